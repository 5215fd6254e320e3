"""Places of y2 that see nothing but padding: no part of a stream."""

from __future__ import annotations

import pytest
import torch
from small_codecs import random_images

from data_pipeline.views import normalize
from pretrain.codec.feature_codec import FeatureCodec

HEIGHT, WIDTH = 70, 100  # 5 x 7 of 8 x 8 places


@pytest.mark.parametrize("name", ["codec", "checkered", "stepped"])
def test_encode__padded_places_do_not_reach_the_stream(name: str, request: pytest.FixtureRequest):
    codec = request.getfixturevalue(name)
    rate = 255 if name != "codec" else None
    image, coder = random_images(1, HEIGHT, WIDTH), codec._ready()
    y2, z = codec.analyse(normalize(image.float() / 255))
    assert y2.shape[-2:] == (8, 8)
    other = y2.clone()
    other[..., 5:, :] += 3
    other[..., 7:] -= 5
    (stream,) = coder.encode(z, other, HEIGHT, WIDTH, rate)
    assert stream == codec.encode(image[0])
    other[..., 4, 6] += 3
    assert coder.encode(z, other, HEIGHT, WIDTH, rate)[0] != stream


def test_decode_latents__padded_places_have_their_means(codec: FeatureCodec):
    stream = codec.encode(random_images(1, HEIGHT, WIDTH)[0])
    whole, base = codec.decode_latents([stream]), codec.decode_latents([stream], last_layer="base")
    # Without its layer `rest`, a stream's channels from 16 on are their means.
    assert torch.equal(whole[:, 16:, 5:], base[:, 16:, 5:])
    assert torch.equal(whole[:, 16:, :, 7:], base[:, 16:, :, 7:])
    assert not torch.equal(whole[:, 16:, :5, :7], base[:, 16:, :5, :7])


@pytest.mark.parametrize("name", ["codec", "checkered", "stepped"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (224, 224)])
def test_forward__bits_are_those_of_places_that_see_the_image(
    name: str, size: tuple[int, int], request: pytest.FixtureRequest
):
    codec = request.getfixturevalue(name)
    images = random_images(2, *size)
    output = codec(normalize(images.float() / 255))
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    assert output.likelihoods["y2"].shape == (2, 32, rows, columns)
    streams = codec.encode_batch(images)
    payloads = [8 * (len(stream) - codec.describe(stream).header_bytes) for stream in streams]
    assert torch.allclose(output.bits, torch.tensor(payloads, dtype=torch.float32), atol=24)
