"""Where tests run that a GPU runs as well."""

from __future__ import annotations

import pytest

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
