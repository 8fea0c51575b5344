"""Networks to save, pruned, and what it means that one comes back."""

import torch
from torch import Tensor, nn

from stamp_fast import trace

from .networks import Plain, Residual
from .randomise import random_keep, randomise


class Mixed(nn.Module):
    """Concatenation, grouped and depthwise convolutions, tied weights, buffers kept and not kept, GRU, LayerNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, width, 3, padding=1)
        self.right = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.twin1 = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.twin2 = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.twin2.weight = self.twin1.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 2 * width).view(1, -1, 1, 1))
        self.register_buffer("gain", torch.linspace(1, 2, 2 * width).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("steps", torch.arange(5), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.norm = nn.LayerNorm(2 * width)
        self.gru = nn.GRU(2 * width, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        x = torch.relu(self.depthwise(self.grouped(x)))
        x = x + torch.relu(self.twin1(x)) * self.gain
        x = x + torch.relu(self.twin2(x)) + self.shift
        x = self.norm(x.mean((2, 3)))
        return self.head(self.gru(x[:, None])[0][:, -1])


class Sized(nn.Module):
    """Keeps widths in attributes of its own, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 16, [8, 24]
        self.stem = nn.Conv2d(3, 16, 3)
        self.split = nn.Conv2d(16, 32, 1)
        self.small = nn.Conv2d(8, 6, 1)
        self.large = nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x.view(x.shape[0], self.width, x.shape[2], x.shape[3])
        small, large = torch.split(torch.relu(self.split(x)), self.sizes, 1)
        return (self.small(small) + self.large(large)).mean((2, 3))


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


NETWORKS = {"plain": (Plain, 1), "residual": (Residual, 1), "mixed": (Mixed, 3), "sized": (Sized, 3)}


def pruned(make=Residual, channels: int = 1, times: int = 1, seed: int = 0) -> nn.Module:
    model = randomise(make(), seed).eval()
    for i in range(times):
        graph = trace(model, image(channels))
        graph.settle()
        graph.compact(random_keep(graph, i))
    return model


def numbers(module: nn.Module) -> dict:
    return {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, list, tuple, str))}


def tables(module: nn.Module) -> dict:
    return {**module._parameters, **module._buffers}


def assert_same_network(actual: nn.Module, expected: nn.Module) -> None:
    """Bits, strides, dtypes, ties, flags and every number that a module holds."""
    assert type(actual) is type(expected)
    first: dict[int, str] = {}
    others: dict[int, str] = {}
    pairs = zip(actual.named_modules(), expected.named_modules(), strict=True)
    for (name, module), (same_name, other) in pairs:
        assert name == same_name
        skip = ("_flat_weights", "_flat_weight_refs", "_is_torch_compile")
        mine, theirs = ({k: v for k, v in numbers(m).items() if k not in skip} for m in (module, other))
        assert mine == theirs, name
        assert tables(module).keys() == tables(other).keys()
        for key, tensor in tables(module).items():
            wanted = tables(other)[key]
            if wanted is None:
                assert tensor is None
                continue
            assert torch.equal(tensor, wanted), f"{name}.{key}"
            assert (tensor.dtype, tensor.stride(), tensor.requires_grad) == (
                wanted.dtype,
                wanted.stride(),
                wanted.requires_grad,
            ), f"{name}.{key}"
            assert type(tensor) is type(wanted)
            assert first.setdefault(id(tensor), f"{name}.{key}") == others.setdefault(id(wanted), f"{name}.{key}")
