"""Fine-tune a Mamba-2 with LoRA on text of your own: TRL's SFTTrainer, documents packed, adapters saved and merged.

    python examples/finetune_lora.py --tiny                           # the shipped model, a minute on a CPU
    python examples/finetune_lora.py --model ./mamba2-2.7b --text notes/ --qlora --out runs/notes
    python examples/finetune_lora.py ... --resume                     # goes on from the last checkpoint

`--text` is a folder of text files or a .jsonl file with a "text" per line; without it, the sources of Python's `email`
package are read. `--dora` and `--rslora` change the adapter; `--qlora` loads the model in 4 bits (a GPU and
bitsandbytes). Hybrid models work alike. The folder gets `adapter/`, `merged/` (not with --qlora), `loss.csv`,
`loss.png` and the checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from peft import LoraConfig, PeftModel
from rich.console import Console
from text_data import plot_losses, read_texts, shared_arguments, show_progress
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from mamba2_hf.pretrained import shipped_model_path

console = Console(stderr=True)
transformers.utils.logging.disable_progress_bar()
app = typer.Typer(add_completion=False)


@app.command(help=__doc__.partition("\n")[0])
def main(
    model: Annotated[str, typer.Option(help="A folder or a name on the Hub; the shipped model by default.")] = "",
    text: Annotated[Path | None, typer.Option(help="A folder of text files, or a .jsonl file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for adapter, merged model, curves and checkpoints.")] = Path(
        "runs/lora"
    ),
    dora: Annotated[bool, typer.Option("--dora", help="DoRA: magnitudes apart from directions.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="rsLoRA: scaled by the root of the rank.")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="4-bit weights under the adapters; needs a GPU.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Packed rows per step and device.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per packed row.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak.")] = 2e-4,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a forward more.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few short steps, for a first look on a CPU.")] = False,
) -> None:
    if tiny:
        steps, batch, length, learning_rate = 10, 2, 128, 2e-3
    source = model or str(shipped_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, held_out = read_texts(text, tokenizer)
    console.print(f"{len(train)} documents to train on, {len(held_out)} held out")

    config = SFTConfig(
        **shared_arguments(out, steps, batch, learning_rate),
        packing=True,  # documents share rows, and stay apart: their states do not mix
        packing_strategy="bfd_split",  # those longer than a row go into several
        padding_free=True,
        max_length=length,
        gradient_checkpointing=checkpointing,
    )
    trainer = SFTTrainer(
        model=load(source, qlora),
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, use_rslora=rslora
        ),
    )
    show_progress(trainer, console)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if resume else None)
    plot_losses(trainer.state.log_history, out, console)

    trainer.save_model(str(out / "adapter"))
    if not qlora:
        merge(source, out, tokenizer, next(iter(held_out))["input_ids"][:length])


def load(source: str, qlora: bool) -> Any:
    """The model that adapters go on: bf16 on a GPU, fp32 on a CPU, 4 bits where asked for."""
    if not qlora:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if not torch.cuda.is_available():
        raise typer.BadParameter("--qlora computes on a GPU, and PyTorch sees none: leave it out")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise typer.BadParameter("--qlora needs bitsandbytes: pip install bitsandbytes") from None
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=four_bits, dtype=torch.bfloat16)


@torch.no_grad()
def merge(source: str, out: Path, tokenizer: Any, ids: list[int]) -> None:
    """Load the adapter as a user would, merge it, and see that the merged model computes the same, in fp32."""
    rows = torch.tensor([ids])
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    expected = adapted(rows).logits
    adapted.merge_and_unload().save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    error = float((merged(rows).logits - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise RuntimeError(f"the merged model's logits are off by {error:.1e} of the largest")
    console.print(f"merged into {out / 'merged'}: logits equal the adapter's within {error:.0e} of the largest")


if __name__ == "__main__":
    app()
