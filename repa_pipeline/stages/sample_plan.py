"""What `repa sample` is about to do: settings and checkpoint -> a SampleStage, without a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.autoencoders.base import find_autoencoder_weights
from repa_pipeline.config import decisions, from_json
from repa_pipeline.config_sample import LATER, SampleConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import ArraySpec, fingerprint, first_difference
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.diffusion.guidance import count_model_evaluations
from repa_pipeline.diffusion.sampling import choose_sampler
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.methods.base import Method, answers_of
from repa_pipeline.registry import autoencoder_spec, load_plugins
from repa_pipeline.stages.judge import judge_spec, of_samples
from repa_pipeline.stages.sample import SampleStage, image_spec, open_latents
from repa_pipeline.stages.sample_checkpoint import (
    Checkpoint,
    find_checkpoint,
    is_main_average,
    read_checkpoint,
    weights_of,
)
from repa_pipeline.stages.sample_labels import kept_labels, settle_labels
from repa_pipeline.stages.sample_outputs import IMAGES, LATENTS, PICTURES
from repa_pipeline.training.state import method_of_checkpoint
from repa_pipeline.weights import file_sha256

_KINDS = {"samples": "samples", LATENTS: "sample-latents"}
# Of the latents themselves, beside the recipe.
_AUTOENCODER = "autoencoder"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What --outputs, --score, --npz and --grid come to."""

    writes: tuple[str, ...]
    finishes: tuple[str, ...]


def sample_stage(config: SampleConfig) -> SampleStage:
    """Settles checkpoint, decoder, labels and output folder; raises for what does not fit."""
    if config.from_latents:
        return _stage_of_latents(config, config.from_latents)
    where = find_checkpoint(config)
    checkpoint = read_checkpoint(config, where)
    about = checkpoint.about
    config = with_training_entries(config, about)
    decoder = autoencoder_spec(config, config.decoder or about["latents"]["autoencoder"])
    _check_channels(decoder, about["latents"]["channels"], about["latents"]["autoencoder"])
    config = _settled(config, checkpoint, where)
    labels = settle_labels(
        config.labels,
        config.seed,
        about["inputs"]["num_classes"],
        config.num_images,
        sorted_too=config.sorted_labels,
    )
    guide = _guide_recipe(config, checkpoint)
    recipe = {**_recipe(config, checkpoint), **labels.recipe, **guide, **_decoding(config, decoder)}
    inputs = about["inputs"]
    shape = (inputs["latent_channels"], inputs["latent_size"], inputs["latent_size"])
    stage = SampleStage(
        config=config,
        checkpoint=where,
        output=config.output or _default_output(config, where, recipe),
        recipe=recipe,
        labels=labels,
        latents=_latent_spec(recipe, shape, about["latents"]["autoencoder"]),
        notes=checkpoint.notes,
    )
    return _with_outputs(stage)


def _settled(config: SampleConfig, checkpoint: Checkpoint, where: str) -> SampleConfig:
    """The settings with the sampler's own name and the files' own paths.

    Raises ConfigError where the sampler, its steps, or an average do not fit the checkpoint.
    """
    method = method_of_checkpoint(checkpoint.content)
    name = _sampler_of(config, method, checkpoint.about)
    count_model_evaluations(name, config.num_steps)
    weights_of(checkpoint, config.use_ema, config.ema_decay)
    is_main = is_main_average(checkpoint, config.ema_decay)
    return dataclasses.replace(
        config,
        checkpoint=where,
        run=None,
        sampler=name,
        ema_decay=0.0 if is_main else config.ema_decay,
    )


def _sampler_of(config: SampleConfig, method: Method, about: Mapping[str, Any]) -> str:
    what = f"a checkpoint of {about['model_spec']['name']}"
    return choose_sampler(config.sampler, answers_of(method), what).name


def _recipe(config: SampleConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies the images, but for labels, guide and decoder."""
    about, defaults = checkpoint.about, decisions(SampleConfig())
    decided = {
        name: value
        for name, value in decisions(config).items()
        if name not in LATER or value != defaults[name]
    }
    return {
        "kind": _KINDS["samples"],
        "checkpoint_sha256": checkpoint.sha256,
        "step": checkpoint.step,
        "model": about["model_spec"]["name"],
        "method": about["method"],
        "num_classes": about["inputs"]["num_classes"],
        "class_names": about["class_names"],
        "resolution": about["inputs"]["resolution"],
        "num_images": config.num_images,
        **decided,
        **({"eta": config.eta} if config.sampler == "ddim" else {}),
        "tf32": config.dtype == "tf32",
        "source_rows": about["data"]["rows"],
    }


def _decoding(config: SampleConfig, decoder: AutoencoderSpec) -> dict[str, Any]:
    path = find_autoencoder_weights(decoder, config.decoder_weights)
    return {"decoder": decoder.name, "decoder_sha256": file_sha256(path)}


def _check_channels(decoder: AutoencoderSpec, channels: int, autoencoder: str) -> None:
    if decoder.channels != channels:
        raise MismatchError(
            f"decoder {decoder.name} has {decoder.channels} latent channels, the checkpoint's "
            f"latents ({autoencoder}) have {channels}: choose another --decoder"
        )


def _guide_recipe(config: SampleConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of the weaker checkpoint; raises MismatchError for one that cannot
    guide this one, ConfigError where it would have nothing to do."""
    if not config.guide_checkpoint:
        return {}
    if config.cfg == 1:
        raise ConfigError("--guide-checkpoint with --cfg 1 guides nothing: give another --cfg")
    guide = read_checkpoint(config, config.guide_checkpoint)
    check_guide(guide, checkpoint)
    return {"guide": {"checkpoint_sha256": guide.sha256, "step": guide.step}}


def check_guide(guide: Checkpoint, checkpoint: Checkpoint) -> None:
    """Raises MismatchError for a weaker checkpoint that cannot guide this one."""
    load_plugins(tuple(guide.about["config"]["plugins"]))
    difference = first_difference(_guided_by(guide), _guided_by(checkpoint))
    if difference:
        name, got, expected = difference
        raise MismatchError(
            f"guide checkpoint {guide.where} does not fit {checkpoint.where}: {name} is {got!r}, "
            f"expected {expected!r}; give a weaker checkpoint of the same latents"
        )


def _guided_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """What two models must have in common for one to guide the other."""
    about = checkpoint.about
    latents = {k: about["latents"][k] for k in ("autoencoder", "channels", "scale", "shift")}
    inputs = {k: about["inputs"][k] for k in ("resolution", "latent_size", "num_classes")}
    answers = sorted(answers_of(method_of_checkpoint(checkpoint.content)))
    return {"latents": latents, **inputs, "path": about["config"]["path"], "answers": answers}


def _with_outputs(stage: SampleStage) -> SampleStage:
    """The stage with what its settings ask to be written."""
    config = stage.config
    refuse_credentials(stage.output)
    outputs = settle_outputs(config)
    if "npz" in outputs.finishes and "://" in stage.output:
        raise ConfigError(
            f"output {stage.output}: an npz is written to a local folder only; give --outputs with "
            "some of images, png, jpeg, latents, or --score NETWORK, or a local --output"
        )
    if "://" in stage.output:
        outputs = dataclasses.replace(outputs, finishes=())
    if config.network_weights and len(config.score) > 1:
        raise ConfigError(
            "--network-weights names one file and --score several networks: set [networks.NAME] "
            'weights = "..." in repa.toml'
        )
    spec = image_spec(stage.recipe)
    judges = tuple(
        judge_spec(
            config,
            network,
            config.network_weights,
            resolution=stage.recipe["resolution"],
            num_rows=spec.num_rows,
            shard_rows=spec.layout.shard_rows,
            of=of_samples(spec),
            any_weights=config.any_weights,
        )
        for network in dict.fromkeys(config.score)
    )
    return dataclasses.replace(
        stage, writes=outputs.writes, judges=judges, finishes=outputs.finishes
    )


def settle_outputs(config: SampleConfig) -> Outputs:
    """What is written in the pass, and what is made of it; raises ConfigError where they differ."""
    asked = set(config.outputs)
    if not asked and not config.score:
        asked = {"npz", IMAGES} if config.npz else {IMAGES}
    if "npz" in config.outputs and not config.npz:
        raise ConfigError("--outputs npz and --no-npz were both given: give one of them")
    if "npz" in asked:
        asked.add(IMAGES)
    writes = tuple(name for name in (*PICTURES, LATENTS, IMAGES) if name in asked)
    finishes = ["npz"] if "npz" in asked else []
    if IMAGES in asked and config.grid:
        finishes.append("grid")
    return Outputs(writes, tuple(finishes))


def _latent_spec(recipe: Mapping[str, Any], shape: tuple[int, ...], autoencoder: str) -> ArraySpec:
    manifest = {**recipe, "kind": _KINDS[LATENTS], _AUTOENCODER: autoencoder}
    layout = RecordLayout(shape, "float32", recipe["shard_rows"])
    return ArraySpec(LATENTS, recipe["num_images"], layout, manifest)


def _stage_of_latents(config: SampleConfig, folder: str) -> SampleStage:
    """Decodes finished latents: their settings hold, --decoder may name another decoder."""
    if config.checkpoint or config.run:
        raise ConfigError("--from-latents needs no checkpoint: leave out --run and --checkpoint")
    if LATENTS in config.outputs:
        raise ConfigError("--from-latents decodes latents: --outputs names what else is made")
    there = open_latents(folder).spec
    manifest = dict(there.manifest)
    autoencoder = manifest.pop(_AUTOENCODER)
    recipe = {**manifest, "kind": _KINDS["samples"]}
    kept = {f.name for f in dataclasses.fields(SampleConfig) if f.name in recipe}
    given = {name: recipe[name] for name in kept - {"decoder", "resolution"}}
    decoder = autoencoder_spec(config, config.decoder or recipe["decoder"])
    _check_channels(decoder, there.layout.shape[0], autoencoder)
    if config.decoder:
        recipe["decoder"] = decoder.name
    recipe |= _decoding(config, decoder)
    output = config.output or folder
    if not config.output and recipe["decoder_sha256"] != manifest["decoder_sha256"]:
        output = f"{folder.rstrip('/')}.{decoder.name}.{fingerprint(recipe)[:8]}"
    stage = SampleStage(
        config=from_json(SampleConfig, {**dataclasses.asdict(config), **given}),
        checkpoint=None,
        output=output,
        recipe=recipe,
        labels=kept_labels(recipe, open_store(folder)),
        latents=there,
    )
    return _with_outputs(stage)


def with_training_entries(config: SampleConfig, about: Mapping[str, Any]) -> SampleConfig:
    """Plugins and entry overrides of the training run, unless this command has its own."""
    trained: TrainConfig = from_json(TrainConfig, about["config"])
    return dataclasses.replace(
        config,
        plugins=tuple(dict.fromkeys((*trained.plugins, *config.plugins))),
        overrides={**trained.overrides, **config.overrides},
    )


def _default_output(config: SampleConfig, where: str, recipe: Mapping[str, Any]) -> str:
    """A folder whose name tells the settings, and ends in a digest of all of them."""
    low, high = recipe["interval"]
    guidance = f"cfg{recipe['cfg']:g}" if recipe["cfg"] != 1 else "plain"
    guidance += f"-{low:g}-{high:g}" if (low, high) != (0, 1) and recipe["cfg"] != 1 else ""
    guidance += "-auto" if "guide" in recipe else ""
    name = (
        f"step{recipe['step']}.{recipe['sampler']}{recipe['num_steps']}.{guidance}."
        f"seed{recipe['seed']}.n{recipe['num_images']}.{fingerprint(recipe)[:8]}"
    )
    if "://" in where:
        return f"{config.workspace.rstrip('/')}/samples/{name}"
    path = Path(where)
    folder = path if path.is_dir() else path.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    relative = os.path.relpath(folder)
    below = folder if relative.startswith(os.pardir) else Path(relative)
    return str(below / "samples" / name)
