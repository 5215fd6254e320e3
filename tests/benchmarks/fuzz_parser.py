"""Coverage-guided fuzzing of the container's parser, by atheris (not a dependency: `pip install atheris`).

    python tests/benchmarks/fuzz_parser.py -max_total_time=600 [CORPUS]

Options are libFuzzer's. Half of the inputs are parsed as they are; the other half are first given checksums that fit,
so that what lies behind the checks is reached too. Anything but a `BitstreamError` is a finding. `--smoke` needs no
atheris: some thousand inputs are drawn at random, without its guidance.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import nullcontext

try:
    import atheris
except ImportError:
    atheris = None

with nullcontext() if atheris is None else atheris.instrument_imports(include=["pretrain.codec.bitstream"]):
    from pretrain.codec import bitstream
    from pretrain.errors import BitstreamError

import google_crc32c

FINGERPRINT = bytes(8)
SMOKE_INPUTS = 5000


def with_checks(stream: bytes) -> bytes:
    """The stream with checksums that fit, as far as its header can be read."""
    try:
        info = bitstream.describe(stream)
    except BitstreamError:
        return stream
    position = behind_number(stream, behind_number(stream, bitstream.FIXED_BYTES))
    position += bool(stream[2] & bitstream.RATED)
    if info.channels is not None:
        _, position = bitstream.ChannelList.read(stream, position)
    table, place, check = stream[:position], info.header_bytes, google_crc32c.value(stream[:position])
    for length in info.layers.values():
        end = behind_number(stream, position) + 2
        check = google_crc32c.extend(check, stream[end - 2 : end] + stream[place : place + length])
        table += stream[position:end] + check.to_bytes(4, "little")
        position, place = end + 4, place + length
    return table + stream[info.header_bytes :]


def behind_number(stream: bytes, position: int) -> int:
    """Where the varint at `position` ends."""
    while stream[position] & 0x80:
        position += 1
    return position + 1


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


def draw(generator: random.Random) -> bytes:
    """An input: a kind, and behind it a header's numbers, small for the most part, and anything."""
    sides = bytes(generator.randrange(16, 128) for _ in range(2))
    small = bytes(generator.randrange(8) for _ in range(generator.randrange(12)))
    return generator.randbytes(1) + sides + small + generator.randbytes(generator.randrange(40))


def create_parser() -> argparse.ArgumentParser:
    """Its own options; all others are libFuzzer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="random inputs, without atheris: to see that this runs")
    return parser


def main() -> None:
    arguments, others = create_parser().parse_known_args()
    if arguments.smoke:
        generator = random.Random(0)
        for _ in range(SMOKE_INPUTS):
            test_one_input(draw(generator))
        print(f"{SMOKE_INPUTS} inputs, no finding")
    elif atheris is None:
        raise SystemExit("error: fuzzing is atheris's; run pip install atheris")
    else:
        atheris.Setup([sys.argv[0], *others], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
