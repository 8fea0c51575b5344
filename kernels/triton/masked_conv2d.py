"""Implicit-GEMM convolution over compact channels-last activations; the mask lies on the weight's side.

A weight stays dense: `rows` and `cols` say which of its channels live, `scale` multiplies the columns. The input may be
normalised and rectified as it is read (x * norm_scale + norm_shift, then ReLU; the padding stays zero), and sums of the
output and of its squares, which a batch norm needs, come out of the same pass. Sums are float32 within a block and
float64 over the blocks, in a fixed order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

# Blocks of positions, output channels and contracted channels. `family` in the key: the logarithms of the sizes.
_CONFIGS = [
    triton.Config({"BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=3),
    triton.Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3),
    triton.Config({"BM": 128, "BN": 64, "BK": 32}, num_warps=4, num_stages=4),
    triton.Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=8, num_stages=3),
    triton.Config({"BM": 64, "BN": 128, "BK": 32}, num_warps=4, num_stages=4),
    triton.Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=4),
    triton.Config({"BM": 128, "BN": 32, "BK": 32}, num_warps=4, num_stages=4),
    triton.Config({"BM": 256, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
]
_LEAST_POSITIONS = 32  # of a block
_SPLITS = 64  # the most parts that the positions are cut into for the gradient of the weight
_POSITIONS_PER_SPLIT = 4096


def interpreted() -> bool:
    """The kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(_forward_kernel_body, triton.JITFunction)


def _autotuned(kernel):
    """Tries the configurations once for each family of shapes; Triton keeps the answers on disk."""
    if not isinstance(kernel, triton.JITFunction):  # the interpreter has nothing to choose
        return triton.autotune([triton.Config({"BM": 32, "BN": 16, "BK": 16})], key=[])(kernel)
    # What decides about time and shared memory: a configuration that fits one set of flags may not fit another.
    flags = {"stride_h", "dil_h", "NORM", "STATISTICS", "RESIDUAL", "HAS_ROWS", "HAS_COLS", "HAS_SCALE", "PRECISION"}
    key = ["family", *sorted(flags.intersection(kernel.arg_names))]
    return triton.autotune(_CONFIGS, key=key, cache_results=True)(kernel)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter would multiply the bits of bfloat16
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _weight_tile(
    w_ptr, rows_ptr, cols_ptr, scale_ptr, o, c, c_out, c_in, stride_o, stride_c, offset,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """w[rows[o], cols[c]] * scale[c] at one tap; `o` and `c` broadcast against each other."""
    o_ok = o < c_out
    c_ok = c < c_in
    row = tl.load(rows_ptr + o, mask=o_ok, other=0) if HAS_ROWS else o.to(tl.int64)
    col = tl.load(cols_ptr + c, mask=c_ok, other=0) if HAS_COLS else c.to(tl.int64)
    w = tl.load(w_ptr + row * stride_o + col * stride_c + offset, mask=o_ok & c_ok, other=0.0)
    if HAS_SCALE:
        z = tl.load(scale_ptr + c, mask=c_ok, other=0.0)
        w = (w.to(tl.float32) * z.to(tl.float32)).to(w.dtype)
    return w


@triton.jit
def _input_tile(x_ptr, at, c, c_in, inside, norm_scale_ptr, norm_shift_ptr, NORM: tl.constexpr):
    """x at the addresses `at` [positions, 1] + c [1, channels], normalised and rectified; zero outside."""
    c_ok = c < c_in
    x = tl.load(x_ptr + at + c, mask=inside & c_ok, other=0.0)
    if NORM:
        s = tl.load(norm_scale_ptr + c, mask=c_ok, other=0.0)
        t = tl.load(norm_shift_ptr + c, mask=c_ok, other=0.0)
        value = tl.maximum(x.to(tl.float32) * s + t, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.where(inside & c_ok, value, 0.0).to(x.dtype)
    return x


@triton.jit
def _gradient_tile(g_ptr, y_ptr, at, o, c_out, inside, grad_sum_ptr, grad_square_ptr, STATISTICS: tl.constexpr):
    """The output's gradient at `at` + o, with what comes through the sums of the output and of its squares."""
    o_ok = o < c_out
    g = tl.load(g_ptr + at + o, mask=inside & o_ok, other=0.0)
    if STATISTICS:
        y = tl.load(y_ptr + at + o, mask=inside & o_ok, other=0.0).to(tl.float32)
        one = tl.load(grad_sum_ptr + o, mask=o_ok, other=0.0)
        two = tl.load(grad_square_ptr + o, mask=o_ok, other=0.0)
        value = g.to(tl.float32) + one + 2 * y * two
        g = tl.where(inside & o_ok, value, 0.0).to(g.dtype)
    return g


@triton.jit(do_not_specialize=["family"])
def _forward_kernel_body(
    x_ptr, w_ptr, bias_ptr, rows_ptr, cols_ptr, scale_ptr, norm_scale_ptr, norm_shift_ptr, residual_ptr, y_ptr,
    partial_ptr, positions, c_in, c_out, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    w_stride_o, w_stride_c, w_stride_h, w_stride_w, family,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
    HAS_SCALE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks_o = tl.cdiv(c_out, BN)
    # Neighbouring programs share the activations that they read.
    pid_m = tl.program_id(0) // blocks_o
    pid_o = tl.program_id(0) % blocks_o
    m = pid_m * BM + tl.arange(0, BM)
    o = (pid_o * BN + tl.arange(0, BN))[None, :]
    m_ok = m < positions
    ow = m % OW
    oh = (m // OW) % OH
    n = (m // OW) // OH
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    blocks_c = tl.cdiv(c_in, BK)
    # One loop over taps and channels, so that loads run ahead through all of it.
    for k in range(KH * KW * blocks_c):
        tap = k // blocks_c
        c = (k % blocks_c) * BK + tl.arange(0, BK)
        ih = oh * stride_h - pad_h + (tap // KW) * dil_h
        iw = ow * stride_w - pad_w + (tap % KW) * dil_w
        inside = (m_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
        at = (((n.to(tl.int64) * H + ih) * W + iw) * c_in)[:, None]
        x = _input_tile(x_ptr, at, c[None, :], c_in, inside, norm_scale_ptr, norm_shift_ptr, NORM)
        w = _weight_tile(
            w_ptr, rows_ptr, cols_ptr, scale_ptr, o, c[:, None], c_out, c_in, w_stride_o, w_stride_c,
            (tap // KW) * w_stride_h + (tap % KW) * w_stride_w, HAS_ROWS, HAS_COLS, HAS_SCALE,
        )  # fmt: skip
        acc = _dot(x, w, acc, PRECISION)
    o_ok = o < c_out
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=o_ok, other=0.0).to(tl.float32)
    to = m.to(tl.int64)[:, None] * c_out + o
    stored = m_ok[:, None] & o_ok
    if RESIDUAL:
        acc += tl.load(residual_ptr + to, mask=stored, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + to, y, mask=stored)
    if STATISTICS:
        # Squares about the block's own mean: float32 then does where the mean is far larger than the deviation.
        value = tl.where(stored, y.to(tl.float32), 0.0)
        total = tl.sum(value, 0)[None, :]
        mean = total / tl.minimum(positions - pid_m * BM, BM).to(tl.float32)
        away = tl.where(stored, value - mean, 0.0)
        place = partial_ptr + pid_m.to(tl.int64) * 2 * c_out + o
        tl.store(place, total, mask=o_ok)
        tl.store(place + c_out, tl.sum(away * away, 0)[None, :], mask=o_ok)


@triton.jit(do_not_specialize=["family"])
def _input_gradient_kernel_body(
    g_ptr, y_ptr, grad_sum_ptr, grad_square_ptr, w_ptr, rows_ptr, cols_ptr, scale_ptr, x_ptr, norm_scale_ptr,
    norm_shift_ptr, dx_ptr, partial_ptr, images, c_in, c_out, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w,
    dil_h, dil_w, w_stride_o, w_stride_c, w_stride_h, w_stride_w, family,
    KH: tl.constexpr, KW: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, HAS_SCALE: tl.constexpr,
    NORM: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Positions whose row and column leave the same remainders by the stride meet the same taps: a phase each.
    phase = tl.program_id(1)
    phase_h = phase // stride_w
    phase_w = phase % stride_w
    rows_h = (H - phase_h + stride_h - 1) // stride_h
    rows_w = (W - phase_w + stride_w - 1) // stride_w
    blocks_c = tl.cdiv(c_in, BN)
    pid_m = tl.program_id(0) // blocks_c
    pid_c = tl.program_id(0) % blocks_c
    m = pid_m * BM + tl.arange(0, BM)
    c = (pid_c * BN + tl.arange(0, BN))[None, :]
    m_ok = m < images * rows_h * rows_w
    iw = (m % rows_w) * stride_w + phase_w
    ih = ((m // rows_w) % rows_h) * stride_h + phase_h
    n = (m // rows_w) // rows_h
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    # Without dilation every stride-th tap meets a phase; with it all are tried, and most of them masked.
    step_h = stride_h if dil_h == 1 else 1
    step_w = stride_w if dil_w == 1 else 1
    first_h = (phase_h + pad_h) % step_h
    first_w = (phase_w + pad_w) % step_w
    taps_h = (KH - first_h + step_h - 1) // step_h
    taps_w = (KW - first_w + step_w - 1) // step_w
    blocks_o = tl.cdiv(c_out, BK)
    for k in range(taps_h * taps_w * blocks_o):
        tap = k // blocks_o
        kh = first_h + (tap // taps_w) * step_h
        kw = first_w + (tap % taps_w) * step_w
        o = (k % blocks_o) * BK + tl.arange(0, BK)
        up_h = ih + pad_h - kh * dil_h
        up_w = iw + pad_w - kw * dil_w
        oh = up_h // stride_h
        ow = up_w // stride_w
        met = (up_h % stride_h == 0) & (up_w % stride_w == 0)
        inside = (m_ok & met & (up_h >= 0) & (oh < OH) & (up_w >= 0) & (ow < OW))[:, None]
        at = (((n.to(tl.int64) * OH + oh) * OW + ow) * c_out)[:, None]
        g = _gradient_tile(g_ptr, y_ptr, at, o[None, :], c_out, inside, grad_sum_ptr, grad_square_ptr, STATISTICS)
        w = _weight_tile(
            w_ptr, rows_ptr, cols_ptr, scale_ptr, o[:, None], c, c_out, c_in, w_stride_o, w_stride_c,
            kh * w_stride_h + kw * w_stride_w, HAS_ROWS, HAS_COLS, HAS_SCALE,
        )  # fmt: skip
        acc = _dot(g, w, acc, PRECISION)
    to = (((n.to(tl.int64) * H + ih) * W + iw) * c_in)[:, None] + c
    c_ok = c < c_in
    stored = m_ok[:, None] & c_ok
    if NORM:
        s = tl.load(norm_scale_ptr + c, mask=c_ok, other=0.0)
        t = tl.load(norm_shift_ptr + c, mask=c_ok, other=0.0)
        x = tl.load(x_ptr + to, mask=stored, other=0.0).to(tl.float32)
        acc = tl.where(stored & ~(x * s + t <= 0), acc, 0.0)  # NaN passes
        place = partial_ptr + (phase.to(tl.int64) * (tl.num_programs(0) // blocks_c) + pid_m) * 2 * c_in + c
        tl.store(place, tl.sum(acc * x, 0)[None, :], mask=c_ok)
        tl.store(place + c_in, tl.sum(acc, 0)[None, :], mask=c_ok)
        acc = acc * s
    tl.store(dx_ptr + to, acc.to(dx_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["family"])
def _weight_gradient_kernel_body(
    g_ptr, y_ptr, grad_sum_ptr, grad_square_ptr, x_ptr, norm_scale_ptr, norm_shift_ptr, partial_ptr,
    positions, per_split, c_in, c_out, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, family,
    KW: tl.constexpr, NORM: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(c_in, BN)
    pid_o = tl.program_id(0) // blocks_c
    pid_c = tl.program_id(0) % blocks_c
    tap = tl.program_id(1)
    split = tl.program_id(2)
    kh = tap // KW
    kw = tap % KW
    o = pid_o * BM + tl.arange(0, BM)
    c = (pid_c * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, positions)
    for m0 in range(first, last, BK):
        m = m0 + tl.arange(0, BK)
        m_ok = m < last
        ow = m % OW
        oh = (m // OW) % OH
        n = (m // OW) // OH
        ih = oh * stride_h - pad_h + kh * dil_h
        iw = ow * stride_w - pad_w + kw * dil_w
        inside = (m_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
        at = (((n.to(tl.int64) * H + ih) * W + iw) * c_in)[:, None]
        x = _input_tile(x_ptr, at, c, c_in, inside, norm_scale_ptr, norm_shift_ptr, NORM)
        g = _gradient_tile(
            g_ptr, y_ptr, m.to(tl.int64)[:, None] * c_out, o[None, :], c_out, m_ok[:, None], grad_sum_ptr,
            grad_square_ptr, STATISTICS,
        )  # fmt: skip
        acc = _dot(tl.trans(g), x, acc, PRECISION)
    # [split, o, tap, c]
    taps = tl.num_programs(1)
    to = ((split.to(tl.int64) * c_out + o[:, None]) * taps + tap) * c_in + c
    tl.store(partial_ptr + to, acc, mask=(o < c_out)[:, None] & (c < c_in))


_forward_kernel = _autotuned(_forward_kernel_body)
_input_gradient_kernel = _autotuned(_input_gradient_kernel_body)
_weight_gradient_kernel = _autotuned(_weight_gradient_kernel_body)


def _tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the newer setting was used
        return torch.backends.cudnn.conv.fp32_precision != "ieee"


class Problem:
    """Sizes and strides of one convolution; input and gradients are channels_last."""

    def __init__(self, input, weight, rows, cols, stride, padding, dilation) -> None:
        self.images, self.c_in, self.H, self.W = input.shape
        self.c_out = weight.shape[0] if rows is None else rows.numel()
        self.kernel = tuple(weight.shape[2:])
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.OH, self.OW = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, pad, dil, k, step in zip((self.H, self.W), padding, dilation, self.kernel, stride, strict=True)
        )
        self.positions = self.images * self.OH * self.OW
        if max(self.positions, self.images * self.H * self.W) >= 2**31:
            raise ValueError(f"masked_conv2d: at most 2^31 - 1 positions, got {self.positions}")
        self.precision = "ieee"
        if interpreted() and input.dtype == torch.bfloat16:
            self.precision = "widened"
        elif input.dtype == torch.float32:  # as the user lets cuDNN multiply it
            self.precision = "tf32" if _tf32() else "ieee"
        taps = self.kernel[0] * self.kernel[1]
        self.family = taps << 24
        for place, size in enumerate((self.positions, self.c_in, self.c_out)):
            self.family |= size.bit_length() << (8 * place)

    @property
    def sizes(self) -> tuple[int, ...]:
        moves = (*self.stride, *self.padding, *self.dilation)
        return (self.c_in, self.c_out, self.H, self.W, self.OH, self.OW, *moves)


class _Grid:
    """`count(meta)` programs along the first dim, which has room for 2^31; the others have 65,535."""

    def __init__(self, count: Callable[[dict], int], *rest: int) -> None:
        self.count, self.rest = count, rest

    def __call__(self, meta: dict) -> tuple[int, ...]:
        self.positions_per_block = meta["BM"]  # of the configuration that runs last
        return (self.count(meta), *self.rest)


def _partial_sums(positions: int, phases: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Room for two sums a block, at the smallest block."""
    blocks = phases * triton.cdiv(positions, _LEAST_POSITIONS)
    return torch.empty((blocks, 2, channels), dtype=torch.float32, device=like.device)


def _written(partial: torch.Tensor, positions: int, phases: int, grid: _Grid) -> torch.Tensor:
    """Those of the configuration that ran last, in float64; what others have left behind them is not among them."""
    return partial[: phases * triton.cdiv(positions, grid.positions_per_block)].double()


def _sums(partial: torch.Tensor, positions: int, grid: _Grid) -> torch.Tensor:
    """Of the output and of its squares, from the blocks' sums and squares about their means."""
    total, away = _written(partial, positions, 1, grid).unbind(1)  # [blocks, c_out]
    sizes = torch.full((len(total), 1), grid.positions_per_block, dtype=torch.float64, device=partial.device)
    sizes[-1] = positions - (len(total) - 1) * grid.positions_per_block
    return torch.stack([total.sum(0), (away + total.square() / sizes).sum(0)])


def masked_conv2d(p: Problem, input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual, statistics):
    """The output [images, c_out, OH, OW], channels_last, and float64 [2, c_out]: sums of it and of its squares."""
    shape = (p.images, p.c_out, p.OH, p.OW)
    y = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    sums = torch.zeros((2, p.c_out), dtype=torch.float64, device=input.device) if statistics else None
    if y.numel() == 0:
        return y, sums
    partial = _partial_sums(p.positions, 1, p.c_out, input) if statistics else None
    grid = _Grid(lambda meta: triton.cdiv(p.positions, meta["BM"]) * triton.cdiv(p.c_out, meta["BN"]))
    _forward_kernel[grid](
        input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual, y, partial,
        p.positions, *p.sizes, *weight.stride(), p.family,
        KH=p.kernel[0], KW=p.kernel[1], HAS_BIAS=bias is not None, HAS_ROWS=rows is not None,
        HAS_COLS=cols is not None, HAS_SCALE=scale is not None, NORM=norm_scale is not None,
        RESIDUAL=residual is not None, STATISTICS=statistics, PRECISION=p.precision,
    )  # fmt: skip
    return y, _sums(partial, p.positions, grid) if statistics else None


def input_gradient(p: Problem, grad, y, grad_statistics, input, weight, rows, cols, scale, norm_scale, norm_shift):
    """That of the input, channels_last, and float32 [2, c_in]: those of norm_scale and norm_shift."""
    dx = torch.empty_like(input, memory_format=torch.channels_last)
    norm = norm_scale is not None
    if dx.numel() == 0:
        return dx, torch.zeros((2, p.c_in), dtype=torch.float32, device=input.device) if norm else None
    phases = p.stride[0] * p.stride[1]
    largest = p.images * triton.cdiv(p.H, p.stride[0]) * triton.cdiv(p.W, p.stride[1])
    partial = _partial_sums(largest, phases, p.c_in, input) if norm else None
    one, two = (None, None) if grad_statistics is None else grad_statistics.unbind()
    grid = _Grid(lambda meta: triton.cdiv(largest, meta["BM"]) * triton.cdiv(p.c_in, meta["BN"]), phases)
    _input_gradient_kernel[grid](
        grad, y, one, two, weight, rows, cols, scale, input, norm_scale, norm_shift, dx, partial,
        p.images, *p.sizes, *weight.stride(), p.family,
        KH=p.kernel[0], KW=p.kernel[1], HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
        HAS_SCALE=scale is not None, NORM=norm, STATISTICS=one is not None, PRECISION=p.precision,
    )  # fmt: skip
    return dx, _written(partial, largest, phases, grid).sum(0).float() if norm else None


def weight_gradient(p: Problem, grad, y, grad_statistics, input, norm_scale, norm_shift):
    """That of the packed weight, float32 [c_out, c_in, kh, kw], channels_last."""
    taps = p.kernel[0] * p.kernel[1]
    splits = max(1, min(_SPLITS, triton.cdiv(p.positions, _POSITIONS_PER_SPLIT)))
    shape = (splits, p.c_out, *p.kernel, p.c_in)
    if p.positions == 0 or 0 in shape:
        return torch.zeros(shape[1:], dtype=torch.float32, device=input.device).permute(0, 3, 1, 2)
    partial = torch.empty(shape, dtype=torch.float32, device=input.device)
    one, two = (None, None) if grad_statistics is None else grad_statistics.unbind()
    grid = _Grid(lambda meta: triton.cdiv(p.c_out, meta["BM"]) * triton.cdiv(p.c_in, meta["BN"]), taps, splits)
    _weight_gradient_kernel[grid](
        grad, y, one, two, input, norm_scale, norm_shift, partial,
        p.positions, triton.cdiv(p.positions, splits), *p.sizes, p.family,
        KW=p.kernel[1], NORM=norm_scale is not None, STATISTICS=one is not None, PRECISION=p.precision,
    )  # fmt: skip
    return partial.sum(0).permute(0, 3, 1, 2)
