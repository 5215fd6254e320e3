from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import assert_refused, dicm


def test_evaluate__prints_the_figures_and_writes_them(finetuned: Path, tmp_path: Path):
    folder = shutil.copytree(finetuned, tmp_path / "run")
    before = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**before, "top1": -1}))
    result = dicm("evaluate", folder)
    assert result.returncode == 0, result.stderr
    after = json.loads((folder / "results.json").read_text())
    assert after == before
    assert f"{100 * after['top1']:.1f} %" in result.stdout and f"{after['bpp']:.4f}" in result.stdout


def test_report__of_runs(finetuned: Path, tmp_path: Path):
    result = dicm("report", finetuned, "-o", tmp_path / "page" / "report.html")
    assert result.returncode == 0, result.stderr
    assert "streams of random" in (tmp_path / "page" / "report.html").read_text()


def test_report__run_without_results(tmp_path: Path):
    assert_refused(dicm("report", tmp_path), str(tmp_path), "results.json", "dicm finetune")
