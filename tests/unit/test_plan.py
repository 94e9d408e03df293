"""The arithmetic of `repa plan`: at scale, against what `repa encode` really writes and reads, and
against hand-made numbers where it decides."""

from __future__ import annotations

import dataclasses
import http.server
import io
import math
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.objects import LocalStore, RemoteStore
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import ConfigError
from repa_pipeline.observe import Silent
from repa_pipeline.stages.index import cache_store, ensure_index
from repa_pipeline.stages.plan import (
    DECODING,
    NETWORKS,
    READING,
    WRITING,
    CachePlan,
    Rates,
    Shape,
    Workload,
    epoch_gets,
    plan_cache,
)
from repa_pipeline.stages.plan_inputs import Facts, find_facts, planned_arrays
from repa_pipeline.stages.plan_verdict import Prices, break_even_in_money, money, verdict
from repa_pipeline.testing.encoded import encode_tiny_cache, tiny_parts
from repa_pipeline.training.inputs import open_inputs

NODE = Shape(devices=8, devices_per_node=8, cores_per_node=96)
NETWORK_RATES = {"sd-vae-ft-ema": 600.0, "dinov2-b": 2500.0}
IMAGENET_RATES = Rates(NETWORK_RATES, decode=150, train=500)


def imagenet(tmp_path: Path, **changes: Any) -> Facts:
    settings = {"preset": "imagenet", "workspace": str(tmp_path / "none"), **changes}
    return find_facts(PlanConfig(**settings))


def plan_of(encoding: EncodeAllConfig, **changes: Any) -> Facts:
    """The plan of what `encoding` did."""
    return find_facts(PlanConfig(**{**settings_of(encoding), **changes}))


def settings_of(config: EncodeAllConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("codec", "gigabytes", "read_rate", "thousand_gets"),
    [("fp16", 525, 1.64, 32.5), ("int8", 273, 0.85, 20.0), ("int4", 147, 0.46, 12.5)],
)
def test_the_arithmetic_at_scale(
    codec: str, gigabytes: int, read_rate: float, thousand_gets: float, tmp_path: Path
) -> None:
    work = imagenet(tmp_path, codec=codec).work
    plan = plan_cache(work, NODE, IMAGENET_RATES)
    records = sum(a.num_bytes for a in work.arrays if not a.name.endswith(".scale"))
    assert round(records / 1e9) == gigabytes
    # One float16 a token and its checksum, and the shards' own indexes.
    scale = 0 if codec == "fp16" else 1_281_167 * (2 * 256 + 4) + 2503 * (512 * 16 + 4)
    assert plan.num_bytes == records + scale
    assert plan.training is not None
    assert round(plan.training.required_read / 1e9, 2) == read_rate
    assert round(plan.training.epoch_gets / 1e3, 1) == thousand_gets
    assert {array.num_shards for array in work.arrays} == {2503}


def test_a_cluster_shape(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    seconds = {"sd-vae-ft-ema": 1_281_167 / 600, "dinov2-b": 1_281_167 / 2500}
    encoding = plan_cache(work, NODE, IMAGENET_RATES).encoding
    assert encoding.bottleneck == NETWORKS
    for name, value in seconds.items():
        assert encoding.compute_hours[name] == pytest.approx(value / 3600)
    assert encoding.wall_hours == pytest.approx(sum(seconds.values()) / 8 / 3600)
    assert encoding.held_hours == pytest.approx(8 * encoding.wall_hours)
    assert encoding.feature_hours == pytest.approx(seconds["dinov2-b"] / 3600)
    assert encoding.index_hours == pytest.approx(1_281_167 / (150 * 96) / 3600)
    assert encoding.enough_devices == 8
    # 12 devices fill one node and half of another; both decode.
    two = Shape(devices=12, devices_per_node=8, cores_per_node=2)
    assert (two.nodes, two.devices_on_node, two.cores) == (2, 8, 4)
    encoding = plan_cache(work, two, IMAGENET_RATES).encoding
    assert encoding.bottleneck == DECODING
    assert encoding.wall_hours == pytest.approx(1_281_167 / 600 / 3600)
    # 2647 seconds of networks in 2135 of decoding.
    assert encoding.enough_devices == 2
    assert Shape(4, 8, 1).devices_on_node == 4


def test_a_slow_store_holds_the_devices(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    slow = dataclasses.replace(IMAGENET_RATES, write=50e6)
    encoding = plan_cache(work, NODE, slow).encoding
    assert encoding.bottleneck == WRITING
    total = sum(array.num_bytes for array in work.arrays)
    latents = sum(array.num_bytes for array in work.latents)
    assert encoding.wall_hours == pytest.approx(total / 50e6 / 3600)
    # Without the teacher the pass would be as long as the latents take.
    others = max(latents / 50e6, 1_281_167 / 600 / 8)
    assert encoding.feature_hours == pytest.approx(8 * (total / 50e6 - others) / 3600)
    # When decoding takes longest, the teacher costs no more than its own time.
    few_cores = plan_cache(work, Shape(8, 8, 1), IMAGENET_RATES).encoding
    assert few_cores.feature_hours == pytest.approx(1_281_167 / 2500 / 3600)
    reading = plan_cache(work, NODE, dataclasses.replace(IMAGENET_RATES, read=1e6)).encoding
    assert reading.bottleneck == READING
    assert reading.wall_hours == pytest.approx(1_281_167 * 115_000 / 1e6 / 3600)


def test_a_run_with_and_without_the_cache(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    training = plan_cache(work, NODE, IMAGENET_RATES).training
    assert training is not None
    assert training.cached_rate == 500
    assert training.online_rate == pytest.approx(1 / (1 / 500 + 1 / 2500))
    assert training.saved_hours == pytest.approx(400_000 * 256 / 2500 / 3600)
    assert training.cached_hours == pytest.approx(400_000 * 256 / 500 / 3600)
    assert training.online_cores == pytest.approx(training.online_rate * 8 / 150)
    # The teacher sees every image once for the cache, 79.9 times in a run.
    assert training.break_even_runs == pytest.approx(1 / work.epochs)
    assert work.epochs == pytest.approx(400_000 * 256 / 1_281_167)


def test_a_store_limits_both_ways_of_training(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    slow = dataclasses.replace(IMAGENET_RATES, read=0.2e9)
    training = plan_cache(work, NODE, slow).training
    assert training is not None
    # Latents and int8 tokens with their scales; online latents and the image's file.
    record, online = 16384 + 4 + 196608 + 4 + 512 + 4, 16384 + 4 + 115_000
    assert training.cached_rate == pytest.approx(0.2e9 / 8 / record)
    assert training.online_rate == pytest.approx(0.2e9 / 8 / online)
    decided = verdict(plan_cache(work, NODE, slow), work, Prices())
    assert decided.cache is False and "the store delivers 117 images/s a device" in decided.why
    # At int4 the records are smaller than the files: the cache wins at any speed of the store.
    small = imagenet(tmp_path, codec="int4").work
    assert verdict(plan_cache(small, NODE, slow), small, Prices()).cache


def test_few_epochs_and_few_runs(tmp_path: Path) -> None:
    def decided(**changes: Any) -> tuple[bool | None, str]:
        work = imagenet(tmp_path, **changes).work
        found = verdict(plan_cache(work, NODE, IMAGENET_RATES), work, Prices())
        return found.cache, found.why

    assert decided() == (
        True,
        "cache: the features cost 8.54 min of devices once and save 11.4 h a run, paid after "
        "1.00 epochs of training (1 run of 79.9 epochs planned)",
    )
    assert decided(train_steps=4000) == (
        False,
        "do not cache: the features cost 8.54 min of devices once and save 6.83 min a run, paid "
        "after 1.00 epochs of training (1 run of 0.799 epochs planned)",
    )
    assert decided(train_steps=4000, runs=2)[0] is True
    # The mirrored view is encoded too: twice the cost for the same saving.
    assert decided(train_steps=8000)[0] is True and decided(train_steps=8000, flip=True)[0] is False
    assert decided(encoder=("none",)) == (
        None,
        "nothing to weigh: no teacher, and every run needs the latents",
    )


def test_without_a_rate_of_training_nothing_is_weighed(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    plan = plan_cache(work, NODE, dataclasses.replace(IMAGENET_RATES, train=None))
    assert plan.training is None
    assert verdict(plan, work, Prices()).cache is None
    assert money(plan, work, Prices(device_hour=2)) == {
        "devices while encoding": pytest.approx(2 * plan.encoding.held_hours)
    }


def test_money_comes_from_the_users_prices_alone(tmp_path: Path) -> None:
    work = imagenet(tmp_path).work
    plan = plan_cache(work, NODE, IMAGENET_RATES)
    assert plan.training is not None
    assert money(plan, work, Prices()) == {} and break_even_in_money(plan, work, Prices()) is None
    prices = Prices("EUR", device_hour=2.5, gb_month=0.02, get_1000=0.0004, put_1000=0.005)
    assert money(plan, work, prices) == pytest.approx(
        {
            "devices while encoding": 2.5 * (1_281_167 / 600 + 1_281_167 / 2500) / 3600,
            "requests while encoding": (2 * 1_281_167 * 0.0004 + plan.puts * 0.005) / 1000,
            "storage, a month": plan.num_bytes / 1e9 * 0.02,
            "requests, a run": 20_020 * work.epochs * 0.0004 / 1000,
            "devices, saved a run": 2.5 * plan.training.saved_hours,
        }
    )
    features = sum(array.num_bytes for array in work.features) / 1e9
    once = 2.5 * plan.encoding.feature_hours + 0.005 * (4 * 2503 + 4) / 1000 + features * 0.02
    a_run = 2.5 * plan.training.saved_hours
    a_run -= (20_020 - 2503) * work.epochs * 0.0004 / 1000
    assert break_even_in_money(plan, work, prices) == pytest.approx(once / a_run)
    assert verdict(plan, work, prices).cache is True
    # Kept for long enough it costs more than it saves; requests can cost more than devices.
    dear = dataclasses.replace(prices, months=12)
    decided = verdict(plan, work, dear)
    assert decided.cache is False and "(stored for 12 months)" in decided.why
    never = verdict(plan, work, Prices(device_hour=0.01, get_1000=1.0))
    assert never.cache is False and "never pays" in never.why


def test_index_requests_are_left_out_when_it_stands(tmp_path: Path) -> None:
    work = imagenet(tmp_path, num_images=1000).work
    plan = plan_cache(work, NODE, IMAGENET_RATES)
    indexed = plan_cache(dataclasses.replace(work, is_indexed=True), NODE, IMAGENET_RATES)
    assert (plan.source_gets, indexed.source_gets) == (2000, 1000)
    # Claim, listing, table, manifest, and a part with its record for 512 images each.
    assert plan.puts - indexed.puts == 4 + 2 * 2
    assert plan.encoding.index_hours > 0 == indexed.encoding.index_hours


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all objects that local stores are asked to write."""
    keys: list[str] = []
    for method in ("put", "put_new"):
        original = getattr(LocalStore, method)

        def counted(self: LocalStore, key: str, data: Any, original: Any = original) -> Any:
            keys.append(key)
            return original(self, key, data)

        monkeypatch.setattr(LocalStore, method, counted)
    return keys


@pytest.mark.parametrize(
    ("num_images", "changes"),
    [
        (520, {"shard_rows": 128, "batch_size": 64}),
        (37, {"flip": False, "shard_rows": 0, "codec": "fp16", "moments_dtype": "float32"}),
        (20, {"codec": "int8", "format": "webdataset"}),
    ],
)
def test_the_plan_is_what_encoding_writes(
    num_images: int, changes: dict[str, Any], written: list[str], tmp_path: Path
) -> None:
    with tiny_parts(tmp_path):
        config = encode_tiny_cache(tmp_path, num_images=num_images, **changes)
        work = plan_of(config, workspace=str(tmp_path / "new"), num_images=num_images).work
        again = plan_of(config)
    rates = Rates(dict.fromkeys(work.networks, 1.0), 1, 1)
    plan = plan_cache(work, NODE, rates)
    cache = tmp_path / "work" / "cache"
    assert len(written) == plan.puts
    assert sum(path.is_file() for path in cache.rglob("*")) == plan.num_objects
    for array in work.arrays:
        shards = [cache / array.shard_key(k) for k in range(array.num_shards)]
        assert sum(path.stat().st_size for path in shards) == array.num_bytes
    names = {array.name for array in work.arrays}
    assert names == {p.name for p in cache.iterdir() if p.name.startswith(("latents", "features"))}
    # With the index at hand it is the same cache, in the index's partition.
    assert again.work.arrays == work.arrays and again.work.is_indexed
    assert again.work.num_images == num_images and again.work.source_gets == 0
    assert again.work.source_bytes == sum(p.stat().st_size for p in tmp_path.glob("images/*/*"))
    assert again.images.files[0].startswith(b"\x89PNG")


def test_an_epoch_reads_every_shard_of_both_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_parts(tmp_path):
        config = encode_tiny_cache(tmp_path, num_images=64, shard_rows=16)
        work = plan_of(config).work
    inputs = open_inputs(
        TrainConfig(workspace=config.workspace, flip=True, model="SiT-XS/2"),
        needs=frozenset({"direction", "magnitude"}),
    )
    reads: list[str] = []
    original = RemoteStore.read_range_into

    def counted(self: RemoteStore, key: str, start: int, buffer: memoryview) -> None:
        reads.append(f"{key} {start}")
        original(self, key, start, buffer)

    monkeypatch.setattr(RemoteStore, "read_range_into", counted)
    remote = RemoteStore((tmp_path / "work" / "cache").as_uri(), LocalFileSystem())
    arrays, mirrored = (
        [dataclasses.replace(array, store=remote) for array in some]
        for some in (inputs.arrays, inputs.mirrored)
    )
    order = Order(64, 16, 8, seed=0)
    flips = np.random.default_rng(0).random((8, 8)) < 0.5
    with Reader(
        arrays,
        order,
        first_step=0,
        last_step=8,
        mirrored=mirrored,
        views=lambda step: flips[step],
    ) as reader:
        assert len(list(reader)) == 8
    assert len(reads) == len(set(reads)) == epoch_gets(work.arrays) == 6 * 4


class Server:
    """One file over http with byte ranges; keeps the requests for bytes."""

    def __init__(self, data: bytes):
        self.gets: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(200, data, b"")

            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                outer.gets.append(wanted)
                first, last = wanted.removeprefix("bytes=").split("-")
                body = data[int(first) : int(last) + 1]
                self._answer(206, body, body)

            def _answer(self, status: int, measured: bytes, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(measured)))
                self.end_headers()
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/images.tar"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A tar of 40 images, with members between them that make some gaps too wide to read."""
    from PIL import Image

    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(40):
            picture = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
            pad = bytes(int(generator.integers(0, 400_000)))
            for end, data in (("png", picture.getvalue()), ("cls", b"0"), ("bin", pad)):
                info = tarfile.TarInfo(f"s{i:02d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    started = Server(buffer.getvalue())
    yield started
    started.close()


def test_source_gets_are_those_of_the_pass(server: Server, tmp_path: Path) -> None:
    with tiny_parts(tmp_path):
        tiny: dict[str, Any] = {"autoencoder": "tiny-kl", "encoder": ("tiny-teacher",)}
        config = EncodeAllConfig(
            source=server.url, workspace=str(tmp_path / "work"), resolution=16, shard_rows=8, **tiny
        )
        blind = plan_of(config, num_images=40)
        assert (blind.work.source_gets, blind.work.is_indexed, server.gets) == (40, False, [])
        ensure_index(config, LocalExecutor(0), Silent())
        planned = plan_of(config)
        server.gets.clear()
        (tmp_path / "images").mkdir()  # so that none are made
        encode_tiny_cache(tmp_path, **settings_of(config))
    assert 5 < len(server.gets) < 40
    assert planned.work.source_gets == len(server.gets)
    assert planned.images.gets_from == "counted on 5 of 5 shards of the index"


def test_where_the_images_come_from(tmp_path: Path) -> None:
    def images(**changes: Any) -> tuple[int, int, int, str]:
        found = find_facts(PlanConfig(workspace=str(tmp_path / "none"), **changes))
        return (
            found.work.num_images,
            found.work.source_gets,
            found.work.source_bytes,
            found.images.images_from,
        )

    digits: dict[str, Any] = {"resolution": 64, "autoencoder": "digits-vae"}
    digits |= {"encoder": ("digits-vit",), "preset": "digits"}
    assert images(**digits)[:2] == (1438, 0)
    assert images(**digits)[3] == "the embedded data set embedded:digits"
    assert images(**digits, num_images=99)[0] == 99
    default = images(preset="imagenet")
    assert default[:3] == (1_281_167, 1_281_167, 1_281_167 * 115_000)
    assert images(source="s3://bucket/x", num_images=10, image_bytes=7)[:3] == (10, 10, 70)
    assert images(source="nowhere", num_images=10)[:3] == (10, 0, 1_150_000)


def test_the_index_may_be_of_another_plan(tmp_path: Path) -> None:
    with tiny_parts(tmp_path):
        config = encode_tiny_cache(tmp_path, num_images=20, flip=False)
        larger = plan_of(config, num_images=40)
        assert larger.work.source_bytes == 2 * plan_of(config).work.source_bytes
        assert not larger.work.is_indexed
        assert plan_of(config, source="elsewhere").work.num_images == 1_281_167
        # A codec that stands there is kept.
        assert [a.name for a in plan_of(config, codec="auto").work.features][1].endswith(".scale")
        for path in (cache := Path(cache_store(config).url)).glob("features*.scale/*.json"):
            path.unlink()
        path = next(cache.glob("features.tiny-teacher.16/zarr.json"))
        path.unlink()
        assert len(plan_of(config, codec="auto").work.features) == 2
        fp16 = encode_tiny_cache(
            tmp_path, flip=False, codec="fp16", workspace=str(tmp_path / "fp16")
        )
        assert len(plan_of(fp16, codec="auto").work.features) == 1


def test_arrays_that_no_cache_can_have(tmp_path: Path) -> None:
    config = PlanConfig(preset="imagenet", workspace=str(tmp_path / "none"))

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            planned_arrays(dataclasses.replace(config, **changes), 100)

    refused("names one twice", encoder=("dinov2-b", "dinov2-vit-b"))
    refused("has no class token", encoder=("siglip2-b",), tokens="patch+cls")
    refused("multiple of", resolution=100)
    changed = {"encoders.dinov2-b": {"width": 700}}
    refused("codec int4 needs a width", codec="int4", overrides=changed)


def test_a_plan_has_no_infinite_numbers_in_ordinary_cases(tmp_path: Path) -> None:
    work: Workload = imagenet(tmp_path, encoder=("dinov2-b", "clip-l"), flip=True).work
    assert [*work.networks.items()] == [("sd-vae-ft-ema", 2), ("dinov2-b", 2), ("clip-l", 2)]
    rates = Rates({**NETWORK_RATES, "clip-l": 800.0}, 150, 500)
    plan: CachePlan = plan_cache(work, NODE, rates)
    assert plan.training is not None and math.isfinite(plan.training.break_even_runs)
    assert plan.training.online_rate == pytest.approx(1 / (1 / 500 + 1 / 2500 + 1 / 800))
