import pytest
from torch import nn

from stamp_fast import trace

SHAPE = ("--shape", "3,12,12")


def test_it_shows_every_layer(stamp):
    result = stamp("inspect", "usernet:make", *SHAPE)
    assert result.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert set(rows) == {"0", "3", "8"}
    assert "yes" in rows["0"] and "yes" in rows["3"]
    assert "no: output of the model" in rows["8"]
    assert "2 of 3 groups" in result.stdout


def test_json_agrees_with_the_graph(answered, user_folder):
    found = answered("inspect", "usernet:make(width=12)", *SHAPE)
    import torch
    import usernet

    graph = trace(usernet.make(width=12), torch.zeros(2, 3, 12, 12))
    assert (found["macs"], found["params"]) == (graph.macs(), graph.params())
    assert 0 < found["least_macs"] < 0.1 * found["macs"]
    assert [(layer["name"], layer["channels"]) for layer in found["layers"]] == [("0", 12), ("3", 24), ("8", 3)]
    assert [layer["reason"] for layer in found["layers"]] == ["", "", "output of the model"]


def test_layers_of_one_group_have_widths_and_steps_of_their_own(answered):
    found = answered("inspect", "torchvision:resnet18(width_per_group=64)", "--classes", "5", "--shape", "3,32,32")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["layer1.0.conv2"]["group"] == layers["layer1.1.conv2"]["group"] == "conv1"
    assert layers["fc"]["channels"] == 5
    named = {name for name, module in _resnet().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert set(layers) == named


def _resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


@pytest.mark.parametrize("data", ["usernet:loader", "usernet:batches", "usernet:dataset", "pics"])
def test_data_says_what_the_network_takes(answered, data):
    found = answered("inspect", "usernet:net", data, *SHAPE)
    assert found["input_shape"] == [3, 12, 12]


def test_timm_knows_its_own_input(answered):
    pytest.importorskip("timm")
    found = answered("inspect", "timm:test_convnext", "--classes", "4")
    assert found["input_shape"] == [3, 160, 160]
    assert found["layers"][-1]["channels"] == 4


def test_long_reasons_stand_below_the_table_once(stamp):
    result = stamp("inspect", "torchvision:shufflenet_v2_x0_5", "--shape", "3,64,64")
    assert result.exit_code == 0
    assert result.stdout.count("all channels of the dimension depend on each other") == 1
    assert result.stdout.count("no, see (1)") > 1


def test_a_wrong_shape_names_the_way_out(stamp):
    result = stamp("inspect", "usernet:make", "--shape", "1,12,12")
    assert result.exit_code == 1
    assert "in module '0'" in result.stderr and "--shape C,H,W" in result.stderr
    assert "Traceback" not in result.stderr
