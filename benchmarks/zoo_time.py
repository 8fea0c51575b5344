"""The structural work alone on one network of the zoo, ours and Torch-Pruning's in turns."""

from __future__ import annotations

import copy
import gc
import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from stamp_fast import Budget, importance, trace
from stamp_fast.errors import CompactionError
from tests.reference.randomise import randomise

from .timing import Contestant, in_turns
from .zoo_check import ASK, shapes_of, train, without_folders
from .zoo_models import ZooModel

__all__ = ["compare"]

_ROUNDS = 3
_SLOW = 5.0  # seconds; whoever takes longer is run once only


def compare(entry: ZooModel, known: dict[str, Any], peers: bool) -> Iterator[dict[str, Any]]:
    """Times of removing half of every group by its local L2 norm, from the dense network on, in float32, batch 1.

    Args:
        known: what `examine` has said of the network; times are taken only if it had no error.

    Yields:
        `ours`, seconds of each round, and `peer`: Torch-Pruning's verdict with the seconds of each of its rounds.
    """
    model = randomise(entry.build())
    shape = tuple(known["shape"])
    inputs = entry.inputs(shape, 1)

    def fresh() -> nn.Module:
        gc.collect()
        return copy.deepcopy(model)

    contestants = {}
    if "error" not in known:
        yield {"stage": "time"}
        contestants["ours"] = Contestant(partial(ours, inputs=inputs), fresh)
        yield {"ours": _rounds(contestants)["ours"]}
    if not peers:
        return
    yield {"stage": "peer"}
    theirs = partial(torch_pruning_prune, inputs=inputs, heads=known.get("heads"))
    result = _peer_verdict(entry, fresh(), theirs, inputs, shape)
    if result["verdict"] in ("runs", "does not train") and result["seconds"][0] <= _SLOW:
        contestants["peer"] = Contestant(theirs, fresh)
        rounds = _rounds(contestants)
        result["seconds"] = rounds.pop("peer")
        yield rounds
    yield {"peer": result}


def _rounds(contestants: dict[str, Contestant]) -> dict[str, list[float]]:
    """Seconds of each round after one that warms up; only of that one where it is slow."""
    one_round = in_turns(contestants)
    rounds = [one_round()]
    if max(rounds[0].values()) <= _SLOW:
        rounds = [one_round() for _ in range(_ROUNDS)]
    return {name: [seconds[name] for seconds in rounds] for name in contestants}


def ours(model: nn.Module, inputs: tuple) -> nn.Module:
    """The cut itself is replayed before it is made; where the replay trips over a fixed size, that is mended first."""
    graph = trace(model, inputs)
    for attempt in itertools.count():
        # What is kept whole counts as channels too.
        share = 1 - (1 - ASK) * sum(group.channels for group in graph.prunable) / graph.channels()
        scores = importance.magnitude(graph, p=2)
        keep = graph.select(scores, Budget(channels=share), ranking="local", exact=False)
        try:
            return graph.compact(keep)
        except CompactionError as fixed:
            if attempt == 0:
                graph.settle()
            elif fixed.groups:
                graph.keep_groups(fixed.groups, fixed.reason)
            else:
                raise
    raise AssertionError


def torch_pruning_prune(model: nn.Module, inputs: tuple, heads: list[str] | None) -> nn.Module:
    """Torch-Pruning as it comes: half of every group, the layers that make the output left alone."""
    import torch_pruning

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    # Without a graph of ours to name the output's layers, the last one is taken for it.
    ignored = [model.get_submodule(name) for name in heads] if heads else list(layers.values())[-1:]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - ASK,
        ignored_layers=ignored,
    )
    pruner.step()
    return model


def _peer_verdict(entry: ZooModel, model: nn.Module, theirs: Any, inputs: tuple, shape: tuple) -> dict[str, Any]:
    """What becomes of the network: pruned or not, and does it run and train afterwards?"""
    with torch.no_grad():
        wanted = shapes_of(model(*inputs))
    parameters = _parameters(model)
    begin = time.perf_counter()
    try:
        theirs(model)
    except Exception as error:  # whatever it raises is the verdict
        return {"verdict": f"raises {type(error).__name__}", "error": _first_line(error)}
    left = _parameters(model) / parameters
    result = {"verdict": "runs", "seconds": [time.perf_counter() - begin], "params_left": left}
    if left == 1:
        return result | {"verdict": "pruned nothing"}
    try:
        with torch.no_grad():
            got = shapes_of(model.eval()(*inputs))
    except Exception as error:
        return result | {"verdict": "forward breaks", "error": _first_line(error)}
    if got != wanted:
        return result | {"verdict": "output changes its shape", "error": f"{got} instead of {wanted}"}
    try:
        train(model, entry.train_inputs(shape, 2))
    except Exception as error:
        return result | {"verdict": "does not train", "error": _first_line(error)}
    return result


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _first_line(error: Exception) -> str:
    return without_folders(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")[:300]
