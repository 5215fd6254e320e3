"""Whether a training is still one: its losses, gradients and state are finite.

A step must not wait for a GPU. The number of the first step whose loss or gradient is not finite is therefore kept on
the device, and read where the training waits for the device in any case: where it logs, and before it saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

from cluster.runtime import Runtime


class FiniteCheck:
    """Remembers the first step of this group of workers that was not finite.

    Args:
        runtime: whose ranks hear the same answers, so that all of them end together.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._first = torch.zeros((), dtype=torch.int64, device=runtime.device)  # 0: there was none

    def note(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Take in a step, counted from 1: scalars on the runtime's device. Does not wait for them."""
        is_bad = ~(loss.isfinite() & grad_norm.isfinite())
        self._first.masked_fill_(is_bad & (self._first == 0), step)

    def first_bad(self) -> int | None:
        """The first step with a loss or a gradient that is not finite, on any rank; a collective, as `is_finite`."""
        if not self.runtime.mean({"first": float(self._first)})["first"]:
            return None
        firsts = self.runtime.gather(self._first[None])
        return int(firsts[firsts > 0].min())

    def is_finite(self, state: Any) -> bool:
        """Whether the state that rank 0 is about to save is finite; what other ranks give is not looked at."""
        return bool(self.runtime.broadcast(all_finite(state) if self.runtime.rank == 0 else None))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm (scalar) of all gradients together; 0 where there are none."""
    return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def all_finite(state: Any) -> bool:
    """Whether all tensors and numbers in nested dicts, lists and tuples are finite; waits once for each device."""
    answers: dict[torch.device, list[Tensor]] = defaultdict(list)
    for leaf in tree_leaves(state):
        if isinstance(leaf, float | Tensor):
            tensor = torch.as_tensor(leaf)
            answers[tensor.device].append(tensor.isfinite().all())
    return all(bool(torch.stack(each).all()) for each in answers.values())
