"""The search spaces of the paper (arXiv 1903.10258 and its code): MobileNetV1, MobileNetV2 and ResNet-50, 224 x 224."""

from __future__ import annotations

import torch
from torch import nn

from .genome import SearchSpace

_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
_V2 = ((22, 1, 1), (33, 2, 2), (44, 3, 2), (88, 4, 2), (132, 3, 1), (224, 3, 2), (448, 1, 1))
_RESNET50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EXAMPLE = (2, 3, 224, 224)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type = nn.ReLU) -> list:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([act(inplace=True)] if act else [])]


class MobileNetV1(nn.Sequential):
    """A stem and 13 blocks of a depthwise and a pointwise convolution."""

    def __init__(self, classes: int = 1000) -> None:
        layers, channels = [nn.Sequential(*_unit(3, 32, 3, 2))], 32
        for out, stride in _V1:
            depthwise = _unit(channels, channels, 3, stride, groups=channels)
            layers.append(nn.Sequential(*depthwise, *_unit(channels, out, 1)))
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class _Residual(nn.Module):
    """y = body(x), plus x where the shapes allow it, or plus what a convolution makes of x."""

    def __init__(self, body: list, shortcut: list | None, act: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = None if shortcut is None else nn.Sequential(*shortcut)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.act(y if self.shortcut is None else y + self.shortcut(x))


class MobileNetV2(nn.Sequential):
    """Some 1.4 times as wide as usual; the first bottleneck has a 1 x 1 convolution too, as in the paper's code."""

    def __init__(self, classes: int = 1000) -> None:
        layers: list[nn.Module] = [nn.Sequential(*_unit(3, 44, 3, 2, act=nn.ReLU6))]
        channels = 44
        for stage, (out, blocks, stride) in enumerate(_V2):
            for block in range(blocks):
                mid, step = channels * (6 if stage else 1), stride if block == 0 else 1
                body = _unit(channels, mid, 1, act=nn.ReLU6)
                body += _unit(mid, mid, 3, step, groups=mid, act=nn.ReLU6) + _unit(mid, out, 1, act=None)
                layers.append(_Residual(body, [] if block else None, act=False))
                channels = out
        layers.append(nn.Sequential(*_unit(channels, 1280, 1, act=nn.ReLU6)))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


class ResNet50(nn.Sequential):
    """The stride is in the 3 x 3 convolution."""

    def __init__(self, classes: int = 1000) -> None:
        layers: list[nn.Module] = [nn.Sequential(*_unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))]
        channels = 64
        for mid, blocks, stride in _RESNET50:
            for block in range(blocks):
                step, out = stride if block == 0 else 1, 4 * mid
                body = _unit(channels, mid, 1) + _unit(mid, mid, 3, step) + _unit(mid, out, 1, act=None)
                shortcut = _unit(channels, out, 1, step, act=None) if block == 0 else []
                layers.append(_Residual(body, shortcut, act=True))
                channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def mobilenet_v1(classes: int = 1000) -> dict:
    """Arguments of `PruningNet` or `SearchSpace`: 13 genes, the widths of the stem and of all blocks but the last."""
    return {"model": MobileNetV1(classes), "example": torch.zeros(_EXAMPLE), "keep": ["13.3"]}


def mobilenet_v2(classes: int = 1000) -> dict:
    """25 genes: the widths of stem and stages, and of the middle of every bottleneck; the 1,280 before the end stay."""
    return {"model": MobileNetV2(classes), "example": torch.zeros(_EXAMPLE), "keep": ["18.0"]}


def resnet50(classes: int = 1000) -> dict:
    """20 genes: the widths of stem and stages 1 to 3, and one of every block, which both of its middles have."""
    model = ResNet50(classes)
    blocks = [str(i) for i, layer in enumerate(model) if isinstance(layer, _Residual)]
    tied = [[f"{block}.body.0", f"{block}.body.3"] for block in blocks]
    return {"model": model, "example": torch.zeros(_EXAMPLE), "keep": [f"{blocks[-3]}.body.6"], "tied": tied}


def from_stages_and_middles(space: SearchSpace, ids: list[int]) -> list[int]:
    """A genome in the order of the paper's code, [stem and stages, middles], in that of `space.genes`.

    Raises:
        ValueError: not as many as there are genes.
    """
    middles = [i for i, gene in enumerate(space.genes) if gene[0].name.endswith("body.0")]
    stages = [i for i in range(len(space.genes)) if i not in middles]
    places = dict(zip([*stages, *middles], ids, strict=True))
    return [places[i] for i in range(len(space.genes))]
