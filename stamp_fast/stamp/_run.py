"""Checkpoints of a meta-training: where it is, and what it is a training of."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import nn

from .._files import opened, real_path, write
from ..errors import CheckpointError
from .architecture import Architecture
from .mask_generator import MaskGenerator


class Run:
    """A meta-training that can be interrupted.

    Args:
        path: of its checkpoint; None keeps none.
        schedule: all that decides what it computes, as JSON can hold it.
        network, labels: what it learns from; a checkpoint of others is refused.
    """

    def __init__(self, path: Any, schedule: dict[str, Any], network: nn.Module, labels: torch.Tensor) -> None:
        self.path = None if path is None else real_path(path)
        self.schedule = json.loads(json.dumps(schedule))
        self.sources = (
            {}
            if path is None
            else {
                "weights": _digest([t for _, t in sorted(network.state_dict().items())]),
                "labels": _digest([labels]),
            }
        )

    def save(self, generator: MaskGenerator, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """Writes the checkpoint, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.path is None:
            return
        stored = {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            stored |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        metadata = {"schedule": json.dumps(self.schedule), "architecture": generator.architecture.to_json()}
        metadata |= {"updates": str(updates), **self.sources}
        write({name: tensor.contiguous() for name, tensor in stored.items()}, metadata, self.path)

    def resume(self, generator: MaskGenerator, optimizer: torch.optim.Optimizer) -> int:
        """Brings both to where the checkpoint is; updates that are done already, 0 where there is no checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another network, schedule or data set.
        """
        if self.path is None or not os.path.exists(self.path):
            return 0
        keys = {"schedule", "architecture", "updates", *self.sources}
        with opened(self.path, keys, "stamp_fast.stamp.meta_train") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        other = Architecture.from_json(metadata["architecture"]).difference(generator.architecture)
        if other:
            raise CheckpointError(f"meta_train: '{self.path}' is for another network: it has {other}; use another file")
        theirs = json.loads(metadata["schedule"])
        differing = [key for key, value in theirs.items() if self.schedule.get(key) != value]
        differing += [key for key, value in self.sources.items() if metadata[key] != value]
        if differing:
            raise CheckpointError(
                f"meta_train: '{self.path}' was made with other {', '.join(differing)}; use another file"
            )
        generator.load_state_dict(
            {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
        )
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["updates"])


def _digest(tensors: list[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
