"""prune() of whole detectors: lists of images, and a loss in training mode only."""

import pytest
import torch
from reference.state import Frozen
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import stamp_fast
from stamp_fast import Budget, LoaderError


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def small_detector() -> FasterRCNN:
    layers = [nn.Conv2d(3, 24, 3, 4, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, 4, 1), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 32
    return FasterRCNN(
        backbone,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((32,),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(32 * 9, 40),
        box_predictor=FastRCNNPredictor(40, 4),
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        box_batch_size_per_image=16,
        box_score_thresh=0.0,
    )


def batches(count: int = 2, images: int = 3) -> list[tuple]:
    """What the usual collate function of detection, tuple(zip(*examples)), gives."""
    boxes = torch.tensor([[5.0, 5.0, 50.0, 60.0], [20.0, 10.0, 60.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    return [(tuple(torch.rand(3, 64 + 8 * i, 80) for i in range(images)), (target,) * images) for _ in range(count)]


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    images, targets = batch
    return sum(model(list(images), list(targets)).values())


@pytest.mark.parametrize("method", ["magnitude", "taylor", "stamp"])
def test_small_detector(method):
    torch.manual_seed(0)
    model = small_detector().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss(model, batches()[0]).backward()
    optimizer.step()
    heads = [p.shape for p in (*model.rpn.head.bbox_pred.parameters(), *model.roi_heads.box_predictor.parameters())]
    old_mean = model.backbone[1].running_mean.clone()
    stamp_fast.prune(model, batches(), method=method, steps=3, loss_fn=loss, optimizer=optimizer, progress=False)
    report = stamp_fast.report(model)
    assert 0.49 <= report.macs_after / report.macs_before <= 0.51
    assert model.backbone[3].out_channels < 32 and model.training
    assert model.roi_heads.box_head.fc7.out_features < 40
    # Outputs stay: the first dims of the heads.
    predictor = model.roi_heads.box_predictor
    left = [p.shape for p in (*model.rpn.head.bbox_pred.parameters(), *predictor.parameters())]
    assert [s[0] for s in heads] == [s[0] for s in left]
    assert model.backbone[1].running_mean.shape != old_mean.shape and model.backbone[1].num_batches_tracked == 1
    assert report.train_step_ms_after > 0 and report.peak_memory_after < report.peak_memory_before
    assert report.forward_ms_before > 0 and report.forward_ms_after > 0
    assert sum(report.layer_ms_after.values()) == pytest.approx(report.train_step_ms_after)
    assert {"backbone.0", "rpn.head.cls_logits", "roi_heads.box_head.fc6"} <= set(report.layer_ms_after)
    optimizer.zero_grad()
    loss(model, batches()[0]).backward()
    optimizer.step()
    found = model.eval()(list(batches()[0][0]))
    assert len(found) == 3 and set(found[0]) == {"boxes", "labels", "scores"}


def test_statistics_of_a_detector_are_those_of_the_data():
    """Recalibrated although there is no loss in eval mode."""
    model = small_detector()
    data = batches()
    stamp_fast.prune(model, data, method="magnitude", keep=["backbone.0"], loss_fn=loss, progress=False)
    found = model.backbone[1].running_mean.clone()
    seen = []
    handle = model.backbone[1].register_forward_hook(lambda module, args, out: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in data:
            loss(model.train(), batch)
    handle.remove()
    assert torch.allclose(found, torch.stack(seen).mean(0), atol=1e-5)


def test_a_loss_that_fails_in_both_modes_says_why_it_failed_first():
    model = small_detector().train()
    before = Frozen(model)
    with pytest.raises(LoaderError, match="loader: the model or loss_fn cannot take its batches"):
        stamp_fast.prune(model, batches(), method="magnitude", loss_fn=lambda m, b: m(b), progress=False)
    before.assert_same(rng=False)


def test_example_as_a_list_of_images():
    model = small_detector()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    stamp_fast.prune(
        model,
        [{"images": images, "targets": list(batches(images=2)[0][1])}],
        method="magnitude",
        example=(images,),
        loss_fn=lambda m, b: sum(m(b["images"], b["targets"]).values()),
        budget=Budget(channels=0.5),
        progress=False,
    )
    assert model.backbone[3].out_channels < 32


@pytest.mark.parametrize("method", ["taylor", "stamp"])
def test_what_scoring_leaves_in_attributes_does_not_count(method):
    """Poolers of detectors find out their scales in their first forward, and keep them."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.more, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
            self.scale = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.more(torch.relu(self.body(x))))
            if self.scale is None:
                self.scale = float(x.shape[-1])
                x = x * torch.log2(x.new_ones(()) * 2)
            return self.head(x.mean((2, 3)))

    model = Remembers()
    data = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(2)]
    stamp_fast.prune(model, data, method=method, steps=2, budget=Budget(channels=0.5), progress=False)
    assert 0 < model.body.out_channels < 16 and 0 < model.more.out_channels < 16
    assert model.body.out_channels + model.more.out_channels == 16


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_fasterrcnn_mobilenet(method):
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=128
    )
    stamp_fast.prune(model, batches(images=2), method=method, loss_fn=loss, progress=False)
    report = stamp_fast.report(model)
    assert 0.49 <= report.macs_after / report.macs_before <= 0.51
    kept = {group.name: group.reason for group in report.groups if group.verdict == "kept"}
    kept = {name: reason for name, reason in kept.items() if "rank above the cut" not in reason}
    assert all(name.startswith(("rpn.head", "roi_heads.box_predictor")) for name in kept), kept
    assert all("torchvision/models/detection" in reason for reason in kept.values())
