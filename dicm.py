"""The `dicm` console command: mounts the apps of the four packages and holds no logic of its own.

Errors that our packages raise are written for the user: they become one line on stderr and exit code 2, as does
storage that does not answer. Any other exception is a bug and keeps its traceback. Nothing heavy is imported here or
at the top of a `cli` module, so `dicm --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import warnings

# OpenMP's threads spin while they wait; where other processes share the cores, a step then takes ten times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not sys.warnoptions:
    # Libraries telling each other of coming changes: nothing a user can act on. Workers inherit the variable.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)

import typer

from cluster.cli import app as cluster_app
from cluster.cli import resolvers
from cluster.errors import is_ours
from cluster.failures import passing
from cluster.machine import num_cpus
from data_pipeline.cli import app as data_app
from downstream.cli import app as downstream_app
from pretrain.cli import app as pretrain_app

# OpenMP counts the cores of the affinity alone, and starts too many threads where a container has a quota of fewer.
if (cpus := num_cpus()) < len(os.sched_getaffinity(0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus))

__version__ = "0.1.0"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain a codec of features without labels, freeze it, and fine-tune vision tasks on its bitstreams.",
)
app.add_typer(data_app, name="data")
app.add_typer(pretrain_app)
app.add_typer(downstream_app)
app.add_typer(cluster_app, name="cluster")
resolvers.update(pretrain="pretrain.run:resolve", finetune="downstream.finetune:resolve")


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr for whatever the user can put right."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show, or that is not UTF-8, is no reason to end: stderr escapes it already.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception as error:
        told = error if is_ours(error) else passing(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
