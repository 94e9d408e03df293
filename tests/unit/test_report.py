"""The report says what the result files say, and says it for every state of a workspace."""

from __future__ import annotations

import copy
import html
import json
import math
import pathlib
import re
import statistics
from typing import Any

import numpy as np
import pytest

from repa_pipeline.config import ReportConfig
from repa_pipeline.data.array import ArraySpec, begin_array, seal_array, write_shard
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.pictures import save_png
from repa_pipeline.report import write_report
from repa_pipeline.report_charts import COLOURS, Panel, thinned
from repa_pipeline.report_results import read_runs
from repa_pipeline.report_settings import differences
from repa_pipeline.report_twins import _T, find_twins, ratio_interval

TEACHER = "digits-vit"
METRICS = {
    "frechet_distance": 12.345678901,
    "spatial_frechet_distance": None,
    "inception_score": 8.7654321,
    "precision": 0.654321,
    "recall": 0.543219,
}


def make_run(
    workspace: pathlib.Path,
    name: str,
    *,
    teacher: str | None = TEACHER,
    seed: int = 0,
    steps: int = 200,
    settings: dict[str, Any] | None = None,
    num_events: int = 10,
) -> pathlib.Path:
    """A run folder as `repa train` leaves it, with falling losses; returns the folder."""
    folder = workspace / "runs" / name
    (folder / "checkpoints").mkdir(parents=True)
    arrays = {"latents.digits-vae.64": "11" * 32}
    if teacher:
        arrays[f"features.{teacher}.64"] = "22" * 32
    decided = {
        "data": {"arrays": arrays, "rows": "33" * 32},
        "dtype": "float32",
        "method": "repa" if teacher else "sit",
        "settings": {
            **{"model": "SiT-XS/2", "seed": seed, "batch_size": 64, "learning_rate": 1e-3},
            **{"align_coeff": 0.5, "projector_width": 256, "log_every": 20, **(settings or {})},
        },
    }
    config = {"steps": steps, **decided["settings"]}  # type: ignore[dict-item]
    write_json(folder / "run.json", {"config": config, "decided": decided})
    events = [_event(steps * (i + 1) // num_events, i, teacher, seed) for i in range(num_events)]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines, encoding="utf-8")
    write_json(folder / "checkpoints" / f"step-{steps:08d}.json", {})
    return folder


def _event(step: int, i: int, teacher: str | None, seed: int) -> dict[str, Any]:
    denoising = 0.4 + 1.3 * math.exp(-i / 3) + 0.01 * math.sin(7 * i + seed)
    alignment = {"alignment": -0.9 * (1 - math.exp(-(i + 1) / 4))} if teacher else {}
    losses = {"loss": denoising + 0.5 * alignment.get("alignment", 0), "denoising": denoising}
    pace = {"images_per_s": 300.0 + i, "data_wait": 0.001 * i, "skipped_steps": 0.0}
    norm = {"grad_norm": 0.3 + math.exp(-i / 2)}
    return {"event": "scalars", "step": step, **losses, **alignment, **norm, **pace}


def make_samples(
    run: pathlib.Path,
    distance: float | None,
    *,
    step: int = 200,
    agreement: float | None = None,
    sealed: bool = True,
    picture: bool = True,
    num_samples: int = 1000,
    **settings: Any,
) -> pathlib.Path:
    """A sample folder as `repa sample` and (with a distance) `repa evaluate` leave it."""
    manifest = {
        **{"kind": "samples", "checkpoint_sha256": "44" * 32, "step": step, "model": "SiT-XS/2"},
        **{"method": f"methods:{run.name}", "num_classes": 10, "class_names": None, "cfg": 1.8},
        **{"resolution": 8, "num_images": num_samples, "interval": [0.0, 0.7], "sampler": "sde"},
        **{"num_steps": 50, "seed": 0, "labels": "random", "batch_size": 100, "use_ema": True},
        **{"dtype": "float32", "decoder": "digits-vae", "source_rows": "33" * 32, **settings},
    }
    folder = run / "samples" / f"step{step}.{settings.get('seed', 0)}.{num_samples}"
    folder.mkdir(parents=True)
    colours = np.random.default_rng(step).integers(0, 255, (160, 160, 3), np.uint8)
    if picture:
        save_png(folder / "grid.png", colours)
    if sealed:
        _seal(folder, manifest)
    if distance is not None:
        write_json(folder / "result.json", make_result(manifest, distance, num_samples))
    if agreement is not None:
        judge = {"judge": "an SVM on 8x8 pixels", "held_out_accuracy": 0.9876}
        judge |= {"agreement": agreement, "num_samples": num_samples}
        write_json(folder / "judge.json", judge)
    return folder


def _seal(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    store = open_store(str(folder))
    spec = ArraySpec("images", 2, RecordLayout((8, 8, 3), "uint8", 2), manifest)
    begin_array(store, spec)
    num_bytes, sha256 = write_shard(store, spec, 0, np.zeros((2, 8, 8, 3), np.uint8))
    seal_array(store, spec, [{"index": 0, "rows": 2, "num_bytes": num_bytes, "sha256": sha256}])


def make_result(manifest: dict[str, Any], distance: float, num_samples: int) -> dict[str, Any]:
    return {
        "metrics": {**METRICS, "frechet_distance": distance},
        "num_samples": num_samples,
        "samples": "somewhere",
        "sample_settings": manifest,
        "network": {"name": "digits-cnn", "weights_sha256": "55" * 32},
        "reference": {
            **{"name": "the training source", "kind": "training source", "num_images": 1500},
            **{"source": "s3://bucket", "rows_digest": "33" * 32, "sha256": "66" * 32},
        },
        "precision_recall": {"mode": "float32", "k": 3, "reference": 1500},
        "inception_score_block": 1000,
        "device": "cpu",
        "versions": {"python": "3.11.0", "torch": "9.8.7"},
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_twins(
    workspace: pathlib.Path, aligned: float, vanilla: float, seed: int = 0, **samples: Any
) -> None:
    """An aligned and a vanilla run with the given distances."""
    for teacher, distance in ((TEACHER, aligned), (None, vanilla)):
        run = make_run(workspace, f"{teacher or 'vanilla'}.{seed}", teacher=teacher, seed=seed)
        make_samples(run, distance, **samples)


def report(workspace: pathlib.Path) -> str:
    return write_report(ReportConfig(workspace=str(workspace))).read_text(encoding="utf-8")


@pytest.fixture
def charts() -> None:
    """Asks for the real charts, which take most of the time of a page."""


@pytest.fixture(autouse=True)
def _quick_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "charts" not in request.fixturenames:
        for module in ("report", "report_training"):
            monkeypatch.setattr(f"repa_pipeline.{module}.draw", lambda panels, name: "<svg></svg>")


def words(page: str) -> str:
    """What a reader of the page sees, without the charts."""
    body = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.S)
    body = re.sub("</?code>", "", body)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_numbers_are_those_of_the_result(tmp_path: pathlib.Path) -> None:
    run = make_run(tmp_path, "aligned")
    make_samples(run, METRICS["frechet_distance"], agreement=0.8765)
    page = report(tmp_path)
    for value in METRICS.values():
        if value is not None:
            assert f'<span title="{value!r}">{value:.4g}</span>' in page
    seen = words(page)
    assert "spatial Fréchet distance not given by this network" in seen
    assert "87.6% of 1,000 samples show the class that they were asked for" in seen
    assert "an SVM on 8x8 pixels (right on 98.8% of held-out images)" in seen
    assert "1,000 samples, seed 0, sde 50 steps, cfg 1.8 on t in [0, 0.7], random labels" in seen
    assert "FID" not in seen
    for hash_ in ("55" * 32, "66" * 32):
        assert hash_ in seen
    assert "versions.torch 9.8.7" in seen
    assert "settings.learning_rate 0.001" in seen


def test_run_table_tells_medians_and_last_losses(tmp_path: pathlib.Path) -> None:
    run = make_run(tmp_path, "aligned", steps=200)
    make_run(tmp_path, "plain", teacher=None)
    page = report(tmp_path)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rate = statistics.median(event["images_per_s"] for event in events)
    wait = statistics.median(event["data_wait"] for event in events)
    assert f'<span title="{rate!r}">{rate:.4g}</span>' in page
    assert f'<span title="{wait!r}">{wait:.2%}</span>' in page
    for name in ("loss", "denoising", "alignment", "grad_norm"):
        last = events[-1][name]
        assert f'<span title="{last!r}">{last:.4g}</span>' in page
    seen = words(page)
    assert f"aligned runs/aligned SiT-XS/2 {TEACHER} repa 0 200 / 200" in seen
    assert "plain runs/plain SiT-XS/2 vanilla sit 0 200 / 200" in seen
    assert " none " in seen.split("plain runs/plain")[1].split("medians")[0]


def test_the_report_calls_the_distance_what_the_result_calls_it(tmp_path: pathlib.Path) -> None:
    folder = make_samples(make_run(tmp_path, "aligned"), 7.5)
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", {**result, "kind": "FID"})
    assert "FID 7.5" in words(report(tmp_path))


@pytest.mark.parametrize(
    ("aligned", "ratio", "difference", "conclusion"),
    [
        (12.0, "0.6", "is 40 % lower (lower is better)", "the aligned run is ahead."),
        (25.0, "1.25", "is 25 % higher (lower is better)", "the vanilla run is ahead."),
        (20.2, "1.01", "difference of 1 % is less than the noise", "neither is ahead."),
        (19.8, "0.99", "difference of 1 % is less than the noise", "neither is ahead."),
    ],
)
def test_twin_sentence(
    tmp_path: pathlib.Path, aligned: float, ratio: str, difference: str, conclusion: str
) -> None:
    make_twins(tmp_path, aligned, 20.0)
    seen = words(report(tmp_path))
    distances = f"has a Fréchet distance of {aligned:.4g} and vanilla.0 (vanilla) of 20"
    assert f"{distances}: {ratio} times the vanilla run's." in seen
    assert difference in seen
    ends = ("the aligned run is ahead.", "the vanilla run is ahead.", "neither is ahead.")
    assert [end for end in ends if end in seen] == [conclusion]
    assert "One seed: the spread between seeds is not measured." in seen


def test_margin_grows_as_samples_get_few(tmp_path: pathlib.Path) -> None:
    make_twins(tmp_path, 15.0, 20.0, num_samples=40)
    make_twins(tmp_path, 15.0, 20.0, seed=1, num_samples=50_000)
    twins = {t.seed: t for g in find_twins(read_runs(_config(tmp_path))) for t in g.twins}
    assert twins[0].margin == pytest.approx(0.02 + 2 / math.sqrt(40))
    assert (twins[0].verdict, twins[1].verdict) == ("tie", "aligned")


def test_several_seeds_give_mean_and_spread(tmp_path: pathlib.Path) -> None:
    ours, theirs = [12.0, 13.0, 12.5], [20.0, 21.0, 19.0]
    for seed, pair in enumerate(zip(ours, theirs, strict=True)):
        make_twins(tmp_path, *pair, seed=seed)
    seen = words(report(tmp_path))
    assert "Over 3 training seeds at step 200" in seen
    assert f"is 12.5 ± {statistics.stdev(ours):.2g} aligned with {TEACHER}" in seen
    assert f"20 ± {statistics.stdev(theirs):.2g} vanilla" in seen
    ratio, low, high = ratio_interval(ours, theirs)
    assert f"{ratio:.3g}, 95 % interval {low:.3g} to {high:.3g}: the aligned runs are ahead" in seen
    assert seen.count("times the vanilla run's.") == 3


def test_seeds_that_disagree_show_no_difference(tmp_path: pathlib.Path) -> None:
    make_twins(tmp_path, 10.0, 20.0, seed=0)
    make_twins(tmp_path, 20.0, 10.0, seed=1)
    assert "the interval includes 1, so these seeds show no difference" in words(report(tmp_path))


def test_sampling_seeds_of_one_training_are_called_so(tmp_path: pathlib.Path) -> None:
    for teacher, distances in ((TEACHER, (10.0, 10.1)), (None, (20.0, 20.3))):
        run = make_run(tmp_path, teacher or "vanilla", teacher=teacher)
        for seed, distance in enumerate(distances):
            make_samples(run, distance, seed=seed)
    seen = words(report(tmp_path))
    assert "Over 2 sampling seeds" in seen
    assert "this spread is that of sampling alone" in seen


def test_sampling_seeds_are_averaged_before_training_seeds_are_compared(
    tmp_path: pathlib.Path,
) -> None:
    for seed, (ours, theirs) in enumerate((((8.0, 12.0), (20.0, 20.0)), ((11.0,), (22.0,)))):
        for teacher, distances in ((TEACHER, ours), (None, theirs)):
            run = make_run(tmp_path, f"{teacher}.{seed}", teacher=teacher, seed=seed)
            for sample_seed, distance in enumerate(distances):
                make_samples(run, distance, seed=sample_seed)
    seen = words(report(tmp_path))
    assert f"10.5 ± {statistics.stdev([10, 11]):.2g} aligned" in seen
    assert "geometric mean of the ratios is 0.5, 95 % interval 0.5 to 0.5" in seen


def test_ratio_interval_is_students_t_on_logarithms() -> None:
    special = pytest.importorskip("scipy.special")
    for freedom, quantile in enumerate(_T, start=1):
        assert quantile == pytest.approx(special.stdtrit(freedom, 0.975), abs=6e-4)
    ours, theirs = [2.0, 2.5, 1.9, 2.2], [3.0, 3.1, 3.3, 2.9]
    logs = np.log(np.array(ours) / np.array(theirs))
    half = special.stdtrit(3, 0.975) * logs.std(ddof=1) / 2
    expected = tuple(np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]))
    assert ratio_interval(ours, theirs) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cfg": 1.0}, "sample cfg"),
        ({"num_samples": 500}, "num_samples, sample num_images"),
        ({"step": 100}, "step"),
    ],
)
def test_unequal_sampling_is_not_compared(
    tmp_path: pathlib.Path, change: dict[str, Any], named: str
) -> None:
    make_samples(make_run(tmp_path, "aligned"), 10.0)
    make_samples(make_run(tmp_path, "plain", teacher=None), 20.0, **change)
    seen = words(report(tmp_path))
    assert "times the vanilla run's." not in seen
    assert f"nearest vanilla scores, of plain, were made with another {named}." in seen


def test_unequal_training_or_scoring_is_not_compared(tmp_path: pathlib.Path) -> None:
    make_samples(make_run(tmp_path, "aligned"), 10.0)
    other = make_run(tmp_path, "plain", teacher=None, settings={"batch_size": 32})
    folder = make_samples(other, 20.0)
    result = json.loads((folder / "result.json").read_text())
    result["network"]["weights_sha256"] = "77" * 32
    write_json(folder / "result.json", result)
    assert "made with another network, train batch_size." in words(report(tmp_path))


def test_layout_and_alignment_settings_do_not_part_twins(tmp_path: pathlib.Path) -> None:
    make_samples(make_run(tmp_path, "aligned", settings={"align_coeff": 1.0}), 10.0, batch_size=7)
    make_samples(make_run(tmp_path, "plain", teacher=None), 20.0)
    assert "0.5 times the vanilla run's." in words(report(tmp_path))


def test_distances_against_steps(tmp_path: pathlib.Path, charts: None) -> None:
    for teacher, scale in ((TEACHER, 1.0), (None, 1.5)):
        run = make_run(tmp_path, teacher or "vanilla", teacher=teacher)
        for step in (50, 100, 200):
            make_samples(run, scale * 1000 / step, step=step)
        make_samples(run, scale, step=200, num_samples=500)
    page = report(tmp_path)
    # Training curves, speed, one chart of distances; the 500 samples are in none.
    assert page.count("<svg") == 3
    assert "Fréchet distance (digits-cnn) against training steps" in page
    seen = words(page)
    assert "Pairs at earlier steps (2)" in seen
    assert "All points: 1,000 samples" in seen and "All points: 500 samples" not in seen
    order = [seen.index(f"{TEACHER}, step {step}") for step in (50, 100, 200)]
    assert order == sorted(order)


def test_one_checkpoint_gives_a_table_only(tmp_path: pathlib.Path) -> None:
    make_samples(make_run(tmp_path, "aligned"), 10.0)
    page = report(tmp_path)
    assert page.count("<svg") == 2
    assert "No run has two checkpoints scored alike" in page


def test_missing_parts_are_said_to_be_missing(tmp_path: pathlib.Path) -> None:
    run = make_run(tmp_path, "fresh", num_events=1)
    (run / "events.jsonl").unlink()
    (run / "checkpoints" / "step-00000200.json").unlink()
    make_samples(make_run(tmp_path, "half"), None, picture=False, sealed=False)
    make_samples(make_run(tmp_path, "sampled"), None)
    seen = words(report(tmp_path))
    assert "0 / 200 not logged yet not logged yet not logged yet" in seen
    assert "Nothing logged yet: fresh." in seen
    assert "fresh: no samples yet, run repa sample --run fresh." in seen
    assert "no picture (grid.png) yet" in seen
    assert "no finished samples in" in seen and "run repa sample first" in seen
    assert seen.count("not scored yet: run repa evaluate --samples FOLDER") == 2
    assert "Samples are not scored yet" in seen
    assert "Labels not judged." in seen
    assert "sampled is not scored yet" in seen


def test_no_logged_numbers_at_all(tmp_path: pathlib.Path, charts: None) -> None:
    run = make_run(tmp_path, "plain", teacher=None)
    (run / "events.jsonl").write_text('{"event": "scalars", "step": 20, "denoising": NaN}\n{"ev')
    page = report(tmp_path)
    assert "no aligned run has logged yet" in page
    assert "There is no aligned run yet" in page


def test_damaged_files_are_named(tmp_path: pathlib.Path) -> None:
    run = make_run(tmp_path, "aligned")
    folder = make_samples(run, 10.0, agreement=0.5)
    (folder / "result.json").write_text("{")
    (folder / "judge.json").write_text("[1]")
    (folder / "grid.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    other = make_run(tmp_path, "plain", teacher=None)
    (other / "run.json").write_text("nonsense")
    seen = words(report(tmp_path))
    for name in ("result.json", "judge.json", "grid.png", "plain: run.json"):
        assert f"{name} cannot be read" in seen


def test_a_result_of_the_samples_pictures_is_shown(tmp_path: pathlib.Path) -> None:
    """Their settings are those of the samples, and say the format besides."""
    folder = make_samples(make_run(tmp_path, "aligned"), 10.0)
    result = json.loads((folder / "result.json").read_text())
    result["sample_settings"] |= {"kind": "jpeg", "quality": 95}
    write_json(folder / "result.json", result)
    assert "of other samples" not in words(report(tmp_path))


def test_a_result_of_other_samples_is_not_shown(tmp_path: pathlib.Path) -> None:
    folder = make_samples(make_run(tmp_path, "aligned"), 10.0)
    result = json.loads((folder / "result.json").read_text())
    result["sample_settings"]["cfg"] = 3.0
    write_json(folder / "result.json", result)
    seen = words(report(tmp_path))
    assert "result.json is of other samples: run repa evaluate again" in seen
    assert "not scored yet" in seen


def test_a_score_outlives_its_images(tmp_path: pathlib.Path) -> None:
    make_samples(make_run(tmp_path, "aligned"), 10.0, sealed=False)
    assert "Fréchet distance 10" in words(report(tmp_path))


def test_every_text_is_escaped(tmp_path: pathlib.Path, charts: None) -> None:
    evil = '<script>alert("x")&$'
    run = make_run(tmp_path, evil, teacher="<i>teacher", settings={"model": "<b>model"})
    folder = make_samples(run, 10.0, agreement=0.5, sampler="<u>sampler")
    result = json.loads((folder / "result.json").read_text())
    result["network"]["name"] = "<em>network"
    result["metrics"]["<s>metric"] = 1.0
    write_json(folder / "result.json", result)
    write_json(folder / "judge.json", {"judge": "<q>judge", "agreement": 0.5})
    page = report(tmp_path)
    for start in ("<script", "<i>", "<b>", "<u>", "<em>", "<s>", "<q>"):
        assert start not in page
    seen = words(page)
    for text in (evil, "<i>teacher", "<b>model", "<u>sampler", "<em>network", "<q>judge"):
        assert text in seen


def test_nothing_outside_is_referenced(tmp_path: pathlib.Path, charts: None) -> None:
    make_twins(tmp_path, 10.0, 20.0)
    page = report(tmp_path)
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert all(src.startswith("data:image/png;base64,") for src in re.findall('src="([^"]*)', page))
    assert all(ref.startswith("#") for ref in re.findall('href="([^"]*)', page))
    defined = re.findall(r'\bid="([^"]*)"', page)
    assert set(re.findall('href="#([^"]*)"', page)) | set(
        re.findall(r"url\(#(.*?)\)", page)
    ) <= set(defined)


def test_ids_of_charts_do_not_clash(tmp_path: pathlib.Path, charts: None) -> None:
    run = make_run(tmp_path, "aligned")
    for step in (100, 200):
        make_samples(run, 10.0, step=step)
    charts = re.findall("<svg.*?</svg>", report(tmp_path), flags=re.S)
    ids = [set(re.findall(r'\bid="([^"]*)"', chart)) for chart in charts]
    assert len(ids) == 3 and all(ids) and len(set.union(*ids)) == sum(map(len, ids))


def test_equal_results_are_equal_bytes(tmp_path: pathlib.Path, charts: None) -> None:
    make_twins(tmp_path, 10.0, 20.0)
    config = _config(tmp_path)
    first = write_report(config).read_bytes()
    assert write_report(config).read_bytes() == first


def test_long_lists_are_counted(tmp_path: pathlib.Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    make_samples(make_run(tmp_path, "aligned"), 10.0, class_names=names)
    assert "class_names 1,000 values" in words(report(tmp_path))


def test_large_pictures_are_made_smaller(tmp_path: pathlib.Path) -> None:
    folder = make_samples(make_run(tmp_path, "aligned"), 10.0)
    save_png(folder / "grid.png", np.zeros((1300, 2600, 3), np.uint8))
    assert 'width="1200" height="600"' in report(tmp_path)


def test_output_and_its_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(MissingError, match="no runs in .*: run `repa train` first"):
        write_report(_config(tmp_path))
    make_run(tmp_path, "aligned")
    assert write_report(_config(tmp_path)) == tmp_path / "report.html"
    elsewhere = tmp_path / "pages" / "one.html"
    assert write_report(ReportConfig(workspace=str(tmp_path), output=str(elsewhere))) == elsewhere
    runs_dir = str(tmp_path / "runs")
    with pytest.raises(ConfigError, match="give --output FILE"):
        write_report(ReportConfig(workspace="s3://bucket/ws", runs_dir=runs_dir))
    remote = ReportConfig(workspace="s3://bucket/ws", runs_dir=runs_dir, output=str(elsewhere))
    assert "Training report: ws" in write_report(remote).read_text(encoding="utf-8")


def test_other_versions_of_the_files_are_read(tmp_path: pathlib.Path) -> None:
    """Keys that another version does not write are called not recorded."""
    run = make_run(tmp_path, "aligned")
    folder = make_samples(run, 10.0, sealed=False)
    result = json.loads((folder / "result.json").read_text())
    for key in ("network", "reference", "sample_settings", "num_samples"):
        smaller = copy.deepcopy(result)
        del smaller[key]
        write_json(folder / "result.json", smaller)
        assert "Training report" in report(tmp_path)
    write_json(run / "run.json", {})
    seen = words(report(tmp_path))
    assert "not recorded vanilla not recorded not recorded 200 / unknown" in seen


# Watching runs: losses by t, speed, scores on the way, settings that differ.


def add_events(run: pathlib.Path, *events: dict[str, Any]) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def drawn(monkeypatch: pytest.MonkeyPatch, workspace: pathlib.Path) -> dict[str, Panel]:
    """The panels of the page, by title."""
    panels: list[Panel] = []

    def keep(shown: Any, name: str) -> str:
        panels.extend(shown)
        return "<svg></svg>"

    for module in ("report", "report_training"):
        monkeypatch.setattr(f"repa_pipeline.{module}.draw", keep)
    report(workspace)
    return {panel.title: panel for panel in panels}


def lines_of(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    return {line.label: (list(line.x), list(line.y)) for line in panel.lines}


def test_losses_by_t_are_those_of_the_last_interval(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "aligned")
    make_run(tmp_path, "old")  # logged without buckets
    add_events(
        run,
        {"event": "scalars", "step": 210, "denoising": 1.0, "denoising/t0.0-0.1": 9.0},
        {
            **{"event": "scalars", "step": 220, "denoising": 1.0, "denoising/t0.9-1.0": 0.25},
            **{"denoising/t0.0-0.1": 0.5, "alignment/t0.0-0.1": -0.75, "alignment/vit-a": -0.5},
            **{"alignment/vit-a/t0.0-0.1": -0.6},
        },
        {"event": "scalars", "step": 230, "denoising": 1.5},  # no good step has a bucket here
    )
    panels = drawn(monkeypatch, tmp_path)
    (x, y) = lines_of(panels["Denoising loss by t"])["aligned"]
    assert (x, y) == ([pytest.approx(0.05), pytest.approx(0.95)], [0.5, 0.25])
    assert lines_of(panels["Denoising loss by t"]).keys() == {"aligned"}
    assert lines_of(panels["Alignment by t"]) == {"aligned": ([pytest.approx(0.05)], [0.75])}
    assert lines_of(panels["Alignment with vit-a"]) == {"aligned": ([220], [0.5])}
    assert not [title for title in panels if "t0.0" in title]
    seen = words(report(tmp_path))
    assert "last denoising" in seen and "last denoising/t" not in seen


def test_speed_and_memory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "fast", num_events=1)
    make_run(tmp_path, "plain", teacher=None)
    pace = {"images_per_s": 400.0, "mfu": 0.25, "data_wait": 0.01, "bytes_per_s": 2e8}
    memory = {"rss_bytes": 3e9, "peak_device_bytes": 5e10, "skipped_steps": 7.0}
    add_events(
        run,
        {"event": "scalars", "step": 220, **pace, **memory},
        {"event": "scalars", "step": 240, **pace, **memory, "mfu": 0.75, "rss_bytes": 2e9},
        {"event": "scalars", "step": 260, **pace, **memory, "bytes_per_s": 3e8, "mfu": 0.5},
    )
    page = report(tmp_path)
    seen = words(page).split("Speed and memory")[1]
    assert "● fast 400 50.0% 1.00% 200 3 50 7" in seen
    assert "■ plain" not in seen and "● plain 304.5 peak unknown" in seen
    panels = drawn(monkeypatch, tmp_path)
    assert lines_of(panels["Model FLOPs utilisation"]) == {
        "fast": ([220, 240, 260], [25.0, 75.0, 50.0])
    }
    assert lines_of(panels["Read"])["fast"][1] == pytest.approx([200.0, 200.0, 300.0])
    assert lines_of(panels["Device memory"]) == {"fast": ([220, 240, 260], [50.0, 50.0, 50.0])}
    assert lines_of(panels["Data wait"])["fast"][1] == pytest.approx([0.0, 1.0, 1.0, 1.0])


def score(step: int, distance: float, **changes: Any) -> dict[str, Any]:
    how = {"num_samples": 100, "network": "digits-cnn", "reference": "the source", "path": "x"}
    numbers = {"eval/frechet_distance": distance, "eval/recall": distance / 100}
    numbers |= {"eval/kid": 0.1, "eval/spatial_frechet_distance": 50.0}
    return {"event": "evaluation", "step": step, **how, **numbers, **changes}


def test_scores_on_the_way(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "aligned")
    other = make_run(tmp_path, "plain", teacher=None)
    # The second came late, after the scalars of step 200; the third is not comparable.
    add_events(run, score(100, 20.0), score(50, 40.0), score(200, 5.0, num_samples=999))
    add_events(
        other,
        score(100, 30.0),
        {"event": "evaluation_skipped", "step": 150, "reason": "too slow"},
        {"event": "evaluation_skipped", "step": 180, "reason": "no weights"},
    )
    seen = words(report(tmp_path))
    assert "100 samples, network digits-cnn, against the source" in seen
    assert "999 samples, network digits-cnn" in seen
    assert "plain: 2 evaluations were skipped; of step 180: no weights" in seen
    shown: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "repa_pipeline.report_training.draw",
        lambda panels, name: shown.extend((p.title, lines_of(p)) for p in panels) or "<svg></svg>",
    )
    report(tmp_path)
    scores = [lines for title, lines in shown if title == "Fréchet distance"]
    assert scores == [
        {"aligned": ([50, 100], [40.0, 20.0]), "plain": ([100], [30.0])},
        {"aligned": ([200], [5.0])},
    ]
    titles = ["Fréchet distance", "KID", "Recall", "Spatial Fréchet distance"]
    assert [title for title, _ in shown][-8:] == titles * 2
    # A score after the last interval hides none of its losses.
    assert read_runs(_config(tmp_path))[0].last().keys() >= {"loss", "denoising", "grad_norm"}


def test_settings_that_differ(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path, "a", settings={"learning_rate": 1e-3, "align_steps": 40})
    make_run(tmp_path, "b", settings={"learning_rate": 5e-4})
    make_run(tmp_path, "c", teacher=None, steps=400)
    runs = read_runs(_config(tmp_path))
    assert differences(runs) == {
        "align_steps": ["40", None, None],
        "data.arrays.features.digits-vit.64": ["22222222", "22222222", None],
        "learning_rate": ["0.001", "0.0005", "0.001"],
        "method": ["repa", "repa", "sit"],
        "steps": ["200", "200", "400"],
    }
    seen = words(report(tmp_path))
    assert "run align_steps data.arrays.features.digits-vit.64 learning_rate method steps" in seen
    assert "● a 40 22222222 0.001 repa 200" in seen
    assert "● c not recorded none 0.001 sit 400" in seen


def test_equal_runs_do_not_differ(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path, name)
    assert "The runs do not differ in any setting." in words(report(tmp_path))


def test_many_runs_stay_apart(tmp_path: pathlib.Path, charts: None) -> None:
    names = [f"sit-xs-2.teacher-{i:02d}" for i in range(12)]
    for i, name in enumerate(names):
        make_run(tmp_path, name, seed=i)
    page = report(tmp_path)
    keys = re.findall(r'<span style="color:(#\w+)">(.)</span> <strong>([^<]*)', page)
    by_run = {name: (colour, glyph) for colour, glyph, name in keys}
    assert list(by_run) == names and len(set(by_run.values())) == 12
    assert by_run[names[0]] == (COLOURS[0], "●") and by_run[names[7]] == (COLOURS[0], "■")
    assert words(page).count("sit-xs-2.teacher-11") >= 4
    # What is the same for all is folded away.
    folds = re.findall(r"<summary>([^<]*)</summary>", page)
    assert folds[:2] == ["Aligned runs that are not compared (12)", "Runs without samples (12)"]


def test_long_curves_are_averaged() -> None:
    x, y = list(range(1, 1001)), [float(i % 4) for i in range(1000)]
    thin_x, thin_y = thinned(x, y, limit=300)
    assert len(thin_x) == 250 and thin_x[:2] == [4, 8] and thin_y == [1.5] * 250
    assert thinned([1, 2, 3], [4.0, 5.0, 6.0], limit=2) == ([2, 3], [4.5, 6.0])
    assert thinned(x[:300], y[:300], limit=300) == (x[:300], y[:300])


def _config(workspace: pathlib.Path) -> ReportConfig:
    return ReportConfig(workspace=str(workspace))
