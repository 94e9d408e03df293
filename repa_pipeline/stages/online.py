"""`repa train --features online`: the teacher runs inside the step on the source's images.

For a teacher that is tried once, and to prove a cache: rows, order and views are those of a cached
run, and so are decoding, crop, preprocessing and token rule, which are the same code.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repa_pipeline.config import FeaturesConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.index import Entry, Index, open_index
from repa_pipeline.data.order import Order
from repa_pipeline.data.source import Source
from repa_pipeline.encoders.base import Encoder, load_encoder
from repa_pipeline.stages.images import Images, load_images
from repa_pipeline.stages.index import cache_store, open_config_source
from repa_pipeline.training.inputs import CacheInputs
from repa_pipeline.training.upload import Upload

Views = Callable[[int], npt.NDArray[np.bool_]]

_AHEAD = 2
_HELD_SHARDS = 256


class OnlineTeachers:
    """Tokens of all online teachers for step after step; a context manager.

    A thread reads and decodes the images of the next steps meanwhile; `wait_s` sums the time that
    steps waited for it. Raises what `load_encoder` raises, and, at the step that needs it,
    DataError for an image that is not the indexed one.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: CacheInputs,
        order: Order,
        *,
        steps: range,
        local: slice,
        device: str,
        dtype: str,
        compile: bool = False,
        views: Views | None = None,
    ):
        self.wait_s = 0.0
        resolution = inputs.latents.spec.manifest["resolution"]
        self._encoders: list[Encoder] = [
            load_encoder(t.spec, resolution=resolution, device=device, dtype=dtype, compile=compile)
            for t in inputs.online
        ]
        self._config = image_config(config, inputs)
        self._source: Source = open_config_source(self._config)
        self._index: Index = open_index(cache_store(self._config))
        self._shard_rows = int(inputs.manifest["shard_rows"])
        self._entries = functools.lru_cache(_HELD_SHARDS)(self._load_entries)
        self._order, self._steps, self._local, self._views = order, steps, local, views
        # As many images at once as the model takes.
        self._most = config.micro_batch or config.batch_size
        self._upload = Upload(device)
        self._queue: queue.Queue[Images | BaseException] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="repa-images", daemon=True)

    def __enter__(self) -> OnlineTeachers:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """Each teacher's patch tokens float32 [b, T, D] of this rank's slice of batch `step`.

        Asked for every step in turn.
        """
        began = time.perf_counter()
        found = self._queue.get()
        self.wait_s += time.perf_counter() - began
        if isinstance(found, BaseException):
            raise found
        return self.tokens(self._upload([found])[0].permute(0, 3, 1, 2))

    def tokens(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Each teacher's patch tokens of uint8 [b, 3, R, R] on the device."""
        parts = torch.split(pixels, self._most)
        return tuple(torch.cat([e.tokens(part) for part in parts]) for e in self._encoders)

    def _produce(self) -> None:
        for step in self._steps:
            try:
                item: Images | BaseException = self._images(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def _images(self, step: int) -> Images:
        """uint8 [b, R, R, 3], mirrored where the step's view is."""
        rows = self._order.rows(step)[self._local]
        entries = [self._entry(int(row)) for row in rows]
        images, _, _ = load_images(self._source, entries, self._config)
        if self._views is not None:
            mirrored = self._views(step)[self._local]
            images[mirrored] = images[mirrored, :, ::-1]
        return images

    def _entry(self, row: int) -> Entry:
        shard, inside = divmod(row, self._shard_rows)
        return self._entries(shard)[inside]

    def _load_entries(self, shard: int) -> Sequence[Entry]:
        start = shard * self._shard_rows
        return self._index.rows(start, min(start + self._shard_rows, self._index.num_rows))


def image_config(config: TrainConfig, inputs: CacheInputs) -> FeaturesConfig:
    """The settings with which `repa cache-features` reads and decodes the images of these rows."""
    decode = inputs.manifest["decode"]
    return FeaturesConfig(
        source=config.source,
        workspace=config.workspace,
        plugins=config.plugins,
        overrides=config.overrides,
        resolution=inputs.latents.spec.manifest["resolution"],
        exif=decode["exif"],
        max_pixels=decode["max_pixels"],
        decode_threads=config.decode_threads,
        scratch=config.scratch,
        scratch_gb=config.scratch_gb,
    )
