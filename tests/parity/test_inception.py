"""The FID network in the published file's layout with random weights, against torch-fidelity."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from repa_pipeline.config import CommonConfig
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.errors import DamagedError, MismatchError, MissingError
from repa_pipeline.metrics import inception
from repa_pipeline.metrics.frechet import frechet_distance
from repa_pipeline.metrics.inception_score import inception_score
from repa_pipeline.metrics.kid import kid_of_subsets
from repa_pipeline.metrics.networks import NETWORKS, NetworkSpec, is_published, load_network
from repa_pipeline.metrics.precision_recall import precision_recall
from repa_pipeline.metrics.statistics import RunningStatistics
from repa_pipeline.observe import Silent
from repa_pipeline.stages.evaluate import evaluate, summary
from repa_pipeline.stages.judge import Judge, judge_spec
from repa_pipeline.weights import file_sha256

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict as torch-fidelity publishes it, random, with activations of a usual size."""
    torch.manual_seed(0)
    network = inception._Extractor()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(scope="module")
def theirs(weights: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch-fidelity's own numbers, its own loader included."""
    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights)
    )
    pool, logits = network(images)
    return pool, logits


def test_rows_equal_torch_fidelity(
    weights: Path, images: torch.Tensor, theirs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    config = CommonConfig(device="cpu")
    settings: dict[str, Any] = {"resolution": 64, "num_rows": 5, "shard_rows": 5, "of": {}}
    spec = judge_spec(
        config, "inception-v3", str(weights), forward_images=4, any_weights=True, **settings
    )
    rows = Judge(config, str(weights), spec).rows(images.permute(0, 2, 3, 1).numpy())
    assert rows.shape == (5, 2048 + 2023 + 1008)
    pool, logits = (part.numpy() for part in theirs)
    assert pool.std() > 0.01 and logits.std() > 0.01
    np.testing.assert_allclose(rows[:, :2048], pool, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows[:, 4071:], logits, rtol=1e-4, atol=1e-4)
    state: State = torch.load(weights, weights_only=True)
    want = rows[:, :2048] @ state["fc.weight"].numpy().T
    np.testing.assert_allclose(rows[:, 4071:], want, rtol=1e-3, atol=1e-3)
    assert np.abs(state["fc.bias"].numpy()).max() > 1e-3  # which the logits are without


def test_the_spatial_features_are_the_layer_of_sfid(weights: Path, images: torch.Tensor) -> None:
    network = load_network("inception-v3", weights=str(weights))
    found = network.features(images[:2]).spatial
    assert found is not None
    extractor = inception._Extractor()
    extractor.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[torch.Tensor] = []
    extractor.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(images[:2])
    layer = extractor.Mixed_6d.branch1x1
    normalised = nn.functional.batch_norm(
        nn.functional.conv2d(seen[0], layer.conv.weight),
        layer.bn.running_mean,
        layer.bn.running_var,
        layer.bn.weight,
        layer.bn.bias,
        eps=0.001,
    )
    want = normalised.clamp(min=0)[:, :7]
    as_map = found.reshape(2, 17, 17, 7)
    torch.testing.assert_close(as_map.permute(0, 3, 1, 2), want, rtol=1e-4, atol=1e-4)
    assert found.min() == 0 and found.std() > 0.1


@pytest.mark.parametrize("published", [False, True])
def test_a_score_by_it(
    published: bool,
    weights: Path,
    images: torch.Tensor,
    theirs: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Called FID with the published weights alone; compared with the paper's with 50,000 alone."""
    pictures = images.permute(0, 2, 3, 1).numpy()
    mu = np.random.default_rng(0).standard_normal(2048)
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)} if published else {}
    reference = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(reference, arr_0=pictures[:4], mu=mu, sigma=np.eye(2048), **spatial)
    np.savez(tmp_path / "samples.npz", arr_0=pictures)
    config = EvaluateConfig(
        **{"workspace": str(tmp_path / "ws"), "samples": str(tmp_path / "samples.npz")},
        **{"reference": str(reference), "network_weights": str(weights), "batch_size": 5},
        **{"device": "cpu", "allow_few": True, "is_split": 5, "compare": "paper"},
        any_weights=not published,
    )
    if published:
        with pytest.raises(MismatchError, match="is not the published weights"):
            evaluate(config, Silent())
        monkeypatch.setitem(NETWORKS._entries, "inception-v3", published_as(weights))
    result = evaluate(config, Silent())
    pool, logits = (part.double().numpy() for part in theirs)
    centred = (pool - pool.mean(0)) / 2  # over the root of N - 1
    roots = np.linalg.svd(centred, compute_uv=False).sum()
    distance = ((mu - pool.mean(0)) ** 2).sum() + 2048 + (centred**2).sum() - 2 * roots
    assert result["metrics"]["frechet_distance"] == pytest.approx(distance, rel=1e-5)
    assert result["metrics"]["inception_score"] == pytest.approx(
        isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)[
            "inception_score_mean"
        ],
        rel=1e-4,
    )
    assert (result["metrics"]["spatial_frechet_distance"] is not None) == published
    assert result["network"]["published"] == published
    assert result["kind"] == ("FID" if published else "Fréchet distance")
    assert summary(result).startswith("FID " if published else "frechet_distance ")
    assert result["versions"]["torch-fidelity"] == "0.4.0"
    why = ["5 samples, not 50,000"]
    why += [] if published else ["another network than the published Inception-v3"]
    why += ["64 pixels, not 256"]
    assert result["compare"]["because"] == why and not result["compare"]["comparable"]


def published_as(weights: Path) -> NetworkSpec:
    """The table's entry as if this were the published file."""
    return NetworkSpec(**{**vars(NETWORKS["inception-v3"]), "sha256": file_sha256(weights)[:8]})


def features(seed: int, count: int = 60, width: int = 24) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, width)) + seed / 4).astype(np.float32)


def test_the_metrics_equal_torch_fidelity() -> None:
    samples, reference = features(1), features(2, 50)
    both: list[Any] = []
    for rows in (samples, reference):
        running = RunningStatistics()
        running.update(rows)
        both += running.finalize()
    statistics = [fid_features_to_statistics(torch.from_numpy(r)) for r in (samples, reference)]
    fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(*both) == pytest.approx(fid, rel=1e-5)

    pair = torch.from_numpy(samples), torch.from_numpy(reference)
    settings = {"kid_subsets": 7, "kid_subset_size": 20, "rng_seed": 5, "verbose": False}
    kid = kid_features_to_metric(*pair, **settings)
    found = kid_of_subsets(reference, samples, subsets=7, size=20, seed=5)
    assert found.mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-4)
    assert found.std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-4)

    prc = prc_features_to_metric(*pair, verbose=False, save_cpu_ram=False)
    precision, recall = precision_recall(reference, samples)
    assert (precision, recall) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1

    isc = isc_features_to_metric(torch.from_numpy(samples), splits=3, shuffle=False)
    assert inception_score(samples, 20) == pytest.approx(isc["inception_score_mean"], rel=1e-6)


def test_files_of_old_without_counters(
    weights: Path, tmp_path: Path, images: torch.Tensor, theirs: tuple[torch.Tensor, Any]
) -> None:
    state: State = torch.load(weights, weights_only=True)
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    found = load_network("inception-v3", weights=str(tmp_path / "old.pth"))
    torch.testing.assert_close(found.features(images[:2]).pool, theirs[0][:2], rtol=1e-4, atol=1e-4)


def test_what_is_refused(weights: Path, tmp_path: Path) -> None:
    config = CommonConfig(device="cpu")
    settings: dict[str, Any] = {"resolution": 64, "num_rows": 5, "shard_rows": 5, "of": {}}
    with pytest.raises(MismatchError, match=r"is not the published weights of network 'inception"):
        judge_spec(config, "inception-v3", str(weights), **settings)
    assert not is_published("inception-v3", "0" * 64)
    assert is_published("inception-v3", "6726825d" + "0" * 56)
    with pytest.raises(MissingError, match="no weights file at none.pth for network 'inception-v"):
        judge_spec(config, "inception-v3", "none.pth", **settings)
    state: State = torch.load(weights, weights_only=True)
    del state["fc.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(MismatchError, match=r"does not fit network 'inception-v3': missing: fc.we"):
        load_network("inception-v3", weights=str(tmp_path / "part.pth"))
    (tmp_path / "torn.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DamagedError, match="torn.pth"):
        load_network("inception-v3", weights=str(tmp_path / "torn.pth"))


def test_the_librarys_own_download(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file as if from the network: a wrong one is refused, a present one is not fetched."""
    name = "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / "site").mkdir()
    url = (tmp_path / "site" / name).as_uri()
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(MissingError, match=rf"cannot get {name} from torch-fidelity's release"):
        load_network("inception-v3")
    (tmp_path / "site" / name).write_bytes(weights.read_bytes())
    with pytest.raises(MissingError, match="invalid hash value"):
        load_network("inception-v3")
    assert not (tmp_path / "hub" / "checkpoints" / name).exists()
    monkeypatch.setitem(NETWORKS._entries, "inception-v3", published_as(weights))
    assert load_network("inception-v3").name == "inception-v3"

    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert load_network("inception-v3").name == "inception-v3"  # it is in the hub's folder
