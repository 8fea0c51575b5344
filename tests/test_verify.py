"""A smaller network that computes something else is never handed over, and the group at fault is named."""

import copy
import math

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import randomise
from reference.state import Frozen
from torch import Tensor, nn
from torch.nn import functional as F

import stamp_fast
from stamp_fast import Budget, CompactionError
from stamp_fast import verify as verification
from stamp_fast.graph import _plan

BATCHES = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]


def with_wrong_cut(monkeypatch, parameter: str) -> None:
    """Two positions that stay change places in one parameter, and in nothing else of its group."""
    make = _plan.make

    def wrong(graph, keep):
        plan = make(graph, keep)
        slot = [s.name for s in graph.slots].index(parameter)
        if plan.kept[slot][0] is not None:
            plan.kept[slot][0] = plan.kept[slot][0].roll(1)
        return plan

    monkeypatch.setattr(_plan, "make", wrong)


@pytest.mark.parametrize(
    ("network", "parameter", "culprit", "method"),
    [
        (Plain, "conv1.weight", "conv1", "magnitude"),
        (Plain, "conv2.weight", "conv2", "stamp"),
        (Plain, "bn3.running_mean", "hidden", "magnitude"),
        (Residual, "stem.0.weight", "stem.0", "magnitude"),
        (Residual, "conv2.weight", "stem.0", "magnitude"),
        (Residual, "squeeze.bias", "squeeze", "magnitude"),
    ],
)
def test_wrong_cut_is_undone_and_named(monkeypatch, network, parameter, culprit, method):
    half = Budget(channels=0.5)
    torch.manual_seed(1)
    model = randomise(network()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        optimizer.step()
    with_wrong_cut(monkeypatch, parameter)
    calls = []
    masked_output = verification.masked_output
    monkeypatch.setattr(verification, "masked_output", lambda *args: calls.append(1) or masked_output(*args))
    before = Frozen(model, optimizer)
    with pytest.raises(CompactionError, match=f"'{culprit}': cut from .* differs") as error:
        stamp_fast.prune(
            model, BATCHES, budget=half, method=method, steps=2, optimizer=optimizer, seed=0, progress=False
        )
    before.assert_same(rng=False)
    groups = stamp_fast.trace(model, BATCHES[0][0]).groups
    assert groups[error.value.groups[0]].name == culprit
    # One before the cut, three to see that the dense network repeats itself, and a bisection.
    assert len(calls) <= 4 + math.ceil(math.log2(len(groups)))


def test_without_verification_a_wrong_cut_goes_through(monkeypatch):
    """What the argument is about: nothing else sees two channels that have changed places."""
    with_wrong_cut(monkeypatch, "conv2.weight")
    model = Plain()
    stamp_fast.prune(model, BATCHES, method="magnitude", verify=False, progress=False)
    report = stamp_fast.report(model)
    assert report.equality_error is None and "verify" not in report.seconds
    assert any("not compared" in note and "verify=False" in note for note in report.notes)


class Hidden(nn.Module):
    """Scales one of its layers by its width, through a constant that no operator takes as an argument."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if i == 0 else 16, 16, 3, padding=1) for i in range(6))
        self.head = nn.Linear(16, 10)
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if i == self.at:
                x = x * x.new_tensor(x.shape[1])
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_width_hidden_in_a_constant_is_named(at):
    model = Hidden(at)
    before = Frozen(model)
    with pytest.raises(CompactionError, match=rf"'layers\.{at}': cut from 16 to .*keep="):
        stamp_fast.prune(model, BATCHES, method="magnitude", progress=False)
    before.assert_same(rng=False)
    keep = [f"layers.{at}.bias"]
    stamp_fast.prune(model, BATCHES, method="magnitude", keep=keep, progress=False)
    report = stamp_fast.report(model)
    assert report.equality_error < 1e-5 and model.layers[at].out_channels == 16


class Jumps(nn.Module):
    """A rounding error decides which of two things it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return y + torch.sin(1e8 * y.detach())


@pytest.mark.parametrize("network", [Jumps, lambda: nn.Sequential(Jumps(), Random())], ids=["jumps", "random"])
def test_what_does_not_repeat_itself_is_not_compared(network):
    model = network()
    stamp_fast.prune(model, BATCHES, method="magnitude", progress=False)
    report = stamp_fast.report(model)
    assert report.equality_error is None and any("random, or its output jumps" in note for note in report.notes)
    assert report.macs_after / report.macs_before < 0.52, "cut all the same"
    body = model.body if isinstance(model, Jumps) else model[0].body
    assert body.out_channels == 8


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Picks(nn.Module):
    """Gives rows that score high, which may be none, as a detector does."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)
        self.least = least

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return [y[torch.nonzero(y.amax(1) > self.least).squeeze(1)]]


def test_a_loop_over_more_images_than_were_traced_is_compared():
    network = randomise(Plain()).eval()

    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images):
            return torch.cat([self.network(image[None]) for image in images])

    images = [torch.randn(1, 8, 8) for _ in range(5)]
    loader = [(images, torch.randint(10, (5,)))] * 2
    for method in ("magnitude", "stamp"):
        model = copy.deepcopy(Each())
        model.eval()
        stamp_fast.prune(
            model,
            loader,
            method=method,
            steps=1,
            loss_fn=lambda m, b: F.cross_entropy(m.eval()(b[0]), b[1]),
            progress=False,
        )
        report = stamp_fast.report(model)
        assert report.macs_after < 0.6 * report.macs_before
        assert report.equality_error is not None and report.equality_error < 1e-5


@pytest.mark.parametrize(("least", "compared"), [(-1e9, True), (1e9, False)])
def test_an_empty_output_is_no_proof(least, compared):
    model = Picks(least)
    loss = lambda m, b: F.cross_entropy(m.head(torch.relu(m.body(b[0])).mean((2, 3))), b[1])  # noqa: E731
    stamp_fast.prune(model, BATCHES, method="magnitude", loss_fn=loss, progress=False)
    report = stamp_fast.report(model)
    assert (report.equality_error is not None) is compared
    assert any("is empty" in note for note in report.notes) is not compared
