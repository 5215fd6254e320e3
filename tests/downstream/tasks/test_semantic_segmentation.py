from __future__ import annotations

import math

import pytest
import torch
from small_codecs import create_codec, random_images
from torch import Tensor

from downstream.errors import TaskError
from downstream.gate import create_gate
from downstream.latents import FeatureLatents
from downstream.tasks.deeplab import DeepLab
from downstream.tasks.semantic_segmentation import (
    SegmentationConfig,
    SegmentationMetric,
    SegmentationNetwork,
    constant_scores,
    learning_rate,
    scores,
    segmentation_loss,
    student_loss,
)
from downstream.transform import TRANSFORMS

GATE_CHOICES = {"dynamic": None, "static": [1, 4, 20], "variance": [0, 31], "none": None}


@pytest.fixture(scope="module")
def latents() -> FeatureLatents:
    return FeatureLatents(create_codec(), torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher() -> DeepLab:
    torch.manual_seed(0)
    return DeepLab("resnet18", 5).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("gate", GATE_CHOICES)
def test_network__of_a_stream_is_that_of_training(gate: str, kind: str, latents: FeatureLatents, teacher: DeepLab):
    """The logits that a receiver computes from the base alone are those of the gated latent."""
    torch.manual_seed(0)
    network = SegmentationNetwork(create_gate(gate, 32, GATE_CHOICES[gate]), kind, teacher).eval()
    image = random_images(1, 70, 100)[0]
    with torch.no_grad():
        logits, features = network(latents.latents(image[None]), 70, 100)
        stream = latents.encode(image, network.gate.choice, rest=True)
        received = latents.receive(stream if network.gate.choice is None else latents.split(stream)[0])
        assert torch.allclose(network.from_base(received), logits, atol=1e-3)
    assert logits.shape == (1, 5, 70, 100) and features.shape == (1, 64, 18, 25)
    assert features.shape == teacher.head(torch.randn(1, 3, 70, 100)).shape


def test_network__refuses_a_stream_of_other_channels(latents: FeatureLatents, teacher: DeepLab):
    network = SegmentationNetwork(create_gate("static", 32, [1, 2, 3]), "deconv", teacher).eval()
    received = latents.receive(latents.encode(random_images(1, 64, 64)[0], [1, 2]))
    with pytest.raises(TaskError, match="carries 2 channels, this network reads 3"):
        network.from_base(received)


def test_network__trains_gate_transform_and_tail_and_leaves_codec_and_teacher(
    latents: FeatureLatents, teacher: DeepLab
):
    torch.manual_seed(0)
    network = SegmentationNetwork(create_gate("dynamic", 32), "deconv", teacher).train()
    frozen = {**latents.codec.state_dict(), **{f"teacher.{k}": v for k, v in teacher.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    images = random_images(2, 64, 64)
    logits, features = network(latents.latents(images), 64, 64)
    target = teacher.head(torch.randn(2, 3, 64, 64))
    student_loss(logits, torch.zeros(2, 64, 64).long(), features, target, 1.0).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.gate.parameters())
    assert all(p.grad is not None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.items())


def test_loss__is_cross_entropy_and_the_distance_of_features():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, 0] = 255
    features, target = torch.randn(2, 6, 1, 1), torch.randn(2, 6, 1, 1)
    count = masks != 255
    expected = -logits.log_softmax(1).permute(0, 2, 3, 1)[count].gather(1, masks[count][:, None]).mean()
    assert torch.allclose(segmentation_loss(logits, masks), expected)
    total = student_loss(logits, masks, features, target, 0.5)
    assert torch.allclose(total, expected + 0.5 * (features - target).square().mean())
    # A crop that lies outside of what was annotated must not end a training with NaN.
    assert float(segmentation_loss(logits, torch.full_like(masks, 255))) == 0


def test_metric__ignores_255_and_averages_over_classes_that_occur():
    metric = SegmentationMetric(4)
    truth = torch.tensor([[[0, 0, 0, 1], [1, 255, 255, 2]]])
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 3, 0, 1]]])
    metric.update(predicted, truth)
    assert metric.confusion().sum() == 6
    results = metric.results()
    assert results["miou"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)  # class 3 occurs only where nothing counts
    assert results["pixel_accuracy"] == pytest.approx(4 / 6)


def test_metric__gathers_over_parts():
    random = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(0, 4, (6, 8, 8), generator=random) for _ in range(2))
    whole, parts = SegmentationMetric(4), [SegmentationMetric(4), SegmentationMetric(4)]
    whole.update(predicted, truth)
    for part, half in zip(parts, (slice(0, 3), slice(3, 6)), strict=True):
        part.update(predicted[half], truth[half])
    assert scores(parts[0].confusion() + parts[1].confusion()) == whole.results()


def test_constant_scores__are_those_of_the_most_frequent_class():
    confusion = torch.tensor([[5.0, 0, 0], [1, 1, 1], [0, 0, 2]])
    assert constant_scores(confusion) == {
        "miou": pytest.approx(5 / 10 / 3),
        "pixel_accuracy": pytest.approx(0.5),
    }
    assert scores(torch.zeros(3, 3)) == {"miou": 0.0, "pixel_accuracy": 0.0}


def test_learning_rate__drops_to_a_tenth_after_300_of_400_epochs():
    config = SegmentationConfig()
    rates = [learning_rate(config, epoch / config.epochs) for epoch in range(config.epochs)]
    assert rates[:300] == [1e-3] * 300
    assert all(math.isclose(rate, 1e-4) for rate in rates[300:])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gate": "soft"}, "gate=soft.*dynamic"),
        ({"transform": "unet"}, "transform=unet.*deconv"),
        ({"codec": None}, "latents=codec codec=None"),
        ({"latents": "mbt2018-mean"}, "latents=mbt2018-mean codec=c"),
        ({"gate": "static"}, "select-channels"),
        ({"channels": "c.json"}, "gate=dynamic channels=c.json"),
        ({"epochs": 0}, "epochs=0"),
        ({"height": 20}, "height=20"),
        ({"lr": 0.0}, "lr=0"),
        ({"scale_min": 3.0}, "scale_min=3"),
    ],
)
def test_config__refuses_what_cannot_work(values: dict[str, object], words: str):
    with pytest.raises(TaskError, match=words):
        SegmentationConfig(**{"data": "d", "codec": "c", **values}).validate()


def test_config__defaults_are_possible():
    SegmentationConfig(data="d", codec="c").validate()


def perfect(masks: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float()


def test_metric__perfect_is_one():
    metric, masks = SegmentationMetric(3), torch.randint(0, 3, (2, 8, 8))
    metric.update(perfect(masks).argmax(1), masks)
    assert metric.results() == {"miou": 1.0, "pixel_accuracy": 1.0}
