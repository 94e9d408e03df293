"""`repa export --run NAME`: a trained model for others.

    DEST.pt           --to reference: model, ema, opt, args, steps, as the reference's code saves
    DEST/             --to safetensors:
      model.safetensors, projectors.safetensors    the EMA weights
      config.json     written last: everything needed to build the model, no checkpoint needed
      README.md       the model card

`stages/import_run.py` reads both.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.encoders import ALIASES
from repa_pipeline.errors import ConfigError, MismatchError, RepaError, StageError
from repa_pipeline.models.reference import join_reference_state, read_plain
from repa_pipeline.settings import decisions, from_json
from repa_pipeline.stages.model_card import model_card
from repa_pipeline.training.checkpoint import file_digest, load_checkpoint, read_marker
from repa_pipeline.training.runs import find_run

FORMAT = "repa-pipeline-model"
FORMAT_VERSION = 1
TRUNK, PROJECTORS = "trunk.", "projectors."
MODEL_FILE, PROJECTORS_FILE, CONFIG_FILE = (
    "model.safetensors",
    "projectors.safetensors",
    "config.json",
)
_MLP = re.compile(r"\d+\.[024]\.(weight|bias)")
# Of the reference's constructor and its sampler, which its command line does not change.
_REFERENCE_PROJECTOR_WIDTH = 2048
_REFERENCE_NULL_LABEL = 1000
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RunExport:
    """A checkpoint and where it goes; `run_folder` is the run's, where its scores are."""

    config: ExportConfig
    checkpoint: Path
    run_folder: Path
    destination: Path
    digest: str

    @property
    def run_name(self) -> str:
        return self.run_folder.name


def plan_export(config: ExportConfig) -> RunExport:
    """Finds the checkpoint; raises for settings that do not fit, MissingError without one."""
    if config.to == "webdataset":
        raise ConfigError(
            "--to webdataset is of a cache: a run's model goes --to reference or --to safetensors"
        )
    if not config.destination or "://" in config.destination:
        raise ConfigError(
            f"destination {config.destination}: a model is exported to a local path: repa export "
            "--run NAME MODEL.pt, or a folder with --to safetensors"
        )
    if config.to == "reference" and config.destination.endswith((".zip", "/")):
        raise ConfigError(
            f"destination {config.destination}: a checkpoint of the reference is one file: NAME.pt"
        )
    if config.checkpoint:
        path = Path(config.checkpoint)
        folder = path.absolute().parent
        folder = folder.parent if folder.name == "checkpoints" else folder
    else:
        run = find_run(config, config.run)
        path, folder = run.newest_checkpoint(), run.folder
    if not path.is_file():
        load_checkpoint(path)  # says what is wrong
    marked = path.with_suffix(".json").is_file()
    digest = str(read_marker(path)["sha256"]) if marked else file_digest(path)
    return RunExport(config, path, folder, Path(config.destination), digest)


def export_run(plan: RunExport) -> list[str] | None:
    """Writes the export; returns what is to be known of it, None when it stands there already.

    Raises ConfigError for a model that the format cannot hold, MismatchError when something else
    is at the destination, StageError when the disk does not take it.
    """
    if _stands(plan):
        return None
    return write_export(plan, load_checkpoint(plan.checkpoint))


def write_export(plan: RunExport, content: Mapping[str, Any]) -> list[str] | None:
    """As `export_run`, of a checkpoint's content that is at hand."""
    write = _write_reference if plan.config.to == "reference" else _write_safetensors
    if _stands(plan):
        return None
    try:
        return write(plan, content)
    except OSError as error:
        if isinstance(error, RepaError):
            raise
        raise StageError(f"cannot write {plan.destination}: {error}; free some space") from error


def _stands(plan: RunExport) -> bool:
    """Whether this very export is there; raises MismatchError when something else is."""
    path = plan.destination
    if not path.exists() or (path.is_dir() and not os.listdir(path)):
        return False
    there = None
    if plan.config.to == "safetensors" and path.is_dir():
        unfinished = not (path / CONFIG_FILE).exists()
        if unfinished and {p.name for p in path.iterdir()} <= {MODEL_FILE, PROJECTORS_FILE}:
            return False  # of an export that was killed
        if not unfinished:
            there = get_json(LocalStore(str(path)), CONFIG_FILE).get("checkpoint_sha256")
    elif plan.config.to == "reference" and path.is_file():
        try:
            args = read_plain(path).get("args")
        except RepaError:
            args = None
        there = getattr(args, "checkpoint_sha256", None)
    if there == plan.digest:
        return True
    raise MismatchError(f"{path} is there and not the export of this checkpoint: give a new name")


def _write_reference(plan: RunExport, content: Mapping[str, Any]) -> list[str]:
    about = content["about"]
    states = {}
    for part in ("model", "ema"):
        trunk, projectors = split_state(content[part])
        _check_reference(about, projectors)
        states[part] = join_reference_state(trunk, projectors)
    args = reference_args(about, projectors, plan.run_name)
    args.checkpoint_sha256 = plan.digest
    whole = {**states, "opt": None, "args": args, "steps": content["step"]}

    def write(file: Any) -> None:
        torch.save(whole, file)

    plan.destination.parent.mkdir(parents=True, exist_ok=True)
    _write_renamed(plan.destination, write)
    return _reference_notes(about, args, projectors)


def _check_reference(about: Mapping[str, Any], projectors: State) -> None:
    spec = about["model_spec"]
    if spec.get("family", "sit") != "sit":
        raise ConfigError(
            f"{spec['name']} is no SiT, the only family of the reference's code: use --to "
            "safetensors"
        )
    if not all(_MLP.fullmatch(key) for key in projectors):
        raise ConfigError(
            "the reference's code has MLP projectors only, this run has others: use --to "
            "safetensors"
        )


def split_state(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """A checkpoint's state as (trunk, projectors), both without their prefix.

    Raises ConfigError for a method that has other parts.
    """
    trunk = {k.removeprefix(TRUNK): v for k, v in state.items() if k.startswith(TRUNK)}
    rest = {k.removeprefix(PROJECTORS): v for k, v in state.items() if k.startswith(PROJECTORS)}
    if len(trunk) + len(rest) != len(state):
        other = next(key for key in state if not key.startswith((TRUNK, PROJECTORS)))
        raise ConfigError(
            f"the method has other parts than a trunk and projectors ('{other}'), for which there "
            "is no exchange format"
        )
    return trunk, rest


def reference_args(
    about: Mapping[str, Any], projectors: Mapping[str, Tensor], name: str
) -> argparse.Namespace:
    """The settings under the names of the reference's command line."""
    config: TrainConfig = from_json(TrainConfig, about["config"])
    spec, inputs = about["model_spec"], about["inputs"]
    reference_names = {ours: theirs for theirs, ours in reversed(ALIASES.items())}
    teachers = [reference_names.get(f["name"], f["name"]) for f in inputs["features"]]
    widths = [str(value.shape[0]) for key, value in projectors.items() if key.endswith(".4.bias")]
    return argparse.Namespace(
        exp_name=name,
        model=spec["name"],
        num_classes=inputs["num_classes"],
        encoder_depth=config.align_depth or spec["align_depth"],
        fused_attn=True,
        qk_norm=config.qk_norm,
        resolution=inputs["resolution"],
        batch_size=config.batch_size,
        allow_tf32=config.tf32,
        mixed_precision="no" if config.dtype == "float32" else "bf16",
        max_train_steps=config.steps,
        checkpointing_steps=config.checkpoint_every,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        adam_beta1=0.9,
        adam_beta2=config.beta2,
        adam_weight_decay=config.weight_decay,
        adam_epsilon=1e-8,
        max_grad_norm=config.clip,
        seed=config.seed,
        path_type=config.path,
        prediction="v",
        cfg_prob=config.label_dropout,
        enc_type=",".join(teachers) or "None",
        proj_coeff=config.align_coeff,
        weighting=config.weighting,
        projector_embed_dims=",".join(widths),
    )


def _reference_notes(
    about: Mapping[str, Any], args: argparse.Namespace, projectors: State
) -> list[str]:
    """Where the reference's code needs more than the file."""
    notes = [
        "opt is None, the optimizer's state is not exported: the file is for sampling and fine-"
        "tuning, the reference's --resume-step needs more"
    ]
    if not re.fullmatch(r"SiT-(B|L|XL)/[248]", args.model):
        notes.append(f"the reference's table has no {args.model} that runs: add it there")
    widths = {len(v) for k, v in projectors.items() if k.endswith(".0.bias")}
    if widths - {_REFERENCE_PROJECTOR_WIDTH}:
        notes.append(
            f"the projectors are {sorted(widths)[0]} wide: give the reference's SiT projector_dim"
        )
    if args.num_classes != _REFERENCE_NULL_LABEL:
        notes.append(
            f"the null label is {args.num_classes}: the reference's samplers have 1000 written in"
        )
    if not projectors:
        notes.append("there are no projectors: give the reference's SiT z_dims=[]")
    channels = about["inputs"]["latent_channels"]
    if (channels, about["latents"]["autoencoder"]) != (4, "sd-vae-ft-ema"):
        notes.append(
            f"the latents are of {about['latents']['autoencoder']}: the reference decodes those of "
            "sd-vae-ft-ema and ft-mse"
        )
    return notes


def _write_safetensors(plan: RunExport, content: Mapping[str, Any]) -> list[str]:
    from safetensors.torch import save

    about, folder = public_about(content["about"]), plan.destination
    trunk, projectors = split_state(content["ema"])
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory.
    for name, state in ((MODEL_FILE, trunk), (PROJECTORS_FILE, projectors)):
        if state:
            data = save({k: v.clone() for k, v in state.items()}, {"format": "pt"})
            _write_bytes(folder / name, data)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint_sha256": plan.digest,
        "weights": "ema",
        "step": content["step"],
        "about": about,
    }
    card = model_card(
        name=plan.run_name,
        step=content["step"],
        about=about,
        num_parameters=sum(value.numel() for value in trunk.values()),
        has_projectors=bool(projectors),
        license=plan.config.license,
        digest=plan.digest,
        run_folder=plan.run_folder,
    )
    _write_bytes(folder / "README.md", card.encode())
    LocalStore(str(folder)).put(CONFIG_FILE, json_bytes(config))
    return [] if plan.config.license else ["the model card says licence unknown: give --license"]


def public_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, without paths and addresses of the machine it is from."""
    config: TrainConfig = from_json(TrainConfig, about["config"])
    kept = {
        **decisions(config),
        "steps": config.steps,
        "source": public_source(config.source),
        "plugins": list(config.plugins),
    }
    return {**about, "config": kept}


def public_source(source: str) -> str:
    """A source by its last two names where it is a path of this machine."""
    if "://" in source or source.startswith("embedded:"):
        return source
    return "/".join(Path(source).parts[-2:]).lstrip("/")


def _write_bytes(path: Path, data: bytes) -> None:
    _write_renamed(path, lambda file: file.write(data))


def _write_renamed(path: Path, write: Callable[[Any], object]) -> None:
    """A file that is there completely or not at all."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
