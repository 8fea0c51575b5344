"""Masked execution by hand: in the dense network, the weights that read a dead channel are zero."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stamp_fast import ChannelGraph


def kept_positions(graph: ChannelGraph, keep: Tensor) -> dict[str, list[Tensor]]:
    """Per parameter and buffer, by every name it has, a bool tensor for each dim: which positions stay."""
    positions = {}
    for slot in graph.slots:
        per_dim = [
            torch.ones(size, dtype=torch.bool) if axis is None else (axis < 0) | keep[axis.clamp(min=0)]
            for size, axis in zip(slot.tensor.shape, slot.axes, strict=True)
        ]
        for name, tensor in [
            *graph.model.named_parameters(remove_duplicate=False),
            *graph.model.named_buffers(remove_duplicate=False),
        ]:
            if tensor is slot.tensor:
                positions[name] = per_dim
    return positions


def with_zeroed_readers(model: nn.Module, positions: dict[str, list[Tensor]]) -> nn.Module:
    """A dense copy in which every convolution and linear layer ignores the input channels that do not stay.

    Right for networks in which only these layers sum over channels.
    """
    masked = copy.deepcopy(model)
    for name, module in masked.named_modules():
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        dim = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        stays = positions[f"{name}.weight"][dim]
        assert stays.numel() == module.weight.shape[dim]
        with torch.no_grad():
            module.weight.index_fill_(dim, (~stays).nonzero().flatten(), 0.0)
    return masked


def counted_macs(model: nn.Module, *inputs: Tensor) -> float:
    """Multiply-accumulates of one eval-mode forward, counted by PyTorch."""
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    model.train(training)
    return counter.get_total_flops() / 2
