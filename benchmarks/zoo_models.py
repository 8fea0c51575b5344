"""The networks of the zoo: all of torchvision's, and from every file of timm the smallest of each kind."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection, optical_flow, segmentation, video

__all__ = ["ZooModel", "choose_timm", "zoo"]

_TORCHVISION = {
    "classification": torchvision.models,
    "segmentation": segmentation,
    "detection": detection,
    "video": video,
    "optical flow": optical_flow,
}
_TIMM_LIST = Path(__file__).parent / "zoo_timm.txt"
_MOST_PARAMETERS = 150_000_000
# Smallest first: the first that a network accepts is taken.
_SHAPES = {
    "segmentation": [(3, 128, 128)],
    "detection": [(3, 128, 128)],
    "video": [(3, 8, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224)],
    "optical flow": [(3, 128, 128)],
    "timm vision_transformer_sam": [(3, 256, 256)],
}
# Of how the network is built, where the default is too large: 1024 pixels.
_OPTIONS = {"timm vision_transformer_sam": {"img_size": 256}}


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One network by name; `family` is a task of torchvision or a file of timm."""

    family: str
    name: str

    def build(self) -> nn.Module:
        """The network with its initial weights, in eval mode."""
        if self.family.startswith("timm"):
            return timm.create_model(self.name, pretrained=False, **_OPTIONS.get(self.family, {})).eval()
        options: dict[str, Any] = {"weights": None}
        if self.family in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if self.name in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # minutes of scipy
        if self.family == "detection":
            # Random weights leave no box that is sure of itself.
            options["box_score_thresh" if "rcnn" in self.name else "score_thresh"] = 0.0
            if not self.name.startswith("ssd"):
                # Not the 800 pixels to which they scale their images by default.
                options.update(min_size=128, max_size=128)
        return torchvision.models.get_model(self.name, **options).eval()

    def shapes(self, model: nn.Module) -> list[tuple[int, ...]]:
        """Shapes of one input to try, the preferred one first."""
        if self.family in _SHAPES:
            return _SHAPES[self.family]
        if self.family == "classification":
            crop = torchvision.models.get_model_weights(self.name).DEFAULT.transforms().crop_size[0]
            crop = getattr(model, "image_size", crop)  # some weights are for other sizes than the default
            return [(3, side, side) for side in sorted({96, crop})]
        native = tuple(model.default_cfg["input_size"])
        if model.default_cfg.get("fixed_input_size"):
            return [native]
        return [(3, side, side) for side in sorted({min(128, native[-1]), native[-1]})]

    def inputs(self, shape: tuple[int, ...], batch: int, dtype: torch.dtype = torch.float32) -> tuple:
        """Positional arguments of a forward in eval mode: images in [0, 1]."""
        if self.family == "detection":
            return ([torch.rand(shape, dtype=dtype) for _ in range(batch)],)
        count = 2 if self.family == "optical flow" else 1
        return tuple(torch.rand(batch, *shape, dtype=dtype) for _ in range(count))

    def train_inputs(self, shape: tuple[int, ...], batch: int, dtype: torch.dtype = torch.float32) -> tuple:
        """Positional arguments of a forward in train mode; detectors want targets there."""
        inputs = self.inputs(shape, batch, dtype)
        if self.family != "detection":
            return inputs
        side = shape[-1]
        target = {
            "boxes": torch.tensor([[0.2, 0.2, 0.7, 0.8]], dtype=dtype) * side,
            "labels": torch.ones(1, dtype=torch.long),
            "masks": torch.ones(1, side, side, dtype=torch.uint8),
            "keypoints": torch.full((1, 17, 3), side / 2),
        }
        return (*inputs, [target] * batch)

    def comparable(self, output: Any) -> Any:
        """An output in eval mode, detections in an order that does not hang on the rounding of equal scores."""
        if self.family != "detection":
            return output
        weights = torch.tensor([1.0, 2.0, 3.0, 5.0]).sqrt()  # sums that are equal by chance are unlikely
        ordered = []
        for found in output:
            boxes = found["boxes"] @ weights.to(found["boxes"].dtype)
            order = (boxes + 7**0.5 * found["labels"] + 11**0.5 * found["scores"]).argsort()
            ordered.append({key: value[order] for key, value in found.items()})
        return ordered


def zoo() -> list[ZooModel]:
    """Every network of the sweep, in the order of the table."""
    models = []
    for family, module in _TORCHVISION.items():
        models += [ZooModel(family, name) for name in sorted(torchvision.models.list_models(module=module))]
    for line in _TIMM_LIST.read_text().split("\n"):
        family, _, names = line.partition(": ")
        models += [ZooModel(family, name) for name in names.split()]
    return models


def choose_timm() -> Iterator[str]:
    """Lines of `zoo_timm.txt`: of every file of timm the smallest network of each kind, and at least two.

    Two networks are of one kind if their names start with the same letters.
    """
    for module in timm.list_modules():
        sizes = {name: _parameters(name) for name in timm.list_models(module=module) if not name.startswith("test_")}
        names = sorted((size, name) for name, size in sizes.items() if 0 < size <= _MOST_PARAMETERS)
        kinds = {}
        for _, name in names:
            kinds.setdefault(re.match("[a-z]+", name)[0], name)
        chosen = list(kinds.values())
        chosen += [name for _, name in names if name not in chosen][: max(0, 2 - len(chosen))]
        if chosen:
            yield f"timm {module}: {' '.join(sorted(chosen))}"


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())
