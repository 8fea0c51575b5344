"""Options, the machine's description, and the `measure` fixture that every suite goes through."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .machine import cpu_model, machine_info
from .table import render
from .timing import Ratio, ratio_of

_RESULTS = Path(__file__).parent / "results"
_MEASURED = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stamp_fast benchmarks")
    group.addoption("--keep", metavar="NAME", help="write results/NAME-torch<version>-<cpu>.json")
    group.addoption("--check-bars", action="store_true", help="fail where a bar is missed")
    group.addoption("--rounds", type=int, help="rounds of every benchmark, for a quick look")
    group.addoption("--threads", type=int, default=1, help="threads of torch (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = []
    # Its table would show whole rounds, all contestants together.
    config.option.benchmark_quiet = True
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--keep"):
        _RESULTS.mkdir(exist_ok=True)
        config.option.benchmark_json = _RESULTS / f"{config.getoption('--keep')}-{_machine_name()}.json"


def _machine_name() -> str:
    cpu = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*", " ", cpu_model().lower())
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu).strip("-")
    return f"torch{torch.__version__.partition('+')[0]}-{cpu}"


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Replaces pytest-benchmark's own, which names the host."""
    return machine_info(threads=torch.get_num_threads())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Leaves the commit: the rest is made of folder names."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]
    # New results of the suites before this one are no change to what is measured.
    command = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results"]
    status = subprocess.run(command, capture_output=True, text=True, cwd=_RESULTS.parent)
    if status.returncode == 0:
        commit_info["dirty"] = bool(status.stdout)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_MEASURED]:
        terminalreporter.write_sep("=", "benchmarks")
        terminalreporter.write_line(render(config.stash[_MEASURED]))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """measure(case, one_round, rounds, ratios): calls `one_round() -> {name: seconds}` over and over.

    The JSON keeps all that it returns as extra_info["samples"]. With --check-bars a missed bar is a failure.
    """

    def run(
        case: str,
        one_round: Callable[[], dict[str, float]],
        rounds: int,
        ratios: Sequence[Ratio] = (),
        **info: Any,
    ) -> None:
        rounds = request.config.getoption("--rounds") or rounds
        samples: dict[str, list[float]] = {name: [] for name in one_round()}  # this first round warms up

        def one_kept_round() -> None:
            for name, seconds in one_round().items():
                samples[name].append(round(seconds, 7))

        # The statistics that pytest-benchmark keeps are of whole rounds; the samples say what took how long.
        benchmark.pedantic(one_kept_round, rounds=rounds)
        benchmark.extra_info.update(
            suite=request.node.path.stem.removeprefix("test_"),
            case=case,
            samples=samples,
            ratios=[dataclasses.asdict(ratio) for ratio in ratios],
            **info,
        )
        request.config.stash[_MEASURED].append(benchmark.extra_info)
        if request.config.getoption("--check-bars"):
            for ratio in ratios:
                value = ratio_of(samples, ratio).median
                assert ratio.met(value), f"{case}: {ratio.top} / {ratio.bottom} = {value:.3f}, bar {ratio.bar()}"

    return run
