"""A clock that goes on by what operators run instead of by time, so that measurements can be foretold."""

from torch.utils._python_dispatch import TorchDispatchMode

# Milliseconds. Whatever is not here takes none.
TICKS: dict[str, float] = {
    "convolution": 10,
    "convolution_backward": 20,
    "addmm": 3,
    "mm": 3,
    "bmm": 2,
    "relu": 1,
    "relu_": 1,
    "threshold_backward": 2,
    "mul_": 1,  # of a momentum
}


class Ticking(TorchDispatchMode):
    """While it is on, `now` goes on with every operator, forward or backward.

    Args:
        slowness: what every operator's time is multiplied with.
    """

    def __init__(self, slowness: float = 1.0) -> None:
        super().__init__()
        self.now = 0.0
        self.slowness = slowness

    def perf_counter(self) -> float:
        return self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now += self.slowness * TICKS.get(func.overloadpacket.__name__, 0) / 1000
        return func(*args, **(kwargs or {}))
