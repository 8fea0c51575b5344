"""A pruned network is an ordinary module: it exports, compiles and runs elsewhere like one made by hand."""

from collections.abc import Callable

import onnxruntime
import pytest
import torch
from reference.randomise import random_keep, randomise, relative_error
from torch import Tensor, nn
from torchvision import models

import stamp_fast


class Branches(nn.Module):
    """Concatenation, grouped and depthwise convolutions, a residual sum and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.right = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = x + torch.relu(self.depthwise(self.grouped(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def vision_transformer() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64, num_classes=10
    )


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "resnet18": lambda: models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=10),
    "densenet": densenet,
    "vision_transformer": vision_transformer,
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = {0: torch.export.Dim("batch", min=2, max=64)}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "mobilenet_v2" else ()) for name in NETWORKS],
)
def network(request, tmp_path_factory) -> nn.Module:
    """Pruned, saved and loaded, in eval mode."""
    make = NETWORKS[request.param]
    model = randomise(make()).eval()
    dense = sum(p.numel() for p in model.parameters())
    graph = stamp_fast.trace(model, IMAGES)
    graph.settle()
    graph.compact(random_keep(graph))
    assert sum(p.numel() for p in model.parameters()) < 0.9 * dense
    path = tmp_path_factory.mktemp("export") / "model"
    stamp_fast.save(model, path)
    return stamp_fast.load(make, path)


def assert_same_outputs(run: Callable[[Tensor], Tensor], network: nn.Module, batches: tuple[int, ...] = (3, 2)) -> None:
    for batch in batches:
        with torch.no_grad():
            expected = network(IMAGES[:batch])
            assert relative_error(torch.as_tensor(run(IMAGES[:batch])), expected) < 1e-4


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(network, strict):
    exported = torch.export.export(network, (IMAGES,), dynamic_shapes=(BATCH,), strict=strict)
    assert_same_outputs(exported.module(), network)


def compiled_step(network: nn.Module, backend: str) -> None:
    """Forward in eval mode, forward and backward in train mode, each in one graph."""
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    assert_same_outputs(compiled, network, (3,))
    network.train()
    try:
        gradients = []
        for run in (network, compiled):
            torch.manual_seed(0)
            before = {name: buffer.clone() for name, buffer in network.named_buffers()}
            run(IMAGES).square().mean().backward()
            gradients.append([p.grad for p in network.parameters()])
            network.zero_grad()
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])
    finally:
        network.eval()
    largest = max(g.abs().max() for g in gradients[0])
    for expected, actual in zip(*gradients, strict=True):
        assert (actual - expected).abs().max() < 1e-3 * largest


def test_compiles_in_one_graph(network):
    compiled_step(network, "eager")


@pytest.mark.slow
def test_compiles_with_inductor(network):
    compiled_step(network, "inductor")


def test_onnx(network, tmp_path):
    program = torch.onnx.export(network, (IMAGES,), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert_same_outputs(lambda x: session.run(None, {name: x.numpy()})[0], network)
