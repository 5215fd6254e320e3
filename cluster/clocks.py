"""Clocks of nodes that are apart: training does not mind, but times in logs do, and stores refuse such requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from cluster.runtime import Runtime

MOST_SECONDS = 30.0

logger = logging.getLogger(__name__)


def check_clocks(runtime: Runtime, place_of: Callable[[int], str]) -> None:
    """Warn of nodes whose clock is far from rank 0's; a collective.

    Args:
        place_of: rank -> rank and node, to be shown.
    """
    runtime.barrier()  # so that all read their clocks at the same moment
    clocks = runtime.gather(torch.tensor([time.time()], dtype=torch.float64)).tolist()
    if runtime.rank == 0:
        for rank, clock in enumerate(clocks):
            if abs(apart := clock - clocks[0]) > MOST_SECONDS:
                logger.warning(
                    "%s: its clock is %.0f s %s rank 0's; set it (NTP): times in the logs are wrong, and a store may "
                    "refuse its requests",
                    place_of(rank),
                    abs(apart),
                    "ahead of" if apart > 0 else "behind",
                )
