from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from data_pipeline.in_hand import SIZE, Board, put_down, take

FORK = multiprocessing.get_context("fork")


def _work(board: Board, text: str, done: bool) -> None:
    board.join()
    take("something earlier and longer")
    take(text)
    if done:
        put_down()
    os._exit(1)


def run(board: Board, *works: tuple[str, bool]) -> list[int]:
    """Process ids of workers that ended, each after it took up a text, and put it down where it was done."""
    pids = []
    for text, done in works:
        process = FORK.Process(target=_work, args=(board, text, done))
        process.start()
        process.join()
        pids.append(process.pid or 0)
    return pids


def test_board__tells_what_processes_had_in_hand_when_they_ended():
    board = Board(3, FORK)
    first, _, third = run(board, ("a.png", False), ("b.png", True), (os.fsdecode(b"caf\xe9.png"), False))
    assert board.texts() == ["a.png", os.fsdecode(b"caf\xe9.png")]
    assert board.texts([first]) == ["a.png"] and board.texts([third, 0]) == [os.fsdecode(b"caf\xe9.png")]


def test_board__of_a_long_text_the_end_stays():
    board = Board(1, FORK)
    path = Path("folder" * SIZE) / "picture.png"
    run(board, (str(path), False))
    (text,) = board.texts()
    assert str(path).endswith(text) and text.endswith("/picture.png") and len(text) > SIZE - 20


def test_take__without_a_board_does_nothing():
    take("a.png")
    put_down()
