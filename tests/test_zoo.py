"""A sample of the zoo (benchmarks/zoo.py) in every test run: half the MACs, equal to the masked network, trains."""

import pytest

from benchmarks.zoo import steps
from benchmarks.zoo_check import verdict
from benchmarks.zoo_models import ZooModel, zoo


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
    of("swin_t", "classification", "0.54 of the MACs: the residual stream is kept for the sizes of attention"),
    of("ssdlite320_mobilenet_v3_large", "detection", "an image of a list is taken for a batch"),
]


@pytest.mark.parametrize("entry", SAMPLE)
def test_network_of_the_zoo(entry):
    record = {}
    for update in steps(entry):
        record.update(update)
    assert verdict(record) == ("pass", "")


def test_the_sample_is_of_the_zoo():
    assert {parameter.values[0] for parameter in SAMPLE} <= set(zoo())
