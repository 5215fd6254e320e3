from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from pretrain.codec.backbone import Backbone
from pretrain.codec.config import CodecConfig
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.errors import CodecError
from pretrain.ssl.config import HEATMAPS
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.heatmap import heatmap_boxes, heatmaps


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Has seen enough batches for its running statistics; layer2 is frozen in eval mode."""
    torch.manual_seed(0)
    backbone = Backbone("resnet10t")
    config = CodecConfig(backbone="resnet10t", re_channels=8, re_latent=8, re_depths=[1, 1, 1], re_kernel=3)
    encoder = Encoder(backbone, RedundancyElimination(backbone.channels, config)).train()
    with torch.no_grad():
        for _ in range(10):
            encoder(torch.randn(8, 3, 32, 32))
    encoder.backbone.layer2.eval()
    return encoder


def slow_box(heat: np.ndarray, threshold: float) -> list[float]:
    height, width = heat.shape
    maximum = heat.max()
    if maximum <= 0 or heat.min() == maximum:
        return [0, 0, 1, 1]
    rows = [y for y in range(height) if heat[y].max() > np.float32(threshold) * maximum]
    columns = [x for x in range(width) if heat[:, x].max() > np.float32(threshold) * maximum]
    return [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]


HEATS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0.0, 0.0625, 0.125, 0.5, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False),
)


@given(heat=HEATS, threshold=st.sampled_from([0.0625, 0.1, 0.125]) | st.floats(0, 0.9))
@settings(max_examples=200, deadline=None)
def test_heatmap_boxes__equals_slow_reference(heat: np.ndarray, threshold: float):
    expected = np.array([slow_box(image, threshold) for image in heat], dtype=np.float32)
    np.testing.assert_allclose(heatmap_boxes(torch.from_numpy(heat), threshold).numpy(), expected, rtol=1e-6)


@given(heat=HEATS, threshold=st.sampled_from([0.0625, 0.1, 0.125]) | st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_heatmap_boxes__is_inside_the_image_and_holds_the_maximum(heat: np.ndarray, threshold: float):
    boxes = heatmap_boxes(torch.from_numpy(heat), threshold)
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    for image, (left, top, right, bottom) in zip(heat, boxes.tolist(), strict=True):
        row, column = np.unravel_index(image.argmax(), image.shape)
        assert left <= (column + 0.5) / image.shape[1] <= right
        assert top <= (row + 0.5) / image.shape[0] <= bottom


@pytest.mark.parametrize("value", [0.0, 0.7, float("nan")])
def test_heatmap_boxes__flat_map_gives_the_whole_image(value: float):
    assert heatmap_boxes(torch.full((2, 5, 7), value)).tolist() == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("layer", ["layer1", "layer3", "layer4"])
@pytest.mark.parametrize("method", HEATMAPS)
def test_heatmaps__every_method_gives_an_image_sized_map_in_0_to_1(encoder: Encoder, method: str, layer: str):
    heat = heatmaps(encoder, torch.randn(2, 3, 64, 96), method, layer)
    assert heat.shape == (2, 64, 96)
    assert heat.dtype == torch.float32
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert (heat.amax((1, 2)) > 0.2).all()


@pytest.mark.parametrize("method", HEATMAPS)
def test_heatmaps__leaves_flags_statistics_and_gradients_alone(encoder: Encoder, method: str):
    flags = {name: module.training for name, module in encoder.named_modules()}
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    heatmaps(encoder, torch.randn(2, 3, 32, 32), method, "layer3")
    assert {name: module.training for name, module in encoder.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())


def test_heatmaps__training_in_the_same_autocast_context_still_gets_gradients(encoder: Encoder):
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        heat = heatmaps(encoder, images, "activation", "layer4")
        encoder(images).features.float().square().mean().backward()
    gradient = encoder.backbone.layer4[0].downsample[-2].weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    encoder.zero_grad(set_to_none=True)
    assert not heat.is_inference()


def test_heatmaps__image_does_not_depend_on_its_batch(encoder: Encoder):
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(heatmaps(encoder, images)[1:2], heatmaps(encoder, images[1:2]), rtol=1e-3, atol=1e-4)


def test_heatmaps__redundancy_is_in_the_path_where_enabled(encoder: Encoder):
    images = torch.randn(2, 3, 32, 32)
    without = heatmaps(encoder, images, layer="layer1")
    encoder.redundancy_enabled = True
    assert not torch.allclose(heatmaps(encoder, images, layer="layer1"), without, atol=1e-2)
    encoder.redundancy_enabled = False


def bright_patch(row: int, column: int) -> Tensor:
    """A grey image of 128 px with a noisy patch of 32 px whose corner is at (row, column)."""
    images = torch.zeros(1, 3, 128, 128)
    images[..., row : row + 32, column : column + 32] = 3 * torch.randn(1, 3, 32, 32)
    return images


@pytest.mark.parametrize("place", [(0, 0), (96, 0), (48, 96)])
@pytest.mark.parametrize("method", HEATMAPS)
def test_heatmaps__warmest_where_the_image_has_something(encoder: Encoder, method: str, place: tuple[int, int]):
    heat = heatmaps(encoder, bright_patch(*place), method, layer="layer2")[0]
    row, column = divmod(int(heat.argmax()), 128)
    assert place[0] - 16 <= row <= place[0] + 48
    assert place[1] - 16 <= column <= place[1] + 48


@pytest.mark.parametrize("method", ["eigencam", "kpca_cam"])
def test_heatmaps__components_are_warm_where_the_encoder_responds(encoder: Encoder, method: str):
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    cam, activation = heatmaps(encoder, images, method, "layer1"), heatmaps(encoder, images, layer="layer1")
    cam, activation = (heat - heat.mean((1, 2), keepdim=True) for heat in (cam, activation))
    assert ((cam * activation).sum((1, 2)) > 0).all()


def test_heatmaps__unknown_names_are_refused_with_the_nearest(encoder: Encoder):
    with pytest.raises(CodecError, match=r"eigen_cam.*eigencam"):
        heatmaps(encoder, torch.zeros(1, 3, 32, 32), "eigen_cam")
    with pytest.raises(CodecError, match=r"layer9.*layer"):
        heatmaps(encoder, torch.zeros(1, 3, 32, 32), "activation", "layer9")
