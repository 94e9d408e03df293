"""`repa grid` and `repa sweep`: the samples and scores of single commands, on one page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repa_pipeline.cli import main
from repa_pipeline.commands_pictures import guidances
from repa_pipeline.models import MODELS, build_model
from repa_pipeline.stages.sample import open_samples, read_settings, sample_blocks
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import make_samples, toy_sample_config, write_toy_runs
from repa_pipeline.training.runs import Run

SIDE, GAP = 64, 2
SCORING = ("--network=digits-cnn", "--is-split=12", "--kid-subsets=0", "--device=cpu")
COMMON = ("--device=cpu", "--threads=1", "--num-steps=4", "--shard-rows=5", "--seed=3")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    with isolated_tables(folder):
        write_toy_runs(folder, first={}, second={"seed": 1})
        yield folder


def repa(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def run(command: str, workspace: Path, *arguments: str) -> int:
    return repa(command, f"--workspace={workspace}", *COMMON, *arguments)


def images_of(workspace: Path, output: Path, **changes: Any) -> np.ndarray[Any, Any]:
    settings = {"seed": 3, "output": str(output), "outputs": ("images",), **changes}
    stage = make_samples(toy_sample_config(workspace, **settings))
    return np.concatenate([block.copy() for block in sample_blocks(open_samples(stage.output))])


def test_guidances_without_guidance_come_once() -> None:
    assert guidances("1,1.5:2:0.5", "0,0.6:0.7:0.1") == [
        (1.0, (0.0, 1.0)),
        (1.5, (0.0, 0.6)),
        (1.5, (0.0, 0.7)),
        (2.0, (0.0, 0.6)),
        (2.0, (0.0, 0.7)),
    ]


def test_a_grid_shows_what_repa_sample_makes(workspace: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "grid"
    arguments = ("--run=first", "--run=second", "--cfg=1,2", "--interval=0,0.7", "--classes=2,0")
    assert run("grid", workspace, *arguments, "--per-class=3", f"--output={folder}") == 0
    labels = tmp_path / "labels.txt"
    labels.write_text("2\n0\n2\n0\n2\n0\n")
    with Image.open(folder / "grid.png") as image:
        picture = np.asarray(image)
    step = SIDE + GAP
    assert picture.shape == (4 * step + GAP, 6 * step + GAP, 3)
    for row, (name, cfg) in enumerate((r, c) for r in ("first", "second") for c in (1.0, 2.0)):
        given = {"run": name, "cfg": cfg, "interval": (0.0, 0.7) if cfg > 1 else (0.0, 1.0)}
        made = images_of(
            workspace, tmp_path / f"{row}", **given, num_images=6, batch_size=6, labels=str(labels)
        )
        by_class = [*made[0::2], *made[1::2]]
        for column, expected in enumerate(by_class):
            top, left = GAP + row * step, GAP + column * step
            assert (picture[top : top + SIDE, left : left + SIDE] == expected).all()
    page = (folder / "index.html").read_text()
    assert page.count("<img ") == 8 and "samples 1, 3, 5" in page
    assert "second/step-00000012, cfg 2 on [0, 0.7]" in page
    first = (folder / "index.html").read_bytes()
    capsys.readouterr()
    assert run("grid", workspace, *arguments, "--per-class=3", f"--output={folder}") == 0
    assert capsys.readouterr().out.count("nothing to do") == 4
    assert (folder / "index.html").read_bytes() == first


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--classes=1,99", "classes: got 1,99, expected different numbers from 0 to "),
        ("--classes=1,1", "classes: got 1,1, expected different numbers from 0 to "),
        ("--cfg=2:1:1", "cfg (flag --cfg): got '2:1:1', expected FROM <= TO"),
        ("--interval=0.5", "interval (flag --interval): got '0.5', expected LOW,HIGH"),
        ("--run=third", "no run 'third'"),
    ],
)
def test_a_grid_of_what_is_not_there(
    workspace: Path, flag: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grid", workspace, "--run=first", flag) == 2
    assert said in capsys.readouterr().err


def test_a_weaker_checkpoint_guides_what_is_guided(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weaker = str(Run(workspace / "runs" / "second").newest_checkpoint())
    common = ("--run=first", "--cfg=1,2", "--classes=1", "--per-class=2")
    pages = []
    for more in ((), (f"--guide-checkpoint={weaker}",)):
        assert run("grid", workspace, *common, *more) == 0
        said = capsys.readouterr().out
        pages.append(Path(said.split("page: ")[1].split("\n")[0]).parent)
    plain, auto = pages
    shown = [
        [np.concatenate([b.copy() for b in sample_blocks(open_samples(str(p / "samples" / row)))])
         for row in ("0", "1")]
        for p in pages
    ]  # fmt: skip
    assert plain != auto
    np.testing.assert_array_equal(shown[1][0], shown[0][0])
    assert (shown[1][1] != shown[0][1]).any()
    assert "guide" not in read_settings(str(auto / "samples" / "0"))
    assert read_settings(str(auto / "samples" / "1"))["guide"]["step"] == 12


def test_a_grid_of_other_rows_keeps_the_page_that_was_there(
    workspace: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "grid"
    arguments = ("--run=first", "--classes=0", "--per-class=2", f"--output={folder}")
    assert run("grid", workspace, *arguments, "--cfg=1,2") == 0
    before = {name: (folder / name).read_bytes() for name in ("index.html", "grid.png")}
    assert run("grid", workspace, *arguments, "--cfg=1") == 0
    (page,), (picture,) = folder.glob("index.*.html"), folder.glob("grid.*.png")
    assert (page.read_bytes(), picture.read_bytes()) == tuple(before.values())
    assert (folder / "grid.png").read_bytes() != before["grid.png"]
    assert run("grid", workspace, *arguments, "--cfg=1,2") == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(list(folder.glob("index.*.html"))) == 2


def test_a_grid_of_checkpoints_of_other_images(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs.pt"
    network = build_model(MODELS["SiT-XS/2"], input_size=4, in_channels=4, num_classes=3)
    torch.save(network.state_dict(), theirs)
    given = ("--run=first", f"--checkpoint={theirs}", "--num-heads=4", f"--output={tmp_path}/grid")
    assert run("grid", workspace, *given) == 2
    assert "has resolution 64, " in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """Of twelve pictures of noise, by the digits' network."""
    source = tmp_path / "source" / "0"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    path = str(tmp_path / "reference.npz")
    made = ("--resolution=64", f"--source={source.parent}", f"--output={path}")
    assert repa("reference", f"--workspace={tmp_path}", *SCORING, *made) == 0
    return path


def test_a_sweep_has_the_scores_of_single_commands(
    workspace: Path, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, folder = f"--workspace={tmp_path}", tmp_path / "sweep"
    few = (*SCORING, "--allow-few", f"--reference={reference}")
    arguments = (*few, "--run=first", "--cfg=1,3", "--interval=0,0.5:1:0.5", "--num-images=12")
    assert run("sweep", workspace, *arguments, "--batch-size=4", f"--output={folder}") == 0
    points = json.loads((folder / "sweep.json").read_bytes())["points"]
    assert [(p["cfg"], tuple(p["interval"])) for p in points] == guidances("1,3", "0,0.5:1:0.5")
    alone = tmp_path / "alone"
    images_of(workspace, alone, run="first", cfg=3.0, interval=(0.0, 0.5), num_images=12)
    assert repa("evaluate", space, *few, f"--samples={alone}") == 0
    result = json.loads((alone / "result.json").read_bytes())
    assert points[1]["metrics"] == result["metrics"]
    best = min(points, key=lambda p: p["metrics"]["frechet_distance"])
    said = capsys.readouterr().out
    least = best["metrics"]["frechet_distance"]
    assert f"least {result['kind']}: {least:.4g} with " in said
    page = (folder / "index.html").read_text()
    assert all(f"{p['metrics']['frechet_distance']:.4g}" in page for p in points)


def test_sweeps_of_other_guidances_share_points_and_keep_pages(
    workspace: Path, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    given = (*SCORING, "--allow-few", f"--reference={reference}", "--run=first", "--num-images=12")
    given += ("--batch-size=4", f"--output={folder}", "--interval=0,0.5")
    assert run("sweep", workspace, *given, "--cfg=1,2") == 0
    before = {name: (folder / name).read_bytes() for name in ("index.html", "sweep.json")}
    capsys.readouterr()
    assert run("sweep", workspace, *given, "--cfg=2,3") == 0
    said = capsys.readouterr().out
    assert said.count("nothing to do") == 1
    # Of 4 SDE steps at 1, 0.68, 0.36 and 0.04 two lie in [0, 0.5]: 6 evaluations an image.
    assert "\n144 model evaluations in all\n" in said
    (page,), (told,) = folder.glob("index.*.html"), folder.glob("sweep.*.json")
    assert (page.read_bytes(), told.read_bytes()) == tuple(before.values())
    points = json.loads((folder / "sweep.json").read_bytes())["points"]
    assert [p["cfg"] for p in points] == [2, 3]
    assert run("sweep", workspace, *given, "--cfg=1,2") == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--allow-few --reference=none.npz", "no reference file none.npz"),
        ("--no-allow-few", "Fréchet distance of 12 samples in 64 pool features: expected at least"),
        ("--network=mobilenet-v1", "network 'mobilenet-v1' loads from a local file only"),
        ("--allow-few --network=encoder:digits-vit", "was made with network digits-cnn"),
        ("--allow-few --checkpoint=none.pt", "no checkpoint none.pt"),
    ],
)
def test_a_sweep_that_cannot_be_scored_samples_nothing(
    workspace: Path,
    reference: str,
    tmp_path: Path,
    flags: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "sweep"
    given = (*SCORING, f"--reference={reference}", "--num-images=12", f"--output={folder}")
    for dry in ((), ("--dry-run",)):
        assert run("sweep", workspace, "--run=first", *given, *flags.split(), *dry) == 2
        assert said in capsys.readouterr().err
    assert not folder.exists()


def test_a_killed_sweep_goes_on_to_the_same_bytes(
    workspace: Path, reference: str, tmp_path: Path
) -> None:
    """SIGKILL in the samples of its second point, whose ledger then says what stands."""
    given = (*SCORING, "--allow-few", f"--reference={reference}", "--run=first", "--num-images=20")
    given += ("--batch-size=4", "--cfg=1,2,3", "--interval=0,0.5", "--num-steps=20")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    point = killed / "samples" / "cfg2-0-0.5"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REPA_")}
    environment["PYTHONPATH"] = f"{Path(__file__).resolve().parents[2]}:{workspace}"
    line = ["sweep", f"--workspace={workspace}", *COMMON, *given, f"--output={killed}"]
    with open(tmp_path / "said.txt", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "repa_pipeline", *line],
            cwd=tmp_path, env=environment, stdout=said, stderr=said,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list(point.glob("ledger/*/*.json"))) < 2:
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.002)
        process.kill()
        process.wait(60)
    assert not list(point.glob("judge.*/seal.json")) and not (killed / "index.html").exists()
    for folder in (killed, whole):
        assert run("sweep", workspace, *given, f"--output={folder}") == 0
    files = sorted(path.relative_to(killed) for path in killed.rglob("*") if path.is_file())
    others = (path for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(whole) for path in others)
    assert {"index.html", "sweep.json", "result.json"} <= {path.name for path in files}
    for path in files:
        found = (killed / path).read_bytes().replace(bytes(killed), bytes(whole))
        assert found == (whole / path).read_bytes(), path
