"""Whether a planned cache pays: in device hours, and in money where the user gave prices."""

from __future__ import annotations

import dataclasses
import math

from repa_pipeline.stages.plan import CachePlan, Training, Workload, epoch_gets
from repa_pipeline.text import count, hours, number


@dataclasses.dataclass(frozen=True)
class Prices:
    """The user's own, in his currency; what is not given costs nothing and is not printed.

    device_hour: a device for an hour. gb_month: 10**9 bytes stored for a month. get_1000,
    put_1000: a thousand requests. months: how long the cache is kept.
    """

    currency: str = ""
    device_hour: float = 0.0
    gb_month: float = 0.0
    get_1000: float = 0.0
    put_1000: float = 0.0
    months: float = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`cache` is None where there is nothing to weigh; `why` is one line."""

    cache: bool | None
    why: str


def money(plan: CachePlan, work: Workload, prices: Prices) -> dict[str, float]:
    """Costs in the user's currency, by what they are for; empty without prices."""
    training = plan.training
    gets = training.epoch_gets * work.epochs if training else 0.0
    saved = training.saved_hours if training and work.teachers else 0.0
    requests = plan.source_gets * prices.get_1000 + plan.puts * prices.put_1000
    costs = {
        "devices while encoding": plan.encoding.held_hours * prices.device_hour,
        "requests while encoding": requests / 1000,
        "storage, a month": plan.num_bytes / 1e9 * prices.gb_month,
        "requests, a run": gets * prices.get_1000 / 1000,
        "devices, saved a run": saved * prices.device_hour,
    }
    return {name: cost for name, cost in costs.items() if cost}


def break_even_in_money(plan: CachePlan, work: Workload, prices: Prices) -> float | None:
    """Runs after which the teachers' arrays have paid for themselves, storage and requests
    included; infinite where a run saves nothing, None without a price of devices."""
    if not prices.device_hour or plan.training is None or not work.teachers:
        return None
    saved = plan.training.saved_hours * prices.device_hour
    saved -= epoch_gets(work.features) * work.epochs * prices.get_1000 / 1000
    return _features_cost(plan, work, prices) / saved if saved > 0 else math.inf


def verdict(plan: CachePlan, work: Workload, prices: Prices) -> Verdict:
    """Whether to cache the teachers' tokens for the planned runs, and why.

    Hours decide; with a price of devices, money does.
    """
    training = plan.training
    if not work.teachers:
        return Verdict(None, "nothing to weigh: no teacher, and every run needs the latents")
    if training is None:
        return Verdict(None, "not weighed: the rate of training is unknown")
    if training.saved_hours <= 0:
        return Verdict(
            False,
            f"do not cache: the store delivers {number(training.cached_rate)} images/s a device "
            f"from the cache, and {number(training.online_rate)} are trained with the teacher "
            "online; a smaller codec or a copy on local disks would change that",
        )
    in_money = break_even_in_money(plan, work, prices)
    runs = training.break_even_runs if in_money is None else in_money
    if in_money is None:
        balance = (
            f"the features cost {hours(plan.encoding.feature_hours)} of devices once and save "
            f"{hours(training.saved_hours)} a run"
        )
    else:
        balance = _balance(plan, work, prices, training)
    if runs > work.runs:
        return Verdict(False, f"do not cache: {balance}, {_after(runs, work)}")
    return Verdict(True, f"cache: {balance}, {_after(runs, work)}")


def _after(runs: float, work: Workload) -> str:
    """When that has paid, in epochs of training, and how many are planned."""
    planned = f"{count(work.runs, 'run')} of {number(work.epochs)} epochs planned"
    if math.isinf(runs):
        return f"which never pays, however many runs ({planned})"
    return f"paid after {number(runs * work.epochs)} epochs of training ({planned})"


def _features_cost(plan: CachePlan, work: Workload, prices: Prices) -> float:
    """What the teachers' arrays cost until they are deleted."""
    num_bytes = sum(array.num_bytes for array in work.features)
    puts = sum(2 * array.num_shards + 2 for array in work.features)
    devices = plan.encoding.feature_hours * prices.device_hour
    storage = num_bytes / 1e9 * prices.gb_month * prices.months
    return devices + puts * prices.put_1000 / 1000 + storage


def _balance(plan: CachePlan, work: Workload, prices: Prices, training: Training) -> str:
    saved = training.saved_hours * prices.device_hour
    gets = epoch_gets(work.features) * work.epochs * prices.get_1000 / 1000
    unit = f" {prices.currency}" if prices.currency else ""
    months = f"{prices.months:g} month{'' if prices.months == 1 else 's'}"
    return (
        f"the features cost {_features_cost(plan, work, prices):,.2f}{unit} (stored for "
        f"{months}) and save {saved:,.2f} of devices less {gets:,.2f} of requests "
        "a run"
    )
