from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from downstream.compressai_models import new_model
from downstream.errors import TaskError
from downstream.evaluation.anchors import check_anchor, create_anchor, through

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3)).astype(np.uint8).repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize(
    ("name", "qualities"),
    [
        ("jpeg", (5, 50, 95)),
        ("webp", (5, 50, 95)),
        ("avif", (5, 50, 95)),
        ("hevc", (50, 35, 20)),
        ("hevc444", (50, 35, 20)),
    ],
)
def test_through__higher_quality_costs_more_and_is_nearer(name: str, qualities: tuple[int, ...]):
    errors, sizes = [], []
    for quality in qualities:
        decoded, size, payload = through(create_anchor(f"{name}:{quality}"), IMAGES)
        assert (payload < size).all() and (payload >= 0).all()
        assert decoded.shape == IMAGES.shape
        errors.append(np.abs(decoded.astype(float) - IMAGES).mean())
        sizes.append(size.sum())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_payload_bytes__are_what_a_flat_colour_does_not_have():
    anchor = create_anchor("jpeg:1")
    flat = np.full((48, 80, 3), 128, np.uint8)
    _, sizes, payloads = through(anchor, np.stack([flat, IMAGES[0]]))
    assert payloads[0] == 0 and payloads[1] == sizes[1] - sizes[0]


@pytest.mark.parametrize("shape", [(17, 23), (64, 64), (130, 16)])
@pytest.mark.parametrize("name", ["hevc:20", "hevc444:20", "hevc:20@0.5", "jpeg:90@0.5", "webp:50@0.3"])
def test_decode__gives_images_of_any_size_back(name: str, shape: tuple[int, int]):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([rows * 255 // shape[0], columns * 255 // shape[1], rows * 0 + 90], -1).astype(np.uint8)
    anchor = create_anchor(name)
    decoded = anchor.decode(anchor.encode(image))
    assert decoded.shape == image.shape and np.abs(decoded.astype(float) - image).mean() < 12


def test_hevc__of_420_is_of_the_picture_s_colours():
    """Matrix and range of the way there are those of the way back."""
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 200, 90)):
        image = np.full((32, 48, 3), colour, np.uint8)
        anchor = create_anchor("hevc:10")
        assert np.abs(anchor.decode(anchor.encode(image)).astype(int) - image).max() <= 3


def test_shrunk__costs_less_than_the_same_quality_at_full_size():
    _, sizes, payloads = through(create_anchor("hevc:30"), IMAGES)
    _, shrunk, shrunk_payloads = through(create_anchor("hevc:30@0.5"), IMAGES)
    assert (shrunk < sizes).all() and (shrunk_payloads < payloads).all() and (shrunk_payloads > 0).all()


def test_hevc__what_is_no_stream_is_named():
    with pytest.raises(TaskError, match="hevc picture"):
        create_anchor("hevc:30").decode(b"\x08\0\x08\0" + b"no picture" * 9)


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018", "cheng2020-anchor-checkerboard"])
def test_through__a_model_gives_what_it_decodes_itself(name: str, tmp_path: Path):
    """One that is sent channel by channel, and one with a context model, which is sent whole."""
    torch.manual_seed(0)
    model = new_model(name, 1).eval()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    anchor = create_anchor(f"{name}:1", str(tmp_path / "w.safetensors"))
    decoded, sizes, payloads = through(anchor, IMAGES)
    assert decoded.shape == IMAGES.shape and (sizes - payloads <= 32).all() and (payloads > 0).all()
    model.update()
    padded = F.pad(torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2).float() / 255, (0, 48, 0, 16), mode="reflect")
    coded = model.compress(padded)
    theirs = model.decompress(coded["strings"], coded["shape"])["x_hat"][0, :, :48, :80]
    assert np.abs(theirs.clamp(0, 1).mul(255).permute(1, 2, 0).detach().numpy() - decoded[0].astype(float)).max() <= 1
    with pytest.raises(TaskError, match=r"weights of .*none.pt"):
        create_anchor(f"{name}:1", str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    "text",
    [
        "gif:3",
        "jpeg",
        "jpeg:101",
        "jpeg:x",
        "mbt2018:9",
        "jpeg:²",
        "cheng2020-attn:7",
        "mbt2018:0",
        "mbt2018",
        "hevc:52",
        "jpeg:30@2",
        "jpeg:30@",
        "hevc:30@x",
        "elic2022-official:0",
    ],
)
def test_check_anchor__bad_anchors_are_named(text: str):
    with pytest.raises(TaskError, match=text):
        check_anchor(text)


@pytest.mark.parametrize(("name", "program"), [("bpg", "bpgenc"), ("vvc", "vvencapp"), ("vtm", "EncoderAppStatic")])
def test_check_anchor__a_program_that_is_missing_is_named(name: str, program: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TaskError, match=f"{name} needs {program}"):
        check_anchor(f"{name}:30")


def test_bpg__is_run_as_its_documentation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins that take bpgenc's and bpgdec's options and no others, and keep the picture as it is."""
    programs = {
        "bpgenc": "parser.add_argument('-q', type=int, choices=range(52), required=True)\n"
        "parser.add_argument('-f', choices=['420', '422', '444'], required=True)\n",
        "bpgdec": "",
    }
    for name, options in programs.items():
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\nimport argparse, shutil\nparser = argparse.ArgumentParser()\n{options}"
            "parser.add_argument('-o', required=True)\nparser.add_argument('source')\n"
            "given = parser.parse_args()\nshutil.copy(given.source, given.o)\n"
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("bpg:37", "bpg444:37"):
        decoded, sizes, payloads = through(create_anchor(name), IMAGES)
        assert np.array_equal(decoded, IMAGES) and (payloads < sizes).all()
    (tmp_path / "bpgdec").write_text(f"#!{sys.executable}\nraise SystemExit('Could not decode image')\n")
    with pytest.raises(TaskError, match="Could not decode image"):
        through(create_anchor("bpg:37"), IMAGES)
