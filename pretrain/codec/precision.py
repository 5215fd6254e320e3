"""The arithmetic of networks: float32, or bfloat16 where a device computes in it."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str, enabled: bool = True) -> torch.autocast:
    """Context in which networks compute on `device`: under bf16 their convolutions and products are bfloat16.

    A device that would only imitate bfloat16 computes in float32. PyTorch's convolutions on a processor with neither
    AVX-512 nor Arm's bf16 leave oneDNN then, for loops many times as slow; GPUs before Ampere convert to and fro.

    Args:
        precision: `fp32` or `bf16`.
        enabled: False for float32 with either.
    """
    wanted = enabled and precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # What convolutions ask before they choose oneDNN; there is no public name for it.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
