"""Aligned runs against vanilla runs: which distances may be compared, and what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from repa_pipeline.report_results import RunFacts, SampleSet, dig

# Settings that only an aligned run has use of, and one that only thins the log.
_ALIGNMENT = (
    *("align_depth", "align_coeff", "align_schedule", "align_steps", "align_objective"),
    *("align_temperature", "align_target", "align_resize", "projector", "projector_width"),
    "features",
)
_NOT_COMPARED = (*_ALIGNMENT, "log_every")
_TRAIN_SEED, _SAMPLE_SEED = "train seed", "sample seed"
_SEEDS = (_TRAIN_SEED, _SAMPLE_SEED)

# Two runs of the same settings differ by 1-2 % in practice.
RUN_NOISE = 0.02

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves all above.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class Twin:
    """Two scored sets of samples that differ in the alignment alone."""

    aligned: RunFacts
    vanilla: RunFacts
    aligned_samples: SampleSet
    vanilla_samples: SampleSet
    conditions: Mapping[str, Any]

    @property
    def aligned_distance(self) -> float:
        return self.aligned_samples.distance or 0.0

    @property
    def vanilla_distance(self) -> float:
        return self.vanilla_samples.distance or 0.0

    @property
    def ratio(self) -> float:
        """Aligned over vanilla: below 1 the aligned run is closer to the reference."""
        return self.aligned_distance / self.vanilla_distance

    @property
    def margin(self) -> float:
        """Relative difference up to which nothing is claimed for one pair.

        The usual difference of two equal runs, plus twice 1/sqrt(N): the relative standard
        deviation of a Fréchet distance of N samples is about that at most.
        """
        return RUN_NOISE + 2 / math.sqrt(self.aligned_samples.num_samples)

    @property
    def verdict(self) -> str:
        """Which run is ahead, "aligned" or "vanilla"; "tie" within the margin."""
        if abs(math.log(self.ratio)) <= math.log1p(self.margin):
            return "tie"
        return "aligned" if self.ratio < 1 else "vanilla"

    @property
    def seed(self) -> Any:
        return self.conditions[_TRAIN_SEED]

    @property
    def step(self) -> int:
        return self.aligned_samples.step or 0

    def sentence(self) -> str:
        """Both distances, their ratio, and what may be concluded."""
        teachers = ", ".join(self.aligned.teachers)
        return (
            f"At step {self.step:,}, seed {self.seed}, {self.aligned.name} (aligned with "
            f"{teachers}) has a {self.aligned_samples.distance_name} of "
            f"{self.aligned_distance:.4g} and {self.vanilla.name} (vanilla) of "
            f"{self.vanilla_distance:.4g}: {self.ratio:.3g} times the vanilla run's. "
            + self._conclusion()
        )

    def _conclusion(self) -> str:
        percent = _percent(abs(self.ratio - 1))
        if self.verdict == "tie":
            return (
                f"The difference of {percent} is less than the noise allowed for one pair of "
                f"{self.aligned_samples.num_samples:,} samples each ({_percent(self.margin)}): "
                "neither is ahead."
            )
        ahead, lower = ("aligned", "lower") if self.ratio < 1 else ("vanilla", "higher")
        return (
            f"The aligned run's is {percent} {lower} (lower is better): the {ahead} run is ahead."
        )


@dataclasses.dataclass(frozen=True)
class TwinGroup:
    """Twins that differ in seeds alone, by seed."""

    twins: tuple[Twin, ...]

    @property
    def step(self) -> int:
        return self.twins[0].step

    @property
    def series(self) -> str:
        """Equal for groups that differ in the step alone."""
        return _group_key(self.twins[0], but_for=(*_SEEDS, "step"))

    def replicates(self) -> tuple[str, list[list[Twin]]]:
        """What is repeated ("training" or "sampling") and the twins of each repetition.

        Samples of one training are no repetition of it, so with several training seeds the
        distances of each are averaged over its sampling seeds.
        """
        several = len({twin.seed for twin in self.twins}) > 1
        key, what = (_TRAIN_SEED, "training") if several else (_SAMPLE_SEED, "sampling")
        found: dict[Any, list[Twin]] = {}
        for twin in self.twins:
            found.setdefault(twin.conditions[key], []).append(twin)
        return what, list(found.values())

    def sentence(self) -> str | None:
        """Mean, spread and what may be concluded from all seeds; None with one repetition."""
        what, parts = self.replicates()
        if len(parts) < 2:
            return None
        aligned = [statistics.fmean(t.aligned_distance for t in part) for part in parts]
        vanilla = [statistics.fmean(t.vanilla_distance for t in part) for part in parts]
        ratio, low, high = ratio_interval(aligned, vanilla)
        if low <= 1 <= high:
            conclusion = "the interval includes 1, so these seeds show no difference."
        else:
            conclusion = f"the {'aligned' if high < 1 else 'vanilla'} runs are ahead."
        alone = " The training seed is one, so this spread is that of sampling alone."
        return (
            f"Over {len(parts)} {what} seeds at step {self.step:,}, the "
            f"{self.twins[0].aligned_samples.distance_name} is {_mean_and_spread(aligned)} "
            f"aligned with {', '.join(self.twins[0].aligned.teachers)} and "
            f"{_mean_and_spread(vanilla)} vanilla (mean ± standard deviation); the "
            f"geometric mean of the ratios is {ratio:.3g}, 95 % interval {low:.3g} to {high:.3g}: "
            + conclusion
            + (alone if what == "sampling" else "")
        )


def ratio_interval(
    aligned: Sequence[float], vanilla: Sequence[float]
) -> tuple[float, float, float]:
    """(geometric mean, low, high) of paired ratios, 2 or more; 95 %, Student's t on the logs."""
    logs = [math.log(a / v) for a, v in zip(aligned, vanilla, strict=True)]
    mean = statistics.fmean(logs)
    quantile = _T[min(len(logs) - 1, len(_T)) - 1]
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def find_twins(runs: Sequence[RunFacts]) -> list[TwinGroup]:
    """All pairs of equal model, data, seed, step, sampling and scoring; the last step first."""
    groups: dict[str, list[Twin]] = {}
    for aligned, ours, conditions in _scored(runs, aligned=True):
        for vanilla, theirs, their_conditions in _scored(runs, aligned=False):
            if conditions == their_conditions:
                twin = Twin(aligned, vanilla, ours, theirs, conditions)
                groups.setdefault(_group_key(twin, _SEEDS), []).append(twin)
    found = [TwinGroup(tuple(twins)) for twins in groups.values()]
    return sorted(found, key=lambda group: -group.step)


def without_twin(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Why an aligned run is in no pair."""
    if not run.scored:
        return f"{run.name} is not scored yet: run `repa sample` and `repa evaluate`."
    others = [other for other in runs if not other.aligned]
    if not others:
        return f"{run.name} has no vanilla twin yet: run `repa train --encoder none`."
    if not any(other.scored for other in others):
        return f"{run.name} has no scored twin: no vanilla run is scored yet."
    candidates = [
        (_differences(ours, theirs), other.name)
        for _, ours_samples, ours in _scored([run], aligned=True)
        for other, theirs_samples, theirs in _scored(others, aligned=False)
    ]
    if not candidates:
        return f"{run.name} has no twin: a distance of 0 or below has no ratio."
    names, nearest = min(candidates, key=lambda candidate: (len(candidate[0]), candidate[1]))
    return (
        f"{run.name} is not compared: the nearest vanilla scores, of {nearest}, were made with "
        f"another {', '.join(names)}."
    )


def _scored(
    runs: Sequence[RunFacts], *, aligned: bool
) -> list[tuple[RunFacts, SampleSet, dict[str, Any]]]:
    """Scored samples of aligned (or vanilla) runs, each with all that must be equal in a twin."""
    return [
        (run, samples, {**_training(run), **samples.conditions(), "step": samples.step})
        for run in runs
        if run.aligned == aligned and run.record
        for samples in run.scored
        if (samples.distance or 0) > 0 and samples.num_samples > 0
    ]


def _training(run: RunFacts) -> dict[str, Any]:
    """What two runs must share to differ in the alignment alone."""
    decided = dig(run.record, "decided") or {}
    settings = dig(decided, "settings") or {}
    arrays = dig(decided, "data", "arrays") or {}
    return {
        **{f"train {k}": v for k, v in settings.items() if k not in _NOT_COMPARED},
        _TRAIN_SEED: settings.get("seed"),
        "train dtype": decided.get("dtype"),
        "rows": dig(decided, "data", "rows"),
        "latents": {k: v for k, v in arrays.items() if not k.startswith("features.")},
    }


def _group_key(twin: Twin, but_for: Sequence[str]) -> str:
    """Equal for twins that differ in the conditions `but_for` alone."""
    kept = {k: v for k, v in twin.conditions.items() if k not in but_for}
    how = {name: twin.aligned.setting(name) for name in _ALIGNMENT}
    method = dig(twin.aligned.record, "decided", "method")
    return json.dumps([kept, how, method, twin.aligned.teachers], sort_keys=True)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
