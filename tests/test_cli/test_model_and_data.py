import sys

import numpy
import pytest
import torch
from PIL import Image

from stamp_fast.cli.sources import Data, DataChoice, Images

INSPECT = ("inspect", "--shape", "3,12,12")


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        (("nomodule:make",), 2, "no module 'nomodule': neither a file nomodule.py in"),
        (("usernet:mak",), 2, "no 'mak' in module 'usernet'; did you mean make?"),
        (("usernet",), 2, "expected torchvision:NAME, timm:NAME, package.module:function"),
        (("usernet.py:make",), 2, "write usernet:make"),
        (("needs:make",), 1, "No module named 'a_library_that_is_not_there'"),
        (("usernet:weights",), 1, "usernet:weights gave OrderedDict, expected a torch.nn.Module; weights alone"),
        (("usernet:number",), 1, "usernet:number is int, expected a torch.nn.Module"),
        (("usernet:broken",), 1, "usernet:broken raised RuntimeError: no such disc"),
        (("usernet:make(depth=3)",), 1, "unexpected keyword argument 'depth'"),
        (("usernet:make(3)",), 2, "an option without a name"),
        (("usernet:make", "--classes", "4"), 2, "usernet:make(num_classes=10)"),
        (("usernet:make", "--weights", "DEFAULT"), 2, "--weights is for networks of torchvision and timm"),
        (("usernet:make", "--into", "usernet:make"), 2, "--into is for a MODEL that is a file"),
        (("torchvision:resnet19",), 2, "did you mean resnet18"),
        (("timm:test_convnex",), 2, "did you mean test_convnext"),
        (("torchvision:resnet18", "--weights", "V9"), 2, "no 'V9' in weights of resnet18"),
        (("weights.pt",), 2, "--state weights.pt"),
        (("nothing.safetensors", "--into", "usernet:make"), 2, "there is no file 'nothing.safetensors'"),
        (("usernet:make", "--device", "tpu"), 2, "cpu, cuda and cuda:1 are"),
        (("usernet:make", "--shape", "3x12"), 2, "e.g. 3,224,224, got '3x12'"),
    ],
)
def test_models_that_are_none(stamp, model, code, message):
    if model[0].startswith("timm"):
        pytest.importorskip("timm")
    result = stamp(*INSPECT, *model)
    assert (result.exit_code, "Traceback" in result.stderr) == (code, False)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        ("nofolder", 2, "there is no folder 'nofolder'"),
        ("empty", 1, "Couldn't find any class folder in empty"),
        ("single", 1, "a single class, 'cat'; the layout is single/CLASS/IMAGE.png"),
        ("usernet:nothing", 2, "there is no 'nothing' in module 'usernet'"),
        ("usernet:number", 1, "usernet:number is int, expected a DataLoader"),
        ("usernet:make", 0, ""),
    ],
)
def test_data_that_is_none(stamp, data, code, message):
    result = stamp("prune", "usernet:make", data, "--shape", "3,12,12", "--output", "out.safetensors")
    if data == "usernet:make":  # a network is iterable: prune's own check of the batches says so
        assert result.exit_code == 1 and result.stderr.startswith("Error: ")
        return
    assert (result.exit_code, "Traceback" in result.stderr) == (code, False)
    assert message in result.stderr


def test_a_head_for_other_classes_is_refused(stamp):
    result = stamp("prune", "usernet:make(num_classes=5)", "pics", "--shape", "3,12,12")
    assert result.exit_code == 1
    assert "has 5 outputs, and pics has 3 classes (blue, green, red)" in result.stderr
    assert "mymodel:make(num_classes=3)" in result.stderr


def test_a_file_for_another_network_is_refused(stamp, tmp_path):
    path = str(tmp_path / "small.safetensors")
    stamp("prune", "usernet:make", "usernet:loader", "--method", "random", "--output", path)
    assert "say which dense network" in stamp(*INSPECT, path).stderr
    result = stamp(*INSPECT, path, "--into", "usernet:make(width=12)")
    assert result.exit_code == 1
    assert "Is it from --into usernet:make(width=12)?" in result.stderr


def test_weights_of_another_network_are_refused(stamp, tmp_path):
    import usernet

    path = str(tmp_path / "weights.pt")
    torch.save(usernet.make(width=4).state_dict(), path)
    result = stamp(*INSPECT, "usernet:make", "--state", path)
    assert result.exit_code == 1 and "the weights are of another network" in result.stderr
    torch.save({"more": torch.ones(1), **usernet.make().state_dict()}, path)
    assert "1 are not the network's (more)" in stamp(*INSPECT, "usernet:make", "--state", path).stderr


def test_a_pickle_is_not_executed(stamp, tmp_path):
    class Trap:
        def __reduce__(self):
            return sys.exit, ()

    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    result = stamp(*INSPECT, "usernet:make", "--state", str(tmp_path / "trap.pt"))
    assert result.exit_code == 1 and "Nothing in a file is executed" in result.stderr


def test_pretrained_weights_that_cannot_be_fetched_are_one_line(stamp, monkeypatch):
    def offline(*unused, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    result = stamp(*INSPECT, "torchvision:resnet18", "--weights", "DEFAULT")
    assert result.exit_code == 1
    assert "no route to host" in result.stderr and "--state" in result.stderr


def test_pretrained_weights_are_those_of_the_library(stamp, monkeypatch):
    import torchvision

    fetched = []

    def state(url, *unused, **options):
        fetched.append(url)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", state)
    result = stamp(*INSPECT, "torchvision:resnet18", "--weights", "DEFAULT", "--classes", "5")
    assert result.exit_code == 0, result.stderr
    assert fetched == [torchvision.models.ResNet18_Weights.DEFAULT.url]


def test_debug_shows_where_it_came_from(user_folder, monkeypatch):
    from click.testing import CliRunner

    from stamp_fast.cli import main

    monkeypatch.chdir(user_folder)
    result = CliRunner().invoke(main, ["inspect", "usernet:broken", "--debug"])
    assert result.exit_code == 1
    assert str(result.exception.__cause__) == "no such disc"


def test_images_become_what_the_network_expects(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    data = Data(DataChoice("parts", shape=(1, 8, 8), batch_size=4), evaluates=True)
    images = data.prepare(Images())
    assert images.shape == (1, 8, 8) and len(images.mean) == 1
    inputs, labels = next(iter(data.loader(data.train, shuffle=True)))
    assert inputs.shape == (4, 1, 8, 8) and labels.dtype == torch.int64
    assert data.classes == ["blue", "green", "red"]
    assert data.split() == "evaluated on parts/val"
    same = Data(DataChoice("pics", shape=(3, 14, 12), mean=(0, 0, 0), std=(1, 1, 1)))
    same.prepare(Images())
    pixels = torch.from_numpy(numpy.array(Image.open("pics/blue/0.png"))).permute(2, 0, 1)
    assert torch.equal(same.train[0][0], pixels / 255)  # of that size already


def test_what_is_held_out_is_not_trained_on(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    data = Data(DataChoice("pics", shape=(3, 12, 12)))
    data.split()
    train, val = set(data.train.indices), set(data.val.indices)
    assert not train & val and len(train | val) == 30 and len(val) == 6
