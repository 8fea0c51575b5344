"""Many random networks, each pruned at random and checked: `python -m tests.fuzz --networks 10000 --seed 0`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from .check import Failure, examine
from .records import write_record
from .spec import Block, Network
from .strategies import random_network

_CHUNK = 100
_RULES = Path(__file__).resolve().parents[2] / "csrc" / "graph"


class Chunk(NamedTuple):
    statuses: Counter
    operators: Counter
    notes: Counter
    failures: list  # (Network, message)


def run_chunk(seed: int, start: int, count: int, records: Path | None) -> Chunk:
    """Networks [start, start + count) of a run."""
    torch.set_num_threads(1)
    done = Chunk(Counter(), Counter(), Counter(), [])

    for index in range(start, start + count):
        spec = random_network(seed, index)
        try:
            result = examine(spec)
        except Failure as failure:
            done.statuses[failure.kind] += 1
            done.failures.append((spec, str(failure)))
            continue
        done.statuses[result.status] += 1
        done.operators.update(result.operators.keys())
        done.notes.update(result.notes)
        if records is not None and result.graph is not None:
            write_record(result.graph, records / f"{seed}-{index}.record")
    return done


def shrink(spec: Network, message: str, seconds: float = 60.0) -> Network:
    """A smaller network that fails with the same kind of message."""
    end = time.monotonic() + seconds

    def same(candidate: Network) -> bool:
        try:
            examine(candidate)
        except Failure as failure:
            return _signature(str(failure)) == _signature(message)
        return False

    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for candidate in _smaller(spec):
            if time.monotonic() > end:
                break
            if same(candidate):
                spec, progress = candidate, True
                break
    return spec


def _smaller(spec: Network):
    for blocks in _smaller_list(spec.blocks):
        yield spec._replace(blocks=blocks)
    for field, value in (("head", 0), ("second_input", 0), ("width", 8), ("seed", spec.seed % 4), ("seed", 0)):
        if getattr(spec, field) != value:
            yield spec._replace(**{field: value})


def _smaller_list(blocks: tuple[Block, ...]):
    for i, block in enumerate(blocks):
        yield blocks[:i] + blocks[i + 1 :]
        if block.children:
            yield blocks[:i] + block.children + blocks[i + 1 :]
    for i, block in enumerate(blocks):
        for children in _smaller_list(block.children):
            yield blocks[:i] + (block._replace(children=children),) + blocks[i + 1 :]
        if block.numbers:
            yield blocks[:i] + (block._replace(numbers=block.numbers[:-1]),) + blocks[i + 1 :]
        for k, number in enumerate(block.numbers):
            if number:
                numbers = block.numbers[:k] + (0,) + block.numbers[k + 1 :]
                yield blocks[:i] + (block._replace(numbers=numbers),) + blocks[i + 1 :]


def _signature(message: str) -> str:
    """The message without what differs from network to network."""
    return re.sub(r"'[^']*'|[-+]?\d[\d.e+-]*|\([\d, ]*\)|\[[\d, ]*\]", "#", message)[:160]


def rules() -> set[str]:
    """Operators in the rule table, read off its source."""
    found: set[str] = set()
    for path in _RULES.glob("rules_*.cpp"):
        _, _, rows = path.read_text().partition("\nvoid add_")
        found |= set(re.findall(r'"([a-z_0-9]+)"', rows))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz_failures.txt"), help="failing specs go here")
    parser.add_argument("--records", type=Path, help="folder for the operator records, for tests/cpp/fuzz_record.cpp")
    parser.add_argument("--json", type=Path, help="the summary as JSON")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--spec", help="only this network, as a failure prints it")
    options = parser.parse_args()
    if options.spec is not None:
        print(examine(eval(options.spec, {"Network": Network, "Block": Block})))
        return 0
    if options.records is not None:
        options.records.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    total = Chunk(Counter(), Counter(), Counter(), [])
    starts = range(0, options.networks, _CHUNK)
    tasks = [(options.seed, i, min(_CHUNK, options.networks - i), options.records) for i in starts]
    with ProcessPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(run_chunk, *task) for task in tasks]:
            chunk = future.result()
            total.statuses.update(chunk.statuses)
            total.operators.update(chunk.operators)
            total.notes.update(chunk.notes)
            total.failures.extend(chunk.failures)
            for spec, message in chunk.failures:
                print(f"{message}\n    {spec}", file=sys.stderr, flush=True)
            done = sum(total.statuses.values())
            print(f"{done}/{options.networks} networks, {len(total.failures)} failures, "
                  f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
    _report_failures(total, options)
    _print_summary(total, time.monotonic() - start, options)
    return 1 if total.failures else 0


def _report_failures(total: Chunk, options: argparse.Namespace) -> None:
    if not total.failures:
        return
    kinds: dict[str, list] = {}
    for spec, message in total.failures:
        kinds.setdefault(_signature(message), []).append((spec, message))
    options.failures.parent.mkdir(parents=True, exist_ok=True)
    with options.failures.open("w") as file:
        for found in sorted(kinds.values(), key=len, reverse=True):
            spec, message = min(found, key=lambda f: len(repr(f[0])))
            if not options.no_shrink:
                spec = shrink(spec, message)
            text = f"{len(found)} x {message}\n    {spec}\n"
            print(text)
            file.write(text)
            file.flush()


def _print_summary(total: Chunk, seconds: float, options: argparse.Namespace) -> None:
    print(f"\n{sum(total.statuses.values())} networks, seed {options.seed}, {seconds:.0f} s")
    for status, count in total.statuses.most_common():
        print(f"  {count:7d}  {status}")
    print("of which")
    for note, count in total.notes.most_common():
        print(f"  {count:7d}  {note}")
    known = rules()
    print("\nnetworks that ran each operator of the rule table")
    hit = [(name, n) for name, n in total.operators.most_common() if name in known]
    print("  " + ", ".join(f"{name} {n}" for name, n in hit))
    print(f"{len(hit)} of {len(known)} rows were hit. Not hit: {', '.join(sorted(known - total.operators.keys()))}")
    print(f"operators without a rule: {', '.join(sorted(total.operators.keys() - known))}")
    if options.json is not None:
        summary = {name: getattr(total, name) for name in ("statuses", "notes", "operators")}
        options.json.write_text(json.dumps({"seed": options.seed, "seconds": round(seconds), **summary}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
