"""Optimizers, schedulers, scalers, averages and hooks go on after a cut as if the network had always been small."""

import copy
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from reference.masked import kept_positions
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise, relative_error
from reference.state import Frozen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stamp_fast
from stamp_fast import ArgumentError, Budget, ChannelGraph, StampFastError, importance, trace

OPTIMIZERS = sorted(
    (
        kind
        for kind in vars(torch.optim).values()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ),
    key=lambda kind: kind.__name__,
)
OPTIONS = {
    "amsgrad": True,
    "centered": True,
    "decoupled_weight_decay": True,
    "foreach": True,
    "fused": True,
    "maximize": True,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.1,
}


def variants() -> Iterator[object]:
    """Every optimizer of torch.optim as it comes, and with each option that it has."""
    for kind in OPTIMIZERS:
        yield pytest.param(kind, {}, id=kind.__name__)
        for option, value in OPTIONS.items():
            if option in inspect.signature(kind).parameters:
                options = {option: value} | ({"momentum": 0.9} if option == "nesterov" else {})
                yield pytest.param(kind, options, id=f"{kind.__name__}-{option}")


class Words(nn.Module):
    """An embedding with sparse gradients in front of linear layers; every parameter a matrix."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12, sparse=sparse)
        self.hidden = nn.Linear(12, 16, bias=False)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.words(x).sum(1))))


def example(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Words):
        return torch.randint(20, (16, 3), generator=generator), torch.randint(5, (16,), generator=generator)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (16,), generator=generator)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    for step in range(steps):
        x, y = example(model, seed + step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            return loss

        closure()
        for optimizer in optimizers:
            optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


def by_hand(value: object, positions: list[Tensor]) -> object:
    """What stays of a tensor that has the size of its parameter, or 1, along every dim."""
    if not isinstance(value, Tensor) or value.dim() != len(positions):
        return copy.deepcopy(value)
    for dim, stays in enumerate(positions):
        if value.shape[dim] == len(stays):
            value = value.index_select(dim, stays.nonzero().flatten())
    return value.detach().clone()


def small_twin(graph: ChannelGraph, keep: Tensor) -> nn.Module:
    """The small network made from scratch: every module as wide as the live part of its own tensors."""
    twin = copy.deepcopy(graph.model)
    positions = kept_positions(graph, keep)
    for path, module in twin.named_modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None:
                    continue
                new = by_hand(old, positions[f"{path}.{key}".removeprefix(".")])
                table[key] = nn.Parameter(new, requires_grad=old.requires_grad) if table is module._parameters else new
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.num_features = len(weight)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            names = (
                ("out_channels", "in_channels") if isinstance(module, nn.Conv2d) else ("out_features", "in_features")
            )
            for name, size in zip(names, weight.shape, strict=False):
                setattr(module, name, size)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape
    return twin


def handed_on(
    optimizer: torch.optim.Optimizer, model: nn.Module, twin: nn.Module, positions: dict[str, list[Tensor]]
) -> torch.optim.Optimizer:
    """A new optimizer of the same kind over the small twin, with the state of the live channels."""
    of = {id(p): (twin.get_parameter(name), positions[name]) for name, p in model.named_parameters()}
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"params": [of[id(p)][0] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    defaults = {k: v for k, v in optimizer.defaults.items() if k in inspect.signature(type(optimizer)).parameters}
    fresh = type(optimizer)(groups, **defaults)
    for owner, state in optimizer.state.items():
        parameter, stays = of[id(owner)]
        fresh.state[parameter] = {key: by_hand(value, stays) for key, value in state.items()}
    return fresh


def assert_same_network(model: nn.Module, twin: nn.Module, tolerance: float = 0.0) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert ours.isfinite().all(), name
        assert torch.equal(ours, theirs) or relative_error(ours, theirs) <= tolerance, name


@pytest.mark.parametrize(("kind", "options"), list(variants()))
def test_next_steps_are_those_of_the_small_network(kind, options):
    matrices_only = kind in (torch.optim.Muon, torch.optim.SparseAdam)
    model = randomise(Words(kind is torch.optim.SparseAdam) if matrices_only else Residual()).double().train()
    chosen = [model.words.weight] if kind is torch.optim.SparseAdam else list(model.parameters())
    rest = torch.optim.SGD([p for p in model.parameters() if not any(p is c for c in chosen)] or chosen, 0.01)
    optimizer = kind(chosen, lr=0.001 if "maximize" in options else 0.01, **options)
    train(model, optimizer, rest)
    graph = trace(model, example(model)[0])
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)

    if kind is torch.optim.LBFGS:
        before = Frozen(model, optimizer)
        with pytest.raises(ArgumentError, match="optimizer: LBFGS keeps .*make a new optimizer"):
            graph.compact(keep, optimizer=[optimizer, rest])
        before.assert_same()
        return
    twin = small_twin(graph, keep)
    twin_optimizers = [handed_on(o, model, twin, positions) for o in (optimizer, rest)]
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    graph.compact(keep, optimizer=[optimizer, rest])
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == order
    assert_same_network(model, twin)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, rest, seed=5)
    train(twin, *twin_optimizers, seed=5)
    assert_same_network(model, twin, 1e-6)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} did not move"


def test_all_optimizers_were_tried():
    names = {kind.__name__ for kind in OPTIMIZERS}
    assert names >= {"Adafactor", "Muon", "LBFGS", "SparseAdam", "Rprop", "ASGD", "NAdam", "SGD", "AdamW"}


def never(*unused: object) -> Tensor:
    raise AssertionError("the search has begun")


@pytest.mark.parametrize("first", ["model", "elsewhere"])
def test_lbfgs_is_refused_before_the_search_and_taken_when_fresh(first):
    """Its history of all parameters lies under the first one, which may keep its shape."""
    model = randomise(Residual()).train()
    model.register_parameter("unused", nn.Parameter(torch.ones(1)))
    outside = nn.Parameter(torch.ones(3))
    parameters = [model.unused] if first == "model" else [outside]
    optimizer = torch.optim.LBFGS([*parameters, *(p for p in model.parameters() if p is not model.unused)])
    graph = trace(model, example(model)[0])
    fresh = copy.deepcopy(model), torch.optim.LBFGS(model.parameters())
    train(model, optimizer, steps=1)
    before = Frozen(model, optimizer)
    with pytest.raises(ArgumentError, match="LBFGS keeps 'd' under .*make a new optimizer"):
        graph.compact(random_keep(graph), optimizer=optimizer)
    with pytest.raises(ArgumentError, match="LBFGS keeps"):
        stamp_fast.prune(model, [example(model)], loss_fn=never, optimizer=optimizer, progress=False)
    before.assert_same()
    graph.compact(random_keep(graph), optimizer=fresh[1])
    train(model, fresh[1], steps=1)


def test_optimizer_of_copies_is_refused():
    """Mixed precision by hand: the optimizer works on float32 copies of the weights."""
    model = randomise(Residual()).bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    graph = trace(model, example(model)[0])
    with pytest.raises(ArgumentError, match="optimizer: holds none of the model's parameters"):
        graph.compact(random_keep(graph), optimizer=torch.optim.SGD(masters))
    with pytest.raises(ArgumentError, match="optimizer: expected .* got str"):
        graph.compact(random_keep(graph), optimizer="adam")


# --- what goes with an optimizer ---
@pytest.mark.parametrize("schedule", ["StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_groups_and_schedules_go_on(schedule):
    make = {
        "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=20),
        "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    }[schedule]
    step = (lambda s: s.step(1.0)) if schedule == "ReduceLROnPlateau" else (lambda s: s.step())
    model = randomise(Residual()).double().train()
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0, "tag": "norm"}, {"params": matrices, "lr": 0.02}], lr=0.005
    )
    scheduler = make(optimizer)
    for k in range(3):
        train(model, optimizer, steps=1, seed=k)
        step(scheduler)
    graph = trace(model, example(model)[0])
    keep = random_keep(graph)
    twin = small_twin(graph, keep)
    twin_optimizer = handed_on(optimizer, model, twin, kept_positions(graph, keep))
    twin_scheduler = copy.copy(scheduler)
    twin_scheduler.optimizer = twin_optimizer
    groups = [(id(g), {k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    graph.compact(keep, optimizer=optimizer)
    assert [(id(g), {k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups] == groups
    assert scheduler.optimizer is optimizer
    rates = []
    for k in range(3):
        train(model, optimizer, steps=1, seed=5 + k)
        step(scheduler)
        train(twin, twin_optimizer, steps=1, seed=5 + k)
        step(twin_scheduler)
        rates.append([g["lr"] for g in optimizer.param_groups])
        assert rates[-1] == [g["lr"] for g in twin_optimizer.param_groups]
    assert len({tuple(r) for r in rates}) > 1, "the schedule stands still"
    assert_same_network(model, twin, 1e-9)


def test_gradient_scaler_goes_on():
    model = randomise(Residual()).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def step(net: nn.Module, opt: torch.optim.Optimizer, scale: torch.amp.GradScaler, seed: int, factor: float) -> None:
        x, y = example(net, seed)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y) * factor
        scale.scale(loss).backward()
        scale.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scale.step(opt)
        scale.update()

    for seed in range(3):
        step(model, optimizer, scaler, seed, 1.0)
    graph = trace(model, example(model)[0])
    keep = random_keep(graph)
    twin = small_twin(graph, keep)
    twin_optimizer = handed_on(optimizer, model, twin, kept_positions(graph, keep))
    twin_scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    twin_scaler.load_state_dict(scaler.state_dict())
    graph.compact(keep, optimizer=optimizer)
    scales = []
    for seed, factor in enumerate((1.0, float("inf"), 1.0, 1.0)):
        step(model, optimizer, scaler, 5 + seed, factor)
        step(twin, twin_optimizer, twin_scaler, 5 + seed, factor)
        assert scaler.state_dict() == twin_scaler.state_dict()
        scales.append(scaler.get_scale())
    assert scales == [4096.0, 2048.0, 2048.0, 4096.0], "grown, skipped, kept, grown"
    assert_same_network(model, twin)


def test_gradients_accumulate_across_the_cut():
    model = randomise(Residual()).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer)

    def accumulate(net: nn.Module, seed: int) -> None:
        x, y = example(net, seed)
        F.cross_entropy(net(x), y).backward()

    optimizer.zero_grad()
    accumulate(model, 1)
    graph = trace(model, example(model)[0])
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    twin = small_twin(graph, keep)
    for name, parameter in twin.named_parameters():
        parameter.grad = by_hand(model.get_parameter(name).grad, positions[name])
    twin_optimizer = handed_on(optimizer, model, twin, positions)
    graph.compact(keep, optimizer=optimizer)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        accumulate(net, 2)
        opt.step()
    assert_same_network(model, twin, 1e-9)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, twin.get_parameter(name).grad) < 1e-9, name


def test_sparse_gradients_are_cut():
    model = randomise(Words())
    x, y = example(model)
    F.cross_entropy(model(x), y).backward()
    old = model.words.weight.grad.to_dense()
    graph = trace(model, x)
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    graph.compact(keep)
    assert model.words.weight.grad.is_sparse
    assert model.words.weight.shape[1] < 12
    assert torch.equal(model.words.weight.grad.to_dense(), by_hand(old, positions["words.weight"]))


# --- averages ---
AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema-buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "swa": lambda m: AveragedModel(m),
    "swa-of-compiled": lambda m: AveragedModel(torch.compile(m, backend="eager"), use_buffers=True),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_average_goes_on(kind):
    model = randomise(Residual()).double().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    average = AVERAGES[kind](model)
    for seed in range(3):
        train(model, optimizer, steps=1, seed=seed)
        average.update_parameters(model)
    inside = average.module
    inside = getattr(inside, "_orig_mod", inside)
    graph = trace(model, example(model)[0])
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    old = {name: tensor.clone() for name, tensor in inside.state_dict().items()}
    twin = small_twin(graph, keep)
    twin_average = AVERAGES[kind](twin)
    twin_inside = getattr(twin_average.module, "_orig_mod", twin_average.module)
    for name, tensor in twin_inside.state_dict().items():
        tensor.copy_(by_hand(old[name], positions[name]) if positions[name] else old[name])
    twin_average.n_averaged.copy_(average.n_averaged)
    twin_optimizer = handed_on(optimizer, model, twin, positions)
    graph.compact(keep, optimizer=optimizer, ema=average)
    assert_same_network(inside, twin_inside)
    assert not torch.equal(inside.conv1.weight, model.conv1.weight)
    for seed in range(2):
        train(model, optimizer, steps=1, seed=5 + seed)
        average.update_parameters(model)
        train(twin, twin_optimizer, steps=1, seed=5 + seed)
        twin_average.update_parameters(twin)
    assert_same_network(inside, twin_inside, 1e-9)
    assert inside.conv1.out_channels == inside.conv1.weight.shape[0] == model.conv1.out_channels < 16
    torch.optim.swa_utils.update_bn([example(model)[0]], average)


def test_attributes_of_the_root_change_in_its_average():
    class Grouped(nn.Conv2d):
        """The root itself is a layer with sizes."""

        def __init__(self) -> None:
            super().__init__(3, 12, 3)
            self.last = nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x)).mean((2, 3))

    model = randomise(Grouped())
    average = AveragedModel(model)
    graph = trace(model, torch.randn(2, 3, 8, 8))
    graph.compact(random_keep(graph), ema=average)
    assert average.module.out_channels == model.out_channels == len(model.weight) < 12
    assert not hasattr(average, "out_channels")


def test_average_of_another_kind_is_refused():
    model = randomise(Residual())
    graph = trace(model, example(model)[0])
    before = Frozen(model)
    with pytest.raises(ArgumentError, match="ema: expected a torch.nn.Module, got dict"):
        graph.compact(random_keep(graph), ema=dict(model.state_dict()))
    before.assert_same()


def test_scores_budget_and_cut_with_an_average():
    """`prune` takes no average: this is the road for those who keep one."""
    model = randomise(Residual()).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, optimizer)
    average.update_parameters(model)
    graph = trace(model, example(model)[0])
    graph.settle()
    keep = graph.select(importance.magnitude(graph), Budget(macs=0.5))
    graph.compact(keep, optimizer=optimizer, ema=average)
    train(model, optimizer)
    average.update_parameters(model)
    assert average(example(model)[0]).shape == (16, 10)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert trace(model, example(model)[0]).macs() <= 0.5 * graph.macs()


# --- failure ---
def test_failed_prune_puts_the_random_state_back():
    model = randomise(Plain())

    def fails_late(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        fails_late.calls += 1
        if fails_late.calls > 4:
            raise RuntimeError("on purpose")
        return F.cross_entropy(net(batch[0] + torch.rand(())), batch[1])

    fails_late.calls = 0
    before = Frozen(model)
    with pytest.raises(StampFastError, match="on purpose"):
        stamp_fast.prune(model, [example(model)], loss_fn=fails_late, progress=False)
    assert fails_late.calls == 5
    before.assert_same(rng=True)
