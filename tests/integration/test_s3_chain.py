"""Whole commands on a real S3 server: undisturbed, two at once, killed, and through bad days.

Every test ends with the objects of one undisturbed cache in a local folder, byte for byte. Images
come from tars in the bucket, networks from a plugin, credentials from the environment alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.observe import read_events
from repa_pipeline.testing.faults import (
    Chance,
    FaultProxy,
    Rule,
    Script,
    delay,
    lost_answer,
    reset,
    server_error,
    slow_down,
    truncate,
)
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights
from repa_pipeline.testing.swift import SwiftServer

pytestmark = pytest.mark.slow

BUCKET = "chain"
NUM_TARS, IMAGES_PER_TAR, SHARD_ROWS = 3, 200, 50
NUM_IMAGES = NUM_TARS * IMAGES_PER_TAR  # two parts of the index
NUM_SHARDS = NUM_IMAGES // SHARD_ROWS
TOKENS = "features.tiny-teacher.32"
ARRAYS = ["latents.tiny-kl.32", "latents.tiny-kl.32.flip"]
ARRAYS += [TOKENS, f"{TOKENS}.flip", f"{TOKENS}.scale", f"{TOKENS}.flip.scale"]
TIMEOUT_S = 300

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder
AUTOENCODERS = [tiny_autoencoder()]
ENCODERS = [tiny_encoder()]
"""
PROJECT = f"""
source = "s3://{BUCKET}/source/images-{{0..{NUM_TARS - 1}}}.tar"
plugins = ["chain_parts"]
device = "cpu"
threads = 1
resolution = 32
batch_size = 25
shard_rows = {SHARD_ROWS}
autoencoder = "tiny-kl"
runs_dir = "runs"

[encode]
encoder = "tiny-teacher"
codec = "int8"
flip = true
[train]
model = "SiT-XS/2"
flip = true
steps = 4
batch_size = 16
log_every = 1
projector_width = 32
[sample]
num_images = 6
num_steps = 3
batch_size = 3
shard_rows = 3
cfg = 1.5

[autoencoders.tiny-kl]
weights = "kl.safetensors"
[encoders.tiny-teacher]
weights = "teacher.safetensors"
"""


@dataclasses.dataclass
class Job:
    """A command in a process session of its own, which holds everything that it starts."""

    process: subprocess.Popen[str]
    output: Path

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def told(self) -> str:
        return self.output.read_text()

    def others(self) -> dict[int, str]:
        """Names of the session's other living processes, by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(") ")
                state, _, _, session = rest.split()[:4]
                pid = int(folder.name)
                if int(session) == self.process.pid != pid and state != "Z":
                    found[pid] = name
        return found

    def kill(self) -> None:
        """The command's own process alone."""
        self.process.kill()

    def kill_all(self) -> None:
        """As a machine that goes: the command, then what it started until nothing is left."""
        self.kill()
        while others := self.others():
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class Site:
    """A user's folder, and the server with the images."""

    folder: Path
    server: SwiftServer

    @contextlib.contextmanager
    def job(self, line: str, **variables: str) -> Iterator[Job]:
        """`repa LINE` while it lasts; nothing of it runs afterwards."""
        ours = ("REPA_", "AWS_", "RAY_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        environment |= {**self.server.environment(), "OMP_NUM_THREADS": "1", **variables}
        number = len(list(self.folder.glob("*.log")))
        with open(self.folder / f"{number:02d}.log", "x") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "repa_pipeline", *line.split()],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        job = Job(process, Path(log.name))
        try:
            yield job
        finally:
            job.kill_all()

    def run(self, line: str, code: int = 0, **variables: str) -> str:
        """What `repa LINE` says until it ends with `code`."""
        with self.job(line, **variables) as job:
            assert job.wait() == code, job.told()
        return job.told()

    def objects(self, workspace: str) -> dict[str, bytes]:
        """Everything in a workspace of the bucket, verify's notes apart; no upload is pending."""
        assert self.server.multipart_uploads(BUCKET) == []
        return read_all(open_store(url_of(workspace)))


def url_of(workspace: str) -> str:
    return f"s3://{BUCKET}/{workspace}"


def read_all(store: ObjectStore) -> dict[str, bytes]:
    keys = [key for key in sorted(store.keys()) if not key.startswith("cache/verify/")]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(keys, pool.map(store.get, keys), strict=True))


def different(got: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Keys that are in one of them only, or have other bytes."""
    return sorted(k for k in got.keys() | expected.keys() if got.get(k) != expected.get(k))


def parts_of(objects: Mapping[str, bytes]) -> dict[str, bytes]:
    """The objects that an unfinished workspace may hold beside some of the finished one's."""
    return {k: v for k, v in objects.items() if not k.startswith("cache/index.parts/")}


def put_tars(store: ObjectStore) -> None:
    generator = np.random.default_rng(0)
    for number in range(NUM_TARS):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for i in range(IMAGES_PER_TAR):
                png = io.BytesIO()
                blocks = generator.integers(0, 256, (8, 8, 3), np.uint8)
                size = (40, 36 + i % 5)
                Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(png, "png")
                key = f"{number}-{i:04d}"
                for name, content in (
                    (f"{key}.png", png.getvalue()),
                    (f"{key}.cls", b"%d" % (i % 5)),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        store.put(f"images-{number}.tar", data.getvalue())


@pytest.fixture(scope="module")
def site(s3: SwiftServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "repa.toml").write_text(PROJECT)
    (folder / "chain_parts.py").write_text(PLUGIN)
    write_weights(tiny_autoencoder(weights=str(folder / "kl.safetensors")))
    write_weights(tiny_encoder(weights=str(folder / "teacher.safetensors")))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        s3.create_bucket(BUCKET)
        put_tars(open_store(url_of("source")))
        yield Site(folder, s3)


@pytest.fixture(scope="module")
def expected(site: Site) -> dict[str, bytes]:
    """The objects of the undisturbed cache, in a local folder."""
    told = site.run("encode --workspace local")
    assert told.count(", sealed") == len(ARRAYS)
    found = read_all(open_store(str(site.folder / "local")))
    shards = [key for key in found if "/c/" in key]
    assert len(shards) == len(ARRAYS) * NUM_SHARDS
    assert all(np.frombuffer(found[key], np.uint8).any() for key in shards)
    return found


@pytest.fixture
def proxy(site: Site) -> Iterator[FaultProxy]:
    with FaultProxy(site.server.endpoint) as running:
        yield running


def test_two_jobs_write_one_cache_and_the_chain_goes_on(
    site: Site, expected: dict[str, bytes]
) -> None:
    where = f"--workspace {url_of('shared')}"
    with site.job(f"encode {where}") as one, site.job(f"encode {where}") as other:
        assert (one.wait(), other.wait()) == (0, 0), one.told() + other.told()
    for told in (one.told(), other.told()):
        assert f"{NUM_IMAGES:,} images in 5 classes, 0 excluded, 0 exact duplicates\n" in told
        assert all(f"{url_of('shared')}/cache/{name}" in told for name in ARRAYS)
    assert different(site.objects("shared"), expected) == []

    assert "run: runs/sit-xs-2.tiny-teacher at step 4" in site.run(f"train {where}")
    events = read_events(site.folder / "runs/sit-xs-2.tiny-teacher/events.jsonl")
    losses = [event["denoising"] for event in events if event["event"] == "scalars"]
    assert len(losses) == 4 and np.isfinite(losses).all() and min(losses) > 0.1
    site.run(f"sample {where}")
    (samples,) = (site.folder / "runs").glob("*/samples/*/samples.npz")
    with np.load(samples, allow_pickle=False) as stored:
        assert stored["arr_0"].shape == (6, 32, 32, 3) and stored["arr_0"].std() > 1
    told = site.run(f"verify {where}")
    num_shards, num_records = len(ARRAYS) * NUM_SHARDS, len(ARRAYS) * NUM_IMAGES
    assert f"verified: 6 arrays, {num_shards} shards, {num_records:,} records" in told
    objects = site.objects("shared")
    mirrored = {name for name in objects if name.startswith("runs/")}
    assert "runs/sit-xs-2.tiny-teacher/checkpoints/step-00000004.json" in mirrored
    cache = {name: data for name, data in objects.items() if name not in mirrored}
    assert different(cache, expected) == []


@dataclasses.dataclass
class AtPut:
    """A proxy's script without faults: calls `act` before PUT `number` of a cache goes on.

    All other requests wait meanwhile.
    """

    number: int
    act: Callable[[], None]
    is_done: bool = False

    def __call__(self, method: str, path: str) -> None:
        self.number -= method == "PUT"
        if self.number == 0 and not self.is_done:
            self.is_done = True
            self.act()


def test_killed_jobs_are_resumed(site: Site, expected: dict[str, bytes], proxy: FaultProxy) -> None:
    """First the driver alone, then everything at once, then a worker of the run that finishes."""
    seeded = random.Random(3)
    where = f"--workspace {url_of('killed')}"
    site.run(f"index {where}")
    line = f"encode {where} --executor ray --worker-cpus 0.5 --workers"
    for kill in (Job.kill, Job.kill_all):
        with site.job(f"{line} 1", AWS_ENDPOINT_URL=proxy.endpoint) as job:
            proxy.script = moment = AtPut(seeded.randint(20, 50), functools.partial(kill, job))
            assert job.wait() == -signal.SIGKILL, job.told()
            wait_for_workers_to_end(job)
        left = site.objects("killed")
        assert 0 < len(open_store(url_of("killed")).list(f"cache/ledger/{TOKENS}")) < NUM_SHARDS
        assert "cache/manifest.json" in left and f"cache/{TOKENS}/seal.json" not in left
        assert [key for key in left if left[key] != expected.get(key)] == []
    with site.job(f"{line} 2", AWS_ENDPOINT_URL=proxy.endpoint) as job:

        def kill_one() -> None:
            os.kill(seeded.choice(sorted(workers_of(job))), signal.SIGKILL)

        proxy.script = moment = AtPut(seeded.randint(10, 30), kill_one)
        assert job.wait() == 0, job.told()
    assert moment.is_done and "is gone: its process ended at once" in job.told()
    assert different(site.objects("killed"), expected) == []


def workers_of(job: Job) -> list[int]:
    """The Ray workers that hold the stage."""
    return [pid for pid, name in job.others().items() if name.startswith("ray::ShardWork")]


def wait_for_workers_to_end(job: Job) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while workers_of(job):
        assert time.monotonic() < deadline, job.others()
        time.sleep(0.05)


def test_bad_days(site: Site, expected: dict[str, bytes], proxy: FaultProxy) -> None:
    faults = [server_error(), slow_down(), delay(0.2), truncate(0.6), reset(), lost_answer()]
    proxy.script = Chance(11, 0.15, faults)
    told = site.run(
        f"encode --workspace {url_of('bad-days')}",
        AWS_ENDPOINT_URL=proxy.endpoint,
        REPA_STORE_FIRST_DELAY_SECONDS="0.02",
    )
    assert told.count(", sealed") == len(ARRAYS)
    assert set(proxy.faults()) == {fault.name for fault in faults}
    assert different(site.objects("bad-days"), expected) == []


def test_an_endpoint_that_fails_for_ever(
    site: Site, expected: dict[str, bytes], proxy: FaultProxy
) -> None:
    where = f"--workspace {url_of('outage')}"
    proxy.script = Script(Rule(slow_down(), times=None, after=random.Random(5).randint(150, 250)))
    impatient = {"REPA_STORE_ATTEMPTS": "3", "REPA_STORE_FIRST_DELAY_SECONDS": "0.01"}
    told = site.run(f"encode {where}", 2, AWS_ENDPOINT_URL=proxy.endpoint, **impatient)
    lines = [line for line in told.splitlines() if line.startswith("repa: ")]
    assert lines == told.splitlines()[-1:] and "Traceback" not in told
    assert re.search(r"tried 3 times in \d+ s, the last answer was: 503", lines[0]), lines
    assert "run the same command again: what is done is kept" in lines[0]

    left = site.objects("outage")
    assert [key for key in parts_of(left) if left[key] != expected.get(key)] == []
    recorded = {name: sum(f"ledger/{name}/" in key for key in left) for name in ARRAYS}
    assert 0 < recorded[TOKENS] < NUM_SHARDS
    told = site.run(f"verify {where}")
    for name, count in recorded.items():
        made_by = "encode-latents" if name.startswith("latents") else "cache-features"
        state = f"{name} is unfinished: {count} of {NUM_SHARDS} shards recorded"
        assert f"{state}; run `repa {made_by}" in told
    assert f"verified: 6 arrays, {sum(recorded.values())} shards" in told
    assert ", sealed" in site.run(f"encode {where}")
    assert different(site.objects("outage"), expected) == []
    assert json.loads(expected[f"cache/{TOKENS}/seal.json"])["num_rows"] == NUM_IMAGES
