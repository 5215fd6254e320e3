from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from data_pipeline.errors import DataError
from data_pipeline.in_hand import take
from data_pipeline.parallel import ordered_map


def _slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def _fail(number: int) -> int:
    raise KeyError(number)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_ordered_map__keeps_the_order(count: int):
    assert list(ordered_map(_slow_square, range(count), 2, chunk=3)) == [n * n for n in range(count)]


def test_ordered_map__holds_few_jobs_at_a_time():
    """An endless input is worked on, so its length does not matter to memory."""
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            yield taken
            taken += 1

    results = ordered_map(_slow_square, endless(), 2, chunk=2)
    assert list(islice(results, 10)) == [n * n for n in range(10)]
    results.close()  # type: ignore[attr-defined]
    assert taken <= 10 + 2 * (4 * 2 + 2)


def _end(number: int) -> int:
    os._exit(1)


def test_ordered_map__a_process_that_was_ended_is_told_in_one_line():
    with pytest.raises(DataError, match=r"a worker process was ended from outside.*run the same again, with") as error:
        list(ordered_map(_end, range(3), 1))
    assert "\n" not in str(error.value)


def test_ordered_map__passes_errors_on():
    with pytest.raises(KeyError):
        list(ordered_map(_fail, range(3), 1))


def _die_on_three(number: int) -> int:
    take(f"picture {number}")
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(0.01)
    return number


def test_ordered_map__names_what_a_process_that_died_had_in_hand():
    with pytest.raises(DataError, match=r"ended from outside while it read picture 3, perhaps"):
        list(ordered_map(_die_on_three, range(40), 2, chunk=1))
