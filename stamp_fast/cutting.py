"""From scores to the smaller network: chosen, replayed, cut, compared. The same for all that prunes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .budget import Budget, RoundTo, checked_scores, meet
from .errors import CompactionError
from .graph import ChannelGraph
from .graph._snapshot import Snapshot
from .methods import Ranking
from .reconstruct import reconstruct
from .verify import Verification


def select_and_cut(
    graph: ChannelGraph,
    ranked: Ranking,
    budget: Budget,
    round_to: RoundTo,
    optimizer: Any,
    strict: bool,
    folds: Any,
    examples: Any,
    phases: Callable[[str], AbstractContextManager],
    ema: nn.Module | None = None,
) -> tuple[torch.Tensor, Verification | None]:
    """Cuts what the scores and the budget say; a group that turns out to be fixed is kept and the rest chosen anew.

    Args:
        strict: a fixed group is an error.
        folds: inputs that what goes is folded into what stays on; None leaves that out.
        examples: inputs that the smaller network is compared with the masked dense one on; None leaves that out.
        phases: what is being done, by name.

    Returns:
        What stayed, and the comparison.
    """
    if folds is not None:
        with phases("cut"):
            reconstruct(graph, chosen(graph, ranked, budget, round_to, strict), folds)
    while True:
        with phases("cut"):
            kept = _select(graph, ranked, budget, round_to)
        verified = None
        if examples is not None:
            with phases("verify"):
                verified = Verification(graph, kept, examples)
        try:
            with phases("cut"):
                dense = Snapshot(graph.model, optimizer, ema)
                graph.compact(kept, optimizer, ema)
        except CompactionError as fixed:
            _keep_fixed(graph, fixed, strict)
            continue
        if verified is not None:
            with phases("verify"):
                if not verified.compare(dense):
                    graph.compact(kept, optimizer, ema)
        return kept, verified


def _select(graph: ChannelGraph, ranked: Ranking, budget: Budget, round_to: RoundTo) -> torch.Tensor:
    if ranked.keep is not None:
        return ranked.keep
    options = {"ranking": ranked.ranking, "round_to": round_to, "floor": ranked.floor, "exact": ranked.exact}

    def choose(budget: Budget) -> torch.Tensor:
        return graph.select(ranked.scores, budget, **options)

    if not budget.measured():
        return choose(budget)
    scores = checked_scores(graph, ranked.scores, ranked.ranking, round_to)
    key = scores.numpy().tobytes(), str(options), tuple(group.reason for group in graph.groups)
    return meet(graph, budget, choose, key)


def chosen(graph: ChannelGraph, ranked: Ranking, budget: Budget, round_to: RoundTo, strict: bool) -> torch.Tensor:
    """What stays, after a replay: what is trained or folded for one choice needs it to be the last."""
    while True:
        kept = _select(graph, ranked, budget, round_to)
        try:
            graph.check(kept)
            return kept
        except CompactionError as fixed:
            _keep_fixed(graph, fixed, strict)


def _keep_fixed(graph: ChannelGraph, fixed: CompactionError, strict: bool) -> None:
    if strict or not fixed.groups:
        raise fixed
    graph.keep_groups(fixed.groups, fixed.reason)
