"""Care of a cache on a real S3 server and on Ray workers: the same files, the same findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.placement import Wish
from repa_pipeline.config_care import CopyConfig, RepairConfig, VerifyConfig
from repa_pipeline.data.objects import open_store
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.observe import Silent
from repa_pipeline.stages.copy import copy_cache
from repa_pipeline.stages.repair import repair_cache
from repa_pipeline.stages.verify import verify_cache
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.encoded import encode_tiny_cache
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

TOKENS = "features.tiny-teacher.16"
PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder
AUTOENCODERS = [tiny_autoencoder(weights="{folder}/kl.safetensors")]
ENCODERS = [tiny_encoder(weights="{folder}/teacher.safetensors", patch_size=8)]
"""


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A sound cache whose networks come from a plugin that workers can load."""
    write_weights(tiny_autoencoder(weights=f"{tmp_path}/kl.safetensors"))
    write_weights(tiny_encoder(weights=f"{tmp_path}/teacher.safetensors", patch_size=8))
    (tmp_path / "care_parts.py").write_text(PLUGIN.format(folder=tmp_path))
    with isolated_tables(tmp_path):
        encode_tiny_cache(tmp_path, plugins=("care_parts",))
        yield tmp_path / "work"


def repair_config(work: Path, workspace: str, **changes: Any) -> RepairConfig:
    return RepairConfig(
        source=str(work.parent / "images"),
        workspace=workspace,
        plugins=("care_parts",),
        device="cpu",
        threads=1,
        **changes,
    )


def files(workspace: Path) -> dict[str, bytes]:
    found = {p.relative_to(workspace).as_posix(): p for p in sorted(workspace.rglob("*"))}
    return {n: p.read_bytes() for n, p in found.items() if p.is_file() and "verify/" not in n}


def ruin(workspace: str) -> None:
    store = open_store(workspace).child("cache")
    key = f"{TOKENS}.flip/c/1/0/0"
    data = bytearray(store.get(key))
    data[70] ^= 1
    store.put(key, data)
    store.delete(f"{TOKENS}.flip.scale/c/5/0")
    store.put(f"{TOKENS}/c/0/0/0", store.get(f"{TOKENS}/c/2/0/0"))
    store.delete(f"{TOKENS}.flip/zarr.json")


EXPECTED = [
    (f"{TOKENS}.flip", "metadata", None),
    (TOKENS, "shard", 0),
    (f"{TOKENS}.flip", "shard", 1),
    (f"{TOKENS}.flip.scale", "shard", 5),
]


@pytest.mark.slow
def test_a_cache_in_a_bucket(work: Path, bucket: str, tmp_path: Path) -> None:
    before = files(work)
    copied = copy_cache(CopyConfig(origin=str(work), target=bucket), Silent())
    copied.check()
    assert copied.num_new == 36
    assert copy_cache(CopyConfig(origin=str(work), target=bucket), Silent()).num_new == 0
    ruin(bucket)
    report = verify_cache(VerifyConfig(workspace=bucket), LocalExecutor(0), Silent())
    assert [(d.array, d.kind, d.shard) for d in report.damage] == EXPECTED
    repaired = repair_cache(repair_config(work, bucket), LocalExecutor(0), Silent())
    repaired.check()
    assert len(repaired.done) == 4
    copy_cache(CopyConfig(origin=bucket, target=str(tmp_path / "back")), Silent()).check()
    assert files(tmp_path / "back") == before


@pytest.mark.slow
def test_ray_workers_find_and_mend_the_same(work: Path) -> None:
    before = files(work)
    executor = RayExecutor(Wish(device="cpu", workers=2, threads=1), plugins=("care_parts",))
    ruin(str(work))
    report = verify_cache(VerifyConfig(workspace=str(work)), executor, Silent())
    assert [(d.array, d.kind, d.shard) for d in report.damage] == EXPECTED
    assert report.num_shards == 33
    repaired = repair_cache(repair_config(work, str(work)), executor, Silent(), LocalExecutor(0))
    repaired.check()
    assert files(work) == before
