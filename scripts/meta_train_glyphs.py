"""Makes stamp_fast/demo/glyph_generator.safetensors: the mask generator of the demo's network.

    python scripts/meta_train_glyphs.py            # about half an hour on one core
    python scripts/meta_train_glyphs.py --tasks 40 --output /tmp/generator.safetensors

Meta-learned over class subsets of the glyphs that the network was pretrained on, in poses drawn once. An interrupted
run goes on from its checkpoint, which lies beside the output.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch.utils.data import TensorDataset

from stamp_fast.demo import glyphs
from stamp_fast.demo.network import GENERATOR, pretrained
from stamp_fast.stamp import meta_train


@click.command()
@click.option("--tasks", default=400, show_default=True)
@click.option("--mode", default="joint", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--output", default=GENERATOR, type=click.Path(path_type=Path))
def main(tasks: int, mode: str, threads: int, output: Path) -> None:
    """Meta-train and save."""
    torch.set_num_threads(threads)
    model, metadata = pretrained()
    generator = meta_train(
        model.to(memory_format=torch.channels_last),
        TensorDataset(*glyphs.posed(metadata["classes"], copies=3)),
        tasks=tasks,
        mode=mode,
        autocast=True,
        checkpoint=output.with_suffix(".checkpoint"),
        checkpoint_every=5,
    )
    generator.save(output)
    output.with_suffix(".checkpoint").unlink()


if __name__ == "__main__":
    main()
