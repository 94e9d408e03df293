"""Trains the three small networks of the embedded default on scikit-learn's handwritten digits.

    OMP_NUM_THREADS=1 python scripts/train_embedded.py

writes repa_pipeline/assets/{digits_vae,digits_vit,digits_cnn}.safetensors (float16) and
assets.json: how they were made, their SHA-256 and their scores, measured from the written files
by the pipeline's own loaders. About ten minutes on one core. Every fifth digit is held out and
only scored (data/digits.py). One thread and one seed a network: the same machine and library
versions give the same bytes, also with `--only`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save as to_safetensors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from repa_pipeline.autoencoders.base import load_autoencoder
from repa_pipeline.data.digits import embedded_digits, heldout_indices, train_indices
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.encoders.preprocess import preprocess
from repa_pipeline.encoders.rules import PREPROCESS
from repa_pipeline.metrics.digits_cnn import DigitsCNN
from repa_pipeline.metrics.digits_judge import DigitsJudge, fit_judge
from repa_pipeline.metrics.networks import load_network

COMMAND = "OMP_NUM_THREADS=1 python scripts/train_embedded.py"
DATA = "UCI Optical Recognition of Handwritten Digits (CC BY 4.0), as in scikit-learn's load_digits"
ASSETS = Path(__file__).resolve().parents[1] / "repa_pipeline" / "assets"
RESOLUTION, PATCH, NUM_CLASSES = 64, 16, 10
NAMES = ("vae", "vit", "cnn")

VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": [8, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
}
# mlp_ratio 1 keeps the float16 file below 1 MiB.
VIT_CONFIG: Mapping[str, Any] = {
    "img_size": RESOLUTION,
    "patch_size": PATCH,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 1.0,
    "num_classes": 0,
    "global_pool": "",
    "class_token": True,
}
# The posterior's std where unit variance is the latent's: small, yet it smooths the decoder.
POSTERIOR_STD, KL_WEIGHT, WHITENING_WEIGHT = 0.1, 0.01, 0.1
BLANKED_IMAGES, BLANKED_PATCHES = 0.25, 0.25
CONTENT_WEIGHT, LABEL_SMOOTHING = 0.3, 0.1
CONTENT_SIDE = 4


@dataclass(frozen=True)
class Plan:
    """How long and how fast one network is trained."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float


PLANS = {
    "vae": Plan(epochs=8, batch=16, learning_rate=3e-3, weight_decay=0.0),
    "vit": Plan(epochs=100, batch=32, learning_rate=1e-3, weight_decay=0.05),
    "cnn": Plan(epochs=30, batch=64, learning_rate=3e-3, weight_decay=0.01),
}


@dataclass(frozen=True)
class Digits:
    """images uint8 [1797, 3, 64, 64], labels int64 [1797], and the two parts as indices."""

    images: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor

    def parts(self) -> dict[str, Tensor]:
        return {"train": self.train, "held_out": self.held_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--only", choices=NAMES, nargs="*", default=NAMES, help="none: measure")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    given.out.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    trainers = {"vae": train_vae, "vit": train_vit, "cnn": train_cnn}
    for name in given.only:
        start = time.monotonic()
        torch.manual_seed(given.seed)
        network, config = trainers[name](digits, PLANS[name])
        save(network, config, asset_path(given.out, name))
        print(f"{name}: trained in {time.monotonic() - start:.0f} s", flush=True)
    facts = {"command": COMMAND, "seed": given.seed, "data": DATA, **describe(digits, given.out)}
    (given.out / "assets.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


def load_digits() -> Digits:
    images, labels = embedded_digits(RESOLUTION)
    return Digits(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels.copy()),
        train=torch.from_numpy(train_indices()),
        held_out=torch.from_numpy(heldout_indices()),
    )


def train_vae(digits: Digits, plan: Plan) -> tuple[nn.Module, Mapping[str, Any]]:
    """L1 + L2 of pixels in [-1, 1]; channels of the latent whitened; posterior std held near 0.1.

    The usual KL to a unit normal leaves one channel informative and three as noise, since a cell
    of 8x8 pixels holds one stored pixel. So the aggregate of the means is pulled to zero mean and
    unit covariance, and the KL only ties the posterior's variance.
    """
    untyped: Any = AutoencoderKL
    vae = untyped(**VAE_CONFIG)

    def loss(index: Tensor) -> Tensor:
        pixels = digits.images[index].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        ratio = posterior.var / POSTERIOR_STD**2
        kl = 0.5 * (ratio - 1 - ratio.log()).mean()
        total: Tensor = error + KL_WEIGHT * kl + WHITENING_WEIGHT * whitening_loss(posterior.mean)
        return total

    fit(vae, loss, digits.train, plan)
    return vae, VAE_CONFIG


def whitening_loss(latents: Tensor) -> Tensor:
    """Squared distance of mean and covariance over cells from 0 and identity. [B, C, h, w]."""
    cells_CN = latents.transpose(0, 1).flatten(1)
    identity = torch.eye(len(cells_CN))
    return cells_CN.mean(1).square().mean() + (torch.cov(cells_CN) - identity).square().mean()


def train_vit(digits: Digits, plan: Plan) -> tuple[nn.Module, Mapping[str, Any]]:
    """A teacher that knows what (the class) and where (the grey values of every patch).

    Classes are read from the class token and from the mean patch token; the content from each
    patch token, also where patches of the input are blanked. The heads are thrown away.
    """
    vit = VisionTransformer(**VIT_CONFIG)
    width = VIT_CONFIG["embed_dim"]
    heads = nn.ModuleDict(
        {
            "class": nn.Linear(width, NUM_CLASSES),
            "mean": nn.Linear(width, NUM_CLASSES),
            "content": nn.Linear(width, CONTENT_SIDE**2),
        }
    )

    def loss(index: Tensor) -> Tensor:
        images, labels = augment(digits.images[index]), digits.labels[index]
        pixels = blank_patches(preprocess(images, PREPROCESS["digits"]))
        tokens = vit.forward_features(pixels)
        content = F.mse_loss(heads["content"](tokens[:, 1:]), patch_content(images))
        return (
            F.cross_entropy(heads["class"](tokens[:, 0]), labels, label_smoothing=LABEL_SMOOTHING)
            + F.cross_entropy(
                heads["mean"](tokens[:, 1:].mean(1)), labels, label_smoothing=LABEL_SMOOTHING
            )
            + CONTENT_WEIGHT * content
        )

    fit(nn.ModuleList([vit, heads]), loss, digits.train, plan)
    return vit, VIT_CONFIG


def blank_patches(pixels: Tensor) -> Tensor:
    """In a quarter of the preprocessed images, sets a quarter of the patches to 0 (mean colour)."""
    side = RESOLUTION // PATCH
    blanked = torch.rand(len(pixels), 1, side, side) < BLANKED_PATCHES
    blanked &= torch.rand(len(pixels), 1, 1, 1) < BLANKED_IMAGES
    return pixels * ~blanked.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def patch_content(images: Tensor) -> Tensor:
    """Grey values of each patch at 4x4 pixels, in [-1, 1]. uint8 [B, 3, R, R] -> [B, T, 16]."""
    gray = F.avg_pool2d(images.float().mean(1, keepdim=True), PATCH // CONTENT_SIDE) / 127.5 - 1
    return F.unfold(gray, CONTENT_SIDE, stride=CONTENT_SIDE).transpose(1, 2)


def train_cnn(digits: Digits, plan: Plan) -> tuple[nn.Module, Mapping[str, Any]]:
    """A plain classifier."""
    cnn = DigitsCNN()

    def loss(index: Tensor) -> Tensor:
        logits = cnn(augment(digits.images[index])).logits
        return F.cross_entropy(logits, digits.labels[index], label_smoothing=LABEL_SMOOTHING)

    fit(cnn, loss, digits.train, plan)
    return cnn, {}


def augment(images: Tensor) -> Tensor:
    """Turns by up to 8 degrees, scales by up to 8%, shifts by up to 4 pixels. uint8 -> uint8."""
    angle, scale, shift_x, shift_y = torch.rand(4, len(images)) * 2 - 1
    angle, scale = angle * math.radians(8), 1 + 0.08 * scale
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    # affine_grid's image is 2 wide.
    shift_x, shift_y = shift_x * 8 / RESOLUTION, shift_y * 8 / RESOLUTION
    rows = [torch.stack(row, 1) for row in ((cosine, -sine, shift_x), (sine, cosine, shift_y))]
    gray = images[:, :1].float()
    grid = F.affine_grid(torch.stack(rows, 1), list(gray.shape), align_corners=False)
    moved = F.grid_sample(gray, grid, align_corners=False).round().to(torch.uint8)
    return moved.expand(-1, 3, -1, -1)


def fit(network: nn.Module, loss: Callable[[Tensor], Tensor], index: Tensor, plan: Plan) -> None:
    """AdamW on shuffled full batches; the rate warms up over 5% of the steps and falls to zero."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    steps_per_epoch = len(index) // plan.batch
    num_steps = plan.epochs * steps_per_epoch

    def factor(step: int) -> float:
        warm_up = min(1.0, (step + 1) / (0.05 * num_steps))
        return warm_up * 0.5 * (1 + math.cos(math.pi * step / num_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    network.train()
    for epoch in range(plan.epochs):
        total = 0.0
        shuffled = index[torch.randperm(len(index))]
        for step in range(steps_per_epoch):
            value = loss(shuffled[step * plan.batch : (step + 1) * plan.batch])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += value.item()
        print(f"  epoch {epoch + 1}/{plan.epochs}: loss {total / steps_per_epoch:.4f}", flush=True)


def asset_path(folder: Path, name: str) -> Path:
    return folder / f"digits_{name}.safetensors"


def save(network: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    state = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(to_safetensors(state, metadata={"config": json.dumps(config)}))


def describe(digits: Digits, folder: Path) -> dict[str, Any]:
    """Versions, hashes and scores of the files in `folder`."""
    judge = fit_judge()
    measures = {"vae": score_vae, "vit": score_vit, "cnn": score_cnn}
    packages = ("torch", "timm", "diffusers", "scikit-learn", "numpy", "pillow", "safetensors")
    files = {}
    for name in NAMES:
        path = asset_path(folder, name)
        if not path.exists():
            continue
        files[path.name] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_bytes": path.stat().st_size,
            **measures[name](digits, path, judge),
        }
    return {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "judge": {"held_out_accuracy": round(judge.held_out_accuracy, 4)},
        "files": files,
    }


@torch.no_grad()
def score_vae(digits: Digits, path: Path, judge: DigitsJudge) -> dict[str, Any]:
    """Of decoded posterior means: PSNR on 0..255, and the judge beside its score on originals.

    Latent mean and std per channel are those of posterior samples over the training digits.
    """
    vae = load_autoencoder("digits-vae", weights=str(path))
    scores: dict[str, Any] = {}
    for part, index in digits.parts().items():
        images, labels = digits.images[index], digits.labels[index]
        moments = torch.cat([vae.encode(chunk) for chunk in chunks(images)])
        mean, std = moments.chunk(2, dim=1)
        pixels = torch.cat([vae.decode(chunk) for chunk in chunks(mean)])
        decoded = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if part == "train":
            scores["latents"] = latent_statistics(mean, std)
        scores[part] = {
            "psnr": round(mean_psnr(decoded, images), 3),
            "judge_on_originals": agreement(judge.predict(images.numpy()), labels),
            "judge_on_decoded": agreement(judge.predict(decoded.numpy()), labels),
        }
    return scores


def latent_statistics(mean: Tensor, std: Tensor) -> dict[str, list[float]]:
    """Per channel: mean and std of posterior samples (in closed form), of means, and mean std."""
    mean_CN, std_CN = (moments.double().transpose(0, 1).flatten(1) for moments in (mean, std))
    sampled_std = (mean_CN.var(1) + std_CN.square().mean(1)).sqrt()
    columns = {
        "mean": mean_CN.mean(1),
        "std": sampled_std,
        "std_of_means": mean_CN.std(1),
        "posterior_std": std_CN.mean(1),
    }
    return {name: [round(value, 5) for value in found.tolist()] for name, found in columns.items()}


def mean_psnr(first: Tensor, second: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB. uint8 [N, 3, R, R]."""
    mse = (first.double() - second.double()).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / mse)).mean())


@torch.no_grad()
def score_vit(digits: Digits, path: Path, judge: DigitsJudge) -> dict[str, Any]:
    """Of frozen tokens, probes fitted on the training digits.

    knn, linear: class from the mean patch token (10 nearest by cosine; logistic regression).
    content_r2: grey values of a patch (4x4) from its own token, ridge regression.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neighbors import KNeighborsClassifier

    encoder = load_encoder("digits-vit", resolution=RESOLUTION, weights=str(path))
    tokens = torch.cat([encoder.tokens(chunk) for chunk in chunks(digits.images)])
    content = patch_content(digits.images).numpy()
    pooled, labels = tokens.mean(1).numpy(), digits.labels.numpy()
    train = digits.train.numpy()
    knn = KNeighborsClassifier(10, metric="cosine").fit(pooled[train], labels[train])
    linear = LogisticRegression(max_iter=2000).fit(pooled[train], labels[train])
    ridge = Ridge().fit(tokens[train].flatten(0, 1), content[train].reshape(-1, CONTENT_SIDE**2))
    scores = {}
    for part, index in digits.parts().items():
        targets = content[index].reshape(-1, CONTENT_SIDE**2)
        scores[part] = {
            "knn": agreement(knn.predict(pooled[index]), digits.labels[index]),
            "linear": agreement(linear.predict(pooled[index]), digits.labels[index]),
            "content_r2": round(ridge.score(tokens[index].flatten(0, 1), targets), 4),
        }
    return scores


def score_cnn(digits: Digits, path: Path, judge: DigitsJudge) -> dict[str, Any]:
    """Accuracy of the logits."""
    network = load_network("digits-cnn", weights=str(path))
    scores: dict[str, Any] = {}
    for part, index in digits.parts().items():
        logits = network.features(digits.images[index]).logits
        assert logits is not None
        scores[part] = {"accuracy": agreement(logits.argmax(1).numpy(), digits.labels[index])}
    return scores


def chunks(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + 128] for start in range(0, len(rows), 128)]


def agreement(predicted: Any, labels: Tensor) -> float:
    return round(float(np.mean(predicted == labels.numpy())), 4)


if __name__ == "__main__":
    main()
