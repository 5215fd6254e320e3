"""Damaged streams: what each gives, and whether any needs more time or memory than a good one.

    python tests/benchmarks/damage.py --codec CODEC [--streams 20000] [--seed 0] [--json FILE]

Good streams of smooth noise at several sizes are cut, flipped, spliced, given lying headers (sizes up to 2^32, other
layer lengths, guard lists, rates) with their checksums as they were, and forged: the same lies with checksums that fit.
Every damaged stream must end in a `BitstreamError` and every forged one in that or in features, within twice the time of the processor
and 64 MiB more memory than the slowest good stream of that header's size. Exits with 1 where one does not.

Figures in --json: `streams`, `errors` (count by message), `decoded` (forged ones that gave features), `worst_ratio` (time
over that of a good stream of the size) and `memory_mib` (peak above that of the good streams).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # a test runs this file, too

import smoke
import torch
from rich.progress import track
from torch import Tensor

from pretrain.codec import bitstream
from pretrain.codec.bitstream import Layer
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError

SIZES = [(16, 16), (64, 64), (64, 200), (160, 128)]
MAX_RATIO, MAX_MIB = 2.0, 64.0
FLOOR_SECONDS = 0.02  # below this, a ratio of times says more of the machine than of the stream


def noise(height: int, width: int, seed: int) -> Tensor:
    """A smooth random image, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return fine.clamp(0, 1).mul(255).byte()


def varint(number: int) -> bytes:
    """A number as headers have it (docs/bitstream.md): seven bits a byte, low ones first."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


class Damage:
    """Damages streams of `good`, each kind drawn alike; `forged` says whether the last one's checksums fit."""

    def __init__(self, good: list[bytes], seed: int):
        self.good, self.random = good, random.Random(seed)
        self.forged = False
        self.kinds: list[Callable[[bytes], bytes]] = [
            self.cut, self.flip, self.splice, self.noise, self.lie, self.lengthen, self.forge_payload, self.forge_header,
        ]  # fmt: skip

    def __call__(self) -> bytes:
        """One damaged stream."""
        stream = self.random.choice(self.good)
        while True:
            self.forged = False
            damaged = self.random.choice(self.kinds)(stream)
            if damaged not in self.good:
                return damaged

    def cut(self, stream: bytes) -> bytes:
        """Its beginning."""
        return stream[: self.random.randrange(len(stream))]

    def flip(self, stream: bytes) -> bytes:
        """One to eight other bits."""
        damaged = bytearray(stream)
        for _ in range(self.random.randint(1, 8)):
            damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
        return bytes(damaged)

    def splice(self, stream: bytes) -> bytes:
        """The beginning of one, the end of another."""
        other = self.random.choice(self.good)
        return stream[: self.random.randrange(len(stream))] + other[self.random.randrange(len(other)) :]

    def noise(self, stream: bytes) -> bytes:
        """A good beginning, then anything."""
        return stream[: self.random.randint(0, 24)] + self.random.randbytes(self.random.randint(0, 200))

    def lie(self, stream: bytes) -> bytes:
        """Another size, up to 2^32, in its header."""
        info = bitstream.describe(stream)
        start = bitstream.FIXED_BYTES
        end = start + len(varint(info.height)) + len(varint(info.width))
        sides = [varint(self.random.randrange(1 << self.random.randint(1, 32))) for _ in range(2)]
        return stream[:start] + b"".join(sides) + stream[end:]

    def lengthen(self, stream: bytes) -> bytes:
        """Bytes behind its end, or put in somewhere."""
        place = self.random.choice([len(stream), self.random.randrange(len(stream))])
        return stream[:place] + self.random.randbytes(self.random.randint(1, 40)) + stream[place:]

    def forge_payload(self, stream: bytes) -> bytes:
        """Other payloads, digests and guard lists, with checksums that fit."""
        self.forged = True
        info = bitstream.describe(stream)
        layers = [
            Layer(
                self.random.randbytes(self.random.randint(0, 2 * length + 8)),
                self.random.randrange(1 << 16),
                {self.random.randrange(1 << self.random.randint(1, 30)): self.random.randrange(256)
                 for _ in range(self.random.choice([0, 0, 1, 5]))},
            )
            for length in info.layers.values()
        ]  # fmt: skip
        fingerprint = bytes.fromhex(info.fingerprint)
        return bitstream.pack(fingerprint, info.height, info.width, layers, info.rate)

    def forge_header(self, stream: bytes) -> bytes:
        """Another small size, rate or number of layers, with checksums that fit."""
        self.forged = True
        info = bitstream.describe(stream)
        _, layers = bitstream.unpack(stream, bytes.fromhex(info.fingerprint))
        height, width = self.random.choice([*SIZES, (info.height, self.random.randint(0, 300))])
        rate = self.random.choice([None, info.rate, self.random.randrange(256)])
        count = self.random.randint(1, len(layers))
        return bitstream.pack(bytes.fromhex(info.fingerprint), height, width, layers[:count], rate)


def decode_seconds(codec: FeatureCodec, stream: bytes) -> float:
    """Time of the processor that one decoding takes."""
    start = time.process_time()
    codec.decode(stream)
    return time.process_time() - start


def claimed_size(stream: bytes) -> tuple[int, int] | None:
    """What its header says, where it says something."""
    try:
        info = bitstream.describe(stream)
    except BitstreamError:
        return None
    return info.height, info.width


def peak_mib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--codec", str(smoke.codec(folder)), "--streams", "200"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="exported codec")
    parser.add_argument("--streams", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> int:
    """Damage, decode, count; returns the exit code."""
    options = smoke.parse(create_parser(), small)
    codec = FeatureCodec.from_pretrained(options.codec)
    rates = [None] if codec.y2_gain is None else [0.0, 0.5, 1.0]
    good = [codec.encode(noise(*size, seed), rate) for size in SIZES for seed in range(3) for rate in rates]
    slowest = max(decode_seconds(codec, stream) for stream in good for _ in range(3))
    # What may be decoded at most: the largest size that a forged header names.
    largest = codec.encode(noise(320, 320, 0))
    slowest = max(slowest, *(decode_seconds(codec, largest) for _ in range(3)))
    before = peak_mib()

    damage, errors, decoded, worst, failures = Damage(good, options.seed), Counter[str](), 0, 0.0, []
    for _ in track(range(options.streams), description="decoding damaged streams"):
        stream = damage()
        start = time.process_time()
        try:
            codec.decode(stream)
            decoded += damage.forged
            if not damage.forged:
                failures.append(("no error", stream))
        except BitstreamError as error:
            errors[re.sub(r"0x\w+|\b[0-9a-f]{8}\b|\d+", "N", str(error))] += 1
        except Exception as error:
            failures.append((repr(error), stream))
        seconds = time.process_time() - start
        worst = max(worst, seconds / max(slowest, FLOOR_SECONDS))
        if seconds > MAX_RATIO * max(slowest, FLOOR_SECONDS):
            failures.append((f"{seconds:.3f} s, claims {claimed_size(stream)}", stream))
    memory = peak_mib() - before

    for message, count in errors.most_common():
        print(f"{count:7d}  {message}")
    print(f"{decoded:7d}  forged streams gave features")
    print(f"worst time {worst:.2f} of a good stream's, {memory:.1f} MiB more memory")
    for what, stream in failures[:20]:
        print(f"FAILED: {what}: {stream.hex()}", file=sys.stderr)
    if options.json:
        figures = {"streams": options.streams, "errors": dict(errors), "decoded": decoded, "worst_ratio": worst,
                   "memory_mib": memory, "failures": len(failures)}  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(failures) or memory > MAX_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
