"""scikit-learn's handwritten digits amid clutter, at the demo network's size: what the demo fine-tunes on.

Upright and alone, these digits are too easy to tell two networks apart: a pretrained one gets 99% of them
right after a few seconds. So every image shows a small digit in a random pose among fragments of others.
Training batches are drawn anew each time, the test images once, always in the same way.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

NUM_CLASSES = 10
SIZE = 32
TEST_IMAGES = 500
TEST_COPIES = 2  # cluttered copies of every test image
FRAGMENTS = 6
FRAGMENT_SIZE = 8


def clutter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shrinks and poses every digit at random and scatters fragments of the others, and noise, over it.

    Args:
        images: (N, 1, 32, 32) float in [0, 1].
        generator: Source of all randomness.

    Returns:
        Images of the same shape and range.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    # The matrix maps output to input coordinates, so a scale above 1 makes the digit smaller.
    angle, shear, scale = uniform(-0.35, 0.35), uniform(-0.3, 0.3), uniform(1.3, 1.7)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = (
        torch.stack([cos, shear - sin, scale * uniform(-0.35, 0.35)], 1),
        torch.stack([sin, cos, scale * uniform(-0.35, 0.35)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    posed = F.grid_sample(images, grid, align_corners=False) * uniform(0.6, 1.0).view(n, 1, 1, 1)

    pixels = torch.arange(SIZE)
    out = posed
    for _ in range(FRAGMENTS):
        shift = torch.randint(SIZE, (2,), generator=generator).tolist()
        donors = posed[torch.randperm(n, generator=generator)].roll(shift, (2, 3))
        x, y = uniform(0, SIZE), uniform(0, SIZE)
        row = (pixels - y[:, None]).abs() < FRAGMENT_SIZE / 2  # (N, 32)
        column = (pixels - x[:, None]).abs() < FRAGMENT_SIZE / 2
        out = torch.maximum(out, donors * (row[:, None, :, None] & column[:, None, None, :]))
    noise = torch.randn(out.shape, generator=generator) * uniform(0, 0.12).view(n, 1, 1, 1)
    return (out + noise).clamp(0, 1)


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """1,297 plain training images and 500 test images in two cluttered copies, always the same split.

    Images are (1, 32, 32) in [0, 1]. The training images get their clutter from `train_loader`.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    images = F.interpolate(images, SIZE, mode="bilinear", align_corners=False)
    targets = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(targets)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    test_images = clutter(images[test].repeat(TEST_COPIES, 1, 1, 1), torch.Generator().manual_seed(0))
    return (
        TensorDataset(images[train], targets[train]),
        TensorDataset(test_images, targets[test].repeat(TEST_COPIES)),
    )


def train_loader(dataset: TensorDataset, batch_size: int, seed: int) -> DataLoader:
    """Full, shuffled, cluttered batches; two loaders made with the same seed yield the same batches."""
    order = torch.Generator().manual_seed(seed)
    scatter = torch.Generator().manual_seed(seed)

    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, targets = default_collate(samples)
        return clutter(images, scatter), targets

    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, collate_fn=collate, generator=order)
