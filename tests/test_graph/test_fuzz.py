"""Random networks (tests/fuzz), a few hundred; `python -m tests.fuzz` runs as many as you like."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from stamp_fast._load import graph_core
from stamp_fast.graph import _plan
from stamp_fast.graph._record import Ref
from tests.fuzz.__main__ import rules, shrink
from tests.fuzz.check import Failure, examine
from tests.fuzz.spec import KINDS, Block, Network, build
from tests.fuzz.strategies import networks, random_network


def test_composed_by_hypothesis():
    seen: Counter[str] = Counter()
    notes: Counter[str] = Counter()

    @settings(
        max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(networks())
    def every(spec: Network) -> None:
        result = examine(spec)
        seen[result.status] += 1
        notes.update(result.notes)

    every()
    # The comparison is not vacuous: most lose channels, which shows in the output, and nearly all can be compared.
    assert notes["the output did not move"] < 0.05 * notes["the output moved"]
    assert seen["equal"] > 0.7 * seen.total()
    assert seen["not comparable"] + seen["does not run dense"] < 0.05 * seen.total()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_block(kind: str):
    pruned = 0
    for seed in range(4):
        numbers = random_network(seed, 0).blocks[0].numbers
        inner = (Block("conv", (seed,)),)
        pruned += examine(Network((Block("conv"), Block(kind, numbers, inner)), seed=seed)).status == "equal"
    assert pruned


def test_a_network_is_its_description():
    spec = random_network(0, 7)
    again = eval(repr(spec), {"Network": Network, "Block": Block})
    one, other = build(spec), build(again)
    assert repr(one[0]) == repr(other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


# --- the fuzzer finds what is wrong ---
PLAIN = Network((Block("conv"), Block("batch_norm"), Block("conv")), seed=3)


def test_a_cut_of_the_wrong_channels_is_found(monkeypatch):
    """Another channel of the batch norm than of the convolution before it: every shape agrees."""
    make = _plan.make

    def wrong(graph, keep):
        plan = make(graph, keep)
        for i, slot in enumerate(graph.slots):
            for dim, index in enumerate(plan.kept[i]):
                if "batch_norm" in slot.name and index is not None:
                    plan.kept[i][dim] = (index + 1) % slot.tensor.shape[dim]
        return plan

    examine(PLAIN)
    monkeypatch.setattr(_plan, "make", wrong)
    with pytest.raises(Failure, match="mismatch"):
        examine(PLAIN)


def test_a_failure_is_shrunk(monkeypatch):
    def broken(self, x):
        if x.is_meta:
            raise RuntimeError("broken on meta tensors")
        return torch.sigmoid(x)

    monkeypatch.setattr(nn.SiLU, "forward", broken)
    spec = Network((Block("conv", (0, 0, 0, 0, 0, 3)), Block("norm"), Block("dense", (), (Block("conv"),))), seed=5)
    with pytest.raises(Failure, match="broken on meta tensors") as failure:
        examine(spec)
    small = shrink(spec, str(failure.value))
    assert [block.kind for block in small.blocks] == ["conv"] and small.blocks[0].numbers[5] == 3


def test_the_rule_table_is_read():
    assert {"convolution", "add", "pixel_shuffle", "native_layer_norm", "glu"} <= rules()


# --- records that no network makes ---
def core(shapes=((4, 3, 1, 1), (2, 3, 5, 5), (2, 4, 5, 5)), ops=None, slots=(True,), outputs=(2,), **options):
    if ops is None:
        ops = [("aten.convolution.default", (Ref(1), Ref(0), None, [1], [0], [1], False, [0], 1), [2])]
    options = {"pinned": [], "num_costed_ops": 1, "ref": Ref} | options
    return graph_core().ChannelGraph([list(s) for s in shapes], ops, list(slots), list(outputs), **options)


def cyclic() -> list:
    items: list = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    "hostile",
    [
        {"ops": [("aten.relu.default", (Ref(3),), [2])]},
        {"ops": [("aten.relu.default", (Ref(-1),), [2])]},
        {"ops": [("aten.relu.default", (Ref(2**70),), [2])]},
        {"ops": [("aten.cat.default", ([Ref(1), Ref(9)], 1), [2])]},
        {"ops": [("aten.relu.default", (Ref(1),), [7])]},
        {"ops": [("aten.relu.default", (Ref(1),), [-1])]},
        {"ops": [("aten.relu.default", (Ref(1),), [])]},
        {"ops": [("aten.cat.default", (cyclic(), 1), [2])]},
        {"shapes": [(4, -3, 1, 1), (2, 3, 5, 5), (2, 4, 5, 5)]},
        {"shapes": [(4, 3, 1, 1), (2**40, 2**40), (2, 4, 5, 5)]},
        {"shapes": [(2**30, 3), (2, 3, 5, 5), (2, 4, 5, 5)]},
        {"slots": [True] * 4},
        {"outputs": [3]},
        {"pinned": [1]},
        {"num_costed_ops": 2},
        {"num_costed_ops": -1},
        {"ties": [(0, 0, 9, 0)]},
        {"ties": [(0, 4, 0, 0)]},
        {"ties": [(0, 0, 1, 1)]},
    ],
    ids=lambda hostile: " ".join(f"{k} {v}" for k, v in hostile.items())[:60],
)
def test_hostile_record_is_refused(hostile):
    with pytest.raises(ValueError, match="channel graph"):
        core(**hostile)


@pytest.mark.parametrize(
    "operator",
    [
        ("aten.convolution.default", (Ref(1), Ref(0), None, [1], [0], [1], False, [0], 0)),
        ("aten.convolution.default", (Ref(1), Ref(0), None, [1], [0], [1], False, [0], 2**62)),
        ("aten.convolution.default", (Ref(1),)),
        ("aten.convolution.default", ()),
        ("aten.cat.default", (3, 1)),
        ("aten.cat.default", ([], 10**12)),
        ("aten.slice.Tensor", (Ref(1), 1, 2**62, 2**62, 1)),
        ("aten.select.int", (Ref(0), -9, 0)),
        ("aten.split.Tensor", (Ref(0), 0, 0)),
        ("aten.constant_pad_nd.default", (Ref(0), [0, 2**62], 0.0)),
        ("aten.view.default", (Ref(0), [-1])),
        ("aten.pixel_shuffle.default", (Ref(1), 2**40)),
        ("aten.native_group_norm.default", (Ref(1), Ref(0), None, 2, 3, 25, 0, 1e-5)),
        ("aten.sum.dim_IntList", (Ref(0), [99])),
        ("aten.permute.default", (Ref(0), [0, 1, 7])),
        ("aten.add.Tensor", (Ref(0), Ref(1))),
        ("no.name", (Ref(0),)),
        ("", (Ref(0),)),
    ],
    ids=lambda operator: f"{operator[0]} {operator[1]}"[:60],
)
def test_operator_that_does_not_fit_freezes(operator):
    """It may leave nothing to prune; it may not read what is not there."""
    graph = core(ops=[(*operator, [2])])
    assert not graph.groups
    assert any("unused" in reason or "operator" in reason or "meets" in reason for reason, _ in graph.events)
