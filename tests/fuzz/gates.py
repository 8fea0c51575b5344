"""Blocks in which activations meet activations: gates, attention, recurrent layers, statistics over channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import Draw, Part, block


@block("squeeze")
def squeeze(d: Draw) -> nn.Module:
    c, r = d.channels, max(2, d.channels // 2)
    convs = {"down": nn.Conv2d(c, r, 1), "up": nn.Conv2d(r, c, 1)}
    lines = {"down": nn.Linear(c, r), "up": nn.Linear(r, c)}
    run, parts = d.pick(
        (lambda m, x: x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True))))), convs),
        (lambda m, x: x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3))))))[:, :, None, None], lines),
        (
            lambda m, x: x
            * torch.sigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(x, 1).view(-1, c))))).view(-1, c, 1, 1),
            lines,
        ),
        (
            lambda m, x: x
            * torch.sigmoid(m.up(torch.relu(m.down(x.amax((2, 3)))))).view(x.shape[0], x.shape[1], 1, 1).expand_as(x),
            lines,
        ),
        (lambda m, x: x * F.hardsigmoid(m.up(F.hardswish(m.down(F.adaptive_max_pool2d(x, 1))))), convs),
        (
            lambda m, x: x * torch.sigmoid(m.conv(x.mean((2, 3))[:, None]))[:, 0, :, None, None],
            {"conv": nn.Conv1d(1, 1, 3, padding=1)},
        ),
        (lambda m, x: x * torch.sigmoid(m.up(m.down(x.flatten(2).mean(-1)).relu())).unsqueeze(-1).unsqueeze(-1), lines),
        (lambda m, x: x * torch.softmax(m.up(torch.relu(m.down(x.mean((2, 3))))), 1).view(x.shape[0], -1, 1, 1), lines),
    )  # fmt: skip
    return Part(run, **parts)


@block("statistic")
def statistic(d: Draw) -> nn.Module:
    """A number over all channels at every position."""
    reduce: Callable = d.pick(
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x.amax(1, keepdim=True),
        lambda x: x.amin(1, keepdim=True),
        lambda x: x.max(1, keepdim=True).values,
        lambda x: x.min(1, keepdim=True)[0],
        lambda x: x.var(1, keepdim=True, unbiased=False),
        lambda x: x.std(1, keepdim=True, unbiased=False),
        lambda x: x.norm(dim=1, keepdim=True),
        lambda x: x.norm(p=1, dim=1, keepdim=True),
        lambda x: x.logsumexp(1, keepdim=True),
        lambda x: torch.sigmoid(x).prod(1, keepdim=True),
        lambda x: (x > 0).any(1, keepdim=True).to(x.dtype) + (x > -1).all(1, keepdim=True),
        lambda x: (x * x).sum(1, keepdim=True) / x.shape[1],
        lambda x: x.argmax(1, keepdim=True) * 0.1,
        lambda x: x.sum((1, 2, 3), keepdim=True),
        lambda x: x.mean().view(1, 1, 1, 1),
        lambda x: x.mean(1)[:, None],
        lambda x: torch.einsum("bchw,bchw->bhw", x, x)[:, None],
        lambda x: x.pow(2).mean((1, 2), keepdim=True).sqrt(),
        lambda x: x.softmax(1)[:, :1],
        lambda x: torch.softmax(x, 1),
        lambda x: torch.log_softmax(x, 1),
    )
    use: Callable = d.pick(
        lambda m, x, s: x * torch.sigmoid(s),
        lambda m, x, s: torch.cat([x, s.expand(x.shape[0], -1, *x.shape[2:])], 1),
        lambda m, x, s: x - s,
    )
    return Part(lambda m, x: use(m, x, reduce(x)))


@block("spatial_gate")
def spatial_gate(d: Draw) -> nn.Module:
    gate = nn.Conv2d(2, 1, 3, padding=1)
    one = nn.Conv2d(d.channels, 1, 1)
    run = d.pick(
        lambda m, x: x * torch.sigmoid(m.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))),
        lambda m, x: x * torch.sigmoid(m.one(x)),
        # A global context: one weight for every position, softmax over all of them.
        lambda m, x: x + (x.flatten(2) @ torch.softmax(m.one(x).flatten(2), -1).transpose(1, 2))[..., None],
        lambda m, x: x * torch.sigmoid(m.gate(torch.stack([x.mean(1), x.max(1).values], 1))),
    )
    return Part(run, gate=gate, one=one)


@block("glu")
def glu(d: Draw) -> nn.Module:
    c = d.channels
    wide, back = nn.Conv2d(c, 12, 1), nn.Conv2d(6, c, 1)
    last, last_back = nn.Linear(c, 12), nn.Linear(6, c)
    run = d.pick(
        lambda m, x: m.back((lambda a, b: a * torch.sigmoid(b))(*m.wide(x).chunk(2, 1))),
        lambda m, x: m.back(F.glu(m.wide(x), 1)),
        lambda m, x: (lambda a, b: m.last_back(F.silu(a) * b))(*m.last(x.movedim(1, -1)).chunk(2, -1)).movedim(-1, 1),
        lambda m, x: (lambda y: m.back(y[:, :6] * torch.tanh(y[:, 6:])))(m.wide(x)),
        lambda m, x: (lambda y: m.back(y[:, 0] * y[:, 1]))(m.wide(x).view(x.shape[0], 2, -1, *x.shape[2:])),
        lambda m, x: (lambda y: m.back(y[:, :, 0] * y[:, :, 1]))(m.wide(x).view(x.shape[0], -1, 2, *x.shape[2:])),
        lambda m, x: m.back((lambda a, b, c: torch.cat([a * b, c], 1))(*m.wide(x).split([3, 3, 3, 3], 1)[:3])),
        lambda m, x: m.last_back(F.glu(m.last(x.movedim(1, -1)))).movedim(-1, 1),
    )
    return Part(run, wide=wide, back=back, last=last, last_back=last_back)


# --- attention --------------------------------------------------------------------------------------------------
@block("attention")
def attention(d: Draw) -> nn.Module | None:
    """Several heads over the positions of the image, written in the usual ways."""
    c = d.channels
    heads = d.divisor(least=1)
    h, w, n, width = d.height, d.width, d.height * d.width, d.channels // heads

    def image(y: Tensor) -> Tensor:
        return y.transpose(1, 2).unflatten(2, (h, w))

    def attend(m: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        a = (q @ k.transpose(-2, -1)) * scale
        return (torch.softmax(a, -1) @ v).transpose(1, 2)

    def fused(m: Part, x: Tensor) -> Tensor:  # sizes from shapes
        b, n, c = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = m.qkv(y).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        return image(m.out(attend(m, q, k, v, (c // heads) ** -0.5).reshape(b, n, c)))

    def fused_literal(m: Part, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        q, k, v = m.qkv(y).view(-1, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        return image(m.out(attend(m, q, k, v, m.scale).reshape(-1, n, c)))

    def fused_inferred(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = m.qkv(y).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return image(m.out(attend(m, q, k, v, m.scale).reshape(b, n, -1)))

    def fused_chunk(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = (t.view(b, n, -1, m.width).transpose(1, 2) for t in m.qkv(y).chunk(3, -1))
        return image(m.out(attend(m, q, k, v, m.width**-0.5).flatten(2)))

    def separate(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = (layer(y).view(b, n, heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return image(m.out(attend(m, q, k, v, 0.5).reshape(b, n, -1)))

    def fused_kernel(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = (layer(y).view(b, n, heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return image(m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)))

    def shared_keys(m: Part, x: Tensor) -> Tensor:  # several query heads to one of the keys
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q = m.q(y).view(b, n, heads, -1).transpose(1, 2)
        k, v = m.kv(y).chunk(2, -1)
        k, v = (t.view(b, n, 1, -1).transpose(1, 2).expand(-1, heads, -1, -1) for t in (k, v))
        return image(m.out(attend(m, q, k, v, m.scale).reshape(b, n, -1)))

    def one_head(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = m.cq(x).flatten(2), m.ck(x).flatten(2), m.cv(x).flatten(2)
        a = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        return torch.bmm(v, a.transpose(1, 2)).view(b, c, h, w)

    def over_channels(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = (layer(y).view(b, n, heads, -1).permute(0, 2, 3, 1) for layer in (m.q, m.k, m.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        a = torch.softmax(q @ k.transpose(-2, -1) * m.temperature, -1)
        return image(m.out((a @ v).permute(0, 3, 1, 2).reshape(b, n, -1)))

    def gram(m: Part, x: Tensor) -> Tensor:
        y = x.flatten(2)
        a = torch.softmax(torch.bmm(y, y.transpose(1, 2)), -1)
        return torch.bmm(a, y).view_as(x) + x

    def linear(m: Part, x: Tensor) -> Tensor:
        q, k, v = (torch.relu(layer(x.movedim(1, -1).flatten(1, 2))) for layer in (m.q, m.k, m.v))
        context = k.transpose(1, 2) @ v
        return image(m.out(q @ context / (1 + q @ k.sum(1).unsqueeze(2))))

    def by_einsum(m: Part, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(y).unflatten(2, (heads, -1)) for layer in (m.q, m.k, m.v))
        a = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return image(m.out(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2)))

    def with_table(m: Part, x: Tensor) -> Tensor:
        b, n, _ = (y := x.flatten(2).transpose(1, 2)).shape
        q, k, v = (layer(y).view(b, n, heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        a = q @ k.transpose(-2, -1) + m.table[:, m.index.view(-1)].view(-1, n, n)
        return image(m.out((a.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)))

    run = d.pick(
        fused, fused_literal, fused_inferred, fused_chunk, separate, fused_kernel, shared_keys, one_head,
        over_channels, gram, linear, by_einsum, with_table,
    )  # fmt: skip
    parts = {
        "qkv": nn.Linear(c, 3 * c), "q": nn.Linear(c, c), "k": nn.Linear(c, c), "v": nn.Linear(c, c),
        "kv": nn.Linear(c, 2 * width), "out": nn.Linear(c, d.pick(c, 8)), "cq": nn.Conv2d(c, 4, 1),
        "ck": nn.Conv2d(c, 4, 1), "cv": nn.Conv2d(c, c, 1), "temperature": nn.Parameter(torch.empty(heads, 1, 1)),
        "table": nn.Parameter(torch.empty(heads, 9)), "index": torch.arange(n * n).view(n, n) % 9,
    }  # fmt: skip
    return Part(run, **parts, scale=width**-0.5, width=width, heads=heads)


@block("multihead")
def multihead(d: Draw) -> nn.Module:
    """torch's own attention module, or its encoder layer."""
    c, h, w = d.channels, d.height, d.width
    heads = d.divisor(least=1)
    match d.pick(0, 1, 2):
        case 1:
            layer = nn.TransformerEncoderLayer(c, heads, 9, dropout=0.0, batch_first=True, norm_first=d.flag())
            return Part(lambda m, x: m.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape), layer=layer)
        case 2:
            layer = nn.MultiheadAttention(c, heads, batch_first=False, bias=d.flag())
            return Part(lambda m, x: (lambda y: m.layer(y, y, y)[0].permute(1, 2, 0).unflatten(2, (h, w)))(x.flatten(2).permute(2, 0, 1)), layer=layer)  # fmt: skip # noqa: E501
    layer = nn.MultiheadAttention(c, heads, batch_first=True)
    return Part(lambda m, x: (lambda y: (y + m.layer(y, y, y, need_weights=False)[0]).transpose(1, 2).view_as(x))(x.flatten(2).transpose(1, 2)), layer=layer)  # fmt: skip # noqa: E501


# --- recurrent --------------------------------------------------------------------------------------------------
@block("recurrent", plain=True)
def recurrent(d: Draw) -> nn.Module:
    """Along the columns of the image, every row a sequence."""
    c, height = d.channels, d.height
    kind = d.pick(nn.GRU, nn.LSTM, nn.RNN)
    both = d.flag()
    layer = kind(c, 6, num_layers=d.pick(1, 2), bidirectional=both, batch_first=True, bias=not d.flag())
    return Part(
        lambda m, x: m.layer(x.permute(0, 2, 3, 1).flatten(0, 1))[0].unflatten(0, (-1, height)).permute(0, 3, 1, 2),
        layer=layer,
    )


# --- products of activations ------------------------------------------------------------------------------------
@block("bilinear")
def bilinear(d: Draw) -> nn.Module:
    c = d.channels
    a, b = nn.Conv2d(c, 6, 1), nn.Conv2d(c, 5, 1)
    back = nn.Linear(30, c)
    flat = nn.Linear(c * c, c)
    other = nn.Bilinear(c, c, 4)
    run, parts = d.pick(
        (
            lambda m, x: (
                x + m.back((m.a(x).flatten(2) @ m.b(x).flatten(2).transpose(1, 2)).flatten(1))[:, :, None, None]
            ),
            {"a": a, "b": b, "back": back},
        ),
        (
            lambda m, x: x + m.flat((x.flatten(2) @ x.flatten(2).transpose(1, 2)).flatten(1))[:, :, None, None],
            {"flat": flat},
        ),
        (
            lambda m, x: torch.einsum("bchw,bdhw->bcd", torch.relu(m.a(x)), m.b(x))[:, :, :, None],
            {"a": a, "b": b},
        ),
        (lambda m, x: m.other(x.movedim(1, -1), x.movedim(1, -1).relu()).movedim(-1, 1), {"other": other}),
        (lambda m, x: torch.einsum("bchw,bc->bchw", x, x.mean((2, 3))), {}),
        (lambda m, x: torch.cdist(x.flatten(2), x.flatten(2))[:, :, :, None], {}),
        (lambda m, x: F.cosine_similarity(x, x.mean((2, 3), keepdim=True), dim=1)[:, None] * x, {}),
        (lambda m, x: torch.outer(x.mean((1, 2, 3)), x.mean((0, 2, 3)))[:, :, None, None] + x, {}),
        (lambda m, x: x + torch.mv(m.w, x.mean((0, 2, 3)))[:, None, None], {"w": nn.Parameter(torch.empty(c, c))}),
        (lambda m, x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1), {}),
    )
    return Part(run, **parts)
