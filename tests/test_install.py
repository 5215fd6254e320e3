"""What stands in the way of `make install` becomes one line with the remedy, before or after the installers try."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / ".ci" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was written."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_check_python__one_that_is_too_old(install: ModuleType, capsys: pytest.CaptureFixture[str]):
    install.OLDEST = (sys.version_info[0], sys.version_info[1] + 1)
    with pytest.raises(SystemExit, match="2"):
        install.check_python()
    line = told(capsys)
    assert sys.executable in line and "make PYTHON=" in line


def test_check_compiler__none_where_compressai_has_no_wheel(
    install: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    install.NEWEST_WITH_WHEELS = (3, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match="2"):
        install.check_compiler()
    line = told(capsys)
    assert "C++ compiler" in line and "apt install g++" in line


def test_check_space__too_little(
    install: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    install.GIGABYTES = 1e9
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        install.check_space()
    assert "free space" in told(capsys)


@pytest.mark.parametrize("words", ["error: failed to write (os error 28)", "No space left on device"])
def test_run__a_disk_that_fills_up(
    install: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str
):
    monkeypatch.chdir(tmp_path)
    Path(".venv").mkdir()
    with pytest.raises(SystemExit, match="2"):
        install.run(sys.executable, "-c", f"import sys; print({words!r}); sys.exit(1)")
    line = told(capsys)
    assert "free 6" in line and ".venv/install.log" in line and words in Path(".venv/install.log").read_text()


@pytest.mark.slow
def test_main__without_a_network(tmp_path: Path):
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, env=environment | nowhere, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "index was not reached" in done.stderr
    assert not (tmp_path / ".venv" / "installed").exists()
