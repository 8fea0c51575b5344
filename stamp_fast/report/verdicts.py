"""What became of every group of channels, and why."""

from __future__ import annotations

import torch

from ..budget import minimum_width
from ..graph import ChannelGraph
from .report import GroupVerdict


def verdicts(graph: ChannelGraph, kept: torch.Tensor, round_to: int | None, floor: float) -> list[GroupVerdict]:
    """One for each group, prunable or not, and for each layer that belongs to none.

    Args:
        kept: bool, [graph.num_classes]: what was left.
        round_to: as asked of the selection, like `floor`.
    """
    found = []
    for group, layers in zip(graph.groups, graph.layers(), strict=True):
        left = round(group.channels * kept[group.classes].float().mean().item())
        reason = group.reason or ""
        if not reason and left == group.channels:
            reason = minimum_width(group, round_to, floor) or "all its channels rank above the cut"
        found.append(GroupVerdict(group.name, group.channels, left, "kept" if reason else "pruned", reason, layers))
    for group in graph.frozen + graph.unlisted():
        found.append(GroupVerdict(group.name, group.channels, group.channels, "kept", group.reason or ""))
    return found
