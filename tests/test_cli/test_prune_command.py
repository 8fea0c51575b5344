import dataclasses
import json
from pathlib import Path

import pytest
import torch

import stamp_fast
from stamp_fast.cli import options
from stamp_fast.report import PruneReport

QUICK = ("--shape", "3,12,12", "--batch-size", "8", "--steps", "4", "--budget", "macs=0.5")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "small.safetensors")


@pytest.fixture
def seen(monkeypatch):
    """The model that the command saved, and its report."""
    kept = {}

    def save(model, path):
        kept["model"], kept["report"] = model, stamp_fast.report(model)
        original(model, path)

    original = stamp_fast.save
    monkeypatch.setattr(stamp_fast, "save", save)
    return kept


def test_the_file_holds_the_network_that_was_pruned(stamp, output, seen):
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--output", output)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    code = [line.strip() for line in lines[-2:]]
    namespace: dict = {}
    exec("\n".join(code), namespace)  # what it says about loading is true
    loaded, images = namespace["model"].eval(), torch.randn(4, 3, 12, 12)
    assert torch.equal(loaded(images), seen["model"].eval()(images))
    assert loaded[0].out_channels + loaded[3].out_channels < 24
    assert str(seen["report"]) in result.stdout
    assert "pics: 30 images of 3 classes, resized and cropped to 3x12x12" in result.stderr


def test_json_is_the_report_and_nothing_else(stamp, output, seen):
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--output", output, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    report = json.loads(seen["report"].to_json())
    assert (found["model"], found["class"]) == ("usernet:make", report.pop("model"))
    assert {name: found[name] for name in report} == report
    assert found["macs_after"] / found["macs_before"] == pytest.approx(0.5, rel=0.02)
    assert found["output"] == output and "stamp_fast.load(" in found["load"]
    assert "note" not in result.stderr


def test_the_seed_repeats_it(answered, tmp_path):
    states = []
    for seed in ("1", "1", "2"):
        path = str(tmp_path / f"{len(states)}.safetensors")
        answered("prune", "usernet:make", "pics", *QUICK, "--seed", seed, "--output", path)
        import usernet

        states.append(stamp_fast.load(usernet.make, path).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(states[0][name].shape != v.shape or not torch.equal(states[0][name], v) for name, v in states[2].items())


def test_a_library_network_gets_a_head_for_the_folder(answered, output, tmp_path):
    small = ("--shape", "3,32,32", "--batch-size", "8", "--method", "magnitude", "--budget", "macs=0.2")
    found = answered("prune", "torchvision:resnet18", "pics", *small, "--output", output)
    assert found["groups"][-1]["channels"] == 3
    again = ("inspect", output, "--into", "torchvision:resnet18", "--shape", "3,32,32")
    assert answered(*again, "--classes", "3")["macs"] == found["macs_after"]
    smaller = str(tmp_path / "smaller.safetensors")
    more = answered("prune", output, "pics", "--into", "torchvision:resnet18", *small, "--output", smaller)
    assert more["macs_before"] == found["macs_after"]


def test_state_is_loaded_and_a_head_for_other_classes_left_out(stamp, output, seen, tmp_path):
    import torchvision

    given = torchvision.models.resnet18(num_classes=7)
    state = {f"module.{name}": value for name, value in given.state_dict().items()}  # as a parallel trainer leaves it
    torch.save({"state_dict": state}, tmp_path / "given.pt")
    whole = ("--shape", "3,32,32", "--batch-size", "8", "--method", "random", "--budget", "macs=1", "--output")
    result = stamp("prune", "torchvision:resnet18", "pics", "--state", str(tmp_path / "given.pt"), *whole, output)
    assert result.exit_code == 0, result.stderr
    assert torch.equal(seen["model"].conv1.weight, given.conv1.weight)
    assert "fc.weight, fc.bias" in result.stderr and "has 7 outputs and the network 3" in result.stderr


@pytest.mark.parametrize("data", ["usernet:loader(count=3)", "usernet:dataset", "usernet:batches"])
def test_data_of_ones_own(stamp, output, data):
    arguments = ("--method", "taylor", "--keep", "0", "--round-to", "2", "--loss", "usernet:loss", "--output", output)
    result = stamp("prune", "usernet:make(width=32)", data, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    kept = {group["name"]: group for group in json.loads(result.stdout)["groups"]}
    assert kept["0"]["reason"] == "kept on request" and kept["3"]["kept"] % 2 == 0


def test_html_is_the_reports_own(stamp, output, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(PruneReport, "to_html", lambda self, path: written.append((self, path)), raising=False)
    page = tmp_path / "page.html"
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--output", output, "--html", str(page))
    assert result.exit_code == 0, result.stderr
    assert isinstance(written[0][0], PruneReport) and written[0][1] == page


def test_a_budget_takes_whatever_the_class_has_fields_for(monkeypatch):
    @dataclasses.dataclass
    class Budget:
        macs: float | None = None
        memory: float | str | None = None

    monkeypatch.setattr(options, "Budget", Budget)
    assert options._budget(None, None, ("memory=4GiB", "macs=0.5")) == Budget(0.5, "4GiB")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "macs=0.0001"), 1, "out of reach"),
        (("--budget", "speed=0.5"), 2, "one of macs, params"),
        (("--budget", "macs=0.5", "--budget", "macs=0.4"), 2, "macs is given twice"),
        (("--budget", "macs=2"), 2, "macs must be a fraction in (0, 1], got 2.0"),
        (("--keep", "conv9"), 1, "no module or parameter named 'conv9'"),
        (("--method", "guess"), 2, "'guess' is not one of"),
        (("--loss", "usernet:number"), 2, "expected a function"),
        (("--output", "nowhere/small.safetensors"), 2, "there is no folder"),
        (("--html", "nowhere/page.html"), 2, "there is no folder"),
    ],
)
def test_refusals(stamp, output, arguments, code, message):
    result = stamp("prune", "usernet:make", "pics", *QUICK[:-2], "--output", output, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout.strip() in ("", "a user's module may print")
    assert "Traceback" not in result.stderr
    assert not Path(output).exists()


def test_an_interrupt_leaves_the_old_file(stamp, output, monkeypatch):
    Path(output).write_text("older")
    monkeypatch.setattr("stamp_fast._files._digest", _interrupted)
    result = stamp("prune", "usernet:make", "pics", *QUICK, "--method", "random", "--output", output)
    assert result.exit_code == 1 and "Aborted" in result.stderr
    assert Path(output).read_text() == "older"
    assert [path.name for path in Path(output).parent.iterdir()] == ["small.safetensors"]


def _interrupted(*unused):
    raise KeyboardInterrupt


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_the_options_say_is_handed_on(stamp, output, monkeypatch, force):
    """A budget of time with an amount, and whether a network that is not faster will do."""
    given = {}

    def prune(model, loader, **options):
        given.update(options)
        raise stamp_fast.BudgetError("Budget(train_step=): the smaller network would not be faster")

    monkeypatch.setattr(stamp_fast, "prune", prune)
    arguments = ("--shape", "3,12,12", "--budget", "train_step=250 ms", "--budget", "memory=0.5", *force)
    result = stamp("prune", "usernet:make", "pics", *arguments, "--output", output)
    assert result.exit_code == 1 and "would not be faster" in result.stderr
    assert given["budget"] == stamp_fast.Budget(train_step="250 ms", memory=0.5)
    assert given["force"] == bool(force) and given["round_to"] is None
