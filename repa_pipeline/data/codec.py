"""How teacher tokens are stored. A codec is named in the array's manifest from the first day.

A codec says which of {direction, magnitude} of a token it keeps; an objective says which it needs,
and a mismatch is refused before the first step (`require`). The arithmetic is in coders.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from repa_pipeline.data import hadamard
from repa_pipeline.errors import ConfigError, DataError, MismatchError
from repa_pipeline.tables import Table, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from repa_pipeline.data.coders import Coded, Coder

    # (records [n, ...], their scale [n, T] or None) -> tokens float32 [n, T, D], on their device
    Decode = Callable[[Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Codec:
    """A coding of tokens float32 [n, T, D] as fixed records, and for `has_scale` a float16 scale
    [n, T] that is an array of its own.

    dtype: of the stored record; values_per_item: how many of a token's values share one item of
    it; rotation: whether tokens are rotated (hadamard.py) first; coder: "module:class" of a Coder.
    """

    name: str
    version: int
    dtype: str
    coder: str
    has_scale: bool = False
    values_per_item: int = 1
    rotation: Literal["never", "where it fits", "always"] = "never"

    def kept(self, with_scale: bool) -> frozenset[str]:
        """What of a token comes back: "direction", and with its scale "magnitude"."""
        if self.has_scale and not with_scale:
            return frozenset({"direction"})
        return frozenset({"direction", "magnitude"})

    def check(self, width: int) -> None:
        """Raises ConfigError where tokens of `width` cannot be coded, naming codecs that can."""
        if self.rotation != "always" or hadamard.factors(width):
            return
        fitting = [codec.name for codec in CODECS.values() if codec.rotation != "always"]
        raise ConfigError(
            f"codec {self.name} needs a width that is a product of 12s, 20s and a power of 2 "
            f"(384, 768, 1024, 1152, 1280, 1536, ...), got {width}: use --codec "
            f"{' or '.join(fitting)}"
        )

    def record_shape(self, num_tokens: int, width: int) -> tuple[int, int]:
        """Of the record of one image."""
        return (num_tokens, width // self.values_per_item)

    def manifest(self, width: int) -> dict[str, Any]:
        """What the array's attributes say of the coding; raises ConfigError as `check`."""
        self.check(width)
        said: dict[str, Any] = {"name": self.name, "version": self.version, "width": width}
        if self.rotation != "never":
            said["rotation"] = hadamard.rotation_name(width)
            if self._orders(width):
                said["sign_seed"] = hadamard.SIGN_SEED
        return said

    def encode(self, tokens: Tensor) -> Coded:
        """Tokens float32 [n, T, D] on any device -> records, scale and number of zero tokens.

        An image's bytes do not depend on the images beside it. Raises ConfigError as `check`,
        DataError for tokens that are not finite or out of the codec's range.
        """
        self.check(tokens.shape[-1])
        return self._coder.encode(tokens, self._orders(tokens.shape[-1]))

    def decoder(self, stored: Mapping[str, Any]) -> Decode:
        """Decodes what was coded as the manifest entry `stored` says.

        Without the scale of a codec that has one, tokens come back in the right direction and at
        an arbitrary length. Raises MismatchError for a rotation that we cannot undo.
        """
        return functools.partial(self._coder.decode, orders=self._stored_orders(stored))

    @property
    def _coder(self) -> Coder:
        return cast("Coder", resolve(self.coder)())

    def _orders(self, width: int) -> tuple[int, ...]:
        return () if self.rotation == "never" else hadamard.factors(width)

    def _stored_orders(self, stored: Mapping[str, Any]) -> tuple[int, ...]:
        unrotated = self.rotation == "where it fits" and stored.get("rotation") == "none"
        if self.rotation == "never" or unrotated:
            return ()
        known = (hadamard.rotation_name(stored["width"]), hadamard.SIGN_SEED)
        got = (stored.get("rotation"), stored.get("sign_seed"))
        if got != known:
            raise MismatchError(
                f"tokens are stored as {self.name} rotated by {got[0]} with sign seed {got[1]}, "
                f"this package undoes {known[0]} with {known[1]}: use the package version that "
                "wrote them"
            )
        return self._orders(stored["width"])


_CODERS = "repa_pipeline.data.coders"
CODECS: Table[Codec] = Table(
    "codec",
    [
        Codec("fp16", 1, "float16", f"{_CODERS}:Float16Coder"),
        Codec("bf16", 1, "uint16", f"{_CODERS}:BFloat16Coder"),
        Codec("int8", 1, "int8", f"{_CODERS}:Int8Coder", True, rotation="where it fits"),
        Codec("int4", 1, "uint8", f"{_CODERS}:Int4Coder", True, 2, "always"),
    ],
)


def encode_float(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """Latents as they are stored: float32 [...] -> `dtype`, "float16" or "float32".

    Raises DataError for values that are not finite after the cast.
    """
    with np.errstate(over="ignore"):
        coded = array.astype(dtype)
    if not np.isfinite(coded).all():
        largest = float(np.abs(array).max())
        raise DataError(
            f"values do not fit {dtype}: got one of {largest:g}, expected finite ones up to "
            f"{float(np.finfo(dtype).max):g}; check the model's weights and preprocessing"
        )
    return coded


def codec_of(manifest: Mapping[str, Any], where: str) -> Codec:
    """The codec an array was written with; raises MismatchError for a version we do not read."""
    stored = manifest["codec"]
    codec = CODECS[stored["name"]]
    if codec.version != stored["version"]:
        raise MismatchError(
            f"{where} is coded by {codec.name} version {stored['version']}, this package reads "
            f"{codec.version}: use the package version that wrote it"
        )
    return codec


def require(kept: frozenset[str], needs: frozenset[str], objective: str, stored: str) -> None:
    """Raises MismatchError when `objective` needs what the codec of `stored` does not keep."""
    lost = sorted(needs - kept)
    if lost:
        raise MismatchError(
            f"{objective} needs the {' and '.join(lost)} of teacher tokens, {stored} preserves "
            f"{', '.join(sorted(kept)) or 'neither'} only: cache with another --codec"
        )
