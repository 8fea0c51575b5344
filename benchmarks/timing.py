"""Contestants timed in turns, and the ratios between them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Contestant", "Ratio", "Spread", "in_turns", "ratio_of", "spread"]

Samples = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is timed: `run(setup())`, of which only `run` counts."""

    run: Callable[..., Any]
    setup: Callable[[], Any] | None = None

    def seconds(self) -> float:
        arguments = () if self.setup is None else (self.setup(),)
        begin = time.perf_counter()
        self.run(*arguments)
        return time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One contestant's time over another's, and the bar it is held to: `at_least`, `at_most` or neither."""

    top: str
    bottom: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def bar(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclasses.dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Median with the 20th and 80th percentile."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])


def ratio_of(samples: Samples, ratio: Ratio) -> Spread:
    """Ratio of the medians; the percentiles are those of the ratios within each round."""
    top, bottom = samples[ratio.top], samples[ratio.bottom]
    within = spread([a / b for a, b in zip(top, bottom, strict=True)])
    return Spread(statistics.median(top) / statistics.median(bottom), within.p20, within.p80)


def in_turns(contestants: dict[str, Contestant]) -> Callable[[], dict[str, float]]:
    """A function that times every contestant once. Each call starts with the next one: noise and what the
    neighbour leaves in the caches meet all alike.
    """
    order = list(contestants)

    def one_round() -> dict[str, float]:
        seconds = {name: contestants[name].seconds() for name in order}
        order.append(order.pop(0))
        return {name: seconds[name] for name in contestants}

    return one_round
