"""Budgets as fractions of the dense network, and how a choice of channels is made to meet them."""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, BudgetError

if TYPE_CHECKING:
    from ..graph import ChannelGraph, Group

TOLERANCE = 0.02
MEASURED = ("train_step", "latency", "memory")
_EXAMPLES = {"train_step": "250 ms", "latency": "12 ms", "memory": "4 GiB"}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MOST_TRIALS = 300  # of a search that only networks with few channels need
RoundTo = int | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may stay, as a fraction of the dense network, in (0, 1]. Several at once: all must hold.

    The last three are measured on this machine, and may be absolute: "250 ms", "1.5 s", "4 GiB", "800 MB".

    Attributes:
        macs: multiply-accumulates of a forward.
        params: number of parameters.
        channels: number of channels over all prunable groups.
        train_step: time of forward, backward and optimizer step on a batch.
        latency: time of a forward in eval mode on a batch.
        memory: peak of what is allocated in a training step; weights, gradients and momentum count.

    Raises:
        ArgumentError: nothing is asked, a fraction outside (0, 1], or an amount that cannot be read.
    """

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    train_step: float | str | None = None
    latency: float | str | None = None
    memory: float | str | None = None

    def __post_init__(self) -> None:
        if not self.asked():
            names = ", ".join(f"{field.name}=" for field in dataclasses.fields(self))
            raise ArgumentError(f"Budget: give at least one of {names}, each a fraction in (0, 1]")
        for name, value in self.asked().items():
            if name in MEASURED and isinstance(value, str):
                absolute(name, value)
            elif not isinstance(value, bool) and isinstance(value, Real) and 0 < value <= 1:
                object.__setattr__(self, name, float(value))  # numpy's numbers are no JSON
            else:
                example = f" or an amount such as '{_EXAMPLES[name]}'" if name in MEASURED else ""
                raise ArgumentError(f"Budget: {name} must be a fraction in (0, 1]{example}, got {value!r}")

    def asked(self) -> dict[str, float | str]:
        """What is given, by name."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}

    def measured(self) -> tuple[str, ...]:
        """Names of what is asked that a measurement on this machine has to tell."""
        return tuple(name for name in self.asked() if name in MEASURED)

    def in_fractions(self, dense: Callable[[str], float]) -> Budget:
        """The same with amounts as fractions.

        Args:
            dense: from a name to what the dense network costs: milliseconds, or bytes.

        Raises:
            BudgetError: the dense network is within an amount as it is, and nothing less than it all is asked besides.
        """
        asked, met = self.asked(), ""
        for name, value in asked.items():
            if isinstance(value, str):
                whole = dense(name)
                asked[name] = min(1.0, absolute(name, value) / whole)
                if asked[name] == 1.0:
                    has = f"{whole / absolute(name, f'1 {unit_of(value)}'):.3g} {unit_of(value)}"
                    met = f"Budget({name}={value!r}): is met as it is: the dense network takes {has}"
        if met and min(asked.values()) == 1.0:
            raise BudgetError(met)
        return Budget(**asked)

    def predicted(self, graph: ChannelGraph) -> Budget:
        """The same with amounts as fractions of what `graph.cost_table` predicts for the dense network.

        Raises:
            ArgumentError: there is no table, or not of this.
            BudgetError: the dense network is within an amount as it is.
        """
        return self.in_fractions(lambda unit: getattr(graph, unit)())

    def select(
        self,
        graph: ChannelGraph,
        scores: torch.Tensor,
        *,
        ranking: str = "global",
        round_to: RoundTo = None,
        floor: float = 0.0,
        exact: bool = True,
    ) -> torch.Tensor:
        """Removes classes in order of importance until every fraction holds.

        Args:
            scores: float, [graph.num_classes], higher = keep.
            ranking: "global" compares scores across groups; "local" takes the same fraction of every group.
            round_to: the width of every group that is cut stays a multiple of it, and at least that. Or one for each
                group, by its name.
            floor: fraction of each group that stays whatever its scores, given up only if the budget needs it.
            exact: with False the first choice that fits is good enough, however far below the ask.

        Returns:
            bool, [graph.num_classes]. The tightest fraction is met within 2 percent of the ask.

        Raises:
            ArgumentError: scores of another size or with NaN, unknown ranking, round_to below 1, floor no fraction.
            BudgetError: out of reach; says what can be reached and which groups stand in the way.
        """
        if any(isinstance(value, str) for value in self.asked().values()):
            options = {"ranking": ranking, "round_to": round_to, "floor": floor, "exact": exact}
            return self.predicted(graph).select(graph, scores, **options)
        scores = checked_scores(graph, scores, ranking, round_to)
        if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor <= 1:
            raise ArgumentError(f"select: floor must be a fraction in [0, 1], got {floor!r}")
        units = _removal_units(graph, scores, ranking, round_to, floor)
        keep = _first_that_fits(self, graph, units)
        if keep is None and floor > 0:
            units = _removal_units(graph, scores, ranking, round_to, 0.0)
            keep = _first_that_fits(self, graph, units)
        if keep is None:
            raise self.out_of_reach(graph, units.without_first(graph, len(units)), round_to)
        if not exact:
            return keep
        if self.used(graph, keep) < 1 - TOLERANCE:
            keep = _fitted(self, graph, keep, units)
        used = self.used(graph, keep)
        # What is measured is met as well as measurements are.
        if used < 1 - TOLERANCE and not bool(keep.all()) and not self.measured():
            raise BudgetError(self._too_coarse(graph, keep, units, used))
        return keep

    def costs(self, graph: ChannelGraph) -> torch.Tensor:
        """How much less is used when one class of a group goes, relative to the mean: float64, [graph.num_classes].

        The same for all classes of a group; 1 where nothing can be pruned.
        """
        costs, whole = torch.ones(graph.num_classes, dtype=torch.float64), self.used(graph, graph.all_kept())
        groups = [group for group in graph.prunable if group.num_classes > 1]
        for group in groups:
            keep = graph.all_kept()
            keep[group.classes.start] = False
            costs[group.classes] = whole - self.used(graph, keep)
        prunable = torch.cat([costs[group.classes] for group in groups]) if groups else costs
        # What costs nothing may stay.
        mean = prunable.mean()
        for group in groups:
            costs[group.classes] = (costs[group.classes] / mean).clamp(min=1e-6)
        return costs

    def used(self, graph: ChannelGraph, keep: torch.Tensor) -> float:
        """The most used of the fractions, relative to what was asked: 1.0 is exactly met."""
        return max(fraction / self.asked()[name] for name, fraction in self._fractions(graph, keep).items())

    def _fractions(self, graph: ChannelGraph, keep: torch.Tensor) -> dict[str, float]:
        """Of the dense network, for what is asked for."""
        measures = {name: getattr(graph, name) for name in self.asked()}
        return {name: measure(keep) / measure() for name, measure in measures.items()}

    def _reached(self, graph: ChannelGraph, keep: torch.Tensor) -> str:
        return ", ".join(f"{name}={value:.3f}" for name, value in self._fractions(graph, keep).items())

    def _ask(self) -> str:
        return ", ".join(
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={value:g}"
            for name, value in self.asked().items()
        )

    def out_of_reach(self, graph: ChannelGraph, least: torch.Tensor, round_to: RoundTo = None) -> BudgetError:
        """The error that says how far down the network can be cut, `least`, and what stands in the way."""
        text = f"Budget({self._ask()}): out of reach; from 1 down to {self._reached(graph, least)} can be had"
        if round_to and not isinstance(round_to, Mapping):
            text += f" with round_to={round_to}"
        for unit in self.measured():
            if hasattr(graph.cost_table, "why"):
                text += f". {unit}: {graph.cost_table.why(unit)}"
        in_the_way = [
            f"'{g.name}' ({g.channels} channels): {reason}"
            for g in graph.groups + graph.frozen
            if (reason := g.reason or minimum_width(g, round_to))
        ]
        if in_the_way:
            text += ". In the way: " + "; ".join(in_the_way[:5])
            text += f"; and {len(in_the_way) - 5} more" if len(in_the_way) > 5 else ""
        return BudgetError(text)

    def _too_coarse(self, graph: ChannelGraph, keep: torch.Tensor, units: _Removals, used: float) -> str:
        above = []
        for i in range(len(units)):
            if not keep[units.unit(i)].any():
                trial = keep.clone()
                trial[units.unit(i)] = True
                above.append((self.used(graph, trial), int(units.groups[i])))
        next_used, index = min(above)
        name = graph.groups[index].name
        return (
            f"Budget({self._ask()}): cannot be met within {TOLERANCE:.0%}: the network is too coarse. "
            f"{used:.3f} or {next_used:.3f} times the ask can be had; a single step of '{name}' "
            f"({graph.groups[index].num_classes} removable units) lies between them. Ask for one of those."
        )


@dataclasses.dataclass
class _Removals:
    """Units of classes that are removed together, in the order in which they go.

    Attributes:
        classes: int64, the classes of unit 0, of unit 1, ...
        ends: int64, [units], where each unit ends in `classes`.
        groups: int64, [units], the group each unit belongs to.
    """

    classes: torch.Tensor
    ends: torch.Tensor
    groups: torch.Tensor

    def __len__(self) -> int:
        return self.ends.numel()

    def unit(self, i: int) -> torch.Tensor:
        return self.classes[self.ends[i - 1] if i else 0 : self.ends[i]]

    def without_first(self, graph: ChannelGraph, count: int) -> torch.Tensor:
        keep = graph.all_kept()
        keep[self.classes[: self.ends[count - 1] if count else 0]] = False
        return keep

    def brought_back(self, keep: torch.Tensor, which: list[int]) -> torch.Tensor:
        """`keep` with these units in it."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[which] = True
        sizes = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        result = keep.clone()
        result[self.classes[torch.repeat_interleave(chosen, sizes)]] = True
        return result


def written(asked: Mapping[str, float | str]) -> str:
    """What is asked, as a user would write it: "macs=0.5, latency=12 ms"."""
    return ", ".join(f"{n}={v if isinstance(v, str) else f'{v:g}'}" for n, v in asked.items())


def absolute(name: str, text: str) -> float:
    """Milliseconds of "250 ms", bytes of "4 GiB".

    Raises:
        ArgumentError: another form, or nothing above 0.
    """
    units = _BYTES if name == "memory" else _MILLISECONDS
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    try:
        amount = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        amount = 0.0
    if not 0 < amount < math.inf:
        raise ArgumentError(
            f"Budget: {name}={text!r} is no amount above 0 in one of {', '.join(units)}, such as '{_EXAMPLES[name]}'"
        )
    return amount


def unit_of(amount: str) -> str:
    """ "ms" of "250 ms"."""
    return re.search(r"[A-Za-z]+\s*$", amount)[0].strip()


def steps_of(graph: ChannelGraph, multiple: int) -> dict[str, int]:
    """What every group's width may be rounded to where kernels like multiples: no more than a quarter of its width."""
    return {g.name: min(multiple, 1 << max(0, (g.channels // 4).bit_length() - 1)) for g in graph.prunable}


def check_round_to(round_to: Any) -> None:
    """Raises ArgumentError unless it is None or a whole number of at least 1."""
    if isinstance(round_to, Mapping):
        for step in round_to.values():
            check_round_to(step)
    elif round_to is not None and (not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1):
        raise ArgumentError(f"round_to: must be a whole number of at least 1, got {round_to!r}")


def minimum_width(group: Group, round_to: RoundTo, floor: float = 0.0) -> str:
    """Why no budget can cut the group: it is as narrow as it may get. "" where it is not."""
    round_to = _step_of(group, round_to)
    if group.num_classes > _least(group, round_to, floor)[1]:
        return ""
    if group.num_classes == 1:
        return "minimum width: its channels go together and have to stay"
    wanted = ", ".join([f"round_to={round_to}"] * (round_to > 1) + [f"floor={floor:g}"] * bool(floor))
    return f"minimum width: {group.channels} channels with {wanted}"


def _step_of(group: Group, round_to: RoundTo) -> int:
    return round_to.get(group.name, 1) if isinstance(round_to, Mapping) else round_to or 1


def _least(group: Group, round_to: int, floor: float) -> tuple[int, int]:
    """How many classes go at a time, and how many have to stay."""
    width = max(1, round(group.channels / group.num_classes))  # channels that go with one class
    step = round_to // math.gcd(round_to, width)
    return step, max(step, math.ceil(floor * group.num_classes / step) * step)


def checked_scores(graph: ChannelGraph, scores: torch.Tensor, ranking: str, round_to: RoundTo) -> torch.Tensor:
    if ranking not in ("global", "local"):
        raise ArgumentError(f"select: ranking must be 'global' or 'local', got {ranking!r}")
    check_round_to(round_to)
    try:
        scores = torch.as_tensor(scores).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"scores: expected a float tensor, [num_classes], got {type(scores).__name__}") from None
    if scores.shape != (graph.num_classes,):
        raise ArgumentError(f"scores: expected shape ({graph.num_classes},), got {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        bad = next(g.name for g in graph.groups if bool(scores[g.classes].isnan().any()))
        raise ArgumentError(f"scores: NaN in group '{bad}'")
    return scores


def _removal_units(
    graph: ChannelGraph, scores: torch.Tensor, ranking: str, round_to: RoundTo, floor: float
) -> _Removals:
    none = torch.empty(0, dtype=torch.long)
    classes, keys, counts, groups = [none], [none.double()], [none], [none]
    for index, group in enumerate(graph.groups):
        size = group.num_classes
        step, least = _least(group, _step_of(group, round_to), floor)
        if group.reason is not None or size <= least:
            continue
        ascending, order = torch.sort(scores[group.classes], stable=True)
        # The first cut brings the width down to a multiple of the step, each later one to the next.
        left = torch.arange((size - 1) // step * step, least - 1, -step)
        ends = size - left
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        if ranking == "local":
            key = ends.double() / size
        else:
            total = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])
            key = (total[ends] - total[ends - sizes]) / sizes
        classes.append(order[: ends[-1]] + group.classes.start)
        keys.append(key)
        counts.append(sizes)
        groups.append(torch.full_like(sizes, index))
    key, count = torch.cat(keys), torch.cat(counts)
    rank = torch.argsort(key, stable=True)
    place = torch.empty_like(rank)
    place[rank] = torch.arange(rank.numel())
    by_unit = torch.argsort(torch.repeat_interleave(place, count), stable=True)
    return _Removals(torch.cat(classes)[by_unit], count[rank].cumsum(0), torch.cat(groups)[rank])


def _first_that_fits(budget: Budget, graph: ChannelGraph, units: _Removals) -> torch.Tensor | None:
    """The fewest removals, in order, that meet the budget: costs only fall, so bisection finds them."""
    low, high = 0, len(units)
    if budget.used(graph, units.without_first(graph, high)) > 1:
        return None
    while low < high:
        middle = (low + high) // 2
        if budget.used(graph, units.without_first(graph, middle)) > 1:
            low = middle + 1
        else:
            high = middle
    return units.without_first(graph, low)


def _fitted(budget: Budget, graph: ChannelGraph, keep: torch.Tensor, units: _Removals) -> torch.Tensor:
    """Coarse networks step over the budget: brings units back, and takes one group further where that is not enough."""
    best = filled = _fill(budget, graph, keep, units, set())
    trials = 0
    for further in range(len(units)):
        if budget.used(graph, best) >= 1 - TOLERANCE or trials == _MOST_TRIALS:
            break
        if not bool(filled[units.unit(further)].any()):
            continue
        # All units of the group up to this one go; the others may come back instead.
        group = int(units.groups[further])
        trial = filled.clone()
        for i in range(further + 1):
            if int(units.groups[i]) == group:
                trial[units.unit(i)] = False
        trials += 1
        trial = _fill(budget, graph, trial, units, {group})
        if budget.used(graph, trial) > budget.used(graph, best):
            best = trial
    return best


def _fill(budget: Budget, graph: ChannelGraph, keep: torch.Tensor, units: _Removals, closed: set[int]) -> torch.Tensor:
    """Brings back, most important first, whatever still fits, but nothing in the groups that are closed."""
    groups = units.groups.tolist()
    for limit in (1.0, 1.0 + TOLERANCE):
        full = set(closed)  # groups whose next unit did not fit
        first = keep[units.classes[units.ends - 1]].tolist()  # the classes of a unit come and go together
        waiting = [i for i in reversed(range(len(units))) if not first[i]]
        while waiting := [i for i in waiting if groups[i] not in full]:

            def use(count: int) -> float:
                return budget.used(graph, units.brought_back(keep, waiting[:count]))  # noqa: B023  (used at once)

            # Costs only grow: as many as fit are found by bisection, and of those the fewest that are enough.
            fits = bisect.bisect_right(range(1, len(waiting) + 1), limit, key=use)
            if fits and use(fits) >= 1 - TOLERANCE:
                enough = 1 + bisect.bisect_left(range(1, fits + 1), 1 - TOLERANCE, key=use)
                return units.brought_back(keep, waiting[:enough])
            keep = units.brought_back(keep, waiting[:fits])
            if fits < len(waiting):
                full.add(groups[waiting[fits]])
            waiting = waiting[fits + 1 :]
    return keep
