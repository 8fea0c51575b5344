import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stamp_fast import ArgumentError, CheckpointError, LoaderError
from stamp_fast.metapruning import PruningNet, WeightGenerator
from stamp_fast.recalibrate import recalibrate

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """All that is special: a residual sum, a depthwise convolution, a concatenation, a bias, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn_depthwise = nn.BatchNorm2d(12)
        self.pointwise = nn.Conv2d(12, 12, 1, bias=False)
        self.bn_pointwise = nn.BatchNorm2d(12)
        self.side = nn.Conv2d(12, 20, 1)
        self.bn_both = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.bn_pointwise(self.pointwise(F.relu(self.bn_depthwise(self.depthwise(x)))))
        x = F.relu(self.bn_both(torch.cat([x, self.side(x)], 1)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def net_of(**options) -> PruningNet:
    torch.manual_seed(0)
    return PruningNet(Net(), EXAMPLE, hidden=8, **options)


def data(count: int = 4, size: int = 16, seed: int = 0) -> list:
    """Images whose class is the brightest corner."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        labels = torch.randint(4, (size,), generator=generator)
        images = torch.randn(size, 3, 8, 8, generator=generator)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2
        batches.append((images, labels))
    return batches


def test_a_generator_is_two_linear_layers_cropped():
    torch.manual_seed(0)
    generator = WeightGenerator(torch.randn(6, 4, 3, 3), 2, 5)
    scales = torch.tensor([0.3, 0.7])
    hidden = F.relu(generator.first.weight @ scales + generator.first.bias)
    second = nn.Linear(5, 6 * 4 * 9)
    with torch.no_grad():
        second.weight.copy_(generator.weight.reshape(-1, 5))
        second.bias.copy_(generator.bias.flatten())
    whole = second(hidden).reshape(6, 4, 3, 3)
    torch.testing.assert_close(generator(scales, [None] * 4), whole)
    kept = [torch.arange(4), torch.tensor([0, 2]), None, None]
    torch.testing.assert_close(generator(scales, kept), whole[:4][:, [0, 2]])


def test_a_fresh_generator_gives_weights_of_the_usual_size():
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(64, 32, 3, 3)
    made = WeightGenerator(weight, 2, 32)(torch.tensor([0.5, 1.0]), [None] * 4)
    assert 0.9 < made.std() / weight.std() < 1.5


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_genome_runs_as_the_network_that_it_builds(seed, affine):
    net = net_of(affine=affine)
    if affine:
        for bank in net.norms.values():
            nn.init.normal_(bank)
    genome = net.space.random(random.Random(seed))
    images = torch.randn(4, 3, 8, 8)
    built = net.build(genome)
    assert {name: m.weight.shape[0] for name, m in built.named_modules() if name in genome.widths()} == genome.widths()
    torch.testing.assert_close(net.train()(genome, images), built.train()(images))
    assert [p.requires_grad for p in built.parameters()] == [True] * len(list(built.parameters()))


def test_weights_are_given_the_scales_of_the_genes_that_touch_them():
    net = net_of()
    names = net.space.graph.recording.slots
    genes = {names[i]: [net.space.genes[g][0].name for g in found] for i, found in net._genes.items()}
    assert genes["stem.weight"] == ["stem"] and genes["depthwise.weight"] == ["stem"]
    assert genes["side.weight"] == ["stem", "side"] and genes["last.weight"] == ["stem", "side", "last"]
    one, other = (net.space.genome(ids) for ids in ([5, 9, 9], [5, 9, 20]))
    images = torch.randn(2, 3, 8, 8)
    slots = {name: i for i, name in enumerate(names)}
    for name, same in (("side.weight", True), ("last.weight", False)):
        mine, theirs = (net.weights(g)[slots[name]] for g in (one, other))
        assert torch.equal(mine[:1], theirs[:1]) == same
    assert net(one, images).shape == (2, 4)


def test_the_classifier_is_ordinary_and_cropped():
    net = net_of()
    names = net.space.graph.recording.slots
    slot = names.index("fc.weight")
    assert str(slot) in net.shared
    genome = net.space.genome([0, 0, 10])
    torch.testing.assert_close(net.weights(genome)[slot], net.shared[str(slot)][:, : genome.widths()["last"]])


def test_every_width_has_scales_and_shifts_of_its_own():
    net = net_of(affine=True)
    genome = net.space.genome([3, 20, 9])
    net.train()(genome, torch.randn(4, 3, 8, 8)).square().sum().backward()
    slot = str(net.space.graph.recording.slots.index("bn_both.weight"))
    touched = net.norms[slot].grad.abs() > 0
    expected = torch.zeros_like(touched)
    widths = genome.widths()
    expected[3, : widths["stem"]] = True  # positions of the stem, at the row of the stem's width
    expected[20, 12 : 12 + widths["side"]] = True
    assert torch.equal(touched, expected)


def test_a_small_genome_costs_a_small_step():
    net = net_of().train()
    images = torch.randn(4, 3, 8, 8)
    flops = {}
    for genome in (net.space.smallest, net.space.largest):
        with FlopCounterMode(display=False) as counter:
            net(genome, images).sum().backward()
        flops[genome.ids] = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        assert flops[genome.ids] == pytest.approx(2 * 4 * (genome.macs() - 4 * genome.widths()["last"]), rel=0.01)
    assert flops[net.space.smallest.ids] < 0.1 * flops[net.space.largest.ids]


def test_gradients_reach_the_generators_and_nothing_of_the_given_model():
    model = Net()
    torch.manual_seed(0)
    net = PruningNet(model, EXAMPLE, hidden=8)
    before = copy.deepcopy(model.state_dict())
    fresh = copy.deepcopy(net.state_dict())
    net.fit(data(), epochs=1, lr=0.1, progress=False)
    assert not any(torch.equal(net.state_dict()[name], fresh[name]) for name in fresh if name.endswith(".weight"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())
    inner = net.space.graph.model
    assert all(torch.equal(tensor, inner.state_dict()[name]) for name, tensor in before.items())


def test_fitting_helps_and_repeats():
    batches = data(8)
    scores, states = [], []
    for _ in range(2):
        net = net_of()
        genome = net.space.genome([12, 12, 12])
        before = net.score(genome, batches[:2], batches[4:])
        net.fit(batches, epochs=12, lr=0.1, seed=3, progress=False)
        scores.append((before, net.score(genome, batches[:2], batches[4:])))
        states.append(net.state_dict())
    assert scores[0] == scores[1]
    assert scores[0][1] > scores[0][0] + 0.3
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = net_of().fit(batches, epochs=12, lr=0.1, seed=4, progress=False).state_dict()
    assert any(not torch.equal(states[0][name], other[name]) for name in other)


def test_the_learning_rate_falls_to_zero_in_a_line(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def noted(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    net_of().fit(data(4), epochs=2, lr=0.8, progress=False)
    assert rates == pytest.approx([0.8 * (1 - n / 8) for n in range(8)])


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path):
    batches = data()
    options = {"epochs": 4, "lr": 0.1, "seed": 1, "progress": False}
    expected = net_of().fit(batches, **options).state_dict()

    class Killed(Exception):
        pass

    class Breaks(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for number, batch in enumerate(super().__iter__()):
                if self.passes == 4 and number == 2:  # the first pass is a look at the first batch
                    raise Killed
                yield batch

    path = tmp_path / "net.safetensors"
    with pytest.raises(LoaderError, match="Killed"):
        net_of().fit(Breaks(batches), checkpoint=path, **options)
    found = net_of().fit(batches, checkpoint=path, **options).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match="other lr"):
        net_of().fit(batches, checkpoint=path, **{**options, "lr": 0.2})
    with pytest.raises(CheckpointError, match="another network"):
        net_of(round_to=2).fit(batches, checkpoint=path, **options)


def test_a_score_is_that_of_the_built_network_with_fresh_statistics():
    batches = data(6)
    net = net_of().fit(batches, epochs=4, lr=0.1, progress=False)
    for seed in range(3):
        genome = net.space.random(random.Random(seed))
        built = net.build(genome)
        recalibrate(built, batches[:2], lambda model, batch: model(batch[0]))
        built.eval()
        right = sum((built(images).argmax(1) == labels).sum().item() for images, labels in batches[2:])
        assert net.score(genome, batches[:2], batches[2:]) == right / 64
        again = net.score(genome, batches[:2], batches[2:], lambda m, b: (2.0 * len(b[0]), len(b[0])))
        assert again == 2.0


def test_what_cannot_be_is_refused():
    net = net_of()
    with pytest.raises(ArgumentError, match="hidden"):
        net_of_hidden = PruningNet(Net(), EXAMPLE, hidden=0)
        del net_of_hidden
    with pytest.raises(ArgumentError, match="not of this network's space"):
        net(net_of().space.smallest, EXAMPLE)
    for epochs in (0, 1.5, True):
        with pytest.raises(ArgumentError, match="epochs"):
            net.fit(data(), epochs=epochs)
    with pytest.raises(ArgumentError, match="calibration: has no batch"):
        net.score(net.space.smallest, [], data(1))
    with pytest.raises(ArgumentError, match="validation: has no examples"):
        net.score(net.space.smallest, data(1), [])
    with pytest.raises(LoaderError, match="yields no batch"):
        net.fit([], epochs=1)


def test_frozen_parameters_stay_as_they_are():
    model = Net()
    model.stem.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    net = PruningNet(model, EXAMPLE, hidden=8)
    net.fit(data(), epochs=1, lr=0.1, progress=False)
    genome = net.space.genome([9, 9, 9])
    for built in (net.build(genome), genome.build()):
        width = built.stem.out_channels
        assert torch.equal(built.stem.weight, model.stem.weight[:width])
        assert not built.stem.weight.requires_grad and built.side.weight.requires_grad
    assert torch.equal(net.build(genome).fc.bias, model.fc.bias)


def test_only_the_statistics_of_batch_norms_are_taken_anew():
    class Centered(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.full((3, 1, 1), 5.0))

        def forward(self, x):
            return super().forward(x - self.running_mean)

    torch.manual_seed(0)
    net = PruningNet(Centered().eval(), EXAMPLE, hidden=8)
    genome = net.space.genome([9, 9, 9])
    assert net.build(genome).running_mean.eq(5).all()
    built = net.build(genome)
    recalibrate(built, data(2), lambda model, batch: model(batch[0]))
    assert not built.bn.running_mean.eq(0).any()
    with_statistics = net.score(genome, data(2), data(2), lambda m, b: (m(b[0]).sum().item(), 1))
    built.eval()
    with torch.no_grad():
        expected = sum(built(images).sum().item() for images, _ in data(2)) / 2
    assert with_statistics == pytest.approx(expected, rel=1e-4)


def test_batches_of_any_form_with_a_metric():
    class Two(Net):
        def forward(self, x, y):
            return super().forward(x + y)

    torch.manual_seed(0)
    net = PruningNet(Two(), (EXAMPLE, EXAMPLE), hidden=8)
    batches = [{"x": x, "y": 0 * x, "labels": labels} for x, labels in data(2)]

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"], batch["y"]), batch["labels"])

    def metric(model, batch):
        right = model(batch["x"], batch["y"]).argmax(1) == batch["labels"]
        return right.sum().item(), len(right)

    net.fit(batches, epochs=1, lr=0.1, loss_fn=loss, progress=False)
    genome = net.space.genome([9, 9, 9])
    assert 0 <= net.score(genome, batches, batches, metric) <= 1
    with pytest.raises(ArgumentError, match="pass metric="):
        net.score(genome, batches, batches)


@pytest.mark.parametrize("targets", [torch.rand(16, 4), torch.zeros(16, 2, dtype=torch.long)])
def test_the_default_metric_refuses_what_it_cannot_count(targets):
    net = net_of()
    with pytest.raises(ArgumentError, match="pass metric="):
        net.score(net.space.smallest, data(1), [(data(1)[0][0], targets)])


def test_other_dtypes():
    torch.manual_seed(0)
    batches = [(images.double(), labels) for images, labels in data(2)]
    net = PruningNet(Net().double(), EXAMPLE.double(), hidden=8).fit(batches, epochs=1, lr=0.1, progress=False)
    assert net.build(net.space.smallest).stem.weight.dtype == torch.float64
    moved = net_of().double().fit(batches, epochs=1, lr=0.1, progress=False)
    assert 0 <= moved.score(moved.space.smallest, batches, batches) <= 1


def test_gradients_from_before_do_not_count():
    first = net_of()
    first(first.space.smallest, torch.randn(2, 3, 8, 8)).sum().backward()
    states = [net.fit(data(2), epochs=1, lr=0.1, progress=False).state_dict() for net in (first, net_of())]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    options = {"epochs": 1, "lr": 0.1, "checkpoint": path, "progress": False}
    net_of().fit(data(1), **options)
    with pytest.raises(CheckpointError, match="another network"):
        net_of(affine=True).fit(data(1), **options)
    with pytest.raises(CheckpointError, match="label_smoothing"):
        net_of().fit(data(1), label_smoothing=0.2, **options)
