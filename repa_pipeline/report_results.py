"""What a workspace holds for the report: runs, their events, their samples and their scores.

Reading forgives: a file that is absent, torn or of other samples becomes a remark, not an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.config import CommonConfig
from repa_pipeline.errors import RepaError
from repa_pipeline.observe import read_events
from repa_pipeline.training.runs import Run, list_runs

DISTANCE = "frechet_distance"
_PACE = (
    *("images_per_s", "mfu", "data_wait", "bytes_per_s"),
    *("rss_bytes", "peak_device_bytes", "skipped_steps"),
)
_BUCKET = re.compile(r"(.+)/t(\d\.\d+)-(\d\.\d+)")
# Sample settings that say which training the samples are of, and how they are laid out in shards.
_OF_TRAINING = ("checkpoint_sha256", "step", "method", "model")
_LAYOUT = ("batch_size", "shard_rows")


def dig(values: Any, *keys: str) -> Any:
    """The value under nested keys, None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """A folder of samples: settings, score and judgement, each None where it is not there."""

    folder: Path
    settings: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    judge: Mapping[str, Any] | None
    remarks: tuple[str, ...]

    @property
    def step(self) -> int | None:
        step = dig(self.settings, "step")
        return step if isinstance(step, int) else None

    @property
    def distance(self) -> float | None:
        """The Fréchet distance, None when it is not scored or not a number."""
        value = dig(self.result, "metrics", DISTANCE)
        return float(value) if is_number(value) else None

    @property
    def distance_name(self) -> str:
        """What the result calls its distance."""
        return str(dig(self.result, "kind") or "Fréchet distance")

    @property
    def network(self) -> str:
        return str(dig(self.result, "network", "name"))

    @property
    def num_samples(self) -> int:
        return int(dig(self.result, "num_samples") or 0)

    def conditions(self) -> dict[str, Any]:
        """What must be equal for two distances to be comparable, but for step and training."""
        settings = self.settings or {}
        left_out = (*_OF_TRAINING, *_LAYOUT)
        return {
            "distance": self.distance_name,
            "num_samples": dig(self.result, "num_samples"),
            "network": dig(self.result, "network"),
            "reference": dig(self.result, "reference", "sha256"),
            **{f"sample {k}": v for k, v in settings.items() if k not in left_out},
        }


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """A run as its files tell it; evaluations: scores made on the way, by step."""

    run: Run
    record: Mapping[str, Any]
    scalars: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    samples: tuple[SampleSet, ...]
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def teachers(self) -> tuple[str, ...]:
        arrays = dig(self.record, "decided", "data", "arrays") or {}
        features = [name for name in arrays if name.startswith("features.")]
        return tuple(name.split(".", 1)[1].rsplit(".", 1)[0] for name in features)

    @property
    def aligned(self) -> bool:
        return bool(self.teachers)

    @property
    def scored(self) -> list[SampleSet]:
        return [s for s in self.samples if s.distance is not None]

    def setting(self, name: str) -> Any:
        """A setting of `repa train`, None when it is not recorded."""
        decided = dig(self.record, "decided", "settings", name)
        return dig(self.record, "config", name) if decided is None else decided

    def values(self, name: str) -> list[float]:
        """A logged number, event by event."""
        return self.curve(name)[1]

    def median(self, name: str) -> float | None:
        """Median of a logged number over the events."""
        values = self.values(name)
        return statistics.median(values) if values else None

    def peak(self, name: str) -> float | None:
        """Largest value of a logged number."""
        return max(self.values(name), default=None)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a logged number; empty when it was never logged."""
        points = [(e["step"], e[name]) for e in self.scalars if is_number(e.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    def last(self) -> dict[str, float]:
        """The last logged losses and gradient norm."""
        event = self.scalars[-1] if self.scalars else {}
        hidden = ("event", "step", *_PACE)
        return {
            name: value
            for name, value in event.items()
            if name not in hidden and isinstance(value, int | float) and not is_bucket(name)
        }

    def names(self) -> list[str]:
        """What was logged at least once, in the order of the first time."""
        return list(dict.fromkeys(name for event in self.scalars for name in event))

    def by_time(self, name: str) -> tuple[list[float], list[float]]:
        """(middles of the buckets of t, means) of a loss in the last interval that has any."""
        for event in reversed(self.scalars):
            found = []
            for key, value in event.items():
                bucket = _BUCKET.fullmatch(key)
                if bucket and bucket[1] == name and is_number(value):
                    found.append(((float(bucket[2]) + float(bucket[3])) / 2, value))
            if found:
                found.sort()
                return [t for t, _ in found], [value for _, value in found]
        return [], []


def is_bucket(name: str) -> bool:
    """Whether a logged number is a mean over a part of the times t: "denoising/t0.0-0.1"."""
    return _BUCKET.fullmatch(name) is not None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_runs(config: CommonConfig) -> list[RunFacts]:
    """All runs of the workspace, by name."""
    return [_read_run(run) for run in list_runs(config)]


def _read_run(run: Run) -> RunFacts:
    remarks: list[str] = []
    record = _read_json(run.folder / "run.json", remarks) or {}
    path = run.folder / "events.jsonl"
    events = read_events(path) if path.is_file() else []
    events = [e for e in events if isinstance(e, dict) and isinstance(e.get("step"), int)]
    scalars = [event for event in events if event.get("event") == "scalars"]
    refused = [e for e in events if e.get("event") == "checkpoint_refused"]
    remarks += [f"step {e['step']:,}: checkpoint refused: {e.get('reason')}" for e in refused]
    skipped = scalars[-1].get("skipped_steps") if scalars else None
    if skipped:
        remarks.append(f"{skipped:,.0f} steps were skipped")
    remarks += [words for kind in ("preview", "evaluation") for words in _not_made(events, kind)]
    scores = [event for event in events if event.get("event") == "evaluation"]
    scores.sort(key=lambda event: event["step"])
    found = [_read_samples(path) for path in sorted(run.folder.glob("samples/*/"))]
    found.sort(key=lambda samples: (samples.step or 0, samples.folder.name))
    return RunFacts(run, record, scalars, scores, tuple(found), tuple(remarks))


def _not_made(events: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """How many previews or evaluations failed, and why the last one did."""
    failed = [event for event in events if event.get("event") == f"{kind}_skipped"]
    if not failed:
        return []
    last = failed[-1]
    count = f"{len(failed)} {kind}s were" if len(failed) > 1 else f"1 {kind} was"
    return [f"{count} skipped; of step {last['step']:,}: {last.get('reason')}"]


def _read_samples(folder: Path) -> SampleSet:
    from repa_pipeline.stages.sample import read_settings

    remarks: list[str] = []
    result = _read_json(folder / "result.json", remarks)
    judge = _read_json(folder / "judge.json", remarks)
    settings = dig(result, "sample_settings")
    try:
        sealed = read_settings(str(folder))
    except RepaError as error:
        sealed = None
        if result is None:
            remarks.append(str(error))
    if result is not None and sealed is not None and not _is_of(sealed, settings or {}):
        remarks.append("result.json is of other samples: run `repa evaluate` again")
        result = None
    return SampleSet(folder, sealed or settings, result, judge, tuple(remarks))


def _is_of(sealed: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether settings in a result are of these samples; those of pictures say the format too."""
    return all(settings.get(name) == value for name, value in sealed.items() if name != "kind")


def _read_json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    """A JSON object, None when there is none; what is wrong with the file goes to `remarks`."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    remarks.append(f"{path.name} cannot be read: make it again")
    return None
