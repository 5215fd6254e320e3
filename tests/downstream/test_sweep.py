from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import is_alive
from typer.testing import CliRunner

from cluster.errors import RecipeError
from cluster.recipes import save_config
from downstream import finetune
from downstream.cli import app
from downstream.errors import StoppedError, TaskError
from downstream.evaluation import sweep as sweep_module
from downstream.evaluation.points import SweepConfig, points_of, resolve, run_name
from downstream.evaluation.sweep import COLUMNS, Progress, point_config, sweep
from downstream.results import read_results
from downstream.runs import load_run, trained_weights
from pretrain.codec.feature_codec import FeatureCodec


def test_sweep__writes_a_row_for_every_codec_and_protocol(swept: Path, clean: Path):
    rows = json.loads((swept / "results.json").read_text())
    found = {(row["codec"], row["quality"], row["protocol"]) for row in rows}
    codecs = {("jpeg", "5"), ("hevc", "45@0.5"), ("dicm", "")}
    assert found == {(*codec, protocol) for codec in codecs for protocol in ("frozen", "adapted")}
    for row in rows:
        assert set(COLUMNS) <= set(row)
        assert 0 < row["bpp_payload"] < row["bpp"] and 0 <= row["value"] <= 1 and row["value"] == row["top1"]
        assert min(row["encode_ms"], row["decode_ms"], row["decode_macs"]) > 0
        assert (row["encode_macs"] > 0) == (row["codec"] == "dicm")  # formats have no network
    with (swept / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["codec"] for row in table] == [row["codec"] for row in rows]


def test_sweep__frozen_is_the_base_run_s_network_and_adapted_starts_from_it(swept: Path, clean: Path):
    base = trained_weights(clean)
    points = swept / "points" / "clean"
    frozen, adapted = (trained_weights(points / f"jpeg-5-{protocol}") for protocol in ("frozen", "adapted"))
    assert all(tensor.equal(base[name]) for name, tensor in frozen.items())
    assert not adapted["head.weight"].equal(base["head.weight"])
    options = load_run(points / "jpeg-5-adapted")
    assert (options.epochs, options.lr, options.init) == (1, 0.01, str(clean))  # type: ignore[attr-defined]
    assert load_run(points / "jpeg-5-frozen").epochs == 0


def retrained(codec_folder: Path, folder: Path) -> Path:
    """The same backbone with another transform."""
    codec = FeatureCodec.from_pretrained(codec_folder)
    with torch.no_grad():
        codec.g_a[-1].weight.mul_(2)
    codec.save_pretrained(folder, extra={"image_size": 64, "canvas_size": 64})
    return folder


def test_sweep__what_is_done_is_not_done_again_and_more_points_are_added(swept: Path, clean: Path, tmp_path: Path):
    out = shutil.copytree(swept, tmp_path / "sweep")
    before = read_results(out / "points" / "clean" / "jpeg-5-frozen")
    done: list[str] = []
    config = resolve("classification", [f"runs={clean}", f"out={out}", "anchors=jpeg", "qualities=5,40", "epochs=1",
                                        "options=lr=0.01", "protocols=frozen"])  # fmt: skip
    rows = sweep(config, lambda progress: done.append(progress.point.name))
    assert done == ["jpeg-40-frozen"] and len(rows) == 7
    assert read_results(out / "points" / "clean" / "jpeg-5-frozen") == before


def test_sweep__a_point_that_was_measured_with_another_codec_is_refused(
    swept: Path, clean: Path, codec_folder: Path, tmp_path: Path
):
    given = [f"runs={clean}", f"out={swept}", "epochs=1", "options=lr=0.01"]
    with pytest.raises(TaskError, match=r"dicm-(frozen|adapted) was measured with something else: .*codec: "):
        sweep(resolve("classification", [*given, f"codec={retrained(codec_folder, tmp_path / 'other')}"]))


def test_sweep__what_cannot_be_is_found_before_a_point_is_measured(clean: Path, tmp_path: Path):
    given = [f"runs={clean}", f"out={tmp_path / 'sweep'}", "anchors=jpeg:5"]
    with pytest.raises(RecipeError, match="lrr"):
        sweep(resolve("classification", [*given, "options=lrr=0.01"]))
    weights = ["anchors=mbt2018-mean:2", f"anchor_weights={tmp_path}"]
    with pytest.raises(
        TaskError, match=r"no mbt2018-mean-2\.safetensors; train it with `dicm anchors train mbt2018-mean"
    ):
        sweep(resolve("classification", [*given, *weights]))
    assert not (tmp_path / "sweep").exists()


def test_sweep__the_others_are_measured_where_a_point_fails(clean: Path, tmp_path: Path):
    (tmp_path / "bmshj2018-factorized-1.safetensors").write_bytes(b"none")
    given = [f"runs={clean}", f"out={tmp_path / 'sweep'}", "streams=false", "protocols=frozen"]
    anchors = ["anchors=bmshj2018-factorized:1,jpeg:5", f"anchor_weights={tmp_path}"]
    with pytest.raises(TaskError, match=r"1 of 2 points failed, .*bmshj2018-factorized-1-frozen: .*not weights of"):
        sweep(resolve("classification", [*given, *anchors]))
    (row,) = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert (row["codec"], row["quality"], row["parallel"]) == ("jpeg", "5", 1)


def test_point_config__keeps_its_checkpoints_in_its_own_folder(clean: Path, tmp_path: Path):
    base = shutil.copytree(clean, tmp_path / "base")
    options = (base / "config.yaml").read_text()
    (base / "config.yaml").write_text(options.replace("checkpoints: null", f"checkpoints: {base / 'checkpoints'}"))
    assert load_run(base).checkpoints == str(base / "checkpoints")
    config = resolve("classification", [f"runs={base}", "anchors=jpeg:5"])
    for point in points_of(config):
        assert point_config(config, point, tmp_path / "point").checkpoints is None


def test_point_config__options_of_one_side_are_those_of_its_adapted_points(clean: Path, tmp_path: Path):
    given = ["options=[weight_decay=0.1]", "anchor_options=[lr=0.1]", "stream_options=[lr=0.3]"]
    config = resolve("classification", [f"runs={clean}", "anchors=jpeg:5", *given])
    found = {point.name: point_config(config, point, tmp_path) for point in points_of(config)}
    assert {name: (each.lr, each.weight_decay) for name, each in found.items()} == {
        "jpeg-5-frozen": (0.02, 5e-4), "jpeg-5-adapted": (0.1, 0.1),
        "dicm-frozen": (0.02, 5e-4), "dicm-adapted": (0.3, 0.1),
    }  # fmt: skip


def test_sweep__a_frozen_probe_is_not_trained(
    codec_folder: Path, colours: Path, tmp_path: Path, options: Callable[..., list[str]]
):
    given = options(codec_folder, colours, tmp_path / "probe", "input=pixels", "probe=true")
    finetune.run(finetune.resolve("classification", given))
    out = tmp_path / "sweep"
    sweep(resolve("classification", [f"runs={tmp_path / 'probe'}", f"out={out}", "anchors=jpeg:5", "streams=false",
                                     "protocols=frozen"]))  # fmt: skip
    base, frozen = (trained_weights(run) for run in (tmp_path / "probe", out / "points" / "probe" / "jpeg-5-frozen"))
    assert all(tensor.equal(base[name]) for name, tensor in frozen.items())


def test_evaluate__tells_points_and_bd_rates(swept: Path, clean: Path, tmp_path: Path):
    out = shutil.copytree(swept, tmp_path / "sweep")
    command = ["evaluate", "classification", f"runs={clean}", f"out={out}", "epochs=1", "options=lr=0.01"]
    done = CliRunner().invoke(app, [*command, "anchors=jpeg:5,jpeg:40", "against=jpeg", "protocols=frozen"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for words in ("jpeg 40 frozen: ", "bpp payload, top1", "bpp, payload", "against jpeg", f"wrote {out}/results.csv"):
        assert words in text
    assert len(json.loads((out / "results.json").read_text())) == 7


@pytest.mark.parametrize(("parallel", "qualities"), [(1, "5,10,20"), (2, "5,10,20,30,40,50")], ids=["1", "2"])
def test_sweep__told_to_stop_when_a_point_is_done_it_begins_no_other(
    parallel: int, qualities: str, clean: Path, tmp_path: Path
):
    config = resolve("classification", [f"runs={clean}", f"out={tmp_path}", "anchors=jpeg", f"parallel={parallel}",
                                        f"qualities={qualities}", "streams=false", "protocols=frozen"])  # fmt: skip
    with pytest.raises(StoppedError, match="the same command goes on"):
        sweep(config, lambda progress: os.kill(os.getpid(), signal.SIGTERM))
    done = len(list(tmp_path.glob("points/*/*/costs.json")))
    total = len(qualities.split(","))
    assert 1 <= done < total  # each process ends the point that it has begun, and may be ahead of what is told
    assert len(json.loads((tmp_path / "results.json").read_text())) == done
    assert len(sweep(replace(config, parallel=1))) == total


def test_sweep__told_to_stop_before_there_are_processes_it_begins_none(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def save_and_tell(config: SweepConfig, path: Path) -> None:
        save_config(config, path)
        sweep_module._stop()

    monkeypatch.setattr(sweep_module._told, "clear", lambda: None)  # the notice comes behind it
    monkeypatch.setattr(sweep_module, "save_config", save_and_tell)
    config = resolve("classification", [f"runs={clean}", f"out={tmp_path / 'out'}", "anchors=jpeg", "parallel=2",
                                        "qualities=5,10", "streams=false", "protocols=frozen"])  # fmt: skip
    try:
        with pytest.raises(StoppedError, match="stopped before jpeg-5-frozen; the same command goes on"):
            sweep(config)
    finally:
        monkeypatch.undo()
        sweep_module._told.clear()
    assert not list((tmp_path / "out").glob("points/*/*"))


def test_sweep__a_process_that_is_killed_is_told_in_one_line_and_the_others_end_with_their_parent(
    clean: Path, tmp_path: Path
):
    given = [f"runs={clean}", f"out={tmp_path}", "anchors=jpeg", "parallel=2", "qualities=5,10,20,30,40,50,60,70",
             "streams=false", "protocols=frozen"]  # fmt: skip

    def kill_one(progress: Progress) -> None:
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)  # type: ignore[arg-type]

    with pytest.raises(TaskError, match=r"parallel=2: a process was ended from outside.*smaller parallel=") as error:
        sweep(resolve("classification", given), kill_one)
    assert "\n" not in str(error.value)
    endless = [f"runs={clean}", f"out={tmp_path / 'endless'}", "anchors=jpeg:5", "parallel=2", "epochs=100000",
               "streams=false", "protocols=adapted", "options=log_every=1"]  # fmt: skip
    config = resolve("classification", endless)
    driver = multiprocessing.get_context("forkserver").Process(target=sweep, args=(config,))
    driver.start()
    while not list(tmp_path.glob("endless/points/*/*/metrics.jsonl")):
        assert driver.is_alive()
        time.sleep(0.05)
    begun = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    assert any(map(is_alive, begun))
    driver.kill()
    driver.join()
    while any(map(is_alive, begun)):
        time.sleep(0.05)  # until the time-out of a test


def test_sweep__other_options_in_the_same_folder_are_refused(swept: Path, clean: Path):
    with pytest.raises(TaskError, match=r"epochs: 1 there, 2 here"):
        sweep(resolve("classification", [f"runs={clean}", f"out={swept}", "epochs=2", "options=lr=0.01"]))


def test_points_of__a_base_run_must_be_on_clean_pixels(finetuned: Path):
    with pytest.raises(TaskError, match="starts from runs with input=pixels"):
        points_of(resolve("classification", [f"runs={finetuned}", "anchors=jpeg:5"]))


def test_points_of__each_point_once(clean: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(clean)
    given = ["runs=.", "anchors=jpeg,jpeg:5", "qualities=5", "protocols=frozen"]
    points = points_of(resolve("classification", given))
    assert [(run_name(point.run), point.name) for point in points] == [
        ("clean", "jpeg-5-frozen"),
        ("clean", "dicm-frozen"),
    ]


def test_points_of__runs_of_one_seed_or_of_different_data_are_no_seeds(clean: Path, swept: Path, tmp_path: Path):
    other = shutil.copytree(clean, tmp_path / "other")
    both = [f"runs={clean},{other}", "protocols=frozen"]
    with pytest.raises(TaskError, match=r"clean and .*other have one seed.*label="):
        points_of(resolve("classification", both))
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seed: 0\n", "seed: 1\n"))
    assert {point.run for point in points_of(resolve("classification", both))} == {str(clean), str(other)}
    inputs = json.loads((other / "inputs.json").read_text())
    (other / "inputs.json").write_text(json.dumps({**inputs, "data": "0" * 64}))
    with pytest.raises(TaskError, match=r"clean and .*other were trained on different data"):
        points_of(resolve("classification", both))
    given = [f"runs={other}", f"out={swept}", "epochs=1", "options=lr=0.01"]
    with pytest.raises(TaskError, match=r"holds a sweep on other data \(.*colours\)"):
        sweep(resolve("classification", given))


def test_points_of__runs_that_see_images_otherwise_are_no_seeds(clean: Path, tmp_path: Path):
    other = shutil.copytree(clean, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        text.replace("seed: 0\n", "seed: 1\n").replace("scale_min: 0.4", "scale_min: 0.5")
    )
    with pytest.raises(TaskError, match=r"clean and .*other differ in scale_min \(0\.4, 0\.5\)"):
        points_of(resolve("classification", [f"runs={clean},{other}", "protocols=frozen"]))


def test_sweep__another_run_of_the_same_seed_does_not_join_what_is_there(swept: Path, clean: Path, tmp_path: Path):
    shutil.copytree(clean, tmp_path / "other")
    given = [f"runs={tmp_path / 'other'}", f"out={swept}", "epochs=1", "options=lr=0.01", "protocols=frozen"]
    with pytest.raises(TaskError, match=r"dicm frozen .*of runs clean and other, which have one seed \(0\)"):
        sweep(resolve("classification", given))


def test_point_config__of_a_base_run_that_was_elastic_has_one_worker(clean: Path, tmp_path: Path):
    base = shutil.copytree(clean, tmp_path / "base")
    text = (base / "config.yaml").read_text()
    assert "workers: 1\n" in text and "min_workers: null" in text
    elastic = text.replace("workers: 1\n", "workers: 4\n", 1).replace("min_workers: null", "min_workers: 2")
    (base / "config.yaml").write_text(elastic)
    config = resolve("classification", [f"runs={base}", "anchors=jpeg:5"])
    for point in points_of(config):
        found = point_config(config, point, tmp_path / "point")
        assert (found.workers, found.cluster.min_workers) == (1, None)


def test_points_of__a_codec_must_have_the_base_run_s_stem_and_layer1(clean: Path, codec_folder: Path, tmp_path: Path):
    codec = FeatureCodec.from_pretrained(retrained(codec_folder, tmp_path / "retrained"))
    assert points_of(resolve("classification", [f"runs={clean}", f"codec={tmp_path / 'retrained'}"]))
    with torch.no_grad():
        codec.backbone.layer1[0].conv1.weight.mul_(2)
    codec.save_pretrained(tmp_path / "other")
    with pytest.raises(TaskError, match=r"other has another stem and layer1 than the codec of runs=.*clean"):
        points_of(resolve("classification", [f"runs={clean}", f"codec={tmp_path / 'other'}"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["runs=[]"], "runs is empty"),
        (["runs=a", "task=anchor"], "task=anchor has no accuracy"),
        (["runs=a", "anchors=jpeg"], "anchors=jpeg has no quality"),
        (["runs=a", "anchors=gif", "qualities=3"], "anchor=gif:3 is unknown"),
        (["runs=a", "protocols=thawed"], "protocols=thawed"),
        (["runs=a", "rates=2"], "rates=2"),
        (["runs=a", "gates=static"], "gates=static"),
        (["runs=a", "gates=dynamic"], "reads no latents"),
        (["runs=a", "streams=false"], "nothing to measure"),
        (["runs=a", "parallel=0"], "parallel=0"),
        (["runs=a", "label=a/b"], "label=a/b"),
        (["runs=a", "label=hevc"], "label=hevc"),
        (["runs=a", "options=run=b"], "options=run=b"),
        (["runs=a", "anchor_options=[cache_folder=b]"], "anchor_options=cache_folder=b"),
        (["runs=a", "anchor_options=[epochs=3]"], "anchor_options=epochs=3"),
        (["runs=a", "stream_options=[rate=0]"], "stream_options=rate=0"),
        (["runs=a", "anchor_options=[image_size=96]"], "anchor_options=image_size=96 .*the same for all codecs"),
    ],
)
def test_resolve__bad_options_are_named(options: list[str], message: str):
    with pytest.raises(TaskError, match=message):
        resolve("classification", options)


def test_init__of_another_shape_or_unfinished_is_refused(
    clean: Path, codec_folder: Path, colours: Path, tmp_path: Path, options: Callable[..., list[str]]
):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((clean / "config.yaml").read_text())
    for init, message in ((tmp_path, "not a run folder"), (tmp_path / "begun", "not complete")):
        config = finetune.resolve("classification", options(codec_folder, colours, tmp_path / "run", f"init={init}"))
        with pytest.raises(TaskError, match=message):
            finetune.run(config)


def test_train_head__trains_stem_and_layer1_of_a_copy(
    clean: Path, codec_folder: Path, colours: Path, tmp_path: Path, options: Callable[..., list[str]]
):
    given = options(codec_folder, colours, tmp_path / "run", f"init={clean}", "input=pixels", "train_head=true")
    results = finetune.run(finetune.resolve("classification", given))
    weights = trained_weights(tmp_path / "run")
    codec = finetune.task_class("classification").load_codec(load_run(clean))
    assert codec is not None
    stem = {f"front.0.{name}": weight for name, weight in codec.backbone.stem.named_parameters()}
    assert stem and not any(weights[name].equal(weight) for name, weight in stem.items())
    assert results["top1"] > 0.5
    with pytest.raises(TaskError, match="train_head=true with input=streams"):
        finetune.resolve("classification", options(codec_folder, colours, tmp_path / "other", "train_head=true"))
