"""REPA: a SiT aligned with frozen teachers (arXiv 2410.06940, section 3)."""

from __future__ import annotations

from repa_pipeline.methods.alignment import Aligned
from repa_pipeline.methods.sit import SiTMethod


class RepaMethod(Aligned, SiTMethod):
    """Denoising + lambda * alignment (methods/alignment.py)."""

    name = "repa"
    twin = "sit"
