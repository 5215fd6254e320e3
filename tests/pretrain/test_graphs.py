from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY, Result, assert_refused, dicm, small_run
from small_codecs import wake
from torch.export import ExportedProgram

from cluster.checkpoint import CheckpointStore
from cluster.recipes import save_config
from pretrain import graphs
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import PretrainConfig
from pretrain.errors import CodecError

# Of an image: below one window and no multiple of 64, just above one window a side, and windowed with padding.
SIZES = [(40, 70), (256, 272), (320, 384)]


@pytest.fixture(scope="module")
def config(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """Of a run whose codec has one block of each kind, two layers and a range of rates."""
    options = ["codec.re_depths=[1,0,0]", "codec.rgc_orders=[0,0,2]", "codec.base_channels=4", "codec.rate_points=2",
               "stages.codec.rates=[4,1]", "codec.guard=1e-4"]  # fmt: skip
    return small_run(scenes, tmp_path_factory.mktemp("graphs") / "run", *options)


@pytest.fixture(scope="module")
def codec(config: PretrainConfig) -> FeatureCodec:
    """Its codec, every block of which counts."""
    torch.manual_seed(0)
    codec = wake(FeatureCodec(config.codec).eval().requires_grad_(False))
    for name, parameter in codec.named_parameters():
        if "gamma" in name:
            parameter.fill_(0.5)
        elif "positions" in name:
            parameter.normal_()
        elif name.endswith("filter.weight") and parameter.shape[-1] == 2:
            parameter.normal_(std=0.5)
    # Symbols that are not all zero.
    codec.g_a[-1].weight.mul_(4)
    codec.h_a[-1].weight.mul_(8)
    codec.update()
    return codec


@dataclass
class Exported:
    """What `dicm export RUN FOLDER --onnx` left, what it said, and the programs that it wrote as ONNX."""

    run: Path
    folder: Path
    result: Result
    programs: dict[str, ExportedProgram]


@pytest.fixture(scope="module")
def exported(config: PretrainConfig, codec: FeatureCodec) -> Exported:
    run, programs, export_programs = Path(config.run), {}, graphs.export_programs
    CheckpointStore(run / "checkpoints").save(1, {"codec": codec.state_dict()})
    save_config(config, run / "config.yaml")

    def kept(codec: FeatureCodec) -> dict[str, ExportedProgram]:
        programs.update(export_programs(codec))
        return programs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "export_programs", kept)
        patch.setattr(logging.root.manager, "disable", logging.DEBUG)  # torch would write down each step of its trace
        result = dicm("export", run, run.parent / "codec", "--onnx")
    return Exported(run, run.parent / "codec", result, programs)


@pytest.fixture(scope="module")
def folder(exported: Exported) -> Path:
    assert exported.result.returncode == 0, exported.result.stderr
    return exported.folder


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    """docs/onnx_codec.py"""
    spec = importlib.util.spec_from_file_location("onnx_codec", REPOSITORY / "docs" / "onnx_codec.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


def networks(codec: FeatureCodec, height: int, width: int):
    """Inputs of the three graphs, height and width multiples of 64, and what torch's modules make of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height, width, generator=generator)
    z_hat = 4 * torch.randn(2, 8, height // 64, width // 64, generator=generator, dtype=torch.float64)
    y2_hat = torch.randn(2, 16, height // 16, width // 16, generator=generator)
    with torch.no_grad():
        return {
            "encoder": (images, codec.analyse(images)),
            "hyper_decoder": (z_hat, copy.deepcopy(codec.h_s).double()(z_hat)),
            "decoder": (y2_hat, (codec.g_s(y2_hat),)),
        }


def assert_near(name: str, found, expected) -> None:
    tolerance = 1e-12 if name == "hyper_decoder" else 1e-4
    for one, other in zip(found, expected, strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        # y1 between two symbols may round to either: then a patch of y2 differs, and no more.
        near = ((one - other).abs() <= tolerance * other.std()).double().mean()
        assert near == 1 if name != "encoder" else near > 0.9


def test_export_onnx__graphs_equal_torch_at_any_size(codec: FeatureCodec, folder: Path, loop: ModuleType):
    sessions = loop.OnnxCodec(folder, threads=1)
    for size in [(64, 64), (128, 320), (320, 384)]:
        for name, (given, expected) in networks(codec, *size).items():
            session = getattr(sessions, name)
            found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
            assert_near(name, found, expected)


def test_export_programs__equal_torch_at_any_size(codec: FeatureCodec, exported: Exported):
    programs = {name: program.module() for name, program in exported.programs.items()}
    for size in [(64, 64), (320, 384)]:
        for name, (given, expected) in networks(codec, *size).items():
            found = programs[name](given)
            assert_near(name, found if isinstance(found, tuple) else (found,), expected)


def test_encoder_graph__without_redundancy_elimination(codec: FeatureCodec):
    torch.manual_seed(0)
    plain = FeatureCodec(dataclasses.replace(codec.config, redundancy=False)).eval().requires_grad_(False)
    given, expected = networks(plain, 128, 192)["encoder"]
    assert_near("encoder", graphs.EncoderGraph(plain)(given), expected)


@pytest.mark.parametrize("size", SIZES)
def test_onnx_codec__streams_are_exchanged_both_ways(codec, folder, loop, size: tuple[int, int]):
    ours, image = loop.OnnxCodec(folder, threads=1), picture(*size)
    for stream in (ours.encode(image.numpy(), rate=0.4), codec.encode(image, rate=0.4), codec.encode(image)):
        latents = codec.decode_latents([stream])
        assert latents.unique().numel() > 100
        np.testing.assert_allclose(ours.decode_latents(stream), latents.numpy(), atol=1e-6)
        f3 = codec.decode(stream).numpy()
        np.testing.assert_allclose(ours.decode(stream), f3, atol=1e-4 * f3.std())


def test_onnx_codec__files_from_the_command_line(folder: Path, loop: ModuleType, codec: FeatureCodec, tmp_path: Path):
    from PIL import Image

    image = picture(33, 64)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    loop.main("encode", str(folder), str(tmp_path / "a.png"), str(tmp_path / "a.dicm"))
    loop.main("decode", str(folder), str(tmp_path / "a.dicm"), str(tmp_path / "a.npy"))
    assert np.load(tmp_path / "a.npy").shape == codec.decode((tmp_path / "a.dicm").read_bytes()).shape


def test_onnx_codec__graph_of_another_codec(folder: Path, loop: ModuleType, tmp_path: Path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "fingerprint": "00" * 8}))
    with pytest.raises(CodecError, match=r"encoder\.onnx is the graph of another codec"):
        loop.OnnxCodec(tmp_path)


def test_export_onnx__files_are_whole_and_name_no_path_of_this_machine(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", *graphs.ONNX_FILES}
    for name in graphs.ONNX_FILES:
        model = onnx.load(folder / name, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == graphs.OPSET
        assert str(REPOSITORY).encode() not in model.SerializeToString()


def test_export__onnx_is_stated_with_its_opset_and_goes_with_the_next_export(exported: Exported, tmp_path: Path):
    assert f"opset {graphs.OPSET}" in exported.result.stdout
    folder = shutil.copytree(exported.folder, tmp_path / "codec")
    assert f"opset {graphs.OPSET}" in (folder / "README.md").read_text()
    again = dicm("export", exported.run, folder)
    assert again.returncode == 0 and not list(folder.glob("*.onnx"))
    assert "opset" not in (folder / "README.md").read_text()


def test_export__onnx_packages_missing_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "REQUIRED", ("onnx", "no_such_package"))
    result = dicm("export", tmp_path / "run", tmp_path / "codec", "--onnx")
    assert_refused(result, "no_such_package", "pip install 'dicm[export]'")
    assert not (tmp_path / "codec").exists()


def test_precise_erf__to_the_last_digits():
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    assert (graphs.precise_erf(x) - torch.erf(x)).abs().max() < 1e-15
