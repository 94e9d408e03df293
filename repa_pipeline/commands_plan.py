"""`repa plan`: prints what a cache costs and saves."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.stages.plan import CachePlan, Prices, Rates, Shape, money, plan_cache, verdict
from repa_pipeline.stages.plan_inputs import Facts, find_facts, find_rates, find_shape
from repa_pipeline.text import count, size


def plan(config: PlanConfig) -> None:
    """`repa plan`; raises RepaError for settings that no cache can have."""
    facts = find_facts(config)
    rates, prices, origins = find_rates(config, facts.work)
    shape = find_shape(config)
    planned = plan_cache(facts.work, shape, rates)
    if config.json:
        _say(json.dumps(as_json(facts, shape, rates, prices, origins, planned)))
        return
    for line in lines(config, facts, shape, rates, prices, origins, planned):
        _say(line)


def as_json(
    facts: Facts,
    shape: Shape,
    rates: Rates,
    prices: Prices,
    origins: dict[str, str],
    planned: CachePlan,
) -> dict[str, Any]:
    """The whole estimate as one JSON object."""
    pays, why = verdict(planned, facts.work.runs)
    return {
        "num_images": facts.work.num_images,
        "images_from": facts.images_from,
        "arrays": {array.name: array.num_bytes for array in facts.work.arrays},
        "shape": dataclasses.asdict(shape),
        "rates": dataclasses.asdict(rates),
        "origins": origins,
        "plan": dataclasses.asdict(planned),
        "money": {"currency": prices.currency, **money(planned, prices)},
        "cache": pays,
        "verdict": why,
    }


def lines(
    config: PlanConfig,
    facts: Facts,
    shape: Shape,
    rates: Rates,
    prices: Prices,
    origins: dict[str, str],
    planned: CachePlan,
) -> list[str]:
    """The estimate for people."""
    work = facts.work
    cluster = f"{count(shape.devices, 'device')} on {count(shape.nodes, 'node')}"
    found = [
        f"{work.num_images:,} images ({facts.images_from}), {config.resolution} pixels, "
        f"{size(work.source_bytes)} of source; {cluster} of {shape.cores_per_node} cores",
        "",
        "stored",
    ]
    found += [
        f"  {array.name}: {size(array.num_bytes)} in {count(array.num_shards, 'object')}"
        for array in work.arrays
    ]
    found += [
        f"  together {size(planned.num_bytes)}, {planned.puts:,} PUTs; the source is read with "
        f"{planned.source_gets:,} GETs (index and encoding)",
        "",
        f"encoded in {_hours(planned.wall_hours)} of wall time, limited by {planned.bottleneck}",
    ]
    found += [
        f"  {name}: {_hours(hours)} of one device at {rates.networks[name]:,.4g} images/s "
        f"({origins[name]})"
        for name, hours in planned.device_hours.items()
    ]
    found += [
        f"  decoding: {rates.decode:,.4g} images/s a core ({origins['decode']})",
        "",
        f"trained on: {config.train_steps:,} steps of {config.train_batch} images, {config.model} "
        f"at {rates.train:,.4g} images/s a device ({origins['train']})",
        f"  reads {size(planned.required_read)}/s a node, {planned.epoch_gets:,} GETs of 16 MiB "
        "an epoch" + (f"; the store gives {size(rates.read)}/s" if rates.read else ""),
        f"  {planned.cached_rate:,.4g} images/s a device from the cache, "
        f"{planned.online_rate:,.4g} with the teacher in the step: "
        f"{_hours(planned.saved_hours_per_run)} of devices saved a run",
    ]
    costs = money(planned, prices)
    if costs:
        shown = "; ".join(f"{name} {cost:,.2f}" for name, cost in costs.items())
        found += ["", f"money ({prices.currency or 'as given'}): {shown}"]
    return [*found, "", verdict(planned, work.runs)[1]]


def _hours(hours: float) -> str:
    sign, hours = ("-" if hours < 0 else ""), abs(hours)
    if hours < 1 / 60:
        return f"{sign}{hours * 3600:.3g} s"
    return f"{sign}{hours * 60:.3g} min" if hours < 1 else f"{sign}{hours:,.4g} h"


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
