"""The codec's networks as graphs that run without this package: ONNX files, and programs of torch.export.

    encoder.onnx        images (N, 3, H, W) float32, normalised  ->  y2 (N, ., H/16, W/16), z (N, ., H/64, W/64)
    hyper_decoder.onnx  z_hat (N, ., H/64, W/64) float64         ->  means, scales (N, ., H/16, W/16) float64
    decoder.onnx        y2_hat (N, ., H/16, W/16) float32        ->  f3 (N, C1, H/4, W/4)

One graph serves every batch and every size; H and W are multiples of 64, so padding, rounding of y2 and z, and
coding stay with the caller (docs/onnx_codec.py). Each graph takes the modules of a `FeatureCodec` but for those
whose shapes or operators do not travel. They are replaced by ones with the same weights and the same results:

- attention pads to whole windows and masks, so that no shape depends on which of side and window is smaller;
- the filter over the Fourier plane becomes products with matrices of cosines and sines, since ONNX has no inverse
  real transform; that costs H x W x (H + W), not H x W x log, which at these planes, H/8, is little;
- h_s in float64 does without convolution and erf, which onnxruntime has in float32 alone, and without constants
  that the exporter would round to float32.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from pretrain.codec.coder import Z_STRIDE
from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import bottleneck_round
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.gated_conv import FILTER_SIZE, GlobalLocalFilter
from pretrain.codec.hyperprior import WindowedAttention
from pretrain.errors import CodecError

OPSET = 18
ENCODER, HYPER_DECODER, DECODER = "encoder", "hyper_decoder", "decoder"
ONNX_FILES = tuple(f"{name}.onnx" for name in (ENCODER, HYPER_DECODER, DECODER))
OUTPUTS = {ENCODER: ["y2", "z"], HYPER_DECODER: ["means", "scales"], DECODER: ["f3"]}
# In each file: the codec whose graph it is, as `FeatureCodec.fingerprint` in hexadecimal.
FINGERPRINT_KEY = "dicm.fingerprint"
REQUIRED = ("onnx", "onnxscript", "onnxruntime")


def check_graphs(config: CodecConfig) -> None:
    """Refuse (CodecError) a codec with parts that have no graph."""
    if config.context != "none":
        raise CodecError(f"codec.context={config.context} has no ONNX graph; export without --onnx, or train with none")


def require_onnx() -> None:
    """Refuse to go on (CodecError) where a package that ONNX needs is missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CodecError(f"ONNX needs {', '.join(missing)}, not installed here; run: pip install 'dicm[export]'")


def export_onnx(codec: FeatureCodec, folder: Path | str) -> list[Path]:
    """Write encoder.onnx, hyper_decoder.onnx and decoder.onnx, each whole in one file, into `folder`.

    Raises:
        CodecError: the packages of the extra `export` are missing, or `folder` cannot be written.
    """
    require_onnx()
    check_graphs(codec.config)
    fingerprint, paths = codec.fingerprint.hex(), []
    for name, program in export_programs(codec).items():
        onnx_program = torch.onnx.export(
            program, opset_version=OPSET, output_names=OUTPUTS[name], dynamo=True, verbose=False
        )
        assert onnx_program is not None
        model = onnx_program.model
        for node in model.graph.all_nodes():
            node.metadata_props.clear()  # source lines with the paths of this machine
        model.metadata_props[FINGERPRINT_KEY] = fingerprint
        path = Path(folder) / f"{name}.onnx"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            onnx_program.save(path, external_data=False)
        except OSError as error:
            raise CodecError(f"{path}: cannot be written ({error}); free space or name another folder") from error
        paths.append(path)
    return paths


def export_programs(codec: FeatureCodec) -> dict[str, ExportedProgram]:
    """The programs `encoder`, `hyper_decoder` and `decoder` of a codec, in eval mode, on the CPU; codec kept.

    Raises:
        CodecError: this torch cannot trace sizes of which nothing is known.
    """
    try:
        from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapeVar, TensorSpec
    except ImportError as error:
        raise CodecError(
            f"torch {torch.__version__} cannot export graphs of free sizes; install the version in constraints.txt"
        ) from error
    _ = codec.fingerprint  # solves the medians that the encoder rounds about
    programs = {}
    for name, argument, graph, channels, step, dtype in (
        (ENCODER, "images", EncoderGraph(codec), 3, Z_STRIDE, torch.float32),
        (HYPER_DECODER, "z_hat", HyperDecoderGraph(codec), codec.config.z_channels, 1, torch.float64),
        (DECODER, "y2_hat", DecoderGraph(codec), codec.config.latent_channels, Z_STRIDE // 16, torch.float32),
    ):
        # Unbacked sizes: a trace that knows an example's would keep facts that hold for it alone, such as that one
        # window is enough.
        height, width = ShapeVar("height", min=step), ShapeVar("width", min=step)
        sizes = ParamsSpec({argument: TensorSpec([ShapeVar("batch", min=1), channels, height, width])})
        example = torch.zeros(1, channels, step, step, dtype=dtype)
        with torch.no_grad():
            programs[name] = torch.export.export(graph, (example,), dynamic_shapes=sizes)
    return programs


class EncoderGraph(nn.Module):
    """Normalised images (N, 3, H, W) -> y2 and z, not rounded; H and W multiples of 64."""

    def __init__(self, codec: FeatureCodec):
        super().__init__()
        self.stem, self.layer1 = _graph_of(codec.backbone.stem), _graph_of(codec.backbone.layer1)
        self.redundancy = None if codec.redundancy is None else _graph_of(codec.redundancy)
        self.g_a, self.h_a = _graph_of(codec.g_a), _graph_of(codec.h_a)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer1(self.stem(images))
        if self.redundancy is not None:
            prior = self.redundancy.entropy_bottleneck
            features = self.redundancy.decode(bottleneck_round(prior, self.redundancy.encode(features)))
        y2 = self.g_a(features)
        return y2, self.h_a(y2)


class HyperDecoderGraph(nn.Module):
    """z_hat (N, z_channels, H/64, W/64) -> means and raw scales of y2, each (N, latent_channels, H/16, W/16).

    All float64: the scale indexes that follow must be the same wherever a stream is written and read.
    """

    def __init__(self, codec: FeatureCodec):
        super().__init__()
        forms = {nn.Conv2d: Pointwise, nn.GELU: PreciseGELU, nn.LayerNorm: PreciseLayerNorm}
        self.h_s = _graph_of(codec.h_s, forms, torch.float64)

    def forward(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        return self.h_s(z_hat)


class DecoderGraph(nn.Module):
    """y2_hat (N, latent_channels, H/16, W/16) -> f3 (N, C1, H/4, W/4)."""

    def __init__(self, codec: FeatureCodec):
        super().__init__()
        self.g_s = _graph_of(codec.g_s)

    def forward(self, y2_hat: Tensor) -> Tensor:
        return self.g_s(y2_hat)


class PaddedAttention(nn.Module):
    """`WindowedAttention` by whole windows: what sticks out of the plane is masked, so weights and sums agree."""

    bias: Tensor

    def __init__(self, attention: WindowedAttention):
        super().__init__()
        self.heads, self.head_dim, self.window = attention.heads, attention.head_dim, attention.window
        self.qkv, self.proj = attention.qkv, attention.proj
        # The scale of scores goes into the query's weights: as a factor, onnxruntime would make it float32.
        with torch.no_grad():
            for parameter in (self.qkv.weight, self.qkv.bias):
                parameter[: self.heads * self.head_dim] *= self.head_dim**-0.5
        self.register_buffer("bias", attention._bias(self.window, self.window).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        count, height, width, dim = x.shape
        side, tokens = self.window, self.window**2
        down, across = (height + side - 1) // side, (width + side - 1) // side
        x = F.pad(x, (0, 0, 0, across * side - width, 0, down * side - height))
        x = x.view(count, down, side, across, side, dim).transpose(2, 3).reshape(count, down * across, tokens, dim)
        qkv = self.qkv(x).view(count, down * across, tokens, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
        scores = query @ key.transpose(-2, -1) + self.bias
        inside_y, inside_x = (
            (torch.arange(n * side) < length).view(n, side) for n, length in ((down, height), (across, width))
        )
        inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
        scores = scores.masked_fill(~inside.reshape(down * across, 1, 1, tokens), -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)
        mixed = self.proj(mixed).view(count, down, across, side, side, dim).transpose(2, 3)
        return mixed.reshape(count, down * side, across * side, dim)[:, :height, :width]


class MatrixFilter(nn.Module):
    """`GlobalLocalFilter` with transforms and interpolation written as matrix products."""

    def __init__(self, module: GlobalLocalFilter):
        super().__init__()
        self.norm_in, self.local, self.norm_out = module.norm_in, module.local, module.norm_out
        self.weight = module.weight

    def forward(self, x: Tensor) -> Tensor:
        local, wide = self.norm_in(x).chunk(2, dim=1)
        height, width = wide.shape[-2:]
        mixed = torch.stack([self.local(local), self._filter(wide, height, width)], dim=2).flatten(1, 2)
        return self.norm_out(mixed)

    def _filter(self, wide: Tensor, height: int, width: int) -> Tensor:
        """irfft2(rfft2(wide) * weight); real and imaginary parts stand in the last channel axis of two tensors."""
        num_columns = width // 2 + 1
        stretch_y = linear_matrix(FILTER_SIZE[0], height)
        stretch_x = linear_matrix(FILTER_SIZE[1], num_columns)
        weight_re, weight_im = (stretch_y @ plane @ stretch_x.T for plane in self.weight.unbind(-1))
        cos_y, sin_y = fourier_matrices(height, height)
        cos_x, sin_x = fourier_matrices(width, num_columns)
        # Forward, exp(-i...): along rows, then along columns.
        half_re, half_im = wide @ cos_x, -(wide @ sin_x)
        re, im = cos_y @ half_re + sin_y @ half_im, cos_y @ half_im - sin_y @ half_re
        re, im = re * weight_re - im * weight_im, re * weight_im + im * weight_re
        # Back, exp(+i...). The columns that a real transform leaves out are the conjugates of those it has.
        half_re, half_im = cos_y @ re - sin_y @ im, cos_y @ im + sin_y @ re
        column = torch.arange(num_columns)
        alone = (column == 0) | (2 * column == width)
        times = torch.where(alone, 1.0, 2.0)
        return (half_re * times) @ cos_x.T - (half_im * times) @ sin_x.T


class Pointwise(nn.Module):
    """A 1x1 convolution as a linear layer over channels."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
        self.linear.weight = nn.Parameter(conv.weight.flatten(1))
        if conv.bias is not None:
            self.linear.bias = nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PreciseLayerNorm(nn.Module):
    """LayerNorm over the last axis; ONNX's own has its epsilon in float32.

    Sums stand for means because onnxruntime would take the pattern with means back into its own operator.
    """

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
        variance = (x * x).sum(-1, keepdim=True) / x.shape[-1]
        return x / (variance + _exact(self.epsilon)).sqrt() * self.weight + self.bias


class PreciseGELU(nn.Module):
    """GELU in float64 with `precise_erf`."""

    def __init__(self, gelu: nn.GELU):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + precise_erf(x * _exact(math.sqrt(0.5))))


def linear_matrix(size: int, new_size: int) -> Tensor:
    """(new_size, size) float32: linear interpolation that keeps both ends (`align_corners=True`)."""
    place = torch.arange(new_size)
    place = place.double() * (size - 1) / place[-1:].clamp(min=1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0).float()


def fourier_matrices(size: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """(size, num_columns) float32: cosines and sines of 2 pi j k / size, over sqrt(size)."""
    # Exact integers modulo one turn, then float64: float32 angles would lose digits on large planes.
    places = torch.arange(size)
    turn = places[-1:] + 1
    angle = (places[:, None] * torch.arange(num_columns) % turn).double() * _exact(2 * math.pi) / turn
    norm = turn.double().sqrt()
    return (angle.cos() / norm).float(), (angle.sin() / norm).float()


# Cody, Rational Chebyshev approximations for the error function, Math. Comp. 23 (1969): numerators and denominators,
# highest power first, of erf(x) / x in x^2 below 15/32, and of erfc(x) exp(x^2) in x above.
ERF_NUMERATOR = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
    3.20937758913846947e3,
)  # fmt: skip
ERF_DENOMINATOR = (
    1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3,
)  # fmt: skip
ERFC_NUMERATOR = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3,
)  # fmt: skip
ERFC_DENOMINATOR = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)  # fmt: skip
ERF_ONE = 6.0  # from here on erf is 1 in float64


def precise_erf(x: Tensor) -> Tensor:
    """erf of float64 values to about 1e-16, from operators that onnxruntime has in float64."""
    size = x.abs().clamp(max=ERF_ONE)
    square = size * size
    small = size * _polynomial(ERF_NUMERATOR, square) / _polynomial(ERF_DENOMINATOR, square)
    large = 1 - (-square).exp() * _polynomial(ERFC_NUMERATOR, size) / _polynomial(ERFC_DENOMINATOR, size)
    return torch.where(size <= 15 / 32, small, large) * x.sign()


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, highest power first."""
    value = _exact(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _exact(coefficient)
    return value


def _exact(number: float) -> Tensor:
    """A constant of float64; a Python number in a graph becomes one of float32."""
    return torch.tensor(number, dtype=torch.float64)


def _graph_of(
    module: nn.Module,
    further: Mapping[type, Callable[[Any], nn.Module]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A frozen copy of `module` on the CPU, with graph forms in place of what has one; a form may change the copy."""
    forms: dict[type, Callable[[Any], nn.Module]] = {
        WindowedAttention: PaddedAttention,
        GlobalLocalFilter: MatrixFilter,
        **(further or {}),
    }
    with torch.inference_mode(False), torch.no_grad():
        copied = copy.deepcopy(module).cpu().to(dtype).eval()
        _replace(copied, forms)
    return copied.requires_grad_(False)


def _replace(module: nn.Module, forms: Mapping[type, Callable[[Any], nn.Module]]) -> None:
    for name, child in module.named_children():
        if type(child) in forms:
            setattr(module, name, forms[type(child)](child))
        else:
            _replace(child, forms)
