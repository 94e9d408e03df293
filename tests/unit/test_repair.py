"""`repa repair`: a damaged cache becomes, file by file, what it was; nothing else is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.commands_care import repair, verify
from repa_pipeline.config import FeaturesConfig, LatentsConfig
from repa_pipeline.config_care import RepairConfig, VerifyConfig
from repa_pipeline.data.array import ArraySpec, fingerprint, read_spec
from repa_pipeline.data.index import open_index
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    StageError,
)
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages import images
from repa_pipeline.stages.recipes import recipe_of
from repa_pipeline.stages.repair import Repaired, repair_cache
from repa_pipeline.stages.verify import verify_cache
from repa_pipeline.testing.caches import write_toy_cache
from repa_pipeline.testing.encoded import encode_tiny_cache, tiny_parts
from repa_pipeline.testing.parts import write_weights

TOKENS = "features.tiny-teacher.16"
LATENTS = "latents.tiny-kl.16"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache, its images and weights."""
    folder: Path = tmp_path_factory.mktemp("calm")
    with tiny_parts(folder):
        encode_tiny_cache(folder)
    return folder


@pytest.fixture
def cache(calm: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of everything; the source the index names is the copy's."""
    for name in ("images", "work"):
        shutil.copytree(calm / name, tmp_path / name)
    for path in calm.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    with tiny_parts(tmp_path):
        yield tmp_path / "work/cache"


def config_of(cache: Path, **changes: Any) -> RepairConfig:
    source = str(cache.parents[1] / "images")
    given = {"workspace": str(cache.parent), "source": source, "device": "cpu", "threads": 1}
    return RepairConfig(**{**given, **changes})


def run(cache: Path, **changes: Any) -> Repaired:
    return repair_cache(config_of(cache, **changes), LocalExecutor(0), Silent())


def files(cache: Path) -> dict[str, bytes]:
    """All files of a cache but the records of verifying it."""
    found = {p.relative_to(cache).as_posix(): p for p in sorted(cache.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if not name.startswith("verify/")}


def shard_file(cache: Path, name: str, index: int) -> Path:
    (found,) = (path for path in (cache / name / "c" / str(index)).rglob("*") if path.is_file())
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ruin(cache: Path) -> None:
    """Every kind of damage, in every kind of array."""
    flip(shard_file(cache, LATENTS, 1), 70)
    shard_file(cache, f"{LATENTS}.flip", 5).unlink()
    os.truncate(shard_file(cache, TOKENS, 0), 100)
    first, second = (shard_file(cache, f"{TOKENS}.scale", k) for k in (2, 3))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    flip(shard_file(cache, f"{TOKENS}.flip", 4), -9)
    edit_json(cache / TOKENS / "seal.json", num_rows=21)
    (cache / LATENTS / "zarr.json").write_bytes(b"{")
    (cache / f"{LATENTS}.flip" / "seal.json").unlink()
    (cache / f"{TOKENS}.flip" / "zarr.json").unlink()
    shutil.rmtree(cache / "ledger" / f"{TOKENS}.flip")
    (cache / "ledger" / LATENTS / "000003.json").write_bytes(b"{}")
    shutil.copytree(cache / TOKENS / "c/5", cache / TOKENS / "c/6")
    shutil.copy(
        cache / "ledger" / LATENTS / "000005.json", cache / "ledger" / LATENTS / "000006.json"
    )


def test_every_file_is_what_it_was(cache: Path) -> None:
    before = files(cache)
    ruin(cache)
    assert sum(files(cache).get(name) != data for name, data in before.items()) > 12
    repaired = run(cache)
    repaired.check()
    assert files(cache) == before
    assert repaired.report.num_shards == 36 and repaired.report.damage == ()
    assert sorted(repaired.done) == [
        f"{TOKENS}.flip: 6 ledger records from the seal",
        f"{TOKENS}.flip: encoded again shard 4",
        f"{TOKENS}.flip: metadata written again from the seal",
        f"{TOKENS}.scale: encoded again shards 2, 3",
        f"{TOKENS}: encoded again shard 0",
        f"{TOKENS}: removed {TOKENS}/c/6/0/0",
        f"{TOKENS}: sealed from its ledger",
        f"{LATENTS}.flip: encoded again shard 5",
        f"{LATENTS}.flip: sealed from its ledger",
        f"{LATENTS}: 1 ledger record from the seal",
        f"{LATENTS}: encoded again shard 1",
        f"{LATENTS}: metadata written again from the seal",
        f"{LATENTS}: removed ledger/{LATENTS}/000006.json",
    ]
    assert run(cache).done == ()


def test_webdataset_containers(tmp_path: Path) -> None:
    with tiny_parts(tmp_path):
        encode_tiny_cache(tmp_path, format="webdataset", codec="int4")
        cache = tmp_path / "work/cache"
        before = files(cache)
        flip(cache / f"{TOKENS}.flip" / "000002.tar", 800)
        (cache / f"{TOKENS}.scale" / "000005.tar").unlink()
        (cache / TOKENS / "array.json").unlink()
        run(cache).check()
        assert files(cache) == before


class Watched(LocalExecutor):
    """Tells which shards were encoded again."""

    def __init__(self) -> None:
        super().__init__(0)
        self.shards: list[int] = []

    def map(self, open_stage: Any, shards: Any, tell: Any = None) -> Any:
        if open_stage.func.__self__.name != "verify":
            self.shards += [shard.index for shard in shards]
        return super().map(open_stage, shards, tell)


def test_only_what_is_damaged_is_encoded_and_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, written = LocalStore.put, []

    def note(self: LocalStore, key: str, data: Any) -> None:
        written.append(key)
        put(self, key, data)

    monkeypatch.setattr(LocalStore, "put", note)
    flip(shard_file(cache, f"{TOKENS}.flip.scale", 2), 3)
    flip(shard_file(cache, f"{TOKENS}.flip", 5), 3)
    executor = Watched()
    repair_cache(config_of(cache), executor, Silent()).check()
    assert executor.shards == [2, 5]
    assert sorted(key for key in written if not key.startswith("verify/")) == [
        f"{TOKENS}.flip.scale/c/2/0",
        f"{TOKENS}.flip/c/5/0/0",
    ]


def test_a_finished_verify_is_taken_at_its_word(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_into = LocalStore.read_into

    def read(self: LocalStore, key: str, buffer: memoryview) -> int:
        reads.append(key.split("/0")[0])
        return read_into(self, key, buffer)

    flip(shard_file(cache, LATENTS, 1), 70)
    before = {name: data for name, data in files(cache).items() if "/c/1/" not in name}
    verify_cache(VerifyConfig(workspace=str(cache.parent)), LocalExecutor(0), Silent())
    shard_file(cache, TOKENS, 4).unlink()  # since then: found by its absence
    monkeypatch.setattr(LocalStore, "read_into", read)
    run(cache).check()
    assert sorted(reads) == [f"{TOKENS}/c/4", f"{LATENTS}/c/1"]
    assert before.items() <= files(cache).items()
    reads.clear()
    run(cache).check()  # nothing is known to be damaged any more: everything is read
    assert len(reads) == 36
    flip(shard_file(cache, LATENTS, 1), 70)
    verify_cache(VerifyConfig(workspace=str(cache.parent)), LocalExecutor(0), Silent())
    flip(shard_file(cache, LATENTS, 2), 70)
    reads.clear()
    run(cache, again=True).check()
    assert len(reads) == 36


def test_other_weights_are_refused(cache: Path) -> None:
    flip(shard_file(cache, LATENTS, 1), 70)
    shard_file(cache, TOKENS, 1).unlink()
    broken = files(cache)
    write_weights(TABLES["autoencoders"]["tiny-kl"], seed=1)
    repaired = run(cache)
    with pytest.raises(MismatchError, match=f"other weights than those of {LATENTS}: sha256 "):
        repaired.check()
    assert repaired.done == (f"{TOKENS}: encoded again shard 1",)  # the rest is repaired
    assert [(d.array, d.shard) for d in repaired.report.damage] == [(LATENTS, 1)]
    now = files(cache)
    assert [name for name in now if now[name] != broken.get(name)] == [f"{TOKENS}/c/1/0/0"]
    # The right file, given by a flag.
    folder = cache.parents[1]
    right = folder / "right.safetensors"
    spec = TABLES["autoencoders"]["tiny-kl"]
    write_weights(dataclasses.replace(spec, weights=str(right)))
    run(cache, weights=str(right)).check()


def test_other_entries_are_refused(cache: Path) -> None:
    shard_file(cache, TOKENS, 1).unlink()
    overrides = {"encoders.tiny-teacher": {"tokens": "some others"}}
    with pytest.raises(MismatchError, match=f"{TOKENS} cannot be encoded as it was: tokens is"):
        run(cache, overrides=overrides).check()


def test_other_images_are_refused(cache: Path) -> None:
    index = open_index(LocalStore(str(cache)))
    victim = cache.parents[1] / "images" / index.entries[6].path
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    flip(shard_file(cache, LATENTS, 1), 70)
    flip(shard_file(cache, LATENTS, 2), 70)
    broken = shard_file(cache, LATENTS, 1).read_bytes()
    repaired = run(cache)
    with pytest.raises(StageError, match=r"shard 1 \(rows 4 to 7\): image .* is not the one that"):
        repaired.check()
    assert repaired.done == (f"{LATENTS}: encoded again shard 2",)
    assert shard_file(cache, LATENTS, 1).read_bytes() == broken
    victim.write_bytes(data)
    run(cache).check()
    flip(shard_file(cache, LATENTS, 1), 70)
    shutil.rmtree(cache.parents[1] / "images")
    with pytest.raises(MissingError, match="images"):
        run(cache).check()


def test_the_index_knows_the_source(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without --source: where the index says the images are; another place is said."""
    shard_file(cache, LATENTS, 1).unlink()
    run(cache, source=RepairConfig.source).check()
    assert "images are read from" not in caplog.text
    moved = cache.parents[1] / "moved"
    (cache.parents[1] / "images").rename(moved)
    shard_file(cache, LATENTS, 1).unlink()
    shard_file(cache, TOKENS, 1).unlink()
    run(cache, source=str(moved)).check()
    assert caplog.text.count(f"images are read from {moved}, the index was made of ") == 1


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose decoder sees every pixel a little brighter."""
    load = images.load_images

    def brighter(*arguments: Any) -> Any:
        pixels, *seconds = load(*arguments)
        return np.minimum(pixels, 254) + np.uint8(1), *seconds

    monkeypatch.setattr(images, "load_images", brighter)


def test_other_bytes_are_refused_or_accepted(cache: Path, other_machine: None) -> None:
    sound = files(cache)
    flip(shard_file(cache, TOKENS, 1), 7)
    shard_file(cache, LATENTS, 0).unlink()
    broken = files(cache)
    with pytest.raises(MismatchError, match=f"{TOKENS} would get other bytes than the sealed"):
        run(cache).check()
    assert files(cache) == broken
    repaired = run(cache, accept=True)
    repaired.check()
    assert repaired.done == (
        f"{TOKENS}: 1 shard with other bytes accepted",
        f"{TOKENS}: encoded again shard 1",
        f"{TOKENS}.scale: 1 shard with other bytes accepted",  # of the same encoding
        f"{LATENTS}: 1 shard with other bytes accepted",
        f"{LATENTS}: encoded again shard 0",
    )
    now = files(cache)
    changed = sorted(name for name in sound if now[name] != sound[name])
    assert changed == sorted(
        f"{prefix}{name}"
        for array, shard in ((TOKENS, 1), (f"{TOKENS}.scale", 1), (LATENTS, 0))
        for prefix, name in (
            ("", f"{array}/seal.json"),
            ("", shard_file(cache, array, shard).relative_to(cache).as_posix()),
            ("ledger/", f"{array}/{shard:06d}.json"),
        )
    )
    seal = json.loads(now[f"{TOKENS}/seal.json"])
    assert [entry.get("counts") for entry in seal["shards"]] == [None, {"accepted": 1}] + [None] * 4
    verify_cache(VerifyConfig(workspace=str(cache.parent)), LocalExecutor(0), Silent()).check()


def test_seals_of_old(cache: Path) -> None:
    """The sha256 of whole objects in seal and ledger: shards come back to the bit."""
    path = cache / LATENTS / "seal.json"
    seal = json.loads(path.read_text())
    del seal["seal_sha256"]
    for entry in seal["shards"]:
        del entry["digest"]
        data = shard_file(cache, LATENTS, entry["index"]).read_bytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        record = cache / "ledger" / LATENTS / f"{entry['index']:06d}.json"
        old = {**json.loads(record.read_text()), "sha256": entry["sha256"]}
        del old["digest"]
        record.write_text(json.dumps(old))
    path.write_text(json.dumps({**seal, "seal_sha256": fingerprint(seal)}))
    before = files(cache)
    flip(shard_file(cache, LATENTS, 5), 3)
    run(cache).check()
    assert files(cache) == before


def test_what_cannot_be_rebuilt(cache: Path) -> None:
    before = files(cache)
    edit_json(cache / TOKENS / "seal.json", num_rows=21)
    (cache / "ledger" / TOKENS / "000002.json").unlink()
    with pytest.raises(DamagedError, match="the seal is damaged and 1 shard without a"):
        run(cache).check()
    encode_tiny_cache(cache.parents[1])  # what the advice says
    assert files(cache) == before
    (cache / LATENTS / "seal.json").unlink()
    (cache / LATENTS / "zarr.json").write_text("{}")
    with pytest.raises(DamagedError, match="damaged in 1 place .* make it again"):
        run(cache).check()
    (cache / "manifest.json").write_text("{}")
    shard_file(cache, TOKENS, 1).unlink()
    with pytest.raises(DamagedError, match="remove index.parquet and manifest.json and run"):
        run(cache).check()


def test_unfinished_arrays_stay_so(cache: Path) -> None:
    (cache / LATENTS / "seal.json").unlink()
    (cache / "ledger" / LATENTS / "000002.json").unlink()
    flip(shard_file(cache, LATENTS, 1), 3)
    repaired = run(cache)
    repaired.check()
    assert repaired.done == (f"{LATENTS}: encoded again shard 1",)
    assert not (cache / LATENTS / "seal.json").exists()
    assert "5 of 6 shards recorded" in repaired.report.unfinished[0]


def test_arrays_without_a_recipe(tmp_path: Path) -> None:
    """Random data under a teacher's name: refused, the rest of the report kept."""
    write_toy_cache(tmp_path, num_rows=16)
    shard_file(tmp_path / "cache", "latents.tiny-kl.64", 1).unlink()
    with tiny_parts(tmp_path), pytest.raises(MismatchError, match=r"\(no 'batch_size'\): make it"):
        run(tmp_path / "cache").check()


def test_the_recipe_is_the_manifests(cache: Path) -> None:
    """Settings that are not defaults come back; machine and places are those of the repair."""
    store = LocalStore(str(cache))
    index, spec = open_index(store), read_spec(store, f"{TOKENS}.flip")
    changed = ArraySpec(
        spec.name,
        spec.num_rows,
        dataclasses.replace(spec.layout, container="webdataset"),
        {
            **spec.manifest,
            "compute": {"dtype": "bf16", "compile": True},
            "class_token": True,
            "batch_size": 9,
        },
    )
    recipe = recipe_of(changed, config_of(cache, device="cuda:1", decode_threads=7), index)
    assert isinstance(recipe, FeaturesConfig)
    assert (recipe.encoder, recipe.codec, recipe.tokens) == (("tiny-teacher",), "int8", "patch+cls")
    assert (recipe.dtype, recipe.compile, recipe.batch_size) == ("bf16", True, 9)
    assert (recipe.flip, recipe.format, recipe.resolution) == (True, "webdataset", 16)
    assert (recipe.device, recipe.decode_threads, recipe.exif) == ("cuda:1", 7, "upright")
    latents = recipe_of(read_spec(store, LATENTS), config_of(cache), index)
    assert isinstance(latents, LatentsConfig)
    assert (latents.autoencoder, latents.moments_dtype) == ("tiny-kl", "float16")
    assert (latents.flip, latents.batch_size, latents.dtype) == (False, 3, "float32")


def test_one_weights_file_is_for_one_network(cache: Path) -> None:
    shard_file(cache, TOKENS, 1).unlink()
    shard_file(cache, LATENTS, 1).unlink()
    with pytest.raises(ConfigError, match="--weights names one file, 2 networks are needed"):
        run(cache, weights="x.safetensors")


def test_what_the_command_prints(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repair(config_of(cache))
    assert capsys.readouterr().out == "nothing to repair: 6 arrays, 36 shards sound\n"
    shard_file(cache, TOKENS, 1).unlink()
    with pytest.raises(DamagedError):
        verify(VerifyConfig(workspace=str(cache.parent)))
    capsys.readouterr()
    repair(config_of(cache, dry_run=True))
    assert capsys.readouterr().out == f"would repair: {TOKENS}: shard 1\n"
    repair(config_of(cache))
    assert capsys.readouterr().out == (
        f"{TOKENS}: encoded again shard 1\nrepaired: 6 arrays, 36 shards sound\n"
    )


def test_what_is_not_ours_is_left_alone(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = (
        f"{LATENTS}/README.md",
        f"{LATENTS}/c/9/0",
        f"{LATENTS}/c/00/0/0/0",
        f"{LATENTS}/deep/er/notes.txt",
        f"ledger/{LATENTS}/000001.json.bak",
        f"ledger/{LATENTS}/README",
    )
    for name in mine:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
    killed = cache / LATENTS / "c/0/.tmp-pod7-1-1"
    killed.write_bytes(b"half")
    os.utime(killed, (0, 0))
    repaired = run(cache)
    repaired.check()
    assert repaired.done == (f"{LATENTS}: removed {LATENTS}/c/0/.tmp-pod7-1-1",)
    assert not killed.exists()
    assert [(cache / name).read_text() for name in mine] == ["mine"] * 6
    assert repaired.report.foreign == tuple(sorted(mine))
    repair(config_of(cache))
    told = capsys.readouterr().out
    assert f"note: {cache}/{LATENTS}/README.md is no part of the array: left alone\n" in told
    assert told.endswith("nothing to repair: 6 arrays, 36 shards sound\n")
    verify(VerifyConfig(workspace=str(cache.parent)))
    assert f"note: {cache}/{LATENTS}/README.md is no part of" in capsys.readouterr().out


def seal_as_other(cache: Path, name: str, shard: int) -> None:
    """The seal and the ledger say another digest of a shard than any encoding gives."""
    path = cache / name / "seal.json"
    seal = json.loads(path.read_text())
    del seal["seal_sha256"]
    digest = seal["shards"][shard]["digest"]
    other = digest[:-4] + ("0000" if digest[-4:] != "0000" else "1111")
    seal["shards"][shard]["digest"] = other
    path.write_text(json.dumps({**seal, "seal_sha256": fingerprint(seal)}))
    edit_json(cache / "ledger" / name / f"{shard:06d}.json", digest=other)


def test_one_array_that_differs_does_not_spoil_the_others(cache: Path) -> None:
    sound = shard_file(cache, TOKENS, 1).read_bytes()
    flip(shard_file(cache, TOKENS, 1), 7)
    seal_as_other(cache, f"{TOKENS}.scale", 1)
    seal_as_other(cache, f"{TOKENS}.scale", 3)
    repaired = run(cache)
    assert repaired.done == (f"{TOKENS}: encoded again shard 1",)
    assert shard_file(cache, TOKENS, 1).read_bytes() == sound
    assert [(d.array, d.shard) for d in repaired.report.damage] == [
        (f"{TOKENS}.scale", 1),
        (f"{TOKENS}.scale", 3),
    ]
    said = f"^{TOKENS}.scale would get other bytes than the sealed ones .shards 1, 3.: .*--accept"
    with pytest.raises(MismatchError, match=said):
        repaired.check()
    run(cache, accept=True).check()
