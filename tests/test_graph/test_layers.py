"""A layer that is like one before is written down, not run: the recording is the same."""

import copy

import pytest
import torch
from torch import nn

from stamp_fast.graph import _layers, _record

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "conv-strided-no-bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 9, 7)),
    "conv-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 8)),
    "conv-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "batch-norm": (lambda: nn.BatchNorm2d(4), (2, 4, 8, 8)),
    "batch-norm-without-statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 8, 8)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 8, 8)),
    "layer-norm": (lambda: nn.LayerNorm(8), (2, 4, 8)),
    "relu": (lambda: nn.ReLU(), (2, 4)),
    "relu-in-place": (lambda: nn.ReLU(inplace=True), (2, 4)),
    "prelu": (lambda: nn.PReLU(4), (2, 4, 8)),
    "gelu": (lambda: nn.GELU(), (2, 4)),
    "dropout": (lambda: nn.Dropout(0.5), (2, 4)),
    "identity": (lambda: nn.Identity(), (2, 4)),
    "linear": (lambda: nn.Linear(8, 3), (2, 8)),
    "linear-of-tokens": (lambda: nn.Linear(8, 3), (2, 4, 8)),
    "max-pool": (lambda: nn.MaxPool2d(2), (2, 4, 8, 8)),
    "adaptive-pool": (lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 8, 8)),
}


class Repeated(nn.Module):
    """Each block has a layer of its own, on an input of its own."""

    def __init__(self, make) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(block(x * 2).sum() for block in self.blocks)


def calls(model: nn.Module, x: torch.Tensor) -> tuple:
    recording = _record.record(model, x)
    return [(c.name, c.args, c.outs, c.module, c.line) for c in recording.calls], recording.shapes, recording.outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_recording_is_that_of_layers_that_ran(name, training, monkeypatch):
    make, shape = LAYERS[name]
    model, x = Repeated(make).train(training), torch.randn(shape)
    with monkeypatch.context() as patch:
        patch.setattr(_layers, "known", lambda key: None)
        expected = calls(model, x)
    monkeypatch.setattr(_layers, "_known", {})
    learned = calls(model, x)
    assert learned == expected
    again = calls(model, x)
    assert again == expected


def test_layers_are_remembered(monkeypatch):
    """The three blocks share one entry, and the second trace runs none of them."""
    monkeypatch.setattr(_layers, "_known", {})
    model, x = Repeated(LAYERS["conv"][0]), torch.randn(2, 4, 8, 8)
    calls(model, x)
    assert len(_layers._known) == 1
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: pytest.fail("run again"))
    calls(model, x)


def settings() -> dict:
    base = nn.Conv2d(4, 6, 3, padding=1)
    other = {
        "stride": nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "dilation": nn.Conv2d(4, 6, 3, padding=1, dilation=2),
        "bias": nn.Conv2d(4, 6, 3, padding=1, bias=False),
        "mode": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        "dtype": nn.Conv2d(4, 6, 3, padding=1).double(),
        "layout": nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last),
    }
    return {"base": base, **other}


def test_whatever_differs_is_another_key():
    x = torch.randn(2, 4, 8, 8)
    keys = {name: _layers.key_of(layer, x) for name, layer in settings().items()}
    keys["size"] = _layers.key_of(settings()["base"], torch.randn(2, 4, 9, 8))
    keys["train"] = _layers.key_of(settings()["base"].eval(), x)
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)
    assert _layers.key_of(settings()["base"], x) == keys["base"]


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "submodule"])
def test_what_is_unusual_is_run(how):
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    if how == "hook":
        layer.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif how == "forward":
        layer.forward = lambda x: x
    else:
        layer.inner = nn.ReLU()
    assert _layers.key_of(layer, x) is None


def test_tied_layers_keep_their_own_tensors():
    """One weight in two layers, another in the third: the template knows places, not tensors."""
    model = Repeated(lambda: nn.Linear(8, 8, bias=False))
    model.blocks[1].weight = model.blocks[0].weight
    recording = _record.record(model, torch.randn(2, 8))
    used = [next(int(a) for a in c.args) for c in recording.calls if c.name == "aten.t.default"]
    assert used == [0, 0, 1]
    assert calls(copy.deepcopy(model), torch.randn(2, 8))[0] == calls(model, torch.randn(2, 8))[0]
