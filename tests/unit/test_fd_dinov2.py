"""FD-DINOv2's network on a tiny Vision Transformer, step by step against plain code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_pipeline.encoders.timm_vit import build_vit
from repa_pipeline.errors import MismatchError, MissingError
from repa_pipeline.metrics import fd_dinov2
from repa_pipeline.metrics.networks import NETWORKS, NetworkSpec, Widths, load_network

CONFIG = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.5}
SPEC = NetworkSpec("tiny", "repa_pipeline.metrics.fd_dinov2:load", config=CONFIG, pool=24)


def random_state(side: int) -> dict[str, torch.Tensor]:
    """Weights of a network whose position embedding has side x side patches."""
    generator = torch.Generator().manual_seed(0)
    state = build_vit(CONFIG, 14 * side).state_dict()
    return {
        key: torch.randn(value.shape, generator=generator) / max(1, value.shape[-1]) ** 0.5
        for key, value in state.items()
    }


def test_the_class_token_of_the_authors_preparation(tmp_path: Path) -> None:
    state = random_state(16)
    torch.save(state, tmp_path / "tiny.pth")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    network = fd_dinov2.load(SPEC, tmp_path / "tiny.pth").eval()
    found = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    plain = build_vit(CONFIG, 224, "cpu").eval()
    plain.load_state_dict(state)
    for image, pool in zip(images, found.pool, strict=True):
        large = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = np.asarray(large) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        chw = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
        tokens = plain.forward_features(chw)
        assert tokens.shape[1] == 1 + 16 * 16
        torch.testing.assert_close(pool, tokens[0, 0], rtol=1e-4, atol=1e-4)
    assert found.pool.std() > 0.1 and found.spatial is None and found.logits is None


def test_images_of_224_pixels_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (2, 3, 224, 224)).byte()
    torch.testing.assert_close(fd_dinov2.resize(images), images.float() / 255)


def test_the_position_embedding_by_the_authors_rule(tmp_path: Path) -> None:
    """At ratio (16 + 0.1) / 37, so that cell j lies at (j + 0.5) * 37 / 16.1 - 0.5."""
    ramp = torch.arange(37.0)
    grid = torch.stack([ramp[:, None].expand(37, 37), ramp[None].expand(37, 37)], dim=-1)
    pos = torch.cat([torch.full((1, 1, 2), 9.0), grid.reshape(1, 37 * 37, 2)], dim=1)
    made = fd_dinov2.resample(pos, 16)
    assert made.shape == (1, 257, 2) and made[0, 0].tolist() == [9, 9]
    at = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    want = torch.stack([at[:, None].expand(16, 16), at[None].expand(16, 16)], dim=-1)
    inner = slice(1, 15)
    found = made[0, 1:].reshape(16, 16, 2)
    # torch's cubic follows a ramp to 0.05; a ratio of 16 / 37 would be 0.2 away at the end.
    torch.testing.assert_close(found[inner, inner], want[inner, inner], rtol=0, atol=0.06)
    assert abs(found[14, 14, 0] - ((14.5 * 37 / 16) - 0.5)) > 0.14

    torch.save(random_state(37), tmp_path / "published.pth")
    network = fd_dinov2.load(SPEC, tmp_path / "published.pth")
    assert network.vit.pos_embed.shape == (1, 257, 24)


def test_the_entry_and_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NETWORKS["fd-dinov2"].widths(256) == Widths(1024)
    torch.save({"cls_token": torch.zeros(1, 1, 1024)}, tmp_path / "part.pth")
    with pytest.raises(MismatchError, match=r"does not fit network 'fd-dinov2': missing"):
        load_network("fd-dinov2", weights=str(tmp_path / "part.pth"))

    def unreachable(*_: object) -> Path:
        raise MissingError("no")

    monkeypatch.setattr(fd_dinov2, "resolve_weights", unreachable)
    with pytest.raises(MissingError, match=r"no weights for .*'fd-dinov2'.*--network-w"):
        load_network("fd-dinov2")
