"""The stage of `repa repair`: damaged shards encoded again by their array's own recipe.

An object is replaced only by bytes that have the sealed digest, unless others are accepted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from repa_pipeline.config import EncodeConfig
from repa_pipeline.config_care import RepairConfig
from repa_pipeline.data.array import ArraySpec, SealedArray, stored_digest
from repa_pipeline.data.index import Index
from repa_pipeline.data.names import SCALE
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.data.shards import pack_into
from repa_pipeline.engine.contracts import (
    Commit,
    Commits,
    Executor,
    Shard,
    Wanted,
    Work,
    split_rows,
)
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import DamagedError, MismatchError, RepaError
from repa_pipeline.stages.images import ImagePass, check_scratch
from repa_pipeline.stages.index import cache_store
from repa_pipeline.stages.recipes import check_recipe, product_of, recipe_of
from repa_pipeline.stages.verify import Round

ACCEPTED = "accepted"  # counted in the seal of an array that took other bytes
REFUSED = "refused"  # in place of the digest of bytes that were not stored


@dataclasses.dataclass
class Job:
    """Shards to encode again with one recipe: the arrays, and which shards of which."""

    settings: EncodeConfig
    arrays: dict[str, SealedArray] = dataclasses.field(default_factory=dict)
    wanted: dict[int, set[str]] = dataclasses.field(default_factory=dict)

    def add(self, array: SealedArray, shards: Sequence[int]) -> None:
        self.arrays[array.spec.name] = array
        for shard in shards:
            self.wanted.setdefault(shard, set()).add(array.spec.name)


def jobs_of(
    config: RepairConfig, index: Index, damaged: Sequence[Round]
) -> tuple[list[Job], list[RepaError]]:
    """One job a recipe; a mirrored view belongs to the recipe of the other."""
    jobs: list[Job] = []
    errors: list[RepaError] = []
    for current in damaged:
        try:
            settings = recipe_of(current.array.spec, config, index)
        except RepaError as error:
            errors.append(error)
            continue
        alike = dataclasses.replace(settings, flip=False)
        job = next((j for j in jobs if dataclasses.replace(j.settings, flip=False) == alike), None)
        if job is None:
            job = Job(settings)
            jobs.append(job)
        if settings.flip:
            job.settings = settings
        job.add(current.array, sorted(current.damaged))
    return jobs, errors


def add_partners(job: Job, by_name: Mapping[str, Round]) -> None:
    """Coded tokens and their scales belong to one encoding: whoever takes new ones takes both."""
    for name in list(job.arrays):
        other = name.removesuffix(SCALE) if name.endswith(SCALE) else name + SCALE
        if other in by_name:
            shards = [shard for shard, names in job.wanted.items() if name in names]
            job.add(by_name[other].array, shards)


def run_job(
    job: Job,
    index: Index,
    accept: bool,
    executor: Executor,
    progress: Progress,
    commits: list[Commit],
) -> None:
    """Runs a job, appending what was stored to `commits`; raises RepaError for what was not."""
    check_scratch(index, job.settings)
    product = product_of(job.settings, index)
    for array in job.arrays.values():
        check_recipe(array.spec, product)
    digests = {
        name: {
            shard: stored_digest(array.shards[shard])
            for shard, names in job.wanted.items()
            if name in names
        }
        for name, array in job.arrays.items()
    }
    refused: dict[str, list[int]] = {}
    stage = HealStage(ImagePass(job.settings, (product,)), digests, accept)
    wanted = {shard: frozenset(names) for shard, names in job.wanted.items()}
    partition = split_rows(index.num_rows, index.manifest["shard_rows"])
    shards = [shard for shard in partition if shard.index in wanted]
    progress.start(stage.name, sum(shard.num_rows for shard in shards), 0, "images")
    try:
        for found in executor.map(functools.partial(stage.open, wanted), shards, progress.workers):
            for commit in found:
                if commit.digest == REFUSED:
                    refused.setdefault(commit.output, []).append(commit.index)
                else:
                    commits.append(commit)
            progress.advance(found[0].rows)
    finally:
        progress.finish()
    _raise_refused(refused)


def _raise_refused(refused: Mapping[str, list[int]]) -> None:
    """Raises MismatchError when there were other bytes than the sealed ones."""
    if refused:
        indices = sorted({index for of_array in refused.values() for index in of_array})
        shards = f"shard{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
        raise MismatchError(
            f"{', '.join(sorted(refused))} would get other bytes than the sealed ones ({shards}): "
            "this machine computes otherwise (device, libraries or thread count differ); repair it "
            "where it was made, make the array again, or take the new bytes with --accept"
        )


@dataclasses.dataclass(frozen=True)
class HealStage:
    """Encodes shards again and stores those that have the digest they must have.

    digests: of every array, shard -> digest. `accept` takes other bytes too, and counts them.
    """

    images: ImagePass
    digests: Mapping[str, Mapping[int, str]]
    accept: bool

    @property
    def name(self) -> str:
        return f"repair {self.images.name}"

    def open(self, wanted: Wanted) -> Work:
        return _HealWork(self, self.images.open(wanted), cache_store(self.images.config))


@dataclasses.dataclass(frozen=True)
class _HealWork:
    stage: HealStage
    images: Work
    store_: ObjectStore

    def load(self, shard: Shard) -> Any:
        return self.images.load(shard)

    def compute(self, shard: Shard, loaded: Any) -> Any:
        return self.images.compute(shard, loaded)

    def store(self, shard: Shard, computed: Any) -> Commits:
        """Stores what has the right digest; a commit of REFUSED says of an array that it has not,
        so that what is stored of the others is known to the driver."""
        return tuple(
            self._store(shard, coded.spec, coded.records, coded.counts) for coded in computed
        )

    def _store(
        self, shard: Shard, spec: ArraySpec, records: Any, counts: Mapping[str, int]
    ) -> Commit:
        """REFUSED, and nothing stored, when the digest is not the sealed one."""
        data = bytearray(spec.layout.shard_bytes(len(records)))
        digest = pack_into(memoryview(data), records, spec.layout, shard.start)
        sealed = self.stage.digests[spec.name][shard.index]
        if sealed.startswith("sha256:"):
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if digest != sealed and not self.stage.accept:
            return Commit(shard.index, len(records), 0, REFUSED, {}, spec.name)
        key = spec.shard_key(shard.index)
        self.store_.put(key, data)
        if self.store_.get(key) != data:
            raise DamagedError(f"{self.store_.url}/{key} reads back otherwise than written")
        other = {ACCEPTED: 1} if digest != sealed else {}
        return Commit(
            shard.index, len(records), len(data), digest, {}, spec.name, {**counts, **other}
        )
