"""Where the structural time goes. `settle` is what prune() adds to trace; `compact` checks once more."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision

from stamp_fast import Budget, importance, trace

MODELS = ["resnet18", "resnet50", "mobilenet_v2", "vgg19_bn", "densenet121"]


@pytest.mark.parametrize("name", MODELS)
def test_phases(measure: Callable[..., None], name: str) -> None:
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)

    def one_round() -> dict[str, float]:
        gc.collect()
        model = copy.deepcopy(dense)
        seconds = {}

        def timed(phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **options)
            seconds[phase] = time.perf_counter() - begin
            return result

        graph = timed("trace", trace, model, example)
        timed("settle", graph.settle)
        scores = timed("score", importance.magnitude, graph, p=2)
        keep = timed("select", graph.select, scores, Budget(channels=0.5), ranking="local")
        timed("check", graph.check, keep)
        timed("compact", graph.compact, keep)
        return seconds

    measure(name, one_round, rounds=5)
