from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.zoo import image_models
from safetensors.torch import save_file
from small_codecs import random_images

from downstream.compressai_latents import CompressAILatents, Predicted, SeparableLatents, create_latents
from downstream.compressai_models import load_model
from downstream.errors import TaskError
from pretrain.codec import bitstream
from pretrain.codec.backbone import pad_to
from pretrain.errors import BitstreamError, CodecError

CPU = torch.device("cpu")
SEPARABLE = ("bmshj2018-hyperprior", "bmshj2018-factorized", "bmshj2018-factorized-relu", "mbt2018-mean")
CHOSEN = [3, 4, 90, 150, 191]


def lively(name: str, **options: Any) -> Any:
    """A model with random weights whose latents have a spread of some symbols, as trained ones have."""
    torch.manual_seed(0)
    model = image_models[name](quality=1, **options).eval().requires_grad_(False)
    pixels = random_images(1, 64, 64).float() / 255
    model.g_a[-1].weight.mul_(3 / model.g_a(pixels).std())
    if hasattr(model, "h_a"):
        y = model.g_a(pixels)
        model.h_a[-1].weight.mul_(3 / model.h_a(y).std())
    return model


@pytest.fixture(scope="module", params=SEPARABLE)
def latents(request: pytest.FixtureRequest) -> CompressAILatents:
    return create_latents(lively(request.param), CPU)


def test_decode__both_layers_give_the_image_of_the_models_own_stream(latents: CompressAILatents):
    image = random_images(1, 70, 100)[0]
    theirs = latents.model.compress(pad_to(image[None].float() / 255, 64))
    their_image = latents.model.decompress(theirs["strings"], theirs["shape"])["x_hat"][..., :70, :100]
    layered = latents.encode(image, channels=CHOSEN, rest=True)
    assert torch.equal(latents.decode_image(layered), their_image)
    assert torch.equal(latents.decode_image(latents.encode(image)), their_image)
    base, rest = latents.split(layered)
    assert torch.equal(latents.decode(base + rest), latents.decode(latents.encode(image)))


def test_receive__the_base_alone_gives_the_chosen_channels(latents: CompressAILatents):
    image = random_images(1, 70, 100)[0]
    y_hat = latents.latents(image[None])
    assert y_hat.shape == (1, 192, 8, 8)
    base, _ = latents.split(latents.encode(image, channels=CHOSEN, rest=True))
    received = latents.receive(base)
    assert received.channels == tuple(CHOSEN) and (received.height, received.width) == (70, 100)
    assert torch.equal(received.latents, y_hat[:, CHOSEN])
    # The header of a stream that may get its rest has a row for it, that without has none.
    alone = latents.encode(image, channels=CHOSEN)
    assert torch.equal(latents.receive(alone).latents, y_hat[:, CHOSEN])
    assert len(base) - 9 <= len(alone) < len(base) < len(latents.encode(image))
    with pytest.raises(BitstreamError, match="cut"):
        latents.decode(base)
    with pytest.raises(CodecError, match="without rest"):
        latents.decode(alone)


def test_encode__layers_cost_at_most_two_percent_more_than_one(latents: CompressAILatents):
    image = random_images(1, 192, 256)[0]
    chosen = list(range(0, 192, 6))
    both, single = latents.encode(image, channels=chosen, rest=True), latents.encode(image)
    assert len(both) <= 1.02 * len(single)


def test_latents__are_those_of_the_streams_of_each_image(latents: CompressAILatents):
    images = random_images(3, 64, 96)
    batch = latents.latents(images)
    for image, y_hat in zip(images, batch, strict=True):
        stream = latents.encode(image)
        assert latents.receive(stream).channels is None
        difference = (latents.decode(stream)[0] - y_hat).abs() > 1e-3  # convolutions of a batch sum in another order
        assert difference.float().mean() < 1e-3


def test_encode__the_choice_may_depend_on_the_image(latents: CompressAILatents):
    def busiest(y_hat: torch.Tensor) -> list[int]:
        return y_hat.flatten(1).std(dim=1).topk(6).indices.tolist()

    image = random_images(1, 64, 64)[0]
    stream = latents.encode(image, channels=busiest)
    received = latents.receive(stream)
    assert list(received.channels or ()) == sorted(busiest(latents.latents(image[None])[0]))
    # Without a hyperprior, channels known beforehand are computed alone, in sums of another order.
    assert torch.allclose(received.latents, latents.receive(latents.encode(image, received.channels)).latents, atol=1)


def test_encode__takes_the_tables_that_the_model_itself_takes():
    """Also at the bounds between two tables, and beyond the first and the last."""
    latents = create_latents(lively("bmshj2018-hyperprior"), CPU)
    assert isinstance(latents, SeparableLatents)
    gaussian = latents.model.gaussian_conditional
    table = gaussian.scale_table
    scales = torch.cat([table, table.nextafter(torch.tensor(0.0)), table.nextafter(torch.tensor(1e9)), -table])
    predicted = Predicted(scales.view(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    assert torch.equal(
        latents._tables(predicted, [1, 3]).view(2, 8, 8), gaussian.build_indexes(predicted.scales)[0, 1::2]
    )
    assert torch.equal(
        latents._tables(predicted, [0, 2]).view(2, 8, 8), gaussian.build_indexes(predicted.scales)[0, ::2]
    )


def test_decode__damage_is_an_error(latents: CompressAILatents):
    stream = latents.encode(random_images(1, 64, 64)[0], channels=CHOSEN, rest=True)
    for place in range(0, len(stream), 7):
        damaged = bytearray(stream)
        damaged[place] ^= 0x10
        with pytest.raises(BitstreamError):
            latents.decode(bytes(damaged))
    _, layers = bitstream.unpack(stream, latents.fingerprint)
    wrong = [bitstream.Layer(layer.payload, layer.digest ^ 1) for layer in layers]
    channels = bitstream.describe(stream).channels
    with pytest.raises(BitstreamError, match="other symbols"):
        latents.receive(bitstream.pack(latents.fingerprint, 64, 64, wrong, None, channels))
    for forged in (bitstream.ChannelList((1, 2), 100), bitstream.ChannelList(tuple(range(192)), 192)):
        with pytest.raises(BitstreamError, match="latent of 192"):
            latents.decode(bitstream.pack(latents.fingerprint, 64, 64, layers, None, forged))
    with pytest.raises(BitstreamError, match="written by codec"):
        create_latents(lively("mbt2018-mean" if not hasattr(latents.model, "h_a") else SEPARABLE[1]), CPU).decode(
            stream
        )


@pytest.mark.parametrize("channels", [[], [0, 0], [192], [-1]])
def test_encode__impossible_channels(latents: CompressAILatents, channels: list[int]):
    with pytest.raises(CodecError, match=r"0\.\.191"):
        latents.encode(random_images(1, 64, 64)[0], channels=channels)


@pytest.mark.parametrize("image", [torch.zeros(3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)])
def test_encode__what_is_no_image(latents: CompressAILatents, image: torch.Tensor):
    with pytest.raises(CodecError, match="uint8"):
        latents.encode(image)


def test_encode__without_a_hyperprior_only_the_chosen_channels_are_computed():
    from torch.utils.flop_counter import FlopCounterMode

    latents, image = create_latents(lively("bmshj2018-factorized"), CPU), random_images(1, 64, 64)[0]
    flops = []
    for channels in (None, [1, 2, 3]):
        counter = FlopCounterMode(display=False)
        with counter:
            latents.encode(image, channels=channels)
        flops.append(counter.get_total_flops())
    last = 2 * 4 * 4 * 128 * 25  # one channel of the last convolution
    assert flops[0] - flops[1] == 189 * last


@pytest.mark.parametrize("name", ["mbt2018", "bmshj2018-hyperprior-vbr"])
def test_whole_latents__are_coded_by_the_model_itself(name: str):
    latents = create_latents(lively(name), CPU, quality=2)  # s=1, where CompressAI names none
    image = random_images(1, 64, 70)[0]
    stream = latents.encode(image)
    received = latents.receive(stream)
    assert received.latents.shape == (1, latents.channels, 4, 8) and received.channels is None
    theirs = latents.model.compress(pad_to(image[None].float() / 255, 64))
    their_image = latents.model.decompress(theirs["strings"], theirs["shape"])["x_hat"]
    assert torch.equal(latents.decode_image(stream), their_image[..., :64, :70])
    assert latents.payload_bytes(stream) == sum(len(strings[0]) for strings in theirs["strings"])
    assert latents.latents(image[None]).shape == received.latents.shape
    with pytest.raises(CodecError, match="gate=none"):
        latents.encode(image, channels=[1])


@pytest.mark.parametrize("steps", [False, True])
def test_create_latents__quality_is_the_rate_of_a_model_with_a_range(steps: bool, tmp_path: Path):
    """With one step of z for all rates, as trained here, or one for each, as in the zoo's weights."""
    name, path = "bmshj2018-hyperprior-vbr", tmp_path / "weights.safetensors"
    model = lively(name, vr_entbttlnck=steps)
    model.update()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    image = random_images(1, 64, 64)[0]
    streams, errors = [], []
    for quality in (1, 8):
        latents = create_latents(load_model(name, quality, str(path)), CPU, quality)
        streams.append(latents.encode(image))
        theirs = latents.model.compress(image[None].float() / 255, s=quality - 1)
        decoded = latents.model.decompress(theirs["strings"], theirs["shape"], s=quality - 1)["x_hat"]
        assert torch.equal(latents.decode_image(streams[-1]), decoded)
        assert torch.equal(latents.decode(streams[-1]), latents.latents(image[None]))
        y_hat, y = latents.decode(streams[-1]), latents.model.g_a(image[None].float() / 255)
        errors.append(float((y_hat - y).square().mean()))
    assert len(streams[0]) < len(streams[1]) and errors[0] > errors[1]
    with pytest.raises(BitstreamError, match="written by codec"):
        latents.decode(streams[0])


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "bmshj2018-factorized-relu"])
@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_load_model__weights_of_a_file(name: str, suffix: str, tmp_path: Path):
    model = lively(name)
    model.update()
    path = tmp_path / f"weights{suffix}"
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state}, path)
    loaded = load_model(name, weights=str(path))
    image = random_images(1, 64, 64)[0]
    assert create_latents(loaded, CPU).encode(image) == create_latents(model, CPU).encode(image)


def test_load_model__refusals(tmp_path: Path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"state_dict": {"g_a.0.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    for options, words in [
        ({"name": "jpeg"}, "bmshj2018-hyperprior"),
        ({"name": "bmshj2018-hyperprior", "quality": 12}, "quality 12"),
        ({"name": "mbt2018-vbr", "quality": 9, "weights": str(tmp_path / "other.pth")}, "quality 9: .*1..8"),
        ({"name": "bmshj2018-hyperprior", "weights": str(tmp_path / "none.pth")}, "none.pth"),
        ({"name": "bmshj2018-hyperprior", "weights": str(tmp_path / "junk.pth")}, "junk.pth"),
        ({"name": "bmshj2018-hyperprior", "weights": str(tmp_path / "other.pth")}, "not weights of"),
    ]:
        with pytest.raises(TaskError, match=words) as error:
            load_model(**options)
        assert "\n" not in str(error.value)
