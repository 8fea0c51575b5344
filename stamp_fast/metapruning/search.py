"""Evolutionary search for the best genome under a budget (arXiv 1903.10258, algorithm 1 and its code)."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from .._files import real_path
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

    Under torch.distributed each process scores its part of the genomes.

    Args:
        path: JSON lines; if it is there, what it holds is not scored again. None keeps nothing.

    Raises:
        CheckpointError: a file of another network, or of other batches.
    """

    def __init__(
        self, net: PruningNet, calibration: Iterable[Any], validation: Iterable[Any], metric: Metric | None, path: Any
    ) -> None:
        device = net.space.graph.device
        self.net, self.metric = net, metric
        # Once: every genome is to meet the same images.
        self.calibration = list(Batches(calibration, device).one_pass())
        self.validation = list(Batches(validation, device).one_pass())
        self.known: dict[tuple[int, ...], float] = {}
        self.path = None if path is None else real_path(path)
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.ranks = distributed.get_world_size() if together else 1
        self._load()

    def of(self, genomes: list[Genome], done: Callable[[int], None] = lambda count: None) -> list[float]:
        """Scores of all; those that are not known yet are worked out. `done` hears how many more are."""
        new = [g for g in dict.fromkeys(genomes) if g.ids not in self.known]
        done(len(genomes) - len(new))
        for start in range(0, len(new), self.ranks):
            part = new[start : start + self.ranks]
            score = float("nan")
            if self.rank < len(part):
                score = self.net.score(part[self.rank], self.calibration, self.validation, self.metric)
            for genome, value in zip(part, self._gathered(score), strict=False):
                self.known[genome.ids] = value
                self._append({"ids": genome.ids, "score": value})
            done(len(part))
        return [self.known[genome.ids] for genome in genomes]

    def from_first(self, make: Callable[[], list[Genome]]) -> list[Genome]:
        """What the first process makes, in all of them: measured costs, and so what fits, differ between processes."""
        if self.ranks == 1:
            return make()
        made: list[Any] = [None]
        if self.rank == 0:
            try:
                made = [[genome.ids for genome in make()]]
            except Exception as error:
                made = [error]
        distributed.broadcast_object_list(made, 0)
        if isinstance(made[0], Exception):
            raise made[0]
        return [self.net.space.genome(ids) for ids in made[0]]

    def _gathered(self, score: float) -> list[float]:
        if self.ranks == 1:
            return [score]
        device = self.net.space.graph.device if distributed.get_backend() == "nccl" else torch.device("cpu")
        mine = torch.tensor([score], dtype=torch.float64, device=device)
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        distributed.all_gather(found, mine)
        return [value.item() for value in found]

    def _signature(self) -> str:
        """Of the network and of what it is scored on."""
        with torch.no_grad():
            weights = sum(p.double().abs().sum().item() for p in self.net.parameters())
        batches = [[t.double().sum().item() for t in _tensors(b)] for b in (*self.calibration, *self.validation)]
        return json.dumps([self.net.space.signature()[0], round(weights, 3), batches])

    def _load(self) -> None:
        if self.path is None:
            return
        if os.path.exists(self.path):
            try:
                with open(self.path) as file:
                    lines = file.read().split("\n")
                # What follows the last line break was being written when the process ended.
                first, *rest = [json.loads(line) for line in lines[:-1]]
                self.known = {tuple(line["ids"]): float(line["score"]) for line in rest}
                theirs = first["scores"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"search: '{self.path}' is not a file of scores ({error}); use another"
                ) from error
            if theirs != self._signature():
                raise CheckpointError(
                    f"search: '{self.path}' holds scores of another network, training or images; use another file"
                )
            if lines[-1] and self.rank == 0:
                os.truncate(self.path, os.path.getsize(self.path) - len(lines[-1].encode()))
        else:
            self._append({"scores": self._signature()})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None or self.rank:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"search: cannot write '{self.path}': {error}") from error


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
    narrowed until they do (ours). It ends early when there is no new genome left.

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
    """
    counts = {"population": population, "parents": parents, "generations": generations}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (2 if name == "parents" else 1):
            raise ArgumentError(f"{name}: must be a whole number of at least {1 + (name == 'parents')}, got {value!r}")
    if not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
    if not 0 <= at_least < 1:
        raise ArgumentError(f"at_least: must be a fraction in [0, 1), got {at_least!r}")
    scores = scores or Scores(net, calibration, validation, metric, checkpoint)
    pool = _Pool(net, budget, at_least, random.Random(seed))
    wanted = [population] + [mutations + crossovers] * (generations - 1)
    best: list[Genome] = []

    def made(generation: int) -> list[Genome]:
        if generation == 0:
            pool.check()
            return pool.drawn(population)
        offspring = pool.mutated(best[:parents], mutations, mutation_probability)
        offspring += pool.crossed(best[:parents], crossovers)
        return offspring + pool.drawn(wanted[generation] - len(offspring))

    with tqdm(total=sum(wanted), desc="search", disable=not progress) as bar:
        for generation in range(generations):
            new = scores.from_first(functools.partial(made, generation))
            if not new:
                break
            scores.of(new, bar.update)
            best = sorted([*best, *new], key=lambda genome: -scores.known[genome.ids])[:population]
            bar.set_postfix(best=f"{scores.known[best[0].ids]:.4f}", rejected=pool.rejected)
    return best[0]


class _Pool:
    """Makes genomes within the budget that were not there before."""

    def __init__(self, net: PruningNet, budget: Budget, at_least: float, draw: random.Random) -> None:
        self.space, self.budget, self.at_least, self.draw = net.space, budget, at_least, draw
        self.seen: set[tuple[int, ...]] = set()
        self.rejected = 0

    def check(self) -> None:
        """Raises if no genome fits."""
        if self._used(self.space.smallest) > 1:
            raise self.budget.out_of_reach(self.space.graph, self.space.smallest.keep)
        widest = self._used(self.space.largest)
        if widest < self.at_least:
            raise ArgumentError(f"at_least: the widest network uses {widest:.3f} of the budget")

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
        """Random ones, and where these do not fit, such as are narrowed until they do."""
        found = self._collected(lambda: self.space.random(self.draw), count, _TRIES * count)
        missing = count - len(found)
        return found + self._collected(self._narrowed, missing, _REPAIRS * missing)

    def _narrowed(self) -> Genome:
        ids = list(self.space.random(self.draw).ids)
        while self._used(Genome(self.space, tuple(ids))) > 1:
            gene = self.draw.choice([gene for gene, i in enumerate(ids) if i])
            ids[gene] -= 1
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
