"""Which arrays a run opens, and which it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.data.objects import get_json, open_store
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    UnknownNameError,
)
from repa_pipeline.stages.train import plan_training
from repa_pipeline.testing.caches import (
    ToyLatents,
    ToyTeacher,
    toy_train_config,
    write_array,
    write_toy_cache,
)
from repa_pipeline.training.inputs import open_inputs


def copy_array(workspace: Path, name: str, *, seal: bool = True, **changes: Any) -> None:
    """Writes another array like the toy teacher's, with other facts in its manifest."""
    store = open_store(str(workspace)).child("cache")
    manifest = get_json(store, "features.toy-vit.64/seal.json")["manifest"]
    tokens = np.zeros((48, 16, 12), np.float16)
    write_array(store, name, tokens, 8, {**manifest, **changes}, seal=seal)


def test_what_is_opened(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path)
    inputs = open_inputs(toy_train_config(tmp_path))
    assert [array.spec.name for array in inputs.arrays] == [
        "latents.tiny-kl.64",
        "features.toy-vit.64",
    ]
    assert np.array_equal(inputs.labels, cache.labels)
    described = inputs.describe()
    assert (described.resolution, described.latent_channels, described.latent_size) == (64, 4, 8)
    assert (described.num_classes, described.features[0].grid) == (3, (4, 4))
    assert set(inputs.digests()["arrays"]) == {array.spec.name for array in inputs.arrays}
    assert open_inputs(toy_train_config(tmp_path, encoder=("none",))).teachers == ()


def test_auto_does_not_guess(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher("a"), ToyTeacher("b")))
    with pytest.raises(ConfigError, match=r"several teachers \(a, b\): choose with --encoder"):
        open_inputs(toy_train_config(tmp_path))
    write_toy_cache(tmp_path, latents=ToyLatents("other"), teachers=())
    with pytest.raises(ConfigError, match="several latents .*choose with --autoencoder"):
        open_inputs(toy_train_config(tmp_path, encoder=("a",)))
    chosen = open_inputs(toy_train_config(tmp_path, encoder=("b",), autoencoder="other"))
    assert [array.spec.name for array in chosen.arrays] == ["latents.other.64", "features.b.64"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    config = toy_train_config(tmp_path)
    with pytest.raises(MissingError, match=r"no cache at .*: run `repa encode-latents` first"):
        open_inputs(config)
    write_toy_cache(tmp_path, teachers=())
    with pytest.raises(MissingError, match="train the vanilla twin with --encoder none"):
        open_inputs(config)
    with pytest.raises(MissingError, match="run `repa cache-features --encoder dinov2-b` first"):
        open_inputs(toy_train_config(tmp_path, encoder=("dinov2-b",)))
    with pytest.raises(MissingError, match="no finished latents of taesd"):
        open_inputs(toy_train_config(tmp_path, autoencoder="taesd"))


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    for changes, nearest in (
        ({"encoder": ("dinov2b",)}, "unknown encoder 'dinov2b': did you mean 'dinov2-b'"),
        ({"autoencoder": "taesdd"}, "unknown autoencoder 'taesdd': did you mean 'taesd'"),
        ({"model": "SiT-XS/3"}, "unknown model 'SiT-XS/3': did you mean 'SiT-XS/"),
        ({"method": "rep"}, "unknown method 'rep': did you mean 'repa'"),
    ):
        with pytest.raises(UnknownNameError, match=nearest):
            plan_training(toy_train_config(tmp_path, **changes))


def test_the_reference_names_of_teachers_and_autoencoders_work(tmp_path: Path) -> None:
    write_toy_cache(
        tmp_path, latents=ToyLatents("sd-vae-ft-ema"), teachers=(ToyTeacher("dinov2-b"),)
    )
    config = toy_train_config(tmp_path, encoder=("dinov2-vit-b",), autoencoder="sd-vae")
    assert "sd-vae" in AUTOENCODERS
    assert [array.spec.name for array in open_inputs(config).arrays] == [
        "latents.sd-vae-ft-ema.64",
        "features.dinov2-b.64",
    ]


def test_an_unsealed_array_is_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    copy_array(tmp_path, "features.dinov2-s.64", seal=False)
    with pytest.raises(MissingError, match=r"features.dinov2-s.64 is unfinished \(no seal\): run"):
        open_inputs(toy_train_config(tmp_path, encoder=("dinov2-s",)))
    assert len(open_inputs(toy_train_config(tmp_path)).teachers) == 1  # auto passes it over


def test_arrays_of_other_rows_are_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    copy_array(tmp_path, "features.other.64", rows_digest="f" * 64)
    with pytest.raises(MismatchError, match=r"other rows than the index \(row digest ffffffff"):
        open_inputs(toy_train_config(tmp_path, encoder=("other",)))


def test_arrays_of_other_images_are_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    prepare = {"crop": "adm-center", "exif": "raw", "max_pixels": 178_956_970}
    copy_array(tmp_path, "features.raw.64", prepare=prepare)
    with pytest.raises(
        MismatchError, match="saw other images than .*: prepare.exif is 'raw', expected 'upright'"
    ):
        open_inputs(toy_train_config(tmp_path, encoder=("raw",)))


def test_a_codec_of_another_version_is_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    copy_array(tmp_path, "features.newer.64", codec={"name": "fp16", "version": 2, "width": 12})
    with pytest.raises(MismatchError, match="coded by fp16 version 2, this package reads 1"):
        plan_training(toy_train_config(tmp_path, encoder=("newer",)))


def test_grids_that_do_not_fit(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher("fine", grid=8), ToyTeacher("odd", grid=5)))
    for encoder, advice in (("fine", "or use --align-resize pool"), ("odd", "or another --model")):
        with pytest.raises(MismatchError) as caught:
            plan_training(toy_train_config(tmp_path, encoder=(encoder,)))
        message = str(caught.value)
        grid = "8x8" if encoder == "fine" else "5x5"
        assert message.startswith(f"{encoder} has a token grid of {grid}, SiT-XS/2 has 4x4: ")
        assert "dinov2-b, " in message and "mobilenet-v2, " in message
        assert "mobilenet-v2-os8" not in message and message.endswith(advice)
    with pytest.raises(MismatchError, match="has a token grid of 5x5"):
        plan_training(toy_train_config(tmp_path, encoder=("odd",), align_resize="pool"))
    plan_training(toy_train_config(tmp_path, encoder=("fine",), align_resize="pool"))


def test_a_depth_beyond_the_model_is_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    with pytest.raises(ConfigError, match="align_depth 4 is beyond the 3 blocks of SiT-XS/2"):
        plan_training(toy_train_config(tmp_path, align_depth=4))


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    with pytest.raises(ConfigError, match="batch_size 49 is larger than the data set of 48 rows"):
        plan_training(toy_train_config(tmp_path, batch_size=49))


def test_method_sit_ignores_cached_features(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path, method="sit"))
    assert plan.inputs.teachers == () and plan.name == "sit-xs-2.vanilla"
    with pytest.raises(ConfigError, match="method repa needs a teacher"):
        plan_training(toy_train_config(tmp_path, method="repa", encoder=("none",)))


def test_an_absent_or_short_shard_is_refused_before_the_first_step(tmp_path: Path) -> None:
    write_toy_cache(tmp_path / "ws")
    config = toy_train_config(tmp_path / "ws")
    opened = open_inputs(config)
    for array in opened.arrays:
        path = tmp_path / "ws/cache" / array.spec.shard_key(array.spec.num_shards - 1)
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(DamagedError, match=f"{len(data) - 1} bytes, truncated or foreign"):
            open_inputs(config)
        path.unlink()
        with pytest.raises(DamagedError, match=r"is missing .*; run `repa repair`"):
            open_inputs(config)
        path.write_bytes(data)
    assert open_inputs(config).labels.tolist() == opened.labels.tolist()
