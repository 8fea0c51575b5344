"""What the accuracy experiments train on: images of 32 x 32.

Reference: glyphs of the fonts inside matplotlib. Targets that packages ship: Fashion-MNIST (Debian's
`dataset-fashion-mnist`) and scikit-learn's digits. With a folder, through torchvision: Fashion-MNIST, CIFAR-10,
CIFAR-100 and SVHN, which are downloaded into it, and any folder of images with train/ and test/ inside.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stamp_fast.demo import digits, glyphs

__all__ = ["CLASSES", "SHIPPED", "TARGETS", "batches", "reference", "target"]

CLASSES = 400  # of the reference
_COPIES = 4  # augmented copies of every glyph in every font
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@functools.cache
def reference(copies: int = _COPIES) -> TensorDataset:
    """Rendered glyphs, each in ten fonts and `copies` random poses: images (3, 32, 32) in [0, 1]."""
    images, labels = glyphs.posed(glyphs.choose_classes(CLASSES), copies)
    return TensorDataset(images.expand(-1, 3, -1, -1), labels)


def fashion(root: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Fashion-MNIST, padded to 32 x 32. `root`: a folder for torchvision, which downloads what is not there."""
    parts = []
    for train in (True, False):
        if root is None:
            name = "train" if train else "t10k"
            images = _idx(f"{name}-images-idx3-ubyte.gz", 16).view(-1, 28, 28)
            labels = _idx(f"{name}-labels-idx1-ubyte.gz", 8)
        else:
            from torchvision.datasets import FashionMNIST

            found = FashionMNIST(root, train=train, download=True)
            images, labels = found.data, found.targets
        images = F.pad(images[:, None].float() / 255, (2, 2, 2, 2))
        parts.append(TensorDataset(images.expand(-1, 3, -1, -1), labels.long()))
    return parts[0], parts[1]


def _idx(name: str, header: int) -> Tensor:
    """The bytes of one of the data set's files."""
    path = _DEBIAN / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: install Debian's dataset-fashion-mnist, or pass root=")
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header)


def handwritten(root: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits amid clutter; every training image in eight cluttered copies."""
    train, test = digits.datasets()
    images, labels = train.tensors
    scattered = digits.clutter(images.repeat(8, 1, 1, 1), torch.Generator().manual_seed(1))
    return (
        TensorDataset(scattered.expand(-1, 3, -1, -1), labels.repeat(8)),
        TensorDataset(test.tensors[0].expand(-1, 3, -1, -1), test.tensors[1]),
    )


def _torchvision(name: str, **parts: dict) -> Callable[[Path | None], tuple[TensorDataset, TensorDataset]]:
    def load(root: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
        if root is None:
            raise FileNotFoundError(f"{name}: is read through torchvision; pass root=, a folder for its files")
        from torchvision import datasets

        found = [getattr(datasets, name)(root, download=True, transform=_to_tensor, **part) for part in parts.values()]
        return tuple(map(_in_memory, found))

    return load


def image_folder(root: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """root/train/CLASS/*.png and root/test/CLASS/*.png, of any size: scaled to 32 x 32."""
    if root is None:
        raise FileNotFoundError("folder: pass root=, a folder with train/CLASS/ and test/CLASS/ inside")
    from torchvision.datasets import ImageFolder

    train, test = (ImageFolder(Path(root) / part, transform=_to_tensor) for part in ("train", "test"))
    if train.classes != test.classes:
        raise ValueError(f"{root}: train/ and test/ hold other classes: {set(train.classes) ^ set(test.classes)}")
    return _in_memory(train), _in_memory(test)


def _to_tensor(image: Any) -> Tensor:
    from torchvision.transforms import functional

    return functional.to_tensor(functional.resize(image.convert("RGB"), [32, 32]))


def _in_memory(dataset: Any) -> TensorDataset:
    images, labels = zip(*DataLoader(dataset, batch_size=500), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels).long())


TARGETS: dict[str, Callable[[Path | None], tuple[TensorDataset, TensorDataset]]] = {
    "fashion": fashion,
    "digits": handwritten,
    "cifar10": _torchvision("CIFAR10", train={"train": True}, test={"train": False}),
    "cifar100": _torchvision("CIFAR100", train={"train": True}, test={"train": False}),
    "svhn": _torchvision("SVHN", train={"split": "train"}, test={"split": "test"}),
    "folder": image_folder,
}
SHIPPED = ("fashion", "digits")  # those that need no download


@functools.cache
def target(name: str, root: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (3, 32, 32) with their labels.

    Args:
        root: a folder for the files, for what no package ships.
    """
    return TARGETS[name](root)


def batches(dataset: TensorDataset, size: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same shuffled batches for everyone who asks with the same seed."""
    images, labels = dataset.tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while len(order) < size * count:
        order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
    return [(images[part], labels[part]) for part in order[: size * count].split(size)]
