from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.loader import eval_loader
from downstream.evaluation.anchors import create_anchor
from downstream.frozen import FrozenCodec, PixelInput
from pretrain.codec.feature_codec import FeatureCodec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(colours: Path) -> torch.Tensor:
    return next(iter(eval_loader(colours, "val", canvas_size=64, batch_size=6))).canvas


@pytest.fixture(scope="module")
def codec(codec_folder: Path) -> FeatureCodec:
    return FeatureCodec.from_pretrained(codec_folder)


def test_features__are_those_of_the_real_streams(codec: FeatureCodec, images: torch.Tensor):
    """What a task trains on is what it gets once it reads bytes."""
    frozen = FrozenCodec(codec, CPU)
    decoded, sizes, payloads = frozen.through_streams(images)
    assert torch.allclose(frozen.features(images), decoded, atol=1e-4)
    assert sizes.tolist() == [len(codec.encode(image)) for image in images]
    assert bool((payloads < sizes).all()) and bool((sizes - payloads <= 32).all())


def test_frozen_codec__puts_a_training_codec_into_eval_mode_without_gradients(codec_folder: Path, images: torch.Tensor):
    codec = FeatureCodec.from_pretrained(codec_folder).train().requires_grad_(True)
    frozen = FrozenCodec(codec, CPU)
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    assert not frozen.features(images).requires_grad
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.state_dict().items())


def test_pixel_input__without_an_anchor_is_the_backbones_head_on_the_image(codec: FeatureCodec, images: torch.Tensor):
    f1, sizes, payloads = PixelInput(codec.backbone.head, None, CPU).through_streams(images)
    assert f1.shape == (len(images), codec.backbone.channels, 16, 16)
    assert sizes.tolist() == payloads.tolist() == [3 * 64 * 64] * len(images)


def test_pixel_input__counts_the_bytes_of_real_files_and_sees_their_damage(codec: FeatureCodec, images: torch.Tensor):
    anchor = create_anchor("jpeg:10")
    f1, sizes, payloads = PixelInput(codec.backbone.head, anchor, CPU).through_streams(images)
    assert sizes.tolist() == [len(anchor.encode(image.permute(1, 2, 0).numpy())) for image in images]
    assert bool((payloads < sizes).all()) and bool((payloads >= 0).all())
    assert not torch.allclose(f1, PixelInput(codec.backbone.head, None, CPU).features(images), atol=1e-2)


@pytest.mark.parametrize("name", ["streams", "jpeg:10", None])
def test_sources__what_is_encoded_is_decoded_one_by_one_and_all_together(
    name: str | None, codec: FeatureCodec, images: torch.Tensor
):
    """Training from streams that were encoded before sees what training from images sees."""
    source = FrozenCodec(codec, CPU)
    if name != "streams":
        source = PixelInput(codec.backbone.head, create_anchor(name) if name else None, CPU)
    sizes = [images[0], images[1][:, :32], images[2], images[3][:, :, :48]]
    streams = [source.encode(image) for image in sizes]
    together = source.decode_all(streams)
    for image, stream, features in zip(sizes, streams, together, strict=True):
        one, height, width = source.decode(stream)
        assert (height, width) == tuple(image.shape[-2:])
        assert torch.allclose(one[0], features, atol=1e-4)
        assert torch.allclose(source.features(image[None])[0], features, atol=1e-4)
