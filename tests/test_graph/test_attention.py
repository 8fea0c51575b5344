"""Attention that takes the width of a head for a share of the residual stream: stream and heads are cut together."""

import gc

import pytest
import torch
from reference.cut import Custom, assert_exact, prunable, reasons, settled
from reference.randomise import randomise
from torch import Tensor, nn

from stamp_fast import ArgumentError, trace


def tokens(count: int = 8) -> Tensor:
    return torch.randn(2, count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Windows(nn.Module):
    """As in Swin: windows of four tokens, every second block on a shifted sequence; `C // heads` by the stream."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.heads, self.shift = heads, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.shift:
            x = torch.roll(x, -self.shift, 1).sin()
        x = x.view(b * n // 4, 4, c)
        qkv = self.qkv(x).reshape(len(x), 4, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (c // self.heads) ** -0.5) @ k.mT + self.bias
        x = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 4, c)).view(b, n, c)
        return torch.roll(x, self.shift, 1) if self.shift else x


class Block(nn.Module):
    """The hidden layer is as wide as the stream, by coincidence."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), attention
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Two tokens become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(2 * width), nn.Linear(2 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.cat([x[:, ::2], x[:, 1::2]], -1)))


def swin(blocks: int, heads: int = 3) -> Custom:
    """Two stages. In the first, batch times windows times heads is the width if there are three heads."""
    width = 4 * heads
    body = nn.Sequential(
        *(Block(Windows(width, heads, i % 2), width) for i in range(blocks)),
        Merge(width),
        *(Block(Windows(2 * width, 2 * heads, i % 2), 2 * width) for i in range(blocks)),
    )
    return Custom(
        lambda m, x: m.head(m.body(m.embed(x)).mean(1)),
        **{"embed": nn.Linear(5, width), "body": body, "head": nn.Linear(2 * width, 4)},
    )


@pytest.mark.parametrize("seed", range(3))
def test_stream_goes_by_whole_heads(seed):
    model = swin(2)
    graph = settled(model, tokens())
    classes = {group.name: group.num_classes for group in graph.prunable}
    hidden = {f"body.{i}.mlp.0": 24 if i > 2 else 12 for i in (0, 1, 3, 4)}
    assert classes == {"embed": 3, "body.2.down": 6} | hidden
    assert {b.attribute for b in graph.bindings} == {"heads"}, "nobody takes the shift for a width"
    assert_exact(graph, tokens(), seed=seed)
    for block in (model.body[0], model.body[1]):
        assert 4 * block.attention.heads == model.embed.out_features < 12
        assert len(block.attention.bias) == block.attention.heads
    assert [block.attention.shift for block in (model.body[0], model.body[1])] == [0, 1]


def test_further_blocks_cost_no_further_replays(replays):
    counts = []
    for blocks in (2, 6):
        replays.clear()
        graph = settled(swin(blocks), tokens())
        counts.append(len(replays))
        assert not [group for group in graph.groups if group.reason]
    assert counts[0] == counts[1] <= 12


def test_one_head_cannot_be_shared_out():
    """All channels of the stream would be one class: it is kept, and what does not depend on it is not."""
    model = Custom(
        lambda m, x: m.head(m.body(m.embed(x)).mean(1)),
        **{"embed": nn.Linear(5, 12), "body": Block(Windows(12, 1, 0), 12), "head": nn.Linear(12, 4)},
    )
    graph = settled(model, tokens())
    assert prunable(graph) >= {"body.mlp.0"}
    assert "embed" not in prunable(graph)
    assert f"{__file__}:" in reasons(graph)["embed"]
    assert_exact(graph, tokens())


def test_protected_stream_keeps_the_heads():
    model = randomise(swin(2)).double().eval()
    graph = trace(model, tokens())
    graph.protect(["embed"])
    graph.settle()
    assert prunable(graph) >= {f"body.{i}.mlp.0" for i in (0, 1, 3, 4)}
    assert_exact(graph, tokens())
    assert model.embed.out_features == 4 * model.body[0].attention.heads == 12


# --- torch's own attention ---
class Own(nn.Module):
    """nn.MultiheadAttention, of itself or of something of another width."""

    def __init__(self, width: int, heads: int, other: int | None = None, **options) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(width, heads, batch_first=True, kdim=other, vdim=other, **options)
        self.memory = None if other is None else nn.Linear(width, other)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.memory is None else torch.relu(self.memory(x))
        return self.own(x, y, y, need_weights=False)[0]


def encoder(attention: nn.Module) -> Custom:
    return Custom(
        lambda m, x: m.head(m.body(m.embed(x)).mean(1)),
        **{"embed": nn.Linear(5, 15), "body": Block(attention, 15), "head": nn.Linear(15, 4)},
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("other", [None, 10], ids=["itself", "another"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_multihead_attention(other, bias, seed):
    model = encoder(Own(15, 3, other, bias=bias))
    graph = settled(model, tokens())
    classes = {group.name: group.num_classes for group in graph.prunable}
    expected = {"embed": 3, "body.mlp.0": 15} | ({} if other is None else {"body.attention.memory": 10})
    assert classes == expected
    assert not graph.bindings, "what torch's layers keep follows from their parameters"
    assert_exact(graph, tokens(), seed=seed)
    own, width = model.body.attention.own, model.embed.out_features
    assert own.embed_dim == own.num_heads * own.head_dim == own.out_proj.in_features == width < 15
    assert own.kdim == own.vdim == (width if other is None else model.body.attention.memory.out_features)


def test_heads_survive_where_q_k_and_v_are_taken_apart_first():
    """Of five channels for each of three heads, the heads survive: the others set the scale of the scores."""
    graph = trace(encoder(Own(15, 3)), tokens().float())
    attention = next(group for group in graph.groups if group.name == "body.attention.own")
    assert attention.num_classes == 3


# --- garbage collection ---
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_left_as_it_was(enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        graph = settled(swin(2), tokens())
        assert gc.isenabled() == enabled
        with pytest.raises(ArgumentError):
            graph.compact(torch.zeros(graph.num_classes, dtype=torch.bool))
        assert gc.isenabled() == enabled
        graph.compact(graph.all_kept())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
