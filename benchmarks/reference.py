"""Networks pretrained on the reference data, and generators meta-trained for them: made once, kept beside the results.

python -m benchmarks.reference resnet18
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from stamp_fast.demo import glyphs
from stamp_fast.stamp import MaskGenerator, meta_train

from . import data
from .networks import cifar_resnet18, cifar_vgg

__all__ = ["NETWORKS", "generator_for", "pretrain", "pretrained_for"]

_CACHE = Path(__file__).parent / ".cache"
# As wide as two cores can afford; vgg48 is for speed, which takes tensors that fill the machine.
NETWORKS = {
    "resnet18": lambda classes: cifar_resnet18((24, 48, 96, 192), classes=classes),
    "vgg": lambda classes: cifar_vgg(24, classes=classes),
    "vgg48": lambda classes: cifar_vgg(48, classes=classes),
}
_STEPS = {"resnet18": 3000, "vgg": 3000, "vgg48": 1500}
_TASKS = {"resnet18": 80, "vgg": 200, "vgg48": 80}  # of meta-training


def pretrain(network: str, batch: int = 128, lr: float = 0.2) -> Path:
    """Trains the network on rendered glyphs, in poses drawn anew for every batch; the file with its weights."""
    path = _CACHE / f"{network}.safetensors"
    if path.exists():
        return path
    steps = _STEPS[network]
    torch.manual_seed(0)
    model = NETWORKS[network](data.CLASSES).to(memory_format=torch.channels_last)
    rendered = glyphs.render_all(glyphs.choose_classes(data.CLASSES), glyphs.TRAIN_FONTS)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    progress = trange(steps, desc=f"pretrain {network}")
    for step in progress:
        labels = torch.randint(len(rendered), (batch,), generator=generator)
        fonts = torch.randint(rendered.shape[1], (batch,), generator=generator)
        images = glyphs.augment(rendered[labels, fonts].unsqueeze(1).float() / 255, generator)
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss:.2f}")
    _CACHE.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def pretrained_for(network: str, classes: int, seed: int) -> nn.Module:
    """The pretrained network with a fresh, seeded head, in channels_last."""
    model = NETWORKS[network](classes)
    weights = {k: v for k, v in load_file(pretrain(network)).items() if not k.startswith("fc.")}
    model.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.fc.weight, std=0.01, generator=generator)
    nn.init.zeros_(model.fc.bias)
    return model.to(memory_format=torch.channels_last)


def generator_for(network: str, mode: str, tasks: int | None = None, **schedule: object) -> MaskGenerator:
    """Meta-trained on the reference data, in bfloat16, otherwise with the default schedule."""
    tasks = _TASKS[network] if tasks is None else tasks
    name = "-".join([network, mode, str(tasks), *(f"{k}={v}" for k, v in sorted(schedule.items()))])
    path = _CACHE / f"{name}.safetensors"
    if path.exists():
        return MaskGenerator.load(path)
    model = NETWORKS[network](data.CLASSES)
    model.load_state_dict(load_file(pretrain(network)))
    generator = meta_train(
        model.to(memory_format=torch.channels_last),
        data.reference(),
        mode=mode,
        tasks=tasks,
        autocast=True,
        checkpoint_every=10,
        checkpoint=path.with_suffix(".checkpoint"),
        **schedule,
    )
    generator.save(path)
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    return generator


@click.command()
@click.argument("network", type=click.Choice(list(NETWORKS)))
@click.option("--tasks", type=int, help="Of meta-training; default: as many as the experiments take.")
@click.option("--threads", default=2, show_default=True)
def main(network: str, tasks: int | None, threads: int) -> None:
    """Pretrain a network and meta-train its generators."""
    torch.set_num_threads(threads)
    pretrain(network)
    for mode in ("joint", "structure"):
        generator_for(network, mode, tasks)


if __name__ == "__main__":
    main()
