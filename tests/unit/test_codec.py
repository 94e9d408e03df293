"""Codecs: what comes back, that bytes depend on a record's own tokens alone, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
from torch import Tensor

from repa_pipeline.data import coders, hadamard
from repa_pipeline.data.codec import CODECS, Codec, codec_of, encode_float, require
from repa_pipeline.data.coders import LEVELS, THRESHOLDS, Coded, Int4Coder, Int8Coder
from repa_pipeline.data.fidelity import Fidelity, fidelity, spatial_normalise
from repa_pipeline.data.numcodecs_codec import Int8, register
from repa_pipeline.errors import ConfigError, DataError, MismatchError, RepaError
from repa_pipeline.testing.tokens import OUTLIERS, outlier_tokens

LOSSY = ("int8", "int4")
BOTH = frozenset({"direction", "magnitude"})
ROTATED = {
    12: (12,), 20: (20,), 16: (16,), 128: (128,), 240: (12, 20), 384: (12, 32), 768: (12, 64),
    1024: (1024,), 1152: (12, 12, 8), 1280: (20, 64), 1408: (), 1536: (12, 128), 1: (), 0: (),
    36: (), 100: (), 320: (20, 16),
}  # fmt: skip


def decode(codec: Codec, coded: Coded, *, width: int, scale: bool = True) -> Tensor:
    stored = torch.from_numpy(coded.records)
    scales = torch.from_numpy(coded.scale) if scale and coded.scale is not None else None
    return codec.decoder(codec.manifest(width))(stored, scales)


def same(one: Coded, other: Coded) -> bool:
    scales = (one.scale, other.scale)
    return one.records.tobytes() == other.records.tobytes() and (
        scales[0] is None or scales[0].tobytes() == scales[1].tobytes()  # type: ignore[union-attr]
    )


def plain_rotation(width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """R with y = x @ R, dense, in float64."""
    signs = hadamard.signs(width).astype(np.float64)
    dense = hadamard.matrix(hadamard.factors(width)).astype(np.float64)
    return (dense * signs / math.sqrt(width)).T


# --- the rotation


@pytest.mark.parametrize("width", ROTATED)
def test_orders_of_the_rotation(width: int) -> None:
    orders = hadamard.factors(width)
    assert orders == ROTATED[width]
    name = "hadamard-" + "x".join(map(str, orders)) if orders else "none"
    assert hadamard.rotation_name(width) == name
    if orders:
        dense = hadamard.matrix(orders).astype(np.float32)
        assert (np.abs(dense) == 1).all()
        assert np.array_equal(dense @ dense.T, width * np.eye(width))


def test_hadamard_matrices_are_pinned() -> None:
    rows = ["".join("+-"[int(x < 0)] for x in row) for row in hadamard.paley(12)]
    assert rows[:3] == ["++++++++++++", "+-+-+++---+-", "+--+-+++---+"]
    assert [int(row.sum()) for row in hadamard.paley(20)[:2]] == [20, 0]
    assert hadamard.matrix((4,)).tolist() == [
        [1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1],
    ]  # fmt: skip
    kron = np.kron(hadamard.paley(12), hadamard.matrix((4,)))
    assert np.array_equal(hadamard.matrix((12, 4)), kron)


def test_signs_are_pinned() -> None:
    first = [1, -1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, 1, -1, -1, -1]
    assert hadamard.signs(768)[:16].tolist() == first == hadamard.signs(16).tolist()
    assert abs(hadamard.signs(4096).sum()) < 200


@pytest.mark.parametrize("width", [w for w, orders in ROTATED.items() if orders])
def test_fast_rotations_equal_the_dense_one(width: int) -> None:
    orders = hadamard.factors(width)
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    dense = torch.from_numpy(hadamard.matrix(orders)).double()
    forward = hadamard.transform(rows.T.contiguous(), orders)
    torch.testing.assert_close(forward.double(), dense @ rows.T.double(), rtol=0, atol=1e-4)
    back = hadamard.inverse(rows, orders)
    torch.testing.assert_close(back.double(), rows.double() @ dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [768, 1152, 1536])
def test_the_inverse_of_levels_is_exact(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (33, width), generator=generator).float()
    whole[0] = 127
    dense = torch.from_numpy(hadamard.matrix(hadamard.factors(width))).double()
    for rows in (whole, whole.sign() * LEVELS[-1], whole / 1024):
        expected = (rows.double() @ dense).float()
        assert torch.equal(hadamard.inverse(rows, hadamard.factors(width)), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(hadamard.inverse(rows, hadamard.factors(width)), expected)


def test_levels_are_lloyd_max_of_the_gaussian() -> None:
    """Each level is the mean of its cell, each threshold the middle of its levels."""
    edges = [0.0, *THRESHOLDS, math.inf]
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in edges]
    below = [math.erf(x / math.sqrt(2)) / 2 for x in edges]
    distortion = 1.0
    for k, level in enumerate(LEVELS):
        mass = below[k + 1] - below[k]
        mean = (density[k] - density[k + 1]) / mass
        assert level == pytest.approx(mean, abs=6e-4)
        assert (level * 1024).is_integer()
        distortion += 2 * (level**2 * mass - 2 * level * mean * mass)
    # Max's table I: 0.009497
    assert distortion == pytest.approx(0.009497, rel=5e-4)


# --- what is stored


@pytest.mark.parametrize("width", [384, 768, 1152, 1280])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_int8_equals_the_plain_path(outliers: str, width: int) -> None:
    tokens = outlier_tokens(2, 20, width, outliers)
    coded = CODECS["int8"].encode(tokens)
    rotated = tokens.double().numpy() @ plain_rotation(width)
    unit = np.abs(rotated).max(-1, keepdims=True) / 127
    check_levels(coded.records, rotated / unit, np.arange(-126.5, 127))
    assert coded.records.dtype == np.int8 and coded.records.shape == (2, 20, width)
    assert np.abs(coded.records.astype(int)).max(-1).tolist() == [[127] * 20] * 2
    assert coded.scale is not None and coded.scale.dtype == np.float16
    np.testing.assert_allclose(coded.scale, unit[..., 0], rtol=2**-11 + 1e-6)
    back = coded.records * coded.scale[..., None].astype(float) @ plain_rotation(width).T
    np.testing.assert_allclose(decode(CODECS["int8"], coded, width=width), back, atol=2e-5 * 127)


@pytest.mark.parametrize("width", [384, 768, 1152, 1280])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_int4_equals_the_plain_path(outliers: str, width: int) -> None:
    tokens = outlier_tokens(2, 20, width, outliers)
    coded = CODECS["int4"].encode(tokens)
    rotated = tokens.double().numpy() @ plain_rotation(width)
    rms = np.sqrt((rotated**2).mean(-1, keepdims=True))
    assert coded.records.dtype == np.uint8 and coded.records.shape == (2, 20, width // 2)
    packed = coded.records.astype(int)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(tokens.shape)
    inner = np.array([-t for t in reversed(THRESHOLDS)] + [0.0, *THRESHOLDS])
    check_levels(codes - 8, rotated / rms, inner)
    assert coded.scale is not None and coded.scale.dtype == np.float16
    np.testing.assert_allclose(coded.scale, rms[..., 0], rtol=2**-11 + 1e-6)
    levels = np.array([-x for x in reversed(LEVELS)] + list(LEVELS))
    back = levels[codes] * coded.scale[..., None].astype(float) @ plain_rotation(width).T
    np.testing.assert_allclose(decode(CODECS["int4"], coded, width=width), back, atol=1e-4)


def check_levels(got: Any, exact: Any, edges: Any) -> None:
    """`got` is the cell of `exact` between `edges`, but for values within 1e-4 of an edge."""
    cells = np.searchsorted(edges, exact)
    lowest = int(got.min() - cells.min())
    near = np.abs(exact[..., None] - edges).min(-1) < 1e-4
    assert near.mean() < 0.02
    assert np.array_equal(got[~near], cells[~near] + lowest)
    assert np.abs(got - cells - lowest).max() <= 1


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [384, 768])
def test_bytes_do_not_depend_on_the_batch(name: str, width: int) -> None:
    tokens = outlier_tokens(9, 49, width, "moderate")
    tokens[3, 5] = 0
    codec = CODECS[name]
    whole = codec.encode(tokens)
    for n in (1, 2, 5):
        parts = [codec.encode(tokens[i : i + n]) for i in range(0, 9, n)]
        assert np.concatenate([part.records for part in parts]).tobytes() == whole.records.tobytes()
        if whole.scale is not None:
            scales = np.concatenate([part.scale for part in parts if part.scale is not None])
            assert scales.tobytes() == whole.scale.tobytes()
    single = codec.encode(tokens.view(-1, 1, width))
    assert single.records.tobytes() == whole.records.tobytes()
    backwards = codec.encode(tokens.flip(0).contiguous())
    assert np.array_equal(backwards.records[::-1], whole.records)
    with_class = torch.cat([tokens[:, :1], tokens], 1)
    assert same(codec.encode(with_class[:, 1:]), whole)
    assert same(codec.encode(tokens.mT.contiguous().mT), whole)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_do_not_depend_on_threads_and_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = outlier_tokens(2, 196, 768, "severe")
    whole = CODECS[name].encode(tokens)
    decoded = decode(CODECS[name], whole, width=768)
    before = torch.get_num_threads()
    try:
        for threads, values in ((2, 2**25), (3, 2**17), (1, 7 * 768), (1, 1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(coders, "_CHUNK_VALUES", {"cpu": values})
            part = slice(None) if values > 1 else slice(0, 1)
            again = CODECS[name].encode(tokens[part])
            assert np.array_equal(again.records, whole.records[part])
            assert torch.equal(decode(CODECS[name], again, width=768), decoded[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 1280, 1536])
def test_a_gpu_makes_the_same_bytes(name: str, width: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = outlier_tokens(5, 256, width, "severe")
    tokens[1, 2] = 0
    codec = CODECS[name]
    coded = codec.encode(tokens)
    assert same(codec.encode(tokens.cuda()), coded)
    back = codec.decoder(codec.manifest(width))
    stored = torch.from_numpy(coded.records).cuda()
    scale = None if coded.scale is None else torch.from_numpy(coded.scale).cuda()
    assert torch.equal(back(stored, scale).cpu(), decode(codec, coded, width=width))


@pytest.mark.parametrize(("num_images", "num_tokens"), [(1, 1), (7, 3), (3, 500), (40, 9), (2, 0)])
def test_memory_of_a_step_is_bounded(num_images: int, num_tokens: int) -> None:
    width = 2048
    tokens = torch.arange(num_images * num_tokens).float().view(num_images, num_tokens, 1)
    parts = list(coders._chunks(tokens.expand(-1, -1, width)))
    assert all(rows.numel() <= 2**18 for _, rows in parts)
    covered = [row for place, _ in parts for row in range(place.start, place.stop)]
    assert covered == list(range(num_images * num_tokens))
    assert all(rows[:, 0].tolist() == covered[place] for place, rows in parts)


# --- zero tokens, scales, refusals


@pytest.mark.parametrize("name", CODECS)
def test_zero_tokens(name: str) -> None:
    tokens = outlier_tokens(2, 6, 96, "none")
    tokens[0, 4] = 0
    tokens[1, 0] = 0
    tokens[1, 1] = 1e-17  # below what any codec tells from zero, but for bf16
    codec = CODECS[name]
    coded = codec.encode(tokens)
    assert coded.num_zero_tokens == (2 if name == "bf16" else 3)
    zero = (coded.records == 0).all(-1)
    assert zero.sum() == coded.num_zero_tokens and zero[0, 4] and zero[1, 0]
    assert coded.scale is None or np.array_equal(coded.scale == 0, zero)
    for scale in (True, False):
        decoded = decode(codec, coded, width=96, scale=scale)
        assert np.array_equal((decoded == 0).all(-1), zero) and torch.isfinite(decoded).all()


def test_an_int4_token_of_one_value_is_not_zero() -> None:
    """Rotated it is a row of H, all values of one size: as near to all-lowest as one can be."""
    tokens = torch.zeros(1, 2, 24)
    direction = torch.from_numpy(plain_rotation(24)).float()
    tokens[0, 0] = -direction.sum(1)  # rotates to -1 everywhere
    tokens[0, 1] = -direction[:, 0] * 5  # rotates to -5 in the first place, else 0
    coded = CODECS["int4"].encode(tokens)
    assert coded.num_zero_tokens == 0
    assert coded.records[0, 0].tolist() == [4 | 4 << 4] * 12  # the level nearest to -1: -0.94
    assert coded.records[0, 1, 0] & 15 == 0 and (coded.records[0, 1] != 0).all()
    assert fidelity(tokens, decode(CODECS["int4"], coded, width=24)).worst_cosine > 0.9


@pytest.mark.parametrize("name", LOSSY)
def test_magnitude_comes_from_the_scale(name: str) -> None:
    codec = CODECS[name]
    tokens = outlier_tokens(1, 40, 384, "moderate")
    tokens *= torch.logspace(-4, 2, 40)[:, None]
    coded = codec.encode(tokens)
    assert codec.kept(with_scale=True) == BOTH
    assert codec.kept(with_scale=False) == {"direction"}
    with_scale = decode(codec, coded, width=384)
    bare = decode(codec, coded, width=384, scale=False)
    lengths = with_scale.norm(dim=-1) / tokens.norm(dim=-1)
    assert (lengths[0, 20:] - 1).abs().max() < (0.001 if name == "int8" else 0.02)
    cosines = torch.cosine_similarity(bare, with_scale, dim=-1)
    assert cosines.min() > 1 - 1e-6
    floor = 0.9998 if name == "int8" else 0.985
    assert torch.cosine_similarity(bare, tokens, dim=-1).min() > floor
    spread = bare.norm(dim=-1)
    assert spread.max() / spread.min() < 2  # tokens differ a millionfold: no magnitude left


@pytest.mark.parametrize("name", LOSSY)
def test_a_tiny_token_keeps_its_direction_and_a_scale(name: str) -> None:
    tokens = outlier_tokens(1, 3, 48, "none") * 1e-12
    coded = CODECS[name].encode(tokens)
    assert coded.num_zero_tokens == 0
    assert coded.scale is not None and coded.scale.tolist() == [[2.0**-24] * 3]
    assert fidelity(tokens, decode(CODECS[name], coded, width=48)).worst_cosine > 0.98


@pytest.mark.parametrize("name", CODECS)
def test_non_finite_tokens_are_refused(name: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        tokens = torch.ones(7, 8, 48)
        tokens[3, 2, 1] = bad
        tokens[3, 7, :] = bad
        for image in (4, 5, 6):
            tokens[image, 1, 47] = bad
        match = r"5 of 56 teacher tokens hold NaN or infinity \(images 3, 4, 5, \.\.\. of the batch"
        with pytest.raises(DataError, match=match):
            CODECS[name].encode(tokens)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", -7e4, r"do not fit float16: got one of 70000, expected finite ones up to 65504"),
        ("bf16", 3.4e38, "do not fit bfloat16: got one of 3.4e"),
        ("int8", 1e8, "a token's scale does not fit float16: got .* or use --codec bf16"),
        ("int8", 1e38, "a token's scale does not fit float16: got .* or use --codec bf16"),
        ("int4", 1e8, "a token's scale does not fit float16: got .* or use --codec bf16"),
        ("int4", 1e30, "a token's scale does not fit float16: got .* or use --codec bf16"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float, message: str) -> None:
    tokens = outlier_tokens(2, 3, 48, "none")
    tokens[1, 2, 3] = value
    with pytest.raises(DataError, match=message):
        CODECS[name].encode(tokens)


def test_fp16_bytes_are_numpys() -> None:
    tokens = outlier_tokens(2, 5, 30, "severe")
    tokens[0, 0, :4] = torch.tensor([1 + 2**-12, 65519.0, -6e-8, 0.1])
    coded = CODECS["fp16"].encode(tokens)
    assert coded.records.tobytes() == tokens.numpy().astype(np.float16).tobytes()
    assert coded.scale is None and CODECS["fp16"].kept(with_scale=False) == BOTH
    decoded = decode(CODECS["fp16"], coded, width=30)
    assert decoded.dtype == torch.float32
    assert decoded[0, 0, :4].tolist() == [1.0, 65504.0, -(2.0**-24), 0.0999755859375]


def test_bf16_is_rounded_to_nearest_even_bit_patterns() -> None:
    values = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3e38, 1e-40, 0.0, -0.0]
    coded = CODECS["bf16"].encode(torch.tensor(values).view(1, 1, 8))
    expected = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xFF62, 0x0001, 0x0000, 0x8000]
    assert coded.records.dtype == np.uint16 and coded.records.tolist() == [[expected]]
    decoded = decode(CODECS["bf16"], coded, width=8)
    assert decoded[0, 0, :4].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7]
    assert coded.scale is None and CODECS["bf16"].kept(with_scale=False) == BOTH


# --- cosine floors


def measure(name: str, tokens: Tensor, *, rotated: bool = True) -> Fidelity:
    coder = {"int8": Int8Coder, "int4": Int4Coder}[name]()
    orders = hadamard.factors(tokens.shape[-1]) if rotated else ()
    coded = coder.encode(tokens, orders)
    assert coded.scale is not None
    scale = torch.from_numpy(coded.scale)
    return fidelity(tokens, coder.decode(torch.from_numpy(coded.records), scale, orders))


@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_cosine_floors(outliers: str, width: int) -> None:
    tokens = outlier_tokens(2, 256, width, outliers, seed=1)
    int8, int4 = measure("int8", tokens), measure("int4", tokens)
    assert int8.mean_cosine > 0.99996 and int8.worst_cosine > 0.9998
    assert int8.spatial_error < 0.03
    assert int4.mean_cosine > 0.995 and int4.worst_cosine > 0.987
    # without the rotation both lose, and int4 all but breaks where there are outliers
    bare8, bare4 = measure("int8", tokens, rotated=False), measure("int4", tokens, rotated=False)
    assert bare8.mean_cosine < int8.mean_cosine and bare8.worst_cosine < int8.worst_cosine
    assert bare4.mean_cosine < int4.mean_cosine and bare4.worst_cosine < int4.worst_cosine
    if outliers == "severe":
        assert 1 - bare8.mean_cosine > 10 * (1 - int8.mean_cosine)
        assert bare8.spatial_error > 5 * int8.spatial_error
        assert bare4.mean_cosine < 0.85
    for name in ("fp16", "bf16"):
        decoded = decode(CODECS[name], CODECS[name].encode(tokens), width=width)
        assert fidelity(tokens, decoded).worst_cosine > 0.99999


def test_fidelity() -> None:
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert fidelity(tokens, tokens.clone()) == Fidelity(1.0, 1.0, 0.0)
    other = torch.tensor([[[4.0, 3.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
    got = fidelity(tokens, other)
    assert got.mean_cosine == pytest.approx((24 / 25 + 1 + 1 + 1) / 4)
    assert got.worst_cosine == pytest.approx(24 / 25)
    assert fidelity(tokens, torch.zeros_like(tokens)).mean_cosine == 0.25
    normal = spatial_normalise(tokens.double())
    by_hand = (tokens[0, :, 0] - 0.6 * 1.5) / 1.5
    torch.testing.assert_close(normal[0, :, 0], by_hand.double(), rtol=2e-6, atol=0)
    # a common factor of every token is what spatial normalisation takes out
    big = outlier_tokens(2, 9, 24, "none")
    assert fidelity(big, 3 * big).spatial_error < 1e-5
    noisy = big + 0.1 * big.std() * torch.randn(big.shape, generator=torch.manual_seed(0))
    target, found = spatial_normalise(big.double()), spatial_normalise(noisy.double())
    expected = float((found - target).norm() / target.norm())
    assert fidelity(big, noisy).spatial_error == pytest.approx(expected)


# --- the table


def test_manifests_and_shapes() -> None:
    rotated = {"rotation": "hadamard-12x64", "sign_seed": 2410}
    assert CODECS["fp16"].manifest(768) == {"name": "fp16", "version": 1, "width": 768}
    assert CODECS["bf16"].manifest(768) == {"name": "bf16", "version": 1, "width": 768}
    for name in LOSSY:
        manifest = {"name": name, "version": 1, "width": 768, **rotated}
        assert CODECS[name].manifest(768) == manifest
        assert codec_of({"codec": manifest}, "x") is CODECS[name]
    bare = {"name": "int8", "version": 1, "width": 1408, "rotation": "none"}
    assert CODECS["int8"].manifest(1408) == bare
    said = {name: (c.dtype, c.record_shape(256, 768), c.has_scale) for name, c in CODECS.items()}
    assert said == {
        "fp16": ("float16", (256, 768), False),
        "bf16": ("uint16", (256, 768), False),
        "int8": ("int8", (256, 768), True),
        "int4": ("uint8", (256, 384), True),
    }
    tokens = outlier_tokens(1, 4, 768, "none")
    for codec in CODECS.values():
        records = codec.encode(tokens).records
        assert records.dtype == codec.dtype and records.shape[1:] == codec.record_shape(4, 768)


def test_a_width_without_rotation() -> None:
    tokens = outlier_tokens(1, 16, 100, "none")
    coded = CODECS["int8"].encode(tokens)
    expected = tokens / tokens.abs().amax(-1, keepdim=True) * 127
    assert np.abs(coded.records - expected.numpy()).max() < 0.5 + 1e-4
    assert fidelity(tokens, decode(CODECS["int8"], coded, width=100)).mean_cosine > 0.9999
    message = "codec int4 needs a width .* got 100: use --codec fp16 or bf16 or int8"
    for refused in (CODECS["int4"].check, CODECS["int4"].manifest):
        with pytest.raises(ConfigError, match=message):
            refused(100)
    with pytest.raises(ConfigError, match=message):
        CODECS["int4"].encode(tokens)
    for name in ("fp16", "bf16", "int8"):
        CODECS[name].check(100)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    "change",
    [{"rotation": "hadamard-64x12"}, {"sign_seed": 7}, {"sign_seed": None}, {"rotation": None}],
)
def test_a_rotation_we_cannot_undo_is_refused(name: str, change: dict[str, Any]) -> None:
    stored = {**CODECS[name].manifest(768), **change}
    with pytest.raises(MismatchError, match="this package undoes hadamard-12x64 with 2410"):
        CODECS[name].decoder(stored)


def test_unrotated_int8_of_a_rotatable_width_is_read_as_it_says() -> None:
    tokens = outlier_tokens(1, 4, 768, "none")
    coded = Int8Coder().encode(tokens, ())
    assert coded.scale is not None
    stored = {"name": "int8", "version": 1, "width": 768, "rotation": "none"}
    back = CODECS["int8"].decoder(stored)
    decoded = back(torch.from_numpy(coded.records), torch.from_numpy(coded.scale))
    assert fidelity(tokens, decoded).mean_cosine > 0.9999
    with pytest.raises(MismatchError, match="stored as int4 rotated by none"):
        CODECS["int4"].decoder({**stored, "name": "int4"})


def test_codecs_and_objectives() -> None:
    require(CODECS["fp16"].kept(False), BOTH, "x", "codec fp16")
    require(CODECS["int8"].kept(True), BOTH, "x", "codec int8")
    with pytest.raises(MismatchError, match="smooth-L1 needs the magnitude .* codec int8"):
        require(CODECS["int8"].kept(False), BOTH, "smooth-L1", "codec int8")
    with pytest.raises(MismatchError, match="x is coded by int4 version 9, this package reads 1"):
        codec_of({"codec": {"name": "int4", "version": 9}}, "x")
    with pytest.raises(RepaError, match="unknown codec 'int9': did you mean"):
        codec_of({"codec": {"name": "int9", "version": 1}}, "x")


def test_the_table_imports_without_torch_and_numcodecs() -> None:
    code = (
        "import sys, repa_pipeline.data.codec as c; c.CODECS['int8'].manifest(768); "
        "sys.exit(bool({'torch', 'numcodecs', 'zarr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- latents


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents(dtype: str) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 8, 4, 4)).astype(np.float32)
    coded = encode_float(latents, dtype)
    assert coded.dtype == dtype and coded.tobytes() == latents.astype(dtype).tobytes()
    for bad in (math.nan, math.inf, -math.inf):
        latents[1, 2, 3, 3] = bad
        with pytest.raises(DataError, match=f"do not fit {dtype}: got one of {abs(bad):g}, exp"):
            encode_float(latents, dtype)
    latents[1, 2, 3, 3] = -7e4
    if dtype == "float32":
        assert encode_float(latents, dtype)[1, 2, 3, 3] == -7e4
    else:
        with pytest.raises(DataError, match="float16: got one of 70000, expected .* up to 65504"):
            encode_float(latents, dtype)


# --- numcodecs


@pytest.mark.parametrize("name", CODECS)
def test_numcodecs(name: str) -> None:
    register()
    tokens = outlier_tokens(2, 5, 96, "moderate")
    tokens[1, 3] = 0
    made = numcodecs.get_codec({"id": f"repa.{name}", "width": 96})
    assert made.get_config() == {"id": f"repa.{name}", "width": 96, "version": 1}
    again = numcodecs.get_codec(made.get_config())
    assert again == made and again.codec_id == f"repa.{name}"
    data = made.encode(tokens.numpy())
    coded = CODECS[name].encode(tokens)
    scale = b"" if coded.scale is None else coded.scale.tobytes()
    assert data == coded.records.tobytes() + scale
    decoded = again.decode(data)
    expected = decode(CODECS[name], coded, width=96).view(-1, 96).numpy()
    assert decoded.dtype == np.float32 and np.array_equal(decoded, expected)
    out = np.empty((2, 5, 96), np.float32)
    assert again.decode(bytearray(data), out=out) is out
    assert np.array_equal(out.reshape(-1, 96), expected)
    with pytest.raises(DataError, match="expected whole tokens of"):
        made.decode(data[:-1])
    with pytest.raises(DataError, match="got 95 values, expected whole tokens of 96"):
        made.encode(np.zeros(95, np.float32))


def test_numcodecs_refusals() -> None:
    register()
    with pytest.raises(MismatchError, match="coded by int8 version 2, this package reads 1"):
        Int8(96, version=2)
    with pytest.raises(ConfigError, match="codec int4 needs a width"):
        numcodecs.get_codec({"id": "repa.int4", "width": 100})
