"""What a prune puts into its report's ledger."""

import pytest
import torch
from reference.networks import Plain, Residual
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import stamp_fast
from stamp_fast.report import PruneReport


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(count)]


def pruned(model: nn.Module, loader, **options) -> PruneReport:
    stamp_fast.prune(model, loader, method="magnitude", progress=False, **options)
    return stamp_fast.report(model)


def test_the_ledger_of_a_prune():
    model = Residual(width=16)
    report = pruned(model, batches())
    assert report.model == "Residual" and report.batch_size == 8 and report.steps_per_epoch == 3
    assert report.steps_timed >= 1 and torch.__version__ in report.machine and "thread" in report.machine
    assert report.forward_ms_before > 0 and report.forward_ms_after > 0
    assert list(report.layer_ms_before) == list(report.layer_ms_after), "the same layers, in the same order"
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    assert set(report.layer_ms_before) == leaves | {"(optimizer)", "(other)"}
    for times, step in (
        (report.layer_ms_before, report.train_step_ms_before),
        (report.layer_ms_after, report.train_step_ms_after),
    ):
        assert sum(times.values()) == pytest.approx(step) and min(times.values()) >= 0
    assert report.prune_seconds == sum(report.seconds.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_cannot_be_copied_is_pruned_all_the_same(tmp_path):
    class Holding(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (i for i in range(3))

    report = pruned(Holding(), batches())
    assert report.macs_after < report.macs_before
    assert report.train_step_ms_before is None and report.forward_ms_after is None and report.layer_ms_before == {}
    assert report.break_even_steps is None and report.epoch_seconds_after is None
    assert str(report).startswith("Training time was not measured") and "cannot be copied" in str(report)
    report.to_html(tmp_path / "page.html")
    assert "Training time was not measured" in (tmp_path / "page.html").read_text()


def test_loaders_that_do_not_say_their_length():
    class Silent:
        def __iter__(self):
            yield from batches()

        def __len__(self):
            raise NotImplementedError

    assert pruned(Plain(), Silent()).steps_per_epoch is None
    assert pruned(Plain(), iter(batches())).steps_per_epoch is None
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.randint(10, (20,)))
    assert pruned(Plain(), DataLoader(data, 8)).steps_per_epoch == 3


def test_a_forward_that_eval_mode_refuses_is_not_measured():
    class Picky(Plain):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            if not self.training and scale is not None:
                raise ValueError("scale is for training")
            return super().forward(x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], torch.ones(()) if model.training else None), batch[1])

    report = pruned(Picky(), batches(), loss_fn=loss)
    assert report.train_step_ms_after > 0 and report.forward_ms_before is None
    assert any("forward in eval mode was not measured" in n and "scale is for training" in n for n in report.notes)
    assert "not measured" in str(report)


def test_a_loss_that_mixes_positions_and_names():
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], flag=True), batch[1])

    class Flagged(Plain):
        def forward(self, x: Tensor, flag: bool = True) -> Tensor:
            return super().forward(x)

    report = pruned(Flagged(), batches(), loss_fn=loss, example=torch.randn(2, 1, 8, 8))
    assert report.forward_ms_before is None and any("eval mode was not measured" in note for note in report.notes)


def test_measuring_draws_no_random_numbers():
    """How often is a matter of time."""
    model = Plain()
    model.bn1 = nn.Sequential(model.bn1, nn.Dropout(0.5))
    data = batches()
    state = torch.get_rng_state()
    pruned(model, data)
    assert torch.equal(torch.get_rng_state(), state)
