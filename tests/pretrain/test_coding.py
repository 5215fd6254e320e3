from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_refused, dicm
from pictures import encoded, picture
from PIL import Image
from safetensors import safe_open
from torchvision.io import ImageReadMode, decode_image, write_png

from data_pipeline.decoding import decode_image as decode
from data_pipeline.decoding import try_decode
from data_pipeline.in_hand import take
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.coding import READERS, read_channels, read_image
from pretrain.feature_picture import feature_picture

SIZES = {"a": (40, 50), "b": (17, 64)}


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of chunks, each with the right checksum."""
    whole = (len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


HEADER = b"\x08\x02\x00\x00\x00"
# Two frames, the first of which is no pixels: decoders have ended the process on it.
ANIMATED_PNG = png(
    (b"IHDR", (96).to_bytes(4) + (64).to_bytes(4) + HEADER), (b"acTL", (2).to_bytes(4) + bytes(4)),
    (b"fcTL", bytes(4) + (96).to_bytes(4) + (64).to_bytes(4) + bytes(14)), (b"IDAT", zlib.compress(bytes(9))),
    (b"IEND", b""),
)  # fmt: skip
BOMB = png((b"IHDR", (30_000).to_bytes(4) * 2 + HEADER), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b""))


def write_noise(path: Path, height: int, width: int, seed: int = 0) -> torch.Tensor:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    write_png(image, str(path))
    return image


@pytest.fixture(scope="module")
def codec(exported_codec: Path) -> FeatureCodec:
    return FeatureCodec.from_pretrained(exported_codec)


@pytest.fixture(scope="module")
def streams(codec: FeatureCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.dicm and b.dicm, of noise images of `SIZES`."""
    folder = tmp_path_factory.mktemp("streams")
    for name, size in SIZES.items():
        (folder / f"{name}.dicm").write_bytes(codec.encode(write_noise(folder / "image", *size)))
    (folder / "image").unlink()
    return folder


def test_encode__a_folder_gives_each_image_its_own_stream(codec: FeatureCodec, exported_codec: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    images = {
        f"{i:02d}": write_noise(tmp_path / "images" / f"{i:02d}.png", 16 + i, 32, i) for i in range(4 * READERS + 3)
    }
    result = dicm("encode", tmp_path / "images", "-o", tmp_path / "out" / "streams", "--codec", exported_codec)
    assert result.returncode == 0, result.stderr
    assert f"{len(images)} images" in result.stdout and "bpp" in result.stdout and "images/s" in result.stdout
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "streams").iterdir()}
    assert written == {f"{name}.dicm": codec.encode(image) for name, image in images.items()}


def test_encode__images_that_fail_are_left_out_by_name(exported_codec: Path, tmp_path: Path):
    write_noise(tmp_path / "good.png", 32, 32)
    write_noise(tmp_path / "tiny.png", 8, 8)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    result = dicm("encode", tmp_path, "-o", tmp_path / "out", "--codec", exported_codec)
    assert result.returncode == 0, result.stderr
    assert "2 left out" in result.stdout
    for name in ("tiny.png", "broken.png"):
        assert f"left out: {tmp_path / name}: " in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.dicm"]
    assert_refused(
        dicm("encode", tmp_path / "tiny.png", "-o", tmp_path, "--codec", exported_codec), "tiny.png", "8 x 8"
    )


def test_encode__images_that_all_fail_are_each_named(exported_codec: Path, tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture())[:-300])
    (tmp_path / "b.png").write_bytes(encoded(picture(), "PNG")[:-300])
    (tmp_path / "c.png").symlink_to("nowhere")
    said = dicm("encode", tmp_path, "-o", tmp_path / "out", "--codec", exported_codec)
    assert_refused(said, "none of 3 files", "a.jpg: not an image", "b.png: not an image", "c.png: cannot be read")
    assert not (tmp_path / "out").exists()


def test_encode__images_of_every_format_are_what_other_commands_see(
    exported_codec: Path, codec: FeatureCodec, tmp_path: Path
):
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = cv2.imencode(".png", np.asarray(picture(seed=3)).astype(np.uint16) * 256 + 200)[1].tobytes()
    files = {
        b"a.webp": encoded(picture(), "WEBP", exif=turned, lossless=True),
        b"b.jfif": encoded(picture(), exif=turned),
        b"caf\xe9.png": deep,  # a name that is not UTF-8
    }
    for name, data in files.items():
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(data)
    (tmp_path / "anim.png").write_bytes(ANIMATED_PNG)
    (tmp_path / "bomb.png").write_bytes(BOMB)
    (tmp_path / "scan.TIF").write_bytes(encoded(picture(), "TIFF"))
    result = dicm("encode", tmp_path, "-o", tmp_path / "out", "--codec", exported_codec)
    assert result.returncode == 0, result.stderr
    assert "anim.png: not an image that can be decoded" in result.stdout
    assert "scan.TIF: .TIF is not read; convert it" in result.stdout and "3 left out" in result.stdout
    assert "bomb.png: an image of more than 178956970 pixels" in result.stdout
    written = {os.fsencode(path.stem): path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {
        name.partition(b".")[0]: codec.encode(torch.from_numpy(decode(data)).permute(2, 0, 1))
        for name, data in files.items()
    }


def test_encode__a_folder_that_cannot_be_listed_is_named(tmp_path: Path, unreadable: Callable[[Path], None]):
    write_noise(tmp_path / "a.png", 32, 32)
    (tmp_path / "closed").mkdir()
    unreadable(tmp_path / "closed")
    said = dicm("encode", tmp_path, "-o", tmp_path / "out", "--codec", "none")
    assert_refused(said, f"{tmp_path / 'closed'}: cannot be read (Permission denied)", "check its permissions")


def test_encode__channels_of_a_file_with_a_byte_order_mark(exported_codec: Path, tmp_path: Path):
    (tmp_path / "channels.json").write_text("[1, 5]", "utf-8-sig")
    assert read_channels(tmp_path / "channels.json") == [1, 5]


def test_encode__channels_of_a_file(codec: FeatureCodec, exported_codec: Path, tmp_path: Path):
    write_noise(tmp_path / "a.png", 64, 96)
    (tmp_path / "channels.json").write_text('{"channels": [5, 1], "counts": [1, 2]}')
    options = ["-o", tmp_path, "--codec", exported_codec, "--channels", tmp_path / "channels.json"]
    result = dicm("encode", tmp_path / "a.png", *options)
    assert result.returncode == 0, result.stderr
    stream = (tmp_path / "a.dicm").read_bytes()
    assert stream == codec.encode(read_image(tmp_path / "a.png"), channels=[1, 5])
    # The sizes of both layers are told; the base alone is the beginning of the same stream, but for its layer table.
    base = codec.encode(read_image(tmp_path / "a.png"), channels=[1, 5], rest=False)
    total = codec.describe(stream).base_bytes
    assert f"base {total} bytes, rest {len(stream) - total}" in result.stdout
    alone = dicm("encode", tmp_path / "a.png", *options, "--layers", "base")
    assert alone.returncode == 0 and "rest" not in alone.stdout, alone.stderr
    assert (tmp_path / "a.dicm").read_bytes() == base
    assert_refused(dicm("encode", tmp_path / "a.png", *options[:4], "--layers", "base"), "--layers=base", "--channels")
    assert_refused(dicm("encode", tmp_path / "a.png", *options, "--layers", "top"), "--layers=top", "base, rest")
    (tmp_path / "channels.json").write_text("[500]")
    assert_refused(dicm("encode", tmp_path / "a.png", *options), "a.png", "500", "0..15")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"channels": ["a"]}', "[1, 1]", "[-1]", "[true]"])
def test_encode__a_file_without_channels(content: str, tmp_path: Path):
    (tmp_path / "channels.json").write_text(content)
    result = dicm("encode", tmp_path, "-o", tmp_path / "out", "--channels", tmp_path / "channels.json")
    assert_refused(result, "channels.json", "channels")


@pytest.mark.parametrize(
    ("option", "value"), [("--rate", "1.5"), ("--rate", "-0.1"), ("--rate", "nan"), ("--max-bytes", "0")]
)
def test_encode__limits_out_of_range(option: str, value: str, tmp_path: Path):
    write_noise(tmp_path / "a.png", 32, 32)
    assert_refused(dicm("encode", tmp_path, "-o", tmp_path / "out", option, value), option, value, "choose")


def test_encode__out_is_refused_before_work_is_done(tmp_path: Path):
    write_noise(tmp_path / "a.png", 32, 32)
    (tmp_path / "out").write_text("a file")
    for out in (tmp_path / "out", tmp_path / "out" / "streams"):
        assert_refused(dicm("encode", tmp_path, "-o", out, "--codec", "none"), str(out), "is a file", "another folder")


def test_encode__two_images_for_one_stream(tmp_path: Path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_noise(tmp_path / folder / "a.png", 32, 32)
    assert_refused(
        dicm("encode", tmp_path, "-o", tmp_path / "out"), "x/a.png", "y/a.png", "a.dicm", "two output folders"
    )


def test_decode__folder_formats(codec: FeatureCodec, exported_codec: Path, streams: Path, tmp_path: Path):
    for options in ([], ["--format", "safetensors"], ["--format", "png"]):
        result = dicm("decode", streams, "-o", tmp_path, "--codec", exported_codec, *options)
        assert result.returncode == 0, result.stderr
    suffixes = (".npy", ".png", ".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name + suffix for name in SIZES for suffix in suffixes]
    for name, (height, width) in SIZES.items():
        f3 = codec.decode((streams / f"{name}.dicm").read_bytes())[0]
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), f3.numpy())
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("f3"), f3)
            facts = {"height": str(height), "width": str(width), "fingerprint": codec.fingerprint.hex()}
            assert file.metadata() == facts
        picture = decode_image(str(tmp_path / f"{name}.png"), ImageReadMode.RGB)
        assert torch.equal(picture, feature_picture(f3)[:, :height, :width])
        assert picture.shape == (3, height, width)


@pytest.mark.parametrize("name", ["f.npy", "new/f.safetensors", "f.PNG"])
def test_decode__one_stream_to_a_file(name: str, exported_codec: Path, streams: Path, tmp_path: Path):
    result = dicm("decode", streams / "a.dicm", "-o", tmp_path / name, "--codec", exported_codec)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / name).is_file()
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_decode__up_to_a_layer(exported_codec: Path, streams: Path, tmp_path: Path, codec: FeatureCodec):
    out = tmp_path / "f.npy"
    result = dicm("decode", streams / "a.dicm", "-o", out, "--codec", exported_codec, "--layers", "base")
    assert result.returncode == 0, result.stderr
    base = codec.decode((streams / "a.dicm").read_bytes(), "base")[0]
    assert np.array_equal(np.load(out), base.numpy())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{streams}", "-o", "{out}/f.png"], ["f.png", "2 streams", "--format png"]),
        (["{streams}", "-o", "{out}/f.jpg"], ["f.jpg", ".npy", ".safetensors", ".png"]),
        (["{streams}", "-o", "{out}", "--format", "jpg"], ["--format=jpg", "safetensors"]),
        (["{streams}/a.dicm", "-o", "{out}/f.npy", "--format", "png"], ["--format=png", "f.npy"]),
        (["{streams}", "-o", "{out}", "--layers", "top"], ["--layers=top", "base"]),
        (["{streams}/a.dicm", "-o", "{streams}/a.dicm/f.npy"], ["a.dicm is a file", "another folder"]),
        (["{out}", "-o", "{out}"], ["{out}", ".dicm"]),
        (["{out}/none.dicm", "-o", "{out}"], ["none.dicm", "no such file"]),
        (["{streams}", "-o", "/proc"], ["/proc", "cannot be written"]),
    ],
)
def test_decode__refused(
    arguments: list[str], words: list[str], streams: Path, exported_codec: Path, tmp_path: Path
):  # fmt: skip
    filled = [argument.format(streams=streams, out=tmp_path) for argument in arguments]
    result = dicm("decode", *filled, "--codec", exported_codec)
    assert_refused(result, *(word.format(streams=streams, out=tmp_path) for word in words))
    assert not list(tmp_path.iterdir())


def test_decode__damaged_stream_is_named(exported_codec: Path, streams: Path, tmp_path: Path):
    stream = (streams / "a.dicm").read_bytes()
    (tmp_path / "flipped.dicm").write_bytes(stream[:-1] + bytes([stream[-1] ^ 1]))
    result = dicm("decode", tmp_path, "-o", tmp_path / "f.npy", "--codec", exported_codec)
    assert_refused(result, "flipped.dicm", "damaged")
    assert not (tmp_path / "f.npy").exists()


def test_feature_picture__does_not_depend_on_order_or_mean_of_channels():
    features = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(6, 1, 1)
    picture = feature_picture(features)
    assert picture.shape == (3, 20, 28) and picture.dtype == torch.uint8
    assert torch.equal(picture, feature_picture(features.flip(0) + 3))
    assert all(channel.min() == 0 and channel.max() == 255 for channel in picture)


def test_feature_picture__strongest_direction_is_red():
    ramp = torch.linspace(0, 1, 400).view(1, 20, 20)
    features = torch.cat([ramp, -2 * ramp, 0.3 * ramp, 0.7 * ramp])
    red, green, blue = feature_picture(features, scale=1)
    assert red.view(-1)[:4].eq(255).all() and red.view(-1)[-4:].eq(0).all()
    assert not green.any() and not blue.any()


@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 1, 1), (8, 4, 4)])
def test_feature_picture__of_few_channels_or_constant_features(shape: tuple[int, int, int]):
    assert not feature_picture(torch.full(shape, 0.1)).any()
    assert feature_picture(torch.ones(shape)).shape == (3, 4 * shape[1], 4 * shape[2])


def test_encode__in_tiles_and_in_bfloat16(exported_codec: Path, codec: FeatureCodec, tmp_path: Path):
    image = write_noise(tmp_path / "large.png", 150, 200)
    options = ("--tile", 64, "--precision", "bf16", "--codec", exported_codec)
    result = dicm("encode", tmp_path / "large.png", "-o", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    rough = FeatureCodec.from_pretrained(exported_codec, "bf16")
    stream = (tmp_path / "large.dicm").read_bytes()
    assert stream == rough.encode(image, tile=64) != codec.encode(image)
    result = dicm("decode", tmp_path / "large.dicm", "-o", tmp_path / "f3.npy", *options)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(np.load(tmp_path / "f3.npy"), rough.decode(stream, tile=64)[0])


@pytest.mark.parametrize(("option", "value"), [("--tile", "100"), ("--tile", "0"), ("--precision", "fp16")])
@pytest.mark.parametrize("command", ["encode", "decode"])
def test_commands__refuse_impossible_options(
    exported_codec: Path, streams: Path, tmp_path: Path, command: str, option: str, value: str
):
    write_noise(tmp_path / "a.png", 32, 32)
    source = tmp_path / "a.png" if command == "encode" else streams / "a.dicm"
    said = dicm(command, source, "-o", tmp_path / "out", "--codec", exported_codec, option, value)
    assert_refused(said, f"{option}={value}", "choose")


def test_encode__a_reader_that_dies_names_its_image(
    exported_codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a", "b", "c"):
        write_noise(tmp_path / f"{name}.png", 16, 32)
    monkeypatch.setattr("pretrain.coding.try_decode", die_on_b)
    said = dicm("encode", tmp_path, "-o", tmp_path / "out", "--codec", exported_codec)
    assert_refused(said, f"ended from outside while it read {tmp_path / 'b.png'}", "without that file")


def die_on_b(path: Path) -> object:
    """A decoder that ends its process on b.png."""
    take(str(path))
    if path.name == "b.png":
        os.kill(os.getpid(), signal.SIGSEGV)
    return try_decode(path)
