"""`repa import FILE.pt --name NAME`: a checkpoint of others becomes a run that can be sampled.

Read are checkpoints of the reference's code (either naming, projectors of any width; a bare state
dict too), published DiTs (the authors' and diffusers' names) and folders of `repa export --to
safetensors`. They hold no optimizer and no place in
the data, so such a run is sampled, never trained on. Nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repa_pipeline.config_exchange import ImportConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.names import ArrayName
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.encoders import ALIASES
from repa_pipeline.errors import ConfigError, DataError, MismatchError, MissingError
from repa_pipeline.methods import METHODS, auto_method
from repa_pipeline.methods.base import FeatureInfo, Inputs
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.models.published_dit import load_published_dit
from repa_pipeline.models.reference import (
    ReferenceCheckpoint,
    family_of,
    load_reference_checkpoint,
    read_plain,
)
from repa_pipeline.models.sit import SiTConfig
from repa_pipeline.registry import autoencoder_spec, load_plugins
from repa_pipeline.resolve import convert
from repa_pipeline.settings import as_json, from_json
from repa_pipeline.stages.export_run import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    PROJECTORS,
    PROJECTORS_FILE,
    TRUNK,
)
from repa_pipeline.training.checkpoint import file_digest, save_checkpoint
from repa_pipeline.training.runs import IMPORTED, NAME_RULE, Run, locked, runs_folder
from repa_pipeline.training.state import describe_run, method_of_checkpoint
from repa_pipeline.weights import load_state

State = dict[str, Tensor]

# Settings whose names differ in the reference's args; the others that count are read one by one.
_SETTINGS = {
    "path": "path_type",
    "weighting": "weighting",
    "align_coeff": "proj_coeff",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "beta2": "adam_beta2",
    "weight_decay": "adam_weight_decay",
    "clip": "max_grad_norm",
    "label_dropout": "cfg_prob",
    "seed": "seed",
}


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """What a file holds, as a checkpoint's parts; `step` 0 where it does not say."""

    content: Mapping[str, Any]
    step: int
    digest: str

    @property
    def about(self) -> Mapping[str, Any]:
        about: Mapping[str, Any] = self.content["about"]
        return about


def read_model(config: ImportConfig) -> ImportedModel:
    """Reads and checks what `config.source` names; the model it describes has just these weights.

    Raises MissingError without a file, DataError for one that is no such checkpoint or holds more
    than tensors and settings, MismatchError where parts do not fit, ConfigError for what is not
    supported or cannot be told.
    """
    load_plugins(config.plugins)
    path = Path(config.source)
    if path.is_dir():
        imported = _read_exported(path, config.plugins)
    else:
        imported = _read_file(config, path)
    _check_builds(imported, path)
    return imported


def import_run(config: ImportConfig, imported: ImportedModel) -> tuple[Run, bool]:
    """Writes the run; (run, whether it is new). Raises MismatchError when another run is there."""
    if not config.name or not NAME_RULE.fullmatch(config.name):
        raise ConfigError(
            f"run name {config.name!r}: a checkpoint becomes a run, say which with --name NAME "
            "(letters, digits, '.', '_', '-', '+')"
        )
    run = Run(runs_folder(config) / config.name)
    record = {
        IMPORTED: Path(config.source).name,
        "sha256": imported.digest,
        "decided": {"data": imported.about["data"]},
        "config": imported.about["config"],
    }
    if not LocalStore(str(run.folder)).put_new("run.json", json_bytes(record)):
        there = run.record()
        if there.get("sha256") != imported.digest or IMPORTED not in there:
            raise MismatchError(
                f"run '{config.name}' is there and was not imported from this file: choose another "
                "--name"
            )
    with locked(run):
        if run.has_checkpoint():
            return run, False
        save_checkpoint(run.checkpoints, imported.step, imported.content)
    return run, True


def load_exported(folder: str | os.PathLike[str], plugins: tuple[str, ...] = ()) -> nn.Module:
    """The trunk of a folder of `repa export --to safetensors`, in eval mode, without gradients.

    Its forward is that of its family: SiT takes latents [B, C, h, w], times [B], labels [B].
    `plugins`: modules that add what it was trained with. Raises MissingError, DataError,
    MismatchError or ConfigError for what is no such folder.
    """
    load_plugins(plugins)
    imported = _read_exported(Path(folder), plugins)
    model = _check_builds(imported, Path(folder))
    return model.get_submodule(TRUNK[:-1]).eval().requires_grad_(False)


def _check_builds(imported: ImportedModel, path: Path) -> nn.Module:
    """The module that the description builds, with the averaged weights."""
    model = method_of_checkpoint(imported.content).build()
    for part in ("model", "ema"):
        try:
            model.load_state_dict(imported.content[part])
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise MismatchError(
                f"{path} does not fit the model that it describes ({part}): {what[:300]}"
            ) from error
    return model


def _read_exported(folder: Path, plugins: tuple[str, ...]) -> ImportedModel:
    if not (folder / CONFIG_FILE).is_file():
        raise MissingError(
            f"no {CONFIG_FILE} in {folder}: give a folder of `repa export --to safetensors`"
        )
    config = get_json(LocalStore(str(folder)), CONFIG_FILE)
    if (config.get("format"), config.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{folder / CONFIG_FILE} has format {config.get('format')!r} version "
            f"{config.get('format_version')!r}, expected {FORMAT!r} version {FORMAT_VERSION}"
        )
    state, digest = State(), hashlib.sha256()
    for name, prefix in ((MODEL_FILE, TRUNK), (PROJECTORS_FILE, PROJECTORS)):
        path = folder / name
        if name == PROJECTORS_FILE and not path.is_file():
            continue
        if not path.is_file():
            raise MissingError(f"no {name} in {folder}: the export is not whole")
        digest.update(file_digest(path).encode())
        state |= {f"{prefix}{key}": value for key, value in load_state(path).items()}
    about = trusted(config["about"], plugins, folder / CONFIG_FILE)
    content = {"model": state, "ema": state, "optimizer": None, "about": about}
    return ImportedModel(content, int(config["step"]), digest.hexdigest())


def trusted(about: Mapping[str, Any], plugins: tuple[str, ...], where: object) -> dict[str, Any]:
    """A description that names code of this package and of the user's own plugins alone, which are
    loaded; changes of table entries, which may name code too, are left out.

    It comes from somebody else: raises ConfigError when it wants any other module imported.
    """
    known = {spec.loader for spec in METHODS.values()} | {spec.loader for spec in MODELS.values()}
    wanted = [about["method"], about["model_spec"].get("loader", ModelSpec.loader)]
    unknown = [name for name in wanted if name not in known]
    unknown += sorted({*about["config"].get("plugins", ())} - {*plugins})
    if unknown:
        raise ConfigError(
            f"{where} wants '{unknown[0]}', which is neither of this package nor in "
            "your plugins: name its plugin in repa.toml if you trust it"
        )
    config = {**about["config"], "plugins": list(plugins), "overrides": {}}
    # With the defaults of what an exporter leaves out, paths and the like.
    return {**about, "config": as_json(from_json(TrainConfig, config))}


def _read_file(config: ImportConfig, path: Path) -> ImportedModel:
    content = read_plain(path)
    found = content if any(hasattr(v, "shape") for v in content.values()) else content.get("ema")
    family = family_of(found) if isinstance(found, Mapping) else None
    if family == "dit":
        checkpoint = _read_dit(config, path, found)
    else:
        del content, found  # mapped; read again, with what is wrong with it
        family = "sit"
        checkpoint = load_reference_checkpoint(path, num_heads=config.num_heads or None)
    digest = file_digest(path)
    about = _describe(config, checkpoint, family)
    about["class_names"] = None
    resolution = about["inputs"]["resolution"]
    teachers = [feature["name"] for feature in about["inputs"]["features"]]
    arrays = {str(ArrayName("features", name, resolution)): "imported" for name in teachers}
    about["data"] = {"rows": f"imported {digest}", "arrays": arrays}
    averaged = checkpoint.ema_projectors or checkpoint.projectors
    states = {
        "model": _join(checkpoint.model, checkpoint.projectors),
        "ema": _join(checkpoint.ema, averaged),
    }
    step = checkpoint.steps
    if step is None:
        named = re.fullmatch(r"\d{4,}", path.stem)  # the reference's names: 0400000.pt
        step = int(path.stem) if named else 0
    return ImportedModel({**states, "optimizer": None, "about": about}, int(step), digest)


def _read_dit(config: ImportConfig, path: Path, state: Any) -> ReferenceCheckpoint:
    """A published DiT; its averaged weights stand for the trained ones too."""
    autoencoder = autoencoder_spec(config, config.autoencoder)
    is_diffusers = any(key.startswith("transformer_blocks.") for key in state)
    if is_diffusers and not config.resolution:
        raise ConfigError(
            f"{path} has diffusers' names, which do not tell the size of the images: give "
            "--resolution 256 or 512"
        )
    size = autoencoder.latent_shape(config.resolution)[-1] if is_diffusers else 0
    shape, found = load_published_dit(path, input_size=size, num_heads=config.num_heads or None)
    return ReferenceCheckpoint(shape, found, found, {}, {}, None)


def _join(trunk: Mapping[str, Tensor], projectors: Mapping[str, Tensor]) -> State:
    """Both under our names, as tensors of their own: a mapped file may go away."""
    named = {f"{TRUNK}{key}": value for key, value in trunk.items()}
    named |= {f"{PROJECTORS}{key}": value for key, value in projectors.items()}
    return {key: value.clone() for key, value in named.items()}


def _describe(config: ImportConfig, checkpoint: ReferenceCheckpoint, family: str) -> dict[str, Any]:
    """What a checkpoint of ours says of itself."""
    shape, args = checkpoint.config, checkpoint.args
    if args.get("prediction", "v") != "v":
        raise ConfigError(
            f"the checkpoint predicts '{args['prediction']}': this package's SiT predicts 'v'"
        )
    latents = _latents(config, shape, args)
    spec = _model_spec(shape, args, family)
    features = _features(checkpoint, spec)
    inputs = Inputs(
        resolution=latents["resolution"],
        latent_channels=shape.in_channels,
        latent_size=shape.input_size,
        num_classes=shape.num_classes,
        features=features,
    )
    trained = _settings(config, checkpoint, spec, features)
    method = METHODS[auto_method(family, aligned=bool(features))]
    return describe_run(method.loader, trained, spec, inputs, latents)


def _latents(config: ImportConfig, shape: SiTConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    spec = autoencoder_spec(config, config.autoencoder)
    if spec.channels != shape.in_channels:
        raise MismatchError(
            f"autoencoder {spec.name} has {spec.channels} latent channels, the checkpoint's model "
            f"has {shape.in_channels}: choose another --autoencoder"
        )
    resolution = shape.input_size * spec.downsample
    if args.get("resolution") not in (None, resolution):
        raise MismatchError(
            f"the checkpoint is of {args['resolution']} pixels, latents of {shape.input_size} per "
            f"side of {spec.name} are of {resolution}: choose another --autoencoder"
        )
    return {
        "kind": "latents",
        "autoencoder": spec.name,
        "posterior": spec.posterior,
        "channels": spec.channels,
        "downsample": spec.downsample,
        "scale": list(spec.scale),
        "shift": list(spec.shift),
        "resolution": resolution,
    }


def _model_spec(shape: SiTConfig, args: Mapping[str, Any], family: str) -> ModelSpec:
    """The table's entry of these sizes, or one made of them."""
    if shape.mlp_ratio != 4.0:
        raise ConfigError(
            f"the checkpoint's MLPs are {shape.mlp_ratio:g} times as wide as its tokens, expected 4"
        )
    sizes = (shape.depth, shape.width, shape.num_heads, shape.patch_size)
    of_family = [spec for spec in MODELS.packaged.values() if spec.family == family]
    for spec in of_family:
        if (spec.depth, spec.width, spec.num_heads, spec.patch_size) == sizes:
            return spec
    prefix = of_family[0].name.partition("-")[0]
    name = f"{prefix}-{shape.depth}x{shape.width}/{shape.patch_size}"
    depth = int(args.get("encoder_depth") or max(1, shape.depth // 3))
    return ModelSpec(name, *sizes, depth, family, of_family[0].loader)


def _features(checkpoint: ReferenceCheckpoint, spec: ModelSpec) -> tuple[FeatureInfo, ...]:
    """A teacher for every projector, named as the args have it."""
    numbers = sorted({int(key.split(".")[0]) for key in checkpoint.projectors})
    named = str(checkpoint.args.get("enc_type") or "").split(",")
    features = []
    for position, number in enumerate(numbers):
        name = named[position] if len(named) == len(numbers) and named[0] else f"teacher-{number}"
        try:
            width = len(checkpoint.projectors[f"{number}.4.bias"])
        except KeyError as error:
            raise DataError(
                f"projector {number} has no layer {error}: expected layers 0, 2 and 4 of an MLP"
            ) from error
        grid = spec.grid(checkpoint.config.input_size)
        kept = frozenset({"direction", "magnitude"})
        features.append(FeatureInfo(ALIASES.get(name, name), width, grid, kept))
    return tuple(features)


def _settings(
    config: ImportConfig,
    checkpoint: ReferenceCheckpoint,
    spec: ModelSpec,
    features: tuple[FeatureInfo, ...],
) -> TrainConfig:
    """The run's settings as far as the file tells them, defaults elsewhere."""
    args = checkpoint.args
    told = {ours: _told(ours, args[theirs]) for ours, theirs in _SETTINGS.items() if theirs in args}
    first = checkpoint.projectors.get("0.0.bias")
    return TrainConfig(
        name=config.name,
        source=f"imported from {Path(config.source).name}",
        model=spec.name,
        encoder=tuple(feature.name for feature in features) or ("none",),
        autoencoder=config.autoencoder,
        qk_norm=checkpoint.config.qk_norm,
        align_depth=int(args.get("encoder_depth") or 0),
        projector_width=2048 if first is None else len(first),
        steps=int(checkpoint.steps or args.get("max_train_steps") or 1),
        plugins=config.plugins,
        overrides=config.overrides,
        **told,
    )


def _told(name: str, value: Any) -> Any:
    """A setting as the file has it; raises DataError for a value that ours cannot have."""
    (field,) = [field for field in dataclasses.fields(TrainConfig) if field.name == name]
    try:
        converted = convert(typing.get_type_hints(TrainConfig)[name], value)
    except (TypeError, ValueError) as error:
        raise DataError(f"the checkpoint's args say {_SETTINGS[name]} {value!r}") from error
    choices, check = field.metadata["choices"], field.metadata["check"]
    if (choices and converted not in choices) or (check and check(converted)):
        raise DataError(
            f"the checkpoint's args say {_SETTINGS[name]} {value!r}, expected "
            f"{', '.join(choices) or check(converted)}"
        )
    return converted
