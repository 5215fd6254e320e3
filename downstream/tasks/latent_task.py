"""What tasks have in common that can read gated latents: streams of chosen channels, and what is received of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.manifest import Manifest
from downstream.channels import most_varied
from downstream.errors import TaskError
from downstream.gate import StaticGate
from downstream.latent_config import LatentConfig
from downstream.latents import Received
from downstream.tasks.latent_input import LatentInput, create_latent_codec, gate_of
from downstream.tasks.task import Task
from pretrain.codec import bitstream
from pretrain.codec.feature_codec import FeatureCodec

C = TypeVar("C", bound=LatentConfig)
B = TypeVar("B")


class LatentTask(Task[C, B]):
    """A task that reads latents where its options say so (`LatentConfig.reads_latents`), else as `Task` does."""

    numbers = {"channels": "channels"}  # noqa: RUF012

    @classmethod
    def fill_in(cls, config: C, codec: FeatureCodec | None, manifest: Manifest) -> None:
        """The channels of gate=static are those of their file."""
        super().fill_in(config, codec, manifest)
        config.read_chosen()

    @classmethod
    def check_codec(cls, config: C, codec: FeatureCodec | None) -> None:
        """The gate's channels are among the latent's, and can be sent alone."""
        super().check_codec(config, codec)
        if config.reads_latents:
            latents = create_latent_codec(config, codec, config.rate, torch.device("cpu"))
            gate_of(config, latents.channels)
            if config.gate != "none":
                latents.need_channels()

    def start_from(self, state: dict[str, Any]) -> None:
        """As `Task`; a static gate's channels are part of the network, and other ones cannot be asked for."""
        super().start_from(state)
        chosen = sorted(self.config.chosen)
        if chosen and self.front is not None and self.front.gate.choice != chosen:
            raise TaskError(
                f"init={self.config.init} reads other channels than channels={self.config.channels}; name that run's "
                "own file, or leave init out"
            )

    def make_source(self) -> Any:
        if self.config.reads_latents:
            return create_latent_codec(self.config, self.codec, self.config.rate, self.device)
        return super().make_source()

    @property
    def front(self) -> LatentInput | None:
        """What reads latents in the network that is trained now; None for one that does not."""
        return next((module for module in self.model.modules() if isinstance(module, LatentInput)), None)

    def choose_varied(self, images: Iterable[Tensor]) -> None:
        """Tell a gate of gate=variance its channels, from training images (3, H, W) uint8."""
        if self.config.gate == "variance" and self.front is not None:
            assert isinstance(self.front.gate, StaticGate)
            chosen = most_varied(self.source, images, self.config.num_channels)
            self.front.gate.chosen.copy_(torch.tensor(chosen))

    def through_stream(self, image: Tensor) -> tuple[Any, int, int]:
        """What is received of an image (3, H, W) uint8, the stream's bytes, and those of its payload."""
        if self.front is None:
            features, sizes, payloads = self.source.through_streams(image[None].to(self.device))
            return features, int(sizes[0]), int(payloads[0])
        stream = self.stream_of(image)
        payload = self.source.payload_bytes(stream)
        if self.config.gate == "dynamic":  # its list differs from image to image: no header that is agreed upon
            channels = bitstream.describe(stream).channels
            assert channels is not None
            payload += len(channels.pack())
        return self.source.receive(stream), len(stream), payload

    def stream_of(self, image: Tensor) -> bytes:
        if self.front is None:
            return super().stream_of(image)
        return self.source.encode(image.to(self.device), self.front.gate.choice)

    def receive_stream(self, stream: bytes) -> tuple[Any, int, int]:
        if self.front is None:
            return super().receive_stream(stream)
        received = self.source.receive(stream)
        return received, received.height, received.width

    @torch.no_grad()
    def picture(self, received: Any, height: int, width: int) -> Tensor:
        """The features, or F as the network makes it of latents."""
        if self.front is None:
            return super().picture(received, height, width)
        with self.autocast():
            features = self.front.from_base(received)
        return super().picture(features.float(), height, width)


def num_channels(received: Any) -> int:
    """Channels of the latent that were received; 0 of what is no latent."""
    return received.latents.shape[1] if isinstance(received, Received) else 0
