"""Small networks and uses that other pruning libraries are known to get wrong, and where each is tested.

| trap | test |
|---|---|
| literal view(..., 128) | test_compact.py::`test_literal_flatten_is_found_and_kept` |
| static sizes in attributes (C2f, Res2Net, mixed convolutions) | `test_sizes_in_attributes`; test_settle.py |
| spatial gate (CBAM), squeeze and excitation | `test_cbam`; test_rules.py::`test_rule`[cbam, squeeze-and-excitation] |
| pixel shuffle, channel shuffle | test_rules.py::`test_rule`[pixel-shuffle, channel-shuffle-...] |
| weight norm, spectral norm, parametrizations | test_carried.py::`test_parametrized_layers_are_pruned`, `test_weight_norm_along_any_dim` |
| weight standardisation | test_counterexamples.py::`test_standardised_weights` |
| tied weights, shared modules | test_compact.py::`test_tied_weights_and_shared_modules_stay_tied`; test_carried.py::`test_tied_embedding`, `test_convolutions_tied_straight_and_transposed` |
| per-channel buffers, frozen batch norm | test_carried.py::`test_nested_and_shared_modules_and_buffers`, `test_other_batch_norms` |
| raw parameters | test_rules.py::`test_rule`[per-channel-parameter, layer-scale, mm, ...]; `test_raw_parameters` |
| frozen stage comes back trainable | test_peer_uses.py::`test_frozen_stage_stays_frozen`; test_carried.py::`test_frozen_parameters_stay_frozen` |
| all frozen = nothing pruned | test_prune.py::`test_all_frozen_model`; test_compact.py::`test_traces_without_gradients` |
| left in eval mode | test_prune.py::`test_flags_and_gradients_are_left_alone`; test_compact.py::`test_trace_leaves_no_mark` |
| channels_last lost | test_carried.py::`test_memory_format_is_kept_by_all_that_has_it` |
| round_to wider than a group | test_peer_uses.py::`test_round_to_never_empties_a_group`; test_budget.py::`test_round_to_wider_than_a_group_keeps_it` |
| one weak layer under global ranking | test_peer_uses.py::`test_weak_layer_does_not_shelter_the_others`; test_budget.py::`test_one_weak_group_does_not_swallow_the_budget` |
| over-pruned groups skipped, size grows again | test_peer_uses.py::`test_smaller_budgets_never_give_larger_networks` |
| optimizer sees 1 of 62 parameters | test_peer_uses.py::`test_optimizer_sees_every_parameter`; test_state.py |
| pickle under weights_only | test_peer_uses.py::`test_files_need_neither_this_library_nor_trust`; test_wrappers.py::`test_pruned_model_copies_and_pickles`; test_checkpoint.py |
| LayerNorm is not zero-invariant | test_rules.py::`test_rule`[layer-norm, layer-norm-channels-last] |
| compiled model recompiles for every layer | test_wrappers.py::`test_compiled_model_is_cut_and_compiled_once_more` |
| finished pruners keep modules alive | test_peer_uses.py::`test_nothing_keeps_a_pruned_model_alive` |
| one output channel taken for depthwise | `test_one_channel_is_not_depthwise` |
| depthwise then pointwise, in detectors | `test_depthwise_blocks` |
| grouped convolution with other widths in than out | `test_grouped_convolution_of_other_width` |
| GroupNorm behind a layer of other width | `test_group_norm_behind_layers_of_any_width` |
| attention with fewer keys than queries | `test_grouped_query_attention` |
| multi-head attention of torch | `test_multi_head_attention` |
| operator without a rule | test_rules.py::`test_unknown_operator_freezes_and_says_where`; `test_deformable_convolution` |
| nothing pruned and no reason given | test_prune.py::`test_unusable`[one-layer, everything-kept]; `test_every_layer_that_stays_has_a_reason` |
| output heads pruned | `test_heads_of_a_detector_stay`; test_rules.py::`test_output_is_never_cut`, `test_outputs_in_containers_are_never_cut` |
| reshape between linear and convolution | `test_linear_into_convolution` |
| LSTM, GRU | test_rules.py::`test_recurrent_layers_trace`; `test_recurrent_stacks` |
| InstanceNorm's buffers in exported files | test_rules.py::`test_rule`[instance-norm-affine] |
| files as large as before | test_peer_uses.py::`test_files_shrink_with_the_parameters` |
"""  # noqa: E501  (a table)

import copy

import pytest
import torch
import torchvision
from reference.cut import Custom, assert_exact, cut_layers, prunable, reasons, settled
from reference.masked import kept_positions
from reference.randomise import random_keep, relative_error
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def images(channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, side, side, dtype=torch.float64, generator=generator)


def tokens() -> Tensor:
    return torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tail(width: int, classes: int = 4) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


# --- forwards with sizes of their own ---
class C2f(nn.Module):
    """YOLO's: the pieces of the first layer in `self.c`, all concatenated at the end."""

    def __init__(self, width: int, split: bool) -> None:
        super().__init__()
        self.c, self.split = width // 2, split
        self.cv1, self.cv2 = conv(width, 2 * self.c, 1), conv(4 * self.c, width, 1)
        self.m = nn.ModuleList(conv(self.c, self.c) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1) if self.split else self.cv1(x).chunk(2, 1))
        y.extend(F.silu(m(y[-1])) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Res2Net(nn.Module):
    """A hierarchy of convolutions on pieces of equal width."""

    def __init__(self, width: int, scale: int = 4) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.conv1, self.conv3 = conv(12, width * scale, 1), conv(width * scale, 12, 1)
        self.convs = nn.ModuleList(conv(width, width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(torch.relu(self.conv1(x)), self.width, 1)
        out = [pieces[-1]]
        for piece, layer in zip(pieces, self.convs, strict=False):
            out.append(torch.relu(layer(piece if len(out) == 1 else out[-1] + piece)))
        return x + self.conv3(torch.cat(out, 1))


class Mixed(nn.Module):
    """Depthwise kernels of another size for each piece."""

    def __init__(self, *pieces: int) -> None:
        super().__init__()
        self.splits = list(pieces)
        self.layers = nn.ModuleList(conv(n, n, 3 + 2 * i, groups=n) for i, n in enumerate(pieces))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([f(p) for f, p in zip(self.layers, torch.split(x, self.splits, 1), strict=True)], 1)


class DualPath(nn.Module):
    """DPN's: a residual part and a growing dense part, cut at an attribute."""

    def __init__(self, width: int, residual: int, growth: int) -> None:
        super().__init__()
        self.residual = residual
        self.conv1, self.conv2 = conv(width, 14, 1), conv(14, residual + growth)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        kept, dense = x[:, : self.residual], x[:, self.residual :]
        return torch.relu(torch.cat([kept + y[:, : self.residual], dense, y[:, self.residual :]], 1))


class CrossStage(nn.Module):
    """CSP's: half of the channels go by, cut at a fraction of an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = width
        self.conv0, self.conv1, self.conv2 = conv(12, width, 1), conv(width // 2, width // 2), conv(width, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        left, right = x.split(self.expand // 2, 1)
        return self.conv2(torch.relu(torch.cat([torch.relu(self.conv1(right)), left], 1)))


STATIC = {
    "c2f-chunk": (lambda: C2f(12, False), 12, {"2.cv1"}),
    "c2f-split": (lambda: C2f(12, True), 12, {"2.cv1"}),
    "res2net": (lambda: Res2Net(5), 12, {"2.conv1"}),
    "mixed": (lambda: Mixed(4, 5, 3), 12, {"0"}),
    "dual-path": (lambda: nn.Sequential(DualPath(12, 8, 4), DualPath(16, 8, 5)), 21, {"2.0.conv1", "2.1.conv1", "0"}),
    "cross-stage": (lambda: CrossStage(16), 12, {"2.conv0"}),
}


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("kind", STATIC)
def test_sizes_in_attributes(kind, seed):
    make, width, free = STATIC[kind]
    model = nn.Sequential(conv(3, 12), nn.ReLU(), make(), conv(width, 10), nn.ReLU(), *tail(10))
    graph = settled(model, images())
    assert prunable(graph) >= free | {"3"}
    assert_exact(graph, images(), seed=seed)


class Spatial(nn.Module):
    """CBAM whole: channel gate by two poolings through one MLP, spatial gate by mean and maximum over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width))
        self.gate = nn.Sequential(conv(2, 1, 7, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * scale[:, :, None, None]
        return x * torch.sigmoid(self.gate(torch.cat([x.max(1, True).values, x.mean(1, True)], 1)))


def test_cbam():
    model = nn.Sequential(conv(3, 16), nn.ReLU(), Spatial(16), conv(16, 10), nn.ReLU(), *tail(10))
    graph = settled(model, images())
    assert prunable(graph) == {"0", "2.mlp.0", "3"}
    assert_exact(graph, images())
    assert model[2].gate[0].weight.shape[:2] == (1, 2)


# --- depthwise, grouped, one channel ---
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(lambda: [conv(3, 8), nn.ReLU(), conv(8, 1), nn.ReLU(), conv(1, 6)], id="one-in-the-middle"),
        pytest.param(lambda: [conv(3, 8), nn.ReLU(), conv(8, 1, groups=1), nn.Upsample(scale_factor=2), conv(1, 6)],
                     id="one-resized"),
        pytest.param(lambda: [conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), conv(8, 6)], id="true-depthwise"),
        pytest.param(lambda: [conv(3, 1), conv(1, 1), conv(1, 8), nn.ReLU(), conv(8, 6)], id="one-into-one"),
        pytest.param(lambda: [conv(3, 8), conv(8, 1), nn.BatchNorm2d(1), conv(1, 8, groups=1), conv(8, 6)],
                     id="one-into-eight"),
    ],
)  # fmt: skip
def test_one_channel_is_not_depthwise(layers):
    model = nn.Sequential(*layers(), nn.ReLU(), *tail(6))
    graph = settled(model, images())
    widths = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert_exact(graph, images())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels < widths[name]) == (widths[name] > 1)


def test_network_that_ends_in_one_channel():
    model = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 1))
    graph = settled(model, images(1))
    assert prunable(graph) == {"0", "2"}
    assert_exact(graph, images(1))
    assert model[4].out_channels == 1


def test_depthwise_blocks():
    """Depthwise between, before and after pointwise, as detectors have them; the widths in front grow."""
    model = nn.Sequential(
        *(conv(3, 8), nn.SiLU(), conv(8, 16, 1), nn.SiLU(), conv(16, 16, groups=16), nn.BatchNorm2d(16)),
        *(conv(16, 32, 5, groups=16), nn.SiLU(), conv(32, 12, 1), conv(12, 12, groups=12), nn.SiLU(), *tail(12)),
    )
    graph = settled(model, images())
    assert prunable(graph) == {"0", "2", "8"}
    assert_exact(graph, images())
    assert model[4].groups == model[4].in_channels == model[6].groups < 16
    assert model[6].out_channels == 2 * model[6].groups


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("i", "o", "groups"), [(12, 24, 4), (24, 12, 4), (12, 18, 3), (16, 8, 8), (8, 24, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolution_of_other_width(i, o, groups, transposed, seed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        conv(3, i), nn.ReLU(), kind(i, o, 3, groups=groups), nn.ReLU(), conv(o, 10), nn.ReLU(), *tail(10)
    )
    graph = settled(model, images())
    assert prunable(graph) >= {"0", "4"}
    assert_exact(graph, images(), seed=seed)
    layer = model[2]
    assert layer.in_channels % layer.groups == layer.out_channels % layer.groups == 0
    assert layer.in_channels < i


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("into", [4, 24])
def test_group_norm_behind_layers_of_any_width(into, groups):
    model = nn.Sequential(
        *(conv(3, into), nn.ReLU(), conv(into, 12), nn.GroupNorm(groups, 12), nn.ReLU()),
        *(conv(12, 10), nn.ReLU(), *tail(10)),
    )
    graph = settled(model, images())
    assert prunable(graph) >= {"0", "5"} | ({"2"} if groups < 12 else set())
    assert_exact(graph, images())
    assert model[3].num_channels == model[2].out_channels
    assert model[3].num_channels % model[3].num_groups == 0


# --- attention ---
class GroupedQuery(nn.Module):
    """Every two heads of queries share one of keys and values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.dim = kind, 4
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 12), nn.Linear(5, 12)
        self.out, self.head = nn.Linear(24, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kind == "repeat":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        elif self.kind == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind == "built-in")
        return self.head(torch.relu(self.out(h.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["repeat", "expand", "built-in"])
def test_grouped_query_attention(kind, seed):
    model = GroupedQuery(kind)
    graph = settled(model, tokens())
    assert prunable(graph) >= {"q", "out"}
    assert cut_layers(graph) >= {"q", "k", "v", "out"}
    assert_exact(graph, tokens(), seed=seed)
    assert model.q.out_features == 2 * model.k.out_features == 2 * model.v.out_features == model.out.in_features


@pytest.mark.parametrize("other", [False, True])
def test_multi_head_attention(other):
    """torch's own module; keys and values from elsewhere, or not. The layers around it are free or have a reason."""
    body = nn.MultiheadAttention(12, 3, batch_first=True, kdim=9 if other else None, vdim=9 if other else None)

    def forward(m: Custom, x: Tensor) -> Tensor:
        q = m.embed(x)
        y = m.memory(x) if other else q
        return m.head(torch.relu(m.hidden(m.body(q, y, y)[0])).mean(1))

    parts = {"memory": nn.Linear(5, 9)} if other else {}
    model = Custom(forward, embed=nn.Linear(5, 12), body=body, hidden=nn.Linear(12, 8), head=nn.Linear(8, 4), **parts)
    graph = settled(model, tokens())
    assert cut_layers(graph) >= {"body.out_proj", "hidden", *parts}
    for layer in {"embed", "body"} - cut_layers(graph):
        assert f"{__file__}:" in reasons(graph)[layer]
    assert_exact(graph, tokens())


# --- other layers ---
def test_linear_into_convolution():
    """A generator: the linear layer's channels come back as maps of many pixels."""
    model = nn.Sequential(
        *(nn.Linear(6, 8 * 16), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), conv(8, 12), nn.ReLU()),
        *(nn.ConvTranspose2d(12, 10, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(640, 14), nn.ReLU()),
        nn.Linear(14, 4),
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    graph = settled(model, x)
    assert prunable(graph) == {"0", "3", "5", "8"}
    assert_exact(graph, x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=["two", "both-ways"])
def test_recurrent_stacks(kind, options):
    """Held to zeroed weights: a recurrent layer's own kernels run other operators than its trace."""
    width = 24 if "bidirectional" in options else 12
    parts = {"a": nn.Linear(5, 16), "r": kind(16, 12, batch_first=True, **options), "b": nn.Linear(width, 8)}
    model = Custom(
        lambda m, x: m.head(torch.relu(m.b(m.r(torch.relu(m.a(x)))[0]))[:, -1]), **parts, head=nn.Linear(8, 3)
    )
    graph = settled(model, tokens())
    assert prunable(graph) >= {"a", "b"}
    keep = random_keep(graph)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, stays in kept_positions(graph, keep).items():
            if len(stays) == 2:
                masked.get_parameter(name).index_fill_(1, (~stays[1]).nonzero().flatten(), 0.0)
        expected = masked(tokens())
        assert relative_error(model(tokens()), expected) > 1e-4
        graph.compact(keep)
        assert relative_error(model(tokens()), expected) < 1e-9
    assert model.r.input_size == model.a.out_features < 16
    assert model.r.hidden_size == model.r.weight_hh_l0.shape[1]


def test_deformable_convolution():
    """An operator of another library: what it touches stays, the rest goes."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        return m.head(torch.relu(m.b(torch.relu(m.deform(h, m.offset(h))))).mean((2, 3)))

    parts = {"a": conv(3, 8), "offset": conv(8, 18), "b": conv(12, 10), "head": nn.Linear(10, 4)}
    model = Custom(forward, **parts, deform=torchvision.ops.DeformConv2d(8, 12, 3, padding=1))
    graph = settled(model, images())
    assert "b" in prunable(graph)
    for layer in {"a", "offset", "deform"} - prunable(graph):
        assert "deform_conv2d" in reasons(graph)[layer]
    assert_exact(graph, images())


def test_raw_parameters():
    """Position embeddings, class tokens, scales and mixing matrices that no module owns."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        h = torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1) + m.positions
        h = h + m.scale * torch.einsum("bnc,cd->bnd", torch.relu(h @ m.mix), m.back)
        return m.head(h[:, 0] * m.gain)

    shapes = {"token": (1, 1, 12), "positions": (1, 8, 12), "scale": (12,), "mix": (12, 20), "back": (20, 12)}
    parts = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    model = Custom(forward, **parts, gain=nn.Parameter(torch.empty(())), embed=nn.Linear(5, 12), head=nn.Linear(12, 4))
    graph = settled(model, tokens())
    assert sorted(g.num_classes for g in graph.prunable) == [12, 20]
    assert_exact(graph, tokens())
    width = model.embed.out_features
    assert [model.token.shape[2], model.positions.shape[2], *model.scale.shape, model.mix.shape[0]] == [width] * 4
    assert model.positions.shape[1] == 8


def test_heads_of_a_detector_stay():
    """Boxes and classes at three scales, in a list and a dict: none of their channels is taken, all before them may."""

    def forward(m: Custom, x: Tensor) -> dict[str, list[Tensor]]:
        maps = []
        for layer in m.stages:
            x = torch.relu(layer(x))
            maps.append(x)
        return {"boxes": [f(h) for f, h in zip(m.boxes, maps, strict=True)], "scores": [m.scores(maps[-1]).sigmoid()]}

    model = Custom(
        forward,
        stages=nn.ModuleList([conv(3, 10), conv(10, 12, stride=2), conv(12, 14, stride=2)]),
        boxes=nn.ModuleList([conv(10, 8, 1), conv(12, 8, 1), conv(14, 8, 1)]),
        scores=conv(14, 5, 1),
    )
    graph = settled(model, images())
    assert prunable(graph) == {"stages.0", "stages.1", "stages.2"}
    for name in ("boxes.0", "boxes.1", "boxes.2", "scores"):
        assert "output of the model" in reasons(graph)[name]
    graph.compact(random_keep(graph))
    assert [tuple(t.shape) for t in model(images())["boxes"]] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]


def test_every_layer_that_stays_has_a_reason():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.Flatten(), nn.Linear(512, 4), nn.Softmax(1))
    graph = settled(model, images())
    graph.protect(["0"])
    why = reasons(graph)
    assert why["0"] == "kept on request"
    assert "output of the model" in why["4"]
    assert not graph.prunable
