"""Multiply-accumulates of the paper's search spaces (goldens of 2.7 in the notes on the paper: from its code)."""

import pytest
import torch

from stamp_fast.metapruning import SearchSpace, spaces


def space_of(make, **options) -> SearchSpace:
    arguments = make()
    for name in options.pop("without", ()):
        arguments.pop(name, None)
    return SearchSpace(**arguments, **options)


def test_mobilenet_v1():
    space = space_of(spaces.mobilenet_v1)
    classifier = 1024 * 1000
    assert len(space.genes) == 13
    assert space.largest.macs() / 1e6 == pytest.approx(568.7, abs=0.05)
    assert (space.largest.macs() - classifier) / 1e6 == pytest.approx(567.7, abs=0.05)


@pytest.mark.parametrize(("scale", "golden", "paper"), [(0.75, 325.7, 325), (0.5, 150.0, 149), (0.25, 41.8, 41)])
def test_uniform_mobilenet_v1(scale, golden, paper):
    space = space_of(spaces.mobilenet_v1, without=["keep"], scales=[scale, 1.0])
    macs = space.smallest.macs()
    assert int(macs / 1e6) == paper
    # The golden has the classifier of the widest network.
    assert (macs + (1 - scale) * 1024 * 1000) / 1e6 == pytest.approx(golden, abs=0.05)


def test_mobilenet_v2_has_a_gene_for_every_stage_and_middle():
    space = space_of(spaces.mobilenet_v2)
    assert len(space.genes) == 8 + 17
    small = space.smallest.build().eval()
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert small[17].body[6].out_channels == 44 and small[18][0].out_channels == 1280


def test_resnet50():
    space = space_of(spaces.resnet50)
    assert len(space.genes) == 20
    assert space.largest.macs() / 1e9 == pytest.approx(4.089, abs=0.0005)
    for ids, golden in (
        ([19, 9, 15, 13, 10, 9, 10, 6, 9, 13, 11, 12, 7, 18, 7, 13, 12, 10, 19, 18], 1.028),
        ([23, 17, 16, 17, 16, 16, 18, 20, 18, 25, 11, 29, 22, 18, 13, 27, 17, 23, 23, 20], 1.990),
    ):
        genome = space.genome(spaces.from_stages_and_middles(space, ids))
        assert genome.macs() / 1e9 == pytest.approx(golden, abs=0.0005)


@pytest.mark.parametrize(("scale", "golden"), [(0.75, 2.32), (0.5, 1.05)])
def test_uniform_resnet50(scale, golden):
    space = space_of(spaces.resnet50, without=["keep"], scales=[scale, 1.0])
    assert space.smallest.macs() / 1e9 == pytest.approx(golden, abs=0.005)


def test_a_genome_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter|longer"):
        spaces.from_stages_and_middles(space_of(spaces.resnet50), [0] * 19)
