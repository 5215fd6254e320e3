from __future__ import annotations

import pytest
import torch
from small_codecs import NARROW, random_images

from pretrain.codec.context import anchor_mask
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import CodecError


def test_checkerboard__symbols_and_layers(checkered: FeatureCodec):
    images = random_images(3, 80, 64)
    streams = checkered.encode_batch(images, rate=0.5)
    together = checkered.decode_latents(streams)
    alone = torch.cat([checkered.decode_latents([stream]) for stream in streams])
    assert torch.allclose(together, alone, atol=1e-5)
    with pytest.raises(CodecError, match="no layers to stop at"):
        checkered.decode(streams[0], last_layer="base")


def test_checkerboard__anchors_alone_are_seen(checkered: FeatureCodec):
    """What is predicted does not change with values that the reader does not have yet."""
    means, scales, y2_hat = torch.rand(3, 1, NARROW.latent_channels, 8, 8)
    other = torch.where(anchor_mask(y2_hat), y2_hat, torch.rand_like(y2_hat))
    assert checkered.context is not None
    first, second = checkered.context(y2_hat, means, scales), checkered.context(other, means, scales)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], means)
    assert torch.equal(first[0][..., 0, 0], means[..., 0, 0])
