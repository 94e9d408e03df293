"""The table NETWORKS of frozen networks whose features judge images, and how one is loaded.

A new network is one entry here and one loader function: `load(spec, path) -> nn.Module` whose
forward maps images uint8 [B, 3, R, R] to Features of the widths that the entry says. Any entry of
the encoders' table serves as "encoder:NAME". Imports without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from repa_pipeline.errors import MismatchError, MissingError
from repa_pipeline.tables import Table, resolve
from repa_pipeline.weights import ASSET_PREFIX, ASSETS, file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODER_PREFIX = "encoder:"


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to load a network, and how wide its features are.

    `loader` is "module:function"; `weights` a local path, or "asset:FILE" of this package, or None
    where the user must give one; `config` the loader's own settings. `pool`, `spatial`, `logits`:
    widths of the features, 0 where there are none. With a `spatial_stride` the spatial map grows
    with the image: `spatial` is then its channels and a cell stands for that many pixels a side.
    `sha256`: how the hash of the published file begins, where scores by others would mislead.
    `download`: "module:function" that gets that file where the user names none.
    """

    name: str
    loader: str
    weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    pool: int = field(kw_only=True)
    spatial: int = field(default=0, kw_only=True)
    logits: int = field(default=0, kw_only=True)
    spatial_stride: int = field(default=0, kw_only=True)
    sha256: str = field(default="", kw_only=True)
    download: str | None = field(default=None, kw_only=True)

    def widths(self, resolution: int) -> Widths:
        """Widths of the features of images of `resolution` pixels."""
        side = math.ceil(resolution / self.spatial_stride) if self.spatial_stride else 1
        return Widths(self.pool, self.spatial * side**2, self.logits)


class Widths(NamedTuple):
    """Columns of pool, spatial and logits in a row of features, side by side in this order."""

    pool: int
    spatial: int = 0
    logits: int = 0


class Features(NamedTuple):
    """pool float32 [B, D]; spatial float32 [B, S] or None; logits float32 [B, K] or None."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureNetwork(Protocol):
    """A loaded network."""

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, hexadecimal."""

    def features(self, images: Tensor) -> Features:
        """images uint8 [B, 3, R, R] on any device -> features on the network's; no gradient."""


NETWORKS: Table[NetworkSpec] = Table(
    "network",
    [
        NetworkSpec(
            "digits-cnn",
            loader="repa_pipeline.metrics.digits_cnn:load",
            weights="asset:digits_cnn.safetensors",
            pool=64,
            spatial=7 * 8 * 8,
            logits=10,
        ),
        NetworkSpec(
            "mobilenet-v1",
            loader="repa_pipeline.metrics.mobilenet_v1:load",
            config={"spatial_block": 10, "spatial_channels": 7},
            pool=1024,
            spatial=7,
            spatial_stride=16,
            logits=1000,
        ),
        NetworkSpec(
            "inception-v3",
            loader="repa_pipeline.metrics.inception:load",
            pool=2048,
            spatial=7 * 17 * 17,
            logits=1008,
            sha256="6726825d",
            download="repa_pipeline.metrics.inception:download",
        ),
        NetworkSpec(
            "fd-dinov2",
            loader="repa_pipeline.metrics.fd_dinov2:load",
            pool=1024,
            download="repa_pipeline.metrics.fd_dinov2:download",
            config={"architecture": "vit_large_patch14_dinov2"},
        ),
    ],
)


def load_network(name: str, *, weights: str | None = None, device: str = "cpu") -> FeatureNetwork:
    """Loads a network of the table, or "encoder:NAME" (mean of the teacher's patch tokens as pool).

    `weights` is a local file and comes before the entry's own. Raises UnknownNameError,
    MissingError (no weights to be had), DamagedError or MismatchError (the file).
    """
    path = find_network_weights(name, weights)
    if name.startswith(ENCODER_PREFIX):
        return EncoderNetwork(name, path, device)
    spec = NETWORKS[name]
    module: nn.Module = resolve(spec.loader)(spec, path)
    return TableNetwork(spec.name, file_sha256(path), module, device)


def find_network_weights(name: str, weights: str | None = None) -> Path:
    """The local file that a network's weights come from; raises UnknownNameError, MissingError."""
    if name.startswith(ENCODER_PREFIX):
        find = resolve("repa_pipeline.encoders.base:find_encoder_weights")
        found: Path = find(name.removeprefix(ENCODER_PREFIX), weights)
        return found
    spec = NETWORKS[name]
    chosen = weights or spec.weights
    ways_out = f'`--network-weights PATH`, or `[networks.{name}] weights = "PATH"` in repa.toml'
    if chosen is None and spec.download:
        got: Path = resolve(spec.download)(ways_out)
        return got
    if chosen is None:
        raise MissingError(f"network '{name}' loads from a local file only: give {ways_out}")
    asset = chosen.startswith(ASSET_PREFIX)
    path = ASSETS / chosen.removeprefix(ASSET_PREFIX) if asset else Path(chosen).expanduser()
    if not path.is_file():
        raise MissingError(f"no weights file at {chosen} for network '{name}': give {ways_out}")
    return path


def is_published(name: str, weights_sha256: str) -> bool:
    """Whether a network of the table has its published weights; True where none are laid down."""
    return name not in NETWORKS or weights_sha256.startswith(NETWORKS[name].sha256)


def check_published(name: str, path: Path) -> None:
    """Raises MismatchError unless the file is the one that scores by this network are made with."""
    digest = file_sha256(path)
    if not is_published(name, digest):
        raise MismatchError(
            f"{path} is not the published weights of network '{name}': its sha256 begins with "
            f"{digest[:8]}, expected {NETWORKS[name].sha256}; give the published file, or accept "
            "this one with --any-weights, and the score will not be called FID"
        )


class TableNetwork:
    """A network of the table in eval mode on a device."""

    def __init__(self, name: str, weights_sha256: str, module: nn.Module, device: str) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self._device = device
        self._module = module.to(device).eval().requires_grad_(False)

    def features(self, images: Tensor) -> Features:
        """See FeatureNetwork; raises MismatchError when images are not uint8 [B, 3, R, R]."""
        _check_images(images)
        found: Features = self._module(images.to(self._device))
        return found


class EncoderNetwork:
    """A teacher of the encoders' table as a feature network: pool = mean of its patch tokens.

    A teacher is built for one resolution, so it is loaded when the first images arrive, and again
    when their resolution changes. On DINOv2's this is not the published FD-DINOv2, which takes
    another size of the teacher and its class token.
    """

    def __init__(self, name: str, path: Path, device: str) -> None:
        self.name = name
        self.weights_sha256 = file_sha256(path)
        self._path = path
        self._device = device
        self._loaded: Any = None

    def features(self, images: Tensor) -> Features:
        """See FeatureNetwork; spatial and logits are None."""
        _check_images(images)
        return Features(self._encoder(images.shape[-1]).tokens(images).mean(dim=1))

    def _encoder(self, resolution: int) -> Any:
        if self._loaded is None or self._loaded.resolution != resolution:
            self._loaded = resolve("repa_pipeline.encoders.base:load_encoder")(
                self.name.removeprefix(ENCODER_PREFIX),
                resolution=resolution,
                weights=str(self._path),
                device=self._device,
            )
        return self._loaded


def _check_images(images: Tensor) -> None:
    square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
    if not square or str(images.dtype) != "torch.uint8":
        raise MismatchError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: expected uint8 [B, 3, R, R]"
        )
