"""`repa sample`: (checkpoint, settings, seed, k) -> image k.

Images are shards of a sealed array like every other output, so a killed run loses at most the
shard in flight. The npz for the ADM suite and the picture are made from the sealed array.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import decisions, from_json
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    fingerprint,
    open_sealed,
    write_shard,
)
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.shards import RecordLayout, as_rows
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.contracts import Commit, Commits, Shard, Wanted, Work
from repa_pipeline.errors import ConfigError, DataError, MismatchError
from repa_pipeline.registry import autoencoder_spec, load_plugins
from repa_pipeline.stages.array_stage import ArrayOutput
from repa_pipeline.training.draws import seed_of
from repa_pipeline.training.runs import find_run

if TYPE_CHECKING:
    import torch

    from repa_pipeline.diffusion.interpolant import States
    from repa_pipeline.diffusion.sampling import SamplerSpec
    from repa_pipeline.methods.base import Method

IMAGES = "images"
Images = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class SampleStage:
    """Writes images: uint8 [num_images, R, R, 3], image k in row k."""

    config: SampleConfig
    checkpoint: str
    output: str
    spec: ArraySpec
    name: str = "sample"

    @property
    def store(self) -> ObjectStore:
        return open_store(self.output)

    @property
    def outputs(self) -> tuple[ArrayOutput, ...]:
        return (ArrayOutput(self.output, self.spec),)

    def open(self, wanted: Wanted) -> Work:
        prepare_compute(self.config.threads)
        return _SampleWork(self, Sampler(self.config, self.checkpoint, self.spec.manifest))


@dataclasses.dataclass(frozen=True)
class _SampleWork:
    stage: SampleStage
    sampler: Sampler

    def load(self, shard: Shard) -> None:
        return None

    def compute(self, shard: Shard, loaded: None) -> Images:
        return self.sampler.images(range(shard.start, shard.stop))

    def store(self, shard: Shard, computed: Images) -> Commits:
        spec = self.stage.spec
        num_bytes, digest = write_shard(self.stage.store, spec, shard.index, computed)
        return (Commit(shard.index, shard.num_rows, num_bytes, digest, output=spec.name),)


class Sampler:
    """The EMA (or raw) model of a checkpoint with its decoder, loaded once."""

    def __init__(self, config: SampleConfig, checkpoint: str, manifest: Mapping[str, Any]):
        import torch

        from repa_pipeline.autoencoders.base import load_autoencoder
        from repa_pipeline.training.checkpoint import load_checkpoint
        from repa_pipeline.training.state import method_of_checkpoint

        self.config = config
        self.device = choose_device(config.device)
        content = load_checkpoint(Path(checkpoint))
        self.about: Mapping[str, Any] = content["about"]
        load_plugins(tuple(self.about["config"]["plugins"]))
        self.method: Method = method_of_checkpoint(content)
        self.model = self.method.build()
        self.model.load_state_dict(content["ema" if config.use_ema else "model"])
        self.model.to(self.device).eval().requires_grad_(False)
        self.sampler = _choose_sampler(config.sampler, self.method, self.about)
        spec = autoencoder_spec(config, manifest["decoder"])
        weights = config.decoder_weights
        self.decoder = load_autoencoder(spec, weights=weights, device=self.device)
        self.num_classes: int = self.about["inputs"]["num_classes"]
        self._autocast = torch.autocast(
            self.device.split(":")[0], torch.bfloat16, enabled=config.dtype == "bf16"
        )

    def images(self, indices: range) -> Images:
        """uint8 [len(indices), R, R, 3], made in batches of exactly `batch_size`."""
        size = self.config.batch_size
        parts = []
        for start in range(0, len(indices), size):
            batch = list(indices[start : start + size])
            padded = batch + [batch[-1]] * (size - len(batch))
            parts.append(self._to_uint8(self._decode(self.latents(padded)))[: len(batch)])
        return np.concatenate(parts)

    def latents(self, indices: list[int]) -> torch.Tensor:
        """Scaled latents float64 [B, C, h, w] of samples `indices`."""
        import torch

        from repa_pipeline.diffusion.guidance import guided
        from repa_pipeline.diffusion.interpolant import PATHS
        from repa_pipeline.diffusion.sampling import SamplerOptions

        config = self.config
        labels = sample_labels(config.labels, config.seed, indices, self.num_classes)
        cond = torch.from_numpy(labels).to(self.device)
        null = torch.full_like(cond, self.method.null_label)
        answer = guided(self._answer, cond, null, scale=config.cfg, interval=config.interval)
        shapes = self.method.state_shapes()
        noise = self._draw(indices, "noise", shapes, torch.float32)[0]
        options = SamplerOptions(
            config.num_steps,
            increments=_Increments(self, indices, shapes),
            path=PATHS[self.about["config"]["path"]],
            eta=config.eta,
        )
        return self.sampler.run(answer, noise, options)[0]

    def _answer(self, states: States, t: torch.Tensor, cond: torch.Tensor) -> States:
        with self._autocast:
            answer: States = getattr(self.method, self.sampler.asks)(self.model, states, t, cond)
            return answer

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        import torch

        from repa_pipeline.autoencoders.scaling import unscale_by

        manifest = self.about["latents"]
        scaled = latents.to(torch.float32)
        return self.decoder.decode(unscale_by(scaled, manifest["scale"], manifest["shift"]))

    def _to_uint8(self, pixels: torch.Tensor) -> Images:
        """[-1, 1] [B, 3, R, R] -> uint8 [B, R, R, 3]; truncation is the reference's rule.

        Raises DataError when a pixel is not finite.
        """
        if not pixels.isfinite().all():
            raise DataError(
                "the model's images are not finite: use a checkpoint from before the loss "
                "diverged, or --dtype float32"
            )
        unit = (pixels + 1) / 2
        levels = 255 * unit + (0.5 if self.config.uint8 == "round" else 0.0)
        images: Images = levels.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _draw(
        self,
        indices: list[int],
        purpose: str,
        shapes: tuple[tuple[int, ...], ...],
        dtype: torch.dtype,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[States, list[torch.Generator]]:
        """Standard normal states, sample by sample from a CPU generator of the sample's own."""
        import torch

        generators = generators or [
            torch.Generator().manual_seed(seed_of(self.config.seed, k, purpose)) for k in indices
        ]
        states = tuple(
            torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators]).to(
                self.device
            )
            for shape in shapes
        )
        return states, generators


class _Increments:
    """Normal increments of a batch, drawn step after step from each sample's own generator."""

    def __init__(self, sampler: Sampler, indices: list[int], shapes: tuple[tuple[int, ...], ...]):
        self._sampler = sampler
        self._indices = indices
        self._shapes = shapes
        self._generators: list[torch.Generator] | None = None

    def __call__(self, step: int) -> States:
        import torch

        states, self._generators = self._sampler._draw(
            self._indices, "sde", self._shapes, torch.float64, self._generators
        )
        return states


def sample_labels(
    rule: str, seed: int, indices: list[int], num_classes: int
) -> npt.NDArray[np.int64]:
    """int64 [B]: the class of each sample, from its own index and the seed alone.

    random: uniform; balanced: index % num_classes; a number: that class. Raises ConfigError.
    """
    if rule == "balanced":
        return np.array([k % num_classes for k in indices], np.int64)
    if rule == "random":
        return np.array([seed_of(seed, k, "label") % num_classes for k in indices], np.int64)
    if not rule.isdecimal() or int(rule) >= num_classes:
        raise ConfigError(
            f"labels: got '{rule}', expected random, balanced or a class from 0 to "
            f"{num_classes - 1}"
        )
    return np.full(len(indices), int(rule), np.int64)


def sample_stage(config: SampleConfig) -> SampleStage:
    """Settles checkpoint, decoder and output folder; raises for what does not fit together."""
    from repa_pipeline.autoencoders.base import find_autoencoder_weights
    from repa_pipeline.training.checkpoint import file_digest, load_checkpoint
    from repa_pipeline.training.state import method_of_checkpoint
    from repa_pipeline.weights import file_sha256

    path = _find_checkpoint(config)
    content = load_checkpoint(path)
    about = content["about"]
    config = _with_training_entries(config, about)
    decoder = config.decoder or about["latents"]["autoencoder"]
    spec = autoencoder_spec(config, decoder)
    if spec.channels != about["latents"]["channels"]:
        raise MismatchError(
            f"decoder {decoder} has {spec.channels} latent channels, the checkpoint's latents "
            f"({about['latents']['autoencoder']}) have {about['latents']['channels']}: choose "
            "another --decoder"
        )
    sample_labels(config.labels, config.seed, [0], about["inputs"]["num_classes"])
    config = _with_sampler(config, method_of_checkpoint(content), about)
    resolution = about["inputs"]["resolution"]
    manifest = {
        "kind": "samples",
        "checkpoint_sha256": file_digest(path),
        "step": content["step"],
        "model": about["model_spec"]["name"],
        "method": about["method"],
        "num_classes": about["inputs"]["num_classes"],
        "class_names": about["class_names"],
        "resolution": resolution,
        "num_images": config.num_images,
        **decisions(config),
        **({"eta": config.eta} if config.sampler == "ddim" else {}),
        "decoder": spec.name,
        "decoder_sha256": file_sha256(find_autoencoder_weights(spec, config.decoder_weights)),
        "tf32": False,
        "source_rows": about["data"]["rows"],
    }
    layout = RecordLayout((resolution, resolution, 3), "uint8", config.shard_rows)
    array = ArraySpec(IMAGES, config.num_images, layout, manifest)
    output = config.output or str(_default_output(path, manifest))
    return SampleStage(config, str(path), output, array)


def _with_sampler(config: SampleConfig, method: Method, about: Mapping[str, Any]) -> SampleConfig:
    """The settings with the sampler's own name; raises ConfigError where it or its steps do not
    fit the checkpoint."""
    from repa_pipeline.diffusion.guidance import count_model_evaluations

    name = _choose_sampler(config.sampler, method, about).name
    count_model_evaluations(name, config.num_steps)
    return dataclasses.replace(config, sampler=name)


def _choose_sampler(name: str, method: Method, about: Mapping[str, Any]) -> SamplerSpec:
    from repa_pipeline.diffusion.sampling import choose_sampler
    from repa_pipeline.methods.base import answers_of

    what = f"a checkpoint of {about['model_spec']['name']}"
    return choose_sampler(name, answers_of(method), what)


def finish_samples(stage: SampleStage) -> list[Path]:
    """Makes the npz (if not yet there) and the picture from the sealed images, where asked for."""
    from repa_pipeline.metrics.adm_file import AdmWriter
    from repa_pipeline.pictures import save_png

    folder, config = Path(stage.output), stage.config
    array = open_samples(str(folder))
    made = []
    npz = folder / "samples.npz"
    if config.npz:
        if not npz.exists():
            resolution = array.spec.layout.shape[0]
            with AdmWriter(npz, num_images=array.spec.num_rows, resolution=resolution) as writer:
                for block in sample_blocks(array):
                    writer.write(block)
        made.append(npz)
    if config.grid:
        picture = folder / "grid.png"
        save_png(picture, _grid(array, config.grid))
        made.append(picture)
    return made


def _grid(array: SealedArray, count: int) -> Images:
    """The picture of `count` samples; holds those alone."""
    from repa_pipeline.pictures import class_grid, grid_indices

    labels = labels_of(array.spec.manifest, array.spec.num_rows)
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


def sample_blocks(array: SealedArray, num_images: int | None = None) -> Any:
    """Yields verified blocks uint8 [b, R, R, 3] in order, up to `num_images` in all."""
    left = array.spec.num_rows if num_images is None else num_images
    buffer = array.new_buffer()
    for shard in range(array.spec.num_shards):
        if left <= 0:
            return
        block = as_rows(array.read_shard(shard, buffer), array.spec.layout)[:left]
        left -= len(block)
        yield block


def labels_of(manifest: Mapping[str, Any], num_images: int) -> npt.NDArray[np.int64]:
    """int64 [num_images]: the classes that the samples of a manifest were asked for."""
    return sample_labels(
        manifest["labels"], manifest["seed"], list(range(num_images)), manifest["num_classes"]
    )


def _find_checkpoint(config: SampleConfig) -> Path:
    if config.checkpoint and config.run:
        raise ConfigError("--run and --checkpoint were both given: give one of them")
    if config.checkpoint:
        return Path(config.checkpoint)
    return find_run(config, config.run).newest_checkpoint()


def _with_training_entries(config: SampleConfig, about: Mapping[str, Any]) -> SampleConfig:
    """Plugins and entry overrides of the training run, unless this command has its own."""
    trained: TrainConfig = from_json(TrainConfig, about["config"])
    return dataclasses.replace(
        config,
        plugins=tuple(dict.fromkeys((*trained.plugins, *config.plugins))),
        overrides={**trained.overrides, **config.overrides},
    )


def _default_output(checkpoint: Path, manifest: Mapping[str, Any]) -> Path:
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    low, high = manifest["interval"]
    guidance = f"cfg{manifest['cfg']:g}" if manifest["cfg"] != 1 else "plain"
    guidance += f"-{low:g}-{high:g}" if (low, high) != (0, 1) and manifest["cfg"] != 1 else ""
    name = (
        f"step{manifest['step']}.{manifest['sampler']}{manifest['num_steps']}.{guidance}."
        f"seed{manifest['seed']}.n{manifest['num_images']}.{fingerprint(manifest)[:8]}"
    )
    relative = os.path.relpath(run)
    return (run if relative.startswith(os.pardir) else Path(relative)) / "samples" / name


def read_settings(folder: str) -> dict[str, Any]:
    """The manifest of a sample folder as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(dict(open_samples(folder).spec.manifest)))
    return settings
