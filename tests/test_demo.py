import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from matplotlib.image import imread

from stamp_fast.cli import main
from stamp_fast.demo import digits, glyphs, network, run

CLASSES = "AbΩж→"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_glyphs_are_deterministic_and_have_ink():
    images = glyphs.render_all(CLASSES)
    assert images.shape == (len(CLASSES), len(glyphs.FONTS), 32, 32)
    assert torch.equal(images, glyphs.render_all(CLASSES))
    assert (images.flatten(2).float().mean(2) > 5).all()
    assert images.flatten(2).amax(2).min() > 200


def test_augmentation_follows_its_generator_and_stays_in_range():
    images = glyphs.render_all(CLASSES)[:, :1].float() / 255
    first, again, other = (glyphs.augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert first.min() >= 0 and first.max() <= 1


def test_chosen_classes_are_distinct_and_unlike_digits():
    classes = glyphs.choose_classes(60)
    assert len(set(classes)) == len(classes) == 60
    images = glyphs.render_all(classes + glyphs.DIGITS).flatten(1).float() / 255
    distance = torch.stack([(images - image).abs().mean(1) for image in images])
    distance.fill_diagonal_(1)
    assert distance[:60, :60].min() >= 0.08
    assert distance[:60, 60:].min() >= 0.1


def test_too_many_classes_is_an_error(monkeypatch):
    monkeypatch.setattr(glyphs, "BLOCKS", ((0x41, 0x4A),))
    with pytest.raises(ValueError, match="wanted 11 classes, the fonts have"):
        glyphs.choose_classes(11)


def test_pretraining_left_digits_and_held_out_fonts_out():
    _, metadata = network.pretrained()
    classes = metadata["classes"]
    assert len(set(classes)) == len(classes) >= 300
    assert not any(character.isnumeric() for character in classes)
    assert set(metadata["fonts"].split()).isdisjoint(glyphs.HELD_OUT_FONTS)
    assert metadata["held_out_fonts"].split() == list(glyphs.HELD_OUT_FONTS)


def test_weights_are_small_and_reach_their_stated_accuracy():
    assert network.WEIGHTS.stat().st_size < 1_000_000
    model, metadata = network.pretrained()
    images, targets = glyphs.held_out(metadata["classes"])
    accuracy, _ = run.evaluate(model, torch.utils.data.TensorDataset(images, targets))
    assert accuracy > 0.8
    # Another FreeType draws slightly other glyphs.
    assert accuracy == pytest.approx(float(metadata["held_out_accuracy"]), abs=0.02)


def test_fresh_head_is_seeded():
    first, again, other = (network.pretrained_for(10, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_digits_split_is_fixed_and_loaders_agree():
    train, test = digits.datasets()
    again = digits.datasets()
    assert (len(train), len(test)) == (1297, 1000)
    assert torch.equal(train.tensors[0], again[0].tensors[0])
    assert torch.equal(test.tensors[0], again[1].tensors[0])
    assert train[0][0].shape == (1, 32, 32)
    (images, targets), (same_images, same_targets) = (
        next(iter(digits.train_loader(train, 64, seed=5))) for _ in range(2)
    )
    assert torch.equal(images, same_images) and torch.equal(targets, same_targets)


def test_learning_rate_rises_then_falls():
    rates = [run.warm_up_and_cosine(step, 50) for step in range(50)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.01 and max(rates) == 1
    assert run.warm_up_and_cosine(0, 1) > 0


def test_table_names_what_the_pruned_network_is_worse_in():
    whole = run.Arm("whole", 100, 1000, 2**20, step_ms=[10.0], test_loss=[0.1])
    whole.seconds, whole.accuracy = [0.0, 4.0, 5.0, 6.0], [0.1, 0.99, 0.99, 0.99]
    pruned = run.Arm("pruned", 40, 300, 2**19, 1.0, step_ms=[4.0], test_loss=[0.2])
    pruned.seconds, pruned.accuracy = [1.0, 3.0, 4.0, 5.0], [0.2, 0.98, 0.98, 0.98]
    result = run.DemoResult("stamp", whole, pruned, 0.975, [], None, None)
    columns = [list(column.cells) for column in run.table(result).columns]
    rows = dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True))
    assert rows["test accuracy, best"] == ("99.0%", "98.0%", "[red]-1.0 points (worse)[/]")
    assert rows["MACs per image"] == ("1,000", "300", "[green]3.33x less[/]")
    assert rows["test loss, last"][2] == "[red]2.00x more (worse)[/]"
    assert rows["time to 97.5%, with prune()"] == ("4.0 s", "3.0 s", "[green]1.33x less[/]")


def test_an_accuracy_seen_once_does_not_count_as_reached():
    arm = run.Arm("whole", 100, 1000)
    arm.seconds, arm.accuracy = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.99, 0.5, 0.97, 0.98, 0.97]
    assert arm.held == [0.1, 0.5, 0.5, 0.97]
    assert arm.seconds_to(0.97) == 3.0


@pytest.mark.parametrize("method", ["stamp", "taylor"])
def test_demo_end_to_end(method, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "TEST_IMAGES", 50)
    output = tmp_path / "figures" / "demo.png"
    options = ["--method", method, "--epochs", "1", "--batch-size", "16", "--steps", "4"]
    options += ["--train-images", "48", "--no-progress", "--output", str(output)]
    outcome = CliRunner().invoke(main, ["demo", *options], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for row in ("test accuracy, best", "MACs per image", "parameters", "train step", "with prune()"):
        assert row in outcome.output
    picture = imread(output)
    assert picture.shape[0] > 400 and picture.shape[1] > 1000 and picture.std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "guess"], "'guess' is not one of"),
        (["--train-images", "20"], "less than one batch of 64"),
        (["--budget", "1"], "0<x<1"),
    ],
)
def test_demo_rejects(options, message):
    outcome = CliRunner().invoke(main, ["demo", *options])
    assert outcome.exit_code == 2
    assert message in outcome.output
