"""The ADM suite's `.npz`: images at `arr_0`, uint8 NHWC in file order, written and read in blocks.

50,000 images of 256 x 256 are 9.83 GB, so nothing here holds all of them, and the zip is zip64.
Equal images give equal bytes: stored uncompressed, fixed timestamps, our own array header.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import (
    DamagedError,
    DataError,
    MismatchError,
    MissingError,
    StageError,
)

MEMBER, SETTINGS_MEMBER = "arr_0.npy", "settings.npy"
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError)


class AdmWriter:
    """Streams uint8 images into an `.npz`; the file appears, whole, when the `with` block ends.

        with AdmWriter("samples.npz", num_images=50_000, resolution=256) as writer:
            writer.write(images)  # uint8 [B, 256, 256, 3], in order

    Until then the bytes are as `whole_file` has them; an exception, or another number of images
    than promised (DataError), leaves no file. `settings`, any text, stands behind the images as an
    array of its own, which the suite's reader does not look at.
    """

    def __init__(
        self, path: str | Path, *, num_images: int, resolution: int, settings: str | None = None
    ) -> None:
        self.path = Path(path)
        self.shape = (num_images, resolution, resolution, 3)
        self.num_written = 0
        self._settings = settings
        self._stack = ExitStack()

    def __enter__(self) -> AdmWriter:
        file = self._stack.enter_context(whole_file(self.path))
        self._stack.push(self._finish)
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._stream = self._zip.open(_member(MEMBER), "w", force_zip64=True)
        self._stream.write(_array_header(self.shape))
        return self

    def write(self, images: NDArray[np.uint8]) -> None:
        """Appends images uint8 [B, R, R, 3]; raises MismatchError on any other shape or dtype."""
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise MismatchError(
                f"images are {images.dtype} of shape {images.shape}: "
                f"expected uint8 [B, {', '.join(map(str, self.shape[1:]))}]"
            )
        self._stream.write(np.ascontiguousarray(images).data)
        self.num_written += len(images)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._zip:
            self._stream.close()
            if kind is None and self.num_written != self.shape[0]:
                raise DataError(
                    f"{self.path} got {self.num_written} images, expected {self.shape[0]}: "
                    "nothing was written; sample the missing ones and write it again"
                )
            if self._settings is not None and kind is None:
                text = io.BytesIO()
                np.save(text, np.array(self._settings), allow_pickle=False)
                self._zip.writestr(_member(SETTINGS_MEMBER), text.getvalue())


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path`, whole, when the block ends well.

    Until then the bytes are in `PATH.partial`, which an exception removes; what a killed writer
    left there is written anew. Raises StageError while another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        if not _is_ours_alone(file, partial):
            raise StageError(
                f"{path} is being written by another process: wait for it, then run this again"
            )
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _is_ours_alone(file: IO[bytes], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    # Another one may have finished, and moved it away, between our opening and our lock.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def read_adm_settings(path: str | Path) -> str | None:
    """The settings text in an `.npz` of samples, None without one; errors as read_adm."""
    with _readable(Path(path)), np.load(path, allow_pickle=False) as stored:
        name = SETTINGS_MEMBER.removesuffix(".npy")
        if name not in stored.files:
            return None
        with contextlib.suppress(ValueError):  # of objects: somebody else's
            return str(stored[name])
    return None


def adm_shape(path: str | Path) -> tuple[int, int, int, int]:
    """Shape (N, H, W, 3) of the images in an `.npz`, without reading them; errors as read_adm."""
    with _open_images(Path(path)) as (_, shape):
        return shape


def read_adm(path: str | Path, *, block_images: int = 256) -> Iterator[NDArray[np.uint8]]:
    """Yields the images of an `.npz` in file order as uint8 [B, H, W, 3], the last block shorter.

    Holds one block. Raises MissingError without the file, DamagedError when it is cut short or
    its checksum is wrong, DataError when `arr_0` is absent or is not uint8 NHWC with 3 channels.
    """
    with _open_images(Path(path)) as (stream, shape):
        for start in range(0, shape[0], block_images):
            count = min(block_images, shape[0] - start)
            num_bytes = count * shape[1] * shape[2] * shape[3]
            data = stream.read(num_bytes)
            if len(data) != num_bytes:
                raise DamagedError(
                    f"{path} ends after {start} of {shape[0]} images: fetch it again"
                )
            yield np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:])


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean [D], covariance [D, D] of pool features, and of spatial ones where stored; float64."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    mu_s: NDArray[np.float64] | None
    sigma_s: NDArray[np.float64] | None


def read_reference_statistics(path: str | Path) -> ReferenceStatistics:
    """Reads `mu`, `sigma` and, where present, `mu_s`, `sigma_s` of a reference `.npz`.

    Raises MissingError without the file, DamagedError when it is no `.npz`, DataError when it has
    no statistics (a file of samples has none).
    """
    path = Path(path)
    with _readable(path), np.load(path, allow_pickle=False) as stored:
        absent = [key for key in ("mu", "sigma") if key not in stored]
        if absent:
            raise DataError(
                f"{path} has no {' and no '.join(absent)} (it has {', '.join(stored.files)}): "
                "expected a reference file, not a file of samples"
            )
        keys = ("mu", "sigma", "mu_s", "sigma_s")
        found = {key: stored[key].astype(np.float64) for key in keys if key in stored}
    return ReferenceStatistics(found["mu"], found["sigma"], found.get("mu_s"), found.get("sigma_s"))


def _member(name: str) -> zipfile.ZipInfo:
    """An entry whose bytes are the same on every machine and day."""
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3  # else it names the operating system
    member.external_attr = 0o600 << 16
    return member


def _array_header(shape: tuple[int, ...]) -> bytes:
    """Header of npy format 1.0; numpy's own differs in padding between its versions."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    prefix = len(np.lib.format.magic(1, 0)) + 2
    padding = -(prefix + len(text) + 1) % 64
    body = (text + " " * padding + "\n").encode("latin1")
    return np.lib.format.magic(1, 0) + len(body).to_bytes(2, "little") + body


@contextmanager
def _open_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    with _readable(path), zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            raise DataError(f"{path} has no arr_0 (it has {', '.join(archive.namelist())})")
        with archive.open(MEMBER) as stream:
            yield stream, _image_shape(stream, path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise MissingError(f"no file {path}: give the path of an .npz of images")
    if not zipfile.is_zipfile(path):
        raise DamagedError(f"{path} is no .npz (or is cut short): fetch it again")
    try:
        yield
    except (DataError, MissingError):
        raise
    except UNREADABLE as error:
        raise DamagedError(f"cannot read {path} as .npz ({error}): fetch it again") from None


def _image_shape(stream: IO[bytes], path: Path) -> tuple[int, int, int, int]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise DataError(f"{path}: arr_0 is in npy format {version}, expected 1.0 or 2.0")
    shape, fortran_order, dtype = read(stream)
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
        raise DataError(
            f"{path}: arr_0 is {dtype} of shape {shape}{' in Fortran order' * fortran_order}, "
            "expected uint8 [N, H, W, 3]"
        )
    return shape
