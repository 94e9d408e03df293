"""Sums of what a run logs: losses, losses by time, gradient norm, skipped steps.

    meter.add(losses, t, share)      every micro-batch
    meter.end_step(norm, bad)        every optimiser step
    means = meter.read(world, reset=True)

Everything stays on the device, in float64, until `read`, which waits for the device once and is
the only place that does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from repa_pipeline.errors import DataError

_NORM = "grad_norm"


class Ranks(Protocol):
    """What of a World the sums of all ranks need."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each."""


class Meter:
    """Means over the good steps since the last reset, whatever the micro-batches and ranks.

    A row of sums for every name: value * share, share, and for values per sample by bucket of t
    the values and their number. The buckets are `num_bins` equal parts of [0, 1]; t = 1 belongs to
    the last. Every rank must add the same names, so each must have a share of every step.
    """

    worst_in_a_row: int = 0
    """Most bad steps in a row since the reading before, as of the last `read`."""

    def __init__(self, device: str | torch.device = "cpu", num_bins: int = 10):
        self.device = torch.device(device)
        self.num_bins = num_bins
        self._step: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._binned: set[str] = set()
        # Skipped steps of the run; bad steps in a row now, and at most since the last reading.
        self._bad = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, losses: Mapping[str, Tensor], t: Tensor, share: float) -> None:
        """Adds one micro-batch: scalars, or values a sample [B]; t: [B] in [0, 1].

        share: its part of the global batch, so that the shares of a step are 1 over all ranks.
        """
        values = torch.stack([value.detach().double().expand(len(t)) for value in losses.values()])
        bins = (t.detach().double() * self.num_bins).long().clamp_(0, self.num_bins - 1)
        shape = (len(losses), self.num_bins)
        sums = values.new_zeros(shape).index_add_(1, bins, values)
        counts = values.new_zeros(shape).index_add_(1, bins, torch.ones_like(values))
        whole = values.mean(1, keepdim=True) * share
        rows = torch.cat([whole, torch.full_like(whole, share), sums, counts], dim=1)
        self._binned.update(name for name, value in losses.items() if value.ndim)
        _add(self._step, losses, rows)

    def end_step(self, norm: Tensor, bad: Tensor) -> None:
        """Counts the step; of a bad one the sums are dropped, whatever they hold.

        norm: the gradients' norm, a scalar; bad: a bool scalar; both the same on every rank.
        """
        row = torch.zeros(2 + 2 * self.num_bins, dtype=torch.float64, device=self.device)
        row[0], row[1] = norm.detach(), 1.0
        names = [*self._step, _NORM]
        rows = torch.stack([*self._step.values(), row])
        _add(self._total, names, rows.masked_fill(bad, 0.0))
        self._step = {}
        num_skipped, in_a_row, most = self._bad.unbind()
        in_a_row = (in_a_row + bad) * bad
        self._bad = torch.stack([num_skipped + bad, in_a_row, torch.maximum(most, in_a_row)])

    def read(self, world: Ranks | None = None, reset: bool = True) -> dict[str, float]:
        """Means over the good steps and all ranks; the one wait for the device.

        By name, for values per sample also "NAME/t0.0-0.1" and so on (without the buckets that no
        sample fell into); then "skipped_steps" of the whole run. Without a good step there is no
        mean. `reset` starts a new interval. Every rank must call it.
        """
        names = sorted(self._total)
        sums = self._table(names)
        if world is not None:
            sums = world.sum(sums)
        flat: list[float] = torch.cat([sums.flatten(), self._bad]).tolist()
        *_, num_skipped, in_a_row, most = flat
        self.worst_in_a_row = int(most)
        self._bad = torch.stack([self._bad[0], self._bad[1], self._bad[1]])
        if reset:
            self._total = {}
        width = 2 + 2 * self.num_bins
        rows = (flat[i * width : (i + 1) * width] for i in range(len(names)))
        means: dict[str, float] = {}
        for name, row in zip(names, rows, strict=True):
            means.update(self._means(name, row))
        return {**means, "skipped_steps": num_skipped}

    def _means(self, name: str, row: Sequence[float]) -> dict[str, float]:
        total, weight, *binned = row
        if not weight:
            return {}
        means = {name: total / weight}
        if name not in self._binned:
            return means
        sums, counts = binned[: self.num_bins], binned[self.num_bins :]
        for i, (value, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                means[bin_name(name, i, self.num_bins)] = value / count
        return means

    def _table(self, names: Sequence[str]) -> Tensor:
        if not names:
            return self._bad.new_zeros((0, 2 + 2 * self.num_bins))
        return torch.stack([self._total[name] for name in names])

    def state_dict(self, world: Ranks | None = None) -> dict[str, Any]:
        """Everything between two steps, tensors and plain values; every rank must call it.

        Holds the sums of each rank, so that each goes on with its own bits.
        """
        names = sorted(self._total)
        table = self._table(names)
        sums = table[None].clone()
        if world is not None:
            sums = table.new_zeros((world.size, *table.shape))
            sums[world.rank] = table
            sums = world.sum(sums)
        return {
            "names": names,
            "binned": sorted(self._binned),
            "num_bins": self.num_bins,
            "sums": sums,
            "bad": self._bad.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], world: Ranks | None = None) -> None:
        """The inverse of `state_dict`; of another number of ranks rank 0 takes what all had.

        Raises DataError for a state with other buckets.
        """
        if state["num_bins"] != self.num_bins:
            raise DataError(
                f"the checkpoint has sums of {state['num_bins']} buckets of t, expected "
                f"{self.num_bins}: use the package version that wrote it"
            )
        rank, size = (world.rank, world.size) if world is not None else (0, 1)
        sums = state["sums"].to(self.device)
        if len(sums) != size:
            sums = torch.cat(
                [sums.sum(0, keepdim=True), sums.new_zeros((size - 1, *sums.shape[1:]))]
            )
        self._step = {}
        self._total = dict(zip(state["names"], sums[rank].clone(), strict=True))
        self._binned = set(state["binned"])
        self._bad = state["bad"].to(self.device).clone()


def bin_name(name: str, index: int, num_bins: int) -> str:
    """What the mean of `name` in a bucket of t is called: "denoising/t0.0-0.1"."""
    digits = next((d for d in (1, 2) if 10**d % num_bins == 0), 3)
    low, high = index / num_bins, (index + 1) / num_bins
    return f"{name}/t{low:.{digits}f}-{high:.{digits}f}"


def _add(sums: dict[str, Tensor], names: Mapping[str, Any] | Sequence[str], rows: Tensor) -> None:
    """Adds rows [len(names), W] to the sums of their names."""
    for name, row in zip(names, rows.unbind(), strict=True):
        sums[name] = sums[name] + row if name in sums else row
