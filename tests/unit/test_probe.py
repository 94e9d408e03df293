"""What `repa plan` measures and counts: networks without weights, operations, rates."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.autoencoders.base import load_autoencoder, load_random_autoencoder
from repa_pipeline.encoders import ENCODERS, EncoderSpec
from repa_pipeline.encoders.base import build_network, load_encoder, load_random_encoder
from repa_pipeline.encoders.randomised import build_random, fill_randomly
from repa_pipeline.errors import MissingError
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.stages.flops import encoder_flops, training_flops
from repa_pipeline.stages.probe import Probe, example_jpeg, measure
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

SD_VAE = AUTOENCODERS["sd-vae"]
ROTARY = {**ENCODERS["dinov3-s"].config, "embed_dim": 64, "depth": 2, "num_heads": 1}


def probe(**changes: object) -> Probe:
    settings: dict[str, object] = {"device": "cpu", "dtype": "float32", "compile": False}
    settings |= {"threads": 1, "resolution": 64, "batch": 4, **changes}
    return Probe(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_is_built_without_a_file(name: str) -> None:
    spec = ENCODERS[name]
    network = build_network(spec, 256)
    assert not network.training and {p.device.type for p in network.parameters()} == {"meta"}
    with torch.device("meta"), torch.no_grad():
        side = spec.input_size(256)
        made = network(torch.empty(2, 3, side, side))
    assert made.shape == (2, spec.num_tokens(256) + spec.class_token, spec.width)


def test_attention_counts_on_the_meta_device() -> None:
    def count(device: str) -> int:
        query = torch.zeros(1, 4, 256, 64, device=device)
        with FlopCounterMode(display=False) as counter:
            nn.functional.scaled_dot_product_attention(query, query, query)
        return counter.get_total_flops()

    # Two products of [256, 64] with [64, 256] a head, two operations a multiply-add.
    assert count("meta") == count("cpu") == 2 * 2 * 4 * 256 * 256 * 64


def test_training_flops_are_those_of_the_literature() -> None:
    names = ("SiT-S/2", "SiT-B/2", "SiT-XL/2")
    gflop = {name: training_flops(MODELS[name], SD_VAE, 256) / 1e9 for name in names}
    assert gflop["SiT-XL/2"] == pytest.approx(712, rel=0.03)
    assert gflop["SiT-B/2"] == pytest.approx(138, rel=0.03)
    teacher = encoder_flops(ENCODERS["dinov2-b"], 256) / 1e9
    for model, share in (("SiT-S/2", 1.28), ("SiT-B/2", 0.34)):
        assert teacher / gflop[model] == pytest.approx(share, abs=0.01)
    assert teacher / gflop["SiT-XL/2"] == pytest.approx(0.065, abs=0.001)
    giant = encoder_flops(ENCODERS["dinov2-g"], 256) / 1e9
    assert giant / gflop["SiT-XL/2"] == pytest.approx(0.82, abs=0.03)


def test_counting_equals_hand_made_products() -> None:
    # Patch embedding, query, key and value, attention, projection, two layers of the MLP.
    spec = ENCODERS["dinov1-b"]
    tokens, width = 257, 768
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    assert encoder_flops(spec, 256) == 2 * (12 * block + 256 * (3 * 16 * 16) * width)


class Uncountable(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * float(t.sum())


def build_uncountable(spec: ModelSpec, **sizes: int) -> nn.Module:
    return Uncountable()


def test_a_model_that_cannot_be_counted_is_said_so() -> None:
    loader = f"{__name__}:build_uncountable"
    spec = dataclasses.replace(MODELS["SiT-B/2"], name="mine", loader=loader)
    with pytest.raises(MissingError, match="operations of model 'mine'.*give the rate of training"):
        training_flops(spec, SD_VAE, 256)


def test_random_networks_are_seeded_and_finite() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    # DINOv3's rotary embedding is no parameter: it must not be left uninitialised.
    rotary = dataclasses.replace(ENCODERS["dinov3-s"], config=ROTARY, width=64)
    for spec in (ENCODERS["digits-vit"], ENCODERS["mobilenet-v2"], rotary):
        before = torch.random.get_rng_state()
        encoder = load_random_encoder(spec, resolution=64)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert encoder.weights_sha256 == "random"
        tokens = encoder.tokens(images)
        assert tokens.isfinite().all() and tokens.std() > 1e-4
        again = load_random_encoder(spec, resolution=64).tokens(images)
        assert torch.equal(tokens, again)
    for name in ("digits-vae", "taesd"):
        autoencoder = load_random_autoencoder(AUTOENCODERS[name])
        moments = autoencoder.encode(images)
        assert autoencoder.weights_sha256 == "random"
        assert moments.isfinite().all() and moments.std() > 1e-3
        assert torch.equal(moments, load_random_autoencoder(AUTOENCODERS[name]).encode(images))


def test_a_random_network_is_the_one_of_the_file() -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    spec = ENCODERS["digits-vit"]
    real, random = load_encoder(spec, resolution=64), load_random_encoder(spec, resolution=64)
    assert shapes(real._network) == shapes(random._network)
    assert not torch.equal(real.tokens(images), random.tokens(images))
    kl = AUTOENCODERS["digits-vae"]
    assert (
        load_autoencoder(kl).encode(images).shape
        == load_random_autoencoder(kl).encode(images).shape
    )


def shapes(network: object) -> dict[str, torch.Size]:
    assert isinstance(network, nn.Module)
    return {name: value.shape for name, value in network.state_dict().items()}


def test_random_weights_have_the_variance_of_their_fan_in() -> None:
    network = build_random(lambda device: nn.Linear(400, 300, device=device), torch.device("cpu"))
    weight = network.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.var().item() == pytest.approx(1 / 400, rel=0.02)
    assert isinstance(network.bias, nn.Parameter) and not network.bias.any()
    norm = nn.LayerNorm(3)
    fill_randomly(norm)
    assert (norm.weight == 1).all() and not norm.bias.any()


def test_a_plugin_without_build_needs_its_file_or_a_rate(tmp_path: Path) -> None:
    encoder, autoencoder = tiny_encoder(patch_size=8), tiny_autoencoder()
    message = "cannot be built without its weights.*or give its rate"
    for refused in (
        lambda: load_random_encoder(encoder, resolution=64),
        lambda: build_network(encoder, 64),
        lambda: load_random_autoencoder(autoencoder),
        lambda: encoder_flops(encoder, 64),
    ):
        with pytest.raises(MissingError, match=message):
            refused()
    with pytest.raises(MissingError, match="has no `config`"):
        build_network(dataclasses.replace(ENCODERS["digits-vit"], weights=None), 64)
    with_file = dataclasses.replace(encoder, weights=str(tmp_path / "encoder.safetensors"))
    kl_with_file = dataclasses.replace(autoencoder, weights=str(tmp_path / "kl.safetensors"))
    write_weights(with_file)
    write_weights(kl_with_file)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    loaded = load_random_encoder(with_file, resolution=64)
    plain = load_encoder(with_file, resolution=64)
    assert torch.equal(loaded.tokens(images), plain.tokens(images))
    assert load_random_autoencoder(kl_with_file).encode(images).shape == (1, 8, 8, 8)
    assert encoder_flops(with_file, 64) == 2 * 64 * (3 * 8 * 8) * 16


class Own(nn.Module):
    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.conv = nn.Conv2d(3, spec.width, spec.patch_size, stride=spec.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.conv(pixels)
        return made.flatten(2).transpose(1, 2)


def load_own(spec: EncoderSpec, resolution: int, path: Path) -> nn.Module:
    raise AssertionError("no file is loaded for a random network")


def build_own(spec: EncoderSpec, resolution: int, device: str) -> nn.Module:
    with torch.device(device):
        return Own(spec)


def test_a_plugin_with_build_needs_nothing() -> None:
    spec = dataclasses.replace(tiny_encoder(patch_size=8), loader=f"{__name__}:load_own")
    assert encoder_flops(spec, 64) == 2 * 64 * (3 * 8 * 8) * 16
    assert probe().encoder(spec).rate > 0


@pytest.mark.parametrize(
    ("a_run", "an_image", "budget", "batches"),
    [
        # One image takes a second: two fit into half of four seconds, then twice that.
        (0.0, 1.0, 4.0, [1, 2, 2]),
        (0.0, 0.01, 4.0, [1, 8, 8, 8]),
        # Slower than the budget: one run of one image.
        (0.0, 9.0, 4.0, [1]),
        # Just within it: a second run.
        (3.0, 0.9, 4.0, [1, 1]),
        (0.0, 1.5, 4.0, [1, 1, 1]),
        (0.1, 0.1, None, [8, 8, 8, 8]),
    ],
)
def test_a_slow_device_gets_a_smaller_batch(
    a_run: float, an_image: float, budget: float | None, batches: list[int]
) -> None:
    seen: list[int] = []

    def seconds(batch: int) -> float:
        seen.append(batch)
        return a_run + an_image * batch

    found = measure(seconds, 8, budget)
    assert seen == batches
    assert found.rate == pytest.approx(batches[-1] / (a_run + an_image * batches[-1]))
    timed = len(batches) - (batches[-1] > 1)
    runs = "one run" if timed == 1 else f"best of {timed} runs"
    assert found.how == f"batch {batches[-1]}, {runs}"


def test_the_best_run_counts() -> None:
    times = iter([5.0, 3.0, 2.0, 4.0])
    assert measure(lambda batch: next(times), 8, None).rate == 4.0


def test_the_example_is_like_an_imagenet_file() -> None:
    data = example_jpeg()
    assert data == example_jpeg() and 100_000 < len(data) < 130_000
    picture = Image.open(io.BytesIO(data))
    assert (picture.format, picture.size) == ("JPEG", (500, 375))


def test_probing_this_machine() -> None:
    found = probe().encoder(ENCODERS["digits-vit"])
    assert found.rate > 0 and found.how.startswith("batch ")
    assert probe().autoencoder(AUTOENCODERS["digits-vae"]).rate > 0
    assert probe().decode().how == "a JPEG like ImageNet's, best of 3 runs"
    files = [example_jpeg()] * 2
    assert probe().decode(files).how == "2 files of the source, best of 3 runs"
    assert probe().where() == "cpu with 1 thread, float32"
    assert probe(threads=2, dtype="bf16", compile=True).where() == (
        "cpu with 2 threads, bf16, compiled"
    )
    torch.set_num_threads(1)
