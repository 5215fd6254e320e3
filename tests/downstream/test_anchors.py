from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.zoo import image_models
from safetensors.torch import save_file

from downstream.errors import TaskError
from downstream.evaluation.anchors import check_anchor, create_anchor, through

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3)).astype(np.uint8).repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_through__higher_quality_costs_more_and_is_nearer(name: str):
    errors, sizes = [], []
    for quality in (5, 50, 95):
        decoded, size, payload = through(create_anchor(f"{name}:{quality}"), IMAGES)
        assert (payload < size).all() and (payload >= 0).all()
        assert decoded.shape == IMAGES.shape
        errors.append(np.abs(decoded.astype(float) - IMAGES).mean())
        sizes.append(size.sum())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_payload_bytes__are_what_a_flat_colour_does_not_have():
    anchor = create_anchor("jpeg:1")
    flat = np.full((48, 80, 3), 128, np.uint8)
    _, sizes, payloads = through(anchor, np.stack([flat, IMAGES[0]]))
    assert payloads[0] == 0 and payloads[1] == sizes[1] - sizes[0]


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
def test_through__a_model_gives_what_it_decodes_itself(name: str, tmp_path: Path):
    """One that is sent channel by channel, and one with a context model, which is sent whole."""
    torch.manual_seed(0)
    model = image_models[name](quality=1).eval()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    anchor = create_anchor(f"{name}:1", str(tmp_path / "w.safetensors"))
    decoded, sizes, payloads = through(anchor, IMAGES)
    assert decoded.shape == IMAGES.shape and (sizes - payloads <= 32).all() and (payloads > 0).all()
    model.update()
    padded = F.pad(torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2).float() / 255, (0, 48, 0, 16), mode="reflect")
    coded = model.compress(padded)
    theirs = model.decompress(coded["strings"], coded["shape"])["x_hat"][0, :, :48, :80]
    assert np.abs(theirs.clamp(0, 1).mul(255).permute(1, 2, 0).detach().numpy() - decoded[0].astype(float)).max() <= 1
    with pytest.raises(TaskError, match=r"weights of .*none.pt"):
        create_anchor(f"{name}:1", str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    "text", ["gif:3", "jpeg", "jpeg:101", "jpeg:x", "mbt2018:9", "jpeg:²", "cheng2020-attn:7", "mbt2018:0", "mbt2018"]
)
def test_check_anchor__bad_anchors_are_named(text: str):
    with pytest.raises(TaskError, match=text):
        check_anchor(text)
