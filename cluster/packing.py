"""The code that a job takes along: one zip of the working tree, without data and without runs.

In: a folder; in a git checkout its tracked files and those that git neither tracks nor ignores, elsewhere all. Out:
paths relative to it, or a zip of them. The same files give the same bytes, so that a cluster that has a package gets
it no second time. Everyone who may submit to the cluster can read a package: files that look like secrets are refused.
"""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

from cluster.errors import RunError

# Ray keeps packages in the head's memory and takes no larger ones.
PACKAGE_BYTES = 100 * 2**20
# Of files that git does not track: folders that no source lies in, wherever they are, and those at the top of the tree
# that commands write. Deeper down `data` may be a package.
LEFT_OUT = frozenset({
    ".git", ".hg", ".venv", "venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis",
    ".import_linter_cache", ".ipynb_checkpoints", "node_modules",
})  # fmt: skip
LEFT_OUT_AT_THE_TOP = frozenset({"build", "dist", "runs", "data", "shards", "checkpoints", "tensorboard"})
# Names that hold secrets, in lower case; tracked or not. `.dockerignore` lists them, too.
SECRET_FOLDERS = frozenset({".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kube", ".ssh"})
SECRETS = (
    ".env", ".env.*", "*.env", ".netrc", "_netrc", ".pgpass", ".git-credentials", ".npmrc", ".pypirc", ".htpasswd",
    ".vault-token", "*.token", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.ppk", "*.p12", "*.pfx", "*.jks",
    "*.keystore", "*.kdbx", "kubeconfig", "kubeconfig.yaml", "kubeconfig.yml", "*.kubeconfig", "credentials",
    "credentials.csv", "credentials.ini", "credentials.toml", "credentials.yaml", "*credentials.json",
    "client_secret*.json", "service-account*.json", "service_account*.json", "secrets.yaml",
    "secrets.yml", "secrets.json", "secrets.toml", "*.tfvars", "*.tfstate", "*.tfstate.backup",
)  # fmt: skip
HARMLESS = ("*.example", "*.sample", "*.template")  # what shows how a secret would be written
PRIVATE_KEY = re.compile(rb"\s*-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
OLDEST_TIME = (1980, 1, 1, 0, 0, 0)  # that a zip can hold


def list_files(tree: Path) -> list[Path]:
    """The files of `tree` that a job takes along: sorted, relative to it.

    Symbolic links that leave the tree, and links to folders, are left out.

    Raises:
        RunError: no such folder, a file that looks like a secret, or together more than `PACKAGE_BYTES`.
    """
    if not tree.is_dir():
        raise RunError(f"{tree}: no folder; submit from the folder that holds the code")
    tracked = _git(tree, "--cached")
    if tracked is None:
        found = {path.relative_to(tree) for path in tree.rglob("*")}
        files = {path for path in found if not _is_left_out(path)}
    else:
        others = _git(tree, "--others", "--exclude-standard") or set()
        files = tracked | {path for path in others if not _is_left_out(path)}
    inside = tree.resolve()
    kept = sorted(path for path in files if (tree / path).is_file() and (tree / path).resolve().is_relative_to(inside))
    _refuse_secrets(tree, kept)
    _check_size(tree, kept)
    return kept


def write_package(tree: Path, files: list[Path], package: Path) -> None:
    """Write `files` of `tree` as a zip to `package`."""
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.as_posix(), OLDEST_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (tree / path).stat().st_mode << 16  # scripts stay executable
            archive.writestr(entry, (tree / path).read_bytes())


def holds(files: list[Path], path: str) -> bool:
    """Whether `path`, relative, names one of `files` or a folder with some of them."""
    wanted = Path(path)
    return ".." not in wanted.parts and any(wanted == file or wanted in file.parents for file in files)


def _git(tree: Path, *which: str) -> set[Path] | None:
    """What `git ls-files` lists below `tree`; None where there is no checkout. RunError where git fails in one."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", *which], cwd=tree, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        here = tree.resolve()
        if not any((folder / ".git").exists() for folder in (here, *here.parents)):
            return None
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = (said.strip().splitlines() or ["no reason given"])[0]
        raise RunError(f"{here}: git does not list the files of this checkout ({reason})") from error
    return {Path(name) for name in listed.stdout.decode(errors="surrogateescape").split("\0") if name}


def _is_left_out(path: Path) -> bool:
    return bool(LEFT_OUT.intersection(path.parts)) or path.parts[0] in LEFT_OUT_AT_THE_TOP


def _refuse_secrets(tree: Path, files: list[Path]) -> None:
    found = [path.as_posix() for path in files if _is_secret(tree, path)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise RunError(
            f"{tree.resolve()}: {', '.join(found[:3])}{more}: looks like a secret, and everyone on the cluster can "
            "read a job's package; move it out of this folder, or have git ignore it"
        )


def _is_secret(tree: Path, path: Path) -> bool:
    """Whether a file's name or folder is one of those that hold secrets, or it begins as a private key does."""
    name = path.name.lower()
    if SECRET_FOLDERS.intersection(part.lower() for part in path.parts[:-1]):
        return True
    if any(fnmatchcase(name, pattern) for pattern in SECRETS):
        return not any(fnmatchcase(name, pattern) for pattern in HARMLESS)
    with (tree / path).open("rb") as file:
        return PRIVATE_KEY.match(file.read(100)) is not None


def _check_size(tree: Path, files: list[Path]) -> None:
    sizes = {path: (tree / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total <= PACKAGE_BYTES:
        return
    places: Counter[str] = Counter()
    for path, size in sizes.items():
        places[path.parts[0] + ("/" if len(path.parts) > 1 else "")] += size
    largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in places.most_common(3))
    raise RunError(
        f"{tree.resolve()}: {total / 2**20:.0f} MiB are too much for a job's package of at most "
        f"{PACKAGE_BYTES / 2**20:.0f} MiB; the most is in {largest}; move it out, or let .gitignore name it"
    )
