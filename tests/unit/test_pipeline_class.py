"""REPAPipeline gives the images of `repa sample`, and is read back from what it saves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import repa_pipeline
from repa_pipeline import REPAPipeline, pipeline
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError
from repa_pipeline.stages.sample import open_samples, sample_blocks
from repa_pipeline.stages.sample_labels import labels_of
from repa_pipeline.testing.caches import TOY_TRUNK, isolated_tables
from repa_pipeline.testing.sampling import make_samples, toy_sample_config, write_toy_runs
from repa_pipeline.training.runs import Run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sample_pipeline.py"
GUIDED: dict[str, Any] = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
PLUGINS = ("toy_decoders",)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    dit = {
        "model": "DiT-S/2",
        "overrides": {"models.DiT-S/2": {**TOY_TRUNK, "align_depth": 2}},
        "steps": 4,
    }
    with isolated_tables(folder):
        write_toy_runs(folder, toy={}, weak={"steps": 4}, dit=dit)
        yield folder


def pipe_of(workspace: Path, run: str = "toy") -> REPAPipeline:
    return REPAPipeline.from_run(run, workspace=str(workspace))


def sampled(workspace: Path, output: Path, run: str = "toy", **changes: Any) -> tuple[Any, Any]:
    """Images and classes of `repa sample`."""
    config = toy_sample_config(workspace, run=run, output=str(output), npz=False, **changes)
    stage = make_samples(config)
    images = np.concatenate(list(sample_blocks(open_samples(str(output)))))
    return images, labels_of(stage.recipe, len(images))


def pixels(output: Any) -> Any:
    return np.stack([np.asarray(image) for image in output.images])


@pytest.mark.parametrize(
    ("run", "sampler"), [("toy", "sde"), ("toy", "heun"), ("dit", "ddpm"), ("dit", "ddim")]
)
def test_image_k_is_that_of_repa_sample(
    workspace: Path, tmp_path: Path, run: str, sampler: str
) -> None:
    images, labels = sampled(workspace, tmp_path / "out", run, sampler=sampler, seed=3)
    pipe = pipe_of(workspace, run)
    common = {**GUIDED, "num_inference_steps": 4, "sampler": sampler, "generator": 3}
    whole = pixels(pipe(labels.tolist(), batch_size=4, **common))
    # Batches of the stage begin anew with each shard of 5; here they do not.
    assert whole.shape == (10, 64, 64, 3) and whole.std() > 10
    assert np.array_equal(whole, images)
    one = pixels(pipe([int(labels[7])], indices=[7], batch_size=4, **common))
    assert np.array_equal(one[0], images[7])
    alone = pixels(pipe([int(labels[7])], indices=[7], **common)).astype(int)
    assert np.abs(alone[0] - images[7]).max() <= 1
    assert (whole[0] != pixels(pipe([int(labels[0])], **{**common, "generator": 4}))[0]).any()


def test_saved_and_read_back(workspace: Path, tmp_path: Path) -> None:
    pipe, folder = pipe_of(workspace), tmp_path / "model"
    pipe.save_pretrained(folder, license="mit")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "projectors.safetensors", "vae.json",
        "vae.safetensors",
    ]  # fmt: skip
    pipe.save_pretrained(folder)  # again: nothing to do
    back = REPAPipeline.from_pretrained(folder, plugins=PLUGINS)
    state = dict(back.transformer.state_dict())
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(state[name], value)
    labels = [0, 1, 2]
    common: dict[str, Any] = {"num_inference_steps": 4, "generator": 0, **GUIDED}
    assert np.array_equal(pixels(back(labels, **common)), pixels(pipe(labels, **common)))
    twice = tmp_path / "twice"
    back.save_pretrained(twice)
    for name in ("model.safetensors", "vae.safetensors"):
        assert (twice / name).read_bytes() == (folder / name).read_bytes()
    newest = Run(workspace / "runs" / "toy").newest_checkpoint()
    other = REPAPipeline.from_checkpoint(newest, decoder="tiny-other")
    with pytest.raises(MismatchError, match="vae.safetensors is another decoder than the pipel"):
        other.save_pretrained(folder)
    with pytest.raises(MismatchError, match="is there and not the export of this checkpoint"):
        pipe_of(workspace, "weak").save_pretrained(folder)
    (folder / "vae.safetensors").write_bytes(b"x" + (folder / "vae.safetensors").read_bytes()[1:])
    with pytest.raises(DamagedError, match="vae.safetensors is not what was saved: save .* again"):
        REPAPipeline.from_pretrained(folder, plugins=PLUGINS)
    pipe.save_pretrained(folder)
    REPAPipeline.from_pretrained(folder, plugins=PLUGINS)


def test_a_folder_of_repa_export_is_read(workspace: Path, tmp_path: Path) -> None:
    from repa_pipeline.config_exchange import ExportConfig
    from repa_pipeline.stages.export_run import export_run, plan_export

    destination = str(tmp_path / "model")
    export_run(
        plan_export(
            ExportConfig(
                workspace=str(workspace), run="toy", to="safetensors", destination=destination
            )
        )
    )
    common: dict[str, Any] = {"num_inference_steps": 4, "generator": 0, **GUIDED}
    back = REPAPipeline.from_pretrained(destination, plugins=PLUGINS)
    expected = pixels(pipe_of(workspace)([1, 2], **common))
    assert np.array_equal(pixels(back([1, 2], **common)), expected)
    other = REPAPipeline.from_pretrained(destination, plugins=PLUGINS, decoder="tiny-other")
    assert (pixels(other([1, 2], **common)) != expected).any()


def test_output_types_and_generators(workspace: Path) -> None:
    pipe = pipe_of(workspace)
    common: dict[str, Any] = {"num_inference_steps": 4, **GUIDED}
    latents = pipe([0, 1], generator=0, output_type="latent", **common).images
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    raw = latents / 0.5 + 0.1
    decoded = pipe.vae.decode(raw).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    floats = pipe([0, 1], generator=0, output_type="np", **common).images
    np.testing.assert_allclose(floats, decoded.clip(0, 1), atol=1e-5)
    shown = pixels(pipe([0, 1], generator=0, **common)).astype(int)
    assert np.abs(shown - 255 * floats).max() <= 1.001

    def own(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = pixels(pipe([0, 1], generator=[own(5), own(6)], **common))
    second = pixels(pipe([1], generator=[own(6)], **common))[0]
    assert np.abs(both[1].astype(int) - second).max() <= 1 and (both[0] != both[1]).any()
    again = [pixels(pipe([0, 1], generator=own(9), **common)) for _ in range(2)]
    assert np.array_equal(again[0], again[1])
    torch.manual_seed(0)
    first, other = (pixels(pipe([0], **common)) for _ in range(2))
    assert (first != other).any()


def test_generators_of_the_caller_are_drawn_from_on_demand_alone() -> None:
    """On a CUDA device too, where a thread draws ahead from those of a seed."""
    shapes = ((2,),)
    draws = pipeline._drawing(torch.Generator(), [0], shapes, "cuda", 1)([0])
    assert draws._ahead is None
    assert pipeline._drawing(0, [0], shapes, "cuda", 1)([0])._ahead is not None
    foreign: Any = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(ConfigError, match="generator: got one of cuda:1, expected torch.Generato"):
        pipeline._drawing([foreign], [0], shapes, "cuda", 1)


def test_a_weaker_pipeline_guides(workspace: Path, tmp_path: Path) -> None:
    weak = Run(workspace / "runs" / "weak").newest_checkpoint()
    images, labels = sampled(workspace, tmp_path / "out", guide_checkpoint=str(weak))
    pipe, guide = pipe_of(workspace), pipe_of(workspace, "weak")
    got = pipe(labels.tolist(), 4, batch_size=4, generator=0, guide=guide, **GUIDED)
    assert np.array_equal(pixels(got), images)
    with pytest.raises(MismatchError, match="guide checkpoint .* does not fit"):
        pipe([0], 4, guide=pipe_of(workspace, "dit"), generator=0)


def test_what_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sampled."""
    pipe = pipe_of(workspace)
    monkeypatch.setattr(pipeline.LatentSampler, "scaled", None)
    for arguments, said in (
        ({"class_labels": [3]}, r"class_labels: got \[3\], expected classes from 0 to 2"),
        ({"class_labels": []}, "class_labels: got"),
        ({"class_labels": [0], "output_type": "pt"}, "output_type: got 'pt', expected one of pil"),
        ({"class_labels": [0], "dtype": "fp16"}, "dtype: got 'fp16', expected one of float32"),
        ({"class_labels": [0], "uint8": "floor"}, "uint8: got 'floor', expected one of truncate"),
        ({"class_labels": [0], "sampler": "ddpm"}, "sampler ddpm does not fit a model of SiT-XS/2"),
        ({"class_labels": [0], "indices": [1, 2]}, "indices: got 2, expected one for 1 labels"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "generator: got 1, expected"),
        (
            {"class_labels": [0, 1, 2], "generator": torch.Generator(), "batch_size": 2},
            "batch_size 2 must divide the 3 images where generators are given",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            pipe(num_inference_steps=2, **arguments)
    with pytest.raises(ConfigError, match="no class 'cat': known are none"):
        pipe.get_label_ids("cat")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, repa_pipeline; print('torch' in sys.modules, repa_pipeline.__version__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", repa_pipeline.__version__]
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = repa_pipeline.Pipeline


def test_the_example(workspace: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(EXAMPLE), "--workspace", str(workspace), "--run", "toy"]
    line += ["--labels", "0", "2", "--steps", "3", "--device", "cpu", "--output", "made"]
    environment = {"PYTHONPATH": f"{EXAMPLE.parents[1]}:{workspace}", "PATH": "/usr/bin:/bin"}
    subprocess.run(line, cwd=tmp_path, env=environment, check=True, capture_output=True)
    made = tmp_path / "made"
    assert sorted(p.name for p in made.glob("*.png")) == ["00-class-0.png", "01-class-2.png"]
    assert json.loads((made / "model" / "config.json").read_text())["step"] == 12
