"""The codecs on real teacher tokens: MobileNetV2 on photos of tiny20."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.fidelity import Fidelity, fidelity
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.encoders.base import load_encoder

NUM_IMAGES = 32
RESOLUTION = 128


@pytest.fixture(scope="module")
def tokens(shared: Path) -> Tensor:
    """float32 [32, 64, 1280], sparse: outputs of a ReLU6."""
    images = []
    with tarfile.open(shared / "data" / "tiny20" / "val-0000.tar.gz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or member.name.endswith(".cls"):
                continue
            images.append(adm_center_crop(decode_image(file.read()).image, RESOLUTION))
            if len(images) == NUM_IMAGES:
                break
    weights = str(shared / "data" / "weights" / "mobilenet_v2_1.0_int8.safetensors")
    encoder = load_encoder("mobilenet-v2", resolution=RESOLUTION, weights=weights)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return torch.cat([encoder.tokens(part) for part in pixels.split(8)])


def measure(name: str, tokens: Tensor) -> Fidelity:
    coded = CODECS[name].encode(tokens)
    assert coded.num_zero_tokens == 0
    decode = CODECS[name].decoder(CODECS[name].manifest(tokens.shape[-1]))
    scale = None if coded.scale is None else torch.from_numpy(coded.scale)
    return fidelity(tokens, decode(torch.from_numpy(coded.records), scale))


def test_real_tokens(tokens: Tensor) -> None:
    assert tokens.shape == (NUM_IMAGES, 64, 1280) and (tokens == 0).float().mean() > 0.7
    int8, int4 = measure("int8", tokens), measure("int4", tokens)
    assert int8.mean_cosine > 0.9999 and int8.worst_cosine > 0.9998
    assert int4.mean_cosine > 0.994 and int4.worst_cosine > 0.988
    fp16, bf16 = measure("fp16", tokens), measure("bf16", tokens)
    assert fp16.worst_cosine > 0.9999999 and fp16.spatial_error < 0.0005
    assert bf16.worst_cosine > 0.99999 and bf16.spatial_error < 0.003


def test_sparse_tokens_do_not_survive_spatial_normalisation(tokens: Tensor) -> None:
    """A quarter of the channels is zero all over an image. Rotated codecs put a little noise
    there, and the normalisation divides it by its own std: such teachers need fp16 or bf16."""
    silent = (tokens == 0).all(1)
    assert 0.2 < silent.float().mean() < 0.35
    assert 0.3 < measure("int8", tokens).spatial_error < 0.8
    assert 0.5 < measure("int4", tokens).spatial_error < 1.0
