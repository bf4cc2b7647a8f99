"""Looks inside a model while it reads a text, for a person who would rather look than read.

``look`` measures: attention matrices of every head, how long heads remember, how full their states are, which tokens
gate. ``write_page`` draws that as one HTML page that needs no server and no network::

    from mamba2_hf.inspect import look, write_page

    write_page(look(model, "def f(", tokenizer), "page.html")
"""

from __future__ import annotations

from .measure import Inspection, MixerView, look
from .page import write_page

__all__ = ["Inspection", "MixerView", "look", "write_page"]
