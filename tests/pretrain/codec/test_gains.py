from __future__ import annotations

import math

import pytest
import torch
from small_codecs import random_images

from data_pipeline.views import normalize
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError, CodecError


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("kind", ["rated", "checkered", "stepped"])
def test_rate__streams_hold_what_an_eval_pass_estimates(kind: str, rate: float | None, request: pytest.FixtureRequest):
    codec = request.getfixturevalue(kind)
    image = random_images(1, 96, 128)[0]
    stream = codec.encode(image, rate=rate)
    level = 1.0 if rate is None else round(255 * rate) / 255
    normalised = normalize(image[None].float() / 255)
    with torch.no_grad():
        output = codec(normalised, rate=level)
    info = codec.describe(stream)
    assert abs(len(stream) - info.header_bytes - float(output.bits) / 8) <= 2
    assert codec.describe(stream).rate == round(255 * level)
    f3 = codec.decode(stream)
    assert torch.allclose(f3, output.f3, atol=1e-4 * float(f3.abs().max()))
    assert torch.allclose(codec.decode_latents([stream]), codec.latents(normalised, rate=level), atol=1e-4)


def test_rate__bytes_rise_with_it(rated: FeatureCodec):
    image = random_images(1, 128, 128)[0]
    sizes = [len(rated.encode(image, rate=step / 8)) for step in range(9)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.3 * sizes[0]
    assert len(rated.encode(image)) == sizes[-1]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_max_bytes__the_highest_rate_that_fits(rated: FeatureCodec, share: float):
    image = random_images(1, 128, 128)[0]
    smallest, largest = (len(rated.encode(image, rate=rate)) for rate in (0, 1))
    limit = round(smallest + share * (largest - smallest))
    stream = rated.encode(image, max_bytes=limit)
    level = rated.describe(stream).rate
    assert level is not None
    assert len(stream) <= limit < len(rated.encode(image, rate=(level + 1) / 255))
    assert rated.encode(image, rate=0.2, max_bytes=10 * largest) == rated.encode(image, rate=0.2)


def test_rate__what_cannot_be_is_refused(codec: FeatureCodec, rated: FeatureCodec):
    image = random_images(1, 64, 64)[0]
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(CodecError, match=r"rate=.* must lie in 0\.\.1"):
            rated.encode(image, rate=rate)
    with pytest.raises(CodecError, match="one rate"):
        codec.encode(image, rate=0.5)
    with pytest.raises(CodecError, match="max_bytes=10: the smallest stream of this image has"):
        rated.encode(image, max_bytes=10)
    with pytest.raises(CodecError, match=r"max_bytes=10: .*rate_points"):
        codec.encode(image, max_bytes=10)
    with pytest.raises(BitstreamError, match="codec"):
        rated.decode(codec.encode(image))


def test_features__are_those_of_the_rate_that_a_stream_carries(rated: FeatureCodec):
    images = normalize(random_images(1, 64, 64).float() / 255)
    assert torch.equal(rated.features(images, rate=0.3), rated.features(images, rate=round(0.3 * 255) / 255))
    with pytest.raises(CodecError, match=r"rate=2 must lie in 0\.\.1"):
        rated.features(images, rate=2)
