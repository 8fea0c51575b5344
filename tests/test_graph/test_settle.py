"""What settling binds, ties and keeps, and that it changes nothing else."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from reference.cut import Custom, assert_exact, prunable, reasons, settled
from reference.randomise import random_keep, randomise
from reference.state import Frozen
from torch import Tensor, nn

from stamp_fast import ArgumentError, CompactionError, trace
from stamp_fast.graph import _compact


def conv(i: int, o: int, k: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2)


def images(side: int = 6) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def line_of(mark: str) -> str:
    """`file:line` of the line that ends with the comment."""
    with open(__file__) as source:
        number = next(i for i, text in enumerate(source, 1) if text.rstrip().endswith(f"# {mark}"))
    return f"{__file__}:{number}"


def around(middle: Callable, width: int = 16, **parts) -> Custom:
    """conv a (3 -> 16), `middle`, conv b (width -> 10), head."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.b(middle(m, torch.relu(m.a(x))))).mean((2, 3)))

    return Custom(forward, a=conv(3, 16, 3), b=conv(width, 10, 3), head=nn.Linear(10, 4), **parts)


# --- attributes ---
@pytest.mark.parametrize("seed", range(4))
def test_attribute_follows_its_width(seed):
    model = around(lambda m, h: h.view(len(h), m.width, -1).view(len(h), m.width, 6, 6), width=16)
    model.width = 16
    x = images()
    graph = settled(model, x)
    assert {(b.module, b.attribute, b.times) for b in graph.bindings} == {("", "width", 1)}
    assert prunable(graph) == {"a", "b"}
    keep = assert_exact(graph, x, seed=seed)
    group = next(g for g in graph.groups if g.name == "a")
    assert model.width == model.a.out_channels == int(keep[group.classes].sum()) < 16


@pytest.mark.parametrize("times", [2, 3, 4])
def test_attribute_that_is_a_multiple_of_a_width(times):
    model = around(lambda m, h: h.view(len(h), m.wide // times, 6, 6))
    model.wide = 16 * times
    x = images()
    graph = settled(model, x)
    assert [b.times for b in graph.bindings] == [times]
    assert prunable(graph) == {"a", "b"}
    assert_exact(graph, x)
    assert model.wide == times * model.a.out_channels < 16 * times


@pytest.mark.parametrize("kind", [list, tuple])
def test_pieces_in_a_list(kind):
    def pieces(m: Custom, h: Tensor) -> Tensor:
        return torch.cat([p * (i + 1) for i, p in enumerate(torch.split(h, m.sizes, 1))][::-1], 1)

    model = around(pieces, sizes=kind([2, 6, 8]))
    x = images()
    graph = settled(model, x)
    assert prunable(graph) == {"a", "b"}
    assert [(b.attribute, b.item) for b in graph.bindings] == [("sizes", 0), ("sizes", 1), ("sizes", 2)]
    assert_exact(graph, x, seed=2)
    assert type(model.sizes) is kind
    assert sum(model.sizes) == model.a.out_channels < 16
    assert len(model.sizes) == 3
    assert tuple(model.sizes) != (2, 6, 8)


def test_width_as_one_item_of_a_tuple():
    """The other items are no widths, and stay, though one of them has the same value."""
    model = around(lambda m, h: h * torch.ones(m.size, dtype=h.dtype, device=h.device).cumsum(2), size=(16, 16, 1))
    x = images(16)
    graph = settled(model, x)
    assert prunable(graph) == {"a", "b"}
    assert_exact(graph, x)
    assert model.size == (model.a.out_channels, 16, 1)
    assert model.a.out_channels < 16


@pytest.mark.parametrize("sizes", [(4, 12), (2, 5, 9), (8, 8)])
def test_pieces_in_separate_attributes(sizes):
    names = ["first", "second", "third"][: len(sizes)]

    def pieces(m: Custom, h: Tensor) -> Tensor:
        parts = torch.split(h, [getattr(m, name) for name in names], 1)
        return torch.cat([p * (i + 1) for i, p in enumerate(parts)][::-1], 1)

    model = around(pieces, **dict(zip(names, sizes, strict=True)))
    x = images()
    graph = settled(model, x)
    assert "b" in prunable(graph)
    if len(set(sizes)) == len(sizes):
        assert {b.attribute for b in graph.bindings} == set(names)
        assert "a" in prunable(graph)
    assert_exact(graph, x, seed=1)
    assert sum(getattr(model, name) for name in names) == model.a.out_channels


def test_widths_of_two_layers_in_one_module():
    def forward(m: Custom, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x)).view(len(x), m.outer, -1).view(len(x), m.outer, 6, 6)
        h = torch.relu(m.c(h)).reshape(len(x), m.inner, 36).unflatten(2, (6, 6))
        return m.head(torch.relu(m.b(h)).mean((2, 3)))

    parts = {"a": conv(3, 16, 3), "c": conv(16, 24), "b": conv(24, 10), "head": nn.Linear(10, 4)}
    model = Custom(forward, **parts, outer=16, inner=24)
    x = images()
    graph = settled(model, x)
    assert prunable(graph) == {"a", "b", "c"}
    assert_exact(graph, x)
    assert (model.outer, model.inner) == (model.a.out_channels, model.c.out_channels)
    assert model.outer < 16
    assert model.inner < 24


@pytest.mark.parametrize("order", [("side", "depth", "width"), ("width", "depth", "side"), ("depth", "width", "side")])
def test_equal_by_coincidence(order):
    """16 is the width, the side of the image and a number that nobody reads: only the first may change."""
    model = around(lambda m, h: h.view(len(h), m.width, m.side, -1))
    for name in order:
        setattr(model, name, 16)
    x = images(16)
    graph = settled(model, x)
    assert {b.attribute for b in graph.bindings} == {"width"}
    assert_exact(graph, x)
    assert (model.depth, model.side) == (16, 16)
    assert model.width == model.a.out_channels < 16


def test_width_and_number_of_heads_alike():
    """Three heads of three channels, and three of q, k, v: one 3 of three may change, or none."""

    def attention(m: Custom, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(len(x), -1, 3, m.heads, m.width).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return m.head(torch.relu(m.b(h.transpose(1, 2).flatten(2))))

    model = Custom(attention, qkv=nn.Linear(5, 27), b=nn.Linear(9, 8), head=nn.Linear(8, 4), heads=3, width=3, depth=3)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = settled(model, x)
    assert "b" in prunable(graph)
    for seed in range(3):
        other = copy.deepcopy(model)
        assert_exact(settled(other, x), x, seed=seed)
        assert other.depth == 3
        assert 3 * other.heads * other.width == other.qkv.out_features


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.width = hidden, width
        self.a, self.b = conv(width, hidden), conv(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return x + self.b(h.view(len(x), self.hidden, *x.shape[2:]))


def blocks(*hidden: int) -> nn.Sequential:
    return nn.Sequential(
        *(conv(3, 12), nn.ReLU(), *(Block(12, h) for h in hidden), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(12, 4),
    )


def test_modules_of_one_class_cost_no_further_replays(replays):
    counts = []
    for hidden in ((8, 8), (8, 20, 12, 8, 30, 9, 17, 24)):
        model = blocks(*hidden)
        replays.clear()
        graph = settled(model, images())
        counts.append(len(replays))
        assert len(graph.bindings) == len(hidden)
        assert all(f"{i + 2}.a" in prunable(graph) for i in range(len(hidden)))
        assert_exact(graph, images())
        inside = [module for module in model if isinstance(module, Block)]
        assert [block.hidden for block in inside] == [block.a.out_channels for block in inside]
        assert all(block.width == 12 for block in inside), "nobody reads it"
    assert counts[0] == counts[1]


# --- counts ---
def counted(m: Custom, h: Tensor) -> Tensor:
    b, c, height, width = h.shape
    return torch.relu(m.q(h)).reshape(b, c, height * width).reshape(b, c, height, width)


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(counted, id="shape"),
        pytest.param(lambda m, h: m.q(h).flatten(2).view_as(h), id="view_as"),
        pytest.param(lambda m, h: m.q(h).flatten(2).reshape(h.shape), id="reshape"),
        pytest.param(lambda m, h: m.q(h).flatten(2).transpose(1, 2).reshape(-1, h.size(1)).sigmoid().view(
            len(h), 6, 6, h.size(1)).permute(0, 3, 1, 2), id="tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(2))
def test_count_of_one_layer_used_for_another(middle, seed):
    x = images()
    model = around(middle, q=conv(16, 16))
    with pytest.raises(CompactionError, match="test_settle.py"):
        dense = trace(model, images().float())
        dense.check(random_keep(dense))
    graph = settled(model, x)
    assert len(graph.ties) == 1
    assert "b" in prunable(graph) and prunable(graph) & {"a", "q"}, "tied, not kept"
    assert_exact(graph, x, seed=seed)
    assert model.q.out_channels == model.a.out_channels < 16


def test_protection_outlives_a_tie():
    """Tying numbers groups and classes anew."""
    model = randomise(around(counted, q=conv(16, 16))).double().eval()
    graph = trace(model, images())
    graph.protect(["head"])
    graph.settle()
    assert graph.ties
    assert reasons(graph)["b"] == "kept on request"
    assert prunable(graph) & {"a", "q"}
    assert "b" not in prunable(graph)
    assert_exact(graph, images())
    assert model.b.out_channels == 10


def test_tie_with_a_protected_layer_protects_both():
    model = randomise(around(counted, q=conv(16, 16))).double().eval()
    graph = trace(model, images())
    graph.protect(["a"])
    graph.settle()
    assert prunable(graph) == {"b"}
    assert_exact(graph, images())
    assert model.q.out_channels == model.a.out_channels == 16


def test_tied_in_every_block():
    class Counted(Block):
        def forward(self, x: Tensor) -> Tensor:
            b, c, height, width = x.shape
            return x + torch.relu(self.b(torch.relu(self.a(x)))).flatten(2).reshape(b, c, height, width)

    class Squeezed(nn.Module):
        """Two layers of one width that no operator couples."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(12, width), conv(width, width), conv(width, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return x + self.c(torch.relu(self.b(h)).flatten(2).view(h.shape))

    widths = (8, 16, 10, 20)
    model = nn.Sequential(
        *(conv(3, 12), nn.ReLU(), *map(Squeezed, widths), Counted(12, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(12, 4),
    )
    graph = settled(model, images())
    assert len(graph.prunable) == 1 + len(widths) + 1
    assert_exact(graph, images())
    for block, width in zip(model[2:6], widths, strict=True):
        assert block.a.out_channels == block.b.out_channels < width


# --- keeping ---
LITERALS = {
    "view": lambda m, h: h.view(len(h), 16, -1).mul(2).view(h.shape),  # fixed by view
    "absorbed": lambda m, h: h.view(-1, 16, 36).view(h.shape),  # fixed by absorbed
    "split": lambda m, h: torch.cat(h.split([6, 10], 1)[::-1], 1),  # fixed by split
    "factory": lambda m, h: h + torch.ones(1, 16, 1, 1, dtype=h.dtype, device=h.device),  # fixed by factory
    "scale": lambda m, h: h * (1 / h.shape[1]),  # fixed by scale
}


@pytest.mark.parametrize("kind", LITERALS)
def test_literal_is_kept_with_its_line(kind):
    def forward(m: Custom, x: Tensor) -> Tensor:
        h = torch.relu(m.b(LITERALS[kind](m, torch.relu(m.a(torch.relu(m.before(x)))))))
        return m.head(torch.relu(m.after(h)).mean((2, 3)))

    parts = {"before": conv(3, 16), "a": conv(16, 16), "b": conv(16, 16), "after": conv(16, 10)}
    model = Custom(forward, **parts, head=nn.Linear(10, 4))
    graph = settled(model, images())
    assert prunable(graph) == {"before", "b", "after"}
    assert line_of(f"fixed by {kind}") in reasons(graph)["a"]
    assert_exact(graph, images())


@pytest.mark.parametrize("seed", range(3))
def test_size_that_fits_some_counts(seed):
    """With a size left open, 4, 8 or 12 channels of 16 go through, others do not."""
    model = around(lambda m, h: h.view(len(h), 16, -1).view(h.shape))
    graph = settled(model, images())
    assert "b" in prunable(graph)
    assert_exact(graph, images(), seed=seed)


def test_literal_is_kept_in_every_block(replays):
    class Literal(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)).view(len(x), 8, *x.shape[2:]))  # fixed in blocks

    counts = []
    for count in (2, 16):
        model = nn.Sequential(conv(3, 12), *(Literal(12, 8) for _ in range(count)), nn.Flatten(), nn.Linear(432, 4))
        replays.clear()
        graph = settled(model, images())
        counts.append(len(replays))
        assert prunable(graph) == {"0"}
        kept = [reasons(graph)[f"{i + 1}.a"] for i in range(count)]
        assert all(line_of("fixed in blocks") in reason for reason in kept)
        assert_exact(graph, images())
    assert counts[1] <= 3 * counts[0], "bisection takes its logarithm, further blocks nothing"


def test_only_the_combination_fails():
    """Either layer may be cut, both may not: one is kept, the other not."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        h, g = torch.relu(m.a(x)), torch.relu(m.c(x))
        both = h.mean((2, 3)).sum(1, keepdim=True) + g.mean((2, 3)).sum(1, keepdim=True)
        if h.shape[1] < 16 and g.shape[1] < 14:
            both = both.sin()
        return m.head(torch.cat([torch.relu(m.b(h)), torch.relu(m.d(g))], 1).mean((2, 3)) * both)

    parts = {"a": conv(3, 16), "b": conv(16, 8), "c": conv(3, 14), "d": conv(14, 8)}
    model = Custom(forward, **parts, head=nn.Linear(16, 4))
    graph = settled(model, images())
    assert prunable(graph) in ({"b", "d", "a"}, {"b", "d", "c"})
    assert reasons(graph)["c" if "a" in prunable(graph) else "a"].startswith("its size is fixed in the forward")
    assert_exact(graph, images())


def test_forward_that_counts_its_calls():
    """With other operators every time there is nothing to compare with: an error of ours, and nothing has changed."""
    calls = itertools.count(1)

    def longer(m: Custom, h: Tensor) -> Tensor:
        for _ in range(next(calls)):
            h = torch.sin(h)
        return h

    model = randomise(around(longer)).double().eval()
    graph = trace(model, images())
    before = Frozen(model)
    with pytest.raises(CompactionError, match="does not repeat itself.*same operators every time"):
        graph.settle()
    before.assert_same()


def test_assertion_in_python():
    """It fails before any operator runs, and names no size that a tensor has."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        assert h.shape[1] == m.heads * m.width, "embed_dim must be divisible"
        return m.head(torch.relu(m.b(h)).mean((2, 3)))

    model = Custom(forward, a=conv(3, 16), b=conv(16, 10), head=nn.Linear(10, 4), heads=4, width=4)
    graph = settled(model, images())
    assert prunable(graph) >= {"b"}
    assert_exact(graph, images())
    assert model.a.out_channels == model.heads * model.width


# --- leaves no mark ---
def several() -> Custom:
    """An attribute, a list, a tie and a literal."""

    def forward(m: Custom, x: Tensor) -> Tensor:
        h = counted(m, torch.relu(m.a(x)).view(len(x), m.width, 6, 6))
        h = torch.cat(torch.relu(m.c(h)).split(m.sizes, 1)[::-1], 1)
        return m.head(torch.relu(m.b(h)).view(len(x), 10, 36).mean(2))

    parts = {"a": conv(3, 16), "q": conv(16, 16), "c": conv(16, 20), "b": conv(20, 10), "head": nn.Linear(10, 4)}
    return Custom(forward, **parts, width=16, sizes=[8, 12])


@pytest.mark.parametrize("training", [False, True])
def test_settling_changes_nothing(training):
    model = randomise(several()).double().train(training)
    model.head.bias.grad = torch.ones(4, dtype=torch.float64)
    sizes = model.sizes
    graph = trace(model, images())
    before = Frozen(model)
    graph.settle()
    assert graph.bindings and graph.ties
    before.assert_same()
    assert model.sizes is sizes
    graph.check(random_keep(graph))
    before.assert_same()
    assert model.sizes is sizes


def test_settled_twice_is_settled_once():
    graph = settled(several(), images())
    before = graph.bindings, graph.ties, [(g.name, g.classes, g.reason) for g in graph.groups]
    graph.settle()
    assert (graph.bindings, graph.ties, [(g.name, g.classes, g.reason) for g in graph.groups]) == before


def test_attributes_come_back_after_a_mask():
    graph = settled(several(), images())
    model, keep, before = graph.model, random_keep(graph), Frozen(graph.model)
    sizes = model.sizes
    with graph.masked(keep):
        assert model.width < 16
        assert sum(model.sizes) < 20
        assert model.a.out_channels == model.width
    before.assert_same()
    assert model.sizes is sizes
    with pytest.raises(ZeroDivisionError), graph.masked(keep):
        raise ZeroDivisionError
    before.assert_same()
    assert model.sizes is sizes == [8, 12]


@pytest.mark.parametrize("cause", ["optimizer", "half-way", "literal"])
def test_attributes_come_back_after_a_failed_cut(monkeypatch, cause):
    graph = settled(several(), images())
    model, keep, optimizer = graph.model, random_keep(graph), None
    sizes, before = model.sizes, Frozen(graph.model)
    if cause == "optimizer":
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    elif cause == "half-way":
        replaced = []

        def fails_late(tensor: Tensor, data: Tensor) -> None:
            replaced.append(tensor)
            if len(replaced) > 3:
                raise CompactionError("on purpose")
            original(tensor, data)

        original = _compact.replace_data
        monkeypatch.setattr(_compact, "replace_data", fails_late)
    else:
        graph = trace(model, images())  # not settled
        keep = random_keep(graph)
    with pytest.raises(ArgumentError if cause == "optimizer" else CompactionError):
        graph.compact(keep, optimizer=optimizer)
    before.assert_same()
    assert model.sizes is sizes == [8, 12]


def test_average_gets_the_attributes_too():
    graph = settled(several(), images())
    average = copy.deepcopy(graph.model)
    graph.compact(random_keep(graph), ema=average)
    with torch.no_grad():
        assert torch.equal(average(images()), graph.model(images()))
    assert (average.width, average.sizes) == (graph.model.width, graph.model.sizes)
    assert average.width == average.a.out_channels < 16
