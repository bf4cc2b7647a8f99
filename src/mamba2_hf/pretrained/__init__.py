"""Models that ship inside the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_model_path"]


def shipped_model_path(name: str = "mamba2-tiny-python") -> Path:
    """Folder of a model that ships in the package, in the layout that ``from_pretrained`` reads.

    ``mamba2-tiny-python`` is a Mamba-2 of under four million parameters, trained on the source of Python's standard
    library; its ``README.md`` is its model card. Nothing is downloaded::

        path = shipped_model_path()
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)

    Args:
        name: which model.

    Raises:
        ValueError: no model of that name ships; the message lists those that do.
    """
    root = Path(__file__).parent
    shipped = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in shipped:
        raise ValueError(
            f"no model named {name!r} ships in this package; those that do: {', '.join(shipped) or 'none'}"
        )
    return root / name
