"""What the codecs do to tokens: float32 [n, T, D] on any device to records, and back.

Everything is float32 and element by element, or exact in any order, so the bytes of a record
depend on its own tokens alone: not on the batch around it, nor on threads or device. float32
matmuls in TF32 would round int4 levels while decoding: `device.prepare_compute` switches TF32 off.

Shapes: n images, T tokens an image, D width, N = n * T tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repa_pipeline.data import hadamard
from repa_pipeline.errors import DataError

# Lloyd-Max levels of the unit Gaussian for 16 levels, positive half, in 1024ths: sums of a token's
# levels are then exact in float32 up to a width of 5996. Max, Quantizing for minimum distortion,
# IRE Trans. IT-6 (1960), table I; the rounding to 1024ths adds 0.04% to the distortion.
LEVELS = tuple(k / 1024 for k in (131, 397, 673, 965, 1286, 1657, 2119, 2798))
THRESHOLDS = tuple((a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:], strict=False))
# below this a token counts as zero; float16 ends at 6e-8
_TINIEST = 2.0**-50
_SMALLEST_SCALE = 2.0**-24
# values a step works on: the cache of a CPU core, and little memory on a GPU
_CHUNK_VALUES = {"cpu": 2**18, "cuda": 2**25}

Orders = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Coded:
    """Records of a batch, [n, ...] in the codec's dtype, and its scale, float16 [n, T], if any."""

    records: npt.NDArray[np.generic]
    scale: npt.NDArray[np.float16] | None
    num_zero_tokens: int


class Coder(Protocol):
    """How a codec turns tokens to records; `orders` are those of the rotation, () for none."""

    def encode(self, tokens: Tensor, orders: Orders) -> Coded:
        """float32 [n, T, D] -> records; raises DataError for what cannot be stored."""

    def decode(self, coded: Tensor, scale: Tensor | None, orders: Orders) -> Tensor:
        """Records [n, ...] and their scale [n, T] -> float32 [n, T, D] on the records' device."""


class FloatCoder:
    """Tokens as they are, in a 2-byte float type."""

    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, tokens: Tensor, orders: Orders) -> Coded:
        # rounding is monotone: a token's largest value tells what becomes of all of them
        peak = torch.maximum(tokens.amax(-1), -tokens.amin(-1))
        rounded = peak.to(self.dtype)
        if not torch.isfinite(rounded).all():
            refuse_non_finite(tokens)
            name = str(self.dtype).removeprefix("torch.")
            raise DataError(
                f"values do not fit {name}: got one of {float(peak.max()):g}, expected finite "
                f"ones up to {torch.finfo(self.dtype).max:g}; check the encoder's weights and "
                "preprocessing"
            )
        return Coded(self.to_numpy(tokens.to(self.dtype)), None, int((rounded == 0).sum()))

    def decode(self, coded: Tensor, scale: Tensor | None, orders: Orders) -> Tensor:
        return self.from_stored(coded).float()

    def to_numpy(self, coded: Tensor) -> npt.NDArray[np.generic]:
        found: npt.NDArray[np.generic] = coded.cpu().numpy()
        return found

    def from_stored(self, coded: Tensor) -> Tensor:
        return coded


class Float16Coder(FloatCoder):
    """float16: 11 bits, up to 65504."""

    dtype = torch.float16


class BFloat16Coder(FloatCoder):
    """bfloat16 as uint16 bit patterns (numpy has no bfloat16): 8 bits, the range of float32."""

    dtype = torch.bfloat16

    def to_numpy(self, coded: Tensor) -> npt.NDArray[np.generic]:
        return coded.view(torch.int16).cpu().numpy().view(np.uint16)

    def from_stored(self, coded: Tensor) -> Tensor:
        return coded.view(torch.bfloat16)


class ScaledCoder:
    """Integer levels of a rotated token, and one scale a token; an all-zero token is all zeros."""

    dtype: torch.dtype
    values_per_item: int

    @torch.no_grad()
    def encode(self, tokens: Tensor, orders: Orders) -> Coded:
        n, num_tokens, width = tokens.shape
        shape = (n * num_tokens, width // self.values_per_item)
        coded = torch.empty(shape, dtype=self.dtype, device=tokens.device)
        scale = torch.empty(shape[0], device=tokens.device)
        norm = math.sqrt(1 / width) if orders else 1.0
        for part, rows in _chunks(tokens):
            levels, unit = self.quantise(_rotate(rows, orders))
            coded[part] = levels.T
            scale[part] = unit * norm
        stored = scale.half()
        if not torch.isfinite(stored).all():
            refuse_non_finite(tokens)
            raise DataError(
                f"a token's scale does not fit float16: got {float(scale.max()):g}, expected one "
                "up to 65504; check the encoder's weights and preprocessing, or use --codec bf16"
            )
        # the scale is zero for zero tokens, and for them alone
        stored = torch.where(scale > 0, stored.clamp_min(_SMALLEST_SCALE), stored)
        return Coded(
            coded.view(n, num_tokens, -1).cpu().numpy(),
            stored.view(n, num_tokens).cpu().numpy(),
            int((scale == 0).sum()),
        )

    @torch.no_grad()
    def decode(self, coded: Tensor, scale: Tensor | None, orders: Orders) -> Tensor:
        n, num_tokens, items = coded.shape
        width = items * self.values_per_item
        tokens = torch.empty(n, num_tokens, width, device=coded.device)
        flat, scales = tokens.view(-1, width), None if scale is None else scale.reshape(-1, 1)
        signs = _signs(width, coded.device) * math.sqrt(1 / width)
        for part, rows in _chunks(coded):
            values = self.values(rows)
            if orders:
                values = hadamard.inverse(values, orders).mul_(signs)
            if scales is not None:
                values.mul_(scales[part].float())
            flat[part] = values
        return tokens

    def quantise(self, columns_DN: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated tokens as columns, used up -> stored items [D or D/2, N] and the unit float32
        [N] of each token's levels, 0 for a zero token."""
        raise NotImplementedError

    def values(self, coded: Tensor) -> Tensor:
        """Stored items [N, D or D/2] -> level values float32 [N, D]; 0 for a zero token."""
        raise NotImplementedError


class Int8Coder(ScaledCoder):
    """-127..127, the largest absolute value of the rotated token at 127."""

    dtype = torch.int8
    values_per_item = 1

    def quantise(self, columns_DN: Tensor) -> tuple[Tensor, Tensor]:
        peak = columns_DN.abs().amax(0)
        zero = peak < _TINIEST
        unit = peak * (1 / 127)
        # 127 after rounding at most: peak / unit is 127 up to the last bit
        levels = columns_DN.div_(unit.masked_fill(zero, 1)).round_()
        return levels.to(torch.int8), unit.masked_fill(zero, 0)

    def values(self, coded: Tensor) -> Tensor:
        return coded.float()


class Int4Coder(ScaledCoder):
    """16 Lloyd-Max levels of the Gaussian that a rotated token over its rms is close to.

    Code 0 is the lowest level, 15 the highest; two codes a byte, the first in the low nibble. A
    token that is not zero has a mean square of 1, so not all of its values are at level 0 (-2.73):
    zero bytes stand for the zero token alone.
    """

    dtype = torch.uint8
    values_per_item = 2

    def quantise(self, columns_DN: Tensor) -> tuple[Tensor, Tensor]:
        zero = columns_DN.abs().amax(0) < _TINIEST
        rms = _sum_in_pairs(columns_DN * columns_DN).mul_(1 / len(columns_DN)).sqrt_()
        codes = _codes(columns_DN.div_(rms.masked_fill(zero, 1)))
        packed = codes[0::2] | codes[1::2] << 4
        return packed.masked_fill_(zero, 0), rms.masked_fill(zero, 0)

    def values(self, coded: Tensor) -> Tensor:
        pairs = _nibble_pairs(coded.device)
        found = pairs.index_select(0, coded.reshape(-1).int()).view(len(coded), -1)
        return found.mul_(coded.amax(1, keepdim=True) > 0)


def refuse_non_finite(tokens: Tensor) -> None:
    """Raises DataError when tokens [n, T, D] hold NaN or infinity, naming how many do."""
    bad = ~torch.isfinite(tokens).all(-1)
    if bad.any():
        raise DataError(
            f"{int(bad.sum())} of {bad.numel()} teacher tokens hold NaN or infinity (images "
            f"{_first(bad.any(-1))} of the batch): check the encoder's weights and preprocessing, "
            "or run it in float32"
        )


def _first(mask: Tensor) -> str:
    """The first places where a mask [n] is true, as "3, 4, 9, ..."."""
    found = mask.nonzero().flatten().tolist()
    return ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "")


def _chunks(tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(place among the N, rows [k, D]) of tokens [n, T, D], k bounded whatever n and T are."""
    n, num_tokens, width = tokens.shape
    size = max(1, _CHUNK_VALUES.get(tokens.device.type, 2**18) // width)
    images = max(1, size // max(1, num_tokens))
    for first in range(0, n, images):
        rows = tokens[first : first + images].reshape(-1, width)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            place = first * num_tokens + start
            yield slice(place, place + len(part)), part


def _rotate(rows: Tensor, orders: Orders) -> Tensor:
    """Tokens [k, D] -> H (s * x), unnormalised, as columns float32 [D, k]; without `orders` the
    tokens themselves."""
    columns = torch.empty(rows.shape[::-1], device=rows.device)
    columns.copy_(rows.T)
    if not orders:
        return columns
    columns.mul_(_signs(len(columns), columns.device)[:, None])
    return hadamard.transform(columns, orders)


# Made once a device: a copy to it waits for what it computes.
@functools.lru_cache(maxsize=16)
def _nibble_pairs(device: torch.device) -> Tensor:
    """float32 [256, 2]: the levels of a byte's low and high nibble."""
    ascending = torch.tensor([-level for level in reversed(LEVELS)] + list(LEVELS))
    byte = torch.arange(256)
    return torch.stack([ascending[byte & 15], ascending[byte >> 4]], 1).to(device)


@functools.lru_cache(maxsize=16)
def _signs(width: int, device: torch.device) -> Tensor:
    return torch.from_numpy(hadamard.signs(width)).to(device)


def _sum_in_pairs(rows: Tensor) -> Tensor:
    """Sum over the first axis, in an order that depends on its length alone; rows are used up."""
    while len(rows) % 2 == 0:
        half = len(rows) // 2
        rows = rows[:half].add_(rows[half:])
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total


def _codes(z: Tensor) -> Tensor:
    """Codes 0..15 uint8 of values in units of their rms: 8 + k above zero, 7 - k below."""
    size = z.abs()
    codes = torch.zeros_like(z, dtype=torch.uint8)
    for threshold in THRESHOLDS:
        codes += (size > threshold).view(torch.uint8)
    # 15 ^ (8 + k) is 7 - k
    return codes.bitwise_xor_(8).bitwise_xor_((z < 0).view(torch.uint8) * 15)
