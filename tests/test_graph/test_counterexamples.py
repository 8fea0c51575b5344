"""Forwards that a naive engine cuts wrongly without a word: each is right, or kept with the reason.

What they hold to, by kind of trap:

| trap | test |
|---|---|
| slices that clamp, a batch that absorbs, asserts before any operator, scalars made of widths, index tables, label pairs, moved offsets | `test_what_a_smaller_width_would_change_without_a_word`; test_compact.py::`test_size_fixed_in_the_forward`; test_rules.py::`test_literal_offset_is_never_silently_wrong` |
| operators that vanish at full size | `test_operators_that_vanish_at_one_channel` |
| counts that have to agree | test_attention.py; `test_attention_counts_and_scales`; test_settle.py::`test_count_of_one_layer_used_for_another`; test_rules.py::`test_counts_that_have_to_agree` |
| scale of attention, mean over channels | `test_attention_counts_and_scales`; test_rules.py::`test_rule`[scaled-dot-product-attention] |
| reads without a weight | `test_factor_of_a_query_counts_once`; test_rules.py::`test_rule`[cbam, l2-normalise, softmax-over-channels, mean-over-channels, ...] |
| operators that are no readers | `test_factor_behind_a_depthwise_convolution_counts_once` |
| ties that collapse | `test_shuffle_and_chunk_repeated`, `test_shuffle_with_a_literal_number_of_groups` |
| statistics over a weight's inputs | `test_standardised_weights`; test_carried.py::`test_parametrized_layers_are_pruned`, `test_parametrizations_over_the_whole_weight_are_kept` |
| caches | test_caches.py; test_compact.py::`test_trace_leaves_no_mark` |
| fast ways that eval mode takes | `test_encoder_layer_of_torch` |
| attributes found by value | test_settle.py::`test_equal_by_coincidence`, `test_width_and_number_of_heads_alike`, `test_width_as_one_item_of_a_tuple` |
| what is done over channels | `test_operators_over_channels` |
| bindings carried to modules of one class | `test_modules_of_one_class_in_other_roles`, `test_sizes_of_a_parent_and_of_a_module_used_twice` |
| size of the batch | `test_any_batch_gives_the_same_graph` |
| parts that begin at zero | `test_parts_that_begin_at_zero`, `test_randomised_networks_have_nothing_at_zero` |
"""  # noqa: E501  (a table)

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from reference.cut import Custom, assert_exact, prunable, reasons, settled
from reference.randomise import random_keep, randomise, relative_error
from torch import nn

import stamp_fast
from stamp_fast.graph._verify import masked_output


def conv(i: int, o: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def pixels(side: int = 6, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=generator)


def tokens() -> torch.Tensor:
    return torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def around(middle: Callable, width: int = 16, **parts) -> Custom:
    """conv a (3 -> 16), `middle`, conv b (width -> 10), head."""

    def forward(m: Custom, x: torch.Tensor) -> torch.Tensor:
        return m.head(torch.relu(m.b(middle(m, torch.relu(m.a(x))))).mean((2, 3)))

    return Custom(forward, a=conv(3, 16, 3), b=conv(width, 10, 3), head=nn.Linear(10, 4), **parts)


def temporal_shift(m: Custom, h: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(h)
    y[:, :4] = h.roll(1, 2)[:, :4]
    y[:, 4:] = h[:, 4:]
    return y


def temporal_shift_of_a_share(m: Custom, h: torch.Tensor) -> torch.Tensor:
    share = h.shape[1] // 4
    return torch.cat([h[:, :share].roll(1, 2), h[:, share:]], 1)


FIXED_IN_A = {
    "clamped-slices": temporal_shift,
    "slices-by-a-share": temporal_shift_of_a_share,
    "absorbed-by-the-batch": lambda m, h: h.view(-1, 16, 36).relu().view(h.shape),
    "assertion": lambda m, h: h if h.shape[1] == 16 else h.new_zeros(()).expand(-1, -1, -1, -1, -2),
    "mean-written-out": lambda m, h: h + h.sum(1, keepdim=True) / h.shape[1],
    "loss-normaliser": lambda m, h: h / (h.square().sum((1, 2, 3), keepdim=True) / h[0].numel()).sqrt(),
    "root-of-the-width": lambda m, h: h * h.size(1) ** -0.5,
    "threshold": lambda m, h: h.sin() if h.shape[1] > 14 else h.cos(),
    "even-or-odd": lambda m, h: h if h.shape[1] % 2 == 0 else h.sin(),
    "uneven-pieces": lambda m, h: torch.cat(h.tensor_split(3, 1)[::-1], 1),
    "size-in-a-dataclass": lambda m, h: h.view(len(h), m.sizes.width, -1).sin().view(h.shape),
    "size-in-a-dict": lambda m, h: h.view(len(h), vars(m.sizes)["width"], -1).sin().view(h.shape),
    "eye": lambda m, h: torch.einsum("bchw,cd->bdhw", h, torch.eye(h.size(1), dtype=h.dtype, device=h.device)),
    "list-comprehension": lambda m, h: torch.stack([h[:, i] * (i + 1) for i in range(16)], 1),
    "permutation-in-a-buffer": lambda m, h: h[:, m.order],
    "permutation-by-gather": lambda m, h: h.gather(1, m.order.view(1, -1, 1, 1).expand(h.shape)),
    "positions-of-channels": lambda m, h: h * torch.arange(h.shape[1], device=h.device).view(1, -1, 1, 1),
    "two-labels-on-one-dim": lambda m, h: h * m.gram((h.flatten(2) @ h.flatten(2).mT).flatten(1))[:, :, None, None],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", FIXED_IN_A)
def test_what_a_smaller_width_would_change_without_a_word(kind, seed):
    """One layer's channels are kept, with the reason; those of its neighbours go."""
    parts = {"order": torch.randperm(16)} if "permutation" in kind else {}
    parts |= {"gram": nn.Linear(256, 1)} if kind.startswith("two") else {}
    parts |= {"sizes": SimpleNamespace(width=16)} if kind.startswith("size") else {}
    model = around(FIXED_IN_A[kind], **parts)
    graph = settled(model, pixels())
    free_rest = kind == "clamped-slices"  # of a's channels, those behind the slice
    assert prunable(graph) == ({"a", "b"} if free_rest else {"b"})
    assert len(reasons(graph)["a"]) > 20
    if kind != "two-labels-on-one-dim":
        assert f"{__file__}:" in reasons(graph)["a"]
    assert_exact(graph, pixels(), seed=seed)
    assert (model.a.out_channels == 16) != free_rest


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, h: h[:, :16], id="slice-of-everything"),
        pytest.param(lambda m, h: h[:, : h.shape[1]].contiguous(), id="slice-of-the-width"),
        pytest.param(lambda m, h: h.transpose(1, 2).contiguous().transpose(1, 2).clone(), id="copies"),
        pytest.param(lambda m, h: h.expand_as(h).reshape(h.shape).squeeze(-1).view_as(h), id="squeeze"),
        pytest.param(lambda m, h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), id="channels-last"),
        pytest.param(lambda m, h: h.flatten(2).transpose(1, 2).reshape(len(h), -1, h.shape[1]).mT.unflatten(2, (6, 6)),
                     id="tokens"),
        pytest.param(lambda m, h: torch.cat(h.split(h.shape[1], 1), 1), id="one-piece"),
    ],
)  # fmt: skip
def test_operators_that_vanish_at_one_channel(body):
    """A copy of what is contiguous, a slice of everything: nothing runs, and nothing may be taken for something."""
    model = around(body)
    graph = settled(model, pixels())
    assert prunable(graph) == {"a", "b"}
    keep = graph.all_kept()
    for group in graph.prunable:
        keep[group.classes.start + 1 : group.classes.stop] = False
    with torch.no_grad():
        expected = masked_output(graph, keep, pixels())
        graph.compact(keep)
        assert relative_error(model(pixels()), expected) < 1e-9
    assert model.a.out_channels == model.b.out_channels == 1


OVER_CHANNELS = {  # what is done, and whether the channels can go all the same
    "convolution": (lambda m, h: h * m.eca(h.mean((2, 3))[:, None]).sigmoid().squeeze(1)[..., None, None], False),
    "local-response-norm": (lambda m, h: nn.functional.local_response_norm(h, 3), False),
    "top-k": (lambda m, h: h * h.mean((2, 3)).topk(4, 1).values.sum(1)[:, None, None, None], False),
    "argmax": (lambda m, h: h * (h.mean((2, 3)).argmax(1)[:, None, None, None] + 1), False),
    "write-to-some": (lambda m, h: (lambda y: (y[:, 2:5].mul_(2), y)[1])(h.clone()), False),
    "odd-ones": (lambda m, h: h * (torch.arange(h.shape[1], device=h.device) % 2)[:, None, None], False),
    "standardise": (lambda m, h: (h - h.mean(1, True)) / (h.var(1, keepdim=True) + 1).sqrt(), True),
    "global-response-norm": (lambda m, h: h * (lambda g: g / (g.mean(1, True) + 1))(h.norm(dim=(2, 3), keepdim=True)),
                             True),
    "cosine": (lambda m, h: h * nn.functional.cosine_similarity(h, h.roll(1, 2), 1)[:, None], True),
    "gram-of-itself": (lambda m, h: (h.flatten(2) @ h.flatten(2).mT @ h.flatten(2)).view(h.shape), True),
    "dynamic-depthwise": (lambda m, h: nn.functional.conv2d(
        h.reshape(1, -1, 6, 6), m.kernels(h.mean((2, 3))).reshape(-1, 1, 3, 3), padding=1, groups=len(h) * h.shape[1]
    ).view(h.shape), True),
}  # fmt: skip


@pytest.mark.parametrize("kind", OVER_CHANNELS)
def test_operators_over_channels(kind):
    middle, free = OVER_CHANNELS[kind]
    parts = {"eca": nn.Conv1d(1, 1, 3, padding=1)} if kind == "convolution" else {}
    parts |= {"kernels": nn.Linear(16, 144)} if kind == "dynamic-depthwise" else {}
    model = around(middle, **parts)
    graph = settled(model, pixels())
    assert prunable(graph) == ({"a", "b"} if free else {"b"})
    assert free or f"{__file__}:" in reasons(graph)["a"]
    assert_exact(graph, pixels())


# --- modules of one class ---
class Role(nn.Module):
    """One class, two forwards, a list of sizes that several may share."""

    def __init__(self, sizes: list[int], turned: bool) -> None:
        super().__init__()
        self.sizes, self.turned, self.width = sizes, turned, sum(sizes)
        self.a, self.b = conv(12, self.width), conv(self.width, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        if self.turned:
            h = torch.cat([p * (i + 1) for i, p in enumerate(h.split(self.sizes, 1))][::-1], 1)
        return x + self.b(h.view(len(x), self.width, -1).sin().view(h.shape))


@pytest.mark.parametrize("seed", range(2))
def test_modules_of_one_class_in_other_roles(seed):
    shared = [4, 12]
    body = [Role(shared, True), Role(shared, True), Role([3, 13], False), Role([10, 6], True), Role(shared, False)]
    model = nn.Sequential(conv(3, 12), *body, nn.Flatten(), nn.Linear(432, 4))
    graph = settled(model, pixels())
    assert prunable(graph) == {"0", *(f"{i + 1}.a" for i in range(5))}
    assert_exact(graph, pixels(), seed=seed)
    for role in body:
        assert role.width == role.a.out_channels < 16
        assert sum(role.sizes) == (role.width if role.turned else 16)
    assert body[4].sizes is shared, "nobody cuts in there by this list"


def test_sizes_of_a_parent_and_of_a_module_used_twice():
    class Inner(nn.Module):
        def forward(self, h: torch.Tensor, width: int) -> torch.Tensor:
            return h.view(len(h), width, -1).sin().view(len(h), self.outer, 6, 6)

    def forward(m: Custom, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(m.a(x))
        for _ in range(2):
            h = torch.relu(m.c(m.inner(h, m.width)))
        return m.head(torch.relu(m.b(h)).mean((2, 3)))

    parts = {"a": conv(3, 16), "c": conv(16, 16), "b": conv(16, 10), "head": nn.Linear(10, 4)}
    model = Custom(forward, **parts, inner=Inner(), width=16)
    model.inner.outer = 16
    graph = settled(model, pixels())
    assert prunable(graph) == {"a", "b"}
    assert_exact(graph, pixels())
    assert model.width == model.inner.outer == model.c.in_channels == model.c.out_channels < 16


# --- attention ---
class Attention(nn.Module):
    """As in vision transformers: one layer for q, k, v; the scale and the checks of its kind."""

    def __init__(self, kind: str, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, width
        self.scale = (width // heads) ** -0.5
        self.embed = nn.Linear(5, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        if self.kind == "assertion":
            assert c == self.width, f"{c} instead of {self.width}"
        h = self.heads
        q, k, v = self.qkv(x).reshape(b, n, 3, h, -1 if self.kind == "open" else c // h).permute(2, 0, 3, 1, 4)
        if self.kind in ("sdpa", "open"):
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.mT).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, n, -1 if self.kind == "open" else c)
        x = x + self.out(y)
        return self.head(torch.relu(x + self.mlp(x)).mean(1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["sdpa", "open", "scale", "assertion"])
def test_attention_counts_and_scales(kind, seed):
    """`C // heads` couples q, k, v to the stream, and their width sets the scale of the scores."""
    model = Attention(kind)
    graph = settled(model, tokens())
    assert prunable(graph) == ({"embed", "qkv", "mlp.0"} if kind == "open" else {"embed", "mlp.0"})
    assert_exact(graph, tokens(), seed=seed)
    assert model.qkv.out_features == 3 * model.out.in_features


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_of_torch(norm_first):
    """The hidden layer of its MLP is free, whichever of its fast ways the encoder takes in eval mode."""
    encoder = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first)
    model = Custom(lambda m, x: m.head(m.body(m.embed(x)).mean(1)), embed=nn.Linear(5, 12), body=encoder,
                   head=nn.Linear(12, 4))  # fmt: skip
    graph = settled(model, tokens())
    assert "body.linear1" in prunable(graph)
    assert_exact(graph, tokens())
    assert encoder.linear1.out_features == encoder.linear2.in_features < 20


def test_factor_of_a_query_counts_once():
    """Where no weight reads a channel, one of the two operands is scaled, never both (that would be z squared)."""
    model = Custom(lambda m, x: m.q(x) @ m.k(x).mT, q=nn.Linear(5, 8), k=nn.Linear(5, 8))
    graph = settled(model, tokens())
    assert len(graph.prunable) == 1
    keep, z = random_keep(graph), torch.rand(graph.num_classes, dtype=torch.float64)
    live = graph.slots[0].axes[0][keep[graph.slots[0].axes[0]]]
    with torch.no_grad():
        expected = masked_output(graph, keep, tokens())
        assert not graph.read_by_weights()[live].any()
        with graph.masked(keep, z):
            actual = model(tokens())
        assert relative_error(actual, expected) < 1e-9, "no weight reads these: the factor has nothing to act on"
    assert_exact(graph, tokens())


def test_factor_behind_a_depthwise_convolution_counts_once():
    """It does not sum over channels, so only what comes after it is scaled."""
    model = around(lambda m, h: torch.relu(m.d(h)), d=conv(16, 16, 3, groups=16))
    graph = settled(model, pixels())
    z = torch.rand(graph.num_classes, dtype=torch.float64) + 0.5
    axis = next(s for s in graph.slots if s.name == "b.weight").axes[1]
    with torch.no_grad():
        by_hand = copy.deepcopy(model)
        by_hand.b.weight *= z[axis].view(1, -1, 1, 1)
        by_hand.head.weight *= z[next(s for s in graph.slots if s.name == "head.weight").axes[1]]
        with graph.masked(graph.all_kept(), z):
            assert relative_error(model(pixels()), by_hand(pixels())) < 1e-9
        assert relative_error(model(pixels()), by_hand(pixels())) > 1e-3


# --- ties ---
class Shuffled(nn.Module):
    """ShuffleNet's unit: half of the channels go by, the other half through three layers, then all are shuffled."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.d, self.c = (
            conv(width // 2, hidden),
            conv(hidden, hidden, 3, groups=hidden),
            conv(hidden, width // 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, torch.relu(self.c(self.d(torch.relu(self.a(right)))))], 1)
        return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_shuffle_and_chunk_repeated(units):
    """The stream's channels end as one class, or few; what is within a unit stays free."""
    model = nn.Sequential(
        *(conv(3, 16, 3), nn.ReLU(), *(Shuffled(16, 10) for _ in range(units))),
        *(conv(16, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    graph = settled(model, pixels())
    assert prunable(graph) >= {f"{2 + i}.a" for i in range(units)} | {str(units + 2)}
    if "0" not in prunable(graph):
        assert len(reasons(graph)["0"]) > 20
    for seed in range(2):
        assert_exact(settled(copy.deepcopy(model), pixels()), pixels(), seed=seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("kind", ["view", "attribute"])
def test_shuffle_with_a_literal_number_of_groups(kind, groups, seed):
    """Rows of the number that stays, or columns: only these can go."""

    def shuffle(m: Custom, h: torch.Tensor) -> torch.Tensor:
        if kind == "view":
            return h.view(len(h), groups, -1, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        return h.unflatten(1, (m.groups, -1)).transpose(1, 2).flatten(1, 2)

    model = around(shuffle, groups=groups)
    graph = settled(model, pixels())
    assert "b" in prunable(graph)
    assert_exact(graph, pixels(), seed=seed)


class Standardised(nn.Conv2d):
    """Weight standardisation as normaliser-free networks do it: statistics over what a filter reads."""

    def __init__(self, i: int, o: int, k: int, by_batch_norm: bool) -> None:
        super().__init__(i, o, k, padding=k // 2)
        self.gain, self.by_batch_norm = nn.Parameter(torch.ones(o, 1, 1, 1)), by_batch_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_batch_norm:
            flat = self.weight.reshape(1, self.out_channels, -1)
            gain = self.gain.view(-1)
            weight = nn.functional.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
            weight = weight.reshape_as(self.weight)
        else:
            mean, var = self.weight.mean((1, 2, 3), True), self.weight.var((1, 2, 3), keepdim=True)
            weight = (self.weight - mean) * torch.rsqrt(var + 1e-6) * self.gain
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("by_batch_norm", [False, True])
def test_standardised_weights(by_batch_norm):
    """Their mean and variance are those of the live inputs."""
    model = nn.Sequential(
        *(Standardised(3, 16, 3, by_batch_norm), nn.ReLU(), Standardised(16, 12, 3, by_batch_norm), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    graph = settled(model, pixels())
    assert prunable(graph) == {"0", "2"}
    assert_exact(graph, pixels())
    assert model[2].in_channels == model[0].out_channels == len(model[0].gain) < 16


def test_table_of_position_biases():
    """The table is indexed by position, so that dim stays; its heads go with those of the values."""

    def forward(m: Custom, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(2, 7, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        scores = q @ k.mT / 2 + m.table[m.index].permute(2, 0, 1)
        return m.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)

    index = (torch.arange(7)[:, None] - torch.arange(7)[None] + 6).abs()
    parts = {"q": nn.Linear(5, 24), "k": nn.Linear(5, 24), "v": nn.Linear(5, 24), "head": nn.Linear(24, 4)}
    model = Custom(forward, **parts, table=nn.Parameter(torch.empty(13, 6)), index=index)
    graph = settled(model, tokens())
    assert "v" in prunable(graph) or "q" in prunable(graph)
    assert_exact(graph, tokens())
    assert len(model.table) == 13
    assert torch.equal(model.index, index)


# --- the example ---
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_any_batch_gives_the_same_graph(count):
    """A batch of one hides what the batch absorbs, one as large as a width looks like it."""
    model = around(lambda m, h: h.view(-1, 16, 36).relu().view(h.shape) + h.reshape(-1, *h.shape[2:]).view_as(h))
    graph = settled(model, pixels(count=count))
    assert prunable(graph) == {"b"}
    assert_exact(graph, pixels(count=5))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "stamp"])
@pytest.mark.parametrize("kind", ["head", "gamma"])
def test_parts_that_begin_at_zero(kind, method):
    """A zero output equals any other; scores of zero are no error, and the cut is as large as asked."""
    net = around(lambda m, h: h)
    if kind == "head":
        nn.init.zeros_(net.head.weight)
        nn.init.zeros_(net.head.bias)
    else:
        net.a = nn.Sequential(net.a, nn.BatchNorm2d(16))
        nn.init.zeros_(net.a[1].weight)
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    report = stamp_fast.report(stamp_fast.prune(net, [batch], method=method, steps=2, seed=0, progress=False))
    assert report.equality_error is not None
    assert report.equality_error < 1e-5
    assert 0.4 < report.macs_after / report.macs_before < 0.6


def test_randomised_networks_have_nothing_at_zero():
    """`randomise` reaches every parameter: a comparison behind a zero one would say nothing."""
    model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    randomise(model)
    assert all(bool((p != 0).all()) for p in model.parameters())
