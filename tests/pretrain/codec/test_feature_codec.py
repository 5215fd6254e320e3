from __future__ import annotations

import copy
import json
import math
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_codecs import NARROW, create_codec, random_images, wake
from torch import Tensor

from data_pipeline.views import normalize
from pretrain.codec import bitstream
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError, CodecError

SIZES = [(16, 16), (17, 31), (64, 65), (128, 192)]


@pytest.mark.parametrize("size", SIZES)
def test_encode__bytes_are_what_the_estimate_says(codec: FeatureCodec, size: tuple[int, int]):
    image = random_images(1, *size)[0]
    stream = codec.encode(image)
    with torch.no_grad():
        estimate = float(codec(normalize(image[None].float() / 255)).bits) / 8
    header = codec.describe(stream).header_bytes
    assert header <= 32
    # A payload ends on a whole byte; the estimate counts half a one.
    assert abs(len(stream) - header - estimate) <= max(0.001 * estimate, 0.6 * len(codec.describe(stream).layers))


@pytest.mark.parametrize("size", SIZES)
def test_decode__equals_the_features_of_an_eval_pass(codec: FeatureCodec, size: tuple[int, int]):
    image = random_images(1, *size)[0]
    f3 = codec.decode(codec.encode(image))
    features = codec.features(normalize(image[None].float() / 255))
    assert f3.shape == (1, 64, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert f3.dtype == torch.float32
    assert torch.allclose(f3, features, atol=1e-4 * float(features.abs().max()))


def test_decode_latents__equal_those_of_an_eval_pass(codec: FeatureCodec):
    images = random_images(2, 64, 128)
    y2_hat = codec.decode_latents(codec.encode_batch(images))
    assert torch.allclose(y2_hat, codec.latents(normalize(images.float() / 255)), atol=1e-4)
    assert y2_hat.abs().max() > 2


def test_decode_batch__symbols_do_not_depend_on_the_batch(codec: FeatureCodec):
    streams = codec.encode_batch(random_images(6, 64, 64))
    together = codec.decode_latents(streams)
    alone = torch.cat([codec.decode_latents([stream]) for stream in streams])
    # Another symbol would be off by one; means may differ by float64's last bits.
    assert torch.allclose(together, alone, atol=1e-5)
    assert codec.decode_batch(streams).shape == (6, 64, 16, 16)


def test_encode_batch__writes_what_encode_writes(codec: FeatureCodec):
    images = random_images(5, 48, 64)
    assert codec.encode_batch(images) == [codec.encode(image) for image in images]


def test_decode__does_not_depend_on_the_number_of_threads(codec: FeatureCodec):
    stream = codec.encode(random_images(1, 128, 192)[0])
    threads, latents = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            latents.append(codec.decode_latents([stream]))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(latents[0], latents[1], atol=1e-5)
    assert torch.allclose(latents[0], latents[2], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decode__on_another_device_than_encode(codec: FeatureCodec):
    there = copy.deepcopy(codec).cuda()
    images = random_images(16, 128, 192)
    assert there.fingerprint == codec.fingerprint
    for streams in (codec.encode_batch(images), there.encode_batch(images)):
        assert torch.allclose(codec.decode_latents(streams), there.decode_latents(streams).cpu(), atol=1e-5)


def test_decode__stops_after_the_base_layer(codec: FeatureCodec):
    stream = codec.encode(random_images(1, 64, 64)[0])
    info = codec.describe(stream)
    assert list(info.layers) == ["base", "rest"]
    start = stream[: info.header_bytes + info.layers["base"]]
    whole, base = codec.decode_latents([stream]), codec.decode_latents([start], last_layer="base")
    assert torch.equal(base[:, :16], whole[:, :16])
    assert not torch.equal(base[:, 16:], whole[:, 16:])
    assert codec.decode(start, last_layer="base").shape == (1, 64, 16, 16)
    with pytest.raises(BitstreamError, match="cut"):
        codec.decode(start)
    with pytest.raises(CodecError, match="base, rest"):
        codec.decode(stream, last_layer="z")


def test_decode__any_damage_is_a_bitstream_error(codec: FeatureCodec):
    images = random_images(2, 32, 40)
    stream, other = codec.encode_batch(images)
    chance = random.Random(0)
    for trial in range(300):
        damaged = bytearray(stream)
        kind = trial % 4
        if kind == 0:
            del damaged[chance.randrange(len(damaged)) :]
        elif kind == 1:
            for _ in range(chance.choice([1, 2, 30])):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        elif kind == 2:
            cut = chance.randrange(1, len(damaged))
            damaged[cut:] = other[cut:]
        else:
            start = chance.randrange(len(damaged))
            damaged[start : start + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
        if bytes(damaged) in (stream, other):
            continue
        with pytest.raises(BitstreamError):
            codec.decode(bytes(damaged))


def test_decode__symbols_that_fail_their_digest(codec: FeatureCodec):
    stream = codec.encode(random_images(1, 32, 40)[0])
    _, layers = bitstream.unpack(stream, codec.fingerprint)
    wrong = [bitstream.Layer(layer.payload, layer.digest ^ 1) for layer in layers]
    with pytest.raises(BitstreamError, match="base decodes to other symbols"):
        codec.decode(bitstream.pack(codec.fingerprint, 32, 40, wrong))


def test_decode__stream_of_another_codec(codec: FeatureCodec):
    stream = create_codec(seed=1).encode(random_images(1, 32, 32)[0])
    with pytest.raises(BitstreamError, match=f"this is {codec.fingerprint[:4].hex()}"):
        codec.decode(stream)


def test_decode_batch__sizes_must_agree(codec: FeatureCodec):
    streams = [codec.encode(random_images(1, size, 32)[0]) for size in (32, 48)]
    with pytest.raises(CodecError, match="2 image sizes"):
        codec.decode_batch(streams)
    with pytest.raises(CodecError, match="0 streams"):
        codec.decode_batch([])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 32, 32), "uint8"),
        (torch.zeros(1, 32, 32, dtype=torch.uint8), "3, H, W"),
        (torch.zeros(32, 32, dtype=torch.uint8), "3, H, W"),
        (torch.zeros(3, 15, 32, dtype=torch.uint8), "15 x 32"),
        (torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 32, 70_000), "32 x 70000"),
    ],
)
def test_encode__refuses_what_is_no_image(codec: FeatureCodec, image: Tensor, words: str):
    with pytest.raises(CodecError, match=words):
        codec.encode(image)


def test_encode__diverged_weights_are_named():
    codec = create_codec()
    with torch.no_grad():
        codec.g_a[-1].weight.fill_(math.nan)
    with pytest.raises(CodecError, match="not finite"):
        codec.encode(random_images(1, 32, 32)[0])


def change_by_step(codec: FeatureCodec) -> None:
    """One optimizer step on every parameter."""
    codec.train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    output = codec(normalize(random_images(2, 64, 64).float() / 255))
    (output.bits.mean() + output.f3.square().mean() - output.likelihoods["y1"].log().sum()).backward()
    optimizer.step()


def change_in_place(codec: FeatureCodec) -> None:
    """A prior that moves by several symbols."""
    with torch.no_grad():
        codec.entropy.z.biases[-1].add_(3)


def change_by_loading(codec: FeatureCodec) -> None:
    codec.load_state_dict(create_codec(seed=2).state_dict())


def change_behind_autograd(codec: FeatureCodec) -> None:
    """Leaves no trace, so the change of mode has to look."""
    codec.entropy.z.biases[-1].data.add_(3)
    codec.eval()


@pytest.mark.parametrize("change", [change_by_step, change_in_place, change_by_loading, change_behind_autograd])
def test_encode__never_with_tables_of_other_weights(change: Callable[[FeatureCodec], None]):
    codec, image = create_codec(), random_images(1, 64, 64)[0]
    before = codec.encode(image)
    change(codec)
    fresh = FeatureCodec(NARROW)
    fresh.load_state_dict(codec.state_dict())
    stream = codec.encode(image)
    assert stream != before
    assert stream == fresh.encode(image)
    with pytest.raises(BitstreamError, match="codec"):
        codec.decode(before)
    codec.eval()
    features = codec.features(normalize(image[None].float() / 255))
    assert torch.allclose(codec.decode(stream), features, atol=1e-4 * float(features.abs().max()))


def test_features__round_about_solved_medians():
    codec, image = create_codec(), random_images(1, 64, 64)[0]
    change_in_place(codec)
    features = codec.features(normalize(image[None].float() / 255))  # before anything was encoded
    assert torch.allclose(codec.decode(codec.encode(image)), features, atol=1e-4 * float(features.abs().max()))


def test_encode__leaves_training_mode_and_random_state_alone():
    codec, image = create_codec().train(), random_images(1, 64, 64)[0]
    codec.redundancy.eval()
    modes = [module.training for module in codec.modules()]
    statistics = {name: tensor.clone() for name, tensor in codec.named_buffers()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = codec.encode(image)
        codec.decode(stream)
    assert [module.training for module in codec.modules()] == modes
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in codec.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert stream == codec.eval().encode(image)


def test_encode__in_inference_mode():
    codec, image = create_codec(), random_images(1, 64, 64)[0]
    with torch.inference_mode():
        stream = codec.encode(image)
        codec.decode(stream)
    assert codec.encode(image) == stream
    change_by_step(codec)  # weights can still be trained


@pytest.mark.parametrize("again", [copy.deepcopy, lambda codec: pickle.loads(pickle.dumps(codec))])
def test_copies__keep_the_tables(folder: Path, again: Callable[[FeatureCodec], FeatureCodec]):
    codec, image = FeatureCodec.from_pretrained(folder), random_images(1, 32, 32)[0]
    copied = again(codec)
    assert copied.fingerprint == codec.fingerprint
    assert copied.encode(image) == codec.encode(image)


def test_forward__noise_follows_torchs_seed():
    codec, images = create_codec().train(), normalize(random_images(2, 48, 40).float() / 255)
    torch.manual_seed(0)
    first = codec(images)
    torch.manual_seed(0)
    again = codec(images)
    assert torch.equal(first.bits, again.bits)
    assert not torch.equal(first.bits, codec(images).bits)
    assert first.f1.shape == first.f2.shape == first.f3.shape == (2, 64, 12, 10)
    assert first.bits.shape == (2,)
    assert first.likelihoods.keys() == {"y1", "y2", "z"}


def test_save_pretrained__loads_equal_and_frozen(codec: FeatureCodec, folder: Path):
    loaded, image = FeatureCodec.from_pretrained(folder), random_images(1, 64, 65)[0]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.encode(image) == codec.encode(image)
    assert torch.equal(loaded.decode(codec.encode(image)), codec.decode(codec.encode(image)))
    assert loaded.extra == {"dataset": "noise"}
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_save_pretrained__again_gives_the_same_files(folder: Path, tmp_path: Path):
    FeatureCodec.from_pretrained(folder).save_pretrained(tmp_path, extra={"dataset": "noise"})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_save_pretrained__notices_what_left_no_trace(tmp_path: Path):
    codec, image = create_codec(), random_images(1, 32, 32)[0]
    before = codec.encode(image)
    codec.entropy.z.biases[-1].data.add_(3)
    codec.save_pretrained(tmp_path)
    assert FeatureCodec.from_pretrained(tmp_path).encode(image) == codec.encode(image) != before


def test_save_pretrained__unwritable_folder(codec: FeatureCodec, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CodecError, match="cannot be written"):
        codec.save_pretrained(tmp_path / "file")


def test_fingerprint__leaves_out_the_tail_that_tasks_train():
    codec = create_codec()
    before = codec.fingerprint
    with torch.no_grad():
        codec.backbone.layer3[0].conv1.weight.add_(1)
    assert codec.fingerprint == before
    with torch.no_grad():
        codec.g_s[0].weight.add_(1)
    assert codec.fingerprint != before


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    facts["config"].update(changes.pop("config", {}))
    path.write_text(json.dumps({**facts, **changes}))


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors: damaged",
    ),
    "config cut": (lambda f: (f / "config.json").write_text('{"schema_ver'), "config.json: damaged"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[]"), "config.json: damaged"),
    "config without sizes": (
        lambda f: (f / "config.json").write_text('{"schema_version": 1}'), "config.json: damaged"
    ),
    "unknown size": (lambda f: edit_config(f, config={"depth": 3}), "depth"),
    "size of another type": (lambda f: edit_config(f, config={"z_channels": "many"}), "z_channels|many"),
    "size that would be looked up": (
        lambda f: edit_config(f, config={"backbone": "${oc.env:DICM_SECRET}"}), r"oc\.env:DICM_SECRET"
    ),
    "bool for a size": (lambda f: edit_config(f, config={"z_channels": True}), "z_channels=True"),
    "size beyond any memory": (lambda f: edit_config(f, config={"hyper_dim": 60_000}), "configuration: 'h_a"),
    "brackets without end": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: damaged"),
    "facts of another type": (lambda f: edit_config(f, extra=["x"]), "extra="),
    "image size of another type": (lambda f: edit_config(f, extra={"image_size": "a"}), "extra.image_size='a'"),
    "impossible size": (lambda f: edit_config(f, config={"z_channels": 0}), "z_channels=0"),
    "newer schema": (lambda f: edit_config(f, schema_version=9), "schema version 9"),
    "another width": (lambda f: edit_config(f, config={"z_channels": 16}), "configuration: 'entropy.z"),
    "another fingerprint": (lambda f: edit_config(f, fingerprint="00" * 8), "different codecs"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin, a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_from_pretrained__names_the_defect(folder: Path, tmp_path: Path, defect: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DICM_SECRET", "hunter2")
    damage, words = DEFECTS[defect]
    damaged = shutil.copytree(folder, tmp_path / "codec")
    damage(damaged)
    with pytest.raises(CodecError, match=words) as caught:
        FeatureCodec.from_pretrained(damaged)
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_from_pretrained__flipped_weights_are_noticed(folder: Path, tmp_path: Path):
    damaged = shutil.copytree(folder, tmp_path / "codec")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    header = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + header])["g_a.1.weight"]
    data[8 + header + entry["data_offsets"][0]] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(CodecError, match="different codecs"):
        FeatureCodec.from_pretrained(damaged)


def test_from_pretrained__no_folder(tmp_path: Path):
    with pytest.raises(CodecError, match=r"no such codec folder.*dicm export"):
        FeatureCodec.from_pretrained(tmp_path / "nothing")


def test_from_pretrained__hub_id_without_a_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CodecError, match=r"not fetched from the hub.*dicm export"):
        FeatureCodec.from_pretrained("nobody-at-all/no-codec")


def test_compile__leaves_streams_and_features_as_they_are():
    """The graphs that are captured, run by torch's own kernels; the default backend needs a C++ compiler."""
    torch.manual_seed(0)
    one_of_each = replace(NARROW, backbone="test_resnet", re_depths=[1, 0, 0], rgc_orders=[0, 0, 2])
    codec = wake(FeatureCodec(one_of_each).eval().requires_grad_(False))
    codec.g_a[-1].weight.mul_(4)  # symbols that are not all zero
    compiled, image = copy.deepcopy(codec), random_images(1, 64, 96)[0]
    compiled.compile(backend="eager")
    stream = compiled.encode(image)
    assert stream == codec.encode(image)
    assert torch.equal(compiled.decode(stream), codec.decode(stream))


@pytest.mark.parametrize("writer", ["fp32", "bf16"])
def test_precision__streams_of_either_are_read_with_either(folder: Path, writer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.codec.precision.has_bfloat16", lambda device: True)  # slow where it has none, but so
    codecs = {name: FeatureCodec.from_pretrained(folder, name) for name in ("fp32", "bf16")}
    image = random_images(1, 96, 128)[0]
    stream = codecs[writer].encode(image)
    latents = [codec.decode_latents([stream]) for codec in codecs.values()]
    assert torch.equal(*latents)
    f3, rough = (codec.decode(stream) for codec in codecs.values())
    assert rough.dtype == torch.float32
    assert 0 < float((f3 - rough).abs().max()) < 0.05 * float(f3.abs().max())


def test_from_pretrained__unknown_precision(folder: Path):
    with pytest.raises(CodecError, match="precision=fp16 is unknown; choose one of fp32, bf16"):
        FeatureCodec.from_pretrained(folder, "fp16")
