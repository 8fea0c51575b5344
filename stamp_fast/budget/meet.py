"""Budgets that only a measurement can tell: chosen by prediction, measured, corrected, chosen again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

from ..errors import BudgetError
from .budget import Budget, absolute

if TYPE_CHECKING:
    from ..graph import ChannelGraph

_TRIES = 7
_CLOSE = 0.04  # measured again, it may be off by as much once more
PROMISED = 0.1


@dataclasses.dataclass(frozen=True)
class Promise:
    """What was asked for in a unit that is measured, and what came of it.

    Attributes:
        unit: "train_step", "latency" (milliseconds) or "memory" (bytes).
        asked: a fraction of the dense network's, or an amount.
        dense, pruned: measured after the cut, in turns.
        missed_by: measured over asked, less 1: 0.07 is 7 percent more than was asked.
        why: where it is off by over 10 percent, the reason as far as it is known; "" where it was kept.
    """

    unit: str
    asked: float | str
    dense: float
    pruned: float
    missed_by: float
    why: str = ""

    @property
    def kept(self) -> bool:
        """Within 10 percent, either way. Where several asks hold at once, one may be missed for another's sake."""
        return abs(self.missed_by) <= PROMISED


def meet(graph: ChannelGraph, budget: Budget, choose: Callable[[Budget], torch.Tensor], key: Hashable) -> torch.Tensor:
    """What `choose` chooses for the budget that, predicted, gives this one, measured.

    Args:
        budget: in fractions.
        choose: selects by costs that `graph.cost_table` predicts: bool, [num_classes].
        key: of what `choose` goes by besides the budget: the same is answered the same.

    Returns:
        Of the networks that were measured the one that is closest to the budget.

    Raises:
        BudgetError: out of reach.
    """
    met = graph.cost_table.met
    if (budget, key) not in met:
        met[budget, key] = _meet(graph, budget, choose)
    return met[budget, key]


def _meet(graph: ChannelGraph, budget: Budget, choose: Callable[[Budget], torch.Tensor]) -> torch.Tensor:
    asked, units = budget.asked(), budget.measured()
    others = {name: ask for name, ask in asked.items() if name not in units}
    best, closest = graph.all_kept(), math.inf
    below, above = None, None  # (log of the factor on the asks, log of measured over asked) on both sides of the ask
    factor, measured_before = 0.0, set()
    for _ in range(_TRIES):
        try:
            keep = choose(Budget(**asked | {unit: min(1.0, math.exp(factor) * asked[unit]) for unit in units}))
        except BudgetError:
            if below is None and above is None:
                raise
            break  # by prediction there is nothing narrower
        used = math.log(max(graph.cost_table.share(unit, keep) / asked[unit] for unit in units))
        if used < 0 and others and Budget(**others).used(graph, keep) > 1 - _CLOSE:
            return keep  # another unit holds it there
        if abs(used) < closest:
            best, closest = keep, abs(used)
        widths = keep.numpy().tobytes()
        if closest <= _CLOSE or widths in measured_before:
            break
        measured_before.add(widths)
        if used < 0:
            below = (factor, used)
        else:
            above = (factor, used)
        if below and above:
            # Along the line between both, but not so near to one of them that nothing would be learnt.
            way = min(max(-below[1] / (above[1] - below[1]), 0.15), 0.85)
            factor = below[0] + way * (above[0] - below[0])
        else:
            factor -= used
    return best


def promised(budget: Budget, costs: dict[str, tuple[float, float]], why: Callable[[str, float], str]) -> list[Promise]:
    """How the asks turned out.

    Args:
        budget: as the user gave it.
        costs: by unit the dense network's and the pruned one's.
        why: from a unit, and what was asked as a fraction, to what stands in the way of it.
    """
    found = []
    for unit in budget.measured():
        asked, (dense, pruned) = budget.asked()[unit], costs[unit]
        target = absolute(unit, asked) if isinstance(asked, str) else asked * dense
        promise = Promise(unit, asked, dense, pruned, pruned / target - 1)
        found.append(promise if promise.kept else dataclasses.replace(promise, why=why(unit, target / dense)))
    return found
