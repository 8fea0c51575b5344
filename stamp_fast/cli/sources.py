"""MODEL and DATA of the command line, made into networks and loaders."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split

import stamp_fast
from stamp_fast._phases import in_mode
from stamp_fast.data import logits_of
from stamp_fast.errors import ArgumentError, CheckpointError, LoaderError, ModelError

from .imports import call_text, called, imported, library, parsed, some, unknown

_LIBRARIES = ("torchvision", "timm")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HELD_OUT = 0.2  # of the data, where nothing says what to evaluate on


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """MODEL and its options, as given."""

    spec: str
    weights: str | None
    classes: int | None
    state: Path | None
    into: str | None


@dataclasses.dataclass(frozen=True)
class DataChoice:
    """DATA and its options, as given."""

    spec: str | None
    shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 2
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Images:
    """What a network expects: channels, height and width, and how its pixels (0 to 1) are normalised."""

    shape: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = _IMAGENET[0]
    std: tuple[float, ...] = _IMAGENET[1]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and where it came from.

    Attributes:
        images: what it expects, as far as that is known.
        code: an import and an expression that make the dense network, without weights.
        notes: what the user should know.
    """

    network: nn.Module
    images: Images
    code: tuple[str, str]
    notes: tuple[str, ...] = ()

    def load_code(self, path: Path) -> str:
        """Python that loads what `stamp_fast.save` has written."""
        made, expression = self.code
        return f"import stamp_fast, {made}\nmodel = stamp_fast.load(lambda: {expression}, {str(path)!r})"


# --- models -----------------------------------------------------------------------------------------------------------
def open_model(choice: ModelChoice, device: torch.device, classes: int | None = None) -> Model:
    """The network that MODEL and its options describe.

    Args:
        classes: how many the data has, where that is known: outputs of a library's network, unless --classes says.

    Raises:
        click.UsageError: there is no such module, function, network or file, or the options contradict each other.
        StampFastError: the function fails, or the weights are not of this network.
    """
    if choice.spec.endswith(".safetensors"):
        return _pruned(choice, device, classes)
    if choice.into is not None:
        raise click.UsageError(f"--into is for a MODEL that is a file written by `prune`, not for '{choice.spec}'")
    if choice.spec.endswith((".pt", ".pth", ".bin", ".ckpt")):
        raise click.UsageError(
            f"'{choice.spec}' holds weights, not a network: give the function that makes the network as MODEL, and "
            f"--state {choice.spec}"
        )
    make, code, images, pretrained = _factory(choice.spec, choice.classes, classes, choice.weights)
    if choice.weights is not None and choice.state is not None:
        raise click.UsageError("--weights and --state: give one of them")
    network, notes = make(), ()
    if choice.state is not None:
        notes = _fill(network, _state_dict(choice.state), str(choice.state))
    elif pretrained is not None:
        notes = _fill(network, _downloaded(pretrained, choice.weights), choice.weights)
    elif choice.spec.partition(":")[0] in _LIBRARIES and choice.weights is None:
        notes = ("the network has random weights; give --weights DEFAULT, or --state FILE",)
    return Model(network.to(device), images, code, notes)


def _pruned(choice: ModelChoice, device: torch.device, classes: int | None) -> Model:
    if not Path(choice.spec).is_file():
        raise click.BadParameter(f"there is no file '{choice.spec}'", param_hint="MODEL")
    if choice.into is None:
        raise click.UsageError(
            f"'{choice.spec}' holds weights and a plan; say which dense network it was made from: --into "
            "torchvision:resnet18, or --into mymodel:make"
        )
    if choice.weights is not None or choice.state is not None:
        raise click.UsageError(f"--weights, --state: '{choice.spec}' brings its own weights")
    make, code, images, _ = _factory(choice.into, choice.classes, classes, None)
    try:
        return Model(stamp_fast.load(make, choice.spec).to(device), images, code)
    except CheckpointError as error:
        library_made = choice.into.partition(":")[0] in _LIBRARIES and choice.classes is None
        hint = " If it has another number of outputs, say so with --classes." if library_made else ""
        raise CheckpointError(f"{error}. Is it from --into {choice.into}?{hint}") from error


def _factory(
    text: str, classes: int | None, data_classes: int | None, weights: str | None
) -> tuple[Callable[[], nn.Module], tuple[str, str], Images, Any]:
    """What makes the dense network, Python that does, what it expects, and torchvision's weights, not yet loaded."""
    module, name, options = parsed(text, "MODEL")
    if module in _LIBRARIES:
        if (classes or data_classes) is not None:
            options.setdefault("num_classes", classes or data_classes)
        return (_torchvision if module == "torchvision" else _timm)(text, name, options, weights)
    for option, value in (("--classes", classes), ("--weights", weights)):
        if value is not None:
            raise click.UsageError(
                f"{option} is for networks of torchvision and timm; write {text.partition('(')[0]}(num_classes=10), "
                "or what your function calls it"
            )
    found = imported(module, name, "MODEL")

    def make() -> nn.Module:
        network = copy.deepcopy(found) if isinstance(found, nn.Module) else called(found, options, text, "MODEL")
        if not isinstance(network, nn.Module):
            hint = "; weights alone are given with --state" if isinstance(network, dict) else ""
            raise ModelError(f"MODEL: {text} gave {type(network).__name__}, expected a torch.nn.Module{hint}")
        return network

    expression = f"{module}.{name}" if isinstance(found, nn.Module) else call_text(f"{module}.{name}", options)
    return make, (module, expression), Images(), None


def _torchvision(text: str, name: str, options: dict, weights: str | None) -> tuple:
    models = library("torchvision", "torchvision.models")
    if name not in models.list_models():
        raise click.BadParameter(unknown(name, "torchvision", models.list_models()), param_hint="MODEL")
    images, found = Images(), None
    if weights is not None:
        known = models.get_model_weights(name)
        if weights not in ["DEFAULT", *known.__members__]:
            raise click.BadParameter(
                unknown(weights, f"weights of {name}", ["DEFAULT", *known.__members__]), param_hint="--weights"
            )
        found = known[weights] if weights != "DEFAULT" else known.DEFAULT
        preset = found.transforms()
        if hasattr(preset, "crop_size"):
            side = preset.crop_size[0]
            images = Images((3, side, side), tuple(preset.mean), tuple(preset.std))
        if name in ("googlenet", "inception_v3"):  # what the library itself does for its weights of these two
            options.setdefault("transform_input", True)
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:  # or it downloads them unasked
        options.setdefault("weights_backbone", None)
    call = {"weights": None, **options}
    code = call_text("torchvision.models.get_model", options, name)
    return lambda: called(builder, call, text, "MODEL"), ("torchvision", code), images, found


def _timm(text: str, name: str, options: dict, weights: str | None) -> tuple:
    timm = library("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise click.BadParameter(unknown(name, "timm", timm.list_models()), param_hint="MODEL")
    if weights not in (None, "DEFAULT"):
        name = f"{name.partition('.')[0]}.{weights}"
        if name not in timm.list_pretrained():
            tags = [m for m in timm.list_pretrained() if m.partition(".")[0] == name.partition(".")[0]]
            raise click.BadParameter(unknown(name, "timm's pretrained networks", tags), param_hint="--weights")
    expected = timm.get_pretrained_cfg(name)
    images = Images() if expected is None else Images(expected.input_size, expected.mean, expected.std)
    call = {"model_name": name, "pretrained": weights is not None, **options}
    code = call_text("timm.create_model", options, name)
    return lambda: called(timm.create_model, call, text, "MODEL"), ("timm", code), images, None


def _downloaded(weights: Any, name: str) -> dict[str, torch.Tensor]:
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # of the network, the cache, the hash
        raise ModelError(
            f"--weights {name}: cannot be fetched from {weights.url}: {error}; get the file another way and give it "
            "with --state"
        ) from error


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"--state {path}: cannot be read as a state_dict ({type(error).__name__}). Nothing in a file is executed: "
            "write it with torch.save(model.state_dict(), ...), or with safetensors"
        ) from error
    for key in ("state_dict", "model"):  # as trainers wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"--state {path}: holds {type(state).__name__}, expected a state_dict")
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _fill(network: nn.Module, state: dict[str, torch.Tensor], name: str) -> tuple[str, ...]:
    """Loads weights; those of a head for other classes are left out, and that is noted."""
    own = network.state_dict()
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    sizes = {(own[key].shape[:1], state[key].shape[:1]) for key in other}
    if other and (len(sizes) > 1 or any(own[key].shape[1:] != state[key].shape[1:] for key in other)):
        key = other[0]
        raise ModelError(
            f"{name}: '{key}' is {tuple(state[key].shape)} there and {tuple(own[key].shape)} in the network, and "
            f"{len(other)} tensors differ in all: the weights are of another network (a pruned one is loaded as MODEL)"
        )
    found = network.load_state_dict({key: value for key, value in state.items() if key not in other}, strict=False)
    missing = [key for key in found.missing_keys if key not in other]
    if missing or found.unexpected_keys:
        raise ModelError(
            f"{name}: is of another network: {len(missing)} tensors are missing ({some(missing)}), "
            f"{len(found.unexpected_keys)} are not the network's ({some(found.unexpected_keys)})"
        )
    if not other:
        return ()
    (new,), (old,) = sizes.pop()
    return (f"{', '.join(other)}: {name} has {old} outputs and the network {new}, so these start from random values",)


# --- data -------------------------------------------------------------------------------------------------------------
class Data:
    """A folder of images in torchvision's ImageFolder layout, or a user's data set, loader or list of batches.

    Raises:
        click.UsageError: there is no such folder, module or name.
        StampFastError: there are no images in the folder, or the user's function fails.
    """

    def __init__(self, choice: DataChoice, val: str | None = None, evaluates: bool = False) -> None:
        """
        Args:
            val: what is evaluated on, as it was given.
            evaluates: whether DATA/val is, where nothing was given.
        """
        self.choice = choice
        text = choice.spec or ""
        self._folders: list[Any] = []
        self.classes: list[str] | None = None  # of a folder
        whole = Path(text) / "train"
        parted = whole.is_dir() and any(child.is_dir() for child in whole.iterdir())  # else it is a class of that name
        what = "--val"
        if evaluates and val is None and parted and (Path(text) / "val").is_dir():
            val, what = str(Path(text) / "val"), "DATA/val"
        self.train = self._opened(str(whole) if parted else text, "DATA")
        self.val = None if val is None else self._opened(val, what)
        self.val_name = val

    @property
    def outputs(self) -> int | None:
        """How many a library's network needs, where the data says: of a folder, or a data set with `classes`."""
        classes = self.classes
        for part in (self.train, getattr(self.train, "dataset", None)):
            classes = classes or getattr(part, "classes", None)
        return len(classes) if isinstance(classes, (list, tuple)) and classes else None

    def _opened(self, text: str, what: str) -> Any:
        if not Path(text).is_dir():
            return _importable(text, what)
        folder = _folder(Path(text))
        if self.classes is not None and folder.classes != self.classes:
            differ = sorted(set(self.classes) ^ set(folder.classes))
            raise LoaderError(
                f"{what}: the classes of '{text}' are not those of '{self.train.root}'; only in one of them: "
                f"{some(differ)}"
            )
        self.classes = folder.classes
        self._folders.append(folder)
        return folder

    def prepare(self, images: Images) -> Images:
        """Tells folders what the network expects, and returns that, the user's options seen to."""
        channels = (self.choice.shape or images.shape)[0]
        mean, std = self.choice.mean or images.mean, self.choice.std or images.std
        if channels == 1:
            mean, std = ((sum(values) / len(values),) for values in (mean, std))
        images = Images(self.choice.shape or images.shape, mean, std)
        for part in self._folders:
            part.transform = _transform(images)
        return images

    def loader(self, part: Any, shuffle: bool) -> Iterable[Any]:
        """Batches of a data set; what yields batches is handed through."""
        if not isinstance(part, Dataset):
            return part
        size = None if isinstance(part, IterableDataset) else len(part)
        return DataLoader(
            part,
            self.choice.batch_size,
            shuffle=shuffle and size is not None,
            num_workers=self.choice.workers,
            # A last batch of one example stops batch norm.
            drop_last=shuffle and size is not None and size > self.choice.batch_size,
            persistent_workers=self.choice.workers > 0,
        )

    def split(self) -> str:
        """Sees to it that there is something to evaluate on that nothing is learned from; says what it is."""
        for what, part in (("DATA", self.train), ("--val", self.val)):
            if hasattr(part, "__next__"):
                raise click.UsageError(
                    f"{what}: yields its batches once, and bench goes through them many times: give a DataLoader, a "
                    "Dataset or a list"
                )
        if self.val is not None:
            return f"evaluated on {self.val_name}"
        if isinstance(self.train, (list, tuple)) and len(self.train) > 1:
            count = max(1, round(_HELD_OUT * len(self.train)))
            self.train, self.val = self.train[:-count], self.train[-count:]
            return f"evaluated on the last {count} of {count + len(self.train)} batches, which nothing learns from"
        if isinstance(self.train, Dataset) and not isinstance(self.train, IterableDataset) and len(self.train) > 1:
            total = len(self.train)
            fixed, count = torch.Generator().manual_seed(0), max(1, round(_HELD_OUT * total))
            self.train, self.val = random_split(self.train, [total - count, count], generator=fixed)
            return f"evaluated on {len(self.val)} of {total} examples, drawn by seed 0, which nothing learns from"
        raise click.UsageError("--val: say what to evaluate on: a folder, or another loader, mydata:val_loader")

    def notes(self, images: Images) -> list[str]:
        """What is made of the images in folders."""
        made = f"resized and cropped to {'x'.join(map(str, images.shape))}, mean {_numbers(images.mean)}, "
        made += f"std {_numbers(images.std)}"
        return [f"{f.root}: {len(f)} images of {len(f.classes)} classes, {made}" for f in self._folders]

    def check_outputs(self, model: Model, shape: tuple[int, ...]) -> None:
        """Raises ModelError where the network has not one output for each class of a folder."""
        if self.classes is None:
            return
        device = next(model.network.parameters(), torch.empty(0)).device
        try:
            with torch.no_grad(), in_mode(model.network, training=False):
                outputs = logits_of(model.network(torch.zeros(2, *shape, device=device)))
        except Exception as error:
            raise ModelError(
                f"MODEL: cannot take images of {'x'.join(map(str, shape))}: {type(error).__name__}: {error}; say with "
                "--shape C,H,W what it takes"
            ) from error
        if outputs.dim() == 2 and outputs.shape[1] != len(self.classes):
            raise ModelError(
                f"MODEL: has {outputs.shape[1]} outputs, and {self.choice.spec} has {len(self.classes)} classes "
                f"({some(self.classes)}); give it one output for each, by --classes {len(self.classes)} for a network "
                f"of torchvision or timm, by an option of your own function: mymodel:make(num_classes="
                f"{len(self.classes)})"
            )


def _folder(path: Path) -> Any:
    datasets = library("torchvision", "torchvision.datasets")
    layout = f"the layout is {path}/CLASS/IMAGE.png or {path.parent if path.name == 'train' else path}/train/CLASS/..."
    try:
        found = datasets.ImageFolder(str(path), loader=_read_image)
    except FileNotFoundError as error:
        raise LoaderError(f"DATA: {error}; {layout}") from error
    if len(found.classes) < 2:
        raise LoaderError(f"DATA: '{path}' has a single class, '{found.classes[0]}'; {layout}")
    return found


def _read_image(path: str) -> Any:
    """
    Raises:
        LoaderError: it cannot be read, and which one that is.
    """
    try:
        return library("torchvision", "torchvision.datasets.folder").default_loader(path)
    except OSError as error:
        raise LoaderError(f"DATA: the image '{path}' cannot be read ({error}); remove or replace it") from error


def _transform(images: Images) -> Callable:
    transforms = library("torchvision", "torchvision.transforms")
    channels, height, width = images.shape
    if channels not in (1, 3) or len(images.mean) != channels or len(images.std) != channels:
        raise ArgumentError(
            f"--shape, --mean, --std: images have 1 or 3 channels, and each a mean and a deviation; got {channels} "
            f"channels, {len(images.mean)} means, {len(images.std)} deviations"
        )
    from PIL import Image, ImageOps  # torchvision's reader of images needs it, too

    # As large as can be inside, the middle of it; an image of that size already stays as it is.
    fit = functools.partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BILINEAR)
    steps = [transforms.Grayscale()] if channels == 1 else []
    return transforms.Compose([*steps, fit, transforms.ToTensor(), transforms.Normalize(images.mean, images.std)])


def _importable(text: str, what: str) -> Any:
    if ":" not in text:
        raise click.BadParameter(
            f"there is no folder '{text}' in {os.getcwd()}; give a folder of images, or package.module:loader",
            param_hint=what,
        )
    module, name, options = parsed(text, what)
    found = imported(module, name, what)
    if isinstance(found, type) or not (hasattr(found, "__iter__") or isinstance(found, Dataset)):
        found = called(found, options, text, what)
    if not (hasattr(found, "__iter__") or isinstance(found, Dataset)):
        raise LoaderError(f"{what}: {text} gave {type(found).__name__}, expected a DataLoader, a Dataset or batches")
    return found


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
