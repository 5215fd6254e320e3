from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster import packing
from cluster.errors import RunError
from cluster.packing import holds, list_files, write_package


def write(tree: Path, *names: str) -> None:
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=tree, check=True, capture_output=True)


def listed(tree: Path) -> list[str]:
    return [path.as_posix() for path in list_files(tree)]


def test_list_files__of_a_checkout_what_git_tracks_and_new_code(tmp_path: Path):
    write(tmp_path, ".gitignore", "dicm.py", "gone.py", "data/table.csv", "new/code.py", "secret.env", "runs/r/x.pt")
    (tmp_path / ".gitignore").write_text("*.env\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".gitignore", "dicm.py", "gone.py", "data/table.csv")
    (tmp_path / "gone.py").unlink()
    assert listed(tmp_path) == [".gitignore", "data/table.csv", "dicm.py", "new/code.py"]
    assert listed(tmp_path / "new") == ["code.py"]


def test_list_files__without_git_no_data_no_runs_no_environment(tmp_path: Path):
    write(
        tmp_path,
        "dicm.py",
        "recipes/mine.yaml",
        ".venv/lib/x.py",
        "runs/r/metrics.jsonl",
        "data/a.tar",
        "a/__pycache__/b",
    )
    write(tmp_path, "shards/0.tar", "checkpoints/step_1/state.pt", ".ruff_cache/x")
    assert listed(tmp_path) == ["dicm.py", "recipes/mine.yaml"]


@pytest.mark.parametrize("checkout", [False, True])
def test_list_files__a_package_called_data_is_code(tmp_path: Path, checkout: bool):
    write(tmp_path, "dicm.py", "mine/data/loader.py", "mine/build/steps.py", "data/a.tar", "build/lib/x.py")
    if checkout:
        git(tmp_path, "init")
    assert listed(tmp_path) == ["dicm.py", "mine/build/steps.py", "mine/data/loader.py"]


SECRET_FILES = (
    ".env", "deploy/.env.local", "prod.env", ".aws/credentials", ".ssh/config", "keys/id_rsa", "id_ed25519",
    "kubeconfig", "k8s/kubeconfig.yaml", ".kube/config", ".netrc", "service-account-7.json", "Secrets.YAML", "a.token",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRET_FILES)
def test_list_files__a_secret_is_refused_by_its_name(tmp_path: Path, name: str):
    write(tmp_path, "dicm.py", name)
    with pytest.raises(RunError, match=rf"{re.escape(name)}: looks like a secret.*move it out of this folder"):
        list_files(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", name)  # tracked ones, too
    with pytest.raises(RunError, match=re.escape(name)):
        list_files(tmp_path)
    git(tmp_path, "rm", "--cached", name)
    (tmp_path / ".gitignore").write_text(name)
    assert listed(tmp_path) == [".gitignore", "dicm.py"]


def test_list_files__a_private_key_of_any_name_is_a_secret(tmp_path: Path):
    write(tmp_path, "dicm.py")
    (tmp_path / "server.pem").write_text("-----BEGIN RSA PRIVATE KEY-----\nMII\n")
    with pytest.raises(RunError, match=r"server\.pem: looks like a secret"):
        list_files(tmp_path)
    (tmp_path / "server.pem").write_text("-----BEGIN CERTIFICATE-----\nMII\n")
    assert listed(tmp_path) == ["dicm.py", "server.pem"]


def test_list_files__what_only_looks_like_a_secret_goes_along(tmp_path: Path):
    names = [".env.example", "credentials.py", "environment.yaml", "id_rsa.pub", "tokens.txt"]
    write(tmp_path, *names)
    assert listed(tmp_path) == sorted(names)


def test_list_files__of_a_checkout_that_git_cannot_read_is_refused(tmp_path: Path):
    write(tmp_path, "dicm.py", "large.bin", ".git/config")  # what git would ignore is not known
    with pytest.raises(RunError, match="git does not list the files of this checkout"):
        list_files(tmp_path)


def test_list_files__links_out_of_the_tree_stay_behind(tmp_path: Path):
    write(tmp_path, "outside/secret", "tree/code.py")
    tree = tmp_path / "tree"
    (tree / "folder").symlink_to("../outside")
    (tree / "file").symlink_to("../outside/secret")
    (tree / "inside.py").symlink_to("code.py")
    assert listed(tree) == ["code.py", "inside.py"]


def test_list_files__too_much_names_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "PACKAGE_BYTES", 2**20)
    write(tmp_path, "dicm.py")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "large.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(RunError, match=r"3 MiB are too much .* at most 1 MiB; .* pictures/ \(3 MiB\).*\.gitignore"):
        list_files(tmp_path)


def test_write_package__the_same_files_give_the_same_bytes(tmp_path: Path):
    tree = tmp_path / "tree"
    write(tree, "b.py", "a/run.sh")
    (tree / "a/run.sh").chmod(0o755)
    files = list_files(tree)
    write_package(tree, files, tmp_path / "1.zip")
    (tree / "b.py").touch()
    write_package(tree, files, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["a/run.sh", "b.py"]
        assert archive.getinfo("a/run.sh").external_attr >> 16 & 0o111


def test_holds__files_and_their_folders_alone():
    files = [Path("recipes/mine.yaml"), Path("dicm.py")]
    assert all(holds(files, name) for name in ("dicm.py", "recipes", "recipes/mine.yaml"))
    assert not any(holds(files, name) for name in ("recipe", "recipes/other.yaml", "../dicm.py", "data"))
