import json
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stamp_fast import ArgumentError, Budget, BudgetError, ModelError
from stamp_fast.metapruning import SCALES, SearchSpace

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """A stem, a residual block and a head: the stem's width is the block's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(20, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(32, 20, 1, bias=False), nn.BatchNorm2d(20))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((x + self.down(self.up(x))).mean((2, 3)))


def space_of(**options) -> SearchSpace:
    torch.manual_seed(0)
    return SearchSpace(Net(), EXAMPLE, **options)


def test_scales_are_those_of_the_paper():
    assert len(SCALES) == 31
    assert [round(s, 2) for s in (*SCALES[:3], SCALES[-1])] == [0.10, 0.13, 0.16, 1.0]


def test_widths_are_rounded_down_and_equal_where_a_sum_is():
    space = space_of()
    genome = space.genome([3, 17])
    assert genome.widths() == {"stem.0": int(20 * 0.19), "up.0": int(32 * 0.61)}
    assert space.genome([0, 0]).widths() == {"stem.0": 2, "up.0": 3}
    assert space_of(scales=[0.01, 1]).smallest.widths() == {"stem.0": 1, "up.0": 1}
    assert space_of(round_to=8).genome([30, 15]).widths() == {"stem.0": 16, "up.0": 16}
    assert space_of(round_to=8).smallest.widths() == {"stem.0": 8, "up.0": 8}


def test_every_width_is_the_floor_of_its_share():
    """0.29 * 100 is 28.999999999999996."""
    model = nn.Sequential(nn.Conv2d(3, 100, 1), nn.ReLU(), nn.Conv2d(100, 4, 1))
    space = SearchSpace(model, EXAMPLE, scales=[n / 100 for n in range(1, 101)])
    assert [space.genome([i]).widths()["0"] for i in range(100)] == list(range(1, 101))


def test_costs_are_those_of_the_built_network():
    space = space_of()
    for seed in range(5):
        genome = space.random(random.Random(seed))
        model = genome.build()
        assert sum(p.numel() for p in model.parameters()) == genome.params()
        again = SearchSpace(model, EXAMPLE, scales=[1.0])
        assert again.largest.macs() == genome.macs()
        assert model.stem[0].out_channels == model.down[0].out_channels == genome.widths()["stem.0"]
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_a_built_network_has_fresh_weights_and_the_given_model_its_own():
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    space = SearchSpace(model, EXAMPLE)
    built = space.genome([10, 10]).build()
    assert not any(bool((p == 7.0).any()) for p in built.parameters())
    assert all(bool((p == 7.0).all()) for p in model.parameters())
    assert built.stem[1].weight.eq(1).all() and built.stem[1].bias.eq(0).all()
    assert model.stem[0].out_channels == 20

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 3.0)

    assert space.genome([10, 10]).build(init).up[0].weight.eq(3).all()
    assert all(p.requires_grad for p in built.parameters())


def test_groups_can_share_a_gene_or_stay():
    space = space_of(tied=[["up.0", "stem.0"]])
    assert len(space.genes) == 1
    assert space.genome([3]).widths() == {"stem.0": 3, "up.0": 6}
    space = space_of(keep=["stem.0"])
    assert space.smallest.widths() == {"up.0": 3}
    built = space.smallest.build()
    assert built.stem[0].out_channels == 20 and built.up[0].out_channels == 3


def test_the_widest_uniform_network_within_a_budget():
    space = space_of()
    budget = Budget(macs=0.4)
    genome = space.uniform(budget)
    assert len(set(genome.ids)) == 1
    assert budget.used(space.graph, genome.keep) <= 1
    wider = space.genome([genome.ids[0] + 1] * 2)
    assert budget.used(space.graph, wider.keep) > 1
    with pytest.raises(BudgetError, match="out of reach"):
        space.uniform(Budget(macs=0.001))


def test_genomes_go_through_json():
    space = space_of()
    genome = space.genome([4, 9])
    assert space.from_json(genome.to_json()) == genome
    with pytest.raises(ArgumentError, match="another search space"):
        space_of(scales=[s / 2 for s in SCALES[:-1]] + [1.0]).from_json(genome.to_json())
    for text in ("{", "[]", json.dumps({"ids": [1]}), json.dumps({"ids": "ab"})):
        with pytest.raises(ArgumentError):
            space.from_json(text)


def test_what_cannot_be_is_refused():
    space = space_of()
    for ids in ([1], [1, 2, 3], [0, 31], [0, -1], [0, 1.0], [True, 0]):
        with pytest.raises(ArgumentError, match="ids"):
            space.genome(ids)
    for scales in ([], [0.5], [0.5, 0.2, 1.0], [0.0, 1.0], [0.5, 0.5, 1.0]):
        with pytest.raises(ArgumentError, match="scales"):
            space_of(scales=scales)
    with pytest.raises(ArgumentError, match="there is no group stem; the groups are stem.0, up.0"):
        space_of(keep=["stem"])
    for tied in ([["stem.0", "nothing"]], [["stem.0"], ["stem.0", "up.0"]], ["stem.0"]):
        with pytest.raises(ArgumentError, match="tied"):
            space_of(tied=tied)
    with pytest.raises(ModelError, match="nothing to prune"):
        SearchSpace(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), EXAMPLE)


def test_groups_that_cannot_follow_are_left_out():
    class Literal(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(self.stem(x))
            x = x.reshape(x.shape[0], 32, -1).mean(2)  # 32 is written down
            return self.fc(self.down(x[:, :, None, None]).mean((2, 3)))

    space = SearchSpace(Literal(), EXAMPLE)
    assert "up.0" not in space.smallest.widths()
    assert space.smallest.build()(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_parametrized_layers_and_attention_get_fresh_weights():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1))
    built = SearchSpace(model, EXAMPLE).largest.build()
    assert not torch.equal(built[0].weight, model[0].weight)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2))
            return self.head(self.attention(x, x, x)[0].mean(1))

    fresh = SearchSpace(Attends(), EXAMPLE).largest.build()
    assert fresh.attention.out_proj.bias.eq(0).all() and fresh.attention.in_proj_bias.eq(0).all()


def test_widths_are_multiples_where_channels_go_together():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 4, 1))
    space = SearchSpace(model, EXAMPLE, round_to=8)
    found = {space.genome([i]).widths()["0"] for i in range(31)}
    assert found == {8, 16, 24, 32}
