from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import torch

from downstream.evaluation.pictures import grouped, pca_picture
from downstream.evaluation.report import Report

RESULTS = [
    {"input": input_, "anchor": anchor, "codec": "codec", "probe": False, "top1": 0.5, "top5": 0.9, "bpp": bpp,
     "bpp_payload": bpp / 2, "images": 16}
    for input_, anchor, bpp in (("streams", None, 0.4), ("pixels", "jpeg:30", 1.5), ("streams", None, 0.1), ("pixels", None, 24))
]  # fmt: skip


def test_report__one_file_that_loads_nothing(pretrained_run: Path, exported_codec: Path, scenes: Path, tmp_path: Path):
    path = tmp_path / "report.html"
    Report("a <title>", RESULTS, pretrained_run, [exported_codec], scenes, {"draw": 1.0}, ["dicm demo"]).write(path)
    page = path.read_text()

    class Loads(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    parser = Loads()
    parser.feed(page)
    assert parser.found
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in parser.found)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "a &lt;title&gt;" in page
    for words in ("Accuracy over rate", "jpeg:30", "heatmap", "f3, ", "kNN accuracy", "compressai"):
        assert words in page


def test_grouped__a_curve_runs_along_its_rates():
    groups = grouped(RESULTS)
    assert set(groups) == {"codec", "jpeg", "clean pixels"}
    assert [row["bpp"] for row in groups["codec"]] == [0.1, 0.4]


def test_grouped__codecs_have_curves_of_their_own():
    groups = grouped([{**row, "codec": f"codecs/{number}"} for number, row in enumerate(RESULTS)])
    assert set(groups) == {"codecs/0", "codecs/2", "jpeg", "clean pixels"}


def test_pca_picture__shows_any_feature_map():
    for features in (torch.zeros(8, 4, 4), torch.randn(2, 4, 6), torch.randn(64, 16, 16)):
        picture = pca_picture(features, 32)
        assert picture.shape == (3, 32, 32)
        assert picture.dtype == torch.uint8
