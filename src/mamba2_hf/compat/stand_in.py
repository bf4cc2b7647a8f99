"""Answers ``import mamba_ssm`` and ``import causal_conv1d`` where these cannot be imported, when asked to."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers.utils import import_utils, logging

from ..errors import ArgumentError
from . import conv, layer_norm, layernorm_gated, lm, mamba2, ssd

logger = logging.get_logger(__name__)

# The releases whose functions these are, by their signatures.
VERSIONS = {"mamba_ssm": "2.3.2+mamba2.hf", "causal_conv1d": "1.6.1+mamba2.hf"}
_CONV = {"causal_conv1d_fn": conv.causal_conv1d_fn, "causal_conv1d_update": conv.causal_conv1d_update}
_SERVED: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"Mamba2": mamba2.Mamba2, "MambaLMHeadModel": lm.MambaLMHeadModel},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": lm.MambaConfig},
    "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": lm.MambaLMHeadModel},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba2": {"Mamba2": mamba2.Mamba2},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": {
        "RMSNorm": layer_norm.RMSNorm,
        "layer_norm_fn": layer_norm.layer_norm_fn,
        "rms_norm_fn": layer_norm.rms_norm_fn,
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        "LayerNorm": layernorm_gated.LayerNorm,
        "RMSNorm": layernorm_gated.RMSNorm,
        "layernorm_fn": layernorm_gated.layernorm_fn,
        "rmsnorm_fn": layernorm_gated.rmsnorm_fn,
    },
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": ssd.selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": ssd.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": ssd.mamba_split_conv1d_scan_combined,
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {"InferenceParams": lm.InferenceParams},
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": conv.causal_conv1d_varlen_states},
}


def install(*packages: str, undo: bool = False) -> dict[str, str]:
    """Answers imports of ``mamba_ssm`` and ``causal_conv1d`` by :mod:`mamba2_hf.compat`, where they cannot be imported.

    A package that is there and fails, as one built for another torch does, counts as missing; one that works is left
    alone. Their names that are not served cannot be imported, so that code with another way out takes it.

    Args:
        packages: which; both if none is named.
        undo: whether to end it: they cannot be imported again, and code that has imported their names keeps them.

    Returns:
        Who answers each: ``"mamba2_hf"``, ``"itself"`` or ``"nobody"``.

    Raises:
        ArgumentError: there is no such package here.
    """
    if unknown := set(packages) - VERSIONS.keys():
        raise ArgumentError(f"packages names {sorted(unknown)[0]!r}; there are: {', '.join(VERSIONS)}")
    return {name: _take_back(name) if undo else _answer(name) for name in packages or VERSIONS}


def _answer(name: str) -> str:
    if name in _finder.serves:
        return "mamba2_hf"
    if _works(name):
        return "itself"
    _finder.serves.add(name)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _forget(name)
    for module in _SERVED:  # so that they are attributes of their packages
        if module.partition(".")[0] == name:
            importlib.import_module(module)
    logger.warning_once(f"{name} cannot be imported here: mamba2_hf.compat answers to its name")
    return "mamba2_hf"


def _take_back(name: str) -> str:
    if name in _finder.serves:
        _finder.serves.remove(name)
        _forget(name)
    return "itself" if _works(name) else "nobody"


def _works(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(name)
    except Exception:  # of any kind: a library that does not load, a version check
        _forget(name)
        return False
    return True


def _forget(name: str) -> None:
    """Drops what was imported under a name, and what others remember of whether it can be."""
    for module in [found for found in sys.modules if found.partition(".")[0] == name]:
        del sys.modules[module]
    importlib.invalidate_caches()
    for check in vars(import_utils).values():
        if hasattr(check, "cache_clear"):
            check.cache_clear()


class _Distribution(importlib.metadata.Distribution):
    """What installers would have written down of a package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {self._package}\nVersion: {VERSIONS[self._package]}\n"

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, loads and describes the packages that are answered for."""

    def __init__(self) -> None:
        self.serves: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.serves or fullname not in _SERVED:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _SERVED)
        return ModuleSpec(fullname, self, origin="mamba2_hf.compat", is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__

        def missing(attribute: str) -> Any:
            raise AttributeError(f"module {name!r} of mamba2_hf.compat has no attribute {attribute!r}")

        module.__doc__ = "Names of mamba2_hf.compat."
        vars(module).update(_SERVED[name], __getattr__=missing)
        if name in VERSIONS:
            vars(module)["__version__"] = VERSIONS[name]

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else context.name.replace("-", "_").lower()
        return [_Distribution(name) for name in sorted(self.serves) if wanted in (None, name)]


_finder = _Finder()
