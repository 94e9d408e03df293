"""From random numbers to latents to images, with models that are loaded once.

`LatentSampler` is what `repa sample` and the pipeline class (pipeline.py) share; `Sampler` is the
former's: image k from (checkpoint, settings, seed, k).
"""

from __future__ import annotations

import dataclasses
import functools
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repa_pipeline.autoencoders.base import Autoencoder, load_autoencoder
from repa_pipeline.autoencoders.scaling import unscale_by
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.device import choose_device, float32_products
from repa_pipeline.diffusion.guidance import Model, guided
from repa_pipeline.diffusion.interpolant import PATHS, States
from repa_pipeline.diffusion.sampling import SAMPLERS, SamplerOptions
from repa_pipeline.errors import ConfigError, DataError, MismatchError
from repa_pipeline.methods.base import Method
from repa_pipeline.registry import autoencoder_spec, load_plugins
from repa_pipeline.stages.sample_checkpoint import Checkpoint, read_checkpoint, weights_of
from repa_pipeline.stages.sample_labels import Labels
from repa_pipeline.training.draws import seed_of
from repa_pipeline.training.parallel import compile_blocks
from repa_pipeline.training.state import method_of_checkpoint

Images = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.float32]
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class SampledModel:
    """A network in eval mode without gradients, and the method that knows how to ask it."""

    method: Method
    network: nn.Module
    about: Mapping[str, Any]

    def asked(self, what: str, device: str, dtype: str) -> Model:
        """The function `what` of its method, computed in `dtype`."""
        kind = device.split(":")[0]

        def answer(states: States, t: Tensor, cond: Tensor) -> States:
            with torch.autocast(kind, torch.bfloat16, enabled=dtype == "bf16"):
                answered: States = getattr(self.method, what)(self.network, states, t, cond)
                return answered

        return answer


def load_model(
    checkpoint: Checkpoint,
    device: str,
    *,
    use_ema: bool = True,
    ema_decay: float = 0.0,
    dtype: str = "float32",
    compile: bool = False,
) -> SampledModel:
    """The network of a checkpoint on a device, ready to be asked in `dtype`."""
    load_plugins(tuple(checkpoint.about["config"]["plugins"]))
    method = method_of_checkpoint(checkpoint.content)
    network = method.build()
    network.load_state_dict(weights_of(checkpoint, use_ema, ema_decay))
    network.to(device).eval().requires_grad_(False)
    if dtype == "bf16":
        cast_linears(network)
    if compile:
        compile_blocks(network, dynamic=False)
    return SampledModel(method, network, checkpoint.about)


def cast_linears(network: nn.Module) -> None:
    """Linear and convolution weights to bf16, which autocast would do at every step again."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Steps:
    """How noise becomes data: a sampler of SAMPLERS, its steps, guidance where it is on."""

    sampler: str
    num_steps: int
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    dtype: str = "float32"


class LatentSampler:
    """Noise to latents by one model, guided by itself or by a weaker one."""

    def __init__(
        self, model: SampledModel, steps: Steps, device: str, weaker: SampledModel | None = None
    ):
        self.model = model
        self.weaker = weaker
        self.steps = steps
        self.device = device
        self._spec = SAMPLERS[steps.sampler]
        self._path = PATHS[model.about["config"]["path"]]
        self._ask = model.asked(self._spec.asks, device, steps.dtype)
        self._weaker = None
        if weaker is not None:
            self._weaker = weaker.asked(self._spec.asks, device, steps.dtype)

    def scaled(self, labels: npt.NDArray[np.int64], draws: Draws) -> Tensor:
        """Latents in the model's scale, float64 [B, C, h, w], of classes int64 [B]."""
        steps = self.steps
        cond = torch.from_numpy(labels).to(self.device)
        null = torch.full_like(cond, self.model.method.null_label)
        answer = guided(
            self._ask,
            cond,
            null,
            scale=steps.scale,
            interval=steps.interval,
            weaker=self._weaker,
        )
        options = SamplerOptions(
            steps.num_steps, increments=draws.increments, path=self._path, eta=steps.eta
        )
        with torch.no_grad():
            return self._spec.run(answer, draws.noise(), options)[0]

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Raw latents float32 [B, C, h, w], which the autoencoder decodes."""
        latents = self.model.about["latents"]
        return unscale_by(scaled.to(torch.float32), latents["scale"], latents["shift"])


class Draws:
    """The random numbers of a batch, sample by sample from CPU generators of its own.

    `noise` generators give what a sample starts from, float32; `sde` generators the increments,
    float64, one step after the other. With `ahead` (without a word: for a CUDA device) the next
    increments are drawn on a thread while the device computes.
    """

    def __init__(
        self,
        noise: Sequence[torch.Generator],
        sde: Sequence[torch.Generator],
        shapes: Shapes,
        device: str,
        ahead: bool | None = None,
    ):
        self._noise, self._sde, self._shapes = noise, sde, shapes
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        is_ahead = self._is_cuda if ahead is None else ahead
        self._ahead = ThreadPoolExecutor(1) if is_ahead else None
        self._next: Future[States] | None = None

    @classmethod
    def seeded(cls, seed: int, indices: Sequence[int], shapes: Shapes, device: str) -> Draws:
        """Those of samples `indices` of a seed."""
        noise, sde = (
            [torch.Generator().manual_seed(seed_of(seed, k, purpose)) for k in indices]
            for purpose in ("noise", "sde")
        )
        return cls(noise, sde, shapes, device)

    def noise(self) -> States:
        """What the samples start from."""
        return self._placed(self._drawn(self._noise, torch.float32))

    def increments(self, step: int) -> States:
        """The increments of noisy step `step`; to be asked for in order."""
        if self._ahead is None:
            return self._placed(self._drawn(self._sde, torch.float64))
        drawn = self._next.result() if self._next else self._drawn(self._sde, torch.float64)
        self._next = self._ahead.submit(self._drawn, self._sde, torch.float64)
        return self._placed(drawn)

    def _drawn(self, generators: Sequence[torch.Generator], dtype: torch.dtype) -> States:
        states = [
            torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators])
            for shape in self._shapes
        ]
        # From pinned memory a copy waits for nothing that the device still computes.
        return tuple(state.pin_memory() if self._is_cuda else state for state in states)

    def _placed(self, states: States) -> States:
        return tuple(state.to(self._device, non_blocking=True) for state in states)


class Sampler:
    """Everything that makes image k of a plan; `checkpoint` None decodes latents alone.

    Raises MismatchError where this machine has other files than the plan was made with.
    """

    def __init__(
        self,
        config: SampleConfig,
        recipe: Mapping[str, Any],
        labels: Labels,
        *,
        checkpoint: str | None,
        decodes: bool = True,
    ):
        self.config = config
        self.labels = labels
        self.device = choose_device(config.device)
        if config.dtype == "tf32" and self.device.startswith("cpu"):
            raise ConfigError("dtype tf32 is of CUDA devices: give --dtype float32 or bf16")
        self._recipe = recipe
        self.decoder = self._load_decoder() if decodes else None
        self.latent_sampler = None if checkpoint is None else self._load_models(checkpoint)

    def _load_models(self, where: str) -> LatentSampler:
        config, recipe = self.config, self._recipe
        load = functools.partial(
            load_model, use_ema=config.use_ema, dtype=config.dtype, compile=config.compile
        )
        checkpoint = read_checkpoint(config, where, recipe["checkpoint_sha256"])
        model = load(checkpoint, self.device, ema_decay=config.ema_decay)
        weaker = None
        if config.guide_checkpoint:
            guide = read_checkpoint(
                config, config.guide_checkpoint, recipe["guide"]["checkpoint_sha256"]
            )
            weaker = load(guide, self.device)
        steps = Steps(
            config.sampler, config.num_steps, config.cfg, config.interval, config.eta, config.dtype
        )
        return LatentSampler(model, steps, self.device, weaker)

    def _load_decoder(self) -> Autoencoder:
        spec = autoencoder_spec(self.config, self._recipe["decoder"])
        decoder = load_autoencoder(spec, weights=self.config.decoder_weights, device=self.device)
        expected = self._recipe["decoder_sha256"]
        if decoder.weights_sha256 != expected:
            raise MismatchError(
                f"the weights of decoder {spec.name} on {socket.gethostname()} have sha256 "
                f"{decoder.weights_sha256[:12]}, expected {expected[:12]}: give every machine the "
                "same file"
            )
        return decoder

    @property
    def model(self) -> SampledModel:
        """What is sampled."""
        assert self.latent_sampler is not None
        return self.latent_sampler.model

    def scaled(self, indices: Sequence[int]) -> Tensor:
        """Latents of samples `indices` in the model's scale, float64 [B, C, h, w], one batch."""
        assert self.latent_sampler is not None
        shapes = self.model.method.state_shapes()
        draws = Draws.seeded(self.config.seed, indices, shapes, self.device)
        with float32_products(tf32=self.config.dtype == "tf32"):
            return self.latent_sampler.scaled(self.labels.of(indices), draws)

    def latents(self, indices: range) -> Latents:
        """Raw latents float32 [n, C, h, w], made in batches of exactly `batch_size`."""
        sampler = self.latent_sampler
        assert sampler is not None

        def batch(padded: list[int]) -> Latents:
            found: Latents = sampler.unscaled(self.scaled(padded)).cpu().numpy()
            return found

        return in_batches(batch, list(indices), self.config.batch_size)

    def decoded(self, latents: Latents) -> Images:
        """uint8 [n, R, R, 3] of raw latents, in batches of exactly `batch_size`.

        Raises DataError when a pixel is not finite.
        """
        decoder = self.decoder
        assert decoder is not None

        def batch(padded: list[int]) -> Images:
            raw = torch.from_numpy(latents[padded]).to(self.device)
            with float32_products(tf32=self.config.dtype == "tf32"):
                return to_uint8(decoder.decode(raw), self.config.uint8)

        return in_batches(batch, list(range(len(latents))), self.config.batch_size)

    def images(self, indices: range) -> Images:
        """uint8 [n, R, R, 3] of samples `indices`."""
        return self.decoded(self.latents(indices))


def in_batches(
    make: Callable[[list[int]], npt.NDArray[Any]], items: list[int], size: int
) -> npt.NDArray[Any]:
    """What `make` gives for items, `size` at a time; the last batch repeats its last item."""
    parts = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        parts.append(make(batch + [batch[-1]] * (size - len(batch)))[: len(batch)])
    return np.concatenate(parts)


def to_uint8(pixels: Tensor, rule: str) -> Images:
    """[-1, 1] [B, 3, R, R] -> uint8 [B, R, R, 3]; `rule` truncate is the reference's, or round.

    Raises DataError when a pixel is not finite.
    """
    if not pixels.isfinite().all():
        raise DataError(
            "the model's images are not finite: use a checkpoint from before the loss diverged, "
            "or --dtype float32"
        )
    levels = 255 * ((pixels + 1) / 2) + (0.5 if rule == "round" else 0.0)
    images: Images = levels.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return images
