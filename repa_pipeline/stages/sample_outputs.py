"""What one sampling pass writes: sealed arrays of images, latents and judge rows, tars of pictures.

    settings.json          the recipe: what identifies the images, whichever of them is written
    labels.npy             the classes, where they came from a file
    images/  latents/  judge.NETWORK/     sealed arrays (data/array.py)
    png/000000.tar         webdataset: KEY.png, KEY.cls, KEY.json (index, class, recipe)
    png/settings.json  png/seal.json      before the first tar; after the last, with every digest

Nothing of another recipe is written into a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import ArraySpec, fingerprint, first_difference, write_shard
from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.engine.contracts import Commit, Output, Plan, Shard, split_rows
from repa_pipeline.errors import DamagedError, MismatchError, MissingError
from repa_pipeline.pictures import jpeg_bytes, png_bytes
from repa_pipeline.stages.array_stage import ArrayOutput, commit_of, seal_entry
from repa_pipeline.stages.sample_labels import Labels

IMAGES, LATENTS = "images", "latents"
PICTURES = ("png", "jpeg")
SETTINGS_FILE = "settings.json"
_ENCODE_THREADS = 4
_LONG = ("class_names", "source_rows")

Recipe = Mapping[str, Any]
Records = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Made:
    """A shard of samples: records [n, ...] by array name, images among them where needed, and
    their classes int64 [n]."""

    records: Mapping[str, Records]
    labels: npt.NDArray[np.int64]


class SampleOutput(Output, Protocol):
    """An output that knows what it takes of a shard."""

    def write(self, shard: Shard, made: Made) -> Commit: ...


@dataclasses.dataclass(frozen=True)
class Claim:
    """A folder of samples and what they are: refuses those of another recipe."""

    url: str
    recipe: Recipe
    labels: Labels

    def check(self) -> None:
        """Raises MismatchError when samples of another recipe are there; writes nothing."""
        store = open_store(self.url)
        if store.size(SETTINGS_FILE) is not None:
            check_same(store, SETTINGS_FILE, self.recipe)

    def take(self) -> None:
        """Writes the recipe, and classes that came from a file."""
        store = open_store(self.url)
        if not store.put_new(SETTINGS_FILE, json_bytes(dict(self.recipe))):
            check_same(store, SETTINGS_FILE, self.recipe)
        self.labels.keep(store)


def check_same(store: ObjectStore, key: str, wanted: Mapping[str, Any]) -> None:
    """Raises MismatchError when the settings at `key` are others, naming the first difference."""
    here = json.loads(json.dumps(dict(wanted)))
    difference = first_difference(get_json(store, key), here)
    if difference:
        name, got, expected = difference
        raise MismatchError(
            f"{store.url} was made with other settings: {name} is {got!r} there, {expected!r} now; "
            "set it back or give another --output"
        )


@dataclasses.dataclass(frozen=True)
class SampleArray(ArrayOutput):
    """A sealed array of samples."""

    claim: Claim

    def check(self) -> None:
        self.claim.check()
        super().check()

    def begin(self) -> None:
        self.claim.take()
        super().begin()

    def write(self, shard: Shard, made: Made) -> Commit:
        num_bytes, digest = write_shard(self.store, self.spec, shard.index, made.records[self.name])
        return Commit(shard.index, shard.num_rows, num_bytes, digest, output=self.name)


@dataclasses.dataclass(frozen=True)
class PictureTars:
    """Tars of png or jpeg files for webdataset, one a shard."""

    name: str
    claim: Claim
    spec: ArraySpec
    quality: int

    @property
    def store(self) -> ObjectStore:
        return open_store(self.claim.url).child(self.name)

    @property
    def manifest(self) -> dict[str, Any]:
        """What decides every byte."""
        coded = {"quality": self.quality} if self.name == "jpeg" else {}
        return {**self.claim.recipe, "kind": self.name, **coded}

    def plan(self) -> Plan:
        spec = self.spec
        return Plan(
            where=self.store.url,
            fingerprint=fingerprint(self.manifest),
            shards=split_rows(spec.num_rows, spec.layout.shard_rows),
            num_rows=spec.num_rows,
            num_bytes=spec.num_rows * spec.layout.record_bytes,
        )

    def check(self) -> None:
        self.claim.check()
        if self.store.size(SETTINGS_FILE) is not None:
            check_same(self.store, SETTINGS_FILE, self.manifest)

    def begin(self) -> None:
        self.claim.take()
        if not self.store.put_new(SETTINGS_FILE, json_bytes(self.manifest)):
            check_same(self.store, SETTINGS_FILE, self.manifest)

    def write(self, shard: Shard, made: Made) -> Commit:
        images: Any = made.records[IMAGES]
        with ThreadPoolExecutor(_ENCODE_THREADS) as pool:
            files = list(pool.map(self._encoded, images))
        data = self._tar(shard.start, files, made.labels)
        self.store.put(_tar_key(shard.index), data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return Commit(shard.index, shard.num_rows, len(data), digest, output=self.name)

    def seal(self, commits: list[Commit]) -> None:
        seal = {
            "fingerprint": fingerprint(self.manifest),
            "manifest": self.manifest,
            "num_rows": self.spec.num_rows,
            "shards": [{**seal_entry(c), "name": _tar_key(c.index)} for c in commits],
        }
        self.store.put("seal.json", json_bytes(seal))

    def is_sealed(self) -> bool:
        return self.store.size("seal.json") is not None

    def sealed(self) -> list[Commit]:
        try:
            seal = get_json(self.store, "seal.json")
            if seal["fingerprint"] != fingerprint(self.manifest):
                return []
            return [commit_of(entry) for entry in seal["shards"]]
        except (DamagedError, MissingError, KeyError, TypeError):
            return []

    def stands(self, commit: Commit) -> bool:
        return self.store.size(_tar_key(commit.index)) == commit.num_bytes

    def _encoded(self, image: npt.NDArray[np.uint8]) -> bytes:
        return png_bytes(image) if self.name == "png" else jpeg_bytes(image, self.quality)

    def _tar(self, start: int, files: list[bytes], labels: npt.NDArray[np.int64]) -> bytes:
        names = self.claim.recipe.get("class_names")
        settings = {k: v for k, v in self.manifest.items() if k not in _LONG}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (data, label) in enumerate(zip(files, labels.tolist(), strict=True)):
                key = f"{start + i:09d}"
                about = {"index": start + i, "label": label, "settings": settings}
                if names:
                    about["class_name"] = names[label]
                _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.json", json.dumps(about, sort_keys=True).encode())
                _add(tar, f"{key}.{'jpg' if self.name == 'jpeg' else self.name}", data)
        return buffer.getvalue()


def _tar_key(index: int) -> str:
    return f"{index:06d}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
