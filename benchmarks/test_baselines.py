"""One train step beside what people would try first: the masks of torch.nn.utils.prune, Torch-Pruning at the same MACs,
torch.compile, and the network written by hand at the same widths.
"""

from __future__ import annotations

import copy
import importlib.metadata
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.nn.utils import prune as masks

from stamp_fast import trace
from stamp_fast.graph._verify import difference, masked_output

from .networks import cifar_resnet18, randomise, widths_of
from .steps import BATCH, BFLOAT16, FLOAT32, Batch, Precision, batch_for, choose, loss_of, train_step
from .timing import Contestant, Ratio, in_turns

TOLERANCE = 1e-5
MASKED = "torch.nn.utils.prune"
COMPILED = ("dense", "compacted", "by hand", "Torch-Pruning")
MACS, FIRST = "MACs, dense / this", "s of the first step, which compiles"  # columns of the table


def mask(model: nn.Module, images: torch.Tensor, keep: torch.Tensor) -> nn.Module:
    """The same channels out, by `torch.nn.utils.prune`, in place: filters of convolutions, and scale and bias of batch
    norms, without which a dead channel would go on as a constant.
    """
    plan = trace(model, images).plan(keep)
    for slot, kept in zip(plan.graph.slots, plan.kept, strict=True):
        if slot.is_parameter and kept[0] is not None:
            alive = torch.zeros_like(slot.tensor)
            alive[kept[0]] = 1
            for module, name in slot.owners:
                masks.custom_from_mask(module, name, alive)
    return model


def torch_pruned(dense: nn.Module, batch: Batch, method: str, share: float, round_to: int | None) -> nn.Module:
    """What Torch-Pruning makes of the network, by the same kind of scores and with the same floor under the widths.

    It takes a ratio of channels and no budget in MACs: by bisection, the ratio that comes closest to `share` of them.
    """
    import torch_pruning  # here, for what else is in this file needs none of it

    examples = batch[0][:2]
    grads = [None for _ in dense.parameters()]
    if method == "taylor":
        scored = copy.deepcopy(dense).train()
        loss_of(scored, batch).backward()
        grads = [parameter.grad for parameter in scored.parameters()]
    macs = trace(dense, examples).macs()

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense).eval()
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = copy.deepcopy(grad)
        options = (
            {"importance": torch_pruning.importance.GroupTaylorImportance(), "global_pruning": True}
            if method == "taylor"
            else {"importance": torch_pruning.importance.GroupMagnitudeImportance(p=2)}
        )
        torch_pruning.pruner.MagnitudePruner(
            model,
            examples,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=[model.fc],
            round_to=round_to,
            **options,
        ).step()
        model.zero_grad(set_to_none=True)
        return model

    def off(model: nn.Module) -> float:
        return trace(model, examples).macs() / macs - share

    low, high = 0.0, 1.0
    best, nearest = dense, 1.0 - share
    for _ in range(10):
        model = pruned((low + high) / 2)
        too_much = off(model)
        if abs(too_much) < abs(nearest):
            best, nearest = model, too_much
        if abs(too_much) < 1e-3:
            break
        low, high = ((low + high) / 2, high) if too_much > 0 else (low, (low + high) / 2)
    return best


@torch.no_grad()
def _check_outputs(dense: nn.Module, small: dict[str, nn.Module], keep: torch.Tensor) -> float:
    """In eval mode, those with the same channels compute what the dense network does with the others masked where they
    are read. The largest difference.
    """
    images = torch.randn(4, 3, 32, 32)
    dense.eval()
    expected = masked_output(trace(dense, images), keep, images)
    assert difference(dense(images), expected) > 0.01, "the channels taken out do not matter"
    worst = max(difference(model.eval()(images), expected) for model in small.values())
    assert worst < TOLERANCE
    return worst


def add_compiled(
    steps: dict[str, Callable[[], float]],
    models: dict[str, nn.Module],
    batch: Batch,
    precision: Precision,
    losses: dict[str, list[float]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Adds the compiled networks' steps, each after two of them. Seconds of the first; why the others do not compile.

    Args:
        models: as they were before any step.
        losses: of two steps of each, not compiled: compiled ones have to go down alike.
    """
    torch.compiler.reset()  # what the case before has compiled counts towards dynamo's limit
    with fresh_cache():
        torch.compile(nn.ReLU())(torch.ones(4))  # the compiler's own imports are no network's to pay for
    seconds, failed = {}, {}
    for name, model in models.items():
        begin = time.perf_counter()
        try:
            # Whole or not at all: what compiles in pieces is slower, and nothing would tell. Of two networks alike the
            # second would find what was compiled for the first, in memory (isolate_recompiles) and in files.
            compiled = torch.compile(model, fullgraph=True, dynamic=False, isolate_recompiles=True)
            step = train_step(compiled, batch, precision.autocast)
            with fresh_cache():
                first = step()
        except Exception as error:  # whatever it is: the others are still to be timed
            failed[f"{name}, compiled"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        seconds[f"{name}, compiled"] = time.perf_counter() - begin
        # Fused operators round less often than bfloat16 asks for.
        assert [first, step()] == pytest.approx(losses[name], rel=2e-2 if precision.autocast else 1e-3), name
        steps[f"{name}, compiled"] = step
    return seconds, failed


def ratios_of(names: list[str]) -> list[Ratio]:
    """Dense over all, compiled dense over the smaller ones, Torch-Pruning over ours, and what compiling ours brings."""
    smaller = [name for name in names if name.removesuffix(", compiled") not in ("dense", MASKED)]
    pairs = [("dense", name) for name in names if name != "dense"]
    pairs += [("dense, compiled", name) for name in smaller]
    pairs += [("Torch-Pruning", "compacted"), ("Torch-Pruning, compiled", "compacted, compiled")]
    pairs += [("compacted", "compacted, compiled")]
    return [Ratio(top, bottom) for top, bottom in pairs if top in names and bottom in names]


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method, round_to", [("magnitude", None), ("taylor", None), ("taylor", 8)], ids=["magnitude", "taylor", "taylor-8"]
)
def test_baselines(measure: Callable[..., None], method: str, round_to: int | None, precision: Precision) -> None:
    torch.manual_seed(0)
    batch = batch_for(precision)
    dense = randomise(cifar_resnet18()).to(memory_format=precision.layout)
    graph = trace(copy.deepcopy(dense), batch[0])
    keep = choose(method, graph, batch, round_to)
    macs = graph.macs(keep) / graph.macs()
    compacted = copy.deepcopy(dense)
    trace(compacted, batch[0]).compact(keep)
    by_hand = cifar_resnet18(**widths_of(compacted))
    by_hand.load_state_dict(compacted.state_dict())
    theirs = torch_pruned(dense, batch, method, macs, round_to)
    models = {
        "dense": dense,
        MASKED: mask(copy.deepcopy(dense), batch[0], keep),
        "compacted": compacted,
        "by hand": by_hand,
        "Torch-Pruning": theirs,
    }
    models = {name: model.to(memory_format=precision.layout) for name, model in models.items()}
    same = (MASKED, "compacted", "by hand")
    error = _check_outputs(copy.deepcopy(dense), {name: models[name] for name in same}, keep)
    left = {name: trace(copy.deepcopy(models[name]), batch[0][:2]).macs() for name in COMPILED}
    if method == "magnitude":
        assert widths_of(theirs) == widths_of(compacted)
    assert left["Torch-Pruning"] == pytest.approx(left["compacted"], rel=0.1)

    to_compile = {name: copy.deepcopy(models[name]) for name in COMPILED}
    steps = {name: train_step(model, batch, precision.autocast) for name, model in models.items()}
    # Two steps each: the second loss depends on the gradients of the first.
    losses = {name: [step(), step()] for name, step in steps.items()}
    for name in same:
        assert losses[name] == pytest.approx(losses["by hand"], rel=1e-3), f"{name}: {losses}"
    seconds, failed = add_compiled(steps, to_compile, batch, precision, losses)

    left[MASKED] = left["dense"]  # the masks are zeros that are multiplied like any number
    fewer = {name: left["dense"] / left[name.removesuffix(", compiled")] for name in steps}
    notes = [
        f"batch {BATCH}; MACs {macs:.3f} of dense, by Torch-Pruning {left['Torch-Pruning'] / left['dense']:.3f}",
        *(f"{who}: {_described(models[name])}" for who, name in [("ours", "compacted"), ("its", "Torch-Pruning")]),
        *(f"**not timed**: {name}: {why}" for name, why in failed.items()),
    ]
    rounded = f", widths by {round_to}" if round_to else ""
    measure(
        f"CIFAR ResNet-18, {method}{rounded}, {precision.name}",
        in_turns({name: Contestant(step) for name, step in steps.items()}),
        rounds=10,
        ratios=ratios_of(list(steps)),
        against=["dense", "dense, compiled"],
        columns={MACS: fewer, FIRST: seconds},
        not_timed=failed,
        losses=losses,
        equality_error=error,
        batch=BATCH,
        torch_pruning=importlib.metadata.version("torch-pruning"),
        note="; ".join(notes),
    )


def _described(model: nn.Module) -> str:
    widths = widths_of(model)
    return f"widths {widths['widths']}, in blocks {widths['inner']}"
