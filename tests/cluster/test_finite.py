from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

from worker_functions import Options, bad_step_of_one_rank, facts_of

from cluster.finite import FiniteCheck, all_finite, gradient_norm
from cluster.runtime import LocalRuntime, run

GOOD, BAD = torch.tensor(1.0), torch.tensor(math.nan)


def test_finite_check__names_the_first_bad_step():
    check = FiniteCheck(LocalRuntime())
    check.note(1, GOOD, GOOD)
    assert check.first_bad() is None
    check.note(2, GOOD, torch.tensor(math.inf))
    check.note(3, BAD, BAD)
    check.note(4, GOOD, GOOD)
    assert check.first_bad() == 2


def test_finite_check__ranks_hear_the_same(tmp_path: Path):
    run(bad_step_of_one_rank, Options(str(tmp_path)), workers=2, launcher="local", run_dir=str(tmp_path))
    assert facts_of(tmp_path, 2) == [{"before": None, "first": 5, "finite": True}] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, BAD, torch.tensor([1.0, -math.inf]), BAD.bfloat16()])
def test_all_finite__looks_everywhere(bad: float | torch.Tensor):
    good = {"step": 3, "name": "x", "none": None, "weights": [torch.ones(2), (torch.ones(3, dtype=torch.int64), 0.5)]}
    assert all_finite(good) and all_finite({"empty": torch.zeros(0)})
    assert not all_finite({**good, "deep": [{"state": (bad,)}]})


def test_gradient_norm__of_all_gradients():
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert gradient_norm([first, second, third]) == 5
    assert gradient_norm([third]) == 0
