"""The sets of images that a network judges: samples in their three forms, and a source's rows.

Each says what identifies it (`of`, which enters the fingerprint of its features) without reading
pixels, and is opened again in the worker.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EncodeConfig
from repa_pipeline.data.array import ArraySpec, open_sealed
from repa_pipeline.data.image import decode_image
from repa_pipeline.data.index import Index, open_index
from repa_pipeline.data.items import Item
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.shards import as_rows
from repa_pipeline.data.source import open_source
from repa_pipeline.engine.contracts import Shard
from repa_pipeline.errors import DamagedError, DataError, MismatchError
from repa_pipeline.metrics.adm_file import MEMBER, adm_shape, read_adm
from repa_pipeline.stages.images import load_images, read_images
from repa_pipeline.stages.index import cache_store, listing_digest, open_config_source
from repa_pipeline.stages.judge import of_samples
from repa_pipeline.stages.sample_labels import stands_by_class
from repa_pipeline.weights import file_sha256

IMAGES = "images"
SHARD_ROWS = 256
_LOCAL_HEADER_BYTES = 30

Images = npt.NDArray[np.uint8]
Read = Callable[[Shard], Images]


class ImageSet(Protocol):
    """Images uint8 [R, R, 3] in an order that is part of what they are. Picklable."""

    @property
    def resolution(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def shard_rows(self) -> int: ...

    @property
    def of(self) -> Mapping[str, Any]:
        """What identifies the images."""
        ...

    def check(self) -> None:
        """Before any forward pass, in the driver: raises DataError for what cannot be read."""
        ...

    def open(self) -> Read:
        """In the worker: the function of a shard, uint8 [n, R, R, 3]."""
        ...


@dataclasses.dataclass(frozen=True)
class SampleImages:
    """The sealed array `images` of a sample folder."""

    url: str
    spec: ArraySpec

    @property
    def resolution(self) -> int:
        return self.spec.layout.shape[0]

    @property
    def num_rows(self) -> int:
        return self.spec.num_rows

    @property
    def shard_rows(self) -> int:
        return self.spec.layout.shard_rows

    @property
    def of(self) -> Mapping[str, Any]:
        return of_samples(self.spec)

    def check(self) -> None:
        open_sealed(open_store(self.url), IMAGES, "sample").check_present()

    def open(self) -> Read:
        array = open_sealed(open_store(self.url), IMAGES, "sample")
        if array.spec.fingerprint != self.spec.fingerprint:
            raise MismatchError(f"{array.where} became other samples meanwhile: start again")
        buffer = array.new_buffer()

        def read(shard: Shard) -> Images:
            rows = as_rows(array.read_shard(shard.index, buffer), array.spec.layout)
            return rows.astype(np.uint8, copy=False)

        return read


def sample_images(url: str) -> SampleImages:
    """The images of a sample folder; raises as `open_sealed`."""
    return SampleImages(url, open_sealed(open_store(url), IMAGES, "sample").spec)


@dataclasses.dataclass(frozen=True)
class AdmImages:
    """The first `num_rows` images of an ADM-style npz; crc: the zip's own checksum of all."""

    path: str
    resolution: int
    num_rows: int
    crc: int
    sha256: str
    shard_rows: int = SHARD_ROWS

    @property
    def of(self) -> Mapping[str, Any]:
        return {"npz_sha256": self.sha256}

    def check(self) -> None:
        for _ in read_adm(self.path):
            pass

    def open(self) -> Read:
        """Raises DamagedError when this machine has another file at that path."""
        archive = zipfile.ZipFile(self.path)
        info = archive.getinfo(MEMBER)
        if info.CRC != self.crc:
            raise DamagedError(f"{self.path} here is another file than the driver's: copy it again")
        record = self.resolution * self.resolution * 3
        stream = _seekable(archive, info)
        first = stream.seek(0, 2) - adm_shape(self.path)[0] * record

        def read(shard: Shard) -> Images:
            stream.seek(first + shard.start * record)
            data = stream.read(shard.num_rows * record)
            if len(data) != shard.num_rows * record:
                raise DamagedError(f"{self.path} ends too early: fetch it again")
            return np.frombuffer(data, np.uint8).reshape(-1, self.resolution, self.resolution, 3)

        return read


def adm_images(path: Path, num_rows: int | None = None) -> AdmImages:
    """The images of an npz, or the first `num_rows`; raises as `adm_shape`, MismatchError for
    images that are not square."""
    count, height, width, _ = adm_shape(path)
    if height != width:
        raise MismatchError(f"images of {path} are {height}x{width}: expected square ones")
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo(MEMBER).CRC
    wanted = count if num_rows is None else min(num_rows, count)
    return AdmImages(str(path.resolve()), height, wanted, crc, file_sha256(path))


def _seekable(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes] | _Window:
    """The member as a file: where it lies uncompressed a view of the archive itself, for a seek
    in a zip's member reads all that lies before."""
    if info.compress_type != zipfile.ZIP_STORED:
        return archive.open(info)
    assert archive.filename is not None
    file = open(archive.filename, "rb")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return _Window(file, info.header_offset + _LOCAL_HEADER_BYTES + lengths, info.file_size)


class _Window:
    """Bytes [start, start + size) of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (self._size if whence == 2 else 0)
        return self._file.seek(self._start + position) - self._start

    def read(self, num_bytes: int) -> bytes:
        return self._file.read(num_bytes)


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """Pictures of the samples' own size, in a webdataset or a folder, in the source's order;
    by_class: they stand class by class, as sub-folders of classes do."""

    source: str
    scratch: str | None
    scratch_gb: float
    decode_threads: int
    resolution: int
    num_rows: int
    listing: str
    by_class: bool
    shard_rows: int = SHARD_ROWS

    @property
    def of(self) -> Mapping[str, Any]:
        return {"listing": self.listing}

    def check(self) -> None:
        return

    def open(self) -> Read:
        source = open_source(
            self.source,
            scratch_dir=self.scratch,
            scratch_limit_bytes=int(self.scratch_gb * 2**30),
        )
        items = source.items()
        if listing_digest(items) != self.listing:
            raise MismatchError(f"{self.source} lists other images here than in the driver")

        def read(shard: Shard) -> Images:
            wanted = items[shard.start : shard.stop]
            images = np.empty((len(wanted), self.resolution, self.resolution, 3), np.uint8)

            def decode(i: int, data: bytes) -> None:
                images[i] = _picture(wanted[i], data, self.resolution)

            read_images(source, wanted, decode, self.decode_threads)
            return images

        return read


def source_images(
    url: str, scratch: str | None, scratch_gb: float, decode_threads: int
) -> SourceImages:
    """The pictures of a source as samples; their size is the first one's.

    Raises MissingError for no source, DataError for one without pictures.
    """
    source = open_source(url, scratch_dir=scratch, scratch_limit_bytes=int(scratch_gb * 2**30))
    items = source.items()
    if not items:
        raise DataError(f"{url} holds no images: check --samples")
    first = decode_image(source.read(items[0]), upright=False).image
    return SourceImages(
        source=url,
        scratch=scratch,
        scratch_gb=scratch_gb,
        decode_threads=decode_threads,
        resolution=first.height,
        num_rows=len(items),
        listing=listing_digest(items),
        by_class=stands_by_class(np.array([item.label or 0 for item in items])),
    )


def _picture(item: Item, data: bytes, resolution: int) -> Images:
    image = decode_image(data, upright=False).image
    if image.size != (resolution, resolution):
        raise MismatchError(
            f"picture {item.key} ({item.path}) is {image.width}x{image.height}, expected "
            f"{resolution}x{resolution}: samples are scored as they are, all of one size"
        )
    return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class IndexedImages:
    """The rows of an index, cropped as the encoders see them."""

    config: EncodeConfig
    num_rows: int
    shard_rows: int
    rows_digest: str

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def of(self) -> Mapping[str, Any]:
        crop = {"crop": "adm-center", "exif": self.config.exif}
        return {"rows_digest": self.rows_digest, "prepare": crop}

    def check(self) -> None:
        return

    def open(self) -> Read:
        source, index = open_config_source(self.config), open_index(cache_store(self.config))

        def read(shard: Shard) -> Images:
            return load_images(source, index.rows(shard.start, shard.stop), self.config)[0]

        return read


def indexed_images(config: EncodeConfig, index: Index) -> IndexedImages:
    """The rows of `index`, which is that of the workspace of `config`."""
    manifest = index.manifest
    config = dataclasses.replace(config, **manifest["decode"])
    return IndexedImages(config, index.num_rows, manifest["shard_rows"], manifest["rows_digest"])
