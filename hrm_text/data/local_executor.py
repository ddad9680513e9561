"""datatrove's executor for the processes of one machine, without its log on the terminal, where progress is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.stats import PipelineStats
from loguru import logger


class LocalExecutor(LocalPipelineExecutor):
    """Says nothing: what fails is raised, and what is finished is noted in its folder."""

    def run(self) -> Any:
        """Run all tasks."""
        logger.disable("datatrove")
        return super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def preload(work: Callable[..., Any]) -> None:
    """Have the process that workers are forked from import what they run; the first call alone counts.

    Else every worker of every stage imports it for itself: half a second of a core each.
    """
    function = getattr(work, "func", work)  # of a functools.partial
    multiprocess.set_forkserver_preload([__name__, function.__module__])
