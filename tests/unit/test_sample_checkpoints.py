"""What can be sampled: averages, files of others, exports, URLs; a weaker model as guide."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.data.objects import open_store
from repa_pipeline.diffusion.guidance import count_evaluations, guided
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    DataError,
    MismatchError,
    MissingError,
)
from repa_pipeline.models.published_dit import to_diffusers
from repa_pipeline.stages import sample_checkpoint
from repa_pipeline.stages.export_run import export_run, plan_export, split_state
from repa_pipeline.stages.sample_checkpoint import fetch
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.stages.sampler import Sampler
from repa_pipeline.testing.caches import TOY_TRUNK, isolated_tables
from repa_pipeline.testing.sampling import PLUGIN_NAME, toy_sample_config, write_toy_runs
from repa_pipeline.training.checkpoint import file_digest, load_checkpoint
from repa_pipeline.training.mirror import Mirror
from repa_pipeline.training.runs import Run

OTHERS: dict[str, Any] = {"decoder": "tiny-kl", "num_heads": 2, "plugins": ("toy_decoders",)}
DIT: dict[str, Any] = {
    "model": "DiT-S/2",
    "overrides": {"models.DiT-S/2": {**TOY_TRUNK, "align_depth": 2}},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs `toy` (averages 0.9, 0.5 and 0.99), `short` (its weaker twin), `dit`, `cosine`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with isolated_tables(folder):
        write_toy_runs(
            folder,
            toy={"ema_extra": (0.5, 0.99)},
            short={"steps": 4},
            dit={**DIT, "steps": 4},
            cosine={"steps": 2, "path": "cosine"},
        )
        yield folder


def checkpoint_of(workspace: Path, run: str = "toy") -> Path:
    return Run(workspace / "runs" / run).newest_checkpoint()


def sampler_of(workspace: Path, **changes: Any) -> Sampler:
    settings = {} if "checkpoint" in changes else {"run": "toy"}
    return sample_stage(toy_sample_config(workspace, **{**settings, **changes})).load_sampler()


def samples_of(workspace: Path, **changes: Any) -> Tensor:
    found = sampler_of(workspace, **changes).scaled([0, 1, 2, 3])
    assert found.shape == (4, 4, 8, 8) and float(found.std()) > 0.1
    return found


# Averages


def test_an_average_is_chosen_by_its_decay(workspace: Path) -> None:
    content = load_checkpoint(checkpoint_of(workspace))
    name = "trunk.blocks.0.attn.qkv.weight"
    for decay, state in (
        (0.0, content["ema"]),
        (0.9, content["ema"]),
        (0.5, content["more_emas"]["0.5"]),
        (0.99, content["more_emas"]["0.99"]),
    ):
        network = sampler_of(workspace, ema_decay=decay).model.network
        assert torch.equal(network.get_parameter(name), state[name])
    assert not torch.equal(content["ema"][name], content["more_emas"]["0.5"][name])
    specs = {
        decay: sample_stage(toy_sample_config(workspace, run="toy", ema_decay=decay)).spec
        for decay in (0.0, 0.9, 0.5)
    }
    assert specs[0.0].fingerprint == specs[0.9].fingerprint != specs[0.5].fingerprint
    assert "ema_decay" not in specs[0.0].manifest and specs[0.5].manifest["ema_decay"] == 0.5


def test_an_average_that_is_not_there(workspace: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"ema_decay 0.7: .* averages of decay 0.9, 0.5, 0.99: .*--ema-extra 0.7"
    ):
        sample_stage(toy_sample_config(workspace, run="toy", ema_decay=0.7))
    with pytest.raises(ConfigError, match="--ema-decay chooses an average, --no-use-ema none"):
        sample_stage(toy_sample_config(workspace, run="toy", ema_decay=0.5, use_ema=False))


# Files of others


def reference_file(
    workspace: Path, path: Path, *, older: bool = False, width: int = 0, bare: bool = False
) -> Path:
    """The toy run as the reference's code would have saved it; `width`: of another projector."""
    content = load_checkpoint(checkpoint_of(workspace))
    states = {}
    for part in ("model", "ema"):
        trunk, projectors = split_state(content[part])
        if older:
            trunk = {k.replace("blocks.2.", "decoder_blocks.0."): v for k, v in trunk.items()}
        if width:
            projectors = {
                "0.0.weight": torch.ones(width, 64), "0.0.bias": torch.ones(width),
                "0.2.weight": torch.ones(width, width), "0.2.bias": torch.ones(width),
                "0.4.weight": torch.ones(7, width), "0.4.bias": torch.ones(7),
            }  # fmt: skip
        states[part] = {**trunk, **{f"projectors.{k}": v for k, v in projectors.items()}}
    args = argparse.Namespace(path_type="linear", num_classes=3, enc_type="dinov2-vit-b")
    whole = {**states, "opt": {"state": {}}, "args": args, "steps": 12}
    torch.save(states["ema"] if bare else whole, path)
    return path


@pytest.mark.parametrize(
    "shape",
    [{}, {"older": True}, {"width": 40}, {"bare": True}, {"older": True, "bare": True}],
    ids=str,
)
def test_reference_checkpoints_sample_directly(
    workspace: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    path = reference_file(workspace, tmp_path / "0000012.pt", **shape)
    found = samples_of(workspace, checkpoint=str(path), **OTHERS)
    assert torch.equal(found, samples_of(workspace))
    stage = sample_stage(toy_sample_config(workspace, checkpoint=str(path), **OTHERS))
    assert stage.recipe["checkpoint_sha256"] == file_digest(path) and stage.recipe["step"] == 12
    assert stage.notes == () and stage.output.startswith(f"{tmp_path}/samples/step12.sde4.")
    projectors = stage.load_sampler()
    for module in projectors.model.network.get_submodule("projectors").children():
        module.register_forward_hook(lambda *_: pytest.fail("a projector ran"))
    projectors.scaled([0])


def test_which_autoencoder_was_assumed_is_said(workspace: Path, tmp_path: Path) -> None:
    path = reference_file(workspace, tmp_path / "last.pt")
    config = toy_sample_config(workspace, checkpoint=str(path), num_heads=2)
    found = sample_checkpoint.read_checkpoint(config, str(path))
    assert found.about["latents"]["autoencoder"] == "sd-vae-ft-ema"
    assert found.notes == (
        "last.pt does not say which autoencoder its latents are of: sd-vae-ft-ema is assumed, "
        "--decoder names another",
    )
    with pytest.raises(ConfigError, match="cannot tell the number of heads of a model of width 64"):
        sample_stage(toy_sample_config(workspace, checkpoint=str(path), decoder="tiny-kl",
                                       plugins=("toy_decoders",)))  # fmt: skip


@pytest.mark.parametrize("naming", ["authors", "diffusers"])
def test_published_dit_files_sample_directly(workspace: Path, tmp_path: Path, naming: str) -> None:
    trunk, _ = split_state(load_checkpoint(checkpoint_of(workspace, "dit"))["ema"])
    torch.save(trunk if naming == "authors" else to_diffusers(trunk), tmp_path / "dit.pt")
    for sampler in ("ddpm", "ddim"):
        common: dict[str, Any] = {"sampler": sampler, "checkpoint": str(tmp_path / "dit.pt")}
        found = samples_of(workspace, **common, **OTHERS, resolution=64)
        ours = samples_of(
            workspace, sampler=sampler, checkpoint=str(checkpoint_of(workspace, "dit"))
        )
        assert torch.equal(found, ours)
    with pytest.raises(ConfigError, match="sampler sde does not fit .* ddpm, ddim"):
        samples_of(workspace, sampler="sde", checkpoint=str(tmp_path / "dit.pt"), resolution=64,
                   **OTHERS)  # fmt: skip
    if naming == "diffusers":
        with pytest.raises(ConfigError, match="do not tell the size of the images"):
            samples_of(workspace, checkpoint=str(tmp_path / "dit.pt"), **OTHERS)


def test_an_exported_folder_samples_directly(workspace: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    export_run(
        plan_export(
            ExportConfig(workspace=str(workspace), run="toy", to="safetensors", destination=folder)
        )
    )
    found = samples_of(workspace, checkpoint=folder, plugins=("toy_decoders",))
    assert torch.equal(found, samples_of(workspace))
    stage = sample_stage(toy_sample_config(workspace, checkpoint=folder, plugins=("toy_decoders",)))
    assert stage.output.startswith(f"{folder}/samples/")


def test_files_that_are_no_checkpoint(workspace: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Bomb(), "ema": {}}, tmp_path / "bomb.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, kind in (("bomb.pt", DataError), ("text.pt", DataError), ("no.pt", MissingError)):
        with pytest.raises(kind):
            samples_of(workspace, checkpoint=str(tmp_path / name), **OTHERS)
    assert not (tmp_path / "executed").exists()


# URLs


def test_a_checkpoint_at_a_url(workspace: Path, tmp_path: Path, monkeypatch: Any) -> None:
    downloads = tmp_path / "kept"
    kept = {"downloads": str(downloads), "plugins": (PLUGIN_NAME,)}
    path = checkpoint_of(workspace)
    store = open_store("memory://sample-url/plain")
    store.put("mine.pt", path.read_bytes())
    monkeypatch.setattr(sample_checkpoint, "_PIECE_BYTES", 100_000)  # many pieces
    url = "memory://sample-url/plain/mine.pt"
    assert torch.equal(samples_of(workspace, checkpoint=url, **kept), samples_of(workspace))
    digest = file_digest(path)
    assert [p.relative_to(downloads) for p in downloads.rglob("*.pt")] == [Path(digest) / "mine.pt"]
    with pytest.raises(ConfigError, match=rf"{url} wants '{PLUGIN_NAME}', which is neither .* nor"):
        samples_of(workspace, checkpoint=url, downloads=str(downloads))
    stage = sample_stage(toy_sample_config(workspace, checkpoint=url, **kept))
    assert stage.recipe["checkpoint_sha256"] == digest
    assert stage.output.startswith(f"{workspace}/samples/step12.sde4.cfg2-0-0.7.")

    # A worker asks by digest: nothing is downloaded again, and a torn file of that name is.
    store.delete("mine.pt")
    stage.load_sampler()
    with pytest.raises(MissingError, match="no checkpoint memory://sample-url/plain/mine.pt"):
        fetch(url, downloads=str(downloads))
    store.put("mine.pt", path.read_bytes())
    (downloads / digest / "mine.pt").write_bytes(b"torn")
    assert fetch(url, digest, str(downloads)).read_bytes() == path.read_bytes()
    store.put("mine.pt", path.read_bytes()[:-1])
    shutil.rmtree(downloads)
    with pytest.raises(DamagedError, match=f"expected {digest[:12]}: it was changed or cut short"):
        fetch(url, digest, str(downloads))
    assert not list(downloads.rglob("*.pt"))


def test_a_checkpoint_at_a_url_brings_no_code(workspace: Path, tmp_path: Path) -> None:
    """A description of somebody else: no module is imported because it says so."""
    content = torch.load(checkpoint_of(workspace), weights_only=True)
    about, bare = content["about"], {**content["about"]["config"], "plugins": []}
    entry = {"autoencoders.tiny": {"loader": "this:s"}}
    evil = {
        "method.pt": {**about, "config": bare, "method": "this:s"},
        "model.pt": {
            **about,
            "config": bare,
            "model_spec": {**about["model_spec"], "loader": "this:s"},
        },
        "entry.pt": {**about, "config": {**bare, "overrides": entry}},
    }
    store = open_store("memory://sample-url/evil")
    for name, described in evil.items():
        torch.save({**content, "about": described}, tmp_path / name)
        store.put(name, (tmp_path / name).read_bytes())
        config = toy_sample_config(
            workspace, checkpoint=f"{store.url}/{name}", downloads=str(tmp_path),
            plugins=(PLUGIN_NAME,),
        )  # fmt: skip
        if name == "entry.pt":
            assert sample_stage(config).config.overrides == {}
        else:
            with pytest.raises(ConfigError, match="wants 'this:s', which is neither of this pack"):
                sample_stage(config)


def test_a_checkpoint_that_a_run_keeps_in_pieces(workspace: Path, tmp_path: Path) -> None:
    kept = {"downloads": str(tmp_path)}
    run = Run(workspace / "runs" / "toy")
    Mirror(run, open_store("memory://sample-url/toy"), 200_000).sync(keep=2, keep_every=0)
    url = f"memory://sample-url/toy/checkpoints/{run.newest_checkpoint().name}"
    assert len(open_store("memory://sample-url/toy").list("checkpoints")) > 3
    own = {**kept, "plugins": (PLUGIN_NAME,)}
    assert torch.equal(samples_of(workspace, checkpoint=url, **own), samples_of(workspace))
    assert fetch(url, **kept).read_bytes() == run.newest_checkpoint().read_bytes()
    with pytest.raises(ConfigError, match="password|credentials"):
        fetch("s3://name:secret@bucket/x.pt")


def test_another_file_on_a_worker_is_refused(workspace: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.pt"
    shutil.copy(checkpoint_of(workspace), mine)
    stage = sample_stage(toy_sample_config(workspace, checkpoint=str(mine)))
    shutil.copy(checkpoint_of(workspace, "short"), mine)
    with pytest.raises(MismatchError, match="the checkpoint .*mine.pt on .* has sha256 .*, exp"):
        stage.open({})


# A weaker model as guide


class Affine:
    """A model that answers `factor * x + cond`, and counts."""

    def __init__(self, factor: float, more: int = 0):
        self.factor, self.more = factor, more
        self.calls: list[int] = []

    def __call__(self, states: Any, t: Tensor, cond: Tensor) -> Any:
        self.calls.append(len(t))
        answers = tuple(self.factor * s + cond[:, None] for s in states)
        return answers + answers * self.more


def test_the_weaker_model_takes_the_place_of_the_null_condition() -> None:
    strong, weak = Affine(2.0, more=1), Affine(3.0, more=1)
    cond, null = torch.tensor([1.0, 5.0]), torch.tensor([100.0, 100.0])
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = guided(strong, cond, null, scale=1.5, interval=(0.2, 0.7), weaker=weak)
    for t in (0.1, 0.8):
        mean, variance = answer((x,), t, t)
        torch.testing.assert_close(mean, 2 * x + cond[:, None].double(), rtol=1e-6, atol=1e-6)
    assert (strong.calls, weak.calls) == ([2, 2], [])
    mean, variance = answer((x,), 0.5, 0.5)
    c, w = 2 * x + cond[:, None], 3 * x + cond[:, None]
    torch.testing.assert_close(mean, w + 1.5 * (c - w), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, c, rtol=1e-6, atol=1e-6)
    assert (strong.calls, weak.calls) == ([2, 2, 2], [2])


def test_what_autoguidance_costs() -> None:
    for sampler, steps, scale, interval, expected in (
        ("sde", 250, 1.8, (0.0, 0.7), (250, 172)),
        ("sde", 250, 1.8, (0.0, 1.0), (250, 250)),
        ("heun", 50, 1.5, (0.0, 1.0), (99, 99)),
        ("ddpm", 10, 1.0, (0.0, 1.0), (10, 0)),
    ):
        counts = count_evaluations(sampler, steps, autoguided=True, scale=scale, interval=interval)
        assert counts == expected


def test_autoguided_samples(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak = str(checkpoint_of(workspace, "short"))
    plain, classifier_free = samples_of(workspace, cfg=1.0), samples_of(workspace)
    found = samples_of(workspace, guide_checkpoint=weak)
    assert not torch.equal(found, plain) and not torch.equal(found, classifier_free)
    # By itself a model guides nowhere: w + s (w - w).
    itself = samples_of(workspace, guide_checkpoint=str(checkpoint_of(workspace)))
    torch.testing.assert_close(itself, plain, rtol=0, atol=1e-5)
    assert torch.equal(samples_of(workspace, guide_checkpoint=weak, interval=(0.1, 0.11)), plain)

    one = sampler_of(workspace, guide_checkpoint=weak, sampler="euler", num_steps=4)
    strong, weaker = one.latent_sampler.model, one.latent_sampler.weaker  # type: ignore[union-attr]
    assert weaker is not None

    def velocity(model: Any, x: Tensor, t: float) -> Tensor:
        labels = torch.from_numpy(one.labels.of([0, 1]))
        trunk = model.network.get_submodule("trunk")
        return trunk(x.float(), torch.full((2,), t), labels).double()

    from repa_pipeline.stages.sampler import Draws

    (x,) = Draws.seeded(0, [0, 1], ((4, 8, 8),), "cpu").noise()
    x = x.double()
    for t in (1.0, 0.75, 0.5, 0.25):
        v = velocity(strong, x, t)
        if t <= 0.7:
            w = velocity(weaker, x, t)
            v = w + 2.0 * (v - w)
        x = x - 0.25 * v
    torch.testing.assert_close(one.scaled([0, 1]), x, rtol=0, atol=1e-5)


def test_the_guide_is_in_the_recipe(workspace: Path) -> None:
    weak = checkpoint_of(workspace, "short")
    stage = sample_stage(toy_sample_config(workspace, run="toy", guide_checkpoint=str(weak)))
    assert stage.recipe["guide"] == {"checkpoint_sha256": file_digest(weak), "step": 4}
    assert ".cfg2-0-0.7-auto." in stage.output
    plain = sample_stage(toy_sample_config(workspace, run="toy"))
    assert "guide" not in plain.recipe and plain.output != stage.output


def test_guides_that_do_not_fit(workspace: Path) -> None:
    for run, said in (
        ("dit", r"answers\.?.* is|answers"),
        ("cosine", "path is 'cosine', expected 'linear'"),
    ):
        with pytest.raises(MismatchError, match=f"guide checkpoint .* does not fit .*{said}"):
            guide = str(checkpoint_of(workspace, run))
            sample_stage(toy_sample_config(workspace, run="toy", guide_checkpoint=guide))
    with pytest.raises(ConfigError, match="--cfg 1 guides nothing"):
        guide = str(checkpoint_of(workspace, "short"))
        sample_stage(toy_sample_config(workspace, run="toy", guide_checkpoint=guide, cfg=1.0))


# Compute


def test_tf32_is_refused_where_there_is_none(workspace: Path) -> None:
    stage = sample_stage(toy_sample_config(workspace, run="toy", dtype="tf32"))
    assert (stage.recipe["dtype"], stage.recipe["tf32"]) == ("tf32", True)
    with pytest.raises(ConfigError, match="dtype tf32 is of CUDA devices"):
        stage.open({})
    half = sample_stage(toy_sample_config(workspace, run="toy", dtype="bf16"))
    assert (half.recipe["dtype"], half.recipe["tf32"]) == ("bf16", False)


@pytest.mark.slow
def test_compiled_samples_are_close(workspace: Path) -> None:
    stage = sample_stage(toy_sample_config(workspace, run="toy", compile=True))
    assert stage.recipe["compile"] is True
    found = stage.load_sampler().scaled([0, 1, 2, 3])
    torch.testing.assert_close(found, samples_of(workspace), rtol=0, atol=1e-3)


def test_settings_that_came_later_change_no_recipe(workspace: Path) -> None:
    recipe = sample_stage(toy_sample_config(workspace, run="toy")).recipe
    assert not {"compile", "ema_decay", "num_heads", "guide", "labels_sha256"} & recipe.keys()
