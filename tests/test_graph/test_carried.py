"""Hooks, parametrizations, ties, buffers, formats and dtypes survive the cut, or are kept with a reason."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from reference.masked import kept_positions, with_zeroed_readers
from reference.networks import Residual
from reference.randomise import random_keep, randomise, relative_error
from reference.state import Frozen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks

import stamp_fast
from stamp_fast import ChannelGraph, TraceError, trace
from stamp_fast.graph._verify import masked_output


def chain(wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Sequential:
    """Two layers that `wrap` works on, one that it does not, a head."""
    return nn.Sequential(
        *(wrap(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU(), wrap(nn.Conv2d(16, 12, 3, padding=1)), nn.ReLU()),
        *(nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(8, 6)), nn.ReLU()),
        nn.Linear(6, 4),
    )


def images(count: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def data() -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.arange(8) % 4)]


def names(graph: ChannelGraph) -> set[str]:
    return {group.name for group in graph.prunable}


def cut_and_compare(model: nn.Module, x: Tensor, tolerance: float = 1e-9) -> ChannelGraph:
    """Cuts at random and holds the output to the masked dense network's; some group must have shrunk."""
    graph = trace(model.eval(), x)
    graph.settle()
    keep = random_keep(graph)
    assert not keep.all()
    with torch.no_grad():
        dense = model(x)
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        assert relative_error(model(x), expected) < tolerance
        assert relative_error(expected, dense) > 1e-4
    return graph


# --- hooks ---
def test_hooks_fire_with_small_shapes():
    model = randomise(chain()).train()
    seen: dict[str, list] = {}

    def note(kind: str) -> Callable:
        return lambda *args: seen.setdefault(kind, []).append(
            [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        )

    handles = [
        model[2].register_forward_pre_hook(note("pre-forward")),
        model[2].register_forward_hook(note("forward")),
        model[2].register_full_backward_pre_hook(note("pre-backward")),
        model[2].register_full_backward_hook(note("backward")),
        model[2].weight.register_hook(note("gradient")),
        model[2].weight.register_post_accumulate_grad_hook(note("accumulated")),
        model.register_state_dict_post_hook(
            lambda module, state, *rest: seen.setdefault("state", []).append(len(state))
        ),
        model.register_load_state_dict_pre_hook(lambda module, *rest: seen.setdefault("load", []).append(1)),
    ]
    graph = trace(model, images())
    graph.compact(random_keep(graph))
    out, into = model[2].weight.shape[:2]
    assert out < 12
    assert into < 16
    seen.clear()
    F.cross_entropy(model(images()), torch.arange(8) % 4).backward()
    model.load_state_dict(model.state_dict())
    x, y, w = (8, into, 8, 8), (8, out, 8, 8), (out, into, 3, 3)
    assert seen == {
        "pre-forward": [[x]],
        "forward": [[x, y]],
        "pre-backward": [[y]],
        "backward": [[x, y]],
        "gradient": [[w]],
        "accumulated": [[w]],
        "state": [10],
        "load": [1],
    }
    for handle in handles:
        handle.remove()
    seen.clear()
    F.cross_entropy(model(images()), torch.arange(8) % 4).backward()
    assert not seen, "a handle no longer removes its hook"


def test_hook_that_computes_is_part_of_the_network():
    model = randomise(chain()).double()
    gate = torch.tensor([2.0], dtype=torch.float64)
    model[0].register_forward_hook(lambda module, args, output: output * gate)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert names(cut_and_compare(model, images(dtype=torch.float64))) == {"0", "2", "4", "8"}


def test_hook_that_keeps_features_on_its_module_is_no_trouble():
    model = randomise(chain()).double()
    model[0].register_forward_hook(lambda module, args, output: setattr(module, "features", output.detach()))
    cut_and_compare(model, images(dtype=torch.float64))
    assert model[0].features.device.type == "cpu"
    assert model[0].features.shape[1] == model[0].out_channels


@pytest.mark.parametrize("kind", ["value", "numpy", "kept", "kept-in-dict", "derived", "pre"])
def test_hook_that_looks_at_values_is_named(kind):
    """It could not be told from one that computes, and would be left with tensors that have no values."""
    log: list = []
    store: dict[str, Tensor] = {}
    hooks = {
        "value": lambda module, args, output: log.append(output.mean().item()),
        "numpy": lambda module, args, output: log.append(output.detach().numpy()),
        "kept": lambda module, args, output: log.append(output),
        "kept-in-dict": lambda module, args, output: store.update(conv=output.detach()),
        "derived": lambda module, args, output: log.append(output.mean((0, 2, 3))),
        "pre": lambda module, args: log.append(args),
    }
    model = chain()
    register = model[2].register_forward_pre_hook if kind == "pre" else model[2].register_forward_hook
    handle = register(hooks[kind])
    before = Frozen(model)
    with pytest.raises(TraceError, match=r"hook <lambda> \(.*test_carried.py:\d+\) of module '2' .*handle.remove\(\)"):
        trace(model, images())
    before.assert_same()
    with pytest.raises(TraceError, match="of module '2'"):
        stamp_fast.prune(model, data(), method="magnitude", progress=False)
    handle.remove()
    trace(model, images())


@pytest.mark.parametrize("method", ["stamp", "taylor"])
def test_optimizer_that_steps_in_the_backward_rests(method):
    model = randomise(chain())
    optimizers = {p: torch.optim.SGD([p], 0.01, momentum=0.9) for p in model.parameters()}
    steps = []

    def step(parameter: Tensor) -> None:
        steps.append(parameter)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    F.cross_entropy(model(images()), data()[0][1]).backward()
    done = len(steps)
    assert done == len(optimizers)
    stamp_fast.prune(model, data(), method=method, steps=2, optimizer=list(optimizers.values()), progress=False)
    assert len(steps) == done
    F.cross_entropy(model(images()), data()[0][1]).backward()
    assert len(steps) == 2 * done
    assert all(o.state[p]["momentum_buffer"].shape == p.shape for p, o in optimizers.items())


# --- parametrizations ---
class Squash(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Scaled(nn.Module):
    """A parameter per output channel, and the dtype of the layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(len(weight), *(1 for _ in weight.shape[1:])))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def parametrized(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


EXACT = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm-old": nn.utils.weight_norm,
    "mask": lambda m: masks.l1_unstructured(m, "weight", 0.3),
    "mask-of-channels": lambda m: masks.random_structured(m, "weight", 0.3, dim=0),
    "custom": lambda m: parametrized(m, Squash()),
    "custom-with-parameter": lambda m: parametrized(m, Scaled(m.weight)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("kind", EXACT)
def test_parametrized_layers_are_pruned(kind):
    model = chain(EXACT[kind])
    positions = {n: b.clone() for n, b in model.named_buffers()}  # masks are not to be randomised
    randomise(model).double()
    for name, buffer in model.named_buffers():
        buffer.copy_(positions[name])
    graph = cut_and_compare(model, images(dtype=torch.float64))
    assert names(graph) == {"0", "2", "4", "8"}
    layers = [model[0], model[2], model[4], model[8], model[10]]
    shapes = [tuple(layer.weight.shape[:2]) for layer in layers]
    assert all(out < old for (out, _), old in zip(shapes, (16, 12, 8, 6), strict=False))
    # Attributes and a weight kept as a plain attribute follow at once, before any forward.
    again = trace(model, images(dtype=torch.float64))
    again.compact(random_keep(again, seed=1))
    for layer, before in zip(layers, shapes, strict=True):
        unit = "channels" if isinstance(layer, nn.Conv2d) else "features"
        shape = tuple(layer.weight.shape[:2])
        assert shape == (getattr(layer, f"out_{unit}"), getattr(layer, f"in_{unit}"))
        assert shape != before
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    F.cross_entropy(model.train()(images(dtype=torch.float64)), data()[0][1]).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("dim", [0, 1, 3, None])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_weight_norm_along_any_dim(layer, dim):
    model = randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), parametrizations.weight_norm(layer(8, 12, 3), dim=dim), nn.ReLU()),
            *(nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )
    ).double()
    graph = cut_and_compare(model, images(dtype=torch.float64))
    assert names(graph) >= ({"0", "2", "4"} if dim in (0, 1) else {"4"})
    length = model[2].parametrizations.weight.original0
    assert length.numel() == (1 if dim is None else model[2].weight.shape[dim])


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.orthogonal],
    ids=lambda w: w.__module__,
)
def test_parametrizations_over_the_whole_weight_are_kept(wrap):
    model = chain(lambda m: wrap(m) if isinstance(m, nn.Conv2d) else m).double()
    graph = cut_and_compare(model, images(dtype=torch.float64))
    assert names(graph) == {"4", "8"}
    reasons = {group.name: group.reason for group in graph.frozen + graph.unlisted()}
    for layer in ("0", "2"):
        assert f"in module '{layer}" in reasons[layer], "the reason names the layer"
        assert "no rule for operator" in reasons[layer]


# --- ties, sharing, buffers ---
class TiedEmbedding(nn.Module):
    """Words in and words out share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.hidden = nn.Linear(12, 16)
        self.back = nn.Linear(16, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(torch.relu(self.hidden(self.words(x)))).mean(1))


def test_tied_embedding():
    model = randomise(TiedEmbedding()).double()
    x = torch.randint(20, (4, 5))
    cut_and_compare(model, x)
    assert model.head.weight is model.words.weight
    assert model.words.embedding_dim == model.head.in_features == model.hidden.in_features < 12
    assert model.words.num_embeddings == model.head.out_features == 20


class TiedConvolutions(nn.Module):
    """One weight in two convolutions, and turned round in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.down = nn.Conv2d(10, 14, 3, padding=1)
        self.again = nn.Conv2d(10, 14, 3, padding=1, bias=False)
        self.again.weight = self.down.weight
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        h = torch.relu(self.down(x) + self.again(torch.relu(x - 0.1)))
        return self.head(F.conv_transpose2d(h, self.down.weight, padding=1).mean((2, 3)))


def test_convolutions_tied_straight_and_transposed():
    model = randomise(TiedConvolutions()).double()
    assert names(cut_and_compare(model, images(dtype=torch.float64))) == {"stem", "down"}
    assert model.again.weight is model.down.weight
    assert model.again.out_channels == model.down.out_channels == len(model.down.bias) < 14


def test_parameters_that_share_memory_but_are_no_one_object_stay():
    model = nn.Sequential(*(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()))
    model.extend([nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)])
    model = randomise(model)
    model[4].weight.data = model[2].weight.data
    graph = cut_and_compare(model, torch.randn(8, 3), 1e-5)
    assert names(graph) == {"6"}
    assert {g.name for g in graph.frozen if "shares memory" in g.reason} == {"2", "4"}
    assert model[4].weight.data_ptr() == model[2].weight.data_ptr()


class Nested(nn.Module):
    """Lists and dicts of modules and parameters, a shared module, per-channel buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.ModuleDict({"a": shared}), nn.Sequential(shared)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2)])
        self.register_buffer("shift", torch.ones(8, 1, 1))
        self.register_buffer("mean", torch.ones(8, 1, 1), persistent=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.blocks[0](x) * self.scales[0] - self.mean)
        x = torch.relu(self.blocks[1]["a"](x) + self.shift)
        return self.head(torch.relu(self.blocks[2](x) * self.scales[1]).mean((2, 3)))


def test_nested_and_shared_modules_and_buffers():
    model = randomise(Nested()).double()
    cut_and_compare(model, images(dtype=torch.float64))
    width = model.blocks[0].out_channels
    assert width < 8
    assert model.blocks[1]["a"] is model.blocks[2][0]
    assert {t.shape[0] for t in (*model.scales, model.shift, model.mean)} == {width}
    assert "mean" not in model.state_dict()
    assert "mean" in dict(model.named_buffers())


class Unregistered(nn.Module):
    """Parameters and layers that PyTorch does not know of cannot be cut, so what they touch stays."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3)
        self.free = nn.Conv2d(10, 8, 3)
        self.hidden = [nn.Parameter(torch.randn(10, 1, 1))] if kind == "parameter" else [nn.Conv2d(10, 10, 1)]
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, own = self.stem(x), self.hidden[0]
        return self.head(torch.relu(self.free(own(h) if isinstance(own, nn.Module) else own * h)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_what_plain_lists_hold_is_left_alone(kind):
    model = randomise(Unregistered(kind))
    graph = cut_and_compare(model, images(), 1e-5)
    assert "stem" not in names(graph) >= {"free"}
    assert all(group.reason for group in graph.frozen)
    assert model.stem.out_channels == 10


# --- norms, formats, dtypes ---
@pytest.mark.parametrize("norm", ["frozen", "sync"])
def test_other_batch_norms(norm):
    model = Residual()
    if norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for name, width in (("bn1", 16), ("bn2", 8), ("bn3", 24)):
            setattr(model, name, torchvision.ops.FrozenBatchNorm2d(width))
    model = randomise(model).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert names(cut_and_compare(model, x)) >= {"stem.0", "conv1", "project"}
    assert len(model.bn1.running_mean) == len(model.bn1.weight) == model.conv1.out_channels < 16
    if norm == "sync":
        assert isinstance(model.bn1, nn.SyncBatchNorm)
        assert model.bn1.num_features == model.conv1.out_channels


def test_cumulative_statistics_beside_a_head_for_training_alone():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None)
            self.head, self.extra = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.norm(self.stem(x))).mean((2, 3))
            return self.head(h) + self.extra(h) if self.training else self.head(h)

    model = randomise(Auxiliary()).double()
    cut_and_compare(model, images(dtype=torch.float64))
    assert model.norm.momentum is None
    assert model.norm.num_features == model.extra.in_features == model.head.in_features < 16


def test_frozen_parameters_stay_frozen():
    model = randomise(Residual()).double().requires_grad_(False)
    cut_and_compare(model, torch.randn(4, 1, 8, 8, dtype=torch.float64))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [2, 3])
def test_memory_format_is_kept_by_all_that_has_it(rank):
    conv = nn.Conv2d if rank == 2 else nn.Conv3d
    last = torch.channels_last if rank == 2 else torch.channels_last_3d
    model = nn.Sequential(
        *(conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, padding=1, groups=8), conv(8, 6, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1) if rank == 2 else nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    model = randomise(model).to(memory_format=last)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def strides(network: nn.Module, optimizer: torch.optim.Optimizer, memory_format: torch.memory_format) -> list[bool]:
        tensors = [t for p in network.parameters() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
        return [
            t.stride() == torch.empty(t.shape, memory_format=memory_format).stride() for t in tensors if t.dim() > 3
        ]

    for network, is_last in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        x = torch.randn(4, 2, *(6,) * rank)
        network(x.to(memory_format=last) if is_last else x).sum().backward()
        optimizer.step()
        before = [strides(network, optimizer, f) for f in (last, torch.contiguous_format)]
        graph = trace(network, x)
        graph.compact(random_keep(graph), optimizer=optimizer)
        assert [strides(network, optimizer, f) for f in (last, torch.contiguous_format)] == before
        assert all(before[not is_last][::3]), "the weights"
        assert network[3].weight.shape[1] < 8


class MixedPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1).bfloat16()
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 8, 3).double()
        self.c = nn.Linear(8, 8).half()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.norm(self.a(x.bfloat16()).float()).double()).mean((2, 3))
        return self.head(torch.relu(self.c(h.half())).float())


def test_every_tensor_keeps_its_dtype():
    model = randomise(MixedPrecision())
    dtypes = [t.dtype for t in model.state_dict().values()]
    assert names(cut_and_compare(model, images(), 1e-2)) == {"a", "b", "c"}
    assert [t.dtype for t in model.state_dict().values()] == dtypes


class Fourier(nn.Module):
    """A complex filter per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.filter = nn.Parameter(torch.ones(16, 8, 5, dtype=torch.cfloat))
        self.b = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.irfft2(torch.fft.rfft2(self.a(x)) * self.filter, s=x.shape[-2:])
        return self.head(torch.relu(self.b(h)).mean((2, 3)))


def test_complex_parameters_are_kept_with_a_reason():
    model = Fourier()
    graph = cut_and_compare(model, images(), 1e-5)
    assert names(graph) == {"b"}
    assert any(group.name == "a" and "fft" in group.reason for group in graph.frozen)


def test_reference_of_these_tests_sees_a_wrong_cut():
    """`cut_and_compare` holds networks to `masked_output`; here that is held to zeroed weights."""
    model = randomise(chain()).double().eval()
    x = images(dtype=torch.float64)
    graph = trace(model, x)
    keep = random_keep(graph)
    with torch.no_grad():
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        assert relative_error(masked_output(graph, keep, x), by_hand) < 1e-12
        assert relative_error(masked_output(graph, random_keep(graph, seed=9), x), by_hand) > 1e-4
