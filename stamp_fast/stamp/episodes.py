"""Tasks for meta-training: small data sets cut out of a reference data set with labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from ..errors import ArgumentError, LoaderError


@dataclasses.dataclass(frozen=True)
class Episode:
    """One task: a class subset of the reference data.

    Attributes:
        support: (inputs, targets) of the set that the masks are made for; targets count from 0 within the task.
        query: (inputs, targets) of other examples of the same classes.
        classes: how many classes the task has.
    """

    support: tuple[Any, torch.Tensor]
    query: tuple[Any, torch.Tensor]
    classes: int

    def to(self, device: torch.device) -> Episode:
        """The same on a device."""
        moved = (
            tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, part)
            for part in (self.support, self.query)
        )
        return Episode(*moved, self.classes)


class Episodes:
    """Draws tasks from a map-style data set of (input, class index).

    Task i depends on the seed and i alone, so that a run can be resumed or spread over processes. Random transforms of
    the data set follow the same seed as far as they draw from torch.

    Args:
        dataset: with `__getitem__` and `__len__`.
        labels: int, [examples]; taken from the data set's `targets`, `labels` or `tensors` if not given, else from
            its examples.
        classes: fewest and most classes of a task.
        shots: examples of every class in the support set.
        queries: examples of every class in the query set.

    Raises:
        ArgumentError: no map-style data set, labels of another length, or too few classes with enough examples.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        labels: Sequence[int] | torch.Tensor | None = None,
        classes: tuple[int, int] = (5, 20),
        shots: int = 16,
        queries: int = 8,
    ) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(f"dataset: expected a map-style data set with a length, got {type(dataset).__name__}")
        self.dataset, self.seed, self.shots, self.queries = dataset, seed, shots, queries
        self.labels = _checked(_labels(dataset) if labels is None else labels)
        if len(self.labels) != len(dataset):
            raise ArgumentError(f"labels: {len(self.labels)} for a data set of {len(dataset)} examples")
        least = shots + queries
        found, counts = self.labels.unique(return_counts=True)
        self.by_class = [(self.labels == c).nonzero().flatten() for c in found[counts >= least]]
        self.classes = classes[0], min(classes[1], len(self.by_class))
        if classes[0] < 2 or self.classes[1] < classes[0]:
            raise ArgumentError(
                f"dataset: {len(self.by_class)} classes have the {least} examples that a task takes of each "
                f"(shots={shots}, queries={queries}), but classes={classes} asks for at least {max(2, classes[0])}"
            )

    def generator(self, index: int, stream: int) -> torch.Generator:
        """A source of randomness for task `index`; each stream is another one."""
        # torch's generator looks at the lower 32 bits of a seed only.
        mixed = np.random.SeedSequence([self.seed, index, stream]).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def __getitem__(self, index: int) -> Episode:
        generator = self.generator(index, 0)
        low, high = self.classes
        count = int(torch.randint(low, high + 1, (), generator=generator))
        chosen = torch.randperm(len(self.by_class), generator=generator)[:count].tolist()
        parts: tuple[list[int], list[int]] = [], []
        targets: tuple[list[int], list[int]] = [], []
        for target, c in enumerate(chosen):
            members = self.by_class[c]
            drawn = members[torch.randperm(len(members), generator=generator)[: self.shots + self.queries]].tolist()
            for part, goal, taken in zip(parts, targets, (drawn[: self.shots], drawn[self.shots :]), strict=True):
                part += taken
                goal += [target] * len(taken)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            support, query = (
                (self._inputs(part), torch.tensor(goal)) for part, goal in zip(parts, targets, strict=True)
            )
        return Episode(support, query, count)

    def _inputs(self, indices: list[int]) -> Any:
        try:
            return default_collate([self.dataset[i][0] for i in indices])
        except Exception as error:
            raise LoaderError(f"dataset: reading examples raised {type(error).__name__}: {error}") from error


def _checked(labels: Any) -> torch.Tensor:
    """Class indices, [examples]."""
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        values = None
    if values is None or values.dim() != 1 or values.is_floating_point() or values.is_complex():
        found = type(labels).__name__ if values is None else f"{values.dtype} {tuple(values.shape)}"
        raise ArgumentError(f"labels: expected class indices, one for each example, got {found}; pass labels=")
    return values.long().cpu()


def _labels(dataset: Any) -> Any:
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, Sized) and len(found) == len(dataset):
            return found
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[1]
    try:
        return [int(dataset[i][1]) for i in range(len(dataset))]
    except Exception as error:  # of the user's code
        raise ArgumentError(
            f"labels: the data set does not yield (input, class index) pairs ({type(error).__name__}: {error}); pass "
            "labels="
        ) from error
