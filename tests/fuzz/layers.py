"""Blocks with weights of their own, normalisation, and everything that works position by position."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import Draw, Part, block

# --- convolutions and linear layers -----------------------------------------------------------------------------


def _finish(d: Draw, channels: int, x: nn.Module) -> nn.Module:
    """What often stands behind a convolution."""
    match d.pick(0, 1, 2, 3):
        case 1:
            return nn.Sequential(x, nn.BatchNorm2d(channels), nn.ReLU())
        case 2:
            return nn.Sequential(x, nn.ReLU())
        case 3:
            return nn.Sequential(x, nn.SiLU())
    return x


@block("conv", plain=True)
def conv(d: Draw) -> nn.Module:
    out = d.outputs()
    kernel, dilation = d.pick((3, 1), (1, 1), (3, 2), ((1, 3), 1))
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(dilation * (k // 2) for k in sides)
    stride = d.pick(1, 1, 2) if min(d.height, d.width) > 3 else 1
    mode = d.pick("zeros", "zeros", "reflect", "circular") if max(padding) < min(d.height, d.width) else "zeros"
    made = nn.Conv2d(
        d.channels, out, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=not d.flag()
    )
    return _finish(d, out, made)


@block("grouped", plain=True)
def grouped(d: Draw) -> nn.Module | None:
    groups = d.divisor()
    if groups is None:
        return None
    out = groups * d.pick(d.channels // groups, 1, 2, 3)
    return _finish(d, out, nn.Conv2d(d.channels, out, 3, padding=1, groups=groups, bias=not d.flag()))


@block("depthwise", plain=True)
def depthwise(d: Draw) -> nn.Module:
    out = d.channels * d.pick(1, 2)
    return _finish(d, out, nn.Conv2d(d.channels, out, 3, padding=1, groups=d.channels))


@block("transposed", plain=True)
def transposed(d: Draw) -> nn.Module | None:
    stride = d.pick(1, 2) if max(d.height, d.width) < 9 else 1
    groups = d.divisor(least=1)
    out = groups * d.pick(d.channels // groups, 1, 2, 3)
    made = nn.ConvTranspose2d(d.channels, out, 2 + stride, stride=stride, padding=1, groups=groups, bias=not d.flag())
    return _finish(d, out, made)


@block("conv1d", plain=True)
def conv1d(d: Draw) -> nn.Module:
    height, width = d.height, d.width
    made = nn.Conv1d(d.channels, d.outputs(), 3, padding=1)
    return Part(lambda m, x: m.conv(x.flatten(2)).unflatten(2, (height, width)), conv=made)


@block("conv3d", plain=True)
def conv3d(d: Draw) -> nn.Module:
    out = d.outputs()
    if d.flag():  # the channels' neighbourhood as depth: no channel dim is left
        made = nn.Conv3d(1, 1, 3, padding=1)
        return Part(lambda m, x: m.conv(x[:, None])[:, 0], conv=made)
    made = nn.Sequential(nn.Conv3d(d.channels, out, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(out))
    return Part(lambda m, x: m.conv(x.unsqueeze(2)).squeeze(2), conv=made)


@block("linear", plain=True)
def linear(d: Draw) -> nn.Module:
    out = d.outputs()
    height, width = d.height, d.width
    match d.pick(0, 1, 2, 3):
        case 1:  # back to an image, as a generator does
            rows = nn.Linear(d.channels, out * height * width)
            return Part(lambda m, x: m.fc(x.mean((2, 3))).view(x.shape[0], -1, height, width), fc=rows)
        case 2:
            rows = nn.Linear(d.channels * height * width, out)
            return Part(lambda m, x: torch.relu(m.fc(x.flatten(1)))[:, :, None, None].expand(-1, -1, 3, 2), fc=rows)
        case 3:
            rows = nn.Linear(d.channels, out)
            return Part(lambda m, x: m.fc(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width)), fc=rows)  # fmt: skip # noqa: E501
    return Part(lambda m, x: m.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), fc=nn.Linear(d.channels, out))


@block("mixer")
def mixer(d: Draw) -> nn.Module:
    """Over the positions of the image instead of its channels."""
    tokens = d.height * d.width
    mix = nn.Sequential(nn.Linear(tokens, 7), nn.GELU(), nn.Linear(7, tokens))
    return Part(lambda m, x: x + m.mix(x.flatten(2)).view_as(x), mix=mix)


@block("product")
def product(d: Draw) -> nn.Module:
    """Weights that are no module's."""
    c, out = d.channels, d.outputs()
    w, b = nn.Parameter(torch.empty(out, c)), nn.Parameter(torch.empty(out))
    run: Callable = d.pick(
        lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w),
        lambda m, x: torch.einsum("bchw,oc->bhwo", x, m.w).movedim(-1, 1) + m.b.view(1, -1, 1, 1),
        lambda m, x: (m.w @ x.flatten(2)).view(x.shape[0], -1, *x.shape[2:]),
        lambda m, x: (x.permute(0, 2, 3, 1) @ m.w.t() + m.b).permute(0, 3, 1, 2),
        lambda m, x: torch.baddbmm(
            m.b[None, :, None], m.w.expand(x.shape[0], -1, -1), x.flatten(2)
        ).unflatten(2, x.shape[2:]),
        lambda m, x: torch.addmm(m.b, x.permute(0, 2, 3, 1).flatten(0, 2), m.w.t())
        .view(x.shape[0], x.shape[2], x.shape[3], -1)
        .permute(0, 3, 1, 2),
        lambda m, x: torch.tensordot(x, m.w, dims=([1], [1])).permute(0, 3, 1, 2),
        lambda m, x: (m.w.flatten(1) @ F.unfold(x, 1)).unflatten(2, x.shape[2:]),
    )  # fmt: skip
    return Part(run, w=w, b=b)


# --- weights that are computed ----------------------------------------------------------------------------------
@block("weight")
def weight(d: Draw) -> nn.Module:
    """A convolution whose weight is computed from parameters."""
    c, out = d.channels, d.outputs()
    w = nn.Parameter(torch.empty(out, c, 3, 3))
    half = nn.Parameter(torch.empty(out // 2, c, 1, 1))
    rest = nn.Parameter(torch.empty(out - out // 2, c, 1, 1))
    narrow = nn.Parameter(torch.empty(out, c, 1, 1))
    gain = nn.Parameter(torch.empty(out))

    def standardised(m: Part, x: Tensor) -> Tensor:
        mean, var = m.w.mean((1, 2, 3), keepdim=True), m.w.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (m.w - mean) / (var + 1e-3).sqrt(), padding=1)

    def standardised_by_batch_norm(m: Part, x: Tensor) -> Tensor:
        w = F.batch_norm(m.w.reshape(1, m.w.shape[0], -1), None, None, weight=m.gain, training=True).reshape_as(m.w)
        return F.conv2d(x, w, padding=1)

    def mixed(m: Part, x: Tensor) -> Tensor:
        """Weights of every example's own, as in CondConv."""
        a = torch.softmax(m.choose(x.mean((2, 3))), 1)
        w = (a @ m.bank.flatten(1)).view(-1, m.bank.shape[2], 3, 3)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w, padding=1, groups=x.shape[0])
        return y.view(x.shape[0], -1, *x.shape[2:])

    run, parts = d.pick(
        (lambda m, x: F.conv2d(x, m.w * m.gain.view(-1, 1, 1, 1), padding=1), {"w": w, "gain": gain}),
        (standardised, {"w": w}),
        (standardised_by_batch_norm, {"w": w, "gain": gain}),
        (lambda m, x: F.conv2d(x, torch.cat([m.a, m.b])), {"a": half, "b": rest}),
        (lambda m, x: F.conv2d(x, m.w + F.pad(m.k, (1, 1, 1, 1)), padding=1), {"w": w, "k": narrow}),
        (lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w, padding=1).relu(), m.w, padding=1), {"w": w}),
        (lambda m, x: F.conv2d(F.conv2d(x, m.k).relu(), m.k.transpose(0, 1)), {"k": narrow}),
        (lambda m, x: F.conv2d(x, F.normalize(m.w, dim=(1, 2, 3)), padding=1), {"w": w}),
        (lambda m, x: F.conv2d(x, torch.tanh(m.w), padding=1), {"w": w}),
        (mixed, {"bank": nn.Parameter(torch.empty(3, out, c, 3, 3)), "choose": nn.Linear(c, 3)}),
        (lambda m, x: F.conv2d(x, m.w * m.mask, padding=1), {"w": w, "mask": torch.ones(1, 1, 3, 3)}),
        (lambda m, x: F.conv2d(x, m.w.sum((2, 3), keepdim=True)), {"w": w}),
        (lambda m, x: F.conv2d(x, m.w.permute(0, 1, 3, 2).flip(2), padding=1), {"w": w}),
    )
    return Part(run, **parts)


@block("parametrized")
def parametrized(d: Draw) -> nn.Module:
    made = nn.Conv2d(d.channels, d.outputs(), 3, padding=1)
    norms = nn.utils.parametrizations
    return d.pick(norms.weight_norm, norms.spectral_norm)(made)


# --- shared -----------------------------------------------------------------------------------------------------
@block("shared")
def shared(d: Draw) -> nn.Module:
    c = d.channels
    same = nn.Conv2d(c, c, 3, padding=1)
    other = nn.Conv2d(c, c, 3, padding=1)
    norm = nn.BatchNorm2d(c)
    match d.pick(0, 1, 2, 3):
        case 1:
            return Part(lambda m, x: torch.relu(m.norm(m.b(torch.relu(m.norm(m.a(x)))))), a=same, b=other, norm=norm)
        case 2:
            other.weight = same.weight
            return Part(lambda m, x: m.b(torch.relu(m.a(x))), a=same, b=other)
        case 3:
            up, down = nn.Linear(c, 9), nn.Linear(9, c)
            down.weight = nn.Parameter(up.weight.t())
            return Part(
                lambda m, x: F.linear(torch.relu(m.up(x.movedim(1, -1))), m.up.weight.t(), m.down.bias).movedim(-1, 1),
                up=up,
                down=down,
            )
    return Part(lambda m, x: m.a(torch.relu(m.a(x))), a=same)


# --- normalisation ----------------------------------------------------------------------------------------------
def _groups(d: Draw) -> int:
    return d.divisor(least=1)


@block("batch_norm", plain=True)
def batch_norm(d: Draw) -> nn.Module:
    return nn.BatchNorm2d(d.channels, affine=not d.flag(), track_running_stats=not d.pick(False, False, True))


@block("norm")
def norm(d: Draw) -> nn.Module:
    c, height, width = d.channels, d.height, d.width
    last = nn.LayerNorm(c)
    gain = nn.Parameter(torch.empty(c))
    match d.pick(*range(11)):
        case 0:
            return nn.GroupNorm(_groups(d), c)
        case 1:
            return Part(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=last)
        case 2:
            return nn.InstanceNorm2d(c, affine=d.flag(), track_running_stats=d.flag())
        case 3:
            return nn.LayerNorm([c, height, width])
        case 4:
            return Part(lambda m, x: F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1))
        case 5:  # root mean square
            return Part(lambda m, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.1) * m.g[:, None, None], g=gain)  # fmt: skip # noqa: E501
        case 6:
            return Part(lambda m, x: F.normalize(x, dim=1))
        case 7:  # global response

            def respond(m: Part, x: Tensor) -> Tensor:
                size = x.norm(dim=(2, 3), keepdim=True)
                return x * size / (size.mean(1, keepdim=True) + 0.1) * m.g.view(1, -1, 1, 1) + x

            return Part(respond, g=gain)
        case 8:
            return nn.LocalResponseNorm(3)
        case 9:  # by hand, channels first
            return Part(
                lambda m, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 0.1).sqrt()
            )
    groups = _groups(d)  # by hand, with the number of groups given

    def by_groups(m: Part, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], groups, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, unbiased=False) + 0.1).sqrt()
        return y.view_as(x)

    return Part(by_groups)


# --- position by position ---------------------------------------------------------------------------------------
MODULES: list[Callable[[], nn.Module]] = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.CELU,
    nn.SELU, nn.LeakyReLU, nn.PReLU, nn.Sigmoid, nn.Tanh, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanhshrink,
    nn.Hardtanh, lambda: nn.Threshold(0.1, 0.2), nn.LogSigmoid, nn.Dropout, nn.Dropout2d, nn.AlphaDropout,
    nn.Identity, nn.RReLU, nn.Softshrink, nn.Hardshrink, lambda: nn.GELU(approximate="tanh"),
]  # fmt: skip
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    torch.abs, torch.neg, torch.sin, torch.cos, torch.atan, torch.sinh, torch.erf, torch.erfc, torch.square,
    torch.sgn, torch.sign, torch.ceil, torch.floor, torch.round, torch.trunc, torch.frac, torch.nan_to_num,
    lambda x: torch.exp(x.clamp(max=2)), lambda x: torch.exp2(x.clamp(max=2)), lambda x: torch.expm1(x.clamp(max=2)),
    lambda x: torch.log(1 + x.abs()), lambda x: torch.log2(1 + x.abs()), lambda x: torch.log10(1 + x.abs()),
    lambda x: torch.log1p(x.abs()), lambda x: torch.sqrt(1 + x.abs()), lambda x: torch.rsqrt(1 + x.abs()),
    lambda x: torch.tan(0.5 * torch.tanh(x)), lambda x: torch.asin(0.9 * torch.tanh(x)),
    lambda x: torch.acos(0.9 * torch.tanh(x)), lambda x: torch.cosh(x.clamp(-2, 2)), lambda x: torch.logit(x, 0.1),
    lambda x: 1 / (1 + x.abs()), lambda x: torch.reciprocal(1.5 + torch.tanh(x)), lambda x: 2 - x / 3,
    lambda x: x.abs() ** 1.5 + 1, lambda x: torch.pow(1.3, x.clamp(max=3)), lambda x: torch.rsub(x, 1),
    lambda x: x.clamp(-1, 1), lambda x: x.clamp_min(-0.3), lambda x: x.clamp_max(0.3), lambda x: x + x.detach() // 0.37,
    lambda x: torch.remainder(x, 0.7), lambda x: torch.fmod(x, 0.7),
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.masked_fill(x < 0, -0.5),
    lambda x: x * (x >= 0) + 0.1 * x * (x <= 0.2), lambda x: x * (x != 0) - 0.3 * (x == 0),
    lambda x: x * ((x > -1) & (x < 1)), lambda x: torch.logical_and(x > 0, x < 1) + x,
    lambda x: torch.logical_or(x > 1, x < 0) * x, lambda x: torch.logical_not(x > 0) * x,
    lambda x: torch.logical_xor(x > 0, x > 1) + x, lambda x: ((x > 0) | (x < -1)) * x,
    lambda x: ((x > 0) ^ (x > 1)) * x,
    lambda x: ~(x > 0) * x, lambda x: x.masked_fill(torch.isnan(x) | torch.isinf(x) | ~torch.isfinite(x), 0.0),
    lambda x: x.clone().mul_(2).add_(0.5).relu_(),
    lambda x: x.contiguous(memory_format=torch.channels_last).sigmoid(),
    lambda x: x.to(torch.float32).to(torch.float64), lambda x: x.detach() + x, lambda x: x * math.pi,
    lambda x: x + torch.zeros_like(x) + 0.3 * torch.ones_like(x), lambda x: x * torch.full_like(x, 0.7),
    lambda x: x + torch.full(x.shape, 0.3, dtype=x.dtype), lambda x: x + torch.zeros(x.shape[1], 1, 1, dtype=x.dtype),
    lambda x: x + x.new_ones(x.shape), lambda x: x - x.new_full((1, x.shape[1], 1, 1), 0.2),
    lambda x: x + torch.empty_like(x).fill_(0.2), lambda x: x * x.new_zeros(x.shape).add_(0.5),
    lambda x: torch.empty_like(x).copy_(x), lambda x: x.clone().zero_() + x, lambda x: x * x.new_tensor(0.3),
    lambda x: x + torch.ones(x.shape, dtype=x.dtype) * torch.zeros(1, dtype=x.dtype),
    lambda x: x + x.new_empty(x.shape).fill_(0.1), lambda x: x + torch.empty(x.shape, dtype=x.dtype).fill_(0.1),
    # Random factories, times zero.
    lambda x: x + 0 * torch.rand_like(x), lambda x: x + 0 * torch.randn_like(x), lambda x: x * x.new_empty(()).fill_(2),
    lambda x: x + 0 * torch.rand(x.shape, dtype=x.dtype), lambda x: x + 0 * torch.randn(x.shape, dtype=x.dtype),
    lambda x: x + 0 * torch.empty_like(x).normal_(), lambda x: x + 0 * torch.empty_like(x).uniform_(),
    lambda x: x + 0 * torch.empty_like(x).exponential_(), lambda x: x + 0 * torch.bernoulli(torch.sigmoid(x)),
    lambda x: x + 0 * torch.randint(5, x.shape[2:]), lambda x: x + 0 * torch.randperm(x.shape[3]),
    lambda x: F.dropout(x, 0.0, training=True), lambda x: x + torch.randint(3, x.shape) * 0,
    # Tensors in which the position matters, along the width.
    lambda x: x * torch.linspace(0.5, 1, x.shape[3], dtype=x.dtype), lambda x: x @ torch.eye(x.shape[3], dtype=x.dtype),
    lambda x: x * torch.logspace(-1, 0, x.shape[3], dtype=x.dtype), lambda x: x + torch.arange(x.shape[3]) * 0.1,
    lambda x: x + torch.tril_indices(x.shape[3], x.shape[3])[0, : x.shape[3]] * 0.1,
    lambda x: x + torch.triu_indices(x.shape[3], x.shape[3])[1, : x.shape[3]] * 0.1,
    lambda x: x + torch.empty_strided(x.shape, x.contiguous().stride(), dtype=x.dtype).zero_(),
    lambda x: x + x.new_empty_strided(x.shape, x.contiguous().stride()).fill_(0.1),
]  # fmt: skip
PAIRS: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.add, torch.sub, torch.mul,
    lambda x, y: x / (1 + y.abs()), lambda x, y: torch.atan2(x, 1 + y.abs()), lambda x, y: torch.hypot(x, y),
    lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: torch.lerp(x, y, torch.sigmoid(y)),
    lambda x, y: torch.addcmul(x, x, y, value=0.3), lambda x, y: torch.addcdiv(x, y, 1 + y.abs()),
    lambda x, y: torch.where(y > 0, x, y), lambda x, y: x.clone().copy_(y) + x,
    lambda x, y: torch.xlogy(x.abs(), 1 + y.abs()),
    lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: x.clone().add_(y).mul_(y.sigmoid()),
    lambda x, y: x.masked_fill(y < 0, 0.1), lambda x, y: torch.logaddexp(x, y),
]  # fmt: skip


@block("act", plain=True)
def act(d: Draw) -> nn.Module:
    return nn.Sequential(d.pick(*MODULES)(), d.pick(*MODULES)())


@block("function", plain=True)
def function(d: Draw) -> nn.Module:
    a, b = d.pick(*FUNCTIONS), d.pick(*FUNCTIONS)
    return Part(lambda m, x: b(a(x)))


@block("pair", plain=True)
def pair(d: Draw) -> nn.Module:
    """Two tensors of one shape: the input, and a convolution of it."""
    a, b = d.pick(*PAIRS), d.pick(*PAIRS)
    return Part(lambda m, x: b(a(x, m.conv(x)), x), conv=nn.Conv2d(d.channels, d.channels, 1))


@block("per_channel", plain=True)
def per_channel(d: Draw) -> nn.Module:
    c, height, width = d.channels, d.height, d.width
    one = nn.Parameter(torch.empty(c))
    return d.pick(
        lambda: nn.PReLU(c),
        lambda: Part(lambda m, x: x + m.g.view(1, -1, 1, 1) * torch.relu(x), g=one),
        lambda: Part(lambda m, x: x * m.g[:, None, None] + m.s, g=one, s=nn.Parameter(torch.empty(1, c, 1, 1))),
        lambda: Part(lambda m, x: x * m.table.view(1, -1, 1, 1), table=torch.ones(c)),
        lambda: Part(lambda m, x: x + m.place, place=nn.Parameter(torch.empty(1, c, height, width))),
        lambda: Part(lambda m, x: x + m.place, place=torch.ones(1, 1, height, width)),
        lambda: Part(lambda m, x: x * m.g.reshape(1, c, 1, 1), g=one),
        lambda: Part(lambda m, x: (x.movedim(1, -1) * m.g).movedim(-1, 1), g=one),
        lambda: Part(
            lambda m, x: x + m.table(torch.arange(height * width)).t().unflatten(1, (height, width)),
            table=nn.Embedding(height * width, c),
        ),
        lambda: Part(lambda m, x: x * m.g[None, :, None, None].expand_as(x), g=one),
        lambda: Part(lambda m, x: x * torch.exp(m.s), s=nn.Parameter(torch.empty(()))),
    )()
