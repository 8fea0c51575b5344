"""Composes networks: lists of blocks, some of them with blocks inside. One composer, for hypothesis and for long runs."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

from . import gates, layers, shapes  # noqa: F401  (they register their blocks)
from .spec import KINDS, NESTING, Block, Network

__all__ = ["networks", "random_network"]

_SIMPLE = sorted(KINDS.keys() - NESTING)
_NESTING = sorted(NESTING)
_Draw = Callable[[int], int]  # a number from 0 to below its argument


def _block(below: _Draw, depth: int) -> Block:
    nested = depth > 0 and below(4) == 3
    kind = _NESTING[below(len(_NESTING))] if nested else _SIMPLE[below(len(_SIMPLE))]
    # 720720 has every number up to 16 as a divisor: all choices are equally likely.
    numbers = tuple(below(720720) for _ in range(6))
    children = tuple(_block(below, depth - 1) for _ in range(1 + below(3))) if nested else ()
    return Block(kind, numbers, children)


def compose(below: _Draw) -> Network:
    return Network(
        blocks=tuple(_block(below, 2) for _ in range(1 + below(6))),
        width=(8, 6, 12, 4, 9, 16)[below(6)],
        head=below(8),
        second_input=int(below(4) == 3),
        seed=below(2**16),
    )


def random_network(seed: int, index: int) -> Network:
    """The network of that index in the long run with that seed."""
    return compose(random.Random(f"{seed} {index}").randrange)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    return compose(lambda n: draw(st.integers(0, n - 1)))
