"""The mask generator: from a set of images and a budget to the gates of one network's channels.

Certain (arXiv 2006.12139, abstract and introduction): a generator makes a structural mask of a pretrained network as a
function of a data set it need not have seen, and is meta-learned over subsets of the reference data set. Its form is
our reading: the Beta-Bernoulli gates of the paper's ancestor, their parameters kept per channel, conditioned on the
statistic of a `SetEncoder`. The start from the L1 norm and the allocation of a budget over groups are ours.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import importance
from .._files import errors_name, opened, real_path, write
from ..budget import Budget
from ..errors import ArgumentError, CheckpointError
from ..graph import ChannelGraph
from .architecture import Architecture
from .gates import A_INIT, B_INIT, BETA_INIT, GAMMA_INIT, BetaBernoulliGates
from .set_encoder import SetEncoder

MODES = ("joint", "structure")
_MOMENTUM = 0.02  # of the running mean and deviation of o over tasks
_MOST_SHIFT = 1.5  # logits: no group is opened or closed beyond this for a budget


def _tightest(graph: ChannelGraph, budget: Budget) -> float:
    """Of the fractions asked; generators learn on fractions of the MACs, and know nothing of a machine's time."""
    asked = dict(budget.asked())
    measured = {name: asked.pop(name) for name in budget.measured()}
    if measured:
        same_of_all = Budget(**measured).select(graph, torch.zeros(graph.num_classes), ranking="local", exact=False)
        asked["macs"] = graph.macs(same_of_all) / graph.macs()
    return min(asked.values())


class MaskGenerator(nn.Module):
    """Meta-learned over tasks; `gates` is what it says of one set.

    Symbols of the ancestor (Lee et al. 2018), each [classes]: `a`, `b` (Kumaraswamy, before softplus), `gamma`, `beta`
    (affine of the standardised statistic), `mu`, `sigma` (running, of the statistic over tasks).

    Args:
        architecture: of the network it is for.
        encoder: kind of the `SetEncoder`.
        image_shape: of one image, for the encoder "input".
        ranks: float, [classes], in (0, 1): where `beta` starts.
        mode: of the adaptation that it is meta-trained for, "joint" or "structure".
    """

    def __init__(
        self,
        architecture: Architecture,
        encoder: str = "activation",
        image_shape: Sequence[int] | None = None,
        ranks: torch.Tensor | None = None,
        mode: str = "joint",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ArgumentError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.architecture = architecture
        sizes = [classes for _, _, classes in architecture.groups]
        self.encoder = SetEncoder(sizes, encoder, image_shape=image_shape)
        classes = sum(sizes)
        self.a = nn.Parameter(torch.full((classes,), A_INIT))
        self.b = nn.Parameter(torch.full((classes,), B_INIT))
        self.gamma = nn.Parameter(torch.full((classes,), GAMMA_INIT))
        self.beta = nn.Parameter(torch.full((classes,), BETA_INIT) if ranks is None else ranks.clone())
        # Per group: of a constant and of log2(budget), and of the set's code.
        self.allocation = nn.Parameter(torch.zeros(len(sizes), 2))
        self.allocation_of_set = nn.Linear(self.encoder.width, 1, bias=False)
        nn.init.zeros_(self.allocation_of_set.weight)
        self.register_buffer("mu", torch.zeros(classes))
        self.register_buffer("sigma", torch.ones(classes))
        self.register_buffer("tasks", torch.zeros((), dtype=torch.long))

    @staticmethod
    def untrained(
        graph: ChannelGraph,
        encoder: str = "activation",
        image_shape: Sequence[int] | None = None,
        mode: str = "joint",
    ) -> MaskGenerator:
        """Its gates rank as the L1 norm does, with equal shares of every group."""
        return MaskGenerator(Architecture.of(graph), encoder, image_shape, l1_ranks(graph), mode).float()

    def forward(
        self, graph: ChannelGraph, inputs: Any, labels: torch.Tensor | None, budget: Budget
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What it says of a set, differentiable in its parameters.

        Args:
            inputs: what a forward takes, or a list of that: the images of the set.
            labels: int, [images], or None.

        Returns:
            Arguments of `BetaBernoulliGates`, and o, the set's statistic, [classes], for `follow`.
        """
        o, codes = self.encoder(graph, inputs, labels)
        statistic = torch.where(o.isnan(), 0, (o - self.mu) / self.sigma)
        ask = torch.tensor([1.0, math.log2(_tightest(graph, budget))], dtype=self.allocation.dtype)
        of_set = self.allocation_of_set(codes).squeeze(1) / self.encoder.width
        shift = self.of_classes(_MOST_SHIFT * torch.tanh(self.allocation @ ask + of_set))
        learned = {"a": self.a, "b": self.b, "gamma": self.gamma, "beta": self.beta}
        return {"statistic": statistic, **learned, "shift": shift}, o

    def of_classes(self, values: torch.Tensor) -> torch.Tensor:
        """[groups] -> [classes]."""
        return torch.repeat_interleave(values, torch.tensor(self.encoder.sizes))

    def gates(
        self, graph: ChannelGraph, inputs: Any, labels: torch.Tensor | None, budget: Budget
    ) -> BetaBernoulliGates:
        """The gates for a set, with parameters of their own that start where the generator says."""
        with torch.no_grad():
            return BetaBernoulliGates(**self(graph, inputs, labels, budget)[0]).to(graph.device)

    def check_fits(self, graph: ChannelGraph) -> None:
        """
        Raises:
            ArgumentError: made for another network; names the first difference.
        """
        other = self.architecture.difference(Architecture.of(graph))
        if other:
            raise ArgumentError(
                f"generator: is for {self.architecture.model}, not for this {type(graph.model).__name__}: it has "
                f"{other}; meta-train one for this network, or leave generator= out"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, atomically, that `load` gives back.

        Raises:
            CheckpointError: it cannot be written.
        """
        settings = {"encoder": self.encoder.kind, "image_shape": self.encoder.image_shape, "mode": self.mode}
        metadata = {"architecture": self.architecture.to_json(), "generator": json.dumps(settings)}
        write({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, metadata, real_path(path))

    @staticmethod
    def load(path: str | os.PathLike) -> MaskGenerator:
        """The generator that `save` wrote.

        Raises:
            CheckpointError: no such file, damaged, or another kind of file.
        """
        file = real_path(path)
        kind = {"architecture", "generator"}
        with errors_name("generator", file), opened(file, kind, "MaskGenerator.save") as content:
            metadata = content.metadata()
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        architecture = Architecture.from_json(metadata["architecture"])
        try:
            settings = json.loads(metadata["generator"])
            generator = MaskGenerator(architecture, settings["encoder"], settings["image_shape"], mode=settings["mode"])
            generator.float().load_state_dict(state)  # float32 whatever the default dtype
            if not all(bool(value.isfinite().all()) for value in generator.state_dict().values()):
                raise ValueError("it holds NaN or inf")
        except (ArgumentError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"generator: '{file}' contradicts itself: {error}") from error
        return generator.eval()

    @torch.no_grad()
    def follow(self, o: torch.Tensor) -> None:
        """Takes a task's statistic into the running mean and deviation over tasks."""
        known = ~o.isnan()
        if not self.tasks:
            self.mu[known] = o[known]
        off = o[known] - self.mu[known]
        rate = max(_MOMENTUM, 1 / (int(self.tasks) + 2))
        self.sigma[known] = ((1 - rate) * self.sigma[known].square() + rate * off.square()).sqrt().clamp(min=1e-4)
        self.mu[known] += rate * off
        self.tasks += 1


def l1_ranks(graph: ChannelGraph) -> torch.Tensor:
    """Rank by L1 norm within the group, evenly over (0.05, 0.95)."""
    scores = importance.magnitude(graph)
    ranks = torch.empty_like(scores)
    for group in graph.groups:
        order = scores[group.classes].argsort().argsort()
        ranks[group.classes] = 0.05 + 0.9 * (order + 0.5) / group.num_classes
    return ranks


def check_generator(generator: Any, method: str, steps: int) -> MaskGenerator | None:
    """The generator, read from its file if that was given.

    Raises:
        ArgumentError: no generator, one for another method, or no step without one.
        CheckpointError: the file cannot be read.
    """
    if isinstance(generator, (str, os.PathLike)):
        generator = MaskGenerator.load(generator)
    if generator is not None and not isinstance(generator, MaskGenerator):
        raise ArgumentError(f"generator: expected a MaskGenerator or the file of one, got {type(generator).__name__}")
    if generator is not None and method != "stamp":
        raise ArgumentError(f"generator: is for method 'stamp', not for '{method}'")
    if generator is not None and any(p.dtype != torch.float32 for p in generator.parameters()):
        generator = copy.deepcopy(generator).float()
    if generator is None and method == "stamp" and steps < 1:
        raise ArgumentError("steps: must be at least 1 where no generator= says which channels matter")
    return generator
