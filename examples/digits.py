"""What the examples share and you have already: data, a small network, a training loop.

scikit-learn's handwritten digits come with the package, so that nothing is downloaded.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def loaders(size: int = 16, batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """1,297 training and 500 test images of 1 x size x size, with their classes."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    dataset = TensorDataset(images, torch.from_numpy(digits.target).long())
    train, test = torch.utils.data.random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(0)
    return DataLoader(train, batch_size, shuffle=True, drop_last=True, generator=order), DataLoader(test, 250)


class Net(nn.Sequential):
    """Four convolutions with batch norm, and a linear head."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for out, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float = 0.05) -> nn.Module:
    """SGD with momentum; the learning rate rises over the first tenth and falls to zero."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * len(loader), pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Fraction of the images that the model gets right."""
    was_training = model.training
    model.eval()
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    model.train(was_training)
    return right / len(loader.dataset)


def parameters(model: nn.Module) -> int:
    """How many numbers the model has learned."""
    return sum(parameter.numel() for parameter in model.parameters())
