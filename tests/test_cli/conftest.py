"""A user's folder: a network of their own, a few images, loaders; and the commands run in it."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("torchvision")

from PIL import Image

from stamp_fast.cli import main

NETWORK = """
import os

import torch
from torch import nn

print("a user's module may print")


def make(width=8, num_classes=3, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes),
    )


net = make()
batches = [(torch.randn(8, 3, 12, 12), torch.arange(8) % 3) for _ in range(5)]
number = 5


def loader(count=5):
    return batches[:count]


def dataset():
    return torch.utils.data.TensorDataset(torch.randn(40, 3, 12, 12), torch.arange(40) % 3)


def weights():
    return make().state_dict()


def broken():
    raise RuntimeError("no such disc")


def leaves():
    raise SystemExit(0)


def noisy():
    os.system("echo something else prints")
    return make()


def once():
    yield from batches


class Named(torch.utils.data.TensorDataset):
    classes = ["red", "green", "blue", "none"]


def named():
    return Named(torch.randn(40, 3, 32, 32), torch.arange(40) % 4)


def held_out(kind):
    x, y = batches[0]
    return {
        "triples": [(x, y, y)], "too high": [(x, y + 3)], "floats": [(x, y.float())], "empty": [],
        "other images": [(x[:, :2], y)], "words": ["ab"], "no examples": [(x[:0], y[:0])], "once": iter(batches),
    }[kind]


def loss(model, batch):
    return model(batch[0]).square().mean()
"""


def write_images(folder: Path, count: int) -> None:
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 120, (14, 12, 3), dtype=torch.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "usernet.py").write_text(NETWORK)
    (folder / "needs.py").write_text("import a_library_that_is_not_there")
    write_images(folder / "pics", 10)
    write_images(folder / "parts" / "train", 6)
    write_images(folder / "parts" / "val", 2)
    (folder / "empty").mkdir()
    (folder / "single" / "cat").mkdir(parents=True)
    Image.new("RGB", (12, 12)).save(folder / "single" / "cat" / "0.png")
    path = list(sys.path)
    yield folder
    sys.path[:] = path
    for name in ("usernet", "needs"):
        sys.modules.pop(name, None)


@pytest.fixture
def stamp(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in the user's folder: stamp("inspect", "usernet:make")."""
    torch.set_num_threads(1)
    monkeypatch.chdir(user_folder)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(main, arguments, prog_name="stamp-fast")
        # Whatever happens, a user sees a message and an exit code.
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert not [name for name in os.listdir() if name.endswith(".tmp")]
        return result

    return run


@pytest.fixture
def answered(stamp: Callable[..., Result]) -> Callable[..., dict]:
    """The JSON that a command prints."""

    def run(*arguments: str) -> dict:
        result = stamp(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run
