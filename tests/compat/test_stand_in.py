"""``import mamba_ssm`` and ``import causal_conv1d`` where these are missing, broken and there, in other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import TIMEOUT, start

from mamba2_hf import compat
from mamba2_hf.compat import stand_in
from mamba2_hf.errors import ArgumentError

pytestmark = TIMEOUT

MEGATRON = """
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
"""


def run(folder: Path, code: str) -> tuple[Any, str]:
    """What the last expression of ``code`` is, as JSON, and what was said meanwhile. Packages may lie in the folder."""
    *lines, last = code.strip().splitlines()
    script = folder / "script.py"
    script.write_text(
        "\n".join(["import json, sys, mamba2_hf", *lines, f"print(json.dumps({last}))"]), encoding="utf-8"
    )
    well, (said,) = start(script, 1, folder)
    assert well, said
    *before, result = said.splitlines()
    return json.loads(result), "\n".join(before)


def test_missing_packages(tmp_path: Path) -> None:
    """They answer with their names, versions and metadata, and say so once; what is not served cannot be imported."""
    code = f"""
told = mamba2_hf.compat.install(), mamba2_hf.compat.install()
{MEGATRON}
import mamba_ssm, causal_conv1d, importlib.metadata, importlib.util
from mamba_ssm import Mamba2, MambaLMHeadModel
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from transformers.utils.import_utils import _is_package_available
def refused(statement):
    try:
        exec(statement)
    except ImportError as error:
        return type(error).__name__
mamba1 = [refused(f"from mamba_ssm import {{name}}") for name in ("Mamba", "Mamba3", "selective_scan_fn")]
mamba1.append(refused("import mamba_ssm.ops.selective_scan_interface"))
mamba1.append(refused("import causal_conv1d_cuda"))
same = Mamba2 is mamba2_hf.compat.Mamba2 and causal_conv1d.causal_conv1d_fn is causal_conv1d_fn
versions = [importlib.metadata.version(name) for name in ("mamba-ssm", "mamba_ssm", "causal-conv1d")]
versions += [mamba_ssm.__version__, mamba_ssm.ops.triton.ssd_combined.__spec__.origin, hasattr(mamba_ssm, "Mamba")]
[told, mamba1, same, versions, _is_package_available("mamba_ssm")]
"""
    (told, refusals, same, versions, available), said = run(tmp_path, code)
    both = {"mamba_ssm": "mamba2_hf", "causal_conv1d": "mamba2_hf"}
    assert told == [both, both]
    assert refusals == ["ImportError"] * 3 + ["ModuleNotFoundError"] * 2
    assert same
    assert versions == ["2.3.2+mamba2.hf"] * 2 + ["1.6.1+mamba2.hf", "2.3.2+mamba2.hf", "mamba2_hf.compat", False]
    assert available[0]
    assert said.count("mamba_ssm cannot be imported here") == said.count("causal_conv1d cannot be imported here") == 1


def test_packages_that_work_and_that_fail(tmp_path: Path) -> None:
    """One that works is left alone; one that is there and fails counts as missing."""
    for name, content in (("mamba_ssm", "number = 7"), ("causal_conv1d", "raise OSError('undefined symbol')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content, encoding="utf-8")
    code = """
told = mamba2_hf.compat.install()
import mamba_ssm, causal_conv1d
[told, mamba_ssm.number, causal_conv1d.__version__]
"""
    (told, number, version), said = run(tmp_path, code)
    assert told == {"mamba_ssm": "itself", "causal_conv1d": "mamba2_hf"}
    assert number == 7
    assert version.startswith("1.6.1")
    assert "mamba_ssm" not in said


def test_it_ends_when_told_to(tmp_path: Path) -> None:
    code = """
mamba2_hf.compat.install("causal_conv1d")
import causal_conv1d
told = mamba2_hf.compat.install(undo=True)
try:
    import causal_conv1d.causal_conv1d_varlen
    ended = False
except ImportError:
    ended = True
[told, ended, "causal_conv1d" in sys.modules]
"""
    found, _ = run(tmp_path, code)
    assert found == [{"mamba_ssm": "nobody", "causal_conv1d": "nobody"}, True, False]


def test_stock_classes_pick_it_up(tmp_path: Path) -> None:
    """Those that are imported after it, as with the real packages."""
    code = """
mamba2_hf.compat.install()
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Model
config = Mamba2Config(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8)
model, ids = Mamba2Model(config).eval(), torch.arange(12)[None]
seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
alone = torch.cat([model(part, use_cache=False)[0] for part in ids.split([5, 7], 1)], 1)
(model(ids, use_cache=False, seq_idx=seq_idx)[0] - alone).abs().max().item()
"""
    difference, said = run(tmp_path, code)
    assert difference < 1e-5
    assert "falling back" not in said


def test_other_packages_are_not_answered_for() -> None:
    with pytest.raises(ArgumentError, match="'flash_attn'; there are: mamba_ssm, causal_conv1d"):
        compat.install("flash_attn")


def test_every_name_that_is_served_is_public() -> None:
    public = {id(getattr(compat, name)) for name in compat.__all__}
    served = {id(value) for names in stand_in._SERVED.values() for value in names.values()}
    assert served == public - {id(compat.install), id(compat.use_with_transformers)}
