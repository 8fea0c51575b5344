"""Every group is pruned, or kept for a reason that is said; with strict=True few reasons are good enough."""

import pytest
import torch
from reference.networks import Plain
from reference.state import Frozen
from torch import Tensor, nn

import stamp_fast
from stamp_fast import Budget, ModelError


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]


def test_a_group_too_narrow_to_cut_says_so(loader):
    model = Plain(width=12)
    stamp_fast.prune(model, loader, method="magnitude", round_to=16, budget=Budget(macs=0.72), progress=False)
    rows = {row.name: row for row in stamp_fast.report(model).groups}
    assert rows["conv1"].verdict == "kept" and rows["conv1"].reason == "minimum width: 12 channels with round_to=16"
    assert rows["conv2"].verdict == "pruned" and rows["conv2"].kept == 16
    assert "12 channels with round_to=16" in str(stamp_fast.report(model))


def test_one_channel_cannot_be_cut(loader):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    stamp_fast.prune(model, loader, method="magnitude", budget=Budget(channels=0.5), progress=False)
    reasons = {row.name: row.reason for row in stamp_fast.report(model).groups}
    assert reasons == {"0": "minimum width: its one channel has to stay", "1": "", "3": "output of the model"}


def test_a_group_that_scores_high_says_so(loader):
    model = Plain()
    model.bn1.weight.data += 100.0
    stamp_fast.prune(model, loader, method="bn_scale", budget=Budget(macs=0.8), progress=False)
    reasons = {row.name: row.reason for row in stamp_fast.report(model).groups}
    assert reasons["conv1"] == "all its channels rank above the cut" and reasons["conv2"] == ""


class Fixed(nn.Module):
    """A literal size in its forward, an operator without a rule, an unused layer, and things that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.literal = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.sorted, self.unused = nn.Linear(12, 8), nn.Linear(3, 5)
        self.narrow, self.head = nn.Linear(8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.literal(torch.relu(self.free(x))).mean((2, 3)).view(-1, 12)
        h = torch.sort(self.sorted(h), dim=1).values
        return self.head(h * self.narrow(h))


def test_strict_lists_what_cannot_be_pruned_and_why(loader):
    model = Fixed().train()
    before = Frozen(model)
    with pytest.raises(ModelError, match="strict: 3 of 6 groups") as error:
        stamp_fast.prune(model, loader, method="magnitude", strict=True, progress=False)
    before.assert_same(rng=False)
    text = str(error.value)
    lines = {line.split("'")[1]: line for line in text.splitlines()[1:]}
    assert set(lines) == {"literal", "sorted", "unused"}
    assert (
        "(12 channels): its size is fixed in the forward" in lines["literal"]
        and "test_verdicts.py:" in lines["literal"]
    )
    assert "aten.sort" in lines["sorted"] and "test_verdicts.py:" in lines["sorted"]
    assert "Drop strict=True" in text and "keep=" in text


def test_strict_lets_pass_what_was_asked_for(loader):
    model = Fixed()
    keep = ["literal.bias", "sorted.bias", "unused"]  # the weights also read channels, which would stay as well
    stamp_fast.prune(model, loader, method="magnitude", keep=keep, strict=True, progress=False)
    assert model.free.out_channels < 16
    sound = Plain()
    stamp_fast.prune(sound, loader, method="magnitude", strict=True, progress=False)
    assert sound.conv2.out_channels < 48


def test_strict_settling(loader):
    graph = stamp_fast.trace(Fixed(), loader[0][0])
    with pytest.raises(ModelError, match="'literal'.*fixed in the forward"):
        graph.settle(strict=True)
    graph.settle()
    assert {g.name: g.reason is None for g in graph.groups} == {"free": True, "literal": False}
