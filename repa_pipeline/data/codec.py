"""How teacher tokens are stored. A codec is named in the array's manifest from the first day.

A codec says which of {direction, magnitude} of a token it preserves; an objective says which it
needs, and a mismatch is refused before the first step (`require`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import DataError, MismatchError
from repa_pipeline.tables import Table

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Codec:
    """A coding of tokens float32 [n, T, D] as fixed records.

    dtype: of the stored record; record_shape: (T, D) -> shape of a record; encode and decode are
    inverse up to the codec's error; decode takes and gives tensors and runs on their device.
    """

    name: str
    version: int
    dtype: str
    preserves: frozenset[str]
    record_shape: Callable[[int, int], tuple[int, ...]]
    encode: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]
    decode: Callable[[torch.Tensor], torch.Tensor]

    def manifest(self, width: int) -> dict[str, Any]:
        """What the array's attributes say of the coding."""
        return {"name": self.name, "version": self.version, "width": width}


def _encode_fp16(tokens: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    with np.errstate(over="ignore"):
        coded = tokens.astype(np.float16)
    if not np.isfinite(coded).all():
        largest = float(np.abs(tokens).max())
        raise DataError(
            f"values do not fit float16: got one of {largest:g}, expected finite ones below "
            "65504; check the encoder's weights and preprocessing"
        )
    return coded


def _decode_fp16(coded: torch.Tensor) -> torch.Tensor:
    return coded.float()


CODECS: Table[Codec] = Table(
    "codec",
    [
        Codec(
            name="fp16",
            version=1,
            dtype="float16",
            preserves=frozenset({"direction", "magnitude"}),
            record_shape=lambda num_tokens, width: (num_tokens, width),
            encode=_encode_fp16,
            decode=_decode_fp16,
        )
    ],
)


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


def require(preserves: frozenset[str], needs: frozenset[str], objective: str, stored: str) -> None:
    """Raises MismatchError when `objective` needs what the codec of `stored` does not preserve."""
    lost = sorted(needs - preserves)
    if lost:
        raise MismatchError(
            f"{objective} needs the {' and '.join(lost)} of teacher tokens, {stored} preserves "
            f"{', '.join(sorted(preserves)) or 'neither'} only: cache with another --codec"
        )
