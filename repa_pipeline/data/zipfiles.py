"""Zips as a tree of files: the central directory is read once, members by byte range.

Nothing is extracted by name. Stored and deflated members; an item's offset is that of the
member's local header, whose sizes and crc32 are checked at every read.
"""

from __future__ import annotations

import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence

from repa_pipeline.data.coalesce import Extent, coalesce, read_extents
from repa_pipeline.data.files import Descriptors, Entry, Files, changed
from repa_pipeline.data.items import IMAGE_EXTENSIONS, Item, is_image_name
from repa_pipeline.data.remote import in_parallel
from repa_pipeline.data.tree import Member
from repa_pipeline.errors import DataError, MissingError

MAX_MEMBER_BYTES = 2 * 2**30
MAX_RATIO = 1000

_HEADER = struct.Struct("<4sHHHHHIIIHH")
_MAGIC, _DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x07\x08"
_ENCRYPTED, _STREAMED = 0x1, 0x8
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DESCRIPTOR_BYTES = 24
# The local header's extra field is of unknown length: 28 bytes as Info-ZIP writes it.
_HEADER_ALLOWANCE = 128
_FOREIGN_FOLDER = "__MACOSX"
_READ_EXTENSIONS = tuple(f".{name}" for name in (*sorted(IMAGE_EXTENSIONS), "npy", "json"))


class ZipTree:
    """The members of one or several zips below one root. Safe to use from several threads.

    A single folder that holds everything else in folders (`zip -r train.zip train`) is the root.
    """

    def __init__(self, files: Files, names: Sequence[str]):
        self._files = files
        self._names = sorted(names)
        self.is_remote = not files.is_local
        self._descriptors = Descriptors()
        self._lock = threading.Lock()
        self._members: dict[str, list[Member]] | None = None

    def top(self) -> list[Entry]:
        """The first level; raises MissingError or DataError for what is no whole, usable zip."""
        by_folder = self._by_folder()
        folders = [Entry(name, True, 0) for name in by_folder if name]
        return sorted([*folders, *(Entry(m.name, False, m.num_bytes) for m in self.top_files())])

    def top_files(self) -> list[Member]:
        return list(self._by_folder().get("", []))

    def walk(self, folders: Sequence[str]) -> list[list[Member]]:
        by_folder = self._by_folder()
        return [list(by_folder.get(folder, [])) for folder in folders]

    def find(self, name: str) -> Member | None:
        folder = name.partition("/")[0] if "/" in name else ""
        return next((m for m in self._by_folder().get(folder, []) if m.name == name), None)

    def read(self, item: Item) -> bytes:
        """The member's bytes, unpacked, sizes and crc32 checked; raises DamagedError."""
        extent = _extent(item)
        data = self._fetch(item.path, extent.start, extent.stop - extent.start)
        return self._unpacked(item, data)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return coalesce([_extent(item) if self.is_remote else None for item in items])

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        """The members' bytes by one request, where they are of one remote zip."""
        extents = [_extent(item) for item in items]
        if not self.is_remote or len({extent.path for extent in extents}) != 1:
            return [self.read(item) for item in items]

        def fetch(start: int, num_bytes: int) -> bytes:
            return self._fetch(extents[0].path, start, num_bytes)

        pieces = read_extents(fetch, extents)
        return [self._unpacked(*pair) for pair in zip(items, pieces, strict=True)]

    def _by_folder(self) -> dict[str, list[Member]]:
        """Sorted members by their first folder, "" for those without one."""
        with self._lock:
            if self._members is None:
                listed = in_parallel(self._list, self._names)
                members = _below_wrapper([member for members in listed for member in members])
                by_folder: dict[str, list[Member]] = {}
                for member in sorted(members):
                    folder = member.name.partition("/")[0] if "/" in member.name else ""
                    by_folder.setdefault(folder, []).append(member)
                self._members = by_folder
            return self._members

    def _list(self, name: str) -> list[Member]:
        try:
            with self._files.open(name) as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except FileNotFoundError:
            raise MissingError(f"no zip {self._files.path(name)}: check the path") from None
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
            raise DataError(f"{name} is not a whole zip: {error}; copy it again") from None
        members = [info for info in infos if _is_visible(info)]
        for info in members:
            _check_usable(info, name)
        return [Member(i.filename, name, i.header_offset, i.file_size) for i in members]

    def _fetch(self, name: str, start: int, num_bytes: int) -> bytes:
        if self.is_remote:
            return self._files.read_range(name, start, num_bytes, to_end=True)

        def open_fd() -> int:
            return os.open(self._files.path(name), os.O_RDONLY | os.O_CLOEXEC)

        return self._descriptors.read_range(name, open_fd, start, num_bytes, to_end=True)

    def _unpacked(self, item: Item, data: bytes) -> bytes:
        def more(num_bytes: int) -> bytes:
            return self._fetch(item.path, item.offset, num_bytes)

        return unpack_member(data, item, more)


def unpack_member(data: bytes, item: Item, more: Callable[[int], bytes]) -> bytes:
    """The bytes of a zip's member; `data` begins with its local header.

    more(num_bytes): the data from the header on, longer, for when it does not suffice.
    Raises DamagedError when there is no such member, or its crc32 is wrong.
    """
    place = f"{item.path} at byte {item.offset}"
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise changed(f"there is no member of a zip in {place}")
    _, _, flags, method, _, _, crc, _, size, name_length, extra_length = _HEADER.unpack_from(data)
    if method not in _METHODS or flags & _ENCRYPTED:
        raise changed(f"the member in {place} is encrypted or packed by method {method}")
    is_streamed = bool(flags & _STREAMED)
    if not is_streamed and size not in (item.num_bytes, 0xFFFFFFFF):
        raise changed(f"the member in {place} has {size} bytes, not {item.num_bytes}")
    start = _HEADER.size + name_length + extra_length
    tail = _DESCRIPTOR_BYTES if is_streamed else 0
    unpack = _inflated if method == zipfile.ZIP_DEFLATED else _stored
    found = unpack(data, start, item.num_bytes, tail)
    if found is None:
        # A deflated member may be longer than its content by 5 bytes in 16 KiB.
        longest = start + item.num_bytes + item.num_bytes // 1000 + 1024 + tail
        found = unpack(more(longest), start, item.num_bytes, tail)
    if found is None or len(found[0]) != item.num_bytes:
        raise changed(f"the member in {place} is not {item.num_bytes} bytes long")
    content, behind = found
    if zlib.crc32(content) != (_descriptor_crc(behind) if is_streamed else crc):
        raise changed(f"the member in {place} has a wrong crc32")
    return content


def _stored(data: bytes, start: int, num_bytes: int, tail: int) -> tuple[bytes, bytes] | None:
    """The content and what follows it; None when the data does not reach so far."""
    end = start + num_bytes
    return (data[start:end], data[end : end + tail]) if len(data) >= end + tail else None


def _inflated(data: bytes, start: int, num_bytes: int, tail: int) -> tuple[bytes, bytes] | None:
    """As `_stored`; content of another length when the data is not deflated or too long."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(memoryview(data)[start:], num_bytes + 1)
    except zlib.error:
        return bytes(num_bytes + 1), b""
    if len(content) > num_bytes:
        return content, b""
    is_whole = inflate.eof and len(inflate.unused_data) >= tail
    return (content, inflate.unused_data[:tail]) if is_whole else None


def _descriptor_crc(behind: bytes) -> int:
    return int.from_bytes(behind.removeprefix(_DESCRIPTOR_MAGIC)[:4], "little")


def _extent(item: Item) -> Extent:
    header = _HEADER.size + len(item.key.encode()) + _HEADER_ALLOWANCE
    return Extent(item.path, item.offset, item.offset + header + item.num_bytes)


def _is_visible(info: zipfile.ZipInfo) -> bool:
    parts = info.filename.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return not info.is_dir() and not hidden and parts[0] != _FOREIGN_FOLDER


def _check_usable(info: zipfile.ZipInfo, path: str) -> None:
    if not info.filename.lower().endswith(_READ_EXTENSIONS):
        return
    place = f"{info.filename} in {path}"
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{place} is encrypted: pack it again without a password")
    if info.compress_type not in _METHODS:
        raise DataError(
            f"{place} is packed by method {info.compress_type}: expected stored or deflated, "
            "pack it again with `zip -0`"
        )
    if info.file_size > MAX_MEMBER_BYTES:
        raise DataError(f"{place} unpacks to {info.file_size} bytes: expected at most 2 GiB")
    if info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise DataError(
            f"{place} unpacks to {info.file_size} bytes from {info.compress_size}, more than "
            f"{MAX_RATIO} times as much: no image does, remove it"
        )


def _below_wrapper(members: list[Member]) -> list[Member]:
    """Members named below the single folder that wraps folders of images, if there is one."""
    parts = [member.name.split("/", 2) for member in members]
    if len({p[0] for p in parts}) != 1 or any(len(p) == 1 for p in parts):
        return members
    if any(len(p) == 2 and is_image_name(p[1]) for p in parts) or max(map(len, parts)) < 3:
        return members
    skip = len(parts[0][0]) + 1
    return _below_wrapper([member._replace(name=member.name[skip:]) for member in members])
