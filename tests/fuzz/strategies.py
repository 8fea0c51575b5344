"""Composes networks: lists of blocks, some with blocks inside. One composer, for hypothesis and for long runs."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

from . import gates, layers, shapes  # noqa: F401  (they register their blocks)
from .spec import KINDS, NESTING, PLAIN, Block, Network

__all__ = ["networks", "random_network"]

_Draw = Callable[[int], int]  # a number from 0 to below its argument


def _block(below: _Draw, kinds: set[str], depth: int) -> Block:
    nested = depth > 0 and below(4) == 3
    fitting = sorted(kinds & NESTING if nested else kinds - NESTING)
    kind = fitting[below(len(fitting))]
    # 720720 has every number up to 16 as a divisor: all choices are equally likely.
    numbers = tuple(below(720720) for _ in range(6))
    children = tuple(_block(below, kinds, depth - 1) for _ in range(1 + below(3))) if nested else ()
    return Block(kind, numbers, children)


def compose(below: _Draw) -> Network:
    # One in five can be masked by hand.
    kinds = PLAIN if below(5) == 4 else set(KINDS)
    return Network(
        blocks=tuple(_block(below, kinds, 2) for _ in range(1 + below(6))),
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
