"""The hyperprior: h_a, y2 (H/16) -> z (H/64), and h_s, z_hat -> means and scales of y2, with ViT blocks.

      y2 -> 1x1 -> ViT -> 3x3 /2 -> ViT -> 3x3 /2 -> ViT -> 1x1 -> z
      z_hat -> 1x1 -> ViT -> x2 -> ViT -> x2 -> ViT -> 1x1 -> means, scales

One block at each of three scales models dependencies over the whole latent. Attention is global while a side has at
most `window` tokens and windowed above, so the cost of a picture grows with its number of pixels. With
`hyperprior: conv` each block is a pair of 3x3 convolutions, as in hyperpriors without attention.

Sources: DICM (Tang, Yi, Wang 2025), Fig. 3; mean-scale hyperprior (Minnen, Ballé, Toderici 2018); ViT (Dosovitskiy
et al. 2021) with relative positions (Liu et al. 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.codec.config import CodecConfig
from pretrain.codec.residual import begin_at_zero


class WindowedAttention(nn.Module):
    """Multi-head attention over (N, H, W, C) with learned relative positions, in windows of at most `window` a side."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int):
        super().__init__()
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)
        self.positions = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))

    def forward(self, x: Tensor) -> Tensor:
        count, height, width, dim = x.shape
        rows, columns = min(height, self.window), min(width, self.window)
        pad_bottom, pad_right = -height % rows, -width % columns
        x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        down, across = x.shape[1] // rows, x.shape[2] // columns
        tokens = x.view(count, down, rows, across, columns, dim).transpose(2, 3).reshape(-1, rows * columns, dim)
        qkv = self.qkv(tokens).view(len(tokens), rows * columns, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self._bias(rows, columns).to(query.dtype)
        if pad_bottom or pad_right:
            bias = bias + self._padding_mask(x, height, width, rows, columns, count).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        mixed = mixed.view(count, down, across, rows, columns, dim).transpose(2, 3)
        return mixed.reshape(count, down * rows, across * columns, dim)[:, :height, :width]

    def _bias(self, rows: int, columns: int) -> Tensor:
        """(heads, rows * columns, rows * columns): the learned value of each pair's offset."""
        device = self.positions.device
        y = torch.arange(rows, device=device).repeat_interleave(columns)
        x = torch.arange(columns, device=device).repeat(rows)
        offset_y = y[:, None] - y[None, :] + self.window - 1
        offset_x = x[:, None] - x[None, :] + self.window - 1
        return self.positions[:, offset_y, offset_x]

    def _padding_mask(self, padded: Tensor, height: int, width: int, rows: int, columns: int, count: int) -> Tensor:
        """(windows, 1, 1, rows * columns): minus infinity at keys that are padding."""
        down, across = padded.shape[1] // rows, padded.shape[2] // columns
        outside = torch.zeros(padded.shape[1:3], device=padded.device)
        outside[height:] = float("-inf")
        outside[:, width:] = float("-inf")
        windows = outside.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, 1, 1, -1)
        return windows.repeat(count, 1, 1, 1)


class ViTBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); (N, C, H, W) kept. Training starts from the identity."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        dim = config.hyper_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowedAttention(dim, config.hyper_heads, config.hyper_head_dim, config.window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        begin_at_zero(self.attention.proj, self.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """x + two 3x3 convolutions of LeakyReLU x; (N, C, H, W) kept. Training starts from the identity."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        dim = config.hyper_dim
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        begin_at_zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x))))


def create_block(config: CodecConfig) -> nn.Module:
    """A block of the kind `config.hyperprior` names."""
    return ViTBlock(config) if config.hyperprior == "vit" else ConvBlock(config)


class HyperAnalysis(nn.Sequential):
    """h_a: y2 (N, latent_channels, H/16, W/16) -> z (N, z_channels, H/64, W/64)."""

    def __init__(self, config: CodecConfig):
        dim = config.hyper_dim
        super().__init__(
            nn.Conv2d(config.latent_channels, dim, 1),
            create_block(config),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
            create_block(config),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
            create_block(config),
            nn.Conv2d(dim, config.z_channels, 1),
        )

    @property
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """Those between the blocks, in order."""
        return self[0], self[2], self[4], self[6]  # type: ignore[return-value]


class HyperSynthesis(nn.Module):
    """h_s: z_hat (N, z_channels, H/64, W/64) -> means and scales of y2, each (N, latent_channels, H/16, W/16).

    Scales are raw; the Gaussian conditional bounds them from below, as CompressAI does.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        dim = config.hyper_dim
        self.body = nn.Sequential(
            nn.Conv2d(config.z_channels, dim, 1),
            create_block(config),
            nn.Conv2d(dim, 4 * dim, 1),
            nn.PixelShuffle(2),
            create_block(config),
            nn.Conv2d(dim, 4 * dim, 1),
            nn.PixelShuffle(2),
            create_block(config),
        )
        self.head = nn.Conv2d(dim, 2 * config.latent_channels, 1)
        # Scales start at one: at zero they would sit on the lower bound, where gradients are one-sided.
        bias = torch.cat([torch.zeros(config.latent_channels), torch.ones(config.latent_channels)])
        self.head.bias = nn.Parameter(bias)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """Those between the blocks, in order, and the head."""
        return self.body[0], self.body[2], self.body[5], self.head  # type: ignore[return-value]

    def forward(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        means, scales = self.head(self.body(z_hat)).chunk(2, dim=1)
        return means, scales
