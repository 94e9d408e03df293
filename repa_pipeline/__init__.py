"""Training diffusion transformers with representation alignment (REPA) from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_pipeline.pipeline import REPAPipeline

__all__ = ["REPAPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The pipeline class, imported when it is asked for: `import repa_pipeline` needs no torch."""
    if name == "REPAPipeline":
        from repa_pipeline.pipeline import REPAPipeline

        return REPAPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
