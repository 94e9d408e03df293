"""How settings are settled: precedence, sections, paths, what is refused, round trips."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from repa_pipeline import resolve as resolving
from repa_pipeline.command_table import COMMANDS
from repa_pipeline.config import EMBEDDED, PRESETS, as_json, decisions, from_json
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError, MissingError, UnknownNameError
from repa_pipeline.registry import autoencoder_spec, encoder_spec
from repa_pipeline.resolve import Project, Resolved, load_project, resolve

NO_ENVIRONMENT: Mapping[str, str] = {}


def write(folder: Path, text: str) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "repa.toml").write_text(text)
    return load_project(str(folder / "repa.toml"))


def settle(
    command: str,
    flags: Mapping[str, Any] | None = None,
    project: Project | None = None,
    environment: Mapping[str, str] = NO_ENVIRONMENT,
) -> Resolved:
    return resolve(command, flags, project, environment)


DIGITS = PRESETS["digits"]["train"]

# command, key; values in the order default, preset, repa.toml, its section, the environment, the
# command's own variable, flag. A preset of None: the preset says nothing of the key.
LEVELS: list[tuple[str, str, list[Any]]] = [
    ("train", "steps", [400_000, DIGITS["steps"], 11, 12, 13, 14, 15]),
    ("train", "learning_rate", [1e-4, DIGITS["learning_rate"], 0.1, 0.2, 0.3, 0.4, 0.5]),
    (
        "train",
        "model",
        ["SiT-XL/2", "SiT-XS/2", "SiT-B/2", "SiT-B/4", "SiT-L/2", "SiT-S/2", "SiT-S/4"],
    ),
    ("train", "resume", [True, None, False, True, False, True, False]),
    ("train", "qk_norm", [False, None, True, False, True, False, True]),
    ("train", "name", [None, None, "a", "b", "c", "d", "e"]),
    (
        "cache-features",
        "encoder",
        [("dinov2-b",), ("digits-vit",), ("a",), ("b", "c"), ("d",), ("e", "f"), ("g",)],
    ),
    (
        "sample",
        "interval",
        [(0.0, 1.0), None, (0.0, 0.1), (0.0, 0.2), (0.0, 0.3), (0.0, 0.4), (0.0, 0.5)],
    ),
]


def toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("command", "key", "values"), LEVELS)
def test_every_level_of_precedence(
    command: str, key: str, values: list[Any], tmp_path: Path
) -> None:
    default, preset, general, section, variable, own_variable, flag = values
    dashed = key.replace("_", "-")  # both spellings are known
    variables = [f"REPA_{key.upper()}", f"REPA_{command.replace('-', '_').upper()}_{key.upper()}"]
    name = "digits" if preset is not None else "imagenet"
    path = tmp_path / "repa.toml"
    base = f'preset = "{name}"\n'
    whole = base + f"{dashed} = {toml(general)}\n"
    own = whole + f"[{command}]\n{key} = {toml(section)}\n"
    both = {variables[0]: text(variable), variables[1]: text(own_variable)}
    levels: list[tuple[str, dict[str, str], dict[str, Any], Any, str]] = [
        ('preset = "imagenet"', {}, {}, default, "default"),
        (base, {}, {}, *((default, "default") if preset is None else (preset, f"preset {name}"))),
        (whole, {}, {}, general, f"{path}"),
        (own, {}, {}, section, f"{path} [{command}]"),
        (own, {variables[0]: text(variable)}, {}, variable, f"environment {variables[0]}"),
        (own, both, {}, own_variable, f"environment {variables[1]}"),
        (own, {variables[1]: text(own_variable)}, {key: text(flag)}, flag, f"flag --{dashed}"),
    ]
    for content, environment, flags, expected, origin in levels:
        settled = settle(command, flags, write(tmp_path, content), environment)
        got = getattr(settled.config, key)
        assert (got, type(got)) == (expected, type(expected)), origin
        assert settled.origins[key] == origin


def test_a_section_wins_over_the_general_key_for_its_command_alone(tmp_path: Path) -> None:
    project = write(tmp_path, "batch_size = 8\n[train]\nbatch_size = 16\n")
    assert settle("train", project=project).config.batch_size == 16
    assert settle("sample", project=project).config.batch_size == 8
    assert settle("cache-features", project=project).config.batch_size == 8
    environment = {"REPA_BATCH_SIZE": "4", "REPA_TRAIN_BATCH_SIZE": "2"}
    assert settle("train", project=project, environment=environment).config.batch_size == 2
    assert settle("sample", project=project, environment=environment).config.batch_size == 4


def test_presets() -> None:
    assert settle("train").config.preset == "digits"
    assert settle("encode-latents").config.resolution == 64
    assert settle("encode-latents").config.autoencoder == "digits-vae"
    images = {"source": "some/folder"}
    assert settle("train", images).config.preset == "imagenet"
    assert settle("train", images).config.steps == 400_000
    assert settle("train", {**images, "preset": "digits"}).config.model == "SiT-XS/2"
    environment = {"REPA_SOURCE": "elsewhere"}
    assert settle("encode-latents", environment=environment).config.resolution == 256
    with pytest.raises(ConfigError, match="unknown preset 'digit': known are auto, digits, imag"):
        settle("train", {"preset": "digit"})
    for name, preset in PRESETS.items():
        for section, values in preset.items():
            owners = [COMMANDS[section]] if section else list(COMMANDS.values())
            for key, value in values.items():
                known = [cls for cls in owners if key in {f.name for f in dataclasses.fields(cls)}]
                assert known, f"{name} sets {section}.{key}, which no command has"
                default = next(f for f in dataclasses.fields(known[0]) if f.name == key).default
                assert type(default) in (type(value), type(None))


def test_a_checkpoint_from_elsewhere_is_not_taken_for_one_of_digits(tmp_path: Path) -> None:
    given = {"checkpoint": "SiT-XL-2-256.pt", "workspace": str(tmp_path)}
    config = resolve("sample", given, environment={}).config
    assert (config.preset, config.num_steps, config.num_images) == ("imagenet", 250, 50_000)
    digits = resolve("sample", {**given, "source": EMBEDDED}, environment={}).config
    assert (digits.preset, digits.num_steps) == ("digits", 12)
    assert resolve("sample", {"workspace": str(tmp_path)}, environment={}).config.num_steps == 12


def test_a_presets_section_wins_over_its_general_part(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = {"": {"batch_size": 3}, "train": {"batch_size": 5}}
    monkeypatch.setattr(resolving, "PRESETS", {"digits": digits})
    assert settle("train").config.batch_size == 5
    assert settle("sample").config.batch_size == 3


def test_paths_in_the_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    project = write(
        tmp_path / "lab",
        'source = "images::more/val"\nworkspace = "/big/disk"\nruns_dir = "runs"\nscratch = "~/s"\n'
        '[cache-features]\nweights = "w/dino.safetensors"\n'
        '[sample]\ndecoder_weights = "w/vae.safetensors"\ncheckpoint = "c.pt"\noutput = "out"\n'
        '[evaluate]\nreference = "ref.npz"\nsamples = "s.npz"\nnetwork_weights = "n.npz"\n'
        '[encoders.dinov2-b]\nweights = "w/dino.safetensors"\n'
        '[autoencoders.taesd]\nweights = "asset:digits_vae.safetensors"\n',
    )
    lab = tmp_path / "lab"
    features = settle("cache-features", project=project).config
    assert features.source == f"{lab}/images::{lab}/more/val"
    assert (features.workspace, features.runs_dir) == ("/big/disk", f"{lab}/runs")
    assert features.scratch == os.path.expanduser("~/s")
    assert features.weights == f"{lab}/w/dino.safetensors"
    sample = settle("sample", project=project).config
    assert sample.decoder_weights == f"{lab}/w/vae.safetensors"
    assert (sample.checkpoint, sample.output) == (f"{lab}/c.pt", f"{lab}/out")
    evaluate = settle("evaluate", project=project).config
    assert evaluate.reference == f"{lab}/ref.npz"
    assert (evaluate.samples, evaluate.network_weights) == (f"{lab}/s.npz", f"{lab}/n.npz")
    assert evaluate.overrides == {
        "encoders.dinov2-b": {"weights": f"{lab}/w/dino.safetensors"},
        "autoencoders.taesd": {"weights": "asset:digits_vae.safetensors"},
    }
    # Elsewhere a path is what the user typed.
    assert settle("train", {"workspace": "w"}, project).config.workspace == "w"
    environment = {"REPA_WORKSPACE": "w"}
    assert settle("train", project=project, environment=environment).config.workspace == "w"


def test_a_reference_file_is_not_of_the_digits() -> None:
    assert settle("evaluate").config.network == "digits-cnn"
    evaluate = settle("evaluate", {"reference": "VIRTUAL_imagenet256_labeled.npz"}).config
    assert (evaluate.network, evaluate.is_split) == ("auto", 5000)
    assert settle("reference", {"adm": "ref.npz"}).config.resolution == 256
    digits = {"reference": "ref.npz", "source": "embedded:digits"}
    assert settle("evaluate", digits).config.network == "digits-cnn"
    assert settle("certify").config.network == "auto"


def test_urls_are_not_paths(tmp_path: Path) -> None:
    project = write(tmp_path, 'source = "embedded:digits"\nworkspace = "s3://bucket/ws"\n')
    config = settle("train", project=project).config
    assert (config.source, config.workspace) == ("embedded:digits", "s3://bucket/ws")
    assert config.preset == "digits"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepss = 3", "unknown setting 'stepss': did you mean 'steps'?"),
        ("[trian]\nsteps = 3", "unknown section 'trian': did you mean 'train'?"),
        ("[encode_latents]", "unknown section 'encode_latents': did you mean 'encode-latents'?"),
        ("[train]\nstep = 3", r"unknown setting in [train] 'step': did you mean 'steps'?"),
        ("[sample]\nalign_depth = 3", "unknown setting in [sample] 'align_depth': known are "),
        ("overrides = 3", "unknown setting 'overrides': "),
        ("[encoder.dinov2-b]", "unknown section 'encoder': did you mean 'encoders'?"),
        ("[encoders]\ndinov2-b = 3", "[encoders] dinov2-b must be a section of its own"),
        ("steps = ", "is not valid TOML: "),
    ],
)
def test_unknown_keys_are_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, content)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "key", "value", "message"),
    [
        ("train", "steps", "ten", "got 'ten', expected a whole number"),
        ("grid", "output", "s3://b/x", "got 's3://b/x', expected a local path"),
        ("sweep", "output", "s3://b/x", "got 's3://b/x', expected a local path"),
        ("certify", "output", "s3://b/x", "got 's3://b/x', expected a local path"),
        ("reference", "output", "s3://b/x", "got 's3://b/x', expected a local path"),
        ("reference", "adm_npz", "s3://b/x", "got 's3://b/x', expected a local path"),
        ("train", "steps", 1.5, "got 1.5, expected a whole number"),
        ("train", "steps", True, "got True, expected a whole number"),
        ("train", "steps", 0, "got 0, expected a number above 0"),
        ("train", "accumulate", "-1", "got '-1', expected a number above 0"),
        ("train", "learning_rate", "fast", "got 'fast', expected a number"),
        ("train", "learning_rate", "nan", "got 'nan', expected a number"),
        ("train", "align_coeff", "inf", "got 'inf', expected a number"),
        ("train", "label_dropout", 1.5, "got 1.5, expected a number in [0, 1]"),
        ("train", "preview_every", -1, "got -1, expected 0 or more"),
        ("train", "resume", "maybe", "got 'maybe', expected true or false"),
        ("train", "path", "bezier", "got 'bezier', expected one of linear, cosine"),
        ("train", "model", ["a"], "got ['a'], expected text"),
        ("train", "name", {"a": 1}, "got {'a': 1}, expected text"),
        ("train", "encoder", 3, "got 3, expected a comma-separated list (text)"),
        ("sample", "interval", "0.7", "got '0.7', expected a comma-separated list (2 of: "),
        ("sample", "interval", "0,x", "got '0,x', expected a comma-separated list (2 of: "),
        ("sample", "interval", [0.7, 0.2], "got [0.7, 0.2], expected LOW,HIGH with 0 <= "),
        ("sample", "interval", "0,1.1", "got '0,1.1', expected LOW,HIGH"),
    ],
)
def test_bad_values_say_what_was_expected(command: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(command, {key: value})
    text = str(caught.value)
    assert text.startswith(f"{key} (flag --{key.replace('_', '-')}): {message}")
    assert "\n" not in text


def test_a_bad_value_names_where_it_stands(tmp_path: Path) -> None:
    project = write(tmp_path, "[train]\nsteps = 'x'\n")
    with pytest.raises(ConfigError, match=r"^steps \(.*/repa.toml \[train\]\): got 'x', expected"):
        settle("train", project=project)
    with pytest.raises(ConfigError, match=r"^steps \(environment REPA_STEPS\): got ''"):
        settle("train", environment={"REPA_STEPS": ""})


def test_lists_and_intervals() -> None:
    assert settle("sample", {"interval": "0,0.7"}).config.interval == (0.0, 0.7)
    assert settle("sample", {"interval": " 0.2 , 1 "}).config.interval == (0.2, 1.0)
    for given in ("a,b", ["a", "b"], ["a,b"], " a , b ,"):
        assert settle("train", {"encoder": given}).config.encoder == ("a", "b")
    assert settle("train", {"encoder": "none"}).config.encoder == ("none",)
    assert settle("sample", {"labels": 3}).config.labels == "3"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_settings_survive_json(command: str, tmp_path: Path) -> None:
    project = write(tmp_path, '[encoders.dinov2-b]\nweights = "w"\nwidth = 3\n')
    config = settle(command, project=project).config
    stored = json.loads(json.dumps(as_json(config)))
    assert from_json(COMMANDS[command], {**stored, "of_a_later_version": 1}) == config
    decided = decisions(config)
    assert decided.items() <= stored.items()
    assert not {"workspace", "device", "threads", "retries", "keep", "steps"} & decided.keys()


def test_tuples_survive_json() -> None:
    config = settle("sample", {"interval": "0.1,0.7", "plugins": "a,b"}).config
    back = from_json(COMMANDS["sample"], json.loads(json.dumps(as_json(config))))
    assert (back.interval, back.plugins) == ((0.1, 0.7), ("a", "b"))


# Changed entries.


def test_overrides_reach_the_entries(tmp_path: Path) -> None:
    project = write(
        tmp_path,
        '[encoders.dinov2-b]\nweights = "dino.safetensors"\nwidth = 12\n'
        '[autoencoders."sd-vae-ft-ema"]\nscale = [0.5]\nconfig = {latent_channels = 4}\n',
    )
    config = settle("train", project=project).config
    encoder = encoder_spec(config, "dinov2-b")
    assert (encoder.weights, encoder.width) == (f"{tmp_path}/dino.safetensors", 12)
    assert encoder_spec(config, "dinov2-vit-b") == encoder  # by the reference's name too
    autoencoder = autoencoder_spec(config, "sd-vae")
    assert autoencoder.scale == (0.5,) and autoencoder.config == {"latent_channels": 4}
    assert encoder_spec(config, "dinov2-l").weights is None
    assert encoder_spec(TrainConfig(), "dinov2-b").width == 768


def test_overrides_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"\[encoders.dinov2-b\] has no setting 'weight': known"):
        encoder_spec(TrainConfig(overrides={"encoders.dinov2-b": {"weight": "w"}}), "dinov2-b")
    with pytest.raises(ConfigError, match="has no setting 'name'"):
        encoder_spec(TrainConfig(overrides={"encoders.dinov2-b": {"name": "w"}}), "dinov2-b")
    with pytest.raises(
        ConfigError, match=r"width \(\[encoders.dinov2-b\]\): got 'x', expected a w"
    ):
        encoder_spec(TrainConfig(overrides={"encoders.dinov2-b": {"width": "x"}}), "dinov2-b")
    with pytest.raises(ConfigError, match=r"weights .*: got {'a': 1}, expected text"):
        encoder_spec(
            TrainConfig(overrides={"encoders.dinov2-b": {"weights": {"a": 1}}}), "dinov2-b"
        )
    # An entry that no table has, though another one is asked for.
    with pytest.raises(UnknownNameError, match="unknown encoder 'dinov2b': did you mean 'dinov2-b"):
        autoencoder_spec(TrainConfig(overrides={"encoders.dinov2b": {"weights": "w"}}), "taesd")


# Finding the file.


def test_the_file_of_the_folder_or_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPA_CONFIG", raising=False)
    assert load_project().path is None and load_project().content == {}
    write(tmp_path, "steps = 1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.toml").write_text('steps = 2\nworkspace = "ws"\n')
    assert load_project().content == {"steps": 1}
    monkeypatch.setenv("REPA_CONFIG", "other/mine.toml")
    assert load_project().content["steps"] == 2
    assert settle("train", project=load_project()).config.workspace == "other/ws"
    assert load_project("repa.toml").content == {"steps": 1}  # the flag comes first
    for missing in ("nowhere.toml", "other"):
        monkeypatch.setenv("REPA_CONFIG", missing)
        with pytest.raises(MissingError, match=rf"no configuration file {missing}: check --config"):
            load_project()


def test_a_cache_says_what_source_it_is_of(tmp_path: Path) -> None:
    cache = tmp_path / "ws" / "cache"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text(json.dumps({"source": "/data/photos"}))
    workspace = {"workspace": str(tmp_path / "ws")}
    found = resolve("train", workspace, environment={})
    assert (found.config.source, found.config.preset) == ("/data/photos", "imagenet")
    assert found.config.model == "SiT-XL/2" and found.origins["source"] == "the workspace's cache"
    named = resolve("train", {**workspace, "source": "embedded:digits"}, environment={})
    assert named.config.preset == "digits"
    (cache / "manifest.json").write_text("torn")
    assert resolve("train", workspace, environment={}).config.preset == "digits"
