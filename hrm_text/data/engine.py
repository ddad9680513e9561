"""The engine: one function over many shards, in this process, in processes of this machine, on Slurm or on Ray.

Everything that takes long (cleaning, tokenising, looking for duplicates) is a function of one shard that leaves its
result on the disk, whole or not at all. What is finished is found again, so a run that was killed goes on where it was,
and gives the same bytes. Executors are datatrove's; their logs lie in the engine's folder.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import importlib.util
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from hrm_text.contracts import UserError
from hrm_text.files import read_json, write_json

Kind = Literal["local", "slurm", "ray"]
Shard = TypeVar("Shard")
Progress = Callable[[int, int], None]
"""Called with what is done and the total, in the unit that the function names."""

_POLL_SECONDS = 0.2
_QUEUE_SECONDS = 20.0
_MOST_GROUPS = 32
"""Tasks for each worker, at most: every one is sent with the names of all shards, and has a log of its own."""


@dataclass(frozen=True)
class Engine:
    """Where shards are worked on."""

    kind: Kind = "local"
    workers: int = 1
    """Processes at a time; 1 on this machine is this process."""
    folder: Path | None = None
    """For logs and notes of what is finished, shared by all machines; needed but for one local worker."""
    partition: str = ""
    """Slurm's."""
    time_limit: str = "24:00:00"
    """Slurm's, of one shard."""
    memory_gb: int = 4
    """Of one worker, on Slurm and Ray."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.kind not in get_args(Kind):
            raise UserError(f"engine: expected one of {', '.join(get_args(Kind))}; found {self.kind!r}")
        if self.workers < 1:
            raise UserError(f"workers: expected at least 1, found {self.workers}")
        if self.kind == "slurm" and not self.partition:
            raise UserError("engine slurm: name the partition to run in")

    def run(
        self,
        name: str,
        work: Callable[[Shard], None],
        shards: Sequence[Shard],
        *,
        weights: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Call ``work`` on every shard. The first that fails fails the run.

        Args:
            name: of the stage, for its logs.
            work: a function of a module, or a ``functools.partial`` of one: it is sent to other processes. It writes
                its result whole or not at all.
            shards: what is left to do, each small (paths, settings): a caller leaves out what is finished.
            weights: of each shard, such as its bytes, for showing progress; 1 by default.
            on_progress: weight done, and in all.

        Raises:
            UserError: of ``work``, or the executor cannot run here.
        """
        weights = [1] * len(shards) if weights is None else weights
        total = sum(weights)
        weight_of_task: list[int] = []

        def advance(finished: Iterable[int], begun: int = 0) -> None:
            if on_progress is not None:
                on_progress(min(total, sum(weight_of_task[task] for task in finished) + begun), total)

        if self.kind == "local" and self.workers == 1:
            _work_on(work, shards, weights, lambda done: advance([], done))
            return
        if not shards:
            return
        if self.folder is None:
            raise UserError("an engine with several workers needs a folder for its logs")
        folder = self.folder / name
        # An earlier run numbered other shards: what it noted as finished says nothing of these.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        groups = _groups(weights, _MOST_GROUPS * self.workers)
        task = Task(
            work,
            tuple(tuple(shards[i] for i in group) for group in groups),
            tuple(tuple(weights[i] for i in group) for group in groups),
            folder,
        )
        weight_of_task += map(sum, task.weights)
        executor = self._executor(name, folder, task, len(groups))
        with _watching(folder, advance):
            try:
                executor.run()
                if self.kind == "slurm":
                    _wait_for_queue(executor.job_id, folder, len(groups))
            except Exception:
                _raise_failure(folder)
                raise
        _raise_failure(folder)
        if unfinished := sorted(set(range(len(groups))) - set(_finished(folder))):
            first = unfinished[0]
            raise UserError(
                f"{name}: {len(unfinished):,} of {len(groups):,} tasks did not finish, the first has "
                f"{task.groups[first][0]}; its log is {folder / 'logs' / f'task_{first:05d}.log'}. "
                "Run the same command again to go on."
            )
        if self.kind == "local":  # silent executors leave nothing worth keeping
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _executor(self, name: str, folder: Path, task: Task[Any], tasks: int) -> Any:
        """The executor of datatrove, which is imported here: that takes half a second."""
        common = {"pipeline": [task], "tasks": tasks, "workers": min(self.workers, tasks), "logging_dir": str(folder)}
        if self.kind == "local":
            from hrm_text.data.local_executor import LocalExecutor, preload

            preload(task.work)
            return LocalExecutor(**common)
        if self.kind == "ray":
            if importlib.util.find_spec("ray") is None:
                raise UserError("engine ray needs something that is not installed: pip install ray")
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor(**common, mem_per_cpu_gb=self.memory_gb)
        if shutil.which("sbatch") is None:
            raise UserError("engine slurm: there is no sbatch here; run this on a machine that submits jobs")
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            **common, job_name=f"hrm-{name}", time=self.time_limit, partition=self.partition,
            mem_per_cpu_gb=self.memory_gb, mail_type="NONE", requeue=False, requeue_signals=None,
            # The environment that this runs in, on a disk that all machines share.
            env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        )  # fmt: skip


def _groups(weights: Sequence[int], most: int) -> list[list[int]]:
    """Shards by number, in at most so many groups of about equal weight: a task has its price, whatever its size."""
    if len(weights) <= most:
        return [[index] for index in range(len(weights))]
    groups: list[list[int]] = [[] for _ in range(most)]
    heap = [(0, number) for number in range(most)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        weight, number = heap[0]
        groups[number].append(index)
        # One more than its weight, so that shards of no weight are spread as well.
        heapq.heapreplace(heap, (weight + weights[index] + 1, number))
    return groups


@dataclass(frozen=True)
class Task(Generic[Shard]):
    """A step of a pipeline: task number ``rank`` works on the shards of group number ``rank``."""

    work: Callable[[Shard], None]
    groups: tuple[tuple[Shard, ...], ...]
    weights: tuple[tuple[int, ...], ...]
    folder: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Work on a group; what the user can mend is written down, for exceptions do not reach us from everywhere."""
        try:
            note = functools.partial(_note_begun, self.folder / "begun" / str(rank))
            _work_on(self.work, self.groups[rank], self.weights[rank], note)
        except UserError as error:
            write_json(self.folder / FAILURE, str(error))
            raise


def _work_on(
    work: Callable[[Shard], None], shards: Sequence[Shard], weights: Sequence[int], note: Callable[[int], None]
) -> None:
    """Work on shards one after the other, and note the weight that is done."""
    done = 0
    for shard, weight in zip(shards, weights, strict=True):
        reporter = _reporter.set(functools.partial(lambda before, part: note(before + part), done))
        try:
            work(shard)
        finally:
            _reporter.reset(reporter)
        done += weight
        note(done)


_reporter: ContextVar[Callable[[int], None] | None] = ContextVar("reporter", default=None)


def report(done: int) -> None:
    """Say, from within ``work``, how much of the shard's weight is done; to be called as often as is handy."""
    if (reporter := _reporter.get()) is not None:
        reporter(done)


def _note_begun(path: Path, done: int) -> None:
    """Leave a number where ``_watching`` finds it; a lost one does no harm."""
    with contextlib.suppress(OSError):
        if not path.exists() or time.time() - path.stat().st_mtime > _POLL_SECONDS:
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(done))


FAILURE = "failure.json"
"""The message of the first shard that failed."""


def _raise_failure(folder: Path) -> None:
    if (folder / FAILURE).is_file():
        raise UserError(read_json(folder / FAILURE)) from None


def _finished(folder: Path) -> list[int]:
    completions = folder / "completions"
    return [int(path.name) for path in completions.iterdir()] if completions.is_dir() else []


def _begun(folder: Path, finished: Sequence[int]) -> int:
    """Weight done of the shards that are begun and not finished."""
    paths = (folder / "begun").iterdir() if (folder / "begun").is_dir() else ()
    return sum(int(path.read_text() or 0) for path in paths if int(path.name) not in finished)


@contextlib.contextmanager
def _watching(folder: Path, advance: Callable[[Sequence[int], int], None]) -> Iterator[None]:
    """Report what is finished, from a thread, as long as it lasts."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            finished = _finished(folder)
            advance(finished, _begun(folder, finished))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    advance(_finished(folder), 0)


def _wait_for_queue(job: str, folder: Path, tasks: int) -> None:
    """Wait until every task is finished, or the job has left the queue."""
    while len(_finished(folder)) < tasks and not (folder / FAILURE).is_file():
        queue = subprocess.run(
            ["squeue", "--noheader", "--jobs", str(job)], capture_output=True, text=True, check=False
        )
        if not queue.stdout.strip():
            time.sleep(_POLL_SECONDS)  # what the last one noted may arrive late
            return
        time.sleep(_QUEUE_SECONDS)
