"""From a run folder to a frozen codec that others load: `model.safetensors`, `config.json`, README.md.

On request also the networks as graphs, `*.onnx` (`graphs.py`). Only tensors, graphs and JSON leave a run; nothing in
an exported folder can execute code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.checkpoint import open_checkpoints
from cluster.errors import CheckpointError
from cluster.metrics import METRICS, read_rows
from cluster.recipes import load_saved
from data_pipeline.manifest import Manifest
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import PretrainConfig
from pretrain.errors import CodecError
from pretrain.graphs import ONNX_FILES, OPSET, check_graphs, export_onnx, require_onnx


def load_run(run: Path) -> tuple[FeatureCodec, PretrainConfig, int]:
    """The codec of the newest complete checkpoint of `run` in eval mode, the run's options, and the step.

    Raises:
        CheckpointError: `run` is not a run folder or has no complete checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: not a run folder (no config.yaml); name one that `dicm pretrain` wrote")
    config = load_saved(PretrainConfig, run / "config.yaml")
    store = open_checkpoints(config, run)
    step = store.newest()
    if step is None:
        raise CheckpointError(f"{run}: no complete checkpoint yet; run `dicm pretrain` until it writes one")
    codec = FeatureCodec(config.codec)
    codec.load_state_dict(store.load(step)["codec"])
    return codec.eval().requires_grad_(False), config, step


def export(run: Path | str, out: Path | str, onnx: bool = False) -> Path:
    """Write the frozen codec of `run` to the folder `out`, replacing an earlier export there; returns `out`.

    Args:
        onnx: write the three graphs of `graphs.export_onnx` too.

    Raises:
        CheckpointError: `run` has nothing to export.
        CodecError: `out` holds files that are not an exported codec, or packages for ONNX are missing.
    """
    run, out = Path(run), Path(out)
    if onnx:
        require_onnx()
    allowed = {"model.safetensors", "config.json", "README.md", *ONNX_FILES}
    if out.is_file() or (out.is_dir() and (foreign := {path.name for path in out.iterdir()} - allowed)):
        what = "is a file" if out.is_file() else f"holds {sorted(foreign)[0]}, which is not part of a codec"
        raise CodecError(f"{out} {what}; name a new folder")
    codec, config, step = load_run(run)
    if onnx:
        check_graphs(config.codec)
    facts = training_facts(run, config, step)
    for name in ONNX_FILES:  # an earlier export's graphs are another codec's
        (out / name).unlink(missing_ok=True)
    codec.save_pretrained(out, extra=facts)
    if onnx:
        export_onnx(codec, out)
    (out / "README.md").write_text(model_card(out.name, config, facts) + (graphs_card() if onnx else ""))
    return out


def training_facts(run: Path, config: PretrainConfig, step: int) -> dict[str, Any]:
    """What the codec was trained on and what was measured of it; goes into config.json and the README."""
    manifest = Manifest.load(config.data)
    facts: dict[str, Any] = {
        "dataset": manifest.name,
        "dataset_hash": manifest.hash,
        "training_images": manifest.split(config.split).num_samples,
        "image_size": config.image_size,
        "canvas_size": config.canvas_size,
        "step": step,
        "stages": [{"name": stage.name, "epochs": stage.epochs} for stage in config.stages],
    }
    summary = run / "summary.json"
    if summary.is_file() and (streams := json.loads(summary.read_text()).get("streams")):
        facts["streams"] = streams
    if knn := last_knn(run):
        facts["knn"] = knn
    return facts


def last_knn(run: Path) -> float | None:
    """The last kNN accuracy in the run's metrics, or None."""
    return next((row["knn"] for row in reversed(read_rows(run / METRICS)) if "knn" in row), None)


def model_card(name: str, config: PretrainConfig, facts: dict[str, Any]) -> str:
    """The README of an exported codec, in Markdown."""
    stages = ", ".join(f"{stage['name']} ({stage['epochs']:g} epochs)" for stage in facts["stages"])
    measured = ["| measured | value |", "|---|---|"]
    if streams := facts.get("streams"):
        measured.append(
            f"| real streams, {streams['images']} {streams['split']} images of {streams['image_size']} px "
            f"| {streams['bpp']:.4f} bpp ({streams['bytes']:.0f} bytes an image) |"
        )
        for rate, bpp in streams.get("bpp_at_rate", {}).items():
            measured.append(f"| real streams at rate={rate} | {bpp:.4f} bpp |")
    if knn := facts.get("knn"):
        measured.append(f"| kNN accuracy of the frozen features | {100 * knn:.1f} % |")
    return f"""# {name}

A frozen DICM feature codec: an image becomes a small bitstream, and vision tasks read the features
f3 (N, {"C"}, H/4, W/4) from it without rebuilding pixels.

- backbone: {config.codec.backbone}, method: {config.ssl.method}, heatmap: {config.ssl.heatmap.method}
- trained without labels on {facts["training_images"]} images of {facts["dataset"]} at {facts["image_size"]} px
- stages: {stages}; step {facts["step"]}

{chr(10).join(measured) if len(measured) > 2 else "Nothing was measured: the run is not complete."}

```python
from pretrain.codec import FeatureCodec

codec = FeatureCodec.from_pretrained("{name}")
stream = codec.encode(image)  # (3, H, W) uint8 -> bytes
f3 = codec.decode(stream)  # (1, C, ceil(H/4), ceil(W/4)) float32
```
""".replace('{"C"}', "C")


def graphs_card() -> str:
    """The README's part on ONNX files, in Markdown."""
    return f"""
ONNX, opset {OPSET}, any batch and size (H and W multiples of 64):

| file | input | outputs |
|---|---|---|
| encoder.onnx | images (N, 3, H, W) float32, normalised | y2 (H/16), z (H/64) |
| hyper_decoder.onnx | z_hat (H/64) float64 | means, scales of y2 (H/16) float64 |
| decoder.onnx | y2_hat (H/16) float32 | f3 (N, C, H/4, W/4) |

The loop around them, with padding, rounding and coding, is `docs/onnx_codec.py` of the dicm repository.
"""
