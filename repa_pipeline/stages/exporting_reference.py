"""Export to the reference's format: a folder, or the same in one zip.

images/00000/img00000000.png             the crop the networks saw, uint8 RGB
vae-sd/00000/img-mean-std-00000000.npy   float32 [2C, h, w], mean and std
images/dataset.json, vae-sd/dataset.json {"labels": [[name, class], ...]} of either's names

The numbers follow the source's order, in which the rows were listed, so that images and latents
pair by sorted position as the reference pairs them. A cache imported from such a set gives its
own names back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.autoencoders import GAUSSIAN
from repa_pipeline.config import EncodeConfig
from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.data.index import Index
from repa_pipeline.data.objects import LocalStore, json_bytes
from repa_pipeline.data.source import Source
from repa_pipeline.engine.contracts import Commit, Commits, Shard, Wanted, Work
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError
from repa_pipeline.pictures import png_bytes
from repa_pipeline.stages.cached_rows import image_config
from repa_pipeline.stages.exporting import (
    RECORD,
    STATE,
    ExportOutput,
    ShardRows,
    choose_arrays,
    destination,
    shard_of,
)
from repa_pipeline.stages.images import Images, load_images
from repa_pipeline.stages.index import open_config_source

_KEPT_NAME = re.compile(r"(\d{5})/img(\d{8})\.png")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_NPY_HEADER_BYTES = 128
_counter = itertools.count()


@dataclasses.dataclass(frozen=True)
class Names:
    """File names of the rows: `positions` in the source's order, `kept` names of an import."""

    positions: npt.NDArray[np.int64]
    kept: tuple[str, ...] | None

    def image(self, row: int) -> str:
        """Below images/."""
        if self.kept is not None:
            return self.kept[row]
        number = f"{self.positions[row]:08d}"
        return f"{number[:5]}/img{number}.png"

    def latent(self, row: int) -> str:
        """Below vae-sd/."""
        folder, _, base = self.image(row).rpartition("/")
        return f"{folder}/img-mean-std-{base.removeprefix('img').removesuffix('.png')}.npy"


def names_of(index: Index) -> Names:
    """The names of every row of an index; names of the reference's own are kept."""
    keyed: list[tuple[str, int]] = []
    keys: list[str] = []
    for batch in index.batches(("path", "offset", "key")):
        paths, offsets, found = (column.to_pylist() for column in batch.columns)
        keyed += zip(paths, offsets, strict=True)
        keys += found
    order = sorted(range(len(keyed)), key=keyed.__getitem__)
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    ordered = [keys[row] for row in order]
    is_reference = all(map(_KEPT_NAME.fullmatch, ordered)) and ordered == sorted(ordered)
    return Names(positions, tuple(keys) if is_reference else None)


@dataclasses.dataclass(frozen=True)
class ReferenceExport:
    """The Stage; one output."""

    config: ExportConfig
    output: ReferenceFolder

    @property
    def name(self) -> str:
        return f"export to {self.output.where}"

    @property
    def outputs(self) -> tuple[ReferenceFolder, ...]:
        return (self.output,)

    def open(self, wanted: Wanted) -> Work:
        output = self.output
        exported = output.exported
        moments = ShardRows(exported.latents[0])
        if not output.with_images:
            return _ReferenceWork(output, exported.index, moments, None, None)
        images = image_config(self.config, exported.index, exported.any_manifest)
        source = open_config_source(images)
        return _ReferenceWork(output, exported.index, moments, images, source)


@dataclasses.dataclass(frozen=True)
class _ReferenceWork:
    output: ReferenceFolder
    index: Index
    moments: ShardRows
    images: EncodeConfig | None
    source: Source | None

    def load(self, shard: Shard) -> tuple[npt.NDArray[np.float32], Images | None]:
        moments = self.moments.rows(shard.start, shard.stop).astype(np.float32)
        if self.images is None or self.source is None:
            return moments, None
        rows = self.index.rows(shard.start, shard.stop)
        return moments, load_images(self.source, rows, self.images)[0]

    def compute(
        self, shard: Shard, loaded: tuple[npt.NDArray[np.float32], Images | None]
    ) -> dict[str, bytes]:
        """The files of a shard by name."""
        moments, images = loaded
        names, rows = self.output.names, range(shard.start, shard.stop)
        files = {
            f"vae-sd/{names.latent(row)}": npy_bytes(record)
            for row, record in zip(rows, moments, strict=True)
        }
        if images is not None:
            with ThreadPoolExecutor(self.output.config.decode_threads) as pool:
                coded = list(pool.map(png_bytes, images))
            image_names = [f"images/{names.image(row)}" for row in rows]
            files.update(zip(image_names, coded, strict=True))
        return files

    def store(self, shard: Shard, computed: dict[str, bytes]) -> Commits:
        return (self.output.write(shard, computed),)


@dataclasses.dataclass
class ReferenceFolder(ExportOutput):
    """A folder as an output."""

    @functools.cached_property
    def names(self) -> Names:
        return names_of(self.exported.index)

    def row_bytes(self) -> int:
        shape = self.exported.latents[0].spec.layout.shape
        return int(np.prod(shape)) * 4 + _NPY_HEADER_BYTES

    def write(self, shard: Shard, files: Mapping[str, bytes]) -> Commit:
        """Writes a shard's files, each under a temporary name and renamed."""
        root = Path(self.store.url)
        for name in {os.path.dirname(name) for name in files}:
            (root / name).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_renamed(root / name, data)
        num_bytes = sum(map(len, files.values()))
        return Commit(shard.index, shard.num_rows, num_bytes, _digest(files), output=self.name)

    def stands(self, commit: Commit) -> bool:
        """Whether every file of a shard is there, and none is empty."""
        root, shard = Path(self.store.url), shard_of(commit, self)
        total = 0
        for row in range(shard.start, shard.stop):
            files = [root / "vae-sd" / self.names.latent(row)]
            files += [root / "images" / self.names.image(row)] if self.with_images else []
            for file in files:
                try:
                    total += file.stat().st_size
                except FileNotFoundError:
                    return False
        return total == commit.num_bytes

    def seal(self, commits: list[Commit]) -> None:
        remove_orphans(Path(self.store.url))
        for name, data in self.last_files(commits):
            self.store.put(name, data)

    def last_files(self, commits: list[Commit]) -> Iterator[tuple[str, bytes]]:
        """The labels, and export.json at the end."""
        labels: list[int] = []
        for batch in self.exported.index.batches(("label",)):
            labels += batch["label"].to_pylist()
        order = np.argsort(self.names.positions)
        folders = {"vae-sd": self.names.latent}
        folders |= {"images": self.names.image} if self.with_images else {}
        for folder, name_of in folders.items():
            pairs = [[name_of(int(row)), labels[row]] for row in order]
            yield f"{folder}/dataset.json", (json.dumps({"labels": pairs}) + "\n").encode()
        yield RECORD, json_bytes(self.record(commits))


@dataclasses.dataclass
class ReferenceZip(ReferenceFolder):
    """A zip as an output: a part a shard in PATH.parts/, put together at the end.

    While it is put together the disk holds everything twice.
    """

    path: Path = Path()

    @property
    def where(self) -> str:
        return str(self.path)

    def check_free(self) -> None:
        """An existing zip is refused unless `is_sealed`."""
        if self.path.exists() and not self.is_sealed():
            raise MismatchError(f"{self.path} is there and no export of ours: give a new name")

    def write(self, shard: Shard, files: Mapping[str, bytes]) -> Commit:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as part:
            for name, data in files.items():
                part.writestr(zipfile.ZipInfo(name, _ZIP_TIME), data)
        data = buffer.getvalue()
        self.state_store.put(_part_name(shard.index), data)
        return Commit(shard.index, shard.num_rows, len(data), _digest(files), output=self.name)

    def stands(self, commit: Commit) -> bool:
        return self.state_store.size(_part_name(commit.index)) == commit.num_bytes

    def is_sealed(self) -> bool:
        if not self.path.exists():
            return False
        try:
            with zipfile.ZipFile(self.path) as archive:
                there = json.loads(archive.read(RECORD))
        except (zipfile.BadZipFile, KeyError, ValueError, OSError):
            return False
        self._check_identity(there.get("identity"))
        return True

    def seal(self, commits: list[Commit]) -> None:
        temporary = self.path.with_name(f"{self.path.name}.parts") / "whole.zip"
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as whole:
            for commit in commits:
                with self._part(commit.index) as part:
                    for info in part.infolist():
                        whole.writestr(zipfile.ZipInfo(info.filename, _ZIP_TIME), part.read(info))
            for name, data in self.last_files(commits):
                whole.writestr(zipfile.ZipInfo(name, _ZIP_TIME), data)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.tidy()

    def tidy(self) -> None:
        """Removes the parts of a finished zip."""
        shutil.rmtree(self.state_store.url, ignore_errors=True)

    def _part(self, index: int) -> zipfile.ZipFile:
        path = Path(self.state_store.url) / _part_name(index)
        try:
            return zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DamagedError(f"{path} is damaged ({error}): remove it and run again") from error


def reference_export(config: ExportConfig) -> ReferenceExport:
    """The stage of `repa export --to reference`; raises for what cannot be exported."""
    where = destination(config)
    exported = choose_arrays(config)
    (latents,) = exported.latents
    if latents.spec.manifest["posterior"] != GAUSSIAN:
        raise ConfigError(
            f"{latents.spec.name} has no mean and std, which the reference's format needs: use "
            "--to webdataset"
        )
    common: dict[str, Any] = {
        "config": config,
        "exported": exported,
        "rows_a_shard": exported.shard_rows,
    }
    if where.lower().endswith(".zip"):
        path = Path(where)
        parts = LocalStore(str(path.with_name(f"{path.name}.parts")))
        store = LocalStore(str(path.parent))
        output = ReferenceZip(store=store, state_store=parts, path=path, **common)
        return ReferenceExport(config, output)
    folder = LocalStore(where)
    state = folder.child(STATE)
    return ReferenceExport(config, ReferenceFolder(store=folder, state_store=state, **common))


def npy_bytes(record: npt.NDArray[Any]) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, record, allow_pickle=False)
    return buffer.getvalue()


def write_renamed(path: Path, data: bytes) -> None:
    """Writes a file under a name of this process's own, then renames it.

    Not flushed to the disk one by one: a resumed export compares all lengths.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{next(_counter)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_orphans(folder: Path) -> None:
    """Removes temporary files of exports that were killed."""
    for path in folder.glob("*/*/.tmp-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            path.unlink(missing_ok=True)


def _digest(files: Mapping[str, bytes]) -> str:
    """sha256 over the names and bytes of a shard's files."""
    total = hashlib.sha256()
    for name, data in files.items():
        total.update(name.encode())
        total.update(data)
    return f"sha256:{total.hexdigest()}"


def _part_name(index: int) -> str:
    return f"{index:06d}.zip"
