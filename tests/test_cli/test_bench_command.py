import builtins
import json
import math

import pytest
import torch

import stamp_fast
from stamp_fast.cli import arms, bench

QUICK = ("--shape", "3,12,12", "--batch-size", "8", "--steps", "4", "--budget", "macs=0.5", "--train-steps", "4")
ALL = "dense,random,uniform,scratch,torch-pruning,torch-pruning-global"


def test_every_arm_is_in_the_table_and_trained_alike(stamp):
    pytest.importorskip("torch_pruning")
    result = stamp("bench", "usernet:make", "pics", *QUICK, "--compare", ALL, "--seeds", "2", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["arms"]) == ["dense", "stamp", *ALL.split(",")[1:]]
    for name, arm in found["arms"].items():
        assert arm["failed"] is None, name
        assert arm["steps"] == 4 and len(arm["accuracies"]) == 2 and 0 <= arm["accuracy"] <= 1
        assert arm["train_step_ms"] > 0 and math.isfinite(arm["loss"])
        if name != "dense":
            # Eight channels cannot be cut to any share of the MACs.
            assert arm["macs_ratio"] == pytest.approx(0.5, abs=0.1), name
    assert found["arms"]["scratch"]["macs_ratio"] == found["arms"]["stamp"]["macs_ratio"]
    assert found["arms"]["dense"]["train_step_ratio"] == 1
    assert found["held_out"].startswith("evaluated on 6 of 30 examples")
    text = bench._text(found)
    for name in found["arms"]:
        assert f"│ {name} " in text
    for heading in ("accuracy", "train step", "of dense's", "MACs", "prune"):
        assert heading in text
    # A random choice is always there sooner than one that trains.
    assert any(line.startswith("LOST: random beat stamp in") and "time to prune" in line for line in text.splitlines())
    assert "2 seeds" in text and "±" in text


def test_text_on_stdout_and_progress_on_stderr(stamp):
    result = stamp("bench", "usernet:make", "parts", *QUICK[:-2], "--epochs", "1", "--compare", "dense",
                   "--method", "magnitude")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "1 seed, so no spread; evaluated on parts/val" in result.stdout
    assert "2 steps each" in result.stdout  # 18 images, 8 at a time
    assert "seed 0: magnitude: " in result.stderr and "of the MACs, made in" in result.stderr
    assert "of the MACs" not in result.stdout.replace("MACs │", "")  # no ratio of MACs is sold as a speed-up
    line = next(line for line in result.stdout.splitlines() if line.startswith("magnitude, pruning and training"))
    assert "x faster than" in line or "x SLOWER than" in line


def summary(accuracy: float, share: float = 0.5, **more: float) -> dict:
    base = {"failed": None, "accuracy": accuracy, "accuracy_spread": 0.01, "train_step_ratio": 0.5}
    return {**base, "steps_faster_than_ours": share, "prune_seconds": 1.0, **more}


def test_a_baseline_that_wins_is_named():
    arms = {
        "dense": summary(0.95, 0.0, train_step_ratio=1.0),
        "stamp": summary(0.90),
        "uniform": summary(0.93, 0.9, train_step_ratio=0.4, prune_seconds=0.1),
        "random": summary(0.895, 0.6, prune_seconds=2.0),
        "scratch": summary(0.8, 1.0),
    }
    losses, gains = bench._verdicts(arms, "stamp")
    assert losses == [
        "dense beat stamp in accuracy (95.0 % against 90.0 %)",
        "uniform beat stamp in accuracy (93.0 % against 90.0 %), train step (0.40 of dense's against 0.50 of dense's), "
        "time to prune (0.1 s against 1.0 s)",
    ]
    assert gains == [
        "stamp beat dense in train step (0.50 of dense's against 1.00 of dense's)",
        "stamp beat random in accuracy, within the spread (90.0 % against 89.5 %), time to prune (1.0 s against 2.0 s)",
        "stamp beat scratch in accuracy (90.0 % against 80.0 %)",
    ]


def test_arms_of_another_size_are_named():
    arms = {"dense": summary(1, macs_ratio=1.0), "stamp": summary(1, macs_ratio=0.35)}
    arms |= {"uniform": summary(1, macs_ratio=0.36), "torch-pruning": summary(1, macs_ratio=0.45)}
    size, training, timing = bench._notes(arms, "stamp")
    assert size == "torch-pruning is NOT of equal size: 45.0% of the MACs, stamp 35.0%"
    assert "stamp also trains" in training and "searched untimed" in timing


def test_scratch_is_our_architecture_without_our_weights():
    import usernet

    network = usernet.make()
    stamp_fast.prune(network, usernet.batches, method="random", seed=0, progress=False)
    scratch = arms._scratch(arms.Arm("random", network, 1.5), seed=0)
    assert [p.shape for p in scratch.network.parameters()] == [p.shape for p in network.parameters()]
    assert not torch.equal(scratch.network[0].weight, network[0].weight)
    assert scratch.prune_seconds == 1.5 and not scratch.note


def test_all_arms_get_the_same_batches():
    import usernet

    class Shuffled:
        def __iter__(self):
            return iter(torch.randn(3, 4, 3, 12, 12))

    given = {"a": [], "b": []}
    made = []
    for name, seen in given.items():
        network = usernet.make()
        network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        made.append(arms.Arm(name, network))
    loader = [(images, torch.arange(4) % 3) for images in Shuffled()]
    arms.train(made, loader, torch.device("cpu"), arms.Recipe(5, 0.01), lambda: None)
    assert len(given["a"]) == 5 and all(map(torch.equal, given["a"], given["b"]))
    assert all(len(arm.step_seconds) == 5 for arm in made)


def test_a_baseline_that_fails_is_said_and_the_rest_goes_on(stamp, monkeypatch):
    monkeypatch.setattr(arms, "_scratch", lambda *_: 1 / 0)
    result = stamp("bench", "usernet:make", "usernet:loader", *QUICK, "--compare", "scratch", "--method", "random")
    assert result.exit_code == 0, result.stderr
    assert "failed: scratch in 1 of 1 runs: ZeroDivisionError" in result.stdout
    assert "│ random " in result.stdout
    assert "the last 1 of 5 batches" in result.stdout


def test_torch_pruning_that_is_missing_names_the_command(stamp, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "torch_pruning":
            raise ImportError("No module named 'torch_pruning'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = stamp("bench", "usernet:make", "pics", *QUICK, "--compare", "torch-pruning")
    assert result.exit_code == 1
    assert "pip install torch-pruning" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pics", "--compare", "dense,best"), 2, "'best' is none of dense, uniform"),
        (("pics", "--epochs", "2"), 2, "--epochs and --train-steps"),
        (("usernet:loader(count=1)",), 2, "--val"),
        (("pics", "--val", "parts/nothing"), 2, "there is no folder 'parts/nothing'"),
        (("pics", "--val", "single"), 1, "'single' has a single class"),
        (("pics", "--budget", "macs=0.0001"), 1, "out of reach"),
    ],
)
def test_refusals(stamp, arguments, code, message):
    budget = () if "--budget" in arguments else QUICK[-4:-2]
    result = stamp("bench", "usernet:make", *QUICK[:-4], *QUICK[-2:], *budget, *arguments)
    assert (result.exit_code, "Traceback" in result.stderr) == (code, False)
    assert message in result.stderr
