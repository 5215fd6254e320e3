"""Coverage-guided fuzzing of the container's parser, by atheris (not a dependency: `pip install atheris`).

    python tests/benchmarks/fuzz_parser.py -max_total_time=600 [CORPUS]

Options are libFuzzer's. Half of the inputs are parsed as they are; the other half are first given checksums that fit,
so that what lies behind the checks is reached too. Anything but a `BitstreamError` is a finding.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["pretrain.codec.bitstream"]):
    from pretrain.codec import bitstream
    from pretrain.errors import BitstreamError

import google_crc32c

FINGERPRINT = bytes(8)


def with_checks(stream: bytes) -> bytes:
    """The stream with checksums that fit, as far as its header can be read."""
    try:
        info, fixed, entries = bitstream._parse(stream)
    except BitstreamError:
        return stream
    table, position, check = b"", info.header_bytes, google_crc32c.value(fixed)
    for entry in entries:
        payload = stream[position : position + entry.length]
        check = google_crc32c.extend(check, entry.digest.to_bytes(2, "little") + payload)
        table += bitstream._varint(entry.length) + entry.digest.to_bytes(2, "little") + check.to_bytes(4, "little")
        position += entry.length
    return fixed + table + stream[info.header_bytes :]


def test_one_input(data: bytes) -> None:
    """One run of the fuzzer."""
    if not data:
        return
    stream = data[1:]
    if data[0] & 1:
        version = bitstream.LISTED if data[0] & 2 else bitstream.PLAIN
        stream = bitstream.MAGIC + bytes([version << 4 | data[0] >> 4]) + FINGERPRINT[:4] + stream
        stream = with_checks(stream)
    try:
        info = bitstream.describe(stream)
        assert info.header_bytes <= 64 + (len(info.channels.pack()) if info.channels else 0)
        _, layers = bitstream.unpack(stream, FINGERPRINT)
        again = bitstream.pack(FINGERPRINT, info.height, info.width, layers, info.rate, info.channels)
        assert bitstream.unpack(again, FINGERPRINT)[1] == layers
    except BitstreamError:
        return


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
