from __future__ import annotations

import math

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck

from pretrain.codec.entropy import (
    MAX_TAIL,
    CoderTable,
    LatentEntropy,
    bottleneck_likelihood,
    bottleneck_round,
    narrow_prior,
    scale_indexes,
    scale_table,
    solve_quantiles,
)
from pretrain.codec.symbols import SymbolDecoder, encode_symbols
from pretrain.errors import CodecError


def random_prior(channels: int = 8, seed: int = 0, spread: float = 1.0) -> EntropyBottleneck:
    """A factorized prior with parameters far from their initial values."""
    torch.manual_seed(seed)
    prior = EntropyBottleneck(channels)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return prior


def test_scale_indexes__is_the_nearest_table():
    table = scale_table()
    assert scale_indexes(torch.tensor(table, dtype=torch.float64))[0].tolist() == list(range(64))
    scales = torch.tensor([-1.0, 0.0, 0.99 * table[30], 1.01 * table[30], 1e9], dtype=torch.float64)
    assert scale_indexes(scales)[0].tolist() == [0, 0, 30, 30, 63]


@torch.no_grad()
def test_narrow_prior__density_has_the_deviations_of_noisy_values():
    torch.manual_seed(0)
    prior, wanted = EntropyBottleneck(4), torch.tensor([0.0, 0.3, 2.0, 25.0])
    narrow_prior(prior, wanted)
    edges = torch.linspace(-400, 400, 160_001).repeat(4, 1, 1)
    mass = torch.sigmoid(prior._logits_cumulative(edges, True))[:, 0].diff()
    centres = (edges[:, 0, 1:] + edges[:, 0, :-1]) / 2
    mean = (mass * centres).sum(1, keepdim=True)
    deviations = (mass * (centres - mean).square()).sum(1).sqrt()
    torch.testing.assert_close(deviations, (wanted.square() + 1 / 12).sqrt(), rtol=0.02, atol=0)


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
