"""The table METHODS: what is trained. Data only: importing it needs no torch.

A new method is one file with a class that follows `methods/base.py` and one entry here, or in a
plugin's METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass

from repa_pipeline.tables import Table


@dataclass(frozen=True)
class MethodSpec:
    """`loader` is "module:Class"; `uses_features` says whether it reads teacher tokens.

    `needs` says what of a token its objective needs: "direction" is all that a cosine needs; with
    "magnitude" the scales of a lossy codec are read too.
    """

    name: str
    loader: str
    uses_features: bool
    needs: frozenset[str] = frozenset({"direction"})


METHODS: Table[MethodSpec] = Table(
    "method",
    [
        MethodSpec("sit", "repa_pipeline.methods.sit:SiTMethod", uses_features=False),
        MethodSpec("repa", "repa_pipeline.methods.repa:RepaMethod", uses_features=True),
    ],
)
