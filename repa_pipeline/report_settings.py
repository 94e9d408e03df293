"""The report's part about settings: in which of them the runs differ, and all of each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_pipeline.report_html import Html, facts, flat, folded, join, missing_text, table, tag
from repa_pipeline.report_results import RunFacts, dig
from repa_pipeline.report_training import run_name

# Where a run lies, how it is watched, and what is said by other rows already.
_HOUSEKEEPING = (
    *("name", "workspace", "runs_dir", "source", "checkpoints", "address", "executor", "plugins"),
    *("overrides", "settings_file", "preset", "dry_run", "resume", "tensorboard", "wandb"),
    *("peak_tflops", "local_copy", "scratch", "encoder", "autoencoder", "method", "preview_every"),
    *("preview_count", "evaluate_every", "evaluate_count", "keep", "keep_every"),
)
_DIGEST = 64
_NOT_RECORDED = "not recorded"


def settings_section(runs: Sequence[RunFacts]) -> Html:
    """What differs between the runs in one table, and all that decides each run's curve."""
    parts = [tag("h2", "Settings of the runs")]
    if len(runs) > 1:
        parts.append(_difference_table(runs))
    for run in runs:
        decided = dig(run.record, "decided")
        content = facts(decided) if decided else missing_text(_NOT_RECORDED)
        parts.append(folded(f"{run.name}: what decides its curve", content))
    return join(parts)


def differences(runs: Sequence[RunFacts]) -> dict[str, list[str | None]]:
    """Settings in which the runs differ: the text of each run's value, None where it has none."""
    described = [_described(run) for run in runs]
    names = dict.fromkeys(name for settings in described for name in settings)
    values = {name: [settings.get(name) for settings in described] for name in names}
    return {name: found for name, found in sorted(values.items()) if len(set(found)) > 1}


def _described(run: RunFacts) -> dict[str, str]:
    """Every setting as text, under the name of its flag; digests in short."""
    decided = {k: v for k, v in (dig(run.record, "decided") or {}).items() if k != "settings"}
    settings = {
        **(dig(run.record, "config") or {}),
        **(dig(run.record, "decided", "settings") or {}),
    }
    kept: dict[str, Any] = {k: v for k, v in settings.items() if k not in _HOUSEKEEPING}
    if isinstance(decided.get("model"), dict):
        decided["model entry"] = decided.pop("model")
    decided.pop("model", None)
    return {name: _in_short(value) for name, value in flat({**kept, **decided})}


def _in_short(value: str) -> str:
    is_digest = len(value) == _DIGEST and set(value) <= set("0123456789abcdef")
    return value[:8] if is_digest else value


def _cell(name: str, value: str | None) -> Any:
    if value is not None:
        return value
    return "none" if name.startswith("data.") else missing_text(_NOT_RECORDED)


def _difference_table(runs: Sequence[RunFacts]) -> Html:
    found = differences(runs)
    if not found:
        return tag("p", "The runs do not differ in any setting.", "quiet")
    rows = [
        (
            run_name(runs, run),
            *(_cell(name, values[i]) for name, values in found.items()),
        )
        for i, run in enumerate(runs)
    ]
    note = "Only what differs between them. Digests of data in short."
    return join([table(("run", *found), rows, ()), tag("p", note, "quiet")])
