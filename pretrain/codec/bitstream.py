"""The container of a stream: header, layer table, payloads; documented byte by byte in docs/bitstream.md.

    magic 2 | version 1 | layers 1 | fingerprint 4 | H varint | W varint | per layer: length varint, digest 2, check 4 | payloads

A layer's check is the CRC-32C of the header's fixed part and its payload, so no flipped bit goes unseen and nothing
is allocated for a size that was not sent; its digest is that of the symbols, so a decoder that drew other
tables than the encoder notices. Layers are `z`, then groups of y2's channels: a reader may stop after any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c
from torch import Tensor

from pretrain.errors import BitstreamError

MAGIC = b"\xd1\xc3"
VERSION = 1
LAYER_NAMES = ("z", "base", "rest")
FINGERPRINT_BYTES = 4
FIXED_BYTES = 4 + FINGERPRINT_BYTES
MAX_SIDE = 1 << 16


@dataclass(frozen=True)
class Layer:
    """One layer: its name, the bytes of its symbols and their digest."""

    name: str
    payload: bytes
    digest: int  # 16 bits


@dataclass(frozen=True)
class StreamInfo:
    """What the header of a stream says."""

    version: int
    fingerprint: str  # of the codec that wrote it, hexadecimal
    height: int
    width: int
    layers: dict[str, int]  # bytes of each layer's payload
    header_bytes: int

    @property
    def bits_per_pixel(self) -> float:
        """Rate of the whole stream."""
        return 8 * (self.header_bytes + sum(self.layers.values())) / (self.height * self.width)


def symbol_digest(symbols: Tensor) -> int:
    """16 bits of the CRC-32C of int32 symbols, little-endian."""
    return google_crc32c.value(symbols.numpy().astype("<i4").tobytes()) & 0xFFFF


def pack(fingerprint: bytes, height: int, width: int, layers: Sequence[Layer]) -> bytes:
    """The stream of an image of height x width pixels."""
    fixed = MAGIC + bytes([VERSION, len(layers)]) + fingerprint + _varint(height) + _varint(width)
    table = b"".join(
        _varint(len(layer.payload)) + layer.digest.to_bytes(2, "little") + _check(fixed, layer.name, layer.payload)
        for layer in layers
    )
    return fixed + table + b"".join(layer.payload for layer in layers)


def describe(stream: bytes) -> StreamInfo:
    """Read the header alone (BitstreamError where it is none)."""
    return _parse(stream)[0]


def unpack(stream: bytes, fingerprint: bytes) -> tuple[StreamInfo, list[Layer]]:
    """All layers of a stream, each checked.

    Raises:
        BitstreamError: cut, damaged, of another codec or of a newer version.
    """
    info, fixed, entries = _parse(stream)
    if bytes.fromhex(info.fingerprint) != fingerprint:
        raise BitstreamError(
            f"stream was written by codec {info.fingerprint}, this is {fingerprint.hex()}; decode it with the codec that wrote it"
        )
    if len(stream) != info.header_bytes + sum(info.layers.values()):
        raise BitstreamError(
            f"stream has {len(stream)} bytes, its header promises {info.header_bytes + sum(info.layers.values())}; it was cut or padded"
        )
    layers, position = [], info.header_bytes
    for (name, length), (digest, check) in zip(info.layers.items(), entries, strict=True):
        payload = stream[position : position + length]
        if _check(fixed, name, payload) != check:
            raise BitstreamError(f"stream is damaged: layer {name} does not match its checksum; fetch it again")
        layers.append(Layer(name, payload, digest))
        position += length
    return info, layers


def _parse(stream: bytes) -> tuple[StreamInfo, bytes, list[tuple[int, bytes]]]:
    """Header fields, the header's fixed part, and (digest, check) of each layer."""
    if len(stream) < FIXED_BYTES or stream[:2] != MAGIC:
        raise BitstreamError("not a dicm stream (its first two bytes are others)")
    version, num_layers = stream[2], stream[3]
    if version > VERSION:
        raise BitstreamError(f"stream is of version {version}, this dicm reads up to {VERSION}; update dicm")
    if version < 1 or not 2 <= num_layers <= len(LAYER_NAMES):
        raise BitstreamError(f"stream is damaged: version {version} with {num_layers} layers")
    height, position = _read_varint(stream, FIXED_BYTES)
    width, position = _read_varint(stream, position)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise BitstreamError(f"stream claims {height} x {width} pixels, sides lie in 1..{MAX_SIDE}; it is damaged")
    fixed = stream[:position]
    lengths, entries = {}, []
    for name in LAYER_NAMES[:num_layers]:
        lengths[name], position = _read_varint(stream, position)
        if position + 6 > len(stream):
            raise BitstreamError("stream ends within its header; it was cut")
        entries.append((int.from_bytes(stream[position : position + 2], "little"), stream[position + 2 : position + 6]))
        position += 6
    fingerprint = stream[4:FIXED_BYTES].hex()
    return StreamInfo(version, fingerprint, height, width, lengths, position), fixed, entries


def _check(fixed: bytes, name: str, payload: bytes) -> bytes:
    return google_crc32c.value(fixed + bytes([LAYER_NAMES.index(name)]) + payload).to_bytes(4, "little")


def _varint(value: int) -> bytes:
    """Base 128, low groups first, the high bit set on all bytes but the last (LEB128)."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _read_varint(stream: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if position >= len(stream):
            raise BitstreamError("stream ends within its header; it was cut")
        byte = stream[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BitstreamError("stream is damaged: a length in its header is too long")
