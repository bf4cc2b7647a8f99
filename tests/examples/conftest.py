from __future__ import annotations

import sys
from pathlib import Path

# The examples import each other as scripts do: from the folder that the script is in.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
