from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.codec.entropy import CoderTables, LatentEntropy, scale_indexes
from pretrain.codec.symbols import SHORT_SYMBOLS, SymbolDecoder, encode_symbols, state_bits
from pretrain.errors import BitstreamError

LONG = SHORT_SYMBOLS + 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.one_of(st.integers(0, 400), st.integers(SHORT_SYMBOLS // 2 - 2, SHORT_SYMBOLS // 2 + 2)),
    size=st.sampled_from([0, 1, 50, 10**6, (1 << 24) - 1]),
)
def test_encode_symbols__any_symbols_return(tables: CoderTables, seed: int, count: int, size: int):
    """Also just below and above the number from which compressai's coder takes over."""
    torch.manual_seed(seed)
    z, z_indexes = torch.randint(-size, size + 1, (count,)).int(), torch.randint(0, 4, (count,)).int()
    y2, y2_indexes = torch.randint(-size, size + 1, (count,)).int(), torch.randint(0, 64, (count,)).int()
    payload = encode_symbols([(tables.z, z, z_indexes), (tables.y2, y2, y2_indexes)])
    reader = SymbolDecoder(payload, 2 * count)
    assert torch.equal(reader.read(tables.z, z_indexes), z)
    assert torch.equal(reader.read(tables.y2, y2_indexes), y2)


@pytest.mark.parametrize("scale", [0.15, 0.4, 1.0, 3.1, 20.0])
def test_encode_symbols__bytes_match_likelihoods(tables: CoderTables, scale: float):
    torch.manual_seed(1)
    scales = scale * torch.empty(20000).uniform_(0.9, 1.1)
    values = (torch.randn(20000) * scales).round()
    _, likelihoods = LatentEntropy(1).eval().y2_likelihood(values, torch.zeros(20000), scales)
    payload = encode_symbols([(tables.y2, values.int(), scale_indexes(scales.double())[0])])
    estimate = float(likelihoods.log2().sum()) / -8
    assert abs(len(payload) - estimate) <= 0.01 * estimate + 8


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from([20, 2000, LONG]),
    size=st.sampled_from([1, 4, 60, 10**4, 10**7]),
)
def test_likelihoods__are_what_the_coder_takes(tables: CoderTables, seed: int, count: int, size: int):
    torch.manual_seed(seed)
    symbols, indexes = torch.randint(-size, size + 1, (count,)).int(), torch.randint(0, 64, (count,)).int()
    bits = -float(tables.y2.likelihoods(symbols, indexes).log2().sum()) + state_bits(count)
    more = len(encode_symbols([(tables.y2, symbols, indexes)])) - bits / 8
    # Above: what rounding up to bytes costs. Below: zero bytes at the end of a short payload are not written, and one
    # more of them than expected is luck of one in 256.
    assert -4 - 1e-4 * bits / 8 <= more <= 1 + 1e-4 * bits / 8


def test_encode_symbols__what_was_expected_takes_no_byte(tables: CoderTables):
    """A short payload begins at nothing: the likeliest symbols of narrow tables leave a state of few bits."""
    indexes = torch.zeros(64, dtype=torch.int32)
    assert len(encode_symbols([(tables.y2, torch.zeros(64, dtype=torch.int32), indexes)])) <= 1


@pytest.mark.parametrize("payload", [b"", b"\x01\x02\x03\x04"])
def test_symbol_decoder__too_short_a_payload(payload: bytes):
    with pytest.raises(BitstreamError, match="too short"):
        SymbolDecoder(payload, LONG)


def garbage(seed: int, count: int) -> bytes:
    return bytes(torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def indexes_of(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32) % 64


@pytest.mark.parametrize("count", [4096, LONG])
def test_symbol_decoder__garbage_gives_symbols_or_an_error_not_a_crash(tables: CoderTables, count: int):
    indexes = indexes_of(count)
    for seed in range(50):
        with suppress(BitstreamError):
            assert SymbolDecoder(garbage(seed, 40), count).read(tables.y2, indexes).shape == indexes.shape


def test_symbol_decoder__a_number_outside_of_every_interval_is_named(tables: CoderTables):
    indexes = indexes_of(2000)
    with pytest.raises(BitstreamError, match="outside of every"):
        SymbolDecoder(b"\xff" * 4000, 2000).read(tables.y2, indexes)
