"""Meta-training of the mask generator over class subsets of a reference data set.

Certain (arXiv 2006.12139, abstract): meta-learned over different subsets of the reference data set, so that it
generalises to unseen data sets within a few gradient steps. The loop is our reading: T inner steps on copies, a
first-order gradient of the query loss at the adapted point, the reference weights restored for the next task. That
the groups' shares of the budget follow differences of the query loss, after the cut and all that comes with it, is
ours: its gradient gave all to the last stage, whose channels are cheap, and starved the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from .._phases import in_mode
from .._run import Run
from ..budget import Budget
from ..checks import check_model, check_prunable
from ..data import LossFn, some_examples
from ..errors import ArgumentError, LoaderError
from ..graph import ChannelGraph, trace
from ..graph._model import unwrapped
from ..graph._snapshot import Snapshot
from ..reconstruct import reconstruct
from .adapt import Settings, gate_steps, gradients_set_aside, weight_steps
from .architecture import Architecture
from .episodes import Episode, Episodes
from .gates import BetaBernoulliGates
from .head import fit_head, fixed, wanting_gradients
from .mask_generator import MaskGenerator

__all__ = ["Schedule", "meta_train", "run_task"]

_OUTER = ("first_order", "reptile")
_TRIED = 0.3  # logits by which the shares of the groups are tried


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All that decides what a meta-training computes.

    Attributes:
        tasks: how many in all.
        tasks_per_update: gradients are averaged over so many.
        inner_steps: T, on every task; in mode "joint" of the gates and then of the weights.
        head_steps: steps in which the fresh head is fitted first.
        batch_size: of the inner steps.
        lr: of the outer Adam.
        outer: "first_order": gradient of the query loss at the adapted point; "reptile": the way from the start to it
            (of what the inner steps adapt: the set encoder is not among it).
        autocast: networks run in bfloat16 where autocast has them do so.
        budgets: fractions of the MACs; every task draws one between the least and the largest.
    """

    tasks: int = 1000
    tasks_per_update: int = 4
    inner_steps: int = 5
    head_steps: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    outer: str = "first_order"
    budgets: tuple[float, float] = (0.1, 0.5)
    classes: tuple[int, int] = (5, 20)
    shots: int = 16
    queries: int = 8
    seed: int = 0
    encoder: str = "activation"
    mode: str = "joint"
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.outer not in _OUTER:
            raise ArgumentError(f"outer: must be one of {', '.join(_OUTER)}, got {self.outer!r}")
        for name in ("tasks", "tasks_per_update", "inner_steps", "batch_size", "shots", "queries"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("head_steps", "seed"):
            _check_whole(name, getattr(self, name), 0)
        if not isinstance(self.lr, Real) or not 0 < self.lr < math.inf:
            raise ArgumentError(f"lr: must be a positive number, got {self.lr!r}")
        if not _is_pair(self.budgets, Real) or not 0 < self.budgets[0] <= self.budgets[1] <= 1:
            raise ArgumentError(f"budgets: must be two fractions in (0, 1], the smaller first, got {self.budgets!r}")
        if not _is_pair(self.classes, int) or not 2 <= self.classes[0] <= self.classes[1]:
            raise ArgumentError(f"classes: must be two whole numbers from 2, the smaller first, got {self.classes!r}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ArgumentError(f"{name}: must be a whole number of at least {least}, got {value!r}")


def _is_pair(value: Any, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, kind) for v in value)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one task has to say to the generator."""

    gradients: list[torch.Tensor]
    statistic: torch.Tensor  # o, [classes]
    loss: float
    macs: float


def meta_train(
    model: nn.Module,
    dataset: Any,
    *,
    labels: Sequence[int] | torch.Tensor | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
    **schedule: Any,
) -> MaskGenerator:
    """A generator for this pretrained network, which is left as it is.

    Under torch.distributed the tasks of an update are spread over the ranks, and every rank returns the same generator
    (that of one process, but for the order in which floats are added up).

    Args:
        model: pretrained on `dataset`; its head needs at least as many outputs as a task has classes.
        dataset: map-style, of (input, class index).
        labels: int, [examples], where the data set does not have them at hand.
        checkpoint: a file that is written every `checkpoint_every` updates, and from which an interrupted run goes on
            as if nothing had happened.
        schedule: fields of `Schedule`.

    Raises:
        ArgumentError: an argument cannot be used.
        CheckpointError: the checkpoint is of another network, schedule or data set; the message names the difference.
    """
    network = unwrapped(model)
    check_model(network)
    _check_whole("checkpoint_every", checkpoint_every, 1)
    unknown = sorted(schedule.keys() - {field.name for field in dataclasses.fields(Schedule)})
    if unknown:
        raise ArgumentError(f"{unknown[0]}: meta_train has no such argument; see stamp.Schedule for what there is")
    plan = Schedule(**schedule)
    episodes = Episodes(dataset, plan.seed, labels, plan.classes, plan.shots, plan.queries)
    example = some_examples(episodes[0].to(next(network.parameters()).device).support[0], 2)
    graph = trace(network, example)
    graph.settle()
    check_prunable(graph)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        generator = MaskGenerator.untrained(graph, plan.encoder, _image_shape(example), plan.mode)
    optimizer = torch.optim.Adam(generator.parameters(), lr=plan.lr)
    architecture = generator.architecture
    run = Run(
        checkpoint,
        "stamp_fast.stamp.meta_train",
        dataclasses.asdict(plan),
        {"weights": [t for _, t in sorted(network.state_dict().items())], "labels": [episodes.labels]},
        architecture.to_json(),
        lambda other: Architecture.from_json(other).difference(architecture),
    )
    done = run.resume(generator, optimizer)
    updates = math.ceil(plan.tasks / plan.tasks_per_update)
    rank, ranks = _place()
    bar = tqdm(total=updates, initial=done, desc="meta-train", disable=not progress or rank > 0, unit="update")
    # In training mode as in `prune`; parameters that the user has frozen too: a task needs a head of its own.
    trained = wanting_gradients(network.parameters(), True)
    with bar, in_mode(network, training=True), trained, contextlib.ExitStack() as stack:
        before = Snapshot(network, copy_values=True)
        stack.callback(before.restore)
        for update in range(done, updates):
            begin = time.perf_counter()
            tasks = range(update * plan.tasks_per_update, min((update + 1) * plan.tasks_per_update, plan.tasks))
            outcomes = {}
            for task in tasks:
                if task % ranks == rank:
                    outcomes[task] = run_task(graph, generator, episodes, task, plan)
                    before.restore()
            loss, macs = _step(generator, optimizer, outcomes, tasks)
            rate = len(tasks) / (time.perf_counter() - begin)
            bar.set_postfix(loss=f"{loss:.3f}", macs=f"{macs:.3f}", rate=f"{rate:.1f} tasks/s", refresh=False)
            bar.update()
            last = update + 1 == updates
            if rank == 0 and (last or (update + 1) % checkpoint_every == 0):
                run.save(generator, optimizer, update + 1)
    return generator.eval()


def run_task(graph: ChannelGraph, generator: MaskGenerator, episodes: Episodes, task: int, plan: Schedule) -> Outcome:
    """One task: condition, fit a fresh head, T inner steps, loss on the query set. Leaves the weights adapted."""
    episode = episodes[task].to(graph.device)
    rng = episodes.generator(task, 1)
    low, high = (math.log(b) for b in plan.budgets)
    budget = Budget(macs=math.exp(low + (high - low) * float(torch.rand((), generator=rng))))
    settings = Settings(mode=plan.mode)
    loss_fn = _loss_over(episode.classes, plan.autocast)
    inputs, labels = episode.support
    start, o = generator(graph, inputs, labels, budget)
    gates = BetaBernoulliGates(**start).to(graph.device)
    with torch.no_grad():
        for parameter in graph.output_parameters():
            parameter.zero_()

    def batches(count: int) -> Iterator[Any]:
        return _batches(episode, count, plan.batch_size, rng)

    with gradients_set_aside(graph.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))  # dropout
        fit_head(graph, batches(plan.head_steps), loss_fn)
        steps = plan.inner_steps
        for _ in gate_steps(graph, gates, batches(steps), steps, loss_fn, budget, len(labels), rng, settings):
            pass
        for parameter in gates.parameters():
            parameter.grad = None
        _towards_better_channels(graph, gates, episode, loss_fn, rng)
        weights = [(p, p.detach().clone()) for p in graph.model.parameters()]
        after = list(batches(steps)) if plan.mode == "joint" else []
        # The groups' shares are tried both ways, all that follows included, on one draw.
        logits = torch.logit(gates.sample(rng).detach())
        way = _TRIED * torch.randn(len(graph.groups), generator=rng)
        losses = []
        for sign in (1, -1):
            drawn = torch.sigmoid(logits + sign * generator.of_classes(way).to(logits))
            keep = budget.select(graph, drawn, ranking="global", floor=settings.floor, exact=False)
            reconstruct(graph, keep, inputs)
            for _ in weight_steps(graph, keep, after, loss_fn, settings):
                pass
            with torch.no_grad(), graph.masked(keep):
                losses.append(loss_fn(graph.model, episode.query).item())
            with torch.no_grad():
                for parameter, value in weights:
                    parameter.copy_(value)
    towards_way = (losses[0] - losses[1]) / (2 * _TRIED**2) * way
    gates.shift.grad = generator.of_classes(towards_way / torch.tensor(generator.encoder.sizes)).to(gates.shift)
    named = dict(gates.named_parameters())
    adapted = {"a": named["a_unconstrained"], "b": named["b_unconstrained"]} | named
    if plan.outer == "reptile":
        towards = [start[name].detach() - adapted[name].detach().cpu() for name in start]
    else:
        grads = {name: adapted[name].grad for name in start}
        towards = [torch.zeros_like(start[n]) if grad is None else grad.cpu() for n, grad in grads.items()]
    pairs = [(value, grad) for value, grad in zip(start.values(), towards, strict=True) if value.requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in pairs],
        list(generator.parameters()),
        [grad for _, grad in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return Outcome(list(gradients), o.detach(), sum(losses) / 2, graph.macs(keep) / graph.macs())


def _towards_better_channels(
    graph: ChannelGraph, gates: BetaBernoulliGates, episode: Episode, loss_fn: LossFn, rng: torch.Generator
) -> None:
    """Leaves the gradient of the query loss in the gates, under a relaxed mask of all channels.

    Relaxed: at a hard mask it would say what a little more of a channel does, which is nothing where the weights are
    fitted; over draws between 0 and 1 it adds up to what the channel is worth. Every group's mean is taken out: more
    of everything is no answer.
    """
    with torch.enable_grad():
        mask = gates.sample(rng)
        drawn = mask.detach().requires_grad_()
        with fixed(graph.model.parameters()), graph.masked(graph.all_kept(), drawn):
            loss_fn(graph.model, episode.query).backward()
        means = [drawn.grad[group.classes].mean().expand(group.num_classes) for group in graph.groups]
        mask.backward(drawn.grad - torch.cat(means))


def _step(
    generator: MaskGenerator, optimizer: torch.optim.Optimizer, outcomes: dict[int, Outcome], tasks: range
) -> tuple[float, float]:
    """One outer step on the mean over the tasks of all ranks; their mean loss and MACs."""
    parameters = list(generator.parameters())
    # In one row, so that one all_reduce does: gradients, then loss and MACs, then each task's statistic.
    total = torch.cat([torch.zeros_like(p).flatten() for p in parameters] + [torch.zeros(2)])
    statistics = torch.zeros(len(tasks), len(generator.mu))
    for task, outcome in sorted(outcomes.items()):
        if not all(bool(g.isfinite().all()) for g in outcome.gradients):
            raise LoaderError(f"dataset: task {task} gives a gradient that is not finite, at a loss of {outcome.loss}")
        told = torch.tensor([outcome.loss, outcome.macs])
        total += torch.cat([*(g.flatten() for g in outcome.gradients), told])
        statistics[task - tasks.start] = outcome.statistic
    if distributed.is_initialized():
        distributed.all_reduce(total)
        distributed.all_reduce(statistics)
    total /= len(tasks)
    for parameter, grad in zip(parameters, total[:-2].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for o in statistics:
        generator.follow(o)
    return total[-2].item(), total[-1].item()


def _place() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def _batches(episode: Episode, count: int, size: int, rng: torch.Generator) -> Iterator[Any]:
    inputs, targets = episode.support
    examples = len(targets)
    order: list[int] = []
    for _ in range(count):
        while len(order) < min(size, examples):
            order += torch.randperm(examples, generator=rng).tolist()
        taken = torch.tensor(order[: min(size, examples)])
        del order[: len(taken)]
        yield tree_map(lambda t: t[taken], inputs), targets[taken]  # noqa: B023  (used at once)


def _loss_over(classes: int, autocast: bool) -> LossFn:
    """Cross entropy over the first outputs: a task's classes take the places of the reference's."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=autocast):
            logits = model(inputs)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ArgumentError(
                f"model: its output is {shape}, but a task has {classes} classes; meta-training needs one logit for "
                "each of them, so pass classes= with smaller tasks"
            )
        value = F.cross_entropy(logits[:, :classes].float(), targets.to(logits.device))
        if not bool(value.isfinite()):
            raise LoaderError(f"dataset: the loss of a task is {value.item()}; check its inputs for NaN or inf")
        return value

    return loss


def _image_shape(example: Any) -> tuple[int, ...] | None:
    return tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else None
