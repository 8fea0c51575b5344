"""What every test shares: tolerances, one thread count, and memory that is never zero by luck."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; read when they are first imported
    os.environ["TRITON_INTERPRET"] = "1"

# (rtol, atol) for a result that differs from its reference only by the order of sums.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 1e-3),
}


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seeds, fixes the number of threads, and fills `torch.empty` with NaN, also inside native operators."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_close():
    """`assert_close(actual, expected)` at the table's tolerance; shapes and dtypes must be equal too."""

    def check(actual: torch.Tensor, expected: torch.Tensor, *, check_stride: bool = True) -> None:
        rtol, atol = TOLERANCES[expected.dtype]
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_stride=check_stride)

    return check
