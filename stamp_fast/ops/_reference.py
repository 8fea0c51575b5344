"""The operators in plain PyTorch: slow, obvious, and what tests and benchmarks hold the native code to."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_weights(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    """See `stamp_fast.ops.pack_weights`."""
    packed = []
    for tensor, row, col, scale in zip(tensors, rows, cols, scales, strict=True):
        if row is not None and row.numel():
            tensor = tensor[row]
        if col is not None and col.numel():
            tensor = tensor[:, col]
        if scale is not None and scale.numel():
            tensor = tensor * (scale if tensor.ndim == 1 else scale.view(1, -1, *[1] * (tensor.ndim - 2)))
        packed.append(tensor.clone(memory_format=torch.preserve_format))
    return packed


def pack_weights_backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with respect to `tensors` and `scales` (empty where there is no scale)."""
    tensor_grads, scale_grads = [], []
    for grad, tensor, row, col, scale in zip(grads, tensors, rows, cols, scales, strict=True):
        place = [
            index if index.numel() else torch.arange(n, device=tensor.device)
            for index, n in zip((row, col), tensor.shape, strict=False)
        ]
        if tensor.ndim > 1:
            place[0] = place[0][:, None]
        if scale.numel():
            scaled_dim = 0 if tensor.ndim == 1 else 1
            others = [dim for dim in range(tensor.ndim) if dim != scaled_dim]
            wide = torch.promote_types(tensor.dtype, torch.float32)
            product = grad.to(wide) * tensor[tuple(place)]
            scale_grads.append((product.sum(others) if others else product).to(scale.dtype))
            grad = grad * scale.view([-1 if dim == scaled_dim else 1 for dim in range(tensor.ndim)])
        else:
            scale_grads.append(scale.new_empty(0))
        tensor_grads.append(torch.zeros_like(tensor).index_put(place, grad))
    return tensor_grads, scale_grads


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    scale: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `stamp_fast.ops.masked_conv2d`."""
    weight = weight if rows is None else weight[rows]
    weight = weight if cols is None else weight[:, cols]
    weight = weight if scale is None else weight * scale.view(1, -1, 1, 1)
    if norm_scale is not None:
        normalised = input.to(norm_scale.dtype) * norm_scale.view(1, -1, 1, 1) + norm_shift.view(1, -1, 1, 1)
        input = normalised.relu().to(input.dtype)
    output = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = output if residual is None else output + residual
    if not statistics:
        return output, None
    wide = output.double()
    return output, torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])


def norm_relu(input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """See `stamp_fast.ops.norm_relu`."""
    value = input.to(scale.dtype) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return (value if residual is None else value + residual).relu().to(input.dtype)


def channel_saliency(activation: Tensor, gradient: Tensor, dim: int = 1) -> Tensor:
    """The rows of `stamp_fast.ops.ChannelSaliency`, stacked."""
    wide = torch.promote_types(activation.dtype, torch.float32)
    dim %= activation.ndim

    def view(tensor: Tensor) -> Tensor:
        tensor = tensor.to(wide).unsqueeze(-1)
        # Along dimension 0 there are no images to tell apart.
        return (tensor.movedim(dim, 1) if dim else tensor.unsqueeze(0)).flatten(2)

    a, g = view(activation), view(gradient)  # (images, channels, positions)
    images, _, positions = a.shape
    per_image = (a * g).sum(2)
    count = max(images * positions, 1)
    return torch.stack(
        [
            per_image.abs().sum(0),
            per_image.square().sum(0) / 2,
            a.sum((0, 2)) / count,
            (a == 0).sum((0, 2)).to(wide) / count,
        ]
    )


def depthwise_conv2d(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """See `stamp_fast.ops.depthwise_conv2d`; differentiable by PyTorch's own means."""
    channels, _, filter_height, filter_width = weight.shape
    padded = torch.nn.functional.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (padded.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    output = input.new_zeros(input.shape[0], channels, height, width)
    for j in range(filter_height):
        for i in range(filter_width):
            y, x = j * dilation[0], i * dilation[1]
            rows, columns = (
                slice(y, y + (height - 1) * stride[0] + 1, stride[0]),
                slice(x, x + (width - 1) * stride[1] + 1, stride[1]),
            )
            output = output + padded[:, :, rows, columns] * weight[:, 0, j, i].view(1, -1, 1, 1)
    return output
