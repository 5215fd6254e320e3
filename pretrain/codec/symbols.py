"""Integer symbols to bytes and back: compressai's rANS, or for few symbols a range coder that ends without waste.

compressai's coder keeps its state in 64 bits. It begins at 2^31, so a payload carries 31 bits that say nothing: a tenth
of the stream of a small image. Payloads of few symbols are coded by their interval: any number in it tells them, and
the one with the fewest bytes is taken. Both follow the same tables and write an escaped symbol in the same way.

Source: Duda, "Asymmetric numeral systems", 2013; Martin, "Range encoding", 1979.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from compressai import ans
from torch import Tensor

from pretrain.codec.entropy import DIGIT_BITS, TABLE_BITS, CoderTable
from pretrain.errors import BitstreamError

# Up to so many symbols are coded by their interval, at about a microsecond a symbol; above, 31 bits are nothing.
SHORT_SYMBOLS = 8192
STATE_BYTES = 8
# What a payload takes beside its symbols: half a byte for the last that is not full, and the start of rANS's state.
SHORT_BITS, STATE_BITS = 4, 31 + 4
# An interval begins as wide as 2^64 and is widened by 2^32 whenever it has become narrower than that.
WIDTH, STEP = 64, 32
DIGIT = (1 << DIGIT_BITS) - 1
Part = tuple[CoderTable, Tensor, Tensor]


def state_bits(num_symbols: int) -> int:
    """Bits of a payload of so many symbols beside those that its symbols take, on average."""
    return SHORT_BITS if num_symbols <= SHORT_SYMBOLS else STATE_BITS


def encode_symbols(parts: Sequence[Part]) -> bytes:
    """One payload of one or more (table, symbols, indexes), in order; symbols and indexes flat int32.

    Of compressai's coder the last state, 8 bytes of which the top ones are often zero, goes to the end of the payload
    without up to three of those zeros: what is left out follows from the length, for coded words have four bytes.
    """
    if sum(symbols.numel() for _, symbols, _ in parts) <= SHORT_SYMBOLS:
        return _encode_short(parts)
    encoder = ans.BufferedRansEncoder()
    for table, symbols, indexes in parts:
        encoder.encode_with_indexes(symbols.tolist(), indexes.tolist(), *table.lists(indexes))
    coded = encoder.flush()
    words, state = coded[STATE_BYTES:], coded[:STATE_BYTES]
    zeros = min(len(state) - len(state.rstrip(b"\0")), 3)
    return words + state[: STATE_BYTES - zeros]


def _encode_short(parts: Sequence[Part]) -> bytes:
    """The number with the fewest bytes in the interval of all symbols, big-endian, without its last zero bytes."""
    low, width, total = 0, 1 << WIDTH, WIDTH
    for table, symbols, indexes in parts:
        rows, lengths, offsets = table.lists(indexes) if indexes.numel() else ([], [], [])
        for symbol, index in zip(symbols.tolist(), indexes.tolist(), strict=True):
            row, last, place = rows[index], lengths[index] - 2, symbol - offsets[index]
            beyond = None
            if not 0 <= place < last:
                beyond, place = -2 * place - 1 if place < 0 else 2 * (place - last), last
            steps = [(TABLE_BITS, row[place], row[place + 1] - row[place])]
            if beyond is not None:
                steps += [(DIGIT_BITS, digit, 1) for digit in _digits(beyond)]
            for bits, start, count in steps:
                unit = width >> bits
                low, width = low + unit * start, unit * count
                if width < 1 << STEP:
                    low, width, total = low << STEP, width << STEP, total + STEP
    free = 8 * (width.bit_length() // 8 + 1)  # bits at the end that may be zero, to full bytes
    while (number := (low + width - 1) >> free) << free < low:
        free -= 8
    return number.to_bytes((total - free) // 8 if total > free else 0, "big").rstrip(b"\0")


def _digits(beyond: int) -> list[int]:
    """How many groups of four bits a number has, and these, low ones first."""
    count = -(-beyond.bit_length() // DIGIT_BITS)
    return [count, *(beyond >> DIGIT_BITS * number & DIGIT for number in range(count))]


class SymbolDecoder:
    """Reads the symbols of one payload, part after part, as `encode_symbols` wrote them.

    Args:
        payload: bytes that a checksum vouches for; what is not a payload decodes to other symbols.
        num_symbols: of all parts.

    Raises:
        BitstreamError: too short to hold the coder's state, or outside of every interval.
    """

    def __init__(self, payload: bytes, num_symbols: int):
        self._short = num_symbols <= SHORT_SYMBOLS
        if self._short:
            self._payload, self._width, self._read = payload, 1 << WIDTH, WIDTH // 8
            self._offset = int.from_bytes(payload[: self._read].ljust(self._read, b"\0"), "big")
            return
        if len(payload) < STATE_BYTES - 3:
            raise BitstreamError(f"layer of {len(payload)} bytes is too short for a coder's state; it is damaged")
        whole = payload + bytes(-len(payload) % 4)
        self._decoder = ans.RansDecoder()
        # compressai's coder does not know where its input ends: what it reads behind it are these zeros.
        self._decoder.set_stream(whole[-STATE_BYTES:] + whole[:-STATE_BYTES] + bytes(8 * num_symbols + 64))

    def read(self, table: CoderTable, indexes: Tensor) -> Tensor:
        """The next symbols (flat int32), one for each of `indexes` (flat int32)."""
        if not indexes.numel():
            return torch.empty(0, dtype=torch.int32)
        rows, lengths, offsets = table.lists(indexes)
        if not self._short:
            found = self._decoder.decode_stream(indexes.tolist(), rows, lengths, offsets)
            return torch.tensor(found, dtype=torch.int32)
        symbols = []
        for index in indexes.tolist():
            row, last = rows[index], lengths[index] - 2
            place = bisect_right(row, self._slot(TABLE_BITS)) - 1
            self._take(row[place], row[place + 1] - row[place])
            if place == last:
                beyond = 0
                for number in range(self._digit()):
                    beyond |= self._digit() << DIGIT_BITS * number
                place = -(beyond + 1) // 2 if beyond & 1 else last + beyond // 2
            symbols.append(place + offsets[index])
        # What no encoder writes may be wider than 32 bits; it is cut, and its digest will not fit.
        return torch.tensor(symbols).to(torch.int32)

    def _slot(self, bits: int) -> int:
        """Which of 2^bits equal parts of the interval the payload's number lies in."""
        self._unit = self._width >> bits
        slot = self._offset // self._unit
        if slot >> bits:
            raise BitstreamError("layer is damaged: its number lies outside of every symbol's interval")
        return slot

    def _take(self, start: int, count: int) -> None:
        """Go on with `count` of these parts, from the one numbered `start`."""
        self._offset -= self._unit * start
        self._width = self._unit * count
        if self._width < 1 << STEP:
            word = self._payload[self._read : self._read + STEP // 8].ljust(STEP // 8, b"\0")
            self._read += STEP // 8
            self._offset, self._width = self._offset << STEP | int.from_bytes(word, "big"), self._width << STEP

    def _digit(self) -> int:
        digit = self._slot(DIGIT_BITS)
        self._take(digit, 1)
        return digit
