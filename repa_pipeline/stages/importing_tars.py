"""What is in the webdataset tars of an export: the samples, their labels, where members lie."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from repa_pipeline.data.archives import find_archives
from repa_pipeline.data.files import Files
from repa_pipeline.data.image import decode_image
from repa_pipeline.data.index import content_digest
from repa_pipeline.data.items import IMAGE_EXTENSIONS
from repa_pipeline.data.patterns import archive_kind, is_gzipped, names_archives
from repa_pipeline.data.remote import in_parallel, open_filesystem
from repa_pipeline.data.tarscan import split_member_name
from repa_pipeline.errors import DataError, MissingError
from repa_pipeline.stages.exporting import RECORD, STATE

_SMALL_BYTES = 2**20
_LARGEST_IMAGE = 2**28


@dataclasses.dataclass(frozen=True)
class Place:
    """Bytes of a member: `num_bytes` from `offset` on."""

    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """The image of a sample: where it is, its content_digest and size."""

    place: Place
    digest: str
    width: int
    height: int


@dataclasses.dataclass
class Sample:
    """One sample of a tar. arrays: its .npy members by name ('moments', 'dinov2-b')."""

    key: str
    tar: str
    label: int | None = None
    source_key: str | None = None
    image: Picture | None = None
    arrays: dict[str, Place] = dataclasses.field(default_factory=dict)

    @property
    def row_key(self) -> str:
        """What the row is called in the index."""
        return self.source_key or self.key


@dataclasses.dataclass(frozen=True)
class Tars:
    """The samples of all tars in order, and export.json where there is one."""

    url: str
    samples: tuple[Sample, ...]
    record: Mapping[str, Any]


def scan_tars(url: str) -> Tars:
    """Reads the headers and small members of every tar of a folder, pattern or URL.

    Raises MissingError or DataError: no tars, an export that did not finish or lost a tar, a
    damaged tar, a sample without what the others have.
    """
    files, names = _tars_of(url)
    record = _record(files, url)
    _check_whole(files, names, record, url)
    scanned = in_parallel(lambda name: _scan(files, name), names)
    samples = tuple(sample for tar in scanned for sample in tar)
    if not samples:
        raise MissingError(f"no samples in the {len(names)} tars of {url}")
    _check_alike(samples)
    return Tars(url, samples, record)


def _tars_of(url: str) -> tuple[Files, list[str]]:
    files = Files(*open_filesystem(url))
    if names_archives(url) and not files.is_folder():
        files, names = find_archives(url)
    else:
        try:
            entries = files.entries(sizes=False)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(f"no folder of tars at '{url}': check the path") from None
        names = [e.name for e in entries if not e.is_folder and archive_kind(e.name) == "tar"]
        if any(entry.name == "array.json" for entry in entries):
            raise DataError(
                f"{url} is one array of a cache, without labels: copy the cache with `repa copy`, "
                "or import an export of it (`repa export --to webdataset`)"
            )
    if not names:
        raise MissingError(f"no tars in '{url}': expected those of `repa export --to webdataset`")
    packed = [name for name in names if is_gzipped(name)]
    if packed:
        raise DataError(f"{packed[0]} is compressed: unpack it, members are read by byte range")
    return files, names


def _record(files: Files, url: str) -> Mapping[str, Any]:
    if files.is_file(RECORD):
        try:
            record: Any = json.loads(files.read(RECORD, files.size(RECORD)))
        except ValueError as error:
            raise DataError(f"{RECORD} of {url} is not JSON: {error}; export again") from None
        if not _is_record(record):
            raise DataError(
                f"{RECORD} of {url} is not that of an export: remove it, or export again"
            )
        found: Mapping[str, Any] = record
        return found
    if files.is_file(f"{STATE}/identity.json"):
        raise DataError(
            f"the export in {url} did not finish (no {RECORD}): run the same `repa export` again"
        )
    return {}


def _is_record(record: Any) -> bool:
    """Whether a JSON value has the parts that are looked into, each of the right kind."""
    if not isinstance(record, dict):
        return False
    members, tars = record.get("members", {}), record.get("tars", [])
    parts = [record.get("index", {}), record.get("identity", {}), members]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(tars, list):
        return False
    about = list(members.values())
    return all(
        isinstance(a, dict) and isinstance(a.get("manifest", {}), dict) for a in about
    ) and all(
        isinstance(tar, dict) and {"name", "num_bytes", "digest"} <= tar.keys() for tar in tars
    )


def _check_whole(files: Files, names: list[str], record: Mapping[str, Any], url: str) -> None:
    for tar in record.get("tars", ()):
        if tar["name"] not in names or files.size(tar["name"]) != tar["num_bytes"]:
            raise DataError(
                f"{tar['name']} of {url} is missing or not {tar['num_bytes']} bytes long: the "
                "first of the export that is; restore it or export again"
            )


def _scan(files: Files, name: str) -> list[Sample]:
    samples: dict[str, Sample] = {}
    try:
        with files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                parts = split_member_name(member.name)
                if parts is not None and member.isreg():
                    sample = samples.setdefault(parts[0], Sample(parts[0], name))
                    _add_member(sample, member, parts[1], file)
            file.seek(tar.offset)
            if len(file.read(512)) < 512:
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{name} is not a whole tar: {error}; copy it again") from None
    return list(samples.values())


def _add_member(sample: Sample, member: tarfile.TarInfo, extension: str, file: BinaryIO) -> None:
    place = Place(member.offset_data, member.size)
    if extension.endswith(".npy"):
        sample.arrays[extension.removesuffix(".npy")] = place
    elif extension in IMAGE_EXTENSIONS:
        data = _read(member, file, _LARGEST_IMAGE)
        image = decode_image(data)
        sample.image = Picture(place, content_digest(data), image.width, image.height)
    elif extension in ("cls", "json"):
        content = _read(member, file, _SMALL_BYTES)
        try:
            if extension == "cls":
                sample.label = int(content)
            else:
                sample.source_key = str(json.loads(content)["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{member.name} in {sample.tar} is unusable ({error}): expected a class number or "
                "the JSON of an export"
            ) from None


def _read(member: tarfile.TarInfo, file: BinaryIO, limit: int) -> bytes:
    if member.size > limit:
        raise DataError(f"{member.name} has {member.size} bytes: expected at most {limit}")
    position = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(position)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _check_alike(samples: tuple[Sample, ...]) -> None:
    first = samples[0]
    keys: dict[str, Sample] = {}
    source_keys: dict[str, Sample] = {}
    for sample in samples:
        where = f"sample '{sample.key}' in {sample.tar}"
        if keys.setdefault(sample.key, sample) is not sample:
            raise DataError(f"{where} is also in {keys[sample.key].tar}: keys must be unique")
        other = source_keys.setdefault(sample.row_key, sample)
        if other is not sample:
            raise DataError(
                f"{where} and '{other.key}' in {other.tar} both say they are '{sample.row_key}': "
                "keys must be unique; export again"
            )
        if sample.label is None or sample.label < 0:
            raise DataError(f"{where} has no class: expected a .cls member with a number")
        if sample.arrays.keys() != first.arrays.keys() or not sample.arrays:
            raise DataError(
                f"{where} has arrays {sorted(sample.arrays)}, the first sample "
                f"{sorted(first.arrays)}: export again"
            )
        if (sample.image is None) != (first.image is None):
            raise DataError(f"{where}: some samples have an image and some have none")
