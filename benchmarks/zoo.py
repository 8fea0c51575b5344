"""Prunes every network of torchvision and a choice of timm's, each in a process of its own, and writes a table.

    python -m benchmarks.zoo                          # everything, with Torch-Pruning beside it; an hour or more
    python -m benchmarks.zoo --only 'resnet*' --no-peers --results /tmp/resnets.jsonl

    python -m benchmarks.zoo --add-peers              # times alone, for rows that have none of Torch-Pruning

Results are appended to a JSON-lines file as they come; `--resume` goes on where a sweep was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from . import zoo_check, zoo_table, zoo_time
from .machine import machine_info
from .zoo_models import ZooModel, choose_timm, zoo

_RESULTS = Path(__file__).parent / "results" / "zoo.jsonl"


def steps(
    entry: ZooModel, times: bool = False, peers: bool = False, checked: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Everything that is done with one network, in this process; yields what is known as it becomes known.

    Args:
        checked: what an earlier run has found out: only times are taken.
    """
    torch.set_num_threads(1)
    known: dict[str, Any] = dict(checked or {})

    def guarded(work: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            for update in work:
                known.update(update)
                yield update
        except Exception as error:  # whatever it is, it is this network's result
            line = zoo_check.without_folders(str(error).strip().partition("\n")[0])
            known["error"] = f"{known['stage']}: {type(error).__name__}: {line}"
            yield {"error": known["error"]}

    if checked is None:
        yield from guarded(zoo_check.examine(entry))
    if times and "shape" in known:
        yield from guarded(zoo_time.compare(entry, known, peers))


def _work(channel: Connection, *what: Any) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for update in steps(*what):
            channel.send(update)
        channel.send(None)


def run(
    entry: ZooModel, context: Any, options: argparse.Namespace, checked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is known of a network when its process has ended, of itself or because its time was up."""
    record: dict[str, Any] = checked or {"family": entry.family, "name": entry.name, "stage": "start"}
    receiver, sender = context.Pipe(duplex=False)
    what = (entry, not options.no_times, not options.no_peers, checked)
    process = context.Process(target=_work, args=(sender, *what), daemon=True)
    process.start()
    sender.close()
    deadline = time.monotonic() + options.time_limit
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                _ended(record, "time-out")
                break
            update = receiver.recv()
            if update is None:
                break
            record.update(update)
            if update.get("stage") == "time":
                deadline = time.monotonic() + options.time_limit
            elif update.get("stage") == "peer":
                deadline = time.monotonic() + options.peer_time_limit
    except EOFError:
        process.join()
        _ended(record, f"process died (exit code {process.exitcode})")
    finally:
        process.kill()
        process.join()
    record["verdict"], record["why"] = zoo_check.verdict(record)
    return record


def _ended(record: dict[str, Any], how: str) -> None:
    if record["stage"] == "peer":
        record["peer"] = {"verdict": how}
    else:
        record["error"] = f"{record['stage']}: {how}"


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo_time", "torch_pruning"])
    return context


def _sweep(entries: list[ZooModel], options: argparse.Namespace) -> None:
    context = _context()
    for number, entry in enumerate(entries, 1):
        record = run(entry, context, options)
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        peer = f"  [Torch-Pruning: {record['peer']['verdict']}]" if "peer" in record else ""
        line = f"{number}/{len(entries)} {record['verdict']:8}{entry.family}: {entry.name}{peer} {record['why']}"
        print(line[:200], flush=True)


def _add_peers(entries: list[ZooModel], options: argparse.Namespace) -> None:
    """Runs Torch-Pruning beside ours on what was checked without it; every row is put back as it comes."""
    context = _context()
    first, *lines = options.results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wanted = {(entry.family, entry.name): entry for entry in entries}
    for number, record in enumerate(records):
        entry = wanted.get((record["family"], record["name"]))
        if entry is None or "peer" in record or "error" in record:
            continue
        records[number] = run(entry, context, options, record)
        temporary = options.results.with_suffix(".tmp")
        temporary.write_text("\n".join([first, *map(json.dumps, records)]) + "\n")
        temporary.replace(options.results)
        print(f"{entry.family}: {entry.name} [Torch-Pruning: {records[number]['peer']['verdict']}]", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="networks whose name matches, such as 'resnet*'")
    parser.add_argument("--family", metavar="PATTERN", default="*", help="such as detection or 'timm*'")
    parser.add_argument("--time-limit", type=float, default=180, metavar="S", help="per network (default: 180)")
    parser.add_argument("--peer-time-limit", type=float, default=60, metavar="S", help="Torch-Pruning (default: 60)")
    parser.add_argument("--no-times", action="store_true", help="only the checks")
    parser.add_argument("--no-peers", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--add-peers", action="store_true", help="only Torch-Pruning, for rows that lack it")
    parser.add_argument("--resume", action="store_true", help="leave out what the results already hold")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="JSON lines (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="write the results as Markdown")
    parser.add_argument("--list", action="store_true", help="print the networks and stop")
    parser.add_argument("--choose-timm", action="store_true", help="print zoo_timm.txt anew and stop (minutes)")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    warnings.simplefilter("ignore")
    if options.choose_timm:
        print("\n".join(choose_timm()))
        return
    entries = [
        entry
        for entry in zoo()
        if fnmatch.fnmatch(entry.name, options.only) and fnmatch.fnmatch(entry.family, options.family)
    ]
    if options.list:
        print("\n".join(f"{entry.family}: {entry.name}" for entry in entries))
        return
    options.results.parent.mkdir(exist_ok=True)
    if options.add_peers:
        _add_peers(entries, options)
        entries = []
    elif options.resume and options.results.exists():
        done = {(record["family"], record["name"]) for record in zoo_table.read(options.results)[1]}
        entries = [entry for entry in entries if (entry.family, entry.name) not in done]
    else:
        packages = {name: version(name) for name in ("torchvision", "timm", "torch-pruning")}
        options.results.write_text(json.dumps({"machine": machine_info(threads=1) | {"packages": packages}}) + "\n")
    _sweep(entries, options)
    if options.table:
        machine, records = zoo_table.read(options.results)
        options.table.parent.mkdir(exist_ok=True)
        options.table.write_text(zoo_table.render(machine, records))


if __name__ == "__main__":
    main()
