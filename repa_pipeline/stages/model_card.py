"""The README.md of an exported model: what it is, what it was made of, what it scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repa_pipeline import __version__
from repa_pipeline.text import number

_SETTINGS = (
    *("batch_size", "learning_rate", "ema_decay", "label_dropout", "path", "weighting", "seed"),
    *("align_coeff", "align_depth", "align_objective", "projector", "qk_norm", "flip"),
)

_USE = """\
## Use

With repa-pipeline and this folder:

    repa import FOLDER --name NAME
    repa sample --run NAME --cfg 1.8 --interval 0,0.7

or in Python, as a torch module in eval mode:

    from repa_pipeline.stages.import_run import load_exported
    model = load_exported("FOLDER")    # model(x, t, y)

config.json holds everything that builds it; names of tensors are those of the published \
code of the model's family.
"""


def model_card(
    *,
    name: str,
    step: int,
    about: Mapping[str, Any],
    num_parameters: int,
    has_projectors: bool,
    license: str | None,
    digest: str,
    run_folder: Path,
) -> str:
    """Markdown with YAML front matter; scores are those of samples of this very checkpoint."""
    model, autoencoder = about["model_spec"]["name"], about["latents"]["autoencoder"]
    config, teachers = about["config"], _teachers(about)
    tags = ["diffusion", "image-generation", model.split("-")[0].lower()]
    tags += ["repa", *teachers] if teachers else []
    facts = {
        **_facts(about, num_parameters),
        "steps": f"{step:,} of {config['batch_size']} images",
        "weights": "exponential moving average (model.safetensors"
        + (", projectors.safetensors)" if has_projectors else ")"),
        "checkpoint": f"sha256 {digest}",
        "made with": f"repa-pipeline {__version__}",
    }
    settings = {key: config[key] for key in _SETTINGS if key in config}
    parts = [
        *_front_matter(license, tags),
        f"# {name}",
        "",
        f"A {model} trained on the latents of {autoencoder}"
        + (f", aligned with {', '.join(teachers)} (REPA, arXiv 2410.06940)." if teachers else "."),
        "",
        *_table(("", ""), facts),
        "",
        *_table(("setting", "value"), settings),
        "",
        "## Scores",
        "",
        *(_scores(run_folder, digest) or ["Not evaluated."]),
        "",
        _USE,
    ]
    return "\n".join(parts)


def _teachers(about: Mapping[str, Any]) -> list[str]:
    return [feature["name"] for feature in about["inputs"]["features"]]


def _facts(about: Mapping[str, Any], num_parameters: int) -> dict[str, str]:
    """What it is and what it was made of."""
    spec, inputs, latents = about["model_spec"], about["inputs"], about["latents"]
    rows = latents.get("num_rows")
    return {
        "model": f"{spec['name']}, {num_parameters / 1e6:.1f} M parameters, "
        f"{spec['depth']} blocks of width {spec['width']}",
        "images": f"{inputs['resolution']} x {inputs['resolution']}, {inputs['num_classes']} "
        f"classes (label {inputs['num_classes']}: none)",
        "latents": f"{inputs['latent_channels']} x {inputs['latent_size']} x "
        f"{inputs['latent_size']} of {latents['autoencoder']}",
        "data": str(about["config"]["source"]) + (f", {rows:,} images" if rows else ""),
        "aligned with": ", ".join(_teachers(about)) or "no teacher",
    }


def _front_matter(license: str | None, tags: list[str]) -> list[str]:
    # JSON is YAML: what a user gives cannot break the block.
    return [
        "---",
        f"license: {json.dumps(license or 'unknown')}",
        "library_name: repa-pipeline",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return lines + [f"| {key} | {value} |" for key, value in rows.items()]


def _scores(run_folder: Path, digest: str) -> list[str]:
    """A line a result of samples of this checkpoint; results of others are left out."""
    lines = []
    for result in _results(run_folder):
        settings = result.get("sample_settings")
        if not isinstance(settings, dict) or settings.get("checkpoint_sha256") != digest:
            continue
        names = result.get("names", {})
        found = result["metrics"].items()
        values = [(names.get(n, n), v) for n, v in found if isinstance(v, int | float)]
        low, high = settings["interval"]
        lines.append(
            f"- {', '.join(f'{n} {number(v)}' for n, v in values)}: {result['num_samples']:,} "
            f"samples, {settings['sampler']} {settings['num_steps']} steps, cfg "
            f"{settings['cfg']:g} on t in [{low:g}, {high:g}], seed {settings['seed']}; network "
            f"{result['network']['name']}, against {result['reference']['name']}"
        )
    return lines


def _results(run_folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(run_folder.glob("samples/*/result.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
