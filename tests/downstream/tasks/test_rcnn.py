from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.models.detection import MaskRCNN

from downstream.grouping import pad_features
from downstream.tasks.rcnn import COARSEST, Detector
from pretrain.codec.backbone import HEAD_STRIDE, Backbone

SIZES = [(64, 64), (70, 130), (16, 37)]  # height, width
BOX = torch.tensor([[2.0, 3.0, 14.0, 15.0]])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18").eval()


def detector(backbone: Backbone, masks: bool) -> Detector:
    torch.manual_seed(0)
    return Detector(
        backbone, 3, channels=16, hidden=32, anchors=[8, 16, 32, 64, 128], proposals=20, rois=16, masks=masks
    )


def features(backbone: Backbone, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(backbone.channels, -(-height // 4), -(-width // 4)) for height, width in sizes]


def targets(sizes: list[tuple[int, int]], empty: bool = False) -> list[dict[str, torch.Tensor]]:
    boxes = BOX[:0] if empty else BOX
    return [
        {
            "boxes": boxes,
            "labels": torch.tensor([2] * len(boxes), dtype=torch.int64),
            "masks": torch.ones(len(boxes), *size).byte(),
        }
        for size in sizes
    ]


def test_pad_features__to_whole_cells_of_the_coarsest_level_with_nothing_moved(backbone: Backbone):
    maps = features(backbone, SIZES)
    padded = pad_features(maps, COARSEST // HEAD_STRIDE)
    assert padded.shape == (3, backbone.channels, 32, 48)
    assert all(side * 4 % COARSEST == 0 for side in padded.shape[-2:])
    for one, batch in zip(maps, padded, strict=True):
        height, width = one.shape[-2:]
        assert torch.equal(batch[:, :height, :width], one)
        assert batch.abs().sum() == pytest.approx(float(one.abs().sum()), rel=1e-4)


@pytest.mark.parametrize("masks", [False, True])
def test_detector__finds_inside_images_of_unequal_sizes(backbone: Backbone, masks: bool):
    model = detector(backbone, masks).eval()
    with torch.no_grad():
        found = model(features(backbone, SIZES), SIZES)
    for one, (height, width) in zip(found, SIZES, strict=True):
        assert len(one["boxes"]) > 0
        assert bool((one["boxes"] >= 0).all()) and bool((one["boxes"] <= torch.tensor([width, height] * 2)).all())
        assert set(one["labels"].tolist()) <= {0, 1, 2}
        if masks:
            assert one["masks"].shape == (len(one["boxes"]), height, width) and one["masks"].dtype == torch.bool


def test_detector__is_torchvisions_mask_rcnn_but_for_the_way_to_features(backbone: Backbone):
    """The same weights in torchvision's own model, whose transform is told to leave images as they are."""
    model, size = detector(backbone, True).eval(), (128, 192)

    class Given(torch.nn.Module):
        out_channels = 16

        def forward(self, images: torch.Tensor) -> OrderedDict:
            return model.pyramid(pad_features(f3, COARSEST // HEAD_STRIDE))

    whole = MaskRCNN(Given(), 4, min_size=128, max_size=192, image_mean=[0, 0, 0], image_std=[1, 1, 1]).eval()
    whole.rpn, whole.roi_heads = model.rpn, model.roi_heads
    f3 = features(backbone, [size])
    with torch.no_grad():
        (theirs,), (ours,) = whole([torch.zeros(3, *size)]), model(f3, [size])
    assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-4) and len(ours["boxes"])
    assert torch.equal(ours["labels"] + 1, theirs["labels"])
    assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-6)
    assert torch.equal(ours["masks"], theirs["masks"][:, 0] > 0.5)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_detector__losses_are_finite_with_and_without_objects(backbone: Backbone, masks: bool, empty: bool):
    model = detector(backbone, masks).train()
    losses = model(features(backbone, SIZES), SIZES, targets(SIZES, empty))
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"} | (
        {"loss_mask"} if masks else set()
    )
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_detector__batch_norms_keep_their_statistics_in_training(backbone: Backbone):
    model = detector(backbone, False).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(features(backbone, SIZES), SIZES, targets(SIZES))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.roi_heads.training and not model.pyramid.norms[0].training


def test_detector__the_codecs_backbone_stays_as_it_is(backbone: Backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = detector(backbone, False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(features(backbone, SIZES), SIZES, targets(SIZES)).values()).backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
