"""The errors stamp_fast raises. Each message names the layer or argument and the way out."""

__all__ = [
    "StampFastError",
    "ArgumentError",
    "LoaderError",
    "ModelError",
    "TraceError",
    "BudgetError",
    "CompactionError",
    "CheckpointError",
]


class StampFastError(Exception):
    """Base class of every error that stamp_fast raises on purpose."""


class ArgumentError(StampFastError, ValueError):
    """An argument has the wrong type or value."""


class LoaderError(StampFastError, ValueError):
    """The loader yields nothing, or batches that the model or the loss cannot take."""


class ModelError(StampFastError, ValueError):
    """The model is in a state that cannot be pruned: NaN weights, several devices, nothing to prune."""


class TraceError(StampFastError, RuntimeError):
    """The model's forward could not be recorded.

    Attributes:
        calls_done: how many operators ran before it failed.
        modules: names of the modules whose forwards were running, the innermost first.
    """

    def __init__(self, message: str, calls_done: int = 0, modules: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.calls_done = calls_done
        self.modules = modules


class BudgetError(StampFastError, ValueError):
    """The budget cannot be reached; the message says what can be."""


class CompactionError(StampFastError, RuntimeError):
    """The smaller network would not compute what was predicted; the model was left as it was.

    Attributes:
        groups: indices into ``graph.groups`` of the groups involved, to be kept in the next try.
        reason: why those groups have to be kept, with the source line.
    """

    def __init__(self, message: str, groups: tuple[int, ...] = (), reason: str = "") -> None:
        super().__init__(message)
        self.groups = groups
        self.reason = reason


class CheckpointError(StampFastError, RuntimeError):
    """A file cannot be written or read, is damaged or foreign, or does not fit the model, which was left as it was."""
