"""The channel graph of a model: which channels live or die together, what they cost, and how to take them out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._load import graph_core
from ..errors import ArgumentError
from . import _compact, _plan, _record, _replay, _settle
from ._bindings import Binding
from ._model import layer_of, owners, places, unwrapped
from ._optimizers import Optimizers
from ._strict import check_strict
from ._ties import Tie
from ._undisturbed import collection_paused, emptied

if TYPE_CHECKING:
    from ..budget import Budget
    from ..cost_table import CostTable

__all__ = ["ChannelGraph", "Group", "trace"]


@dataclasses.dataclass
class Group:
    """Channels that occur in the same places: one layer's output, or that of all layers of a residual stream.

    Attributes:
        name: the module that emits the channels.
        channels: how many channels that module emits into this group.
        classes: the group's slice of the per-class tensors (scores, keep). A class is what can be removed on its own:
            one channel, or several that have to go together.
        reason: why the group cannot be pruned; None if it can.
    """

    name: str
    channels: int
    classes: slice
    reason: str | None = None

    @property
    def num_classes(self) -> int:
        return self.classes.stop - self.classes.start


@dataclasses.dataclass
class Slot:
    """A parameter or buffer and, per dim, the class of every position (int64, -1 = stays), None where all stay."""

    name: str
    is_parameter: bool
    axes: list[torch.Tensor | None]
    owners: list[tuple[nn.Module, str]]

    @property
    def tensor(self) -> torch.Tensor:
        module, key = self.owners[0]
        table = module._parameters if self.is_parameter else module._buffers
        return table[key]


class ChannelGraph:
    """Made by `trace`. Per-class tensors have `num_classes` entries; `groups[i].classes` is a group's slice of them.

    Attributes:
        groups: what can be pruned, in the order in which the network emits the channels.
        frozen: groups that no choice of channels can touch, each with its reason.
    """

    def __init__(self, model: nn.Module, example: Any, recording: _record.Recording) -> None:
        self.model = model
        self.recording = recording
        self.example = example
        self.bindings: list[Binding] = []
        self.ties: list[Tie] = []
        self.survivors: dict[int, int] = {}  # reshape that splits channels -> axis of it that survives, if not ours
        self.calls_by_module: dict[str, list[_record.Call]] | None = None  # made when something has to be mended
        self.cost_table: CostTable | None = None  # measured, for budgets in milliseconds
        self._compacted: tuple[_record.Recording, _plan.Plan] | None = None
        self.protected: dict[str, str] = {}  # names given to `protect`, each with its reason
        self._kept: list[tuple[int, int, torch.Tensor | slice, str]] = []  # slot, dim, positions, reason
        owned = owners(model)
        self._owners = [owned[id(t)] for t in _record.slot_tensors(model).values()]
        self._is_parameter = [places[0][1] in places[0][0]._parameters for places in self._owners]
        self._calls = [(c.name, c.args, c.outs) for c in recording.calls]
        self.rebuild([])

    def rebuild(self, ties: list[Tie], survivors: dict[int, int] | None = None) -> None:
        """Groups channels anew, with dims tied that have to stay equally wide. Kept groups stay kept."""
        self.ties = list(ties)
        self.survivors = self.survivors if survivors is None else survivors
        recording = self.recording
        self._core = graph_core().ChannelGraph(
            recording.shapes,
            self._calls,
            self._is_parameter,
            recording.outputs,
            sorted(set(recording.pinned)),
            recording.costed,
            _record.Ref,
            [(*tie.first, *tie.second) for tie in ties],
            list(self.survivors.items()),
            recording.batched,
            _record.BATCH,
        )
        axes: dict[int, torch.Tensor | None] = {-1: None}  # a weight and its norm's four vectors share one
        for axis in {axis for dims in self._core.slot_axes for axis in dims if axis >= 0}:
            axes[axis] = torch.from_numpy(self._core.axis_classes(axis))
        self.slots = [
            Slot(name, is_parameter, [axes[axis] for axis in dims], owners)
            for name, is_parameter, dims, owners in zip(
                recording.slots, self._is_parameter, self._core.slot_axes, self._owners, strict=True
            )
        ]
        self.num_classes: int = self._core.num_classes
        self.groups = [self._group(g, None) for g in self._core.groups]
        self.frozen = [self._group(g, self._reason(g.event)) for g in self._core.frozen]
        _make_unique(self.groups)
        self._class_channels = torch.empty(self.num_classes, dtype=torch.float32)
        for group in self.groups:
            self._class_channels[group.classes] = group.channels / group.num_classes
        self._ends = torch.tensor([0, *(group.classes.stop for group in self.groups)])
        self._reader_dims: dict[int, set[int]] = {}
        for read in self._core.reads:
            if read.slot >= 0:
                self._reader_dims.setdefault(read.slot, set()).add(read.slot_dim)
        for slot, dim, positions, reason in self._kept:
            axis = self.slots[slot].axes[dim]
            self._protect_classes(None if axis is None else axis[positions], reason)

    def reader_dim(self, slot: int) -> int | None:
        """The dim by which a parameter reads channels; None if it reads none, or is used both ways round."""
        dims = self._reader_dims.get(slot, set())
        return next(iter(dims)) if len(dims) == 1 else None

    def read_by_weights(self) -> torch.Tensor:
        """bool, [num_classes]: classes that a mask can scale, because some parameter reads them."""
        read = torch.zeros(self.num_classes, dtype=torch.bool)
        for i, slot in enumerate(self.slots):
            dim = self.reader_dim(i)
            if dim is not None:
                read[slot.axes[dim][slot.axes[dim] >= 0]] = True
        return read

    def is_activation(self, tensor: int) -> bool:
        """Whether a recorded tensor is no parameter, no buffer and no view of one."""
        return not self._core.is_slot_view(tensor)

    def output_parameters(self) -> list[nn.Parameter]:
        """Parameters of the layers whose channels are the model's output: its head."""
        names = {group.name for group in self.frozen if group.reason and group.reason.startswith("output of the model")}
        return [s.tensor for s in self.slots if s.is_parameter and layer_of(s.name) in names]

    @property
    def device(self) -> torch.device:
        return self.slots[0].tensor.device

    def _group(self, group: Any, reason: str | None) -> Group:
        name = self.recording.slots[group.slot]
        module = layer_of(name)
        classes = slice(group.first_class, group.first_class + group.num_classes)
        return Group(module, group.channels, classes, reason)

    def _reason(self, event: int) -> str:
        reason, op = self._core.events[event]
        return reason if op < 0 else f"{reason} ({self.recording.calls[op]})"

    def layers(self) -> list[list[str]]:
        """Per group, the layers with a weight of two dims or more that emit its channels."""
        members: list[list[str]] = [[] for _ in self.groups]
        starts = torch.tensor([group.classes.start for group in self.groups])
        for i, slot in enumerate(self.slots):
            for dim, axis in enumerate(slot.axes):
                if not slot.is_parameter or len(slot.axes) < 2 or axis is None or dim == self.reader_dim(i):
                    continue
                found = torch.searchsorted(starts, axis[axis >= 0].unique(), right=True) - 1
                for group in found.unique().tolist():
                    name = layer_of(slot.name)
                    if name not in members[group]:
                        members[group].append(name)
        return members

    def unlisted(self) -> list[Group]:
        """Layers with a weight of two dims or more that belong to no group, prunable or frozen, with the reason."""
        listed = {name for names in self.layers() for name in names} | {group.name for group in self.frozen}
        rest: dict[str, Group] = {}
        for i, slot in enumerate(self.slots):
            name = layer_of(slot.name)
            if slot.is_parameter and len(slot.axes) > 1 and name not in listed and name not in rest:
                event = self._core.freeze_event(i, 0)
                channels = self.recording.shapes[i][0]
                reason = "its channels are not the output of a layer"
                if event >= 0:
                    reason = self._reason(event)
                elif channels == 1:
                    reason = "minimum width: its one channel has to stay"
                rest[name] = Group(name, channels, slice(0, 0), reason)
        return list(rest.values())

    def __repr__(self) -> str:
        return (
            f"ChannelGraph({type(self.model).__name__}: {len(self.groups)} groups, {self.num_classes} classes, "
            f"{len(self.frozen)} frozen)"
        )

    # --- choosing -----------------------------------------------------------------------------------------------
    def all_kept(self) -> torch.Tensor:
        """A keep mask (bool, [num_classes]) that removes nothing."""
        return torch.ones(self.num_classes, dtype=torch.bool)

    @property
    def prunable(self) -> list[Group]:
        return [group for group in self.groups if group.reason is None]

    def protect(self, names: Iterable[str], reason: str = "kept on request") -> None:
        """Keeps every group that touches a parameter of the named modules.

        "layer#2", as one of several groups of a layer is called, means that layer.

        Raises:
            ArgumentError: no list of names, or a name is neither a module nor a parameter of the model.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ArgumentError(f"keep: expected a list of module or parameter names, got {names!r}")
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in names:
            named = places(modules, name)
            if not named:
                raise ArgumentError(f"keep: the model has no module or parameter named '{name}'")
            self.protected[name] = reason
            for i, slot in enumerate(self.slots):
                # By any of its names: a tied weight has one for each layer that uses it.
                if any(module in named or (module, key) in named for module, key in slot.owners):
                    for dim, axis in enumerate(slot.axes):
                        self._kept.append((i, dim, slice(None), reason))
                        self._protect_classes(axis, reason)

    def _protect_classes(self, axis: torch.Tensor | None, reason: str) -> None:
        if axis is None:
            return
        touched = torch.zeros(self.num_classes, dtype=torch.bool)
        touched[axis[axis >= 0]] = True
        for group in self.prunable:
            if touched[group.classes].any():
                group.reason = reason

    def macs(self, keep: torch.Tensor | None = None) -> int:
        """Multiply-accumulates of one forward of one example, of the whole network or of what `keep` leaves."""
        return self._core.macs(self._bytes(keep)) // _record.BATCH

    def params(self, keep: torch.Tensor | None = None) -> int:
        """Number of parameters, of the whole network or of what `keep` leaves."""
        return self._core.params(self._bytes(keep))

    def latency(self, keep: torch.Tensor | None = None) -> float:
        """Milliseconds of one forward, as `cost_table` predicts them.

        Raises:
            ArgumentError: there is no table, or not of this; so with the next two.
        """
        return self._measured("latency", keep)

    def train_step(self, keep: torch.Tensor | None = None) -> float:
        """Milliseconds of one training step, as `cost_table` predicts them."""
        return self._measured("train_step", keep)

    def memory(self, keep: torch.Tensor | None = None) -> float:
        """Peak bytes of one training step, as `cost_table` predicts them."""
        return self._measured("memory", keep)

    def _measured(self, unit: str, keep: torch.Tensor | None) -> float:
        predict = getattr(self.cost_table, unit, None)
        if predict is None:
            raise ArgumentError(
                f"Budget({unit}=): needs measured costs: graph.cost_table = LayerCosts(graph, batch, loss_fn)"
            )
        return predict(self.all_kept() if keep is None else self.checked(keep))

    def channels(self, keep: torch.Tensor | None = None) -> int:
        """Number of channels over all groups."""
        keep = self.all_kept() if keep is None else self.checked(keep)
        return round((self.class_channels() * keep).sum().item())

    def class_channels(self) -> torch.Tensor:
        """float, [num_classes]: how many channels of its group's layer go with each class."""
        return self._class_channels

    def select(self, scores: torch.Tensor, budget: Budget, **options: Any) -> torch.Tensor:
        """The keep mask that meets `budget` with the highest-scored classes; see `Budget.select`."""
        if not hasattr(budget, "select"):
            raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
        return budget.select(self, scores, **options)

    def _bytes(self, keep: torch.Tensor | None) -> Any:
        keep = self.all_kept() if keep is None else self.checked(keep)
        return keep.numpy().view("uint8")

    def checked(self, keep: torch.Tensor) -> torch.Tensor:
        """`keep` as a bool tensor on the CPU.

        Raises:
            ArgumentError: not a mask, wrong size, a group without a channel left, or a protected group cut.
        """
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
            keep = _as_mask(keep)
        keep = keep.detach().cpu().contiguous()
        if keep.shape != (self.num_classes,):
            raise ArgumentError(f"keep: expected shape ({self.num_classes},), got {tuple(keep.shape)}")
        counts = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)])[self._ends].diff().tolist()
        for group, count in zip(self.groups, counts, strict=True):
            if count == 0:
                raise ArgumentError(f"keep: no channel of '{group.name}' is left; at least one must stay")
            if group.reason is not None and count < group.num_classes:
                raise ArgumentError(f"keep: '{group.name}' cannot be pruned: {group.reason}")
        return keep

    def keep_groups(self, indices: Iterable[int], reason: str) -> None:
        """Marks groups as not prunable."""
        for index in indices:
            group, made = self.groups[index], self._core.groups[index]
            axis = self.slots[made.slot].axes[made.dim]
            inside = (axis >= group.classes.start) & (axis < group.classes.stop)
            self._kept.append((made.slot, made.dim, inside.nonzero().flatten(), reason))
            group.reason = reason

    def cut_groups(self, keep: torch.Tensor) -> list[int]:
        """Indices of the groups that lose channels."""
        return [g for g, group in enumerate(self.groups) if not bool(keep[group.classes].all())]

    def cut_only(self, keep: torch.Tensor, groups: Iterable[int]) -> torch.Tensor:
        """The part of the cut that concerns these groups."""
        partial = self.all_kept()
        for g in groups:
            partial[self.groups[g].classes] = keep[self.groups[g].classes]
        return partial

    def cut_groups_at(self, call: _record.Call, keep: torch.Tensor) -> list[int]:
        """Indices of the groups that lose channels and label a tensor of the call."""
        found = {g for t in (*call.outs, *_record.refs_in(call.args)) for g in self._core.groups_of(t)}
        return [g for g in sorted(found) if not bool(keep[self.groups[g].classes].all())]

    @collection_paused()
    def settle(self, strict: bool = False) -> None:
        """Mends what a smaller network would trip over: sizes that the forward holds in attributes or literals.

        Attributes are bound to the width they follow, groups that must stay equally wide are tied, and what cannot be
        mended is kept. Groups and classes are numbered anew, so do it before `select`.

        Args:
            strict: nothing may be kept but outputs of the model, what `protect` names, and layers of one channel.

        Raises:
            CompactionError: the forward does not even repeat itself.
            ModelError: with `strict`, something else is kept; lists every such group with its reason.
        """
        _settle.settle(self)
        if strict:
            check_strict(self)

    def output(self, inputs: Any) -> Any:
        """The model's output in eval mode, without gradients or autocast; the model is left as found."""
        return _record.evaluate(self.model, inputs)

    # --- cutting ------------------------------------------------------------------------------------------------
    def plan(self, keep: torch.Tensor) -> _plan.Plan:
        """What `keep` means for every parameter, buffer and module attribute. Changes nothing."""
        return _plan.make(self, self.checked(keep))

    @collection_paused()
    def check(self, keep: torch.Tensor) -> None:
        """Replays the smaller network on meta tensors. Changes nothing.

        Raises:
            CompactionError: it would not run as predicted; ``.groups`` names the groups to keep.
        """
        _replay.check(self, self.plan(keep))

    @collection_paused()
    def compact(
        self,
        keep: torch.Tensor,
        optimizer: Optimizers = None,
        ema: nn.Module | None = None,
    ) -> nn.Module:
        """Takes the channels out for good, in place, all or nothing.

        The graph describes the old network afterwards; `smaller` is that of the new one.

        Args:
            keep: bool, [num_classes].
            optimizer: its per-parameter state is cut with the parameters; param_groups stay as they are. Several, in a
                list or tuple, where parameters are shared out among them.
            ema: a module with the same parameter names (optionally under ``module.``) that is cut alike.

        Raises:
            CompactionError: the replay of the smaller network differs from the prediction; nothing has changed.
            ArgumentError: state that cannot be cut, or the network has been cut since it was traced; nothing has
                changed.
        """
        self.check_current()
        plan = self.plan(keep)
        recording = _replay.check(self, plan)
        _compact.apply(self, plan, optimizer, ema)
        self._compacted = recording, plan
        return self.model

    def check_current(self) -> None:
        """Raises ArgumentError if the network has been cut since it was traced."""
        if self._compacted is not None:
            raise ArgumentError("graph: describes the network before it was compacted; go on with `graph.smaller()`")
        for slot, shape in zip(self.slots, self.recording.shapes, strict=False):
            now = tuple(slot.tensor.shape)
            if now != shape:  # cut by way of another graph: the positions of this one are other channels by now
                raise ArgumentError(
                    f"graph: '{slot.name}' had shape {shape} when the model was traced, now {now}; trace it again"
                )

    def smaller(self) -> ChannelGraph:
        """The graph of the network that `compact` has left, without another trace: to prune again.

        Groups and classes are numbered anew; what was kept stays kept.

        Raises:
            ArgumentError: nothing was compacted.
        """
        if self._compacted is None:
            raise ArgumentError("graph.smaller: nothing was compacted yet")
        recording, plan = self._compacted

        def moved(slot: int, dim: int, positions: torch.Tensor | slice) -> torch.Tensor | slice:
            index = plan.kept[slot][dim]
            return positions if index is None or isinstance(positions, slice) else torch.searchsorted(index, positions)

        recording.caches = self.recording.caches
        recording.pinned = self.recording.pinned  # on meta tensors nobody sees who shares memory
        graph = ChannelGraph(self.model, self.example, recording)
        graph.protected = dict(self.protected)
        graph._kept = [(slot, dim, moved(slot, dim, where), reason) for slot, dim, where, reason in self._kept]
        # Where the same operators run, tensors have the same indices, and what was mended stays so.
        if [(c.name, c.outs) for c in recording.calls] == [(c.name, c.outs) for c in self.recording.calls]:
            graph.bindings = list(self.bindings)
            graph.rebuild(self.ties, self.survivors)
        else:
            graph.rebuild([])
            if self.bindings or self.ties or self.survivors:
                graph.settle()
        return graph

    @contextlib.contextmanager
    def masked(self, keep: torch.Tensor | _plan.Plan, scale: torch.Tensor | None = None) -> Iterator[nn.Module]:
        """Inside, the model runs virtually compacted: on gathered weights, dead channels are never computed.

        Gradients reach the dense parameters. Buffers are copies: what a forward does to them is dropped at the end.

        Args:
            keep: bool, [num_classes], or the plan made of it (to use it for many steps).
            scale: float, [num_classes]: each class's factor z on the weights that read it; differentiable.

        Raises:
            ArgumentError: a mask that cannot be, a plan of another graph, a scale of another size, or the network has
                been cut since it was traced.
        """
        self.check_current()
        plan = keep if isinstance(keep, _plan.Plan) else self.plan(keep)
        if plan.graph is not self:
            raise ArgumentError("keep: is the plan of another graph; make it of this one, with graph.plan(keep)")
        if scale is not None and (not isinstance(scale, torch.Tensor) or scale.shape != (self.num_classes,)):
            what = tuple(scale.shape) if isinstance(scale, torch.Tensor) else type(scale).__name__
            raise ArgumentError(f"scale: expected a tensor of shape ({self.num_classes},), got {what}")
        with plan.virtual(scale), emptied(self.recording.caches):
            yield self.model


def _as_mask(keep: Any) -> torch.Tensor:
    try:
        values = torch.as_tensor(keep)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"keep: expected a bool tensor, [num_classes], got {type(keep).__name__}") from None
    # Scores given in the place of a choice would all count as "stays".
    if not bool(((values == 0) | (values == 1)).all()):
        raise ArgumentError("keep: expected a bool tensor, [num_classes], got other numbers; scores go to graph.select")
    return values.bool()


def _make_unique(groups: list[Group]) -> None:
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.name] = counts.get(group.name, 0) + 1
    seen: dict[str, int] = {}
    for group in groups:
        if counts[group.name] > 1:
            seen[group.name] = seen.get(group.name, 0) + 1
            group.name = f"{group.name}#{seen[group.name]}"


@collection_paused()
def trace(model: nn.Module, example: Any) -> ChannelGraph:
    """Runs the model once on meta tensors and finds out which channels live or die together.

    Args:
        model: left exactly as found.
        example: an input, a tuple of positional inputs or a dict of keyword inputs; first dim = batch. Only shapes
            and dtypes matter.

    Raises:
        ArgumentError: `model` is not an nn.Module, or is a scripted or wrapped one.
        TraceError: the forward failed on meta tensors.
    """
    model = unwrapped(model)
    return ChannelGraph(model, example, _record.record(model, example))
