"""RUN/results.json: what a complete run measured, and how its table reads.

{"task", "codec", "data", "input", "anchor", ..., "metrics": {"map": "mAP", ...}, "map": 0.41, ...,
 "bpp", "bpp_payload", "images", "left_out": {"train: box without area in the image": 3}, "seconds"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from downstream.errors import TaskError
from downstream.files import write_file

RESULTS = "results.json"
CLASSIFICATION = {"top1": "top-1", "top5": "top-5"}  # of results that were written before there was another task


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write RUN/results.json, whole or not at all (TaskError where the disk refuses)."""
    write_file(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a run (TaskError where it has none)."""
    if not (folder / RESULTS).is_file():
        raise TaskError(f"{folder}: no {RESULTS}; finish it with `dicm finetune`")
    try:
        return dict(json.loads((folder / RESULTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(
            f"{folder / RESULTS}: cannot be read ({error}); remove it, `dicm finetune` writes it again"
        ) from error


def metric_titles(results: dict[str, Any]) -> dict[str, str]:
    """Keys of the metrics, the headline first, with their titles."""
    return results.get("metrics", CLASSIFICATION)


def table(results: dict[str, Any]) -> dict[str, str]:
    """Title and value of every figure of a run, as tables show them."""
    figures = {title: percent(results[key]) for key, title in metric_titles(results).items()}
    for key, title in results.get("numbers", {}).items():
        if results.get(key) is not None:
            figures[title] = f"{results[key]:.4g}"
    rates = {"bpp, whole files": f"{results['bpp']:.4f}", "bpp, payload": f"{results['bpp_payload']:.4f}"}
    return {**figures, **rates, "images": str(results["images"])}


def percent(share: float | None) -> str:
    """A share of 0..1 in per cent; a dash where there was nothing to measure."""
    return "-" if share is None else f"{100 * share:.1f} %"
