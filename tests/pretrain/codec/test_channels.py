"""Streams whose base layer holds chosen channels of y2."""

from __future__ import annotations

import pytest
import torch
from small_codecs import create_codec, random_images, with_options
from torch import Tensor

from pretrain.codec.bitstream import PLAIN
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError, CodecError

CHOSEN = [3, 4, 9, 17, 31]


@pytest.fixture(scope="module")
def codec() -> FeatureCodec:
    return create_codec()


def test_encode__the_base_holds_the_chosen_channels_and_rest_the_others(codec: FeatureCodec):
    image = random_images(1, 70, 100)[0]
    stream, plain = codec.encode(image, channels=CHOSEN), codec.encode(image)
    info = codec.describe(stream)
    assert info.channels is not None and info.channels.chosen == tuple(CHOSEN) and info.channels.total == 32
    assert list(info.layers) == ["base", "rest"]
    whole = codec.decode_latents([plain])
    base = codec.decode_latents([stream[: info.base_bytes]], last_layer="base")
    assert torch.equal(base[:, CHOSEN], whole[:, CHOSEN])
    others = list(info.channels.others)
    assert not torch.equal(base[:, others], whole[:, others])
    assert torch.equal(codec.decode(stream), codec.decode(plain))


def test_encode__without_rest_is_the_same_base(codec: FeatureCodec):
    image = random_images(1, 64, 64)[0]
    alone, both = codec.encode(image, channels=CHOSEN, rest=False), codec.encode(image, channels=CHOSEN)
    info = codec.describe(alone)
    assert list(info.layers) == ["base"] and info.layers["base"] == codec.describe(both).layers["base"]
    assert torch.equal(codec.decode(alone), codec.decode(both, last_layer="base"))
    with pytest.raises(CodecError, match="this stream, which has base"):
        codec.decode(alone, last_layer="rest")


def test_encode__a_choice_may_depend_on_the_image(codec: FeatureCodec):
    """Each stream of a batch has its own list, and is what its image alone gives."""
    images = random_images(4, 64, 64)

    def busiest(y2_hat: Tensor) -> list[int]:
        return y2_hat.flatten(1).std(dim=1).topk(6).indices.tolist()

    streams = codec.encode_batch(images, channels=busiest)
    lists = [codec.describe(stream).channels for stream in streams]
    whole = codec.decode_latents(streams)
    for image, stream, channels, y2_hat in zip(images, streams, lists, whole, strict=True):
        assert channels is not None and list(channels.chosen) == sorted(busiest(y2_hat))
        assert stream == codec.encode(image, channels=channels.chosen)
    assert len({channels.chosen for channels in lists if channels}) > 1


def test_encode__all_channels_leave_no_rest(codec: FeatureCodec):
    image = random_images(1, 64, 64)[0]
    stream = codec.encode(image, channels=range(32))
    assert list(codec.describe(stream).layers) == ["base"]
    assert torch.equal(codec.decode(stream), codec.decode(codec.encode(image)))


def test_encode__a_stream_without_a_choice_lists_nothing(codec: FeatureCodec):
    info = codec.describe(codec.encode(random_images(1, 64, 64)[0]))
    assert (info.version, info.channels) == (PLAIN, None)


@pytest.mark.parametrize("channels", [[], [0, 0], [32], [-1]])
def test_encode__impossible_channels(codec: FeatureCodec, channels: list[int]):
    with pytest.raises(CodecError, match=r"0\.\.31"):
        codec.encode(random_images(1, 64, 64)[0], channels=channels)


def test_encode__a_context_model_has_no_layers(codec: FeatureCodec):
    checkered = with_options(codec, context="checkerboard", context_depth=1, base_channels=0)
    with pytest.raises(CodecError, match="context model"):
        checkered.encode(random_images(1, 64, 64)[0], channels=CHOSEN)


def test_decode__a_list_of_a_latent_of_another_width(codec: FeatureCodec):
    from pretrain.codec import bitstream

    stream = codec.encode(random_images(1, 64, 64)[0], channels=CHOSEN)
    _, layers = bitstream.unpack(stream, codec.fingerprint)
    forged = bitstream.pack(codec.fingerprint, 64, 64, layers, None, bitstream.ChannelList(tuple(CHOSEN), 48))
    with pytest.raises(BitstreamError, match="channels of 48, this codec has 32"):
        codec.decode(forged)
