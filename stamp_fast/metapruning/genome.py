"""One width per channel group: what MetaPruning searches over ("MetaPruning", Liu et al. 2019, arXiv 1903.10258)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._phases import in_mode
from ..budget import Budget, check_round_to
from ..checks import check_model, check_prunable
from ..errors import ArgumentError, CompactionError, ModelError
from ..graph import ChannelGraph, Group, trace

SCALES = tuple((10 + 3 * i) / 100 for i in range(31))  # the paper's code: 0.10, 0.13, ..., 1.00


@dataclasses.dataclass(frozen=True)
class Genome:
    """A width for every gene, each as the index of a scale.

    Attributes:
        ids: one per gene of `space.genes`.
    """

    space: SearchSpace = dataclasses.field(repr=False, compare=False)
    ids: tuple[int, ...]

    @property
    def keep(self) -> torch.Tensor:
        """bool, [num_classes]: the first so many of every group."""
        return self.space.keep(self.ids)

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(self.space.scales[i] for i in self.ids)

    def widths(self) -> dict[str, int]:
        """Channels that stay, by the name of the group."""
        counts = self.space.counts(self.ids)
        return {group.name: round(count * group.channels / group.num_classes) for group, count in counts}

    def macs(self) -> int:
        """Multiply-accumulates of a forward of one example."""
        return self.space.graph.macs(self.keep)

    def params(self) -> int:
        return self.space.graph.params(self.keep)

    def build(self, init: Callable[[nn.Module], Any] | None = None) -> nn.Module:
        """An ordinary network of these widths with fresh weights, to be trained from scratch.

        See `SearchSpace.fresh`.
        """
        return self.space.fresh(self.keep, init)

    def to_json(self) -> str:
        """With the widths, for people; `SearchSpace.from_json` reads it."""
        return json.dumps({"ids": self.ids, "widths": self.widths(), "macs": self.macs(), "params": self.params()})


class SearchSpace:
    """All widths of a network's channel groups.

    Which layers have to be equally wide comes from the channel graph, so that residual streams have one width.

    Args:
        model: the widest network. It is copied; pruned later it makes no difference here.
        example: what a forward takes; the first dim is the batch.
        keep: names of groups whose channels all stay, as `trace(model, example).groups` has them.
        scales: fractions of a group that can stay, ascending, the last 1. Widths are rounded down, to 1 at least.
        round_to: widths are rounded down to multiples of it, the least is it.
        tied: lists of names of groups that share a gene, and so a scale.

    Attributes:
        genes: the groups of each; one where `tied` does not say otherwise.
        graph: of the widest network.

    Raises:
        StampFastError: what `trace` raises; an argument that cannot be; nothing can be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        keep: Collection[str] = (),
        scales: Sequence[float] = SCALES,
        round_to: int | None = None,
        tied: Sequence[Collection[str]] = (),
    ) -> None:
        check_model(model)
        check_round_to(round_to)
        if list(scales) != sorted(set(scales)) or not scales or not 0 < scales[0] <= scales[-1] == 1:
            raise ArgumentError(f"scales: must be fractions above 0 in ascending order, the last 1, got {scales!r}")
        self.scales, self.round_to = tuple(scales), round_to or 1
        self._example, self._kept = example, tuple(keep)
        self.graph = self._traced(copy.deepcopy(model).train())
        check_prunable(self.graph)
        self._fix_what_cannot_follow()
        self.genes: list[list[Group]] = self._genes(tied)
        self._counts = {
            group.name: [self._count(group, scale) for scale in self.scales] for gene in self.genes for group in gene
        }

    def _traced(self, model: nn.Module) -> ChannelGraph:
        with in_mode(model, training=False):
            graph = trace(model, self._example)
            graph.settle()
        names = [group.name for group in graph.groups]
        unknown = [name for name in self._kept if name not in names]
        if unknown:
            raise ArgumentError(f"keep: there is no group {', '.join(unknown)}; the groups are {', '.join(names)}")
        graph.keep_groups([names.index(name) for name in self._kept], "kept on request")
        return graph

    def _fix_what_cannot_follow(self) -> None:
        """Keeps groups without which narrow networks do not run as predicted."""
        draw = random.Random(0)
        trials = 0
        while trials < 4:
            check_prunable(self.graph)
            keep = self.graph.all_kept()
            for group in self.graph.prunable:
                scale = self.scales[0] if trials == 0 else draw.choice(self.scales)
                keep[group.classes.start + self._count(group, scale) : group.classes.stop] = False
            try:
                self.graph.check(keep)
            except CompactionError as fixed:
                if not fixed.groups:
                    raise
                self.graph.keep_groups(fixed.groups, fixed.reason)
                continue
            trials += 1

    def _genes(self, tied: Sequence[Collection[str]]) -> list[list[Group]]:
        """In the order of their first groups."""
        by_name = {group.name: group for group in self.graph.prunable}
        together: dict[str, list[Group]] = {}
        for names in tied:
            unknown = [name for name in names if name not in by_name]
            if isinstance(names, str) or unknown or any(name in together for name in names):
                raise ArgumentError(
                    f"tied: expected lists of groups, each in one list at most, got {names!r}; the groups are "
                    f"{', '.join(by_name)}"
                )
            gene = [by_name[name] for name in by_name if name in names]
            together |= dict.fromkeys(names, gene)
        genes: list[list[Group]] = []
        for name, group in by_name.items():
            gene = together.get(name, [group])
            if gene[0] is group:
                genes.append(gene)
        return genes

    def _count(self, group: Group, scale: float) -> int:
        """Classes that stay at a scale."""
        # In ints as far as it goes: 0.29 * 100 is 28.999999999999996.
        classes = round(scale * 10**6) * group.num_classes // 10**6
        together = max(1, round(group.channels / group.num_classes))  # channels that go with one class
        unit = min(self.round_to // math.gcd(self.round_to, together), group.num_classes)
        return max(unit, classes // unit * unit)

    def counts(self, ids: Sequence[int]) -> list[tuple[Group, int]]:
        """Classes that stay in every group."""
        return [(group, self._counts[group.name][i]) for gene, i in zip(self.genes, ids, strict=True) for group in gene]

    def keep(self, ids: Sequence[int]) -> torch.Tensor:
        """bool, [num_classes]: the first so many of every group."""
        keep = self.graph.all_kept()
        for group, count in self.counts(ids):
            keep[group.classes.start + count : group.classes.stop] = False
        return keep

    # --- genomes ------------------------------------------------------------------------------------------------------
    def genome(self, ids: Sequence[int]) -> Genome:
        """
        Raises:
            ArgumentError: not one index of a scale per gene.
        """
        ids = tuple(ids)
        if len(ids) != len(self.genes):
            raise ArgumentError(f"ids: needs one for each of {len(self.genes)} genes, got {len(ids)}")
        for gene, i in zip(self.genes, ids, strict=True):
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(self.scales):
                raise ArgumentError(
                    f"ids: that of '{gene[0].name}' must be a whole number from 0 to {len(self.scales) - 1}, got {i!r}"
                )
        return Genome(self, ids)

    def from_json(self, text: str) -> Genome:
        """A genome of this space, from `Genome.to_json`.

        Raises:
            ArgumentError: no such text, or of another space.
        """
        try:
            fields = json.loads(text)
            genome = self.genome(fields["ids"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"genome: not from Genome.to_json: {error}") from error
        if fields.get("widths", genome.widths()) != genome.widths():
            raise ArgumentError("genome: is of another search space: its widths differ")
        return genome

    def random(self, draw: random.Random) -> Genome:
        """Every gene uniform over all scales."""
        return Genome(self, tuple(draw.randrange(len(self.scales)) for _ in self.genes))

    @property
    def largest(self) -> Genome:
        return Genome(self, (len(self.scales) - 1,) * len(self.genes))

    @property
    def smallest(self) -> Genome:
        return Genome(self, (0,) * len(self.genes))

    def uniform(self, budget: Budget) -> Genome:
        """The widest of the networks with one scale for all groups that meets the budget.

        Raises:
            BudgetError: none does.
        """
        for i in reversed(range(len(self.scales))):
            genome = Genome(self, (i,) * len(self.genes))
            if budget.used(self.graph, genome.keep) <= 1:
                return genome
        raise budget.out_of_reach(self.graph, self.smallest.keep)

    # --- networks -----------------------------------------------------------------------------------------------------
    def fresh(self, keep: torch.Tensor, init: Callable[[nn.Module], Any] | None = None) -> nn.Module:
        """An ordinary network of the widths of `keep` with fresh weights.

        Every module's `reset_parameters` draws them from torch's global generator. Parameters of modules without it,
        and of modules where one is frozen, are those of the dense model, cropped.

        Args:
            init: given each module afterwards, as by `nn.Module.apply`: for networks with an initialisation of their
                own.

        Raises:
            CompactionError: such a network does not run as predicted; nothing is lost.
            ModelError: a parametrized layer that cannot be given weights.
        """
        model = self.built(keep)
        draw_weights(model)
        return model if init is None else model.apply(init)

    def built(self, keep: torch.Tensor) -> nn.Module:
        """A copy of the widest network, with its weights, cut."""
        model = copy.deepcopy(self.graph.model)
        graph = self._traced(model)
        graph.keep_groups(
            [i for i, group in enumerate(self.graph.groups) if group.reason is not None], "kept by the search space"
        )
        return graph.compact(keep)

    def signature(self) -> str:
        """What tells this space from others."""
        genes = [[[group.name, group.channels, group.num_classes] for group in gene] for gene in self.genes]
        return json.dumps({"genes": genes, "scales": self.scales, "round_to": self.round_to})

    def __repr__(self) -> str:
        kind = type(self.graph.model).__name__
        return f"SearchSpace({kind}: {len(self.genes)} genes, {len(self.scales)} widths each)"


def draw_weights(model: nn.Module) -> None:
    """Gives a network fresh weights in place; see `SearchSpace.fresh` for what keeps its own.

    Raises:
        ModelError: a parametrized layer that cannot be given weights.
    """
    for name, module in reversed(list(model.named_modules())):  # attention sets what its layers have drawn
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset) and all(p.requires_grad for p in module.parameters()):
            _reset(name, module, reset)


@torch.no_grad()
def _reset(name: str, module: nn.Module, reset: Callable[[], Any]) -> None:
    if not parametrize.is_parametrized(module):
        reset()
        return
    with parametrize.cached():  # otherwise it would fill a tensor that is thrown away
        reset()
        drawn = {key: getattr(module, key).clone() for key in module.parametrizations}
    try:
        for key, value in drawn.items():
            setattr(module, key, value)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: '{name}' is parametrized and cannot be given fresh weights: {error}") from error
