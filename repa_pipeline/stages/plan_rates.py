"""The rates of `repa plan`: those of the user's TOML file, and measured ones for the rest."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.registry import autoencoder_spec, encoder_spec, load_plugins, model_spec
from repa_pipeline.stages.flops import encoder_flops, training_flops
from repa_pipeline.stages.plan import Rates, Workload
from repa_pipeline.stages.plan_verdict import Prices
from repa_pipeline.stages.probe import Probe
from repa_pipeline.text import number

GIVEN = "given"
_SPEEDS = ("decode", "train", "read", "write")


@dataclasses.dataclass(frozen=True)
class GivenRates:
    """What a rates file says: speeds by key, those of networks by table name, prices."""

    speeds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    networks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prices: Prices = dataclasses.field(default_factory=Prices)


@dataclasses.dataclass(frozen=True)
class FoundRates:
    """Rates, where each comes from, and what was measured on ("" where nothing was)."""

    rates: Rates
    origins: Mapping[str, str]
    measured_on: str = ""


def read_rates(config: PlanConfig) -> GivenRates:
    """The file at `config.rates`; nothing is given without one.

    Raises MissingError without that file, ConfigError for what is no TOML, an unknown key or a
    value that is no rate or price.
    """
    if config.rates is None:
        return GivenRates()
    path = config.rates
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingError(f"no rates file {path}: check --rates") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}): docs/plan.md shows a rates file") from None
    networks, prices = _section(path, content, "networks"), _section(path, content, "prices")
    _check_known(path, "", content, (*_SPEEDS, "networks", "prices"))
    speeds = {key: _rate(path, key, value) for key, value in content.items() if key in _SPEEDS}
    named = {}
    for name, value in networks.items():
        named[_network(config, path, name)] = _rate(path, f"networks.{name}", value)
    return GivenRates(speeds, named, _prices(path, prices))


def unknown_rates(work: Workload, given: GivenRates) -> list[str]:
    """What is not given and has to be measured: names of networks, "decode"."""
    networks = [name for name in work.networks if name not in given.networks]
    return networks + ([] if "decode" in given.speeds else ["decode"])


def probe_of(config: PlanConfig) -> Probe:
    """The measurements as `repa encode` would compute with these settings."""
    return Probe(
        device=config.device,
        dtype=config.dtype,
        compile=config.compile,
        threads=config.threads,
        resolution=config.resolution,
        batch=config.batch_size,
    )


def find_rates(
    config: PlanConfig, work: Workload, given: GivenRates, files: Sequence[bytes] = ()
) -> FoundRates:
    """All rates: given ones win, others are measured now; `files` are images to decode.

    Raises MissingError for one that is neither given nor to be had.
    """
    unknown = unknown_rates(work, given)
    if unknown and not config.probe:
        keys = [name if name == "decode" else f"networks.{name}" for name in unknown]
        raise MissingError(
            f"no rate for {', '.join(unknown)}: give {', '.join(keys)} in a --rates file "
            "(docs/plan.md), or leave out --no-probe"
        )
    probe = probe_of(config)
    values, origins = _measured(config, work, probe, unknown, files)
    values |= {**given.networks, **given.speeds}
    networks = {name: values[name] for name in work.networks}
    origins = {name: origins.get(name, GIVEN) for name in (*networks, "decode")}
    train, origins["train"] = _train_rate(config, work, networks, given)
    rates = Rates(
        networks=networks,
        decode=values["decode"],
        train=train,
        read=given.speeds.get("read", 0.0),
        write=given.speeds.get("write", 0.0),
    )
    return FoundRates(rates, origins, probe.where() if unknown else "")


def _measured(
    config: PlanConfig,
    work: Workload,
    probe: Probe,
    unknown: Sequence[str],
    files: Sequence[bytes],
) -> tuple[dict[str, float], dict[str, str]]:
    """(rates, origins) of what is unknown."""
    values, origins = {}, {}
    for name in unknown:
        if name == "decode":
            measured = probe.decode(files)
        elif name in work.teachers:
            measured = probe.encoder(encoder_spec(config, name))
        else:
            measured = probe.autoencoder(autoencoder_spec(config, name))
        values[name], origins[name] = measured.rate, f"measured: {measured.how}"
    return values, origins


def _train_rate(
    config: PlanConfig, work: Workload, networks: Mapping[str, float], given: GivenRates
) -> tuple[float | None, str]:
    """Images/s of training, and where it comes from.

    Where it is not given: at as many operations a second as the teachers reach, so at the same
    share of the device's peak. None without a teacher.
    """
    if "train" in given.speeds:
        return given.speeds["train"], GIVEN
    if not work.teachers:
        return None, "unknown: there is no teacher to derive it from; give `train` in --rates"
    resolution = config.resolution
    latents = autoencoder_spec(config, config.autoencoder)
    step = training_flops(model_spec(config, config.model), latents, resolution)
    teachers = [encoder_flops(encoder_spec(config, name), resolution) for name in work.teachers]
    speed = sum(teachers) / sum(1 / networks[name] for name in work.teachers)
    names = " and ".join(work.teachers)
    origin = (
        f"derived: {number(step / 1e9)} GFLOP an image at {number(speed / 1e9)} GFLOP/s, as "
        f"{names} (the same share of the device's peak)"
    )
    return speed / step, origin


def _section(path: str, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {key} is {section!r}, expected a section [{key}]")
    return section


def _check_known(path: str, where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{where}{key}': known are {', '.join(known)}")


def _network(config: PlanConfig, path: str, name: str) -> str:
    """The table name of a network, which may be given by an alias."""
    load_plugins(config.plugins)
    if name in ENCODERS:
        return ENCODERS[name].name
    if name in AUTOENCODERS:
        return AUTOENCODERS[name].name
    raise ConfigError(
        f"{path}: [networks] has '{name}', which is no encoder and no autoencoder: "
        f"known are {', '.join(sorted([*ENCODERS, *AUTOENCODERS]))}"
    )


def _prices(path: str, given: Mapping[str, Any]) -> Prices:
    known = [field.name for field in dataclasses.fields(Prices)]
    _check_known(path, "prices.", given, known)
    for key, value in given.items():
        if key == "currency" and not isinstance(value, str):
            raise ConfigError(f"{path}: prices.currency is {value!r}, expected text")
        if key != "currency" and not (_is_number(value) and value >= 0):
            raise ConfigError(f"{path}: prices.{key} is {value!r}, expected a number, 0 or more")
    return Prices(**given)


def _rate(path: str, key: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{path}: {key} is {value!r}, expected a number above 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
