"""Processes of torch.distributed that work on one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed


class Processes:
    """All of the default group; with one process nothing is sent. Both methods are collective.

    Attributes:
        rank, count: of this process, and of all.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, or the error that it raises, in all of them."""
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        if self.is_first:
            try:
                made = [make()]
            except Exception as error:
                made = [error]
        distributed.broadcast_object_list(made, 0)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def of_all(self, mine: Any) -> list[Any]:
        """What every process has."""
        found = [mine] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, mine)
        return found
