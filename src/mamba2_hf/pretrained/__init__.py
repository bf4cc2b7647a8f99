"""Models that ship inside the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SHIPPED", "shipped_model_path"]

SHIPPED = {"mamba2": "mamba2-tiny-python", "hybrid": "mamba2-hybrid-tiny-python"}
"""Short names of the models, and their folders."""


def shipped_model_path(name: str = "mamba2") -> Path:
    """Folder of a model that ships in the package, in the layout that ``from_pretrained`` reads.

    ``mamba2`` is a Mamba-2, ``hybrid`` one with attention in one of its layers, both of under four million parameters
    and trained on the source of Python's standard library; the ``README.md`` in a folder is its model card. Nothing is
    downloaded::

        path = shipped_model_path()
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)

    Args:
        name: which model, by a key or a value of ``SHIPPED``.

    Raises:
        ValueError: no model of that name ships; the message lists those that do.
    """
    folder = SHIPPED.get(name, name)
    if folder not in SHIPPED.values():
        known = ", ".join(f"{short} ({long})" for short, long in SHIPPED.items())
        raise ValueError(f"no model named {name!r} ships in this package; those that do: {known}")
    return Path(__file__).parent / folder
