"""Damaged, foreign and forged files: a typed error that says what is wrong, and a model that is as it was."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.networks import Residual
from reference.saved import pruned
from reference.state import Frozen
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import stamp_fast
from stamp_fast import ArgumentError, CheckpointError, PruningPlan, _files


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes, nn.Module]:
    path = tmp_path_factory.mktemp("small") / "model"
    stamp_fast.save(pruned(lambda: Residual(width=2)), path)
    return path, path.read_bytes(), Residual(width=2)


def refuse(path: Path, model: nn.Module, message: str = "") -> None:
    before = Frozen(model)
    with pytest.raises(CheckpointError) as error:
        stamp_fast.load(model, path)
    before.assert_same()
    assert message in str(error.value) and str(path) in str(error.value)


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(data=st.data())
def test_truncated_anywhere(data, small, tmp_path):
    _, content, model = small
    (tmp_path / "cut").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuse(tmp_path / "cut", model)


@QUICK
@given(data=st.data())
def test_any_bit_flipped(data, small, tmp_path):
    _, content, model = small
    header = int.from_bytes(content[:8], "little")
    position = data.draw(st.one_of(st.integers(0, 8 + header - 1), st.integers(0, len(content) - 1)))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped").write_bytes(damaged)
    refuse(tmp_path / "flipped", model)
    with pytest.raises(CheckpointError):
        stamp_fast.load_plan(tmp_path / "flipped")


@QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes(content, small, tmp_path):
    (tmp_path / "noise").write_bytes(content)
    refuse(tmp_path / "noise", small[2])


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


def test_files_of_other_kinds(small, tmp_path):
    _, content, model = small
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign", {"format": "pt"})
    refuse(tmp_path / "foreign", model, "was not written by stamp_fast")
    save_file({"sha256": torch.zeros(2)}, tmp_path / "foreign", {"plan": "{}", "state": '"sha256":"' + 64 * "0"})
    refuse(tmp_path / "foreign", model, "was not written by stamp_fast")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for name, other in (("zip", buffer.getvalue()), ("pickle", pickle.dumps(Bomb())), ("text", b"x" * 999)):
        (tmp_path / name).write_bytes(other)
        refuse(tmp_path / name, model, "is not a safetensors file")
    (tmp_path / "empty").touch()
    refuse(tmp_path / "empty", model, "is not a safetensors file, or cut off")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", model, "is not a file")
    refuse(tmp_path / "none", model, "there is no such file")
    refuse(tmp_path / "empty" / "below", model, "there is no such file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", model, "is not a file")
    with open(tmp_path / "sparse", "wb") as file:  # a header of 40 GB, said and there
        file.write((40 << 30).to_bytes(8, "little") + b"{")
        file.truncate((40 << 30) + 8)
    refuse(tmp_path / "sparse", model, "has a header of")
    with pytest.raises(ArgumentError, match="path: expected a str"):
        stamp_fast.load(model, 3)
    with pytest.raises(ArgumentError, match="expected a module or a function"):
        stamp_fast.load("model", tmp_path / "empty")
    with pytest.raises(ArgumentError, match="the factory gave int, expected"):
        stamp_fast.load(lambda: 3, tmp_path / "empty")


def forged(path: Path, change, tensors=None) -> None:
    """Another plan, state and tensors under a checksum that is right."""
    model = pruned(lambda: Residual(width=2))
    stamp_fast.save(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    plan, state = json.loads(metadata["plan"]), json.loads(metadata["state"])
    texts = change(plan, state)
    plan, state = texts if isinstance(texts, tuple) else (plan, state)
    texts = {"plan": plan, "state": state}
    texts = {key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()}
    stored.update(tensors or {})
    _files.write({k: v for k, v in stored.items() if v is not None}, {**metadata, **texts}, str(path))


def put_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(plan, state):
        place = {"plan": plan, "state": state}
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def attribute(module, name, *values):
    return put_in("plan", "attributes", module, {name: list(values)})


FORGERIES = {
    "not an object": (lambda p, s: ([1], s), "plan: expected an object"),
    "a key missing": (lambda p, s: (p.pop("kept"), None)[1], "plan: expected an object"),
    "a key too many": (put_in("plan", "code", "print(1)"), "plan: expected an object"),
    "no JSON": (lambda p, s: ("{'format': 1}", s), "plan: is not JSON"),
    "deep": (lambda p, s: ("[" * 200_000, s), "plan: is not JSON"),
    "long": (lambda p, s: ("[" + "[]," * 7_000_000 + "[]]", s), "plan: is 21000004 characters long"),
    "long number": (lambda p, s: ('{"format": ' + "9" * 10_000 + "}", s), "plan: is not JSON"),
    "later format": (put_in("plan", "format", 2), "has format 2"),
    "model": (put_in("plan", "model", ["x"]), "'model' is not a name"),
    "shapes": (put_in("plan", "shapes", [1]), "'shapes' is not an object"),
    "shape": (put_in("plan", "shapes", "conv1.weight", [1.0]), "shapes: 'conv1.weight'"),
    "huge shape": (put_in("plan", "shapes", "conv1.weight", [10**15] * 4), "'conv1.weight' has shape"),
    "huge dense shape": (put_in("plan", "shapes", "head.bias", [10**15]), "'head.bias' has shape (10,)"),
    "negative shape": (put_in("plan", "shapes", "conv1.weight", [-1, 2, 3, 3]), "shapes: 'conv1.weight'"),
    "other tensor": (put_in("plan", "shapes", "nothing.weight", [2]), "no 'nothing.weight'"),
    "indices": (put_in("plan", "indices", {"a": 1}), "'indices' is not a list"),
    "empty": (put_in("plan", "indices", 0, []), "indices: list 0"),
    "negative": (put_in("plan", "indices", 0, [-1, 0]), "indices: list 0"),
    "twice": (put_in("plan", "indices", 0, [0, 0]), "indices: list 0 is not ascending"),
    "falling": (put_in("plan", "indices", 0, [1, 0]), "indices: list 0 is not ascending"),
    "float": (put_in("plan", "indices", 0, [0.0]), "indices: list 0"),
    "bool": (put_in("plan", "indices", 0, [False, True]), "indices: list 0"),
    "nested": (put_in("plan", "indices", 0, [[0]]), "indices: list 0"),
    "beyond": (put_in("plan", "indices", 0, [0, 10**30]), "keeps a position beyond"),
    "no such list": (put_in("plan", "kept", "conv1.weight", [99, None, None, None]), "positions that are not there"),
    "negative list": (put_in("plan", "kept", "conv1.weight", [-1, None, None, None]), "positions that are not there"),
    "dims": (put_in("plan", "kept", "conv1.weight", [0]), "one entry per dim"),
    "kept of nothing": (put_in("plan", "kept", "nothing", [0]), "'nothing' has no shape"),
    "__class__": (attribute("conv1", "__class__", 1, 2), "no number or list '__class__'"),
    "__dict__": (attribute("conv1", "__dict__", [], []), "no number or list '__dict__'"),
    "forward": (attribute("conv1", "forward", 1, 2), "no number or list 'forward'"),
    "_parameters": (attribute("conv1", "_parameters", [], []), "no number or list '_parameters'"),
    "training": (attribute("conv1", "training", 1, 0), "no number or list 'training'"),
    "bool value": (attribute("conv1", "training", True, False), "changes from True to False"),
    "new attribute": (attribute("conv1", "new", 1, 2), "no number or list 'new'"),
    "padding_mode": (attribute("conv1", "padding_mode", "zeros", "circular"), "changes from 'zeros'"),
    "type": (attribute("conv1", "out_channels", 4, "4"), "changes from 4 to '4'"),
    "float for int": (attribute("conv1", "out_channels", 4, 3.0), "changes from 4 to 3.0"),
    "list for int": (attribute("conv1", "out_channels", 4, [3]), "changes from 4 to [3]"),
    "length": (attribute("conv1", "kernel_size", {"tuple": [3, 3]}, {"tuple": [3]}), "changes from (3, 3)"),
    "list for tuple": (attribute("conv1", "kernel_size", {"tuple": [3, 3]}, [3, 3]), "changes from (3, 3)"),
    "dict": (attribute("conv1", "out_channels", {"a": 1}, {"a": 1}), "neither a number nor a list"),
    "infinity": (attribute("conv1", "out_channels", 1e999, 1e999), "neither a number nor a list"),
    "huge int": (attribute("conv1", "out_channels", 4, 10**40), "changes from 4"),
    "one value": (attribute("conv1", "out_channels", 4), "a dense and a new value"),
    "other dense value": (attribute("conv1", "out_channels", 5, 4), "is 4, in the dense Residual of the plan 5"),
    "no module": (attribute("nothing", "out_channels", 4, 3), "no module 'nothing'"),
    "deep value": (attribute("conv1", "padding", [[[[[[[[[[1]]]]]]]]]], 1), "nested too deeply"),
    "state": (lambda p, s: (p, "[]"), "state: expected an object"),
    "frozen": (put_in("state", "frozen", ["bn1.running_mean"]), "no parameter 'bn1.running_mean'"),
    "frozen type": (put_in("state", "frozen", "all"), "'frozen' is not a list"),
    "eval": (put_in("state", "eval", ["nothing"]), "no module 'nothing'"),
    "memory format": (put_in("state", "memory_format", {"conv1.weight": "sparse"}), "unknown memory format 'sparse'"),
    "memory format of": (put_in("state", "memory_format", {"bn1.weight": "channels_last"}), "not one for 1 dims"),
    "tie of stored": (put_in("state", "tied", {"bn1.weight": "bn1.bias"}), "stored and tied"),
    "tie type": (put_in("state", "tied", {"a": 1}), "'tied' does not map"),
    "tie of tied": (lambda p, s: s["tied"].update({"bn1.weight": "bn2.weight", "bn2.weight": "bn1.bias"}), "tie"),
    "tie of nothing": (put_in("state", "tied", {"a": "b"}), "ties 'a' to 'b'"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_plan_is_refused(kind, small, tmp_path):
    change, message = FORGERIES[kind]
    forged(tmp_path / "forged", change)
    refuse(tmp_path / "forged", small[2], message)


@pytest.mark.parametrize(
    ("shared", "tensors", "message"),
    [
        ({}, {"conv1.weight": torch.zeros(1, 1, 1, 1)}, "'conv1.weight' has shape (1, 1, 1, 1) in the file"),
        ({}, {"more": torch.zeros(1)}, "the model has no parameter or buffer 'more'"),
        ({}, {"head.bias": torch.zeros(10, dtype=torch.int64)}, "'head.bias' is torch.int64 in the file"),
        ({}, {"head.bias": None}, "has no tensor for 'head.bias'"),
        ({"bn1.running_mean": "bn1.bias"}, {"bn1.running_mean": None}, "not of one kind and shape"),
        ({"head.bias": "bn1.bias"}, {"head.bias": None}, "not of one kind and shape"),
        ({"head.bias": "nothing"}, {"head.bias": None}, "has no tensor for 'head.bias'"),
    ],
)
def test_forged_tensors_are_refused(shared, tensors, message, small, tmp_path):
    forged(tmp_path / "forged", put_in("state", "shared", shared), tensors)
    refuse(tmp_path / "forged", small[2], message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_json_in_any_place_of_a_plan(data):
    """Whatever stands there, it is refused with the typed error or is a plan that says the same when written again."""
    plan = json.loads(SOME_PLAN)
    place, key = plan, data.draw(st.sampled_from(sorted(plan)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON)
    try:
        read = PruningPlan.from_json(json.dumps(plan))
    except CheckpointError:
        return
    assert PruningPlan.from_json(read.to_json()) == read
    model = Residual(width=2)
    before = Frozen(model)
    try:
        read.check_fits(model)
    except CheckpointError:
        before.assert_same()


SOME_PLAN = stamp_fast.plan_of(pruned(lambda: Residual(width=2))).to_json()
