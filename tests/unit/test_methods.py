"""Every method keeps the contract; a method in a plugin needs no edit outside its own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repa_pipeline.cli import main
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import SealedArray
from repa_pipeline.diffusion.interpolant import PATHS
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.methods import METHODS, MethodSpec
from repa_pipeline.methods.base import Phase
from repa_pipeline.methods.repa import RepaMethod
from repa_pipeline.methods.sit import SiTMethod
from repa_pipeline.methods.trunk import TrunkMethod
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.registry import load_plugins, method_spec
from repa_pipeline.stages.sample import open_samples, sample_blocks
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.testing.caches import isolated_tables, write_toy_cache
from repa_pipeline.testing.methods import check_method, conformance_inputs
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training.checkpoint import load_checkpoint
from repa_pipeline.training.runs import Run
from repa_pipeline.training.state import build_method

JOINT = '''
"""Two states diffused together: the latents, and the mean of the teacher's tokens beside them."""

import torch
from torch import nn

from repa_pipeline.diffusion.interpolant import PATHS, interpolate
from repa_pipeline.diffusion.losses import denoising_loss
from repa_pipeline.methods import MethodSpec
from repa_pipeline.methods.base import Phase
from repa_pipeline.testing.parts import tiny_autoencoder


class Joint:
    def __init__(self, config, model, inputs):
        self.path, self.inputs = PATHS[config.path], inputs
        self.width = inputs.features[0].width

    @property
    def null_label(self):
        return self.inputs.num_classes

    def build(self):
        channels = self.inputs.latent_channels
        return nn.ModuleDict({
            "labels": nn.Embedding(self.null_label + 1, self.width),
            "latents": nn.Conv2d(channels, channels, 3, padding=1),
            "to_latents": nn.Linear(self.width, channels),
            "token": nn.Linear(self.width + 1, self.width),
        })

    def state_shapes(self):
        size = self.inputs.latent_size
        return (self.inputs.latent_channels, size, size), (self.width,)

    def states(self, batch):
        return batch.latents, batch.features[0].mean(dim=1)

    def phases(self):
        return (Phase(uses_features=True),)

    def loss(self, model, ema, batch, t, noise):
        x_t, target = interpolate(self.path, self.states(batch), noise, t)
        each = zip(self.velocity(model, x_t, t, batch.cond), target)
        latents, token = (denoising_loss(ours, theirs).mean() for ours, theirs in each)
        return {"loss": latents + token, "latents": latents, "token": token}

    def velocity(self, model, states, t, cond):
        latents, token = states
        hidden = token + model["labels"](cond)
        moved = model["latents"](latents) + model["to_latents"](hidden)[:, :, None, None]
        return moved, model["token"](torch.cat([hidden, t[:, None]], dim=1))


METHODS = [MethodSpec("joint", "joint_method:Joint", uses_features=True)]
AUTOENCODERS = [tiny_autoencoder(weights="tiny.safetensors")]
'''

PROJECT = """
workspace = "."
plugins = ["joint_method"]
preset = "imagenet"
threads = 1
[train]
method = "joint"
model = "SiT-XS/2"
steps = 6
batch_size = 8
learning_rate = 1e-2
log_every = 2
checkpoint_every = 3
[sample]
num_images = 10
num_steps = 4
batch_size = 4
shard_rows = 5
cfg = 1.5
"""


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_of_the_table_conforms(name: str) -> None:
    check_method(METHODS[name])


def test_repa_conforms_with_one_teacher() -> None:
    check_method(METHODS["repa"], num_teachers=1)


class Broken(SiTMethod):
    """A velocity that depends on the rest of the batch."""

    def velocity(self, model: nn.Module, states: Any, t: Tensor, cond: Tensor) -> Any:
        (v,) = super().velocity(model, states, t, cond)
        return (v - v.mean(dim=0),)


class Idle(SiTMethod):
    """A head that nothing trains."""

    def build(self) -> nn.Module:
        return nn.ModuleDict({"trunk": self.build_trunk(), "idle": nn.Linear(2, 2)})


class Restless(SiTMethod):
    """A head that is trained on when its phase is over."""

    def build(self) -> nn.Module:
        return nn.ModuleDict({"trunk": self.build_trunk(), "head": nn.Linear(1, 1)})

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(), Phase(5, idle=("head",)))

    def loss(self, model: nn.Module, *rest: Any) -> dict[str, Tensor]:
        losses = super().loss(model, *rest)
        head = model.get_submodule("head")(torch.ones(1)).square().sum()
        return {**losses, "loss": losses["loss"] + head}


class Late(SiTMethod):
    """Phases that leave the first steps out."""

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(1),)


class Mute(TrunkMethod):
    """Nothing that a sampler could ask."""

    family = "sit"
    denoise = SiTMethod.denoise
    path = PATHS["linear"]


@pytest.mark.parametrize(
    ("loader", "complaint"),
    [
        ("Broken", "velocity depends on others"),
        ("Idle", "no gradient reaches idle.weight"),
        ("Restless", "a gradient reaches head.weight, idle from 5 on"),
        ("Late", "do not begin at step 0"),
        ("Mute", "a method has one of velocity, predict_noise"),
    ],
)
def test_the_suite_finds_what_is_broken(
    loader: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {cls.__name__: cls for cls in (Broken, Idle, Restless, Late, Mute)}
    target = "repa_pipeline.training.state.resolve"
    known: dict[str, Any] = dict(classes)
    monkeypatch.setattr(target, lambda path: known[path.partition(":")[2]])
    with pytest.raises(AssertionError, match=complaint):
        check_method(MethodSpec("broken", f"here:{loader}", uses_features=False))


def test_projectors_stay_idle_while_sampling() -> None:
    inputs = conformance_inputs(2)
    config = TrainConfig(projector_width=16)
    model_spec = ModelSpec("small", 3, 32, 2, 2, align_depth=2)
    method = build_method(METHODS["repa"].loader, config, model_spec, inputs)
    model = method.build()
    for projector in model.get_submodule("projectors").children():
        projector.register_forward_hook(lambda *_: pytest.fail("a projector ran"))
    method.velocity(model, (torch.randn(2, 4, 8, 8),), torch.rand(2), torch.tensor([0, 5]))


# A method in a plugin, from the command line.


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_toy_cache(tmp_path)
    write_weights(tiny_autoencoder(weights=str(tmp_path / "tiny.safetensors")))
    (tmp_path / "joint_method.py").write_text(JOINT)
    (tmp_path / "repa.toml").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    with isolated_tables():
        yield tmp_path
    assert "joint" not in METHODS


def repa(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 0


def images_of(array: SealedArray) -> np.ndarray[Any, Any]:
    return np.concatenate(list(sample_blocks(array)))


def test_a_plugin_method_with_two_states(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_plugins(("joint_method",))
    check_method(METHODS["joint"])

    repa("train whole")
    repa("train resumed --steps 3")
    repa("train resumed")
    whole, resumed = (Run(project / "runs" / name) for name in ("whole", "resumed"))
    ours, theirs = (load_checkpoint(r.newest_checkpoint()) for r in (resumed, whole))
    for part in ("model", "ema"):
        assert all(torch.equal(v, theirs[part][n]) for n, v in ours[part].items())
    start, end = (load_checkpoint(r.checkpoints / "step-00000003.pt") for r in (resumed, whole))
    assert torch.equal(start["model"]["token.weight"], end["model"]["token.weight"])
    assert not torch.equal(start["model"]["token.weight"], ours["model"]["token.weight"])

    capsys.readouterr()
    repa("sample --run whole --output out")
    assert "made: out/samples.npz" in capsys.readouterr().out
    repa("sample --run whole --output other --seed 1")
    images, other = (images_of(open_samples(str(project / name))) for name in ("out", "other"))
    assert images.shape == (10, 64, 64, 3) and images.std() > 1
    assert all((images[i] != other[i]).any() for i in range(10))
    assert len({image.tobytes() for image in images}) == 10


def test_the_second_state_reaches_the_images(project: Path) -> None:
    repa("train whole --steps 3")
    config = SampleConfig(workspace=".", device="cpu", num_images=4, num_steps=4, sampler="euler")
    sampler = sample_stage(config).load_sampler()
    before = sampler.scaled([0, 1])
    with torch.no_grad():
        sampler.model.network.get_parameter("token.bias").add_(3.0)
    after = sampler.scaled([0, 1])
    assert before.shape == (2, 4, 8, 8) and float((after - before).abs().max()) > 0.1


def test_plugins_that_do_not_work(project: Path) -> None:
    config = TrainConfig(plugins=("joint_method",))
    assert method_spec(config, "joint").uses_features
    load_plugins(("joint_method",))  # again: harmless
    (project / "clash.py").write_text("from joint_method import METHODS\n")
    with pytest.raises(ConfigError, match="method 'joint' is defined twice"):
        load_plugins(("clash",))
    with pytest.raises(ConfigError, match="plugin 'absent' cannot be imported .*check `plugins`"):
        method_spec(dataclasses.replace(config, plugins=("absent",)), "joint")


def test_a_codec_without_direction_is_refused() -> None:
    inputs = conformance_inputs(1)
    poor = dataclasses.replace(inputs.features[0], preserves=frozenset({"magnitude"}))
    lacking = dataclasses.replace(inputs, features=(poor,))
    with pytest.raises(MismatchError, match="cosine objective needs the direction .* the codec of"):
        RepaMethod(TrainConfig(), MODELS["SiT-XS/2"], lacking)
