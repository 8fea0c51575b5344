"""What the accuracy experiments read and write; the experiments themselves are run by their own commands."""

import copy
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import accuracy_table, budgets, data, early, gpu_suite, metapruning, table, test_baselines
from benchmarks.networks import cifar_resnet18, randomise, widths_of
from benchmarks.steps import FLOAT32, choose, train_step
from benchmarks.time_to_accuracy import ARMS, MARKS, Task
from stamp_fast import trace


def row(arm: str, macs: float, seed: int, accuracy: float, seconds: float, pruning: float = 0.0) -> dict:
    """A run that climbs to `accuracy` evenly over the marks of 1,200 steps."""
    steps = [*MARKS, 1200]
    curve = [[s, pruning + seconds * s / 1200, accuracy * (0.5 + 0.5 * s / 1200)] for s in steps]
    known = {"arm": arm, "network": "vgg", "target": "fashion", "macs": macs, "seed": seed, "steps": 1200, "lr": 0.05}
    return {
        **known,
        "pruning_seconds": pruning,
        "curve": curve,
        "step_ms": 10.0,
        "peak_bytes": 1 << 20,
        "macs_reached": macs,
    }


MACHINE = {"cpu": "a CPU", "capability": "AVX512", "threads": 1, "cores": 2, "load": 0.1, "torch": "2.15.0"}


def rendered(stamp: float, seconds: float, pruning: float = 1.0) -> str:
    found = [row("dense", 1.0, seed, 0.9, 100.0) for seed in range(2)]
    found += [row("uniform L1", 0.125, seed, 0.84 + 0.02 * seed, 25.0, 1.0) for seed in range(2)]
    found += [row("STAMP, joint", 0.125, seed, stamp, seconds, pruning) for seed in range(2)]
    return accuracy_table.render(MACHINE, accuracy_table.collect(found))


def test_wins_and_losses_are_both_printed():
    won, lost = rendered(0.895, 25.0), rendered(0.82, 25.0, 5.0)
    assert won.count("- met") == 4 and "missed" not in won
    assert lost.count("**missed**") == 4 and "- met" not in lost
    assert "dense - 1 point is not reached" in lost
    # 85.0 is the baseline's mean, 1.4 its spread.
    assert "the best baseline less its spread, uniform L1, has 83.6%" in won
    assert "| 85.0 ± 1.4 |" in won


def test_a_noisy_baseline_does_not_lower_the_bar():
    found = [row("dense", 1.0, seed, 0.9, 100.0) for seed in range(2)]
    found += [row("scratch", 0.125, seed, 0.80 + 0.12 * seed, 25.0) for seed in range(2)]  # 86 +- 8.5
    found += [row("Taylor", 0.125, seed, 0.859, 25.0) for seed in range(2)]
    found += [row("STAMP, joint", 0.125, seed, 0.80, 25.0, 1.0) for seed in range(2)]
    page = accuracy_table.render(MACHINE, accuracy_table.collect(found))
    assert "**missed**: at the end STAMP, joint has 80.0%; the best baseline less its spread, Taylor, has 85.9%" in page


def test_seconds_to_the_target_are_those_of_the_first_mark_that_reaches_it():
    runs = accuracy_table.Runs("dense", [row("dense", 1.0, 0, 0.9, 120.0, 3.0)])
    assert runs.seconds_to(0.9 * (0.5 + 0.5 * 400 / 1200)) == pytest.approx(3 + 40)
    assert runs.seconds_to(0.91) is None


def test_files(tmp_path):
    results = tmp_path / "r.jsonl"
    found = [row(arm, 1.0 if arm == "dense" else 0.25, 0, 0.8, 50.0) for arm in ARMS]
    results.write_text("\n".join(map(json.dumps, [{"machine": MACHINE}, *found])) + "\n")
    accuracy_table.main(["--results", str(results), "--output", str(tmp_path)], standalone_mode=False)
    with (tmp_path / "time_to_accuracy.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ARMS) * (len(MARKS) + 1)
    assert {line["arm"] for line in lines} == set(ARMS)
    page = (tmp_path / "time_to_accuracy.md").read_text()
    assert all(f"| {arm} |" in page for arm in ARMS)
    with Image.open(tmp_path / "time_to_accuracy_vgg_fashion_1200_0.05.png") as figure:
        assert figure.width > 500


def test_runs_at_another_learning_rate_are_another_place():
    found = [row("dense", 1.0, 0, 0.9, 100.0), {**row("dense", 1.0, 0, 0.8, 100.0), "lr": 0.02}]
    places = accuracy_table.collect(found)
    assert [place.lr for place in places] == [0.05, 0.02]
    assert len({place.figure for place in places}) == 2
    assert all(len(budgets[1.0]["dense"].rows) == 1 for budgets in places.values())


def test_batches_are_the_same_for_the_same_seed():
    dataset = torch.utils.data.TensorDataset(torch.arange(10.0), torch.arange(10))
    one, same, other = (data.batches(dataset, 4, 5, seed) for seed in (0, 0, 1))
    assert len(one) == 5 and all(len(labels) == 4 for _, labels in one)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


def folder(root, classes: dict[str, list[str]]) -> None:
    for part, names in classes.items():
        for number, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (20 + i, 40), 60 * number + i).save(root / part / name / f"{i}.png")


def test_folders_of_images(tmp_path):
    folder(tmp_path, {"train": ["cat", "dog"], "test": ["cat", "dog"]})
    train, test = data.target("folder", tmp_path)
    assert train.tensors[0].shape == (4, 3, 32, 32) and train.tensors[1].tolist() == [0, 0, 1, 1]
    assert test.tensors[0].max() <= 1
    assert Task("vgg", "folder", 0.5, 0, 10, root=tmp_path).batches(2)[0][0].shape == (64, 3, 32, 32)


def test_folders_that_do_not_match(tmp_path):
    folder(tmp_path, {"train": ["cat", "dog"], "test": ["cat", "fox"]})
    with pytest.raises(ValueError, match="hold other classes"):
        data.target("folder", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "folder"])
def test_data_that_no_package_ships_needs_a_folder(name):
    with pytest.raises(FileNotFoundError, match="pass root="):
        data.target(name)


def test_cifar_is_read_as_torchvision_stores_it(tmp_path, monkeypatch):
    """The files that torchvision downloads, made here; only the download and its check are left out."""
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "download", lambda self: None)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        pixels = torch.full((2, 3072), 10 * number, dtype=torch.uint8).numpy()
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number, number]}))
    train, test = data.target("cifar10", tmp_path)
    assert train.tensors[0].shape == (10, 3, 32, 32) and test.tensors[1].tolist() == [5, 5]
    assert test.tensors[0].unique().item() == pytest.approx(50 / 255)


def test_gpu_suite_runs_without_a_gpu(tmp_path):
    """That it runs, and that a row that fails does not take the others along."""
    arguments = ["--device", "cpu", "--quick", "--no-build", "--no-tests", "--output", str(tmp_path)]
    done = CliRunner().invoke(gpu_suite.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (result,) = tmp_path.glob("*.json")
    found = json.loads(result.read_text())
    assert not found["failed"] and {row["suite"] for row in found["rows"]} == {
        "pack_weights",
        "channel_saliency",
        "masked_conv2d",
        "depthwise_conv2d",
        "conv + norm + ReLU",
        "train step",
    }
    text = result.with_suffix(".md").read_text()
    assert "of the ceiling" in text and "masked, cpu" in text
    suite = gpu_suite.Suite("cpu", True, 1)
    suite.step("broken", lambda: 1 / 0)
    assert suite.failed == ["broken: ZeroDivisionError: division by zero"]
    suite.end = 0
    suite.step("late", lambda: None)
    assert suite.failed[1:] == ["late: out of time"]


def test_gpu_suite_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu_suite.main, ["--output", str(tmp_path)])
    assert done.exit_code == 1 and "no GPU here" in done.output and not any(tmp_path.iterdir())


def early_row(arm: str, seed: int, accuracy: float, seconds: float, cut: int | None = None) -> dict:
    known = {"arm": arm, "network": "resnet18", "seed": seed, "epochs": 30, "cut_epoch": cut}
    return known | {
        "accuracy": accuracy,
        "seconds": seconds,
        "step_ms": 10.0,
        "peak_bytes": 1 << 20,
        "macs_reached": 0.25,
    }


def test_the_page_of_early_pruning_prints_losses_too():
    found = [early_row("dense", seed, 0.92, 100.0) for seed in range(2)]
    found += [early_row("Taylor, at the start", seed, 0.90, 30.0, 0) for seed in range(2)]
    found += [early_row("train, Torch-Pruning L2, fine-tune", seed, 0.918, 60.0, 15) for seed in range(2)]
    found += [early_row(early.MINE, seed, 0.915, 60.0, 7) for seed in range(2)]
    scans = {("resnet18", "taylor", 0): early.Scan([1, 7], [0.93, 0.92], [float("nan"), 0.9], 7, 0.944)}
    page = early.render(MACHINE, found, scans)
    assert "**missed**: EarlyPruner, taylor takes 0.60 of dense's time" in page
    assert "- met: it ends 0.5 points below dense" in page
    assert "**missed**: it is -0.3 points from the best of train-prune-fine-tune" in page
    assert "- met: it is +1.5 points from the best of pruning at the start" in page
    assert "**missed**: within 0.5 points of the best" in page


def test_a_chosen_epoch_that_was_not_scanned_is_that_of_the_arm_that_cut_there():
    scans = {("resnet18", "taylor", 0): early.Scan([1, 7], [0.93, 0.92], [float("nan"), 0.9], 5, 0.944)}
    dense = [early_row("dense", 0, 0.92, 100.0)]
    page = early.render(MACHINE, [*dense, early_row(early.MINE, 0, 0.915, 60.0, 5)], scans)
    assert "chose epoch 5, 1.5 points below" in page
    for elsewhere in (early_row(early.MINE, 0, 0.915, 60.0, 6), early_row(early.MINE, 1, 0.915, 60.0, 5)):
        assert "which was not scanned" in early.render(MACHINE, [*dense, elsewhere], scans)


def searched(
    accuracy: float,
    predicted: float,
    scores: list[float],
    seconds: float = 300.0,
    processes: int = 2,
    again: float = 0.0,
) -> str:
    common = {"kind": "arm", "network": "resnet18", "unit": "macs", "macs": 0.3, "latency": 0.5, "measured_ms": 10.0}
    common |= {"chosen_in": seconds, "processes": processes}
    found = [
        common | {"arm": arm, "seed": seed, "accuracy": value, "predicted_ms": predicted}
        for arm, value in (("uniform", 0.9), ("MetaPruning", accuracy))
        for seed in range(2)
    ]
    for number, score in enumerate(scores):
        found.append(
            {"kind": "genome", "network": "resnet18", "score": score, "accuracy": 0.8 + number / 100, "macs": -number}
        )
    if again:
        latency = {"latency": 0.25, "measured_ms": again}
        found.append({"kind": "latency", "network": "resnet18", "unit": "macs", "arm": "MetaPruning"} | latency)
    return metapruning.render(MACHINE, found)


def test_the_page_of_searches_prints_wins_and_losses():
    won, lost = searched(0.91, 9.5, [1, 2, 3, 4]), searched(0.9, 12.0, [4, 3, 2, 1], seconds=601.0)
    assert won.count("- met") == 2 and "missed" not in won
    assert "1,000 evaluations took 300 s in 2 processes of one thread (bar: 600 s in two: met)" in won
    assert "took 601 s in 2 processes of one thread (bar: 600 s in two: **missed**)" in lost
    assert "took 500 s in 1 process of one thread (bar: 600 s in two)" in searched(0.9, 9.5, [], 500.0, 1)
    assert lost.count("**missed**") == 4
    assert "Spearman 1.00 (bar 0.5: met); their MACs alone: -1.00" in won
    assert "- met: MetaPruning is +1.00 points from uniform" in won
    assert "- **missed**: MetaPruning is +0.00 points from uniform" in lost
    assert "predicted +20% off" in lost
    measured_again = searched(0.91, 9.5, [], again=19.0)
    assert "predicted -50% off" in measured_again and "| 0.25 | 0.50 |" in measured_again


def timed(
    suite: str, case: str, samples: dict[str, list[float]], ratios: list[dict], note: str = "", **more: object
) -> dict:
    bounds = {"at_least": None, "at_most": None}
    info = {"suite": suite, "case": case, "samples": samples, "ratios": [bounds | ratio for ratio in ratios], **more}
    return {"extra_info": info | ({"note": note} if note else {})}


@pytest.fixture
def results(tmp_path):
    """Three suites, of two files, and JSON of another experiment beside them."""
    ours, theirs = {"top": "Torch-Pruning", "bottom": "stamp_fast"}, {"top": "dense", "bottom": "virtual"}
    structural = [
        timed("structural", "small", {"stamp_fast": [0.01, 0.01], "Torch-Pruning": [0.03, 0.03]}, [ours]),
        timed("structural", "wide", {"stamp_fast": [0.02, 0.02], "Torch-Pruning": [0.01, 0.01]}, [ours]),
    ]
    bars = [theirs | {"at_least": 3}, {"top": "virtual", "bottom": "by hand", "at_most": 1.1}]
    steps = [
        timed("train_step", "a", {"dense": [0.4, 0.4], "virtual": [0.1, 0.1], "by hand": [0.1, 0.1]}, bars),
        timed("train_step", "b", {"dense": [0.2, 0.2], "virtual": [0.1, 0.1], "by hand": [0.1, 0.1]}, bars),
    ]
    steps[0]["extra_info"]["note"] = "0.25 of the MACs"
    phases = [timed("phases", "small", {"trace": [0.01], "compact": [0.02]}, [])]
    for name, benchmarks in (("b", [*structural, *phases]), ("a", steps)):
        known = {
            "machine_info": MACHINE,
            "commit_info": {"id": "0123456789", "dirty": False},
            "datetime": "2026-11-22T",
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(known | {"benchmarks": benchmarks}))
    (tmp_path / "scan.json").write_text("{}")
    return tmp_path


def test_the_page_of_benchmarks(results):
    (results / "early.md").write_text("")
    page = table.page([results / "a.json", results / "b.json"], results)
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == ["# Benchmarks", "## Structural time", "## Train step", "## Phases"]
    assert page.count("a CPU (AVX512), 1 of 2 cores, torch 2.15.0, commit 01234567, 2026-11-22") == 3
    assert "| small | 3.00 (3.00 to 3.00) |" in page  # of 30 ms and 10 ms
    assert "| a | 4.00 (4.00 to 4.00), >= 3 met | 1.00 (1.00 to 1.00), <= 1.1 met |" in page
    assert "| b | 2.00 (2.00 to 2.00), >= 3 **missed** | 1.00" in page
    assert "- **not faster**: Torch-Pruning / stamp_fast is 0.50 for wide" in page
    assert "- **missed** 1 of 2 times: dense / virtual >= 3; worst: 2.00, for b" in page
    assert "- met 2 of 2 times: virtual / by hand <= 1.1" in page
    assert "- a: 0.25 of the MACs" in page and "speed" not in page
    assert "](early.md) | `make bench-early`" in page  # which is there, and the other is not
    assert "(no page yet) | `make bench-metapruning`" in page and "](metapruning.md)" not in page


def beside_the_usual(case: str, seconds: dict[str, float], **more: object) -> dict:
    """An entry of the suite of baselines."""
    entry = timed(
        "baselines",
        case,
        {name: [value, value] for name, value in seconds.items()},
        [dataclasses.asdict(ratio) for ratio in test_baselines.ratios_of(list(seconds))],
        against=["dense", "dense, compiled"],
        columns={"MACs, dense / this": {name: 4.0 if "compacted" in name else 1.0 for name in seconds}},
        **more,
    )
    return entry["extra_info"]


def test_the_table_of_baselines_has_a_row_for_each_and_prints_losses():
    masked, compiled = "torch.nn.utils.prune", "dense, compiled"
    won = {"dense": 3.0, masked: 3.3, "compacted": 0.8, compiled: 2.0, "compacted, compiled": 0.5}
    lost = {"dense": 3.0, masked: 3.3, "compacted": 1.0, "Torch-Pruning": 0.9, compiled: 0.9}
    why = "**not timed**: compacted, compiled: RuntimeError: no compiler"
    text = table.render([beside_the_usual("a", won), beside_the_usual("b", lost, note=why)])
    assert "**a**" in text and "**b**" in text and "speed" not in text
    assert "| compacted | 800 (800 to 800) | 3.75 (3.75 to 3.75) | 2.50 (2.50 to 2.50) | 4 |" in text
    assert f"| {masked} | 3300 (3300 to 3300) | 0.91 (0.91 to 0.91) |  | 1 |" in text
    assert "- **not faster**: dense, compiled / compacted is 0.90 for b" in text
    assert "- **not faster**: Torch-Pruning / compacted is 0.90 for b" in text
    assert f"- **not faster**: dense / {masked} is 0.91 for a" in text
    assert text.count("**not faster**: dense, compiled") == 2  # over ours, over Torch-Pruning's; both of b
    # What is held against neither dense network has a table by case.
    assert "| ratio of times | compacted / compacted, compiled | Torch-Pruning / compacted |" in text
    assert "| a | 1.60 (1.60 to 1.60) |  |" in text and why in text


def test_baselines_and_cases_in_rows_go_into_one_table_each():
    rows = timed("baselines", "c", {"dense": [3.0, 3.0]}, [])["extra_info"]
    text = table.render([beside_the_usual("a", {"dense": 3.0, "compacted": 0.8}), rows])
    assert "| c | 3000 (3000 to 3000) |" in text and "**a**" in text and "**c**" not in text


def random_network() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return randomise(cifar_resnet18((16, 16, 32, 32))), (torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


def test_masks_and_a_cut_of_the_same_channels_agree():
    """In their outputs, and in the losses of two steps."""
    dense, batch = random_network()
    keep = choose("taylor", trace(copy.deepcopy(dense), batch[0]), batch)
    small, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    trace(small, batch[0]).compact(keep)
    test_baselines.mask(masked, batch[0], keep)
    with torch.no_grad():
        torch.testing.assert_close(masked.eval()(batch[0]), small.eval()(batch[0]), rtol=1e-4, atol=1e-5)
    steps = [train_step(model, batch, autocast=False) for model in (masked, small)]
    for _ in range(2):
        assert steps[0]() == pytest.approx(steps[1](), rel=1e-3)


@pytest.mark.parametrize("round_to, share", [(None, 0.34), (8, 0.25)])
def test_torch_pruning_comes_close_to_the_macs_asked_for(round_to, share):
    pytest.importorskip("torch_pruning")
    dense, batch = random_network()
    small = test_baselines.torch_pruned(dense, batch, "magnitude", share, round_to)
    assert trace(small, batch[0]).macs() / trace(dense, batch[0]).macs() == pytest.approx(share, rel=0.1)
    widths = widths_of(small)
    assert all(width % (round_to or 1) == 0 for width in widths["widths"] + widths["inner"])


def test_what_does_not_compile_is_said_and_the_others_are_timed(monkeypatch):
    """With a compiler that compiles nothing, as no other is quick enough here."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    networks = {"dense": cifar_resnet18((4, 4, 4, 4)), "broken": torch.nn.Conv2d(3, 4, 5, stride=40)}
    batch = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    step = train_step(copy.deepcopy(networks["dense"]), batch, autocast=False)
    steps: dict = {"dense": step}
    losses = {"dense": [step(), step()]}
    seconds, failed = test_baselines.add_compiled(steps, networks, batch, FLOAT32, losses)
    assert list(seconds) == ["dense, compiled"] and list(steps) == ["dense", "dense, compiled"]
    assert list(failed) == ["broken, compiled"] and "Error: " in failed["broken, compiled"]


def test_tables_are_printed_and_the_page_written(results):
    paths = [str(results / name) for name in ("a.json", "b.json", "scan.json")]
    done = CliRunner().invoke(table.main, paths, catch_exceptions=False)
    assert done.exit_code == 0 and "### Train step" in done.stdout and "| wide | 20 (20 to 20) |" in done.stdout
    assert "scan.json: not of a timed suite, left out" in done.stderr
    CliRunner().invoke(table.main, [*paths, "--write", str(results / "page.md")], catch_exceptions=False)
    assert (results / "page.md").read_text() == table.page([results / "a.json", results / "b.json"], results)


def test_the_page_of_benchmarks_is_that_of_the_results():
    """But for the list of links, which grows with the pages."""
    root = Path(table.__file__).parent.parent
    paths = sorted((root / "benchmarks" / "results").glob("*-torch*.json"))
    written = (root / "docs" / "benchmarks.md").read_text()
    made, kept = (text.partition("\n## ")[2] for text in (table.page(paths, root), written))
    assert made and made == kept, "make bench writes the page"


def test_the_page_of_promises_prints_what_was_missed():
    def promise(unit: str, measured: float) -> dict:
        costs = {"train_step": 0.45, "macs": 0.3, "params": 0.2, "seconds": 12.0}
        known = {"kind": "promise", "network": "ResNet-18", "dtype": "float32", "unit": unit, "asked": 0.5}
        return {**known, "measured": measured, **costs}

    def accuracy(arm: str, value: float, seed: int) -> dict:
        known = {"kind": "accuracy", "arm": arm, "network": "vgg", "ask": 0.4, "seed": seed}
        return {**known, "accuracy": value, "train_step": 0.41, "macs": 0.25}

    found = [promise("train_step", 0.54), promise("memory", 0.6)]
    for seed in range(2):
        found += [accuracy("Budget(train_step)", 0.8, seed), accuracy("Budget(macs)", 0.81, seed)]
        found.append(accuracy("Torch-Pruning, round_to=8", 0.7 + 0.02 * seed, seed))
    page = budgets.render(MACHINE, found)
    assert "Within 10 percent: 1 of 2." in page
    kept, missed = (
        next(line for line in page.splitlines() if unit in line) for unit in ("train_step=0.5", "memory=0.5")
    )
    assert "+8%" in kept and "yes" in kept and "2.22x faster" in kept
    assert "+20%" in missed and "**no**" in missed
    assert "- **missed**: -1.00 points from Budget(macs)" in page
    assert "- met: +9.00 points from Torch-Pruning, round_to=8" in page
