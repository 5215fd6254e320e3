"""What `make install` does: checks this machine, makes .venv and installs the pinned set of constraints.txt into it.

    python3 .ci/install.py

Reads and writes nothing but .venv, with the standard library alone, on whatever Python it is started with. What a user
can put right becomes one line and exit code 2; what the installers said in full is in .venv/install.log.
"""

import glob
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

OLDEST = (3, 11)
NEWEST_WITH_WHEELS = (3, 12)  # of compressai 1.2.8, on x86-64; elsewhere it is built from its sources
GIGABYTES = 6.5  # of .venv, with its bytecode
VERSION = sys.version.split()[0]
VENV, LOG = ".venv", os.path.join(".venv", "install.log")
REASONS = (  # words in the log, and what to say of them
    (
        ("No space left", "os error 28", "Disk quota"),
        f"no space left; free {GIGABYTES} GB here and in the installers' caches",
    ),
    (
        ("No matching distribution found for uv", "NewConnectionError", "Failed to establish", "Connection refused",
         "name resolution", "Name or service not known", "dns error", "error sending request", "timed out"),
        "the package index was not reached; check the network, or index and proxy in pip.conf, uv.toml, HTTPS_PROXY",
    ),
)  # fmt: skip


def main():
    """Install, or say in one line why not."""
    check_python()
    check_compiler()
    check_space()
    if os.path.isdir(VENV):
        shutil.rmtree(VENV)  # what another Python, or half an installation, left
    with open("constraints.txt") as constraints:
        uv = next(line.strip() for line in constraints if line.startswith("uv=="))
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", VENV], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.CalledProcessError as error:
        lines = error.stdout.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        fail(f"{sys.executable} -m venv failed ({lines[0]}); on Debian and Ubuntu install python3-venv")
    python = os.path.join(VENV, "bin", "python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "2", uv)
    run(
        os.path.join(VENV, "bin", "uv"), "pip", "install", "--quiet", "--compile-bytecode", "--python", python,
        "-c", "constraints.txt", "--group", "dev", "-e", ".[anchors,export]",
    )  # fmt: skip


def check_python():
    """A Python that is new enough."""
    if sys.version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        fail(f"dicm needs Python {oldest} or newer, {sys.executable} is {VERSION}; run make PYTHON=python3.13 TARGET")


def check_compiler():
    """C++ and Python's headers, where compressai is built from its sources."""
    if sys.version_info[:2] <= NEWEST_WITH_WHEELS and platform.machine() == "x86_64":
        return
    needed = f"compressai is built from its sources on Python {VERSION}, {platform.machine()},"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "c++", "clang++"])):
        fail(f"{needed} and there is no C++ compiler; install one (Debian: apt install g++), or use Python 3.12")
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        fail(f"{needed} and Python.h is missing; install it (Debian: apt install python3-dev), or use Python 3.12")


def check_space():
    """Room for .venv; one that is there makes way."""
    free = shutil.disk_usage(".").free / 1e9
    if free < GIGABYTES and not glob.glob(os.path.join(VENV, "lib", "python*", "site-packages", "torch")):
        fail(f"{free:.1f} GB are free in {os.getcwd()} and the installation needs {GIGABYTES}; free space")


def run(*command):
    """A command of the installation; its words go to the log, which is read where it fails."""
    with open(LOG, "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        with open(LOG, errors="replace") as log:
            text = log.read()
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
        known = [reason for words, reason in REASONS if any(word in text for word in words)]
        fail(f"{known[0] if known else 'installation failed: ' + lines[-1]}; see {LOG}")


def fail(message):
    """End with one line and exit code 2."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
