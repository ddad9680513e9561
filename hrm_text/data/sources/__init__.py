"""Where training records come from: cleaners of public datasets, and generators with the mixture that the GPU preset
makes of them.
"""

from __future__ import annotations

from hrm_text.data.sources import (  # noqa: F401  they fill SOURCES and DATASETS
    custom,
    flan,
    general,
    geography,
    knowledge,
    mathematics,
    mathematics_dataset,
    procedural,
    reasoning,
    reasoning_gym,
    symbolic,
    web,
    wordnet,
)
from hrm_text.data.sources.mixture import FileReport, build_gpu_mixture
from hrm_text.data.sources.registry import SOURCES, Keyed, Source, available, find_source
from hrm_text.data.sources.upstream import DATASETS, find_dataset

__all__ = [
    "DATASETS",
    "SOURCES",
    "FileReport",
    "Keyed",
    "Source",
    "available",
    "build_gpu_mixture",
    "find_dataset",
    "find_source",
]
