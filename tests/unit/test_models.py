"""The trunk, its sizes, the projector, the EMA and the reading of reference checkpoints."""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_pipeline.errors import ConfigError, DataError, MismatchError, MissingError
from repa_pipeline.models import MODELS, build_model
from repa_pipeline.models.ema import Ema
from repa_pipeline.models.projector import build_projector
from repa_pipeline.models.reference import (
    config_from_reference,
    load_reference_checkpoint,
    rename_blocks,
    split_reference_state,
)
from repa_pipeline.models.sit import (
    Attention,
    SiT,
    SiTConfig,
    sincos_pos_embed,
    timestep_frequencies,
)

SMALL = SiTConfig(
    input_size=8, in_channels=4, patch_size=2, width=32, depth=3, num_heads=4, num_classes=10
)


def randomised(config: SiTConfig = SMALL) -> SiT:
    """A model whose output depends on everything: no zero layers."""
    model = SiT(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(config: SiTConfig = SMALL, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = config.input_size
    x = torch.randn(batch, config.in_channels, side, side, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.arange(batch) % (config.num_classes + 1)


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)],
)
def test_parameter_counts_are_the_published_ones(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = build_model(name, input_size=32, in_channels=4, num_classes=1000)
    count = sum(part.numel() for part in model.parameters() if part.requires_grad)
    assert round(count / 10**6) == millions


def test_the_table_holds_every_size_and_patch() -> None:
    published = {
        f"{family}-{size}/{patch}"
        for family in ("SiT", "DiT")
        for size in ("S", "B", "L", "XL")
        for patch in (2, 4, 8)
    }
    small = {f"SiT-{size}/{patch}" for size in ("XS", "Ti") for patch in (1, 2)}
    assert set(MODELS) == published | small
    assert all(spec.width % spec.num_heads == 0 for spec in MODELS.values())
    assert MODELS["SiT-XS/2"].grid(32) == (16, 16)
    for size in ("S", "B", "L", "XL"):
        sit, dit = MODELS[f"SiT-{size}/4"], MODELS[f"DiT-{size}/4"]
        assert (sit.family, dit.family) == ("sit", "dit")
        same = ("depth", "width", "num_heads", "patch_size", "align_depth")
        assert all(getattr(sit, name) == getattr(dit, name) for name in same)


def test_the_table_imports_without_torch() -> None:
    code = "import sys, repa_pipeline.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_code_imports_neither_timm_nor_diffusers() -> None:
    code = (
        "import sys, repa_pipeline.models.sit, repa_pipeline.models.reference;"
        "import repa_pipeline.models.ema, repa_pipeline.models.projector;"
        "import repa_pipeline.diffusion.guidance, repa_pipeline.diffusion.losses;"
        "sys.exit(bool({'timm', 'diffusers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the trunk ---------------------------------------------------------------------------------


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = SiT(SMALL)
    x, t, y = inputs()
    velocity, tokens = model(x, t, y, capture=3)
    assert torch.equal(velocity, torch.zeros_like(x))
    assert torch.equal(tokens, model.x_embedder(x) + model.pos_embed)


def test_initial_weights_have_the_reference_spread() -> None:
    torch.manual_seed(0)
    model = build_model("SiT-XS/2", input_size=32, in_channels=4, num_classes=1000)
    assert isinstance(model, SiT)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = (6 / (128 + 3 * 128)) ** 0.5
    qkv = model.blocks[0].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not qkv.bias.any()
    patch_bound = (6 / (128 + 4 * 2 * 2)) ** 0.5
    patch_weight = model.x_embedder.proj.weight
    assert patch_weight.abs().max().item() == pytest.approx(patch_bound, rel=0.02)


def test_captured_tokens_are_those_after_that_many_blocks() -> None:
    model = randomised()
    x, t, y = inputs()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    velocity, tokens = model(x, t, y, capture=2)
    assert torch.equal(tokens, seen[1])
    assert not torch.equal(tokens, seen[0])
    assert torch.equal(velocity, model(x, t, y))


@pytest.mark.parametrize("capture", [0, 4, -1])
def test_capture_of_a_block_that_is_not_there_is_refused(capture: int) -> None:
    with pytest.raises(ConfigError, match="blocks 1 to 3"):
        SiT(SMALL)(*inputs(), capture=capture)


def test_the_null_label_has_its_own_row() -> None:
    model = randomised()
    x, t, _ = inputs()
    assert model.null_label == 10
    null = model(x, t, torch.full((3,), model.null_label))
    assert not torch.allclose(null, model(x, t, torch.full((3,), 9)))
    with pytest.raises(IndexError):
        model(x, t, torch.full((3,), 11))


def test_samples_of_a_batch_do_not_mix() -> None:
    model = randomised()
    x, t, y = inputs()
    whole = model(x, t, y)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)


def test_patches_return_to_their_place() -> None:
    config = SiTConfig(6, 3, 2, 32, 1, 4, 10)
    image = torch.arange(3 * 6 * 6).float().view(1, 3, 6, 6)
    patches = torch.stack(
        [
            image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0).ravel()
            for row in range(3)
            for column in range(3)
        ]
    )
    assert torch.equal(SiT(config)._unpatchify(patches[None]), image)


def test_position_embedding_values() -> None:
    pos = sincos_pos_embed(8, 3)[0]
    # token (row 1, column 2); frequencies 1 and 1/100
    angles = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    expected = torch.cat([part for a in angles for part in (a.sin(), a.cos())])
    torch.testing.assert_close(pos[1 * 3 + 2], expected)


def test_timestep_frequencies_values() -> None:
    got = timestep_frequencies(torch.tensor([0.0, 0.5]))
    assert torch.equal(got[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    frequency = 10_000 ** (-64 / 128)
    assert got[1, 64].item() == pytest.approx(torch.tensor(0.5 * frequency).cos().item())
    assert got[1, 128 + 64].item() == pytest.approx(torch.tensor(0.5 * frequency).sin().item())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_timm(qk_norm: bool) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    config = SiTConfig(8, 4, 2, 32, 1, 4, 10, qk_norm=qk_norm)
    ours, theirs = (
        Attention(config),
        timm.Attention(32, num_heads=4, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm),
    )
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)


def test_normalised_queries_run_under_autocast() -> None:
    config = SiTConfig(8, 4, 2, 32, 2, 4, 10, qk_norm=True)
    model = randomised(config)
    x, t, y = inputs(config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, y).float()
    full = model(x, t, y)
    assert (half - full).abs().max() < 0.02 * full.abs().max()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="patches of 2"):
        SiTConfig(7, 4, 2, 32, 1, 4, 10)
    with pytest.raises(ConfigError, match="num_heads 5"):
        SiTConfig(8, 4, 2, 32, 1, 5, 10)


# --- projector ---------------------------------------------------------------------------------


def test_projector_is_the_published_mlp() -> None:
    projector = build_projector(32, 64, 24)
    assert [name for name, _ in projector.named_parameters()] == [
        f"{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")
    ]
    x = torch.randn(2, 5, 32)
    hidden = x
    for layer in (0, 2):
        hidden = F.silu(hidden @ projector[layer].weight.T + projector[layer].bias)
    expected = hidden @ projector[4].weight.T + projector[4].bias
    torch.testing.assert_close(projector(x), expected)


# --- EMA ---------------------------------------------------------------------------------------


def test_ema_equals_the_plain_loop() -> None:
    model = randomised()
    ema = Ema(model, decay=0.9)
    plain = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        for name, value in model.named_parameters():
            plain[name] = 0.9 * plain[name] + 0.1 * value.detach()
    for name, value in ema.module.named_parameters():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.module.pos_embed, sincos_pos_embed(32, 4))


def test_ema_is_frozen_and_independent() -> None:
    model = randomised()
    ema = Ema(model)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
    before = ema.module.blocks[0].attn.qkv.weight.clone()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    assert torch.equal(ema.module.blocks[0].attn.qkv.weight, before)


def test_ema_state_round_trip_and_copy() -> None:
    model, other = randomised(), SiT(SMALL)
    ema = Ema(model)
    restored = Ema(other)
    restored.load_state_dict(ema.state_dict())
    restored.copy_to(other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert other.blocks[0].attn.qkv.weight.requires_grad


def test_ema_refuses_another_module() -> None:
    with pytest.raises(MismatchError, match="by other names"):
        Ema(SiT(SMALL)).update(nn.Linear(2, 2))


# --- reference checkpoints ---------------------------------------------------------------------


def reference_state(model: SiT, *, legacy_depth: int | None = None) -> dict[str, Tensor]:
    """A state dict as the reference writes it: two projectors inside, either naming."""
    state = dict(model.state_dict())
    for n, width in enumerate((24, 40)):
        for name, value in build_projector(32, 64, width).state_dict().items():
            state[f"projectors.{n}.{name}"] = value
    if legacy_depth is None:
        return state
    legacy = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= legacy_depth:
            parts[:2] = ["decoder_blocks", str(int(parts[1]) - legacy_depth)]
        legacy[".".join(parts)] = value
    return legacy


def reference_file(path: pathlib.Path, model: SiT, **args: object) -> pathlib.Path:
    state = reference_state(model)
    ema = {name: value + 1 for name, value in state.items()}
    content = {
        "model": state,
        "ema": ema,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(**args),
        "steps": 400_000,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("legacy_depth", [None, 1, 2])
def test_both_namings_give_the_same_model(legacy_depth: int | None) -> None:
    model = randomised()
    state = reference_state(model, legacy_depth=legacy_depth)
    assert any(name.startswith("decoder_blocks") for name in state) == (legacy_depth is not None)
    own, projectors = split_reference_state(state)
    assert config_from_reference(state, num_heads=4) == SMALL
    loaded = SiT(SMALL).eval()
    loaded.load_state_dict(own)
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    heads = nn.ModuleList([build_projector(32, 64, 24), build_projector(32, 64, 40)])
    heads.load_state_dict(projectors)
    assert torch.equal(heads[1][4].weight, state["projectors.1.4.weight"])


def test_decoder_blocks_that_count_on_keep_their_numbers() -> None:
    state = {"blocks.0.a": torch.zeros(1), "decoder_blocks.1.a": torch.ones(1)}
    assert rename_blocks(state).keys() == {"blocks.0.a", "blocks.1.a"}


def test_config_from_shapes_and_args() -> None:
    with torch.device("meta"):
        state = build_model("SiT-B/4", input_size=32, in_channels=16, num_classes=7).state_dict()
    config = config_from_reference(state)
    assert config == SiTConfig(32, 16, 4, 768, 12, 12, 7)
    assert config_from_reference(state, {"model": "SiT-B/2", "num_classes": 7}) == config
    with pytest.raises(MismatchError, match="SiT-L/2"):
        config_from_reference(state, {"model": "SiT-L/2"})
    with pytest.raises(ConfigError, match="num_heads"):
        config_from_reference(SiT(SMALL).state_dict())
    with pytest.raises(DataError, match="pos_embed"):
        config_from_reference({"weight": torch.zeros(1)})


def test_config_tells_the_heads_of_a_normalised_model() -> None:
    config = SiTConfig(8, 4, 2, 32, 3, 4, 10, mlp_ratio=3.0, qk_norm=True)
    assert config_from_reference(SiT(config).state_dict()) == config


def test_a_model_without_a_null_row_gets_one() -> None:
    state = randomised().state_dict()
    table = "y_embedder.embedding_table.weight"
    state[table] = state[table][:10]
    args = {"num_classes": 10, "cfg_prob": 0.0}
    config = config_from_reference(state, args, num_heads=4)
    assert config == SMALL
    own, _ = split_reference_state(state, num_classes=config.num_classes)
    assert own[table].shape == (11, 32)
    assert not own[table][10].any()


def test_checkpoint_is_read(tmp_path: pathlib.Path) -> None:
    model = build_model("SiT-XS/2", input_size=8, in_channels=4, num_classes=5)
    assert isinstance(model, SiT)
    path = tmp_path / "0400000.pt"
    content = {
        "model": dict(model.state_dict()),
        "ema": {name: value + 1 for name, value in model.state_dict().items()},
        "opt": {},
        "args": argparse.Namespace(model="SiT-XS/2", num_classes=5, encoder_depth=4),
        "steps": 400_000,
    }
    torch.save(content, path)
    checkpoint = load_reference_checkpoint(path)
    assert checkpoint.config == model.config
    assert checkpoint.steps == 400_000
    assert checkpoint.args["encoder_depth"] == 4
    assert torch.equal(checkpoint.ema["pos_embed"], checkpoint.model["pos_embed"] + 1)
    assert checkpoint.projectors == {}


def test_projectors_of_a_checkpoint_are_the_trained_ones(tmp_path: pathlib.Path) -> None:
    path = reference_file(tmp_path / "last.pt", randomised(), encoder_depth=2)
    checkpoint = load_reference_checkpoint(path, num_heads=4)
    assert len(checkpoint.projectors) == 12
    assert not any("projectors" in name for name in {**checkpoint.model, **checkpoint.ema})
    stored = torch.load(path, weights_only=False)["model"]["projectors.1.0.bias"]
    assert torch.equal(checkpoint.projectors["1.0.bias"], stored)


def test_a_bare_state_dict_is_a_checkpoint(tmp_path: pathlib.Path) -> None:
    model = randomised()
    torch.save(reference_state(model, legacy_depth=2), tmp_path / "last.pt")
    checkpoint = load_reference_checkpoint(tmp_path / "last.pt", num_heads=4)
    assert checkpoint.steps is None
    assert checkpoint.args == {}
    loaded = SiT(checkpoint.config).eval()
    loaded.load_state_dict(checkpoint.ema)
    assert torch.equal(loaded(*inputs()), model(*inputs()))


class _Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 3",)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(MissingError, match="no checkpoint"):
        load_reference_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}, "ema": _Command()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "code.pt", "list.pt"):
        with pytest.raises(DataError, match=name):
            load_reference_checkpoint(tmp_path / name)
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="has no 'model'"):
        load_reference_checkpoint(tmp_path / "other.pt")
