"""What a sampling pass writes: every output has the images of a direct run, and its settings."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.cli import main
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.objects import LocalStore, open_store
from repa_pipeline.data.shards import as_rows
from repa_pipeline.engine.contracts import run_phases
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import run_stage
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.metrics.adm_file import read_adm, read_adm_settings
from repa_pipeline.observe import Silent
from repa_pipeline.stages.judge import Judge
from repa_pipeline.stages.sample import (
    SampleStage,
    image_spec,
    open_latents,
    open_samples,
    read_settings,
    sample_blocks,
    sample_ledgers,
)
from repa_pipeline.stages.sample_plan import sample_stage, settle_outputs
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import make_samples, toy_sample_config, write_toy_runs

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("outputs")
    with isolated_tables(folder):
        write_toy_runs(folder)
        yield folder


@pytest.fixture(scope="module")
def direct(workspace: Path) -> Path:
    """Images and npz, as `repa sample` makes them without further words."""
    make(workspace, workspace / "direct")
    return workspace / "direct"


def make(workspace: Path, output: Path | str, **changes: Any) -> SampleStage:
    return make_samples(toy_sample_config(workspace, output=str(output), **changes))


def images_in(folder: Path | str) -> Array:
    return np.concatenate(list(sample_blocks(open_samples(str(folder)))))


def rows_of(folder: Path, name: str) -> Array:
    array = open_sealed(LocalStore(str(folder)), name, "sample")
    shards = range(array.spec.num_shards)
    return np.concatenate(
        [as_rows(array.read_shard(k, array.new_buffer()), array.spec.layout).copy() for k in shards]
    )


def members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in found
                found[member.name] = file.read()
    return found


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_all_outputs_of_one_pass(workspace: Path, direct: Path, tmp_path: Path) -> None:
    out = tmp_path / "all"
    stage = make(workspace, out, outputs=("npz", "png", "jpeg", "latents"), labels="balanced")
    assert [output.name for output in stage.outputs] == ["png", "jpeg", "latents", "images"]
    images, settings = images_in(out), read_settings(str(out))
    assert images.std() > 10 and len(images) == 10
    assert settings["labels"] == "balanced" and settings["cfg"] == 2.0

    assert np.array_equal(np.concatenate(list(read_adm(out / "samples.npz"))), images)
    assert json.loads(str(read_adm_settings(out / "samples.npz"))) == settings
    png = members(out / "png")
    assert sorted(png) == sorted(
        f"{k:09d}.{kind}" for k in range(10) for kind in ("cls", "json", "png")
    )
    for k in range(10):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png[f"{k:09d}.png"]))), images[k])
        assert int(png[f"{k:09d}.cls"]) == k % 3
        about = json.loads(png[f"{k:09d}.json"])
        assert (about["index"], about["label"]) == (k, k % 3)
        assert about["settings"]["checkpoint_sha256"] == settings["checkpoint_sha256"]
        assert about["settings"]["kind"] == "png" and about["settings"]["cfg"] == 2.0
    for k in range(10):
        coded = members(out / "jpeg")[f"{k:09d}.jpg"]
        decoded = np.asarray(Image.open(io.BytesIO(coded))).astype(int)
        assert np.abs(decoded - images[k]).mean() < 4 and coded[:2] == b"\xff\xd8"
    seal = json.loads((out / "png" / "seal.json").read_text())
    assert [s["name"] for s in seal["shards"]] == ["000000.tar", "000001.tar"]
    manifest = dict(open_latents(str(out)).spec.manifest)
    assert manifest.pop("autoencoder") == "tiny-kl" and manifest.pop("kind") == "sample-latents"
    assert manifest == {k: v for k, v in settings.items() if k != "kind"}


def test_webdataset_reads_the_tars(workspace: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    make(workspace, tmp_path / "out", outputs=("png",))
    urls = [str(path) for path in sorted((tmp_path / "out" / "png").glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples = list(data.to_tuple("png", "cls", "json"))
    make(workspace, tmp_path / "plain", npz=False)
    images = images_in(tmp_path / "plain")
    assert len(samples) == 10
    for k, (image, label, about) in enumerate(samples):
        assert np.array_equal(image, images[k]) and about["index"] == k
        assert about["label"] == label


def test_any_set_of_outputs_has_the_images_of_a_direct_run(
    workspace: Path, direct: Path, tmp_path: Path
) -> None:
    """The same recipe gives the same fingerprint and bytes, whatever else is written."""
    expected = images_in(direct)
    make(workspace, tmp_path / "png", outputs=("png",))
    assert not (tmp_path / "png" / "images").exists()
    png = members(tmp_path / "png" / "png")
    for k in range(10):
        image = np.asarray(Image.open(io.BytesIO(png[f"{k:09d}.png"])))
        assert np.array_equal(image, expected[k])
    stage = make(workspace, tmp_path / "png", outputs=("images",))  # now these too
    assert stage.spec.fingerprint == open_samples(str(direct)).spec.fingerprint
    assert np.array_equal(images_in(tmp_path / "png"), expected)


def test_latents_are_decoded_later_to_the_same_bytes(
    workspace: Path, direct: Path, tmp_path: Path
) -> None:
    make(workspace, tmp_path / "latents", outputs=("latents",))
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == [
        "latents", "ledger", "settings.json",
    ]  # fmt: skip
    latents = rows_of(tmp_path / "latents", "latents")
    sampler = sample_stage(toy_sample_config(workspace)).load_sampler()
    assert np.array_equal(latents[:5], sampler.latents(range(5))) and latents.std() > 0.1
    assert np.array_equal(sampler.decoded(latents[:5]), images_in(direct)[:5])
    zarr = pytest.importorskip("zarr")
    stored = zarr.open_array(str(tmp_path / "latents" / "latents"), mode="r")
    assert stored.dtype == np.float32 and np.array_equal(stored[:], latents)

    make(
        workspace,
        tmp_path / "decoded",
        from_latents=str(tmp_path / "latents"),
        plugins=("toy_decoders",),
        # Settings of the latents hold, whatever the command's are.
        cfg=7.0, batch_size=3, num_images=99, seed=5,
    )  # fmt: skip
    assert files(tmp_path / "decoded") == files(direct)
    into = make(workspace, "", from_latents=str(tmp_path / "latents"), plugins=("toy_decoders",))
    assert into.output == str(tmp_path / "latents")
    assert np.array_equal(images_in(tmp_path / "latents"), images_in(direct))


def test_latents_that_stand_there_are_not_sampled_again(
    workspace: Path, direct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(workspace, tmp_path / "out", outputs=("latents",))
    monkeypatch.setattr(
        "repa_pipeline.stages.sampler.load_model", lambda *_, **__: pytest.fail("a model")
    )
    make(workspace, tmp_path / "out", outputs=("images",))
    assert files(tmp_path / "out" / "images") == files(direct / "images")
    # One that is damaged is sampled again.
    monkeypatch.undo()
    key = tmp_path / "out" / "latents" / "c" / "1" / "0" / "0" / "0"
    before = key.read_bytes()
    key.write_bytes(before[:-1])
    make(workspace, tmp_path / "out", outputs=("latents", "png"))
    assert key.read_bytes() == before


def test_latents_through_another_decoder(workspace: Path, direct: Path, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    make(workspace, folder, outputs=("latents",))
    other = make(
        workspace,
        "",
        from_latents=str(folder),
        plugins=("toy_decoders",),
        decoder="tiny-other",
        npz=False,
    )
    assert other.output.startswith(f"{folder}.tiny-other.")
    plain = make(workspace, tmp_path / "plain", decoder="tiny-other", npz=False)
    assert plain.spec.fingerprint == other.spec.fingerprint
    assert files(Path(other.output)) == files(tmp_path / "plain")
    assert (images_in(other.output) != images_in(direct)).any()
    with pytest.raises(MismatchError, match="decoder is 'tiny-kl' there, 'tiny-other' now"):
        make(
            workspace,
            folder,
            from_latents=str(folder),
            plugins=("toy_decoders",),
            decoder="tiny-other",
        )
    with pytest.raises(ConfigError, match="needs no checkpoint"):
        make(workspace, "", from_latents=str(folder), run="toy")
    with pytest.raises(MissingError, match="latents"):
        make(workspace, "", from_latents=str(direct))


def test_judge_rows_are_those_of_the_images(workspace: Path, direct: Path, tmp_path: Path) -> None:
    out = tmp_path / "score"
    stage = make(workspace, out, score=("digits-cnn",))
    assert sorted(p.name for p in out.iterdir()) == ["judge.digits-cnn", "ledger", "settings.json"]
    (spec,) = stage.judges
    assert spec.manifest["of"] == {"samples": open_samples(str(direct)).spec.fingerprint}
    judge = Judge(stage.config, None, spec)
    images = images_in(direct)
    expected = np.concatenate([judge.rows(images[:5]), judge.rows(images[5:])])
    assert np.array_equal(rows_of(out, "judge.digits-cnn"), expected) and expected.std() > 0

    both = make(workspace, tmp_path / "both", score=("digits-cnn",), outputs=("images",))
    assert files(tmp_path / "both" / "judge.digits-cnn") == files(out / "judge.digits-cnn")
    assert files(tmp_path / "both" / "images") == files(direct / "images")
    assert [o.name for o in both.outputs] == ["judge.digits-cnn", "images"]


def test_a_shard_is_made_again_for_what_lacks_it_alone(workspace: Path, tmp_path: Path) -> None:
    """A killed run: png has shard 0, latents have shard 1; the rest is done and all is equal."""
    settings = {"outputs": ("png", "latents"), "num_images": 10}
    make(workspace, tmp_path / "whole", **settings)
    stage = sample_stage(toy_sample_config(workspace, output=str(tmp_path / "killed"), **settings))
    ledgers = sample_ledgers(stage)
    for output in stage.outputs:
        output.begin()
    for index, name in ((0, "png"), (1, "latents")):
        work = stage.open({index: frozenset({name})})
        (commit,) = run_phases(work, stage.outputs[0].plan().shards[index])
        assert commit.output == name
        ledgers[name].record(commit)
    result = run_stage(stage, LocalExecutor(), ledgers, Silent())
    assert {name: out.num_new for name, out in result.outputs.items()} == {"png": 1, "latents": 1}
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert run_stage(stage, LocalExecutor(), ledgers, Silent()).num_new == 0


def test_other_settings_never_enter_a_folder(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "out", outputs=("png",))
    before = files(tmp_path / "out")
    for outputs in (("png",), ("images",), ("latents",), ("jpeg",)):
        with pytest.raises(MismatchError, match="made with other settings: cfg is 2.0 there, 1.5"):
            make(workspace, tmp_path / "out", cfg=1.5, outputs=outputs)
    with pytest.raises(MismatchError, match="seed is 0 there, 3 now"):
        make(workspace, tmp_path / "out", seed=3, score=("digits-cnn",))
    assert files(tmp_path / "out") == before
    make(workspace, tmp_path / "out", outputs=("jpeg",), jpeg_quality=80)
    with pytest.raises(MismatchError, match="quality is 80 there, 90 now"):
        make(workspace, tmp_path / "out", outputs=("jpeg",), jpeg_quality=90)
    names = {
        sample_stage(toy_sample_config(workspace, **changes)).output
        for changes in ({}, {"cfg": 1.5}, {"seed": 1}, {"uint8": "round"}, {"interval": (0, 0.5)})
    }
    assert len(names) == 5


def test_a_damaged_tar_is_made_again(workspace: Path, tmp_path: Path) -> None:
    make(workspace, tmp_path / "out", outputs=("png",))
    before = files(tmp_path / "out")
    (tmp_path / "out" / "png" / "000001.tar").write_bytes(b"short")
    make(workspace, tmp_path / "out", outputs=("png",))
    assert files(tmp_path / "out") == before


def test_outputs_on_a_store(workspace: Path, direct: Path) -> None:
    url = "memory://sample-outputs/one"
    stage = make(
        workspace, url, outputs=("png", "images", "latents"), score=("digits-cnn",), grid=4
    )
    assert stage.finishes == ()
    assert np.array_equal(images_in(url), images_in(direct))
    store = open_store(url)
    assert {"png", "images", "latents", "judge.digits-cnn"} <= set(store.list(""))
    with tarfile.open(fileobj=io.BytesIO(store.get("png/000001.tar"))) as tar:
        file = tar.extractfile("000000007.png")
        assert file is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.read()))), images_in(direct)[7])
    with pytest.raises(ConfigError, match="an npz is written to a local folder only; give"):
        make(workspace, url)


@pytest.mark.parametrize(
    ("settings", "writes", "finishes"),
    [
        ({}, ("images",), ("npz", "grid")),
        ({"npz": False, "grid": 0}, ("images",), ()),
        ({"outputs": ("npz",)}, ("images",), ("npz", "grid")),
        ({"outputs": ("latents", "png")}, ("png", "latents"), ()),
        ({"score": ("digits-cnn",)}, (), ()),
        ({"score": ("digits-cnn",), "outputs": ("jpeg",)}, ("jpeg",), ()),
    ],
)
def test_what_the_settings_come_to(
    settings: dict[str, Any], writes: tuple[str, ...], finishes: tuple[str, ...]
) -> None:
    made = settle_outputs(toy_sample_config(Path(), **{"grid": 100, **settings}))
    assert (made.writes, made.finishes) == (writes, finishes)


def test_settings_that_contradict_each_other(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="--outputs npz and --no-npz were both given"):
        sample_stage(toy_sample_config(workspace, outputs=("npz",), npz=False))
    with pytest.raises(ConfigError, match="names one file and --score several networks"):
        networks = ("digits-cnn", "mobilenet-v1")
        sample_stage(toy_sample_config(workspace, score=networks, network_weights="x"))


def test_the_command(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"sample --workspace {workspace} --num-images 6 --num-steps 4 --batch-size 3 --threads 1"
    line += " --shard-rows 3 --device cpu"

    def repa(arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    said = repa(f"{line} --outputs png,latents --score digits-cnn --output out")
    assert "png: 6 images" in said and "latents: 6 images" in said
    assert "judge.digits-cnn: 6 images" in said and "made:" not in said
    assert "next: repa evaluate --samples out --network digits-cnn\n" in said
    said = repa("sample --from-latents out --outputs npz --grid 0 --plugins toy_decoders")
    assert "decode out: 6 latents, tiny-kl" in said and "made: out/samples.npz" in said
    wrong = repa(f"{line} --outputs gif", code=2)
    assert "outputs (flag --outputs): got ['gif'], expected some of npz, images, png" in wrong
    guide = next((workspace / "runs/toy/checkpoints").glob("*.pt"))
    said = repa(
        f"{line} --guide-checkpoint {guide} --cfg 1.8 --interval 0,0.7 --num-steps 250 --dry-run"
    )
    assert f"250 model evaluations and 172 of the weaker {guide} an image" in said
    said = repa(f"{line} --outputs latents --output alone")
    assert "next: repa sample --from-latents alone\n" in said
    spec = image_spec(read_settings("out"))
    assert spec.fingerprint == open_samples("out").spec.fingerprint
