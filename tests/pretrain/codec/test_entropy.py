from __future__ import annotations

import math

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.codec.entropy import (
    MAX_TAIL,
    STATE_BITS,
    CoderTable,
    CoderTables,
    LatentEntropy,
    SymbolDecoder,
    bottleneck_likelihood,
    bottleneck_round,
    encode_symbols,
    scale_indexes,
    scale_table,
    solve_quantiles,
)
from pretrain.errors import BitstreamError, CodecError


def random_prior(channels: int = 8, seed: int = 0, spread: float = 1.0) -> EntropyBottleneck:
    """A factorized prior with parameters far from their initial values."""
    torch.manual_seed(seed)
    prior = EntropyBottleneck(channels)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return prior


@pytest.fixture(scope="module")
def tables() -> CoderTables:
    torch.manual_seed(0)
    entropy = LatentEntropy(4)
    solve_quantiles(entropy.z)
    return CoderTables.build(entropy)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(16, 400), size=st.sampled_from([0, 1, 50, 10**6]))
def test_encode_symbols__any_symbols_return(tables: CoderTables, seed: int, count: int, size: int):
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
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 4, 60, 10**4, 10**7]))
def test_likelihoods__are_what_the_coder_takes(tables: CoderTables, seed: int, size: int):
    torch.manual_seed(seed)
    symbols, indexes = torch.randint(-size, size + 1, (2000,)).int(), torch.randint(0, 64, (2000,)).int()
    bits = -float(tables.y2.likelihoods(symbols, indexes).log2().sum()) + STATE_BITS
    assert abs(len(encode_symbols([(tables.y2, symbols, indexes)])) - bits / 8) <= 1 + 1e-4 * bits / 8


def test_scale_indexes__is_the_nearest_table():
    table = scale_table()
    assert scale_indexes(torch.tensor(table, dtype=torch.float64))[0].tolist() == list(range(64))
    scales = torch.tensor([-1.0, 0.0, 0.99 * table[30], 1.01 * table[30], 1e9], dtype=torch.float64)
    assert scale_indexes(scales)[0].tolist() == [0, 0, 30, 30, 63]


@pytest.mark.parametrize("payload", [b"", b"\x01\x02\x03\x04"])
def test_symbol_decoder__too_short_a_payload(payload: bytes):
    with pytest.raises(BitstreamError, match="too short"):
        SymbolDecoder(payload, 16)


def test_symbol_decoder__garbage_gives_symbols_not_a_crash(tables: CoderTables):
    indexes = torch.arange(4096, dtype=torch.int32) % 64
    for seed in range(50):
        garbage = bytes(torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(seed)).tolist())
        assert SymbolDecoder(garbage, len(indexes)).read(tables.y2, indexes).shape == indexes.shape


@pytest.mark.parametrize("seed", range(4))
def test_solve_quantiles__meets_the_cumulative_from_any_parameters(seed: int):
    prior = random_prior(seed=seed)
    solve_quantiles(prior)
    with torch.no_grad():
        cumulative = torch.sigmoid(prior._logits_cumulative(prior.quantiles.double().float(), True))[:, 0]
    assert torch.allclose(cumulative[:, 1], torch.full((8,), 0.5), atol=5e-3)
    assert (cumulative[:, 0] < 1e-8).all()
    assert (cumulative[:, 2] > 1 - 1e-6).all()


def test_solve_quantiles__leaves_solved_quantiles_to_the_bit():
    prior = random_prior()
    solve_quantiles(prior)
    with torch.no_grad():
        prior.quantiles[:, 0, 1] += 1e-4  # as another machine's arithmetic might have it
    before = prior.quantiles.detach().clone()
    solve_quantiles(prior)
    assert torch.equal(prior.quantiles, before)


def test_solve_quantiles__follows_changed_weights():
    prior = random_prior()
    solve_quantiles(prior)
    before = prior.quantiles.detach().clone()
    with torch.no_grad():
        prior.biases[-1].add_(3)
    solve_quantiles(prior)
    assert ((prior.quantiles - before)[:, 0, 1] < -0.01).all()


def test_solve_quantiles__cuts_priors_too_wide_for_a_table():
    prior = EntropyBottleneck(2)
    with torch.no_grad():
        prior.matrices[0].sub_(12)  # softplus(matrix) becomes tiny: a density over millions of symbols
    solve_quantiles(prior)
    spread = (prior.quantiles - prior.quantiles[:, :, 1:2]).abs()
    assert spread.max().item() <= MAX_TAIL + 1
    solved = prior.quantiles.detach().clone()
    solve_quantiles(prior)
    assert torch.equal(prior.quantiles, solved)
    table = CoderTable.of(prior)
    symbols = torch.tensor([0, 5000, -(10**6), 12] * 4, dtype=torch.int32)
    indexes = torch.tensor([0, 1] * 8, dtype=torch.int32)
    payload = encode_symbols([(table, symbols, indexes)])
    assert torch.equal(SymbolDecoder(payload, 16).read(table, indexes), symbols)


def test_solve_quantiles__diverged_weights_are_named_not_searched_forever():
    prior = random_prior()
    with torch.no_grad():
        prior.matrices[1][0, 0, 0] = math.nan
    with pytest.raises(CodecError, match="diverged"):
        solve_quantiles(prior)


def test_coder_table__leaves_the_models_state_alone():
    prior = random_prior()
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    CoderTable.of(prior)
    assert prior.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())


def test_bottleneck_round__equals_the_pass_with_likelihoods():
    prior = random_prior().eval()
    solve_quantiles(prior)
    values = 5 * torch.randn(2, 8, 3, 4)
    assert torch.equal(bottleneck_round(prior, values), bottleneck_likelihood(prior, values)[0])


def test_likelihoods__stay_float32_under_autocast():
    entropy, values = LatentEntropy(4), torch.randn(1, 4, 2, 2)
    plain = bottleneck_likelihood(entropy.eval().z, values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y2_hat, likelihoods = entropy.y2_likelihood(values.bfloat16(), values.bfloat16(), values.bfloat16())
        mixed = bottleneck_likelihood(entropy.z, values)
    assert y2_hat.dtype == likelihoods.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_y2_likelihood__training_rounds_values_and_keeps_gradients():
    entropy = LatentEntropy(4).train()
    y2 = (3 * torch.randn(2, 4, 5, 5)).requires_grad_()
    means, scales = torch.randn(2, 4, 5, 5), torch.rand(2, 4, 5, 5) + 0.5
    torch.manual_seed(0)
    y2_hat, likelihoods = entropy.y2_likelihood(y2, means, scales)
    assert torch.allclose(y2_hat - means, (y2_hat - means).round(), atol=1e-5)
    (gradient,) = torch.autograd.grad(y2_hat.sum(), y2, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(gradient))
    (gradient,) = torch.autograd.grad(-likelihoods.log().sum(), y2)
    assert float(gradient.abs().min()) > 0
    torch.manual_seed(0)
    again = entropy.y2_likelihood(y2, means, scales)[1]
    assert torch.equal(again, likelihoods)
    assert not torch.equal(entropy.y2_likelihood(y2, means, scales)[1], likelihoods)


def test_y2_likelihood__eval_is_deterministic_rounding():
    entropy = LatentEntropy(4).eval()
    y2, means = 3 * torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    y2_hat, _ = entropy.y2_likelihood(y2, means, torch.ones_like(means))
    assert torch.equal(y2_hat, (y2 - means).round() + means)
