from __future__ import annotations

import pytest
import torch
from small_codecs import create_codec

from downstream.gate import create_gate
from downstream.tasks.latent_input import LatentInput

EDGE = 9  # places of F that the convolutions of `deconv` look beyond an edge
CHOSEN = {"dynamic": None, "static": [1, 4, 20], "none": None}


@pytest.mark.parametrize("kind", ["deconv", "synthesis"])
@pytest.mark.parametrize("gate", CHOSEN)
def test_of_many__is_each_image_by_itself(gate: str, kind: str):
    """What stands beside an image changes nothing of its F, but for places at an edge that was padded."""
    torch.manual_seed(0)
    front = LatentInput(create_gate(gate, 32, CHOSEN[gate]), kind, 64, create_codec().g_s).eval()
    sizes = [(64, 100), (60, 40), (64, 100)]
    y_hats = [torch.randn(32, 4, 8), torch.randn(32, 4, 4), torch.randn(32, 4, 8)]
    with torch.no_grad():
        many = front.of_many(y_hats, sizes)
        for y_hat, size, features in zip(y_hats, sizes, many, strict=True):
            alone = front(y_hat[None], *size)[0]
            inside = slice(None) if kind == "synthesis" else slice(0, -EDGE)
            assert features.shape == alone.shape
            assert torch.allclose(features[:, inside, inside], alone[:, inside, inside], atol=1e-4)


def test_of_many__a_filter_over_the_whole_picture_would_see_padding():
    """Why pictures of one size go together: padded, the same latent gives other features."""
    torch.manual_seed(0)
    front = LatentInput(create_gate("none", 32), "synthesis", 64, create_codec().g_s).eval()
    y_hat = torch.randn(1, 32, 4, 4)
    padded = torch.nn.functional.pad(y_hat, (0, 4))
    with torch.no_grad():
        assert not torch.allclose(front(padded, 64, 64), front(y_hat, 64, 64), atol=1e-2)
