"""What every random network has to show. Only `masked_output` and the graph's labels are the library's own opinion;
the compacted network is run, its parameters are counted, and where only modules sum over channels it is also held to
a dense copy whose readers were zeroed by hand."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stamp_fast import ChannelGraph, CompactionError, TraceError, trace
from stamp_fast.graph._align import base_name
from stamp_fast.graph._record import _output_tensors, undisturbed
from stamp_fast.graph._verify import masked_output
from tests.reference.masked import kept_positions, with_zeroed_readers
from tests.reference.randomise import randomise

from .spec import PLAIN, Block, Network, build

__all__ = ["Failure", "Result", "examine"]

_TOLERANCE = 1e-9


class Failure(AssertionError):
    """The claim does not hold; `kind` is "mismatch" or "crash"."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class Result(NamedTuple):
    """What became of one network. Notes count what was left out of the comparison, and why."""

    status: str  # "equal", "nothing prunable", "not comparable", "does not run dense"
    operators: Counter[str]
    notes: Counter[str]
    graph: ChannelGraph | None = None


def examine(spec: Network) -> Result:
    """Builds, prunes and checks one network.

    Raises:
        Failure: the claim does not hold for it.
    """
    notes: Counter[str] = Counter()
    try:
        net, inputs = build(spec)
        randomise(net, spec.seed)
        dense = _outputs(net, inputs)
        _gradients(net, inputs, dict(net.named_parameters()), train=False)
    except Exception as error:  # blocks are tried one by one; together, a view may meet a tensor it cannot view
        return Result("does not run dense", Counter(), Counter([_one_line(error)[:90]]))
    if not all(bool(t.isfinite().all()) for t in dense) or max(t.abs().max().item() for t in dense) < 1e-6:
        return Result("not comparable", Counter(), Counter(["the dense network gives zero, infinity or NaN"]))
    before = copy.deepcopy(net.state_dict())
    try:
        graph = trace(net, inputs)
        first = graph
        operators = Counter(base_name(call.name).rstrip("_") for call in graph.recording.calls)
        graph.settle()
        if not any(group.num_classes > 1 for group in graph.prunable):
            return Result("nothing prunable", operators, notes, first)
        status = _prune(spec, net, graph, inputs, before, notes, spec.seed)
        if spec.seed % 4 == 1:  # again, on what is left
            graph = trace(net, inputs)
            graph.settle()
            if any(group.num_classes > 1 for group in graph.prunable):
                _prune(spec, net, graph, inputs, copy.deepcopy(net.state_dict()), notes, spec.seed + 1)
                notes["pruned a second time"] += 1
    except Failure:
        raise
    except Exception as error:
        raise Failure("crash", _one_line(error)) from error
    return Result(status, operators, notes, first)


def random_keep(graph: ChannelGraph, seed: int) -> Tensor:
    """Any number of classes of every prunable group, from one to all; at least one group loses something."""
    generator = torch.Generator().manual_seed(seed)
    keep = graph.all_kept()
    for group in graph.prunable:
        count = 1 + int(torch.randint(group.num_classes, (), generator=generator))
        order = torch.randperm(group.num_classes, generator=generator)
        keep[group.classes.start + order[count:]] = False
    if keep.all():
        largest = max(graph.prunable, key=lambda group: group.num_classes)
        keep[largest.classes.start] = False
    return keep


def _prune(
    spec: Network, net: nn.Module, graph: ChannelGraph, inputs: tuple, before: dict, notes: Counter, seed: int
) -> str:
    keep = random_keep(graph, seed)
    while True:
        try:
            graph.check(keep)
            break
        except CompactionError as fixed:
            if not fixed.groups:
                raise
            notes["a group was kept after settle()"] += 1
            graph.keep_groups(fixed.groups, fixed.reason)
            for group in graph.groups:
                if group.reason is not None:
                    keep[group.classes] = True
            if keep.all():
                return "nothing prunable"
    dense = _outputs(net, inputs)
    dense_net = copy.deepcopy(net)
    try:
        expected = _output_tensors(masked_output(graph, keep, inputs))
    except TraceError as error:
        expected = None
        what = (
            "in a network with recurrent layers"
            if "'recurrent'" in repr(spec)
            else _one_line(error).split(" in mod")[0]
        )
        notes[f"no masked output: {what}"] += 1
    by_hand = None
    if all(_is_plain(b) for b in spec.blocks) and spec.head not in (7,):
        by_hand = _outputs(_masked_by_hand(net, kept_positions(graph, keep)), inputs)
        notes["held to readers zeroed by hand"] += 1

    parameters = dict(net.named_parameters())
    with graph.masked(keep):
        virtual = _outputs(net, inputs)
        gradients = _gradients(net, inputs, parameters, train=False)
    for name, value in net.state_dict().items():
        if not torch.equal(value, before[name]):
            raise Failure("mismatch", f"masked() has changed '{name}'")
    params, macs, plan = graph.params(keep), graph.macs(keep), graph.plan(keep)
    optimizer = _stepped(net, inputs) if seed % 4 == 2 else None
    graph.compact(keep, optimizer=optimizer)
    small = _outputs(net, inputs)

    for what, reference in (
        ("masked dense network", expected),
        ("readers zeroed by hand", by_hand),
        ("masked()", virtual),
    ):
        if reference is not None and not _close(small, reference) and _stable(dense_net, net, inputs, notes):
            error = max(_error(a, b) for a, b in zip(small, reference, strict=True))
            raise Failure("mismatch", f"the compacted network differs from the {what} by {error:.1e}")
    moved = not _close(small, dense, 1e-9)
    notes["the output moved" if moved else "the output did not move"] += 1
    if params != sum(p.numel() for p in net.parameters()):
        raise Failure("mismatch", f"params {params}, counted {sum(p.numel() for p in net.parameters())}")
    counted = _counted_macs(net, inputs)
    if macs != counted:
        raise Failure("mismatch", f"macs {macs}, counted {counted}")
    _check_gradients(net, plan, inputs, gradients, notes)
    if optimizer is not None:
        _check_optimizer(net, optimizer)
        notes["optimizer carried"] += 1
    if seed % 4 == 3:
        if not _close(_outputs(copy.deepcopy(net), inputs), small):
            raise Failure("mismatch", "a deep copy of the compacted network gives another output")
        notes["deep copy"] += 1
    _check_training(net, dense_net, inputs, notes)
    return "equal"


def _is_plain(spec: Block) -> bool:
    return spec.kind in PLAIN and all(_is_plain(child) for child in spec.children)


def _masked_by_hand(net: nn.Module, positions: dict[str, list[Tensor]]) -> nn.Module:
    """A dense copy whose convolutions, linear and recurrent layers ignore what does not stay."""
    masked = with_zeroed_readers(net, positions)
    for name, module in masked.named_modules():
        for key in getattr(module, "_flat_weights_names", ()):
            parameter, stays = getattr(module, key), positions[f"{name}.{key}"]
            if parameter.dim() == 2:
                with torch.no_grad():
                    parameter.index_fill_(1, (~stays[1]).nonzero().flatten(), 0.0)
    return masked


def _outputs(net: nn.Module, inputs: tuple) -> list[Tensor]:
    with undisturbed(net):
        net.eval()
        return _output_tensors(net(*(x.clone() for x in inputs)))


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    error = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
    return float("inf") if bool(error.isnan()) else error.item()


def _close(a: list[Tensor], b: list[Tensor], tolerance: float = _TOLERANCE) -> bool:
    return all(_error(x, y) <= tolerance for x, y in zip(a, b, strict=True))


def _stable(dense: nn.Module, small: nn.Module, inputs: tuple, notes: Counter) -> bool:
    """Whether rounding errors stay small in both; steps (floor, argmax) and near-singular norms blow them up."""
    for net in (dense, small):
        reference = _outputs(net, inputs)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            shaken = copy.deepcopy(net)
            with torch.no_grad():
                for p in shaken.parameters():
                    p.mul_(1 + 1e-14 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if not _close(_outputs(shaken, inputs), reference, _TOLERANCE / 10):
                notes["rounding errors grow beyond the tolerance in it"] += 1
                return False
    return True


def _counted_macs(net: nn.Module, inputs: tuple) -> int:
    two = [x[:2] for x in inputs]
    with undisturbed(net), FlopCounterMode(display=False) as counter:
        net.eval()
        net(*two)
    return counter.get_total_flops() // 4


def _loss(outputs: list[Tensor]) -> Tensor:
    return sum((y.square() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).mean() for y in outputs)


def _gradients(net: nn.Module, inputs: tuple, parameters: dict[str, Tensor], *, train: bool) -> dict[str, Tensor]:
    """Of the loss in every parameter that it depends on."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    net.train(train)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = _output_tensors(net(*(x.clone() for x in inputs)))
        found = torch.autograd.grad(_loss(outputs), list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    finally:
        net.eval()
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _check_gradients(net: nn.Module, plan: Any, inputs: tuple, virtual: dict[str, Tensor], notes: Counter) -> None:
    """The gradient through `masked` is that of the compacted network, in the places of the live channels."""
    small = _gradients(net, inputs, dict(net.named_parameters()), train=False)
    # All packed parameters come from one operator: its backward gives zeros for those that nothing depends on.
    unlike = [name for name in small.keys() ^ virtual.keys() if name in small or bool(virtual[name].any())]
    if unlike:
        raise Failure("mismatch", f"gradients reach other parameters: {sorted(unlike)}")
    if not all(bool(g.isfinite().all()) for g in virtual.values()):
        notes["gradients are not finite in masked() either"] += 1
        return
    largest = max((g.abs().max().item() for g in virtual.values()), default=0.0)
    for slot, kept in zip(plan.graph.slots, plan.kept, strict=True):
        if slot.name not in small:
            continue
        live = virtual[slot.name]
        for dim, index in enumerate(kept):
            if index is not None:
                live = live.index_select(dim, index)
        if live.shape != small[slot.name].shape or not (live - small[slot.name]).abs().max() <= 1e-7 * largest + 1e-12:
            raise Failure("mismatch", f"the gradient of '{slot.name}' differs between compacted and masked()")
        total, part = virtual[slot.name].abs().sum(), live.abs().sum()
        if not (total - part).abs() <= 1e-9 * total + 1e-12:
            raise Failure("mismatch", f"a removed part of '{slot.name}' has a gradient in masked()")


def _check_training(net: nn.Module, dense: nn.Module, inputs: tuple, notes: Counter) -> None:
    """A backward pass in training mode, batch of 4, reaches the parameters that it reaches in the dense network."""
    four = tuple(torch.cat([x, x[:1].flip(-1)]) for x in inputs)
    try:
        expected = _gradients(dense, four, dict(dense.named_parameters()), train=True)
    except (RuntimeError, ValueError):
        notes["the dense network does not train"] += 1
        return
    found = _gradients(net, four, dict(net.named_parameters()), train=True)
    if found.keys() != expected.keys():
        raise Failure("mismatch", f"training reaches other parameters: {sorted(found.keys() ^ expected.keys())}")
    for name, gradient in found.items():
        if not bool(gradient.isfinite().all()) and bool(expected[name].isfinite().all()):
            raise Failure("mismatch", f"the gradient of '{name}' is not finite in training")


def _stepped(net: nn.Module, inputs: tuple) -> torch.optim.Optimizer:
    """An optimizer with state, whose step has left the parameters as they were."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    for name, gradient in _gradients(net, inputs, dict(net.named_parameters()), train=False).items():
        net.get_parameter(name).grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a kink must not spoil the parameters
    optimizer.step()
    return optimizer


def _check_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in net.named_parameters():
        tensors = [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, Tensor) and t.dim()]
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        if any(t.shape != parameter.shape for t in tensors):
            raise Failure("mismatch", f"optimizer state or gradient of '{name}' has another shape than the parameter")
    optimizer.step()
    net.zero_grad()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
