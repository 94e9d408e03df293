"""The table METHODS: what is trained. Data only: importing it needs no torch.

A new method is one file with a class that follows `methods/base.py` and one entry here, or in a
plugin's METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError
from repa_pipeline.methods.parts import needs_of_parts
from repa_pipeline.tables import Table


@dataclass(frozen=True)
class MethodSpec:
    """`loader` is "module:Class"; `uses_features` says whether it reads teacher tokens.

    `needs` says what of a token its objective needs: "direction" is all that a cosine needs; with
    "magnitude" the scales of a lossy codec are read too. None: what the chosen projector, target
    and objective need (methods/parts.py). `family`: the models that it trains, "" for its own.
    """

    name: str
    loader: str
    uses_features: bool
    needs: frozenset[str] | None = frozenset({"direction"})
    family: str = ""


METHODS: Table[MethodSpec] = Table(
    "method",
    [
        MethodSpec("sit", "repa_pipeline.methods.sit:SiTMethod", False, family="sit"),
        MethodSpec("repa", "repa_pipeline.methods.repa:RepaMethod", True, None, "sit"),
        MethodSpec("dit", "repa_pipeline.methods.dit:DiTMethod", False, family="dit"),
        MethodSpec("repa-dit", "repa_pipeline.methods.repa_dit:RepaDiTMethod", True, None, "dit"),
    ],
)


def auto_method(family: str, aligned: bool) -> str:
    """The method of models of `family`, with a teacher (`aligned`) or without.

    Raises ConfigError where there is none.
    """
    for spec in METHODS.values():
        if (spec.family, spec.uses_features) == (family, aligned):
            return spec.name
    raise ConfigError(
        f"no method trains models of family '{family}' {'with' if aligned else 'without'} a "
        f"teacher: choose with --method ({', '.join(METHODS)})"
    )


def token_needs(spec: MethodSpec, config: TrainConfig) -> frozenset[str]:
    """What of a stored token `spec` needs with these settings; UnknownNameError for their names."""
    if spec.needs is not None:
        return spec.needs
    return frozenset().union(*needs_of_parts(config).values())
