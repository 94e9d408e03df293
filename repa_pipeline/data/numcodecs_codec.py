"""The token codecs under numcodecs' interface, for coded tokens outside our arrays.

    register()
    codec = numcodecs.get_codec({"id": "repa.int8", "width": 768})

Encoded bytes are the records of all tokens, then for a codec with a scale their scales (float16,
little endian). Our own arrays do not use it: they hold the coded integers as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from numcodecs.abc import Codec as NumcodecsCodec
from numcodecs.compat import (
    ensure_contiguous_ndarray,
    ensure_ndarray,
    ndarray_copy,
)
from numcodecs.registry import register_codec

from repa_pipeline.data.codec import CODECS, Codec
from repa_pipeline.errors import DataError, MismatchError


class TokenCodec(NumcodecsCodec):  # type: ignore[misc]
    """Tokens float32 [..., width] to bytes, and back to float32 [N, width]."""

    name: ClassVar[str]

    def __init__(self, width: int, version: int = 1):
        if version != self._codec.version:
            raise MismatchError(
                f"bytes are coded by {self.name} version {version}, this package reads "
                f"{self._codec.version}: use the package version that wrote them"
            )
        self._codec.check(width)
        self.width = width
        self.version = version

    @property
    def _codec(self) -> Codec:
        return CODECS[self.name]

    def encode(self, buf: Any) -> bytes:
        """float32 [..., width] -> bytes; raises DataError as the codec, or for another size."""
        values = np.array(ensure_ndarray(buf), np.float32)
        if values.size % self.width:
            raise DataError(
                f"{self.codec_id}: got {values.size} values, expected whole tokens of {self.width}"
            )
        coded = self._codec.encode(torch.from_numpy(values.reshape(1, -1, self.width)))
        scale = b"" if coded.scale is None else coded.scale.tobytes()
        return coded.records.tobytes() + scale

    def decode(self, buf: Any, out: Any = None) -> Any:
        """bytes -> float32 [N, width], into `out` where given; raises DataError for a part of a
        token."""
        data = ensure_contiguous_ndarray(buf).view(np.uint8)
        dtype = np.dtype(self._codec.dtype)
        items = self.width // self._codec.values_per_item
        token_bytes = items * dtype.itemsize
        stored_bytes = token_bytes + (2 if self._codec.has_scale else 0)
        num_tokens, rest = divmod(len(data), stored_bytes)
        if rest:
            raise DataError(
                f"{self.codec_id}: got {len(data)} bytes, expected whole tokens of {stored_bytes}"
            )
        records = data[: num_tokens * token_bytes].copy().view(dtype).reshape(1, num_tokens, items)
        tokens = self._decode(records, data[num_tokens * token_bytes :].copy())
        return ndarray_copy(tokens.reshape(num_tokens, self.width), out)

    def _decode(
        self, records: npt.NDArray[np.generic], scale: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float32]:
        scales = torch.from_numpy(scale.view(np.float16)[None]) if self._codec.has_scale else None
        decode = self._codec.decoder(self._codec.manifest(self.width))
        tokens: npt.NDArray[np.float32] = decode(torch.from_numpy(records), scales).numpy()
        return tokens


class Float16(TokenCodec):
    name = "fp16"
    codec_id = "repa.fp16"


class BFloat16(TokenCodec):
    name = "bf16"
    codec_id = "repa.bf16"


class Int8(TokenCodec):
    name = "int8"
    codec_id = "repa.int8"


class Int4(TokenCodec):
    name = "int4"
    codec_id = "repa.int4"


def register() -> None:
    """Makes repa.fp16, repa.bf16, repa.int8 and repa.int4 known to numcodecs."""
    for codec in (Float16, BFloat16, Int8, Int4):
        register_codec(codec)
