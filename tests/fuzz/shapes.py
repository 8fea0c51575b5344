"""Blocks that take tensors apart, put them together, reshape them and read sizes, in the ways real networks do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import Draw, Part, block


def _conv(i: int, o: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2)


# --- branches ---------------------------------------------------------------------------------------------------
@block("residual", plain=True, nesting=True)
def residual(d: Draw) -> nn.Module:
    body, (channels, height, width) = d.chain()
    join: Callable = d.pick(
        torch.add, torch.sub, torch.mul, torch.maximum, lambda x, y: x.clone().add_(y), lambda x, y: torch.relu(x + y)
    )
    if (channels, height, width) == (d.channels, d.height, d.width) and not d.flag():
        return Part(lambda m, x: join(x, m.body(x)), body=body)
    project = _conv(d.channels, channels)
    same = (height, width) == (d.height, d.width)
    resize = nn.Identity() if same else nn.AdaptiveAvgPool2d((height, width))
    return Part(lambda m, x: join(m.project(m.resize(x)), m.body(x)), body=body, project=project, resize=resize)


@block("dense", plain=True, nesting=True)
def dense(d: Draw) -> nn.Module:
    """Concatenates what went in with what came out."""
    body = d.fitting_chain()
    match d.pick(0, 1, 2, 3):
        case 1:
            return Part(lambda m, x: torch.cat([m.body(x), x, torch.relu(x)], 1), body=body)
        case 2:
            return Part(lambda m, x: torch.cat([x, m.body(x)], 2), body=body)
        case 3:
            return Part(lambda m, x: torch.cat([x.movedim(1, -1), m.body(x).movedim(1, -1)], -1).movedim(-1, 1), body=body)  # fmt: skip # noqa: E501
    return Part(lambda m, x: torch.cat([x, m.body(x)], 1), body=body)


@block("parallel", plain=True, nesting=True)
def parallel(d: Draw) -> nn.Module:
    half = len(d.children) // 2
    a, b = (nn.Sequential(_conv(d.channels, d.channels), d.fitting_chain(c)) for c in (d.children[:half], d.children[half:]))  # fmt: skip # noqa: E501
    join: Callable = d.pick(
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y], 1),
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: torch.stack([x, y], 1).flatten(1, 2),
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
        lambda x, y: torch.cat([y[:, :1], x, y[:, 1:]], 1),
    )
    return Part(lambda m, x: join(m.a(x), m.b(x)), a=a, b=b)


@block("selective", nesting=True)
def selective(d: Draw) -> nn.Module:
    """Branches weighted by a softmax over them."""
    half = len(d.children) // 2
    a, b = (nn.Sequential(_conv(d.channels, d.channels), d.fitting_chain(c)) for c in (d.children[:half], d.children[half:]))  # fmt: skip # noqa: E501
    gate = nn.Conv2d(d.channels, 2 * d.channels, 1)

    def gated(m: Part, x: Tensor) -> Tensor:
        s = torch.stack([m.a(x), m.b(x)], 1)
        z = m.gate(s.sum(1).mean((2, 3), keepdim=True))
        return (s * z.view(x.shape[0], 2, -1, 1, 1).softmax(1)).sum(1)

    run = d.pick(
        lambda m, x: (lambda s: (s * s.softmax(1)).sum(1))(torch.stack([m.a(x), m.b(x)], 1)),
        gated,
        lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0),
        lambda m, x: torch.stack([m.a(x), m.b(x)], -1).amax(-1),
    )
    return Part(run, a=a, b=b, gate=gate)


@block("twice", nesting=True)
def twice(d: Draw) -> nn.Module:
    """The same modules applied two times."""
    return Part(lambda m, x: m.body(torch.relu(m.body(x))), body=nn.Sequential(_conv(d.channels, d.channels), d.fitting_chain()))  # fmt: skip # noqa: E501


@block("scales", plain=True, nesting=True)
def scales(d: Draw) -> nn.Module | None:
    if min(d.height, d.width) < 4:
        return None
    size = (d.height, d.width)
    body = nn.Sequential(nn.MaxPool2d(2), _conv(d.channels, d.channels, 3), nn.ReLU())
    up: Callable = d.pick(
        lambda y: F.interpolate(y, size=size),
        lambda y: F.interpolate(y, size=size, mode="bilinear"),
        lambda y: F.interpolate(y, size=size, mode="bicubic", align_corners=True),
        lambda y: F.interpolate(y, size=size, mode="nearest-exact"),
        lambda y: F.interpolate(y, size=size, mode="area"),
    )
    join = d.pick(torch.add, lambda x, y: torch.cat([x, y], 1))
    return Part(lambda m, x: join(x, up(m.body(x))), body=body)


@block("side_output", nesting=True)
def side_output(d: Draw) -> nn.Module:
    """A branch of which only a few numbers come back."""
    body = d.fitting_chain()
    fc = nn.Linear(d.channels, d.channels)
    return Part(lambda m, x: x + m.fc(m.body(x).mean((2, 3)))[:, :, None, None], body=body, fc=fc)


# --- taken apart and put together -------------------------------------------------------------------------------
@block("split")
def split(d: Draw) -> nn.Module | None:
    c = d.channels
    pieces = d.divisor()
    if pieces is None:
        return None
    size = c // pieces
    sizes = [size] * pieces
    uneven = [c // 3 + 1, c - c // 3 - 1]
    apart: Callable = d.pick(
        lambda m, x: x.chunk(pieces, 1),
        lambda m, x: x.split(x.shape[1] // pieces, 1),
        lambda m, x: x.split(size, 1),
        lambda m, x: x.split(sizes, 1),
        lambda m, x: x.split(m.size, 1),
        lambda m, x: torch.unsafe_split(x, size, 1),
        lambda m, x: torch.unsafe_split_with_sizes(x, sizes, 1),
        lambda m, x: torch.split_with_sizes_copy(x, sizes, 1),
        lambda m, x: [x[:, i * (x.shape[1] // pieces) : (i + 1) * (x.shape[1] // pieces)] for i in range(pieces)],
        lambda m, x: [x[:, i * size : (i + 1) * size] for i in range(pieces)],
        lambda m, x: x.view(x.shape[0], pieces, -1, *x.shape[2:]).unbind(1),
        lambda m, x: x.view(x.shape[0], -1, pieces, *x.shape[2:]).unbind(2),
        lambda m, x: x.unflatten(1, (pieces, size)).unbind(1),
        lambda m, x: x.tensor_split(pieces, 1),
        lambda m, x: [x.narrow(1, i * size, size) for i in range(pieces)],
        lambda m, x: x.split(uneven, 1),
        lambda m, x: (x[:, : x.shape[1] // 3], x[:, x.shape[1] // 3 :]),
        lambda m, x: [x[:, i::pieces] for i in range(pieces)],
        lambda m, x: (x[:, :-2], x[:, -2:]),
    )
    with torch.no_grad():
        widths = [p.shape[1] for p in apart(Part(lambda m, x: x, size=size), d.example)]
    alike = len(set(widths)) == 1
    conv = _conv(widths[0], widths[0], 3)
    joins: list[Callable] = [
        lambda m, p: torch.cat([m.conv(p[0]), *p[1:]], 1),
        lambda m, p: torch.cat(list(p)[::-1], 1),
        lambda m, p: torch.cat([p[-1], torch.relu(p[0])], 1),
        lambda m, p: m.conv(p[0]),
        lambda m, p: torch.cat([m.conv(p[0]), *p], 1),
    ]
    if alike:
        joins += [
            lambda m, p: sum(p),
            lambda m, p: p[0] * torch.sigmoid(p[1]),
            lambda m, p: torch.cat([m.conv(p[0] + p[1]), p[0]], 1),
            lambda m, p: torch.stack(p, 2).flatten(1, 2),
            lambda m, p: torch.cat([m.conv(q) for q in p], 1),
        ]

        def res2(m: Part, p: tuple) -> Tensor:
            out = [p[0]]
            for piece in p[1:]:
                out.append(m.conv(piece + out[-1]))
            return torch.cat(out, 1)

        joins.append(res2)
    join = d.pick(*joins)
    return Part(lambda m, x: join(m, apart(m, x)), conv=conv, size=size)


@block("ghost")
def ghost(d: Draw) -> nn.Module:
    out = d.outputs()
    half = (out + 1) // 2
    primary, cheap = _conv(d.channels, half), nn.Conv2d(half, half, 3, padding=1, groups=half)
    return Part(
        lambda m, x: (lambda y: torch.cat([y, m.cheap(y)], 1)[:, : m.out])(torch.relu(m.primary(x))),
        primary=primary,
        cheap=cheap,
        out=out,
    )


@block("in_place")
def in_place(d: Draw) -> nn.Module | None:
    """Works on a view of a tensor that is used as a whole afterwards."""
    c = d.channels
    k = max(1, c // 2)
    conv = _conv(k, k, 3)

    def partial(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :k] = m.conv(x[:, :k])
        return y

    def from_shape(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        half = max(1, x.shape[1] // 2)
        y[:, :half] *= 0.5
        y[:, half:].add_(1.0)
        return y

    def shift(m: Part, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :k, 1:] = x[:, :k, :-1]
        y[:, k:, :-1] = x[:, k:, 1:]
        return y

    def by_chunk(m: Part, x: Tensor) -> Tensor:
        y = x * 1.0
        for half in y.detach().chunk(2, 1)[:1]:
            half.sigmoid_()
        return y

    def space(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 1:, :] += x[:, :, :-1, :]
        y[:, :, 0] = 0.3
        return y

    def over_views(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y.view(x.shape[0], -1).mul_(0.7)
        y.permute(0, 2, 3, 1).add_(m.g)
        return y

    def buffer(m: Part, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], x.shape[1] + 2, *x.shape[2:])
        y[:, : x.shape[1]] = x
        y[:, x.shape[1] :] = x.mean(1, keepdim=True)
        return y

    run = d.pick(partial, from_shape, shift, by_chunk, space, over_views, buffer)
    return Part(run, conv=conv, g=nn.Parameter(torch.empty(c)))


# --- channels moved ---------------------------------------------------------------------------------------------
@block("shuffle")
def shuffle(d: Draw) -> nn.Module | None:
    c, g = d.channels, d.divisor()
    if g is None:
        return None
    run = d.pick(
        lambda m, x: F.channel_shuffle(x, g),
        lambda m, x: x.view(x.shape[0], g, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]),
        lambda m, x: x.view(x.shape[0], g, x.shape[1] // g, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda m, x: x.reshape(x.shape[0], c // g, g, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        lambda m, x: x.unflatten(1, (g, -1)).flip(1).flatten(1, 2),
        lambda m, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
        lambda m, x: x.roll(1, 1),
        lambda m, x: x.flip(1),
        lambda m, x: x.index_select(1, m.order),
        lambda m, x: x.sort(1).values,
        lambda m, x: x.cumsum(1),
        lambda m, x: x.topk(2, 1).values,
        lambda m, x: torch.renorm(x, 2, 0, 1.0),
        lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
        lambda m, x: torch.cumprod(0.5 + torch.sigmoid(x), 1),
        lambda m, x: torch.tril(x.flatten(2)).view_as(x),
    )
    return Part(run, order=torch.randperm(c, generator=torch.Generator().manual_seed(c)))


@block("pixel")
def pixel(d: Draw) -> nn.Module | None:
    c = d.channels
    if d.flag():
        if d.height % 2 or d.width % 2:
            return None
        run = d.pick(
            lambda m, x: F.pixel_unshuffle(x, 2),
            lambda m, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
            lambda m, x: torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        )
        return Part(run)
    if c % 4:
        return None
    run = d.pick(
        lambda m, x: F.pixel_shuffle(x, 2),
        lambda m, x: x.view(x.shape[0], -1, 2, 2, *x.shape[2:]).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3),
        lambda m, x: x.view(x.shape[0], 2, 2, -1, *x.shape[2:]).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3),
        lambda m, x: x.view(x.shape[0], 2, 2, c // 4, *x.shape[2:]).sum((1, 2)),
    )
    return Part(run)


@block("pad")
def pad(d: Draw) -> nn.Module:
    c = d.channels
    before, after = d.pick((2, 3), (0, 4), (1, 0))
    wide = _conv(c, c + before + after, 3)
    run = d.pick(
        lambda m, x: m.conv(x) + F.pad(x, (0, 0, 0, 0, before, after)),
        lambda m, x: F.pad(x, (0, 0, 0, 0, before, after)),
        lambda m, x: F.pad(x, (0, 0, 0, 0, before, after), value=0.5),
        lambda m, x: torch.cat([x, torch.zeros(x.shape[0], after + 1, *x.shape[2:], dtype=x.dtype)], 1),
        lambda m, x: torch.cat([x.new_ones(x.shape[0], after + 1, *x.shape[2:]), x], 1),
        lambda m, x: torch.cat([x, m.grid.expand(x.shape[0], -1, -1, -1)], 1),
        lambda m, x: F.pad(m.conv(x), (0, 0, 0, 0, -before, -after)),
    )
    rows = torch.linspace(-1, 1, d.height)[:, None].expand(d.height, d.width)
    return Part(run, conv=wide, grid=torch.stack([rows, rows.flip(0)])[None])


@block("repeat")
def repeat(d: Draw) -> nn.Module:
    return Part(
        d.pick(
            lambda m, x: x.repeat(1, 2, 1, 1),
            lambda m, x: x.repeat_interleave(2, 1),
            lambda m, x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
            lambda m, x: x.amax(1, keepdim=True).repeat(1, 4, 1, 1),
            lambda m, x: x.mean(1, keepdim=True).expand_as(x) + x,
            lambda m, x: x[:, None].expand(-1, 3, -1, -1, -1).sum(1),
            lambda m, x: x[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2),
            lambda m, x: x.tile(1, 2, 1, 1),
        )
    )


# --- space ------------------------------------------------------------------------------------------------------
@block("space", plain=True)
def space(d: Draw) -> nn.Module | None:
    h, w = d.height, d.width
    if min(h, w) < 4:
        return None
    run = d.pick(
        lambda m, x: F.max_pool2d(x, 2),
        lambda m, x: F.avg_pool2d(x, 3, 2, 1),
        lambda m, x: F.adaptive_avg_pool2d(x, (4, 3)),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).expand_as(x) * x,
        lambda m, x: F.adaptive_max_pool2d(x, 3),
        lambda m, x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2),
        lambda m, x: F.pad(x, (1, 2, 0, 1)),
        lambda m, x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
        lambda m, x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
        lambda m, x: x[:, :, 1:-1, 1:],
        lambda m, x: x - x.mean((2, 3), keepdim=True),
        lambda m, x: x / (1 + x.abs().amax((2, 3), keepdim=True)) + x.amin((2, 3), keepdim=True),
        lambda m, x: x.max(3, keepdim=True).values + x - x.min(2, keepdim=True).values,
        lambda m, x: x / (1 + x.var((2, 3), keepdim=True)).sqrt(),
        lambda m, x: x * torch.softmax(x.flatten(2), -1).view_as(x),
        lambda m, x: x[:, :, : h // 2] + x[:, :, -(h // 2) :],
        lambda m, x: x.narrow(2, 1, 3),
        lambda m, x: x[:, :, ::2, 1::2],
        lambda m, x: x + x[:, :, 3:4] + x.select(3, 2).unsqueeze(3),
        lambda m, x: torch.stack(x.unbind(3)[::-1], 3),
        lambda m, x: x.index_select(2, torch.tensor([0, 3, 1, 1])),
        lambda m, x: x[:, :, [3, 2, 0]],
        lambda m, x: x.roll(1, 2) + x.flip(3),
        lambda m, x: x.cumsum(2),
        lambda m, x: x.repeat(1, 1, 2, 1),
        lambda m, x: F.interpolate(x, scale_factor=2),
        lambda m, x: F.interpolate(x, size=(5, 7), mode="bilinear", antialias=True),
        lambda m, x: F.interpolate(x, size=(5, 7), mode="bicubic", antialias=True),
        lambda m, x: F.interpolate(x.flatten(2), size=12, mode="linear").unflatten(2, (3, 4)),
        lambda m, x: F.avg_pool1d(x.flatten(2), 3).unsqueeze(2),
        lambda m, x: F.adaptive_avg_pool1d(x.flatten(2), 12).unflatten(2, (4, 3)),
        lambda m, x: F.adaptive_max_pool1d(x.flatten(2), 12).unflatten(2, (4, 3)),
        lambda m, x: F.max_pool1d(x.flatten(2), 2).unsqueeze(3),
        lambda m, x: F.max_pool3d(x[:, :, None], (1, 2, 2)).squeeze(2),
        lambda m, x: F.avg_pool3d(x[:, :, None], (1, 2, 2)).squeeze(),
        lambda m, x: F.adaptive_avg_pool3d(x[:, :, None], (1, 3, 3)).squeeze(2),
        lambda m, x: F.adaptive_max_pool3d(x[:, :, None], (1, 3, 3)).squeeze(2),
        lambda m, x: F.interpolate(x[:, :, None], size=(1, 4, 4), mode="trilinear").squeeze(2),
        lambda m, x: F.interpolate(x[:, :, None], size=(1, 4, 4)).squeeze(2),
        lambda m, x: F.interpolate(x.flatten(2), size=12).unflatten(2, (3, 4)),
        lambda m, x: F.pad(x.flatten(2), (1, 2), mode="reflect").unsqueeze(3),
        lambda m, x: F.pad(x.flatten(2), (1, 2), mode="replicate").unsqueeze(3),
        lambda m, x: F.pad(x[:, :, None], (1, 1, 1, 1, 0, 0), mode="reflect").squeeze(2),
        lambda m, x: F.pad(x[:, :, None], (1, 1, 1, 1, 0, 0), mode="replicate").squeeze(2),
        lambda m, x: F.grid_sample(x, m.grid.expand(x.shape[0], -1, -1, -1), align_corners=False),
        lambda m, x: (lambda s: x / (1 + s[0].square() + s[1].square()))(torch.std_mean(x, (2, 3), keepdim=True)),
        lambda m, x: x * x.std(3, keepdim=True) + torch.logsumexp(x, 2, keepdim=True) + x.norm(dim=3, keepdim=True),
        lambda m, x: torch.log_softmax(x, 3) + x.prod(2, keepdim=True) * (x > 0).any(3, keepdim=True),
        lambda m, x: x * (x > -1).all(3, keepdim=True) + x.sum(2, keepdim=True),
        lambda m, x: x.unfold(2, 3, 1).mean(-1),
        lambda m, x: x.index_put((torch.tensor([0]),), torch.zeros((), dtype=x.dtype)),
        lambda m, x: torch.cat([x[:, :, [0, 2]], x[:, :, 1:]], 2),
    )
    return Part(run, grid=torch.rand(1, 4, 3, 2, generator=torch.Generator().manual_seed(h * w)) * 2 - 1)


# --- reshapes ---------------------------------------------------------------------------------------------------
@block("views")
def views(d: Draw) -> nn.Module | None:
    c, h, w = d.channels, d.height, d.width
    n = h * w
    g = d.divisor() or 1
    windows = h % 2 == 0 and w % 2 == 0
    conv = nn.Conv2d(c // g, c // g, 3, padding=1)
    runs: list[Callable] = [
        lambda m, x: x.flatten(2).view(x.shape[0], x.shape[1], h, w),
        lambda m, x: x.flatten(2).view(-1, c, h, w),
        lambda m, x: x.view(x.shape[0], c, n).view(x.shape[0], c, h, w),
        lambda m, x: x.reshape(-1, m.c, h, w) * 2,
        lambda m, x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], h, w, -1).permute(0, 3, 1, 2),
        lambda m, x: x.reshape(-1, 1, h, w).mul(2).reshape(x.shape[0], -1, h, w),
        lambda m, x: x.view(x.shape[0] * g, -1, h, w).relu().view(x.shape[0], -1, h, w),
        lambda m, x: m.conv(x.view(x.shape[0] * g, x.shape[1] // g, h, w)).view(x.shape[0], -1, h, w),
        lambda m, x: m.conv(x.reshape(x.shape[0] * g, c // g, h, w)).reshape(x.shape),
        lambda m, x: x.view(x.shape[0], g, -1, h, w).mean(1),
        lambda m, x: x.view(x.shape[0], g, -1, h, w).sum(2),
        lambda m, x: x.view(x.shape[0], -1, g, h, w).amax(2),
        lambda m, x: (lambda y: (y * y.softmax(1)).view_as(x))(x.view(x.shape[0], g, -1, h, w)),
        lambda m, x: x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, x.shape[1]).transpose(1, 2).view_as(x),
        lambda m, x: x.permute(2, 3, 0, 1).flatten(0, 1).permute(1, 2, 0).unflatten(2, (h, w)),
        lambda m, x: x.flatten(1).unflatten(1, (-1, h, w)),
        lambda m, x: x.flatten(1).view(x.shape[0], x.shape[1], *x.shape[2:]),
        lambda m, x: x.transpose(1, 2).transpose(1, 3).permute(0, 2, 3, 1).transpose(2, 3).transpose(1, 2),
        lambda m, x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(),
        lambda m, x: x.swapaxes(1, 3).swapaxes(3, 1).as_strided(x.shape, x.stride()),
    ]  # fmt: skip
    if windows:

        def partition(m: Part, x: Tensor) -> Tensor:
            y = x.view(x.shape[0], -1, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).flatten(0, 2)
            y = y * torch.softmax(y.mean(-1), 1)[..., None]
            return y.view(-1, 2, 2, h // 2, w // 2, y.shape[-1]).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

        def merging(m: Part, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            y = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
            return m.fc(m.norm(y)).permute(0, 3, 1, 2)

        runs += [
            lambda m, x: x.view(-1, c, 2, h // 2, w).transpose(1, 2).flatten(0, 1).unflatten(0, (-1, 2)).amax(1),
            lambda m, x: x.view(len(x), -1, 2, h // 2, w).transpose(1, 2).flatten(0, 1).unflatten(0, (-1, 2)).amax(1),
            partition,
            merging,
        ]  # fmt: skip # noqa: E501
    run = d.pick(*runs)
    return Part(run, conv=conv, c=c, norm=nn.LayerNorm(4 * c), fc=nn.Linear(4 * c, 2 * c))
