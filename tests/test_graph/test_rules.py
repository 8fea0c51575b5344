"""One small network per operator rule: what is prunable, and that compacted equals masked."""

import copy
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from reference.masked import kept_positions, with_zeroed_readers
from reference.randomise import random_keep, randomise, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from stamp_fast import CompactionError, trace
from stamp_fast.graph._verify import masked_output


class Net(nn.Module):
    """`forward(net, *inputs)` over the given modules, parameters and buffers."""

    def __init__(self, forward: Callable, parts: dict) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


@dataclass
class Case:
    """A network, what of it is prunable (removable units by group), and what masks its readers by hand.

    zeroed: raw parameters that read channels, by the dim they read along.
    by_hand: removal written out, for readers without a weight: (net, stays, *inputs) -> output, where
        stays[name][d] says which positions of a parameter's dim d stay.
    """

    name: str
    forward: Callable
    prunable: dict[str, int]
    parts: dict
    shapes: list[tuple[int, ...]]
    zeroed: dict[str, int] = field(default_factory=dict)
    by_hand: Callable | None = None


CASES: list[Case] = []


def case(name: str, shape, forward, prunable, zeroed=None, by_hand=None, **parts) -> None:
    shapes = [shape] if isinstance(shape[0], int) else shape
    CASES.append(Case(name, forward, prunable, parts, shapes, zeroed or {}, by_hand))


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=options.pop("padding", k // 2), **options)


def pooled(m: Net, x: Tensor) -> Tensor:
    return m.head(x.mean((2, 3)))


IMAGE = (2, 3, 8, 8)


def two(o: int = 8, i: int = 8, **second) -> dict:
    """conv a (3 -> i), something in between, conv b (i -> o) and a head."""
    return {"a": conv(3, i), "b": conv(i, o, **second), "head": nn.Linear(o, 5)}


def simple(middle: Callable) -> Callable:
    """a, then `middle`, then b, then the head."""
    return lambda m, x: pooled(m, torch.relu(m.b(middle(m, m.a(x)))))


# --- convolution ---
BOTH = {"a": 8, "b": 8}
for options in (
    {},
    {"stride": 2},
    {"dilation": 2, "padding": 2},
    {"bias": False},
    {"padding_mode": "reflect"},
):
    name = "conv-" + "-".join(f"{k}{v}" for k, v in options.items())
    case(name, IMAGE, simple(lambda m, x: torch.relu(x)), BOTH, **two(**options))
case(
    "conv1d",
    (2, 3, 9),
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x)))).mean(2)),
    BOTH,
    a=nn.Conv1d(3, 8, 3),
    b=nn.Conv1d(8, 8, 3, padding=1),
    head=nn.Linear(8, 5),
)
case(
    "conv3d",
    (2, 3, 5, 5, 5),
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x)))).mean((2, 3, 4))),
    BOTH,
    a=nn.Conv3d(3, 8, 3),
    b=nn.Conv3d(8, 8, 3, padding=1),
    head=nn.Linear(8, 5),
)
# Whichever leaves more to choose from: equal positions in every group, or whole groups.
case(
    "conv-grouped-same-position",
    IMAGE,
    simple(lambda m, x: torch.relu(x)),
    {"a": 6, "b": 6},
    **two(i=12, o=12, groups=2),
)
case(
    "conv-grouped-whole-group",
    IMAGE,
    simple(lambda m, x: torch.relu(x)),
    {"a": 6},
    **two(i=12, o=12, groups=6),
)
case(
    "conv-depthwise",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.bn(m.d(torch.relu(m.a(x)))))))),
    BOTH,
    a=conv(3, 8),
    d=conv(8, 8, groups=8),
    bn=nn.BatchNorm2d(8),
    b=conv(8, 8, 1),
    head=nn.Linear(8, 5),
)
case(
    "conv-depthwise-multiplier",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.d(torch.relu(m.a(x))))))),
    BOTH,
    a=conv(3, 8),
    d=conv(8, 24, groups=8),
    b=conv(24, 8, 1),
    head=nn.Linear(8, 5),
)
case(
    "conv-transposed",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.a(x))))),
    BOTH,
    a=conv(3, 8),
    b=nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
    head=nn.Linear(8, 5),
)
case(
    "conv-transposed-grouped-same-position",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.a(x))))),
    {"a": 6, "b": 6},
    a=conv(3, 12),
    b=nn.ConvTranspose2d(12, 12, 4, stride=2, groups=2),
    head=nn.Linear(12, 5),
)
case(
    "conv-transposed-grouped-whole-group",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.a(x))))),
    {"a": 6},
    a=conv(3, 12),
    b=nn.ConvTranspose2d(12, 12, 4, stride=2, groups=6),
    head=nn.Linear(12, 5),
)
case(
    "conv-transposed-depthwise",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.relu(m.d(torch.relu(m.a(x))))))),
    BOTH,
    a=conv(3, 8),
    d=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8),
    b=conv(8, 8, 1),
    head=nn.Linear(8, 5),
)
case(
    "conv-weight-standardised-over-output",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(F.conv2d(torch.relu(m.a(x)), m.w / (1 + m.g[:, None, None, None])))),
    {"a": 8, "w": 8},
    zeroed={"w": 1},
    a=conv(3, 8),
    w=nn.Parameter(torch.empty(8, 8, 3, 3)),
    g=nn.Parameter(torch.empty(8)),
    head=nn.Linear(8, 5),
)

# --- linear and matrix products ---
FLAT = (4, 6)
case(
    "linear",
    FLAT,
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x))))),
    {"a": 8, "b": 10},
    a=nn.Linear(6, 8),
    b=nn.Linear(8, 10, bias=False),
    head=nn.Linear(10, 5),
)
case(
    "linear-on-sequence",
    (2, 7, 6),
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x))))),
    {"a": 8, "b": 10},
    a=nn.Linear(6, 8),
    b=nn.Linear(8, 10),
    head=nn.Linear(10, 5),
)
for name, product in {
    "mm": lambda m, x: x @ m.w,
    "addmm": lambda m, x: torch.addmm(m.c, x, m.w),
    "matmul": lambda m, x: torch.matmul(x, m.w) + m.c,
    "transposed": lambda m, x: x @ m.w.t().t() + m.c,
    "einsum": lambda m, x: torch.einsum("bi,io->bo", x, m.w),
    "bmm": lambda m, x: torch.bmm(x[None].expand(2, -1, -1), m.w.expand(2, -1, -1))[0],
    "baddbmm": lambda m, x: torch.baddbmm(m.c, x[None], m.w[None])[0],
}.items():
    case(
        name,
        FLAT,
        lambda m, x, product=product: m.head(torch.relu(product(m, torch.relu(m.a(x))))),
        {"a": 8, "w": 10},
        zeroed={"w": 0},
        a=nn.Linear(6, 8),
        w=nn.Parameter(torch.empty(8, 10)),
        **({"c": nn.Parameter(torch.empty(10))} if name in ("addmm", "matmul", "transposed", "baddbmm") else {}),
        head=nn.Linear(10, 5),
    )
case(
    "gram-of-two-activations",
    (2, 3, 6, 6),
    lambda m, x: torch.bmm(torch.relu(m.a(x)).flatten(2).transpose(1, 2), torch.relu(m.b(x)).flatten(2)),
    {"a": 8},
    by_hand=lambda m, stays, x: torch.bmm(
        torch.relu(m.a(x))[:, stays["a.weight"][0]].flatten(2).transpose(1, 2),
        torch.relu(m.b(x))[:, stays["b.weight"][0]].flatten(2),
    ),
    a=conv(3, 8),
    b=conv(3, 8),
)

# --- normalisation ---
case("batch-norm", IMAGE, simple(lambda m, x: m.bn(x)), BOTH, bn=nn.BatchNorm2d(8), **two())
case(
    "batch-norm-no-affine",
    IMAGE,
    simple(lambda m, x: m.bn(x)),
    BOTH,
    bn=nn.BatchNorm2d(8, affine=False),
    **two(),
)
case(
    "batch-norm-no-statistics",
    IMAGE,
    simple(lambda m, x: m.bn(x)),
    BOTH,
    bn=nn.BatchNorm2d(8, track_running_stats=False),
    **two(),
)
case(
    "batch-norm-1d",
    FLAT,
    lambda m, x: m.head(torch.relu(m.bn(m.a(x)))),
    {"a": 8},
    a=nn.Linear(6, 8),
    bn=nn.BatchNorm1d(8),
    head=nn.Linear(8, 5),
)
case("instance-norm", IMAGE, simple(lambda m, x: m.n(x)), BOTH, n=nn.InstanceNorm2d(8), **two())
case(
    "instance-norm-affine",
    IMAGE,
    simple(lambda m, x: m.n(x)),
    BOTH,
    n=nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    **two(),
)
case("group-norm-each-channel", IMAGE, simple(lambda m, x: m.n(x)), BOTH, n=nn.GroupNorm(8, 8), **two())
case(
    "group-norm-whole-group",
    IMAGE,
    simple(lambda m, x: m.n(x)),
    {"a": 4, "b": 8},
    n=nn.GroupNorm(4, 8),
    **two(),
)
case(
    "group-norm-same-position",
    IMAGE,
    simple(lambda m, x: m.n(x)),
    {"a": 6, "b": 8},
    by_hand=lambda m, stays, x: pooled_live(
        m,
        stays,
        F.group_norm(
            m.a(x)[:, stays["n.weight"][0]], 2, m.n.weight[stays["n.weight"][0]], m.n.bias[stays["n.bias"][0]]
        ),
    ),
    n=nn.GroupNorm(2, 12),
    **two(i=12),
)


def pooled_live(m: Net, stays: dict, x: Tensor) -> Tensor:
    """b and the head over what is left of b's input."""
    rows, columns = stays["b.weight"][0], stays["b.weight"][1]
    x = F.conv2d(x, m.b.weight[rows][:, columns], m.b.bias[rows], padding=m.b.padding)
    return F.linear(torch.relu(x).mean((2, 3)), m.head.weight[:, stays["head.weight"][1]], m.head.bias)


def live_layer_norm(m: Net, stays: dict, x: Tensor) -> Tensor:
    live = stays["n.weight"][0]
    x = F.linear(x, m.a.weight[live], m.a.bias[live])
    x = F.layer_norm(x, (int(live.sum()),), m.n.weight[live], m.n.bias[live])
    return F.linear(torch.relu(x), m.head.weight[:, live], m.head.bias)


case(
    "layer-norm",
    (4, 6),
    lambda m, x: m.head(torch.relu(m.n(m.a(x)))),
    {"a": 8},
    by_hand=live_layer_norm,
    a=nn.Linear(6, 8),
    n=nn.LayerNorm(8),
    head=nn.Linear(8, 5),
)
case(
    "layer-norm-channels-last",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))),
    BOTH,
    by_hand=lambda m, stays, x: pooled_live(
        m,
        stays,
        F.layer_norm(
            m.a(x)[:, stays["n.weight"][0]].permute(0, 2, 3, 1),
            (int(stays["n.weight"][0].sum()),),
            m.n.weight[stays["n.weight"][0]],
            m.n.bias[stays["n.weight"][0]],
        ).permute(0, 3, 1, 2),
    ),
    n=nn.LayerNorm(8),
    **two(),
)
case(
    "rms-norm-by-hand",
    FLAT,
    lambda m, x: m.head((lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3) * m.g)(m.a(x))),
    {"a": 8},
    by_hand=lambda m, stays, x: F.linear(
        (lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3) * m.g[stays["g"][0]])(
            m.a(x)[:, stays["g"][0]]
        ),
        m.head.weight[:, stays["g"][0]],
        m.head.bias,
    ),
    a=nn.Linear(6, 8),
    g=nn.Parameter(torch.empty(8)),
    head=nn.Linear(8, 5),
)
case(
    "l2-normalise",
    FLAT,
    lambda m, x: m.head(F.normalize(m.a(x), dim=1)),
    {"a": 8},
    by_hand=lambda m, stays, x: F.linear(
        F.normalize(m.a(x)[:, stays["a.weight"][0]], dim=1),
        m.head.weight[:, stays["a.weight"][0]],
        m.head.bias,
    ),
    a=nn.Linear(6, 8),
    head=nn.Linear(8, 5),
)
case(
    "softmax-over-channels",
    FLAT,
    lambda m, x: m.head(torch.softmax(m.a(x), 1)),
    {"a": 8},
    by_hand=lambda m, stays, x: F.linear(
        torch.softmax(m.a(x)[:, stays["a.weight"][0]], 1), m.head.weight[:, stays["a.weight"][0]], m.head.bias
    ),
    a=nn.Linear(6, 8),
    head=nn.Linear(8, 5),
)
case(
    "softmax-over-space",
    IMAGE,
    simple(lambda m, x: x * torch.softmax(x.flatten(2), -1).view_as(x)),
    BOTH,
    **two(),
)

# --- elementwise, broadcasting, activations ---
ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.GELU(),
    nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.PReLU(8), nn.Sigmoid(), nn.Tanh(),
    nn.Mish(), nn.Softplus(), nn.Softsign(), nn.Tanhshrink(), nn.Hardtanh(), nn.Threshold(0.1, 0.2),
    nn.LogSigmoid(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.Identity(), nn.RReLU(),
    nn.Softshrink(), nn.Hardshrink(),
]  # fmt: skip
for activation in ACTIVATIONS:
    suffix = "-channels" if isinstance(activation, nn.PReLU) and activation.num_parameters > 1 else ""
    suffix = "-inplace" if getattr(activation, "inplace", False) else suffix
    case(
        type(activation).__name__ + suffix,
        IMAGE,
        simple(lambda m, x: m.act(x)),
        BOTH,
        act=activation,
        **two(),
    )
for name, middle in {
    "constants": lambda m, x: 2 * x.abs() ** 1.5 + 1 - x / 3,
    "clamp-exp-log": lambda m, x: torch.log1p(torch.exp(x.clamp(-1, 1))),
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "masked-fill": lambda m, x: x.masked_fill(x < 0, -0.5),
    "broadcast-buffer": lambda m, x: x * m.scalar + m.plane,
    "maximum-of-two-branches": lambda m, x: torch.maximum(x, m.c(x)),
    "in-place": lambda m, x: x.mul_(2).add_(0.5).relu_(),
    "copy-and-cast": lambda m, x: x.clone().to(torch.float32).to(torch.float64).contiguous().detach() + x,
    "zeros-like": lambda m, x: x + torch.ones_like(x) * 0.3,
    "factory-of-the-same-shape": lambda m, x: x + torch.full(x.shape, 0.3, dtype=x.dtype),
    "lerp": lambda m, x: torch.lerp(x, x.square(), 0.3),
    "per-channel-parameter": lambda m, x: x * m.g[:, None, None] + m.s,
    "per-channel-buffer": lambda m, x: x * m.table.view(1, -1, 1, 1),
    "layer-scale": lambda m, x: x + m.g.view(1, -1, 1, 1) * torch.relu(x),
}.items():
    case(
        name,
        IMAGE,
        simple(middle),
        BOTH,
        **({"scalar": torch.zeros(1), "plane": torch.zeros(1, 1, 8, 8)} if name == "broadcast-buffer" else {}),
        **({"c": conv(8, 8, 1)} if name == "maximum-of-two-branches" else {}),
        **({"g": nn.Parameter(torch.empty(8))} if name in ("per-channel-parameter", "layer-scale") else {}),
        **({"s": nn.Parameter(torch.empty(8, 1, 1))} if name == "per-channel-parameter" else {}),
        **({"table": torch.zeros(8)} if name == "per-channel-buffer" else {}),
        **two(),
    )
case(
    "residual",
    IMAGE,
    lambda m, x: (lambda y: pooled(m, torch.relu(y + m.c(torch.relu(m.b(y))))))(torch.relu(m.a(x))),
    {"a": 8, "b": 6},
    a=conv(3, 8),
    b=conv(8, 6),
    c=conv(6, 8),
    head=nn.Linear(8, 5),
)
case(
    "residual-into-the-input-freezes",
    (2, 6, 8, 8),
    lambda m, x: pooled(m, torch.relu(x + m.b(torch.relu(m.a(x))))),
    {"a": 8},
    a=conv(6, 8),
    b=conv(8, 6),
    head=nn.Linear(6, 5),
)

# --- pooling, resizing, reductions ---
for name, middle in {
    "max-pool": lambda m, x: F.max_pool2d(x, 2),
    "avg-pool": lambda m, x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive-avg-pool": lambda m, x: F.adaptive_avg_pool2d(x, 3),
    "adaptive-avg-pool-1": lambda m, x: F.adaptive_avg_pool2d(x, 1).expand_as(x),
    "adaptive-max-pool": lambda m, x: F.adaptive_max_pool2d(x, 3),
    "lp-pool": lambda m, x: F.lp_pool2d(x, 2.0, 2),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda m, x: F.interpolate(x, size=(5, 7), mode="bilinear"),
    "bicubic": lambda m, x: F.interpolate(x, size=(5, 7), mode="bicubic"),
    "area": lambda m, x: F.interpolate(x, size=(4, 4), mode="area"),
    "zero-pad": lambda m, x: F.pad(x, (1, 2, 0, 1)),
    "reflection-pad": lambda m, x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "replication-pad": lambda m, x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "crop": lambda m, x: x[:, :, 1:-1, 2:],
    "mean-of-space": lambda m, x: x - x.mean((2, 3), keepdim=True),
    "amax-of-space": lambda m, x: x / (1 + x.abs().amax((2, 3), keepdim=True)),
    "max-of-space": lambda m, x: x.max(3, keepdim=True).values + x,
    "var-of-space": lambda m, x: x / (1 + x.var((2, 3), keepdim=True)).sqrt(),
}.items():
    case(name, IMAGE, simple(middle), BOTH, **two())
for name, reduce in {
    "mean": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(1, keepdim=True),
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: x.max(1, keepdim=True).values,
    "min": lambda x: x.min(1, keepdim=True).values,
    "var": lambda x: x.var(1, keepdim=True, unbiased=False),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
}.items():
    case(
        f"{name}-over-channels",
        IMAGE,
        simple(lambda m, x, reduce=reduce: x * torch.sigmoid(reduce(x))),
        BOTH,
        by_hand=lambda m, stays, x, reduce=reduce: pooled_live(
            m, stays, (lambda h: h * torch.sigmoid(reduce(h)))(m.a(x)[:, stays["a.weight"][0]])
        ),
        **two(),
    )

# --- concatenation and taking apart ---
case(
    "cat",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.cat([torch.relu(m.a(x)), x, m.c(x)], 1)))),
    {"a": 8, "c": 6, "b": 8},
    a=conv(3, 8),
    c=conv(3, 6),
    b=conv(17, 8),
    head=nn.Linear(8, 5),
)
case(
    "cat-of-cat",
    IMAGE,
    lambda m, x: (lambda y: pooled(m, torch.relu(m.b(torch.relu(m.bn(torch.cat([y, m.c(torch.relu(m.bn1(y)))], 1)))))))(
        m.a(x)
    ),
    {"a": 8, "c": 6, "b": 8},
    a=conv(3, 8),
    bn1=nn.BatchNorm2d(8),
    c=conv(8, 6),
    bn=nn.BatchNorm2d(14),
    b=conv(14, 8),
    head=nn.Linear(8, 5),
)
case(
    "cat-along-space",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.cat([m.a(x), m.c(x)], 2)))),
    BOTH,
    a=conv(3, 8),
    c=conv(3, 8),
    b=conv(8, 8),
    head=nn.Linear(8, 5),
)
case(
    "stack",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.b(torch.stack([m.a(x), m.c(x)], 1).sum(1)))),
    BOTH,
    a=conv(3, 8),
    c=conv(3, 8),
    b=conv(8, 8),
    head=nn.Linear(8, 5),
)
case(
    "stack-softmax-over-branches",
    IMAGE,
    lambda m, x: (lambda s: pooled(m, torch.relu(m.b((s * s.softmax(1)).sum(1)))))(torch.stack([m.a(x), m.c(x)], 1)),
    BOTH,
    a=conv(3, 8),
    c=conv(3, 8),
    b=conv(8, 8),
    head=nn.Linear(8, 5),
)
SPLIT_PARTS = dict(a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), head=nn.Linear(6, 5))


def halves(split: Callable) -> Callable:
    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = split(torch.relu(m.a(x)))
        return pooled(m, torch.relu(m.b(left) + m.c(right)))

    return forward


case("chunk", IMAGE, halves(lambda x: x.chunk(2, 1)), {"a": 4, "b": 6}, **SPLIT_PARTS)
case("split", IMAGE, halves(lambda x: x.split(x.shape[1] // 2, 1)), {"a": 4, "b": 6}, **SPLIT_PARTS)
case(
    "glu",
    IMAGE,
    simple(lambda m, x: F.glu(x, 1)),
    {"a": 4, "b": 6},
    a=conv(3, 8),
    b=conv(4, 6),
    head=nn.Linear(6, 5),
)
case(
    "tensor-split-of-the-batch",
    IMAGE,
    simple(lambda m, x: torch.cat(x.split(1, 0)[::-1], 0)),
    BOTH,
    **two(),
)
for name, middle in {
    "slice-of-space": lambda m, x: x[:, :, :4] + x[:, :, 4:],
    "narrow-of-space": lambda m, x: x.narrow(2, 1, 5),
    "strided-slice-of-space": lambda m, x: x[:, :, ::2, 1::2],
    "select-of-space": lambda m, x: x + x[:, :, 3:4] + x.select(3, 2).unsqueeze(3),
    "unbind-of-space": lambda m, x: torch.stack(x.unbind(3)[::-1], 3),
    "index-select-of-space": lambda m, x: x.index_select(2, torch.tensor([0, 3, 1, 1])),
    "index-of-space": lambda m, x: x[:, :, [4, 2, 0]],
    "roll-of-space": lambda m, x: x.roll(1, 2),
    "flip-of-space": lambda m, x: x.flip(3),
    "cumsum-of-space": lambda m, x: x.cumsum(2),
    "repeat-of-space": lambda m, x: x.repeat(1, 1, 2, 1),
}.items():
    case(name, IMAGE, simple(middle), BOTH, **two())
for name, middle in {
    "index-select-of-channels": lambda m, x: x.index_select(1, torch.arange(7, -1, -1)),
    "strided-slice-of-channels": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "unbind-of-channels": lambda m, x: torch.stack(x.unbind(1)[::-1], 1),
    "roll-of-channels": lambda m, x: x.roll(1, 1),
    "cumsum-of-channels": lambda m, x: x.cumsum(1),
    "sort-of-channels": lambda m, x: x.sort(1).values,
}.items():
    case(name + "-freezes-them", IMAGE, simple(middle), {"b": 8}, **two())

# --- views ---
case(
    "flatten",
    (2, 3, 4, 4),
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x)).flatten(1)))),
    {"a": 8, "b": 6},
    a=conv(3, 8),
    b=nn.Linear(128, 6),
    head=nn.Linear(6, 5),
)
case(
    "flatten-channels-last",
    (2, 3, 4, 4),
    lambda m, x: m.head(torch.relu(m.b(torch.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1)))),
    {"a": 8, "b": 6},
    a=conv(3, 8),
    b=nn.Linear(128, 6),
    head=nn.Linear(6, 5),
)
for name, middle in {
    "view-and-back": lambda m, x: x.view(x.shape[0], x.shape[1], -1).unsqueeze(2).squeeze(2).view(x.shape),
    "unflatten-space": lambda m, x: x.flatten(2).unflatten(2, (4, 16)),
    "permute-transpose": lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2).permute(0, 3, 1, 2),
    "reshape-into-the-batch": lambda m, x: x.reshape(-1, 1, 8, 8).mul(2).reshape(x.shape[0], -1, 8, 8),
    "expand-and-add": lambda m, x: x + x.mean((2, 3), keepdim=True).expand_as(x),
    "expand-new-dim": lambda m, x: x[:, None].expand(-1, 3, -1, -1, -1).sum(1),
    "swapped-memory": lambda m, x: x.contiguous(memory_format=torch.channels_last) * 2,
    "window-partition": lambda m, x: x.view(2, -1, 2, 4, 8).permute(0, 2, 1, 3, 4).flatten(0, 1),
}.items():
    case(name, IMAGE, simple(middle), BOTH, **two())
case(
    "pixel-shuffle",
    IMAGE,
    simple(lambda m, x: F.pixel_shuffle(x, 2)),
    {"a": 4, "b": 6},
    a=conv(3, 16),
    b=conv(4, 6),
    head=nn.Linear(6, 5),
)
case(
    "pixel-unshuffle",
    IMAGE,
    simple(lambda m, x: F.pixel_unshuffle(x, 2)),
    {"a": 4, "b": 6},
    a=conv(3, 4),
    b=conv(16, 6),
    head=nn.Linear(6, 5),
)
case("channel-shuffle-op", IMAGE, simple(lambda m, x: F.channel_shuffle(x, 2)), {"a": 6, "b": 8}, **two(i=12))
case(
    "channel-shuffle-by-view",
    IMAGE,
    simple(lambda m, x: x.view(x.shape[0], 2, -1, 8, 8).transpose(1, 2).reshape(x.shape[0], -1, 8, 8)),
    {"a": 6, "b": 8},
    **two(i=12),
)
case(
    "option-a-shortcut",
    IMAGE,
    lambda m, x: (
        lambda y: pooled(m, torch.relu(m.c(torch.relu(F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4)) + m.b(y)))))
    )(torch.relu(m.a(x))),
    {"a": 8, "c": 6},
    a=conv(3, 8),
    b=conv(8, 14, stride=2),
    c=conv(14, 6),
    head=nn.Linear(6, 5),
)
case(
    "unfold-as-convolution",
    IMAGE,
    lambda m, x: m.head((m.w.flatten(1) @ F.unfold(torch.relu(m.a(x)), 3)).relu().mean(2)),
    {"w": 6},
    zeroed={},
    a=conv(3, 8),
    w=nn.Parameter(torch.empty(6, 8, 3, 3)),
    head=nn.Linear(6, 5),
)

# --- gates, attention, sharing ---
case(
    "squeeze-and-excitation",
    IMAGE,
    simple(lambda m, x: x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True)))))),
    {"a": 8, "down": 4, "b": 8},
    down=conv(8, 4, 1),
    up=conv(4, 8, 1),
    **two(),
)
case(
    "cbam",
    IMAGE,
    simple(lambda m, x: x * torch.sigmoid(m.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))),
    BOTH,
    by_hand=lambda m, stays, x: pooled_live(
        m,
        stays,
        (lambda h: h * torch.sigmoid(m.gate(torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1))))(
            m.a(x)[:, stays["a.weight"][0]]
        ),
    ),
    gate=conv(2, 1, 7),
    **two(),
)
case(
    "shared-module",
    IMAGE,
    simple(lambda m, x: m.c(torch.relu(m.c(torch.relu(x))))),
    BOTH,
    c=conv(8, 8),
    **two(),
)
case(
    "shared-norm",
    IMAGE,
    lambda m, x: pooled(m, torch.relu(m.n(m.b(torch.relu(m.n(m.a(x))))))),
    {"a": 8},
    n=nn.BatchNorm2d(8),
    **two(),
)
case(
    "weight-used-transposed",
    FLAT,
    lambda m, x: (torch.relu(x @ m.w.t() + m.c)) @ m.w,
    {"w": 9},
    by_hand=lambda m, stays, x: torch.relu(x @ m.w[stays["w"][0]].t() + m.c[stays["c"][0]]) @ m.w[stays["w"][0]],
    w=nn.Parameter(torch.empty(9, 6)),
    c=nn.Parameter(torch.empty(9)),
)
case(
    "weight-of-two-parameters",
    IMAGE,
    simple(lambda m, x: F.conv2d(torch.relu(x), torch.cat([m.u, m.v], 0))),
    {"a": 8, "u": 4, "v": 4, "b": 6},
    zeroed={"u": 1, "v": 1},
    u=nn.Parameter(torch.empty(4, 8, 1, 1)),
    v=nn.Parameter(torch.empty(4, 8, 1, 1)),
    **two(o=6),
)
case(
    "cumsum-over-a-sequence",
    (2, 5, 6),
    lambda m, x: m.head(torch.relu(m.a(x)).cumsum(1)),
    {"a": 8},
    a=nn.Linear(6, 8),
    head=nn.Linear(8, 3),
)


def attention(m: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


def attention_by_hand(m: Net, stays: dict, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    values = stays["v.weight"][0]
    q, k = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (m.q, m.k))
    v = m.v(x)[..., values].view(b, n, 2, -1).transpose(1, 2)
    out = (torch.softmax(q @ k.transpose(2, 3) / 6**0.5, -1) @ v).transpose(1, 2).reshape(b, n, -1)
    return F.linear(out, m.head.weight[:, values], m.head.bias)


# The width of a head of q and k sets the scale, and their number is a literal; that of v is free, at equal positions in
# both heads.
case(
    "scaled-dot-product-attention",
    (2, 7, 6),
    attention,
    {"v": 6},
    by_hand=attention_by_hand,
    q=nn.Linear(6, 12),
    k=nn.Linear(6, 12),
    v=nn.Linear(6, 12),
    head=nn.Linear(12, 5),
)
case(
    "embedding",
    (2, 7),
    lambda m, x: m.head(torch.relu(m.a(x.abs().long() % 5))),
    {"a": 8},
    a=nn.Embedding(5, 8),
    head=nn.Linear(8, 3),
)


@pytest.mark.parametrize("toy", CASES, ids=lambda c: c.name)
def test_rule(toy: Case):
    torch.manual_seed(0)
    net = randomise(Net(toy.forward, copy.deepcopy(toy.parts))).double().eval()
    for name, buffer in net.named_buffers():
        net.get_buffer(name).data = buffer.double() if buffer.is_floating_point() else buffer
    inputs = [3 * torch.randn(shape, dtype=torch.float64) for shape in toy.shapes]
    graph = trace(net, tuple(inputs))
    graph.settle()
    assert {g.name: g.num_classes for g in graph.prunable if g.num_classes > 1} == toy.prunable

    for seed in range(3):
        check_cut(toy, copy.deepcopy(net), inputs, seed)


def check_cut(toy: Case, net: Net, inputs: list[Tensor], seed: int) -> None:
    graph = trace(net, tuple(inputs))
    graph.settle()
    keep = random_keep(graph, seed)
    for group in graph.prunable:
        assert not keep[group.classes].all() and keep[group.classes].any()
    graph.check(keep)
    stays = kept_positions(graph, keep)
    with torch.no_grad():
        dense = net(*inputs)
        if toy.by_hand is not None:
            expected = toy.by_hand(net, stays, *inputs)
        else:
            masked = with_zeroed_readers(net, stays)
            for name, dim in toy.zeroed.items():
                masked.get_parameter(name).index_fill_(dim, (~stays[name][dim]).nonzero().flatten(), 0.0)
            expected = masked(*inputs)
        assert relative_error(expected, dense) > 1e-3, "the mask did not move the output"
        assert relative_error(masked_output(graph, keep, tuple(inputs)), expected) < 1e-9
        with graph.masked(keep):
            assert relative_error(net(*inputs), expected) < 1e-9
        assert torch.equal(net(*inputs), dense)
        sizes = {name: p.numel() for name, p in net.named_parameters()}
        graph.compact(keep)
        assert relative_error(net(*inputs), expected) < 1e-9
    assert sum(p.numel() for p in net.parameters()) == graph.params(keep) < sum(sizes.values())

    net.train()
    torch.manual_seed(1)
    net(*inputs).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# --- literal offsets ---
@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: m.c(x[:, 4:8]),
        lambda m, x: m.c(x.narrow(1, 4, 4)),
        lambda m, x: m.c(x[:, -4:]),
        lambda m, x: m.c(x[:, :-8]),
        lambda m, x: m.c(x.split([4, 4, 4], 1)[1]),
        lambda m, x: x[:, 3:4],
        lambda m, x: x[:, 3][:, None],
        lambda m, x: m.c(x[:, [4, 5, 6, 7]]),
    ],
    ids=[
        "slice",
        "narrow",
        "slice-from-the-end",
        "slice-up-to-the-end",
        "split-sizes",
        "slice-of-one",
        "select",
        "index",
    ],
)
def test_literal_offset_is_never_silently_wrong(read):
    """Cutting in front of a literal offset moves what it points at, often without a change of any shape."""
    parts = {"a": conv(3, 12), "b": conv(12, 6), "c": conv(4, 6), "head": nn.Linear(6, 5)}
    net = randomise(Net(lambda m, x: (lambda y: pooled(m, m.b(y) + read(m, y)))(torch.relu(m.a(x))), parts)).double()
    net.eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    for seed in range(8):
        small = copy.deepcopy(net)
        graph = trace(small, x)
        keep = random_keep(graph, seed)
        axis = next(slot for slot in graph.slots if slot.name == "a.weight").axes[0]
        if seed < 2 and axis is not None:
            keep[axis[axis >= 0]] = True  # only channels in front of the offset go
            keep[axis[: 1 + seed][axis[: 1 + seed] >= 0]] = False
        with torch.no_grad():
            expected = masked_output(graph, graph.all_kept(), x)
            try:
                graph.check(keep)
            except CompactionError as error:
                assert __file__ in str(error)
                continue
            expected = masked_output(graph, keep, x)
            graph.compact(keep)
            assert relative_error(small(x), expected) < 1e-9, "silently wrong"
    graph = trace(net, x)
    graph.settle()
    keep = random_keep(graph)
    with torch.no_grad():
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        assert relative_error(net(x), expected) < 1e-9


def test_counts_that_have_to_agree():
    """`view_as` wants as many rows in q as x has channels: settled by keeping, never by a wrong result."""
    net = randomise(
        Net(
            simple(
                lambda m, x: (
                    torch.softmax(m.q(x).flatten(2) @ x.flatten(2).transpose(1, 2), -1) @ x.flatten(2)
                ).view_as(x)
            ),
            {"q": conv(8, 8, 1), **two()},
        )
    ).double()
    net.eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    graph = trace(net, x)
    uneven = graph.all_kept()
    uneven[next(g for g in graph.groups if g.name == "q").classes.start] = False
    with pytest.raises(CompactionError, match="test_rules.py"):
        graph.check(uneven)
    graph.settle()
    assert "b" in {g.name for g in graph.prunable}
    keep = random_keep(graph)
    with torch.no_grad():
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        assert relative_error(net(x), expected) < 1e-9


# --- operators without a rule ---
def test_unknown_operator_freezes_and_says_where():
    net = randomise(
        Net(
            lambda m, x: pooled(m, torch.relu(m.b(torch.renorm(m.a(x), 2, 0, 1.0)))),  # the line to be named
            two(),
        )
    ).double()
    graph = trace(net, torch.randn(IMAGE, dtype=torch.float64))
    assert [g.name for g in graph.prunable] == ["b"]
    reason = next(g.reason for g in graph.frozen if g.name == "a")
    assert "no rule for operator aten.renorm" in reason
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "# the line to be named" in text)
    assert f"{__file__}:{line}" in reason
    check_cut(Case("unknown", net.run, {}, {}, []), net, [torch.randn(IMAGE, dtype=torch.float64)], 0)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.renorm(x, 2, 0, 1.0)


def test_frozen_reason_names_the_module():
    net = Net(simple(lambda m, x: m.inner(x)), {"inner": nn.Sequential(Inner()), **two()})
    reason = next(g.reason for g in trace(net, torch.randn(IMAGE)).frozen if g.name == "a")
    assert "in module 'inner.0'" in reason


def test_output_is_never_cut():
    graph = trace(Net(simple(lambda m, x: x), two()), torch.randn(IMAGE))
    frozen = {g.name: g.reason for g in graph.frozen}
    assert "output of the model" in frozen["head"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_trace(kind):
    parts = {"a": nn.Linear(6, 16), "r": kind(16, 12, batch_first=True), "head": nn.Linear(12, 3)}
    net = randomise(Net(lambda m, x: m.head(m.r(torch.relu(m.a(x)))[0][:, -1]), parts)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    graph = trace(net, x)
    graph.settle()
    assert "a" in {g.name for g in graph.prunable}
    keep = random_keep(graph)
    with torch.no_grad():
        masked = copy.deepcopy(net)
        for name in ("r.weight_ih_l0", "r.weight_hh_l0", "head.weight"):
            stays = kept_positions(graph, keep)[name][1]
            masked.get_parameter(name).index_fill_(1, (~stays).nonzero().flatten(), 0.0)
        expected = masked(x)
        graph.compact(keep)
        assert relative_error(net(x), expected) < 1e-9


def test_lstm_with_a_projection():
    parts = {"a": nn.Linear(6, 16), "r": nn.LSTM(16, 12, batch_first=True, proj_size=8), "head": nn.Linear(8, 3)}
    net = randomise(Net(lambda m, x: m.head(m.r(torch.relu(m.a(x)))[0][:, -1]), parts)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    graph = trace(net, x)
    graph.settle()
    keep = random_keep(graph)
    with torch.no_grad():
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        assert relative_error(net(x), expected) < 1e-9
    assert net.r.input_size == net.a.out_features < 16
    assert net.r.hidden_size == net.r.weight_hr_l0.shape[1] < 12
    assert net.r.proj_size == net.r.weight_hr_l0.shape[0] == net.head.in_features


def test_outputs_in_containers_are_never_cut():
    def forward(m: Net, x: Tensor):
        y = torch.relu(m.a(x))
        return {"features": [y], "logits": (m.head(torch.relu(m.b(y)).mean((2, 3))),)}

    graph = trace(Net(forward, two()), torch.randn(IMAGE))
    assert [g.name for g in graph.prunable] == ["b"]
    assert {g.name for g in graph.frozen} == {"a", "head"}


@pytest.mark.parametrize(
    "wrap",
    [deque, frozenset, MappingProxyType, UserDict, dict.values],
    ids=["deque", "frozenset", "mappingproxy", "userdict", "values"],
)
def test_outputs_in_unusual_containers_are_never_cut(wrap):
    def forward(m: Net, x: Tensor):
        y = torch.relu(m.a(x))
        z = m.head(torch.relu(m.b(y)).mean((2, 3)))
        return wrap((y, z) if wrap in (deque, frozenset) else {"y": y, "z": z})

    graph = trace(Net(forward, two()), torch.randn(IMAGE))
    assert [g.name for g in graph.prunable] == ["b"]


def test_unused_parameter_stays():
    graph = trace(Net(simple(lambda m, x: x), {"spare": nn.Linear(4, 4), **two()}), torch.randn(IMAGE))
    keep = random_keep(graph)
    shape = graph.model.spare.weight.shape
    graph.compact(keep)
    assert graph.model.spare.weight.shape == shape


def test_dict_and_tuple_examples():
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.head(torch.relu(self.a(x)) * scale)

    x, scale = torch.randn(4, 6), torch.rand(4, 1)
    for example in ((x, scale), {"x": x, "scale": scale}):
        graph = trace(TwoInputs(), example)
        assert [g.name for g in graph.prunable] == ["a"]
        keep = random_keep(graph)
        graph.compact(keep)
        assert graph.model(x, scale).shape == (4, 3)
