"""The published suite's own outputs, through `repa evaluate`: images, judge rows, numbers.

The vectors are features, so the stand-in network looks an image's features up by the number that
is written in its pixels; all that follows is the public path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.observe import Silent
from repa_pipeline.stages.evaluate import evaluate
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.samples import write_sample_folder

PLUGIN = """
import numpy as np
import torch
from torch import nn
from repa_pipeline.metrics.networks import Features, NetworkSpec

with np.load({path!r}, allow_pickle=False) as stored:
    POOL = np.concatenate([stored["ref_pool"], stored["smp_pool"]])
    SPATIAL = np.concatenate([stored["ref_spatial"], stored["smp_spatial"]])
    SOFTMAX = stored["softmax_w"]


class LookUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.spatial = torch.from_numpy(POOL), torch.from_numpy(SPATIAL)
        self.softmax = torch.from_numpy(SOFTMAX)

    def forward(self, images):
        number = images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0].long()
        pool = self.pool[number]
        return Features(pool, self.spatial[number], pool @ self.softmax)


def load(spec, path):
    return LookUp()


NETWORKS = [
    NetworkSpec(
        "golden", "golden_network:load", {path!r}, pool=POOL.shape[1],
        spatial=SPATIAL.shape[1], logits=SOFTMAX.shape[1],
    )
]
"""


def numbered(start: int, count: int) -> Any:
    """uint8 [count, 4, 4, 3] with start, start + 1, ... in the first pixel."""
    images = np.zeros((count, 4, 4, 3), np.uint8)
    numbers = np.arange(start, start + count)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    return images


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    with np.load(shared / "golden" / "adm_metrics.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def base(
    shared: Path, golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("golden")
    plugin = PLUGIN.replace("{path!r}", repr(str(shared / "golden" / "adm_metrics.npz")))
    (folder / "golden_network.py").write_text(plugin)
    num_reference, num_samples = len(golden["ref_pool"]), len(golden["smp_pool"])
    statistics = {}
    for name, key in (("", "ref_pool"), ("_s", "ref_spatial")):
        rows = golden[key].astype(np.float64)
        statistics |= {f"mu{name}": rows.mean(0), f"sigma{name}": np.cov(rows.T)}
    np.savez(folder / "reference.npz", arr_0=numbered(0, num_reference), **statistics)
    write_sample_folder(folder / "samples", numbered(num_reference, num_samples), shard_rows=100)
    with isolated_tables(folder):
        yield folder


@pytest.mark.parametrize(
    ("is_split", "mode", "key"), [(5000, "float64", "fp64"), (100, "adm_fp16", "adm_fp16")]
)
def test_the_five_numbers(
    base: Path, golden: dict[str, Any], tmp_path: Path, is_split: int, mode: str, key: str
) -> None:
    config = EvaluateConfig(
        workspace=str(base / "ws"),
        samples=str(base / "samples"),
        reference=str(base / "reference.npz"),
        network="golden",
        plugins=("golden_network",),
        device="cpu",
        threads=1,
        is_split=is_split,
        pr_mode=mode,
        kid_subsets=0,
        allow_few=True,
        output=str(tmp_path / "result.json"),
    )
    metrics = evaluate(config, Silent())["metrics"]
    expected = {
        "frechet_distance": float(golden["expect_fid"]),
        "spatial_frechet_distance": float(golden["expect_sfid"]),
        "inception_score": float(golden[f"expect_is_split_{is_split}"]),
        "precision": float(golden[f"expect_precision_{key}"]),
        "recall": float(golden[f"expect_recall_{key}"]),
    }
    assert metrics.pop("kid") is None
    assert metrics == pytest.approx(expected, rel=1e-6)
