"""Judge rows: the features of every image, kept as one array."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from repa_pipeline.config import CommonConfig
from repa_pipeline.data.array import ArraySpec, begin_array, seal_array, write_shard
from repa_pipeline.data.objects import open_store
from repa_pipeline.errors import DamagedError, MismatchError, MissingError, UnknownNameError
from repa_pipeline.metrics.networks import NETWORKS, Widths, load_network
from repa_pipeline.stages.judge import Judge, judge_spec, open_judged

CONFIG = CommonConfig(device="cpu")
NETWORK = "digits-cnn"


def images_of(count: int, side: int = 32) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def spec_of(count: int, shard_rows: int = 4, forward_images: int = 8) -> ArraySpec:
    return judge_spec(
        CONFIG,
        NETWORK,
        None,
        resolution=32,
        num_rows=count,
        shard_rows=shard_rows,
        of={"samples": "abc"},
        forward_images=forward_images,
    )


def store_rows(folder: Path, images: npt.NDArray[np.uint8]) -> ArraySpec:
    spec, store = spec_of(len(images)), open_store(str(folder))
    judge = Judge(CONFIG, None, spec)
    begin_array(store, spec)
    shards = []
    for k in range(spec.num_shards):
        part = images[4 * k : 4 * k + 4]
        num_bytes, digest = write_shard(store, spec, k, judge.rows(part))
        shards.append({"index": k, "rows": len(part), "num_bytes": num_bytes, "digest": digest})
    seal_array(store, spec, shards)
    return spec


def test_rows_are_pool_spatial_and_logits_of_every_image(tmp_path: Path) -> None:
    images = images_of(11)
    spec = store_rows(tmp_path, images)
    assert (spec.name, spec.layout.shape) == ("judge.digits-cnn", (64 + 448 + 10,))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    network = load_network(NETWORK, device="cpu")
    direct = network.features(pixels)
    judged = open_judged(open_store(str(tmp_path)), NETWORK)
    assert judged.widths == Widths(64, 448, 10) and judged.num_rows == 11
    blocks = list(judged.blocks())
    assert [len(block.pool) for block in blocks] == [4, 4, 3]
    for name in ("pool", "spatial", "logits"):
        together = np.concatenate([getattr(block, name) for block in blocks])
        want = getattr(direct, name).numpy()
        np.testing.assert_allclose(together, want, rtol=1e-4, atol=1e-5)
    assert [len(block.pool) for block in judged.blocks(num_rows=6)] == [4, 2]


def test_a_row_depends_on_its_image_alone() -> None:
    images = images_of(13)
    judge = Judge(CONFIG, None, spec_of(13))
    whole = judge.rows(images)
    parts = np.concatenate([judge.rows(images[:5]), judge.rows(images[5:])])
    np.testing.assert_array_equal(parts, whole)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


def test_what_decides_the_array() -> None:
    base = spec_of(8)
    assert base.manifest["weights_sha256"] == load_network(NETWORK).weights_sha256
    assert base.manifest["of"] == {"samples": "abc"}
    others = [spec_of(9), spec_of(8, shard_rows=2), spec_of(8, forward_images=4)]
    assert len({spec.fingerprint for spec in (base, *others)}) == 4


def test_an_encoder_and_a_map_that_grows_with_the_image() -> None:
    assert NETWORKS["mobilenet-v1"].widths(128) == Widths(1024, 7 * 8 * 8, 1000)
    assert NETWORKS["mobilenet-v1"].widths(100) == Widths(1024, 7 * 7 * 7, 1000)
    spec = judge_spec(
        CONFIG, "encoder:digits-vit", None, resolution=64, num_rows=3, shard_rows=4, of={}
    )
    assert spec.name == "judge.encoder-digits-vit"
    judge = Judge(CONFIG, None, spec)
    images = images_of(3, 64)
    want = load_network("encoder:digits-vit").features(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(judge.rows(images), want.pool.numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown network 'digits-cn': did you mean"):
        judge_spec(CONFIG, "digits-cn", None, resolution=32, num_rows=1, shard_rows=1, of={})
    spec = spec_of(4)
    foreign = dataclasses.replace(spec, manifest={**spec.manifest, "weights_sha256": "0" * 64})
    with pytest.raises(MismatchError, match=r"weights of network digits-cnn .* expected 000000"):
        Judge(CONFIG, None, foreign)
    with pytest.raises(MissingError, match=r"judge.digits-cnn is absent: run `repa evaluate` fir"):
        open_judged(open_store(str(tmp_path)), NETWORK)
    store_rows(tmp_path, images_of(5))
    shard = tmp_path / "judge.digits-cnn" / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    blocks = open_judged(open_store(str(tmp_path)), NETWORK).blocks()
    assert len(next(blocks).pool) == 4
    with pytest.raises(DamagedError, match="shard 1, rows 4 to 4"):
        next(blocks)
