"""From latents to streams and back, for one set of weights.

    z, y2 -> round(z * gain - medians) -> h_s in float64 -> means, scale indexes -> round((y2 - means) * gain) -> bytes

What the reader of a stream must find again exactly, the scale indexes, follows from z's integer symbols
alone (and, with a context model, from the symbols of y2 before them): the networks run in float64 from there on, so
that thread counts, batch sizes, devices and TF32 move a scale by about 1e-15 of itself. Where the writer sees one
closer to a bound between two tables than `guard`, it lists the table that it took, so a reader that is off by less
than the guard cannot take another. The digest of the symbols tells of one that is off by more. The means need no such
care: a reader adds its own, and features move by as little as they do.

Networks take images padded to a multiple of 64. Places of y2 that see padding alone are no part of a stream: their
symbols are zero at both ends, so a reader has their means there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.codec import bitstream
from pretrain.codec.backbone import crop_to
from pretrain.codec.bitstream import ChannelList, Layer, StreamInfo, symbol_digest
from pretrain.codec.config import CodecConfig
from pretrain.codec.context import Code, ContextModel
from pretrain.codec.entropy import (
    MAX_SYMBOL,
    SCALE_LEVELS,
    CoderTables,
    LatentEntropy,
    scale_indexes,
)
from pretrain.codec.gains import RateGains
from pretrain.codec.hyperprior import HyperSynthesis
from pretrain.codec.symbols import SymbolDecoder, encode_symbols, state_bits
from pretrain.errors import BitstreamError, CodecError

Z_STRIDE, LATENT_STRIDE = 64, 16
# Tokens of y2 that h_s predicts at once; bounds its memory, which float64 doubles.
CHUNK_TOKENS = 1 << 14
# Channels for `base`: their numbers, or what names them for an image's y2_hat (C, H/16, W/16).
Choice = Sequence[int] | Callable[[Tensor], Sequence[int]]
Group = slice | Tensor


class Prediction(NamedTuple):
    """What is known of y2 before its symbols: means (float64), tables (int32), and which tables were close calls."""

    means: Tensor
    scales: Tensor
    indexes: Tensor
    close: Tensor


class StreamCoder:
    """Codes latents with frozen copies of h_s and of what else predicts tables (float64), medians and tables.

    Args:
        config: sizes; gives the groups of y2's channels.
        entropy, h_s, context, gains: of the codec; not changed. `gains` are those of z and y2, or None.
        tables: of `entropy`.
        fingerprint: of the codec.
    """

    def __init__(
        self,
        config: CodecConfig,
        entropy: LatentEntropy,
        h_s: HyperSynthesis,
        context: ContextModel | None,
        gains: tuple[RateGains, RateGains] | None,
        tables: CoderTables,
        fingerprint: bytes,
    ):
        self.tables, self.fingerprint, self.guard = tables, fingerprint, config.guard
        self.z_channels = config.z_channels
        self.latent_channels = config.latent_channels
        base = config.base_channels or config.latent_channels
        self.groups: list[Group] = [slice(0, base), slice(base, self.latent_channels)]
        if base == self.latent_channels:
            del self.groups[1]
        with torch.inference_mode(False), torch.no_grad():
            self.h_s = copy.deepcopy(h_s).double().eval().requires_grad_(False)
            self.context = None if context is None else copy.deepcopy(context).double().eval().requires_grad_(False)
            self.gains = None if gains is None else tuple(copy.deepcopy(gain).double() for gain in gains)
            self.medians = entropy.z.quantiles[:, 0, 1].detach().double().clone().view(-1, 1, 1)

    def encode(
        self,
        z: Tensor,
        y2: Tensor,
        height: int,
        width: int,
        rate: int | None = None,
        channels: Choice | None = None,
        rest: bool = True,
    ) -> list[bytes]:
        """Streams of images of height x width pixels, of their z (N, ...) and y2 (N, ...).

        Args:
            rate: 0..255, the step of the range of rates; None for a codec of one rate.
            channels: of y2, for `base`; None: the codec's own.
            rest: code the other channels of such a list, too.

        Raises:
            CodecError: latents that are not finite, or beyond what the coder counts; impossible channels.
        """
        if channels is not None and self.context is not None:
            raise CodecError(
                "channels: this codec has a context model, which reads all of them; its streams have one layer"
            )
        rates = [rate] * len(z)
        z_gain, y2_gain = self._gains(rates)
        y2, covered = y2.double(), covered_places(y2, height, width)
        z_symbols = _symbols(z.double() * z_gain - self.medians)
        predicted = self.predict(z_symbols, rates)

        def quantize(means: Tensor) -> Tensor:
            return _symbols((y2 - means) * y2_gain) * covered

        if self.context is not None:
            predicted = self._in_steps(predicted, y2_gain, lambda _, means, __: quantize(means) / y2_gain + means)
        y2_symbols = quantize(predicted.means)
        lists: list[ChannelList | None] = [None] * len(z)
        if channels is not None:
            y2_hat = (y2_symbols / y2_gain + predicted.means).float()
            lists = [
                ChannelList(tuple(sorted(channels(image) if callable(channels) else channels)), self.latent_channels)
                for image in y2_hat
            ]
        y2_parts = [y2_symbols, predicted.indexes, predicted.close]
        y2_parts = [crop_to(part, height, width, LATENT_STRIDE).cpu() for part in y2_parts]
        parts = (z_symbols.cpu(), *y2_parts)
        streams = []
        for chosen, *image in zip(lists, *parts, strict=True):
            groups = self._groups(chosen)[: None if rest or chosen is None else 1]
            streams.append(bitstream.pack(self.fingerprint, height, width, self._layers(groups, *image), rate, chosen))
        return streams

    def _groups(self, channels: ChannelList | None) -> list[Group]:
        """Channels of each layer, by the stream's list or the codec's configuration."""
        if channels is None:
            return self.groups
        return [torch.tensor(group) for group in (channels.chosen, channels.others) if group]

    def decode(self, streams: Sequence[bytes], last_layer: str | None = None) -> tuple[Tensor, int, int]:
        """y2_hat (N, latent_channels, ...) float32, height and width, of streams of images of one size.

        Channels behind `last_layer` are their means, and no byte behind it is needed.

        Raises:
            BitstreamError: damaged, of another codec or of a newer version.
            CodecError: no stream, streams of several sizes, or no such layer.
        """
        infos, images = self._unpack(streams, last_layer)
        height, width, rates = infos[0].height, infos[0].width, [info.rate for info in infos]
        groups = [self._groups(info.channels) for info in infos]
        z_shape = (self.z_channels, -(-height // Z_STRIDE), -(-width // Z_STRIDE))
        z_indexes = self._z_indexes(torch.empty(z_shape))
        channels = torch.arange(self.latent_channels)
        places = -(-height // LATENT_STRIDE) * -(-width // LATENT_STRIDE)
        readers = [
            SymbolDecoder(layers[0].payload, z_indexes.numel() + places * len(channels[first]))
            for layers, (first, *_) in zip(images, groups, strict=True)
        ]
        z_symbols = torch.stack([reader.read(self.tables.z, z_indexes) for reader in readers])
        # What lies outside belongs to a forged stream, and its digest will not fit.
        z_bounded = z_symbols.view(-1, *z_shape).clamp(-MAX_SYMBOL, MAX_SYMBOL)
        predicted, y2_gain = self.predict(z_bounded.to(self.medians.device), rates), self._gains(rates)[1]
        y2_symbols = torch.zeros(predicted.means.shape, dtype=torch.int32)
        if self.context is None:
            coded = crop_to(y2_symbols, height, width, LATENT_STRIDE)  # a view: what is read here stands there
            indexes = crop_to(predicted.indexes, height, width, LATENT_STRIDE).cpu()
            for image in zip(images, groups, readers, z_symbols, indexes, coded, strict=True):
                self._read_layers(*image)
        else:
            size = height, width
            predicted = self._read_in_steps(images, readers, z_symbols, predicted, y2_gain, y2_symbols, size)
        y2_hat = y2_symbols.to(predicted.means.device) / y2_gain + predicted.means
        return y2_hat.float(), height, width

    def state_bits(self, z_places: int, y2_places: int) -> int:
        """Bits of a stream's layers beside those of their symbols, of an image with so many places of z and of y2."""
        channels = torch.arange(self.latent_channels)
        counts = [y2_places * len(channels[group]) for group in self.groups]
        return sum(state_bits(count) for count in [counts[0] + z_places * self.z_channels, *counts[1:]])

    @torch.no_grad()
    def likelihoods(self, z_values: Tensor, y2_residuals: Tensor, y2_scales: Tensor) -> dict[str, Tensor]:
        """What the tables give to quantized latents, 2^-bits (float32), without making bytes.

        Args:
            z_values: (N, z_channels, ...) z_hat, times its gain.
            y2_residuals, y2_scales: (N, latent_channels, ...) y2_hat less its means, and scales, times their gain.
        """
        z_symbols = (z_values - self.medians.to(z_values)).round()
        z_indexes = torch.arange(self.z_channels, device=z_symbols.device)[:, None, None].expand(z_symbols.shape)
        y2_indexes, _ = scale_indexes(y2_scales.double())
        return {
            "y2": self.tables.y2.likelihoods(y2_residuals.round(), y2_indexes),
            "z": self.tables.z.likelihoods(z_symbols, z_indexes),
        }

    def predict(self, z_symbols: Tensor, rates: Sequence[int | None]) -> Prediction:
        """What z's symbols (N, z_channels, H/64, W/64) say of y2."""
        with torch.autocast(z_symbols.device.type, enabled=False):
            z_gain, y2_gain = self._gains(rates)
            z_hat = (z_symbols.double() + self.medians) / z_gain
            means, scales = self._in_chunks(self.h_s, z_hat, tokens=16 * z_hat.shape[-1] * z_hat.shape[-2])
        return Prediction(means, scales, *scale_indexes(scales * y2_gain, self.guard))

    def _in_steps(self, first: Prediction, y2_gain: Tensor, code: Code) -> Prediction:
        """The context model's prediction, on top of that of z, where `code` gives y2_hat step by step."""
        assert self.context is not None
        context, tokens = self.context, first.means.shape[-1] * first.means.shape[-2]

        def correct(number: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self._in_chunks(partial(context, number), *inputs, tokens=tokens)

        with torch.autocast(first.means.device.type, enabled=False):
            means, scales = context.predict(first.means, first.scales, code, correct)
        return Prediction(means, scales, *scale_indexes(scales * y2_gain, self.guard))

    @staticmethod
    def _in_chunks(
        network: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Means and scales of a batch, as many images at once as CHUNK_TOKENS allow."""
        size = max(CHUNK_TOKENS // tokens, 1)
        chunks = [network(*parts) for parts in zip(*(tensor.split(size) for tensor in inputs), strict=True)]
        means, scales = zip(*chunks, strict=True)
        return torch.cat(means), torch.cat(scales)

    def _gains(self, rates: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """Gains of z and y2, each (N, C, 1, 1) float64; ones for a codec of one rate."""
        if self.gains is None:
            one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device=self.medians.device)
            return one, one
        position = torch.tensor(rates, dtype=torch.float64, device=self.medians.device) / bitstream.MAX_RATE
        z_gain, y2_gain = (gain(position) for gain in self.gains)
        return z_gain, y2_gain

    def _unpack(self, streams: Sequence[bytes], last_layer: str | None) -> tuple[list[StreamInfo], list[list[Layer]]]:
        """What the headers say, of images of one size, and the layers of each up to `last_layer`, checked."""
        if last_layer is not None and self.context is not None:
            raise CodecError(
                f"last_layer={last_layer}: this codec has a context model, so its streams have no layers to stop at"
            )
        for stream in streams if last_layer is not None else ():
            names = self._names(bitstream.describe(stream))
            if last_layer not in names:
                raise CodecError(f"last_layer={last_layer} is no layer of this stream, which has {', '.join(names)}")
        wanted = None if last_layer is None else bitstream.LAYER_NAMES.index(last_layer) + 1
        unpacked = [bitstream.unpack(stream, self.fingerprint, wanted) for stream in streams]
        sizes = {(info.height, info.width) for info, _ in unpacked}
        if len(sizes) != 1:
            raise CodecError(f"{len(streams)} streams of {len(sizes)} image sizes; decode sizes one by one")
        for info, _ in unpacked:
            if tuple(info.layers) != (names := self._names(info)):
                raise BitstreamError(f"stream has layers {list(info.layers)}, this codec writes {list(names)}")
            if (info.rate is None) != (self.gains is None):
                raise BitstreamError("stream is damaged: whether it names a rate does not fit its codec")
        return [info for info, _ in unpacked], [layers for _, layers in unpacked]

    def _names(self, info: StreamInfo) -> tuple[str, ...]:
        """The layers that a stream of this codec with such a header has."""
        if info.channels is None:
            return bitstream.LAYER_NAMES[: len(self.groups)]
        if self.context is not None or info.channels.total != self.latent_channels:
            raise BitstreamError(
                f"stream is damaged: it lists channels of {info.channels.total}, this codec has "
                f"{self.latent_channels}{', which its context model keeps together' if self.context else ''}"
            )
        return bitstream.LAYER_NAMES[: min(len(info.layers), len(self._groups(info.channels)))]

    def _read_layers(
        self,
        layers: Sequence[Layer],
        groups: Sequence[Group],
        reader: SymbolDecoder,
        z_symbols: Tensor,
        indexes: Tensor,
        y2_symbols: Tensor,
    ) -> None:
        """Fill the groups of y2_symbols (C, H, W) that were sent; z's were read from the first layer already."""
        for number, (layer, channels) in enumerate(zip(layers, groups, strict=False)):
            chosen = guarded(indexes[channels].flatten(), layer)
            if number:
                reader = SymbolDecoder(layer.payload, chosen.numel())
            found = reader.read(self.tables.y2, chosen)
            _check_digest(number, layer, found if number else torch.cat([z_symbols, found]))
            y2_symbols[channels] = found.view(y2_symbols[channels].shape)

    def _read_in_steps(
        self,
        images: Sequence[Sequence[Layer]],
        readers: Sequence[SymbolDecoder],
        z_symbols: Tensor,
        first: Prediction,
        y2_gain: Tensor,
        y2_symbols: Tensor,
        size: tuple[int, int],
    ) -> Prediction:
        """Fill y2_symbols (N, C, H, W), step by step; returns the prediction that their means are added to."""
        coded = crop_to(y2_symbols, *size, LATENT_STRIDE)
        parts = [[symbols] for symbols in z_symbols]

        def read(places: Tensor, means: Tensor, scales: Tensor) -> Tensor:
            shown = crop_to(places, *size, LATENT_STRIDE).cpu()
            indexes = crop_to(scale_indexes(scales * y2_gain)[0], *size, LATENT_STRIDE).cpu()
            for number, (layer,) in enumerate(images):
                chosen = guarded(indexes[number].flatten(), layer, shown.flatten()).view(shown.shape)[shown]
                found = readers[number].read(self.tables.y2, chosen)
                coded[number][shown] = found
                parts[number].append(found)
            return y2_symbols.clamp(-MAX_SYMBOL, MAX_SYMBOL).to(means.device) / y2_gain + means

        predicted = self._in_steps(first, y2_gain, read)
        for (layer,), symbols in zip(images, parts, strict=True):
            _check_digest(0, layer, torch.cat(symbols))
        return predicted

    def _layers(
        self, groups: Sequence[Group], z_symbols: Tensor, y2_symbols: Tensor, indexes: Tensor, close: Tensor
    ) -> list[Layer]:
        layers = []
        for number, channels in enumerate(groups):
            symbols, chosen = y2_symbols[channels], indexes[channels]
            if self.context is None:
                parts = [(self.tables.y2, symbols.flatten(), chosen.flatten())]
            else:
                turns = [step.places(symbols) for step in self.context.steps]
                parts = [(self.tables.y2, symbols[places], chosen[places]) for places in turns]
            if number == 0:
                parts.insert(0, (self.tables.z, z_symbols.flatten(), self._z_indexes(z_symbols)))
            digest = symbol_digest(torch.cat([symbols for _, symbols, _ in parts]))
            layers.append(Layer(encode_symbols(parts), digest, guard_list(chosen, close[channels])))
        return layers

    @staticmethod
    def _z_indexes(z_symbols: Tensor) -> Tensor:
        """Each channel of z (C, H, W) has a table of its own."""
        return torch.arange(len(z_symbols), dtype=torch.int32).repeat_interleave(z_symbols[0].numel())


def covered_places(latents: Tensor, height: int, width: int) -> Tensor:
    """(H, W) bool on the device of latents (..., H, W): the places that see an image of height x width pixels."""
    covered = torch.zeros(latents.shape[-2:], dtype=torch.bool, device=latents.device)
    crop_to(covered, height, width, LATENT_STRIDE).fill_(True)
    return covered


def guard_list(indexes: Tensor, close: Tensor) -> dict[int, int]:
    """Table by place of the close calls among a layer's indexes (C, H, W)."""
    places = close.flatten().nonzero()[:, 0].tolist()
    return dict(zip(places, indexes.flatten()[places].tolist(), strict=True))


def guarded(indexes: Tensor, layer: Layer, places: Tensor | None = None) -> Tensor:
    """The reader's own indexes (flat), where the writer did not list its own (BitstreamError: impossible ones).

    Args:
        places: (flat, bool) those that are read now; the list speaks of the others once they are.
    """
    if not layer.guard:
        return indexes
    listed = torch.tensor(list(layer.guard))
    tables = torch.tensor(list(layer.guard.values()), dtype=torch.int32)
    fits = int(listed.max()) < len(indexes)
    if fits and places is not None:
        listed, tables = listed[places[listed]], tables[places[listed]]
    if not fits or bool(((tables - indexes[listed]).abs() > 1).any()) or bool((tables >= SCALE_LEVELS).any()):
        raise BitstreamError("stream is damaged: its guard list does not fit its symbols")
    indexes = indexes.clone()
    indexes[listed] = tables
    return indexes


def _check_digest(number: int, layer: Layer, symbols: Tensor) -> None:
    if symbol_digest(symbols) != layer.digest:
        raise BitstreamError(
            f"layer {bitstream.LAYER_NAMES[number]} decodes to other symbols than were encoded; "
            "the arithmetic of this machine is too far from that of the encoder's"
        )


def _symbols(values: Tensor) -> Tensor:
    """Rounded to int32 (CodecError where that is not possible)."""
    if not bool((values.abs() < MAX_SYMBOL).all()):
        raise CodecError("latents are not finite or beyond the coder's range; the codec's training diverged")
    return values.round().int()
