"""Checkpoints: every published Mamba-2 format read, checked, converted and compared."""

from __future__ import annotations

from .adapters import AdapterConversion, convert_adapter
from .checkpoint import Checkpoint, open_checkpoint
from .convert import Conversion, convert
from .formats import FORMATS, Format, detect
from .readers import READERS, Reader, Verdict
from .verify import Verification, verify

__all__ = [
    "FORMATS",
    "READERS",
    "AdapterConversion",
    "Checkpoint",
    "Conversion",
    "Format",
    "Reader",
    "Verdict",
    "Verification",
    "convert",
    "convert_adapter",
    "detect",
    "open_checkpoint",
    "verify",
]
