"""Early pruning in a Lightning training. Needs `lightning`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from .early_pruner import EarlyPruner, cut_as_in


class EarlyPruning(pl.Callback):
    """Watches and cuts the module that is trained; checkpoints from before and after the cut resume.

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Weights are loaded before the callbacks' states, and need the network cut by then.
        load = pl_module.on_load_checkpoint

        def cut_first(checkpoint: dict[str, Any]) -> None:
            pl_module.__dict__.pop("on_load_checkpoint", None)
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state:
                cut_as_in(state, self._network(pl_module))
            load(checkpoint)

        pl_module.on_load_checkpoint = cut_first

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)
        self.pruner = EarlyPruner(trainer.strategy.model, trainer.optimizers, self.example, **self.options)
        if self._state:
            self.pruner.load_state_dict(self._state)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if optimizer is trainer.optimizers[0]:  # of several, the first stands for the step
            self.pruner.observe()  # gradients are unscaled by now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pruner.epoch_end()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        return pl_module.get_submodule(self.options.get("inside", ""))
