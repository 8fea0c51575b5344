"""PruningNet: one network that makes the weights of every width (arXiv 1903.10258, section 3.1 and its code)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from .._phases import in_mode
from .._processes import Processes
from .._run import Run
from ..data import Batches, LossFn, cross_entropy, guarded, hits
from ..errors import ArgumentError, LoaderError
from ..graph._plan import Plan, swapped
from ..graph.graph import Slot
from ..ops import convolutions
from ..recalibrate import recalibrate
from .genome import Genome, SearchSpace

_FIT = "stamp_fast.metapruning.PruningNet.fit"
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class WeightGenerator(nn.Module):
    """The weights of one layer for any widths: fully connected, ReLU, fully connected, cropped.

    Its bias starts as the layer's own weights, so that it begins as any network does; the paper's starts as every
    linear layer.

    Args:
        weight: of the widest layer, [out, in / groups, ...].
        inputs: how many scales it is given.
    """

    def __init__(self, weight: torch.Tensor, inputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, dtype=weight.dtype)
        spread = weight.std().item() if weight.numel() > 1 else 1.0
        self.weight = nn.Parameter(torch.randn(*weight.shape, hidden, dtype=weight.dtype) * spread / hidden**0.5)
        self.bias = nn.Parameter(weight.detach().clone())

    def forward(self, scales: torch.Tensor, kept: list[torch.Tensor | None]) -> torch.Tensor:
        """
        Args:
            scales: float, [inputs].
            kept: per dim of the weight the positions that stay; None for all. Nothing else is computed.
        """
        features = F.relu(self.first(scales))
        weight, bias = _cropped(self.weight, kept), _cropped(self.bias, kept)
        return (weight @ features) + bias


class PruningNet(nn.Module):
    """Generates the weights of every genome of a search space.

    Every weight matrix or filter bank that a gene touches has a `WeightGenerator` of its own, given the scales of all
    genes that touch it. Batch norms have a scale and shift of their own for every width, or none (`affine`); their
    statistics are taken anew for every genome (`score`). The classifier and all other parameters are ordinary, cropped;
    frozen ones stay as they are.

    Args:
        model: the widest network; it is copied.
        example: what a forward takes; the first dim is the batch.
        hidden: width of the generators; the paper's 32 (64 in MobileNetV2's bottlenecks).
        affine: whether batch norms learn scale and shift; in the paper's MobileNetV2 and ResNet they do not.
        space: of `SearchSpace`: keep, scales, round_to.

    Attributes:
        space: what the genomes are of.

    Raises:
        StampFastError: what `SearchSpace` raises.
    """

    def __init__(self, model: nn.Module, example: Any, *, hidden: int = 32, affine: bool = False, **space: Any) -> None:
        super().__init__()
        if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
            raise ArgumentError(f"hidden: must be a whole number of at least 1, got {hidden!r}")
        self.space = SearchSpace(model, example, **space)
        graph = self.space.graph
        self._gene_of = torch.full((graph.num_classes + 1,), -1)  # the last: of positions without a class
        for number, gene in enumerate(self.space.genes):
            for group in gene:
                self._gene_of[group.classes] = number
        self.generators, self.norms, self.shared = nn.ModuleDict(), nn.ParameterDict(), nn.ParameterDict()
        self._genes: dict[int, list[int]] = {}  # of every slot that has a generator
        head = {id(parameter) for parameter in graph.output_parameters()}
        for i, slot in enumerate(graph.slots):
            if not slot.is_parameter:
                continue
            key, tensor = str(i), slot.tensor.detach()
            self._genes[i] = self._genes_of(slot)
            learns = slot.tensor.requires_grad
            if learns and len(slot.axes) > 1 and self._genes[i] and id(slot.tensor) not in head:
                self.generators[key] = WeightGenerator(tensor, len(self._genes[i]), hidden)
            elif learns and _is_norm(slot) and len(slot.axes) == 1:
                if affine:
                    self.norms[key] = nn.Parameter(tensor.expand(len(self.space.scales), -1).clone())
            else:
                self.shared[key] = nn.Parameter(tensor.clone(), requires_grad=learns)
        self.to(graph.device)
        shapes = [list(slot.tensor.shape) for slot in graph.slots]
        self._architecture = json.dumps([self.space.signature(), hidden, affine, shapes])
        self._plans: dict[tuple[int, ...], Plan] = {}

    def _apply(self, fn: Callable, recurse: bool = True) -> PruningNet:
        self.space.graph.model._apply(fn, recurse)  # the network that runs on what is generated
        return super()._apply(fn, recurse)

    def _genes_of(self, slot: Slot) -> list[int]:
        found = [self._gene_of[axis].unique() for axis in slot.axes if axis is not None]
        return [] if not found else [gene for gene in torch.cat(found).unique().tolist() if gene >= 0]

    def _plan(self, genome: Genome) -> Plan:
        if genome.ids not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[genome.ids] = self.space.graph.plan(genome.keep)
        return self._plans[genome.ids]

    def weights(self, genome: Genome) -> dict[int, torch.Tensor]:
        """Every parameter and buffer of the genome's network, by slot of `space.graph`; differentiable."""
        plan, slots = self._plan(genome), self.space.graph.slots
        device = self.space.graph.device
        made: dict[int, torch.Tensor] = {}
        for i, slot in enumerate(slots):
            key, kept = str(i), plan.kept[i]
            if key in self.generators:
                scales = [genome.scales[gene] for gene in self._genes[i]]
                weight = self.generators[key]
                made[i] = weight(torch.tensor(scales, dtype=weight.bias.dtype, device=device), kept)
            elif key in self.norms:
                made[i] = self._of_width(self.norms[key], slot, genome, kept[0])
            elif key in self.shared:
                made[i] = _cropped(self.shared[key], kept)
            elif slot.is_parameter:  # a norm's, which does not learn
                value = 1.0 if slot.owners[0][1] == "weight" else 0.0
                made[i] = torch.full(plan.shape(i), value, dtype=slot.tensor.dtype, device=device)
            else:
                made[i] = _cropped(slot.tensor, kept).clone()
                if slot.owners[0][1] in _RUNNING and _is_norm(slot):
                    made[i].fill_(slot.owners[0][1] == "running_var")
        return made

    def _of_width(self, bank: torch.Tensor, slot: Slot, genome: Genome, kept: torch.Tensor | None) -> torch.Tensor:
        """The row of each position's width."""
        positions = torch.arange(bank.shape[1]) if kept is None else kept
        genes = torch.full_like(positions, -1) if slot.axes[0] is None else self._gene_of[slot.axes[0][positions]]
        ids = torch.tensor([*genome.ids, len(self.space.scales) - 1])[genes]  # what no gene touches is at its widest
        return bank[ids.to(bank.device), positions.to(bank.device)]

    @contextlib.contextmanager
    def as_network(self, genome: Genome) -> Iterator[nn.Module]:
        """Inside, the widest network runs as the genome's, physically cropped, on generated weights."""
        self._check(genome)
        with swapped(self._plan(genome), self.weights(genome)), convolutions():
            yield self.space.graph.model

    def forward(self, genome: Genome, *args: Any, **kwargs: Any) -> Any:
        """The output of the genome's network."""
        with self.as_network(genome) as network, in_mode(network, self.training):
            return network(*args, **kwargs)

    def build(self, genome: Genome) -> nn.Module:
        """An ordinary network with the generated weights. Its batch norms have no statistics yet (`recalibrate`)."""
        self._check(genome)
        with torch.no_grad():
            weights = self.weights(genome)
        model = self.space.built(genome.keep)
        names = self.space.graph.recording.slots
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for i, value in weights.items():
                tensors[names[i]].copy_(value)
        return model

    def _check(self, genome: Any) -> None:
        if not isinstance(genome, Genome) or genome.space is not self.space:
            raise ArgumentError("genome: is not of this network's space; make it with net.space")

    def _difference(self, other: str) -> str:
        """What a checkpoint of another network has that this one has not."""
        return "" if other == self._architecture else "other groups, widths, shapes, hidden= or affine="

    # --- training -----------------------------------------------------------------------------------------------------
    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        lr: float = 0.25,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.1,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        checkpoint: Any = None,
        progress: bool = True,
    ) -> PruningNet:
        """Trains on a new random genome in every step; SGD, learning rate linear to 0.

        The paper gives it a quarter of the epochs of the final training: 64 for MobileNets (batch 512, lr 0.25), and 32
        for ResNet-50 (batch 256, lr 0.1). Under torch.distributed all processes start from the first one's weights,
        draw the same genomes and average their gradients; each has a loader of its own, all of one length.

        Args:
            loader: batches, as for `stamp_fast.prune`.
            weight_decay: of the ordinary parameters; the paper's 4e-5 for MobileNetV1, else 0.
            loss_fn: (network, batch) -> loss; default: cross entropy with `label_smoothing`.
            seed: of the genomes.
            checkpoint: a file, written after every epoch (by the first process); if it is there, the training goes on
                from it.

        Returns:
            self

        Raises:
            StampFastError: a loader or loss that cannot be; a checkpoint of another training.
        """
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ArgumentError(f"epochs: must be a whole number of at least 1, got {epochs!r}")
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or lr <= 0:
            raise ArgumentError(f"lr: must be a number above 0, got {lr!r}")
        loss = guarded(loss_fn or functools.partial(cross_entropy, label_smoothing=label_smoothing))
        batches = Batches(loader, self.space.graph.device)
        decayed = [parameter for parameter in self.shared.parameters() if parameter.requires_grad]
        rest = [*self.generators.parameters(), *self.norms.parameters()]
        groups = [{"params": p, "weight_decay": d} for p, d in ((rest, 0.0), (decayed, weight_decay)) if p]
        optimizer = torch.optim.SGD(groups, lr, momentum=momentum)
        schedule = {"epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "seed": seed}
        schedule["label_smoothing"] = label_smoothing if loss_fn is None else None
        run = Run(checkpoint, _FIT, schedule, {}, self._architecture, self._difference)
        length, together = batches.length(), _Together(self, batches.length())
        first = together.resumed(lambda: run.resume(self, optimizer), optimizer)
        optimizer.zero_grad()
        for epoch in tqdm(range(first, epochs), desc="PruningNet", disable=not progress):
            draw = random.Random(f"{seed} {epoch}")
            if hasattr(getattr(loader, "sampler", None), "set_epoch"):
                loader.sampler.set_epoch(epoch)
            for step, batch in enumerate(batches.one_pass()):
                for group in optimizer.param_groups:  # without a length the rate changes once an epoch
                    group["lr"] = lr * (1 - (epoch + (min(step / length, 1.0) if length else 0.0)) / epochs)
                genome = self.space.random(draw)
                with together.failing_together(), self.as_network(genome) as net, in_mode(net, training=True):
                    loss(net, batch).backward()
                together.average_gradients()
                optimizer.step()
                optimizer.zero_grad()
            if together.processes.is_first:
                run.save(self, optimizer, epoch + 1)
        return self

    # --- scoring ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def score(
        self,
        genome: Genome,
        calibration: Iterable[Any],
        validation: Iterable[Any],
        metric: Callable[[nn.Module, Any], tuple[float, int]] | None = None,
    ) -> float:
        """How good a genome's network is on generated weights; higher is better, as in the paper's code.

        Args:
            calibration: batches that the batch norms take their statistics from.
            validation: batches that are scored, held out of the training.
            metric: (network in eval mode, batch) -> (sum over the examples, how many); default: correct answers. It
                runs the network on the calibration batches too.

        Raises:
            ArgumentError: no batch to calibrate on, no examples to score, or batches that the default does not fit.
        """
        metric, device = metric or hits, self.space.graph.device
        with self.as_network(genome) as network:
            batches = _on(device, calibration)
            first = next(batches, None)
            if first is None:
                raise ArgumentError("calibration: has no batch")
            recalibrate(network, itertools.chain([first], batches), metric)
            with in_mode(network, training=False):
                total, count = 0.0, 0
                for batch in _on(device, validation):
                    value, examples = metric(network, batch)
                    total, count = total + float(value), count + examples
        if not count:
            raise ArgumentError("validation: has no examples")
        return total / count


class _Together:
    """Processes that train one PruningNet; with one there is nothing to do.

    Args:
        length: of this process's loader.

    Raises:
        ArgumentError: the loaders differ in length.
    """

    def __init__(self, net: PruningNet, length: int | None) -> None:
        self.processes = Processes()
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        lengths = self.processes.of_all(length)
        if len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1):
            raise ArgumentError(f"loader: has to have a length, the same in all processes; got {lengths}")

    def resumed(self, resume: Callable[[], int], optimizer: torch.optim.Optimizer) -> int:
        """Where the first process's checkpoint is; all go on from there."""
        if self.processes.count == 1:
            return resume()
        first, state = self.processes.from_first(lambda: (resume(), optimizer.state_dict()["state"]))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter in self.parameters:
            distributed.broadcast(parameter.data, 0)
        return first

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error in one process ends all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.processes.count > 1:
            flag = torch.tensor([error is not None], dtype=torch.int32, device=self.parameters[0].device)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
            if bool(flag) and error is None:
                raise LoaderError("loader: a batch of another process failed; its error is there")
        if error is not None:
            raise error

    def average_gradients(self) -> None:
        if self.processes.count > 1:
            for parameter in self.parameters:  # not all: a first layer behind a dead ReLU has none
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.all_reduce(grad)
                parameter.grad = grad / self.processes.count


def _on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, batch)


def _is_norm(slot: Slot) -> bool:
    return any(isinstance(module, _NormBase) for module, _ in slot.owners)


def _cropped(tensor: torch.Tensor, kept: list[torch.Tensor | None]) -> torch.Tensor:
    """The positions that stay: a view where they are the first so many of every dim, as they mostly are."""
    for dim, index in enumerate(kept):
        if index is None:
            continue
        if int(index[-1]) == len(index) - 1:
            tensor = tensor.narrow(dim, 0, len(index))
        else:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
