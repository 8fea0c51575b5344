"""A sample of the zoo (benchmarks/zoo.py) in every test run: half the MACs, equal to the masked network, trains."""

import math

import pytest

from benchmarks.zoo import steps
from benchmarks.zoo_check import verdict
from benchmarks.zoo_models import ZooModel, zoo
from benchmarks.zoo_table import render


def of(name: str, family: str, failing: str | None = None):
    """A network that passes, or one that is known not to, with the reason; both are held to it."""
    marks = [pytest.mark.xfail(strict=True, reason=failing)] if failing else []
    return pytest.param(ZooModel(family, name), id=name, marks=marks)


SAMPLE = [
    of("mobilenet_v3_small", "classification"),  # depthwise, squeeze and excitation
    of("squeezenet1_1", "classification"),  # concatenation, a convolution as the head
    of("shufflenet_v2_x0_5", "classification"),  # channel shuffle and split
    of("skresnet18", "timm sknet"),  # attention over stacked branches
    of("cspresnet50", "timm cspnet"),  # a split at a width that the module keeps
    of("edgenext_xx_small", "timm edgenext"),  # convolution and attention over channels
    of("fasternet_t0", "timm fasternet"),  # convolution of a quarter of the channels
    of("ghostnet_050", "timm ghostnet"),  # cheap features concatenated
    of("convnext_zepto_rms", "timm convnext"),  # normalised over channels, LayerScale
    of("repvgg_a0", "timm byobnet"),  # parallel branches
    of("mixnet_s", "timm efficientnet"),  # splits at sizes kept in a list
    of("lambda_resnet26t", "timm byoanet"),  # lambda layers
    of("swin_t", "classification"),  # the residual stream and the heads of attention, coupled by their counts
    of("fasterrcnn_mobilenet_v3_large_320_fpn", "detection"),  # a list of images in, boxes out
]


@pytest.mark.parametrize("entry", SAMPLE)
def test_network_of_the_zoo(entry):
    record = {}
    for update in steps(entry):
        record.update(update)
    assert verdict(record) == ("pass", "")


def test_the_sample_is_of_the_zoo():
    assert {parameter.values[0] for parameter in SAMPLE} <= set(zoo())


GOOD = {"reached": 0.5, "moved": 0.3, "predicted": True, "equality": 1e-15, "dtype": "float64", "note": ""}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "pass"),
        ({"reached": 0.511}, "partial"),
        ({"reached": 0.48}, "partial"),
        ({"reached": 1.0}, "FAIL"),
        ({"moved": 1e-6}, "FAIL"),
        ({"predicted": False}, "FAIL"),
        ({"equality": 1e-8}, "FAIL"),
        ({"equality": 1e-8, "dtype": "float32"}, "pass"),
        ({"equality": math.nan}, "FAIL"),
        ({"error": "train: ValueError: no gradients"}, "FAIL"),
    ],
)
def test_verdict(change, expected):
    assert verdict(GOOD | change)[0] == expected


def test_table_shows_losses_as_plainly_as_wins():
    def record(name, seconds, peer, **more):
        known = GOOD | {"family": "timm a", "name": name, "groups": 3, "kept": 1, "reasons": {"r at a.py:1": 1}} | more
        known["verdict"], known["why"] = verdict(known)
        return known | {"ours": [seconds], "peer": peer}

    page = render(
        {"cpu": "c", "capability": "AVX2", "threads": 1, "cores": 2, "torch": "2", "packages": {}},
        [
            record("won", 0.1, {"verdict": "runs", "seconds": [0.4]}),
            record("lost", 0.2, {"verdict": "runs", "seconds": [0.1]}),
            record("broken", 0.2, {"verdict": "forward breaks", "seconds": [0.1]}),
            record("far", 0.1, {"verdict": "time-out"}, reached=0.7, note="out of reach"),
        ],
    )
    # Networks, pass, partial, FAIL; Torch-Pruning's; median ms; median ratio of those that run, and how many below 1.
    assert "| timm | 4 | 3 | 1 | 0 | 2 of 4 | 150 | 2.25 | 1 |" in page
    assert "| timm a | far | **partial** | out of reach | time-out |" in page
    assert "- smallest ratios of times: lost 0.5, won 4" in page
    assert "- Torch-Pruning forward breaks: 1 (broken)" in page
