"""Makes what is in the folders beside this file importable: `from speed.timing import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
