"""Prunes a network while it trains, in the epoch in which its architecture has come to rest."""

from __future__ import annotations

import contextlib
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
from ..graph import ChannelGraph, trace
from ..graph._optimizers import Optimizers, state_by_parameter
from ..graph._snapshot import Snapshot
from ..graph._undisturbed import uncompiled
from ..methods import Ranking
from ..pruning_plan import PruningPlan, apply_plan, original, plan_of
from ._ranks import Ranks, check_alike, rebucket
from .indicator import THRESHOLDS, check_window, indicator, settled
from .scores import GradientScores, filter_norms

_RANKING = "global"  # with the same share of every layer each sub-network would be like the last, whatever happens


class EarlyPruner:
    """Watches the dominant sub-network of a network in training and cuts down to it once it has settled.

    "When to Prune? A Policy towards Early Structural Pruning" (Shen et al. 2022, arXiv 2110.12007): neurons are ranked
    over the whole network; the sub-network that the budget leaves is compared, by its widths alone, with those of the
    epochs before (`indicator`). The training goes on as it was: the same Parameter objects, optimizer state cut along,
    learning rates and schedule untouched. One call in every step, one at every epoch's end::

        pruner = EarlyPruner(model, optimizer, images[:2], budget=Budget(macs=0.25), cap=10)
        for epoch in range(epochs):
            for batch in loader:
                loss(model, batch).backward()
                pruner.observe()
                optimizer.step()
                optimizer.zero_grad()
            pruner.epoch_end()

    Under torch.distributed all processes call both, and cut the same channels; DistributedDataParallel's buckets are
    made anew. A compiled model is compiled once more.

    Args:
        model: the network, or it in DistributedDataParallel, DataParallel or torch.compile.
        optimizer: one or several, of the model's parameters; None where there is no state to cut.
        example: what a forward takes; the first dim is the batch, of which two are enough.
        budget: fractions of the dense network that stay; the paper's is `Budget(channels=...)`.
        importance: "taylor" (gradients, equation 3; needs `observe`) or "magnitude" (equation 2).
        tau: what the indicator has to reach; the paper's 0.944 and 0.983 by default.
        window: epochs that a sub-network is compared with.
        cap: number of epochs after which the cut is made though nothing has settled; None: never.
        steps: 1 cuts at once; more, in so many steps along an exponential curve, `every` calls of `observe` apart.
        ema: an average of the weights of what is cut, cut along.
        inside: name of the part of the model that is cut, as in `model.get_submodule`; "" for all of it. `example` and
            `keep` are that part's.
        keep: names of modules or parameters whose channels all stay.
        round_to: widths that are cut stay multiples of it.
        floor: fraction of every group that stays; one neuron does in any case.

    Attributes:
        history: neurons that stay in each group of `groups`, not rounded, of every epoch until the cut.
        indicators: EPI of every epoch until the cut; the first is NaN.
        cut_epoch: number of `epoch_end` calls, from 1, at which it was cut; None before.

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
        floor: float = 0.0,
    ) -> None:
        if not isinstance(budget, Budget):
            raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
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
        self.keep, self.round_to, self.floor = tuple(keep), round_to, floor
        self.history: list[list[int]] = []
        self.indicators: list[float] = []
        self.cut_epoch: int | None = None
        self._steps_done = self._observed = 0
        self._network = _part(original(model), inside)
        check_model(self._network)
        state_by_parameter(self._network, optimizer)  # one that cannot be cut is an error now
        self._ranks = Ranks(model)
        self._watch()
        self._dense = {name: getattr(self._graph, name)() for name in budget.asked()}
        options = {"ranking": _RANKING, "round_to": round_to, "floor": floor}
        self._graph.select(filter_norms(self._graph), budget, **options)  # one that is out of reach is an error now

    def _watch(self) -> None:
        """Traces the network as it is."""
        with uncompiled(), in_mode(self._network, training=False):
            graph = trace(self._network, self.example)
            graph.protect(self.keep)
            graph.settle()
            check_prunable(graph)
        self._follow(graph)

    def _follow(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._gradients = GradientScores(graph) if self.importance == "taylor" else None

    @property
    def groups(self) -> list[str]:
        """Names of the groups that can be cut, in the order of `history`."""
        return [group.name for group in self._graph.prunable]

    @property
    def done(self) -> bool:
        """Whether the network has the size that was asked for."""
        return self._steps_done == self.steps

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
        keep = self._dominant(self._scores())
        self.history.append([int(keep[group.classes].sum()) for group in self._graph.prunable])
        self.indicators.append(indicator(self.history, self.window))
        if self._is_due():
            try:
                self._cut_step()
            except BaseException:
                del self.history[-1], self.indicators[-1]  # as if it had not been called
                raise
            self.cut_epoch = len(self.history)
            return True
        if self._gradients is not None:
            self._gradients.reset()
        return False

    def _is_due(self) -> bool:
        capped = self.cap is not None and len(self.history) >= self.cap
        return capped or settled(self.indicators, self.tau, self.window)

    def _scores(self) -> torch.Tensor:
        """Of every class, the same in all processes."""
        if self._gradients is None:
            return self._ranks.of_first(filter_norms(self._graph)).cpu()
        return self._gradients.mean(self._ranks.sum)

    def _dominant(self, scores: torch.Tensor) -> torch.Tensor:
        """The sub-network that pruning now would leave, but for rounding, which would make its widths jump."""
        return self._graph.select(scores, self.budget, ranking=_RANKING, floor=self.floor)

    def _cut_step(self) -> bool:
        """The next of `steps` cuts, in all processes or in none; False where the network is too coarse for it."""
        last = self._steps_done + 1 == self.steps
        scores = self._scores()
        ranked = Ranking(scores, _RANKING, self.floor)
        before = Snapshot(self._network, self.optimizer, self.ema)
        kept, error = None, None
        try:
            kept = self._cut_to(ranked, self._budget_now())
        except BudgetError as coarse:
            error = coarse if last else None
        except Exception as caught:
            error = caught
        try:
            if not self._ranks.all(error is None):
                raise error or CompactionError("epoch_end: the cut failed in another process; nothing was changed")
            if not self._ranks.alike(torch.empty(0) if kept is None else kept):
                raise CompactionError("epoch_end: the processes would cut other channels; nothing was changed")
        except BaseException:
            before.restore()
            self._graph._compacted = None
            raise
        self._steps_done += 1
        if kept is not None:
            self._follow(self._graph.smaller())
            rebucket(self.model)
        elif self._gradients is not None:
            self._gradients.reset()
        return kept is not None

    def _cut_to(self, ranked: Ranking, budget: Budget) -> torch.Tensor:
        examples = some_examples(self.example, 8)
        with uncompiled(), in_mode(self._network, training=False):
            kept, _ = select_and_cut(
                self._graph, ranked, budget, self.round_to, self.optimizer, False, None, examples, _quietly, self.ema
            )
        return kept

    def _budget_now(self) -> Budget:
        """What the next step leaves, as fractions of the network as it is: ask ** (step / steps) of the dense one."""
        progress = (self._steps_done + 1) / self.steps
        now = {name: getattr(self._graph, name)() / dense for name, dense in self._dense.items()}
        return Budget(**{name: min(1.0, ask**progress / now[name]) for name, ask in self.budget.asked().items()})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside those of model, optimizer and schedule. JSON can hold it."""
        return {
            "history": self.history,
            "indicators": self.indicators,
            "cut_epoch": self.cut_epoch,
            "steps_done": self._steps_done,
            "observed": self._observed,
            "gradients": None if self._gradients is None else self._gradients.state_dict(),
            "dense": self._dense,
            "plan": plan_of(self._network).to_json() if self._steps_done else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the checkpoint was made. Before `load_state_dict` of model, average and optimizer, in a program
        that has made all of them anew: a network that was cut by then is cut here, where it is not yet (`cut_as_in`).

        Raises:
            CheckpointError: not of an `EarlyPruner` of this network, or this one has been cut otherwise.
        """
        missing = {"history", "indicators", "cut_epoch", "steps_done", "observed", "gradients", "dense", "plan"}
        missing -= state.keys()
        if missing:
            raise CheckpointError(f"EarlyPruner: the state has no {', '.join(sorted(missing))}")
        if (state["gradients"] is None) != (self._gradients is None):
            raise CheckpointError("EarlyPruner: the state is of another importance=")
        if self._steps_done:
            raise CheckpointError("EarlyPruner: this network is cut already; load into one of a dense network")
        groups = len(self._graph.prunable)
        if state["plan"] is None and any(len(counts) != groups for counts in state["history"]):
            raise CheckpointError("EarlyPruner: the state is of a network with other groups, or of another keep=")
        if state["plan"] is not None and plan_of(self._network).to_json() != state["plan"]:
            cut_as_in(state, self._network, self.ema)
            self._watch()
            rebucket(self.model)
        if self._gradients is not None:
            self._gradients.load_state_dict(state["gradients"])
        self.history = [list(counts) for counts in state["history"]]
        self.indicators = list(state["indicators"])
        self.cut_epoch, self._steps_done = state["cut_epoch"], state["steps_done"]
        self._observed, self._dense = state["observed"], dict(state["dense"])

    def __repr__(self) -> str:
        what = f"EarlyPruner({self.importance}, tau={self.tau}, window={self.window}"
        if self.cut_epoch is not None:
            return f"{what}: cut in epoch {self.cut_epoch}, {self._steps_done} of {self.steps} steps done)"
        last = f", EPI {self.indicators[-1]:.3f}" if self.indicators else ""
        return f"{what}: watching, {len(self.history)} epochs{last})"


def cut_as_in(state: dict[str, Any], model: nn.Module, ema: nn.Module | None = None) -> None:
    """Cuts a dense network, and its average, as it was when an `EarlyPruner` gave this state.

    Args:
        model: what the `EarlyPruner` had, or the part of it that it cut.

    Raises:
        CheckpointError: another architecture, or pruned already.
    """
    if state["plan"] is None:
        return
    plan = PruningPlan.from_json(state["plan"])
    apply_plan(model, plan)
    if ema is not None:
        apply_plan(original(getattr(ema, "module", ema)), plan)


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ArgumentError(f"inside: the model has no submodule '{name}'") from error


def _quietly(phase: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
