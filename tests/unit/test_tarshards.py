"""The webdataset container: plain tar readers see the records, every damaged byte is found."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

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
from repa_pipeline.data.tarshards import member_header, npy_header
from repa_pipeline.errors import DamagedError

DTYPES = ["float16", "float32", "uint8", "int8", "uint16"]
SHAPES = [(2, 3), (7,), (100, 8), (1, 1, 5)]
FIRST_ROW = 1_281_024
LAYOUT = RecordLayout((2, 3), "float16", 5, "webdataset")


def some_records(count: int, layout: RecordLayout, seed: int = 0) -> npt.NDArray[np.generic]:
    """Records of every bit pattern, NaN and zarr's fill values among them."""
    data = np.random.default_rng(seed).integers(0, 256, count * layout.record_bytes, np.uint8)
    return data.view(layout.dtype).reshape(count, *layout.shape)


def slow_tar(records: npt.NDArray[np.generic], first_row: int) -> tuple[bytes, str]:
    """The same shard through tarfile and numpy's own writer, and its digest."""
    tar, crcs = b"", b""
    for i, record in enumerate(records):
        content = io.BytesIO()
        np.lib.format.write_array(content, record, version=(1, 0))
        info = tarfile.TarInfo(f"{first_row + i:09d}.npy")
        info.size = len(content.getvalue())
        padded = content.getvalue() + bytes(-info.size % 512)
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT) + padded)
        block[329:345] = bytes(16)  # device numbers: some versions of tarfile write zeros in octal
        block[500:508] = b"%08x" % google_crc32c.value(padded)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        tar += block
        crcs += google_crc32c.value(bytes(block)).to_bytes(4, "little")
    return tar + bytes(1024), "rows-crc32c:" + hashlib.sha256(crcs).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_way(dtype: str, shape: tuple[int, ...]) -> None:
    layout = RecordLayout(shape, dtype, 5, "webdataset")
    for num_rows in (1, 5):
        records = some_records(num_rows, layout)
        expected, digest = slow_tar(records, FIRST_ROW)
        buffer = memoryview(bytearray(b"\xa5" * layout.shard_bytes(num_rows)))
        assert pack_into(buffer, records, layout, FIRST_ROW) == digest
        assert bytes(buffer) == expected == pack_shard(records, layout, FIRST_ROW)
        read, found = check_shard(buffer, num_rows, layout, "x", FIRST_ROW)
        assert found == digest and as_rows(read, layout).tobytes() == records.tobytes()
        assert np.shares_memory(read, np.frombuffer(buffer, np.uint8))


def test_offsets() -> None:
    layout = RecordLayout((256, 768), "int8", 512, "webdataset")
    assert layout.record_offset == 512 + 128
    assert layout.stride == 512 + 512 + 196_608 and layout.stride % 512 == 0
    assert layout.shard_bytes(3) == 3 * layout.stride + 1024
    shard = pack_shard(some_records(2, layout), layout)
    assert shard[:13] == b"000000000.npy" and shard[layout.stride :][:13] == b"000000001.npy"
    start = layout.stride + 640
    assert shard[start : start + 196_608] == some_records(2, layout)[1].tobytes()


def test_npy_header_is_numpys() -> None:
    for shape in [(3,), (256, 768), (1, 2, 3, 4), (123456, 7)]:
        for dtype in DTYPES:
            theirs = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                theirs, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            )
            header = npy_header(shape, dtype)
            read = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
            assert read == (shape, False, np.dtype(dtype)) and len(header) % 64 == 0
            assert header.split(b"}")[0] == theirs.getvalue().split(b"}")[0]


def test_member_header_is_a_valid_one() -> None:
    for row, size in ((0, 0), (999_999_999, 2**33 - 1), (FIRST_ROW, 196_736)):
        info = tarfile.TarInfo.frombuf(member_header(row, size, 0xDEADBEEF), "ascii", "strict")
        assert (info.name, info.size) == (f"{row:09d}.npy", size)
        assert (info.mode, info.uid, info.gid, info.mtime) == (0o644, 0, 0, 0)
        assert (info.uname, info.gname, info.isreg()) == ("", "", True)


@pytest.fixture(params=DTYPES)
def shard_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, RecordLayout]:
    layout = RecordLayout((4, 33), request.param, 9, "webdataset")
    path = tmp_path / "000002.tar"
    path.write_bytes(pack_shard(some_records(9, layout), layout, 18))
    return path, layout


def test_tarfile_reads_it(shard_file: tuple[Path, RecordLayout]) -> None:
    path, layout = shard_file
    for mode in ("r:", "r|"):
        with tarfile.open(path, mode) as tar:
            for row, member in enumerate(tar, 18):
                assert member.name == f"{row:09d}.npy"
                file = tar.extractfile(member)
                assert file is not None
                value = np.load(io.BytesIO(file.read()), allow_pickle=False)
                expected = some_records(9, layout)[row - 18]
                assert value.dtype == expected.dtype and value.tobytes() == expected.tobytes()
                assert value.shape == expected.shape
        assert row == 26


def test_webdataset_reads_it(shard_file: tuple[Path, RecordLayout]) -> None:
    webdataset = pytest.importorskip("webdataset")
    path, layout = shard_file
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(18, 27)]
    values = np.stack([sample["npy"] for sample in samples])
    expected = some_records(9, layout)
    assert values.dtype == expected.dtype and values.shape == expected.shape
    assert values.tobytes() == expected.tobytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
def test_the_tar_command_reads_it(shard_file: tuple[Path, RecordLayout], tmp_path: Path) -> None:
    path, layout = shard_file
    subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True, capture_output=True)
    values = [np.load(tmp_path / f"{row:09d}.npy", allow_pickle=False) for row in range(18, 27)]
    assert np.stack(values).tobytes() == some_records(9, layout).tobytes()


@pytest.mark.parametrize("num_rows", [5, 2])
def test_a_flip_of_any_byte_is_found(num_rows: int) -> None:
    shard = pack_shard(some_records(num_rows, LAYOUT), LAYOUT, 10)
    body = num_rows * LAYOUT.stride
    for position in range(len(shard)):
        shard[position] ^= 0x10
        expected = "the end of the tar is damaged"
        if position < body:
            expected = f"row {10 + position // LAYOUT.stride} fails its crc32c"
        with pytest.raises(DamagedError, match=expected):
            read_records(shard, num_rows, LAYOUT, "x", 10)
        shard[position] ^= 0x10
    assert len(read_records(shard, num_rows, LAYOUT, "x", 10)) == num_rows


def test_another_length_row_or_kind_is_found() -> None:
    shard = bytes(pack_shard(some_records(5, LAYOUT), LAYOUT))
    for data in (shard[:-512], shard + bytes(512), b"", shard[: LAYOUT.shard_bytes(4)]):
        with pytest.raises(
            DamagedError, match=f"got {len(data)} bytes, expected {len(shard)}; run `repa repair`"
        ):
            read_records(data, 5, LAYOUT, "x")
    with pytest.raises(DamagedError, match="rows 5, 6, 7, 8, 9 fail their"):
        read_records(shard, 5, LAYOUT, "x", 5)
    other = RecordLayout((3, 2), "float16", 5, "webdataset")
    assert other.shard_bytes(5) == len(shard)
    with pytest.raises(DamagedError, match="rows 0, 1, 2, 3, 4 fail their"):
        read_records(shard, 5, other, "x")
    foreign, _ = slow_tar(some_records(5, LAYOUT), 0)
    assert foreign == shard
    without_crc = bytearray(foreign)
    without_crc[500:508] = bytes(8)
    with pytest.raises(DamagedError, match="row 0 fails its"):
        read_records(without_crc, 5, LAYOUT, "x")


def test_records_in_any_memory_order() -> None:
    records = some_records(5, LAYOUT)
    for view in (np.asfortranarray(records), np.repeat(records, 2, axis=0)[::2]):
        assert pack_shard(view, LAYOUT) == pack_shard(records, LAYOUT)
