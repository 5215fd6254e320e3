"""What an installation has to show on any version of Python; the whole suite shows it, too, and more."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, dicm
from torchvision.io import write_jpeg

PACKAGES = ("cluster", "data_pipeline", "pretrain", "downstream")


def modules() -> list[str]:
    """Names of all modules of the four packages."""
    return [found.name for package in PACKAGES for found in pkgutil.walk_packages([package], f"{package}.")]


def test_modules__are_all_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    found = modules()
    assert len(found) > 100
    for name in found:
        importlib.import_module(name)


def test_help__answers_without_torch():
    code = "import sys; sys.argv = ['dicm', '--help']; import dicm, atexit; " \
           "atexit.register(lambda: print('heavy:', [name for name in ('torch', 'numpy', 'ray') if name in sys.modules])); " \
           "dicm.main()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout and done.stdout.rstrip().endswith("heavy: []")


def test_codec__trains_is_exported_and_codes_an_image(exported_codec: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    write_jpeg(torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=generator), str(tmp_path / "a.jpg"))
    streams, features = tmp_path / "streams", tmp_path / "features"
    encoded = dicm("encode", tmp_path / "a.jpg", "-o", streams, "--codec", exported_codec)
    assert encoded.returncode == 0, encoded.stderr
    decoded = dicm("decode", streams, "-o", features, "--codec", exported_codec, "--format", "safetensors")
    assert decoded.returncode == 0, decoded.stderr
    from safetensors.torch import load_file

    f3 = load_file(features / "a.safetensors")["f3"]
    assert f3.shape[1:] == (13, 18) and f3.isfinite().all()


def test_task__is_fine_tuned_and_measured_on_real_streams(exported_codec: Path, scenes: Path, tmp_path: Path):
    options = ["epochs=1", "batch_size=16", "launcher=local", "workers=1"]
    folder = tmp_path / "run"
    result = dicm("finetune", "classification", f"codec={exported_codec}", f"data={scenes}", f"run={folder}", *options)
    assert result.returncode == 0, result.stderr
    measured = json.loads((folder / "results.json").read_text())
    assert measured["images"] == 16 and measured["bpp"] > measured["bpp_payload"] > 0
