"""What all cuts so far took from each module, kept on the module itself.

A plain dict of builtins in the module's `__dict__`: it goes along with deep copies, pickles (that open without this
package) and modules that move into another network, and leaves with a layer that the user replaces.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from ._plan import Plan

_KEY = "_stamp_fast_cut"


@dataclasses.dataclass
class Cut:
    """One module against its dense self.

    Attributes:
        tensors: parameter or buffer -> dense shape, and per dim the positions that stayed (int64 as bytes: immutable
            and free to copy), None where all did.
        attributes: attribute -> its dense value.
    """

    tensors: dict[str, tuple[tuple[int, ...], tuple[bytes | None, ...]]] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(module: nn.Module) -> Cut:
    """What was cut from this module; an empty Cut if nothing was."""
    found = module.__dict__.get(_KEY, {})
    return Cut(dict(found.get("tensors", {})), dict(found.get("attributes", {})))


def write(module: nn.Module, cut: Cut) -> None:
    """Replaces the module's record; a new dict, so that a snapshot of the old one stays what it was."""
    module.__dict__[_KEY] = {"tensors": cut.tensors, "attributes": cut.attributes}


def is_cut(module: nn.Module) -> bool:
    return _KEY in module.__dict__


def record(plan: Plan, twins: dict[nn.Module, tuple[nn.Module, ...]]) -> None:
    """Adds a cut that is about to happen to the records of the plan's modules and of their twins.

    Call it while the attributes still have their old values.
    """
    cuts: dict[nn.Module, Cut] = {}
    composed: dict[tuple[int, bytes | None], bytes] = {}  # many tensors share one index

    def compose(old: bytes | None, index: Any) -> bytes | None:
        if index is None:
            return old
        if (id(index), old) not in composed:
            stays = index.cpu().numpy()
            composed[id(index), old] = (stays if old is None else np.frombuffer(old, np.int64)[stays]).tobytes()
        return composed[id(index), old]

    def cut_of(module: nn.Module) -> Cut:
        if module not in cuts:
            cuts[module] = read(module)
        return cuts[module]

    for i, slot in enumerate(plan.graph.slots):
        if not plan.shrinks(i):
            continue
        whole = (tuple(plan.graph.recording.shapes[i]), (None,) * len(plan.kept[i]))
        for owner, key in slot.owners:
            for module in (owner, *twins.get(owner, ())):
                tensors = cut_of(module).tensors
                shape, before = tensors.get(key, whole)
                tensors[key] = shape, tuple(compose(a, b) for a, b in zip(before, plan.kept[i], strict=True))
    for owner, name, _ in plan.attributes:
        for module in (owner, *twins.get(owner, ())):
            cut_of(module).attributes.setdefault(name, getattr(module, name))
    for module, cut in cuts.items():
        write(module, cut)
