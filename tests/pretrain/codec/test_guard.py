from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_codecs import random_images, with_options
from torch import Tensor

from pretrain.codec import bitstream
from pretrain.codec.bitstream import Layer
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError


@pytest.mark.parametrize("kind", ["codec", "rated", "checkered", "stepped"])
def test_guard__a_reader_off_by_less_decodes_the_same_symbols(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Scales moved by almost the guard, at random: symbols stay; without a list some would not."""
    plain = request.getfixturevalue(kind)
    codec = with_options(plain, **{**vars(plain.config), "guard": 1e-3})
    streams = codec.encode_batch(random_images(4, 96, 128))
    expected = codec.decode_latents(streams)
    assert any(stream[2] & bitstream.GUARDED for stream in streams)
    generator = torch.Generator().manual_seed(2)

    def moved(network: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        forward = network.forward

        def disturbed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            means, scales = forward(*inputs)
            noise = 2 * torch.rand(scales.shape, generator=generator, dtype=scales.dtype) - 1
            return means, scales * (1 + 0.99e-3 * noise)

        return disturbed

    coder = codec._ready()
    # The context model's own output takes in the disturbed scales of h_s; one of the two is disturbed at a time.
    network = coder.h_s if coder.context is None else coder.context
    monkeypatch.setattr(network, "forward", moved(network))
    for _ in range(3):
        assert torch.allclose(codec.decode_latents(streams), expected, atol=1e-5)
    unguarded = [
        bitstream.pack(
            codec.fingerprint, info.height, info.width, [Layer(x.payload, x.digest) for x in layers], info.rate
        )
        for info, layers in (bitstream.unpack(stream, codec.fingerprint) for stream in streams)
    ]
    with pytest.raises(BitstreamError, match="other symbols"):
        codec.decode_latents(8 * unguarded)


def test_guard__an_impossible_list_is_damage(codec: FeatureCodec):
    stream = codec.encode(random_images(1, 64, 64)[0])
    info, layers = bitstream.unpack(stream, codec.fingerprint)
    for guard in ({10**6: 3}, {0: 200}):
        forged = [Layer(layers[0].payload, layers[0].digest, guard), layers[1]]
        with pytest.raises(BitstreamError, match="guard list"):
            codec.decode(bitstream.pack(codec.fingerprint, info.height, info.width, forged))
