"""The report of one prune."""

from __future__ import annotations

import dataclasses
import json
import os

from .._files import real_path, write_text
from ..budget import Promise
from ..errors import ArgumentError
from .page import page
from .text import text

_DERIVED = (
    "prune_seconds",
    "epoch_seconds_before",
    "epoch_seconds_after",
    "break_even_steps",
    "break_even_epochs",
)


@dataclasses.dataclass(frozen=True)
class GroupVerdict:
    """What became of one group of channels.

    Attributes:
        name: the layer that emits the channels.
        channels: how many it had.
        kept: how many it has.
        verdict: "pruned" or "kept".
        reason: why it was kept; "" where it was pruned.
        layers: every layer whose output these channels are: they shrink together.
    """

    name: str
    channels: int
    kept: int
    verdict: str
    reason: str = ""
    layers: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """The ledger of one prune: what it cost, and what training cost before and costs from now on, on this machine.

    Times are of the first batch, dense and pruned network in turns; loading the data is in none of them. What could not
    be measured is None or empty, and `notes` says why.

    Attributes:
        method: how channels were scored.
        budget: what was asked by name: a fraction of the dense network, or an amount.
        macs_before, macs_after: multiply-accumulates of one example's forward.
        params_before, params_after: parameters.
        train_step_ms_before, train_step_ms_after: median of a training step (forward, backward, SGD), milliseconds;
            None where the model could not be copied.
        peak_memory_before, peak_memory_after: peak bytes of a training step: weights, gradients, momentum, activations
            and the batch; None likewise.
        seconds: wall time of each phase of the prune.
        equality_error: largest difference between the smaller network and the masked dense one, relative, before
            statistics were recalibrated.
        backends: by operator, the implementation that ran (`stamp_fast.config`).
        groups: a verdict for every group.
        notes: what the user should know.
        forward_ms_before, forward_ms_after: median of a forward in eval mode, milliseconds; None likewise, and where
            the model does not take in eval mode what it is trained with.
        layer_ms_before, layer_ms_after: milliseconds of a training step by layer, forward and backward, in the order of
            the forwards; then "(optimizer)" and "(other)": all between layers, and the loss. They add up to the step.
        steps_timed: training steps of each network that were timed.
        batch_size: examples in the batch that was timed; 0 where that is not known.
        steps_per_epoch: batches in a pass over the loader; None where it does not say.
        model: name of the network's class.
        machine: what the times depend on: device, threads, version of torch.
        promises: of a budget that is measured what was asked, what was measured after the cut, and why it is off by
            over 10 percent if it is.
    """

    method: str
    budget: dict[str, float | str]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    train_step_ms_before: float | None
    train_step_ms_after: float | None
    peak_memory_before: int | None
    peak_memory_after: int | None
    seconds: dict[str, float]
    equality_error: float | None
    backends: dict[str, str]
    groups: list[GroupVerdict]
    notes: list[str]
    forward_ms_before: float | None = None
    forward_ms_after: float | None = None
    layer_ms_before: dict[str, float] = dataclasses.field(default_factory=dict)
    layer_ms_after: dict[str, float] = dataclasses.field(default_factory=dict)
    steps_timed: int = 0
    batch_size: int = 0
    steps_per_epoch: int | None = None
    model: str = ""
    machine: str = ""
    promises: list[Promise] = dataclasses.field(default_factory=list)

    @property
    def prune_seconds(self) -> float:
        """Wall time of the whole prune, seconds, these measurements included."""
        return sum(self.seconds.values())

    @property
    def epoch_seconds_before(self) -> float | None:
        """Seconds that an epoch of the loader took in training steps; None where that was not measured."""
        return self._epoch_seconds(self.train_step_ms_before)

    @property
    def epoch_seconds_after(self) -> float | None:
        """Seconds that an epoch of the loader takes in training steps; None where that was not measured."""
        return self._epoch_seconds(self.train_step_ms_after)

    @property
    def break_even_steps(self) -> float | None:
        """Training steps until the time saved is that of the prune; None where nothing is saved or was measured."""
        if self.train_step_ms_before is None or self.train_step_ms_after is None:
            return None
        saved = self.train_step_ms_before - self.train_step_ms_after
        return 1000 * self.prune_seconds / saved if saved > 0 else None

    @property
    def break_even_epochs(self) -> float | None:
        """Epochs until the time saved is that of the prune; None likewise, and where the loader has no length."""
        if self.break_even_steps is None or not self.steps_per_epoch:
            return None
        return self.break_even_steps / self.steps_per_epoch

    def to_json(self) -> str:
        """The report as a JSON object: one key per attribute, then those that follow from them (break-even, epoch)."""
        return json.dumps(dataclasses.asdict(self) | {name: getattr(self, name) for name in _DERIVED}, indent=2)

    def to_html(self, path: str | os.PathLike) -> None:
        """Writes the report as one HTML page that needs nothing else: no scripts, fonts or images.

        Raises:
            ArgumentError: the file cannot be written.
        """
        file = real_path(path)
        try:
            write_text(file, page(self))
        except OSError as error:
            raise ArgumentError(f"to_html: path={str(path)!r} cannot be written: {error.strerror}") from error

    def __str__(self) -> str:
        return text(self)

    def _epoch_seconds(self, milliseconds: float | None) -> float | None:
        if milliseconds is None or self.steps_per_epoch is None:
            return None
        return self.steps_per_epoch * milliseconds / 1000
