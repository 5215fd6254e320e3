"""Commands of clusters: `dicm cluster submit`, `list`, `status`, `logs`, `stop`, `drain`."""

from __future__ import annotations

import pkgutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from cluster.errors import RunError

if TYPE_CHECKING:
    from cluster.submit import Job, Jobs

app = typer.Typer(no_args_is_help=True, help="Run dicm commands as jobs on a Ray cluster, and watch them.")
console = Console(markup=False)  # names and reasons stay as they are
INTERRUPTED_CODE = 130
REFRESH_SECONDS = 2.0
WIDTH = 1000  # of tables in files and pipes, where whole lines are looked for

# "package.module:function" that makes a config of a recipe and overrides, for each command that has one. This floor may
# not import those above it; `dicm.py` knows them all.
resolvers: dict[str, str] = {}

Address = Annotated[
    str | None,
    typer.Option(help="URL of the dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is a URL, 127.0.0.1:8265."),
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the cluster's token; else RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.")
]
Target = Annotated[str, typer.Argument(metavar="RUN|JOB", help="A job's id, or a run: its path, or its name.")]


@app.command()
def submit(
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="pretrain, finetune or export, as ever.")],
    address: Address = None,
    token_file: TokenFile = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log; exit with the job's exit code.")] = False,
) -> None:
    """Run a dicm command as a job on a cluster, from a copy of the code in this folder.

    The driver takes no CPU and no GPU from the workers, and runs on the head node. With --wait the exit code is the
    command's own; 143 if the job was stopped; 130 if you leave with Ctrl-C, after which the job goes on.

    Example: dicm cluster submit --wait -- pretrain dicm_resnet50 data=/shared/data run=/shared/runs/r50 workers=16
    """
    from cluster.commands import check_command
    from cluster.packing import list_files

    tree = Path.cwd()
    files = list_files(tree)
    name = resolvers.get(words[0])
    command = check_command(words, tree, files, pkgutil.resolve_name(name) if name else None)
    jobs = _jobs(address, token_file)
    job = jobs.submit(command, tree, files)
    if Path("dicm.py") not in files:
        _say("there is no dicm.py in this folder: the job runs the dicm that is installed on the cluster")
    if wait:
        _say(f"job {job.id}")
        _follow(jobs, job)
        return
    _say(f"submitted job {job.id}; run={job.run}")
    _say(f"  follow:  dicm cluster logs {job.id} --follow")
    _say(f"  look:    dicm cluster status {job.id}")
    _say(f"  stop:    dicm cluster stop {job.id}")


@app.command("list")
def list_jobs(address: Address = None, token_file: TokenFile = None) -> None:
    """List the jobs of a cluster, the oldest first.

    Example: dicm cluster list
    """
    whole = [Column(name, overflow="fold") for name in ("job", "run")]  # to be copied
    table = Table(whole[0], "status", whole[1], "begun", "time", "command")
    for job in _jobs(address, token_file).all():
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.begun)) if job.begun else "-"
        table.add_row(job.id, job.status, job.run or "-", begun, _time(job), " ".join(job.command.split()[:2]))
    (console if console.is_terminal else Console(width=WIDTH, markup=False)).print(table)


@app.command()
def status(
    target: Annotated[
        str, typer.Argument(metavar="FOLDER|RUN|JOB", help="A run folder that is visible here; or a run or a job.")
    ],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Draw a run folder's table anew until Ctrl-C.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
) -> None:
    """Show how far a run is: of a run folder its metrics, else what the cluster knows of its job.

    Example: dicm cluster status /shared/runs/r50 --watch
    """
    folder = Path(target)
    if any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        from cluster.status import show

        show(folder, console, every=REFRESH_SECONDS if watch else None)
        return
    try:
        job = _jobs(address, token_file).find(target)
    except RunError as error:
        if folder.is_dir():
            raise RunError(f"{target}: holds no run (no config.yaml); and as a job: {error}") from error
        if "/" in target:
            raise RunError(f"{target}: no such folder here; and as a job: {error}") from error
        raise
    if watch:
        _say("--watch is for run folders; this is the job as it is now, `dicm cluster logs --follow` follows it")
    table = Table(title=job.id, title_justify="left", show_header=False)
    code = "-" if job.exit_code is None else str(job.exit_code)
    for name, value in (
        ("status", job.status),
        ("run", job.run or "-"),
        ("command", job.command),
        ("time", _time(job)),
        ("exit code", code),
        ("message", (job.message.strip().splitlines() or ["-"])[-1]),
    ):
        table.add_row(name, value)
    console.print(table)


@app.command()
def logs(
    target: Target,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
) -> None:
    """Print what a job has printed; with --follow, exit with its exit code.

    Example: dicm cluster logs r50 --follow
    """
    jobs = _jobs(address, token_file)
    job = jobs.find(target)
    if follow:
        _follow(jobs, job)
    else:
        typer.echo(jobs.logs(job), nl=False)


@app.command()
def stop(target: Target, address: Address = None, token_file: TokenFile = None) -> None:
    """Stop a job; its run saves a checkpoint first, and submitting it again goes on from there.

    Example: dicm cluster stop r50
    """
    from cluster.submit import STOP_SECONDS

    jobs = _jobs(address, token_file)
    job = jobs.find(target)
    if job.is_over:
        _say(f"job {job.id} is over already ({job.status})")
        return
    jobs.stop(job)
    _say(f"job {job.id} was asked to stop; it saves a checkpoint after its step")
    job = jobs.wait(job, STOP_SECONDS + 10)
    _say(f"job {job.id}: {job.status}")
    raise typer.Exit(0 if job.is_over else 1)


@app.command()
def drain(
    seconds: Annotated[float, typer.Option(min=1, help="From now until this node goes away.")] = 120,
    node: Annotated[str | None, typer.Option(help="Beginning of the node's id, where several run here.")] = None,
) -> None:
    """Announce that this node goes away, so that training saves and leaves it; to be run on the node itself.

    Example: dicm cluster drain --seconds 100
    """
    from cluster.drain import drain as drain_node

    drained = drain_node(seconds, node)
    end = "no work is left" if drained.is_idle else "work is still running"
    _say(f"node {drained.node[:8]}: {end} after {drained.seconds:.0f} s")


def _jobs(address: str | None, token_file: Path | None) -> Jobs:
    from cluster.submit import Jobs

    return Jobs(address, token_file)


def _follow(jobs: Jobs, job: Job) -> None:
    """Print the job's log to its end, then exit as it did."""
    from cluster.submit import exit_code

    try:
        job = jobs.follow(job, lambda lines: typer.echo(lines, nl=False))
    except KeyboardInterrupt:
        _say(f"\njob {job.id} goes on; `dicm cluster stop {job.id}` ends it")
        raise typer.Exit(INTERRUPTED_CODE) from None
    _say(f"job {job.id}: {job.status}")
    raise typer.Exit(exit_code(job))


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)  # names stay whole, to be copied


def _time(job: Job) -> str:
    if job.begun is None:
        return "-"
    seconds = round((job.ended or time.time()) - job.begun)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
