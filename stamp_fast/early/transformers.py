"""Early pruning in a training by Hugging Face's Trainer. Needs `transformers`."""

from __future__ import annotations

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import CheckpointError
from .early_pruner import EarlyPruner, cut_as_in, part_of

_FILE = "early_pruner.json"


class EarlyPruning(TrainerCallback):
    """Watches and cuts the model that is trained::

        trainer = Trainer(model, arguments, train_dataset=dataset)
        pruning = EarlyPruning(trainer, images[:2], budget=Budget(macs=0.25), cap=10)
        trainer.add_callback(pruning)
        trainer.train()

    At the cut the best checkpoint so far is forgotten: it does not fit any more.

    To go on from a checkpoint call `pruning.resume(folder)` before `trainer.train(resume_from_checkpoint=folder)`.

    Args:
        trainer: whose model and optimizer it is.
        example: what a forward of the model takes (a dict for one by name), or of its part `inside`.
        options: of `EarlyPruner`.

    Attributes:
        pruner: the `EarlyPruner`, from the start of the training on.
    """

    def __init__(self, trainer: Trainer, example: Any, **options: Any) -> None:
        self.trainer, self.example, self.options = trainer, example, options
        self.pruner: EarlyPruner | None = None
        self._state: dict[str, Any] | None = None
        self._epochs: int | None = None  # whose end was seen

    def resume(self, folder: str | PathLike) -> None:
        """Takes what it had when the checkpoint was written; a model that was cut by then is cut now.

        Raises:
            CheckpointError: the checkpoint was written without this callback, or is of another model.
        """
        path = Path(folder) / _FILE
        try:
            found = json.loads(path.read_text())
            self._state, self._epochs = found["pruner"], found["epochs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"EarlyPruning: cannot read '{path}': {error}") from error
        cut_as_in(self._state, self._network(), self.options.get("ema"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        optimizer = self.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
        if self.pruner is not None and self.pruner.network is self._network():  # train again
            self._state = self.pruner.state_dict()
        model = self.trainer.model_wrapped
        self.pruner = EarlyPruner(model, optimizer, self.example, **self.options, state=self._state)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = math.floor(round(state.epoch or 0.0, 6))
        if self._epochs is not None and epoch > self._epochs:
            self._end_epoch(state)  # the checkpoint was written just before it
        self._epochs = epoch

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        scaler = self.trainer.accelerator.scaler
        unscaled = scaler is None or bool(args.max_grad_norm)  # clipping unscales
        self.pruner.observe(1.0 if unscaled else scaler.get_scale())

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_epoch(state)
        self._epochs = round(state.epoch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / _FILE).write_text(json.dumps({"pruner": self.pruner.state_dict(), "epochs": self._epochs}))

    def _end_epoch(self, state: TrainerState) -> None:
        if self.pruner.epoch_end():
            state.best_metric = state.best_model_checkpoint = None

    def _network(self) -> nn.Module:
        return part_of(self.trainer.model, self.options.get("inside", ""))
