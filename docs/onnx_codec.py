"""Encode and decode with the graphs of `dicm export RUN DIR --onnx`: onnxruntime, our symbol coder, no torch network.

    python docs/onnx_codec.py encode CODEC photo.jpg photo.dicm
    python docs/onnx_codec.py decode CODEC photo.dicm features.npy

Streams are those of `FeatureCodec` in both directions. See docs/onnx.md, and docs/bitstream.md for what is coded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pretrain.codec import bitstream
from pretrain.codec.bitstream import Layer, symbol_digest
from pretrain.codec.coder import covered_places, guard_list, guarded
from pretrain.codec.entropy import CoderTables, scale_indexes
from pretrain.codec.gains import RateGains
from pretrain.codec.symbols import SymbolDecoder, encode_symbols
from pretrain.errors import BitstreamError, CodecError

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)[:, None, None]
GAINS = ("z_gain", "y2_gain")
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)[:, None, None]


class OnnxCodec:
    """A codec folder with the three graphs beside `model.safetensors` and `config.json`.

    Args:
        folder: written by `dicm export RUN folder --onnx`.
        threads: of onnxruntime; 0 takes all cores.

    Raises:
        CodecError: a graph is missing, or belongs to another codec.
    """

    def __init__(self, folder: Path | str, threads: int = 0):
        folder = Path(folder)
        facts = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.fingerprint, config = bytes.fromhex(facts["fingerprint"]), facts["config"]
        self.tables = CoderTables.from_tensors(tensors)
        self.medians = tensors["entropy.z.quantiles"][:, 0, 1].double().view(-1, 1, 1).numpy()
        self.z_channels, self.latent_channels = config["z_channels"], config["latent_channels"]
        self.guard = config["guard"]
        self.gains = [RateGains.of(tensors[f"{name}.log_gain"]) for name in GAINS if f"{name}.log_gain" in tensors]
        base = config["base_channels"] or self.latent_channels
        self.groups = [slice(0, base), slice(base, self.latent_channels)][: 1 if base == self.latent_channels else 2]
        self.encoder, self.hyper_decoder, self.decoder = (
            self._session(folder / f"{name}.onnx", threads) for name in ("encoder", "hyper_decoder", "decoder")
        )

    def encode(self, image: np.ndarray, rate: float = 1.0) -> bytes:
        """The stream of an image (3, H, W) uint8 RGB, H, W >= 16, at `rate` where the codec has a range of them."""
        level = round(rate * bitstream.MAX_RATE) if self.gains else None
        z_gain, y2_gain = self._gains(level)
        height, width = image.shape[-2:]
        if wrong := bitstream.check_size(height, width):
            raise CodecError(f"image of {wrong}; resize or tile it")
        images = ((image.astype(np.float32) / 255 - MEAN) / STD)[None]
        y2, z = self.encoder.run(None, {"images": pad(images)})
        z_symbols = np.round(z[0] * z_gain - self.medians).astype(np.int32)
        means, indexes, close = self._predict(z_symbols, level)
        y2_symbols = torch.from_numpy(np.round((y2[0] - means) * y2_gain).astype(np.int32))
        covered = covered_places(indexes, height, width)
        y2_symbols, indexes, close = (part[:, covered] for part in (y2_symbols, indexes, close))
        z_part = (self.tables.z, torch.from_numpy(z_symbols).flatten(), self._z_indexes(z_symbols.shape))
        layers = []
        for number, channels in enumerate(self.groups):
            parts = [(self.tables.y2, y2_symbols[channels].flatten(), indexes[channels].flatten())]
            parts = [z_part, *parts] if number == 0 else parts
            digest = symbol_digest(torch.cat([symbols for _, symbols, _ in parts]))
            layers.append(Layer(encode_symbols(parts), digest, guard_list(indexes[channels], close[channels])))
        return bitstream.pack(self.fingerprint, height, width, layers, level)

    def decode(self, stream: bytes) -> np.ndarray:
        """f3 (1, C1, ceil(H/4), ceil(W/4)) float32 of a stream (BitstreamError: damaged, or of another codec)."""
        info, _ = bitstream.unpack(stream, self.fingerprint)
        (f3,) = self.decoder.run(None, {"y2_hat": self.decode_latents(stream)})
        return f3[..., : -(-info.height // 4), : -(-info.width // 4)]

    def decode_latents(self, stream: bytes) -> np.ndarray:
        """y2_hat (1, latent_channels, H/16, W/16) float32 of a stream, H and W multiples of 64."""
        info, layers = bitstream.unpack(stream, self.fingerprint)
        if len(layers) != len(self.groups):
            raise BitstreamError(f"stream has {len(layers)} layers, this codec writes {len(self.groups)}")
        z_shape = (self.z_channels, -(-info.height // 64), -(-info.width // 64))
        num_places = -(-info.height // 16) * -(-info.width // 16)
        z_indexes = self._z_indexes(z_shape)
        reader = SymbolDecoder(layers[0].payload, z_indexes.numel() + num_places * self.groups[0].stop)
        z_symbols = reader.read(self.tables.z, z_indexes)
        means, indexes, _ = self._predict(z_symbols.view(z_shape).numpy(), info.rate)
        covered = covered_places(indexes, info.height, info.width)
        indexes, y2_symbols = indexes[:, covered], []
        for number, (layer, channels) in enumerate(zip(layers, self.groups, strict=True)):
            chosen = guarded(indexes[channels].flatten(), layer)
            if number:
                reader = SymbolDecoder(layer.payload, chosen.numel())
            symbols = reader.read(self.tables.y2, chosen)
            if symbol_digest(symbols if number else torch.cat([z_symbols, symbols])) != layer.digest:
                raise BitstreamError(
                    f"layer {bitstream.LAYER_NAMES[number]} decodes to other symbols than were encoded"
                )
            y2_symbols.append(symbols)
        residuals = np.zeros(means.shape)
        residuals[:, covered.numpy()] = torch.cat(y2_symbols).view(len(means), -1).numpy()
        return (residuals / self._gains(info.rate)[1] + means).astype(np.float32)[None]

    def _predict(self, z_symbols: np.ndarray, level: int | None) -> tuple[np.ndarray, Tensor, Tensor]:
        """Means (float64), table indexes (int32) and close calls of y2, of z's symbols; the same at both ends."""
        z_gain, y2_gain = self._gains(level)
        means, scales = self.hyper_decoder.run(None, {"z_hat": ((z_symbols + self.medians) / z_gain)[None]})
        return means[0], *scale_indexes(torch.from_numpy(scales[0] * y2_gain), self.guard)

    def _gains(self, level: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Gains (C, 1, 1) of z and y2, float64."""
        if (level is None) != (not self.gains):
            raise BitstreamError("stream is damaged: whether it names a rate does not fit its codec")
        if level is None:
            return np.ones((1, 1, 1)), np.ones((1, 1, 1))
        position = torch.tensor([level], dtype=torch.float64) / bitstream.MAX_RATE
        z_gain, y2_gain = (gain(position)[0].numpy() for gain in self.gains)
        return z_gain, y2_gain

    def _z_indexes(self, z_shape: tuple[int, ...]) -> Tensor:
        return torch.arange(z_shape[0], dtype=torch.int32).repeat_interleave(z_shape[1] * z_shape[2])

    def _session(self, path: Path, threads: int) -> onnxruntime.InferenceSession:
        if not path.is_file():
            raise CodecError(f"{path} is missing; write it with `dicm export RUN {path.parent} --onnx`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        if session.get_modelmeta().custom_metadata_map.get("dicm.fingerprint") != self.fingerprint.hex():
            raise CodecError(f"{path} is the graph of another codec than config.json's; export again with --onnx")
        return session


def pad(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) padded at the right and the bottom to multiples of 64, as `FeatureCodec` pads them.

    Reflected, again and again where a side is too short for one reflection.
    """
    height, width = images.shape[-2:]
    return np.pad(images, ((0, 0), (0, 0), (0, -height % 64), (0, -width % 64)), mode="reflect")


def main(action: str, codec: str, source: str, target: str) -> None:
    """Encode an image file or decode a stream file."""
    if action == "encode":
        with Image.open(source) as picture:
            image = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        Path(target).write_bytes(OnnxCodec(codec).encode(image))
    elif action == "decode":
        np.save(target, OnnxCodec(codec).decode(Path(source).read_bytes()))
    else:
        raise SystemExit(f"{action} is no action; use encode or decode")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
