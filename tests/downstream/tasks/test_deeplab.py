from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torchvision.models.segmentation import deeplabv3_resnet50

from downstream.errors import TaskError
from downstream.tasks.deeplab import DeepLab, load_deeplab
from pretrain.codec.backbone import Backbone


def test_load_deeplab__is_torchvisions_deeplabv3(tmp_path: Path):
    """The same weights give the same logits, and F is what its layer1 gives."""
    torch.manual_seed(0)
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load_deeplab(tmp_path / "theirs.pth", "resnet50", 5).eval()
    images = torch.randn(1, 3, 70, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images)["out"], atol=1e-4)
        backbone = theirs.backbone
        stem = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
        assert torch.equal(ours.head(images), backbone.layer1(stem))
    assert ours.head(images).shape == (1, 256, 18, 16)


def test_deeplab__reads_features_at_an_eighth():
    model = DeepLab("resnet18", 7).eval()
    assert model.tail(model.head(torch.randn(1, 3, 64, 128))).shape == (1, 7, 8, 16)
    assert model(torch.randn(1, 3, 50, 70)).shape == (1, 7, 50, 70)


def test_start_from__takes_a_codecs_backbone():
    torch.manual_seed(0)
    backbone, model = Backbone("resnet18"), DeepLab("resnet18", 7)
    model.start_from(backbone)
    assert torch.equal(model.stem[0].weight, backbone.stem[0].weight)
    assert torch.equal(model.tail.layer4[1].conv2.weight, backbone.layer4[1].conv2.weight)
    with pytest.raises(TaskError, match="not the codec's ResNet"):
        DeepLab("resnet34", 7).start_from(backbone)
    with pytest.raises(TaskError, match="not the codec's ResNet"):
        DeepLab("resnet50", 7).start_from(backbone)


def test_load_deeplab__refusals(tmp_path: Path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    torch.save(DeepLab("resnet18", 7).state_dict(), tmp_path / "seven.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name in ("none.pth", "other.pth", "seven.pth", "junk.pth"):
        with pytest.raises(TaskError, match=f"teacher=.*{name}") as error:
            load_deeplab(tmp_path / name, "resnet18", 5)
        assert "\n" not in str(error.value)
