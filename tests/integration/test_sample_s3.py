"""Sampling between buckets: the checkpoint from one URL, all outputs to another, on a real S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.errors import MismatchError
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import (
    PLUGIN_NAME,
    make_samples,
    toy_sample_config,
    write_toy_runs,
)
from repa_pipeline.training.mirror import Mirror
from repa_pipeline.training.runs import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("buckets")
    with isolated_tables(folder):
        write_toy_runs(folder)
        yield folder


def objects(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.keys()}


def test_from_a_bucket_to_a_bucket(workspace: Path, bucket: str, tmp_path: Path) -> None:
    run = Run(workspace / "runs" / "toy")
    Mirror(run, open_store(f"{bucket}/runs/toy"), 100_000).sync(keep=1, keep_every=0)
    outputs = {"outputs": ("images", "png", "latents"), "score": ("digits-cnn",)}
    make_samples(toy_sample_config(workspace, output=str(tmp_path / "local"), **outputs))
    remote = toy_sample_config(
        workspace,
        checkpoint=f"{bucket}/runs/toy/checkpoints/{run.newest_checkpoint().name}",
        downloads=str(tmp_path / "downloads"),
        plugins=(PLUGIN_NAME,),
        output=f"{bucket}/samples/toy",
        **outputs,
    )
    make_samples(remote)
    made = objects(open_store(f"{bucket}/samples/toy"))
    assert made == objects(open_store(str(tmp_path / "local"))) and "png/seal.json" in made

    # A shard that is lost is made again, from the file that is here already; nothing else is.
    store = open_store(f"{bucket}/samples/toy")
    store.delete("png/000001.tar")
    make_samples(remote)
    assert objects(store) == made
    other = toy_sample_config(workspace, output=f"{bucket}/samples/toy", seed=1, **outputs)
    with pytest.raises(MismatchError, match="seed is 0 there, 1 now"):
        make_samples(other)
    assert sample_stage(remote).recipe["checkpoint_sha256"] in made["settings.json"].decode()
