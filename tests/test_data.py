"""Batches of any loader, the default loss, and the check of the first batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stamp_fast import ArgumentError, LoaderError
from stamp_fast.data import Batches, check_forward, cross_entropy, guarded, inputs_given, inputs_of, some_examples

CPU = torch.device("cpu")


def numbers(count: int) -> list[torch.Tensor]:
    return [torch.tensor([i]) for i in range(count)]


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "iterator", "loader"])
@pytest.mark.parametrize("wanted", [1, 3, 4, 11])
def test_take_begins_anew(kind, wanted):
    data = numbers(4)
    loader = {
        "list": data,
        "tuple": tuple(data),
        "generator": (x for x in data),
        "iterator": iter(data),
        "loader": DataLoader(torch.arange(4), batch_size=1),
    }[kind]
    batches = Batches(loader, CPU)
    assert batches.first.item() == 0
    assert [b.item() for b in batches.take(wanted)] == [i % 4 for i in range(wanted)]
    # And again: what a generator has yielded is kept.
    assert [b.item() for b in batches.take(wanted)] == [i % 4 for i in range(wanted)]


def test_take_after_a_broken_off_take():
    batches = Batches((x for x in numbers(4)), CPU)
    taken = batches.take(4)
    assert [next(taken).item(), next(taken).item()] == [0, 1]
    del taken
    assert [b.item() for b in batches.take(5)] == [0, 1, 2, 3, 0]


def test_takes_no_more_than_asked():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield torch.tensor([len(drawn)])

    batches = Batches(endless(), CPU)
    assert len(list(batches.take(5))) == 5
    assert len(drawn) <= 6


def test_a_sample_has_so_many_examples_or_all_of_a_pass():
    pairs = [(torch.full((4, 2), float(i)), torch.tensor([i] * 4)) for i in range(5)]
    inputs, labels = Batches(pairs, CPU).sample(9, inputs_of)
    assert [(len(x), x[0, 0].item()) for x in inputs] == [(4, 0), (4, 1), (1, 2)]
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2]
    assert len(Batches(pairs, CPU).sample(1000, inputs_of)[0]) == 5
    assert len(Batches(pairs, CPU).sample(3, inputs_of)[0][0]) == 3
    # A generator's batches are still there for others.
    batches = Batches(iter(pairs), CPU)
    assert len(batches.sample(5, inputs_of)[0]) == 2
    assert len(list(batches.take(5))) == 5


def test_a_sample_without_class_indices():
    images = [torch.zeros(3, 5, 4), torch.zeros(3, 6, 4)]
    inputs, labels = Batches([(images, [{}, {}])] * 3, CPU).sample(3, inputs_of)
    assert labels is None and [len(x[0]) for x in inputs] == [2, 1]
    one_each = torch.zeros(2, dtype=torch.long)
    per_pixel = torch.zeros(8, dtype=torch.long)
    for batch in ((torch.zeros(4, 2), torch.zeros(4)), torch.zeros(4, 2), (torch.zeros(4, 2), per_pixel)):
        assert Batches([batch], CPU).sample(3, inputs_of)[1] is None
    assert Batches([(images, one_each)], CPU).sample(3, inputs_of)[1] is None


class TwoInputs(nn.Module):
    def forward(self, x, scale):
        return x * scale


def test_inputs_as_the_loss_gives_them_to_the_model():
    model, batch = TwoInputs(), {"x": torch.ones(2, 3), "y": torch.full((2, 1), 2.0)}
    by_position = inputs_given(model, guarded(lambda m, b: m(b["x"], b["y"]).sum()), batch)
    assert [t.shape for t in by_position] == [(2, 3), (2, 1)]
    by_name = inputs_given(model, guarded(lambda m, b: m(x=b["x"], scale=b["y"]).sum()), batch)
    assert list(by_name) == ["x", "scale"]
    assert not model._forward_pre_hooks
    for loss in (lambda m, b: m(b["x"], scale=b["y"]).sum(), lambda m, b: b["x"].sum()):
        with pytest.raises(ArgumentError, match="by position alone, or by name alone"):
            inputs_given(model, loss, batch)


def test_size_of_a_pass():
    batch = (torch.zeros(4, 2), torch.zeros(4))
    assert Batches([batch] * 5, CPU).size() == 20
    assert Batches(iter([batch] * 5), CPU).size() == 4


def test_loader_that_is_empty_the_second_time():
    class Once:
        used = False

        def __iter__(self):
            if not self.used:
                self.used = True
                yield torch.zeros(1)

    with pytest.raises(LoaderError, match="second time"):
        list(Batches(Once(), CPU).take(2))


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader(torch.arange(3), batch_size=4, drop_last=True)])
def test_loader_without_a_batch(loader):
    with pytest.raises(LoaderError, match="yields no batch"):
        Batches(loader, CPU)


@pytest.mark.parametrize("loader", [None, 3, lambda: [], nn.Linear(1, 1)])
def test_no_loader(loader):
    with pytest.raises(LoaderError, match="expected an iterable"):
        Batches(loader, CPU)


def test_nested_batches_are_moved():
    batch = {"x": torch.zeros(2), "more": [torch.ones(2), ("text", 3)]}
    moved = Batches([batch], torch.device("meta")).first
    assert moved["x"].device.type == moved["more"][0].device.type == "meta"
    assert moved["more"][1] == ("text", 3)


def test_inputs():
    x, y = torch.zeros(2, 3), torch.zeros(2)
    assert Batches([(x, y)], CPU).inputs() is not None
    assert torch.equal(Batches([[x, y]], CPU).inputs(), x)
    assert torch.equal(Batches([x], CPU).inputs(), x)
    for batch in ({"x": x}, ("text", y), ()):
        with pytest.raises(ArgumentError, match="example: the loader yields (dict|tuple) batches"):
            Batches([batch], CPU).inputs()


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (DataLoader(TensorDataset(torch.zeros(7, 2), torch.zeros(7)), 3), 7),
        ([(torch.zeros(5, 2), torch.zeros(5))], 5),
        ([torch.zeros(5, 2)], 5),
        ([{"image": torch.zeros(5, 2)}], 5),
        ([({"image": torch.zeros(5, 2)}, torch.zeros(5))], 5),
    ],
    ids=["data set", "pair", "tensor", "dict", "dict in a pair"],
)
def test_size(loader, size):
    assert Batches(loader, CPU).size() == size


class Wrapped(nn.Module):
    """Returns its logits the way many models do."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: (y, 1), lambda y: [y], lambda y: {"logits": y}, lambda y: {"out": (y,)}]
)
def test_cross_entropy_finds_the_logits(wrap):
    model = Wrapped(wrap)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    assert torch.equal(cross_entropy(model, (x, y)), F.cross_entropy(model.linear(x), y))


def test_cross_entropy_of_probabilities():
    model, x, p = nn.Linear(4, 3), torch.randn(5, 4), torch.rand(5, 3)
    assert torch.equal(cross_entropy(model, (x, p)), F.cross_entropy(model(x), p))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"targets \(4,\) do not fit the model's output \(5, 3\)"),
        (torch.full((5,), 3), r"targets \(5,\) do not fit"),
        (torch.zeros(5), r"targets \(5,\) do not fit"),
        ([0, 1, 2, 0, 1], "targets list do not fit"),
    ],
)
def test_targets_that_do_not_fit(targets, message):
    with pytest.raises(LoaderError, match=message):
        cross_entropy(nn.Linear(4, 3), (torch.randn(5, 4), targets))


def test_check_forward_names_the_batch():
    with pytest.raises(LoaderError, match=r"torch.float32 \(5, 7\), torch.int64 \(5,\)"):
        check_forward(nn.Linear(4, 3), (torch.randn(5, 7), torch.zeros(5, dtype=torch.long)), guarded(cross_entropy))
    check_forward(nn.Linear(4, 3), (torch.randn(5, 4), torch.zeros(5, dtype=torch.long)), guarded(cross_entropy))


def test_some_examples():
    x = {"a": torch.arange(5), "b": (torch.tensor(3.0), torch.zeros(5, 2)), "c": "text"}
    first = some_examples(x, 3)
    assert first["a"].tolist() == [0, 1, 2] and first["b"][1].shape == (3, 2)
    assert first["b"][0].item() == 3 and first["c"] == "text"


def test_some_examples_leave_inputs_without_a_batch_whole():
    x, grid = torch.arange(12).view(6, 2), torch.arange(10)
    first, whole = some_examples((x, grid), 3)
    assert first.equal(x[:3]) and whole is grid
    grid, first = some_examples({"grid": grid, "x": x}, 3).values()
    assert grid.shape == (3,) and first is x, "the first tensor says what the batch is, as in a trace"


def test_some_images_of_a_list():
    images = [torch.zeros(20, 4 + i, 5) for i in range(4)]
    flag = torch.zeros(9)
    assert [t.shape[0] for t in some_examples((images,), 3)[0]] == [20, 20, 20]
    first = some_examples({"images": images, "flag": flag}, 3)
    assert len(first["images"]) == 3 and first["flag"].shape == (9,)


def test_inputs_that_are_lists_of_images():
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 5)]
    for kind in (list, tuple):
        batches = Batches([(kind(images), [{"boxes": torch.zeros(1, 4)}] * 2)], CPU)
        (given,) = batches.inputs()
        assert type(given) is list and [t.shape for t in given] == [t.shape for t in images]
        assert batches.size() == 2


class TrainsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x, y):
        out = self.linear(self.norm(x))
        return F.cross_entropy(out, y) if self.training else [{"labels": out.argmax(1)}]


def test_a_loss_in_training_mode_only():
    loss = guarded(lambda model, batch: model(*batch))
    model = TrainsOnly().eval()
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    assert check_forward(model, batch, loss) is True
    assert not model.training and not model.norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(4)) and model.norm.num_batches_tracked == 0
    assert check_forward(nn.Linear(4, 3), batch, guarded(cross_entropy)) is False
