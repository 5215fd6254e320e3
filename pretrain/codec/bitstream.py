"""The container of a stream: header, layer table, payloads; documented byte by byte in docs/bitstream.md.

    magic 2 | version, flags, layers 1 | fingerprint 4 | H varint | W varint | rate 1, where there is a choice
    channel list, in version 7
    per layer: length varint | digest 2 | check 4
    payloads, each with its guard list in front where the stream has any

`base` holds z and some channels of y2, `rest` the others; a reader may stop after any layer, and then needs no byte
behind it. Which channels `base` holds is the codec's to say, or a list in the stream; streams with such a list are of
version 7, all others of version 6. A layer's check is the CRC-32C of everything before it but the table, so no flipped
bit and no layer of another stream goes unseen, and nothing is allocated for what was not sent. Its digest is that of
its symbols: a decoder that drew other tables than the encoder notices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import google_crc32c
from torch import Tensor

from pretrain.errors import BitstreamError, CodecError

MAGIC = b"\xd1\xc3"
PLAIN, LISTED = 6, 7  # versions: without and with a channel list
LAYER_NAMES = ("base", "rest")
FINGERPRINT_BYTES = 4
FIXED_BYTES = 3 + FINGERPRINT_BYTES
MIN_SIDE = 16
MAX_SIDE = (1 << 16) - 1
MAX_PIXELS = 1 << 27
GUARDED, RATED, LAYERS_MASK = 0b1000, 0b0100, 0b0011
MAX_RATE = 255
MAX_CHANNELS = 1 << 12


@dataclass(frozen=True)
class Layer:
    """One layer: the bytes of its symbols, their digest, and the guard list: table by place, for close calls."""

    payload: bytes
    digest: int  # 16 bits
    guard: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ChannelList:
    """The channels of a latent that `base` holds, ascending, of `total` (CodecError: none, twice or not there).

    In a stream it is its number among all choices of so many channels (the combinatorial number system): no list of
    equal length takes fewer bytes than the most, 10 for 16 of 192 and 24 for 96.
    """

    chosen: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        chosen = self.chosen
        if not 1 <= self.total <= MAX_CHANNELS:
            raise CodecError(f"a latent of {self.total} channels; lists are of 1..{MAX_CHANNELS}")
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < self.total:
            raise CodecError(
                f"channels {list(chosen)} must be one or more of 0..{self.total - 1}, ascending, each once"
            )

    @property
    def others(self) -> tuple[int, ...]:
        """The channels that `rest` holds."""
        return tuple(sorted(set(range(self.total)) - set(self.chosen)))

    def pack(self) -> bytes:
        """Varint of `total`, varint of how many are chosen, number of the choice."""
        number = sum(math.comb(channel, place) for place, channel in enumerate(self.chosen, 1))
        size = _choice_bytes(self.total, len(self.chosen))
        return _varint(self.total) + _varint(len(self.chosen)) + number.to_bytes(size, "little")

    @classmethod
    def read(cls, stream: bytes, position: int) -> tuple[ChannelList, int]:
        """The list at `position` of a stream, and where what follows begins."""
        total, position = _read_varint(stream, position)
        count, position = _read_varint(stream, position)
        if not 1 <= count <= total <= MAX_CHANNELS:
            raise BitstreamError(f"stream is damaged: it claims {count} of {total} channels")
        end = position + _choice_bytes(total, count)
        if end > len(stream):
            raise BitstreamError(f"stream of {len(stream)} bytes ends within its header; it was cut")
        number = int.from_bytes(stream[position:end], "little")
        if number >= math.comb(total, count):
            raise BitstreamError("stream is damaged: its channel list is none")
        chosen, left, below = [], count, math.comb(total - 1, count)  # below: choices of `left` among 0..channel - 1
        for channel in range(total - 1, -1, -1):
            taken = below <= number
            if taken:
                chosen.append(channel)
                number, left = number - below, left - 1
            if not left:
                break
            # comb(channel - 1, left) from comb(channel, left + taken): from its neighbour, a large binomial is cheap
            below = below * (left + 1 if taken else channel - left) // channel
        return cls(tuple(reversed(chosen)), total), end


def _choice_bytes(total: int, count: int) -> int:
    """Bytes that the number of a choice takes."""
    return ((math.comb(total, count) - 1).bit_length() + 7) // 8


@dataclass(frozen=True)
class StreamInfo:
    """What the header of a stream says.

    Attributes:
        fingerprint: hexadecimal, of the codec that wrote it (the first 4 bytes of
        `FeatureCodec.fingerprint`). layers: bytes of each layer's payload, by name, in order. header_bytes:
        everything before the first payload. rate: 0..255, the step of the codec's range of rates; None for a codec
        of one rate. channels: those that `base` holds, where the stream lists them.
    """

    version: int
    fingerprint: str
    height: int
    width: int
    layers: dict[str, int]
    header_bytes: int
    rate: int | None = None
    channels: ChannelList | None = None

    @property
    def base_bytes(self) -> int:
        """Length of the part that a reader of `base` alone needs."""
        return self.header_bytes + self.layers["base"]

    @property
    def num_bytes(self) -> int:
        """Length of the whole stream."""
        return self.header_bytes + sum(self.layers.values())

    @property
    def bits_per_pixel(self) -> float:
        """Rate of the whole stream."""
        return 8 * self.num_bytes / (self.height * self.width)


@dataclass(frozen=True)
class _Entry:
    """A row of the layer table."""

    length: int
    digest: int
    check: int


def symbol_digest(symbols: Tensor) -> int:
    """16 bits of the CRC-32C of int32 symbols, little-endian."""
    return google_crc32c.value(symbols.numpy().astype("<i4").tobytes()) & 0xFFFF


def pack(
    fingerprint: bytes,
    height: int,
    width: int,
    layers: Sequence[Layer],
    rate: int | None = None,
    channels: ChannelList | None = None,
) -> bytes:
    """The stream of an image of height x width pixels."""
    guarded = any(layer.guard for layer in layers)
    flags = (GUARDED if guarded else 0) | (RATED if rate is not None else 0)
    version = PLAIN if channels is None else LISTED
    fixed = MAGIC + bytes([version << 4 | flags | len(layers)]) + fingerprint[:FINGERPRINT_BYTES]
    fixed += _varint(height) + _varint(width) + (b"" if rate is None else bytes([rate]))
    fixed += b"" if channels is None else channels.pack()
    payloads = [(_pack_guard(layer.guard) if guarded else b"") + layer.payload for layer in layers]
    table, check = b"", google_crc32c.value(fixed)
    for layer, payload in zip(layers, payloads, strict=True):
        check = _extend(check, layer.digest, payload)
        table += _varint(len(payload)) + layer.digest.to_bytes(2, "little") + check.to_bytes(4, "little")
    return fixed + table + b"".join(payloads)


def describe(stream: bytes) -> StreamInfo:
    """Read the header alone (BitstreamError where it is none)."""
    return _parse(stream)[0]


def unpack(stream: bytes, fingerprint: bytes, num_layers: int | None = None) -> tuple[StreamInfo, list[Layer]]:
    """All layers of a stream, or its first `num_layers`, each checked.

    Raises:
        BitstreamError: cut, damaged, of another codec or of a newer version.
    """
    info, fixed, entries = _parse(stream)
    if info.fingerprint != fingerprint[:FINGERPRINT_BYTES].hex():
        ours = fingerprint[:FINGERPRINT_BYTES].hex()
        raise BitstreamError(
            f"stream was written by codec {info.fingerprint}, this is {ours}; use the codec that wrote it"
        )
    wanted = entries[:num_layers]
    needed = info.header_bytes + sum(entry.length for entry in wanted)
    if len(stream) < needed or (num_layers is None and len(stream) > needed):
        what = "was cut" if len(stream) < needed else "has bytes behind its end"
        raise BitstreamError(f"stream has {len(stream)} bytes, its header promises {needed}; it {what}")
    layers, position, check = [], info.header_bytes, google_crc32c.value(fixed)
    for name, entry in zip(LAYER_NAMES, wanted, strict=False):
        payload = stream[position : position + entry.length]
        check = _extend(check, entry.digest, payload)
        if check != entry.check:
            raise BitstreamError(f"stream is damaged: layer {name} does not match its checksum; fetch it again")
        guard, start = _read_guard(payload) if stream[2] & GUARDED else ({}, 0)
        layers.append(Layer(payload[start:], entry.digest, guard))
        position += entry.length
    return info, layers


def check_size(height: int, width: int) -> str | None:
    """What is wrong with an image of height x width pixels, or None."""
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        return f"{height} x {width} pixels; sides must lie in {MIN_SIDE}..{MAX_SIDE}"
    if height * width > MAX_PIXELS:
        return f"{height} x {width} pixels; at most {MAX_PIXELS} are coded in one piece"
    return None


def _parse(stream: bytes) -> tuple[StreamInfo, bytes, list[_Entry]]:
    """What the header says, its part before the layer table, and that table."""
    if not isinstance(stream, bytes):
        raise BitstreamError(f"a stream is bytes, this is {type(stream).__name__}")
    if stream[:2] != MAGIC[: len(stream)] or not stream:
        raise BitstreamError("not a dicm stream: it does not begin with its two magic bytes")
    if len(stream) < FIXED_BYTES:
        raise BitstreamError(f"stream of {len(stream)} bytes ends within its header; it was cut")
    version, num_layers = stream[2] >> 4, stream[2] & LAYERS_MASK
    if version > LISTED:
        raise BitstreamError(f"stream is of version {version}, this dicm reads up to {LISTED}; update dicm")
    if not 1 <= version <= LISTED or not 1 <= num_layers <= len(LAYER_NAMES):
        raise BitstreamError(f"stream is damaged: no version of dicm writes {stream[2]:#04x} as its third byte")
    if version < PLAIN:
        raise BitstreamError(f"stream is of version {version}, from before the first release; encode its image again")
    height, position = _read_varint(stream, FIXED_BYTES)
    width, position = _read_varint(stream, position)
    rate = None
    if stream[2] & RATED:
        if position >= len(stream):
            raise BitstreamError(f"stream of {len(stream)} bytes ends within its header; it was cut")
        rate, position = stream[position], position + 1
    if wrong := check_size(height, width):
        raise BitstreamError(f"stream is damaged: it claims {wrong}")
    channels = None
    if version == LISTED:
        channels, position = ChannelList.read(stream, position)
    fixed, entries = stream[:position], []
    for _ in range(num_layers):
        length, position = _read_varint(stream, position)
        if position + 6 > len(stream):
            raise BitstreamError(f"stream of {len(stream)} bytes ends within its header; it was cut")
        row = stream[position : position + 6]
        entries.append(_Entry(length, int.from_bytes(row[:2], "little"), int.from_bytes(row[2:], "little")))
        position += 6
    layers = {name: entry.length for name, entry in zip(LAYER_NAMES, entries, strict=False)}
    fingerprint = stream[3:FIXED_BYTES].hex()
    return StreamInfo(version, fingerprint, height, width, layers, position, rate, channels), fixed, entries


def _pack_guard(guard: Mapping[int, int]) -> bytes:
    """Their number, then for each the distance from the place before and the table."""
    packed, before = _varint(len(guard)), -1
    for place, table in sorted(guard.items()):
        packed += _varint(place - before - 1) + bytes([table])
        before = place
    return packed


def _read_guard(payload: bytes) -> tuple[dict[int, int], int]:
    """The guard list in front of a payload, and where what follows begins."""
    count, position = _read_varint(payload, 0)
    guard, place = {}, -1
    for _ in range(count):
        distance, position = _read_varint(payload, position)
        if position >= len(payload):
            raise BitstreamError("stream is damaged: a guard list is longer than its layer")
        place += distance + 1
        guard[place] = payload[position]
        position += 1
    return guard, position


def _extend(check: int, digest: int, payload: bytes) -> int:
    return google_crc32c.extend(check, digest.to_bytes(2, "little") + payload)


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
            raise BitstreamError(f"stream of {len(stream)} bytes ends within its header; it was cut")
        byte = stream[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BitstreamError("stream is damaged: a number in its header has more than 35 bits")
