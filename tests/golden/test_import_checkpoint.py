"""The reference's own weights, written as its checkpoints are, imported as a run: same forward."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from repa_pipeline.config_exchange import ExportConfig, ImportConfig
from repa_pipeline.stages.export_run import export_run, plan_export
from repa_pipeline.stages.import_run import import_run, read_model
from repa_pipeline.training.checkpoint import load_checkpoint
from repa_pipeline.training.state import method_of_checkpoint

DEPTH = 2


@pytest.fixture(scope="module")
def vectors(shared: pathlib.Path) -> dict[str, Tensor]:
    with safe_open(shared / "golden" / "sit_repa.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["encoder_depth"] == DEPTH
        return {name: file.get_tensor(name) for name in file.keys()}


def state_of(vectors: dict[str, Tensor], legacy: bool) -> dict[str, Tensor]:
    """The state dict in the newer naming, or with `decoder_blocks.N` behind the alignment."""
    state = {}
    for name, value in vectors.items():
        kind, _, key = name.partition(".")
        if kind != "model":
            continue
        parts = key.split(".")
        if legacy and parts[0] == "blocks" and int(parts[1]) >= DEPTH:
            parts[:2] = ["decoder_blocks", str(int(parts[1]) - DEPTH)]
        state[".".join(parts)] = value
    return state


@pytest.mark.parametrize("bare", [False, True], ids=["checkpoint", "bare"])
@pytest.mark.parametrize("legacy", [False, True], ids=["newer", "older"])
@torch.no_grad()
def test_import(
    legacy: bool, bare: bool, vectors: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    state = state_of(vectors, legacy)
    assert any(key.startswith("decoder_blocks") for key in state) == legacy
    args = argparse.Namespace(
        num_classes=1000,
        encoder_depth=DEPTH,
        enc_type="dinov2-vit-b,clip-vit-L",
        path_type="cosine",
    )
    content: Any = state
    if not bare:
        ema = {key: value.clone() for key, value in state.items()}
        trained = {key: value + 1 for key, value in state.items()}
        content = {
            "model": trained,
            "ema": ema,
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "args": args,
            "steps": 400_000,
        }
    torch.save(content, tmp_path / "last.pt")
    common: dict[str, Any] = {"workspace": str(tmp_path / "ws")}
    config = ImportConfig(source=str(tmp_path / "last.pt"), name="r", num_heads=4, **common)
    run, _ = import_run(config, read_model(config))
    loaded = load_checkpoint(run.newest_checkpoint())
    about = loaded["about"]
    assert about["inputs"]["num_classes"] == 1000 and about["inputs"]["resolution"] == 64
    assert [feature["width"] for feature in about["inputs"]["features"]] == [24, 40]
    if not bare:
        assert loaded["step"] == 400_000 and about["config"]["path"] == "cosine"
        assert [f["name"] for f in about["inputs"]["features"]] == ["dinov2-b", "clip-l"]
        assert torch.equal(loaded["model"]["trunk.pos_embed"], vectors["model.pos_embed"] + 1)
    model = method_of_checkpoint(loaded).build()
    model.load_state_dict(loaded["ema"])
    model.eval()
    x, t, y = (vectors[f"forward.{name}"] for name in "xty")
    velocity, tokens = model.get_submodule("trunk")(x, t, y, capture=DEPTH)
    torch.testing.assert_close(velocity, vectors["forward.out"], rtol=0, atol=1e-4)
    for number, projector in enumerate(model.get_submodule("projectors").children()):
        expected = vectors[f"forward.z{number}"]
        torch.testing.assert_close(projector(tokens), expected, rtol=0, atol=1e-4)

    # And out again: the reference's newer naming, the very tensors.
    out = ExportConfig(destination=str(tmp_path / "out.pt"), run="r", **common)
    export_run(plan_export(out))
    ema = torch.load(tmp_path / "out.pt", weights_only=False)["ema"]
    newer = state_of(vectors, legacy=False)
    assert ema.keys() == newer.keys()
    assert all(torch.equal(ema[key], value) for key, value in newer.items())
