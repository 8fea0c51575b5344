"""What the zoo does to one network: prune half the MACs, hold the result to the masked dense network, train it."""

from __future__ import annotations

import collections
import copy
import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stamp_fast import Budget, ChannelGraph, importance, trace
from stamp_fast.errors import BudgetError, CompactionError
from stamp_fast.graph._verify import difference, masked_output
from tests.reference.randomise import randomise

from .zoo_models import ZooModel

__all__ = ["ASK", "examine", "shapes_of", "train", "verdict", "without_folders"]

ASK = 0.5
_WITHIN = 0.02
_MOVED = 1e-3  # less than this, and the channels taken out did not matter: the comparison says nothing
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
_FLOAT32_FROM = 300_000_000  # parameters: in float64 these take too much memory


def examine(entry: ZooModel) -> Iterator[dict[str, Any]]:
    """Takes one network through all stages; yields what is known as it becomes known.

    Raises:
        Exception: whatever the stage named last raises.
    """
    torch.manual_seed(0)
    begin = time.perf_counter()
    yield {"stage": "build"}
    model = entry.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield {"stage": "dense", "params": parameters}
    shape = _accepted_shape(entry, model)
    dtype = _accepted_dtype(entry, randomise(model), shape)
    model.to(dtype)
    inputs = entry.inputs(shape, 2, dtype)
    yield {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}

    yield {"stage": "trace"}
    graph = trace(model, inputs)
    heads = {id(parameter) for parameter in graph.output_parameters()}
    yield {
        "stage": "settle",
        "macs": graph.macs(),
        "heads": [name for name, m in model.named_modules() if any(id(p) in heads for p in m.parameters(False))],
    }
    graph.settle()
    scores = importance.magnitude(graph, p=2)
    for retries in itertools.count():
        yield {"stage": "select", "retries": retries, "groups": len(graph.prunable), **_kept(graph)}
        keep, note = _within_reach(graph, scores)
        reached = graph.macs(keep) / graph.macs()
        yield {"stage": "masked", "reached": reached, "note": without_folders(note)}
        expected = entry.comparable(masked_output(graph, keep, inputs))
        yield {"stage": "compact", "moved": _apart(entry.comparable(graph.output(inputs)), expected)}
        predicted = graph.params(keep)
        try:
            graph.compact(keep)
            break
        except CompactionError as fixed:  # as in `stamp_fast.prune`: what the probe did not find stays too
            if not fixed.groups:
                raise
            graph.keep_groups(fixed.groups, fixed.reason)
    left = sum(parameter.numel() for parameter in model.parameters())
    yield {"stage": "equality", "predicted": left == predicted, "params_left": left / parameters}
    yield {"equality": _apart(entry.comparable(graph.output(inputs)), expected)}
    yield {"stage": "train"}
    train(model, entry.train_inputs(shape, 2, dtype))
    yield {"stage": "checked", "seconds": time.perf_counter() - begin}


def verdict(record: dict[str, Any]) -> tuple[str, str]:
    """pass, partial or FAIL, and why it is not a pass."""
    if record.get("error"):
        return "FAIL", record["error"]
    if not record["reached"] < 1:
        return "FAIL", "nothing can be removed"
    if not record["moved"] > _MOVED:
        return "FAIL", f"the output moved by {record['moved']:.1e} only: nothing is compared"
    if not record["predicted"]:
        return "FAIL", "another number of parameters than predicted"
    if not record["equality"] <= _TOLERANCE[record["dtype"]]:
        return "FAIL", f"differs from the masked network by {record['equality']:.1e}"
    if abs(record["reached"] / ASK - 1) > _WITHIN:
        return "partial", record["note"]
    return "pass", ""


def _within_reach(graph: ChannelGraph, scores: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Half the network by the local ranking; where that is out of reach as little as can be had, and why."""

    def select(share: float, exact: bool = True) -> torch.Tensor:
        return graph.select(scores, Budget(macs=share), ranking="local", exact=exact)

    try:
        return select(ASK), ""
    except BudgetError as error:
        note = str(error)
    low, high = ASK, 1.0  # low cannot be had, high can
    try:
        return select(ASK, exact=False), note  # too coarse
    except BudgetError:
        pass
    while high - low > 1e-3:
        middle = (low + high) / 2
        try:
            select(middle, exact=False)
            high = middle
        except BudgetError:
            low = middle
    return select(high, exact=False), note


def train(model: nn.Module, inputs: tuple) -> None:
    """One forward and backward in train mode.

    Raises:
        ValueError: no parameter has a gradient, or one that is not finite.
    """
    model.train()
    tensors = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    sum(tensor.square().mean() for tensor in tensors).backward()
    model.eval()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError("train: no gradients, or some that are not finite")


def shapes_of(output: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in an output of any structure."""
    return [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _apart(a: Any, b: Any) -> float:
    """Relative difference of two outputs; infinite where tensors differ in number or shape, or are not finite."""
    finite = all(bool(t.isfinite().all()) for t in tree_leaves((a, b)) if isinstance(t, torch.Tensor))
    return difference(a, b) if finite and shapes_of(a) == shapes_of(b) else math.inf


def _accepted_shape(entry: ZooModel, model: nn.Module) -> tuple[int, ...]:
    """The first shape that the dense network runs forward and backward on."""
    *rest, last = entry.shapes(model)
    for shape in rest:
        trial = copy.deepcopy(model)
        try:
            with torch.no_grad():
                trial.eval()(*entry.inputs(shape, 2))
                trial.train()(*entry.train_inputs(shape, 2))
            return shape
        except Exception:  # whatever a network raises for inputs that are too small
            continue
    return last


def _accepted_dtype(entry: ZooModel, model: nn.Module, shape: tuple[int, ...]) -> torch.dtype:
    """float64, but for the largest networks and for those that make float32 tensors on their way."""
    if sum(parameter.numel() for parameter in model.parameters()) > _FLOAT32_FROM:
        return torch.float32
    try:
        with torch.no_grad():
            copy.deepcopy(model).double()(*entry.inputs(shape, 2, torch.float64))
    except RuntimeError:
        return torch.float32
    return torch.float64


def _kept(graph: ChannelGraph) -> dict[str, Any]:
    """How many groups stay whole, and how often for which reason; the output's own channels do not count."""
    groups = [group for group in graph.groups if group.reason] + graph.frozen + graph.unlisted()
    reasons = [group.reason for group in groups if not group.reason.startswith("output of the model")]
    return {"kept": len(reasons), "reasons": dict(collections.Counter(map(_short, reasons)).most_common())}


def _short(reason: str) -> str:
    """A reason without what differs from block to block: the module and sizes."""
    reason = without_folders(re.sub(r" in module '[^']*'", "", reason))
    place, line, rest = re.match(r"(?s)(.*?\.py:\d+)?(\)?)(.*)", reason).groups()
    return (place or "") + line + re.sub(r"\d+", "N", rest)


def without_folders(text: str) -> str:
    """Source files by the last folder only: the others differ from machine to machine."""
    return re.sub(r"/\S*/(?=\w+/\S*\.py)", "", text.replace("site-packages/", ""))
