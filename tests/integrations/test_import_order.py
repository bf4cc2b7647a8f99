"""PEFT, Trainer, TRL and pipelines know our models whether they were imported before or after, and know the stock ones
as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

ORDERS = {
    "ours last": "import peft; from transformers import Trainer; import mamba2_hf",
    "ours first; looked for, then imported by two threads": """
import importlib.util, threading
import mamba2_hf
assert importlib.util.find_spec("peft.tuners.tuners_utils") is not None
assert importlib.util.find_spec("transformers.trainer") is not None
threads = [threading.Thread(target=__import__, args=("peft.tuners.tuners_utils",)) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from transformers import Trainer
""",
    "reloaded": """
import importlib
import mamba2_hf.registration, peft.tuners.tuners_utils, transformers.trainer
importlib.reload(mamba2_hf.registration).register()
importlib.reload(peft.tuners.tuners_utils)
Trainer = importlib.reload(transformers.trainer).Trainer
""",
}

SIZES = "vocab_size=13, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8, n_groups=1, state_size=4"
PROGRAM = f"""
import warnings
import transformers
from peft import LoraConfig, get_peft_model
warnings.simplefilter("ignore")
ours = mamba2_hf.Mamba2ForCausalLM(mamba2_hf.Mamba2Config({SIZES}))
stock = transformers.Mamba2ForCausalLM(transformers.Mamba2Config({SIZES}))
for model in (ours, stock):
    decayed = Trainer.get_decay_parameter_names(None, model)
    print([name.rpartition("backbone.")[2] for name in decayed if name.endswith((".A_log", ".D", "norm_f.weight"))])
ours = get_peft_model(ours, LoraConfig(r=2))
print(sum("lora_A.default.weight" in name for name, _ in ours.named_parameters()), "adapters")
for targets in (["out_proj"], ["conv1d"], "all-linear"):
    try:
        get_peft_model(stock, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets))
    except ValueError as error:
        print("refused" if "incompatible with Mamba" in str(error) else error)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports_does_not_matter(order: str, run_python: Callable[..., str]) -> None:
    assert run_python(ORDERS[order] + PROGRAM).splitlines() == [
        "[]",
        "['layers.0.mixer.A_log', 'layers.0.mixer.D', 'norm_f.weight']",
        "2 adapters",
        *["refused"] * 3,
    ]


BY_NAME = f"""
import tempfile, warnings
import transformers
from transformers.pipelines.base import load_model
from trl.trainer.utils import create_model_from_path
warnings.simplefilter("ignore")
for cls, config in ((mamba2_hf.Mamba2ForCausalLM, mamba2_hf.Mamba2Config({SIZES})), (
    mamba2_hf.Mamba2HybridForCausalLM,
    mamba2_hf.Mamba2HybridConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, layer_blocks=["ssd"], ssm_num_heads=2, ssm_head_dim=8
    ),
)):
    with tempfile.TemporaryDirectory() as folder:
        cls(config).save_pretrained(folder)
        loaded = [create_model_from_path(folder, device_map=None)]
        for load in (load_model, transformers.pipelines.load_model):
            loaded.append(load(folder, config=transformers.AutoConfig.from_pretrained(folder)))
        print([type(model) is cls for model in loaded])
        if cls is mamba2_hf.Mamba2ForCausalLM:
            print(type(transformers.Mamba2ForCausalLM.from_pretrained(folder)).__module__)
"""


@pytest.mark.parametrize("first", ["", "import transformers.pipelines, trl.trainer.utils, trl.trainer.sft_trainer\n"])
def test_classes_are_found_by_name_in_any_order(first: str, run_python: Callable[..., str]) -> None:
    assert run_python(first + "import mamba2_hf\n" + BY_NAME).splitlines() == [
        "[True, True, True]",
        "transformers.models.mamba2.modeling_mamba2",
        "[True, True, True]",
    ]
