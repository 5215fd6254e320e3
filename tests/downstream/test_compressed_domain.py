"""A small run of tests/benchmarks/compressed_domain.py; the real one is at 512 x 1024."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY


def test_benchmark__has_the_rows_of_the_papers_table_and_stable_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    benchmark = runpy.run_path(str(REPOSITORY / "tests" / "benchmarks" / "compressed_domain.py"))
    out = tmp_path / "figures.json"
    size = ["--size", "64", "128", "--backbone", "resnet18", "--repeat", "1", "--threads", "1"]
    benchmark["main"]([*size, "--json", str(out)])
    found = json.loads(out.read_text())
    names = ["pixel domain", "dynamic", "static 16", "static 32", "static 64", "static 128", "no gate"]
    assert list(found["rows"]) == names
    sizes = [found["rows"][name]["bytes"] for name in names[2:]]
    assert sizes == sorted(sizes) and found["rows"]["pixel domain"]["bytes"] == found["rows"]["no gate"]["bytes"]
    assert [found["rows"][name]["channels"] for name in names[2:]] == [16, 32, 64, 128, 192]
    for row in found["rows"].values():
        assert row["sum"] == pytest.approx(row["encode"] + row["decode_and_task"])
        parts = [row[part] for part in ("encode: g_a", "encode: h_a", "encode: h_s", "encode: other")]
        assert sum(parts) + row.get("encode: gate", 0) == pytest.approx(row["encode"], rel=0.01)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("decode + task", "where the time goes", "multiply-adds"))
