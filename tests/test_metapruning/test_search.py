import itertools
import json
import random
import sys
from collections import Counter

import pytest
import search_run
import torch
from test_pruning_net import data, net_of

from stamp_fast import ArgumentError, Budget, BudgetError, CheckpointError
from stamp_fast.cost_table import CostTable
from stamp_fast.metapruning import Genome, Scores, front, search
from stamp_fast.metapruning.search import _Pool
from tests.processes import TIMEOUT, launch, spawn

SMALL = {"population": 12, "parents": 4, "mutations": 6, "crossovers": 6, "generations": 5, "progress": False}


@pytest.fixture(scope="module")
def net():
    return net_of().fit(data(8), epochs=8, lr=0.1, progress=False)


@pytest.fixture(scope="module")
def images():
    return data(2, seed=1), data(3, seed=2)


class Counted(Scores):
    """Scores that are a function of the genome, and a note of what was asked for."""

    def __init__(self, net, value):
        super().__init__(net, data(1), data(1), None, None)
        self.asked: list[Genome] = []
        self.value = value

    def of(self, genomes, done=lambda count: None):
        self.asked += genomes
        for genome in genomes:
            assert genome.ids not in self.known, "asked twice"
            self.known[genome.ids] = self.value(genome)
        return [self.known[genome.ids] for genome in genomes]


def test_it_takes_a_thousand_evaluations_of_new_genomes_within_the_budget(net):
    scores = Counted(net, lambda genome: -abs(genome.ids[0] - 17) - abs(genome.ids[1] - 5) - abs(genome.ids[2] - 9))
    budget = Budget(macs=0.5)
    found = search(net, (), (), budget=budget, scores=scores, progress=False)
    assert len(scores.asked) == len(scores.known) == 1000
    assert all(budget.used(net.space.graph, genome.keep) <= 1 for genome in scores.asked)
    assert found.ids == (17, 5, 9)


def test_it_finds_more_than_as_many_random_genomes(net):
    """An optimum that a random draw of 31 ** 3 misses."""
    wins = 0
    for seed in range(5):
        draw = random.Random(100 + seed)
        goal = [draw.randrange(31) for _ in range(3)]

        def value(genome, goal=goal):
            return -sum((a - b) ** 2 for a, b in zip(genome.ids, goal, strict=True))

        scores = Counted(net, value)
        found = search(net, (), (), budget=Budget(macs=1.0), scores=scores, seed=seed, **SMALL)
        drawn = [net.space.random(draw) for _ in scores.asked]
        wins += value(found) > max(map(value, drawn))
    assert wins >= 4


def test_mutants_change_one_gene_in_ten_to_any_other_width(net):
    pool = _Pool(net, Budget(macs=1.0), 0.0, random.Random(0))
    parent = net.space.genome([10, 20, 30])
    changed = []
    for _ in range(3000):
        pool.seen = {tuple(parent.widths().values())}
        changed += [mutant.ids for mutant in pool.mutated([parent], 1, 0.1)]
    assert parent.ids not in changed
    differing = Counter(sum(a != b for a, b in zip(ids, parent.ids, strict=True)) for ids in changed)
    # Of three genes with a chance of a tenth each: 0.243 : 0.027 : 0.001.
    assert 0.85 < differing[1] / len(changed) < 0.95 and differing[2] > differing[3]
    assert {ids[2] for ids in changed} == set(range(31))


def test_children_have_every_gene_from_either_parent(net):
    pool = _Pool(net, Budget(macs=1.0), 0.0, random.Random(0))
    parents = [net.space.genome(ids) for ids in ([1, 2, 3], [11, 12, 13])]
    children = pool.crossed(parents, 25)
    assert {c.ids for c in children} == {(a, b, c) for a in (1, 11) for b in (2, 12) for c in (3, 13)}
    assert pool.crossed(parents[:1], 25) == []


def test_tight_budgets_are_filled_with_narrowed_genomes(net):
    space, budget = net.space, Budget(macs=2.5 * net.space.smallest.macs() / net.space.largest.macs())
    fitting = set()
    for ids in itertools.product(range(25), repeat=3):  # wider ones do not fit
        genome = space.genome(ids)
        if budget.used(space.graph, genome.keep) <= 1:
            fitting.add(tuple(genome.widths().values()))
    pool = _Pool(net, budget, 0.0, random.Random(0))
    found = {tuple(genome.widths().values()) for genome in pool.drawn(len(fitting))}
    assert found <= fitting and len(found) > 0.6 * len(fitting)


def test_a_budget_that_pins_one_genome_gives_it(net, images):
    fraction = net.space.smallest.macs() / net.space.largest.macs()
    found = search(net, *images, budget=Budget(macs=fraction), **SMALL)
    assert found.widths() == net.space.smallest.widths()


def test_what_is_far_below_the_budget_can_be_left_out(net):
    scores = Counted(net, lambda genome: -genome.macs())
    budget = Budget(macs=0.5)
    search(net, (), (), budget=budget, at_least=0.9, scores=scores, **SMALL)
    assert all(0.9 <= budget.used(net.space.graph, genome.keep) <= 1 for genome in scores.asked)


def test_narrow_genomes_are_widened_where_too_few_use_enough(net):
    pool = _Pool(net, Budget(macs=0.9), 0.95, random.Random(0))
    found = pool.drawn(20)
    assert len(found) >= 10
    assert all(0.95 <= pool._used(genome) <= 1 for genome in found)


def test_no_genome_that_uses_enough_is_an_error(net, images):
    with pytest.raises(ArgumentError, match="at_least: no genome"):
        search(net, *images, budget=Budget(macs=0.9713), at_least=0.99999, **SMALL)


def test_scores_that_are_no_numbers_are_an_error(net, images):
    with pytest.raises(ArgumentError, match="metric: gave nan"):
        search(net, *images, budget=Budget(macs=0.5), metric=lambda m, b: (m(b[0]).sum() * float("nan"), 1), **SMALL)


def test_a_search_in_time_repeats_with_its_table(net, images, tmp_path, monkeypatch):
    # Operators are timed; whole networks, which another program slows down, are not.
    monkeypatch.setattr(CostTable, "measured", lambda self, *keeps: [1000 * self._sum(keep) for keep in keeps])
    options = {"budget": Budget(latency=0.7), **SMALL}
    found = []
    for _ in range(2):
        large = torch.randn(16, 3, 64, 64)  # small ones take no longer through wide networks
        net.space.graph.cost_table = CostTable(net.space.graph, large, path=tmp_path / "costs.jsonl")
        found.append(search(net, *images, checkpoint=tmp_path / "scores.jsonl", **options))
    options["budget"] = Budget(latency=f"{0.7 * net.space.graph.latency()} ms")
    found.append(search(net, *images, checkpoint=tmp_path / "scores.jsonl", **options))
    net.space.graph.cost_table = None
    assert found[0] == found[1] == found[2]


def test_several_budgets_hold_at_once(net):
    scores = Counted(net, lambda genome: genome.macs())
    budget = Budget(macs=0.6, params=0.4)
    found = search(net, (), (), budget=budget, scores=scores, **SMALL)
    assert found.macs() <= 0.6 * net.space.largest.macs()
    assert found.params() <= 0.4 * net.space.largest.params()


def test_what_cannot_be_is_refused(net, images):
    with pytest.raises(BudgetError, match="out of reach; from 1 down to macs=0.0"):
        search(net, *images, budget=Budget(macs=0.0001), **SMALL)
    with pytest.raises(ArgumentError, match="cost_table"):
        search(net, *images, budget=Budget(latency=0.5), **SMALL)
    wrong = [("population", 0), ("parents", 1), ("generations", 0), ("at_least", 1.5), ("budget", 0.5)]
    wrong += [("mutations", -3), ("crossovers", 1.5), ("mutation_probability", 3), ("seed", None), ("at_least", "a")]
    for name, value in wrong:
        with pytest.raises(ArgumentError, match=name):
            search(net, *images, **{"budget": Budget(macs=0.5), **SMALL, name: value})


def test_the_same_seed_repeats_and_another_does_not(net, images):
    def evaluated(seed):
        scores = Scores(net, *images, None, None)
        found = search(net, (), (), budget=Budget(macs=0.5), scores=scores, seed=seed, **SMALL)
        return found, dict(scores.known)

    first, again, other = evaluated(0), evaluated(0), evaluated(1)
    assert first == again
    assert first[1].keys() != other[1].keys()
    best = max(first[1].values())
    assert first[1][first[0].ids] == best


def test_an_interrupted_search_goes_on_with_nothing_lost(net, images, tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    options = {"budget": Budget(macs=0.5), **SMALL}
    whole = Scores(net, *images, None, None)
    expected = search(net, (), (), scores=whole, **options)
    score = type(net).score
    calls = []

    def counting(self, genome, *args):
        calls.append(genome.ids)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return score(self, genome, *args)

    monkeypatch.setattr(type(net), "score", counting)
    with pytest.raises(KeyboardInterrupt):
        search(net, *images, checkpoint=path, **options)
    with open(path, "a") as file:
        file.write('{"ids": [1, 2')  # as a process killed while it writes leaves it
    before = len(calls) - 1
    assert search(net, *images, checkpoint=path, **options) == expected
    assert len(calls) - 1 - before == len(whole.known) - before
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {tuple(line["ids"]): line["score"] for line in lines[1:]} == whole.known
    calls.clear()
    assert search(net, *images, checkpoint=path, **options) == expected
    assert not calls


def test_checkpoints_of_other_searches_are_refused(net, images, tmp_path):
    path = tmp_path / "scores.jsonl"
    options = {"budget": Budget(macs=0.5), "checkpoint": path, **SMALL}
    search(net, *images, **options)
    swapped = [(x, labels.flip(0)) for x, labels in images[1]]
    others = [(net, images[0], data(3, seed=9)), (net_of(), *images), (net, images[0], swapped)]
    for other in others:
        with pytest.raises(CheckpointError, match="another network, training, metric or images"):
            search(*other, **options)
    with pytest.raises(CheckpointError, match="another network, training, metric or images"):
        search(net, *images, metric=lambda m, b: (1.0, 1), **options)
    path.write_text("no scores\n")
    with pytest.raises(CheckpointError, match="not a file of scores"):
        search(net, *images, **options)


def test_one_call_searches_several_budgets(net, images, tmp_path):
    budgets = [Budget(macs=b) for b in (0.6, 0.1, 0.3)]
    found = front(net, *images, budgets=budgets, **SMALL)
    assert found.budgets == [0.1, 0.3, 0.6]
    for budget, genome in zip(found.budgets, found.genomes, strict=True):
        assert genome.macs() <= budget * net.space.largest.macs()
    assert found.scores == sorted(found.scores)  # what fits a small budget fits a large one
    lines = found.to_csv(tmp_path / "front.csv").read_text().splitlines()
    assert lines[0] == "budget,unit,cost,score,ids"
    assert len(lines) == 4
    assert found.plot(tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    for wrong in ([], [Budget(macs=0.5), Budget(params=0.5)], [Budget(macs=0.5, params=0.5)]):
        with pytest.raises(ArgumentError, match="of one unit"):
            front(net, *images, budgets=wrong, **SMALL)


@pytest.mark.parametrize(
    ("how", "said"),
    [("images", "the processes hold other weights"), ("metric", "on purpose"), ("loader", "the same in all processes")],
)
def test_what_fails_in_one_process_ends_all(tmp_path, how, said):
    for process in spawn([sys.executable, search_run.__file__, str(tmp_path), how], 2):
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 1 and said in output


def test_processes_share_the_work_and_agree(tmp_path):
    torch.manual_seed(0)
    launch([sys.executable, search_run.__file__, str(tmp_path)], 2)
    first, second = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == second[0] == search_run.run(None)[0]
    # Each has scored its half.
    assert abs(int(first[1]) - int(second[1])) <= 5 and int(first[1]) + int(second[1]) == int(search_run.run(None)[1])
