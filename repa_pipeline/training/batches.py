"""From stored records to the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repa_pipeline.autoencoders.scaling import scale_by
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.order import rank_slice
from repa_pipeline.data.reader import Records
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.methods.base import Batch, Method
from repa_pipeline.training.draws import StepDraws
from repa_pipeline.training.inputs import CacheInputs

# a micro-batch, its times, its noise, and its share of the global batch
Micro = tuple[Batch, Tensor, States, float]


class BatchMaker:
    """Draws a step's randomness for the global batch and cuts this rank's micro-batches from it."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: CacheInputs,
        method: Method,
        device: str,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.config = config
        self.inputs = inputs
        self.method = method
        self.device = device
        self.local = rank_slice(config.batch_size, rank, world_size)
        self.labels = torch.from_numpy(inputs.labels)
        self.decoders = [
            teacher.codec.decoder(teacher.tokens.spec.manifest["codec"])
            for teacher in inputs.teachers
        ]

    def micro_batches(self, records: Records) -> Iterator[Micro]:
        """The step's micro-batches, --accumulate of them, sizes differing by at most one."""
        config = self.config
        draws = StepDraws(config.seed, records.step, config.batch_size, self.device)
        latents = self._latents(records, draws)
        labels = self.labels[torch.from_numpy(records.rows)].to(self.device)
        dropped = draws.dropped(config.label_dropout)[self.local]
        cond = torch.where(dropped, self.method.null_label, labels)
        features, class_tokens = self._features(records)
        t = draws.t(config.weighting, config.path)[self.local]
        noise = tuple(e[self.local] for e in draws.noise(self.method.state_shapes()))
        for i in range(config.accumulate):
            part = rank_slice(len(t), i, config.accumulate)
            batch = Batch(
                latents[part],
                tuple(tokens[part] for tokens in features),
                cond[part],
                tuple(None if token is None else token[part] for token in class_tokens),
            )
            share = len(t[part]) / config.batch_size
            if share:
                yield batch, t[part], tuple(e[part] for e in noise), share

    def _features(self, records: Records) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Each teacher's decoded patch tokens [b, T, D], and class tokens [b, D] where kept."""
        patches: list[Tensor] = []
        class_tokens: list[Tensor | None] = []
        stored = iter(records.arrays[1:])
        for teacher, decode in zip(self.inputs.teachers, self.decoders, strict=True):
            coded = torch.from_numpy(next(stored)).to(self.device)
            scale = None
            if teacher.scale is not None:
                scale = torch.from_numpy(next(stored)).to(self.device)
            tokens = decode(coded, scale)
            has_class_token = teacher.tokens.spec.manifest.get("class_token", False)
            class_tokens.append(tokens[:, 0] if has_class_token else None)
            patches.append(tokens[:, 1:] if has_class_token else tokens)
        return tuple(patches), tuple(class_tokens)

    def _latents(self, records: Records, draws: StepDraws) -> Tensor:
        """Scaled latents [b, C, h, w]: a fresh posterior sample where there is a posterior."""
        manifest = self.inputs.latents.spec.manifest
        stored = torch.from_numpy(records.arrays[0]).to(self.device)
        raw = stored.float()
        if manifest["posterior"] == "gaussian":
            mean, std = raw.chunk(2, dim=1)
            raw = mean + std * draws.posterior(tuple(mean.shape[1:]))[self.local]
        return scale_by(raw, manifest["scale"], manifest["shift"])


def mirrored_views(config: TrainConfig, step: int) -> npt.NDArray[np.bool_]:
    """bool [global batch]: whose mirrored view is drawn in `step`."""
    return StepDraws(config.seed, step, config.batch_size, "cpu").mirrored()
