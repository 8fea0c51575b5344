"""Early pruning inside other people's training loops: it cuts, training goes on, and checkpoints resume."""

import pytest
import torch
from test_early_pruner import IMAGES, LABELS, QUARTER, Net
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stamp_fast import CheckpointError

OPTIONS = {"budget": QUARTER, "cap": 2}
EPOCHS = 4


def widths(model):
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


class TestLightning:
    pl = pytest.importorskip("lightning.pytorch")

    @pytest.fixture
    def module(self):
        class Module(self.pl.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = Net()

            def forward(self, x):
                return self.net(x)

            def training_step(self, batch, index):
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
                return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]

        return Module

    def fitted(self, module, folder, callbacks, epochs, checkpoint=None, **options):
        trainer = self.pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        model = module()
        trainer.fit(model, DataLoader(TensorDataset(IMAGES, LABELS), 8), ckpt_path=checkpoint)
        return trainer, model

    @pytest.mark.parametrize("inside", ["", "net"])
    def test_it_cuts(self, module, tmp_path, inside):
        from stamp_fast.early.lightning import EarlyPruning

        callback = EarlyPruning(IMAGES[:2], inside=inside, **OPTIONS)
        _, model = self.fitted(module, tmp_path, callback, EPOCHS, gradient_clip_val=1.0, accumulate_grad_batches=2)
        assert callback.pruner.cut_epoch == 2
        assert max(widths(model)) < 24

    @pytest.mark.parametrize("stop", [1, 3])
    def test_it_resumes(self, module, tmp_path, stop):
        from stamp_fast.early.lightning import EarlyPruning

        _, expected = self.fitted(module, tmp_path, EarlyPruning(IMAGES[:2], **OPTIONS), EPOCHS)
        trainer, _ = self.fitted(module, tmp_path, EarlyPruning(IMAGES[:2], **OPTIONS), stop)
        trainer.save_checkpoint(tmp_path / "checkpoint")
        callback = EarlyPruning(IMAGES[:2], **OPTIONS)
        _, found = self.fitted(module, tmp_path, callback, EPOCHS, tmp_path / "checkpoint")
        assert callback.pruner.cut_epoch == 2
        for value, other in zip(expected.state_dict().values(), found.state_dict().values(), strict=True):
            assert torch.equal(value, other)

    def test_it_is_made_once(self, module, tmp_path):
        """Another fit goes on, and a checkpoint of the cut network can be tested."""
        from stamp_fast.early.lightning import EarlyPruning

        callback = EarlyPruning(IMAGES[:2], **OPTIONS)
        trainer, model = self.fitted(module, tmp_path, callback, 3)
        trainer.save_checkpoint(tmp_path / "checkpoint")
        before = widths(model)
        trainer.fit_loop.max_epochs = 6
        trainer.fit(model, DataLoader(TensorDataset(IMAGES, LABELS), 8))
        assert widths(model) == before and callback.pruner.cut_epoch == 2
        model.test_step = model.training_step
        trainer.test(model, DataLoader(TensorDataset(IMAGES, LABELS), 8), ckpt_path=tmp_path / "checkpoint")
        assert widths(model) == before

    def test_an_average_that_lightning_keeps(self, module, tmp_path):
        from lightning.pytorch.callbacks import EMAWeightAveraging

        from stamp_fast.early.lightning import EarlyPruning

        callbacks = [EMAWeightAveraging(decay=0.9), EarlyPruning(IMAGES[:2], **OPTIONS)]
        _, model = self.fitted(module, tmp_path, callbacks, EPOCHS)
        assert max(widths(model)) < 24

    @pytest.mark.parametrize("stop", [1, 3])
    def test_an_average_is_cut_on_resuming(self, module, tmp_path, stop):
        from stamp_fast.early.lightning import EarlyPruning

        def callback():
            return EarlyPruning(IMAGES[:2], inside="net", ema=Net(), **OPTIONS)

        trainer, _ = self.fitted(module, tmp_path, callback(), stop)
        trainer.save_checkpoint(tmp_path / "checkpoint")
        resumed = callback()
        _, found = self.fitted(module, tmp_path, resumed, EPOCHS, tmp_path / "checkpoint")
        assert widths(resumed.options["ema"]) == widths(found)


class TestTransformers:
    transformers = pytest.importorskip("transformers")

    class Images(Dataset):
        def __len__(self):
            return len(IMAGES)

        def __getitem__(self, i):
            return {"pixel_values": IMAGES[i], "labels": LABELS[i]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()

        def forward(self, pixel_values, labels=None):
            logits = self.net(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def trainer(self, folder, epochs):
        arguments = self.transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        return self.transformers.Trainer(self.Model(), arguments, train_dataset=self.Images())

    def pruned(self, folder, epochs):
        from stamp_fast.early.transformers import EarlyPruning

        trainer = self.trainer(folder, epochs)
        callback = EarlyPruning(trainer, IMAGES[:2], inside="net", **OPTIONS)
        trainer.add_callback(callback)
        return trainer, callback

    def test_it_cuts_and_resumes(self, tmp_path):
        trainer, callback = self.pruned(tmp_path, EPOCHS)
        trainer.train()
        assert callback.pruner.cut_epoch == 2
        assert max(widths(trainer.model)) < 24
        for step in range(1, 2 * EPOCHS):  # of two an epoch: before the cut, at epochs' ends, after the cut
            again, resumed = self.pruned(tmp_path / "again", EPOCHS)
            folder = tmp_path / f"checkpoint-{step}"
            resumed.resume(folder)
            again.train(resume_from_checkpoint=str(folder))
            assert resumed.pruner.cut_epoch == 2
            assert resumed.pruner.history == callback.pruner.history
            found = again.model.state_dict()
            for name, value in trainer.model.state_dict().items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0)

    def test_it_is_made_once(self, tmp_path):
        trainer, callback = self.pruned(tmp_path, 3)
        trainer.train()
        before = widths(trainer.model)
        trainer.train()
        assert widths(trainer.model) == before and callback.pruner.cut_epoch == 2

    def test_a_checkpoint_without_it(self, tmp_path):
        _, callback = self.pruned(tmp_path, 1)
        with pytest.raises(CheckpointError, match="cannot read"):
            callback.resume(tmp_path)
