from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cluster.metrics import read_rows
from downstream import finetune
from downstream.cli import app
from downstream.errors import TaskError
from downstream.evaluation.anchors import create_anchor
from downstream.evaluation.report import document_of
from downstream.predict import predict_files
from downstream.results import read_results


def options(data: Path, run: Path, *further: str) -> list[str]:
    return [f"data={data}", f"run={run}", "launcher=local", "image_size=64", "batch_size=8", "log_every=1", *further]


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchors") / "bmshj2018-hyperprior-1"
    further = options(colours, folder, "quality=1", "epochs=2", "lr=1e-3")
    done = CliRunner().invoke(app, ["anchors", "train", "bmshj2018-hyperprior", *further], catch_exceptions=False)
    assert done.exit_code == 0 and "wrote" in done.output and "PSNR" in done.output
    return folder


def test_train__learns_and_writes_what_an_anchor_reads(trained: Path, colours: Path):
    losses = [row["loss"] for row in read_rows(trained / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    results = read_results(trained)
    assert 0 < results["bpp_payload"] < results["bpp"] and results["psnr"] > 5
    anchor = create_anchor("bmshj2018-hyperprior:1", str(trained.with_suffix(".safetensors")))
    image = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    assert anchor.decode(anchor.encode(image)).shape == image.shape


def test_train__quantiles_fit_the_priors_without_an_optimizer_of_their_own(trained: Path):
    """The medians are where each channel's cumulative is one half."""
    task = finetune.open_run(trained).task
    bottleneck = task.model.entropy_bottleneck
    with torch.no_grad():
        middle = torch.sigmoid(bottleneck._logits_cumulative(bottleneck.quantiles[:, :, 1:2], stop_gradient=True))
    assert torch.allclose(middle, torch.full_like(middle, 0.5), atol=5e-3)


def test_predict__of_an_anchor_is_refused(trained: Path, tmp_path: Path):
    image = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(image)
    with pytest.raises(TaskError, match="predicts nothing"):
        predict_files("anchor", trained, [image], tmp_path / "out")


def test_report__of_an_anchor_is_refused(trained: Path):
    with pytest.raises(TaskError, match=rf"{trained}: a run of `anchor` has no accuracy"):
        document_of([trained], None, "hevc", [])


def test_train__a_range_of_rates_is_trained_at_its_quality(colours: Path, tmp_path: Path):
    """Same weights and images: the level alone makes the rate; what is written is an anchor of that quality."""
    rates = []
    for quality in (1, 8):
        run = tmp_path / f"bmshj2018-hyperprior-vbr-{quality}"
        given = options(colours, run, "model=bmshj2018-hyperprior-vbr", f"quality={quality}", "lmbda=0.01", "epochs=1")
        tuner = finetune.create_tuner(finetune.resolve("anchor", given))
        tuner.enter(tuner.stages[0])
        batch = next(iter(tuner.task.batches(0)))
        rates.append(float(tuner.task.loss(tuner.model, batch, torch.Generator().manual_seed(0))[1]["bpp"]))
    assert rates[0] < rates[1]
    tuner.task.finish()
    anchor = create_anchor("bmshj2018-hyperprior-vbr:8", str(run.with_suffix(".safetensors")))
    image = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    assert anchor.decode(anchor.encode(image)).shape == image.shape


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (["model=jpeg2000"], "model=jpeg2000"),
        (["model=cheng2020-attn", "quality=7"], "quality=7"),
        (["image_size=70"], "image_size=70"),
        (["lmbda=-1"], "lmbda=-1"),
        (["cache=bitstreams"], "leave input, anchor and cache out"),
    ],
)
def test_resolve__bad_options_are_named(colours: Path, tmp_path: Path, further: list[str], words: str):
    given = [f"data={colours}", f"run={tmp_path}", *further]
    with pytest.raises(TaskError, match=words):
        finetune.resolve("anchor", given)
