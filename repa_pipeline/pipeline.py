"""`REPAPipeline`: a trained model from Python, in the shape of diffusers' pipelines.

    from repa_pipeline import REPAPipeline

    pipe = REPAPipeline.from_pretrained("exports/big").to("cuda")
    pipe(class_labels=[207, 360], generator=0).images[0].save("dog.png")

The folder is that of `repa export --to safetensors`, with the decoder beside it. It is a class of
its own: diffusers' base class asks of every part what only its own models have.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repa_pipeline.autoencoders.base import (
    Autoencoder,
    find_autoencoder_weights,
    load_autoencoder,
)
from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.device import choose_device, float32_products
from repa_pipeline.diffusion.sampling import choose_sampler
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError
from repa_pipeline.methods.base import answers_of
from repa_pipeline.registry import autoencoder_spec
from repa_pipeline.stages.export_run import TRUNK, RunExport, write_export
from repa_pipeline.stages.sample_checkpoint import (
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
    weights_of,
)
from repa_pipeline.stages.sample_plan import check_guide, with_training_entries
from repa_pipeline.stages.sampler import (
    Draws,
    LatentSampler,
    SampledModel,
    Steps,
    in_batches,
    load_model,
    to_uint8,
)
from repa_pipeline.weights import file_sha256, load_state

VAE_FILE, VAE_RECORD = "vae.safetensors", "vae.json"
Generators = torch.Generator | Sequence[torch.Generator]


@dataclasses.dataclass(frozen=True)
class REPAPipelineOutput:
    """images: a list of PIL images; float32 [B, R, R, 3] in [0, 1] ("np"); or latents in the
    model's scale, float32 [B, C, h, w] ("latent")."""

    images: Any


class REPAPipeline:
    """A SiT or DiT with its autoencoder, by `from_pretrained`, `from_checkpoint` or `from_run`."""

    def __init__(
        self, checkpoint: Checkpoint, model: SampledModel, vae: Autoencoder, vae_file: Path
    ):
        self._checkpoint = checkpoint
        self._vae_file = vae_file
        self.model = model
        self.vae = vae

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str = "cpu", plugins: tuple[str, ...] = (),
        decoder: str | None = None, decoder_weights: str | None = None,
    ) -> REPAPipeline:  # fmt: skip
        """Reads a folder of `save_pretrained` or of `repa export --to safetensors`.

        A decoder that is not beside it comes from `decoder_weights`, the table's file or the hub.
        `plugins`: modules that add what it was trained with. Raises RepaError's children.
        """
        found = _saved_vae(Path(folder))
        return cls.from_checkpoint(
            folder,
            device=device,
            plugins=plugins,
            decoder=decoder,
            decoder_weights=decoder_weights or (None if decoder else found),
        )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, *, device: str = "cpu", ema_decay: float = 0.0,
        plugins: tuple[str, ...] = (), decoder: str | None = None,
        decoder_weights: str | None = None, num_heads: int = 0, resolution: int = 0,
    ) -> REPAPipeline:  # fmt: skip
        """Reads whatever `repa sample --checkpoint` reads: settings as there."""
        config = SampleConfig(
            checkpoint=str(checkpoint), plugins=plugins, decoder=decoder, num_heads=num_heads,
            resolution=resolution, ema_decay=ema_decay, decoder_weights=decoder_weights,
        )  # fmt: skip
        return cls._of(config, device)

    @classmethod
    def from_run(
        cls, name: str | None = None, *, workspace: str = SampleConfig().workspace,
        device: str = "cpu", ema_decay: float = 0.0, decoder_weights: str | None = None,
    ) -> REPAPipeline:  # fmt: skip
        """The newest checkpoint of a run of a workspace, the only one where no name is given."""
        config = SampleConfig(
            run=name, workspace=workspace, ema_decay=ema_decay, decoder_weights=decoder_weights
        )
        return cls._of(config, device)

    @classmethod
    def _of(cls, config: SampleConfig, device: str) -> REPAPipeline:
        device = choose_device(device)
        checkpoint = read_checkpoint(config, find_checkpoint(config))
        about = checkpoint.about
        config = with_training_entries(config, about)
        model = load_model(checkpoint, device, ema_decay=config.ema_decay)
        chosen = {**checkpoint.content, "ema": weights_of(checkpoint, True, config.ema_decay)}
        spec = autoencoder_spec(config, config.decoder or about["latents"]["autoencoder"])
        weights = find_autoencoder_weights(spec, config.decoder_weights)
        vae = load_autoencoder(spec, weights=str(weights), device=device)
        return cls(dataclasses.replace(checkpoint, content=chosen), model, vae, weights)

    def save_pretrained(
        self, folder: str | Path, *, license: str = "", with_vae: bool = True
    ) -> None:
        """Writes model, settings and card as `repa export --to safetensors`, and the decoder.

        safetensors and JSON alone. Raises MismatchError when something else, or another decoder,
        is in the folder.
        """
        path, where = Path(folder), Path(self._checkpoint.where)
        settings: dict[str, Any] = {"to": "safetensors", "destination": str(path)}
        if license:
            settings["license"] = license
        home = where.parent.parent if where.parent.name == "checkpoints" else where.parent
        plan = RunExport(ExportConfig(**settings), where, home, path, self._checkpoint.sha256)
        write_export(plan, self._checkpoint.content)
        if with_vae:
            _write_vae(path, self._vae_file)

    @property
    def transformer(self) -> nn.Module:
        """The trunk: SiT takes latents [B, C, h, w], times [B], labels [B]."""
        return self.model.network.get_submodule(TRUNK[:-1])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.vae.device

    def to(self, device: str | torch.device) -> REPAPipeline:
        """Moves both networks; returns itself."""
        placed = choose_device(str(device))
        self.model.network.to(placed)
        self.vae = load_autoencoder(self.vae.spec, weights=str(self._vae_file), device=placed)
        return self

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """The classes of these names; raises ConfigError for one that the model does not have."""
        known = self._checkpoint.about.get("class_names") or []
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in known:
                raise ConfigError(f"no class '{name}': known are {', '.join(known[:20]) or 'none'}")
        return [known.index(name) for name in wanted]

    def __call__(
        self, class_labels: Sequence[int], num_inference_steps: int = 250,
        guidance_scale: float = 1.8, guidance_interval: tuple[float, float] = (0.0, 0.7),
        sampler: str = "auto", generator: int | Generators | None = None,
        output_type: str = "pil", *, indices: Sequence[int] | None = None,
        batch_size: int | None = None, guide: REPAPipeline | None = None, eta: float = 0.0,
        dtype: str = "float32", uint8: str = "truncate",
    ) -> REPAPipelineOutput:  # fmt: skip
        """An image for each of `class_labels`.

        generator: a seed, or torch generators (one for all, or one an image). With a seed, image i
        is image `indices[i]` (without them i) of `repa sample --seed`, bit for bit if `batch_size`
        is the same (default: all at once). guide: a weaker pipeline, for autoguidance; sampler,
        eta, dtype, uint8 as in `repa sample`. Raises ConfigError for settings that do not fit.
        """
        _check_choice("output_type", output_type, ("pil", "np", "latent"))
        _check_choice("dtype", dtype, ("float32", "tf32", "bf16"))
        _check_choice("uint8", uint8, ("truncate", "round"))
        labels = self._checked(class_labels)
        steps = Steps(
            self._sampler(sampler), num_inference_steps, guidance_scale, guidance_interval, eta,
            "float32" if dtype == "tf32" else dtype,
        )  # fmt: skip
        weaker = None
        if guide is not None:
            check_guide(guide._checkpoint, self._checkpoint)
            weaker = guide.model
        latent_sampler = LatentSampler(self.model, steps, str(self.device), weaker)
        seeds = list(range(len(labels)) if indices is None else indices)
        if len(seeds) != len(labels):
            raise ConfigError(f"indices: got {len(seeds)}, expected one for {len(labels)} labels")
        if generator is None:
            generator = int(torch.randint(2**31, ()).item())
        size, shapes = batch_size or len(labels), self.model.method.state_shapes()
        draw = _drawing(generator, seeds, shapes, str(self.device), size)

        def batch(chosen: list[int]) -> npt.NDArray[Any]:
            scaled = latent_sampler.scaled(labels[chosen], draw(chosen))
            if output_type == "latent":
                found: npt.NDArray[Any] = scaled.float().cpu().numpy()
                return found
            pixels = self.vae.decode(latent_sampler.unscaled(scaled))
            return _picture(pixels, output_type, uint8)

        with float32_products(tf32=dtype == "tf32"):
            made = in_batches(batch, list(range(len(labels))), size)
        return REPAPipelineOutput(_converted(made, output_type))

    def _checked(self, class_labels: Sequence[int]) -> npt.NDArray[np.int64]:
        num_classes = self._checkpoint.about["inputs"]["num_classes"]
        labels = np.array(list(class_labels), np.int64)
        if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            raise ConfigError(
                f"class_labels: got {list(class_labels)}, expected classes from 0 to "
                f"{num_classes - 1}"
            )
        return labels

    def _sampler(self, name: str) -> str:
        what = f"a model of {self._checkpoint.about['model_spec']['name']}"
        return choose_sampler(name, answers_of(self.model.method), what).name


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: got '{value}', expected one of {', '.join(known)}")


def _drawing(
    generator: int | Generators, seeds: list[int], shapes: Any, device: str, size: int
) -> Any:
    """positions of a batch -> their random numbers, in batches of `size`."""
    if isinstance(generator, int):
        return lambda chosen: Draws.seeded(generator, [seeds[i] for i in chosen], shapes, device)
    single = isinstance(generator, torch.Generator)
    each: Any = [generator] * len(seeds) if single else list(generator)  # type: ignore[arg-type]
    if len(each) != len(seeds):
        raise ConfigError(f"generator: got {len(each)}, expected one for {len(seeds)} images")
    other = [one.device for one in each if one.device.type != "cpu"]
    if other:
        raise ConfigError(
            f"generator: got one of {other[0]}, expected torch.Generator(): noise is drawn on the "
            "CPU, so that it is the same for every device"
        )

    if len(seeds) % size:
        raise ConfigError(
            f"batch_size {size} must divide the {len(seeds)} images where generators are given"
        )

    def draw(chosen: list[int]) -> Draws:
        own = [each[i] for i in chosen]
        # Not ahead: the thread would go on drawing from generators that the caller uses again.
        return Draws(own, own, shapes, device, ahead=False)

    return draw


def _picture(pixels: Tensor, output_type: str, uint8: str) -> npt.NDArray[Any]:
    if output_type == "pil":
        return to_uint8(pixels, uint8)
    found: npt.NDArray[Any] = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return found


def _converted(made: npt.NDArray[Any], output_type: str) -> Any:
    if output_type == "latent":
        return torch.from_numpy(made)
    if output_type == "np":
        return made
    from PIL import Image

    return [Image.fromarray(image) for image in made]


def _saved_vae(folder: Path) -> str | None:
    """The decoder's file beside a saved model, verified; None without one."""
    if not (folder / VAE_RECORD).is_file():
        return None
    record = get_json(LocalStore(str(folder)), VAE_RECORD)
    path = folder / VAE_FILE
    if not path.is_file() or file_sha256(path) != record.get("sha256"):
        raise DamagedError(f"{path} is not what was saved: save the pipeline again")
    return str(path)


def _write_vae(folder: Path, source: Path) -> None:
    """The decoder's weights as safetensors; a file of that format is copied as it is."""
    target, store = folder / VAE_FILE, LocalStore(str(folder))
    origin = file_sha256(source)
    if target.is_file() and store.size(VAE_RECORD) is not None:
        record = get_json(store, VAE_RECORD)
        if origin not in (record.get("source_sha256"), record.get("sha256")):
            raise MismatchError(
                f"{target} is another decoder than the pipeline's: remove it or save elsewhere"
            )
        if file_sha256(target) == record.get("sha256"):
            return
    temporary = target.with_suffix(".tmp")
    if source.suffix == ".safetensors":
        shutil.copyfile(source, temporary)
    else:
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in load_state(source).items()}, temporary)
    temporary.replace(target)
    record = {"sha256": file_sha256(target), "source_sha256": origin}
    store.put(VAE_RECORD, json_bytes(record))
