from __future__ import annotations

import re
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.codec.bitstream import LISTED, PLAIN, ChannelList, Layer, describe, pack, unpack
from pretrain.errors import BitstreamError, CodecError

FINGERPRINT = bytes.fromhex("0123456789abcdef")
LAYERS = [Layer(b"first payload", 0x1234), Layer(b"second", 0xBEEF)]
SIDES = st.integers(16, 8000)


@given(height=SIDES, width=SIDES, payloads=st.lists(st.binary(max_size=300), min_size=1, max_size=2))
def test_unpack__returns_what_was_packed(height: int, width: int, payloads: list[bytes]):
    layers = [Layer(payload, number) for number, payload in enumerate(payloads)]
    stream = pack(FINGERPRINT, height, width, layers)
    info, found = unpack(stream, FINGERPRINT)
    assert found == layers
    assert (info.height, info.width, info.version) == (height, width, PLAIN)
    assert list(info.layers.values()) == [len(payload) for payload in payloads]
    assert info.num_bytes == len(stream)
    assert info == describe(stream)


@pytest.mark.parametrize(("side", "length", "most"), [(64, 100, 16), (1024, 20_000, 20), (11_000, 10**7, 24)])
def test_pack__header_stays_small(side: int, length: int, most: int):
    one = pack(FINGERPRINT, side, side, [Layer(bytes(length), 0)])
    assert describe(one).header_bytes <= most
    two = pack(FINGERPRINT, side, side, [Layer(bytes(length), 0), Layer(bytes(length), 0)])
    assert describe(two).header_bytes <= 32 + 2


def test_describe__needs_the_header_alone():
    stream = pack(FINGERPRINT, 480, 640, LAYERS)
    info = describe(stream)
    assert info.fingerprint == "01234567"
    assert info.layers == {"base": 13, "rest": 6}
    assert info.bits_per_pixel == pytest.approx(8 * len(stream) / (480 * 640))
    assert describe(stream[: info.header_bytes]) == info


def test_unpack__first_layer_from_the_beginning_of_a_stream():
    stream = pack(FINGERPRINT, 480, 640, LAYERS)
    _, layers = unpack(stream[:-6], FINGERPRINT, num_layers=1)
    assert layers == LAYERS[:1]
    with pytest.raises(BitstreamError, match="cut"):
        unpack(stream[:-7], FINGERPRINT, num_layers=1)


@pytest.mark.parametrize("rate", [None, 0, 255])
@pytest.mark.parametrize("guards", [({}, {}), ({0: 63}, {}), ({5: 0, 6: 1, 70_000: 2}, {127: 9})])
def test_unpack__rate_and_guard_lists_come_back(rate: int | None, guards: tuple[dict[int, int], dict[int, int]]):
    layers = [Layer(layer.payload, layer.digest, guard) for layer, guard in zip(LAYERS, guards, strict=True)]
    info, found = unpack(pack(FINGERPRINT, 480, 640, layers, rate), FINGERPRINT)
    assert found == layers
    assert info.rate == rate


def test_unpack__a_guard_list_longer_than_its_layer_is_damage():
    whole = pack(FINGERPRINT, 480, 640, [Layer(b"", 0, {1: 2})])
    start = describe(whole).header_bytes
    for claim in (b"\x05\x01\x02", b"\xff\xff\xff\xff\x07", b"\x01\xff"):
        fixed = whole[: start - 7]
        check = google_crc32c.extend(google_crc32c.value(fixed), b"\0\0" + claim)
        stream = fixed + bytes([len(claim), 0, 0]) + check.to_bytes(4, "little") + claim
        with pytest.raises(BitstreamError):
            unpack(stream, FINGERPRINT)


@given(data=st.data(), total=st.integers(1, 320))
def test_unpack__channel_lists_come_back(data: st.DataObject, total: int):
    chosen = data.draw(st.sets(st.integers(0, total - 1), min_size=1))
    channels = ChannelList(tuple(sorted(chosen)), total)
    stream = pack(FINGERPRINT, 480, 640, LAYERS, None, channels)
    info, found = unpack(stream, FINGERPRINT)
    assert (info.channels, info.version, found) == (channels, LISTED, LAYERS)
    assert stream[: info.base_bytes].endswith(LAYERS[0].payload)
    assert sorted(channels.chosen + channels.others) == list(range(total))


@pytest.mark.parametrize(("count", "most"), [(16, 10), (32, 16), (96, 24)])
def test_channel_list__takes_the_bytes_of_its_choice(count: int, most: int):
    """Three bytes say how many of how many."""
    lists = [tuple(range(count)), tuple(range(192 - count, 192)), tuple(range(0, 2 * count, 2))]
    assert [len(ChannelList(chosen, 192).pack()) for chosen in lists] == [3 + most] * 3


@pytest.mark.parametrize("chosen", [(), (3, 2), (1, 1), (-1, 2), (0, 192)])
def test_channel_list__refuses_what_is_none(chosen: tuple[int, ...]):
    with pytest.raises(CodecError, match=r"ascending|0\.\.191"):
        ChannelList(chosen, 192)


@pytest.mark.parametrize("claim", [b"\xc0\x01\x00", b"\x00\x00", b"\x05\x06", b"\xff\xff\x7f\x01", b"\x05\x02\xff"])
def test_unpack__a_channel_list_that_is_none_is_damage(claim: bytes):
    fixed = b"\xd1\xc3\x71" + FINGERPRINT[:4] + b"\x40\x40" + claim
    check = google_crc32c.extend(google_crc32c.value(fixed), b"\0\0payload")
    with pytest.raises(BitstreamError, match="channel"):
        unpack(fixed + bytes([7, 0, 0]) + check.to_bytes(4, "little") + b"payload", FINGERPRINT)


@pytest.mark.parametrize("channels", [None, ChannelList((1, 5, 6), 32)])
def test_unpack__every_flipped_bit_is_noticed(channels: ChannelList | None):
    stream = pack(FINGERPRINT, 480, 640, LAYERS, None, channels)
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            unpack(bytes(damaged), FINGERPRINT)


@pytest.mark.parametrize("channels", [None, ChannelList((1, 5, 6), 32)])
def test_unpack__every_cut_is_named(channels: ChannelList | None):
    stream = pack(FINGERPRINT, 480, 640, LAYERS, None, channels)
    for length in range(1, len(stream)):
        with pytest.raises(BitstreamError, match="cut"):
            unpack(stream[:length], FINGERPRINT)


def test_unpack__layers_of_two_streams_do_not_mix():
    first = pack(FINGERPRINT, 480, 640, LAYERS)
    second = pack(FINGERPRINT, 480, 640, [Layer(b"other payload", 0x4321), Layer(b"others", 0xBEEF)])
    row, end = describe(first).header_bytes - 7, describe(first).header_bytes + 13
    spliced = first[:row] + second[row : row + 7] + first[row + 7 : end] + second[end:]
    with pytest.raises(BitstreamError, match="rest does not match"):
        unpack(spliced, FINGERPRINT)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"", "not a dicm stream"),
        (b"\xff\xd8\xff\xe0 a photo", "not a dicm stream"),
        (pack(bytes(8), 480, 640, LAYERS), "codec 00000000, this is 01234567"),
        (pack(FINGERPRINT, 480, 640, LAYERS) + b"x", "bytes behind its end"),
        (b"\xd1\xc3\x81" + pack(FINGERPRINT, 480, 640, LAYERS)[3:], "version 8"),
        (b"\xd1\xc3\x71" + pack(FINGERPRINT, 480, 640, LAYERS)[3:], "52 of 13 channels"),
        (pack(FINGERPRINT, 60_000, 60_000, LAYERS), "60000 x 60000"),
        (pack(FINGERPRINT, 10**9, 64, LAYERS), "sides must lie in"),
        (pack(FINGERPRINT, 8, 64, LAYERS), "sides must lie in"),
        (b"\xd1\xc3\x11" + pack(FINGERPRINT, 480, 640, LAYERS)[3:], "version 1"),
        (b"\xd1\xc3\x61" + FINGERPRINT[:4] + b"\xff" * 20, "more than 35 bits"),
        ("text", "this is str"),
    ],
)
def test_unpack__says_what_is_wrong(stream: bytes, words: str):
    with pytest.raises(BitstreamError, match=words):
        unpack(stream, FINGERPRINT)


def test_pack__writes_the_documented_example():
    page = (Path(__file__).parents[3] / "docs" / "bitstream.md").read_text()
    rows = re.findall(r"^\| `([0-9a-f ]+)` \|", page, flags=re.MULTILINE)
    stream = bytes.fromhex("".join(rows))
    layer = Layer(b"payload", 0x1234, {3: 7, 300: 8})
    assert stream == pack(bytes.fromhex("5b5dd38e"), 64, 300, [layer], rate=255)
