"""`repa plan`: prints what a cache costs and saves."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.stages.plan import DECODING, CachePlan, Encoding, Shape, Training, plan_cache
from repa_pipeline.stages.plan_inputs import Facts, find_facts, find_shape
from repa_pipeline.stages.plan_rates import (
    FoundRates,
    GivenRates,
    find_rates,
    probe_of,
    read_rates,
    unknown_rates,
)
from repa_pipeline.stages.plan_verdict import Prices, break_even_in_money, money, verdict
from repa_pipeline.text import count, hours, number, size


@dataclasses.dataclass(frozen=True)
class Planned:
    """Everything that is printed."""

    config: PlanConfig
    facts: Facts
    shape: Shape
    found: FoundRates
    prices: Prices
    plan: CachePlan


def plan(config: PlanConfig) -> None:
    """`repa plan`; raises RepaError for settings that no cache can have."""
    facts, given, shape = find_facts(config), read_rates(config), find_shape(config)
    if config.dry_run:
        lines = _dry_run(config, facts, given)
        _say([json.dumps({"would_measure": unknown_rates(facts.work, given)})] * config.json)
        _say(lines * (not config.json))
        return
    found = find_rates(config, facts.work, given, facts.images.files)
    estimate = plan_cache(facts.work, shape, found.rates)
    planned = Planned(config, facts, shape, found, given.prices, estimate)
    _say([json.dumps(as_json(planned))] if config.json else as_text(planned))


def as_json(planned: Planned) -> dict[str, Any]:
    """The whole estimate as one JSON object; what is infinite or unknown is null."""
    work, images, prices = planned.facts.work, planned.facts.images, planned.prices
    decided = verdict(planned.plan, work, prices)
    arrays = {
        array.name: {"bytes": array.num_bytes, "shards": array.num_shards} for array in work.arrays
    }
    found: dict[str, Any] = _finite(
        {
            "num_images": work.num_images,
            "images_from": images.images_from,
            "source_bytes": work.source_bytes,
            "source_gets_from": images.gets_from,
            "resolution": planned.config.resolution,
            "arrays": arrays,
            "shape": {**dataclasses.asdict(planned.shape), "nodes": planned.shape.nodes},
            "rates": dataclasses.asdict(planned.found.rates),
            "origins": dict(planned.found.origins),
            "measured_on": planned.found.measured_on,
            "epochs": work.epochs,
            "runs": work.runs,
            "plan": dataclasses.asdict(planned.plan),
            "money": {"currency": prices.currency, **money(planned.plan, work, prices)},
            "break_even_runs_in_money": break_even_in_money(planned.plan, work, prices),
            "cache": decided.cache,
            "verdict": decided.why,
        }
    )
    return found


def as_text(planned: Planned) -> list[str]:
    """The estimate for people."""
    sections = [_about(planned), _stored(planned), _rates(planned)]
    sections += [_encoding(planned), _training(planned)]
    costs = money(planned.plan, planned.facts.work, planned.prices)
    if costs:
        currency = planned.prices.currency or "in the currency of the prices"
        rows = [(name, f"{cost:,.2f}") for name, cost in costs.items()]
        sections.append([f"money, {currency}", *_table(rows, "<>")])
    sections.append([verdict(planned.plan, planned.facts.work, planned.prices).why])
    return [line for section in sections for line in (*section, "")][:-1]


def _about(planned: Planned) -> list[str]:
    work, shape, config = planned.facts.work, planned.shape, planned.config
    cores = "" if config.cores_per_node else " (as this machine; --cores-per-node says others)"
    return [
        f"{work.num_images:,} images ({planned.facts.images.images_from}) at {config.resolution} "
        f"pixels, {size(work.source_bytes)} of files",
        f"{count(shape.devices, 'device')} on {count(shape.nodes, 'node')} with "
        f"{count(shape.cores_per_node, 'CPU core')} each{cores}",
    ]


def _stored(planned: Planned) -> list[str]:
    plan, images = planned.plan, planned.facts.images
    rows = [("", "bytes", "an image", "shards")]
    for array in planned.facts.work.arrays:
        record = size(array.layout.record_bytes)
        rows.append((array.name, size(array.num_bytes), record, f"{array.num_shards:,}"))
    rows.append(("together", size(plan.num_bytes), "", f"{_num_shards(planned):,}"))
    passes = "encoding" if images.is_indexed else "index and encoding"
    return [
        "cache",
        *_table(rows, "<>>>"),
        f"  {plan.num_objects:,} objects with their records, metadata and index; "
        f"{plan.puts:,} PUTs",
        f"  {plan.source_gets:,} GETs of the source for {passes} ({images.gets_from})",
    ]


def _num_shards(planned: Planned) -> int:
    return sum(array.num_shards for array in planned.facts.work.arrays)


def _rates(planned: Planned) -> list[str]:
    rates, origins = planned.found.rates, planned.found.origins
    rows = [
        (name, f"{number(rate)} images/s a device", origins[name])
        for name, rate in rates.networks.items()
    ]
    rows.append(("decoding", f"{number(rates.decode)} images/s a core", origins["decode"]))
    model = f"training {planned.config.model}"
    train = "-" if rates.train is None else f"{number(rates.train)} images/s a device"
    rows.append((model, train, origins["train"]))
    for name, rate in (("store, read", rates.read), ("store, write", rates.write)):
        given = (f"{size(rate)}/s a node", "given") if rate else ("-", "not given: no limit")
        rows.append((name, *given))
    where = planned.found.measured_on
    measured = f", measured on this machine's {where}" if where else ""
    return [f"rates{measured}", *_table(rows, "<><")]


def _encoding(planned: Planned) -> list[str]:
    encoding: Encoding = planned.plan.encoding
    devices = planned.shape.devices
    computed = sum(encoding.compute_hours.values())
    rows = [(name, hours(value), "of one device") for name, value in encoding.compute_hours.items()]
    if encoding.index_hours:
        rows.insert(0, ("index", hours(encoding.index_hours), "before it, on the CPUs alone"))
    rows.append(("wall time", hours(encoding.wall_hours), f"limited by {encoding.bottleneck}"))
    held = f"of device time, {computed / encoding.held_hours:.0%} of it computing"
    if encoding.enough_devices < devices:
        enough = count(encoding.enough_devices, "device")
        held += f"; {enough} on the same nodes would be as fast"
    if encoding.bottleneck == DECODING:
        held += "; more cores would be faster"
    rows.append(("devices held", hours(encoding.held_hours), held))
    return ["encoding", *_table(rows, "<><")]


def _training(planned: Planned) -> list[str]:
    config, work = planned.config, planned.facts.work
    training = planned.plan.training
    title = (
        f"training {config.model}: {config.train_steps:,} steps of {config.train_batch} images, "
        f"{number(work.epochs)} epochs"
    )
    if training is None or planned.found.rates.train is None:
        return [title, "  left out: the rate of training is unknown (see rates)"]
    wall = training.cached_hours / planned.shape.devices
    rows = [
        (
            "from the cache",
            f"{number(training.cached_rate)} images/s a device",
            f"{hours(training.cached_hours)} of devices a run, {hours(wall)} of wall time",
        )
    ]
    if work.teachers:
        rows += _online(training, work.teachers)
    unread = any(array.name.endswith(".scale") for array in work.arrays)
    without = " (a run that needs directions alone leaves the .scale out)" if unread else ""
    return [
        title,
        *_table(rows, "<><"),
        f"  reads {size(training.required_read)}/s a node at {number(planned.found.rates.train)} "
        f"images/s a device, {training.epoch_gets:,} GETs of 16 MiB an epoch{without}",
    ]


def _online(training: Training, teachers: Sequence[str]) -> list[tuple[str, str, str]]:
    online_hours = training.cached_hours + training.saved_hours
    share = training.saved_hours / online_hours
    word = "teacher" if len(teachers) == 1 else "teachers"
    gained = "saved" if share >= 0 else "lost"
    return [
        (
            f"with the {word} online",
            f"{number(training.online_rate)} images/s a device",
            f"{hours(online_hours)} of devices a run; "
            f"decoding takes {count(math.ceil(training.online_cores), 'core')} a node, not counted",
        ),
        (
            f"{gained} by the cache",
            f"{abs(share):.1%}",
            f"{hours(abs(training.saved_hours))} of devices a run",
        ),
    ]


def _dry_run(config: PlanConfig, facts: Facts, given: GivenRates) -> list[str]:
    unknown = unknown_rates(facts.work, given)
    first = (
        f"would plan {count(len(facts.work.arrays), 'array')} of {facts.work.num_images:,} images "
        f"({facts.images.images_from})"
    )
    if not unknown:
        return [first, "would measure nothing: all rates are given"]
    if not config.probe:
        return [first, f"would refuse: no rate for {', '.join(unknown)}, and --no-probe"]
    return [first, f"would measure {', '.join(unknown)} on {probe_of(config).where()}"]


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Rows of cells as indented lines; each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    return [
        "  "
        + "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, alignment, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stdout, flush=True)
