"""Networks compute in bfloat16 where a device does, and in float32 where it would imitate it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pretrain.codec.precision import autocast, has_bfloat16

CPU = torch.device("cpu")


def convolve(precision: str, enabled: bool = True) -> torch.dtype:
    conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.rand(2, 8, 16, 16)
    with autocast(CPU, precision, enabled):
        return conv(images).dtype


def test_autocast__computes_in_what_the_processor_has():
    assert convolve("bf16") == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)
    assert convolve("fp32") == torch.float32
    assert convolve("bf16", enabled=False) == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_autocast__asks_the_device(monkeypatch: pytest.MonkeyPatch, native: bool):
    monkeypatch.setattr("pretrain.codec.precision.has_bfloat16", lambda device: native)
    assert convolve("bf16") == (torch.bfloat16 if native else torch.float32)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_autocast__never_leaves_the_fast_convolutions():
    conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.rand(2, 8, 16, 16)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, autocast(CPU, "bf16"):
        conv(images).float().sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::mkldnn_convolution" in names, names
    assert not any("slow_conv" in name for name in names), names
