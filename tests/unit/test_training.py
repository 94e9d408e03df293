"""The training loop against a plain one, and what its random draws are a function of."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.reader import Reader
from repa_pipeline.diffusion.targets import pool_tokens
from repa_pipeline.errors import ConfigError
from repa_pipeline.observe import Silent, read_events
from repa_pipeline.stages.train import TrainPlan, TrainResult, plan_training, train
from repa_pipeline.testing.caches import (
    ToyCache,
    ToyLatents,
    ToyTeacher,
    toy_train_config,
    write_toy_cache,
)
from repa_pipeline.training.batches import BatchMaker, Micro
from repa_pipeline.training.checkpoint import load_checkpoint
from repa_pipeline.training.draws import StepDraws, seed_of
from repa_pipeline.training.state import new_state, optimiser_step
from repa_pipeline.training.world import World

Curve = list[dict[str, float]]
SCALARS = ("loss", "denoising", "alignment", "grad_norm")


def run(config: TrainConfig) -> TrainResult:
    return train(plan_training(config), Silent())


def curve_of(result: TrainResult) -> Curve:
    events = read_events(result.run.folder / "events.jsonl")
    return [
        {name: event[name] for name in ("step", *SCALARS) if name in event}
        for event in events
        if event["event"] == "scalars"
    ]


def checkpoint_of(result: TrainResult) -> dict[str, Any]:
    return load_checkpoint(result.run.newest_checkpoint())


def assert_same_curve(got: Curve, expected: Curve, tolerance: float) -> None:
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


# The plain loop: sample by sample, parameter by parameter, no fused or foreach kernel.


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, step, purpose))


def plain_times(config: TrainConfig, step: int) -> Tensor:
    source = generator(config.seed, step, "t")
    if config.weighting == "uniform":
        return torch.rand(config.batch_size, generator=source)
    ratio = torch.randn(config.batch_size, generator=source).exp()
    return ratio / (1 + ratio) if config.path == "linear" else 2 / math.pi * ratio.atan()


def plain_point(path: str, x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    if path == "linear":
        return (1 - t) * x + t * e, e - x
    angle = math.pi / 2 * t
    slope = (e * torch.cos(angle) - x * torch.sin(angle)) * math.pi / 2
    return torch.cos(angle) * x + torch.sin(angle) * e, slope


def plain_losses(plan: TrainPlan, cache: ToyCache, model: nn.Module, step: int) -> dict[str, Any]:
    config, shape = plan.config, plan.method.state_shapes()[0]
    rows = plan.order.rows(step)
    size = (config.batch_size, *shape)
    mean, std = torch.from_numpy(cache.latents[rows]).float().chunk(2, dim=1)
    posterior = torch.randn(size, generator=generator(config.seed, step, "posterior"))
    latents = (mean + std * posterior - 0.1) * 0.5
    noise = torch.randn(size, generator=generator(config.seed, step, "noise.0"))
    t = plain_times(config, step)
    u = torch.rand(config.batch_size, generator=generator(config.seed, step, "label_dropout"))
    denoising = alignment = torch.zeros(())
    for i, row in enumerate(rows):
        label = plan.method.null_label if u[i] < config.label_dropout else int(cache.labels[row])
        x_t, target = plain_point(config.path, latents[i], noise[i], t[i])
        trunk = model.get_submodule("trunk")
        velocity, tokens = trunk(x_t[None], t[i : i + 1], torch.tensor([label]), capture=2)
        denoising = denoising + ((velocity[0] - target) ** 2).mean()
        heads = list(model.get_submodule("projectors").children())
        for head, name in zip(heads, cache.tokens, strict=True):
            wanted = torch.from_numpy(cache.tokens[name][row]).float()
            for ours, theirs in zip(head(tokens)[0], wanted, strict=True):
                cosine = F.cosine_similarity(ours, theirs, dim=0)
                alignment = alignment - cosine / len(wanted) / len(heads)
    denoising, alignment = denoising / len(rows), alignment / len(rows)
    loss = denoising + config.align_coeff * alignment
    return {"loss": loss, "denoising": denoising, "alignment": alignment}


def plain_clip(model: nn.Module, limit: float) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def plain_training(
    plan: TrainPlan, cache: ToyCache, steps: int
) -> tuple[Curve, nn.Module, nn.Module]:
    config = plan.config
    torch.manual_seed(seed_of(config.seed, "init"))
    model = plan.method.build()
    average = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        foreach=False,
        fused=False,
    )
    curve = []
    for step in range(steps):
        optimizer.zero_grad()
        losses = plain_losses(plan, cache, model, step)
        losses["loss"].backward()
        norm = plain_clip(model, config.clip)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.copy_(config.ema_decay * old + (1 - config.ema_decay) * new)
        values = {name: float(value.detach()) for name, value in losses.items()}
        curve.append({"step": step + 1, **values, "grad_norm": norm})
    return curve, model, average


def assert_same_state(got: dict[str, Tensor], expected: nn.Module, tolerance: float) -> None:
    wanted = expected.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("path", "weighting", "steps"), [("linear", "uniform", 3), ("cosine", "lognormal", 2)]
)
def test_the_loop_equals_a_plain_loop(
    tmp_path: Path, path: str, weighting: str, steps: int
) -> None:
    teachers = (ToyTeacher("a", width=12), ToyTeacher("b", width=20))
    cache = write_toy_cache(tmp_path, teachers=teachers)
    config = toy_train_config(
        tmp_path,
        encoder=("a", "b"),
        batch_size=6,
        path=path,
        weighting=weighting,
        steps=steps,
        log_every=1,
        learning_rate=1e-4,
        weight_decay=0.1,
        clip=0.3,
        label_dropout=0.3,
    )
    plan = plan_training(config)
    expected, model, average = plain_training(plan, cache, steps)
    result = train(plan, Silent())
    assert all(values["grad_norm"] > config.clip for values in expected)  # clipping is at work
    assert_same_curve(curve_of(result), expected, 1e-5)
    saved = checkpoint_of(result)
    assert_same_state(saved["model"], model, 1e-5)
    assert_same_state(saved["ema"], average, 1e-5)
    assert max(float((saved["ema"][n] - p).abs().max()) for n, p in saved["model"].items()) > 1e-5


def test_micro_steps_change_nothing(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    results = [
        run(toy_train_config(tmp_path, name=f"of-{n}", accumulate=n, steps=4, log_every=1))
        for n in (1, 2, 3)  # 3 does not divide the batch of 8
    ]
    for other in results[1:]:
        assert_same_curve(curve_of(other), curve_of(results[0]), 1e-5)
    with pytest.raises(ConfigError, match="accumulate 9 x 1 ranks is larger than batch_size 8"):
        plan_training(toy_train_config(tmp_path, accumulate=9))


def test_a_log_line_holds_the_means_of_its_steps(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    single = curve_of(run(toy_train_config(tmp_path, name="single", steps=7, log_every=1)))
    result = run(toy_train_config(tmp_path, name="means", steps=7, log_every=3))
    parts = [single[0:3], single[3:6], single[6:7]]
    expected = [
        {"step": part[-1]["step"], **{n: float(np.mean([v[n] for v in part])) for n in SCALARS}}
        for part in parts
    ]
    assert_same_curve(curve_of(result), expected, 1e-6)
    assert result.last["loss"] == pytest.approx(single[-1]["loss"], abs=1e-6)


# The random draws.


def micro_batches(plan: TrainPlan, steps: int) -> Iterator[Micro]:
    batches = BatchMaker(plan.config, plan.inputs, plan.method, "cpu")
    with Reader(plan.inputs.arrays, plan.order, first_step=0, last_step=steps) as reader:
        for records in reader:
            yield from batches.micro_batches(records)


def test_the_vanilla_twin_sees_what_the_repa_run_sees(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    repa = plan_training(toy_train_config(tmp_path))
    twin = plan_training(toy_train_config(tmp_path, encoder=("none",)))
    assert (repa.method_spec.name, twin.method_spec.name) == ("repa", "sit")
    assert (repa.name, twin.name) == ("sit-xs-2.toy-vit", "sit-xs-2.vanilla")
    pairs = list(zip(micro_batches(repa, 8), micro_batches(twin, 8), strict=True))
    for (ours, t, noise, _), (theirs, t_twin, noise_twin, _) in pairs:
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.cond, theirs.cond)
        assert torch.equal(t, t_twin) and torch.equal(noise[0], noise_twin[0])
        assert len(ours.features) == 1 and theirs.features == ()
    ours, theirs = (new_state(p.config, p.method, "cpu").model for p in (repa, twin))
    trunk = theirs.get_submodule("trunk").state_dict()
    for name, value in ours.get_submodule("trunk").state_dict().items():
        assert torch.equal(value, trunk[name]), name


def test_share_of_dropped_labels(tmp_path: Path) -> None:
    num_steps, batch_size, share = 400, 64, 0.1
    dropped = [StepDraws(0, step, batch_size, "cpu").dropped(share) for step in range(num_steps)]
    count = int(torch.stack(dropped).sum())
    total = num_steps * batch_size
    assert abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share))
    assert not StepDraws(0, 0, 4096, "cpu").dropped(0.0).any()
    assert StepDraws(0, 0, 4096, "cpu").dropped(1.0).all()

    cache = write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path, label_dropout=0.5))
    for step, (batch, *_) in enumerate(micro_batches(plan, 6)):
        gone = StepDraws(0, step, 8, "cpu").dropped(0.5)
        labels = torch.from_numpy(cache.labels[plan.order.rows(step)])
        assert torch.equal(batch.cond, torch.where(gone, 3, labels))


def test_every_epoch_draws_a_new_posterior_sample(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path))
    steps_per_epoch = plan.order.steps_per_epoch
    assert steps_per_epoch == 6
    standard: dict[int, list[Tensor]] = {}
    for step, (batch, *_) in enumerate(micro_batches(plan, 2 * steps_per_epoch)):
        for row, latent in zip(plan.order.rows(step), batch.latents, strict=True):
            mean, std = torch.from_numpy(cache.latents[row]).float().chunk(2)
            standard.setdefault(int(row), []).append((latent / 0.5 + 0.1 - mean) / std)
    assert len(standard) == 48
    draws = torch.stack([torch.stack(both) for both in standard.values()])
    assert draws.shape[:2] == (48, 2)
    assert abs(float(draws.mean())) < 0.03 and abs(float(draws.std()) - 1) < 0.03
    both = torch.stack([draws[:, 0].flatten(), draws[:, 1].flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.05


def test_a_deterministic_latent_is_only_scaled(tmp_path: Path) -> None:
    kind = ToyLatents(posterior="none", scale=(1.0, 2.0, 3.0, 4.0), shift=(0.0, 0.1, 0.2, 0.3))
    cache = write_toy_cache(tmp_path, latents=kind)
    plan = plan_training(toy_train_config(tmp_path))
    for step, (batch, *_) in enumerate(micro_batches(plan, 3)):
        raw = torch.from_numpy(cache.latents[plan.order.rows(step)]).float()
        for c in range(4):
            expected = (raw[:, c] - 0.1 * c) * (c + 1)
            torch.testing.assert_close(batch.latents[:, c], expected)


def test_ranks_take_slices_of_the_same_draws(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path))
    (whole,) = micro_batches(plan, 1)
    parts = []
    for rank in range(3):
        batches = BatchMaker(plan.config, plan.inputs, plan.method, "cpu", World(rank, 3))
        reader = Reader(
            plan.inputs.arrays, plan.order, first_step=0, last_step=1, rank=rank, world_size=3
        )
        with reader:
            parts += [micro for records in reader for micro in batches.micro_batches(records)]
    assert sum(share for *_, share in parts) == pytest.approx(1)
    assert torch.equal(torch.cat([p[0].latents for p in parts]), whole[0].latents)
    assert torch.equal(torch.cat([p[0].features[0] for p in parts]), whole[0].features[0])
    assert torch.equal(torch.cat([p[0].cond for p in parts]), whole[0].cond)
    assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])
    assert torch.equal(torch.cat([p[2][0] for p in parts]), whole[2][0])


# Settings of the model and the loss.


def test_pooling_a_teacher_equals_pooling_by_hand(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path, teachers=(ToyTeacher("fine", grid=8),))
    plan = plan_training(toy_train_config(tmp_path, align_resize="pool"))
    (batch, t, noise, _), *_ = micro_batches(plan, 1)
    by_hand = torch.zeros(8, 16, 12)
    for i in range(8):
        tokens = batch.features[0][i]
        for y in range(4):
            for x in range(4):
                four = [tokens[(2 * y + dy) * 8 + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)]
                by_hand[i, 4 * y + x] = sum(four, torch.zeros(12)) / 4
    torch.testing.assert_close(pool_tokens(batch.features[0], (8, 8), (4, 4)), by_hand)
    assert cache.tokens["fine"].shape == (48, 64, 12)

    model = new_state(plan.config, plan.method, "cpu").model
    loss = plan.method.loss(model, model, batch, t, noise)["alignment"]
    info = dataclasses.replace(plan.inputs.describe().features[0], grid=(4, 4))
    inputs = dataclasses.replace(plan.inputs.describe(), features=(info,))
    method = type(plan.method)(plan.config, plan.model, inputs)
    pooled = dataclasses.replace(batch, features=(by_hand,))
    torch.testing.assert_close(method.loss(model, model, pooled, t, noise)["alignment"], loss)


def test_two_teachers_weigh_the_same(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher("a"), ToyTeacher("b", width=20)))
    plan = plan_training(toy_train_config(tmp_path, encoder=("a", "b")))
    assert plan.name == "sit-xs-2.a+b"
    (batch, t, noise, _), *_ = micro_batches(plan, 1)
    model = new_state(plan.config, plan.method, "cpu").model
    both = plan.method.loss(model, model, batch, t, noise)
    x_t = (1 - t.view(-1, 1, 1, 1)) * batch.latents + t.view(-1, 1, 1, 1) * noise[0]
    _, tokens = model.get_submodule("trunk")(x_t, t, batch.cond, capture=2)
    heads = model.get_submodule("projectors").children()
    each = [
        -F.cosine_similarity(head(tokens), wanted, dim=-1).mean()
        for head, wanted in zip(heads, batch.features, strict=True)
    ]
    torch.testing.assert_close(both["alignment"].mean(), (each[0] + each[1]) / 2)
    expected = both["denoising"].mean() + 0.5 * both["alignment"].mean()
    torch.testing.assert_close(both["loss"], expected)
    assert run(plan.config).step == 3


def test_bf16_is_close_to_float32(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    exact = curve_of(run(toy_train_config(tmp_path, name="a", log_every=1)))
    result = run(toy_train_config(tmp_path, name="b", log_every=1, dtype="bf16"))
    half = curve_of(result)
    assert half != exact
    for ours, theirs in zip(half, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)
    assert {v.dtype for v in checkpoint_of(result)["model"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "parameter", "shape"),
    [
        ({"qk_norm": True}, "trunk.blocks.0.attn.q_norm.weight", [32]),
        ({"align_depth": 3}, "projectors.0.4.weight", [12, 16]),
        ({"overrides": {}}, "trunk.blocks.3.attn.qkv.weight", [384, 128]),
    ],
)
def test_other_models_train(
    tmp_path: Path, changes: dict[str, Any], parameter: str, shape: list[int]
) -> None:
    write_toy_cache(tmp_path)
    result = run(toy_train_config(tmp_path, **changes, steps=2))
    saved = checkpoint_of(result)
    assert list(saved["model"][parameter].shape) == shape
    moved = (saved["ema"][parameter] - saved["model"][parameter]).abs().max()
    assert 0 <= float(moved) < 0.01 and math.isfinite(result.last["loss"])


def test_sit_s_trains(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher(grid=2),))
    plan = plan_training(toy_train_config(tmp_path, model="SiT-S/4", batch_size=2))
    (batch, t, noise, _), *_ = micro_batches(plan, 1)
    state = new_state(plan.config, plan.method, "cpu")
    plan.method.loss(state.model, state.ema.module, batch, t, noise)["loss"].backward()
    norm, _ = optimiser_step(plan.config, state)
    assert 0 < float(norm) < math.inf
    last = state.model.get_parameter("trunk.final_layer.linear.weight")
    assert list(last.shape) == [4 * 4 * 4, 384] and float(last.detach().abs().max()) > 0
