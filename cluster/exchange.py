"""What driver, controller and workers of a run on Ray tell each other, as files in the run folder.

    RUN/ray/20260131-120000-5f3a91c2/   for as long as the run is up
      stop                           made by the driver: workers save after their step and end
      restart                        made by the controller: workers save after their step and start anew
      step                           step of the newest checkpoint, by rank 0
      group.json                     node and process of every rank of the present group
      events.jsonl                   interruptions and starts, by the controller
      messages_<who>.jsonl           warnings of our packages, which the driver shows

The run folder is on storage that all nodes share, and what is written there outlives whoever wrote it: a Ray worker
gets no signals, because its training function runs in a thread, and the controller forgets what it did not write down.
Storage that does not answer is asked again; a line that a full disk tore is left out by who reads it.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

from cluster.errors import OUR_PACKAGES, reason_of
from cluster.files import append_line, patiently, write_whole

STOP, RESTART, STEP, GROUP, EVENTS = "stop", "restart", "step", "group.json", "events.jsonl"
MESSAGES = "messages_*.jsonl"
SAME_SECONDS = 10.0  # within which the same words of several ranks are one message
UNSTARTED = "unstarted"  # event: the start before it brought up no group of workers

logger = logging.getLogger(__name__)


class Exchange:
    """The folder of one launch.

    Args:
        folder: RUN/ray/NAME, made by the driver.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder.parent.parent

    def ask_to_stop(self) -> None:
        """Let the workers save and end; where the folder was removed, they look for it in a new one.

        Called by a signal's handler, which must not raise into whatever runs at that moment.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STOP).touch()
        except OSError as error:
            logger.warning("%s: the workers cannot be told to stop (%s)", self.folder / STOP, error.strerror)

    def ask_to_restart(self) -> None:
        """Let the workers save and start anew, perhaps in another number."""
        patiently((self.folder / RESTART).touch)

    def clear_restart(self) -> None:
        """Forget an earlier `ask_to_restart`; called before workers start."""
        patiently(lambda: (self.folder / RESTART).unlink(missing_ok=True))

    @property
    def stop_asked(self) -> bool:
        """Whether the workers should save and end."""
        return patiently((self.folder / STOP).exists)

    @property
    def restart_asked(self) -> bool:
        """Whether the workers should save and start anew."""
        return patiently((self.folder / RESTART).exists)

    def write_step(self, step: int) -> None:
        """Note the step of a checkpoint that is complete."""
        patiently(lambda: write_whole(self.folder / STEP, str(step)))

    def read_step(self) -> int:
        """Step of the newest checkpoint of this launch; -1 before the first."""
        try:
            return int((self.folder / STEP).read_text())
        except (OSError, ValueError):
            return -1

    def write_group(self, group: dict[int, str]) -> None:
        """Note where every rank runs."""
        patiently(lambda: write_whole(self.folder / GROUP, json.dumps(group)))

    def place_of(self, rank: int) -> str:
        """Rank and node of a worker of the present group, to be shown."""
        try:
            return f"worker {rank} on {json.loads((self.folder / GROUP).read_text())[str(rank)]}"
        except (OSError, ValueError, KeyError):
            return f"worker {rank}"

    def add_event(self, event: str, **facts: Any) -> None:
        """Append an event, with the time by this process's clock; one that a full disk does not take is told."""
        line = json.dumps({"event": event, "time": time.time(), **facts})
        try:
            patiently(lambda: append_line(self.folder / EVENTS, line))
        except OSError as error:  # in the controller, which the run would end with
            logger.warning("%s: %r could not be noted (%s)", self.folder / EVENTS, event, reason_of(error))

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first; a line that is torn, because a disk was full, is left out."""
        try:
            lines = patiently(lambda: (self.folder / EVENTS).read_text(errors="replace")).splitlines()
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := _parse(line)) is not None]

    def unstarted(self) -> int:
        """How often in a row a start brought up no group."""
        names = [event["event"] for event in reversed(self.events()) if event["event"] in ("start", UNSTARTED)]
        pairs = itertools.takewhile(
            lambda pair: pair == (UNSTARTED, "start"), zip(names[::2], names[1::2], strict=False)
        )
        return len(list(pairs))

    def interruption(self) -> dict[str, Any] | None:
        """Why the group before the present one ended: the first event after the start that brought it up."""
        first, is_up = None, True
        for event in reversed(self.events()[:-1]):  # the last one is the present start
            if event["event"] == UNSTARTED:
                is_up = False
            elif event["event"] == "start":
                if is_up:
                    break
                is_up = True
            else:
                first = event
        return first

    def failures(self) -> int:
        """How often in a row workers were lost with no new checkpoint in between."""
        lost = [event for event in self.events() if event["event"] == "lost"]
        steps = [event["step"] for event in lost]
        return len(list(itertools.takewhile(lambda step: step == steps[-1], reversed(steps))))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


class MessageHandler(logging.Handler):
    """Writes the warnings of our packages where the driver finds them."""

    def __init__(self, exchange: Exchange, who: str) -> None:
        super().__init__(logging.WARNING)
        self.path = exchange.folder / MESSAGES.replace("*", who)

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line; a full disk must not end the training."""
        if record.name.partition(".")[0] in OUR_PACKAGES:
            try:
                append_line(self.path, json.dumps([record.created, record.name, record.levelno, record.getMessage()]))
            except OSError:
                self.handleError(record)


class MessageReader:
    """Reads what the `MessageHandler`s of all processes wrote, a message that several ranks have to say once."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._read: dict[Path, int] = {}
        self._shown: dict[str, float] = {}
        self._told = False  # that they cannot be read

    def show(self) -> None:
        """Log what is new, in this process; a folder that cannot be read now is told once, and read by a later call."""
        try:
            for path in sorted(self.exchange.folder.glob(MESSAGES)):
                self._show(path)
        except OSError as error:  # of messages alone: the run goes on
            if not self._told:
                self._told = True
                folder = self.exchange.folder
                logger.warning("%s: messages of the workers cannot be read (%s)", folder, reason_of(error))

    def _show(self, path: Path) -> None:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        for line in lines[self._read.get(path, 0) :]:
            if not line.endswith("\n"):
                break
            self._read[path] = self._read.get(path, 0) + 1
            if (message := _parse_message(line)) is None:
                continue
            created, name, level, text = message
            if created - self._shown.get(text, 0.0) > SAME_SECONDS:
                logging.getLogger(name).log(level, "%s", text)
            self._shown[text] = created


def _parse_message(line: str) -> tuple[float, str, int, str] | None:
    """Time, logger, level and text of a line; None for one that is torn."""
    try:
        created, name, level, text = json.loads(line)
    except (ValueError, TypeError):
        return None
    kinds = ((created, int | float), (name, str), (level, int), (text, str))
    return (created, name, level, text) if all(isinstance(value, kind) for value, kind in kinds) else None
