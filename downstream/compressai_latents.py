"""Latents of CompressAI's image models: y_hat of bmshj2018-hyperprior, as in Liu's paper, or of any other of its zoo.

    x -> g_a -> y -> h_a -> z -> EntropyBottleneck -> z_hat -> h_s -> scales (and means) of y

`base` holds z and the chosen channels of y, `rest` the others, each one rANS payload of CompressAI's coder with the
model's own tables. So `base` and `rest` together decode to the symbols, and the image, of `model.compress`. h_a reads
all of y, so the encoder of a model with a hyperprior computes all of it, whatever is sent; without a hyperprior
(bmshj2018-factorized) only the chosen channels are computed.

A model that predicts each place from all channels before it (mbt2018, cheng2020), or has a range of rates (the -vbr
ones), cannot be sent channel by channel: its streams have one layer, as `model.compress` writes them.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from compressai.models import FactorizedPrior, FactorizedPriorReLU, MeanScaleHyperprior, ScaleHyperprior
from torch import Tensor, nn

from downstream.compressai_models import QUALITY, TABLES, level_of
from downstream.latents import LatentCodec, Received
from pretrain.codec import bitstream
from pretrain.codec.backbone import pad_to
from pretrain.codec.bitstream import ChannelList, Layer, StreamInfo, symbol_digest
from pretrain.codec.coder import Choice
from pretrain.codec.entropy import CoderTable
from pretrain.codec.symbols import SymbolDecoder, encode_symbols
from pretrain.errors import BitstreamError, CodecError

STEP = 64  # sides are padded to multiples of it, which all models' strides divide
LATENT_STRIDE = 16
SEPARABLE = (FactorizedPrior, FactorizedPriorReLU, ScaleHyperprior, MeanScaleHyperprior)


def create_latents(model: Any, device: torch.device, quality: int = QUALITY) -> CompressAILatents:
    """The latents of a CompressAI model, in two layers where it can be sent channel by channel.

    Args:
        quality: 1..8, of a -vbr model, which has a range of rates; of others it is that of their weights.
    """
    return SeparableLatents(model, device) if type(model) in SEPARABLE else WholeLatents(model, device, quality)


class CompressAILatents(LatentCodec):
    """What all models have in common.

    Args:
        model: frozen; its tables are made here where its weights came without.
        level: as `level_of` gives it; a stream of another one is another codec's.
    """

    def __init__(self, model: Any, device: torch.device, level: dict[str, int] | None = None):
        self.model, self.device, self.level = model.eval().requires_grad_(False), device, level or {}
        if hasattr(model, "gayn2zqstep"):  # the step of z, and with it the tables, depends on the rate
            model.update(force=True, scale=model.Gain[self.level["s"]])
        else:
            model.update()
        model.to(device)
        self.channels = _input_channels(model.g_s)
        self.fingerprint = _fingerprint(model, self.level)

    def decode_image(self, stream: bytes) -> Tensor:
        """The image (1, 3, H, W) in 0..1 of a stream with all its layers."""
        info = bitstream.describe(stream)
        y_hat = self.decode(stream)
        with torch.no_grad():
            return self.model.g_s(y_hat).clamp_(0, 1)[..., : info.height, : info.width]

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise CodecError(f"images are {tuple(images.shape)} {images.dtype}; they must be (N, 3, H, W) uint8")
        if wrong := bitstream.check_size(*images.shape[-2:]):
            raise CodecError(f"image of {wrong}; resize or tile it")
        return pad_to(images.to(self.device).float().div(255), STEP)


class Predicted(NamedTuple):
    """Scales (None: each channel has a table of its own) and means of y, each (N, C, h, w)."""

    scales: Tensor | None
    means: Tensor


class SeparableLatents(CompressAILatents):
    """Latents whose channels are coded each by itself: factorized priors and hyperpriors."""

    def __init__(self, model: Any, device: torch.device):
        super().__init__(model, device)
        self.hyper = isinstance(model, ScaleHyperprior)
        bottleneck = _table(model.entropy_bottleneck)
        self.y_table = _table(model.gaussian_conditional) if self.hyper else bottleneck
        self.z_table = bottleneck

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            y = self.model.g_a(self._pixels(images))
            means = self._predict(self._z_symbols(y), y.shape).means
            return self._symbols(y, means) + means

    @torch.no_grad()
    def encode(self, image: Tensor, channels: Choice | None = None, rest: bool = False) -> bytes:
        with torch.autocast(self.device.type, enabled=False):
            pixels = self._pixels(image[None])
            if self.hyper or rest or channels is None or callable(channels):
                y, carried = self.model.g_a(pixels), list(range(self.channels))
            else:
                carried = list(self._list(channels).chosen)
                y = self._chosen_of_transform(pixels, carried)
            z_symbols = self._z_symbols(y)
            predicted = self._predict(z_symbols, (1, self.channels, *y.shape[-2:]))
            symbols = self._symbols(y, predicted.means[:, carried])
            if callable(channels):
                channels = channels((symbols + predicted.means)[0])
        chosen = None if channels is None else self._list(channels)
        groups: list[Any] = [range(self.channels)] if chosen is None else [chosen.chosen, chosen.others]
        layers = []
        for number, group in enumerate(groups[: 2 if rest else 1]):
            if not group:  # every channel is in the base
                break
            places = [carried.index(channel) for channel in group]
            parts = [(self.y_table, symbols[0, places].cpu().int().flatten(), self._tables(predicted, list(group)))]
            if number == 0 and self.hyper:
                parts.insert(0, (self.z_table, z_symbols.cpu().int().flatten(), _by_channel(z_symbols).flatten()))
            digest = symbol_digest(torch.cat([part for _, part, _ in parts]))
            layers.append(Layer(encode_symbols(parts), digest))
        height, width = image.shape[-2:]
        return bitstream.pack(self.fingerprint, height, width, layers, None, chosen)

    def receive(self, stream: bytes) -> Received:
        info, channels, latents = self._read(stream, 1)
        return Received(latents, None if info.channels is None else tuple(channels), info.height, info.width)

    def decode(self, stream: bytes) -> Tensor:
        info, channels, latents = self._read(stream, None)
        if len(channels) < self.channels:
            raise CodecError(f"stream carries {len(channels)} of {self.channels} channels; it was written without rest")
        return latents if info.channels is None else latents[:, torch.tensor(channels).argsort()]

    @torch.no_grad()
    def _read(self, stream: bytes, num_layers: int | None) -> tuple[StreamInfo, list[int], Tensor]:
        """The header, the channels in the order of the layers, and their y_hat (1, n, h, w)."""
        info, layers = bitstream.unpack(stream, self.fingerprint, num_layers)
        groups: list[Any] = [range(self.channels)]
        if info.channels is not None:
            groups = [info.channels.chosen, info.channels.others]
        if (info.channels and info.channels.total != self.channels) or len(layers) > sum(map(bool, groups)):
            raise BitstreamError(f"stream is damaged: its layers do not fit a latent of {self.channels} channels")
        rows, columns = (-(-side // STEP) for side in (info.height, info.width))
        shape = (1, self.channels, rows * STEP // LATENT_STRIDE, columns * STEP // LATENT_STRIDE)
        z_shape = (1, self.model.entropy_bottleneck.channels if self.hyper else 0, rows, columns)
        num_places, num_z = shape[2] * shape[3], z_shape[1] * rows * columns
        readers = [
            SymbolDecoder(layer.payload, len(group) * num_places + (num_z if number == 0 else 0))
            for number, (layer, group) in enumerate(zip(layers, groups, strict=False))
        ]
        z_symbols = torch.zeros(z_shape, dtype=torch.int32)
        if self.hyper:
            z_symbols = readers[0].read(self.z_table, _by_channel(z_symbols).flatten()).view(z_shape)
        with torch.autocast(self.device.type, enabled=False):
            predicted = self._predict(z_symbols.to(self.device), shape)
        carried: list[int] = []
        found: list[Tensor] = []
        for number, (layer, group, reader) in enumerate(zip(layers, groups, readers, strict=False)):
            symbols = reader.read(self.y_table, self._tables(predicted, list(group)))
            if symbol_digest(symbols if number or not self.hyper else torch.cat([z_symbols.flatten(), symbols])) != (
                layer.digest
            ):
                raise BitstreamError(
                    f"layer {bitstream.LAYER_NAMES[number]} decodes to other symbols than were encoded; CompressAI's "
                    "models read a stream only where their arithmetic is that of the machine that wrote it"
                )
            carried += group
            found.append(symbols.view(len(group), *shape[2:]))
        return info, carried, torch.cat(found)[None].to(self.device) + predicted.means[:, carried]

    def _list(self, channels: Any) -> ChannelList:
        return ChannelList(tuple(sorted(channels)), self.channels)

    def _chosen_of_transform(self, pixels: Tensor, channels: list[int]) -> Tensor:
        """`channels` of y; the last convolution computes only these."""
        last = self.model.g_a[-1]
        inner = self.model.g_a[:-1](pixels)
        bias = None if last.bias is None else last.bias[channels]
        return F.conv2d(inner, last.weight[channels], bias, last.stride, last.padding)

    def _z_symbols(self, y: Tensor) -> Tensor:
        """Symbols (N, ...) of z, float; none without a hyperprior."""
        if not self.hyper:
            return y[:, :0]
        z = self.model.h_a(y if isinstance(self.model, MeanScaleHyperprior) else y.abs())
        return (z - self._medians()).round()

    def _predict(self, z_symbols: Tensor, shape: tuple[int, ...]) -> Predicted:
        """What z says of y (N, C, h, w), as CompressAI's `decompress` finds it."""
        if not self.hyper:
            return Predicted(None, self._medians().expand(shape))
        parameters = self.model.h_s(z_symbols + self._medians())
        if isinstance(self.model, MeanScaleHyperprior):
            return Predicted(*parameters.chunk(2, 1))
        return Predicted(parameters, torch.zeros_like(parameters))

    def _tables(self, predicted: Predicted, channels: list[int]) -> Tensor:
        """The table (flat int32, CPU) of each symbol of `channels` of one image: those of `build_indexes`."""
        if predicted.scales is None:
            places = predicted.means[0, 0].numel()
            return torch.tensor(channels, dtype=torch.int32).repeat_interleave(places)
        # CompressAI compares all scales with each of 63 bounds; a search gives the same, and only where it is needed.
        gaussian = self.model.gaussian_conditional
        scales = gaussian.lower_bound_scale(predicted.scales[0, channels])
        return torch.bucketize(scales, gaussian.scale_table[:-1], out_int32=True).flatten().cpu()

    def _medians(self) -> Tensor:
        """(1, channels of the bottleneck, 1, 1)."""
        return self.model.entropy_bottleneck._get_medians().view(1, -1, 1, 1)

    @staticmethod
    def _symbols(y: Tensor, means: Tensor) -> Tensor:
        return (y - means).round()


class WholeLatents(CompressAILatents):
    """Latents that are sent whole, by the model's own `compress`; `channels` must be None.

    Args:
        quality: 1..8, of a -vbr model.
    """

    def __init__(self, model: Any, device: torch.device, quality: int = QUALITY):
        super().__init__(model, device, level_of(model, quality))
        self._shapes: dict[tuple[int, int], Any] = {}

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """As in the model's forward pass; those of its streams differ where a context model shifts what is rounded."""
        with torch.autocast(self.device.type, enabled=False):
            return self._input_of_synthesis(lambda: self.model(self._pixels(images), **self.level))

    def need_channels(self) -> None:
        raise CodecError(
            f"{type(self.model).__name__} predicts from all channels, so none can be sent alone; use gate=none, or "
            "one of bmshj2018-factorized, bmshj2018-hyperprior, mbt2018-mean"
        )

    @torch.no_grad()
    def encode(self, image: Tensor, channels: Choice | None = None, rest: bool = False) -> bytes:
        if channels is not None:
            self.need_channels()
        coded = self.model.compress(self._pixels(image[None]), **self.level)
        strings = [strings[0] for strings in coded["strings"]]
        payload = b"".join(struct.pack("<I", len(string)) + string for string in strings)
        height, width = image.shape[-2:]
        return bitstream.pack(self.fingerprint, height, width, [Layer(payload, 0)])

    def payload_bytes(self, stream: bytes) -> int:
        """Bytes of the model's strings: their lengths are framing, which CompressAI's own figures leave out, too."""
        _, (layer,) = bitstream.unpack(stream, self.fingerprint)
        return sum(map(len, self._strings(layer.payload)))

    def receive(self, stream: bytes) -> Received:
        info = bitstream.describe(stream)
        return Received(self.decode(stream), None, info.height, info.width)

    @torch.no_grad()
    def decode(self, stream: bytes) -> Tensor:
        info, (layer,) = bitstream.unpack(stream, self.fingerprint)
        strings = [[string] for string in self._strings(layer.payload)]
        rows, columns = (-(-side // STEP) for side in (info.height, info.width))
        shape = self._shape(rows * STEP, columns * STEP)
        return self._input_of_synthesis(lambda: self.model.decompress(strings, shape, **self.level))

    @staticmethod
    def _strings(payload: bytes) -> list[bytes]:
        """What `encode` put in a row."""
        strings, position = [], 0
        while position < len(payload):
            (length,) = struct.unpack_from("<I", payload, position)
            strings.append(payload[position + 4 : position + 4 + length])
            position += 4 + length
        return strings

    def _shape(self, height: int, width: int) -> Any:
        """What `decompress` wants to know of an image of this size, each model in a form of its own."""
        if (height, width) not in self._shapes:
            blank = torch.zeros(1, 3, height, width, device=self.device)
            self._shapes[height, width] = self.model.compress(blank, **self.level)["shape"]
        return self._shapes[height, width]

    def _input_of_synthesis(self, run: Any) -> Tensor:
        """y_hat, which these models do not return: what g_s gets while `run` runs."""
        seen: list[Tensor] = []
        hook = self.model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            run()
        finally:
            hook.remove()
        return seen[0]


def _table(model: Any) -> CoderTable:
    """The tables as CompressAI made them, or as they came with the weights."""
    return CoderTable(*(getattr(model, name).int().cpu() for name in TABLES))


def _by_channel(values: Tensor) -> Tensor:
    """int32 of the shape of `values` (N, C, h, w): each its channel's number."""
    return torch.arange(values.shape[1], dtype=torch.int32)[:, None, None].expand(values.shape).contiguous()


def _input_channels(network: nn.Module) -> int:
    """Channels that the first convolution of `network` takes."""
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)).in_channels


def _fingerprint(model: nn.Module, level: dict[str, int]) -> bytes:
    """Eight bytes that name weights, tables and level."""
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update("".join(f" {name}={value}" for name, value in level.items()).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]
