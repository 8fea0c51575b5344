"""Prunes a network while it trains, in the epoch in which its architecture has come to rest."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .._phases import in_mode
from ..budget import Budget, check_round_to
from ..checks import check_model, check_prunable
from ..cutting import select_and_cut
from ..data import some_examples
from ..errors import ArgumentError, BudgetError, CheckpointError, CompactionError
from ..graph import ChannelGraph, _history, trace
from ..graph._compact import copy_inside, matching
from ..graph._optimizers import Optimizers, state_by_parameter
from ..graph._snapshot import Snapshot
from ..graph._undisturbed import uncompiled
from ..methods import Ranking
from ..pruning_plan import PruningPlan, apply_plan, original, plan_of
from ._ranks import Ranks, check_alike, rebucket
from .indicator import THRESHOLDS, check_window, indicator, settled
from .scores import GradientScores, filter_norms

_STATE = (
    *("asked", "groups", "history", "indicators", "cut_epoch", "steps_done"),
    *("observed", "gradients", "dense", "plan"),
)
_RANKING = "global"  # with the same share of every layer each sub-network would be like the last, whatever happens


class EarlyPruner:
    """Watches the dominant sub-network of a network in training and cuts down to it once it has settled.

    "When to Prune? A Policy towards Early Structural Pruning" (Shen et al. 2022, arXiv 2110.12007): neurons are ranked
    over the whole network; the sub-network that the budget leaves is compared, by its widths alone, with those of the
    epochs before (`indicator`). A neuron's importance is divided by the root of what it costs in the budget's own unit.
    With the paper's budget, a fraction of the neurons, all cost the same; for MACs and parameters this is ours: as they
    are, the scores starve late layers of narrow networks, divided by the whole cost they starve early ones.

    The training goes on as it was: the same Parameter objects, optimizer state cut along, learning rates and schedule
    untouched. One call in every step, one at every epoch's end::

        pruner = EarlyPruner(model, optimizer, images[:2], budget=Budget(macs=0.25), cap=10)
        for epoch in range(epochs):
            for batch in loader:
                loss(model, batch).backward()
                pruner.observe()
                optimizer.step()
                optimizer.zero_grad()
            pruner.epoch_end()

    Under torch.distributed all processes call both, and cut the same channels; DistributedDataParallel's buckets are
    made anew; for FSDP2 there is `stamp_fast.early.sharded`. A compiled model is compiled once more for every cut
    (torch gives up after its `recompile_limit`, 8). Hooks of the model see meta tensors while it is traced.

    Args:
        model: the network, or it in DistributedDataParallel, DataParallel or torch.compile.
        optimizer: one or several, of the model's parameters; None where there is no state to cut.
        example: what a forward takes; the first dim is the batch, of which two are enough.
        budget: fractions of the dense network that stay; the paper's is `Budget(channels=...)`.
        importance: "taylor" (gradients, equation 3; needs `observe`) or "magnitude" (equation 2).
        tau: what the indicator has to reach; the paper's 0.944 and 0.983 by default.
        window: epochs that a sub-network is compared with.
        cap: number of epochs after which the cut is made though nothing has settled; None: never.
        steps: 1 cuts at once; more, in so many steps along an exponential curve, `every` calls of `observe` apart,
            which all processes then have to call equally often.
        ema: an average of the weights of what is cut (of the part `inside`), cut along.
        inside: name of the part of the model that is cut, as in `model.get_submodule`; "" for all of it. `example` and
            `keep` are that part's.
        keep: names of modules or parameters whose channels all stay.
        round_to: widths that are cut stay multiples of it.
        floor: fraction of every group that stays, as in `prune`; one neuron does in any case. With 0, as in the paper,
            layers of few channels starve, and each neuron that comes or goes there upsets the indicator.
        state: from `state_dict`, to go on from there: a network, and average, that were cut by then and are dense now
            are cut as they were. Afterwards load the states of model, average and optimizer.

    Attributes:
        network: what is cut.
        groups: names of the groups that can be cut, before anything was.
        history: neurons that stay in each group of `groups`, not rounded, of every epoch until the cut.
        indicators: EPI of every epoch until the cut; the first is NaN.
        cut_epoch: number of the `epoch_end` call, from 1, at which it was cut or its several cuts began; None before.

    Raises:
        StampFastError: an argument that cannot be, or a network or budget that `prune` would refuse.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        example: Any,
        *,
        budget: Budget = Budget(macs=0.5),  # noqa: B008  (frozen)
        importance: str = "taylor",
        tau: float | None = None,
        window: int = 5,
        cap: int | None = None,
        steps: int = 1,
        every: int = 40,
        ema: nn.Module | None = None,
        inside: str = "",
        keep: Collection[str] = (),
        round_to: int | None = None,
        floor: float = 0.1,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(budget, Budget):
            raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
        if budget.measured():
            raise ArgumentError(
                f"Budget({budget.measured()[0]}=): an early cut has no measured costs; use macs=, params= or channels="
            )
        if importance not in THRESHOLDS:
            raise ArgumentError(f"importance: must be one of {', '.join(THRESHOLDS)}, got {importance!r}")
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1):
            raise ArgumentError(f"tau: must be a number in [0, 1], got {tau!r}")
        check_window(window)
        for name, value in (("cap", cap), ("steps", steps), ("every", every)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ArgumentError(f"{name}: must be a whole number of at least 1, got {value!r}")
        check_round_to(round_to)
        if cap is None:
            warnings.warn(
                "EarlyPruner: with cap=None a network that does not settle is never pruned; a third of the epochs is "
                "a usual cap",
                stacklevel=2,
            )
        self.model, self.optimizer, self.example, self.budget = model, optimizer, example, budget
        self.importance, self.window, self.cap = importance, window, cap
        self.tau = THRESHOLDS[importance] if tau is None else tau
        self.steps, self.every, self.ema = steps, every, ema
        self.keep, self.round_to, self.floor = keep, round_to, floor
        self.groups: list[str] = []
        self.history: list[list[int]] = []
        self.indicators: list[float] = []
        self.cut_epoch: int | None = None
        self._steps_done = self._observed = 0
        self.network = part_of(original(model), inside)
        check_model(self.network)
        state_by_parameter(self.network, optimizer)  # one that cannot be cut is an error now
        self._ranks = Ranks(model)
        self._graph: ChannelGraph | None = None
        self._gradients: GradientScores | None = None
        if state is not None and state.get("plan") is not None:
            self.load_state_dict(state)
            return
        self._watch()
        check_prunable(self._graph)
        if ema is not None:
            matching(self._graph, ema)
        self.groups = [group.name for group in self._graph.prunable]
        options = {"ranking": _RANKING, "round_to": round_to, "floor": floor}
        self._graph.select(filter_norms(self._graph), budget, **options)  # one that is out of reach is an error now
        self._dense = {name: getattr(self._graph, name)() for name in budget.asked()}
        if state is not None:
            self.load_state_dict(state)

    def _watch(self) -> None:
        """Traces the network as it is."""
        with uncompiled(), in_mode(self.network, training=False):
            graph = trace(self.network, self.example)
            graph.protect(self.keep)
            graph.settle()
        self._follow(graph)

    def _follow(self, graph: ChannelGraph | None) -> None:
        self._graph = graph
        self._gradients = GradientScores(graph) if graph is not None and self.importance == "taylor" else None

    @property
    def done(self) -> bool:
        """Whether the network has the size that was asked for."""
        return self._steps_done >= self.steps

    def observe(self, scale: float = 1.0) -> bool:
        """To be called in every step, when the gradients are there: before the optimizer steps and before zero_grad.

        With gradient accumulation, once for each step of the optimizer.

        Args:
            scale: what the loss was multiplied by, `scaler.get_scale()`, where the gradients are not unscaled yet.

        Returns:
            True if it cut, which happens here only where the cut is made in several steps.

        Raises:
            ArgumentError: no parameter has a gradient.
        """
        if self.done:
            return False
        if self._gradients is not None:
            self._gradients.add(scale)
        if self.cut_epoch is None:
            return False
        self._observed += 1
        if self._observed < self.every:
            return False
        self._observed = 0
        return self._cut_step()

    def cuts_next(self) -> bool:
        """Whether the next call of `observe` will cut."""
        return self.cut_epoch is not None and not self.done and self._observed + 1 >= self.every

    def scored_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients `observe` looks at."""
        return [] if self._gradients is None else self._gradients.parameters()

    def epoch_end(self) -> bool:
        """To be called after every epoch, or every so many steps that are to count as one.

        Returns:
            True if it cut.

        Raises:
            ArgumentError: `observe` was not called.
            CompactionError: the cut failed, in this or another process; model and optimizers are as they were.
        """
        if self.cut_epoch is not None:
            return False
        if not self.history:
            check_alike(self._ranks, self._graph)
        state_by_parameter(self.network, self.optimizer)  # there was none before the first step
        keep = self._dominant(self._scores())
        self.history.append([int(keep[group.classes].sum()) for group in self._graph.prunable])
        self.indicators.append(indicator(self.history, self.window))
        if self._is_due():
            try:
                cut = self._cut_step()
            except BaseException:
                del self.history[-1], self.indicators[-1]  # as if it had not been called
                raise
            self.cut_epoch = len(self.history)
            return cut
        if self._gradients is not None:
            self._gradients.reset()
        return False

    def _is_due(self) -> bool:
        capped = self.cap is not None and len(self.history) >= self.cap
        return capped or settled(self.indicators, self.tau, self.window)

    def _scores(self) -> torch.Tensor:
        """Importance over the root of the cost, of every class, the same in all processes."""
        if self._gradients is None:
            importance = self._ranks.of_first(filter_norms(self._graph)).cpu()
        else:
            importance = self._gradients.mean(self._ranks.sum)
        return importance.double() / self.budget.costs(self._graph).sqrt()

    def _dominant(self, scores: torch.Tensor) -> torch.Tensor:
        """The sub-network that pruning now would leave, but for rounding, which would make its widths jump."""
        options = {"ranking": _RANKING, "floor": self.floor}
        try:
            return self._graph.select(scores, self.budget, **options)
        except BudgetError:  # too coarse for these scores: the next below
            return self._graph.select(scores, self.budget, exact=False, **options)

    def _cut_step(self) -> bool:
        """The next of `steps` cuts, in all processes or in none; False where the network is too coarse for it."""
        scores = self._scores()
        before = Snapshot(self.network, self.optimizer, self.ema)
        kept, error = None, None
        try:
            kept = self._cut_to(scores, self._budget_now())
        except Exception as caught:
            error = caught
        try:
            if not self._ranks.all(error is None):
                raise error or CompactionError("EarlyPruner: the cut failed in another process; nothing was changed")
            if not self._ranks.alike(torch.empty(0) if kept is None else kept):
                raise CompactionError("EarlyPruner: the processes would cut other channels; nothing was changed")
        except BaseException:
            before.restore()
            self._graph._compacted = None
            raise
        self._steps_done += 1
        if kept is not None:
            self._follow(None if self.done else self._graph.smaller())
            rebucket(self.model)
        elif self._gradients is not None:
            self._gradients.reset()
        return kept is not None

    def _cut_to(self, scores: torch.Tensor, budget: Budget) -> torch.Tensor | None:
        """What stayed. None where an intermediate step cannot be had; the last one then goes below the budget."""
        how = {"strict": False, "folds": None, "examples": some_examples(self.example, 8), "phases": _quietly}
        for exact in (True, False):
            ranked = Ranking(scores, _RANKING, self.floor, exact)
            try:
                with uncompiled(), in_mode(self.network, training=False):
                    kept, _ = select_and_cut(
                        self._graph, ranked, budget, self.round_to, self.optimizer, ema=self.ema, **how
                    )
                return kept
            except BudgetError:
                if self._steps_done + 1 < self.steps:
                    return None
                if not exact:
                    raise
        return None

    def _budget_now(self) -> Budget:
        """What the next step leaves, as fractions of the network as it is: ask ** (step / steps) of the dense one."""
        progress = (self._steps_done + 1) / self.steps
        now = {name: getattr(self._graph, name)() / dense for name, dense in self._dense.items()}
        return Budget(**{name: min(1.0, ask**progress / now[name]) for name, ask in self.budget.asked().items()})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside those of model, optimizer and schedule. JSON can hold it."""
        return {
            "asked": self._asked(),
            "groups": list(self.groups),
            "history": [list(counts) for counts in self.history],
            "indicators": [None if math.isnan(value) else value for value in self.indicators],
            "cut_epoch": self.cut_epoch,
            "steps_done": self._steps_done,
            "observed": self._observed,
            "gradients": None if self._gradients is None else self._gradients.state_dict(),
            "dense": dict(self._dense),
            "plan": plan_of(self.network).to_json() if _is_cut(self.network) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the checkpoint was made, as the argument `state` does.

        Raises:
            CheckpointError: not of an `EarlyPruner` of this network and these arguments, or it has been cut otherwise.
        """
        missing = [key for key in _STATE if key not in state]
        if missing:
            raise CheckpointError(f"EarlyPruner: the state has no {', '.join(missing)}")
        other = [name for name, value in self._asked().items() if state["asked"].get(name) != value]
        if other:
            raise CheckpointError(f"EarlyPruner: the state was made with another {', '.join(other)}=")
        if self.groups and state["groups"] != self.groups:
            raise CheckpointError("EarlyPruner: the state is of a network with other groups, or of another keep=")
        if self._steps_done:
            raise CheckpointError("EarlyPruner: this network is cut already; load into one of a dense network")
        cut = state["plan"] is not None
        if cut:
            cut_as_in(state, self.network, self.ema)
            rebucket(self.model)
        self.groups = list(state["groups"])
        self.history = [list(counts) for counts in state["history"]]
        self.indicators = [math.nan if value is None else value for value in state["indicators"]]
        self.cut_epoch, self._steps_done = state["cut_epoch"], state["steps_done"]
        self._observed, self._dense = state["observed"], dict(state["dense"])
        if self.done:
            self._follow(None)
        elif cut:
            self._watch()
        if self._gradients is not None:
            self._gradients.load_state_dict(state["gradients"])

    def _asked(self) -> dict[str, Any]:
        """What a state is of."""
        names = ("importance", "window", "steps", "every", "round_to", "floor")
        return {name: getattr(self, name) for name in names} | {"budget": self.budget.asked()}

    def __repr__(self) -> str:
        what = f"EarlyPruner({self.importance}, tau={self.tau}, window={self.window}"
        if self.cut_epoch is not None:
            return f"{what}: cut in epoch {self.cut_epoch}, {self._steps_done} of {self.steps} steps done)"
        last = f", EPI {self.indicators[-1]:.3f}" if self.indicators else ""
        return f"{what}: watching, {len(self.history)} epochs{last})"


def cut_as_in(state: dict[str, Any], model: nn.Module, ema: nn.Module | None = None) -> None:
    """Cuts a dense network, and its average, as it was when an `EarlyPruner` gave this state.

    Nothing happens to one that is cut so already, or where the state is from before the cut.

    Args:
        model: what the `EarlyPruner` had, or the part of it that it cut.

    Raises:
        CheckpointError: another architecture, or pruned otherwise.
    """
    if state["plan"] is None:
        return
    plan = PruningPlan.from_json(state["plan"])
    networks = [original(model)] + ([] if ema is None else [copy_inside(ema, next(iter(plan.shapes)))])
    for network in networks:
        if plan_of(network).to_json() != state["plan"]:
            apply_plan(network, plan)


def _is_cut(network: nn.Module) -> bool:
    return any(map(_history.is_cut, network.modules()))


def part_of(model: nn.Module, name: str) -> nn.Module:
    """
    Raises:
        ArgumentError: there is no such submodule.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ArgumentError(f"inside: the model has no submodule '{name}'") from error


def _quietly(phase: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
