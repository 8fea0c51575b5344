"""The command line: `stamp-fast` or `python -m stamp_fast`. One file per command; what they share is in two others."""

from __future__ import annotations

import click

from stamp_fast import __version__

from . import bench, demo, inspect, prune

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Structural (channel) pruning for PyTorch.

    \b
    stamp-fast inspect torchvision:resnet18
    stamp-fast prune torchvision:resnet18 pets/ --weights DEFAULT --budget macs=0.35
    stamp-fast bench mymodel:make pets/ --budget macs=0.35 --epochs 5 --seeds 3

    \b
    Exit codes:
      0  done
      1  refused or failed; the reason is on stderr (--debug shows the traceback)
      2  wrong usage: an unknown option or name, a file that is not there
    """


for command in (inspect.inspect, prune.prune, bench.bench, demo.demo):
    main.add_command(command)
