"""`repa sample`: (checkpoint, settings, seed, k) -> image k, on any number of workers.

Images are shards of sealed outputs like all others, so a killed run loses at most the shards in
flight. One pass fills all that is asked for; the npz for the ADM suite and the picture are made
from the sealed images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.data.array import ArraySpec, SealedArray, open_sealed
from repa_pipeline.data.objects import ObjectStore, get_json, open_store
from repa_pipeline.data.shards import RecordLayout, as_rows
from repa_pipeline.device import prepare_compute
from repa_pipeline.engine.contracts import Commits, Shard, Wanted, Work
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import ledger_of
from repa_pipeline.errors import MissingError
from repa_pipeline.stages.exporting import ShardRows
from repa_pipeline.stages.judge import Judge
from repa_pipeline.stages.sample_labels import Labels
from repa_pipeline.stages.sample_outputs import (
    IMAGES,
    LATENTS,
    PICTURES,
    SETTINGS_FILE,
    Claim,
    Made,
    PictureTars,
    Recipe,
    Records,
    SampleArray,
    SampleOutput,
)

if TYPE_CHECKING:
    from repa_pipeline.stages.sampler import Sampler

Images = npt.NDArray[np.uint8]
NPZ_FILE, GRID_FILE = "samples.npz", "grid.png"


@dataclasses.dataclass(frozen=True)
class SampleStage:
    """Writes samples below the URL `output`, sample k in row k of whatever is written.

    writes: names of sealed outputs, of images, latents, png, jpeg. judges: the arrays of judge
    rows. finishes: what is made of the sealed images, of npz and grid. checkpoint: a path or URL,
    None where latents of another folder are decoded. Made by stages/sample_plan.py.
    """

    config: SampleConfig
    checkpoint: str | None
    output: str
    recipe: Recipe
    labels: Labels
    latents: ArraySpec
    writes: tuple[str, ...] = (IMAGES,)
    judges: tuple[ArraySpec, ...] = ()
    finishes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = "sample"

    @property
    def store(self) -> ObjectStore:
        return open_store(self.output)

    @property
    def spec(self) -> ArraySpec:
        """The array of the images, written or not: its fingerprint says which they are."""
        return image_spec(self.recipe)

    @property
    def outputs(self) -> tuple[SampleOutput, ...]:
        claim = Claim(self.output, self.recipe, self.labels)
        arrays = {LATENTS: self.latents, IMAGES: self.spec}
        quality = self.config.jpeg_quality
        return (
            *(SampleArray(self.output, spec, claim) for spec in self.judges),
            *(
                PictureTars(name, claim, self.spec, quality)
                for name in PICTURES
                if name in self.writes
            ),
            *(
                SampleArray(self.output, spec, claim)
                for name, spec in arrays.items()
                if name in self.writes
            ),
        )

    def open(self, wanted: Wanted) -> Work:
        prepare_compute(self.config.threads)  # TF32 is the sampler's alone, not of judges
        names = frozenset[str]().union(*wanted.values()) or {o.name for o in self.outputs}
        judges = {
            spec.name: Judge(self.config, self.config.network_weights, spec)
            for spec in self.judges
            if spec.name in names
        }
        finished = None if LATENTS in names else self.finished_latents()
        sampler = self.load_sampler(samples=finished is None, decodes=names != {LATENTS})
        source = None if finished is None else ShardRows(open_latents(finished))
        return _SampleWork(self, sampler, judges, source, wanted)

    def finished_latents(self) -> str | None:
        """The folder whose finished latents are decoded instead of sampling: another one, or the
        output's own where they stand there already."""
        if self.config.from_latents:
            return self.config.from_latents
        standing = SampleArray(
            self.output, self.latents, Claim(self.output, self.recipe, self.labels)
        )
        return self.output if standing.sealed() else None

    def load_sampler(self, *, samples: bool = True, decodes: bool = True) -> Sampler:
        """What makes the samples, loaded: models where it `samples`, the decoder where it
        `decodes`."""
        from repa_pipeline.stages.sampler import Sampler

        checkpoint = self.checkpoint if samples else None
        return Sampler(
            self.config, self.recipe, self.labels, checkpoint=checkpoint, decodes=decodes
        )


@dataclasses.dataclass(frozen=True)
class _SampleWork:
    stage: SampleStage
    sampler: Sampler
    judges: Mapping[str, Judge]
    source: ShardRows | None
    wanted: Wanted

    def load(self, shard: Shard) -> Records | None:
        return None if self.source is None else self.source.rows(shard.start, shard.stop)

    def compute(self, shard: Shard, loaded: Any) -> Made:
        indices = range(shard.start, shard.stop)
        names = {output.name for output in self._outputs(shard)}
        latents = self.sampler.latents(indices) if loaded is None else loaded
        records: dict[str, Records] = {LATENTS: latents}
        if names != {LATENTS}:
            images = self.sampler.decoded(latents)
            records[IMAGES] = images
            records |= {n: judge.rows(images) for n, judge in self.judges.items() if n in names}
        return Made(records, self.stage.labels.of(indices))

    def store(self, shard: Shard, computed: Made) -> Commits:
        return tuple(output.write(shard, computed) for output in self._outputs(shard))

    def _outputs(self, shard: Shard) -> list[SampleOutput]:
        wanted = self.wanted.get(shard.index)
        return [o for o in self.stage.outputs if wanted is None or o.name in wanted]


def image_spec(recipe: Recipe) -> ArraySpec:
    """The array of the images of a recipe: uint8 [num_images, R, R, 3]."""
    side = recipe["resolution"]
    layout = RecordLayout((side, side, 3), "uint8", recipe["shard_rows"])
    return ArraySpec(IMAGES, recipe["num_images"], layout, recipe)


def sample_ledgers(stage: SampleStage) -> dict[str, Ledger]:
    """The done records of a stage's outputs, by output."""
    return {output.name: ledger_of(stage.store, output) for output in stage.outputs}


def finish_samples(stage: SampleStage) -> list[Path]:
    """Makes the npz (if not yet there) and the picture from the sealed images, where asked for."""
    from repa_pipeline.metrics.adm_file import AdmWriter
    from repa_pipeline.pictures import save_png

    if not stage.finishes:
        return []
    folder, array = Path(stage.output), open_samples(stage.output)
    made = []
    if "npz" in stage.finishes:
        made.append(folder / NPZ_FILE)
        if not made[0].exists():
            spec = array.spec
            settings = json.dumps(dict(stage.recipe), sort_keys=True)
            side = spec.layout.shape[0]
            with AdmWriter(
                made[0], num_images=spec.num_rows, resolution=side, settings=settings
            ) as writer:
                for block in sample_blocks(array):
                    writer.write(block)
    if "grid" in stage.finishes:
        made.append(folder / GRID_FILE)
        labels = stage.labels.of(range(array.spec.num_rows))
        save_png(made[-1], _grid(array, labels, stage.config.grid))
    return made


def _grid(array: SealedArray, labels: npt.NDArray[np.int64], count: int) -> Images:
    """The picture of `count` samples; holds those alone."""
    from repa_pipeline.pictures import class_grid, grid_indices

    wanted = grid_indices(labels, count)
    shown, start = [], 0
    for block in sample_blocks(array, int(wanted[-1]) + 1):
        inside = wanted[(wanted >= start) & (wanted < start + len(block))] - start
        shown.append(block[inside])
        start += len(block)
    return class_grid(np.concatenate(shown), labels[wanted], count)


def open_samples(folder: str) -> SealedArray:
    """The sealed images in a sample folder."""
    return open_sealed(open_store(folder), IMAGES, "sample")


def open_latents(folder: str) -> SealedArray:
    """The sealed latents in a sample folder: raw float32 [N, C, h, w], ready to be decoded."""
    return open_sealed(open_store(folder), LATENTS, "sample --outputs latents")


def sample_blocks(array: SealedArray, num_images: int | None = None) -> Iterator[Any]:
    """Yields verified blocks uint8 [b, R, R, 3] in order, up to `num_images` in all."""
    left = array.spec.num_rows if num_images is None else num_images
    buffer = array.new_buffer()
    for shard in range(array.spec.num_shards):
        if left <= 0:
            return
        block = as_rows(array.read_shard(shard, buffer), array.spec.layout)[:left]
        left -= len(block)
        yield block


def samples_spec(folder: str) -> ArraySpec:
    """The array of a sample folder's images, be they there or not.

    Raises MissingError where nothing of the samples is finished.
    """
    store = open_store(folder)
    finished = [n for n in store.list("") if store.size(f"{n}/seal.json") is not None]
    if not finished:
        raise MissingError(f"no finished samples in {folder}: run `repa sample` first")
    if store.size(SETTINGS_FILE) is not None:
        return image_spec(get_json(store, SETTINGS_FILE))
    return open_samples(folder).spec


def read_settings(folder: str) -> dict[str, Any]:
    """The recipe of a sample folder as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(dict(samples_spec(folder).manifest)))
    return settings
