"""The pass of a frozen network over a set of images, as a stage: resumable, on any executor."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import CommonConfig
from repa_pipeline.config_evaluate import ScoreConfig
from repa_pipeline.data.array import ArraySpec, write_shard
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.device import prepare_compute
from repa_pipeline.engine.contracts import Commit, Commits, Executor, Shard, Wanted, Work
from repa_pipeline.engine.run import Progress, ledger_of, run_stage
from repa_pipeline.registry import load_plugins
from repa_pipeline.stages.array_stage import ArrayOutput
from repa_pipeline.stages.judge import Images, Judge, Judged, Rows, judge_spec, open_judged
from repa_pipeline.stages.judge_images import ImageSet, Read


@dataclasses.dataclass(frozen=True)
class JudgeStage:
    """Writes the judge rows `spec` of `images` below `url`."""

    config: CommonConfig
    weights: str | None
    images: ImageSet
    url: str
    spec: ArraySpec
    name: str = "judge"

    @property
    def outputs(self) -> tuple[ArrayOutput, ...]:
        return (ArrayOutput(self.url, self.spec),)

    def open(self, wanted: Wanted) -> Work:
        load_plugins(self.config.plugins)
        prepare_compute(self.config.threads)
        judge = Judge(self.config, self.weights, self.spec)
        return _JudgeWork(self.spec, open_store(self.url), self.images.open(), judge)


@dataclasses.dataclass(frozen=True)
class _JudgeWork:
    spec: ArraySpec
    store_: ObjectStore
    read: Read
    judge: Judge

    def load(self, shard: Shard) -> Images:
        return self.read(shard)

    def compute(self, shard: Shard, loaded: Images) -> Rows:
        return self.judge.rows(loaded)

    def store(self, shard: Shard, computed: Rows) -> Commits:
        num_bytes, digest = write_shard(self.store_, self.spec, shard.index, computed)
        return (Commit(shard.index, shard.num_rows, num_bytes, digest, output=self.spec.name),)


def spec_of_images(
    config: ScoreConfig, network: str, images: ImageSet, forward_images: int
) -> ArraySpec:
    """The array of `network`'s rows over `images`; raises as `judge_spec`."""
    return judge_spec(
        config,
        network,
        config.network_weights,
        resolution=images.resolution,
        num_rows=images.num_rows,
        shard_rows=images.shard_rows,
        of=images.of,
        forward_images=config.batch_size or forward_images,
        any_weights=config.any_weights,
    )


def run_judge(stage: JudgeStage, executor: Executor, progress: Progress) -> Judged:
    """The finished rows: what is missing of them is made; a sealed array costs nothing.

    Raises StageError when shards could not be done (what was done is kept), MismatchError when
    rows of other images or settings stand in their place.
    """
    (output,) = stage.outputs
    if len(output.sealed()) < stage.spec.num_shards:
        stage.images.check()
    run_stage(stage, executor, {output.name: ledger_of(output.store, output)}, progress)
    return open_judged(output.store, str(stage.spec.manifest["network"]))
