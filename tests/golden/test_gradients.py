"""The gradients of RepaMethod.loss against the reference code's, through our real method."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.methods.base import Batch, FeatureInfo, Inputs
from repa_pipeline.methods.repa import RepaMethod
from repa_pipeline.models import ModelSpec
from repa_pipeline.models.reference import split_reference_state

Vectors = dict[str, Tensor]

PREFIX = "loss.linear.uniform"


@pytest.fixture(scope="module")
def vectors(shared: pathlib.Path) -> Vectors:
    with safe_open(shared / "golden" / "sit_repa.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["encoder_depth"] == 2
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def method() -> RepaMethod:
    teachers = (("first", 24), ("second", 40))
    preserves = frozenset({"direction", "magnitude"})
    inputs = Inputs(
        resolution=64,
        latent_channels=4,
        latent_size=8,
        num_classes=1000,
        features=tuple(FeatureInfo(name, width, (4, 4), preserves) for name, width in teachers),
    )
    config = TrainConfig(align_coeff=0.5, projector_width=64)
    return RepaMethod(config, ModelSpec("golden", 4, 48, 4, 2, align_depth=2), inputs)


@pytest.fixture
def model(vectors: Vectors, method: RepaMethod) -> nn.Module:
    state = {k.removeprefix("model."): v for k, v in vectors.items() if k.startswith("model.")}
    trunk, projectors = split_reference_state(state)
    built = method.build()
    built.get_submodule("trunk").load_state_dict(trunk)
    built.get_submodule("projectors").load_state_dict(projectors)
    return built


def losses_of(vectors: Vectors, method: RepaMethod, model: nn.Module) -> dict[str, Tensor]:
    batch = Batch(
        latents=vectors["loss.latents"],
        features=(vectors["loss.target0"], vectors["loss.target1"]),
        cond=vectors["loss.y"],
    )
    return method.loss(model, model, batch, vectors[f"{PREFIX}.t"], (vectors[f"{PREFIX}.noise"],))


def test_losses(vectors: Vectors, method: RepaMethod, model: nn.Module) -> None:
    losses = losses_of(vectors, method, model)
    denoising, alignment = vectors[f"{PREFIX}.denoising"], vectors[f"{PREFIX}.proj"]
    torch.testing.assert_close(losses["denoising"], denoising, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses["alignment"].mean(), alignment, rtol=0, atol=1e-5)
    total = denoising.mean() + 0.5 * alignment
    torch.testing.assert_close(losses["loss"], total, rtol=0, atol=1e-5)


def test_gradients(vectors: Vectors, method: RepaMethod, model: nn.Module) -> None:
    losses_of(vectors, method, model)["loss"].backward()  # type: ignore[no-untyped-call]
    names = [name.removeprefix("grad.") for name in vectors if name.startswith("grad.")]
    assert len(names) == 5
    for name in names:
        own = name if name.startswith("projectors.") else f"trunk.{name}"
        gradient = model.get_parameter(own).grad
        assert gradient is not None
        if name == "y_embedder.embedding_table.weight":
            used = vectors["loss.y"].unique()
            untouched = torch.ones(len(gradient), dtype=torch.bool)
            untouched[used] = False
            assert not gradient[untouched].any()
            gradient = gradient[used]
        torch.testing.assert_close(gradient, vectors[f"grad.{name}"], rtol=0, atol=1e-5)
