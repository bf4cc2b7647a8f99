"""Pretrain a Mamba-2 on text of your own with Trainer: documents streamed and packed, on one device or many.

    python examples/pretrain.py --tiny                                        # a toy, a minute on a CPU
    python examples/pretrain.py --preset 130m --text corpus.jsonl --tokenizer EleutherAI/gpt-neox-20b
    torchrun --nproc_per_node 8 examples/pretrain.py --preset 1.3b --text corpus/ --shard 8 --captured
    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --fsdp_state_dict_type FULL_STATE_DICT --mixed_precision bf16 --num_processes 8 \
        examples/pretrain.py --preset 1.3b --text corpus/ --captured          # the same; its options say how
    torchrun --nproc_per_node 8 examples/pretrain.py --preset 1.3b --text books/ --length 1048576 --batch 1 \
        --context 8 --checkpointing                                           # rows of a million tokens
    python examples/pretrain.py ... --resume                                  # goes on from the last checkpoint

`--shard N` spreads weights and optimizer over groups of N processes (FSDP2); more groups train copies of the model, as
all processes do without it. `--context N` spreads every row over N processes, which pass states to each other, and
weights over all, unless `--shard` says otherwise. `--tensor N`, of all N processes, has each compute some of the heads
of every layer. `--captured` runs a step's forward and backward as a CUDA graph, on one GPU too.

`--text` is a folder of text files or a .jsonl file with a "text" per line; without it, the sources of Python's `email`
package are read. The folder gets `model/`, `loss.csv`, `loss.png` and the checkpoints. Weights are held in fp32 and
multiplied in bf16 on a GPU; `A_log`, `D`, `dt_bias` and the states stay in fp32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from rich.console import Console
from text_data import leave_the_collector_out, packed_rows, plot_losses, shared_arguments, show_progress
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, Mamba2HybridConfig, Mamba2HybridForCausalLM, spread_layers
from mamba2_hf.distributed import tensor_parallel
from mamba2_hf.pretrained import shipped_model_path
from mamba2_hf.training import capture_training

console = Console(stderr=True)
transformers.utils.logging.disable_progress_bar()
app = typer.Typer(add_completion=False)

# Width, depth and peak learning rate: the published sizes, with five times the rate of GPT-3's models of the same
# size, as in "Mamba" (Gu and Dao 2023, arXiv 2312.00752); and a toy.
PRESETS: dict[str, tuple[int, int, float]] = {
    "tiny": (64, 2, 4e-3),
    "130m": (768, 24, 3e-3),
    "370m": (1024, 48, 1.5e-3),
    "780m": (1536, 48, 1.25e-3),
    "1.3b": (2048, 48, 1e-3),
    "2.7b": (2560, 64, 8e-4),
}
EVALUATED_ROWS = 64


@app.command(help=__doc__.partition("\n")[0])
def main(
    preset: Annotated[str, typer.Option(help=f"Size: {', '.join(PRESETS)}.")] = "130m",
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Attention in the place of one layer in ten.")] = False,
    text: Annotated[Path | None, typer.Option(help="A folder of text files, or a .jsonl file.")] = None,
    tokenizer: Annotated[str, typer.Option(help="A folder or a name on the Hub; the shipped one by default.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the model, curves and checkpoints.")] = Path("runs/pretrain"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10_000,
    batch: Annotated[int, typer.Option(help="Rows per step and device.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 2048,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a forward more.")] = False,
    shard: Annotated[int, typer.Option(help="Processes that share one copy of the weights (torchrun).")] = 1,
    context: Annotated[int, typer.Option(help="Processes that share each row (torchrun).")] = 1,
    tensor: Annotated[int, typer.Option(help="Processes that share each layer: all of them (torchrun).")] = 1,
    captured: Annotated[bool, typer.Option("--captured", help="Steps as CUDA graphs.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy and a few short steps, for a first look.")] = False,
) -> None:
    if tiny:
        preset, steps, batch, length = "tiny", 30, 8, 128
    if preset not in PRESETS:
        raise typer.BadParameter(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    words = AutoTokenizer.from_pretrained(tokenizer or str(shipped_model_path()))
    torch.manual_seed(0)
    model = new_model(preset, hybrid, words)
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    def rows(held_out: bool) -> dict[str, Any]:
        return {"source": text, "tokenizer": words, "length": length, "held_out": held_out}

    train = IterableDataset.from_generator(packed_rows, gen_kwargs=rows(False)).shuffle(seed=0, buffer_size=1000)
    held_out = [row for row, _ in zip(packed_rows(**rows(True)), range(EVALUATED_ROWS), strict=False)]
    if not held_out:
        raise typer.BadParameter(f"{text} holds too little text: no row of {length} tokens can be held out")
    arguments = TrainingArguments(
        **shared_arguments(out, steps, batch, PRESETS[preset][2]),
        gradient_accumulation_steps=accumulate,
        weight_decay=0.1,  # Trainer keeps it off A_log, D, dt_bias and the norms
        adam_beta2=0.95,
        prediction_loss_only=True,
        gradient_checkpointing=checkpointing,
        **parallelism(shard, context, tensor),
    )
    if tensor > 1:
        if resume:
            raise typer.BadParameter("--resume: with --tensor there are no optimizer's states to go on from")
        # The arguments' device is where the processes have met.
        tensor_parallel(model, init_device_mesh(arguments.device.type, (tensor,), mesh_dim_names=("tp",)))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=Dataset.from_list(held_out),
        processing_class=words,
    )
    show_progress(trainer, console)
    leave_the_collector_out(trainer)
    step = capture_training(trainer) if captured else None
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if resume else None)
    if step is not None and trainer.is_world_process_zero():
        console.print(f"steps were {f'called, not captured: {step.reason}' if step.reason else 'captured'}")
    trainer.save_model(str(out / "model"))
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, out, console)
        console.print(f"the model is in {out / 'model'}")


def parallelism(shard: int, context: int, tensor: int) -> dict[str, Any]:
    """Arguments of Trainer for FSDP2 over ``shard`` of the processes that torchrun has started, none for one; groups of
    ``context`` of them share rows; or for all of them, ``tensor``, sharing layers.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor > 1:
        if (shard, context) != (1, 1) or tensor != processes:
            raise typer.BadParameter(
                f"--tensor {tensor} of {processes} processes, with --shard {shard} and --context {context}: in Trainer "
                "all processes share the layers, and nothing else. A loop of your own may have all three"
            )
        # Everyone reads all rows, and keeps weights alone: Trainer saves no states of an optimizer of parts.
        return {"accelerator_config": {"dispatch_batches": False}, "save_only_model": True}
    if context > 1 and shard == 1:
        shard = processes
    if shard < 1 or processes % shard:
        raise typer.BadParameter(f"--shard {shard} does not divide the {processes} processes that torchrun has started")
    if context < 1 or shard % context:
        raise typer.BadParameter(f"--context {context} does not divide the {shard} processes that share the weights")
    if shard == 1:
        return {}
    sizes = {"dp_replicate_size": processes // shard, "dp_shard_size": shard // context, "cp_size": context}
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2},
        "parallelism_config": ParallelismConfig(**sizes),
        # Processes that share rows have to read the same ones, and one that deals out rows would give each its own.
        "accelerator_config": {"dispatch_batches": False if context > 1 else None},
    }


def new_model(preset: str, hybrid: bool, tokenizer: Any) -> Any:
    width, depth, _ = PRESETS[preset]
    shared = {
        "vocab_size": -(-len(tokenizer) // 16) * 16,  # a multiple that matrix products like
        "hidden_size": width,
        "num_hidden_layers": depth,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
        "tie_word_embeddings": True,
    }
    if not hybrid:
        return Mamba2ForCausalLM(Mamba2Config(**shared, num_heads=2 * width // 64, head_dim=64, n_groups=1))
    return Mamba2HybridForCausalLM(
        Mamba2HybridConfig(
            **shared,
            layer_blocks=spread_layers(depth),
            **{"ssm_num_heads": 2 * width // 64, "ssm_head_dim": 64, "ssm_n_groups": 1},
            **{"num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 64)},
        )
    )


if __name__ == "__main__":
    app()
