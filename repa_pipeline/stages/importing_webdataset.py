"""Import of webdataset tars as `repa export` writes them: rows, labels, latents and tokens.

The tars' order, which the export left shuffled, becomes the order of the rows, so tars are read
from front to back. Without images in them the cache trains, but nothing can be encoded beside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.config_exchange import ImportConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.index import (
    Entry,
    Index,
    content_digest,
    read_index,
    rows_digest,
    write_index,
)
from repa_pipeline.data.items import Item
from repa_pipeline.data.names import ArrayName, check_part
from repa_pipeline.data.source import open_source
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.engine.contracts import Executor
from repa_pipeline.engine.run import Progress, StageResult
from repa_pipeline.errors import DataError, MismatchError, UnknownNameError
from repa_pipeline.registry import autoencoder_spec, encoder_spec
from repa_pipeline.stages.exporting import RECORD
from repa_pipeline.stages.exporting_webdataset import MOMENTS
from repa_pipeline.stages.images import array_spec
from repa_pipeline.stages.importing import (
    UNKNOWN,
    Member,
    imported_manifest,
    latents_spec,
    parse_npy,
    resolution_of,
    run_import,
)
from repa_pipeline.stages.importing_tars import Sample, Tars, scan_tars
from repa_pipeline.stages.index import cache_store, default_shard_rows, listing_digest

_FLIP = ".flip"
# What a table entry must say as the exported manifest does: it decides how latents are used.
_SAME_LATENTS = ("posterior", "channels", "downsample", "scale", "shift")
# Entries of an exported manifest that stay true of the import.
_KEPT_LATENTS = ("weights_sha256", "batch_size", "compute")
_KEPT_FEATURES = (
    *("encoder", "weights_sha256", "width", "grid", "tokens", "preprocess", "model"),
    *("class_token", "batch_size", "compute"),
)


def import_webdataset(
    config: ImportConfig, executor: Executor, progress: Progress
) -> tuple[Index, StageResult]:
    """Makes the index and the sealed arrays of the tars at `config.source`.

    Raises MissingError, DataError or MismatchError for what cannot be imported.
    """
    tars = scan_tars(config.source)
    index = _index_of(config, tars)
    names, specs = _specs(config, tars, index)

    def members(name: str) -> Iterator[Member]:
        member = names[name]
        for sample in tars.samples:
            place = sample.arrays[member]
            what = f"{sample.key}.{member}.npy in {sample.tar}"
            yield Member(what, sample.tar, place.offset, place.num_bytes)

    return index, run_import(config, specs, members, executor, progress)


def _index_of(config: ImportConfig, tars: Tars) -> Index:
    """The index over the samples, written now or compared with the one that stands there."""
    store = cache_store(config)
    rows = [_entry(sample) for sample in tars.samples]
    if store.size("manifest.json") is None:
        write_index(store, rows, [], _index_manifest(config, tars, rows))
    index = read_index(store)
    if index.manifest["rows_digest"] != rows_digest(rows):
        raise MismatchError(
            f"the cache at {store.url} is of other rows than {tars.url}: use another --workspace"
        )
    return index


def _entry(sample: Sample) -> Entry:
    common: dict[str, Any] = {
        "key": sample.row_key, "label": sample.label, "path": sample.tar, "notes": "",
    }  # fmt: skip
    if sample.image is None:
        # Nothing is known of the image; the row is told apart by where it was.
        digest = content_digest(f"{sample.tar}/{sample.key}".encode())
        return Entry(**common, offset=-1, num_bytes=-1, width=0, height=0, digest=digest)
    image = sample.image
    return Entry(
        **common,
        offset=image.place.offset,
        num_bytes=image.place.num_bytes,
        width=image.width,
        height=image.height,
        digest=image.digest,
    )


def _index_manifest(config: ImportConfig, tars: Tars, rows: list[Entry]) -> dict[str, Any]:
    exported: Mapping[str, Any] = tars.record.get("index", {})
    with_images = tars.samples[0].image is not None
    source = tars.url if with_images else f"none (imported from {tars.url} without images)"
    items = open_source(tars.url).items() if with_images else _items_of(rows)
    labels = [entry.label for entry in rows]
    rows_a_shard = tars.record.get("identity", {}).get("rows_a_shard")
    return {
        "source": source,
        "listing": listing_digest(items),
        "permutation_seed": exported.get("permutation_seed", config.permutation_seed),
        "decode": exported.get("decode", {"exif": config.exif, "max_pixels": config.max_pixels}),
        "shard_rows": config.shard_rows or rows_a_shard or default_shard_rows(len(rows)),
        "num_classes": exported.get("num_classes", max(labels) + 1),
        "class_names": exported.get("class_names"),
        "num_excluded": 0,
        "excluded_reasons": {},
        "notes": {},
        "remarks": [f"imported from {tars.url}" + ("" if with_images else ", without images")],
        "num_duplicates": sum(n - 1 for n in Counter(e.digest for e in rows).values()),
    }


def _items_of(rows: list[Entry]) -> list[Item]:
    return [Item(e.key, e.label, e.path, e.offset, e.num_bytes) for e in rows]


def _specs(
    config: ImportConfig, tars: Tars, index: Index
) -> tuple[dict[str, str], list[ArraySpec]]:
    """The arrays that the members make, latents first, and the member of each array's name."""
    shapes = _shapes(tars)
    if MOMENTS not in shapes:
        raise DataError(
            f"{tars.url} has no .{MOMENTS}.npy members, only {sorted(shapes)}: expected an export "
            "with latents"
        )
    names: dict[str, str] = {}
    specs: list[ArraySpec] = []
    digest = _listing(tars)
    resolution = 0
    for member in sorted(shapes, key=lambda name: (not name.startswith(MOMENTS), name)):
        about = tars.record.get("members", {}).get(member, {})
        exported: Mapping[str, Any] = about.get("manifest", {})
        base = member.removesuffix(_FLIP)
        if base == MOMENTS:
            name = check_part(exported.get("autoencoder", config.autoencoder))
            autoencoder = autoencoder_spec(config, name)
            _check_autoencoder(autoencoder, exported, tars.url)
            known = _kept(exported, _KEPT_LATENTS) | {"latents_listing": digest}
            if config.weights:
                known.pop("weights_sha256", None)
            mirrored = member.endswith(_FLIP)
            spec = latents_spec(config, autoencoder, shapes[member], index, known, mirrored)
            resolution = resolution_of(autoencoder, shapes[member])
        else:
            spec = _features_spec(config, member, shapes[member], index, resolution, exported)
        names[spec.name] = member
        specs.append(spec)
    return names, specs


def _features_spec(
    config: ImportConfig,
    member: str,
    shape: tuple[int, ...],
    index: Index,
    resolution: int,
    exported: Mapping[str, Any],
) -> ArraySpec:
    encoder = member.removesuffix(_FLIP)
    if len(shape) != 2:
        raise DataError(f".{member}.npy has shape {list(shape)}: expected tokens [T, D]")
    about = _kept(exported, _KEPT_FEATURES)
    if about:
        _check_encoder(about, encoder, shape)
    else:
        about = _about_encoder(config, encoder, shape, resolution)
    mirrored = member.endswith(_FLIP)
    manifest = {
        **imported_manifest(resolution, index),
        "kind": "features",
        **about,
        "codec": CODECS["fp16"].manifest(shape[1]),
        **({"view": "mirrored"} if mirrored else {}),
    }
    name = str(ArrayName("features", about["encoder"], resolution, mirrored))
    return array_spec(name, index, shape, "float16", manifest, config.format)


def _check_autoencoder(spec: AutoencoderSpec, exported: Mapping[str, Any], url: str) -> None:
    """Raises MismatchError when latents were exported with another entry than the table's."""
    here = json.loads(json.dumps(dataclasses.asdict(spec)))
    for setting in _SAME_LATENTS:
        there = exported.get(setting, here[setting])
        if there != here[setting]:
            raise MismatchError(
                f"{setting} is {there!r} in {url}, autoencoder '{spec.name}' has {here[setting]!r} "
                f"here: set it in [autoencoders.{spec.name}] of repa.toml"
            )


def _check_encoder(about: Mapping[str, Any], member: str, shape: tuple[int, ...]) -> None:
    """Raises MismatchError when what an export says of tokens is not so of its members."""
    num_tokens, width = shape
    if check_part(about.get("encoder", "")).lower() != member:
        raise _unlike(member, "encoder", about["encoder"], repr(member))
    for setting in ("weights_sha256", "tokens"):
        if not isinstance(about.get(setting), str):
            raise MismatchError(
                f"{RECORD} says of .{member}.npy that {setting} is {about.get(setting)!r}, "
                "expected text: export again"
            )
    if about.get("width") != width:
        raise _unlike(member, "width", about.get("width"), str(width))
    grid, class_token = about.get("grid"), about.get("class_token", False)
    sides = grid if isinstance(grid, list) and len(grid) == 2 else [0]
    is_grid = all(type(side) is int and side > 0 for side in sides) and class_token in (True, False)
    if not is_grid or math.prod(sides) + class_token != num_tokens:
        said = f"{grid!r} and a class token" if class_token else repr(grid)
        raise MismatchError(
            f"{RECORD} says of .{member}.npy that grid is {said}, its members say {num_tokens} "
            "tokens: export again"
        )


def _unlike(member: str, setting: str, said: Any, found: str) -> MismatchError:
    return MismatchError(
        f"{RECORD} says of .{member}.npy that {setting} is {said!r}, its members say {found}: "
        "export again"
    )


def _about_encoder(
    config: ImportConfig, name: str, shape: tuple[int, ...], resolution: int
) -> dict[str, Any]:
    """What can be said of tokens without export.json: from the table, else from their shape."""
    num_tokens, width = shape
    side = round(num_tokens**0.5)
    about: dict[str, Any] = {
        "encoder": name,
        "weights_sha256": UNKNOWN,
        "width": width,
        "grid": [side, side],
        "tokens": UNKNOWN,
    }
    try:
        spec: EncoderSpec | None = encoder_spec(config, name)
    except UnknownNameError:
        spec = None
    if spec is not None:
        about |= {"tokens": spec.tokens, "grid": list(spec.grid(resolution))}
        if spec.width != width:
            raise MismatchError(
                f".{name}.npy has tokens of width {width}, encoder '{name}' gives {spec.width}"
            )
    rows, columns = about["grid"]
    if num_tokens - rows * columns not in (0, 1):
        raise MismatchError(
            f".{name}.npy has {num_tokens} tokens: expected {rows}x{columns} of encoder '{name}', "
            "and perhaps a class token"
        )
    return about | ({"class_token": True} if num_tokens > rows * columns else {})


def _shapes(tars: Tars) -> dict[str, tuple[int, ...]]:
    """The shape of every array's first member."""
    first, reader = tars.samples[0], open_source(tars.url)
    shapes = {}
    for member, place in first.arrays.items():
        name = f"{first.key}.{member}.npy in {first.tar}"
        data = reader.read(Item(name, None, first.tar, place.offset, place.num_bytes))
        shapes[member] = parse_npy(data, name).shape
    return shapes


def _kept(manifest: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: manifest[name] for name in names if name in manifest}


def _listing(tars: Tars) -> str:
    """sha256 of the tars' digests where an export says them, else of what lies where."""
    total = hashlib.sha256()
    for tar in tars.record.get("tars", ()):
        total.update(f"{tar['name']}\t{tar['digest']}\n".encode())
    for sample in tars.samples:
        total.update(f"{sample.key}\t{sample.tar}\t{sample.label}\n".encode())
    return total.hexdigest()
