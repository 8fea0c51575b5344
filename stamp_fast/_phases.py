"""Progress and wall time of a job made of phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tqdm.auto import tqdm

_PHASES = 7


class Phases:
    """A progress bar (shown once a second has passed) and the seconds that each phase took.

    Args:
        progress: False shows nothing.
        steps: `advance` calls to expect besides the phases.
    """

    def __init__(self, progress: bool, steps: int) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = tqdm(total=_PHASES + steps, desc="prune", disable=not progress, delay=1.0, leave=False)

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase; one that is entered several times adds up."""
        self._bar.set_description(f"prune: {name}", refresh=False)
        begin = time.perf_counter()
        yield
        self._bar.update(name not in self.seconds)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or eval mode; each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = training
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
