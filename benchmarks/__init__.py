"""Measurements of Inlay and its peers, run as modules: `python -m benchmarks.speed.steps`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "support")]
