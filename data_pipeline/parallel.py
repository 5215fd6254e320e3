"""An ordered map over processes that holds few results at a time, whatever the length of its input."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


def ordered_map(
    function: Callable[[J], R], jobs: Iterable[J], num_processes: int | None = None, chunk: int = 16
) -> Iterator[R]:
    """Results of `function` over `jobs`, in the order of the jobs, computed by `num_processes` processes.

    `Executor.map` submits all jobs at once and keeps every result until it is asked for; here at most four
    chunks a process are under way, so memory stays flat over millions of images. None: a process a core.
    """
    num_processes = num_processes or os.cpu_count() or 1
    with ProcessPoolExecutor(num_processes, initializer=_one_thread) as pool:
        left = iter(jobs)
        chunks = iter(lambda: tuple(islice(left, chunk)), ())
        pending: deque[Future[list[R]]] = deque(
            pool.submit(_apply, function, part) for part in islice(chunks, 4 * num_processes)
        )
        try:
            while pending:
                results = pending.popleft().result()
                pending.extend(pool.submit(_apply, function, part) for part in islice(chunks, 1))
                yield from results
        finally:
            for future in pending:
                future.cancel()


def _apply(function: Callable[[J], R], jobs: tuple[J, ...]) -> list[R]:
    return [function(job) for job in jobs]


def _one_thread() -> None:
    # Each process has its core; OpenCV's own threads would only contend.
    import cv2

    cv2.setNumThreads(0)
