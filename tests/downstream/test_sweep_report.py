from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from downstream.cli import app
from downstream.errors import TaskError
from downstream.evaluation.document import Code, Document, Picture, Section, Table, Text, Tiles
from downstream.evaluation.points import resolve
from downstream.evaluation.rate_accuracy import Curve, RatePoint
from downstream.evaluation.report import document_of
from downstream.evaluation.sweep import sweep
from downstream.evaluation.sweep_report import (
    ablation_section,
    at_equal_rate,
    bd_sections,
    read_sweep,
    read_sweeps,
    savings_at,
    savings_table,
)

RATES = {"hevc": 0.4, "dicm": 0.1, "without RE": 0.2}


def rows(codec: str, factor: float) -> list[dict[str, Any]]:
    """A codec that needs `factor` of the bits that it should."""
    return [
        {
            "task": "classification", "data": "tiny", "codec": codec, "protocol": "adapted", "quality": str(n), "seed": 0,
            "metric": "top1", "value": 0.4 + 0.1 * n, "bpp": 1 + factor * 2**n, "bpp_payload": factor * 2**n,
        }
        for n in range(4)
    ]  # fmt: skip


GROUPS = {("classification", "tiny"): [row for codec, factor in RATES.items() for row in rows(codec, factor)]}


def test_bd_sections__have_the_shape_of_the_papers_tables():
    whole, ablations = bd_sections(GROUPS, "hevc", ["without RE"])
    rate, accuracy = (block for block in whole.blocks if isinstance(block, Table))
    assert rate.header[1] == "classification, tiny" and [list(row) for row in rate.rows] == [["dicm", "-75.0 %"]]
    assert [list(row) for row in accuracy.rows] == [["dicm", "+20.0"]]  # two octaves, at 0.1 each
    (table, *_) = ablations.blocks
    assert isinstance(table, Table) and [list(row) for row in table.rows] == [["without RE", "+100.0 %"]]


def test_ablation_section__what_is_missing_is_a_dash():
    (table,) = ablation_section({"tiny": []}, ["without RE"]).blocks
    assert isinstance(table, Table) and list(table.rows[0]) == ["without RE", "-"]


def test_bd_sections__the_whole_codec_is_the_one_that_is_neither_anchor_nor_ablation():
    factors = {"without RE": 0.2, "hevc": 0.4, "mine": 0.1}
    groups = {("classification", "tiny"): [row for codec, factor in factors.items() for row in rows(codec, factor)]}
    _, ablations = bd_sections(groups, "hevc", ["without RE"])
    table = ablations.blocks[0]
    assert isinstance(table, Table) and [list(row) for row in table.rows] == [["without RE", "+100.0 %"]]


def test_bd_sections__without_what_to_compare_with_say_so():
    (section,) = bd_sections(GROUPS, "vvc", [])
    assert [block.text for block in section.blocks if isinstance(block, Text)] == [
        "Nothing to compare with: no sweep has vvc."
    ]


def test_savings_at__the_best_accuracy_that_both_reach():
    ours = Curve("a", "adapted", (RatePoint("0", 0.1, 0.4), RatePoint("1", 0.2, 0.6)))
    theirs = Curve("b", "adapted", (RatePoint("0", 0.2, 0.3), RatePoint("1", 0.8, 0.5), RatePoint("2", 0.9, 0.6)))
    assert savings_at(ours, theirs) == (0.6, pytest.approx(1 - 0.2 / 0.9))


def test_savings_at__curves_that_share_no_accuracy_count_our_lowest_rate():
    ours = Curve("a", "adapted", (RatePoint("0", 0.1, 0.7), RatePoint("1", 0.2, 0.8)))
    theirs = Curve("b", "adapted", (RatePoint("0", 0.5, 0.6),))
    assert savings_at(ours, theirs) == (0.6, pytest.approx(0.8))
    assert savings_at(theirs, ours) is None


def test_savings_table__each_against_each():
    ours = Curve("a", "adapted", (RatePoint("0", 0.1, 0.4), RatePoint("1", 0.2, 0.6)))
    theirs = Curve("b", "adapted", (RatePoint("0", 0.4, 0.6),))
    rows = savings_table([ours, theirs]).rows
    assert [list(row) for row in rows] == [["a", "-", "50.0 % (at 60.0 %)"], ["b", "-100.0 % (at 60.0 %)", "-"]]


def test_at_equal_rate__takes_the_row_of_each_codec_nearest_to_a_rate_that_all_reach(tmp_path: Path):
    (tmp_path / "config.yaml").touch()
    chosen = at_equal_rate([{**row, "folder": str(tmp_path)} for row in GROUPS["classification", "tiny"]])
    assert [(row["codec"], row["bpp_payload"]) for row in chosen] == [
        ("hevc", 0.4), ("dicm", pytest.approx(0.4)), ("without RE", pytest.approx(0.4)),
    ]  # fmt: skip


def test_report__of_a_sweep_in_one_page_and_as_markdown(swept: Path, tmp_path: Path):
    page, folder = tmp_path / "report.html", tmp_path / "markdown"
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*")}
    done = CliRunner().invoke(
        app, ["report", str(swept), "-o", str(page), "--markdown", str(folder), "--against", "jpeg"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    html, text = page.read_text(), (folder / "README.md").read_text()
    for words in ("What each codec saves against jpeg", "Classification: colours", "hevc 45@0.5", "usable point"):
        assert words in html and words in text
    assert "data:image/png;base64," in html and not re.search(r'(src|href)="(?!data:|#)', html)
    pictures = re.findall(r"\]\(([^)]+)\)", text)
    assert pictures and all((folder / name).stat().st_size > 0 for name in pictures)
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*")} == before  # it may lie where none may write


def test_report__an_ablation_that_no_sweep_has_is_named(swept: Path):
    with pytest.raises(TaskError, match=r"--ablation without RE: .* they have dicm, hevc, jpeg"):
        document_of([swept], None, "hevc", ["without RE"])
    sections = document_of([swept], None, "hevc", ["dicm", "hevc", "jpeg"]).sections
    assert not any(section.title.startswith("Classification") for section in sections)


def test_read_sweeps__rows_of_two_sweeps_are_one_codec_s_once_or_not_at_all(swept: Path, tmp_path: Path):
    copy = shutil.copytree(swept, tmp_path / "sweep")
    assert read_sweeps([swept, copy]) == read_sweep(swept)
    changed = json.loads((copy / "results.json").read_text())
    changed[0]["value"] = 0.123
    (copy / "results.json").write_text(json.dumps(changed))
    with pytest.raises(TaskError, match="averaged as seeds: sweep one with another label="):
        read_sweeps([swept, copy])


def changed_sweep(swept: Path, folder: Path, change: dict[str, Any], data: str | None = None) -> Path:
    """A copy of a sweep whose rows, and whose points' data, are others."""
    shutil.copytree(swept, folder)
    found = [{**row, **change} for row in json.loads((folder / "results.json").read_text())]
    (folder / "results.json").write_text(json.dumps(found))
    if "run" in change:
        (folder / "points" / "clean").rename(folder / "points" / change["run"])
    for path in folder.glob("points/*/*/inputs.json") if data else ():
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))
    return folder


def test_read_sweeps__two_runs_of_one_seed_are_not_averaged(swept: Path, tmp_path: Path):
    other = changed_sweep(swept, tmp_path / "other", {"run": "other"})
    with pytest.raises(TaskError, match=r"of runs clean and other, which have one seed \(0\).*a report of each"):
        read_sweeps([swept, other])
    seeds = changed_sweep(swept, tmp_path / "seeds", {"run": "other", "seed": 1})
    assert len(read_sweeps([swept, seeds])) == 2 * len(read_sweep(swept))


def test_read_sweeps__data_sets_that_share_a_name_alone_are_not_put_together(swept: Path, tmp_path: Path):
    other = changed_sweep(swept, tmp_path / "other", {"run": "other", "seed": 1}, data="0" * 64)
    with pytest.raises(TaskError, match="on different data sets, both called colours"):
        read_sweeps([swept, other])


def test_document_of__runs_on_two_data_sets_share_no_curve(clean: Path, tmp_path: Path):
    other = shutil.copytree(clean, tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "data": "elsewhere"}))
    with pytest.raises(TaskError, match="elsewhere cannot share a curve"):
        document_of([clean, other], None, "hevc", [])


def test_document_of__runs_and_sweeps_are_not_mixed(swept: Path, finetuned: Path):
    with pytest.raises(TaskError, match="is no sweep"):
        document_of([swept, finetuned], None, "hevc", [])


def test_sweep__a_damaged_table_is_made_again(swept: Path, clean: Path, tmp_path: Path):
    copy = tmp_path / "sweep"
    shutil.copytree(swept, copy)
    (copy / "results.json").write_text("{")
    with pytest.raises(TaskError, match=r"results\.json"):
        document_of([copy], None, "hevc", [])
    found = sweep(resolve("classification", [f"runs={clean}", f"out={copy}", "anchors=jpeg:5,hevc:45@0.5", "epochs=1",
                                             "options=lr=0.01"]))  # fmt: skip
    assert json.loads((copy / "results.json").read_text()) == found


def test_document__escapes_in_html_and_keeps_order_in_markdown(tmp_path: Path):
    blocks = [Text("a < b"), Table(["x|y", "z"], [["1", "2"]]), Code("dicm demo"), Picture(b"png", "seen", "picture"),
              Tiles([(b"one", "first"), (b"two", "second"), (b"three", "third")], 2, "tiles", "tile")]  # fmt: skip
    document = Document("<title>", "lead", [Section("one", blocks), Section("empty", [])])
    with pytest.raises(AssertionError, match="one name"):
        Document("", "", [Section("", [Picture(b"png", "", "same")] * 2)]).write_markdown(tmp_path / "twice")
    document.write_html(tmp_path / "page.html")
    document.write_markdown(tmp_path / "docs")
    page, text = (tmp_path / "page.html").read_text(), (tmp_path / "docs" / "README.md").read_text()
    assert "&lt;title&gt;" in page and "a &lt; b" in page and "empty" not in page + text
    assert "| x\\|y | z |\n| --- | --- |\n| 1 | 2 |" in text
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == [
        "README.md", "picture.png", "tile_00.png", "tile_01.png", "tile_02.png",
    ]  # fmt: skip
    assert [text.index(word) for word in ("a < b", "x\\|y", "dicm demo", "picture.png", "tile_02.png")] == sorted(
        text.index(word) for word in ("a < b", "x\\|y", "dicm demo", "picture.png", "tile_02.png")
    )
