"""An ordered map over processes that holds few results at a time, whatever the length of its input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.context import BaseContext
from types import FrameType
from typing import TypeVar

from cluster import machine
from data_pipeline.errors import DataError
from data_pipeline.in_hand import Board, put_down

J = TypeVar("J")
R = TypeVar("R")


def ordered_map(
    function: Callable[[J], R],
    jobs: Iterable[J],
    num_processes: int | None = None,
    chunk: int = 16,
    preload: Sequence[str] = (),
    remedy: str = "with more free memory",
) -> Iterator[R]:
    """Results of `function` over `jobs`, in the order of the jobs, computed by `num_processes` processes.

    `Executor.map` submits all jobs at once and keeps every result until it is asked for; here at most four
    chunks a process are under way, so memory stays flat over millions of images. None: a process a core that this
    process may use, as far as memory has room.

    Args:
        function, jobs: are pickled.
        preload: names of modules that the processes share. The first map of a program decides; where a later one
            needs others, each of its processes imports them.
        remedy: how to run the same again after a process was ended from outside.

    Raises:
        DataError: a process was ended from outside, with what it had in hand (`data_pipeline.in_hand`); and whatever
            `function` raises.
    """
    num_processes = num_processes or machine.num_processes()
    # Not forked from this process: threads of its libraries (Ray, Arrow, OpenCV) do not survive that, their locks do.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    board = Board(num_processes, context)
    try:
        yield from _results(function, jobs, num_processes, chunk, context, board)
    except BrokenProcessPool as error:
        # The others were ended as well by now, and have put down what they had in hand.
        held = " and ".join(board.texts())
        raise DataError(
            f"a worker process was ended from outside{f' while it read {held}' if held else ''}, perhaps for want of "
            f"memory; run the same again, {remedy}{', or without that file' if held else ''}"
        ) from error


def _results(
    function: Callable[[J], R],
    jobs: Iterable[J],
    num_processes: int,
    chunk: int,
    context: BaseContext,
    board: Board,
) -> Iterator[R]:
    with ProcessPoolExecutor(num_processes, context, initializer=_settle, initargs=(board,)) as pool:
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
    results = [function(job) for job in jobs]
    put_down()
    return results


def _settle(board: Board) -> None:
    """Make a new worker process one thread of work that its parent alone ends."""
    board.join()
    # The pool ends the others in this way when one has died: they have nothing to do with it.
    signal.signal(signal.SIGTERM, _leave)
    # Each process has its core; OpenCV's own threads would only contend.
    import cv2

    cv2.setNumThreads(0)
    # A server of processes that was started for workers of a run holds SIGTERM back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # Ctrl-C reaches every process of the terminal; the parent sees to it, and workers have nothing to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _leave(number: int, frame: FrameType | None) -> None:
    put_down()
    os._exit(128 + number)


def _follow_parent() -> None:
    # A killed parent tells its workers nothing: they would wait for jobs for ever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
