"""Everything that a GPU has to show, in one command and under eight minutes: builds, tests, times.

    python -m benchmarks.gpu_suite                    # results/gpu/<name>.json and .md
    python -m benchmarks.gpu_suite --device cpu --quick --no-build --no-tests    # does the suite itself run?

First come the machine's own ceilings; every kernel is then shown as a fraction of the one that bounds it. A row that
fails is printed with its error, and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional as F

from stamp_fast import Budget, config, importance, trace
from stamp_fast.nn import MaskedConvBNReLU2d
from stamp_fast.ops import channel_saliency, depthwise_conv2d, masked_conv2d, pack_weights

from .machine import machine_info
from .networks import cifar_resnet18
from .table import markdown_table

_RESULTS = Path(__file__).parent / "results" / "gpu"
_ROOT = Path(__file__).parents[1]
_TESTS = ["tests/test_ops", "tests/test_nn", "tests/test_packaging.py"]
# ResNet-50's convolutions at 224 pixels: channels, filters, kernel, stride, height and width of the input.
_SHAPES = [
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (128, 128, 3, 1, 28),
    (128, 128, 3, 2, 56),
    (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14),
    (256, 1024, 1, 1, 14),
    (512, 512, 3, 1, 7),
    (2048, 512, 1, 1, 7),
]


class Suite:
    """Rows as they come; `step` contains what goes wrong in it."""

    def __init__(self, device: str, quick: bool, minutes: float) -> None:
        self.device, self.quick = device, quick
        self.batch = 2 if quick else 128
        self.shapes = [(c // 8, o // 8, k, s, 8) for c, o, k, s, _ in _SHAPES[:3]] if quick else _SHAPES
        self.rounds = 3 if quick else 20
        self.compiler = "eager" if quick else "inductor"
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def step(self, name: str, function: Callable[[], None]) -> None:
        if time.monotonic() > self.end:
            self.failed.append(f"{name}: out of time")
            return
        try:
            function()
        except Exception as error:  # one kernel that fails must not take the other figures along
            self.failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        click.echo(f"{name}: {self.failed[-1] if self.failed and self.failed[-1].startswith(name) else 'done'}")

    def add(self, suite: str, case: str, milliseconds: dict[str, float], **more: Any) -> None:
        self.rows.append({"suite": suite, "case": case, "ms": milliseconds, **more})

    def in_turns(self, contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each; they take turns, so that a slow moment meets all alike."""
        for run in contestants.values():
            for _ in range(1 if self.quick else 3):  # compiles, tunes, warms up
                run()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self.rounds):
            for name, run in contestants.items():
                times[name].append(self.milliseconds(run))
        return {name: statistics.median(taken) for name, taken in times.items()}

    def milliseconds(self, run: Callable[[], Any]) -> float:
        if self.device != "cuda":
            begin = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


# --- what the machine can do ------------------------------------------------------------------------------------------
def ceilings(suite: Suite) -> dict[str, float]:
    """Bytes a second of a copy, FLOP a second of a bfloat16 product."""
    size = 1 << (20 if suite.quick else 29)
    source = torch.empty(size, dtype=torch.bfloat16, device=suite.device).normal_()
    target = torch.empty_like(source)
    n = 256 if suite.quick else 8192
    a, b = torch.randn(2, n, n, device=suite.device, dtype=torch.bfloat16).unbind()
    taken = suite.in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        "copy_bytes_per_s": 2 * source.nbytes / taken["copy"] * 1e3,
        "bf16_flop_per_s": 2 * n**3 / taken["product"] * 1e3,
    }


# --- kernels ----------------------------------------------------------------------------------------------------------
def _leaf(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=form).requires_grad_()


def _both_ways(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    grad = torch.randn_like(function())

    def run() -> None:
        torch.autograd.grad(function(), leaves, grad)

    return run


def packing(suite: Suite) -> None:
    """Half of rows and columns of large weights, against a copy of as many bytes."""
    n = 64 if suite.quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        weights = [_leaf(n, n, 3, 3, device=suite.device, dtype=dtype) for _ in range(4)]
        index = torch.arange(0, n, 2, device=suite.device)
        scale = torch.rand(n // 2, device=suite.device, dtype=dtype)

        def forward(weights=weights, index=index, scale=scale) -> list[torch.Tensor]:
            return pack_weights(weights, [index] * 4, [index] * 4, [scale] * 4)

        packed = [torch.empty_like(p) for p in forward()]
        others = [torch.empty_like(p) for p in packed]

        def copies(packed=packed, others=others) -> None:
            for one, other in zip(packed, others, strict=True):
                one.copy_(other)

        with torch.no_grad():
            taken = suite.in_turns({"pack": forward, "copy of as much": copies})
        moved = 2 * sum(p.nbytes for p in packed)
        suite.add("pack_weights", str(dtype), taken, bound="copy", work=moved, of="pack")


def convolutions(suite: Suite) -> None:
    """Forward and backward, half of the channels: the masked operator, cuDNN on compact shapes, cuDNN dense."""
    for c, o, k, s, size in suite.shapes:
        device = suite.device
        moves = {"stride": s, "padding": k // 2}
        x, w = _leaf(suite.batch, c, size, size, device=device), _leaf(o, c, k, k, device=device)
        small_x = _leaf(suite.batch, c // 2, size, size, device=device)
        small_w = _leaf(o // 2, c // 2, k, k, device=device)
        mask = {"rows": torch.arange(0, o, 2, device=device), "cols": torch.arange(1, c, 2, device=device)}
        contestants = {
            "dense": _both_ways(lambda x=x, w=w, m=moves: F.conv2d(x, w, **m), [x, w]),
            "by hand": _both_ways(lambda x=small_x, w=small_w, m=moves: F.conv2d(x, w, **m), [small_x, small_w]),
        }
        for backend in ("triton", "cuda") if device == "cuda" else ("cpu",):
            contestants[f"masked, {backend}"] = _both_ways(
                lambda x=small_x, w=w, m=moves | mask, b=backend: masked_conv2d(x, w, **m, backend=b), [small_x, w]
            )
        positions = suite.batch * ((size + s - 1) // s) ** 2
        work = 3 * 2 * positions * (c // 2) * (o // 2) * k * k
        name = f"{c} -> {o}, {k} x {k}, stride {s}, {size} px"
        first = list(contestants)[2]
        suite.add("masked_conv2d", name, suite.in_turns(contestants), bound="product", work=work, of=first)


def depthwise(suite: Suite) -> None:
    """MobileNetV2's shapes, forward and backward, against PyTorch's."""
    for channels, size, stride in [(16, 8, 1)] if suite.quick else [(96, 112, 2), (144, 56, 1), (384, 14, 1)]:
        x = _leaf(suite.batch, channels, size, size, device=suite.device)
        w = _leaf(channels, 1, 3, 3, device=suite.device)
        moves = {"stride": stride, "padding": 1}
        contestants = {
            "PyTorch": _both_ways(lambda x=x, w=w, m=moves: F.conv2d(x, w, groups=x.shape[1], **m), [x, w]),
            "stamp_fast": _both_ways(lambda x=x, w=w, m=moves: depthwise_conv2d(x, w, **m), [x, w]),
        }
        # Read: input twice, gradient twice; written: output and the input's gradient.
        work = 3 * x.nbytes + 3 * x.nbytes // stride**2
        name = f"{channels}, 3 x 3, stride {stride}, {size} px"
        taken = suite.in_turns(contestants)
        suite.add("depthwise_conv2d", name, taken, bound="copy", work=work, of="stamp_fast")


def saliency(suite: Suite) -> None:
    """One pass over activation and gradient, against plain PyTorch's several."""
    for channels, size in [(16, 8)] if suite.quick else [(256, 56), (512, 28), (2048, 7)]:
        shape = (suite.batch, channels, size, size)
        a, g = (_leaf(*shape, device=suite.device).detach().relu_() for _ in range(2))
        contestants = {
            "PyTorch": lambda a=a, g=g: channel_saliency(a, g, backend="reference"),
            "stamp_fast": lambda a=a, g=g: channel_saliency(a, g),
        }
        name = f"{channels}, {size} px"
        taken = suite.in_turns(contestants)
        suite.add("channel_saliency", name, taken, bound="copy", work=2 * a.nbytes, of="stamp_fast")


def blocks(suite: Suite) -> None:
    """Convolution, batch norm, ReLU on compact shapes: fused, against torch.compile and eager."""
    for c, o, k, s, size in suite.shapes:
        device = suite.device
        x = _leaf(suite.batch, c // 2, size, size, device=device)
        conv = nn.Conv2d(c // 2, o // 2, k, s, k // 2, bias=False)
        eager = nn.Sequential(conv, nn.BatchNorm2d(o // 2), nn.ReLU())
        eager = eager.to(device, memory_format=torch.channels_last)
        fused = MaskedConvBNReLU2d(*copy.deepcopy(eager))
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=suite.compiler)

        def step(block: nn.Module, backend: str = "auto", x: torch.Tensor = x) -> Callable[[], None]:
            leaves = [x, *block.parameters()]

            def forward() -> torch.Tensor:
                with config.use_backend(backend), torch.autocast(x.device.type, torch.bfloat16):
                    return block(x)

            return _both_ways(forward, leaves)

        backend = "triton" if device == "cuda" else "cpu"
        contestants = {"eager": step(eager), "compiled": step(compiled), "fused": step(fused, backend)}
        name = f"{c // 2} -> {o // 2}, {k} x {k}, stride {s}, {size} px"
        suite.add("conv + norm + ReLU", name, suite.in_turns(contestants))


# --- networks ---------------------------------------------------------------------------------------------------------
def _network(suite: Suite) -> tuple[nn.Module, torch.Tensor]:
    if suite.quick:
        return cifar_resnet18((16, 16, 32, 32)), torch.randn(suite.batch, 3, 32, 32)
    from torchvision.models import resnet50

    return resnet50(), torch.randn(suite.batch, 3, 224, 224)


def networks(suite: Suite) -> None:
    """A training step of ResNet-50 with half of its channels, in bfloat16 and channels_last."""
    torch.manual_seed(0)
    dense, images = _network(suite)
    labels = torch.randint(10, (suite.batch,), device=suite.device)
    images = images.to(suite.device).contiguous(memory_format=torch.channels_last)
    dense = dense.to(suite.device, memory_format=torch.channels_last).train()
    virtual, small = copy.deepcopy(dense), copy.deepcopy(dense)
    graph = trace(virtual, images[:2])
    graph.settle()
    keep = graph.select(importance.magnitude(graph), Budget(channels=0.5), ranking="local", round_to=8)
    cut = trace(small, images[:2])
    cut.settle()
    cut.compact(keep)
    plan = graph.plan(keep)
    compiled = torch.compile(copy.deepcopy(small), backend=suite.compiler)

    def step(model: nn.Module, around: Callable[[], Any] = contextlib.nullcontext) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with around():
                with torch.autocast(suite.device, torch.bfloat16):
                    loss = F.cross_entropy(model(images).float(), labels)
                loss.backward()
            optimizer.step()

        return run

    @contextlib.contextmanager
    def on_triton() -> Iterator[None]:
        with config.use_backend("triton"), graph.masked(plan):
            yield

    contestants = {
        "dense": step(dense),
        "virtual": step(virtual, lambda: graph.masked(plan)),
        "compacted": step(small),
        "compacted, compiled": step(compiled),
    }
    if suite.device == "cuda":
        contestants["virtual, Triton"] = step(virtual, on_triton)
    case = f"{type(dense).__name__}, batch {suite.batch}, {graph.macs(keep) / graph.macs():.2f} of the MACs"
    suite.add("train step", case, suite.in_turns(contestants))


# --- the report -------------------------------------------------------------------------------------------------------
def render(found: dict[str, Any]) -> str:
    """The Markdown page."""
    limits = found["ceilings"]
    parts = [
        f"# {found['machine'].get('gpu') or found['machine']['cpu']}",
        f"torch {found['machine']['torch']}, {found['date']}. A copy moves {limits['copy_bytes_per_s'] / 1e9:,.0f} "
        f"GB/s; a bfloat16 product does {limits['bf16_flop_per_s'] / 1e12:,.1f} TFLOP/s. Medians, in turns, in "
        "milliseconds.",
        f"Tests: {found['tests']}",
    ]
    for name in dict.fromkeys(row["suite"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["suite"] == name]
        header = list(dict.fromkeys(contestant for row in rows for contestant in row["ms"]))
        lines = []
        for row in rows:
            share = ""
            if "bound" in row:
                limit = limits["copy_bytes_per_s" if row["bound"] == "copy" else "bf16_flop_per_s"]
                share = f"{row['work'] / (row['ms'][row['of']] / 1e3) / limit:.0%}"
            figures = [f"{row['ms'][c]:.3f}" if c in row["ms"] else "" for c in header]
            lines.append([row["case"], *figures, share])
        share = ["of the ceiling"] if any(line[-1] for line in lines) else []
        parts += [
            f"## {name}",
            markdown_table(["", *header, *share], [line[: len(header) + 1 + len(share)] for line in lines]),
        ]
    if found["failed"]:
        parts += ["## Failed", "\n".join(f"- {line}" for line in found["failed"])]
    return "\n\n".join(parts) + "\n"


def _run(command: list[str], **environment: str) -> str:
    """The last line that it prints; its failure is the suite's to tell."""
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | environment, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return f"{'ok' if done.returncode == 0 else f'FAILED, {done.returncode}'}: {' '.join(last)}"


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Tiny shapes: shows that the suite runs, not what it would find.")
@click.option("--build/--no-build", default=True)
@click.option("--tests/--no-tests", default=True)
@click.option("--minutes", default=7.0, show_default=True, help="No figure is begun after that.")
@click.option("--output", type=click.Path(path_type=Path), default=_RESULTS, help="A folder.")
def main(device: str, quick: bool, build: bool, tests: bool, minutes: float, output: Path) -> None:
    """Build, test, time, and write one JSON file and one Markdown page."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no GPU here; --device cpu --quick shows that the suite itself runs")
    suite = Suite(device, quick, minutes)
    machine = machine_info(torch.get_num_threads())
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    found: dict[str, Any] = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "tests": "not run"}
    if build:
        click.echo(f"build: {_run([sys.executable, 'setup.py', 'build_ext'], STAMP_CUDA='1')}")
        # What this process has loaded is the old library.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_suite", *sys.argv[1:], "--no-build"])
    if tests:
        found["tests"] = _run([sys.executable, "-m", "pytest", "-q", "-x", *_TESTS])
        click.echo(f"tests: {found['tests']}")
    found["ceilings"] = ceilings(suite)
    for step in (packing, saliency, convolutions, depthwise, blocks, networks):
        suite.step(step.__name__, lambda step=step: step(suite))
    found |= {"rows": suite.rows, "failed": suite.failed}
    name = re.sub(r"[^a-z0-9]+", "-", (machine.get("gpu") or machine["cpu"]).lower()).strip("-")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / f"{name}.md").write_text(render(found))
    click.echo(render(found))


if __name__ == "__main__":
    main()
