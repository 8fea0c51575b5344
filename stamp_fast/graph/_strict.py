"""Whether everything that should be prunable is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from .graph import ChannelGraph

_SOUND = ("output of the model", "minimum width")


def check_strict(graph: ChannelGraph) -> None:
    """
    Raises:
        ModelError: a group is kept for another reason than being an output, narrow or named in `protect`; lists all.
    """
    kept = [(group, [group.name, *layers]) for group, layers in zip(graph.groups, graph.layers(), strict=True)]
    kept += [(group, [group.name]) for group in graph.frozen + graph.unlisted()]
    unsound = [
        group
        for group, layers in kept
        if group.reason is not None
        and not group.reason.startswith(_SOUND)
        and group.reason not in graph.protected.values()
        and not any(_is_in(layer, name) for layer in layers for name in graph.protected)
    ]
    if unsound:
        lines = "".join(f"\n  '{g.name}' ({g.channels} channels): {g.reason}" for g in unsound)
        raise ModelError(
            f"strict: {len(unsound)} of {len(kept)} groups of channels cannot be pruned; the model is unchanged. Drop "
            f"strict=True to prune the others, or name these in keep=:{lines}"
        )


def _is_in(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(name + ".") or name.startswith(layer + ".")
