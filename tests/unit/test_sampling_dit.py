"""A DiT from the cache to images: trained, resumed and sampled; samplers and models that fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repa_pipeline.cli import main
from repa_pipeline.config import decisions
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.diffusion.ddpm import chain, sample_ddim, sample_ddpm
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.errors import ConfigError
from repa_pipeline.observe import Silent
from repa_pipeline.stages.sample import SampleStage, open_samples, sample_blocks
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.stages.sampler import Sampler
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import (
    TOY_TRUNK,
    isolated_tables,
    toy_train_config,
    write_toy_cache,
)
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training.checkpoint import load_checkpoint
from repa_pipeline.training.draws import seed_of

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights={weights!r})]
"""
DIT: dict[str, Any] = {
    "model": "DiT-S/2",
    "overrides": {"models.DiT-S/2": {**TOY_TRUNK, "align_depth": 2}},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs `dit` (aligned, until step 6), `plain` (a DiT without a teacher) and `sit`."""
    folder = tmp_path_factory.mktemp("sampling")
    write_toy_cache(folder)
    weights = str(folder / "tiny.safetensors")
    write_weights(tiny_autoencoder(weights=weights))
    (folder / "dit_parts.py").write_text(PLUGIN.format(weights=weights))
    with isolated_tables(folder):
        common: dict[str, Any] = {"plugins": ("dit_parts",), "learning_rate": 1e-2}
        runs: dict[str, dict[str, Any]] = {
            "dit": {**DIT, "steps": 10, "align_steps": 6},
            "plain": {**DIT, "steps": 2, "encoder": ("none",)},
            "sit": {"steps": 2},
        }
        for name, changes in runs.items():
            train(plan_training(toy_train_config(folder, name=name, **common, **changes)), Silent())
        yield folder


def stage_of(workspace: Path, run: str = "dit", **changes: Any) -> SampleStage:
    settings: dict[str, Any] = {
        "workspace": str(workspace),
        "device": "cpu",
        "threads": 1,
        "run": run,
        "num_images": 6,
        "num_steps": 5,
        "batch_size": 4,
        "shard_rows": 3,
        "grid": 0,
        "npz": False,
    }
    return sample_stage(SampleConfig(**{**settings, **changes}))


def checkpoint_of(workspace: Path, run: str = "dit") -> Path:
    return Path(str(stage_of(workspace, run).checkpoint))


def sampler_of(workspace: Path, **changes: Any) -> Sampler:
    return stage_of(workspace, **changes).load_sampler()


def test_the_method_of_a_run_follows_its_model(workspace: Path) -> None:
    methods = {}
    for name in ("dit", "plain", "sit"):
        content = load_checkpoint(checkpoint_of(workspace, name))
        methods[name] = content["about"]["method"].rpartition(":")[2]
    assert methods == {"dit": "RepaDiTMethod", "plain": "DiTMethod", "sit": "RepaMethod"}


def test_alignment_ends_at_its_last_step(workspace: Path) -> None:
    lines = (workspace / "runs" / "dit" / "events.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    steps = {entry["step"]: entry for entry in logged if "denoising" in str(entry)}
    assert {"alignment" in str(steps[step]) for step in (2, 4, 6)} == {True}
    assert {"alignment" in str(steps[step]) for step in (8, 10)} == {False}
    assert all("variational" in str(entry) for entry in steps.values())


@pytest.mark.parametrize(
    ("run", "asked", "used"),
    [
        ("dit", "auto", "ddpm"),
        ("dit", "ode", "ddim"),
        ("dit", "ddim", "ddim"),
        ("sit", "auto", "sde"),
        ("sit", "ode", "euler"),
        ("sit", "heun", "heun"),
    ],
)
def test_the_sampler_is_recorded_by_its_own_name(
    workspace: Path, run: str, asked: str, used: str
) -> None:
    stage = stage_of(workspace, run, sampler=asked)
    assert stage.config.sampler == stage.spec.manifest["sampler"] == used
    same = stage_of(workspace, run, sampler=used)
    assert same.spec.fingerprint == stage.spec.fingerprint and same.output == stage.output
    assert ("eta" in stage.spec.manifest) == (used == "ddim")
    # What decides a sample of a SiT is what decided it before there were DiTs.
    assert not {"eta"} & decisions(stage.config).keys()


def test_eta_decides_a_ddim_sample_alone(workspace: Path) -> None:
    def prints(**changes: Any) -> str:
        return stage_of(workspace, **changes).spec.fingerprint

    assert prints(sampler="ddim", eta=0.5) != prints(sampler="ddim")
    assert prints(sampler="ddpm", eta=0.5) == prints(sampler="ddpm")


def test_samplers_that_do_not_fit_are_refused(workspace: Path) -> None:
    for sampler in ("sde", "euler", "heun"):
        with pytest.raises(
            ConfigError, match=rf"{sampler} does not fit a checkpoint of DiT-S/2: .* ddpm, ddim"
        ):
            stage_of(workspace, sampler=sampler)
    with pytest.raises(ConfigError, match=r"ddpm does not fit .* SiT-XS/2: .* sde, euler, heun"):
        stage_of(workspace, "sit", sampler="ddpm")
    with pytest.raises(ConfigError, match="num_steps: got 1001, expected 1 to 1000"):
        stage_of(workspace, num_steps=1001)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_latents_are_those_of_the_plain_loop(workspace: Path, sampler: str, eta: float) -> None:
    """Noise, increments, guidance and interval put together by hand."""
    one = sampler_of(
        workspace, sampler=sampler, eta=eta, cfg=2.0, interval=(0.0, 0.6), labels="balanced"
    )
    trunk = one.model.network.get_submodule("trunk")
    generators = [torch.Generator().manual_seed(seed_of(0, k, "sde")) for k in (0, 1)]
    noise = torch.stack(
        [
            torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed_of(0, k, "noise")))
            for k in (0, 1)
        ]
    )

    def increments(step: int) -> States:
        drawn = [torch.randn(4, 8, 8, generator=g, dtype=torch.float64) for g in generators]
        return (torch.stack(drawn),)

    def answer(states: States, timestep: float, t_guidance: float) -> States:
        x, t = states[0].float(), torch.full((2,), int(timestep))
        c_noise, v = trunk(x, t, torch.tensor([0, 1])).double().chunk(2, dim=1)
        if timestep > 600:
            return c_noise, v
        u_noise, _ = trunk(x, t, torch.tensor([3, 3])).double().chunk(2, dim=1)
        return u_noise + 2.0 * (c_noise - u_noise), v

    if sampler == "ddpm":
        (expected,) = sample_ddpm(answer, (noise,), num_steps=5, increments=increments)
    else:
        (expected,) = sample_ddim(answer, (noise,), num_steps=5, increments=increments, eta=eta)
    found = one.scaled([0, 1])
    assert found.dtype == torch.float64 and float(found.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {level.timestep > 600 for level in chain(5)} == {True, False}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_its_batch(workspace: Path, sampler: str) -> None:
    latents = {}
    for size in (1, 3, 9):
        one = sampler_of(workspace, sampler=sampler, cfg=1.5, eta=1.0)
        parts = [one.scaled(list(range(i, i + size))) for i in range(0, 9, size)]
        latents[size] = torch.cat(parts)
    for size in (3, 9):
        torch.testing.assert_close(latents[size], latents[1], rtol=0, atol=1e-4)
    assert float((latents[1][0] - latents[1][1]).abs().max()) > 0.1


def test_projectors_are_never_called(workspace: Path) -> None:
    one = sampler_of(workspace)
    for projector in one.model.network.get_submodule("projectors").children():
        projector.register_forward_hook(lambda *_: pytest.fail("a projector ran"))
    one.scaled([0])


def test_the_command(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"sample --workspace {workspace} --run dit --num-images 5 --num-steps 4 --shard-rows 2"
    line += " --cfg 1.8 --interval 0,0.7 --batch-size 4 --grid 4 --threads 1"

    def repa(arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    said = repa(line + " --sampler auto --output ddpm")
    # Timesteps 999, 666, 333 and 0: three of them at most 700, each asked twice.
    assert "5 images, ddpm 4 steps, cfg 1.8 on t in [0, 0.7], 7 model evaluations" in said
    assert "made: ddpm/samples.npz" in said
    # The digits preset asks for the deterministic one.
    assert "5 images, ddim 4 steps" in repa(line + " --preset digits --output ddim")
    images = [
        np.concatenate(list(sample_blocks(open_samples(str(tmp_path / name)))))
        for name in ("ddpm", "ddim")
    ]
    assert images[0].shape == images[1].shape == (5, 64, 64, 3)
    assert images[0].std() > 1 and (images[0] != images[1]).any()
    refused = repa(line + " --sampler euler --output euler", code=2)
    assert "sampler euler does not fit a checkpoint of DiT-S/2" in refused
    assert not (tmp_path / "euler").exists()


def test_training_goes_on_across_the_end_of_alignment(workspace: Path) -> None:
    """Stopped before it, at it and after it: the same weights, bit for bit."""
    whole = load_checkpoint(checkpoint_of(workspace))
    for stop in (4, 6, 8):
        changes: dict[str, Any] = {**DIT, "align_steps": 6, "learning_rate": 1e-2}
        for steps in (stop, 10):
            config = toy_train_config(
                workspace, name=f"stopped-{stop}", plugins=("dit_parts",), steps=steps, **changes
            )
            train(plan_training(config), Silent())
        parts = load_checkpoint(checkpoint_of(workspace, f"stopped-{stop}"))
        assert parts["step"] == 10
        assert parts["model"].keys() == whole["model"].keys()
        for name, value in whole["model"].items():
            assert torch.equal(parts["model"][name], value), (stop, name)
