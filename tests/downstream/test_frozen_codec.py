"""Frozen means frozen: whatever task trains, the codec is the same afterwards, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_objects import NARROW_DETECTOR, SMALL_CROPS

from downstream import finetune
from downstream.tasks import TASKS, task_class
from pretrain.codec.feature_codec import FeatureCodec

OPTIONS = {
    "classification": ["classification"],
    "detection": ["detection_small", *NARROW_DETECTOR],
    "instance_segmentation": ["instance_segmentation_small", *NARROW_DETECTOR, "gate=dynamic"],
    "semantic_segmentation": ["semantic_segmentation_small", *SMALL_CROPS],
}


def test_options__are_those_of_every_task_that_reads_a_codec():
    assert {name for name in TASKS if task_class(name).metrics} == set(OPTIONS)


def state_of(codec: FeatureCodec, image: torch.Tensor) -> dict[str, object]:
    """Weights and statistics, the coder's tables, and what an image becomes."""
    stream = codec.encode(image)
    tables = codec._ready().tables.tensors()
    return {
        **{name: tensor.clone() for name, tensor in codec.state_dict().items()},
        **{name: tensor.clone() for name, tensor in tables.items()},
        "stream": stream,
        "fingerprint": codec.fingerprint,
        "f3": codec.decode(stream),
    }


@pytest.mark.parametrize("task", OPTIONS)
def test_finetune__weights_statistics_tables_and_streams_of_the_codec_stay(
    task: str, exported_codec: Path, scenes: Path, tmp_path: Path
):
    files = {path.name: path.read_bytes() for path in exported_codec.iterdir()}
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = finetune.resolve(
        OPTIONS[task][0],
        [f"codec={exported_codec}", f"data={scenes}", f"run={tmp_path / 'run'}", "launcher=local", "epochs=1",
         "batch_size=16", "precision=fp32", *OPTIONS[task][1:]],
    )  # fmt: skip
    tuner = finetune.create_tuner(config)
    codec = tuner.task.source.codec
    before = state_of(codec, image)
    tuner.enter(tuner.stages[-1])
    trained = {name: tensor.clone() for name, tensor in tuner.model.named_parameters()}
    tuner.train()
    after = state_of(codec, image)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, f"{name} changed"
    assert any(not torch.equal(trained[name], tensor) for name, tensor in tuner.model.named_parameters())
    assert not codec.training and not any(parameter.requires_grad for parameter in codec.parameters())
    assert {path.name: path.read_bytes() for path in exported_codec.iterdir()} == files
