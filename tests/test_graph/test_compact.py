"""The cut in the middle of training: nothing of a channel is lost, nothing changes if it fails."""

import copy
import gc

import pytest
import torch
from reference.masked import kept_positions, with_zeroed_readers
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise, relative_error
from reference.state import Frozen
from torch import Tensor, nn
from torch.nn import functional as F

import stamp_fast
from stamp_fast import ArgumentError, CompactionError, ModelError, trace
from stamp_fast.graph import _compact, _plan, _replay, _snapshot

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
}


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(16, 1, 8, 8, generator=generator, dtype=dtype),
        torch.randint(10, (16,), generator=generator),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x, y = batch(next(model.parameters()).dtype, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def live(tensor: Tensor, positions: list[Tensor]) -> Tensor:
    for dim, stays in enumerate(positions):
        tensor = tensor.index_select(dim, stays.nonzero().flatten())
    return tensor


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("network", [Plain, Residual])
def test_next_step_is_that_of_the_masked_network(network, kind):
    model = randomise(network()).double().train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    x, y = batch(torch.float64, seed=7)
    graph = trace(model, x)
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)

    # The dense step, in which weights that read dead channels are zero while loss and gradient are taken.
    dense = copy.deepcopy(model)
    twin = OPTIMIZERS[kind](dense.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masked = with_zeroed_readers(dense, positions)
    F.cross_entropy(masked(x), y).backward()
    for parameter, other in zip(dense.parameters(), masked.parameters(), strict=True):
        parameter.grad = other.grad
    before = {name: p.detach().clone() for name, p in dense.named_parameters()}
    twin.step()

    objects = list(model.parameters())
    graph.compact(keep, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == [id(p) for p in objects]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    shrunk = 0
    for name, parameter in model.named_parameters():
        expected = live(dense.get_parameter(name).detach(), positions[name])
        assert relative_error(parameter.detach(), expected) < 1e-5, name
        assert not torch.equal(expected, live(before[name], positions[name])), f"{name} did not move"
        shrunk += parameter.numel() < before[name].numel()
        for key, value in optimizer.state[parameter].items():
            reference = twin.state[dense.get_parameter(name)][key]
            if reference.dim():
                assert relative_error(value, live(reference, positions[name])) < 1e-5, (name, key)
            else:
                assert value == reference
    assert shrunk > len(objects) / 2
    for name, buffer in model.named_buffers():
        if buffer.dim():
            assert relative_error(buffer, live(masked.get_buffer(name), positions[name])) < 1e-9, name


@pytest.mark.parametrize(
    "kind", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "LBFGS", "NAdam", "RAdam", "Rprop"]
)
def test_other_optimizers_go_on_or_are_refused(kind):
    """State that is not shaped like its parameter cannot stay behind and crash the caller's next step."""
    model = randomise(Residual()).train()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    graph = trace(model, x)
    before = Frozen(model, optimizer)
    try:
        graph.compact(random_keep(graph), optimizer=optimizer)
    except ArgumentError as error:
        assert "optimizer" in str(error)
        before.assert_same()
        return
    optimizer.step(closure)
    assert model.conv1.out_channels < 16
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradients_are_cut_alike():
    model = randomise(Residual()).train()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    graph = trace(model, x)
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    graph.compact(keep)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, live(grads[name], positions[name])), name


def test_flags_formats_hooks_and_dtypes_are_carried():
    model = randomise(Residual()).to(torch.bfloat16).to(memory_format=torch.channels_last)
    model.train()
    model.bn1.eval()
    model.bn2.float()
    model.conv1.weight.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    calls = []
    model.conv2.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    flags = {name: module.training for name, module in model.named_modules()}
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}

    model.bn2.to(torch.bfloat16)
    dtypes.update({name: torch.bfloat16 for name in dtypes if name.startswith("bn2.") and "num_" not in name})
    graph = trace(model, torch.randn(2, 1, 8, 8, dtype=torch.bfloat16))
    keep = random_keep(graph)
    graph.compact(keep)
    calls.clear()  # hooks run in the trace, too: they may be part of what the model computes
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
    assert {name: t.dtype for name, t in model.state_dict().items()} == dtypes
    for name in ("conv1", "conv2", "conv3"):
        weight = model.get_parameter(f"{name}.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last), name
        assert not weight.is_contiguous(), name
    model(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16))
    assert calls and calls[0][1] == model.conv2.out_channels < 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_cut_bit_exactly(dtype):
    model = randomise(Plain()).to(dtype)
    graph = trace(model, torch.randn(2, 1, 8, 8, dtype=dtype))
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    graph.compact(keep)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live(old[name], positions[name])), name
    assert model.conv1.weight.shape[0] < 24


def test_module_attributes_follow():
    model = Residual()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    graph.compact(random_keep(graph))
    assert model.conv1.out_channels == model.conv1.weight.shape[0] == model.bn1.num_features < 16
    assert model.conv2.in_channels == model.conv2.weight.shape[1] == model.conv1.out_channels
    assert model.conv2.out_channels == model.stem[0].out_channels == model.bn2.num_features < 8
    assert model.squeeze.in_features == model.conv3.out_channels == model.project.out_channels < 24
    assert model.excite.out_features == model.head.in_features == model.conv3.out_channels
    assert model.squeeze.out_features == model.excite.in_features < 8
    assert model.head.out_features == 10


class Tied(nn.Module):
    """Two layers with one weight, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 12)
        self.twice = nn.Linear(12, 12)
        self.decode = nn.Linear(12, 6)
        self.other = nn.Linear(12, 6)
        self.other.weight = self.decode.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.encode(x))
        h = torch.relu(self.twice(torch.relu(self.twice(h))))
        return self.decode(h) + 2 * self.other(h)


def test_tied_weights_and_shared_modules_stay_tied():
    model = randomise(Tied()).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    graph = trace(model, x)
    keep = random_keep(graph)
    with torch.no_grad():
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        dense = model(x)
        graph.compact(keep)
        assert relative_error(model(x), by_hand) < 1e-9
    assert relative_error(by_hand, dense) > 1e-3
    assert model.other.weight is model.decode.weight
    assert model.other.in_features == model.decode.in_features == model.encode.out_features < 12
    assert model.twice.weight.shape == (model.encode.out_features, model.encode.out_features)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "under-module"])
def test_average_is_cut_alike(wrapped):
    model = randomise(Residual())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if wrapped else copy.deepcopy(model)
    randomise(average, seed=5)
    graph = trace(model, torch.randn(2, 1, 8, 8))
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    inner = average.module if wrapped else average
    old = {name: t.clone() for name, t in inner.state_dict().items()}
    graph.compact(keep, ema=average)
    for name, tensor in inner.state_dict().items():
        assert torch.equal(tensor, live(old[name], positions[name])), name
    # An average has to run, too: its layers' own widths count.
    assert inner.conv1.out_channels == model.conv1.out_channels
    assert inner.bn1.num_features == model.bn1.num_features
    inner.eval()
    assert inner(torch.randn(2, 1, 8, 8)).isfinite().all()


def test_grouped_average_runs():
    """The groups of a depthwise convolution are an attribute, not a shape."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 3))
    average = copy.deepcopy(model)
    graph = trace(model, torch.randn(2, 1, 8, 8))
    graph.compact(random_keep(graph), ema=average)
    x = torch.randn(2, 1, 8, 8)
    assert model[1].groups < 8
    assert torch.equal(average(x), model(x))


def test_average_that_is_the_model():
    model = randomise(Plain())
    graph = trace(model, torch.randn(2, 1, 8, 8))
    before = Frozen(model)
    with pytest.raises(ArgumentError, match="ema: is the model itself"):
        graph.compact(random_keep(graph), ema=model)
    before.assert_same()


def test_graph_of_a_network_that_was_cut_by_another():
    model = randomise(Plain())
    first, second = (trace(model, torch.randn(2, 1, 8, 8)) for _ in range(2))
    # Positions that the cut network has, too, though they are other channels by now.
    keep = second.all_kept()
    for group in second.prunable:
        keep[group.classes.start + 2 : group.classes.stop] = False
    first.compact(random_keep(first))
    before = Frozen(model)
    with pytest.raises(ArgumentError, match=r"'conv1.weight' had shape \(24, 1, 3, 3\).*trace it again"):
        second.compact(keep)
    with pytest.raises(ArgumentError, match="trace it again"), second.masked(keep):
        pass
    before.assert_same()


@pytest.mark.parametrize("kind", ["missing", "other-shape"])
def test_average_that_does_not_fit(kind):
    model = randomise(Plain())
    average = nn.Linear(2, 2) if kind == "missing" else Plain(width=6)
    graph = trace(model, torch.randn(2, 1, 8, 8))
    before, before_average = Frozen(model), Frozen(average)
    with pytest.raises(ArgumentError, match="ema: .*conv1.weight"):
        graph.compact(random_keep(graph), ema=average)
    before.assert_same()
    before_average.assert_same()


def test_old_autograd_graph_kept_alive():
    model = randomise(Residual()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = batch()
    kept_alive = F.cross_entropy(model(x), y)
    kept_alive.backward(retain_graph=True)
    optimizer.step()
    graph = trace(model, x)
    graph.compact(random_keep(graph), optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
    del kept_alive
    gc.collect()
    F.cross_entropy(model(x), y).backward()


def test_cut_twice():
    model = randomise(Residual()).double().train()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        train(model, optimizer)
        x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
        graph = trace(model, x)
        keep = random_keep(graph)
        model.eval()
        with torch.no_grad():
            by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
            graph.compact(keep, optimizer=optimizer)
            assert relative_error(model(x), by_hand) < 1e-9
        model.train()
    train(model, optimizer)


# --- nothing may change where it fails ---
class Injected(Exception):
    pass


def fail_at_call(monkeypatch, owner, name: str, k: int) -> None:
    original = getattr(owner, name)
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += 1
        if count == k:
            raise Injected
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


class BadDict(dict):
    """Refuses the k-th change; optimizer state may be any mapping."""

    countdown = 0

    def __setitem__(self, key, value):
        BadDict.countdown -= 1
        if BadDict.countdown == 0:
            raise Injected
        super().__setitem__(key, value)


def inject(monkeypatch, point: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    where, _, k = point.partition("#")
    if where == "replace_data":
        fail_at_call(monkeypatch, _compact, "replace_data", int(k))
    elif where == "replace_data, after the change":
        original = _compact.replace_data
        count = 0

        def wrapper(tensor, data):
            nonlocal count
            count += 1
            original(tensor, data)
            if count == int(k):
                raise Injected

        monkeypatch.setattr(_compact, "replace_data", wrapper)
    elif where == "half replaced":

        def halfway(tensor, data):
            tensor.data = torch.empty(0, dtype=torch.float64)
            raise Injected

        monkeypatch.setattr(_compact, "replace_data", halfway)
    elif where == "module setattr":
        original = nn.Module.__setattr__
        count = 0

        def setattr_(module, name, value):
            nonlocal count
            if name in ("out_channels", "in_channels", "num_features", "in_features", "out_features"):
                count += 1
                if count == int(k):
                    raise Injected
            original(module, name, value)

        monkeypatch.setattr(nn.Module, "__setattr__", setattr_)
    elif where == "optimizer state":
        for parameter in model.parameters():
            optimizer.state[parameter] = BadDict(optimizer.state[parameter])
        BadDict.countdown = int(k)
    elif where == "gather":
        fail_at_call(monkeypatch, _plan, "gather", 1)
    elif where == "replay":
        fail_at_call(monkeypatch, _replay._record, "record", 1)
    elif where == "replay comparison":
        fail_at_call(monkeypatch, _replay, "_difference", 5)
    elif where == "snapshot":
        fail_at_call(monkeypatch, _snapshot.Snapshot, "__init__", 1)
    elif where == "interrupt":

        def interrupted(tensor, data):
            raise KeyboardInterrupt

        monkeypatch.setattr(_compact, "replace_data", interrupted)


@pytest.mark.parametrize(
    "point",
    [
        "replace_data#1",
        "replace_data#2",
        "replace_data#9",
        "replace_data, after the change#1",
        "replace_data, after the change#7",
        "half replaced",
        "module setattr#1",
        "module setattr#6",
        "optimizer state#1",
        "optimizer state#5",
        "gather",
        "replay",
        "replay comparison",
        "snapshot",
        "interrupt",
    ],
)
def test_failure_changes_nothing(monkeypatch, point):
    model = randomise(Residual()).train()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    model.bn1.eval()
    average = copy.deepcopy(model)
    graph = trace(model, torch.randn(2, 1, 8, 8))
    keep = random_keep(graph)
    with monkeypatch.context() as patch:
        inject(patch, point, model, optimizer)
        before, before_average = Frozen(model, optimizer), Frozen(average)
        with pytest.raises((Injected, KeyboardInterrupt)):
            graph.compact(keep, optimizer=optimizer, ema=average)
    BadDict.countdown = 0
    before.assert_same()
    before_average.assert_same()
    # And the same call works afterwards.
    graph.compact(keep, optimizer=optimizer, ema=average)
    train(model, optimizer)
    assert model.conv1.out_channels < 16


# --- sizes that the forward has fixed ---
class Literal(nn.Module):
    """conv1 is free; the size of conv2's output is written down in `forward`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        if self.kind == "absorbing view":
            x = x.view(-1, 16, 36).view(x.shape[0], 16, 6, 6)  # fixed here
        elif self.kind == "temporal shift":
            y = torch.zeros_like(x)
            y[:, :4] = x.roll(1, 2)[:, :4]  # fixed here
            y[:, 4:] = x[:, 4:]
            x = y
        elif self.kind == "literal scale":
            x = x / x.shape[1] ** 0.5  # fixed here
        elif self.kind == "heads":
            b, c, h, w = x.shape
            q = x.reshape(b, 4, c // 4, h * w)
            attention = torch.softmax(q.transpose(2, 3) @ q * (c // 4) ** -0.5, -1)  # fixed here
            x = (q @ attention).reshape(b, c, h, w)
        elif self.kind == "assertion":
            if x.shape[1] != 16:
                raise ValueError("sixteen channels, please")
        elif self.kind == "mean by width":
            x = x + x.sum(1, keepdim=True) / x.shape[1]  # fixed here
        return self.head(torch.relu(self.conv3(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "kind", ["absorbing view", "temporal shift", "literal scale", "heads", "assertion", "mean by width"]
)
def test_size_fixed_in_the_forward(kind):
    model = randomise(Literal(kind)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    before = Frozen(model)
    group = next((g for g in graph.groups if g.name == "conv2"), None)
    if group is not None and group.reason is None:
        keep = graph.all_kept()
        # An odd number goes: it would divide into no heads either.
        keep[group.classes.start : group.classes.start + max(1, group.num_classes // 4 - 1)] = False
        if kind != "heads" or group.num_classes == 16:
            with pytest.raises(CompactionError, match="conv2") as error:
                graph.check(keep)
            assert __file__ in str(error.value), "the message names no source line"
            assert f"{__file__}:" in error.value.reason
            assert group in [graph.groups[i] for i in error.value.groups]
            with pytest.raises(CompactionError):
                graph.compact(keep)
    graph.settle()
    before.assert_same()
    names = {g.name for g in graph.prunable}
    # An exception raised in Python falls between two operators: the next one's group may be kept with it.
    assert names >= ({"conv1"} if kind == "assertion" else {"conv1", "conv3"}), "what is free has to stay free"
    if kind != "heads":
        assert "conv2" not in names
        reasons = [g.reason for g in graph.groups + graph.frozen if g.name == "conv2"]
        assert all(reason for reason in reasons)
    keep = random_keep(graph, seed=3)
    with torch.no_grad():
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        dense = model(x)
        graph.compact(keep)
        assert relative_error(by_hand, dense) > 1e-4
        if kind != "heads":
            assert relative_error(model(x), by_hand) < 1e-9
        assert model(x).shape == (2, 5)


class LiteralFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.linear = nn.Linear(128, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.linear(self.conv(x).view(-1, 128))))


def test_literal_flatten_is_found_and_kept():
    model = LiteralFlatten()
    graph = trace(model, torch.randn(2, 1, 4, 4))
    assert {g.name for g in graph.prunable} == {"conv", "linear"}
    keep = graph.all_kept()
    keep[graph.groups[0].classes.start] = False
    with pytest.raises(CompactionError, match=r"test_compact\.py:\d+"):
        graph.check(keep)
    graph.settle()
    assert {g.name for g in graph.prunable} == {"linear"}
    graph.compact(random_keep(graph))
    assert model(torch.randn(2, 1, 4, 4)).shape == (2, 3)


# --- trace leaves no mark ---
class Caching(nn.Module):
    """Keeps what it has computed, counts its calls, draws random numbers, and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.names: set[str] = set()
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.names.add(str(x.device))
        self.steps += 1
        self.late = x
        if "scale" not in self.cache:
            self.cache["scale"] = torch.ones(1, 1, *x.shape[2:], device=x.device)
        x = self.bn(self.conv(x * self.cache["scale"]))
        x = F.dropout(x, training=True)
        return self.head(x.mean((2, 3)) + torch.rand(1))


@pytest.mark.parametrize("training", [False, True])
def test_trace_leaves_no_mark(training):
    model = randomise(Caching()).train(training)
    model.bn.train(not training)
    model.conv.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(3)
    model.conv.register_forward_pre_hook(lambda module, args: None)
    model.head.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    x = torch.randn(2, 1, 6, 6)
    before = Frozen(model)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    switches = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    graph = trace(model, x)
    before.assert_same()
    graph.check(random_keep(graph))
    graph.settle()
    before.assert_same()
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == switches
    model(x)
    assert model.calls == 1


def test_failing_forward_leaves_no_mark():
    from stamp_fast import TraceError

    class Failing(Caching):
        def forward(self, x: Tensor) -> Tensor:
            if super().forward(x).sum() > 0:
                return x
            return -x

    model = Failing()
    x = torch.randn(2, 1, 6, 6)
    before = Frozen(model)
    with pytest.raises(TraceError, match="meta tensors"):
        trace(model, x)
    before.assert_same()


@pytest.mark.parametrize("mode", ["no_grad", "frozen"])
def test_traces_without_gradients(mode):
    model = randomise(Residual())
    names = [g.name for g in trace(model, torch.randn(2, 1, 8, 8)).prunable]
    if mode == "frozen":
        model.requires_grad_(False)
        graph = trace(model, torch.randn(2, 1, 8, 8))
    else:
        with torch.no_grad():
            graph = trace(model, torch.randn(2, 1, 8, 8))
            graph.compact(random_keep(graph))
    assert [g.name for g in graph.prunable] == names
    assert all(p.requires_grad == (mode != "frozen") for p in model.parameters())


def test_keep_that_cannot_be():
    model = Residual()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    before = Frozen(model)
    with pytest.raises(ArgumentError, match="expected shape"):
        graph.compact(torch.ones(3))
    for bad in (None, "all", object(), [None]):
        with pytest.raises(ArgumentError, match="keep: expected a bool tensor"):
            graph.compact(bad)
    with pytest.raises(ArgumentError, match="got other numbers; scores go to graph.select"):
        graph.compact(torch.linspace(0.1, 0.9, graph.num_classes))
    assert graph.macs([1] * graph.num_classes) == graph.macs(torch.ones(graph.num_classes)) == graph.macs()
    keep = graph.all_kept()
    keep[graph.groups[0].classes] = False
    with pytest.raises(ArgumentError, match=f"no channel of '{graph.groups[0].name}' is left"):
        graph.compact(keep)
    graph.protect(["conv1"])
    keep = graph.all_kept()
    keep[next(g for g in graph.groups if g.name == "conv1").classes.start] = False
    with pytest.raises(ArgumentError, match="'conv1' cannot be pruned: kept on request"):
        graph.compact(keep)
    with pytest.raises(ArgumentError, match="no module or parameter named 'conv9'"):
        graph.protect(["conv9"])
    for bad in ("conv2", 3, None):
        with pytest.raises(ArgumentError, match="expected a list of module or parameter names"):
            graph.protect(bad)
    before.assert_same()


def test_keep_by_the_name_of_a_group():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.half = nn.Linear(6, 12), nn.Linear(12, 3), 4

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.head(torch.cat([h[:, : self.half].relu(), h[:, self.half :].tanh()], 1))

    graph = trace(Halves(), torch.randn(2, 6))
    assert [g.name for g in graph.prunable] == ["stem#1", "stem#2"]
    graph.protect(["stem#1"])  # what an error or a report calls it
    assert not graph.prunable
    with pytest.raises(ArgumentError, match="named 'root#1'"):
        graph.protect(["root#1"])


@pytest.mark.parametrize("name", ["other", "other.weight", "again", "again.weight"])
def test_keep_by_any_name_of_a_shared_weight(name):
    model = Tied()
    model.again = model.decode
    graph = trace(model, torch.randn(2, 6))
    graph.protect([name])
    assert graph.protected and {g.name: g.reason for g in graph.groups} == {"encode": "kept on request"}


def test_what_masked_cannot_take():
    graph, other = (trace(Residual(), torch.randn(2, 1, 8, 8)) for _ in range(2))
    keep = graph.all_kept()
    before = Frozen(graph.model)
    for bad in (torch.ones(3), torch.ones(graph.num_classes + 1), torch.ones(graph.num_classes, 2), [1.0], "all"):
        with pytest.raises(ArgumentError, match=f"scale: expected a tensor of shape .{graph.num_classes},"):
            graph.masked(keep, bad).__enter__()
    with pytest.raises(ArgumentError, match="plan of another graph"):
        graph.masked(other.plan(keep)).__enter__()
    before.assert_same()


def test_nothing_is_cut_while_masked():
    model = randomise(Residual())
    x = torch.randn(4, 1, 8, 8)
    graph = trace(model, x)
    before = Frozen(model)
    with graph.masked(random_keep(graph)):
        for use in (lambda: stamp_fast.prune(model, [(x, torch.arange(4))]), lambda: trace(model, x)):
            with pytest.raises(ModelError, match="stands for the parameter 'stem.0.weight'.*leave `graph.masked`"):
                use()
    before.assert_same()


def test_masked_gradients_land_in_the_dense_parameters_at_live_positions():
    model = randomise(Residual()).double().eval()
    x, y = batch(torch.float64)
    graph = trace(model, x)
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    reference = with_zeroed_readers(model, positions)
    F.cross_entropy(reference(x), y).backward()
    with graph.masked(keep):
        F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        stays = positions[name]
        assert parameter.grad.shape == parameter.shape
        actual, expected = live(parameter.grad, stays), live(reference.get_parameter(name).grad, stays)
        assert relative_error(actual, expected) < 1e-9, name
        rest = parameter.grad.clone()
        for index in torch.cartesian_prod(*[s.nonzero().flatten() for s in stays]).view(-1, len(stays)):
            rest[tuple(index)] = 0
        assert not rest.any(), f"{name}: a dead position has a gradient"
