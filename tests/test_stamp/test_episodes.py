"""Tasks: class subsets that depend on the seed and the number of the task alone."""

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from stamp_fast import ArgumentError, LoaderError
from stamp_fast.stamp.episodes import Episodes

CLASSES, EACH = 9, 12


def dataset() -> TensorDataset:
    """Example i of class c has the value 100 * c + i."""
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    return TensorDataset((100 * labels + torch.arange(EACH).repeat(CLASSES)).float()[:, None], labels)


def episodes(data=None, **options) -> Episodes:
    return Episodes(data or dataset(), **{"seed": 0, "classes": (3, 6), "shots": 5, "queries": 4} | options)


def test_support_and_query_are_disjoint_examples_of_the_same_classes():
    counts = set()
    for task in range(30):
        episode = episodes()[task]
        counts.add(episode.classes)
        (support, support_targets), (query, query_targets) = episode.support, episode.query
        assert not set(support.flatten().tolist()) & set(query.flatten().tolist())
        assert support.unique().numel() == len(support) == 5 * episode.classes
        assert query.unique().numel() == len(query) == 4 * episode.classes
        of = {}
        for values, targets in ((support, support_targets), (query, query_targets)):
            assert sorted(set(targets.tolist())) == list(range(episode.classes))
            for value, target in zip(values.flatten().tolist(), targets.tolist(), strict=True):
                assert of.setdefault(target, value // 100) == value // 100
        assert len(set(of.values())) == episode.classes
    assert counts == {3, 4, 5, 6}


def test_a_task_depends_on_seed_and_number_alone():
    forwards = [episodes()[task] for task in range(4)]
    backwards = [episodes()[task] for task in reversed(range(4))][::-1]
    torch.randn(3)
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one.support[0], other.support[0]) and torch.equal(one.query[0], other.query[0])
    assert not torch.equal(episodes(seed=1)[0].support[0], forwards[0].support[0])
    rng = torch.get_rng_state()
    episodes()[2]
    assert torch.equal(rng, torch.get_rng_state())


class Noisy(Dataset):
    targets = dataset().tensors[1].tolist()

    def __len__(self) -> int:
        return CLASSES * EACH

    def __getitem__(self, i):
        return torch.randn(2), self.targets[i]


def test_random_transforms_follow_the_seed():
    first = episodes(Noisy())[1].support[0]
    torch.randn(7)
    assert torch.equal(first, episodes(Noisy())[1].support[0])


class Bare(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, i):
        if i >= 60:
            raise IndexError
        return torch.tensor([float(i)]), i % 4


def test_labels_are_found_or_given():
    assert torch.equal(episodes().labels, dataset().tensors[1])
    assert torch.equal(episodes(Noisy()).labels, dataset().tensors[1])
    assert torch.equal(episodes(Bare()).labels, torch.arange(60) % 4)
    assert episodes(Bare(), labels=[i % 5 for i in range(60)], classes=(5, 5))[0].classes == 5


class Broken(Bare):
    def __getitem__(self, i):
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data": iter([1, 2])}, ArgumentError, "map-style data set"),
        ({"labels": [0, 1]}, ArgumentError, "labels: 2 for a data set of 108"),
        ({"shots": 11}, ArgumentError, "0 classes have the 15 examples"),
        ({"classes": (10, 12)}, ArgumentError, "9 classes have .* asks for at least 10"),
        ({"classes": (1, 4)}, ArgumentError, "asks for at least 2"),
    ],
    ids=["no length", "labels", "shots", "classes", "one class"],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        episodes(**options)


def test_a_data_set_that_fails():
    with pytest.raises(LoaderError, match="reading examples raised OSError: the disk is gone"):
        episodes(Broken(), labels=[i % 4 for i in range(60)])[0]


def test_labels_of_a_data_set_with_more_than_two_tensors():
    images, labels = dataset().tensors
    assert torch.equal(episodes(TensorDataset(images, labels, torch.zeros(len(labels)))).labels, labels)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.rand(CLASSES * EACH), "expected class indices, one for each example, got torch.float32"),
        (["cat"] * CLASSES * EACH, "expected class indices, one for each example, got list"),
        (torch.zeros(CLASSES * EACH, 2, dtype=torch.long), r"got torch.int64 \(108, 2\)"),
    ],
    ids=["floats", "words", "pairs"],
)
def test_labels_that_are_no_class_indices(labels, match):
    with pytest.raises(ArgumentError, match=match):
        episodes(labels=labels)


class Named(Bare):
    targets = None

    def __getitem__(self, i):
        return {"image": torch.zeros(1), "label": i % 4}


@pytest.mark.parametrize("data", [Named(), Broken()], ids=["items by name", "broken"])
def test_labels_that_cannot_be_read(data):
    with pytest.raises(ArgumentError, match="does not yield .* pairs .*; pass labels="):
        episodes(data)
