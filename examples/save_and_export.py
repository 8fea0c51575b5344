"""What becomes of a pruned network afterwards: save, load, torch.export, ONNX.

    python examples/save_and_export.py
    python examples/save_and_export.py --out /tmp/pruned --onnx

ONNX needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from digits import Net, accuracy, loaders, parameters, train

import stamp_fast


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("pruned"), show_default=True, help="A folder.")
@click.option("--onnx", is_flag=True, help="ONNX too.")
@click.option("--epochs", default=1, show_default=True, help="Before the cut, and after it.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, onnx: bool, epochs: int, seed: int) -> None:
    """Prunes a network for the digits, and writes it in every form."""
    torch.manual_seed(seed)
    batches, test = loaders()
    model = train(Net(), batches, epochs)
    before = parameters(model)
    budget = stamp_fast.Budget(params=0.3)
    stamp_fast.prune(model, batches, budget=budget, method="taylor", seed=seed)
    train(model, batches, epochs).eval()
    print(f"parameters: {before} -> {parameters(model)}")
    print(f"accuracy: {accuracy(model, test):.3f}")

    out.mkdir(parents=True, exist_ok=True)
    images = next(iter(test))[0]
    with torch.no_grad():
        expected = model(images)

    def check(name: str, found: torch.Tensor, path: Path) -> None:
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        print(f"{name}: {path.stat().st_size} bytes, differs by {error:.1e}")

    # The file holds weights and which channels they are; `Net` makes the dense network that they are put into.
    path = out / "pruned.safetensors"
    stamp_fast.save(model, path)
    loaded = stamp_fast.load(Net, path)
    with torch.no_grad():
        check("loaded", loaded(images), path)

    # The same channels of another checkpoint: the plan alone, with no weights.
    other = stamp_fast.apply_plan(Net(), stamp_fast.load_plan(path))
    print(f"plan applied to another network: {parameters(other)} parameters")

    batch = {0: torch.export.Dim("batch", min=2, max=1024)}
    path = out / "pruned.pt2"
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=(batch,)), path)
    with torch.no_grad():
        check("exported", torch.export.load(path).module()(images), path)

    if onnx:
        import onnxruntime

        path = out / "pruned.onnx"
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=(batch,), external_data=False)
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        check("ONNX", torch.from_numpy(found), path)


if __name__ == "__main__":
    main()
