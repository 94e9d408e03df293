"""The `repa` command: help, what it imports, and that a user's error is one line and exit 2."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from repa_pipeline import __version__, commands
from repa_pipeline.cli import main
from repa_pipeline.command_table import COMMAND_TABLE, COMMANDS
from repa_pipeline.errors import DataError
from repa_pipeline.observe import Silent
from repa_pipeline.stages import train_check
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import ToyTeacher, toy_train_config, write_toy_cache

HEAVY = ("torch", "ray", "timm", "diffusers", "zarr", "numpy", "pyarrow", "tensorboard")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPA_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def repa(capsys: pytest.CaptureFixture[str]) -> Repa:
    return Repa(capsys)


class Repa:
    """Runs a command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, line: str) -> Said:
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        out, err = self._capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return Said(code, out, err)

    def refused(self, line: str) -> str:
        """The one line that a user's error gives."""
        code, out, err = self(line)
        assert code == 2 and not out, (code, out)
        assert err.startswith("repa: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err.strip().removeprefix("repa: ")


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys\n"
        "import repa_pipeline.cli\n"
        "try:\n"
        "    repa_pipeline.cli.main(['--help'])\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "Usage: repa [OPTIONS] COMMAND" in found.stdout


def test_help_lists_the_commands(repa: Repa) -> None:
    for line in ("--help", ""):
        code, out, err = repa(line)
        assert (code, err) == (0, "")
        for command in (*COMMANDS, "config", "selftest", "demo"):
            assert f"\n  {command} " in out
    assert repa("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_setting_is_a_flag(command: str, repa: Repa) -> None:
    code, out, _ = repa(f"{command} --help")
    assert code == 0 and "--config" in out
    for field in dataclasses.fields(COMMANDS[command]):
        flag = f"--{field.name.rstrip('_').replace('_', '-')}"
        positional = COMMAND_TABLE[command].positional
        if field.name in positional:
            assert f"[{positional[field.name]}]" in out
        else:
            assert (f"\n  {flag} " in out) == (not field.metadata["hidden"]), flag
        if isinstance(field.default, bool):
            assert f"--no-{flag[2:]}" in out


@pytest.mark.parametrize("command", ["config", "selftest", "demo"])
def test_the_other_commands_have_help(command: str, repa: Repa) -> None:
    assert repa(f"{command} --help").code == 0


def test_help_shows_defaults_and_presets(repa: Repa) -> None:
    out = " ".join(repa("train --help").out.split())
    assert "Global batch. [default: 256; digits: 64]" in out
    assert "Interpolant of SiT. [default: linear] (linear, cosine)" in out
    assert "Seed of weights, order, noise. [default: 0]" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("train --step 3", "No such option: --step"),
        ("train --steps x", "Invalid value for '--steps'"),
        ("train --steps", "Option '--steps' requires an argument."),
        ("train a b", "Got unexpected extra argument"),
        ("train --steps 0", "steps (flag --steps): got 0, expected a number above 0"),
        ("train --path x", "path (flag --path): got 'x', expected one of linear, cosine"),
        ("sample --interval 1", "interval (flag --interval): got '1', expected a comma-separated"),
        ("train --preset x", "unknown preset 'x': known are auto, digits, imagenet"),
        ("train --config x.toml", "no configuration file x.toml: check --config"),
        ("train --device tpu0", "--device: got 'tpu0', expected auto, cpu, cuda or cuda:N"),
        ("train", "no cache at ./repa-workspace/cache: run `repa encode-latents` first"),
        ("sample", "no runs in repa-workspace/runs: run `repa train` first"),
        ("sample --run x", "no run 'x' in repa-workspace/runs: known are none"),
        ("sample --checkpoint x.pt", "no checkpoint x.pt: check --run or --checkpoint"),
        ("evaluate", "no finished samples in the workspace: run `repa sample` first"),
        ("evaluate --samples x", "no samples at x: check --samples"),
        ("runs --workspace s3://bucket/x", "runs are written to a local folder"),
        ("index --source nowhere", "no image source at 'nowhere'"),
        ("encode-latents --plugins absent", "plugin 'absent' cannot be imported"),
        ("encode-latents --autoencoder tased", "unknown autoencoder 'tased': did you mean 'taesd'"),
        ("cache-features --encoder dinov2b", "unknown encoder 'dinov2b': did you mean 'dinov2-b'"),
        ("config trian", "unknown command 'trian': known are index, encode-latents"),
        ("selftest", "Missing option '--vectors'"),
    ],
)
def test_a_users_error_is_one_line(
    line: str, message: str, repa: Repa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line.startswith("train --device"):
        write_toy_cache(tmp_path / "repa-workspace", teachers=())
        line += " --encoder none"
    if line.startswith(("encode-latents", "cache-features")):
        monkeypatch.setattr(commands, "_index", lambda config: None)
    assert repa.refused(line).startswith(message)


def test_a_users_error_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "repa_pipeline", "train", "--path", "x"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1 and "Traceback" not in found.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr(commands, "runs", broken)
    with pytest.raises(KeyError, match="of ours"):
        main(["runs"])


def test_an_error_of_several_lines_is_shown_on_one(
    repa: Repa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: object) -> None:
        raise DataError("one\ntwo")

    monkeypatch.setattr(commands, "runs", fails)
    assert repa.refused("runs") == "one two"


def test_an_interrupt_says_what_to_do(repa: Repa, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "runs", interrupted)
    code, _, err = repa("runs")
    assert code == 130 and "run the same command to go on" in err and err.count("\n") == 1


def test_config_shows_values_and_origins(
    repa: Repa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repa.toml").write_text(
        'source = "images"\n[sample]\ninterval = [0, 0.7]\n[encoders.dinov2-b]\nweights = "w"\n'
    )
    monkeypatch.setenv("REPA_SAMPLE_CFG", "1.8")
    code, out, err = repa("config sample")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "[sample]"
    for line in (
        "  source = ./images  (repa.toml)",
        "  interval = 0.0,0.7  (repa.toml [sample])",
        "  cfg = 1.8  (environment REPA_SAMPLE_CFG)",
        "  preset = imagenet  (default)",
        "  num_steps = 250  (default)",
        "  encoders.dinov2-b: {'weights': './w'}  (repa.toml)",
    ):
        assert line in lines
    everything = repa("config").out
    assert all(f"[{command}]" in everything for command in COMMANDS)
    assert "source = ./images" in everything
    (tmp_path / "repa.toml").write_text("")
    assert "  steps = " in repa("config train").out and "(preset digits)" in repa("config").out


def test_runs_and_choosing_between_them(repa: Repa, tmp_path: Path) -> None:
    assert repa("runs").out == "no runs in repa-workspace/runs: run `repa train` first\n"
    workspace = tmp_path / "repa-workspace"
    write_toy_cache(workspace, teachers=(ToyTeacher("my.vit"),))
    for changes in ({"name": "one", "seed": 4}, {"name": "two", "encoder": ("none",)}):
        train(plan_training(toy_train_config(workspace, steps=1, **changes)), Silent())
    code, out, _ = repa("runs")
    assert code == 0
    first, second = out.splitlines()
    where = "repa-workspace/runs"
    assert first == f"one  step 1 of 1  SiT-XS/2  my.vit  seed 4  {where}/one"
    assert second == f"two  step 1 of 1  SiT-XS/2  vanilla  seed 0  {where}/two"
    expected = f"2 runs in {where} (one, two): choose with --run NAME"
    assert repa.refused("sample") == expected
    assert repa.refused("sample --run three").endswith("known are one, two")


def test_a_dry_run_does_nothing(
    repa: Repa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_check, "READ_S", 0.1)
    monkeypatch.setattr(train_check, "_TRAIN_BUDGET_S", 0.1)
    write_toy_cache(tmp_path / "repa-workspace")
    code, out, _ = repa("train --dry-run --model SiT-XS/2 --batch-size 8 --steps 5")
    assert code == 0 and "done: step 0 of 5" in out
    # A record: moments 2*4*8*8 and tokens 16*12, both float16.
    assert "reads 1,408 bytes an image, 11.26 KB a step" in out
    assert not (tmp_path / "repa-workspace" / "runs").exists()
