from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from cluster.exchange import EVENTS, MESSAGES, UNSTARTED, Exchange, MessageHandler, MessageReader

SHOWN = logging.makeLogRecord({"name": "cluster.launch", "msg": "shown", "levelno": logging.WARNING})


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    folder = tmp_path / "run" / "ray" / "20260131-120000-1"
    folder.mkdir(parents=True)
    return Exchange(folder)


def tell(exchange: Exchange, *events: str) -> None:
    for number, event in enumerate(events):
        exchange.add_event(event, reason=f"{event} {number}", step=0)


def test_events__a_torn_line_is_left_out(exchange: Exchange):
    tell(exchange, "start", "lost")
    with (exchange.folder / EVENTS).open("a") as file:
        file.write('{"event": "lost", "ti')  # as far as a full disk took it
    assert [event["event"] for event in exchange.events()] == ["start", "lost"]
    assert exchange.failures() == 1


def test_add_event__after_a_torn_line_is_a_line_of_its_own(exchange: Exchange):
    tell(exchange, "start")
    with (exchange.folder / EVENTS).open("a") as file:
        file.write('{"event": "lost", "ti')
    tell(exchange, "lost")
    assert [event["event"] for event in exchange.events()] == ["start", "lost"]


def test_add_event__that_the_disk_does_not_take_is_told(exchange: Exchange, caplog: pytest.LogCaptureFixture):
    (exchange.folder / EVENTS).symlink_to("/dev/full")
    tell(exchange, "lost")
    assert f"{exchange.folder / EVENTS}: 'lost' could not be noted (No space left on device)" in caplog.text


@pytest.mark.parametrize(
    "torn",
    ['[1.0, "cluster.launch", 30, "half a mess', "[1.0, 2]", "null", '["then", "cluster", 30, "text"]', "\x00\xff"],
)
def test_show__a_torn_message_is_left_out_and_the_next_is_shown(
    torn: str, exchange: Exchange, caplog: pytest.LogCaptureFixture
):
    path = exchange.folder / MESSAGES.replace("*", "0")
    path.write_bytes(torn.encode("latin-1"))
    MessageHandler(exchange, "0").emit(SHOWN)
    MessageReader(exchange).show()
    assert [record.getMessage() for record in caplog.records] == ["shown"]


def test_show__a_file_that_cannot_be_read_is_told_once(exchange: Exchange, caplog: pytest.LogCaptureFixture):
    path = exchange.folder / MESSAGES.replace("*", "0")
    path.symlink_to("/proc/self/mem")  # whose bytes at 0 are an I/O error, as a failing disk gives it
    reader = MessageReader(exchange)
    reader.show()
    reader.show()
    assert caplog.text.count(f"{exchange.folder}: messages of the workers cannot be read") == 1
    path.unlink()
    MessageHandler(exchange, "0").emit(SHOWN)
    reader.show()
    assert "shown" in caplog.text


def test_ask_to_stop__reaches_workers_though_the_folder_was_removed(exchange: Exchange):
    shutil.rmtree(exchange.folder.parent)
    exchange.ask_to_stop()
    assert exchange.stop_asked


def test_ask_to_stop__where_nothing_can_be_written_is_a_warning(exchange: Exchange, caplog: pytest.LogCaptureFixture):
    """It is called by a signal's handler: an exception would come out of whatever runs at that moment."""
    shutil.rmtree(exchange.folder.parent)
    exchange.folder.parent.touch()  # a file: no folder can be in it
    exchange.ask_to_stop()
    assert "the workers cannot be told to stop (Not a directory)" in caplog.text


def test_interruption__is_none_of_a_first_group(exchange: Exchange):
    tell(exchange, "start")
    assert exchange.interruption() is None


def test_interruption__is_what_came_first_though_a_start_failed_meanwhile(exchange: Exchange):
    tell(exchange, "start", "drained", "start", "lost", "start", UNSTARTED, "start", UNSTARTED, "lost", "start")
    interruption = exchange.interruption()
    assert interruption is not None
    assert interruption["reason"] == "lost 3"


def test_unstarted__counts_starts_in_a_row_that_brought_up_no_group(exchange: Exchange):
    tell(exchange, "start", UNSTARTED, "start", "lost", "start", UNSTARTED)
    assert exchange.unstarted() == 1
    tell(exchange, "start", UNSTARTED)
    assert exchange.unstarted() == 2
    tell(exchange, "start")
    assert exchange.unstarted() == 0
