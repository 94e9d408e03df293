"""From stored records to the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repa_pipeline.autoencoders.scaling import scale_by
from repa_pipeline.config import TrainConfig
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

    def micro_batches(self, records: Records) -> Iterator[Micro]:
        """The step's micro-batches, --accumulate of them, sizes differing by at most one."""
        config = self.config
        draws = StepDraws(config.seed, records.step, config.batch_size, self.device)
        latents = self._latents(records, draws)
        labels = self.labels[torch.from_numpy(records.rows)].to(self.device)
        dropped = draws.dropped(config.label_dropout)[self.local]
        cond = torch.where(dropped, self.method.null_label, labels)
        features = tuple(
            codec.decode(torch.from_numpy(array).to(self.device))
            for array, codec in zip(records.arrays[1:], self.inputs.codecs, strict=True)
        )
        t = draws.t(config.weighting, config.path)[self.local]
        noise = tuple(e[self.local] for e in draws.noise(self.method.state_shapes()))
        for i in range(config.accumulate):
            part = rank_slice(len(t), i, config.accumulate)
            batch = Batch(latents[part], tuple(f[part] for f in features), cond[part])
            share = len(t[part]) / config.batch_size
            if share:
                yield batch, t[part], tuple(e[part] for e in noise), share

    def _latents(self, records: Records, draws: StepDraws) -> Tensor:
        """Scaled latents [b, C, h, w]: a fresh posterior sample where there is a posterior."""
        manifest = self.inputs.latents.spec.manifest
        stored = torch.from_numpy(records.arrays[0]).to(self.device)
        raw = self.inputs.latents_codec.decode(stored)
        if manifest["posterior"] == "gaussian":
            mean, std = raw.chunk(2, dim=1)
            raw = mean + std * draws.posterior(tuple(mean.shape[1:]))[self.local]
        return scale_by(raw, manifest["scale"], manifest["shift"])
