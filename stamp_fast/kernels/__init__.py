"""Device kernels written in Python. In a checkout they live in the top-level folder `kernels/`."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# The test for setup.py keeps an installed copy from picking up another package named `kernels` beside it.
if (_root / "setup.py").is_file() and (_root / "kernels" / "triton").is_dir():
    __path__.append(str(_root / "kernels"))
