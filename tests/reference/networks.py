"""Small networks that have the parts real ones have."""

import torch
from torch import Tensor, nn

# No bias in front of a batch norm: its gradient in training is rounding noise, which Adam would blow up.


class Residual(nn.Module):
    """Stem, two residual blocks (one with a projection), squeeze-and-excitation, pooling, head."""

    def __init__(self, classes: int = 10, width: int = 8, inputs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, 3 * width, 1, stride=2)
        self.conv3 = nn.Conv2d(width, 3 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(3 * width)
        self.squeeze = nn.Linear(3 * width, width)
        self.excite = nn.Linear(width, 3 * width)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.project(x) + self.bn3(self.conv3(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


class Plain(nn.Module):
    """Two convolutions with batch norm, a linear layer over the flattened map, a head."""

    def __init__(self, classes: int = 10, width: int = 24, inputs: int = 1, side: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.hidden = nn.Linear(2 * width * (side // 4) ** 2, 20, bias=False)
        self.bn3 = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.head(torch.relu(self.bn3(self.hidden(x.flatten(1)))))
