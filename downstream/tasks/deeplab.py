"""DeepLabv3 at output stride 8, in two parts: head (stem, layer1; stride 4) and what reads F, the head's features.

    images -> stem, layer1 -> F (H/4) -> layer2, layer3 (dilated), layer4 (dilated) (H/8) -> ASPP -> logits

torchvision's DeepLabv3 to the weight, for its ResNet-50 and -101; the ResNet comes from timm, which also has smaller
ones that can be dilated. The teacher is the whole network on raw images; the student of latents is the part behind F.

Sources: Chen et al. 2017; Liu, Sun, Katto 2022, section 2.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from downstream.compressai_models import checkpoint_fault
from downstream.errors import TaskError
from pretrain.codec.backbone import Backbone
from pretrain.codec.config import validate_backbone

TORCHVISION_STEM = {"conv1": "stem.0", "bn1": "stem.1"}


class SegmentationTail(nn.Module):
    """Logits (N, num_classes, H/8, W/8) of F (N, C1, H/4, W/4)."""

    def __init__(self, resnet: Any, num_classes: int):
        super().__init__()
        self.layer2, self.layer3, self.layer4 = resnet.layer2, resnet.layer3, resnet.layer4
        self.classifier = DeepLabHead(resnet.num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.layer4(self.layer3(self.layer2(features))))


class DeepLab(nn.Module):
    """Logits (N, num_classes, H, W) of normalised images (N, 3, H, W).

    Args:
        backbone: any timm ResNet whose layers can be dilated (ConfigError: no ResNet of timm's).

    Attributes:
        channels: C1, of F.
    """

    def __init__(self, backbone: str, num_classes: int):
        super().__init__()
        validate_backbone(backbone)
        resnet: Any = timm.create_model(backbone, num_classes=0, output_stride=8)
        self.num_classes = num_classes
        self.channels: int = resnet.feature_info[-4]["num_chs"]
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool)
        self.layer1 = resnet.layer1
        self.tail = SegmentationTail(resnet, num_classes)

    def head(self, images: Tensor) -> Tensor:
        """F (N, C1, ceil(H/4), ceil(W/4)) of normalised images."""
        return self.layer1(self.stem(images))

    def forward(self, images: Tensor) -> Tensor:
        return enlarge(self.tail(self.head(images)), images.shape[-2], images.shape[-1])

    def start_from(self, backbone: Backbone) -> None:
        """Take the weights of a codec's backbone of the same name: dilation changes no shape.

        Raises:
            TaskError: it is another ResNet.
        """
        state = {
            name if name.startswith(("stem.", "layer1.")) else f"tail.{name}": tensor
            for name, tensor in backbone.state_dict().items()
        }
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise TaskError(f"backbone: not the codec's ResNet ({str(error).splitlines()[1].strip()})") from error
        if unexpected or any(not name.startswith("tail.classifier.") for name in missing):
            raise TaskError("backbone: not the codec's ResNet; set it to the codec's, or start=random")


def enlarge(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits at the image's size, bilinear, as torchvision's DeepLabv3 does."""
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def load_deeplab(path: Path, backbone: str, num_classes: int) -> DeepLab:
    """A teacher from a file: a state dict of `DeepLab`, or of torchvision's deeplabv3_resnet50 or -101.

    Raises:
        TaskError: no such file, not a state dict, or one of another network or number of classes.
    """
    model = DeepLab(backbone, num_classes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({_our_name(name): tensor for name, tensor in state.items() if "aux_" not in name})
    except OSError as error:
        raise TaskError(f"teacher={path}: cannot be read ({error.strerror}); leave it out to train one") from error
    except Exception as error:  # torch's unpickler raises many classes on what is no checkpoint
        raise TaskError(
            f"teacher={path}: not a DeepLabv3 of {backbone} with {num_classes} classes ({checkpoint_fault(error)})"
        ) from error
    return model


def _our_name(name: str) -> str:
    """A name of torchvision's DeepLabv3 as ours; ours stay."""
    if name.startswith("classifier."):
        return f"tail.{name}"
    if not name.startswith("backbone."):
        return name
    first, _, others = name.removeprefix("backbone.").partition(".")
    if first in TORCHVISION_STEM:
        return f"{TORCHVISION_STEM[first]}.{others}"
    return f"{first}.{others}" if first == "layer1" else f"tail.{first}.{others}"
