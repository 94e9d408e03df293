"""`--features online` against the cache: the same images, the same tokens, the same curve.

Real image files, encoded by the real stages with tiny networks that have weight files.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.reader import Reader
from repa_pipeline.errors import ConfigError, DataError, MissingError, RepaError
from repa_pipeline.observe import Silent, read_events
from repa_pipeline.registry import TABLES
from repa_pipeline.stages import online as online_module
from repa_pipeline.stages import train_check
from repa_pipeline.stages.online import OnlineTeachers
from repa_pipeline.stages.train import TrainPlan, TrainResult, plan_training, train
from repa_pipeline.testing.caches import isolated_tables, toy_train_config
from repa_pipeline.testing.encoded import encode_tiny_cache
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights
from repa_pipeline.training.batches import BatchMaker, mirrored_views
from repa_pipeline.training.checkpoint import load_checkpoint
from repa_pipeline.training.world import World

pytestmark = pytest.mark.slow

RESOLUTION, NUM_IMAGES, BATCH = 64, 48, 16  # three steps an epoch
TEACHERS = ("one", "two")
SCALARS = ("loss", "denoising", "alignment", "grad_norm")
PARTS = """
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder
AUTOENCODERS = [tiny_autoencoder(weights={folder!r} + "/kl.safetensors")]
ENCODERS = [
    tiny_encoder("one", weights={folder!r} + "/one.safetensors", width=16),
    tiny_encoder("two", weights={folder!r} + "/two.safetensors", width=24),
]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images, weights, and a cache of both views and both teachers for every codec: fp16 in
    `work`, the others beside it; the tables know the networks."""
    folder = tmp_path_factory.mktemp("online")
    write_images(folder / "images")
    autoencoder = tiny_autoencoder(weights=str(folder / "kl.safetensors"))
    encoders = [
        tiny_encoder(name, weights=str(folder / f"{name}.safetensors"), width=width)
        for name, width in zip(TEACHERS, (16, 24), strict=True)
    ]
    for seed, spec in enumerate([autoencoder, *encoders]):
        write_weights(spec, seed)
    with isolated_tables():
        TABLES["autoencoders"].add(autoencoder)
        for spec in encoders:
            TABLES["encoders"].add(spec)
        for codec, name in (("fp16", "work"), ("int8", "int8"), ("int4", "int4")):
            encode_tiny_cache(
                folder, workspace=str(folder / name), encoder=TEACHERS, codec=codec,
                resolution=RESOLUTION, batch_size=8, shard_rows=8,
            )  # fmt: skip
        yield folder


def write_images(folder: Path) -> None:
    """Smooth colours of several sizes in three classes, every other one a JPEG."""
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        small = generator.integers(0, 256, (5, 6, 3), np.uint8)
        size = (60 + number % 50, 64 + 3 * (number % 7))
        ending = "png" if number % 2 else "jpg"
        path = folder / "abc"[number % 3] / f"{number:03d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)


def settings(folder: Path, features: str, name: str, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "workspace": str(folder / "work"),
        "source": str(folder / "images"),
        "preset": "imagenet",
        "encoder": ("one",),
        "features": features,
        "name": name,
        "log_every": 1,
        # The default rate of real runs: a larger one lets rounding grow in so small a model.
        "learning_rate": 1e-4,
        "batch_size": BATCH,
        "steps": 200,
        "window": 2,
    }
    merged = {**given, **changes}
    return toy_train_config(merged.pop("workspace"), **merged)


def run(config: TrainConfig) -> TrainResult:
    return train(plan_training(config), Silent())


def curve_of(result: TrainResult) -> list[dict[str, float]]:
    """Every step's values; the run's folder is removed."""
    events = read_events(result.run.folder / "events.jsonl")
    shutil.rmtree(result.run.folder)
    return [
        {key: value for key, value in event.items() if key in ("step", *SCALARS)}
        for event in events
        if event["event"] == "scalars"
    ]


def furthest(ours: list[dict[str, float]], theirs: list[dict[str, float]], name: str) -> float:
    """The largest difference of a value over all steps."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))


# The same curve.


@pytest.fixture(scope="module")
def online(folder: Path) -> list[dict[str, float]]:
    return curve_of(run(settings(folder, "online", "online")))


def test_online_and_an_fp16_cache_give_the_same_curve(
    folder: Path, online: list[dict[str, float]]
) -> None:
    cached = curve_of(run(settings(folder, "cache", "cached")))
    assert len(online) == 200
    assert furthest(online, cached, "loss") < 1e-4
    assert furthest(online, cached, "alignment") < 1e-4
    # It learns to align: the curve says something.
    early, late = (np.mean([v["alignment"] for v in part]) for part in (online[:10], online[-10:]))
    assert late < early - 0.1


# Seeds 0, 1, 2 gave at most: int8 1.5e-4, 2.7e-4, 2e-5; int4 3.3e-3, 6.1e-3, 1.1e-3.
@pytest.mark.parametrize(
    ("codec", "loss", "alignment", "mean"),
    [("int8", 5e-4, 1e-3, 1e-4), ("int4", 1e-2, 2e-2, 3e-3)],
)
def test_how_far_lossy_codes_take_the_curve(
    folder: Path,
    online: list[dict[str, float]],
    codec: str,
    loss: float,
    alignment: float,
    mean: float,
) -> None:
    config = settings(folder, "cache", codec, workspace=str(folder / codec))
    coded = curve_of(run(config))
    # They are coded, farther off than fp16 is.
    assert 5e-5 < furthest(online, coded, "loss") < loss
    assert 5e-5 < furthest(online, coded, "alignment") < alignment
    last = [np.mean([v["alignment"] for v in curve[-50:]]) for curve in (online, coded)]
    assert abs(last[0] - last[1]) < mean


@pytest.mark.parametrize(
    ("flip", "encoder"), [(True, ("one",)), (False, TEACHERS), (True, TEACHERS)]
)
def test_so_do_the_mirrored_view_and_two_teachers(
    folder: Path, flip: bool, encoder: tuple[str, ...]
) -> None:
    ours, theirs = (
        curve_of(run(settings(folder, f, f, flip=flip, encoder=encoder, steps=40)))
        for f in ("online", "cache")
    )
    assert furthest(ours, theirs, "loss") < 1e-4
    assert furthest(ours, theirs, "grad_norm") < 1e-3


def test_micro_steps_and_phases_change_nothing(folder: Path) -> None:
    changes = {"steps": 12, "align_steps": 6}
    whole = curve_of(run(settings(folder, "online", "whole", **changes)))
    parts = curve_of(run(settings(folder, "online", "parts", micro_batch=6, **changes)))
    assert ["alignment" in values for values in whole] == [True] * 6 + [False] * 6
    assert furthest(whole, parts, "loss") < 1e-5


def test_a_resumed_run_goes_on_bit_for_bit(folder: Path) -> None:
    # The pause is in the middle of an epoch.
    config = settings(folder, "online", "resumed", steps=15, flip=True)
    expected = run(dataclasses.replace(config, name="whole"))
    run(dataclasses.replace(config, steps=8))
    result = run(config)
    assert result.num_new == 7
    ours, theirs = (load_checkpoint(r.run.newest_checkpoint())["model"] for r in (result, expected))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert curve_of(result) == curve_of(expected)


# The tokens themselves.


def tokens_of(plan: TrainPlan, teachers: OnlineTeachers | None, steps: range) -> list[Any]:
    maker = BatchMaker(plan.config, plan.inputs, plan.method, "cpu", online=teachers)
    mirrored = plan.inputs.mirrored
    with Reader(
        plan.inputs.arrays, plan.order, first_step=steps.start, last_step=steps.stop,
        mirrored=mirrored, views=lambda step: mirrored_views(plan.config, step),
    ) as reader:  # fmt: skip
        return [micro.batch for records in reader for micro in maker.micro_batches(records)]


def online_teachers(plan: TrainPlan, steps: range, local: slice) -> OnlineTeachers:
    return OnlineTeachers(
        plan.config, plan.inputs, plan.order, steps=steps, local=local, device="cpu",
        dtype="float32", views=lambda step: mirrored_views(plan.config, step),
    )  # fmt: skip


def test_tokens_latents_and_labels_are_those_of_the_cache(folder: Path) -> None:
    ours, theirs = (
        plan_training(settings(folder, f, "tokens", flip=True, encoder=TEACHERS))
        for f in ("online", "cache")
    )
    steps = range(1, 7)  # over the ends of two epochs
    with online_teachers(ours, steps, slice(0, BATCH)) as teachers:
        pairs = zip(tokens_of(ours, teachers, steps), tokens_of(theirs, None, steps), strict=True)
        for step, (made, stored) in zip(steps, pairs, strict=True):
            assert 0 < mirrored_views(ours.config, step).sum() < BATCH
            assert torch.equal(made.latents, stored.latents)
            assert torch.equal(made.cond, stored.cond)
            assert [f.shape for f in made.features] == [(BATCH, 16, 16), (BATCH, 16, 24)]
            for one, other in zip(made.features, stored.features, strict=True):
                assert torch.equal(one.half().float(), other)


def test_a_rank_makes_the_tokens_of_its_slice(folder: Path) -> None:
    plan = plan_training(settings(folder, "online", "ranks", flip=True, encoder=TEACHERS))
    with online_teachers(plan, range(2), slice(0, BATCH)) as teachers:
        whole = [teachers(step) for step in range(2)]
    for local in (slice(0, 5), slice(5, BATCH)):
        with online_teachers(plan, range(2), local) as teachers:
            for step in range(2):
                for one, all_of_it in zip(teachers(step), whole[step], strict=True):
                    torch.testing.assert_close(one, all_of_it[local], rtol=0, atol=1e-6)


def test_a_compiled_teacher_makes_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph; the eager backend, as what a compiler makes of it is not ours to test."""
    seen: list[Any] = []

    def compile(network: Any, **how: Any) -> Any:
        seen.append(how)
        return torch_compile(network, backend="eager", fullgraph=True, **how)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    plans = [plan_training(settings(folder, "online", "x", compile=c)) for c in (False, True)]
    for plan in plans:
        with plan.online(range(1), World()) as teachers:
            seen.append(teachers(0)[0])
    plain, how, fast = seen
    assert how == {"dynamic": False} and torch.equal(plain, fast)


def test_waiting_for_images_is_waiting_for_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By this clock every wait takes 1,000 seconds.
    clock = SimpleNamespace(perf_counter=itertools.count(step=1000.0).__next__)
    monkeypatch.setattr(online_module, "time", clock)
    result = run(settings(folder, "online", "slow", steps=3))
    shares = [e["data_wait"] for e in read_events(result.run.folder / "events.jsonl")]
    shutil.rmtree(result.run.folder)
    assert len(shares) == 3 and min(shares) > 1


def test_a_dry_run_measures_the_teacher_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_check, "READ_S", 0.05)
    monkeypatch.setattr(train_check, "_TRAIN_BUDGET_S", 0.05)
    calls: list[int] = []
    tokens = OnlineTeachers.tokens

    def counted(self: OnlineTeachers, pixels: Any) -> Any:
        calls.append(len(pixels))
        return tokens(self, pixels)

    monkeypatch.setattr(OnlineTeachers, "tokens", counted)
    line, *_ = train_check.check_training(plan_training(settings(folder, "online", "dry")))
    assert "forward and backward of SiT-XS/2 with its teachers inside" in line
    assert calls[0] == BATCH and len(calls) > 1 and max(calls) == BATCH
    line, *_ = train_check.check_training(plan_training(settings(folder, "cache", "dry")))
    assert "teachers" not in line


# What goes wrong is one line.


def assert_refused(error: type[RepaError], config: TrainConfig, *parts: str) -> None:
    with pytest.raises(error) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may spoil."""
    shutil.copytree(folder / "images", tmp_path / "images")
    return tmp_path / "images"


def test_an_image_that_changed_is_refused(folder: Path, images: Path) -> None:
    path = images / "b" / "007.png"
    Image.new("RGB", (64, 64)).save(path)
    config = settings(folder, "online", "changed", source=str(images), steps=6)
    assert_refused(DataError, config, "b/007.png")
    shutil.rmtree(folder / "work/runs/changed")
    data = bytearray((folder / "images/b/007.png").read_bytes())
    data[-20] ^= 1  # as long as it was
    path.write_bytes(data)
    assert_refused(DataError, config, "b/007.png", "is not the one that was indexed: restore it")
    shutil.rmtree(folder / "work/runs/changed")


def test_an_image_that_is_gone_is_refused(folder: Path, images: Path) -> None:
    (images / "c" / "008.jpg").unlink()
    config = settings(folder, "online", "gone", source=str(images), steps=6)
    assert_refused(RepaError, config, "c/008.jpg")
    shutil.rmtree(folder / "work/runs/gone")
    assert_refused(MissingError, settings(folder, "online", "gone", source="nowhere"), "'nowhere'")


def test_missing_weights_are_named(folder: Path) -> None:
    overrides = {"encoders.one": {"weights": "gone.safetensors"}}
    config = settings(folder, "online", "weights")
    config = dataclasses.replace(config, overrides={**config.overrides, **overrides})
    with pytest.raises(MissingError, match=r"gone.safetensors for encoder 'one'") as caught:
        plan_training(config)
    assert "\n" not in str(caught.value)


def test_auto_takes_the_teacher_of_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, "online", "auto", encoder=("auto",))
    with pytest.raises(ConfigError, match="say which teacher runs, with --encoder NAME"):
        plan_training(config)  # it holds two
    shutil.copytree(folder / "work" / "cache", tmp_path / "cache")
    config = dataclasses.replace(config, workspace=str(tmp_path))
    for name in TEACHERS:
        for array in (tmp_path / "cache").glob(f"features.{name}.*"):
            shutil.rmtree(array)
        if name == "one":
            assert [t.describe().name for t in plan_training(config).inputs.teachers] == ["two"]
    with pytest.raises(ConfigError, match="say which teacher runs, with --encoder NAME"):
        plan_training(config)  # it holds none
    assert plan_training(dataclasses.replace(config, encoder=("one",))).inputs.online


def test_the_default_source_is_not_that_of_another_cache(folder: Path) -> None:
    config = settings(folder, "online", "default", source=TrainConfig.source)
    with pytest.raises(ConfigError, match=f"images of {folder}/images: give it as --source"):
        plan_training(config)


def test_the_command_says_it_in_one_line(folder: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(PARTS.format(folder=str(folder)))
    shutil.rmtree(images / "a")
    command = [
        sys.executable, "-m", "repa_pipeline", "train", "said", "--features", "online",
        "--encoder", "one", "--workspace", str(folder / "work"), "--source", str(images),
        "--model", "SiT-XS/2", "--batch-size", "16", "--steps", "6", "--device", "cpu",
    ]  # fmt: skip
    (tmp_path / "repa.toml").write_text('plugins = ["my_parts"]\n')
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    shutil.rmtree(folder / "work/runs/said")
    assert found.returncode == 2, found.stderr
    lines = [line for line in found.stderr.splitlines() if line.startswith("repa: ")]
    assert len(lines) == 1 and "Traceback" not in found.stderr
    assert "a/0" in lines[0]
