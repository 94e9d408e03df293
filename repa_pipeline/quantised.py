"""Small convolutional networks stored as integers: dequantised on load, padded as TensorFlow does.

A file holds, per layer NAME, `NAME.q` (int8 or uint8, [out, in/groups, kh, kw]), `NAME.scale`
(one, or one per output channel), optionally `NAME.zp` (zero when absent) and `NAME.bias` (float32).
BatchNorm is already folded.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from repa_pipeline.errors import DamagedError, MissingError


def load_quantised(path: str | Path) -> dict[str, Tensor]:
    """Reads a file of quantised layers: weight = (q - zp) * scale.

    Returns `NAME.weight` and `NAME.bias` for every layer, float32 on the CPU. Raises MissingError
    when there is no such file and DamagedError when it is not a file of quantised layers.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no weights file at {path}: give the path of a quantised safetensors")
    try:
        stored = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"cannot read {path} as safetensors ({error}): fetch it again") from None
    names = [key.removesuffix(".q") for key in stored if key.endswith(".q")]
    absent = [f"{name}.scale" for name in names if f"{name}.scale" not in stored]
    if absent or not names:
        raise DamagedError(
            f"{path} has {len(names)} quantised layers (NAME.q) and lacks {absent or ['NAME.q']}: "
            "expected NAME.q with NAME.scale"
        )
    state = {f"{name}.weight": _dequantise(stored, name) for name in names}
    biases = {key: value.float() for key, value in stored.items() if key.endswith(".bias")}
    return state | biases


def tf_same_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with TensorFlow's SAME padding.

    x [B, C, H, W], weight [O, C/groups, kh, kw], bias [O] -> [B, O, ceil(H/stride),
    ceil(W/stride)]. Where the padding is odd the extra row and column go to the bottom and right,
    so stride 2 on an even size pads there only.
    """
    top, bottom = _same_padding(x.shape[-2], weight.shape[-2], stride, dilation)
    left, right = _same_padding(x.shape[-1], weight.shape[-1], stride, dilation)
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, stride=stride, dilation=dilation, groups=groups)


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    covered = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1
    total = max(covered - size, 0)
    return total // 2, total - total // 2


def _dequantise(stored: dict[str, Tensor], name: str) -> Tensor:
    q, scale = stored[f"{name}.q"], stored[f"{name}.scale"]
    zero_point = stored.get(f"{name}.zp", torch.zeros(1))
    per_channel = (-1, *[1] * (q.ndim - 1))
    return (q.float() - zero_point.float().view(per_channel)) * scale.float().view(per_channel)
