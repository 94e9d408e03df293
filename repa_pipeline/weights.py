"""Where the weights of a frozen network come from, and how they are read without running code.

Imports without torch, so that a driver can find and hash a file cheaply. Used by encoders,
autoencoders and the networks of metrics.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_pipeline.errors import DamagedError, MismatchError, MissingError

if TYPE_CHECKING:
    from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
ASSET_PREFIX = "asset:"
HUB_TIMEOUT_S = 5
NUM_NAMED = 3
# Where a torch checkpoint keeps its state, in order of preference.
STATE_KEYS = ("model", "state_dict")

_hashes: dict[tuple[str, int, int], str] = {}
# torch keeps the list of what a restricted load may hold for the whole process.
_safe_globals_lock = threading.Lock()


def resolve_weights(
    kind: str,
    name: str,
    spec_weights: str | None,
    hub: str | None,
    filename: str,
    override: str | None,
) -> Path:
    """The local file that holds the weights of table entry `name`.

    `override` (what the user gave) comes before `spec_weights`, that before `filename` of the hub
    repository `hub`; the hub's local cache is looked at first, the network only then. "asset:FILE"
    is a file of this package. `kind` is "encoder", "autoencoder", ...: its plural is the section
    of repa.toml. Raises MissingError, within seconds when there is no network.
    """
    ways_out = f'`--weights PATH`, or `[{kind}s.{name}] weights = "PATH"` in repa.toml'
    given = override or spec_weights
    if given is not None:
        path = _local_path(given)
        if not path.is_file():
            raise MissingError(f"no weights file at {given} for {kind} '{name}': give {ways_out}")
        return path
    if hub is None:
        raise MissingError(f"{kind} '{name}' loads from a local file only: give {ways_out}")
    try:
        return _from_hub(hub, filename)
    # The hub client's errors derive from OSError or from its HTTP library, which varies by version.
    except Exception as error:
        reason = type(error).__name__
        raise MissingError(
            f"no weights for {kind} '{name}': cannot get {filename} from the hub repository {hub} "
            f"({reason}): give {ways_out}, or a network that reaches the hub repository {hub}"
        ) from None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hex, remembered in this process by path, size and mtime."""
    path = Path(path)
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def load_state(path: str | Path, keys: Sequence[str] = STATE_KEYS) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file of plain tensors, on the CPU.

    A torch file may hold its state under one of `keys`, the first that it has, and plain data
    beside it. Never unpickles code. Raises DamagedError when the file is neither.
    """
    path = Path(path)
    state: Any = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    while isinstance(state, Mapping):
        inner = next((state[key] for key in keys if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not all(hasattr(v, "shape") for v in state.values()):
        raise DamagedError(f"{path} holds no plain mapping from names to tensors: {_EXPECTED}")
    return dict(state)


def load_config(path: str | Path) -> dict[str, Any]:
    """The JSON object under `config` in a safetensors file's metadata; empty without one.

    Raises DamagedError when it is there and is not a JSON object.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("config", "{}")
    except safetensors.SafetensorError as error:
        raise DamagedError(f"cannot read {path} ({error}): {_EXPECTED}") from None
    try:
        config = json.loads(text)
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        raise DamagedError(f"metadata `config` of {path} is {text[:60]!r}: expected a JSON object")
    return config


def fit_state(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Puts `state`, read from `path`, into `module` in the module's dtypes.

    The module may lie on the meta device. Raises MismatchError naming the first missing,
    unexpected and misshapen keys when the two do not fit exactly.
    """
    expected = module.state_dict()
    misshapen = [
        f"{key} {tuple(state[key].shape)} (expected {tuple(value.shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": misshapen,
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys)
        raise MismatchError(f"{path} does not fit {what}: {listed}: give a file made for {what}")
    cast = {key: state[key].to(value.dtype) for key, value in expected.items()}
    module.load_state_dict(cast, assign=True)


_EXPECTED = "expected a safetensors file or a torch file of plain tensors"


def _local_path(given: str) -> Path:
    if given.startswith(ASSET_PREFIX):
        return ASSETS / given.removeprefix(ASSET_PREFIX)
    return Path(given).expanduser()


def _from_hub(hub: str, filename: str) -> Path:
    import huggingface_hub as hf

    try:
        return Path(hf.hf_hub_download(hub, filename, local_files_only=True))
    except FileNotFoundError:
        pass
    # One request without retries tells within seconds whether the file can be had; the download
    # itself retries, which without a network would take half a minute.
    hf.get_hf_file_metadata(hf.hf_hub_url(hub, filename), timeout=HUB_TIMEOUT_S)
    return Path(hf.hf_hub_download(hub, filename))


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"cannot read {path} ({error}): {_EXPECTED}") from None


def _load_torch(path: Path) -> Any:
    import torch

    try:
        with _safe_globals_lock, torch.serialization.safe_globals(_plain_data()):
            # Mapped, so that optimizer states beside the weights cost no memory.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except OSError:
        raise
    # A damaged file can fail anywhere in torch's restricted unpickler, with any kind of error.
    except Exception as error:
        reason, advice = _why_not_loaded(path, error)
        raise DamagedError(f"cannot read {path} ({reason}): {_EXPECTED}{advice}") from None


def _plain_data() -> list[Any]:
    """What old checkpoints hold beside tensors: settings and numbers, which run no code."""
    import argparse

    import numpy as np

    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    named = [
        (function, f"numpy.{core}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for core in ("core", "_core")
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *set(dtypes), *named]


def _why_not_loaded(path: Path, error: Exception) -> tuple[str, str]:
    """The reason a torch file was refused, and what to do where its maker is trusted."""
    convert = "; where you trust the file, convert it once with torch.save({}, NEW) and give NEW"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                state = "torch.jit.load(OLD, map_location='cpu').state_dict()"
                return "a TorchScript archive, which holds code", convert.format(state)
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return type(error).__name__, ""
    state = "{'model': torch.load(OLD, weights_only=False)[KEY OF ITS STATE]}"
    return f"it holds a {named[1]}, which could run code", convert.format(state)


def _first(keys: list[str]) -> str:
    more = len(keys) - NUM_NAMED
    return ", ".join(keys[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
