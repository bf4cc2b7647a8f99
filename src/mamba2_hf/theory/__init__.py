"""The theory around the layer, to be read beside the paper: "Transformers are SSMs" (Dao & Gu 2024, arXiv 2405.21060).

=================== ==================================================== ================
module              what                                                 paper
=================== ==================================================== ================
``lti``             time-invariant systems, discretised, in three forms  Section 2.1
``semiseparable``   the matrices: built, multiplied with, recognised     Sections 3, 6
``attention``       structured masked attention, masks, feature maps     Sections 4, 7.3
``heads``           which of x, B and C heads share                      Section 7.2
``duality``         an SSD layer as attention, and back                  Section 5
=================== ==================================================== ================

Plain PyTorch in any dtype, differentiable, one sequence at a time unless leading axes are named; clarity comes before
speed. ``docs/theory.md`` walks through it. Import it by name (``from mamba2_hf import theory``): the package alone does
not load it.
"""

from __future__ import annotations

from . import attention, duality, heads, lti, semiseparable

__all__ = ["attention", "duality", "heads", "lti", "semiseparable"]
