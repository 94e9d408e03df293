"""`repa plan` as a user meets it: the page, its JSON, the rates file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repa_pipeline.cli import main
from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.errors import RepaError
from repa_pipeline.stages import plan_rates
from repa_pipeline.stages.plan_inputs import find_facts
from repa_pipeline.stages.plan_rates import find_rates, read_rates
from repa_pipeline.stages.probe import Measured, Probe
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.text import hours, number

RATES = """
decode = 150
train = 500
[networks]
sd-vae = 600
dinov2-vit-b = 2500
digits-vae = 9
"""
PRICES = """
[prices]
currency = "EUR"
device_hour = 2.5
gb_month = 0.02
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPA_CONFIG", raising=False)
    (tmp_path / "rates.toml").write_text(RATES)


class Repa:
    """Runs `repa plan` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, line: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["plan", *line.split()])
        out, err = self._capsys.readouterr()
        assert caught.value.code == code, err
        if code:
            assert out == "" and err.startswith("repa: ") and err.count("\n") == 1, (out, err)
            return err.strip().removeprefix("repa: ")
        assert err == ""
        return out


@pytest.fixture
def repa(capsys: pytest.CaptureFixture[str]) -> Repa:
    return Repa(capsys)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, instead of measuring: 10 images/s of everything, 20 of decoding."""
    seen: list[str] = []

    def network(self: Probe, spec: Any) -> Measured:
        seen.append(spec.name)
        return Measured(10.0, "batch 1, best of 2 runs")

    def decode(self: Probe, files: Any = ()) -> Measured:
        seen.append(f"decode {len(files)}")
        return Measured(20.0, "a JPEG")

    monkeypatch.setattr(Probe, "encoder", network)
    monkeypatch.setattr(Probe, "autoencoder", network)
    monkeypatch.setattr(Probe, "decode", decode)
    return seen


PAGE = """\
1,281,167 images (ImageNet's train set; --num-images says others) at 256 pixels, 147.3 GB of files
8 devices on 1 node with 96 CPU cores each

cache
                                  bytes   an image  shards
  latents.sd-vae-ft-ema.256    21.02 GB   16.38 KB   2,503
  features.dinov2-b.256        251.9 GB   196.6 KB   2,503
  features.dinov2-b.256.scale  681.6 MB  512 bytes   2,503
  together                     273.6 GB              7,509
  15,026 objects with their records, metadata and index; 20,034 PUTs
  2,562,334 GETs of the source for index and encoding (1 an image in each pass; fewer for tars)

rates
  sd-vae-ft-ema        600 images/s a device  given
  dinov2-b           2,500 images/s a device  given
  decoding               150 images/s a core  given
  training SiT-XL/2    500 images/s a device  given
  store, read                              -  not given: no limit
  store, write                             -  not given: no limit

encoding
  index          1.48 min  before it, on the CPUs alone
  sd-vae-ft-ema  35.6 min  of one device
  dinov2-b       8.54 min  of one device
  wall time      5.52 min  limited by the networks' forward passes
  devices held   44.1 min  of device time, 100% of it computing

training SiT-XL/2: 400,000 steps of 256 images, 79.9 epochs
  from the cache           500 images/s a device  56.9 h of devices a run, 7.11 h of wall time
  with the teacher online  417 images/s a device  68.3 h of devices a run; decoding takes 23 \
cores a node, not counted
  saved by the cache                       16.7%  11.4 h of devices a run
  reads 854.1 MB/s a node at 500 images/s a device, 20,020 GETs of 16 MiB an epoch (a run that \
needs directions alone leaves the .scale out)

money, EUR
  devices while encoding   1.84
  storage, a month         5.47
  devices, saved a run    28.44

cache: the features cost 5.41 EUR (stored for 1 month) and save 28.44 of devices less 0.00 of \
requests a run, paid after 15.2 epochs of training (1 run of 79.9 epochs planned)
"""
IMAGENET = "--preset imagenet --cores-per-node 96 --rates rates.toml --no-probe"


def test_the_page(repa: Repa, tmp_path: Path) -> None:
    (tmp_path / "rates.toml").write_text(RATES + PRICES)
    assert repa(IMAGENET) == PAGE


def test_json_is_one_object_with_the_same_numbers(repa: Repa) -> None:
    out = repa(f"{IMAGENET} --json")
    assert out.count("\n") == 1
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["cache"] is True and found["verdict"].startswith("cache: the features cost")
    assert found["plan"]["num_bytes"] == sum(a["bytes"] for a in found["arrays"].values())
    assert found["plan"]["training"]["epoch_gets"] == 20_020
    assert found["rates"]["networks"] == {"sd-vae-ft-ema": 600, "dinov2-b": 2500}
    assert set(found["origins"].values()) == {"given"} and found["measured_on"] == ""
    # A store so slow that caching never pays: no number of runs.
    Path("rates.toml").write_text("read = 1e6\n" + RATES)
    never = json.loads(repa(f"{IMAGENET} --json"))
    assert never["plan"]["training"]["break_even_runs"] is None and never["cache"] is False
    page = repa(IMAGENET)
    assert "\n  lost by the cache " in page and "limited by reading the source" in page
    assert page.splitlines()[-1].startswith("do not cache: the store delivers 0.585 images/s")


def test_do_not_cache_for_few_epochs(repa: Repa) -> None:
    last = repa(f"{IMAGENET} --train-steps 1000").splitlines()[-1]
    assert last.startswith("do not cache: ") and last.endswith("(1 run of 0.200 epochs planned)")


def test_given_rates_win_and_origins_are_printed(repa: Repa, measured: list[str]) -> None:
    Path("rates.toml").write_text("[networks]\nsd-vae-ft-ema = 600\n")
    page = repa("--preset imagenet --rates rates.toml --num-images 1000 --device cpu --threads 1")
    assert measured == ["dinov2-b", "decode 0"]
    assert "\nrates, measured on this machine's cpu with 1 thread, float32\n" in page
    rates = {line.split()[0]: line for line in page.splitlines() if "images/s" in line}
    assert rates["sd-vae-ft-ema"].endswith("600 images/s a device  given")
    assert rates["dinov2-b"].endswith("measured: batch 1, best of 2 runs")
    assert rates["decoding"].endswith("20.0 images/s a core  measured: a JPEG")
    # 10 images of 46.3 GFLOP a second make 0.65 of 712.
    assert "0.651 images/s a device  derived: 712 GFLOP an image at 463 GFLOP/s" in page
    assert "as dinov2-b (the same share of the device's peak)" in page
    assert "(as this machine; --cores-per-node says others)" in page


def test_training_is_derived_from_all_teachers(measured: list[str]) -> None:
    Path("rates.toml").write_text("[networks]\nclip-l = 40\n")
    config = PlanConfig(
        preset="imagenet", rates="rates.toml", encoder=("dinov2-b", "clip-l"), model="SiT-B/2"
    )
    found = find_rates(config, find_facts(config).work, read_rates(config))
    # Operations of both over the time of both, over 138 GFLOP a step's image.
    speed = (46.32 + 162.02) / (1 / 10 + 1 / 40)
    assert found.rates.train == pytest.approx(speed / 138.01, rel=1e-3)
    assert measured == ["sd-vae-ft-ema", "dinov2-b", "decode 0"]
    assert "as dinov2-b and clip-l" in found.origins["train"]


def test_latents_alone(repa: Repa) -> None:
    out = repa(f"{IMAGENET} --encoder none")
    assert "features" not in out and "from the cache" in out
    assert out.splitlines()[-1] == "nothing to weigh: no teacher, and every run needs the latents"
    Path("rates.toml").write_text("decode = 1\nnetworks.sd-vae = 5\n")
    out = repa(f"{IMAGENET} --encoder none")
    assert "unknown: there is no teacher to derive it from; give `train` in --rates" in out
    assert "left out: the rate of training is unknown" in out


def test_the_embedded_images(repa: Repa, measured: list[str]) -> None:
    out = repa("--device cpu --threads 1")
    assert measured == ["digits-vae", "digits-vit", "decode 16"]
    assert out.startswith("1,438 images (the embedded data set embedded:digits) at 64 pixels")
    assert "0 GETs of the source for index and encoding (part of this package: no GETs)" in out
    assert "1 device on 1 node" in out and "training SiT-XS/2: 600 steps of 64 images" in out


def test_a_dry_run_measures_nothing(repa: Repa, measured: list[str]) -> None:
    out = repa("--preset imagenet --dry-run --device cpu --threads 1").splitlines()
    assert out[0].startswith("would plan 3 arrays of 1,281,167 images")
    assert out[1:] == [
        "would measure sd-vae-ft-ema, dinov2-b, decode on cpu with 1 thread, float32"
    ]
    assert repa(f"{IMAGENET} --dry-run").endswith("would measure nothing: all rates are given\n")
    assert "would refuse: no rate for sd" in repa("--preset imagenet --dry-run --no-probe")
    found = json.loads(repa("--preset imagenet --dry-run --json"))
    assert found == {"would_measure": ["sd-vae-ft-ema", "dinov2-b", "decode"]}
    assert measured == [] and not Path("repa-workspace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("decode 5", "rates.toml is no TOML (Expected '=' after a key"),
        ("decoding = 5", "rates.toml: unknown key 'decoding': known are decode, train, read"),
        ("decode = 0", "rates.toml: decode is 0, expected a number above 0"),
        ("read = -1", "rates.toml: read is -1, expected a number above 0"),
        ("train = nan", "rates.toml: train is nan, expected a number above 0"),
        ("train = true", "rates.toml: train is True, expected a number above 0"),
        ("write = '5'", "rates.toml: write is '5', expected a number above 0"),
        ("networks = 5", "rates.toml: networks is 5, expected a section [networks]"),
        ("[networks]\ndinov2b = 5", "rates.toml: [networks] has 'dinov2b', which is no encoder"),
        ("[networks]\ndinov2-b = 0", "rates.toml: networks.dinov2-b is 0, expected a number"),
        ("[prices]\nhour = 1", "rates.toml: unknown key 'prices.hour': known are currency, device"),
        ("[prices]\ndevice_hour = -1", "rates.toml: prices.device_hour is -1, expected a number,"),
        ("[prices]\nmonths = inf", "rates.toml: prices.months is inf, expected a number, 0 or"),
        ("[prices]\ncurrency = 1", "rates.toml: prices.currency is 1, expected text"),
        ("decode = 5", "no rate for sd-vae-ft-ema, dinov2-b: give networks.sd-vae-ft-ema, netw"),
    ],
)
def test_a_bad_rates_file_is_one_line(content: str, message: str, repa: Repa) -> None:
    Path("rates.toml").write_text(content)
    assert repa(IMAGENET, code=2).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rates absent.toml", "no rates file absent.toml: check --rates"),
        ("--rates .", "no rates file .: check --rates"),
        ("--no-probe", "no rate for digits-vae, digits-vit, decode: give networks.digits-vae,"),
        ("--encoder dinov2b", "unknown encoder 'dinov2b': did you mean 'dinov2-b'"),
        ("--encoder none --encoder dinov2-b", "unknown encoder 'none'"),
        ("--devices 0", "devices (flag --devices): got 0, expected a number above 0"),
        ("--resolution 100", "autoencoder 'digits-vae' cannot take images of 100 pixels"),
        ("--device tpu0", "--device: got 'tpu0', expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_users_error_is_one_line(line: str, message: str, repa: Repa) -> None:
    assert repa(line, code=2).startswith(message)


def test_an_unknown_model_is_one_line(repa: Repa, measured: list[str]) -> None:
    assert repa("--model SiT-B --device cpu", code=2).startswith("unknown model 'SiT-B'")


PLUGIN = """
from repa_pipeline.testing.parts import tiny_encoder
ENCODERS = [tiny_encoder("mine", patch_size=16)]
"""


def test_a_plugins_teacher_without_a_file(repa: Repa, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_plugin_of_plan.py").write_text(PLUGIN)
    line = "--plugins my_plugin_of_plan --preset imagenet --encoder mine --rates rates.toml"
    monkeypatch.syspath_prepend(".")
    with isolated_tables():
        refused = repa(line, code=2)
        assert refused.startswith("encoder 'mine' cannot be built without its weights")
        assert '`[encoders.mine] weights = "PATH"` in repa.toml, or give its rate' in refused
        Path("rates.toml").write_text(RATES.replace("digits-vae", "mine"))
        page = repa(line)
        (row,) = (
            row for row in page.splitlines() if row.startswith("  mine") and "images/s" in row
        )
        assert row.split(maxsplit=1)[1] == "9.00 images/s a device  given"
        Path("rates.toml").write_text(RATES.replace("digits-vae", "mine").replace("train", "read"))
        assert repa(line, code=2).startswith("encoder 'mine' cannot be built")


def test_rates_name_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlanConfig(preset="imagenet", probe=False)
    with pytest.raises(RepaError, match=r"no rate for .*, decode: give .* in a --rates file"):
        find_rates(config, find_facts(config).work, read_rates(config))
    assert plan_rates.read_rates(config).speeds == {}


def test_numbers_for_people() -> None:
    shown = [number(value) for value in (1234567, 1234.5, 56.78, 0.99999, 0.0123456, 0, -2.5)]
    assert shown == ["1,234,567", "1,234", "56.8", "1.00", "0.0123", "0", "-2.50"]
    assert [hours(value) for value in (1000, 7.111, 0.5926, 0.0005, 0, -0.5)] == [
        *("1,000 h", "7.11 h", "35.6 min", "1.80 s", "0 s", "-30.0 min")
    ]
