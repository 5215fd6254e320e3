"""CompressAI's image models: by name and quality, with random weights, the zoo's, or those of a file.

One set of weights of a -vbr model serves all qualities: quality 1..8 is CompressAI's level `s` 0..7, the index of its
gain.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from compressai.models.vbr import ScaleHyperpriorVbr
from compressai.registry import MODELS as REGISTRY
from compressai.zoo import image_models, load_state_dict
from safetensors.torch import load_file

from downstream.errors import TaskError

# Those that CompressAI implements but has no weights for: they are trained here, or elsewhere.
UNTRAINED = ("cheng2020-anchor-checkerboard", "elic2022-official", "elic2022-chandelier")
MODELS = (*image_models, *UNTRAINED)
# Weights of 255^2 * MSE that the zoo's models were trained with, by quality (CompressAI, "Training").
LAMBDAS = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800}
QUALITY = 4  # where none is named
TABLES = ("_quantized_cdf", "_cdf_length", "_offset")


def most_quality(name: str) -> int:
    """The best quality that a model of the zoo has weights for."""
    return 6 if name.startswith("cheng2020") else 8


def new_model(name: str, quality: int) -> Any:
    """A model with random weights, of the width that the zoo has at this quality."""
    return REGISTRY[name]() if name in UNTRAINED else image_models[name](quality=quality)


def level_of(model: Any, quality: int) -> dict[str, int]:
    """What `forward`, `compress` and `decompress` of a model with a range of rates are told; nothing of others."""
    return {"s": quality - 1} if isinstance(model, ScaleHyperpriorVbr) else {}


def load_model(name: str, quality: int = QUALITY, weights: str = "zoo", metric: str = "mse") -> Any:
    """A model of CompressAI's zoo, frozen, in eval mode.

    Args:
        name: of the zoo, for example bmshj2018-hyperprior.
        quality: 1..8 (1..6 for cheng2020), of the zoo's weights; `create_latents` is told it, too.
        weights: `zoo` downloads them; else a file, .safetensors or a checkpoint with a state dict.
        metric: mse or ms-ssim, of the zoo's weights.

    Raises:
        TaskError: no such model, quality or file; weights that could not be fetched or are of another model.
    """
    if name not in MODELS:
        raise TaskError(f"latents={name} is unknown; use codec or one of {', '.join(MODELS)}")
    if name in UNTRAINED and weights == "zoo":
        raise TaskError(f"{name}: the zoo has no weights of it; train some with `dicm anchors train`, name the file")
    if name.endswith("-vbr") and not 1 <= quality <= most_quality(name):
        raise TaskError(f"{name}, quality {quality}: it has no such rate; use 1..{most_quality(name)}")
    try:
        if weights == "zoo":
            model = image_models[name](quality=quality, metric=metric, pretrained=True, progress=False)
        else:
            model = _from_file(name, Path(weights))
    except ValueError as error:
        raise TaskError(f"{name}, quality {quality}, metric {metric}: {error}") from error
    except OSError as error:  # what urllib raises, too
        raise TaskError(
            f"weights of {name}, {weights}, could not be read ({error}); connect, or name a file that you fetched"
        ) from error
    return model.eval().requires_grad_(False)


def _from_file(name: str, path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = load_state_dict(state.get("state_dict", state))
        architecture = type(new_model(name, 1))
        options = {}
        if any(key.startswith("gayn2zqstep.") for key in state):  # the zoo's: z has a step for each rate
            options = {"vr_entbttlnck": True}
            # CompressAI loads no tables into such a bottleneck; they are made anew for the rate.
            state |= {f"entropy_bottleneck.{table}": torch.IntTensor() for table in TABLES}
        return architecture.from_state_dict(state, **options)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises many classes on what is no checkpoint
        raise TaskError(f"{path}: not weights of {name} ({checkpoint_fault(error)}); name another file") from error


def checkpoint_fault(error: Exception) -> str:
    """Why a file is not the checkpoint that was wanted, in a few words; torch would give advice besides."""
    if isinstance(error, pickle.UnpicklingError | EOFError | UnicodeDecodeError):
        return "no checkpoint of plain tensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)][:120]
