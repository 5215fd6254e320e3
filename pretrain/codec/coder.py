"""From latents to streams and back, for one set of weights.

    z, y2 -> round(z - medians) -> h_s in float64 -> means, scale indexes -> round(y2 - means) -> rANS

What the reader of a stream must find again exactly, the scale indexes, follows from z's integer symbols
alone: h_s runs in float64 from there on, so that thread counts, batch sizes, devices and TF32 move a scale by
about 1e-15 of itself and practically never across a bound between two tables. Where that happens all the
same, the digest of the symbols tells. The means need no such care: a reader adds its own, and features move
by as little as they do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.codec import bitstream
from pretrain.codec.bitstream import Layer, symbol_digest
from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import (
    MAX_SYMBOL,
    CoderTables,
    LatentEntropy,
    SymbolDecoder,
    encode_symbols,
    scale_indexes,
)
from pretrain.codec.hyperprior import HyperSynthesis
from pretrain.errors import BitstreamError, CodecError

Z_STRIDE = 64
# Tokens of y2 that h_s predicts at once; bounds its memory, which float64 doubles.
CHUNK_TOKENS = 1 << 14


class StreamCoder:
    """Codes latents with frozen copies of h_s (float64), medians and tables.

    Args:
        config: sizes; gives the groups of y2's channels.
        entropy, h_s: of the codec; not changed.
        tables: of `entropy`.
        fingerprint: of the codec.
    """

    def __init__(
        self,
        config: CodecConfig,
        entropy: LatentEntropy,
        h_s: HyperSynthesis,
        tables: CoderTables,
        fingerprint: bytes,
    ):
        self.tables, self.fingerprint = tables, fingerprint
        self.z_channels = config.z_channels
        base, latent_channels = config.base_channels or config.latent_channels, config.latent_channels
        self.groups = [slice(0, base), slice(base, latent_channels)][: 1 if base == latent_channels else 2]
        with torch.inference_mode(False), torch.no_grad():
            self.h_s = copy.deepcopy(h_s).double().eval().requires_grad_(False)
            self.medians = entropy.z.quantiles[:, 0, 1].detach().double().clone().view(-1, 1, 1)

    def encode(self, z: Tensor, y2: Tensor, height: int, width: int) -> list[bytes]:
        """Streams of images of height x width pixels, of their z (N, ...) and y2 (N, ...).

        Raises:
            CodecError: latents that are not finite, or beyond what the coder counts.
        """
        z_symbols = _symbols(z.double() - self.medians)
        means, indexes = self.predict(z_symbols)
        y2_symbols = _symbols(y2.double() - means)
        images = zip(z_symbols.cpu(), y2_symbols.cpu(), indexes.cpu(), strict=True)
        return [bitstream.pack(self.fingerprint, height, width, self._layers(*image)) for image in images]

    def decode(self, streams: Sequence[bytes], last_layer: str | None = None) -> tuple[Tensor, int, int]:
        """y2_hat (N, latent_channels, ...) float32, height and width, of streams of images of one size.

        Channels behind `last_layer` are their means, and no byte behind it is needed.

        Raises:
            BitstreamError: damaged, of another codec or of a newer version.
            CodecError: no stream, streams of several sizes, or no such layer.
        """
        height, width, images = self._unpack(streams, last_layer)
        z_shape = (self.z_channels, -(-height // Z_STRIDE), -(-width // Z_STRIDE))
        z_indexes = self._z_indexes(torch.empty(z_shape))
        num_base = z_indexes.numel() + 16 * z_shape[1] * z_shape[2] * self.groups[0].stop
        readers = [SymbolDecoder(layers[0].payload, num_base) for layers in images]
        z_symbols = torch.stack([reader.read(self.tables.z, z_indexes) for reader in readers])
        # What lies outside belongs to a forged stream, and its digest will not fit.
        z_bounded = z_symbols.view(-1, *z_shape).clamp(-MAX_SYMBOL, MAX_SYMBOL)
        means, indexes = self.predict(z_bounded.to(self.medians.device))

        y2_symbols = torch.zeros(means.shape, dtype=torch.int32)
        found = zip(images, readers, z_symbols, indexes.cpu(), y2_symbols, strict=True)
        for layers, reader, z_one, indexes_one, y2_one in found:
            base, *rest = zip(bitstream.LAYER_NAMES, layers, self.groups, strict=False)
            self._read_group(reader, *base, indexes_one, y2_one, before=z_one)
            for name, layer, channels in rest:
                reader = SymbolDecoder(layer.payload, indexes_one[channels].numel())
                self._read_group(reader, name, layer, channels, indexes_one, y2_one)
        return (y2_symbols.to(means.device) + means).float(), height, width

    def predict(self, z_symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Means (float64) and scale indexes (int32) of y2, of z's symbols (N, z_channels, H/64, W/64)."""
        with torch.autocast(z_symbols.device.type, enabled=False):
            z_hat = z_symbols.double() + self.medians
            tokens = 16 * z_hat.shape[-1] * z_hat.shape[-2]
            chunks = [self.h_s(chunk) for chunk in z_hat.split(max(CHUNK_TOKENS // tokens, 1))]
        means, scales = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
        return means, scale_indexes(scales)

    def _unpack(self, streams: Sequence[bytes], last_layer: str | None) -> tuple[int, int, list[list[Layer]]]:
        """Height and width of the images, and the layers of each up to `last_layer`, checked."""
        names = bitstream.LAYER_NAMES[: len(self.groups)]
        if last_layer is not None and last_layer not in names:
            raise CodecError(f"last_layer={last_layer} is no layer of this codec, which writes {', '.join(names)}")
        wanted = None if last_layer is None else names.index(last_layer) + 1
        unpacked = [bitstream.unpack(stream, self.fingerprint, wanted) for stream in streams]
        sizes = {(info.height, info.width) for info, _ in unpacked}
        if len(sizes) != 1:
            raise CodecError(f"{len(streams)} streams of {len(sizes)} image sizes; decode sizes one by one")
        for info, _ in unpacked:
            if tuple(info.layers) != names:
                raise BitstreamError(f"stream has layers {list(info.layers)}, this codec writes {list(names)}")
        return *sizes.pop(), [layers for _, layers in unpacked]

    def _read_group(
        self,
        reader: SymbolDecoder,
        name: str,
        layer: Layer,
        channels: slice,
        indexes: Tensor,
        y2_symbols: Tensor,
        before: Tensor | None = None,
    ) -> None:
        """Fill `channels` of y2_symbols (C, H, W); `before` is what of the layer was read already."""
        chosen = indexes[channels]
        found = reader.read(self.tables.y2, chosen.flatten())
        if symbol_digest(found if before is None else torch.cat([before, found])) != layer.digest:
            raise BitstreamError(
                f"layer {name} decodes to other symbols than were encoded; "
                "the arithmetic of this machine is too far from that of the encoder's"
            )
        y2_symbols[channels] = found.view(chosen.shape)

    def _layers(self, z_symbols: Tensor, y2_symbols: Tensor, indexes: Tensor) -> list[Layer]:
        layers = []
        for number, channels in enumerate(self.groups):
            parts = [(self.tables.y2, y2_symbols[channels].flatten(), indexes[channels].flatten())]
            if number == 0:
                parts.insert(0, (self.tables.z, z_symbols.flatten(), self._z_indexes(z_symbols)))
            digest = symbol_digest(torch.cat([symbols for _, symbols, _ in parts]))
            layers.append(Layer(encode_symbols(parts), digest))
        return layers

    @staticmethod
    def _z_indexes(z_symbols: Tensor) -> Tensor:
        """Each channel of z (C, H, W) has a table of its own."""
        return torch.arange(len(z_symbols), dtype=torch.int32).repeat_interleave(z_symbols[0].numel())


def _symbols(values: Tensor) -> Tensor:
    """Rounded to int32 (CodecError where that is not possible)."""
    if not bool((values.abs() < MAX_SYMBOL).all()):
        raise CodecError("latents are not finite or beyond the coder's range; the codec's training diverged")
    return values.round().int()
