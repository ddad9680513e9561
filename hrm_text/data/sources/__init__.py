"""Where training records come from: registered generators, and the mixture that the GPU preset makes of them."""

from __future__ import annotations

from hrm_text.data.sources import (  # noqa: F401  they fill SOURCES
    geography,
    mathematics_dataset,
    procedural,
    reasoning_gym,
    wordnet,
)
from hrm_text.data.sources.mixture import FileReport, build_gpu_mixture
from hrm_text.data.sources.registry import SOURCES, Keyed, Source, available, find_source

__all__ = ["SOURCES", "FileReport", "Keyed", "Source", "available", "build_gpu_mixture", "find_source"]
