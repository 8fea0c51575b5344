"""Copies, compiled and graph modules go on after a cut; wrappers that cannot be cut are refused with the way out."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from reference.networks import Residual
from reference.randomise import random_keep, randomise, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import stamp_fast
from stamp_fast import ModelError, trace
from stamp_fast.graph._verify import masked_output

TARGETS = torch.arange(8) % 4


def chain() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12 * 36, 10), nn.ReLU(), nn.Linear(10, 4)),
    )


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_pruned_model_copies_and_pickles():
    model = randomise(Residual()).eval()
    x = torch.randn(4, 1, 8, 8)
    graph = trace(model, x)
    graph.compact(random_keep(graph))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(other(x), model(x))
            assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", ["symbolic", "exported"])
def test_graph_modules_are_pruned(kind):
    model = randomise(chain()).eval()
    if kind == "symbolic":
        model = torch.fx.symbolic_trace(model)
    else:
        model = torch.export.export(
            model, (images(2),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}]
        ).module()
    graph = trace(model, images())
    graph.settle()
    keep = random_keep(graph)
    assert len(graph.prunable) == 3
    with torch.no_grad():
        expected = masked_output(graph, keep, images()) if kind == "symbolic" else None
        graph.compact(keep)
        assert model(images()).shape == (8, 4)
        assert expected is None or relative_error(model(images()), expected) < 1e-5


def test_compiled_model_is_cut_and_compiled_once_more():
    torch._dynamo.reset()
    model = randomise(chain()).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(images()), TARGETS).backward()
        optimizer.step()

    step()
    step()
    assert counter.frame_count == 1
    graph = trace(compiled, images())
    graph.compact(random_keep(graph), optimizer=optimizer)
    assert counter.frame_count == 1, "the cut itself runs nothing compiled"
    for _ in range(3):
        step()
    assert counter.frame_count == 2
    with torch.no_grad():
        assert torch.equal(compiled(images()), model(images()))


@pytest.mark.parametrize("part", ["whole", "child"])
def test_compiled_parts_run_as_written_while_pruned(part):
    torch._dynamo.reset()
    model = randomise(chain())
    counter = CompileCounter()
    (model if part == "whole" else model[2]).compile(backend=counter)
    stamp_fast.prune(model, [(images(), TARGETS)], method="taylor", progress=False)
    assert counter.frame_count == 0
    assert stamp_fast.report(model).equality_error < 1e-5
    F.cross_entropy(model(images()), TARGETS).backward()
    assert counter.frame_count > 0, "and compiled afterwards"


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "data-parallel": (nn.DataParallel, "wrapped in DataParallel.*model.module.*wrap it again"),
    "nested-data-parallel": (lambda m: nn.Sequential(nn.DataParallel(m)), "'0' is wrapped in DataParallel"),
    "distributed": (nn.parallel.DistributedDataParallel, "wrapped in DistributedDataParallel.*model.module"),
    "sharded": (shard, "'0.weight' is a DTensor, sharded.*prune before"),
    "scripted": (torch.jit.script, "ScriptModule.*prune the original"),
    "nested-scripted": (lambda m: nn.Sequential(torch.jit.script(m)), "'0' is a ScriptModule.*prune the original"),
    "lazy": (lambda m: m.append(nn.LazyLinear(4)), "'8.weight' is lazy.*run one forward"),
    "lazy-norm": (lambda m: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()), "'1.weight' is lazy"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_wrappers_are_refused_with_the_way_out(kind, process_group):
    wrap, message = REFUSED[kind]
    model = wrap(chain())
    with pytest.raises(ModelError, match=message):
        trace(model, images())
    with pytest.raises(ModelError, match=message):
        stamp_fast.prune(model, [(images(), TARGETS)], progress=False)
