"""Evolutionary search for the best genome under a budget (arXiv 1903.10258, algorithm 1 and its code)."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from .._files import JsonLines
from .._processes import Processes
from .._run import digest
from ..budget import Budget
from ..data import Batches
from ..errors import ArgumentError, CheckpointError
from .genome import Genome
from .pruning_net import PruningNet

_TRIES = 25  # for every genome that is wanted
_ROUNDS = 10
_REPAIRS = 5

Metric = Callable[[nn.Module, Any], tuple[float, int]]


class Scores:
    """What every genome scored, kept in a file as they come. Budgets do not matter to a score: searches can share it.

    Under torch.distributed each process scores its part of the genomes, on the same images; the first one has the file.

    Args:
        calibration, validation: their first pass counts: every genome is to meet the same images. They stay in the
            memory of the CPU.
        path: JSON lines; if it is there, what it holds is not scored again. None keeps nothing.

    Raises:
        CheckpointError: a file of another network, training, metric, or of other images.
        ArgumentError: the processes hold other weights or images.
    """

    def __init__(
        self, net: PruningNet, calibration: Iterable[Any], validation: Iterable[Any], metric: Metric | None, path: Any
    ) -> None:
        self.net, self.metric = net, metric
        self.calibration = list(Batches(calibration, torch.device("cpu")).one_pass())
        self.validation = list(Batches(validation, torch.device("cpu")).one_pass())
        self.known: dict[tuple[int, ...], float] = {}
        self.file = JsonLines(path, "search: {} is not a file of scores")
        self.processes = Processes()
        signature = self._signature()
        if any(other != signature for other in self.processes.of_all(signature)):
            raise ArgumentError(
                "search: the processes hold other weights, or other calibration or validation images; give all the same"
            )
        self.known = self.processes.from_first(lambda: self._load(signature))

    def of(self, genomes: list[Genome], done: Callable[[int], None] = lambda count: None) -> list[float]:
        """Scores of all; those that are not known yet are worked out. `done` hears how many more are.

        Raises:
            ArgumentError: a score that is not finite, or what `metric` raises, in all processes.
        """
        new = [g for g in dict.fromkeys(genomes) if g.ids not in self.known]
        done(len(genomes) - len(new))
        for start in range(0, len(new), self.processes.count):
            part = new[start : start + self.processes.count]
            mine = self._tried(part[self.processes.rank]) if self.processes.rank < len(part) else 0.0
            found = self.processes.of_all(mine)
            for value in found:
                if isinstance(value, Exception):
                    raise value
            for genome, value in zip(part, found, strict=False):
                self.known[genome.ids] = value
                if self.processes.is_first:
                    self.file.append({"ids": genome.ids, "score": value})
            done(len(part))
        return [self.known[genome.ids] for genome in genomes]

    def _tried(self, genome: Genome) -> float | Exception:
        try:
            score = self.net.score(genome, self.calibration, self.validation, self.metric)
        except Exception as error:
            if self.processes.count == 1:
                raise
            return error
        if math.isfinite(score):
            return score
        return ArgumentError(f"metric: gave {score} for the widths {genome.widths()}; a score has to be finite")

    def _signature(self) -> str:
        """Of the network, of what it is scored on, and how."""
        parameters = [p for _, p in sorted(self.net.named_parameters())]
        images = [tensor for batch in (*self.calibration, *self.validation) for tensor in _tensors(batch)]
        metric = getattr(self.metric, "__qualname__", type(self.metric).__name__)
        return json.dumps([self.net.space.signature(), digest(parameters), digest(images), metric])

    def _load(self, signature: str) -> dict[tuple[int, ...], float]:
        lines = self.file.read()
        if not lines:
            self.file.append({"scores": signature})
            return {}
        try:
            theirs = lines[0]["scores"]
            known = {tuple(line["ids"]): float(line["score"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise self.file.unfit(error) from error
        if theirs != signature:
            raise CheckpointError(
                f"search: '{self.file.path}' holds scores of another network, training, metric or images; "
                "use another file"
            )
        return known


def search(
    net: PruningNet,
    calibration: Iterable[Any],
    validation: Iterable[Any],
    *,
    budget: Budget,
    at_least: float = 0.0,
    population: int = 50,
    parents: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    generations: int = 20,
    mutation_probability: float = 0.1,
    metric: Metric | None = None,
    seed: int = 0,
    checkpoint: Any = None,
    scores: Scores | None = None,
    progress: bool = True,
) -> Genome:
    """The genome whose network does best on generated weights, of those within the budget.

    As in the paper's code: the best `population` genomes of all so far are kept, the best `parents` of them have
    offspring; what is beyond the budget is dropped, never penalised. Where few genomes fit, random ones that do not are
    widened or narrowed until they do (ours). It ends early when there is no new genome left.

    Args:
        net: trained by `fit`.
        calibration: batches for the statistics of the batch norms; the paper's code takes 100 of 1,000 images. The
            first pass counts: every genome is given the same.
        validation: batches that are scored, held out of the training.
        budget: of the widest network. latency= needs `net.space.graph.cost_table`.
        at_least: what uses less than this fraction of the budget is dropped too; for ResNet-50 the paper's 0.95.
        mutations, crossovers: genomes of either kind in every generation.
        generations: the first one is random.
        mutation_probability: of every gene.
        metric: as for `PruningNet.score`.
        checkpoint: a file that every score is written to at once. The same search goes on from it, and ends as if it
            had never stopped.
        scores: to share with other searches, in the place of calibration, validation, metric and checkpoint.

    Raises:
        BudgetError: not even the narrowest genome is within the budget.
        ArgumentError: an argument that cannot be; no genome uses as much as `at_least`.
        CheckpointError: a checkpoint of another network or of other images.

    The first process's measured costs decide where there are several.
    """
    counts = {"population": (population, 1), "parents": (parents, 2), "generations": (generations, 1)}
    counts |= {"mutations": (mutations, 0), "crossovers": (crossovers, 0), "seed": (seed, 0)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name}: must be a whole number of at least {least}, got {value!r}")
    fractions = {"mutation_probability": mutation_probability, "at_least": at_least}
    for name, value in fractions.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ArgumentError(f"{name}: must be a fraction in [0, 1], got {value!r}")
    if not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
    scores = scores or Scores(net, calibration, validation, metric, checkpoint)
    pool = _Pool(net, budget, at_least, random.Random(seed))
    wanted = [population] + [mutations + crossovers] * (generations - 1)
    best: list[Genome] = []

    def made(generation: int) -> list[tuple[int, ...]]:
        if generation == 0:
            new = pool.first(population)
        else:
            new = pool.mutated(best[:parents], mutations, mutation_probability)
            new += pool.crossed(best[:parents], crossovers)
            new += pool.drawn(wanted[generation] - len(new))
        return [genome.ids for genome in new]

    with tqdm(total=sum(wanted), desc="search", disable=not progress) as bar:
        for generation in range(generations):
            # Measured costs, and so what fits, are a process's own.
            new = [net.space.genome(ids) for ids in scores.processes.from_first(functools.partial(made, generation))]
            if not new:
                break
            scores.of(new, bar.update)
            best = sorted([*best, *new], key=lambda genome: -scores.known[genome.ids])[:population]
            bar.set_postfix(best=f"{scores.known[best[0].ids]:.4f}", rejected=pool.rejected)
    return best[0]


class _Pool:
    """Makes genomes within the budget that were not there before."""

    def __init__(self, net: PruningNet, budget: Budget, at_least: float, draw: random.Random) -> None:
        self.space, self.at_least, self.draw = net.space, at_least, draw
        self.budget = budget.predicted(net.space.graph)
        self.seen: set[tuple[int, ...]] = set()
        self.rejected = 0

    def first(self, count: int) -> list[Genome]:
        """The first generation.

        Raises:
            BudgetError, ArgumentError: there is none.
        """
        if self._used(self.space.smallest) > 1:
            raise self.budget.out_of_reach(self.space.graph, self.space.smallest.keep)
        found = self.drawn(count)
        if not found:
            raise ArgumentError(
                f"at_least: no genome was found that uses {self.at_least:g} to 1 of the budget; ask for less"
            )
        return found

    def mutated(self, parents: list[Genome], count: int, probability: float) -> list[Genome]:
        """Copies of parents with other widths."""
        scales = len(self.space.scales)

        def mutant() -> Genome:
            ids = self.draw.choice(parents).ids
            changed = (
                (i + self.draw.randrange(1, scales)) % scales if scales > 1 and self.draw.random() < probability else i
                for i in ids
            )
            return Genome(self.space, tuple(changed))

        return self._collected(mutant, count, _ROUNDS * _TRIES)

    def crossed(self, parents: list[Genome], count: int) -> list[Genome]:
        """Every gene from either of two parents."""

        def child() -> Genome:
            pairs = zip(*(p.ids for p in self.draw.sample(parents, 2)), strict=True)
            return Genome(self.space, tuple(self.draw.choice(pair) for pair in pairs))

        return self._collected(child, count, _ROUNDS * _TRIES) if len(parents) > 1 else []

    def drawn(self, count: int) -> list[Genome]:
        """Random ones, and where these do not fit, such as are widened or narrowed until they do."""
        found = self._collected(lambda: self.space.random(self.draw), count, _TRIES * count)
        missing = count - len(found)
        return found + self._collected(self._repaired, missing, _REPAIRS * missing)

    def _repaired(self) -> Genome:
        ids, widest = list(self.space.random(self.draw).ids), len(self.space.scales) - 1
        while self._used(Genome(self.space, tuple(ids))) < self.at_least and min(ids) < widest:
            ids[self.draw.choice([gene for gene, i in enumerate(ids) if i < widest])] += 1
        while self._used(Genome(self.space, tuple(ids))) > 1:
            ids[self.draw.choice([gene for gene, i in enumerate(ids) if i])] -= 1
        return Genome(self.space, tuple(ids))

    def _collected(self, make: Callable[[], Genome], count: int, tries: int) -> list[Genome]:
        found: list[Genome] = []
        for _ in range(tries):
            if len(found) >= count:
                break
            genome = make()
            widths = tuple(genome.widths().values())  # in narrow layers several ids are one width
            if widths in self.seen or not self.at_least <= self._used(genome) <= 1:
                self.rejected += 1
                continue
            self.seen.add(widths)
            found.append(genome)
        return found

    def _used(self, genome: Genome) -> float:
        return self.budget.used(self.space.graph, genome.keep)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
