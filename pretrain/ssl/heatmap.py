"""Where an encoder responds in an image, and the box around it in which crops are drawn.

images (N, 3, H, W), normalised -> heat (N, H, W) float32 in 0..1 -> boxes (N, 4) xyxy in 0..1 of the image.

`activation`: the feature map summed over channels, min-max scaled and upsampled (DICM, Tang, Yi, Wang 2025;
after ContrastiveCrop, Peng et al. 2022). The class-free CAMs are grad-cam's: `eigencam`, first principal
component (Muhammad, Yeasin 2020); `kpca_cam`, the same with a kernel (Karmani et al. 2024); `fem`, channels
weighted by their outliers (Fuad et al. 2020). They compute image by image on the host, and cost many times
what `activation` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import CodecError
from pretrain.ssl.config import HEATMAPS, nearest
from pretrain.ssl.encoder import Encoder


def heatmaps(encoder: Encoder, images: Tensor, method: str = "activation", layer: str = "layer4") -> Tensor:
    """Heat (N, H, W) of images (N, 3, H, W), 0..1 in each; zero where the encoder responds alike everywhere.

    Runs the path of training (RE included where enabled) with running batch statistics, up to `layer` and no
    further. Leaves training flags, statistics and the autocast cache as they were.

    Raises:
        CodecError: there is no such method or layer.
    """
    if method not in HEATMAPS:
        raise CodecError(f"heatmap method {method} is unknown; use {nearest(method, HEATMAPS)}")
    with _evaluating(encoder), _autocast_without_cache(images.device):
        if method == "activation":
            with torch.inference_mode():
                response = encoder.feature_map(images, layer).float().sum(dim=1, keepdim=True)
        else:
            response = _cam(encoder, images, method, layer)
    # Functional operations outside inference mode: what is returned is an ordinary tensor.
    response = torch.nan_to_num(response)
    low, high = response.amin((2, 3), keepdim=True), response.amax((2, 3), keepdim=True)
    heat = (response - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    if heat.shape[-2:] != images.shape[-2:]:
        heat = F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return heat.squeeze(1)


def heatmap_boxes(heat: Tensor, threshold: float = 0.1) -> Tensor:
    """Extent (N, 4), xyxy in 0..1, of rows and columns of heat (N, h, w) above threshold * maximum.

    A flat map (or one without a positive value) says nothing about where to look: its box is the whole image.
    """
    height, width = heat.shape[-2:]
    heat = torch.nan_to_num(heat)
    rows, columns = heat.amax(dim=2), heat.amax(dim=1)
    maximum = rows.amax(dim=1, keepdim=True)
    flat = (maximum <= 0) | (heat.amin(dim=(1, 2)).unsqueeze(1) == maximum)
    top, bottom = _extent((rows > threshold * maximum) | flat)
    left, right = _extent((columns > threshold * maximum) | flat)
    return torch.stack([left / width, top / height, right / width, bottom / height], dim=1)


def _extent(above: Tensor) -> tuple[Tensor, Tensor]:
    """First index and last index + 1 of the true entries of (N, n) bool; all of n where none is."""
    above = above.to(torch.uint8)
    return above.argmax(dim=1), above.shape[1] - above.flip(1).argmax(dim=1)


def _cam(encoder: Encoder, images: Tensor, method: str, layer: str) -> Tensor:
    """(N, 1, H, W) by pytorch_grad_cam."""
    # On first use: it brings in scikit-learn and matplotlib.
    from pytorch_grad_cam import FEM, KPCA_CAM, EigenCAM

    class OrientedEigenCAM(_Oriented, EigenCAM):
        pass

    class OrientedKPCACAM(_Oriented, KPCA_CAM):
        pass

    network = _UpToLayer(encoder, layer)
    cams = {"eigencam": OrientedEigenCAM, "kpca_cam": OrientedKPCACAM, "fem": FEM}
    cam = cams[method](network, [network.output])
    with torch.no_grad():
        # An empty list of targets: `None` would make grad-cam look for the likeliest class.
        heat = cam(input_tensor=images, targets=[])
    return torch.from_numpy(heat).to(images.device).unsqueeze(1)


class _Oriented:
    """Gives a principal component the sign with which it is warm where the response is strong.

    Its own sign is arbitrary; as grad-cam leaves it, EigenCAM often shows the background instead.
    """

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: list[nn.Module],
        activations: np.ndarray,
        grads: np.ndarray | None,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        projection = super().get_cam_image(  # type: ignore[misc]
            input_tensor, target_layer, targets, activations, grads, eigen_smooth
        )
        response = activations.sum(axis=1)
        response = response - response.mean(axis=(1, 2), keepdims=True)
        agreement = (projection * response).sum(axis=(1, 2), keepdims=True)
        return np.where(agreement < 0, -projection, projection)


class _UpToLayer(nn.Module):
    """The encoder up to `layer`, with a place (`output`) for grad-cam's hook."""

    def __init__(self, encoder: Encoder, layer: str):
        super().__init__()
        self.encoder, self.layer = encoder, layer
        self.output = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.encoder.feature_map(images, self.layer).float())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the block; then every submodule gets its own flag back, frozen parts stay frozen."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _autocast_without_cache(device: torch.device) -> torch.autocast:
    """The autocast in force, without its cache: weights cast here have no gradient, and a training forward
    of the same encoder in the same context would silently use them.
    """
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
