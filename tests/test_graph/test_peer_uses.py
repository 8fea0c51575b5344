"""Uses that other pruning libraries are known to get wrong; the table at the head of test_peer_toys.py lists them."""

import copy
import gc
import io
import pickletools
import weakref
import zipfile

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import stamp_fast
from stamp_fast import Budget, BudgetError, importance, trace

METHODS = ["stamp", "taylor", "magnitude", "bn_scale", "random"]
UNSCALED = ("squeeze",)  # the layer of `Residual` without a batch norm, which method "bn_scale" needs


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(count)
    ]


# --- budgets ---
def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_round_to_never_empties_a_group(ranking):
    """Widths of 6 and 12 in steps of 8: the first stays, the second goes to 8; what is less is refused."""
    model = randomise(chain(6, 12))
    graph = trace(model, torch.randn(2, 3, 8, 8))
    scores = importance.magnitude(graph)
    for asked in (0.5, 0.25):
        with pytest.raises(BudgetError, match=r"channels=0.778 can be had with round_to=8"):
            graph.select(scores, Budget(channels=asked), ranking=ranking, round_to=8)
    graph.compact(graph.select(scores, Budget(channels=14 / 18), ranking=ranking, round_to=8))
    assert (model[0].out_channels, model[2].out_channels) == (6, 8)


def test_weak_layer_does_not_shelter_the_others():
    """Of 48 channels 24 are to go, and one layer of 8 holds the weakest: others give the rest."""
    model = randomise(chain(20, 8, 20))
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    graph = trace(model, torch.randn(2, 3, 8, 8))
    for ranking in ("global", "local"):
        keep = graph.select(importance.magnitude(graph), Budget(channels=0.5), ranking=ranking)
        assert int((~keep).sum()) == 24
        assert all(keep[group.classes].any() for group in graph.groups)


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
@pytest.mark.parametrize("ranking", ["global", "local"])
def test_smaller_budgets_never_give_larger_networks(ranking, kind):
    """Down to what cannot be had, which is an error and not the whole network."""
    graph = trace(randomise(Residual()), torch.randn(2, 1, 8, 8))
    scores = importance.magnitude(graph)
    sizes, refused = [], 0
    for percent in range(95, 0, -5):
        try:
            keep = graph.select(scores, Budget(**{kind: percent / 100}), ranking=ranking, exact=False)
        except BudgetError as error:
            assert "out of reach" in str(error)
            refused += 1
            continue
        assert not refused, "a smaller budget was met after a larger one was not"
        sizes.append(getattr(graph, kind)(keep))
    assert len(sizes) > 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < getattr(graph, kind)()


# --- state ---
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_sees_every_parameter(method):
    model = randomise(Residual())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    stamp_fast.prune(
        model, batches(), method=method, optimizer=optimizer, keep=UNSCALED, steps=2, seed=0, progress=False
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("method", METHODS)
def test_frozen_stage_stays_frozen(method):
    model = randomise(Residual())
    frozen = [*model.stem.parameters(), *model.conv1.parameters(), *model.bn1.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    stamp_fast.prune(model, batches(), method=method, keep=UNSCALED, steps=2, seed=0, progress=False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in frozen)
    assert model.conv1.out_channels < 16, "frozen is no reason to stay wide"


@pytest.mark.parametrize("method", METHODS)
def test_nothing_keeps_a_pruned_model_alive(method):
    def used_and_forgotten() -> list[weakref.ref]:
        model = randomise(Residual())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        stamp_fast.prune(
            model, batches(), method=method, optimizer=optimizer, keep=UNSCALED, steps=2, seed=0, progress=False
        )
        assert stamp_fast.report(model).macs_after > 0
        return [weakref.ref(o) for o in (model, optimizer, *model.modules(), *model.parameters())]

    gc.collect()
    modules = sum(issubclass(type(o), nn.Module) for o in gc.get_objects())
    references = used_and_forgotten()
    gc.collect()
    assert [r for r in references if r() is not None] == []
    assert sum(issubclass(type(o), nn.Module) for o in gc.get_objects()) <= modules, "a copy outlives the call"


def test_nothing_keeps_a_graph_alive():
    model = randomise(Plain())
    graph = trace(model, torch.randn(2, 1, 8, 8))
    graph.settle()
    graph.compact(random_keep(graph))
    reference = weakref.ref(graph)
    del graph
    gc.collect()
    assert reference() is None


# --- files ---
def test_files_need_neither_this_library_nor_trust():
    """The state dict loads with weights_only; a pickle of the whole model names torch's classes and the model's."""
    model = stamp_fast.prune(randomise(Residual()), batches(), method="magnitude", progress=False)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    copy.deepcopy(model).load_state_dict(state)

    plain = stamp_fast.prune(
        nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 10)),
        batches(),
        method="magnitude",
        progress=False,
    )
    whole = io.BytesIO()
    torch.save(plain, whole)
    archive = zipfile.ZipFile(whole)
    data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    texts = [str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    assert any(text.startswith("torch.nn") for text in texts)
    assert not [text for text in texts if text.startswith("stamp_fast")]
    classes = [nn.Sequential, nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, set]
    whole.seek(0)
    with torch.serialization.safe_globals(classes), torch.no_grad():
        x = batches(1)[0][0]
        assert torch.equal(torch.load(whole, weights_only=True)(x), plain(x))


@pytest.mark.parametrize("whole", [False, True])
def test_files_shrink_with_the_parameters(whole, tmp_path):
    """Tensors of their own, no views of the dense ones, which a file would hold whole."""

    def size(model: nn.Module) -> int:
        file = io.BytesIO()
        torch.save(model if whole else model.state_dict(), file)
        return file.getbuffer().nbytes

    model = randomise(Residual(width=48))
    before = size(model)
    stamp_fast.prune(model, batches(), budget=Budget(params=0.25), method="magnitude", progress=False)
    assert size(model) < 0.35 * before
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*model.parameters(), *model.buffers()))
    stamp_fast.save(model, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.35 * before
