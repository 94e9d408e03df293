"""What training draws from a cache of mirrored views, lossy codecs and class tokens."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader, Records
from repa_pipeline.errors import MismatchError, MissingError
from repa_pipeline.observe import Silent
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import ToyCache, ToyTeacher, toy_train_config, write_toy_cache
from repa_pipeline.training.batches import BatchMaker, mirrored_views
from repa_pipeline.training.draws import StepDraws
from repa_pipeline.training.inputs import CacheInputs, open_inputs

LOSSY = ToyTeacher("toy-lossy", width=24, codec="int8", class_token=True)
MAGNITUDE = frozenset({"direction", "magnitude"})
STEPS = 12


@pytest.fixture
def cache(tmp_path: Path) -> ToyCache:
    return write_toy_cache(tmp_path, teachers=(ToyTeacher(), LOSSY), flip=True)


def config_of(tmp_path: Path, **changes: Any) -> Any:
    return toy_train_config(tmp_path, encoder=("toy-vit", "toy-lossy"), **changes)


def read(inputs: CacheInputs, config: Any, rank: int = 0, world_size: int = 1) -> list[Records]:
    order = Order(num_rows=48, shard_rows=8, batch_size=8, seed=0, window=3)
    with Reader(
        inputs.arrays,
        order,
        first_step=1,
        last_step=STEPS,
        rank=rank,
        world_size=world_size,
        mirrored=inputs.mirrored,
        views=functools.partial(mirrored_views, config),
    ) as reader:
        return [records.copy() for records in reader]


def test_a_row_comes_from_the_drawn_view_in_every_array(cache: ToyCache, tmp_path: Path) -> None:
    config = config_of(tmp_path, flip=True)
    inputs = open_inputs(config)
    assert cache.mirrored_latents is not None
    seen = set()
    for records in read(inputs, config):
        flipped = StepDraws(config.seed, records.step, 8, "cpu").mirrored()
        for i, row in enumerate(records.rows):
            latents = cache.mirrored_latents if flipped[i] else cache.latents
            tokens = (cache.mirrored_tokens if flipped[i] else cache.tokens)["toy-vit"]
            assert np.array_equal(records.arrays[0][i], latents[row])
            assert np.array_equal(records.arrays[1][i], tokens[row])
            seen.add((int(row), bool(flipped[i])))
    assert 40 < sum(flipped for _, flipped in seen) < 60 or len(seen) > 48


def test_views_do_not_depend_on_the_world_size(cache: ToyCache, tmp_path: Path) -> None:
    config = config_of(tmp_path, flip=True)
    inputs = open_inputs(config)
    whole = read(inputs, config)
    parts = [read(inputs, config, rank, 3) for rank in range(3)]
    for step, records in enumerate(whole):
        for k, array in enumerate(records.arrays):
            joined = np.concatenate([part[step].arrays[k] for part in parts])
            assert np.array_equal(joined, array)


def test_half_of_the_views_are_mirrored() -> None:
    drawn = np.concatenate([StepDraws(0, step, 256, "cpu").mirrored() for step in range(40)])
    assert 0.48 < drawn.mean() < 0.52
    assert not np.array_equal(drawn[:256], drawn[256:512])
    again = StepDraws(0, 1, 256, "cpu").mirrored()
    assert np.array_equal(drawn[256:512], again)


def test_without_flip_the_mirrored_view_is_not_read(cache: ToyCache, tmp_path: Path) -> None:
    inputs = open_inputs(config_of(tmp_path))
    assert inputs.mirrored == ()
    assert not any(".flip" in name for name in inputs.digests()["arrays"])


def test_a_mirrored_view_is_asked_for_by_name(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    with pytest.raises(
        MissingError, match=r"latents.tiny-kl.64.flip is absent.*encode-latents .*--flip"
    ):
        open_inputs(toy_train_config(tmp_path, flip=True))


def test_a_mirrored_view_of_another_recipe_is_refused(cache: ToyCache, tmp_path: Path) -> None:
    import json

    from repa_pipeline.data.array import fingerprint

    for name in ("zarr.json", "seal.json"):
        path = tmp_path / "cache/features.toy-vit.64.flip" / name
        content = json.loads(path.read_text())
        about = content["attributes" if name == "zarr.json" else "manifest"]
        about["weights_sha256"] = "1" * 64
        if name == "seal.json":
            del content["seal_sha256"]
            content["seal_sha256"] = fingerprint(content)
        path.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="weights_sha256 is '1111.*encode both with the same"):
        open_inputs(config_of(tmp_path, flip=True))


@pytest.mark.parametrize("needs", [frozenset({"direction"}), MAGNITUDE])
def test_tokens_come_back_in_direction_and_where_needed_length(
    needs: frozenset[str], cache: ToyCache, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    inputs = open_inputs(config, needs=needs)
    names = [array.spec.name for array in inputs.arrays]
    assert ("features.toy-lossy.64.scale" in names) == ("magnitude" in needs)
    lossy = inputs.describe().features[1]
    assert lossy.preserves == needs and lossy.class_token and lossy.grid == (4, 4)
    maker = BatchMaker(config, inputs, plan_training(config).method, "cpu")
    for records in read(inputs, config):
        ((batch, *_),) = maker.micro_batches(records)
        exact, decoded = batch.features
        assert torch.equal(exact, torch.from_numpy(cache.tokens["toy-vit"][records.rows]).float())
        expected = torch.from_numpy(cache.tokens["toy-lossy"][records.rows]).float()
        assert decoded.shape == (8, 16, 24)
        cosine = torch.nn.functional.cosine_similarity(decoded, expected[:, 1:], dim=-1)
        assert cosine.min() > 0.9998
        if "magnitude" in needs:
            assert torch.allclose(decoded, expected[:, 1:], atol=0.03)
        assert batch.class_tokens[0] is None and batch.class_tokens[1] is not None
        cosine = torch.nn.functional.cosine_similarity(
            batch.class_tokens[1], expected[:, 0], dim=-1
        )
        assert cosine.min() > 0.9998


def test_micro_batches_cut_class_tokens_too(cache: ToyCache, tmp_path: Path) -> None:
    config = config_of(tmp_path, accumulate=3)
    inputs = open_inputs(config)
    method = plan_training(config).method
    records = read(inputs, config)[0]
    ((whole, *_),) = BatchMaker(
        dataclasses.replace(config, accumulate=1), inputs, method, "cpu"
    ).micro_batches(records)
    parts = [
        batch for batch, *_ in BatchMaker(config, inputs, method, "cpu").micro_batches(records)
    ]
    tokens = [batch.class_tokens[1] for batch in parts]
    assert whole.class_tokens[1] is not None and [len(t) for t in tokens if t is not None] == [
        2,
        3,
        3,
    ]
    assert torch.equal(torch.cat([t for t in tokens if t is not None]), whole.class_tokens[1])


def test_a_run_with_flips_goes_on_where_it_stopped(cache: ToyCache, tmp_path: Path) -> None:
    settings = {"flip": True, "checkpoint_every": 2, "log_every": 1}
    whole = train(plan_training(config_of(tmp_path, name="whole", steps=6, **settings)), Silent())
    for steps in (2, 6):
        parts = train(
            plan_training(config_of(tmp_path, name="p", steps=steps, **settings)), Silent()
        )
    clocks = {"data_wait", "images_per_s", "rss_bytes", "bytes_per_s"}
    names = [name for name in whole.last if name not in clocks]
    assert [parts.last[name] for name in names] == [whole.last[name] for name in names]
    assert {"loss", "alignment", "grad_norm"} <= set(names)
    plain = train(plan_training(config_of(tmp_path, name="plain", steps=6)), Silent())
    assert plain.last["loss"] != whole.last["loss"]
