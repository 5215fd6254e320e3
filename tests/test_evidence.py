"""The script of the evidence: its plan, its claims, and what it refuses."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tests" / "benchmarks"))

import evidence
import evidence_plan

from downstream.evaluation.points import resolve
from downstream.evaluation.rate_accuracy import Curve, RatePoint


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data=Path("data"), out=tmp_path / "out", seeds=2, scale=0.1, parallel=2, no_ablations=False
    )


def curve(codec: str, *points: tuple[float, float]) -> Curve:
    return Curve(codec, "adapted", tuple(RatePoint(str(n), *point) for n, point in enumerate(points)))


def test_plan__each_step_once_and_behind_what_it_reads(arguments: argparse.Namespace):
    steps = list(evidence_plan.plan(evidence_plan.STUDIES, arguments))
    results = [step.result for step in steps]
    assert len({step.name for step in steps}) == len(steps)
    made: set[Path] = set()
    for step in steps:
        paths = [Path(part.partition("=")[2]) for part in step.command if "=" in part]
        for path in paths:
            if (arguments.out in path.parents and path.name in ("codec", "pretrain")) or path.name.startswith("clean_"):
                # What a step reads in the folder of results was made before, or is what it makes.
                assert any(path == done or path in done.parents for done in {*made, step.result}), (step.name, path)
        made.add(step.result)
    # Scenes of one size are drawn once for both tasks; their codec is one, too.
    assert len(results) - len(set(results)) == 1 + 2 * arguments.seeds


def test_plan__sweeps_are_commands_that_dicm_takes(arguments: argparse.Namespace):
    sweeps = [step for step in evidence_plan.plan(evidence_plan.STUDIES, arguments) if step.command[0] == "evaluate"]
    assert len(sweeps) == len(evidence_plan.STUDIES) * arguments.seeds + len(evidence_plan.ABLATIONS) + 2
    folders: dict[str, tuple] = {}
    for step in sweeps:
        _, _, task, *overrides = shlex.split(step.typed)
        config = resolve(task, overrides)
        assert config.label in ("dicm", evidence_plan.LATENTS, *evidence_plan.ABLATIONS)
        # A sweep refuses a folder that holds one with other options than these.
        fixed = (
            config.task, config.epochs, config.options, config.anchor_options, config.stream_options, config.anchor_weights,
        )  # fmt: skip
        assert folders.setdefault(config.out, fixed) == fixed


def test_plan__an_ablation_of_the_codec_goes_on_from_the_whole_one_s_backbone(arguments: argparse.Namespace):
    steps = {step.name: step.command for step in evidence_plan.plan(evidence_plan.STUDIES, arguments)}
    whole = arguments.out / "tiny_imagenet20" / "whole_0"
    pretraining = steps["tiny_imagenet20: without gated convolutions, seed 0, pretraining"]
    assert {f"init={whole / 'codec'}", "init_parts=[backbone]", "only=[codec]"} <= set(pretraining)
    sweep = steps["tiny_imagenet20: without gated convolutions, seed 0, sweep"]
    assert f"runs={whole / 'clean_classification_whole_0'}" in sweep
    assert not any(part.startswith("init=") for part in steps["tiny_imagenet20: without guidance, seed 0, pretraining"])


def test_claims_of__tell_what_was_wanted_and_found():
    found = {
        "tiny_imagenet20": [
            curve("hevc", (0.1, 0.4), (0.2, 0.5), (0.4, 0.6)),
            curve("dicm", (0.05, 0.4), (0.1, 0.5), (0.2, 0.6)),
            curve("without gated convolutions", (0.1, 0.4), (0.2, 0.5), (0.4, 0.6)),
        ],
        "camvid": [
            curve("hevc", (0.4, 0.5)), curve("dicm variance 32", (0.2, 0.5)), curve("dicm static 32", (0.1, 0.5)),
            curve("bmshj2018-hyperprior", (0.5, 0.6)), curve("latents of pixels static 32", (0.1, 0.6)),
        ],
    }  # fmt: skip
    claims = {name: measured for name, _, measured in evidence.claims_of(found)}
    assert claims["tiny_imagenet20: BD-rate against HEVC intra"] == "-50.0 %"
    assert claims["tiny_imagenet20: BD-rate without gated convolutions against the whole"] == "+100.0 %"
    assert "2.00 times" in claims["tiny_imagenet20: top-1 at the lowest rate, against HEVC at twice the bytes"]
    assert claims["camvid: bits that dicm static 32 saves against dicm variance 32"] == "50.0 % at 50.0 %"
    assert claims["camvid: bits that dicm static 32 saves against hevc"] == "75.0 % at 50.0 %"
    assert (
        claims["camvid: bits that latents of pixels static 32 saves against bmshj2018-hyperprior"] == "80.0 % at 60.0 %"
    )


def test_lowest_rate_claim__above_and_below_all_of_hevc_s():
    hevc = curve("hevc", (0.1, 0.4), (0.2, 0.5))
    assert "above all" in evidence.lowest_rate_claim("", curve("dicm", (0.05, 0.6)), hevc)[2]
    assert "HEVC's lowest 40.0 % at 0.1000" in evidence.lowest_rate_claim("", curve("dicm", (0.05, 0.3)), hevc)[2]


def test_record__a_step_that_was_begun_with_another_command_is_refused(tmp_path: Path):
    path = tmp_path / "steps.json"
    step = evidence_plan.Step("data", ["data", "scenes", "out", "parallel=1"], tmp_path / "result")
    record = evidence.Record(path)
    record.check(step)
    record.begin(step)
    record.end(step, 1.5)
    record.begin(step)
    record.end(step, 1.0)
    again = evidence.Record(path)
    assert again.seconds == {"data": 2.5}
    again.check(evidence_plan.Step("data", ["data", "scenes", "out", "parallel=2"], step.result))
    with pytest.raises(SystemExit, match="use another --out"):
        again.check(evidence_plan.Step("data", ["data", "scenes", "out", "--size", "96"], step.result))
