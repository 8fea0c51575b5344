"""Networks for 32 x 32 images; of the ResNet-18 every width is free: what one would write by hand for given widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "CifarMobileNet",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarVGG",
    "cifar_mobilenet",
    "cifar_mobilenet_v2",
    "cifar_resnet18",
    "cifar_vgg",
    "randomise",
    "widths_of",
]


class BasicBlock(nn.Module):
    def __init__(self, channels: int, inner: int, out: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if projects:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """3 x 3 stem, no max pool, stages of two basic blocks; all stages but the first halve the image."""

    def __init__(self, widths: Sequence[int], inner: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        channels = widths[0]
        for stage, out in enumerate(widths):
            first, second = inner[2 * stage : 2 * stage + 2]
            halves = stage > 0
            self.stages.append(
                nn.Sequential(
                    BasicBlock(channels, first, out, 2 if halves else 1, projects=halves),
                    BasicBlock(out, second, out, 1, projects=False),
                )
            )
            channels = out
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def cifar_resnet18(
    widths: Sequence[int] = (64, 128, 256, 512), inner: Sequence[int] | None = None, classes: int = 10
) -> CifarResNet:
    """ResNet-18 for (batch, 3, 32, 32) images.

    Args:
        widths: channels of each stage's residual stream; the first is the stem's too.
        inner: channels between the convolutions of each block, two per stage; default: those of the stream.
    """
    inner = [width for width in widths for _ in range(2)] if inner is None else inner
    if len(inner) != 2 * len(widths):
        raise ValueError(f"cifar_resnet18: expected {2 * len(widths)} inner widths, got {len(inner)}")
    return CifarResNet(widths, inner, classes)


class CifarVGG(nn.Module):
    """Eight 3 x 3 convolutions with batch norm, in pairs; each pair halves the image and the next is twice as wide."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for stage in range(4):
            for _ in range(2):
                out = width << stage
                self.features.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
                self.features.extend([nn.BatchNorm2d(out), nn.ReLU()])
                channels = out
            self.features.append(nn.MaxPool2d(2))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def cifar_vgg(width: int = 64, classes: int = 10) -> CifarVGG:
    """VGG-11-like network for (batch, 3, 32, 32) images; `width` channels in the first pair."""
    return CifarVGG(width, classes)


class SeparableConv(nn.Module):
    """A depthwise 3 x 3 convolution and a pointwise one, each with batch norm and ReLU."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class CifarMobileNet(nn.Module):
    """MobileNetV1 for 32 x 32 images: stem of stride 1, and three of its strides."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        channels = width
        for factor, stride in ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1)):
            self.blocks.append(SeparableConv(channels, factor * width, stride))
            channels = factor * width
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def cifar_mobilenet(width: int = 32, classes: int = 10) -> CifarMobileNet:
    """MobileNetV1 for (batch, 3, 32, 32) images, without its five blocks in a row."""
    return CifarMobileNet(width, classes)


class InvertedResidual(nn.Module):
    """A 1 x 1 convolution to `middle` channels, a depthwise 3 x 3 and a 1 x 1 back, with a shortcut where it fits."""

    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6())
        depthwise = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(middle), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(middle, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 for 32 x 32 images, with fewer blocks: three strides, expansion 6."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.blocks = nn.Sequential()
        channels = width
        for out, count, stride in ((1, 2, 1), (2, 2, 2), (4, 3, 2), (6, 2, 1)):
            for block in range(count):
                step = stride if block == 0 else 1
                self.blocks.append(InvertedResidual(channels, 6 * channels, out * width, step))
                channels = out * width
        self.last = nn.Sequential(nn.Conv2d(channels, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6())
        self.fc = nn.Linear(160, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.last(self.blocks(self.stem(x))).mean((2, 3)))


def cifar_mobilenet_v2(width: int = 16, classes: int = 10) -> CifarMobileNetV2:
    """MobileNetV2 for (batch, 3, 32, 32) images; `width` channels in stem and first stage."""
    return CifarMobileNetV2(width, classes)


def widths_of(model: CifarResNet) -> dict[str, list[int]]:
    """Arguments with which `cifar_resnet18` builds a network of the same widths."""
    blocks = [block for stage in model.stages for block in stage]
    return {
        "widths": [stage[-1].conv2.weight.shape[0] for stage in model.stages],
        "inner": [block.conv1.weight.shape[0] for block in blocks],
    }


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics, scales and biases of its own: at their initial values much would be
    equal by accident, such as a dead channel that contributes zero anyway.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = 0.7 + 0.6 * torch.rand((), generator=generator)
            module.weight.copy_(layer * uniform(module.weight, 0.5, 1.5))
            module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
    return model
