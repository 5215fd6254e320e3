"""Codecs that are programs of their own, where they are on PATH: BPG, VVC by vvenc, VVC by the VTM.

    bpg   bpgenc, bpgdec                        quality is -q; files are .bpg
    vvc   vvencapp                              quality is --qp; preset slower, one intra picture
    vtm   EncoderAppStatic                      quality is -q; encoder_intra_vtm.cfg, in the folder that VTM_CFG names

VVC streams are read by FFmpeg's own decoder, through PyAV.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from downstream.errors import TaskError
from downstream.evaluation import hevc

PROGRAMS = {
    "bpg": ("bpgenc", "bpgdec"),
    "bpg444": ("bpgenc", "bpgdec"),
    "vvc": ("vvencapp",),
    "vtm": ("EncoderAppStatic",),
}
VTM_CONFIG, VTM_FOLDER = "encoder_intra_vtm.cfg", "VTM_CFG"
PRESET = "slower"
MOST_QP = {"bpg": 51, "bpg444": 51, "vvc": 63, "vtm": 63}
SECONDS = 600  # that a program may take for a picture


def need(name: str) -> None:
    """See that a codec's programs are there (TaskError)."""
    missing = [program for program in PROGRAMS[name] if shutil.which(program) is None]
    if missing:
        raise TaskError(f"anchor {name} needs {' and '.join(missing)} on PATH; install it, or leave this anchor out")
    if name == "vtm" and not (Path(os.environ.get(VTM_FOLDER, ".")) / VTM_CONFIG).is_file():
        raise TaskError(
            f"anchor vtm needs {VTM_CONFIG}; set {VTM_FOLDER} to the folder of it, cfg/ of the VTM's sources"
        )
    if name in ("vvc", "vtm"):
        hevc.need_av()


def encode(name: str, image: np.ndarray, quality: int) -> bytes:
    """File of an image (H, W, 3) uint8 RGB (TaskError where the program fails)."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in", Path(scratch) / "out"
        if name in ("bpg", "bpg444"):
            chroma = "444" if name == "bpg444" else "420"
            Image.fromarray(image).save(source, "PNG")
            _run("bpgenc", "-q", str(quality), "-f", chroma, "-o", str(target), str(source))
            return target.read_bytes()
        planes = hevc.to_planes(image, "420")
        height, width = planes[0].shape
        source.write_bytes(b"".join(plane.tobytes() for plane in planes))
        if name == "vvc":
            _run(
                "vvencapp", "--input", str(source), "--size", f"{width}x{height}", "--format", "yuv420",
                "--framerate", "1", "--frames", "1", "--intraperiod", "1", "--preset", PRESET, "--qpa", "0",
                "--qp", str(quality), "--threads", "1", "--output", str(target),
            )  # fmt: skip
        else:
            config = Path(os.environ.get(VTM_FOLDER, ".")) / VTM_CONFIG
            _run(
                "EncoderAppStatic", "-c", str(config), "-i", str(source), "-wdt", str(width), "-hgt", str(height),
                "-f", "1", "-fr", "1", "-q", str(quality), "--InputBitDepth=8", "--InputChromaFormat=420",
                "--ConformanceWindowMode=1", "-b", str(target),
            )  # fmt: skip
        return target.read_bytes()


def decode(name: str, data: bytes, height: int, width: int) -> np.ndarray:
    """The image (height, width, 3) uint8 RGB of what `encode` wrote (TaskError: it cannot be read)."""
    if name in ("vvc", "vtm"):
        return hevc.decode(data, height, width, "vvc")
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.bpg", Path(scratch) / "out.png"
        source.write_bytes(data)
        _run("bpgdec", "-o", str(target), str(source))
        with Image.open(target) as image:
            return np.asarray(image.convert("RGB"))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TaskError(f"{command[0]} could not be run ({error}); try the command by hand") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise TaskError(f"{command[0]} ended with {done.returncode} ({lines[-1][:200]}); try `{' '.join(command)}`")
