"""Checkpoints of a training of our own: where it is, and what it is a training of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._files import opened, real_path, write
from .errors import CheckpointError


class Run:
    """A training that can be interrupted.

    Args:
        path: of its checkpoint; None keeps none.
        writer: the function that trains, for messages.
        schedule: all that decides what it computes, as JSON can hold it.
        sources: tensors that it learns from, by what they are called; a checkpoint of others is refused.
        architecture: of what is trained.
        difference: what another architecture has that this one has not; "" where they are the same.
    """

    def __init__(
        self,
        path: Any,
        writer: str,
        schedule: dict[str, Any],
        sources: dict[str, list[torch.Tensor]],
        architecture: str,
        difference: Callable[[str], str],
    ) -> None:
        self.path = None if path is None else real_path(path)
        self.writer = writer
        self.schedule = json.loads(json.dumps(schedule))
        self.sources = {} if path is None else {name: digest(tensors) for name, tensors in sources.items()}
        self.architecture, self.difference = architecture, difference

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """Writes the checkpoint, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.path is None:
            return
        stored = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            stored |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        metadata = {"schedule": json.dumps(self.schedule), "architecture": self.architecture}
        metadata |= {"updates": str(updates), **self.sources}
        write({name: tensor.contiguous() for name, tensor in stored.items()}, metadata, self.path)

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Brings both to where the checkpoint is; updates that are done already, 0 where there is no checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another network, schedule or data set.
        """
        if self.path is None or not os.path.exists(self.path):
            return 0
        keys = {"schedule", "architecture", "updates", *self.sources}
        with opened(self.path, keys, self.writer) as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        what = self.writer.rpartition(".")[2]
        other = self.difference(metadata["architecture"])
        if other:
            raise CheckpointError(f"{what}: '{self.path}' is for another network: it has {other}; use another file")
        theirs = json.loads(metadata["schedule"])
        differing = [key for key, value in theirs.items() if self.schedule.get(key) != value]
        differing += [key for key, value in self.sources.items() if metadata[key] != value]
        if differing:
            raise CheckpointError(f"{what}: '{self.path}' was made with other {', '.join(differing)}; use another file")
        stored = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
        try:
            module.load_state_dict(stored)
        except RuntimeError as error:
            raise CheckpointError(f"{what}: '{self.path}' does not fit this network: {error}") from error
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["updates"])


def digest(tensors: list[torch.Tensor]) -> str:
    """SHA-256 of their bytes, in this order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
