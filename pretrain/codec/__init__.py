"""The codec of features: `FeatureCodec` is its one public class (imported on first use, as it brings in torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.codec.feature_codec import FeatureCodec

__all__ = ["FeatureCodec"]


def __getattr__(name: str) -> Any:
    if name == "FeatureCodec":
        from pretrain.codec.feature_codec import FeatureCodec

        return FeatureCodec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
