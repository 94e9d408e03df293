"""REPA on DiT: noise prediction aligned with frozen teachers (arXiv 2410.06940)."""

from __future__ import annotations

from repa_pipeline.methods.alignment import Aligned
from repa_pipeline.methods.dit import DiTMethod


class RepaDiTMethod(Aligned, DiTMethod):
    """Noise prediction with a learned variance + lambda * alignment (methods/alignment.py)."""

    name = "repa-dit"
    twin = "dit"
