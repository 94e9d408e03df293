"""Where weights come from, and files that are not what they should be."""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from repa_pipeline import weights
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.errors import DamagedError, MissingError
from repa_pipeline.weights import file_sha256, load_state, resolve_weights


def _resolve(spec_weights: str | None, hub: str | None, override: str | None) -> pathlib.Path:
    return resolve_weights("encoder", "dinov2-b", spec_weights, hub, "model.safetensors", override)


def test_order_of_sources(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, entry, cached = (tmp_path / name for name in ("given", "entry", "cached"))
    for path in (given, entry, cached):
        path.touch()
    calls = []

    def download(*args: Any, **settings: Any) -> str:
        calls.append((args, settings))
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert _resolve(str(entry), "owner/repo", str(given)) == given
    assert _resolve(str(entry), "owner/repo", None) == entry
    assert calls == []
    assert _resolve(None, "owner/repo", None) == cached
    assert calls == [(("owner/repo", "model.safetensors"), {"local_files_only": True})]


def test_assets_are_found_in_the_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    (tmp_path / "small.safetensors").touch()
    assert _resolve("asset:small.safetensors", None, None) == tmp_path / "small.safetensors"


def test_a_named_file_that_is_absent_is_not_replaced(tmp_path: pathlib.Path) -> None:
    with pytest.raises(MissingError, match="no weights file at .*absent.*--weights PATH"):
        _resolve(None, "owner/repo", str(tmp_path / "absent"))


def test_local_only_entry_names_the_ways_out() -> None:
    with pytest.raises(MissingError) as caught:
        load_encoder("mobilenet-v2", resolution=128)
    assert str(caught.value) == (
        "encoder 'mobilenet-v2' loads from a local file only: give `--weights PATH`, or "
        '`[encoders.mobilenet-v2] weights = "PATH"` in repa.toml'
    )


def test_offline_is_one_line_at_once(tmp_path: pathlib.Path) -> None:
    code = (
        "from repa_pipeline.encoders.base import load_encoder\n"
        "from repa_pipeline.errors import RepaError\n"
        "try: load_encoder('dinov2-b', resolution=256)\n"
        "except RepaError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=120, env=env,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    for way_out in (
        "`--weights PATH`",
        '`[encoders.dinov2-b] weights = "PATH"` in repa.toml',
        "a network that reaches the hub repository timm/vit_base_patch14_dinov2.lvd142m",
    ):
        assert way_out in done.stdout


def test_no_network_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, requests = [], []

    def download(*args: Any, **settings: Any) -> str:
        downloads.append(settings)
        raise FileNotFoundError("not in the local cache")

    def head(url: str, **settings: Any) -> None:
        requests.append(settings)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
    with pytest.raises(MissingError, match="owner/repo .ConnectionError.: give"):
        _resolve(None, "owner/repo", None)
    assert downloads == [{"local_files_only": True}]
    assert requests == [{"timeout": 5}]


def test_file_hash_follows_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"")
    assert file_sha256(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class _Opener:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_files_that_are_no_plain_tensors(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"x": _Opener()}, path)
    with pytest.raises(DamagedError, match="expected a safetensors file or a torch file"):
        load_state(path)
    assert capsys.readouterr().out == ""
    torch.save({"x": 3}, path)
    with pytest.raises(DamagedError, match="no plain mapping"):
        load_state(path)
    for damaged in (b"", b"nothing of the kind", b"\x99" + bytes(7) + b"{"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match="cannot read"):
            load_state(path)


def test_nested_torch_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": {"x": torch.ones(2)}, "epoch": 3}, path)
    assert torch.equal(load_state(path)["x"], torch.ones(2))


def test_old_checkpoints_with_settings_and_numbers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    allowed = torch.serialization.get_safe_globals()
    content = {
        "args": argparse.Namespace(arch="vit_base", lr=0.1),
        "best": np.float64(3.5), "steps": np.int64(7), "rates": np.arange(3.0),
        "state_dict": {"x": torch.ones(2)},
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_state(path)["x"], torch.ones(2))
    # As numpy 1 wrote its module's name, padded to the same length.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(load_state(path)["x"], torch.ones(2))
    assert torch.serialization.get_safe_globals() == allowed


def test_state_is_taken_from_the_first_key_there_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "checkpoint.pth"
    states = {key: {"x": torch.full((1,), float(i))} for i, key in enumerate("abc")}
    torch.save({**states, "epoch": 3}, path)
    assert load_state(path, ("b", "a"))["x"] == 1
    assert load_state(path, ("d", "c"))["x"] == 2
    with pytest.raises(DamagedError, match="no plain mapping"):
        load_state(path)


def test_code_in_a_checkpoint_is_named_and_never_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": {"x": torch.ones(2)}, "callback": _Opener()}, path)
    with pytest.raises(DamagedError) as caught:
        load_state(path)
    message = str(caught.value)
    assert "print, which could run code" in message
    assert "torch.load(OLD, weights_only=False)[KEY OF ITS STATE]" in message
    assert "\n" not in message and capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_with_what_to_do(tmp_path: pathlib.Path) -> None:
    path, new = tmp_path / "clip.pt", tmp_path / "converted.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(DamagedError) as caught:
        load_state(path)
    message = str(caught.value)
    assert "a TorchScript archive, which holds code" in message and "\n" not in message
    advice = "torch.save(torch.jit.load(OLD, map_location='cpu').state_dict(), NEW)"
    assert advice in message
    exec(advice, {"torch": torch, "OLD": str(path), "NEW": str(new)})
    assert set(load_state(new)) == {"weight", "bias"}
