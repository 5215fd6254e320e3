"""`FeatureCodec`: images to small bitstreams to features that vision tasks read; the package's one public class.

      image -> head -> f1 -> RE -> f2 -> g_a -> y2 -> [h_a -> z -> h_s -> means, scales] -> y2_hat -> g_s -> f3 -> tail

Source: DICM (Tang, Yi, Wang, IEEE Trans. Broadcasting 2025). Any image size from 16 x 16: images are padded to a
multiple of 64 and features cropped back. The symbols of a stream do not depend on thread counts or batches:
what drives the coder, from z on, is computed in float64, and the coder's tables come from the exported codec.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pretrain.codec import bitstream, pretrained
from pretrain.codec.backbone import HEAD_STRIDE, Backbone, pad_to
from pretrain.codec.bitstream import Layer, StreamInfo, symbol_digest
from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import CoderTables, LatentEntropy, bottleneck_likelihood, solve_quantiles
from pretrain.codec.hyperprior import HyperAnalysis, HyperSynthesis
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.codec.transforms import AnalysisTransform, SynthesisTransform
from pretrain.errors import BitstreamError, CodecError

PADDING = 64  # z's stride
MIN_SIDE = 16
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class CodecOutput:
    """A training pass: features (N, C1, H/4, W/4), likelihoods of y1, y2 and z, and bits (N,) of y2 and z."""

    f1: Tensor
    f2: Tensor
    f3: Tensor
    likelihoods: dict[str, Tensor]
    bits: Tensor


@dataclass
class _Coder:
    """What coding needs beside the weights; made once and remade when weights have changed."""

    state: tuple[int, ...]
    tables: CoderTables
    hyper_synthesis: HyperSynthesis  # float64
    medians: Tensor  # (z_channels, 1, 1) float32
    scale_table: Tensor  # float64
    fingerprint: bytes


class FeatureCodec(nn.Module):
    """The codec: backbone, redundancy elimination, compression network.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        self.extra: dict[str, Any] = {}  # facts about its training, from config.json
        self.backbone = Backbone(config.backbone, config.pretrained)
        channels = self.backbone.channels
        self.redundancy = RedundancyElimination(channels, config)
        self.g_a, self.g_s = AnalysisTransform(channels, config), SynthesisTransform(channels, config)
        self.h_a, self.h_s = HyperAnalysis(config), HyperSynthesis(config)
        self.entropy = LatentEntropy(config.z_channels)
        self._coder: _Coder | None = None
        self._shipped_tables: CoderTables | None = None

    def forward(self, images: Tensor) -> CodecOutput:
        """A training pass over normalised images (N, 3, H, W), any H, W >= 16."""
        height, width = (math.ceil(side / HEAD_STRIDE) for side in images.shape[-2:])
        f1 = self.backbone.head(pad_to(images, PADDING))
        f2, y1 = self.redundancy(f1)
        f3, likelihoods = self.compress_features(f2)
        f1, f2, f3 = (features[..., :height, :width] for features in (f1, f2, f3))
        bits = torch.stack(
            [likelihood.float().log().flatten(1).sum(1) / -math.log(2) for likelihood in likelihoods.values()]
        ).sum(0)
        return CodecOutput(f1, f2, f3, {"y1": y1, **likelihoods}, bits)

    def compress_features(self, f2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """f3 and the likelihoods of y2 and z, of f2 (N, C1, H/4, W/4) with H, W multiples of 64."""
        y2 = self.g_a(f2)
        z_hat, z_likelihoods = bottleneck_likelihood(self.entropy.z, self.h_a(y2))
        y2_hat, y2_likelihoods = self.entropy.y2_likelihood(y2, *self.h_s(z_hat))
        return self.g_s(y2_hat), {"y2": y2_likelihoods, "z": z_likelihoods}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """f3 of normalised images, as `decode` gives it, without making bytes."""
        return self.forward(images).f3

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """y2_hat (N, latent_channels, H/16, W/16) of normalised images, H and W rounded up to multiples of 64."""
        f2, _ = self.redundancy(self.backbone.head(pad_to(images, PADDING)))
        y2 = self.g_a(f2)
        z_hat, _ = bottleneck_likelihood(self.entropy.z, self.h_a(y2))
        return self.entropy.y2_likelihood(y2, *self.h_s(z_hat))[0]

    def update(self) -> None:
        """Solve the factorized priors' quantiles for the current weights.

        `encode`, `decode` and `save_pretrained` see to this themselves; a training loop calls it before it freezes
        a part whose rounding then depends on the medians.
        """
        for model in (self.redundancy.entropy_bottleneck, self.entropy.z):
            solve_quantiles(model)

    @property
    def fingerprint(self) -> bytes:
        """Four bytes that name this codec in its streams: a hash of configuration, weights and tables."""
        return self._ready().fingerprint

    def encode(self, image: Tensor) -> bytes:
        """The stream of an image (3, H, W) uint8 RGB, H, W >= 16.

        Raises:
            CodecError: another shape or type.
        """
        if image.ndim != 3:
            raise CodecError(f"image has shape {tuple(image.shape)}; encode takes (3, H, W), encode_batch (N, 3, H, W)")
        return self.encode_batch(image[None])[0]

    @torch.no_grad()
    def encode_batch(self, images: Tensor) -> list[bytes]:
        """Streams of images (N, 3, H, W) uint8 RGB of one size."""
        _check_images(images)
        coder = self._ready()
        height, width = images.shape[-2:]
        z, y2 = self._analyse(images)
        z_symbols = (z - coder.medians).round().int()
        means, indexes = self._predict(coder, z_symbols)
        y2_symbols = (y2.double() - means).round().int()
        streams = []
        for z_one, y2_one, indexes_one in zip(z_symbols.cpu(), y2_symbols.cpu(), indexes.cpu(), strict=True):
            layers = [_encode_layer(coder.tables.z, "z", z_one, _z_indexes(z_one))]
            for name, channels in self._groups().items():
                layers.append(_encode_layer(coder.tables.y2, name, y2_one[channels], indexes_one[channels]))
            streams.append(bitstream.pack(coder.fingerprint, height, width, layers))
        return streams

    def decode(self, stream: bytes) -> Tensor:
        """f3 (1, C1, ceil(H/4), ceil(W/4)) float32 of a stream.

        Raises:
            BitstreamError: damaged, of another codec or of a newer version.
        """
        return self.decode_batch([stream])

    @torch.no_grad()
    def decode_batch(self, streams: Sequence[bytes]) -> Tensor:
        """f3 (N, C1, ceil(H/4), ceil(W/4)) float32 of streams of images of one size."""
        coder = self._ready()
        unpacked = [bitstream.unpack(stream, coder.fingerprint) for stream in streams]
        sizes = {(info.height, info.width) for info, _ in unpacked}
        if len(sizes) != 1:
            raise CodecError(f"streams of {len(sizes)} different image sizes; decode them one by one")
        ((height, width),) = sizes
        down, across = -(-height // PADDING), -(-width // PADDING)
        device = coder.medians.device
        z_shape = (self.config.z_channels, down, across)
        z_symbols = torch.stack([_decode_layer(coder.tables.z, layers[0], z_shape) for _, layers in unpacked])
        means, indexes = self._predict(coder, z_symbols.to(device))
        y2_symbols = torch.zeros(means.shape, dtype=torch.int32)
        for number, (_, layers) in enumerate(unpacked):
            groups = self._groups()
            if [layer.name for layer in layers[1:]] != list(groups):
                raise BitstreamError(f"stream has layers {[layer.name for layer in layers]}, this codec writes z, {groups}")
            for layer, channels in zip(layers[1:], groups.values(), strict=True):
                chosen = indexes[number][channels].cpu()
                y2_symbols[number][channels] = _decode_layer(coder.tables.y2, layer, chosen.shape, chosen)
        y2_hat = (y2_symbols.to(device) + means).float()
        f3 = self.g_s(y2_hat)
        return f3[..., : -(-height // HEAD_STRIDE), : -(-width // HEAD_STRIDE)]

    def describe(self, stream: bytes) -> StreamInfo:
        """Sizes, layers, rate and fingerprint of a stream, from its header alone."""
        return bitstream.describe(stream)

    def save_pretrained(self, folder: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write model.safetensors (weights and coder tables) and config.json into `folder`."""
        coder = self._ready()
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        facts = {"config": asdict(self.config), "fingerprint": coder.fingerprint.hex(), "extra": extra or {}}
        pretrained.save(Path(folder), {**tensors, **coder.tables.tensors()}, facts)

    @classmethod
    def from_pretrained(cls, source: Path | str) -> Self:
        """A frozen codec in eval mode, ready to code, from an exported folder or a hub id.

        Raises:
            CodecError: no such folder, a file missing or damaged, a pickle in it, weights of another configuration.
        """
        folder = pretrained.locate(source)
        facts = pretrained.read_config(folder)
        config = pretrained.codec_config(folder, facts)
        codec = cls(config)
        tensors = pretrained.read_tensors(folder)
        codec._shipped_tables = pretrained.take_tables(folder, tensors)
        pretrained.load_weights(codec, tensors, folder)
        codec.extra = facts.get("extra", {})
        codec.eval().requires_grad_(False)
        if codec.fingerprint.hex() != facts.get("fingerprint"):
            raise CodecError(
                f"{folder}: weights and config.json belong to different codecs "
                f"(fingerprint {codec.fingerprint.hex()}, config.json says {facts.get('fingerprint')}); export again"
            )
        return codec

    def _groups(self) -> dict[str, slice]:
        """Channels of y2 in each layer of a stream."""
        base, all_channels = self.config.base_channels, self.config.latent_channels
        if base == 0:
            return {"base": slice(0, all_channels)}
        return {"base": slice(0, base), "rest": slice(base, all_channels)}

    def _analyse(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """z and y2 of uint8 images, float32, the codec in eval mode whatever the caller trains."""
        device = next(self.parameters()).device
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = (images.to(device).float() / 255 - mean) / std
        modes = {module: module.training for module in self.modules()}
        self.eval()
        f2, _ = self.redundancy(self.backbone.head(pad_to(normalised, PADDING)))
        y2 = self.g_a(f2)
        z = self.h_a(y2)
        for module, mode in modes.items():
            module.training = mode
        return z, y2

    @staticmethod
    def _predict(coder: _Coder, z_symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Means (float64) and scale indexes (int32) of y2 from z's symbols, image by image.

        One image at a time, because a product of matrices may round differently in a batch of another size.
        """
        z_hat = z_symbols.double() + coder.medians.double()
        predicted = [coder.hyper_synthesis(one[None]) for one in z_hat]
        means, scales = (torch.cat(tensors) for tensors in zip(*predicted, strict=True))
        return means, torch.bucketize(scales, coder.scale_table).clamp(max=len(coder.scale_table) - 1).int()

    def _ready(self) -> _Coder:
        """The coder for the current weights; built anew where any weight has changed since."""
        state = tuple(tensor._version for tensor in (*self.parameters(), *self.buffers()))
        device = next(self.parameters()).device
        if self._coder is None or self._coder.state != state or self._coder.medians.device != device:
            if self._shipped_tables is not None:
                tables, self._shipped_tables = self._shipped_tables, None
            elif self._coder is not None and self._coder.state == state:
                tables = self._coder.tables
            else:
                self.update()
                tables = CoderTables.build(self.entropy)
            self._coder = _Coder(
                state=tuple(tensor._version for tensor in (*self.parameters(), *self.buffers())),
                tables=tables,
                hyper_synthesis=copy.deepcopy(self.h_s).double().eval().requires_grad_(False),
                medians=self.entropy.z.quantiles[:, 0, 1].detach().clone().view(-1, 1, 1),
                scale_table=self.entropy.y2.scale_table.double(),
                fingerprint=self._fingerprint(tables),
            )
        return self._coder

    def _fingerprint(self, tables: CoderTables) -> bytes:
        digest = hashlib.sha256(json.dumps({**asdict(self.config), "pretrained": False}, sort_keys=True).encode())
        for name, tensor in sorted({**self.state_dict(), **tables.tensors()}.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()[: bitstream.FINGERPRINT_BYTES]


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3 or images.dtype != torch.uint8:
        raise CodecError(f"images are {shape} {images.dtype}; the codec takes RGB of shape (N, 3, H, W) and type uint8")
    if min(shape[-2:]) < MIN_SIDE or max(shape[-2:]) > bitstream.MAX_SIDE:
        raise CodecError(f"image of {shape[-2]} x {shape[-1]} pixels; sides must lie in {MIN_SIDE}..{bitstream.MAX_SIDE}")


def _z_indexes(z_symbols: Tensor) -> Tensor:
    """Each channel of z (C, H, W) has a table of its own."""
    channels = torch.arange(len(z_symbols), dtype=torch.int32)
    return channels.view(-1, 1, 1).expand_as(z_symbols)


def _encode_layer(table: Any, name: str, symbols: Tensor, indexes: Tensor) -> Layer:
    flat = symbols.flatten()
    return Layer(name, table.encode(flat, indexes.flatten()), symbol_digest(flat))


def _decode_layer(table: Any, layer: Layer, shape: Sequence[int], indexes: Tensor | None = None) -> Tensor:
    if indexes is None:
        indexes = _z_indexes(torch.empty(*shape))
    symbols = table.decode(layer.payload, indexes.flatten())
    if symbol_digest(symbols) != layer.digest:
        raise BitstreamError(f"layer {layer.name} decodes to other symbols than were encoded; codec and stream do not fit")
    return symbols.view(*shape)
