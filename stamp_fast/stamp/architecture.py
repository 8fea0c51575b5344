"""Which network a generator is for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ..errors import CheckpointError
from ..graph import ChannelGraph


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What two networks have in common that differ in weights, in the size of their images or in their head.

    Attributes:
        model: name of the model's class.
        groups: (name, channels, classes) of every channel group, in order.
        operators: SHA-256 of the operators that a forward runs, with the modules that run them.
    """

    model: str
    groups: tuple[tuple[str, int, int], ...]
    operators: str

    @staticmethod
    def of(graph: ChannelGraph) -> Architecture:
        run = [(call.name, call.module) for call in graph.recording.calls]
        digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()
        groups = tuple((group.name, group.channels, group.num_classes) for group in graph.groups)
        return Architecture(type(graph.model).__name__, groups, digest)

    def difference(self, other: Architecture) -> str:
        """What another network has otherwise, in words; "" where a generator for this one fits it."""
        for mine, theirs in zip(self.groups, other.groups, strict=False):
            if mine != theirs:
                return f"'{mine[0]}' with {mine[2]} channel classes, where that has '{theirs[0]}' with {theirs[2]}"
        if len(self.groups) != len(other.groups):
            return f"{len(self.groups)} channel groups, where that has {len(other.groups)}"
        return "" if self.operators == other.operators else "other operators in its forward"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Architecture:
        """
        Raises:
            CheckpointError: not what `to_json` writes.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            groups = tuple((str(name), int(channels), int(classes)) for name, channels, classes in found["groups"])
            return Architecture(str(found["model"]), groups, str(found["operators"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"architecture: is not what a generator's file holds: {error}") from error
