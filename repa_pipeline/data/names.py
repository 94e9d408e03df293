"""Names of a cache's arrays: KIND.PART.RESOLUTION, with .flip and .scale behind it.

features.dinov2-b.256             teacher tokens
features.dinov2-b.256.scale       the lossy codec's scale of every token
features.dinov2-b.256.flip        tokens of the mirrored view (its scales: .flip.scale)
"""

from __future__ import annotations

import dataclasses
import re

from repa_pipeline.errors import MismatchError

MIRRORED = ".flip"
SCALE = ".scale"
KINDS = ("latents", "features")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclasses.dataclass(frozen=True)
class ArrayName:
    """An array's name taken apart: `part` is the autoencoder or the encoder (`check_part`)."""

    kind: str
    part: str
    resolution: int
    mirrored: bool = False
    scale: bool = False

    def __post_init__(self) -> None:
        check_part(self.part)

    def __str__(self) -> str:
        base = f"{self.kind}.{self.part}.{self.resolution}"
        return base + MIRRORED * self.mirrored + SCALE * self.scale

    @property
    def main(self) -> ArrayName:
        """The array of the same view that holds the records themselves."""
        return dataclasses.replace(self, scale=False)

    @property
    def made_by(self) -> str:
        """The command that makes it, for advice."""
        if self.kind == "latents":
            command = f"encode-latents --autoencoder {self.part}"
        else:
            command = f"cache-features --encoder {self.part}"
        return command + " --flip" * self.mirrored


def check_part(part: str) -> str:
    """`part` itself, the name of an autoencoder or encoder; an array's name, and so a folder, has
    it in it. Raises MismatchError for one that is more than a plain name, or no text at all."""
    if not isinstance(part, str) or not _PART.fullmatch(part):
        raise MismatchError(
            f"{part!r} is no name of an encoder or autoencoder: expected letters, digits and '_', "
            "'.', '+', '-', a letter or digit first"
        )
    return part


def parse_name(name: str) -> ArrayName:
    """The parts of an array's name; raises MismatchError for one that is no array of a cache."""
    scale = name.endswith(SCALE)
    rest = name.removesuffix(SCALE)
    mirrored = rest.endswith(MIRRORED)
    kind, _, rest = rest.removesuffix(MIRRORED).partition(".")
    part, _, resolution = rest.rpartition(".")
    if kind not in KINDS or not part or not resolution.isdecimal():
        raise MismatchError(
            f"'{name}' is not an array of a cache: expected latents.NAME.RESOLUTION or "
            "features.NAME.RESOLUTION, with .flip and .scale behind it"
        )
    return ArrayName(kind, part, int(resolution), mirrored, scale)
