"""Trained models to and from the reference's format and safetensors: bit for bit, no code run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.cli import main
from repa_pipeline.config_exchange import ExportConfig, ImportConfig
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingError,
    RepaError,
    StageError,
)
from repa_pipeline.models import ModelSpec, build_model
from repa_pipeline.models.published_dit import to_diffusers
from repa_pipeline.observe import Silent
from repa_pipeline.stages.export_run import export_run, plan_export, split_state
from repa_pipeline.stages.import_run import ImportedModel, import_run, load_exported, read_model
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import (
    ToyTeacher,
    isolated_tables,
    toy_train_config,
    write_toy_cache,
)
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training.checkpoint import file_digest, load_checkpoint
from repa_pipeline.training.runs import Run, open_run
from repa_pipeline.training.state import method_of_checkpoint

TEACHERS = (ToyTeacher("dinov2-b", width=12), ToyTeacher("other", width=20))
SOURCE = "/somewhere/private/imagenet/train"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two trained runs, aligned with two teachers and with none, and the autoencoder's weights."""
    folder = tmp_path_factory.mktemp("exchange")
    write_toy_cache(folder, teachers=TEACHERS)
    with isolated_tables():
        spec = tiny_autoencoder(weights=str(folder / "tiny.safetensors"))
        write_weights(spec)
        AUTOENCODERS.add(spec)
        names = tuple(teacher.name for teacher in TEACHERS)
        for name, encoder in (("aligned", names), ("plain", ("none",))):
            config = toy_train_config(
                folder, name=name, encoder=encoder, source=SOURCE, steps=4, align_depth=2
            )
            train(plan_training(config), Silent())
        yield folder


def run_of(workspace: Path, name: str = "aligned") -> Run:
    return Run(workspace / "runs" / name)


def export(workspace: Path, destination: Path, **changes: Any) -> list[str] | None:
    settings = {"run": "aligned", "to": "reference", **changes}
    config = ExportConfig(workspace=str(workspace), destination=str(destination), **settings)
    return export_run(plan_export(config))


def import_config(workspace: Path, source: Path, **changes: Any) -> ImportConfig:
    settings: dict[str, Any] = {"autoencoder": "tiny-kl", "num_heads": 2, **changes}
    return ImportConfig(workspace=str(workspace), source=str(source), **settings)


def imported(workspace: Path, source: Path, name: str, **changes: Any) -> Run:
    config = import_config(workspace, source, name=name, **changes)
    run, is_new = import_run(config, read_model(config))
    assert is_new
    return run


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def samples_of(workspace: Path, run: Run) -> Tensor:
    """Guided latents of three samples of a run, through what `repa sample` is made of."""
    config = SampleConfig(
        workspace=str(workspace), run=run.name, num_images=3, num_steps=3, batch_size=3, cfg=1.8,
        device="cpu", threads=1, shard_rows=3,
    )  # fmt: skip
    return sample_stage(config).load_sampler().scaled([0, 1, 2])


@pytest.mark.parametrize("name", ["aligned", "plain"])
def test_to_the_reference_and_back(name: str, workspace: Path, tmp_path: Path) -> None:
    notes = export(workspace, tmp_path / "0000004.pt", run=name)
    assert notes is not None and "opt is None" in notes[0]
    back = imported(workspace, tmp_path / "0000004.pt", f"{name}-back")
    ours, theirs = (load_checkpoint(r.newest_checkpoint()) for r in (run_of(workspace, name), back))
    for part in ("model", "ema"):
        assert_same(theirs[part], ours[part])
    layer = "trunk.final_layer.linear.weight"  # trained and averaged weights are two things
    assert not torch.equal(theirs["ema"][layer], theirs["model"][layer])
    assert theirs["step"] == ours["step"] == 4
    assert theirs["about"]["inputs"]["resolution"] == ours["about"]["inputs"]["resolution"] == 64
    assert theirs["about"]["latents"]["scale"] == ours["about"]["latents"]["scale"] == [0.5]
    got, expected = (samples_of(workspace, r) for r in (back, run_of(workspace, name)))
    assert torch.equal(got, expected) and got.std() > 0.1


def test_what_the_reference_reads(workspace: Path, tmp_path: Path) -> None:
    """Its rule: torch.load(...)["ema"] is loaded strictly, projectors included."""
    export(workspace, tmp_path / "last.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(content) == {"model", "ema", "opt", "args", "steps"}
    assert (content["opt"], content["steps"]) == (None, 4)
    args = content["args"]
    assert isinstance(args, argparse.Namespace)
    assert (args.model, args.num_classes, args.encoder_depth) == ("SiT-XS/2", 3, 2)
    assert (args.enc_type, args.projector_embed_dims) == ("dinov2-vit-b,other", "12,20")
    assert (args.path_type, args.weighting, args.prediction) == ("linear", "uniform", "v")
    assert (args.proj_coeff, args.cfg_prob, args.qk_norm) == (0.5, 0.1, False)
    assert (args.resolution, args.batch_size, args.learning_rate) == (64, 8, 1e-3)
    trunk, projectors = split_state(load_checkpoint(run_of(workspace).newest_checkpoint())["ema"])
    assert_same(content["ema"], {**trunk, **{f"projectors.{k}": v for k, v in projectors.items()}})
    assert {key.partition(".")[0] for key in content["ema"]} == {
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer",
        "projectors",
    }  # fmt: skip
    assert content["ema"]["projectors.1.4.weight"].shape == (20, 16)


def test_what_the_reference_needs_to_be_told(workspace: Path, tmp_path: Path) -> None:
    notes = export(workspace, tmp_path / "a.pt")
    assert notes is not None
    for said in ("SiT-XS/2", "projectors are 16 wide", "null label is 3", "latents are of tiny-kl"):
        assert any(said in note for note in notes)
    assert any(
        "z_dims=[]" in note for note in export(workspace, tmp_path / "b.pt", run="plain") or ()
    )


def test_safetensors_and_back(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert export(workspace, folder, to="safetensors") == [
        "the model card says licence unknown: give --license"
    ]
    assert sorted(os.listdir(folder)) == [
        "README.md", "config.json", "model.safetensors", "projectors.safetensors",
    ]  # fmt: skip
    ours = load_checkpoint(run_of(workspace).newest_checkpoint())
    model = load_exported(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert_same(dict(model.state_dict()), split_state(ours["ema"])[0])
    back = imported(workspace, folder, "from-safetensors")
    theirs = load_checkpoint(back.newest_checkpoint())
    assert_same(theirs["ema"], ours["ema"])
    assert theirs["step"] == 4 and theirs["about"]["inputs"] == ours["about"]["inputs"]
    assert torch.equal(samples_of(workspace, back), samples_of(workspace, run_of(workspace)))


def test_an_export_says_nothing_of_its_machine(workspace: Path, tmp_path: Path) -> None:
    export(workspace, tmp_path / "model", to="safetensors")
    for name in ("README.md", "config.json"):
        text = (tmp_path / "model" / name).read_text()
        assert "imagenet/train" in text
        assert "private" not in text and str(workspace) not in text and "tmp" not in text


def test_the_model_card(workspace: Path, tmp_path: Path) -> None:
    run = run_of(workspace)
    digest = file_digest(run.newest_checkpoint())
    results = run.folder / "samples"
    settings = {
        "checkpoint_sha256": digest, "interval": [0, 0.7], "sampler": "sde", "num_steps": 250,
        "cfg": 1.8, "seed": 0,
    }  # fmt: skip
    result = {
        "metrics": {"fd": 12.345, "precision": None},
        "num_samples": 50_000,
        "sample_settings": settings,
        "network": {"name": "net"},
        "reference": {"name": "the training source"},
    }
    export(workspace, tmp_path / "before", to="safetensors")
    before = (tmp_path / "before/README.md").read_text()
    assert before.startswith('---\nlicense: "unknown"\nlibrary_name: repa-pipeline\n')
    assert '- "dinov2-b"\n' in before and "## Scores\n\nNot evaluated.\n" in before
    millions = sum(p.numel() for p in load_exported(tmp_path / "before").parameters()) / 1e6
    for said in (
        f"SiT-XS/2, {millions:.1f} M parameters, 3 blocks of width 64",
        "64 x 64, 3 classes (label 3: none)",
        "4 x 8 x 8 of tiny-kl", "imagenet/train, 48 images", "| aligned with | dinov2-b, other |",
        "| steps | 4 of 8 images |", digest, "| learning_rate | 0.001 |",
        "repa import FOLDER --name NAME",
    ):  # fmt: skip
        assert said in before, said
    try:
        for name, other in (("a", digest), ("b", "0" * 64)):
            (results / name).mkdir(parents=True)
            about = {**result, "sample_settings": {**settings, "checkpoint_sha256": other}}
            (results / name / "result.json").write_text(json.dumps(about))
        export(workspace, tmp_path / "after", to="safetensors", license='mit"\nx: y')
    finally:
        for name in ("a", "b"):
            (results / name / "result.json").unlink()
    after = (tmp_path / "after/README.md").read_text()
    assert after.startswith('---\nlicense: "mit\\"\\nx: y"\n')
    assert after.count("- fd 12.3: 50,000 samples, sde 250 steps, cfg 1.8 on t in [0, 0.7]") == 1
    assert "Not evaluated" not in after


@pytest.mark.parametrize("to", ["reference", "safetensors"])
def test_an_export_is_made_once(to: str, workspace: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    export(workspace, place, to=to)
    files = [place] if place.is_file() else sorted(place.iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert export(workspace, place, to=to) is None
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    for changes in ({"run": "plain"}, {"to": {"reference": "safetensors"}.get(to, "reference")}):
        with pytest.raises(MismatchError, match="is there and not the export of this checkpoint"):
            export(workspace, place, **{"to": to, **changes})
    (tmp_path / "mine").write_text("something")
    with pytest.raises(MismatchError, match="give a new name"):
        export(workspace, tmp_path / "mine", to=to)
    assert (tmp_path / "mine").read_text() == "something"


def test_an_export_that_was_killed_is_made_again(workspace: Path, tmp_path: Path) -> None:
    export(workspace, tmp_path / "model", to="safetensors")
    (tmp_path / "model/config.json").unlink()
    (tmp_path / "model/README.md").unlink()
    with pytest.raises(MissingError, match="no config.json"):
        load_exported(tmp_path / "model")
    assert export(workspace, tmp_path / "model", to="safetensors") is not None
    load_exported(tmp_path / "model")


def test_a_full_disk(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repa_pipeline.stages.export_run.os.fsync", full)
    for to in ("reference", "safetensors"):
        with pytest.raises(StageError, match="cannot write .* No space left on device"):
            export(workspace, tmp_path / to, to=to)
    assert not (tmp_path / "reference").exists() and os.listdir(tmp_path / "safetensors") == []


def test_the_commands(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def repa(line: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main([*line.split(), "--workspace", str(workspace)])
        told = capsys.readouterr()
        return int(caught.value.code or 0), told.out + told.err

    code, said = repa("export --run aligned model.pt --dry-run")
    assert code == 0 and not Path("model.pt").exists()
    code, said = repa("export --run aligned model.pt")
    assert code == 0 and "note: opt is None" in said and "output: model.pt" in said
    code, said = repa("export --run aligned model.pt")
    assert code == 0 and "nothing to do: model.pt is complete" in said
    code, said = repa("export --run aligned tars --to webdataset")
    assert (
        code == 2
        and said.startswith("repa: --to webdataset is of a cache")
        and said.count("\n") == 1
    )
    checkpoint = run_of(workspace).newest_checkpoint()
    code, said = repa(f"export --checkpoint {checkpoint} folder --to safetensors --license mit")
    assert code == 0 and Path("folder/config.json").is_file()
    code, said = repa("import model.pt --name cli --autoencoder tiny-kl")
    assert code == 2 and "SiT-XS/2 (width 128, depth 4) but its tensors have width 64" in said
    line = "import model.pt --name cli --autoencoder tiny-kl --num-heads 2"
    code, said = repa(line)
    assert code == 0, said
    assert "SiT-3x64/2 after 4 steps, 3 classes of 64 pixels" in said
    assert "projectors: dinov2-b (12), other (20)" in said and "next: repa sample --run cli" in said
    code, said = repa(line)
    assert code == 0 and "nothing to do: run cli is this checkpoint" in said
    code, said = repa("import folder --name cli")
    assert code == 2 and "run 'cli' is there and was not imported from this file" in said
    code, said = repa("import model.pt --autoencoder tiny-kl --num-heads 2")
    assert code == 2 and "say which with --name NAME" in said
    code, said = repa("runs")
    assert code == 0
    assert "cli  step 4 of 4  SiT-3x64/2  dinov2-b, other" in said
    code, said = repa("train cli --source x --encoder none --model SiT-XS/2 --batch-size 8")
    assert code == 2 and "run 'cli' was imported from model.pt" in said, said
    assert "sample from it, and train under another name" in said


class _Bomb:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("where", ["root", "ema", "opt", "args"])
def test_a_malicious_file_is_refused_and_not_executed(
    where: str, workspace: Path, tmp_path: Path
) -> None:
    export(workspace, tmp_path / "good.pt")
    bomb: Any = _Bomb(tmp_path / "executed")
    content = torch.load(tmp_path / "good.pt", weights_only=False)
    if where == "root":
        content = bomb
    elif where == "args":
        content["args"].model = bomb
    elif where == "ema":
        content["ema"]["pos_embed"] = bomb
    else:
        content["opt"] = bomb
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DataError, match="bad.pt cannot be read as a checkpoint"):
        read_model(import_config(workspace, tmp_path / "bad.pt"))
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("method", "os:system"),
        ("model_spec.loader", "subprocess:run"),
        ("config.plugins", ["evil_plugin"]),
    ],
)
def test_a_description_that_names_code_is_refused(
    where: str, value: Any, workspace: Path, tmp_path: Path
) -> None:
    export(workspace, tmp_path / "model", to="safetensors")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    *parents, last = where.split(".")
    inner = config["about"]
    for name in parents:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(config))
    for read in (
        lambda: load_exported(tmp_path / "model"),
        lambda: read_model(import_config(workspace, tmp_path / "model")),
    ):
        with pytest.raises(ConfigError, match="which is neither of this package nor in your plug"):
            read()


def reference_file(workspace: Path, path: Path, **args: Any) -> Path:
    export(workspace, path)
    content = torch.load(path, weights_only=False)
    vars(content["args"]).update(args)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("args", "changes", "error", "message"),
    [
        ({"prediction": "x"}, {}, ConfigError, "predicts 'x'"),
        ({"path_type": "../x"}, {}, DataError, "path_type '../x', expected linear, cosine"),
        ({"batch_size": [1]}, {}, DataError, r"batch_size \[1\]"),
        ({"cfg_prob": 7.0}, {}, DataError, r"cfg_prob 7.0, expected a number in \[0, 1\]"),
        ({"resolution": 256}, {}, MismatchError, "is of 256 pixels, latents of 8 per side"),
        ({}, {"autoencoder": "wide"}, MismatchError, "has 7 latent channels, the checkpoint's"),
        ({}, {"autoencoder": "none"}, RepaError, "unknown autoencoder"),
    ],
)
def test_what_does_not_fit_is_refused(
    args: dict[str, Any],
    changes: dict[str, Any],
    error: type[RepaError],
    message: str,
    workspace: Path,
    tmp_path: Path,
) -> None:
    path = reference_file(workspace, tmp_path / "last.pt", **args)
    with isolated_tables():
        AUTOENCODERS.add(tiny_autoencoder("wide", channels=7))
        with pytest.raises(error, match=message) as caught:
            read_model(import_config(workspace, path, **changes))
    assert "\n" not in str(caught.value)


def test_a_published_dit(workspace: Path, tmp_path: Path) -> None:
    """Under its authors' names and under diffusers': the same model, told apart from a SiT."""
    spec = ModelSpec("DiT-3x64/2", 3, 64, 2, 2, 1, "dit", "repa_pipeline.models.dit:build_dit")
    torch.manual_seed(0)
    trunk = build_model(spec, input_size=8, in_channels=4, num_classes=3)
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    state = dict(trunk.state_dict())
    torch.save(state, tmp_path / "DiT-XL-2-256x256.pt")
    torch.save(to_diffusers(state), tmp_path / "diffusers.bin")
    torch.save({"model": {}, "ema": state, "opt": {}, "args": None}, tmp_path / "trained.pt")
    with pytest.raises(ConfigError, match="diffusers' names, which do not tell .* --resolution"):
        read_model(import_config(workspace, tmp_path / "diffusers.bin"))
    shots = []
    for name in ("DiT-XL-2-256x256.pt", "diffusers.bin", "trained.pt"):
        changes = {"resolution": 64} if name == "diffusers.bin" else {}
        run = imported(workspace, tmp_path / name, f"dit-{name}", **changes)
        content = load_checkpoint(run.newest_checkpoint())
        assert content["about"]["model_spec"] == dataclasses.asdict(spec)
        assert content["about"]["inputs"]["resolution"] == 64
        assert_same(split_state(content["ema"])[0], state)
        shots.append(samples_of(workspace, run))
    assert shots[0].std() > 0.1 and all(torch.equal(shot, shots[0]) for shot in shots)
    with pytest.raises(ConfigError, match="is no SiT, the only family of the reference's code"):
        export(workspace, tmp_path / "out.pt", run="dit-trained.pt")
    export(workspace, tmp_path / "out", run="dit-trained.pt", to="safetensors")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 3])
    assert torch.equal(load_exported(tmp_path / "out")(x, t, y), trunk.eval()(x, t, y))


def test_a_file_without_steps_or_args(workspace: Path, tmp_path: Path) -> None:
    """The released last.pt is a bare state dict."""
    content = torch.load(reference_file(workspace, tmp_path / "x.pt"), weights_only=False)
    torch.save(content["ema"], tmp_path / "last.pt")
    model = read_model(import_config(workspace, tmp_path / "last.pt"))
    assert model.step == 0 and model.about["config"]["path"] == "linear"
    assert [f["name"] for f in model.about["inputs"]["features"]] == ["teacher-0", "teacher-1"]
    run = imported(workspace, tmp_path / "last.pt", "bare")
    assert run.newest_checkpoint().name == "step-00000000.pt"
    assert torch.equal(samples_of(workspace, run), samples_of(workspace, run_of(workspace)))
    (tmp_path / "last.pt").rename(tmp_path / "0400000.pt")
    assert read_model(import_config(workspace, tmp_path / "0400000.pt")).step == 400_000


def test_an_import_that_was_killed_goes_on(workspace: Path, tmp_path: Path) -> None:
    export(workspace, tmp_path / "m.pt")
    run = imported(workspace, tmp_path / "m.pt", "killed")
    path = run.newest_checkpoint()
    path.with_suffix(".json").unlink()  # before its marker
    config = import_config(workspace, tmp_path / "m.pt", name="killed")
    model = read_model(config)
    assert import_run(config, model) == (run, True) and run.newest_checkpoint() == path
    assert import_run(config, model) == (run, False)
    other = dataclasses.replace(model, digest="0" * 64)
    assert isinstance(other, ImportedModel)
    with pytest.raises(MismatchError, match="was not imported from this file"):
        import_run(config, other)


def test_a_run_that_was_imported_is_not_trained_on(workspace: Path, tmp_path: Path) -> None:
    export(workspace, tmp_path / "m.pt")
    imported(workspace, tmp_path / "m.pt", "given")
    with pytest.raises(ConfigError, match="was imported from m.pt, which does not hold"):
        open_run(toy_train_config(workspace), "given", {})


def test_the_method_of_an_import_is_whole(workspace: Path, tmp_path: Path) -> None:
    export(workspace, tmp_path / "m.pt")
    model = read_model(import_config(workspace, tmp_path / "m.pt"))
    method = method_of_checkpoint(model.content)
    widths = [projector[4].out_features for projector in method.build()["projectors"]]  # type: ignore[index]
    assert widths == [12, 20] and method.null_label == 3
