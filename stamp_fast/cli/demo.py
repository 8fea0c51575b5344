"""`stamp-fast demo`."""

from __future__ import annotations

from pathlib import Path

import click

from stamp_fast.errors import StampFastError
from stamp_fast.methods import METHODS

from .options import NEW_FILE


@click.command(short_help="Try it on handwritten digits that are shipped.")
@click.option("--method", type=click.Choice(list(METHODS)), default="stamp", show_default=True)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.35,
    show_default=True,
    help="MACs of the pruned network as a fraction of the whole one.",
)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Epochs in each arm.")
@click.option("--batch-size", type=click.IntRange(2, 1024), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps inside prune.")
@click.option("--train-images", type=click.IntRange(1), help="Use only the first so many training images.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--output",
    type=NEW_FILE,
    default="stamp_fast_demo.png",
    show_default=True,
    help="Where the figure goes.",
)
@click.option("--progress/--no-progress", default=True, help="Show progress bars.")
def demo(
    method: str,
    budget: float,
    epochs: int,
    batch_size: int,
    steps: int,
    train_images: int | None,
    seed: int,
    output: Path,
    progress: bool,
) -> None:
    """Prune a small pretrained network for handwritten digits, beside the same network fine-tuned whole."""
    if train_images is not None and train_images < batch_size:
        raise click.UsageError(f"--train-images {train_images} is less than one batch of {batch_size}")
    try:
        from stamp_fast.demo import run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the demo needs {error.name}: pip install 'stamp_fast[demo]'") from error
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)  # what cannot be is said before the run
        run.run(
            method,
            budget=budget,
            epochs=epochs,
            batch_size=batch_size,
            steps=steps,
            train_images=train_images,
            seed=seed,
            output=output,
            progress=progress,
        )
    except (StampFastError, OSError) as error:
        raise click.ClickException(str(error)) from error
