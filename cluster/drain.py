"""A drain notice for the node that this process runs on: training saves and moves before the node goes away.

What Kubernetes, or a cloud that takes a spot machine back, allows before the end is passed to Ray as a deadline. Ray
then starts nothing new on the node, and the controller of a run sees the notice (`cluster.policies`): the run saves and
goes on without the node.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import RunError

POLL_SECONDS = 0.5
AGENTS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # a raylet's children that are no one's work


@dataclass(frozen=True)
class Raylet:
    """The Ray process of a node: the node's id (hex), where its cluster's control service listens, its process id."""

    node: str
    gcs_address: str
    pid: int
    is_head: bool


@dataclass(frozen=True)
class Drained:
    """A drain that was asked for: the node's id, whether its work has ended, and the seconds that this took."""

    node: str
    is_idle: bool
    seconds: float


def drain(seconds: float, node: str | None = None, proc: Path = Path("/proc")) -> Drained:
    """Announce that this node goes away in `seconds`, and wait as long, or until no work runs on it.

    Args:
        node: beginning of the id of the node, where several run on this machine.
        proc: where the processes are listed.

    Raises:
        RunError: no Ray node here, several, or the head; or the cluster does not answer.
    """
    raylet = find_raylet(node, proc)
    if raylet.is_head:
        raise RunError(
            f"node {raylet.node[:8]} is the head of its cluster, which cannot go on without it; stop the run with "
            "`dicm cluster stop RUN` instead"
        )
    begun = time.monotonic()
    _announce(raylet, seconds)
    while (waited := time.monotonic() - begun) < seconds:
        if not busy_workers(raylet, proc):
            return Drained(raylet.node, True, waited)
        time.sleep(POLL_SECONDS)
    return Drained(raylet.node, not busy_workers(raylet, proc), waited)


def find_raylet(node: str | None = None, proc: Path = Path("/proc")) -> Raylet:
    """The Ray node on this machine, or the one whose id begins with `node` (RunError: none, or several)."""
    found = [raylet for raylet in list_raylets(proc) if raylet.node.startswith(node or "")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunError(f"no Ray node {node or ''} runs on this machine; `ray start` makes it one".replace("  ", " "))
    nodes = ", ".join(sorted(raylet.node[:8] for raylet in found))
    raise RunError(f"several Ray nodes run on this machine ({nodes}); name one with --node ID")


def list_raylets(proc: Path = Path("/proc")) -> list[Raylet]:
    """All Ray nodes on this machine, of whatever cluster."""
    return [raylet for pid in _processes(proc) if (raylet := _raylet(pid, proc)) is not None]


def busy_workers(raylet: Raylet, proc: Path = Path("/proc")) -> list[str]:
    """Titles of the node's processes that do someone's work."""
    titles = [_words(pid, proc)[:1] for pid in _processes(proc) if _parent(pid, proc) == raylet.pid]
    return [title[0] for title in titles if title and title[0].startswith("ray::") and not title[0].startswith(AGENTS)]


def _announce(raylet: Raylet, seconds: float) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + seconds) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        accepted, refusal = GcsClient(address=raylet.gcs_address).drain_node(
            raylet.node, reason, f"goes away in {seconds:.0f} s", deadline
        )
    except Exception as error:  # Ray has no common class for what its control service answers
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"node {raylet.node[:8]}: the cluster at {raylet.gcs_address} does not answer ({line})"
        ) from error
    if not accepted:
        raise RunError(f"node {raylet.node[:8]}: the cluster refuses to drain it ({refusal})")


def _raylet(pid: int, proc: Path) -> Raylet | None:
    words = _words(pid, proc)
    if not words or Path(words[0]).name != "raylet":
        return None
    options = dict(word.removeprefix("--").split("=", 1) for word in words[1:] if word.startswith("--") and "=" in word)
    if "node_id" not in options:
        return None
    head = "node:__internal_head__" in options.get("static_resource_list", "")
    return Raylet(options["node_id"], options["gcs-address"], pid, head)


def _processes(proc: Path) -> list[int]:
    return [int(path.name) for path in proc.iterdir() if path.name.isdigit()]


def _words(pid: int, proc: Path) -> list[str]:
    try:
        return (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # ended meanwhile
        return []


def _parent(pid: int, proc: Path) -> int:
    try:
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1
