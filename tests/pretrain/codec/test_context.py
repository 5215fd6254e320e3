from __future__ import annotations

import pytest
import torch
from small_codecs import NARROW, random_images
from torch import Tensor

from pretrain.codec.context import ContextModel, predict_in_steps
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import CodecError


@pytest.fixture(params=["checkered", "stepped"])
def contextual(request: pytest.FixtureRequest) -> FeatureCodec:
    return request.getfixturevalue(request.param)


def context_of(codec: FeatureCodec) -> ContextModel:
    assert codec.context is not None
    return codec.context


def test_context__symbols_and_layers(contextual: FeatureCodec):
    images = random_images(3, 80, 64)
    streams = contextual.encode_batch(images, rate=0.5)
    together = contextual.decode_latents(streams)
    alone = torch.cat([contextual.decode_latents([stream]) for stream in streams])
    assert torch.allclose(together, alone, atol=1e-5)
    with pytest.raises(CodecError, match="no layers to stop at"):
        contextual.decode(streams[0], last_layer="base")


def test_context__steps_code_every_place_once(contextual: FeatureCodec):
    latents = torch.empty(NARROW.latent_channels, 5, 8)
    turns = torch.stack([step.places(latents) for step in context_of(contextual).steps])
    assert turns.any(dim=(1, 2, 3)).all()
    assert (turns.sum(dim=0) == 1).all()


def test_context__decoded_values_alone_are_seen(contextual: FeatureCodec):
    """What is predicted changes with values that the reader has, and not with those that it does not have yet."""
    means, scales, y2_hat = torch.rand(3, 1, NARROW.latent_channels, 8, 8)
    context = context_of(contextual)
    known = torch.zeros(y2_hat.shape[1:], dtype=torch.bool)
    for number, step in enumerate(context.steps):
        predicted = context(number, y2_hat, means, scales)
        unknown_moved = context(number, torch.where(known, y2_hat, torch.rand_like(y2_hat)), means, scales)
        assert all(torch.equal(*pair) for pair in zip(predicted, unknown_moved, strict=True))
        if number:
            known_moved = context(number, torch.where(known, torch.rand_like(y2_hat), y2_hat), means, scales)
            assert not torch.equal(predicted[0], known_moved[0])
        known |= step.places(y2_hat)


def test_predict_in_steps__each_place_keeps_what_its_step_said(contextual: FeatureCodec):
    means, scales = torch.rand(2, 1, NARROW.latent_channels, 4, 4)
    steps = context_of(contextual).steps
    known = torch.zeros(means.shape, dtype=torch.bool)

    def correct(number: int, y2_hat: Tensor, first_means: Tensor, first_scales: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(y2_hat, torch.where(known, -1.0, means))
        assert first_means is means and first_scales is scales
        return torch.full_like(means, number), torch.full_like(scales, 10 + number)

    def code(places: Tensor, means: Tensor, _: Tensor) -> Tensor:
        known.logical_or_(places)
        return -torch.ones_like(means)

    found = predict_in_steps(steps, correct, means, scales, code)
    expected = [means, scales]
    for number, step in list(enumerate(steps))[1:]:
        values = zip(expected, (number, 10 + number), strict=True)
        expected = [torch.where(step.places(means), float(value), old) for old, value in values]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
