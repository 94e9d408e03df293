"""From stored records to the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.order import rank_slice
from repa_pipeline.data.reader import Records
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.methods.base import Batch, Method
from repa_pipeline.training.draws import StepDraws
from repa_pipeline.training.inputs import CacheInputs, Teacher
from repa_pipeline.training.upload import Upload
from repa_pipeline.training.world import World

# Step -> each teacher's patch tokens [b, T, D] of this rank's slice, made in the step.
Online = Callable[[int], tuple[Tensor, ...]]


class Micro(NamedTuple):
    """A micro-batch, its times [b], its noise, and its share of the global batch."""

    batch: Batch
    t: Tensor
    noise: States
    share: float


class BatchMaker:
    """Draws a step's randomness for the global batch and cuts this rank's micro-batches from it.

    online: makes the teachers' tokens where they are not read from the cache.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: CacheInputs,
        method: Method,
        device: str,
        world: World | None = None,
        online: Online | None = None,
    ):
        world = world or World()
        self.config = config
        self.inputs = inputs
        self.method = method
        self.device = device
        self.local = rank_slice(config.batch_size, world.rank, world.size)
        self.num_micro = _num_micro(config, self.local.stop - self.local.start)
        self.accumulates = _num_micro(config, -(-config.batch_size // world.size)) > 1
        self._labels = torch.from_numpy(inputs.labels)
        self._online = online
        self._upload = Upload(device)
        # Made once: a tensor made from a list waits for the device.
        latents = inputs.latents.spec.manifest
        self._is_gaussian = latents["posterior"] == "gaussian"
        self._scale, self._shift = (
            torch.tensor(latents[name], device=device).view(-1, 1, 1) for name in ("scale", "shift")
        )

    def micro_batches(self, records: Records) -> Iterator[Micro]:
        """The step's `num_micro` micro-batches, sizes differing by at most one.

        `records` are this rank's; those of latents alone (a phase without features) give batches
        without features.
        """
        config = self.config
        draws = StepDraws(config.seed, records.step, config.batch_size, self.device)
        stored = self._upload(records.arrays)
        labels = self._labels[torch.from_numpy(records.rows)].to(self.device, non_blocking=True)
        dropped = draws.dropped(config.label_dropout)[self.local]
        cond = torch.where(dropped, self.method.null_label, labels)
        latents = self._latents(stored[0], draws)
        online = self._online(records.step) if self._online else ()
        t = draws.t(config.weighting, config.path)[self.local]
        noise = tuple(e[self.local] for e in draws.noise(self.method.state_shapes()))
        for i in range(self.num_micro):
            part = rank_slice(len(t), i, self.num_micro)
            features, class_tokens = self._features([array[part] for array in stored[1:]])
            features += tuple(tokens[part] for tokens in online)
            batch = Batch(latents[part], features, cond[part], class_tokens, records.step)
            share = len(t[part]) / config.batch_size
            yield Micro(batch, t[part], tuple(e[part] for e in noise), share)

    def _features(
        self, stored: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Each teacher's decoded patch tokens [b, T, D], and class tokens [b, D] where kept."""
        patches: list[Tensor] = []
        class_tokens: list[Tensor | None] = []
        arrays = iter(stored)
        for teacher in self.inputs.teachers if stored else ():
            if not isinstance(teacher, Teacher):
                continue
            decode = teacher.decoder()
            tokens = decode(next(arrays), None if teacher.scale is None else next(arrays))
            has_class_token = teacher.describe().class_token
            class_tokens.append(tokens[:, 0] if has_class_token else None)
            patches.append(tokens[:, 1:] if has_class_token else tokens)
        return tuple(patches), tuple(class_tokens)

    def _latents(self, stored: Tensor, draws: StepDraws) -> Tensor:
        """Scaled latents [b, C, h, w]: a fresh posterior sample where there is a posterior."""
        raw = stored.float()
        if self._is_gaussian:
            mean, std = raw.chunk(2, dim=1)
            raw = mean + std * draws.posterior(tuple(mean.shape[1:]))[self.local]
        return (raw - self._shift) * self._scale


def mirrored_views(config: TrainConfig, step: int) -> npt.NDArray[np.bool_]:
    """bool [global batch]: whose mirrored view is drawn in `step`."""
    return StepDraws(config.seed, step, config.batch_size, "cpu").mirrored()


def _num_micro(config: TrainConfig, num_local: int) -> int:
    """Micro-steps of a rank with `num_local` images: as asked, more where memory wants them."""
    needed = -(-num_local // config.micro_batch) if config.micro_batch else 1
    return min(max(config.accumulate, needed), num_local)
