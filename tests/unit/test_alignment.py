"""Projectors, targets, objectives and schedules of alignment, and what each needs of the cache."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.losses import cosine_alignment, nt_xent_alignment
from repa_pipeline.diffusion.targets import plain_tokens, pool_tokens, spatial_normalise
from repa_pipeline.errors import ConfigError, MismatchError, UnknownNameError
from repa_pipeline.methods import METHODS, auto_method, token_needs
from repa_pipeline.methods.base import Batch
from repa_pipeline.methods.dit import DiTMethod
from repa_pipeline.methods.parts import OBJECTIVES, PROJECTORS, TARGETS, align_weight
from repa_pipeline.methods.repa import RepaMethod
from repa_pipeline.methods.repa_dit import RepaDiTMethod
from repa_pipeline.methods.sit import SiTMethod
from repa_pipeline.models import MODELS
from repa_pipeline.models.projector import ConvProjector
from repa_pipeline.registry import load_plugins
from repa_pipeline.stages.train import plan_training
from repa_pipeline.tables import resolve
from repa_pipeline.testing.caches import (
    ToyTeacher,
    isolated_tables,
    toy_train_config,
    write_toy_cache,
)
from repa_pipeline.testing.methods import check_method, conformance_inputs, conformance_model

DIRECTION, BOTH = frozenset({"direction"}), frozenset({"direction", "magnitude"})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- projectors --------------------------------------------------------------------------------


def test_the_convolution_is_the_plain_loop_over_the_grid() -> None:
    torch.manual_seed(0)
    head = ConvProjector(width=5, teacher_width=7, grid=(3, 4), hidden_width=99)
    tokens = drawn(2, 12, 5)
    expected = head.bias.expand(2, 12, 7).clone()
    for row in range(3):
        for column in range(4):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < 3 and 0 <= x < 4:  # zeros outside the grid
                        kernel = head.weight[:, :, dy + 1, dx + 1]
                        expected[:, 4 * row + column] += tokens[:, 4 * y + x] @ kernel.T
    torch.testing.assert_close(head(tokens), expected)
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_every_projector_takes_tokens_to_the_teachers_width(name: str) -> None:
    build = resolve(PROJECTORS[name].loader)
    head = build(width=6, teacher_width=10, grid=(4, 4), hidden_width=8)
    tokens = drawn(3, 16, 6)
    projected = head(tokens)
    assert projected.shape == (3, 16, 10)
    torch.testing.assert_close(head(tokens[1:2]), projected[1:2])


# --- targets -----------------------------------------------------------------------------------


def test_spatial_normalisation_is_the_plain_formula() -> None:
    tokens = drawn(2, 9, 4) * 3 + 5
    got = spatial_normalise(tokens)
    for image in range(2):
        for channel in range(4):
            values = tokens[image, :, channel].tolist()
            mean = sum(values) / 9
            std = math.sqrt(sum((value - mean) ** 2 for value in values) / 9)
            expected = torch.tensor([(value - 0.6 * mean) / (std + 1e-6) for value in values])
            torch.testing.assert_close(got[image, :, channel], expected)
    assert plain_tokens(tokens) is tokens


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_needs_what_it_says(name: str) -> None:
    """Where the magnitude is not needed, other lengths of tokens leave the directions alone."""
    target = resolve(TARGETS[name].function)
    tokens, lengths = drawn(2, 9, 6), drawn(2, 9, 1, seed=1).exp()
    same = torch.cosine_similarity(target(tokens), target(lengths * tokens), dim=-1)
    assert bool((same > 1 - 1e-5).all()) == (TARGETS[name].needs == DIRECTION)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_needs_what_it_says(name: str) -> None:
    objective = resolve(OBJECTIVES[name].function)
    ours, theirs = drawn(2, 9, 6), drawn(2, 9, 6, seed=1)
    lengths = drawn(2, 9, 1, seed=2).exp()
    found, scaled = (objective(ours, target, 0.2) for target in (theirs, lengths * theirs))
    assert torch.allclose(found, scaled, atol=1e-5) == (OBJECTIVES[name].needs == DIRECTION)


# --- objectives --------------------------------------------------------------------------------


def plain_nt_xent(ours: Tensor, theirs: Tensor, temperature: float) -> list[float]:
    values = []
    for image in range(len(ours)):
        total = 0.0
        for i in range(ours.shape[1]):
            a = ours[image, i].double()
            scores = []
            for j in range(theirs.shape[1]):
                b = theirs[image, j].double()
                scores.append(math.exp(float(a @ b / (a.norm() * b.norm())) / temperature))
            total -= math.log(scores[i] / sum(scores))
        values.append(total / ours.shape[1])
    return values


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_is_the_plain_loop(temperature: float) -> None:
    ours, theirs = drawn(3, 8, 6), drawn(3, 8, 6, seed=1)
    got = nt_xent_alignment(ours, theirs, temperature)
    expected = torch.tensor(plain_nt_xent(ours, theirs, temperature))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_samples_value_does_not_depend_on_the_batch(name: str) -> None:
    objective = resolve(OBJECTIVES[name].function)
    ours, theirs = drawn(4, 9, 6), drawn(4, 9, 6, seed=1)
    whole = objective(ours, theirs, 0.1)
    parts = [objective(ours[i : i + 1], theirs[i : i + 1], 0.1) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_the_best_values() -> None:
    tokens = F.normalize(drawn(1, 4, 64), dim=-1)
    assert cosine_alignment(3 * tokens, tokens, 1.0).item() == pytest.approx(-1)
    assert nt_xent_alignment(3 * tokens, tokens, 0.01).item() == pytest.approx(0, abs=1e-6)
    flat = torch.ones(1, 4, 64)
    assert nt_xent_alignment(tokens, flat, 0.1).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("objective", [cosine_alignment, nt_xent_alignment])
def test_objectives_stay_in_float32_under_autocast(objective: Any) -> None:
    ours, theirs = drawn(2, 16, 32), drawn(2, 16, 32, seed=1)
    exact = objective(ours, theirs, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(ours, theirs, 0.1), exact)


# --- lambda over the steps ---------------------------------------------------------------------


def test_schedules() -> None:
    def weights(schedule: str, steps: int) -> list[float]:
        config = TrainConfig(align_coeff=2.0, align_schedule=schedule, align_steps=steps)
        return [align_weight(config, step) for step in (0, 25, 50, 75, 100)]

    assert weights("constant", 0) == weights("constant", 100) == [2.0] * 5
    assert weights("linear", 100) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    falling = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert weights("cosine", 100) == pytest.approx(falling)


def batch_of(inputs: Any, step: int, teachers: int) -> Batch:
    features = tuple(drawn(3, 16, info.width, seed=9) for info in inputs.features[:teachers])
    return Batch(drawn(3, 4, 8, 8, seed=3), features, torch.tensor([0, 1, 5]), step=step)


def losses_of(method: Any, model: Any, step: int, teachers: int = 2) -> dict[str, Tensor]:
    batch = batch_of(method.inputs, step, teachers)
    found: dict[str, Tensor] = method.loss(
        model, model, batch, torch.tensor([0.2, 0.5, 0.9]), (drawn(3, 4, 8, 8, seed=4),)
    )
    return found


@pytest.mark.parametrize(("cls", "family"), [(RepaMethod, "sit"), (RepaDiTMethod, "dit")])
def test_the_loss_is_the_sum_of_its_parts(cls: Any, family: str) -> None:
    config = TrainConfig(
        projector_width=16, align_coeff=0.8, align_schedule="linear", align_steps=10
    )
    torch.manual_seed(0)
    method = cls(config, conformance_model(family), conformance_inputs(2))
    model = method.build()
    with torch.no_grad():
        model["trunk"].final_layer.linear.weight.normal_(std=0.1)
    for step, weight in ((0, 0.8), (5, 0.4), (9, 0.08)):
        found = losses_of(method, model, step)
        names = {"denoising"} | ({"variational"} if family == "dit" else set())
        teachers = {"alignment/teacher-0", "alignment/teacher-1"}
        assert found.keys() == {"loss", "alignment"} | names | teachers
        mean = (found["alignment/teacher-0"] + found["alignment/teacher-1"]) / 2
        torch.testing.assert_close(found["alignment"], mean)
        expected = sum(found[name].mean() for name in names) + weight * mean.mean()
        torch.testing.assert_close(found["loss"], expected)
    off = losses_of(method, model, 10, teachers=0)
    assert off.keys() == {"loss", *names}
    torch.testing.assert_close(off["loss"], sum(found[name].mean() for name in names))
    twin = {"sit": SiTMethod, "dit": DiTMethod}[family]
    alone = twin(config, conformance_model(family), conformance_inputs(0))
    torch.testing.assert_close(losses_of(alone, model, 0, teachers=0)["loss"], off["loss"])


def test_dit_denoises_as_its_equations_say() -> None:
    from repa_pipeline.diffusion.ddpm import diffuse, variational_loss

    method = DiTMethod(TrainConfig(), conformance_model("dit"), conformance_inputs(0))
    torch.manual_seed(0)
    model: Any = method.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    found = losses_of(method, model, 0, teachers=0)
    x, e = drawn(3, 4, 8, 8, seed=3), drawn(3, 4, 8, 8, seed=4)
    timesteps = torch.tensor([200, 500, 900])
    answer = model["trunk"](diffuse(x, e, timesteps), timesteps, torch.tensor([0, 1, 5]))
    noise, v = answer[:, :4], answer[:, 4:]
    torch.testing.assert_close(found["denoising"], (noise - e).square().flatten(1).mean(1))
    bound = variational_loss(x, e, timesteps, noise, v)
    torch.testing.assert_close(found["variational"], bound)
    torch.testing.assert_close(found["loss"], found["denoising"].mean() + bound.mean())
    states = (drawn(2, 4, 8, 8),)
    noise, v = method.predict_noise(model, states, torch.tensor([3.0, 999.0]), torch.tensor([1, 5]))
    both = model["trunk"](states[0], torch.tensor([3, 999]), torch.tensor([1, 5]))
    assert torch.equal(torch.cat([noise, v], dim=1), both)


# --- conformance and refusals ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["repa", "repa-dit"])
@pytest.mark.parametrize(
    "settings",
    [
        {"projector": "conv", "align_target": "spatial-norm"},
        {"align_objective": "nt-xent", "align_schedule": "cosine"},
        {"align_depth": 1, "align_steps": 0},
        {"align_depth": 3, "align_schedule": "linear", "qk_norm": True},
    ],
)
def test_every_choice_conforms(method: str, settings: dict[str, Any]) -> None:
    check_method(METHODS[method], **settings)


def test_the_tables_import_without_torch() -> None:
    code = "import sys, repa_pipeline.methods.parts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_method_follows_the_family_of_the_model() -> None:
    names = {(f, a): auto_method(f, a) for f in ("sit", "dit") for a in (False, True)}
    assert list(names.values()) == ["sit", "repa", "dit", "repa-dit"]
    with pytest.raises(ConfigError, match="family 'unet' without a teacher: .*--method .*repa-dit"):
        auto_method("unet", False)


@pytest.mark.parametrize(
    ("cls", "model", "teachers", "advice"),
    [
        (SiTMethod, "DiT-S/2", 0, "model DiT-S/2 is no sit: train it with --method dit"),
        (RepaMethod, "DiT-S/2", 1, "model DiT-S/2 is no sit: train it with --method repa-dit"),
        (DiTMethod, "SiT-S/2", 0, "model SiT-S/2 is no dit: train it with --method sit"),
    ],
)
def test_a_method_refuses_the_other_family(
    cls: Any, model: str, teachers: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=advice):
        cls(TrainConfig(), MODELS[model], conformance_inputs(teachers))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"path": "cosine"}, "path cosine and weighting uniform are of SiT"),
        ({"weighting": "lognormal"}, "leave --path and --weighting out"),
        ({"align_schedule": "linear"}, "linear falls to 0 at a step .* --align-steps"),
        ({"align_depth": 4}, "align_depth 4 is beyond the 3 blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], complaint: str) -> None:
    config = TrainConfig(**changes)
    with pytest.raises(ConfigError, match=complaint):
        RepaDiTMethod(config, conformance_model("dit"), conformance_inputs(1))


def test_unknown_parts_are_answered_with_the_known() -> None:
    for changes, answer in (
        ({"align_objective": "cosin"}, "unknown objective 'cosin': did you mean 'cosine'"),
        ({"align_target": "spatial"}, "unknown target 'spatial': .*tokens"),
    ):
        with pytest.raises(UnknownNameError, match=answer):
            token_needs(METHODS["repa"], TrainConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, DIRECTION),
        ({"align_objective": "nt-xent"}, DIRECTION),
        ({"align_target": "spatial-norm"}, BOTH),
        ({"align_resize": "pool"}, BOTH),
    ],
)
def test_what_is_needed_is_what_is_opened(
    changes: dict[str, Any], needs: frozenset[str], tmp_path: Path
) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher(codec="int8"),))
    config = toy_train_config(tmp_path, **changes)
    assert token_needs(METHODS["repa"], config) == needs
    plan = plan_training(config)
    names = [array.spec.name for array in plan.inputs.arrays]
    assert ("features.toy-vit.64.scale" in names) == ("magnitude" in needs)
    assert plan.inputs.describe().features[0].preserves == needs


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"align_target": "spatial-norm"}, "the spatial-norm target needs the magnitude"),
        ({"align_resize": "pool"}, r"a mean of tokens \(--align-resize pool\) needs the magnitude"),
    ],
)
def test_a_codec_that_lost_the_magnitude_is_refused(
    changes: dict[str, Any], complaint: str
) -> None:
    inputs = conformance_inputs(1)
    poor = dataclasses.replace(inputs.features[0], preserves=DIRECTION)
    lacking = dataclasses.replace(inputs, features=(poor,))
    for cls, family in ((RepaMethod, "sit"), (RepaDiTMethod, "dit")):
        cls(TrainConfig(), conformance_model(family), lacking)
        with pytest.raises(MismatchError, match=complaint + " .* the codec of teacher-0"):
            cls(TrainConfig(**changes), conformance_model(family), lacking)


def test_a_mean_of_tokens_needs_their_lengths() -> None:
    tokens, lengths = drawn(1, 16, 6), drawn(1, 16, 1, seed=1).exp()
    plain, other = (pool_tokens(t, (4, 4), (2, 2)) for t in (tokens, lengths * tokens))
    assert torch.cosine_similarity(plain, other, dim=-1).min() < 0.99


PLUGIN = """
import torch
from repa_pipeline.methods.parts import ObjectiveSpec, ProjectorSpec, TargetSpec

BOTH = frozenset({"direction", "magnitude"})


def smooth_l1(projected, target, temperature):
    error = torch.nn.functional.smooth_l1_loss(projected.float(), target, reduction="none")
    return error.flatten(1).mean(1)


def halved(tokens):
    return tokens / 2


def build_linear(*, width, teacher_width, grid, hidden_width):
    return torch.nn.Linear(width, teacher_width)


PROJECTORS = [ProjectorSpec("linear", "own_parts:build_linear")]
TARGETS = [TargetSpec("halved", "own_parts:halved", frozenset({"direction"}))]
OBJECTIVES = [ObjectiveSpec("smooth-l1", "own_parts:smooth_l1", BOTH)]
"""


def test_parts_of_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "own_parts.py").write_text(PLUGIN)
    with isolated_tables(tmp_path):
        load_plugins(("own_parts",))
        own = {"projector": "linear", "align_target": "halved", "align_objective": "smooth-l1"}
        assert token_needs(METHODS["repa"], TrainConfig(**own)) == BOTH
        check_method(METHODS["repa"], **own)
    assert "linear" not in PROJECTORS
