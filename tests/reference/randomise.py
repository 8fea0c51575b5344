"""Networks whose outputs depend on every parameter, and choices of channels that differ by group."""

import torch
from torch import Tensor, nn

from stamp_fast import ChannelGraph


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter and statistic: zero-initialised ones make comparisons vacuous."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.copy_(0.5 + draw(parameter))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_((draw(parameter) - 0.5) * 2 * (3 / fan_in) ** 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                offset = 0.5 if name.endswith("var") else -0.5  # variances are positive
                buffer.copy_(draw(buffer) + offset)
    return model


def random_keep(graph: ChannelGraph, seed: int = 0) -> Tensor:
    """Keeps 30 to 80 percent of every prunable group, another share for each; removes at least one."""
    generator = torch.Generator().manual_seed(seed)
    keep = graph.all_kept()
    for group in graph.prunable:
        share = 0.3 + 0.5 * torch.rand((), generator=generator).item()
        count = min(max(1, round(group.num_classes * share)), group.num_classes - 1)
        if count:
            order = torch.randperm(group.num_classes, generator=generator)
            keep[group.classes.start + order[count:]] = False
    return keep


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; NaN counts as infinite."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float("inf") if bool(error.isnan()) else error.item()
