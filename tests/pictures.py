"""Pictures for tests, and their files."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image


def picture(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    """Smooth colours, different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
