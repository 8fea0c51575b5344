"""The demo's network: a small residual network for 32x32 gray images, pretrained on rendered glyphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("glyph_resnet.safetensors")
GENERATOR = Path(__file__).with_name("glyph_generator.safetensors")


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class GlyphResNet(nn.Module):
    """Residual network over (N, 1, 32, 32) images in [0, 1], ink bright on a dark ground.

    Args:
        num_classes: Outputs of the head.
        widths: Channels of each stage; every stage after the first halves the resolution.
        depths: Basic blocks of each stage.
    """

    def __init__(
        self, num_classes: int, widths: Sequence[int] = (24, 48, 96), depths: Sequence[int] = (1, 2, 2)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


def pretrained(path: Path = WEIGHTS) -> tuple[GlyphResNet, dict[str, str]]:
    """The network with its glyph weights, and what the file says about them: classes, steps, accuracy, ..."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    model = GlyphResNet(len(metadata["classes"]))
    model.load_state_dict(state)  # copies the stored float16 into float32
    return model, metadata


def pretrained_for(num_classes: int, seed: int) -> GlyphResNet:
    """The pretrained network with a fresh, seeded head, in channels_last, the faster layout on a CPU."""
    model, _ = pretrained()
    generator = torch.Generator().manual_seed(seed)
    model.head = nn.Linear(model.head.in_features, num_classes)
    nn.init.normal_(model.head.weight, std=0.01, generator=generator)
    nn.init.zeros_(model.head.bias)
    return model.to(memory_format=torch.channels_last)
