"""`pytest --benchmark`: the losses against eager PyTorch and other libraries, with the numbers kept as JSON."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# For a copy that is not installed; an installation comes first.
sys.path += [str(ROOT / "kernels"), str(ROOT / "trainer")]
