"""The file of a reference of ours: one `.npz` that says what it is and checks itself.

mu, sigma (and mu_s, sigma_s)   of all images, float64
rows                            pool features of the first ones, for precision, recall and KID
about                           JSON: network, its weights' hash, resolution, where the images came
                                from, and a digest of the arrays
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import DamagedError, DataError, MismatchError, MissingError
from repa_pipeline.metrics.adm_file import UNREADABLE, ReferenceStatistics

FORMAT_VERSION = 1
ABOUT = "about"
_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "rows")

Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Reference:
    """mu, sigma of pool and (where known) spatial features; rows float32 [n, D]; what it is.

    about: name, kind ("adm", "own", "training source"), sha256, file, num_images, resolution,
    network {name, weights_sha256, published}, and for our own the source.
    """

    mu: Float64
    sigma: Float64
    mu_s: Float64 | None
    sigma_s: Float64 | None
    rows: npt.NDArray[np.float32]
    about: Mapping[str, Any]

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that there are, by name."""
        found = {name: getattr(self, name) for name in _ARRAYS}
        return {name: value for name, value in found.items() if value is not None}


def pack_reference(reference: Reference) -> bytes:
    """The file; equal references give equal bytes."""
    about = {
        **reference.about,
        "format_version": FORMAT_VERSION,
        "digest": _digest(reference.arrays),
    }
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {ABOUT: text, **reference.arrays}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack_reference(data: bytes, where: str) -> Reference:
    """The inverse of `pack_reference`, with the file's own hash; `where` is for messages.

    Raises DamagedError when the arrays are not the recorded ones, or it is another format.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            about = json.loads(stored[ABOUT].tobytes())
            arrays = {name: stored[name] for name in _ARRAYS if name in stored}
        sound = _digest(arrays) == about["digest"] and about["format_version"] == FORMAT_VERSION
    except (KeyError, *UNREADABLE) as error:
        raise _damaged(where, repr(error)) from None
    if not sound:
        raise _damaged(where, "its checksum or format version is another")
    own = {key: value for key, value in about.items() if key not in ("digest", "format_version")}
    named: dict[str, Any] = {**dict.fromkeys(_ARRAYS), **arrays}
    return Reference(
        **named,
        about={**own, "sha256": hashlib.sha256(data).hexdigest(), "file": Path(where).name},
    )


def read_reference(path: Path) -> Reference:
    """A reference of ours; raises MissingError, DamagedError, DataError for one of others."""
    if not is_own(path):
        raise DataError(f"{path} is no reference of `repa reference`: it has no `{ABOUT}`")
    return unpack_reference(path.read_bytes(), str(path))


def is_own(path: Path) -> bool:
    """Whether a file is a reference of ours, and not ADM's. Raises MissingError without one."""
    return about_of(path) is not None


def about_of(path: Path) -> dict[str, Any] | None:
    """What a reference of ours says it is, unchecked; None for another file."""
    if not path.is_file():
        raise MissingError(f"no reference file {path}: check --reference")
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{ABOUT}.npy" not in archive.namelist():
                return None
        with np.load(path, allow_pickle=False) as stored:
            about: dict[str, Any] = json.loads(stored[ABOUT].tobytes())
            return about
    except UNREADABLE as error:
        raise _damaged(str(path), str(error)) from None


def check_fits(
    path: Path, about: Mapping[str, Any], network: str, weights_sha256: str, resolution: int
) -> None:
    """Raises MismatchError where a reference of ours is not for features of this network and these
    weights, or for samples of another resolution."""
    made = about["network"]
    if (made["name"], made["weights_sha256"]) != (network, weights_sha256):
        raise MismatchError(
            f"{path} was made with network {made['name']} (weights {made['weights_sha256'][:12]}), "
            f"this is {network} ({weights_sha256[:12]}): use the network and the weights that the "
            "reference was made with"
        )
    if about["resolution"] != resolution:
        raise MismatchError(
            f"{path} is of images of {about['resolution']} pixels, the samples have {resolution}: "
            "use the reference of the samples' resolution"
        )


def check_adm(
    path: Path,
    statistics: ReferenceStatistics,
    resolution: int,
    manifest: Mapping[str, Any],
) -> None:
    """Raises MismatchError where ADM's file, of images of `resolution` pixels, is not for features
    of this manifest."""
    if resolution != manifest["resolution"]:
        raise MismatchError(
            f"{path} holds images of {resolution} pixels, the samples have "
            f"{manifest['resolution']}: use the reference of the samples' resolution"
        )
    widths = manifest["widths"]
    for mean, part in ((statistics.mu, "pool"), (statistics.mu_s, "spatial")):
        if mean is not None and widths[part] not in (0, len(mean)):
            raise MismatchError(
                f"{path} has {part} statistics of width {len(mean)}, network "
                f"{manifest['network']} gives {widths[part]}: use the network that the reference "
                "was made with"
            )


def _damaged(where: str, reason: str) -> DamagedError:
    return DamagedError(f"reference {where} is damaged ({reason}): remove it and make it again")


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    total = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        total.update(f"{name} {value.dtype} {value.shape}\n".encode())
        total.update(np.ascontiguousarray(value).data)
    return total.hexdigest()
