"""`FeatureCodec`, the package's one public class: images to small bitstreams to features for vision tasks.

    image -> head -> f1 -> RE -> f2 -> g_a -> y2 -> [h_a -> z -> h_s -> means, scales] -> y2_hat -> g_s -> f3

With `rate_points` above one, a codec has a range of rates: 0 is the smallest, 1 the best.

Source: DICM (Tang, Yi, Wang, IEEE Trans. Broadcasting 2025). Any image size from 16 x 16: images are padded
to a multiple of 64 and features cropped back. Coding is `coder.py`'s; this module sees to it that weights are
never coded with tables of other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Self

import torch
from torch import Tensor

from data_pipeline.views import normalize
from pretrain.codec import bitstream, pretrained
from pretrain.codec.backbone import HEAD_STRIDE, crop_to, pad_to
from pretrain.codec.bitstream import StreamInfo
from pretrain.codec.coder import LATENT_STRIDE, Z_STRIDE, Choice, StreamCoder, covered_places
from pretrain.codec.config import PRECISIONS, CodecConfig
from pretrain.codec.entropy import CoderTables, bits_per_image, bottleneck_likelihood, round_latents, solve_quantiles
from pretrain.codec.gains import fit
from pretrain.codec.identity import hash_of, stamp_of, weights_hash
from pretrain.codec.network import ONE_RATE, CodecNetwork
from pretrain.codec.precision import autocast
from pretrain.codec.tiles import MARGIN, check_tile, in_tiles
from pretrain.errors import CodecError


@dataclass
class CodecOutput:
    """A pass: features (N, C1, H/4, W/4), likelihoods of y1, y2 and z, and bits (N,) of the stream but its header.

    In training mode likelihoods are those of the models, of noisy values; in eval mode those of y2 and z are what the
    coder's tables give, and bits hold its start states too.
    """

    f1: Tensor
    f2: Tensor
    f3: Tensor
    likelihoods: dict[str, Tensor]
    bits: Tensor


class FeatureCodec(CodecNetwork):
    """The codec: networks, and their streams.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: CodecConfig):
        super().__init__(config)
        self.extra: dict[str, Any] = {}  # facts about its training, from config.json
        # Of the networks in encode and decode; what symbols follow from is float64 with either.
        self.precision = "fp32"
        # What coding needs beside the weights, a hash of these weights, and their stamps when last looked at.
        self._coder: StreamCoder | None = None
        self._coder_weights = b""
        self._coder_stamp: tuple[int, ...] | None = None
        self._prior_stamp: tuple[int, ...] | None = None

    def forward(self, images: Tensor, rate: Tensor | float | None = None) -> CodecOutput:
        """A pass over normalised images (N, 3, H, W), sides from 16: noise in training, rounding in eval.

        Args:
            rate: in 0..1, one for all images or (N,); None is the best one.
        """
        self._settle()
        height, width = images.shape[-2:]
        f1 = self.backbone.head(pad_to(images, Z_STRIDE))
        f2, y1 = self.eliminate(f1)
        f3, likelihoods = self.compress_features(f2, rate, (height, width))
        f1, f2, f3 = (crop_to(features, height, width, HEAD_STRIDE) for features in (f1, f2, f3))
        bits = bits_per_image(likelihoods.values())
        if not self.entropy.z.training:
            bits = bits + self._ready().state_bits(*(likelihoods[name][0, 0].numel() for name in ("z", "y2")))
        return CodecOutput(f1, f2, f3, {**y1, **likelihoods}, bits)

    def compress_features(
        self, f2: Tensor, rate: Tensor | float | None = None, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f3 and the likelihoods of y2 and z, of f2 (N, C1, H/4, W/4) with H, W multiples of 64.

        `size` is that of the images before they were padded, (H, W) if not given.
        """
        y2 = self.g_a(f2)
        y2_hat, likelihoods = self._quantize(y2, self.h_a(y2), rate, size)
        return self.g_s(y2_hat), likelihoods

    def _quantize(
        self, y2: Tensor, z: Tensor, rate: Tensor | float | None, size: tuple[int, int] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """y2_hat, and the likelihoods of z and of those places of y2 that see the image, of `size`."""
        z_gain, y2_gain = self.gains(rate, len(y2))
        z_hat, z_likelihoods = bottleneck_likelihood(self.entropy.z, z, z_gain)
        means, scales = self.h_s(z_hat)
        if self.context is not None:
            means, scales = self.context.predict(
                means, scales, lambda _, means, __: _covered(round_latents(y2, means, y2_gain), means, size)
            )
        y2_hat, y2_likelihoods = self.entropy.y2_likelihood(y2, means, scales, y2_gain)
        y2_hat, likelihoods = _covered(y2_hat, means, size), {"y2": y2_likelihoods, "z": z_likelihoods}
        if not self.entropy.z.training and not torch.compiler.is_compiling():
            z_factor, y2_factor = (1.0 if gain is None else gain for gain in (z_gain, y2_gain))
            symbols = z_hat * z_factor, (y2_hat - means) * y2_factor
            likelihoods = self._ready().likelihoods(*symbols, scales * y2_factor)
        if size is not None:
            likelihoods["y2"] = crop_to(likelihoods["y2"], *size, LATENT_STRIDE)
        return y2_hat, likelihoods

    @torch.no_grad()
    def features(self, images: Tensor, rate: float | None = None) -> Tensor:
        """f3 of normalised images; in eval mode as `decode` gives it, without making bytes."""
        return self.forward(images, self._coded_rate(rate)).f3

    @torch.no_grad()
    def latents(self, images: Tensor, rate: float | None = None) -> Tensor:
        """y2_hat (N, latent_channels, H/16, W/16) of normalised images; H and W become multiples of 64."""
        self._settle()
        height, width = images.shape[-2:]
        return self._quantize(*self.analyse(images), self._coded_rate(rate), (height, width))[0]

    def update(self) -> None:
        """Solve the factorized priors' quantiles for the current weights; coder tables follow when needed.

        Coding, saving and passes in eval mode see to this themselves whenever a weight has changed. A
        training loop calls it before it freezes a part; and it must be called after weights were changed
        behind autograd's back (`parameter.data.add_(...)`), which leaves no trace.
        """
        for model in self.factorized_priors:
            solve_quantiles(model)
        self._prior_stamp, self._coder_stamp = stamp_of(self._priors()), None

    def train(self, mode: bool = True) -> Self:
        """As in torch; in either direction, weights are looked at again before they are next coded with."""
        self._coder_stamp = self._prior_stamp = None
        return super().train(mode)

    @property
    def fingerprint(self) -> bytes:
        """Eight bytes that name this codec: a hash of its configuration, tables and weights, tail aside."""
        return self._ready().fingerprint

    def encode(
        self,
        image: Tensor,
        rate: float | None = None,
        max_bytes: int | None = None,
        tile: int | None = None,
        channels: Choice | None = None,
        rest: bool = True,
    ) -> bytes:
        """The stream of an image (3, H, W) uint8 RGB, H, W >= 16.

        Args:
            rate: in 0..1, for a codec with a range of rates; None is the best one.
            max_bytes: the highest rate is taken whose stream is no longer than this.
            tile: side of the squares (a multiple of 64 pixels) that the networks take one at a time where the image
                is larger, which bounds memory; None takes it whole.
            channels: of y2, that `base` is to hold in place of the codec's own; or a function that names them for
                an image's y2_hat (latent_channels, H/16, W/16). The stream lists them.
            rest: with `channels`, whether the stream carries the others, too.

        Raises:
            CodecError: another shape, type, size or rate; `max_bytes` too small for this image; no such channels, or
            a codec with a context model.
        """
        if image.ndim != 3:
            raise CodecError(f"image has shape {tuple(image.shape)}; encode takes (3, H, W), encode_batch (N, 3, H, W)")
        return self.encode_batch(image[None], rate, max_bytes, tile, channels, rest)[0]

    @torch.no_grad()
    def encode_batch(
        self,
        images: Tensor,
        rate: float | None = None,
        max_bytes: int | None = None,
        tile: int | None = None,
        channels: Choice | None = None,
        rest: bool = True,
    ) -> list[bytes]:
        """Streams of images (N, 3, H, W) uint8 RGB of one size; each as `encode` alone gives it."""
        _check_images(images)
        if tile is not None:
            check_tile(tile)
        level = self._rate_level(rate)
        coder, (height, width) = self._ready(), images.shape[-2:]
        streams: list[bytes] = []
        with self._coding():
            # One image at a time: in a batch, convolutions sum in another order, and a value that lies between two
            # symbols to float accuracy may be rounded to the other one.
            for image in images.split(1):
                latents = self.analyse(normalize(image.to(self.device).float() / 255), tile)

                def stream_at(level: int | None, latents: tuple[Tensor, Tensor] = latents) -> bytes:
                    y2, z = latents
                    return coder.encode(z, y2, height, width, level, channels, rest)[0]

                streams.append(stream_at(level) if max_bytes is None else fit(stream_at, level, max_bytes))
        return streams

    def _rate_level(self, rate: float | None) -> int | None:
        """The step 0..255 of `rate`; None for a codec of one rate."""
        if self.y2_gain is None:
            if rate is not None:
                raise CodecError(ONE_RATE)
            return None
        if rate is not None and not 0 <= rate <= 1:
            raise CodecError(f"rate={rate:g} must lie in 0..1, from the fewest bits to the best features")
        return bitstream.MAX_RATE if rate is None else round(rate * bitstream.MAX_RATE)

    def _coded_rate(self, rate: float | None) -> float | None:
        """`rate` as a stream carries it."""
        level = self._rate_level(rate)
        return None if level is None else level / bitstream.MAX_RATE

    def decode(self, stream: bytes, last_layer: str | None = None, tile: int | None = None) -> Tensor:
        """f3 (1, C1, ceil(H/4), ceil(W/4)) float32 of a stream, or of its layers up to `last_layer` alone.

        `tile` bounds memory as in `encode`; streams written with and without it are alike.

        Raises:
            BitstreamError: damaged, of another codec or of a newer version.
        """
        return self.decode_batch([stream], last_layer, tile)

    @torch.no_grad()
    def decode_batch(self, streams: Sequence[bytes], last_layer: str | None = None, tile: int | None = None) -> Tensor:
        """f3 (N, C1, ceil(H/4), ceil(W/4)) float32 of streams of images of one size."""
        if tile is not None:
            check_tile(tile)
        y2_hat, height, width = self._ready().decode(streams, last_layer)
        with self._coding():
            if tile is None:
                f3 = self.g_s(y2_hat)
            else:
                f3 = in_tiles(self.g_s, y2_hat, tile // LATENT_STRIDE, MARGIN // LATENT_STRIDE)
        return crop_to(f3.float(), height, width, HEAD_STRIDE)

    @torch.no_grad()
    def decode_latents(self, streams: Sequence[bytes], last_layer: str | None = None) -> Tensor:
        """y2_hat (N, latent_channels, H/16, W/16) float32 of streams of one size, H and W multiples of 64."""
        return self._ready().decode(streams, last_layer)[0]

    def describe(self, stream: bytes) -> StreamInfo:
        """Sizes, layers, rate and fingerprint of a stream, from its header alone."""
        return bitstream.describe(stream)

    def save_pretrained(self, folder: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write model.safetensors (weights and coder tables) and config.json into `folder`."""
        self._coder_stamp = None  # look at every weight: what goes to disk is also what left no trace
        coder = self._ready()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        facts = {"config": asdict(self.config), "fingerprint": coder.fingerprint.hex(), "extra": extra or {}}
        pretrained.save(Path(folder), {**tensors, **coder.tables.tensors()}, facts)

    @classmethod
    def from_pretrained(cls, source: Path | str, precision: str = "fp32") -> Self:
        """A frozen codec in eval mode, ready to code, from an exported folder or a hub id.

        Args:
            precision: fp32 or bf16, of the networks in `encode` and `decode`. A stream of either is read with either:
                what symbols follow from is float64 with both. bf16 halves time and memory where a device has it, and
                moves features by about its rounding.

        Raises:
            CodecError: no such folder, a file missing or damaged, a pickle in it, weights of another
            configuration; another precision.
        """
        if precision not in PRECISIONS:
            raise CodecError(f"precision={precision} is unknown; choose one of {', '.join(PRECISIONS)}")
        folder = pretrained.locate(source)
        facts = pretrained.read_config(folder)
        config = pretrained.codec_config(folder, facts)
        tensors = pretrained.read_tensors(folder)
        tables = pretrained.take_tables(folder, tensors)
        pretrained.check_weights(config, tensors, folder)
        codec = cls(config)
        codec.load_state_dict(tensors)
        codec.eval().requires_grad_(False)
        codec.precision = precision
        fingerprint = codec._fingerprint(tables)
        if fingerprint.hex() != facts.get("fingerprint"):
            raise CodecError(
                f"{folder}: weights and {pretrained.CONFIG} belong to different codecs "
                f"(fingerprint {fingerprint.hex()}, in the file {shown(facts.get('fingerprint'))}); export again"
            )
        codec._adopt(tables)
        codec.extra = facts.get("extra", {})
        return codec

    @contextmanager
    def _coding(self) -> Iterator[None]:
        """Eval mode and `precision` while symbols are made or features decoded, whatever the caller does."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with autocast(self.device, self.precision):
                yield
        finally:
            for module in training:
                module.training = True

    def _priors(self) -> Iterator[Tensor]:
        for model in self.factorized_priors:
            yield from model.parameters()

    def _settle(self) -> None:
        """In eval mode, where values are rounded about medians, solve those of priors that have changed."""
        if self.training or torch.compiler.is_compiling():
            return
        stamp = stamp_of(self._priors())
        if stamp is None or stamp != self._prior_stamp:
            for model in self.factorized_priors:
                solve_quantiles(model)
            self._prior_stamp = stamp_of(self._priors())

    def _ready(self) -> StreamCoder:
        """The coder for the current weights; made anew where any of them has changed since."""
        stamp = self._stamp()
        if self._coder is None or stamp is None or stamp != self._coder_stamp:
            if self._coder is not None and self._weights_hash() == self._coder_weights:
                # The same values elsewhere in memory: moved to another device, copied, loaded once more.
                self._adopt(self._coder.tables)
            else:
                self.update()
                self._adopt(CoderTables.build(self.entropy))
        assert self._coder is not None
        return self._coder

    def _adopt(self, tables: CoderTables) -> None:
        """Code with `tables`, which belong to the current weights."""
        gains = None if self.z_gain is None or self.y2_gain is None else (self.z_gain, self.y2_gain)
        self._coder = StreamCoder(
            self.config, self.entropy, self.h_s, self.context, gains, tables, self._fingerprint(tables)
        )
        self._coder_weights = self._weights_hash()
        self._coder_stamp, self._prior_stamp = self._stamp(), stamp_of(self._priors())

    def _stamp(self) -> tuple[int, ...] | None:
        return stamp_of((*self.parameters(), *self.buffers()))

    def _weights_hash(self) -> bytes:
        return weights_hash(self.config, self.state_dict())

    def _fingerprint(self, tables: CoderTables) -> bytes:
        return hash_of({"weights": self._weights_hash().hex()}, tables.tensors())[:8]


def _covered(y2_hat: Tensor, means: Tensor, size: tuple[int, int] | None) -> Tensor:
    """y2_hat where a place sees the image, the means elsewhere: what a reader of its stream has."""
    if size is None:
        return y2_hat
    return torch.where(covered_places(y2_hat, *size), y2_hat, means)


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3 or images.dtype != torch.uint8:
        raise CodecError(f"images are {shape} {images.dtype}; the codec takes RGB of shape (N, 3, H, W) and type uint8")
    if wrong := bitstream.check_size(*shape[-2:]):
        raise CodecError(f"image of {wrong}; resize or tile it")
