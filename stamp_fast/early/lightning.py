"""Early pruning in a Lightning training. Needs `lightning`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from .early_pruner import EarlyPruner, cut_as_in, part_of


class EarlyPruning(pl.Callback):
    """Watches and cuts the module that is trained; checkpoints from before and after the cut resume.

    At the cut `ModelCheckpoint` forgets which checkpoint was the best: one from before does not fit any more. An
    average that another callback keeps (`WeightAveraging`) is cut along.

    Args:
        example: what a forward of the module takes, or of its part `inside`.
        options: of `EarlyPruner`.

    Attributes:
        pruner: the `EarlyPruner`, from the start of the training on.
    """

    def __init__(self, example: Any, **options: Any) -> None:
        self.example, self.options = example, options
        self.pruner: EarlyPruner | None = None
        self._state: dict[str, Any] | None = None
        self._epochs: int | None = None  # whose end was seen

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Weights are loaded before the callbacks' states, and need the network cut by then.
        load = type(pl_module).on_load_checkpoint

        def cut_first(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state:
                cut_as_in(state["pruner"], self._network(pl_module), self._average(trainer))
            load(pl_module, checkpoint)

        pl_module.on_load_checkpoint = cut_first

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = self._network(pl_module)
        if self.pruner is not None and self.pruner.network is network:  # fit again
            self._state = self.pruner.state_dict()
        own = {id(p) for p in network.parameters()}
        optimizers = [o for o in trainer.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        options = {**self.options, "ema": self._average(trainer), "state": self._state}
        self.pruner = EarlyPruner(trainer.strategy.model, optimizers, self.example, **options)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epochs is not None and trainer.current_epoch > self._epochs:
            self._end_epoch(trainer)  # the checkpoint was written just before it
        self._epochs = trainer.current_epoch

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.pruner.optimizer and optimizer is self.pruner.optimizer[-1]:  # of several, the last ends the step
            self.pruner.observe()  # gradients are unscaled by now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer)
        self._epochs = trainer.current_epoch + 1

    def state_dict(self) -> dict[str, Any]:
        state = self._state if self.pruner is None else self.pruner.state_dict()
        return {} if state is None else {"pruner": state, "epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._state, self._epochs = state_dict["pruner"], state_dict["epochs"]

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        if self.pruner.epoch_end():
            for callback in trainer.callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.best_k_models.clear()
                    callback.best_model_path = callback.kth_best_model_path = ""
                    callback.best_model_score = callback.current_score = None

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        return part_of(pl_module, self.options.get("inside", ""))

    def _average(self, trainer: pl.Trainer) -> nn.Module | None:
        """Of the part that is cut: what was given, or what another callback keeps."""
        if "ema" in self.options:
            return self.options["ema"]
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                return self._network(average if isinstance(average, pl.LightningModule) else average.module)
        return None
