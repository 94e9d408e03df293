"""SiT: the diffusion transformer that predicts velocity (SiT, arXiv 2401.08740; DiT blocks).

Parameter names are those of the reference REPA code, so its checkpoints load after the projectors
have been split off (models/reference.py). Label dropout, projectors and losses live elsewhere; the
trunk of models/dit.py is this one with another output.

Shape legend: B batch, C latent channels, H W latent sides, T tokens, D width, N heads,
K head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repa_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from repa_pipeline.models import ModelSpec

FREQUENCY_WIDTH = 256
MAX_PERIOD = 10_000.0


@dataclasses.dataclass(frozen=True)
class SiTConfig:
    """Everything that decides the shape of a SiT; latents are square, `input_size` per side.

    frequency_shift: 1 spaces the frequencies of t as diffusers' DiT class does, see
    `timestep_frequencies`.
    """

    input_size: int
    in_channels: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    frequency_shift: int = 0

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise ConfigError(
                f"latents of {self.input_size} per side cannot be cut into patches of "
                f"{self.patch_size}: choose a model with another patch size"
            )
        if self.width % self.num_heads or self.width % 4:
            raise ConfigError(
                f"width {self.width} must be a multiple of 4 and of num_heads {self.num_heads}"
            )

    @property
    def grid_size(self) -> int:
        """Tokens per side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the answer: a velocity has those of the latents."""
        return self.in_channels

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        qk_norm: bool = False,
    ) -> Self:
        """The configuration of an entry of MODELS."""
        return cls(
            input_size=input_size,
            in_channels=in_channels,
            patch_size=spec.patch_size,
            width=spec.width,
            depth=spec.depth,
            num_heads=spec.num_heads,
            num_classes=num_classes,
            qk_norm=qk_norm,
        )


def build_sit(
    spec: ModelSpec, *, input_size: int, in_channels: int, num_classes: int, qk_norm: bool = False
) -> SiT:
    """The loader of the SiT entries of MODELS."""
    return SiT(
        SiTConfig.of(
            spec,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            qk_norm=qk_norm,
        )
    )


def sincos_pos_embed(width: int, grid_size: int) -> Tensor:
    """Fixed 2D position embedding, float32 [1, grid_size**2, width], tokens row by row.

    The first half of the channels codes the column, the second half the row; each is the sines
    and then the cosines of `width / 4` frequencies 10000^(-k / (width / 4)).
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = code[None].expand(grid_size, -1, -1)
    rows = code[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid_size**2, width).float()


def timestep_frequencies(t: Tensor, width: int = FREQUENCY_WIDTH, shift: int = 0) -> Tensor:
    """Cosines and sines of t [B] at geometric frequencies, float32 [B, width].

    Frequency k of the n = width / 2 is 10000^(-k / (n - shift)): shift 0 in the code of DiT, SiT
    and REPA (so the published weights expect it), 1 in diffusers' DiT class.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / (half - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class PatchEmbed(nn.Module):
    """Latents [B, C, H, W] -> tokens [B, T, D], row by row."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times [B] of any dtype -> [B, D]: of SiT in [0, 1], of DiT whole numbers."""

    def __init__(self, width: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_WIDTH, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        frequencies = timestep_frequencies(t, shift=self.frequency_shift)
        embedded: Tensor = self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Labels [B] in [0, num_classes] -> [B, D]; the last row is the null label."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention with qkv bias, optionally with normalised queries and keys."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        head_width = config.width // config.num_heads
        self.q_norm: nn.Module = nn.LayerNorm(head_width) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(head_width) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv_BTD3: Tensor = self.qkv(x_BTD)
        q_BNTK, k_BNTK, v_BNTK = (
            part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for part in qkv_BTD3.chunk(3, dim=2)
        )
        # Under autocast a LayerNorm answers in float32, and the three must share one dtype.
        q_BNTK = self.q_norm(q_BNTK).to(v_BNTK.dtype)
        k_BNTK = self.k_norm(k_BNTK).to(v_BNTK.dtype)
        mixed_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        projected: Tensor = self.proj(mixed_BNTK.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a tanh GELU between."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))
        return out


class SiTBlock(nn.Module):
    """A transformer block whose norms and residuals are modulated by the condition (adaLN-Zero)."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        modulation: Tensor = self.adaLN_modulation(condition_BD)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x_BTD = x_BTD + gate1[:, None] * self.attn(_modulate(self.norm1(x_BTD), shift1, scale1))
        x_BTD = x_BTD + gate2[:, None] * self.mlp(_modulate(self.norm2(x_BTD), shift2, scale2))
        return x_BTD


class FinalLayer(nn.Module):
    """Tokens [B, T, D] -> pixels of their patches [B, T, patch * patch * out_channels]."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        modulation: Tensor = self.adaLN_modulation(condition_BD)
        shift, scale = modulation.chunk(2, dim=1)
        out: Tensor = self.linear(_modulate(self.norm_final(x_BTD), shift, scale))
        return out


class SiT(nn.Module):
    """The trunk: velocity of the latents given time and label.

    With `gradient_checkpointing` the blocks keep only their inputs for the way back and are
    computed again there: the same gradients, bit for bit, for less memory and a third more work.
    """

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.width, config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        # A parameter, not a buffer, because the reference's checkpoints and EMA hold it as one.
        self.pos_embed = nn.Parameter(
            torch.empty(1, config.num_tokens, config.width), requires_grad=False
        )
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialise()

    @property
    def null_label(self) -> int:
        """The label of the unconditional model."""
        return self.config.num_classes

    def initialise(self) -> None:
        """Xavier linears, small normal embeddings, zero modulation and output (DiT, section 3.2).

        A fresh model predicts zero, and every block is the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer on flat patches: its fan is a linear layer's.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        _zero(self.x_embedder.proj.bias)
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=0.02)
        for module in self.modules():
            if isinstance(module, SiTBlock | FinalLayer):
                _zero(*module.adaLN_modulation.parameters())
        _zero(*self.final_layer.linear.parameters())
        self.pos_embed.data.copy_(sincos_pos_embed(self.config.width, self.config.grid_size))

    @overload
    def forward(self, x: Tensor, t: Tensor, y: Tensor, capture: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, t: Tensor, y: Tensor, capture: int) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, capture: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity [B, C, H, W] at latents x [B, C, H, W], times t [B] in [0, 1], labels y [B].

        y: int64 in [0, num_classes]; num_classes is the null label. With `capture` (1-based) also
        the tokens [B, T, D] after that many blocks, with their gradient, for the alignment loss.
        Raises ConfigError when there is no such block.
        """
        if capture is not None and not 1 <= capture <= len(self.blocks):
            raise ConfigError(
                f"cannot take tokens after block {capture}: the model has blocks 1 to "
                f"{len(self.blocks)}"
            )
        tokens_BTD = self.x_embedder(x) + self.pos_embed
        condition_BD = self.t_embedder(t) + self.y_embedder(y)
        captured_BTD: Tensor | None = None
        for number, block in enumerate(self.blocks, start=1):
            tokens_BTD = self._run(block, tokens_BTD, condition_BD)
            if number == capture:
                captured_BTD = tokens_BTD
        velocity = self._unpatchify(self.final_layer(tokens_BTD, condition_BD))
        return velocity if captured_BTD is None else (velocity, captured_BTD)

    def _run(self, block: nn.Module, tokens_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            tokens: Tensor = block(tokens_BTD, condition_BD)
            return tokens
        # Nothing in a block is random, and saving the generators' state would stall the device.
        again: Tensor = checkpoint(
            block, tokens_BTD, condition_BD, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, T, patch * patch * C] -> [B, C, H, W]; channels vary fastest inside a patch."""
        grid, patch = self.config.grid_size, self.config.patch_size
        patches = patches.view(-1, grid, grid, patch, patch, self.config.out_channels)
        # [B, row, column, y, x, C] -> [B, C, row, y, column, x]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
