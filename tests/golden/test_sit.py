"""The trunk, losses, gradients and samplers against vectors of the reference REPA code."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from repa_pipeline.diffusion.guidance import guided
from repa_pipeline.diffusion.interpolant import PATHS, States, interpolate
from repa_pipeline.diffusion.losses import alignment_loss, denoising_loss
from repa_pipeline.diffusion.samplers import sample_ode, sample_sde
from repa_pipeline.models.projector import build_projector
from repa_pipeline.models.reference import config_from_reference, split_reference_state
from repa_pipeline.models.sit import SiT, sincos_pos_embed

Vectors = dict[str, Tensor]

DEPTH = 2
GUIDANCE = {
    "plain": (1.0, (0.0, 1.0)),
    "cfg": (1.8, (0.0, 1.0)),
    "interval": (1.8, (0.0, 0.7)),
    "interval2": (2.5, (0.2, 0.8)),
}


@pytest.fixture(scope="module")
def vectors(shared: pathlib.Path) -> Vectors:
    with safe_open(shared / "golden" / "sit_repa.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        assert (config["encoder_depth"], config["num_heads"]) == (DEPTH, 4)
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def model(vectors: Vectors) -> SiT:
    state, _ = split_reference_state(_state(vectors))
    model = SiT(config_from_reference(_state(vectors), num_heads=4)).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def projectors(vectors: Vectors) -> nn.ModuleList:
    _, state = split_reference_state(_state(vectors))
    heads = nn.ModuleList([build_projector(48, 64, 24), build_projector(48, 64, 40)])
    heads.load_state_dict(state)
    return heads


def _state(vectors: Vectors) -> Vectors:
    return {
        name.removeprefix("model."): value
        for name, value in vectors.items()
        if name.startswith("model.")
    }


def test_position_embedding_is_the_reference_one(vectors: Vectors) -> None:
    assert torch.equal(sincos_pos_embed(48, 4), vectors["model.pos_embed"])


@torch.no_grad()
def test_forward_and_tokens(vectors: Vectors, model: SiT, projectors: nn.ModuleList) -> None:
    x, t, y = (vectors[f"forward.{name}"] for name in "xty")
    assert model.null_label in y
    velocity, tokens = model(x, t, y, capture=DEPTH)
    torch.testing.assert_close(velocity, vectors["forward.out"], rtol=0, atol=1e-5)
    for n, head in enumerate(projectors):
        torch.testing.assert_close(head(tokens), vectors[f"forward.z{n}"], rtol=0, atol=1e-5)


def _losses(
    vectors: Vectors, model: SiT, projectors: nn.ModuleList, path: str, weighting: str
) -> tuple[Tensor, Tensor]:
    prefix = f"loss.{path}.{weighting}"
    noise, t = vectors[f"{prefix}.noise"], vectors[f"{prefix}.t"]
    (x_t,), target = interpolate(PATHS[path], (vectors["loss.latents"],), (noise,), t)
    velocity, tokens = model(x_t, t, vectors["loss.y"], capture=DEPTH)
    targets = [vectors["loss.target0"], vectors["loss.target1"]]
    return denoising_loss((velocity,), target), alignment_loss(
        [head(tokens) for head in projectors], targets
    )


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@torch.no_grad()
def test_losses(
    vectors: Vectors, model: SiT, projectors: nn.ModuleList, path: str, weighting: str
) -> None:
    denoising, alignment = _losses(vectors, model, projectors, path, weighting)
    prefix = f"loss.{path}.{weighting}"
    torch.testing.assert_close(denoising, vectors[f"{prefix}.denoising"], rtol=0, atol=1e-5)
    torch.testing.assert_close(alignment, vectors[f"{prefix}.proj"], rtol=0, atol=1e-6)


def test_gradients(vectors: Vectors, model: SiT, projectors: nn.ModuleList) -> None:
    denoising, alignment = _losses(vectors, model, projectors, "linear", "uniform")
    names = [
        "blocks.0.attn.qkv.weight",
        "blocks.3.mlp.fc2.weight",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
    ]
    parameters = [model.get_parameter(name) for name in names]
    parameters.append(projectors.get_parameter("1.4.weight"))
    gradients = list(torch.autograd.grad(denoising.mean() + 0.5 * alignment, parameters))
    gradients[3] = gradients[3][vectors["loss.y"].unique()]
    for name, gradient in zip([*names, "projectors.1.4.weight"], gradients, strict=True):
        torch.testing.assert_close(gradient, vectors[f"grad.{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", list(GUIDANCE))
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["sde", "euler", "heun"])
@torch.no_grad()
def test_samples(vectors: Vectors, model: SiT, sampler: str, path: str, guidance: str) -> None:
    def velocity_of(states: States, t_B: Tensor, y: Tensor) -> States:
        return (model(states[0], t_B, y),)

    labels, noise = vectors["sample.y"], (vectors["sample.noise"],)
    scale, interval = GUIDANCE[guidance]
    null = torch.full_like(labels, model.null_label)
    velocity = guided(velocity_of, labels, null, scale=scale, interval=interval)
    if sampler == "sde":
        name = f"sample.sde.{path}.{guidance}"
        (x,) = sample_sde(
            velocity,
            noise,
            num_steps=12,
            path=PATHS[path],
            increments=lambda step: (vectors["sample.sde.increments"][step],),
        )
    else:
        name = f"sample.ode.{path}.{guidance}.{sampler}"
        (x,) = sample_ode(velocity, noise, num_steps=10, heun=sampler == "heun", path=PATHS[path])
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, vectors[name], rtol=0, atol=1e-5)
