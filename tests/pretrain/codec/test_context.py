from __future__ import annotations

import pytest
import torch
from small_codecs import NARROW, random_images
from torch import Tensor

from pretrain.codec.context import ContextModel
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


def test_predict__decoded_values_alone_are_seen(contextual: FeatureCodec):
    """What is predicted changes with values that the reader has, and not with those that it does not have yet."""
    means, scales, y2_hat, other = torch.rand(4, 1, NARROW.latent_channels, 8, 8)
    context = context_of(contextual)
    places = [step.places(y2_hat) for step in context.steps]

    def predicted_with(changed: int) -> tuple[Tensor, Tensor]:
        """Where values change from step `changed` on, and at no time hold but at their places."""
        turns = iter(range(len(places)))

        def code(here: Tensor, *_: Tensor) -> Tensor:
            return torch.where(here, other if next(turns) >= changed else y2_hat, torch.rand_like(y2_hat))

        return context.predict(means, scales, code)

    unchanged = predicted_with(len(places))
    for number, here in enumerate(places):
        changed = predicted_with(number)
        until_here = torch.stack(places[: number + 1]).any(dim=0)
        for new, old in zip(changed, unchanged, strict=True):
            assert torch.equal(new[0, until_here], old[0, until_here])
            for later in places[number + 1 : number + 2]:
                assert not torch.equal(new[0, later], old[0, later])
        assert torch.equal(unchanged[0][0, here], means[0, here]) == (number == 0)


def test_predict__each_place_keeps_what_its_step_said(contextual: FeatureCodec):
    means, scales = torch.rand(2, 1, NARROW.latent_channels, 4, 4)
    context = context_of(contextual)

    def correct(number: int, seen: Tensor, first_means: Tensor, first_scales: Tensor) -> tuple[Tensor, Tensor]:
        assert first_means is means and first_scales is scales
        return torch.full_like(means, number), torch.full_like(scales, 10 + number)

    found = context.predict(means, scales, lambda _, means, __: means, correct)
    expected = [means, scales]
    for number, step in list(enumerate(context.steps))[1:]:
        values = zip(expected, (number, 10 + number), strict=True)
        expected = [torch.where(step.places(means), float(value), old) for old, value in values]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
