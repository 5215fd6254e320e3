"""Recursive gated convolution (g^n conv), the block of the codec's transforms.

Spatial interactions of order n at the cost of one depthwise convolution: the input is split into a first gate and
n depthwise-filtered parts, and gated again and again while its width doubles. In the deepest blocks the depthwise
convolution gives way to a global-local filter: half of the channels see 3x3 pixels, half all of them, by a product in
the Fourier plane.

Source: HorNet (Rao, Zhao, Tang, Zhou, Lim, Lu 2022), sections 3.1 and 3.2; DICM, "RGC".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from pretrain.codec.residual import begin_at_zero
from pretrain.codec.tiles import in_strips
from pretrain.errors import ConfigError

FILTER_SIZE = (14, 8)  # rows and rfft columns of the learned filter, that of a 14 x 14 plane


class GlobalLocalFilter(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): 3x3 depthwise on half of the channels, a Fourier filter on the other half.

    The filter is learned for a 14 x 14 plane and interpolated to the size of the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm_in = LayerNorm2d(channels)
        self.local = nn.Conv2d(channels // 2, channels // 2, 3, padding=1, groups=channels // 2, bias=False)
        self.weight = nn.Parameter(0.02 * torch.randn(channels // 2, *FILTER_SIZE, 2))
        self.norm_out = LayerNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        local, wide = self.norm_in(x).chunk(2, dim=1)
        height, width = wide.shape[-2:]
        local = self.local(local)
        # The transform runs in float32 under autocast too: bfloat16 has none.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.float()
            if (height, width // 2 + 1) != FILTER_SIZE:
                planes = weight.permute(3, 0, 1, 2)
                planes = F.interpolate(planes, size=(height, width // 2 + 1), mode="bilinear", align_corners=True)
                weight = planes.permute(1, 2, 3, 0)
            spectrum = torch.fft.rfft2(wide.float().contiguous(), norm="ortho")
            spectrum = spectrum * torch.view_as_complex(weight.contiguous())
            wide = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho").to(local.dtype)
        # Interleaved, so that every gate that follows sees channels of both kinds.
        mixed = torch.stack([local, wide], dim=2).flatten(1, 2)
        return self.norm_out(mixed)


class RecursiveGatedConv(nn.Module):
    """g^n conv, (N, C, H, W) -> (N, C, H, W); `order` n, widths C/2^(n-1), ..., C/2, C."""

    def __init__(self, channels: int, order: int, kernel: int = 7, global_local: bool = False):
        super().__init__()
        multiple = 2 ** (order if global_local else order - 1)  # half of them go through each of two filters
        if channels % multiple:
            raise ConfigError(
                f"codec.rgc_orders holds {order}, but {channels} channels are no multiple of {multiple}; "
                "lower the order"
            )
        self.dims = [channels // 2**i for i in reversed(range(order))]
        self.proj_in = nn.Conv2d(channels, self.dims[0] + sum(self.dims), 1)
        self.filter: nn.Module
        if global_local:
            self.filter = GlobalLocalFilter(sum(self.dims))
        else:
            self.filter = nn.Conv2d(sum(self.dims), sum(self.dims), kernel, padding=kernel // 2, groups=sum(self.dims))
        self.gates = nn.ModuleList(
            nn.Conv2d(narrow, wide, 1) for narrow, wide in zip(self.dims[:-1], self.dims[1:], strict=True)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.scale = 1 / 3

    def forward(self, x: Tensor) -> Tensor:
        # Two products, because a slice of one would be copied by the filter and kept for the gate's sake.
        weight, bias, first = self.proj_in.weight, self.proj_in.bias, self.dims[0]
        assert bias is not None
        gate = F.conv2d(x, weight[:first], bias[:first])
        parts = self.filter(F.conv2d(x, weight[first:], bias[first:])).mul_(self.scale).split(self.dims, dim=1)
        x = gate * parts[0]
        for widen, part in zip(self.gates, parts[1:], strict=True):
            x = widen(x) * part
        return self.proj_out(x)


class RGCBlock(nn.Module):
    """x + gnconv(LN x), then x + MLP(LN x); (N, C, H, W) -> (N, C, H, W). Training starts from the identity."""

    def __init__(self, channels: int, order: int, kernel: int = 7, global_local: bool = False):
        super().__init__()
        self.norm1 = LayerNorm2d(channels)
        self.gnconv = RecursiveGatedConv(channels, order, kernel, global_local)
        self.norm2 = LayerNorm2d(channels)
        self.mlp = Mlp(channels, 4 * channels, use_conv=True)
        begin_at_zero(self.gnconv.proj_out, self.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gnconv(self.norm1(x))
        return in_strips(lambda rows: rows + self.mlp(self.norm2(rows)), x)
