"""Runs a forward so that nothing is left of it: flags, caches in modules' __dict__, RNG, attention switches."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

_TABLES = frozenset(("_parameters", "_buffers", "_modules"))
# Every module has these, and most are empty tables of hooks.
_STANDARD = frozenset(nn.Module().__dict__) - _TABLES


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What `model.named_modules()` gives, in a tenth of the time: its generators nest as deep as the modules."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        prefix = name + "." if name else ""
        todo += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return found


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Recordings are many small objects and hardly a cycle: a collection among them costs more than all of a replay,
    the more so the more the process holds besides.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclasses.dataclass
class Caches:
    """What forwards keep in modules for the next time: dicts that got new keys, attributes that became tensors."""

    dicts: list[dict] = dataclasses.field(default_factory=list)
    attributes: list[tuple[dict, str, Any]] = dataclasses.field(default_factory=list)  # with the value before

    def __iadd__(self, other: Caches) -> Caches:
        self.dicts += other.dicts
        self.attributes += other.attributes
        return self

    def clear(self) -> None:
        for cache in self.dicts:
            cache.clear()
        for attributes, name, before in self.attributes:
            attributes[name] = before


@contextlib.contextmanager
def attributes_restored(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> Iterator[Caches]:
    """Puts back, at the end, what forwards change in modules: attributes, and what their containers hold.

    Args:
        modules: what `named_modules` has found, if that is at hand.

    Yields:
        Empty; holds at the end what was a cache.
    """
    caches = Caches()
    saved = [_state_of(module) for module in (modules or named_modules(model)).values()]
    try:
        yield caches
    finally:
        for attributes, before, full, empty in saved:
            for container in empty:
                if container:
                    if isinstance(container, dict):
                        caches.dicts.append(container)
                    container.clear()
            for container, contents in full:
                if isinstance(container, dict) and len(container) > len(contents):
                    caches.dicts.append(container)
                _restore_container(container, contents)
            if _is_same(attributes, before):
                continue
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and name in before and before[name] is None:
                    caches.attributes.append((attributes, name, None))
            _restore_container(attributes, before)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile has wrapped runs as it was written: compiled code shows no operators, and every other
    width, and the recorder itself, would be compiled anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def undisturbed(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> Iterator[Caches]:
    """A forward in here leaves no mark: not on modules, RNG or switches. See `attributes_restored`."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    rng = torch.get_rng_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    validates = Distribution._validate_args  # it looks at values, which a trace does not have
    Distribution.set_default_validate_args(False)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.use_deterministic_algorithms(False)  # it makes other operators of some, on some devices
    try:
        with (
            attributes_restored(model, modules) as caches,
            torch.no_grad(),
            uncompiled(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.autocast(_autocast_device(model), enabled=False),
        ):
            yield caches
    finally:
        Distribution.set_default_validate_args(validates)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_rng_state(rng)


@contextlib.contextmanager
def emptied(caches: Caches) -> Iterator[None]:
    """Inside, the caches are empty, for a forward with other widths; what it leaves there is dropped."""
    contents = [dict(cache) for cache in caches.dicts]
    values = [attributes.get(name) for attributes, name, _ in caches.attributes]
    caches.clear()
    try:
        yield
    finally:
        for cache, before in zip(caches.dicts, contents, strict=True):
            cache.clear()
            cache.update(before)
        for (attributes, name, _), value in zip(caches.attributes, values, strict=True):
            attributes[name] = value


def _state_of(module: nn.Module) -> tuple[dict, dict, list, list]:
    """A module's __dict__, a copy of it, its containers with copies, and its empty containers."""
    attributes = module.__dict__
    full, empty = [], []
    for name, value in attributes.items():
        if name in _STANDARD and not value:
            continue
        if isinstance(value, (dict, list, set)):
            if value:
                full.append((value, value.copy()))
            else:
                empty.append(value)
    return attributes, attributes.copy(), full, empty


def _autocast_device(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    first = next(model.buffers(), None) if first is None else first
    return "cuda" if first is not None and first.is_cuda else "cpu"


def _is_same(value: dict, saved: dict) -> bool:
    return len(value) == len(saved) and all(map(is_, value.values(), saved.values())) and value.keys() == saved.keys()


def _restore_container(value: Any, saved: Any) -> None:
    if isinstance(value, list):
        value[:] = saved
    elif isinstance(value, set):
        if value != saved:
            value.clear()
            value.update(saved)
    elif not _is_same(value, saved):
        value.clear()
        value.update(saved)
