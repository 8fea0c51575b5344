"""What a random network is made of: a small, printable description, and the blocks it may name.

A description is always valid: numbers are choices among what fits, and a block that fits nowhere is left out. So any
part of one can be dropped or lowered while a failure is being shrunk, and `repr` of one is its reproduction.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "NESTING", "PLAIN", "Block", "Draw", "Network", "Part", "block", "build"]

_LARGEST = 6000  # elements of one example's activation


class Block(NamedTuple):
    """A part of a network: its kind, the numbers that make its choices, and the blocks inside it."""

    kind: str
    numbers: tuple[int, ...] = ()
    children: tuple[Block, ...] = ()


class Network(NamedTuple):
    """Stem, blocks, and a head; `seed` makes the parameters, the inputs and which channels go."""

    blocks: tuple[Block, ...]
    width: int = 8
    head: int = 0
    second_input: int = 0
    seed: int = 0


class Part(nn.Module):
    """One block: `run(self, x)` over the given modules, parameters, buffers and plain attributes."""

    def __init__(self, run: Callable[[Any, Tensor], Any], /, **parts: Any) -> None:
        super().__init__()
        self.run = run
        used = _names(run)
        for name, part in parts.items():
            if isinstance(part, (nn.Module, Tensor)) and name not in used:
                continue  # a parameter that nothing uses would only cost time
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _names(value: Any) -> set[str]:
    """Every attribute that a function names, the functions in its closure included."""
    found: set[str] = set()
    if isinstance(value, types.FunctionType):
        found = _names(value.__code__).union(*(_names(cell.cell_contents) for cell in value.__closure__ or ()))
    elif isinstance(value, types.CodeType):
        found = set(value.co_names).union(*map(_names, value.co_consts))
    return found


class Draw:
    """What a block is made from: an example of its input (2, C, H, W) and numbers to choose by."""

    def __init__(self, spec: Block, example: Tensor) -> None:
        self.example = example
        self.channels, self.height, self.width = example.shape[1:]
        self.children = spec.children
        self._numbers = iter(spec.numbers)

    def pick(self, *options: Any) -> Any:
        return options[next(self._numbers, 0) % len(options)]

    def flag(self) -> bool:
        return self.pick(False, True)

    def outputs(self) -> int:
        """A number of output channels."""
        return self.pick(8, 6, 12, 4, 9, 16, self.channels)

    def divisor(self, of: int | None = None, least: int = 2) -> int | None:
        """A divisor of the number of channels; None if there is none that large."""
        of = self.channels if of is None else of
        found = [n for n in range(least, of + 1) if of % n == 0]
        return self.pick(*found) if found else None

    def chain(self, children: tuple[Block, ...] | None = None) -> tuple[nn.Module, tuple[int, ...]]:
        """The blocks inside, one after the other, and the shape (C, H, W) that they give."""
        module, result = chain(self.children if children is None else children, self.example)
        return module, tuple(result.shape[1:])

    def fitting_chain(self, children: tuple[Block, ...] | None = None) -> nn.Module:
        """The blocks inside, with a convolution behind where they change the shape."""
        module, (channels, height, width) = self.chain(children)
        if (channels, height, width) == tuple(self.example.shape[1:]):
            return module
        return nn.Sequential(
            module, nn.AdaptiveAvgPool2d((self.height, self.width)), nn.Conv2d(channels, self.channels, 1).double()
        )


Maker = Callable[[Draw], nn.Module | None]
KINDS: dict[str, Maker] = {}
PLAIN: set[str] = set()  # only modules of torch.nn sum over channels there: can be masked by hand
NESTING: set[str] = set()


def block(kind: str, *, plain: bool = False, nesting: bool = False) -> Callable[[Maker], Maker]:
    """Registers what makes blocks of one kind, or None where the input does not fit."""

    def add(maker: Maker) -> Maker:
        KINDS[kind] = maker
        if plain:
            PLAIN.add(kind)
        if nesting:
            NESTING.add(kind)
        return maker

    return add


def chain(blocks: tuple[Block, ...], example: Tensor) -> tuple[nn.Sequential, Tensor]:
    modules = nn.Sequential()
    for i, spec in enumerate(blocks):
        part = KINDS[spec.kind](Draw(spec, example))
        if part is None:
            continue
        part = part.double().eval()
        with torch.no_grad():
            result = part(example.clone())
        if result[0].numel() > _LARGEST or min(result.shape[2:]) < 1:
            continue
        modules.add_module(f"{spec.kind}{i}", part)
        example = result
    return modules, example


class _Whole(nn.Module):
    """Stem, body, head. Head 5 gives out the features as well, in a dict; head 6 the features alone."""

    def __init__(self, spec: Network, example: Tensor) -> None:
        super().__init__()
        self.kind = spec.head % 8
        self.stem = nn.Conv2d(3, spec.width, 3, padding=1).double()
        with torch.no_grad():
            features = self.stem(example)
            if spec.second_input:
                self.side = nn.Linear(5, 2 * spec.width).double()
            self.body, features = chain(spec.blocks, features)
        channels = features.shape[1]
        if self.kind in (2, 3):
            self.head = nn.Linear(features[0].numel(), 5).double()
        elif self.kind == 4:
            self.head = nn.Conv2d(channels, 3, 1).double()
        elif self.kind != 6:
            self.head = nn.Linear(channels, 5).double()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Any:
        x = torch.relu(self.stem(x))
        if condition is not None:
            scale, shift = self.side(condition)[:, :, None, None].chunk(2, 1)
            x = x * scale + shift
        x = self.body(x)
        match self.kind:
            case 1:
                return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
            case 2:
                return self.head(x.flatten(1))
            case 3:
                return self.head(x.reshape(x.shape[0], -1))
            case 4:
                return self.head(x)
            case 5:
                return {"features": [x], "logits": self.head(x.mean((2, 3)))}
            case 6:
                return x
            case 7:
                return self.head(x.amax((2, 3))), x.mean(1)
        return self.head(x.mean((2, 3)))


def build(spec: Network) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network in float64 and eval mode, with torch's own initial values, and inputs for it (batch of 3)."""
    generator = torch.Generator().manual_seed(spec.seed)
    height, width = ((6, 6), (8, 6), (6, 8), (7, 5))[spec.seed % 4]
    x = torch.randn(3, 3, height, width, generator=generator, dtype=torch.float64)
    net = _Whole(spec, x[:2]).eval()
    if not spec.second_input:
        return net, (x,)
    return net, (x, torch.randn(3, 5, generator=generator, dtype=torch.float64))
