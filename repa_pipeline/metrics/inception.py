"""The FID network: Inception-v3 of 2015-12-05 with 1008 outputs, by the library torch-fidelity.

Its 'inception-v3-compat' resizes by TensorFlow 1's legacy bilinear rule inside, as the ADM suite's
graph does. Weights: torch-fidelity's published file, by path or by its own download.
"""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from repa_pipeline.errors import MissingError
from repa_pipeline.metrics.networks import NETWORKS, Features, NetworkSpec
from repa_pipeline.weights import fit_state, load_state

NAME = "inception-v3-compat"
# "mixed_6/conv:0" of the graph, of which sFID takes the first channels.
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
TIMEOUT_S = 5
_COUNTER = "num_batches_tracked"


def load(spec: NetworkSpec, path: Path) -> Inception:
    """The network with the weights in `path`; raises DamagedError and MismatchError."""
    extractor = _Extractor()
    state = load_state(path)
    # Files of old lack the counters of batches, which nothing reads in eval mode.
    counters = {key: torch.tensor(0) for key in extractor.state_dict() if key.endswith(_COUNTER)}
    fit_state(extractor, {**counters, **state}, path, f"network '{spec.name}'")
    return Inception(extractor)


class _Extractor(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's network without its weights: its constructor would unpickle a file, so it
    is given an empty one, and the real one is read and checked by our own rules."""

    def __init__(self) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__(NAME, ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        return super().load_state_dict(state_dict, strict and bool(state_dict), assign)


class Inception(nn.Module):
    """Images uint8 [B, 3, R, R] -> pool [B, 2048], spatial [B, 2023] in order y, x, channel, and
    1008 logits without the bias."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self._spatial: Tensor | None = None
        extractor.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # A copy: the layer's output goes on into a concatenation, and is large.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> Features:
        pool, logits = self.extractor(images)
        spatial, self._spatial = self._spatial, None
        return Features(pool, spatial, logits)


def download(ways_out: str) -> Path:
    """torch-fidelity's published file in torch's hub folder, fetched where it is not there.

    `ways_out` tells what else the user can do. Raises MissingError, within seconds when there is
    no network.
    """
    name = str(URL_INCEPTION_V3).rpartition("/")[2]
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        # One request with a limit tells whether the file can be had; the download has none.
        with urllib.request.urlopen(URL_INCEPTION_V3, timeout=TIMEOUT_S):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = NETWORKS["inception-v3"].sha256
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise MissingError(
            f"no weights for network 'inception-v3': cannot get {name} from torch-fidelity's "
            f"release ({error}): give {ways_out}, or a network that reaches it"
        ) from None
    return path
