"""prune() end to end on real digits, and what it says to arguments it cannot use."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from reference.masked import counted_macs
from reference.networks import Plain, Residual
from reference.state import Frozen
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import stamp_fast
from stamp_fast import (
    ArgumentError,
    Budget,
    BudgetError,
    CompactionError,
    LoaderError,
    ModelError,
    StampFastError,
    TraceError,
)
from stamp_fast.methods import METHODS
from stamp_fast.report import GroupVerdict, PruneReport


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target))


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    """A small network that knows its digits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(4):
        for x, y in DataLoader(digits, 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert accuracy(model.eval(), digits) > 0.95
    return model


@pytest.fixture
def model(trained) -> nn.Module:
    return copy.deepcopy(trained)


@pytest.fixture
def loader(digits) -> DataLoader:
    return DataLoader(digits, 32)


@torch.no_grad()
def accuracy(model: nn.Module, digits: TensorDataset) -> float:
    x, y = digits.tensors
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for _ in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_method_on_digits(method, model, loader, digits):
    x = digits.tensors[0][:1]
    dense_macs = counted_macs(model, x)
    dense_params = sum(p.numel() for p in model.parameters())
    result = stamp_fast.prune(model, loader, method=method, seed=0, progress=False)
    assert result is model
    assert 0.49 <= counted_macs(model, x) / dense_macs <= 0.51
    # Ten classes: chance is 0.1. Before any fine-tuning the network is usable, but for random channels.
    assert accuracy(model, digits) > (0.3 if method == "random" else 0.5)

    told = stamp_fast.report(model)
    assert told.method == method and told.budget == {"macs": 0.5}
    assert told.macs_before == dense_macs and told.macs_after == counted_macs(model, x)
    assert told.params_before == dense_params
    assert told.params_after == sum(p.numel() for p in model.parameters())
    assert told.equality_error is not None and told.equality_error < 1e-5
    assert told.train_step_ms_before > 0 and told.train_step_ms_after > 0
    assert told.peak_memory_after < told.peak_memory_before
    assert set(told.seconds) == {"load", "trace", "score", "cut", "verify", "recalibrate", "measure"}
    verdicts = {g.name: g for g in told.groups}
    assert set(verdicts) == {"conv1", "conv2", "hidden", "head"}
    assert (verdicts["conv1"].channels, verdicts["conv1"].kept) == (24, model.conv1.out_channels)
    assert (verdicts["conv2"].channels, verdicts["conv2"].kept) == (48, model.conv2.out_channels)
    assert verdicts["head"].verdict == "kept" and "output of the model" in verdicts["head"].reason
    assert verdicts["conv2"].verdict == "pruned" and verdicts["conv2"].reason == ""


def test_pruned_network_learns_again(model, loader, digits):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    objects = [id(p) for p in model.parameters()]
    stamp_fast.prune(model, loader, optimizer=optimizer, seed=0, progress=False)
    assert [id(p) for p in model.parameters()] == objects
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert model.training
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert accuracy(model, digits) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_seed_makes_it_repeatable(method, model, loader):
    other = copy.deepcopy(model)
    data = list(loader)  # a DataLoader draws from the global state itself
    rng = torch.get_rng_state()
    stamp_fast.prune(model, data, method=method, seed=3, steps=5, progress=False)
    assert torch.equal(torch.get_rng_state(), rng), "a seeded prune moved the global random state"
    torch.rand(7)
    stamp_fast.prune(other, data, method=method, seed=3, steps=5, progress=False)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["stamp", "random"])
def test_seeds_differ(method, model, loader):
    other = copy.deepcopy(model)
    stamp_fast.prune(model, loader, method=method, seed=1, steps=5, progress=False)
    stamp_fast.prune(other, loader, method=method, seed=2, steps=5, progress=False)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_prints_nothing(model, loader, capfd):
    stamp_fast.prune(model, loader, steps=3, progress=False)
    stamp_fast.report(model)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_progress_never_writes_to_stdout(model, loader, capfd):
    stamp_fast.prune(model, loader, steps=3)
    assert capfd.readouterr().out == ""


def test_report_text_and_json(model, loader):
    stamp_fast.prune(model, loader, method="magnitude", keep=["conv1"], progress=False)
    told = stamp_fast.report(model)
    text = str(told)
    for part in (
        "magnitude",
        "MACs",
        "params",
        "train step",
        "conv2",
        "pruned",
        "kept on request",
        "output of the model",
    ):
        assert part in text, part
    read = json.loads(told.to_json())
    read["groups"] = [GroupVerdict(**group) for group in read["groups"]]
    assert PruneReport(**{field.name: read[field.name] for field in dataclasses.fields(PruneReport)}) == told


def test_report_of_a_model_never_pruned():
    with pytest.raises(ArgumentError, match="not pruned"):
        stamp_fast.report(Plain())


def test_keep_and_round_to(loader):
    model = Residual(width=16)
    stamp_fast.prune(
        model,
        loader,
        method="taylor",
        keep=["excite.bias"],
        round_to=2,
        budget=Budget(channels=0.7),
        progress=False,
    )
    assert model.conv3.out_channels == model.project.out_channels == 48
    widths = [model.conv1.out_channels, model.conv2.out_channels, model.squeeze.out_features]
    assert all(width % 2 == 0 for width in widths) and sum(widths) < 32 + 16 + 16


def test_flags_and_gradients_are_left_alone(model, loader):
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    flags = {name: m.training for name, m in model.named_modules()}
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    stamp_fast.prune(model, loader, steps=3, progress=False)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_caller_do_not_count(method, model, loader):
    """A gradient that lies around is no part of the scores, and is not lost."""
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    stamp_fast.prune(model, loader, method=method, steps=3, seed=0, progress=False)
    stamp_fast.prune(other, loader, method=method, steps=3, seed=0, progress=False)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.full_like(parameter, 1e3)), name


@pytest.mark.parametrize("method", METHODS)
def test_all_frozen_model(method, model, loader):
    model.requires_grad_(False)
    old = model.conv1.weight.clone()
    stamp_fast.prune(model, loader, method=method, steps=3, progress=False)
    assert model.conv1.out_channels < 24 or model.conv2.out_channels < 48
    assert not any(p.requires_grad for p in model.parameters())
    rows = {row.numpy().tobytes() for row in old}
    assert all(row.numpy().tobytes() in rows for row in model.conv1.weight), "a frozen weight has changed"


def test_frozen_parameters_keep_their_values(model, loader):
    model.conv1.weight.requires_grad_(False)
    old = {row.numpy().tobytes() for row in model.conv1.weight}
    stamp_fast.prune(model, loader, steps=3, seed=0, progress=False)
    assert all(row.numpy().tobytes() in old for row in model.conv1.weight)
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_gradient_context(method, context, model, loader):
    with context():
        stamp_fast.prune(model, loader, method=method, steps=3, budget=Budget(channels=0.5), progress=False)
    assert model.conv2.out_channels < 48


def test_generator_loader_is_enough(model):
    data = batches()
    stamp_fast.prune(model, (batch for batch in data), steps=7, progress=False)
    assert model.conv2.out_channels < 48


def test_any_batch_with_a_loss_function(model):
    data = [{"image": x, "label": y} for x, y in batches()]
    loss = lambda m, b: F.cross_entropy(m(b["image"]), b["label"])  # noqa: E731
    with pytest.raises(ArgumentError, match="example"):
        stamp_fast.prune(model, data, loss_fn=loss, steps=3, progress=False)
    stamp_fast.prune(model, data, loss_fn=loss, example=data[0]["image"], steps=3, progress=False)
    assert model.conv2.out_channels < 48


def test_channels_last_and_float64(model, digits):
    model = model.double().to(memory_format=torch.channels_last)
    x, y = digits.tensors
    stamp_fast.prune(model, [(x[:32].double(), y[:32])], steps=3, progress=False)
    assert model.conv2.weight.dtype == torch.float64
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", METHODS)
def test_float64_model(method, model, digits):
    x, y = digits.tensors
    stamp_fast.prune(model.double(), [(x[:32].double(), y[:32])], method=method, steps=3, progress=False)
    assert model.conv2.out_channels < 48


def test_compiled_model_is_unwrapped(model, loader):
    compiled = torch.compile(model, backend="eager")
    assert stamp_fast.prune(compiled, loader, method="magnitude", progress=False) is compiled
    assert model.conv2.out_channels < 48
    assert stamp_fast.report(compiled).method == "magnitude"


# --- arguments it cannot use ---
class Unmade:
    """`make(model) -> keyword arguments of prune`, the error, and what its message has to say."""

    def __init__(self, make, error, match, change=lambda model: model) -> None:
        self.make, self.error, self.match, self.change = make, error, match, change


def raising_after(count: int):
    yield from batches(count)
    raise OSError("the disk is gone")


class Restartable:
    """Raises in the middle of every pass."""

    def __iter__(self):
        return raising_after(2)


def with_nan(model: nn.Module) -> nn.Module:
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    return model


def with_inf_statistic(model: nn.Module) -> nn.Module:
    model.bn1.running_var[3] = float("inf")
    return model


def half_on_meta(model: nn.Module) -> nn.Module:
    model.head.to("meta")
    return model


def vector(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class CountsCalls:
    """A loss that turns NaN after some calls."""

    def __init__(self, sound: int) -> None:
        self.left = sound

    def __call__(self, model: nn.Module, batch) -> Tensor:
        self.left -= 1
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if self.left >= 0 else loss * float("nan")


def in_inference_mode():
    with torch.inference_mode():
        return Plain()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("norm", [True, False])
def test_stamp_stands_losses_of_any_scale(scale, norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), *[nn.BatchNorm2d(16)] * norm, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1))
    data = [(torch.randn(16, 1, 8, 8), scale * torch.randn(16, 1)) for _ in range(3)]
    stamp_fast.prune(model, data, loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]), steps=10, seed=0, progress=False)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stamp_on_other_dtypes(dtype):
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(64, 10),
    ).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches(3, 16)]
    head = model[-1].weight.detach().clone()
    stamp_fast.prune(model, data, loss_fn=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), steps=3, progress=False)
    assert all(bool(p.isfinite().all()) and p.dtype == dtype for p in model.parameters())
    assert model[-1].weight.shape[1] < head.shape[1]


@pytest.mark.parametrize("by", ["position", "name"])
def test_data_behind_an_example_is_what_is_folded_on(monkeypatch, by):
    """Batches whose form says nothing need `example`, but that is for the trace alone."""
    data = [{"pixels": x, "label": y} for x, y in batches(4, 100)]
    seen = []
    module = sys.modules["stamp_fast.cutting"]
    original = module.reconstruct
    monkeypatch.setattr(
        module, "reconstruct", lambda graph, keep, inputs: seen.append(inputs) or original(graph, keep, inputs)
    )

    def loss(model, batch):
        logits = model(batch["pixels"]) if by == "position" else model(x=batch["pixels"])
        return F.cross_entropy(logits, batch["label"])

    options = {"method": "magnitude", "reconstruction": True, "loss_fn": loss, "progress": False}
    stamp_fast.prune(Plain(), data, example=torch.zeros(1, 1, 8, 8), **options)
    (inputs,) = seen
    tensors = [one["x"] if by == "name" else one[0] for one in inputs]
    assert torch.equal(torch.cat(tensors), torch.cat([d["pixels"] for d in data])[:256])


def on(loader, **more):
    return lambda model: {"loader": loader() if callable(loader) else loader, **more}


GOOD = batches
UNUSABLE = {
    "empty-loader": Unmade(lambda m: {"loader": []}, LoaderError, "loader: yields no batch"),
    "empty-generator": Unmade(lambda m: {"loader": iter(())}, LoaderError, "loader: yields no batch"),
    "lambda-loader": Unmade(lambda m: {"loader": lambda: batches()}, LoaderError, "loader: expected an iterable"),
    "wrong-image-shape": Unmade(
        on([(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]),
        LoaderError,
        r"loader: .*\(4, 3, 8, 8\)",
    ),
    "tensors-only": Unmade(on([torch.randn(4, 1, 8, 8)]), LoaderError, r"loader: expected \(inputs, targets\)"),
    "three-parts": Unmade(on([(torch.randn(4, 1, 8, 8),) * 3]), LoaderError, "of length 3"),
    "targets-out-of-range": Unmade(
        on([(torch.randn(4, 1, 8, 8), torch.full((4,), 10))]), LoaderError, "targets .* do not fit"
    ),
    "targets-of-another-length": Unmade(
        on([(torch.randn(4, 1, 8, 8), torch.zeros(3, dtype=torch.long))]),
        LoaderError,
        "targets .* do not fit",
    ),
    "targets-of-another-type": Unmade(on([(torch.randn(4, 1, 8, 8), "cat")]), LoaderError, "targets str do not fit"),
    "nan-images": Unmade(
        on([(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long))]),
        LoaderError,
        "loss .* nan",
    ),
    "loader-raises-in-the-middle": Unmade(
        lambda m: {"loader": Restartable(), "steps": 9}, LoaderError, "the disk is gone"
    ),
    "generator-raises-in-the-middle": Unmade(
        lambda m: {"loader": raising_after(2), "steps": 9}, LoaderError, "the disk is gone"
    ),
    "later-batch-of-another-shape": Unmade(
        lambda m: {"loader": [*batches(2), (torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]},
        LoaderError,
        "loader",
    ),
    "budget-zero": Unmade(
        lambda m: {"loader": GOOD(), "budget": Budget(macs=0)}, ArgumentError, r"macs .*\(0, 1\].* 0"
    ),
    "budget-above-one": Unmade(
        lambda m: {"loader": GOOD(), "budget": Budget(params=1.2)}, ArgumentError, "params .* 1.2"
    ),
    "budget-nan": Unmade(
        lambda m: {"loader": GOOD(), "budget": Budget(macs=float("nan"))}, ArgumentError, "macs .* nan"
    ),
    "budget-text": Unmade(lambda m: {"loader": GOOD(), "budget": Budget(macs="half")}, ArgumentError, "'half'"),
    "budget-empty": Unmade(lambda m: {"loader": GOOD(), "budget": Budget()}, ArgumentError, "at least one of macs="),
    "budget-none": Unmade(
        lambda m: {"loader": GOOD(), "budget": None}, ArgumentError, "budget: expected a Budget.*None"
    ),
    "budget-number": Unmade(lambda m: {"loader": GOOD(), "budget": 0.5}, ArgumentError, "budget: expected a Budget"),
    "budget-out-of-reach": Unmade(
        lambda m: {"loader": GOOD(), "budget": Budget(macs=1e-6), "method": "magnitude"},
        BudgetError,
        "out of reach",
    ),
    "method-typo": Unmade(
        lambda m: {"loader": GOOD(), "method": "magnitud"}, ArgumentError, "method: .*stamp.*'magnitud'"
    ),
    "method-none": Unmade(lambda m: {"loader": GOOD(), "method": None}, ArgumentError, "method"),
    "method-list": Unmade(lambda m: {"loader": GOOD(), "method": ["stamp"]}, ArgumentError, "method"),
    "steps-zero": Unmade(lambda m: {"loader": GOOD(), "steps": 0}, ArgumentError, "steps: must be at least 1"),
    "steps-text": Unmade(lambda m: {"loader": GOOD(), "steps": "many"}, ArgumentError, "steps"),
    "round-to-zero": Unmade(lambda m: {"loader": GOOD(), "round_to": 0}, ArgumentError, "round_to: .* 0"),
    "keep-typo": Unmade(lambda m: {"loader": GOOD(), "keep": ["conv1", "covn2"]}, ArgumentError, "keep: .*'covn2'"),
    "keep-string": Unmade(lambda m: {"loader": GOOD(), "keep": "conv1"}, ArgumentError, "keep: expected a list"),
    "keep-module": Unmade(lambda m: {"loader": GOOD(), "keep": [m.conv1]}, ArgumentError, "keep: expected a list"),
    "keep-none": Unmade(lambda m: {"loader": GOOD(), "keep": None}, ArgumentError, "keep"),
    "strict-text": Unmade(lambda m: {"loader": GOOD(), "strict": "yes"}, ArgumentError, "strict: .*'yes'"),
    "verify-none": Unmade(lambda m: {"loader": GOOD(), "verify": None}, ArgumentError, "verify: .*None"),
    "seed-text": Unmade(lambda m: {"loader": GOOD(), "seed": "lucky"}, ArgumentError, "seed"),
    "everything-kept": Unmade(
        lambda m: {"loader": GOOD(), "keep": ["conv1", "conv2", "hidden"]},
        ModelError,
        "nothing to prune.*kept on request",
    ),
    "optimizer-of-another-model": Unmade(
        lambda m: {"loader": GOOD(), "optimizer": torch.optim.SGD(Plain(width=3).parameters(), lr=0.1)},
        ArgumentError,
        "optimizer: holds none",
    ),
    "optimizer-class": Unmade(lambda m: {"loader": GOOD(), "optimizer": torch.optim.SGD}, ArgumentError, "optimizer"),
    "vector-loss": Unmade(lambda m: {"loader": GOOD(), "loss_fn": vector}, ArgumentError, r"loss_fn: .*scalar.*\(8,\)"),
    "number-loss": Unmade(
        lambda m: {"loader": GOOD(), "loss_fn": lambda m, b: 1.0}, ArgumentError, "loss_fn: .*scalar"
    ),
    "nan-loss": Unmade(lambda m: {"loader": GOOD(), "loss_fn": CountsCalls(0)}, StampFastError, "nan"),
    "nan-loss-later": Unmade(lambda m: {"loader": GOOD(), "loss_fn": CountsCalls(3)}, StampFastError, "(?i)nan"),
    "nan-loss-later-taylor": Unmade(
        lambda m: {"loader": GOOD(), "loss_fn": CountsCalls(2), "method": "taylor"}, StampFastError, "(?i)nan"
    ),
    "loss-not-callable": Unmade(lambda m: {"loader": GOOD(), "loss_fn": "ce"}, StampFastError, "loss_fn"),
    "detached-loss": Unmade(
        lambda m: {"loader": GOOD(), "loss_fn": lambda n, b: F.cross_entropy(n(b[0]), b[1]).detach()},
        StampFastError,
        "loss_fn",
    ),
    "example-of-another-shape": Unmade(
        lambda m: {"loader": GOOD(), "example": torch.randn(2, 3, 8, 8)}, TraceError, "meta tensors.*conv1"
    ),
    "nan-weights": Unmade(on(batches), ModelError, "'conv2.weight' holds NaN", with_nan),
    "inf-statistic": Unmade(on(batches), ModelError, "'bn1.running_var' holds NaN or inf", with_inf_statistic),
    "two-devices": Unmade(
        on(batches), ModelError, "several devices .*conv1.weight.*cpu.*head.weight.*meta", half_on_meta
    ),
    "meta": Unmade(on(batches), ModelError, "meta device", lambda m: m.to("meta")),
    "data-parallel": Unmade(on(batches), ModelError, "DataParallel.*model.module", nn.DataParallel),
    "scripted": Unmade(on(batches), ModelError, "ScriptModule", lambda m: torch.jit.trace(m, torch.randn(2, 1, 8, 8))),
    "lazy": Unmade(on(batches), ModelError, "lazy", lambda m: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten())),
    "no-parameters": Unmade(on(batches), ModelError, "no parameters", lambda m: nn.Sequential(nn.Flatten())),
    "one-layer": Unmade(
        on(batches),
        ModelError,
        "nothing to prune.*output of the model",
        lambda m: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    ),
    "inference-mode": Unmade(on(batches), ModelError, "made in torch.inference_mode", lambda m: in_inference_mode()),
    "loss-by-name": Unmade(on(batches, loss_fn="ce"), ArgumentError, "loss_fn: expected a function"),
    "not-a-module": Unmade(on(batches), ArgumentError, "model: expected a torch.nn.Module", lambda m: m.forward),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable(name, model):
    bad = UNUSABLE[name]
    model = bad.change(model)
    before = None
    if isinstance(model, nn.Module) and name not in ("scripted", "lazy", "no-parameters"):
        for parameter in model.parameters():
            if parameter.device.type != "meta":
                parameter.grad = torch.ones_like(parameter)
        if name not in ("meta", "two-devices"):
            before = Frozen(model)
    with pytest.raises(bad.error, match=bad.match):
        stamp_fast.prune(model, progress=False, **bad.make(model))
    if before is not None:
        before.assert_same(rng=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("phase", ["select_and_cut", "recalibrate", "measured", "copy_of"])
def test_failure_in_any_phase_changes_nothing(monkeypatch, phase, method, model, loader):
    from importlib import import_module

    road = import_module("stamp_fast.prune")
    original = getattr(road, phase)

    def failing(*args, **kwargs):
        original(*args, **kwargs)
        raise RuntimeError("injected")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    monkeypatch.setattr(road, phase, failing)
    before = Frozen(model, optimizer)
    with pytest.raises(RuntimeError, match="injected"):
        stamp_fast.prune(model, loader, method=method, steps=3, optimizer=optimizer, progress=False)
    before.assert_same(rng=False)
    monkeypatch.setattr(road, phase, original)
    stamp_fast.prune(model, loader, method=method, steps=3, optimizer=optimizer, progress=False)


def test_size_fixed_in_training_mode_alone_is_not_blamed_on_the_loader(loader):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last, self.head = nn.Conv2d(1, 24, 3), nn.Conv2d(24, 16, 3), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.conv(x))
            h = h * torch.rand(24, 1, 1) if self.training else h
            return self.head(torch.relu(self.last(h)).mean((2, 3)))

    model = Noisy()
    before = Frozen(model)
    with pytest.raises(CompactionError, match=r"training step, which the dense one can: .*\(24\).*keep="):
        stamp_fast.prune(model, loader, method="magnitude", progress=False)
    before.assert_same(rng=False)
    stamp_fast.prune(model, loader, method="magnitude", keep=["conv"], progress=False)
    assert model.conv.out_channels == 24 and model.last.out_channels < 16


def test_failure_puts_back_a_buffer_that_the_forward_replaces(digits):
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.Linear(24, 10)
            self.register_buffer("mean", torch.zeros(24))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x))
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 2, 3))
            return self.head(torch.relu(h - self.mean[:, None, None]).mean((2, 3)))

    model = Centred()
    good = next(iter(DataLoader(digits, 32)))
    model(good[0])
    before = Frozen(model)
    with pytest.raises(LoaderError, match="targets"):  # as late as its statistics are taken anew
        stamp_fast.prune(model, [good, (good[0], good[1] + 90)], method="magnitude", progress=False)
    before.assert_same()


def test_other_batches_than_the_first_are_moved_and_read(model):
    """Every one of `steps` batches is used; the loader is begun anew as often as it takes."""
    seen = []

    class Counting:
        def __iter__(self):
            for i, batch in enumerate(batches(3)):
                seen.append(i)
                yield batch

    stamp_fast.prune(model, Counting(), steps=7, progress=False)
    assert seen[:1] == [0] and seen.count(0) >= 3 and seen.count(2) >= 2


def test_every_layer_has_a_verdict():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.c0, self.c1, self.c2 = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
            self.dw, self.c3 = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 12, 1)
            self.sn = nn.utils.parametrizations.spectral_norm(nn.Conv2d(12, 8, 1))
            self.fc, self.unused = nn.Linear(8, 10), nn.Linear(5, 6)

        def forward(self, x):
            h = torch.relu(self.c0(x))
            h = self.dw(h + self.c2(torch.relu(self.c1(h))))
            return self.fc(self.sn(self.c3(h)).mean((2, 3)))

    batch = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    report = stamp_fast.report(stamp_fast.prune(Mixed(), [batch], method="magnitude", progress=False))
    rows = {row.name: row for row in report.groups}
    assert set(rows["c0"].layers) == {"c0", "c2", "dw"} and rows["c0"].verdict == "pruned"
    assert rows["sn"].verdict == "kept" and "aten.mv" in rows["sn"].reason
    assert rows["fc"].reason.startswith("output of the model") and rows["unused"].reason == "unused in this forward"
    named = set(rows) | {layer for row in report.groups for layer in row.layers}
    assert named == {"c0", "c1", "c2", "dw", "c3", "sn", "fc", "unused"}
    assert all(row.reason for row in report.groups if row.verdict == "kept")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3),
        lambda conv: nn.utils.prune.random_structured(conv, "weight", 0.5, dim=1),
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")),
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["mask", "structured mask", "weight_norm", "spectral_norm", "parametrization"],
)
def test_layers_with_a_computed_weight_are_measured(wrap, model, loader):
    wrap(model.conv2)
    model.feature_cache = [model.conv1(torch.randn(2, 1, 8, 8))]  # what some forwards leave behind
    stamp_fast.prune(model, loader, method="magnitude", budget=Budget(channels=0.8), progress=False)
    report = stamp_fast.report(model)
    assert report.train_step_ms_before > 0 and report.peak_memory_after > 0
    assert not any("not measured" in note for note in report.notes)
    assert model.feature_cache[0].grad_fn is not None, "the model's own tensors are left alone"


def test_a_last_batch_of_one_names_the_way_out(digits):
    x, y = digits.tensors
    loader = DataLoader(TensorDataset(x[:33], y[:33]), 32)
    before = Frozen(model := Plain())
    with pytest.raises(LoaderError, match=r"\(1, 1, 8, 8\).*more than 1 value per channel.*drop_last=True"):
        stamp_fast.prune(model, loader, method="taylor", progress=False)
    before.assert_same(rng=False)
    loader = DataLoader(TensorDataset(x[:33], y[:33]), 32, drop_last=True)
    stamp_fast.prune(model, loader, method="taylor", progress=False)
