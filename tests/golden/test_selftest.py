"""The self-test passes on the reference vectors, and fails on the smallest change to them."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from repa_pipeline.diffusion.interpolant import PATHS
from repa_pipeline.diffusion.samplers import sample_sde
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.models.projector import build_projector
from repa_pipeline.models.sit import SiT, SiTConfig
from repa_pipeline.stages.selftest import plan_selftest, run_selftest

SIT = "sit_repa.safetensors"
NPZ = ("preprocessing.npz", "adm_metrics.npz", "tf_resize.npz")


def read_sit(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["config"])
        return {name: file.get_tensor(name) for name in file.keys()}, config


def write_sit(path: pathlib.Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    stored = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(stored, path, {"config": json.dumps(config)})


def without_samples(tensors: dict[str, Tensor], but: str = "") -> dict[str, Tensor]:
    """Drops the expected samples, which take most of the time, except one."""
    return {
        name: value
        for name, value in tensors.items()
        if name == but
        or not name.startswith(("sample.ode.", "sample.sde.linear", "sample.sde.cos"))
    }


def change_npz(path: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


@pytest.fixture
def copy(shared: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    def copied(name: str, as_name: str | None = None) -> pathlib.Path:
        target = tmp_path / "vectors" / (as_name or name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(shared / "golden" / name, target)
        return target

    return copied


def test_passes_on_the_reference_vectors(shared: pathlib.Path) -> None:
    report = run_selftest(str(shared / "golden"))
    failed = [group for group in report.groups if not group.passed]
    assert not failed
    assert report.passed
    assert {group.file for group in report.groups} == {SIT, *NPZ}
    assert {(group.file, group.group) for group in report.groups} >= {
        (SIT, "forward"),
        (SIT, "gradients"),
        (SIT, "sde cosine"),
        ("adm_metrics.npz", "fid"),
        ("adm_metrics.npz", "precision and recall adm_fp16"),
        ("preprocessing.npz", "center crop"),
        ("preprocessing.npz", "preprocess jepa"),
        ("preprocessing.npz", "position embedding"),
        ("tf_resize.npz", "tf1 resize"),
    }
    # 3 forward, 8 losses, 5 gradients, 24 samples; 5 crops, 5 x 2 encoders, 2 grids; 8; 4
    assert sum(group.num_arrays for group in report.groups) == 40 + 17 + 8 + 4
    assert all(group.worst is not None and group.tolerance is not None for group in report.groups)
    assert [skip.file for skip in report.skipped] == ["README.md"]


@pytest.mark.parametrize(
    ("name", "amount", "group"),
    [
        ("forward.out", 5e-4, "forward"),
        ("forward.z1", 5e-4, "forward"),
        ("loss.cosine.lognormal.denoising", 5e-4, "loss cosine/lognormal"),
        ("loss.linear.uniform.proj", 1e-5, "loss linear/uniform"),
        ("grad.x_embedder.proj.weight", 5e-4, "gradients"),
        ("sample.ode.linear.interval.heun", 5e-4, "ode linear"),
        ("sample.sde.cosine.plain", 5e-4, "sde cosine"),
    ],
)
def test_a_changed_sit_vector_fails(
    copy: Callable[..., pathlib.Path], name: str, amount: float, group: str
) -> None:
    path = copy(SIT)
    tensors, config = read_sit(path)
    tensors[name].view(-1)[-1] += amount
    write_sit(path, without_samples(tensors, but=name), config)
    report = run_selftest(str(path.parent))
    assert not report.passed
    assert [result.group for result in report.groups if not result.passed] == [group]
    (failed,) = (result for result in report.groups if not result.passed)
    assert failed.worst_array == name
    assert failed.worst is not None and failed.worst > 1e-4


@pytest.mark.parametrize(
    ("file", "name", "amount", "group"),
    [
        ("adm_metrics.npz", "expect_fid", 1e-5, "fid"),
        ("adm_metrics.npz", "expect_is_split_100", 1e-5, "inception score"),
        ("adm_metrics.npz", "expect_recall_fp64", 1e-3, "precision and recall fp64"),
        ("preprocessing.npz", "crop2_out", 1, "center crop"),
        ("preprocessing.npz", "pre_clip", 1e-4, "preprocess clip"),
        ("preprocessing.npz", "pos_out_32", 1e-4, "position embedding"),
        ("tf_resize.npz", "resized64", 1e-4, "tf1 resize"),
    ],
)
def test_a_changed_array_fails(
    copy: Callable[..., pathlib.Path], file: str, name: str, amount: float, group: str
) -> None:
    def change(arrays: dict[str, Any]) -> None:
        value = arrays[name].reshape(-1)
        value[np.argmin(value)] += np.array(amount, dtype=value.dtype)
        arrays[name] = value.reshape(arrays[name].shape)

    path = copy(file)
    change_npz(path, change)
    report = run_selftest(str(path.parent))
    assert [result.group for result in report.groups if not result.passed] == [group]


def test_files_are_known_by_their_keys(copy: Callable[..., pathlib.Path]) -> None:
    path = copy(SIT, "a.safetensors")
    tensors, config = read_sit(path)
    write_sit(path, without_samples(tensors), config)
    folder = copy("tf_resize.npz", "b.npz").parent
    copy("adm_metrics.npz", "c.dat")
    write_sit(folder / "d", without_samples(tensors), config)
    report = run_selftest(str(folder))
    assert report.passed
    assert {group.file for group in report.groups} == {"a.safetensors", "b.npz", "c.dat", "d"}
    planned, skipped = plan_selftest(str(folder))
    assert planned == [(group.file, group.group) for group in report.groups]
    assert skipped == list(report.skipped) == []


def test_files_of_no_known_format_are_listed(copy: Callable[..., pathlib.Path]) -> None:
    folder = copy("tf_resize.npz").parent
    np.savez(folder / "other.npz", weights=np.zeros(3))
    save_file({"model.a": torch.zeros(1)}, folder / "bare.safetensors")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 40)
    (folder / "notes.txt").write_text("hello")
    report = run_selftest(str(folder))
    assert report.passed
    reasons = {skip.file: skip.reason for skip in report.skipped}
    assert reasons.keys() == {
        "other.npz", "bare.safetensors", "broken.npz", "broken.safetensors", "notes.txt",
    }  # fmt: skip
    assert "no 'config'" in reasons["bare.safetensors"]
    assert reasons["broken.npz"].startswith("cannot be read")
    assert reasons["broken.safetensors"].startswith("cannot be read")


def test_nothing_to_check_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        run_selftest(str(tmp_path / "absent"))
    with pytest.raises(MissingError, match="can be checked"):
        run_selftest(str(tmp_path))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(MissingError, match="other.npz"):
        run_selftest(str(tmp_path))


def test_settings_that_cannot_work_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="float32, tf32, bf16"):
        run_selftest(str(tmp_path), dtype="fp16")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            run_selftest(str(tmp_path), device="cuda")


def test_groups_run_only_when_their_arrays_are_there(copy: Callable[..., pathlib.Path]) -> None:
    path = copy(SIT)
    tensors, config = read_sit(path)
    kept = {name: value for name, value in tensors.items() if name.startswith(("model.", "loss."))}
    kept |= {name: tensors[name] for name in tensors if name.startswith("sample.")}
    del kept["loss.linear.lognormal.t"], kept["sample.sde.increments"]
    kept = {name: value for name, value in kept.items() if not name.endswith(".heun")}
    kept["sample.ode.linear.strange.euler"] = tensors["sample.noise"]
    write_sit(path, kept, config)
    report = run_selftest(str(path.parent))
    assert report.passed
    assert [group.group for group in report.groups] == [
        "loss cosine/lognormal",
        "loss cosine/uniform",
        "loss linear/uniform",
        "ode linear",
        "ode cosine",
    ]
    assert [skip.reason for skip in report.skipped] == [
        "sample.ode.linear.strange.euler: not known here"
    ]


def test_a_known_format_without_a_complete_group_is_skipped(
    copy: Callable[..., pathlib.Path],
) -> None:
    path = copy(SIT)
    tensors, config = read_sit(path)
    write_sit(path, {k: v for k, v in tensors.items() if k.startswith("model.")}, config)
    folder = copy("tf_resize.npz").parent
    np.savez(folder / "half.npz", crop0_in=np.zeros((4, 4, 3), np.uint8), expect_fid=1.0)
    report = run_selftest(str(folder))
    assert {skip.file for skip in report.skipped} == {SIT, "half.npz"}
    assert all("no group" in skip.reason for skip in report.skipped)


@pytest.mark.parametrize("problem", ["shape", "nan", "missing weight"])
def test_what_cannot_be_compared_is_a_failed_group(
    copy: Callable[..., pathlib.Path], problem: str
) -> None:
    path = copy(SIT)
    tensors, config = read_sit(path)
    tensors = {k: v for k, v in tensors.items() if k.startswith(("model.", "forward."))}
    if problem == "shape":
        tensors["forward.out"] = tensors["forward.out"][:, :2]
    elif problem == "nan":
        tensors["forward.x"][0, 0, 0, 0] = float("nan")
    else:
        del tensors["model.blocks.1.attn.proj.weight"]
    write_sit(path, tensors, config)
    report = run_selftest(str(path.parent))
    (group,) = report.groups
    assert not report.passed
    assert group.worst is None
    assert group.problem is not None
    assert {"shape": "shape", "nan": "not finite", "missing weight": "proj.weight"}[
        problem
    ] in group.problem


def test_bf16_is_judged_more_loosely(copy: Callable[..., pathlib.Path]) -> None:
    path = copy(SIT)
    tensors, config = read_sit(path)
    write_sit(path, without_samples(tensors, but="sample.sde.linear.interval"), config)
    report = run_selftest(str(path.parent), dtype="bf16")
    assert report.passed
    limits = {group.group: group.tolerance for group in report.groups}
    assert limits["forward"] == limits["loss linear/uniform"] == 2e-2
    assert limits["gradients"] == 5e-2
    assert limits["sde linear"] is None
    worst = {group.group: group.worst or 0.0 for group in report.groups}
    assert 1e-4 < worst["forward"] < 2e-2


def test_tf32_switches_are_put_back(copy: Callable[..., pathlib.Path]) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    folder = str(copy("tf_resize.npz").parent)
    for dtype in ("float32", "tf32"):
        assert run_selftest(folder, dtype=dtype).passed  # type: ignore[arg-type]
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def other_sit(num_projectors: int, qk_norm: bool, null_row: bool) -> tuple[SiT, dict[str, Tensor]]:
    """A model of another size, and its state as the reference would store it."""
    torch.manual_seed(3)
    config = SiTConfig(12, 3, 4, 64, 5, 8, 7, mlp_ratio=3.0, qk_norm=qk_norm)
    model = SiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        if not null_row:
            model.y_embedder.embedding_table.weight[-1] = 0
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    if not null_row:
        state["model.y_embedder.embedding_table.weight"] = state[
            "model.y_embedder.embedding_table.weight"
        ][:-1]
    for n in range(num_projectors):
        for name, value in build_projector(64, 32, 8 + n).state_dict().items():
            state[f"model.projectors.{n}.{name}"] = value
    return model, state


@pytest.mark.parametrize(
    ("num_projectors", "qk_norm", "null_row"), [(0, False, True), (3, True, True), (1, True, False)]
)
@torch.no_grad()
def test_other_sizes_are_derived_from_the_file(
    tmp_path: pathlib.Path, num_projectors: int, qk_norm: bool, null_row: bool
) -> None:
    model, tensors = other_sit(num_projectors, qk_norm, null_row)
    x, t, y = torch.randn(3, 3, 12, 12), torch.rand(3), torch.tensor([0, 6, 5])
    velocity, tokens = model(x, t, y, capture=4)
    tensors |= {"forward.x": x.double(), "forward.t": t, "forward.y": y.int()}
    tensors["forward.out"] = velocity.double()
    for n in range(num_projectors):
        head = build_projector(64, 32, 8 + n)
        prefix = f"model.projectors.{n}."
        head.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        tensors[f"forward.z{n}"] = head(tokens)
    increments = torch.randn(6, 3, 3, 12, 12, dtype=torch.float64)
    (sample,) = sample_sde(
        lambda states, t, _: (model(states[0].float(), torch.full((3,), t), y).double(),),
        (x,),
        num_steps=7,
        path=PATHS["cosine"],
        increments=lambda step: (increments[step],),
    )
    tensors |= {"sample.noise": x, "sample.y": y, "sample.sde.increments": increments}
    tensors["sample.sde.cosine.plain"] = sample
    arguments = {"num_heads": 8, "encoder_depth": 4, "num_classes": 7, "qk_norm": qk_norm}
    write_sit(tmp_path / "x.safetensors", tensors, arguments)
    report = run_selftest(str(tmp_path))
    assert report.passed, report.groups
    assert [group.group for group in report.groups] == ["forward", "sde cosine"]
    assert report.groups[0].num_arrays == 1 + num_projectors
