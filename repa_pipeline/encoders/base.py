"""A frozen teacher: stored images in, patch tokens out. `load_encoder("dinov2-b", ...)`."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from repa_pipeline.encoders import ENCODERS, PATCH, PATCH_CLS, EncoderSpec
from repa_pipeline.encoders.precision import FLOAT32, autocast, check_dtype, compiled
from repa_pipeline.encoders.preprocess import preprocess
from repa_pipeline.encoders.randomised import RANDOM, build_random, find_build, unbuildable
from repa_pipeline.errors import MismatchError, MissingError
from repa_pipeline.tables import resolve
from repa_pipeline.weights import file_sha256, resolve_weights


class Encoder:
    """A teacher at one resolution, in eval mode, without gradients.

    Its tokens are float32 whatever it computes in; byte equality is promised for float32 alone.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        network: nn.Module,
        *,
        resolution: int,
        weights_sha256: str,
        device: str | torch.device = "cpu",
        tokens: str = PATCH,
        dtype: str = FLOAT32,
        compile: bool = False,
    ):
        spec.check_tokens(tokens)
        self.spec = spec
        self.resolution = resolution
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.dtype = check_dtype(dtype)
        module = network.to(self.device).eval().requires_grad_(False)
        self._network = compiled(module, compile)
        self._shape = (spec.num_tokens(resolution) + spec.class_token, spec.width)
        self._first = int(spec.class_token and tokens != PATCH_CLS)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Tokens of a batch, row by row over the token grid; deterministic, no gradient.

        images uint8 [B, 3, R, R], any device -> float32 on this encoder's device: [B, T, D], or
        [B, 1 + T, D] with the class token first where it was loaded with tokens "patch+cls".
        Raises MismatchError when R is not the resolution it was loaded for, or when the network's
        tokens are not what its table entry says.
        """
        side = self.resolution
        if images.shape[2:] != (side, side):
            raise MismatchError(
                f"images are {list(images.shape)}: encoder '{self.spec.name}' was loaded for "
                f"[B, 3, {side}, {side}]; load it for the images' resolution"
            )
        pixels = preprocess(images.to(self.device), self.spec.rule)
        with autocast(self.device, self.dtype):
            made: Tensor = self._network(pixels)
        if made.shape[1:] != self._shape:
            raise MismatchError(
                f"encoder '{self.spec.name}' made tokens {list(made.shape[1:])}, its table entry "
                f"says {list(self._shape)}: correct width, patch_size and class_token of the entry"
            )
        return made[:, self._first :].float()


def find_encoder_weights(name_or_spec: str | EncoderSpec, weights: str | None = None) -> Path:
    """The local file an encoder's weights come from; raises MissingError (weights.py)."""
    spec = ENCODERS[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec
    return resolve_weights("encoder", spec.name, spec.weights, spec.hub, spec.hub_file, weights)


def load_encoder(
    name_or_spec: str | EncoderSpec,
    *,
    resolution: int,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    tokens: str = PATCH,
    dtype: str = FLOAT32,
    compile: bool = False,
) -> Encoder:
    """Loads a teacher for images of `resolution` pixels.

    `weights` is a local file and comes before the entry's own. `tokens` "patch+cls" keeps the
    class token before the patches. `dtype` "bf16" runs the network under bf16 autocast; `compile`
    compiles it at the first batch. Raises UnknownNameError, ConfigError (resolution, tokens,
    dtype), MissingError (no weights to be had), DamagedError or MismatchError (the file).
    """
    spec = ENCODERS[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec
    spec.input_size(resolution)
    spec.check_tokens(tokens)
    check_dtype(dtype)
    path = find_encoder_weights(spec, weights)
    network: nn.Module = resolve(spec.loader)(spec, resolution, path)
    return Encoder(
        spec,
        network,
        resolution=resolution,
        weights_sha256=file_sha256(path),
        device=device,
        tokens=tokens,
        dtype=dtype,
        compile=compile,
    )


def load_random_encoder(
    spec: EncoderSpec,
    *,
    resolution: int,
    device: str | torch.device = "cpu",
    dtype: str = FLOAT32,
    compile: bool = False,
) -> Encoder:
    """A teacher with seeded random weights, for probes and benchmarks; its `weights_sha256` is
    "random".

    One that cannot be built without its file (a plugin without `build`) is loaded from the local
    file that its entry names. Raises ConfigError (resolution, dtype), MissingError without either.
    """
    spec.input_size(resolution)
    check_dtype(dtype)
    build = find_build(spec.loader)
    if build is None:
        _need_weights(spec)
        return load_encoder(
            spec, resolution=resolution, device=device, dtype=dtype, compile=compile
        )
    made = build_random(functools.partial(build, spec, resolution), torch.device(device))
    return Encoder(
        spec,
        made,
        resolution=resolution,
        weights_sha256=RANDOM,
        device=device,
        dtype=dtype,
        compile=compile,
    )


def build_network(spec: EncoderSpec, resolution: int) -> nn.Module:
    """The network of a teacher on the meta device, where operations are counted, not computed.

    float32 [B, 3, S, S] with S = spec.input_size(resolution) -> tokens. Raises ConfigError for the
    resolution, MissingError for an entry that cannot be built without its weights.
    """
    spec.input_size(resolution)
    build = find_build(spec.loader)
    if build is None:
        _need_weights(spec)
        network: nn.Module = resolve(spec.loader)(spec, resolution, find_encoder_weights(spec))
        return network.to("meta").eval()
    built: nn.Module = build(spec, resolution, "meta")
    return built.eval()


def _need_weights(spec: EncoderSpec) -> None:
    """Raises MissingError when the entry names no local file; the hub is not asked."""
    if spec.weights is None:
        raise MissingError(unbuildable("encoder", spec.name, "there is no `build` by its loader"))
