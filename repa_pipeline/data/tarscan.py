"""Samples of a webdataset tar: members grouped by key, the image's place and the label."""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from typing import Any, BinaryIO

from repa_pipeline.data.items import IMAGE_EXTENSIONS, Item
from repa_pipeline.errors import DataError

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_BLOCK_BYTES = 512
_MAX_LABEL_BYTES = 2**20
_MAX_IMAGE_BYTES = 2 * 2**30


@dataclasses.dataclass
class _Sample:
    members: list[str] = dataclasses.field(default_factory=list)
    image: tarfile.TarInfo | None = None
    label: int | None = None
    label_member: str = ""


def scan_tar(file: BinaryIO, path: str) -> list[Item]:
    """The samples of an open plain tar; `path` is what items and messages call it.

    A sample's key is its members' path up to the first dot of the base name (the webdataset
    rule; a leading './' is dropped). Labels come from `.cls` (an integer) or `.json` ("label" or
    "cls"); other members are ignored. Raises DataError: not a whole tar, a sample without an
    image or with two, an unusable label.
    """
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _add_member(samples, member, file, path)
            _check_end(file, tar, path)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a whole tar: {error}; copy it again") from None
    return [_item(key, sample, path) for key, sample in samples.items()]


def split_member_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member; None for hidden names and names without a dot."""
    match = _KEY_AND_EXTENSION.fullmatch(name.removeprefix("./"))
    return None if match is None else (match[1], match[2].lower())


def is_header_of(block: bytes, num_bytes: int) -> bool:
    """Whether 512 bytes are a valid header of a member of this size."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size == num_bytes
    except tarfile.TarError:
        return False


def _add_member(
    samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO, path: str
) -> None:
    parts = split_member_name(member.name)
    if parts is None or not member.isreg():
        return
    key, extension = parts
    sample = samples.setdefault(key, _Sample())
    sample.members.append(member.name)
    if extension in IMAGE_EXTENSIONS:
        if sample.image is not None:
            raise DataError(
                f"key '{key}' occurs twice, as {sample.image.name} at byte "
                f"{sample.image.offset_data} and as {member.name} at byte {member.offset_data} "
                f"of {path}: expected one image a sample, remove or rename one"
            )
        if member.issparse():
            raise DataError(f"{member.name} in {path} is stored sparse: pack the tar without -S")
        if member.size > _MAX_IMAGE_BYTES:
            raise DataError(
                f"{member.name} in {path} has {member.size} bytes: expected at most 2 GiB"
            )
        sample.image = member
    elif extension in ("cls", "json"):
        _add_label(sample, _label(file, member, extension, path), member.name, path)


def _add_label(sample: _Sample, label: int | None, member: str, path: str) -> None:
    if label is None:
        return
    if sample.label is not None and sample.label != label:
        raise DataError(
            f"two labels in {path}: {sample.label} by {sample.label_member}, {label} by {member}; "
            "remove one"
        )
    sample.label, sample.label_member = label, member


def _label(file: BinaryIO, member: tarfile.TarInfo, extension: str, path: str) -> int | None:
    if member.size > _MAX_LABEL_BYTES:
        raise DataError(f"{member.name} in {path} has {member.size} bytes: too large for a label")
    file.seek(member.offset_data)
    text = file.read(member.size)
    if len(text) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    try:
        label: Any = int(text) if extension == "cls" else _label_of_json(json.loads(text))
    except ValueError:
        label = text[:40].decode("utf-8", "replace")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(
            f"label of {member.name} in {path} is {label!r}: expected an integer of 0 or more"
        )
    return label


def _label_of_json(content: Any) -> Any:
    if not isinstance(content, dict):
        return None
    return content.get("label", content.get("cls"))


def _check_end(file: BinaryIO, tar: tarfile.TarFile, path: str) -> None:
    """A tar ends with a block of zeros; tarfile itself stops in silence at a damaged header."""
    file.seek(tar.offset)
    block = file.read(_BLOCK_BYTES)
    if len(block) < _BLOCK_BYTES or any(block):
        what = "a damaged header" if block else "no end mark"
        raise DataError(f"{path} is not a whole tar: {what} at byte {tar.offset}; copy it again")


def _item(key: str, sample: _Sample, path: str) -> Item:
    if sample.image is None:
        raise DataError(
            f"sample '{key}' in {path} has no image: found {', '.join(sample.members)}, "
            f"expected one of .{', .'.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return Item(key, sample.label, path, sample.image.offset_data, sample.image.size)
