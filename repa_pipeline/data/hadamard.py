"""The signed Hadamard rotation that spreads a token's outlier channels over all of its width.

A token x of width D becomes y = H (s * x) / sqrt(D), with signs s and H = kron of Hadamard
matrices: Paley's of order 12 and 20, Sylvester's for the powers of 2 (768 = 12 x 64). The rotation
is orthogonal: it keeps lengths and angles.

`transform` adds and subtracts in a fixed order, element by element, and calls no BLAS: what comes
out is the same bits for every batch size, number of threads and device, and TF32 cannot touch it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIGN_SEED = 2410
# the largest matrix `inverse` multiplies by, where it can choose
_MAX_RIGHT = 128

Matrix = npt.NDArray[np.int8]


@functools.cache
def factors(width: int) -> tuple[int, ...]:
    """Orders of the Hadamard matrices whose kron has order `width`: 1152 -> (12, 12, 8).

    Empty where there is none among powers of 2 times 12s and 20s, and for a width of 1.
    """
    if width < 2:
        return ()
    found: list[int] = []
    for prime, order in ((3, 12), (5, 20)):
        while width % prime == 0:
            if width % order:
                return ()
            found.append(order)
            width //= order
    if not _is_sylvester(width):
        return ()
    return (*found, width) if width > 1 else tuple(found)


def rotation_name(width: int) -> str:
    """What a manifest calls the rotation of `width`: "hadamard-12x64", or "none"."""
    orders = factors(width)
    return f"hadamard-{'x'.join(map(str, orders))}" if orders else "none"


@functools.cache
def signs(width: int) -> npt.NDArray[np.float32]:
    """+1 or -1 a channel, [D]: the top bits of PCG64's raw stream, equal on every platform."""
    raw = np.random.PCG64(SIGN_SEED).random_raw(width)
    return np.where(raw >> np.uint64(63), -1, 1).astype(np.float32)


@functools.cache
def paley(order: int) -> Matrix:
    """Hadamard matrix int8 of `order` = q + 1, q a prime of 4k + 3 (Paley's first construction).

    Rows are negated to begin with +1.
    """
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)], np.int8)
    matrix = np.ones((order, order), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    matrix[1:, 1:] += np.eye(q, dtype=np.int8)
    return matrix * matrix[:, :1]


def sylvester(order: int) -> Matrix:
    """Hadamard matrix int8 of a power of 2, in natural order."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def matrix(orders: tuple[int, ...]) -> Matrix:
    """H int8 [D, D], the kron of the Hadamard matrices of `orders`; H H^T = D * identity."""
    made = np.ones((1, 1), np.int8)
    for order in orders:
        made = np.kron(made, sylvester(order) if _is_sylvester(order) else paley(order))
    return made


def transform(columns_DN: Tensor, orders: tuple[int, ...]) -> Tensor:
    """H @ columns, unnormalised; tokens are columns, float32 [D, n] contiguous, and are used up.

    n log2(D) or so additions, in the same order for every token.
    """
    import torch

    x, spare = columns_DN, torch.empty_like(columns_DN)
    outer, inner = 1, x.numel()
    for order in orders:
        inner //= order
        if not _is_sylvester(order):
            shape = (outer, order, inner)
            _paley_transform(x.view(shape), spare.view(shape), paley(order))
        for half in _halves(order) if _is_sylvester(order) else ():
            shape = (outer * order // (2 * half), 2, half * inner)
            a, b = x.view(shape).unbind(1)
            torch.add(a, b, out=spare.view(shape)[:, 0])
            torch.sub(a, b, out=spare.view(shape)[:, 1])
            x, spare = spare, x
        outer *= order
    return x.view_as(columns_DN)


def inverse(rows: Tensor, orders: tuple[int, ...]) -> Tensor:
    """H^T @ row for each row, unnormalised: float32 [n, D] -> [n, D], by two small matmuls.

    Exact, thus equal in every order of summation, for integers whose sums stay below 2^24.
    """
    import torch

    left, right = (_on_device(part, rows.dtype, rows.device) for part in _two_parts(orders))
    with torch.autocast(rows.device.type, enabled=False):
        halfway = rows.reshape(-1, len(right)) @ right
        return torch.matmul(left.T, halfway.view(-1, len(left), len(right))).view_as(rows)


@functools.lru_cache(maxsize=32)
def _on_device(orders: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`matrix(orders)` there, made once: a copy to a device waits for what it computes."""
    import torch

    return torch.from_numpy(matrix(orders)).to(device, dtype)


def _is_sylvester(order: int) -> bool:
    return order & (order - 1) == 0


@functools.cache
def _two_parts(orders: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`orders` cut where the right-hand part stays small: (12, 12, 8) -> (12,), (12, 8)."""
    last = orders[-1]
    if last > _MAX_RIGHT:
        small = 1 << last.bit_length() // 2
        orders = (*orders[:-1], last // small, small)
    cut = len(orders) - 1
    while cut and math.prod(orders[cut - 1 :]) <= _MAX_RIGHT:
        cut -= 1
    return orders[:cut], orders[cut:]


def _halves(order: int) -> list[int]:
    """8 -> [4, 2, 1]."""
    return [1 << bit for bit in reversed(range(order.bit_length() - 1))]


def _paley_transform(x: Tensor, spare: Tensor, matrix: Matrix) -> None:
    """x [outer, order, inner] becomes matrix @ x along the middle; spare is overwritten.

    Each row of the matrix is a signed sum of a + b and a - b over pairs (a, b) of x, which halves
    the additions.
    """
    import torch

    torch.add(x[:, 0::2], x[:, 1::2], out=spare[:, 0::2])
    torch.sub(x[:, 0::2], x[:, 1::2], out=spare[:, 1::2])
    for row, coefficients in enumerate(matrix.tolist()):
        first, second = coefficients[0::2], coefficients[1::2]
        terms = [spare[:, 2 * p + (first[p] != second[p])] for p in range(len(first))]
        # first[0] is +1: rows begin so
        torch.add(terms[0], terms[1], alpha=first[1], out=x[:, row])
        for term, sign in zip(terms[2:], first[2:], strict=True):
            x[:, row].add_(term, alpha=sign)
