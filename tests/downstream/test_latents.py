from __future__ import annotations

import pytest
import torch
from small_codecs import create_codec, random_images

from downstream.latents import FeatureLatents
from pretrain.errors import BitstreamError

CHOSEN = [0, 5, 6, 30]


@pytest.fixture(scope="module")
def latents() -> FeatureLatents:
    return FeatureLatents(create_codec(), torch.device("cpu"))


def test_feature_latents__base_and_rest_are_the_whole_latent(latents: FeatureLatents):
    image = random_images(1, 70, 100)[0]
    whole = latents.decode(latents.encode(image))
    assert whole.shape == (1, 32, 8, 8)
    assert torch.allclose(whole, latents.latents(image[None]), atol=1e-4)
    base, rest = latents.split(latents.encode(image, channels=CHOSEN, rest=True))
    received = latents.receive(base)
    assert (received.channels, received.height, received.width) == (tuple(CHOSEN), 70, 100)
    assert torch.equal(received.latents, whole[:, CHOSEN])
    assert torch.equal(latents.decode(base + rest), whole)
    # The image's features, too: what the codec is for does not depend on how its latent was sent.
    assert torch.equal(latents.codec.decode(base + rest), latents.codec.decode(latents.encode(image)))
    with pytest.raises(BitstreamError, match="cut"):
        latents.decode(base)


def test_feature_latents__layers_cost_at_most_two_percent_more_than_one():
    # Of the same weights with one layer; the small codec's own streams have two.
    from small_codecs import with_options

    latents = FeatureLatents(with_options(create_codec(), base_channels=0), torch.device("cpu"))
    image = random_images(1, 256, 384)[0]
    both, single = latents.encode(image, channels=CHOSEN, rest=True), latents.encode(image)
    assert len(both) <= 1.02 * len(single)


def test_feature_latents__without_a_list_all_channels_come(latents: FeatureLatents):
    image = random_images(1, 64, 64)[0]
    received = latents.receive(latents.encode(image))
    assert received.channels is None
    assert torch.equal(received.latents, latents.decode(latents.encode(image)))


def test_feature_latents__streams_of_many_sizes_are_read_together_as_one_by_one(latents: FeatureLatents):
    images = [random_images(1, *size)[0] for size in ((64, 64), (70, 100), (64, 64))]
    streams = [latents.encode(image) for image in images]
    streams.append(latents.encode(images[0], channels=CHOSEN, rest=True))
    together = latents.decode_all(streams)
    for stream, y_hat in zip(streams, together, strict=True):
        assert torch.equal(latents.decode(stream)[0], y_hat)
    assert torch.equal(together[0], together[3])
