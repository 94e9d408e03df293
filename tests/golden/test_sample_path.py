"""The reference's sampler vectors through what `repa sample` runs, from a file of its own."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.testing.sampling import toy_sample_config

Vectors = dict[str, Tensor]

GUIDANCE = {
    "plain": (1.0, (0.0, 1.0)),
    "cfg": (1.8, (0.0, 1.0)),
    "interval": (1.8, (0.0, 0.7)),
    "interval2": (2.5, (0.2, 0.8)),
}
PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights={weights!r})]
"""


@pytest.fixture(scope="module")
def vectors(shared: pathlib.Path) -> Vectors:
    with safe_open(shared / "golden" / "sit_repa.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def folder(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """linear.pt and cosine.pt, as the reference's code saves them, in its older block names."""
    made = tmp_path_factory.mktemp("reference")
    weights = str(made / "tiny.safetensors")
    write_weights(tiny_autoencoder(weights=weights))
    (made / "golden_decoder.py").write_text(PLUGIN.format(weights=weights))
    state = {}
    for name, value in vectors.items():
        if name.startswith("model."):
            key = name.removeprefix("model.")
            for block in (2, 3):
                key = key.replace(f"blocks.{block}.", f"decoder_blocks.{block - 2}.")
            state[key] = value
    assert any(key.startswith("decoder_blocks.1.") for key in state)
    for path in ("linear", "cosine"):
        args = argparse.Namespace(path_type=path, num_classes=1000, encoder_depth=2)
        content = {"model": state, "ema": dict(state), "opt": {}, "args": args, "steps": 7}
        torch.save(content, made / f"{path}.pt")
    with isolated_tables(made):
        yield made


class GivenDraws:
    """The vectors' own noise and increments."""

    def __init__(self, vectors: Vectors):
        self._vectors = vectors

    def noise(self) -> States:
        return (self._vectors["sample.noise"],)

    def increments(self, step: int) -> States:
        return (self._vectors["sample.sde.increments"][step],)


@pytest.mark.parametrize("guidance", list(GUIDANCE))
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["sde", "euler", "heun"])
def test_samples(
    vectors: Vectors, folder: pathlib.Path, sampler: str, path: str, guidance: str
) -> None:
    scale, interval = GUIDANCE[guidance]
    config = toy_sample_config(
        folder, checkpoint=str(folder / f"{path}.pt"), decoder="tiny-kl", num_heads=4,
        plugins=("golden_decoder",), sampler=sampler, cfg=scale, interval=interval,
        num_steps=12 if sampler == "sde" else 10,
    )  # fmt: skip
    latent_sampler = sample_stage(config).load_sampler(decodes=False).latent_sampler
    assert latent_sampler is not None
    draws: Any = GivenDraws(vectors)
    x = latent_sampler.scaled(vectors["sample.y"].numpy(), draws)
    kind = "sde" if sampler == "sde" else "ode"
    name = f"sample.{kind}.{path}.{guidance}" + ("" if kind == "sde" else f".{sampler}")
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, vectors[name], rtol=0, atol=1e-5)
