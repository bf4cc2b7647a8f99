"""What ``test_accelerate.py`` has ``accelerate launch`` start, in every process; not collected by pytest.

On a CPU accelerate knows FSDP2's plugin and prepares models with it, but never turns it on. Here it is told that the
processes' devices are of a kind that it shards on; everything after that is its own.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from distributed_worker import FP32, IDS, dtypes_inside, make_hybrid, make_model
from torch.distributed.fsdp import FSDPModule

STEPS, RATE = 3, 1e-2


def reference(model: Any) -> list[float]:
    """Losses of one process that sees the whole batch, in fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    curve = []
    for _ in range(STEPS):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def trained(accelerator: Accelerator, model: Any) -> dict[str, Any]:
    """The same through accelerate, each process with its part; and what was seen on the way."""
    plain = copy.deepcopy(model).eval()
    model.train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=RATE))
    mine = IDS.chunk(accelerator.num_processes)[accelerator.process_index]
    curve = []
    with dtypes_inside(model) as seen:
        for _ in range(STEPS):
            loss = model(input_ids=mine, labels=mine).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(accelerator.reduce(loss.detach().float(), "mean").item())
    gathered = accelerator.get_state_dict(model)
    result: dict[str, Any] = {
        "kind": str(accelerator.distributed_type),
        "sharded": isinstance(accelerator.unwrap_model(model).backbone.layers[0], FSDPModule),
        "curve": curve,
        "dtypes": {name: str(dtype) for name, dtype in seen.items()},
        "fp32": sorted(name for name in seen if name in FP32),
        "masters": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }
    if accelerator.is_main_process:
        plain.load_state_dict(gathered)
        result["final"] = plain(IDS, labels=IDS).loss.item()
    return result


def let_fsdp_run_on_a_cpu() -> None:
    make_state = PartialState.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        make_state(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    PartialState.__init__ = make


MODELS = {"pure": make_model, "hybrid": make_hybrid}


def main() -> None:
    folder, kind, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if kind == "fsdp":
        let_fsdp_run_on_a_cpu()
    state = PartialState(cpu=True)
    if what == "pretrain":
        import pretrain

        pretrain.app(sys.argv[4:], standalone_mode=False)
        return
    # One model per process: the plugin keeps the classes to wrap of the first.
    make = MODELS[what]
    found = {"expected": reference(make().train()), **trained(Accelerator(cpu=True), make())}
    (folder / f"{state.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
