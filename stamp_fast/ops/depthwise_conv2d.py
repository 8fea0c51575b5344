"""A convolution with one filter per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_fast import _load, config  # noqa: F401  (_load registers the operators)
from stamp_fast.ops import _reference
from stamp_fast.ops._backend import choose, note
from stamp_fast.ops._tensors import (
    autocast_dtype,
    check_float,
    check_same_dtype,
    differentiable_once,
    memory_format,
    new_empty,
    pair,
)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: config.Backend | None = None,
) -> Tensor:
    """Convolves each channel with a filter of its own, as `conv2d(input, weight, groups=C)` does.

    Sums are taken in float32 (float64 for float64) and in a fixed order on CUDA; other devices, and CUDA without the
    CUDA library, take PyTorch's convolution. Differentiable once in `input` and
    `weight`. The output keeps the memory format of `input` (channels_last or contiguous). Under autocast both are cast
    as for `conv2d`.

    Args:
        input: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (C, 1, height, width), of the dtype and device of `input`.
        stride: one number, or two for height and width; so are `padding` (zeros on either side) and `dilation`.

        backend: see `stamp_fast.config`; None: what is set there.

    Returns:
        The output, (N, C, H', W').

    Raises:
        ArgumentError: the backend cannot take this call, or a number is no pair.
        RuntimeError: An argument has the wrong shape, dtype, device or value.
    """
    dtype = autocast_dtype(input)
    if dtype is not None and input.dtype != torch.float64:
        input, weight = input.to(dtype), weight.to(dtype)
    pairs = [
        pair("depthwise_conv2d", name, value)
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    ]
    chosen = choose("depthwise_conv2d", input, backend)
    if chosen == "reference":
        _output_shape("depthwise_conv2d", input, weight, *pairs)  # the checks
        output = _reference.depthwise_conv2d(input, weight, *pairs)
    else:
        output = torch.ops.stamp_fast.depthwise_conv2d(input, weight, *pairs)
    note("depthwise_conv2d", chosen)
    return output


def _output_shape(
    op: str, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Shape of the output, with the checks of csrc/cuda/depthwise_conv2d.cpp."""
    check_float(op, "input", input)
    torch._check(input.ndim == 4, lambda: f"{op}: input must have 4 dimensions, got shape {tuple(input.shape)}")
    check_same_dtype(op, "weight", weight, "input", input)
    channels = input.shape[1]
    torch._check(
        weight.ndim == 4
        and weight.shape[0] == channels
        and weight.shape[1] == 1
        and weight.shape[2] >= 1
        and weight.shape[3] >= 1,
        lambda: f"{op}: weight must have shape ({channels}, 1, height, width), got {tuple(weight.shape)}",
    )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        torch._check(len(values) == 2, lambda n=name, v=values: f"{op}: {n} must have 2 elements, got {len(v)}")
        for i, value in enumerate(values):
            torch._check(
                least <= value < 2**30,
                lambda n=f"{name}[{i}]", v=value, at_least=least: (
                    f"{op}: {n} must lie in [{at_least}, {2**30}), got {v}"
                ),
            )
    shape = [input.shape[0], channels]
    for i, (step, pad, spread) in enumerate(zip(stride, padding, dilation, strict=True)):
        padded = input.shape[2 + i] + 2 * pad
        reach = spread * (weight.shape[2 + i] - 1) + 1
        torch._check(
            reach <= padded,
            lambda i=i, reach=reach, padded=padded: (
                f"{op}: weight reaches over {reach} elements along dimension {2 + i} "
                f"and must not reach over more than the padded input has, {padded}"
            ),
        )
        shape.append((padded - reach) // step + 1)
    return shape


def _check_grad(
    grad: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    op = "depthwise_conv2d_backward"
    shape = tuple(_output_shape(op, input, weight, stride, padding, dilation))
    torch._check(
        tuple(grad.shape) == shape,
        lambda: f"{op}: grad must have the shape of the output, {shape}, got {tuple(grad.shape)}",
    )
    check_same_dtype(op, "grad", grad, "input", input)


@torch.library.register_fake("stamp_fast::depthwise_conv2d")
def _(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    return new_empty(input, _output_shape("depthwise_conv2d", input, weight, stride, padding, dilation))


@torch.library.register_fake("stamp_fast::depthwise_conv2d_backward")
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    _check_grad(grad, input, weight, stride, padding, dilation)
    input_grad = new_empty(input, input.shape) if need[0] else input.new_empty(0)
    return input_grad, weight.new_empty(weight.shape if need[1] else 0)


# "default" serves the CPU, and every device without a native kernel. PyTorch's convolution takes no empty tensors.
@torch.library.impl("stamp_fast::depthwise_conv2d", "default")
def _(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    shape = _output_shape("depthwise_conv2d", input, weight, stride, padding, dilation)
    if input.numel() == 0:
        return new_empty(input, shape).zero_()
    output = torch.conv2d(input, weight, None, stride, padding, dilation, groups=input.shape[1])
    return output.contiguous(memory_format=memory_format(input))


@torch.library.impl("stamp_fast::depthwise_conv2d_backward", "default")
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    _check_grad(grad, input, weight, stride, padding, dilation)
    if input.numel() == 0:
        grads = [new_empty(input, input.shape), weight.new_zeros(weight.shape)]
    else:
        grads = torch.ops.aten.convolution_backward(
            grad, input, weight, None, stride, padding, dilation, False, [0, 0], input.shape[1], [*need, False]
        )
    return (
        grads[0].contiguous(memory_format=memory_format(input)) if need[0] else input.new_empty(0),
        grads[1].contiguous() if need[1] else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    input, weight, *ctx.numbers = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx, grad: Tensor):
    need = list(ctx.needs_input_grad[:2])
    grads = torch.ops.stamp_fast.depthwise_conv2d_backward(grad, *ctx.saved_tensors, *ctx.numbers, need)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None, None


torch.library.register_autograd("stamp_fast::depthwise_conv2d", _backward, setup_context=_setup_context)
differentiable_once("depthwise_conv2d_backward")
