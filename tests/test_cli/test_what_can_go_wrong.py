"""Files that must not be lost, data that cannot be used, functions that misbehave: said at once."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image

from stamp_fast.cli.options import as_options

QUICK = ("--shape", "3,12,12", "--batch-size", "8", "--method", "magnitude", "--budget", "macs=0.5")
TRAINED = (*QUICK, "--train-steps", "2", "--compare", "dense")


@pytest.fixture
def small(stamp, tmp_path) -> str:
    path = str(tmp_path / "small.safetensors")
    assert stamp("prune", "usernet:make", "pics", *QUICK, "--output", path).exit_code == 0
    return path


def test_nothing_that_is_read_is_written_over(stamp, small, tmp_path):
    before = Path(small).read_bytes()
    again = stamp("prune", small, "pics", *QUICK, "--into", "usernet:make", "--output", small)
    assert again.exit_code == 2 and "is MODEL's file too" in again.stderr
    state = tmp_path / "trained.pt"
    torch.save({}, state)
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--state", str(state), "--output", str(state))
    assert result.exit_code == 2 and "is --state's file too" in result.stderr
    page = str(tmp_path / "x")
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--output", page, "--html", page)
    assert result.exit_code == 2 and "is --output's file too" in result.stderr and not os.path.exists(page)
    assert Path(small).read_bytes() == before


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_what_is_no_ordinary_file_stays(stamp, tmp_path, option):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = stamp("prune", "usernet:make", "pics", *QUICK, option, str(pipe))
    assert result.exit_code == 2 and "is no ordinary file" in result.stderr
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_files_get_the_mode_that_the_user_asks_for(small):
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(os.stat(small).st_mode) == 0o666 & ~mask


def test_a_function_that_leaves_is_an_error(stamp):
    result = stamp("prune", "usernet:leaves", "pics", *QUICK)
    assert result.exit_code == 1 and "usernet:leaves raised SystemExit" in result.stderr


def test_what_other_programs_print_is_not_amid_the_json(answered, capfd):
    assert answered("inspect", "usernet:noisy", "--shape", "3,12,12")["class"] == "Sequential"
    found = capfd.readouterr()
    assert "something else prints" in found.err and "something else prints" not in found.out


@pytest.mark.parametrize(
    "kind, said",
    [
        ("triples", r"--val: bench measures accuracy and needs \(images, class indices\)"),
        ("words", r"--val: bench measures accuracy and needs \(images, class indices\)"),
        ("floats", r"--val: bench measures accuracy and needs \(images, class indices\)"),
        ("too high", "--val: labels are 3 to 5, and the network has 3 outputs"),
        ("other images", "--val: the network cannot take its images"),
        ("no examples", "--val: has no examples"),
        ("empty", "--val: loader: yields no batch"),
    ],
)
def test_bench_looks_at_what_it_evaluates_on_first(stamp, kind, said):
    result = stamp("bench", "usernet:make", "pics", *TRAINED, "--val", f"usernet:held_out(kind='{kind}')")
    assert result.exit_code == 1 and "made in" not in result.stderr
    assert re.search(said, result.stderr), result.stderr


def test_bench_needs_batches_more_than_once(stamp):
    for arguments in (("usernet:once",), ("pics", "--val", "usernet:held_out(kind='once')")):
        result = stamp("bench", "usernet:make", *arguments, *TRAINED)
        assert result.exit_code == 2 and "yields its batches once" in result.stderr


def test_numbers_that_are_none_are_null(stamp, monkeypatch):
    from stamp_fast.cli import arms

    monkeypatch.setattr(arms, "_judged", lambda network, batch: (1, float("nan")))
    result = stamp("bench", "usernet:make", "pics", *TRAINED, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["arms"]["dense"]["loss"] is None and found["recipe"]["batch_size"] == 8


def test_a_data_set_with_classes_says_how_many_outputs(answered, tmp_path):
    output = str(tmp_path / "small.safetensors")
    options = ("--method", "magnitude", "--budget", "macs=0.5", "--batch-size", "8", "--output", output)
    found = answered("prune", "torchvision:resnet18", "usernet:named", *options)
    assert "num_classes=4" in found["load"]


@pytest.fixture
def folders(user_folder, tmp_path) -> Path:
    """A class is called "train", and what is to evaluate on has another layout."""
    for name in ("train", "red"):
        shutil.copytree(user_folder / "pics" / "red", tmp_path / "veh" / name)
    shutil.copytree(user_folder / "parts", tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "val")
    shutil.copytree(user_folder / "pics" / "red", tmp_path / "parted" / "val")
    return tmp_path


def test_a_class_may_be_called_train(answered, folders):
    found = answered(
        "prune", "usernet:make(num_classes=2)", str(folders / "veh"), *QUICK, "--output", str(folders / "x")
    )
    assert found["output"] == str(folders / "x")


def test_only_bench_opens_what_it_evaluates_on(stamp, folders):
    data, output = str(folders / "parted"), str(folders / "x")
    assert stamp("prune", "usernet:make", data, *QUICK, "--output", output).exit_code == 0
    result = stamp("bench", "usernet:make", data, *TRAINED)
    assert result.exit_code == 1 and "CLASS" in result.stderr


def test_an_image_that_cannot_be_read_is_named(stamp, user_folder, tmp_path):
    shutil.copytree(user_folder / "pics", tmp_path / "pics")
    bad = tmp_path / "pics" / "red" / "0.png"
    Image.new("RGB", (64, 64)).save(bad)
    bad.write_bytes(bad.read_bytes()[:60])
    result = stamp("prune", "usernet:make", str(tmp_path / "pics"), *QUICK, "--output", str(tmp_path / "x"))
    assert result.exit_code == 1 and f"the image '{bad}' cannot be read" in result.stderr
    assert "remove or replace it" in result.stderr and not (tmp_path / "x").exists()


def test_a_generator_that_cannot_be_read_is_named(stamp, user_folder):
    options = ("--shape", "3,12,12", "--budget", "macs=0.5")
    result = stamp("prune", "usernet:make", "pics", *options, "--generator", "usernet.py")
    assert result.exit_code == 1 and "usernet.py" in result.stderr and "generator" in result.stderr


def test_errors_speak_of_options():
    said = as_options("pass loss_fn=, a function; force=True cuts all the same; add the layer to keep=.")
    assert "--loss" in said and "--force" in said and "--keep" in said and "loss_fn=" not in said


def test_the_demo_says_what_is_wrong_like_the_others(stamp, tmp_path):
    pytest.importorskip("sklearn")
    quick = ("--epochs", "1", "--train-images", "64", "--no-progress", "--method", "magnitude")
    (tmp_path / "file").write_text("")
    blocked = stamp("demo", *quick, "--output", str(tmp_path / "file" / "x.png"))
    assert blocked.exit_code == 1 and "File exists" in blocked.stderr
    result = stamp("demo", *quick, "--budget", "0.0001", "--output", str(tmp_path / "x.png"))
    assert result.exit_code == 1 and "out of reach" in result.stderr
