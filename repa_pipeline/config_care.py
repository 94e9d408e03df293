"""Settings of the commands that care for a cache: verify, repair, copy."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import ClusterConfig, CommonConfig
from repa_pipeline.settings import check_positive, setting


@dataclasses.dataclass(frozen=True)
class VerifyConfig(ClusterConfig):
    """`repa verify`: every stored byte of a cache against its checksums."""

    array: tuple[str, ...] = setting(
        (), "Array to look at, by name; may be given several times (default: all)."
    )
    again: bool = setting(False, "Start over what a stopped verify has begun.")
    read_threads: int = setting(
        4, "Shards that a worker reads at once; each takes memory.", check=check_positive
    )


@dataclasses.dataclass(frozen=True)
class RepairConfig(VerifyConfig):
    """`repa repair`: what is damaged or missing, made again by the array's own recipe."""

    accept: bool = setting(
        False, "Take re-encoded shards whose bytes are not the sealed ones, and seal them anew."
    )
    weights: str | None = setting(
        None, "Local weights file (else the table entry's, else the hub)."
    )
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)


@dataclasses.dataclass(frozen=True)
class CopyConfig(CommonConfig):
    """`repa copy`: a cache from one workspace to another, verified."""

    origin: str | None = setting(None, "Workspace to copy from, a folder or URL.")
    target: str | None = setting(None, "Workspace to copy to, a folder or URL.")
    array: tuple[str, ...] = setting(
        (), "Array to copy, by name; may be given several times (default: all sealed ones)."
    )
    verify: str = setting(
        "read",
        "How what was written is looked at: read it back, or ask for its size alone.",
        choices=("read", "size"),
    )
    copy_threads: int = setting(
        4, "Shards that are copied at once; each takes memory.", check=check_positive
    )
