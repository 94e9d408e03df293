"""The shard format: every byte at its documented offset, every damaged byte found."""

from __future__ import annotations

import hashlib
import struct

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest

from repa_pipeline.data.shards import (
    RecordLayout,
    as_rows,
    check_shard,
    pack_into,
    pack_shard,
    read_records,
)
from repa_pipeline.errors import DamagedError, UnknownNameError

LAYOUT = RecordLayout((2, 3), "float16", 5)
DTYPES = ["float16", "float32", "uint8", "int8", "uint16"]


def crc32c(data: bytes) -> int:
    """Castagnoli, bit by bit from its definition (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def some_records(count: int, layout: RecordLayout, seed: int = 0) -> npt.NDArray[np.generic]:
    """Records of every bit pattern, NaN and the fill value among them."""
    data = np.random.default_rng(seed).integers(0, 256, count * layout.record_bytes, np.uint8)
    return data.view(layout.dtype).reshape(count, *layout.shape)


def test_sizes() -> None:
    latents = RecordLayout((8, 32, 32), "float16", 512)
    assert (latents.record_bytes, latents.stride) == (16_384, 16_388)
    assert latents.shard_bytes(512) == 512 * 16_388 + 512 * 16 + 4
    assert latents.num_shards(1_281_167) == 2503
    assert latents.rows_of(2501, 1_281_167) == 512
    assert latents.rows_of(2502, 1_281_167) == 143
    assert latents.num_shards(512) == 1 and latents.num_shards(513) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_every_byte_at_its_offset(dtype: str, num_rows: int) -> None:
    layout = RecordLayout((2, 3), dtype, 5)
    records = some_records(num_rows, layout)
    shard = bytes(pack_shard(records, layout))
    expected, size = b"", layout.record_bytes
    for i in range(num_rows):
        payload = records[i].tobytes()
        assert shard[i * (size + 4) :][:size] == payload
        assert struct.unpack_from("<I", shard, i * (size + 4) + size) == (crc32c(payload),)
        expected += payload + struct.pack("<I", crc32c(payload))
    index = b"".join(struct.pack("<QQ", i * (size + 4), size + 4) for i in range(num_rows))
    index += struct.pack("<QQ", 2**64 - 1, 2**64 - 1) * (5 - num_rows)
    assert shard == expected + index + struct.pack("<I", crc32c(index))
    assert len(shard) == layout.shard_bytes(num_rows)


@pytest.mark.parametrize("shape", [(2, 3), (7,)])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_packing_over_rubbish_is_packing(shape: tuple[int, ...], num_rows: int) -> None:
    """A reused buffer holds what an earlier, other shard left in it."""
    layout = RecordLayout(shape, "float16", 5)
    records = some_records(num_rows, layout)
    buffer = bytearray(b"\xa5" * layout.shard_bytes(num_rows))
    digest = pack_into(memoryview(buffer), records, layout)
    assert buffer == pack_shard(records, layout)
    crcs = b"".join(struct.pack("<I", crc32c(record.tobytes())) for record in records)
    assert digest == "rows-crc32c:" + hashlib.sha256(crcs).hexdigest()
    assert check_shard(buffer, num_rows, layout, "x")[1] == digest


def test_the_digest_tells_shards_apart() -> None:
    records = some_records(5, LAYOUT)
    digests = {
        check_shard(pack_shard(part, LAYOUT), len(part), LAYOUT, "x")[1]
        for part in (records, records[:4], records[::-1], some_records(5, LAYOUT, seed=1))
    }
    assert len(digests) == 4


def test_an_unknown_container_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'tar': this package knows zarr, webdataset"):
        RecordLayout((2, 3), "float16", 5, "tar")


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == google_crc32c.value(b"123456789") == 0xE3069283


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: str) -> None:
    layout = RecordLayout((3, 4), dtype, 7)
    records = some_records(6, layout)
    shard = pack_shard(records, layout)
    read = as_rows(read_records(shard, 6, layout, "here"), layout)
    assert read.dtype == records.dtype and read.tobytes() == records.tobytes()
    some = as_rows(read_records(memoryview(shard), 6, layout, "here")[[4, 0, 4]], layout)
    assert some.tobytes() == records[[4, 0, 4]].tobytes() and some.flags.c_contiguous


def test_records_in_any_memory_order() -> None:
    records = some_records(5, LAYOUT)
    for view in (np.asfortranarray(records), np.repeat(records, 2, axis=0)[::2]):
        assert pack_shard(view, LAYOUT) == pack_shard(records, LAYOUT)


def test_records_of_another_kind_are_a_bug_of_the_caller() -> None:
    for records in (
        np.zeros((2, 3, 2), "f2"),
        np.zeros((2, 2, 3), "f4"),
        np.zeros((1, 2, 3), ">f2"),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            pack_shard(records, LAYOUT)


def test_damaged_rows_are_named() -> None:
    shard = pack_shard(some_records(5, LAYOUT), LAYOUT)
    shard[3 * LAYOUT.stride] ^= 1
    with pytest.raises(DamagedError, match=r"^a/x: row 3 fails its crc32c .*; run `repa repair`$"):
        read_records(shard, 5, LAYOUT, "a/x")
    shard[4 * LAYOUT.stride] ^= 1
    with pytest.raises(DamagedError, match=r"^a/x: rows 13, 14 fail their crc32c .*; do this$"):
        check_shard(shard, 5, LAYOUT, "a/x", 10, "do this")
    many = RecordLayout((2,), "int8", 40)
    with pytest.raises(DamagedError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7 and 32 more fail their"):
        read_records(b"\1" * many.shard_bytes(40), 40, many, "x")


@pytest.mark.parametrize("num_rows", [5, 2])
def test_a_flip_of_any_byte_is_found(num_rows: int) -> None:
    shard = pack_shard(some_records(num_rows, LAYOUT), LAYOUT)
    body = num_rows * LAYOUT.stride
    for position in range(len(shard)):
        shard[position] ^= 0x10
        if position < body:
            expected = f"row {position // LAYOUT.stride} fails its crc32c"
        else:
            expected = "the shard index is damaged"
        with pytest.raises(DamagedError, match=expected):
            read_records(shard, num_rows, LAYOUT, "x")
        shard[position] ^= 0x10
    assert len(read_records(shard, num_rows, LAYOUT, "x")) == num_rows


def test_another_length_or_row_count_is_found() -> None:
    shard = bytes(pack_shard(some_records(5, LAYOUT), LAYOUT))
    for data in (shard[:-1], shard + b"\0", b"", shard[: LAYOUT.shard_bytes(4)], shard * 2):
        with pytest.raises(
            DamagedError, match=f"got {len(data)} bytes, expected {len(shard)}; run"
        ):
            read_records(data, 5, LAYOUT, "x")
    with pytest.raises(DamagedError, match="truncated or foreign"):
        read_records(shard, 4, LAYOUT, "x")
    foreign = bytes(range(256)) * (len(shard) // 256 + 1)
    with pytest.raises(DamagedError, match="rows 0, 1, 2, 3, 4 fail"):
        read_records(foreign[: len(shard)], 5, LAYOUT, "x")


def test_a_sound_index_of_another_partition_is_refused() -> None:
    """Records and checksums right, offsets swapped: the reader does not follow an index."""
    shard = pack_shard(some_records(2, LAYOUT), LAYOUT)
    body = 2 * LAYOUT.stride
    index = bytes(shard[body : body + 80])
    swapped = index[16:32] + index[:16] + index[32:]
    shard[body:] = swapped + struct.pack("<I", google_crc32c.value(swapped))
    with pytest.raises(DamagedError, match="the shard index is damaged"):
        read_records(shard, 2, LAYOUT, "x")
