"""Sweeps of the other tasks: gates with a teacher, detectors that go on with a base run's network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_codecs import NARROW
from small_objects import NARROW_DETECTOR, SMALL_CROPS

from data_pipeline.scenes import write_scenes
from downstream import finetune
from downstream.errors import TaskError
from downstream.evaluation.points import points_of, resolve
from downstream.evaluation.sweep import sweep
from downstream.evaluation.sweep_report import sweep_sections
from downstream.runs import load_run
from pretrain.codec.feature_codec import FeatureCodec


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=8, val=2, size=64, seed=0)
    return folder


def base_run(recipe: str, codec: Path, data: Path, run: Path, *options: str) -> Path:
    given = [f"codec={codec}", f"data={data}", f"run={run}", "launcher=local", "precision=fp32", "epochs=1",
             "batch_size=4", "input=pixels", *options]  # fmt: skip
    finetune.run(finetune.resolve(recipe, given))
    return run


@pytest.fixture(scope="module")
def clean_detection(codec: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete detection on clean pixels."""
    return base_run("detection", codec, data, tmp_path_factory.mktemp("runs") / "clean", *NARROW_DETECTOR)


def test_sweep__of_gates_trains_students_of_the_base_run(codec: Path, data: Path, tmp_path: Path):
    clean = base_run("semantic_segmentation", codec, data, tmp_path / "clean", "gate=none", *SMALL_CROPS)
    out = tmp_path / "sweep"
    with pytest.raises(TaskError, match=r"num_channels=33 .*1\.\.32"):
        sweep(resolve("semantic_segmentation", [f"runs={clean}", f"out={out}", "gates=static:33", "epochs=1"]))
    assert not out.exists()
    config = resolve("semantic_segmentation", [f"runs={clean}", f"out={out}", "gates=static:4,variance:4", "epochs=1",
                                               "anchors=jpeg:5"])  # fmt: skip
    rows = {(row["codec"], row["protocol"]): row for row in sweep(config)}
    assert set(rows) == {
        ("jpeg", "frozen"), ("jpeg", "adapted"), ("dicm dynamic", "adapted"), ("dicm static 4", "adapted"),
        ("dicm variance 4", "adapted"),
    }  # fmt: skip
    assert rows["dicm static 4", "adapted"]["bpp_payload"] < rows["dicm dynamic", "adapted"]["bpp_payload"]
    student = load_run(out / "points" / "clean" / "dicm_static_4-adapted")
    assert (student.teacher, student.init) == (str(clean / "teacher.pt"), None)  # type: ignore[attr-defined]
    assert len(student.chosen) == 4  # type: ignore[attr-defined]
    titles = [section.title for section in sweep_sections([out], "jpeg") if section.blocks]
    assert "Which channels gates choose" in titles and "Semantic segmentation: scenes" in titles


def test_sweep__of_a_detector_goes_on_with_the_base_run(codec: Path, data: Path, tmp_path: Path):
    task = "instance_segmentation"
    clean = base_run(task, codec, data, tmp_path / "clean", *NARROW_DETECTOR)
    rows = sweep(resolve(task, [f"runs={clean}", f"out={tmp_path / 'sweep'}", "epochs=1", "anchors=hevc:45"]))
    assert {(row["codec"], row["protocol"]) for row in rows} == {
        (name, protocol) for name in ("dicm", "hevc") for protocol in ("frozen", "adapted")
    }
    assert all(row["decode_macs"] > 0 and row["value"] is not None for row in rows)


def test_sweep__of_a_detector_behind_a_gate_trains_it_from_the_codec_s_features(clean_detection: Path, tmp_path: Path):
    given = [f"runs={clean_detection}", f"out={tmp_path / 'sweep'}", "epochs=1", "gates=dynamic"]
    (row,) = sweep(resolve("detection", given))
    assert (row["codec"], row["protocol"]) == ("dicm dynamic", "adapted") and row["decode_macs"] > 0


def test_points_of__a_codec_of_one_rate_has_no_rates(codec: Path, clean_detection: Path, tmp_path: Path):
    clean = shutil.copytree(clean_detection, tmp_path / "clean")
    with pytest.raises(TaskError, match=r"rates=\[0.5\]: the codec .* has one rate"):
        points_of(resolve("detection", [f"runs={clean}", "rates=0.5"]))
    ranged = FeatureCodec(replace(NARROW, backbone="test_resnet", rate_points=3)).eval()
    ranged.save_pretrained(tmp_path / "ranged")
    options = (clean / "config.yaml").read_text().replace(f"codec: {codec}\n", f"codec: {tmp_path / 'ranged'}\n")
    (clean / "config.yaml").write_text(options)
    assert len(points_of(resolve("detection", [f"runs={clean}", "gates=dynamic"]))) == 5
    given = points_of(
        resolve("detection", [f"runs={clean}", "gates=dynamic", "options=[latents=bmshj2018-hyperprior]"])
    )
    assert [point.quality for point in given] == [""]
    (clean / "config.yaml").write_text(options.replace("latents: codec", "latents: bmshj2018-hyperprior"))
    (point,) = points_of(resolve("detection", [f"runs={clean}", "gates=dynamic"]))
    assert point.quality == ""  # whatever the codec has that gives weights to begin with
    with pytest.raises(TaskError, match="protocols=frozen leaves no point"):
        points_of(resolve("detection", [f"runs={clean}", "gates=dynamic", "protocols=frozen"]))
    with pytest.raises(TaskError, match="is a run of detection, not of classification"):
        points_of(resolve("classification", [f"runs={clean}"]))
