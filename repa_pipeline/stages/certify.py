"""`repa certify`: the published numbers again, as far as you have the files.

evaluator        ADM's published pair: its five numbers within EVAL's tolerances
sampler, plain   the published SiT-XL/2 + REPA checkpoint (4M steps), 50,000 SDE samples: FID 5.9
sampler, guided  the same at guidance 1.8 on t in [0, 0.7]: FID 1.42
trainer          SiT-B/2 + REPA at 400,000 steps: FID 21.5 to 24.5

A part is PASS, FAIL or NOT RUN with the reason; nothing is claimed of one that was not run. Exit
code: 0 when at least one part ran, all that ran passed, and every part that files were given for
ran; 1 when one failed; 3 when nothing failed, but nothing or not all that was asked for was run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.config_evaluate import AUTO, CertifyConfig, EvaluateConfig, ScoreConfig
from repa_pipeline.data.objects import json_bytes, open_store
from repa_pipeline.errors import RepaError
from repa_pipeline.metrics.adm_file import read_reference_statistics
from repa_pipeline.metrics.published import NUM_SAMPLES
from repa_pipeline.stages.reference_file import about_of

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"
EXIT_FAILED, EXIT_NOT_RUN = 1, 3
FILE = "certify.json"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A published value and the range that counts as it."""

    published: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, tolerance: float) -> Limit:
        return cls(value, value - tolerance, value + tolerance)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part needs, must be of, and must give.

    samples: the setting with its samples. guidance: settings of `repa sample` that make them of
    --checkpoint, None where it cannot. made: what the samples' own settings must say. kind: what
    the result must be called.
    """

    name: str
    samples: str
    limits: Mapping[str, Limit]
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance: Mapping[str, Any] | None = None
    kind: str = "FID"
    num_samples: int = NUM_SAMPLES


# Balanced classes alone are worth 0.1 of FID; a weaker model's guidance is another method.
_SDE = {"sampler": "sde", "num_steps": 250, "labels": "random", "use_ema": True, "guide": None}
_PLAIN, _GUIDED = {"cfg": 1.0}, {"cfg": 1.8, "interval": [0.0, 0.7]}

# Tolerances of the sampler: one run's noise of 1 to 2 %, and the rounding of the printed number.
PARTS: tuple[Part, ...] = (
    Part(
        "evaluator",
        "adm_samples",
        {
            "frechet_distance": Limit.around(3.943, 0.005),
            "spatial_frechet_distance": Limit.around(6.140, 0.005),
            "inception_score": Limit.around(215.84, 0.3),
            "precision": Limit.around(0.8265, 0.002),
            "recall": Limit.around(0.5309, 0.004),
        },
    ),
    Part(
        "sampler, plain",
        "plain",
        {"frechet_distance": Limit.around(5.9, 0.2)},
        {"model": "SiT-XL/2", **_SDE, **_PLAIN},
        _PLAIN,
    ),
    Part(
        "sampler, guided",
        "guided",
        {"frechet_distance": Limit.around(1.42, 0.06)},
        {"model": "SiT-XL/2", **_SDE, **_GUIDED},
        _GUIDED,
    ),
    Part(
        "trainer",
        "trained",
        {"frechet_distance": Limit(24.4, 21.5, 24.5)},
        {"model": "SiT-B/2", "step": 400_000, **_SDE, **_PLAIN},
    ),
)

Score = Callable[[EvaluateConfig], Mapping[str, Any]]
# (checkpoint, settings that differ from SDE 250 and 50,000 images) -> sample folder
Sample = Callable[[str, Mapping[str, Any]], str]


def certify(
    config: CertifyConfig, score: Score, sample: Sample, parts: Sequence[Part] = PARTS
) -> dict[str, Any]:
    """Runs the parts that there are files for; writes and returns what came of all of them."""
    told = [_run(config, part, score, sample) for part in parts]
    verdicts = [part["verdict"] for part in told]
    result = {
        "parts": told,
        "certified": [part["part"] for part in told if part["verdict"] == PASS],
        "exit_code": _exit_code(told, verdicts),
    }
    output = Path(config.output) if config.output else None
    store = open_store(str(output.parent)) if output else open_store(config.workspace)
    store.put(output.name if output else FILE, json_bytes(result))
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """What came of the parts, for people."""
    told = []
    for part in result["parts"]:
        told.append(f"{part['verdict']:8} {part['part']}: {part['because']}")
        for name, number in part["numbers"].items():
            told.append(
                f"{'':8} {name} {number['value']:.4g}, published {number['published']:g}, "
                f"{number['low']:g} to {number['high']:g}: {'ok' if number['ok'] else 'outside'}"
            )
    certified = ", ".join(result["certified"]) or "nothing"
    return [*told, f"certified: {certified}; of all else nothing is claimed"]


def _exit_code(told: Sequence[Mapping[str, Any]], verdicts: Sequence[str]) -> int:
    if FAIL in verdicts:
        return EXIT_FAILED
    left = [part for part in told if part["asked"] and part["verdict"] == NOT_RUN]
    return EXIT_NOT_RUN if left or PASS not in verdicts else 0


def why_not(config: CertifyConfig, part: Part) -> str | None:
    """Why a part cannot run, as settings and files tell before any work; None where it can."""
    asked = _asked(config, part)
    needed = ["adm_reference"] if asked else [part.samples, "adm_reference"]
    missing = [_flag(name) for name in needed if not getattr(config, name)]
    if missing:
        or_checkpoint = " (or --checkpoint)" if part.guidance is not None and not asked else ""
        return f"not given: {', '.join(missing)}{or_checkpoint}"
    name = part.samples if getattr(config, part.samples) else "checkpoint"
    where = str(getattr(config, name))
    if "://" not in where and not Path(where).exists():
        return f"no file or folder {where}: check {_flag(name)}"
    return _why_not_reference(Path(str(config.adm_reference)))


def _why_not_reference(path: Path) -> str | None:
    """50,000 samples are not made for a reference that is none."""
    try:
        about = about_of(path)
        read_reference_statistics(path)
    except RepaError as error:
        return str(error)
    if about is not None and about["kind"] != "adm":
        return f"{path} is a reference of other images than ADM's: check --adm-reference"
    return None


def _asked(config: CertifyConfig, part: Part) -> bool:
    from_checkpoint = part.guidance is not None and config.checkpoint is not None
    return bool(getattr(config, part.samples)) or from_checkpoint


def _run(config: CertifyConfig, part: Part, score: Score, sample: Sample) -> dict[str, Any]:
    told: dict[str, Any] = {"part": part.name, "asked": _asked(config, part), "numbers": {}}
    because = why_not(config, part)
    if because is not None:
        return {**told, "verdict": NOT_RUN, "because": because}
    given = getattr(config, part.samples)
    try:
        samples = given or sample(str(config.checkpoint), dict(part.guidance or {}))
        result = score(_score_config(config, samples))
    except RepaError as error:
        return {**told, "verdict": NOT_RUN, "because": str(error)}
    return {**told, "result": result["path"], **_judged(part, result)}


def _judged(part: Part, result: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a result: of other samples than the part speaks of it is none."""
    settings = result["sample_settings"] or {}
    other = [
        f"{name} is {settings.get(name)!r}, expected {value!r}"
        for name, value in part.made.items()
        if settings.get(name) != value
    ]
    if result["num_samples"] != part.num_samples:
        other.append(f"{result['num_samples']:,} samples, expected {part.num_samples:,}")
    if result["kind"] != part.kind:
        other.append(f"the distance is a {result['kind']}, expected {part.kind}")
    if other:
        return {"verdict": NOT_RUN, "because": "these are other samples: " + "; ".join(other)}
    numbers = {}
    for name, limit in part.limits.items():
        value = result["metrics"][name]
        inside = value is not None and limit.low <= value <= limit.high
        numbers[name] = {"value": value, **dataclasses.asdict(limit), "ok": inside}
    failed = [name for name, number in numbers.items() if not number["ok"]]
    because = f"outside the range: {', '.join(failed)}" if failed else "within the ranges"
    return {"verdict": FAIL if failed else PASS, "because": because, "numbers": numbers}


def _score_config(config: CertifyConfig, samples: str) -> EvaluateConfig:
    """As the published numbers were computed: float16 distances, the FID network."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(ScoreConfig)}
    network = "inception-v3" if config.network == AUTO else config.network
    parity = {"network": network, "pr_mode": "adm_fp16", "kid_subsets": 0}
    return EvaluateConfig(**{**shared, **parity}, samples=samples, reference=config.adm_reference)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
