"""Samples are a function of (checkpoint, settings, seed, k); what is made of them; refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from repa_pipeline.autoencoders.base import load_autoencoder
from repa_pipeline.cli import main
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.engine.contracts import Shard, run_phases
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import run_stage
from repa_pipeline.errors import ConfigError, DamagedError, DataError, MismatchError, MissingError
from repa_pipeline.observe import Silent
from repa_pipeline.pictures import class_grid
from repa_pipeline.stages.sample import (
    SampleStage,
    finish_samples,
    open_samples,
    read_settings,
    sample_blocks,
    sample_ledgers,
)
from repa_pipeline.stages.sample_labels import labels_of, sample_labels
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.stages.sampler import Draws, LatentSampler, Sampler, to_uint8
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import isolated_tables, toy_train_config, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training.draws import seed_of

Images = npt.NDArray[np.uint8]

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [
    tiny_autoencoder(weights={weights!r}),
    tiny_autoencoder("tiny-wide", channels=6, weights={weights!r}),
    tiny_autoencoder("tiny-other", weights={other!r}),
]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained toy run, and a plugin with its decoder."""
    folder = tmp_path_factory.mktemp("sampling")
    write_toy_cache(folder)
    weights, other = str(folder / "tiny.safetensors"), str(folder / "other.safetensors")
    write_weights(tiny_autoencoder(weights=weights))
    write_weights(tiny_autoencoder(weights=other), seed=1)
    (folder / "tiny_parts.py").write_text(PLUGIN.format(weights=weights, other=other))
    with isolated_tables(folder):
        config = toy_train_config(
            folder, name="toy", plugins=("tiny_parts",), steps=12, learning_rate=1e-2
        )
        train(plan_training(config), Silent())
        yield folder


def config_of(workspace: Path, **changes: Any) -> SampleConfig:
    settings: dict[str, Any] = {
        "workspace": str(workspace),
        "device": "cpu",
        "threads": 1,
        "num_images": 10,
        "num_steps": 6,
        "cfg": 2.0,
        "batch_size": 4,
        "shard_rows": 5,
        "grid": 0,
        "npz": False,
    }
    return SampleConfig(**{**settings, **changes})


def sampler_of(workspace: Path, **changes: Any) -> Sampler:
    return sample_stage(config_of(workspace, **changes)).load_sampler()


def make(workspace: Path, output: Path, **changes: Any) -> SampleStage:
    stage = sample_stage(config_of(workspace, output=str(output), **changes))
    run_stage(stage, LocalExecutor(), sample_ledgers(stage), Silent())
    return stage


def images_in(folder: Path) -> Images:
    return np.concatenate(list(sample_blocks(open_samples(str(folder)))))


@pytest.mark.parametrize("sampler", ["sde", "euler", "heun"])
def test_a_sample_does_not_depend_on_its_batch(workspace: Path, sampler: str) -> None:
    latents, images = {}, {}
    for size in (1, 7, 64):
        one = sampler_of(workspace, sampler=sampler, batch_size=size)
        indices = list(range(64))
        parts = [one.scaled(indices[i : i + size]) for i in range(0, 9, size)]
        latents[size] = torch.cat(parts)[:9]
        images[size] = one.images(range(9)).astype(int)
    assert latents[1].dtype == torch.float64 and float(latents[1].std()) > 0.1
    for size in (7, 64):
        torch.testing.assert_close(latents[size], latents[1], rtol=0, atol=1e-4)
        assert np.abs(images[size] - images[1]).max() <= 1
    assert np.abs(images[1][0] - images[1][1]).max() > 5


def test_shards_in_any_order_and_number_are_the_same(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "whole")
    whole = images_in(tmp_path / "whole")

    stage = sample_stage(config_of(workspace, output=str(tmp_path / "parts")))
    (images,) = stage.outputs
    images.begin()
    work = stage.open({})
    commits = [run_phases(work, shard)[0] for shard in reversed(images.plan().shards)]
    images.seal(sorted(commits, key=lambda commit: commit.index))
    assert np.array_equal(images_in(tmp_path / "parts"), whole)
    assert all(
        (tmp_path / "parts" / key).read_bytes() == (tmp_path / "whole" / key).read_bytes()
        for key in ("images/seal.json", "images/zarr.json", "images/c/1/0/0/0")
    )

    # A killed run: one shard recorded, the other gone.
    resumed = sample_stage(config_of(workspace, output=str(tmp_path / "resumed")))
    resumed.outputs[0].begin()
    sample_ledgers(resumed)["images"].record(run_phases(resumed.open({}), Shard(1, 5, 10))[0])
    result = run_stage(resumed, LocalExecutor(), sample_ledgers(resumed), Silent())
    assert result.num_new == 1
    assert np.array_equal(images_in(tmp_path / "resumed"), whole)

    again = run_stage(resumed, LocalExecutor(), sample_ledgers(resumed), Silent())
    assert again.num_new == 0


def test_more_images_begin_with_the_same_ones(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "few", num_images=6)
    make(workspace, tmp_path / "many", num_images=12)
    few, many = images_in(tmp_path / "few"), images_in(tmp_path / "many")
    assert (len(few), len(many)) == (6, 12)
    assert np.array_equal(few, many[:6])


def test_other_seeds_give_other_images(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "a", seed=0)
    make(workspace, tmp_path / "b", seed=1)
    a, b = images_in(tmp_path / "a"), images_in(tmp_path / "b")
    assert all((a[k] != b[k]).any() for k in range(10))


def test_label_rules() -> None:
    assert sample_labels("balanced", 0, [0, 1, 5, 7], 3).tolist() == [0, 1, 2, 1]
    assert sample_labels("2", 0, [4, 9], 3).tolist() == [2, 2]
    random = sample_labels("random", 0, list(range(3000)), 3)
    assert np.array_equal(random[100:200], sample_labels("random", 0, list(range(100, 200)), 3))
    assert not np.array_equal(random, sample_labels("random", 1, list(range(3000)), 3))
    counts = np.bincount(random, minlength=3)
    assert counts.sum() == 3000 and np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
    for rule in ("3", "-1", "²", "Random", ""):
        with pytest.raises(ConfigError, match="expected random, balanced or a class from 0 to 2"):
            sample_labels(rule, 0, [0], 3)


def test_labels_reach_the_model(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "one", labels="1", num_images=4)
    make(workspace, tmp_path / "two", labels="2", num_images=4)
    one, two = images_in(tmp_path / "one"), images_in(tmp_path / "two")
    assert (one != two).any()
    manifest = open_samples(str(tmp_path / "two")).spec.manifest
    assert labels_of(manifest, 3).tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match="labels: got '3', expected random, balanced or a class"):
        sample_stage(config_of(workspace, labels="3"))


def test_truncating_and_rounding_to_levels() -> None:
    levels = torch.tensor([-3.0, 0.0, 0.4, 0.6, 100.5, 254.4, 254.6, 255.0, 300.0])
    pixels = (levels / 255 * 2 - 1).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    truncated, rounded = (to_uint8(pixels, rule) for rule in ("truncate", "round"))
    assert truncated.shape == (1, 1, 9, 3) and truncated.dtype == np.uint8
    assert truncated[0, 0, :, 1].tolist()[:4] == [0, 0, 0, 0]
    assert truncated[0, 0, :, 1].tolist()[4:] == [100, 254, 254, 255, 255]
    assert rounded[0, 0, :, 1].tolist()[:4] == [0, 0, 0, 1]
    assert rounded[0, 0, :, 1].tolist()[5:] == [254, 255, 255, 255]


def test_images_are_the_decoded_unscaled_latents(workspace: Path) -> None:
    sampler = sampler_of(workspace, batch_size=3)
    raw = sampler.scaled([0, 1, 2]).float() / 0.5 + 0.1
    assert np.array_equal(sampler.latents(range(3)), raw.numpy())
    decoder = load_autoencoder(tiny_autoencoder(weights=str(workspace / "tiny.safetensors")))
    pixels = decoder.decode(raw).permute(0, 2, 3, 1).numpy()
    expected = np.clip(255 * (pixels + 1) / 2, 0, 255)
    assert np.abs(sampler.images(range(3)) - expected).max() <= 1 and expected.std() > 10


class Counting:
    """Counts the model's calls by (guided, t)."""

    def __init__(self, sampler: Sampler):
        self.calls: list[tuple[int, float]] = []
        method: Any = sampler.model.method
        self._velocity = method.velocity
        method.velocity = self

    def __call__(self, model: Any, states: Any, t: torch.Tensor, cond: torch.Tensor) -> Any:
        self.calls.append((len(cond), round(float(t[0]), 6)))
        return self._velocity(model, states, t, cond)


def test_guidance_acts_inside_its_interval_only(workspace: Path) -> None:
    sampler = sampler_of(workspace, sampler="euler", num_steps=5, interval=(0.3, 0.7))
    counting = Counting(sampler)
    sampler.scaled([0, 1])
    assert counting.calls == [(2, 1.0), (2, 0.8), (4, 0.6), (4, 0.4), (2, 0.2)]
    off = sampler_of(workspace, sampler="euler", num_steps=5, cfg=1.0)
    counting = Counting(off)
    off.scaled([0, 1])
    assert [count for count, _ in counting.calls] == [2] * 5

    def latents(**changes: Any) -> torch.Tensor:
        return sampler_of(workspace, sampler="euler", num_steps=5, **changes).scaled([0, 1])

    plain, narrow = latents(cfg=1.0), latents(interval=(0.3, 0.7))
    assert torch.equal(latents(interval=(0.45, 0.5)), plain)
    assert not torch.equal(narrow, plain) and not torch.equal(narrow, latents())


def test_projectors_are_never_called(workspace: Path) -> None:
    sampler = sampler_of(workspace)
    for projector in sampler.model.network.get_submodule("projectors").children():
        projector.register_forward_hook(lambda *_: pytest.fail("a projector ran"))
    sampler.scaled([0])


def test_ema_or_raw_weights(workspace: Path) -> None:
    content = torch.load(sampler_stage_checkpoint(workspace), weights_only=True)
    name = "trunk.blocks.0.attn.qkv.weight"
    ema, raw = sampler_of(workspace), sampler_of(workspace, use_ema=False)
    assert torch.equal(ema.model.network.get_parameter(name), content["ema"][name])
    assert torch.equal(raw.model.network.get_parameter(name), content["model"][name])
    assert not torch.equal(ema.scaled([0]), raw.scaled([0]))
    network = ema.model.network
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


def sampler_stage_checkpoint(workspace: Path) -> str:
    return str(sample_stage(config_of(workspace)).checkpoint)


def test_draws_ahead_are_the_same_numbers() -> None:
    shapes = ((4, 2, 2), (3,))

    def drawn(ahead: bool) -> list[Any]:
        noise, sde = (
            [torch.Generator().manual_seed(seed_of(7, k, purpose)) for k in (0, 5)]
            for purpose in ("noise", "sde")
        )
        draws = Draws(noise, sde, shapes, "cpu", ahead)
        return [draws.noise(), *(draws.increments(step) for step in range(5))]

    plain = drawn(ahead=False)
    for got, expected in zip(drawn(ahead=True), plain, strict=True):
        assert all(map(torch.equal, got, expected))
    generator = torch.Generator().manual_seed(seed_of(7, 5, "sde"))
    for states in plain[1:]:
        for state, shape in zip(states, shapes, strict=True):
            own = torch.randn(shape, generator=generator, dtype=torch.float64)
            assert torch.equal(state[1], own)


def test_weights_in_bf16_are_what_autocast_makes_of_them(workspace: Path) -> None:
    cast = sampler_of(workspace, dtype="bf16")
    assert cast.model.network.get_parameter("trunk.blocks.0.mlp.fc1.weight").dtype == torch.bfloat16
    plain = sampler_of(workspace)
    assert cast.latent_sampler is not None and plain.latent_sampler is not None
    steps = cast.latent_sampler.steps
    autocast = LatentSampler(plain.model, steps, "cpu")
    draws = [Draws.seeded(0, [0, 1], ((4, 8, 8),), "cpu") for _ in range(2)]
    labels = cast.labels.of([0, 1])
    found = cast.latent_sampler.scaled(labels, draws[0])
    assert torch.equal(found, autocast.scaled(labels, draws[1]))


def test_bf16_is_close_to_float32(workspace: Path) -> None:
    exact = sampler_of(workspace).scaled([0, 1])
    half = sampler_of(workspace, dtype="bf16").scaled([0, 1])
    assert not torch.equal(half, exact)
    assert float((half - exact).abs().mean()) < 0.1 * float(exact.std())


def test_tf32_is_on_for_the_sampler_alone(workspace: Path, monkeypatch: Any) -> None:
    """Not for judges of the same pass, whose features are those of `repa evaluate`."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn

    def switched() -> list[bool]:
        return [switch.allow_tf32 for switch in switches]

    before, seen = switched(), []
    sampler = sampler_of(workspace)
    monkeypatch.setattr(sampler, "config", dataclasses.replace(sampler.config, dtype="tf32"))
    for part, name in ((sampler.latent_sampler, "scaled"), (sampler.decoder, "decode")):
        plain = getattr(part, name)

        def noted(*given: Any, plain: Any = plain) -> Any:
            seen.append(switched())
            return plain(*given)

        monkeypatch.setattr(part, name, noted)
    sampler.images(range(2))
    assert seen == [[True, True]] * 2 and switched() == before
    monkeypatch.setattr(SampleStage, "load_sampler", lambda *_, **__: sampler)
    sample_stage(config_of(workspace, dtype="tf32")).open({})
    assert switched() == [False, False]


def test_the_npz_and_the_picture(workspace: Path, tmp_path: Path) -> None:
    stage = make(workspace, tmp_path / "out", npz=True, grid=6, labels="balanced")
    npz, picture = finish_samples(stage)
    images = images_in(tmp_path / "out")
    with np.load(npz, allow_pickle=False) as stored:
        assert stored.files == ["arr_0", "settings"] and stored["arr_0"].dtype == np.uint8
        assert json.loads(str(stored["settings"])) == read_settings(str(tmp_path / "out"))
        assert np.array_equal(stored["arr_0"], images)
    zarr = pytest.importorskip("zarr")
    assert np.array_equal(zarr.open_array(str(tmp_path / "out" / "images"), mode="r")[:], images)

    grid = np.asarray(Image.open(picture))
    assert grid.shape == (3 * 66 + 2, 2 * 66 + 2, 3)  # a row a class, two images of each
    for label in range(3):
        for column in range(2):
            top, left = 2 + 66 * label, 2 + 66 * column
            tile = grid[top : top + 64, left : left + 64]
            assert np.array_equal(tile, images[label + 3 * column])
    assert (grid[:2] == 255).all() and (grid[:, 66:68] == 255).all()

    before = [path.stat().st_mtime_ns for path in (npz, picture)]
    assert finish_samples(stage) == [npz, picture]
    assert [path.stat().st_mtime_ns for path in (npz, picture)] == before


def test_pictures_of_many_classes_and_of_few_images() -> None:
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 2, 2, 3), np.uint8)
    grid = class_grid(images, np.arange(7) % 2, 3)
    assert grid.shape == (10, 6, 3) and grid[2, 2, 0] == 0 and grid[6, 2, 0] == 1
    unsorted = class_grid(images, np.arange(7), 5)  # more classes than images a class
    assert unsorted.shape == (10, 14, 3)
    assert [unsorted[2, 2 + 4 * i, 0] for i in range(3)] == [0, 1, 2]
    assert [unsorted[6, 2 + 4 * i, 0] for i in range(3)] == [3, 4, 255]


def test_settings_are_recorded(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(workspace, tmp_path / "out", interval=(0.0, 0.7), num_images=5)
    settings = read_settings(str(tmp_path / "out"))
    expected = {"cfg": 2.0, "interval": [0.0, 0.7], "uint8": "truncate", "step": 12}
    expected |= {"decoder": "tiny-kl", "model": "SiT-XS/2", "num_images": 5, "num_classes": 3}
    assert {key: settings[key] for key in expected} == expected
    assert len(settings["checkpoint_sha256"]) == len(settings["decoder_sha256"]) == 64

    default = sample_stage(config_of(workspace, cfg=1.8, interval=(0.0, 0.7)))
    assert "/runs/toy/samples/step12.sde6.cfg1.8-0-0.7.seed0.n10." in default.output
    plain = sample_stage(config_of(workspace, cfg=1.0, interval=(0.0, 0.7)))
    assert "/step12.sde6.plain.seed0.n10." in plain.output
    assert plain.output.startswith(str(workspace))
    monkeypatch.chdir(workspace)
    inside = sample_stage(config_of(workspace, cfg=1.0)).output
    assert inside.startswith("runs/toy/samples/step12.sde6.plain.")


def test_a_folder_of_other_settings_is_refused(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "out")
    for changes, named in (
        ({"cfg": 1.5}, "cfg is 2.0 there, 1.5 now"),
        ({"num_images": 11}, "num_images is 10 there, 11 now"),
        ({"seed": 1}, "seed is 0 there, 1 now"),
        ({"decoder": "tiny-other"}, "decoder is 'tiny-kl' there, 'tiny-other' now"),
    ):
        with pytest.raises(MismatchError, match=f"made with other settings: {named}"):
            make(workspace, tmp_path / "out", **changes)


def test_a_decoder_that_does_not_fit(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"decoder tiny-wide has 6 latent channels, .*\(tiny-kl\) have 4"
    ):
        sample_stage(config_of(workspace, decoder="tiny-wide"))
    with pytest.raises(MissingError, match="no weights file at nowhere.safetensors"):
        sample_stage(config_of(workspace, decoder_weights="nowhere.safetensors"))
    make(workspace, tmp_path / "own", num_images=2)
    make(workspace, tmp_path / "other", num_images=2, decoder="tiny-other")
    assert (images_in(tmp_path / "own") != images_in(tmp_path / "other")).any()


def test_checkpoints_that_do_not_work(workspace: Path, tmp_path: Path) -> None:
    def refused(**changes: Any) -> SampleStage:
        return sample_stage(config_of(workspace, **changes))

    with pytest.raises(MissingError, match=r"no run 'tyo' in .*: known are toy"):
        refused(run="tyo")
    with pytest.raises(ConfigError, match="--run and --checkpoint were both given"):
        refused(run="toy", checkpoint="x.pt")
    with pytest.raises(MissingError, match=r"no checkpoint nowhere.pt"):
        refused(checkpoint="nowhere.pt")
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {"weight": torch.zeros(2)}}, foreign)
    with pytest.raises(DataError, match="has no 'ema': .* expected a checkpoint of the reference"):
        refused(checkpoint=str(foreign))
    torch.save({"format_version": 99}, foreign)
    with pytest.raises(DamagedError, match="has format version 99, this package reads 1"):
        refused(checkpoint=str(foreign))
    with pytest.raises(MissingError, match="no runs in .*: run `repa train` first"):
        sample_stage(dataclasses.replace(config_of(workspace), workspace=str(tmp_path)))


def test_the_command(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"sample --workspace {workspace} --num-images 6 --num-steps 4 --batch-size 3 --cfg 1.8"
    line += " --interval 0,0.7 --shard-rows 3 --grid 4 --output out --threads 1 --sampler sde"

    def repa(arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "done: 0 images in 0 shards" in repa(line + " --dry-run")
    assert not (tmp_path / "out" / "images").exists()
    said = repa(line)
    assert "6 images, sde 4 steps, cfg 1.8 on t in [0, 0.7]" in said
    assert "output: out" in said and "made: out/samples.npz" in said
    assert said.rstrip().endswith("next: repa evaluate --samples out")
    assert "nothing to do" in repa(line)
    seal = json.loads((tmp_path / "out" / "images" / "seal.json").read_text())
    assert seal["num_rows"] == 6 and len(seal["shards"]) == 2
