"""Holds the smaller network to the masked dense one; where they differ, finds the group at fault."""

from __future__ import annotations

import bisect
import math
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .errors import CompactionError, TraceError
from .graph import ChannelGraph
from .graph._record import _output_tensors
from .graph._snapshot import Snapshot
from .graph._verify import difference, masked_output

_ATTEMPTS = 3
_ROUNDING = 16  # machine epsilons


class Verification:
    """What the masked dense network gives for some examples, taken before the cut.

    Attributes:
        error: largest difference of the smaller network's output, relative to the largest value; None if not compared.
        skipped: why it was not compared; "" where it was.
    """

    def __init__(self, graph: ChannelGraph, keep: torch.Tensor, inputs: Any) -> None:
        self.error: float | None = None
        self.skipped = ""
        self._graph, self._keep, self._inputs = graph, keep, inputs
        self._tolerance = _tolerance(graph.slots[0].tensor)
        try:
            self._expected = masked_output(graph, keep, inputs)
        except TraceError:
            self.skipped = "the forward runs other operators than its trace"
            return
        if not any(t.numel() for t in _output_tensors(self._expected)):
            self.skipped = "the output for the first examples is empty"

    def compare(self, dense: Snapshot) -> bool:
        """Compares the network as it is now; the dense one is put back where they differ.

        Returns:
            False where even the dense network does not repeat itself, so that nothing can be compared: to be cut anew.

        Raises:
            CompactionError: they differ; names the group at fault.
        """
        if self.skipped:
            return True
        self.error = _difference(self._graph.output(self._inputs), self._expected)
        if self.error < self._tolerance:
            return True
        self._restore(dense)
        if self._is_unstable():
            self.error, self.skipped = None, "the forward is random, or its output jumps with rounding"
            return False
        raise self._failure()

    def _is_unstable(self) -> bool:
        """Whether rounding errors in parameters and inputs, or other random numbers, change the masked output, too."""
        dense = Snapshot(self._graph.model, copy_values=True)
        try:
            for seed in range(_ATTEMPTS):
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter in self._graph.model.parameters():
                        parameter.copy_(_rounded(parameter))
                again = masked_output(self._graph, self._keep, tree_map(_rounded, self._inputs))
                if not _difference(again, self._expected) < self._tolerance:
                    return True
            return False
        finally:
            dense.restore()

    def _failure(self) -> CompactionError:
        cut = self._graph.cut_groups(self._keep)
        # The group with which cutting the first k is wrong, while cutting k - 1 is right.
        culprit = cut[bisect.bisect_left(range(1, len(cut)), True, key=lambda k: self._differs(cut[:k]))]
        group = self._graph.groups[culprit]
        left = round(group.channels * self._keep[group.classes].float().mean().item())
        reason = f"cut from {group.channels} to {left} channels, it differs from its masked self"
        return CompactionError(
            f"prune: '{group.name}': {reason}; the whole output is off by {self.error:.1e} (relative). The forward "
            "depends on that width in a way that was not seen. The model is unchanged; add the layer to keep=.",
            (culprit,),
            reason,
        )

    def _differs(self, groups: list[int]) -> bool:
        partial = self._graph.cut_only(self._keep, groups)
        expected = masked_output(self._graph, partial, self._inputs)
        dense = Snapshot(self._graph.model)
        try:
            self._graph.compact(partial)
            return not _difference(self._graph.output(self._inputs), expected) < self._tolerance
        except CompactionError:
            return True
        finally:
            self._restore(dense)

    def _restore(self, dense: Snapshot) -> None:
        dense.restore()
        self._graph._compacted = None


def _tolerance(parameter: torch.Tensor) -> float:
    """Largest relative difference between the smaller and the masked dense network."""
    if parameter.dtype == torch.float64:
        return 1e-6
    if parameter.dtype == torch.float32:
        return 1e-4 if parameter.device.type == "cpu" else 1e-3  # a GPU may multiply in TF32
    return 0.2


def _difference(output: Any, expected: Any) -> float:
    shapes = [[t.shape for t in _output_tensors(value)] for value in (output, expected)]
    return difference(output, expected) if shapes[0] == shapes[1] else math.inf


def _rounded(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value * (1 + _ROUNDING * torch.finfo(value.dtype).eps * torch.randn_like(value))
    return value
