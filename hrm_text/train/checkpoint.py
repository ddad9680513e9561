"""Checkpoints: copied in an instant, written in the background by all ranks, whole or absent, read after a check.

The layout of the folders and how one process reads them are in ``model.checkpoint_files``, because exporting and
inference read them too.
"""

from __future__ import annotations

import base64
import gc
import json
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import AsyncStager

from hrm_text.contracts import UserError
from hrm_text.model import checkpoint_files
from hrm_text.model.checkpoint_files import (
    SavedState,
    damaged_files,
    load_state,
    newest_without_damage,
    read_manifest,
    saved_tensors,
    step_folders,
)
from hrm_text.train.checkpoint_storage import COPIES, Reader, StagedPlanner, Writer
from hrm_text.train.staging import Staging

__all__ = [
    "Saved",
    "SavedState",
    "Saver",
    "latest_good",
    "load_into",
    "load_state",
    "restore_rng",
    "rng_state",
]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on the disk."""

    step: int
    folder: Path
    stalled_seconds: float
    """How long ``begin`` kept training from going on."""
    seconds: float
    """From ``begin`` until the checkpoint was whole."""


class Saver:
    """Writes the checkpoints of a run to ``root`` while training goes on, one at a time.

    Every rank has one, and calls ``begin`` at the same steps; all must see the same file system. Earlier checkpoints
    stay as they are whatever goes wrong, and those of later steps (of a run that was set back) are never deleted.
    """

    def __init__(self, root: Path, *, keep_last: int, keep_every: int | None, group: ProcessGroup | None) -> None:
        """Make the saver of one rank.

        keep_last, keep_every: how many of the newest stay, and the steps whose multiples stay for good.
        group: of all ranks, on the CPU (gloo) and used for nothing else, as its collectives run beside those of
        training; its timeout is how long the fastest rank waits for the slowest to write. None: one process alone.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"expected keep_last and keep_every >= 1, found {keep_last} and {keep_every}")
        self.root, self.keep_last, self.keep_every, self.group = root, keep_last, keep_every, group
        self._is_first = group is None or dist.get_rank(group) == 0
        self._staging = Staging()
        self._unreported: deque[Future[Saved]] = deque()

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Copy the state of ``step`` to the host and start to write it; on return training may change all of it.

        tensors: by the names of the layout (``weights/<parameter>`` ...), each with the same shape on all ranks; of a
        DTensor every rank writes its part, of any other one rank writes the whole. Asked for one after another, so a
        mapping may make them as it is read. state and config are the first rank's and must survive JSON and YAML.
        A save that is still running is waited for first.
        """
        started = time.monotonic()
        if self._unreported:
            self._unreported[-1].exception()
        plan, copies = self._staging.copy(tensors)
        texts = {}
        if self._is_first:
            texts["state.json"] = json.dumps(dict(state), indent=2, ensure_ascii=False) + "\n"
            texts["config.yaml"] = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        writer = Writer(self.root, step, texts, self.keep_last, self.keep_every)
        outcome: Future[Saved] = Future()
        _expect_one_process(self.group)
        upload = state_dict_saver.async_save(
            {COPIES: copies},
            storage_writer=writer,
            planner=StagedPlanner(plan),
            process_group=self.group,
            async_stager=_AlreadyStaged(),
            no_dist=self.group is None,
        )
        stalled = time.monotonic() - started

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                outcome.set_result(Saved(step, writer.folder, stalled, time.monotonic() - started))
                return
            if self._is_first:
                writer.discard()
            outcome.set_exception(_cause(error))

        self._unreported.append(outcome)
        assert isinstance(upload, Future)
        upload.add_done_callback(settle)

    def finished(self, wait: bool = False) -> Saved | None:
        """The oldest save that has ended and was not told of yet; None when there is none.

        ``wait``: for the one that is running. It is this rank's view: others may learn of the same save a step later.

        Raises:
            UserError: the save failed, on all ranks and whichever of them it was: the disk is full, say. The next may
                succeed.
        """
        if not self._unreported or not (wait or self._unreported[0].done()):
            return None
        outcome = self._unreported[0]
        outcome.exception()  # waits; an interruption here forgets nothing
        return self._unreported.popleft().result()

    def close(self) -> None:
        """Wait for what is being written, and give the memory of the copies back; failures are not told any more."""
        for outcome in self._unreported:
            outcome.exception()
        self._unreported.clear()
        self._staging.close()


def load_into(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Fill tensors in place from a checkpoint, each by its name there, DTensors with the part that they hold.

    However the checkpoint was sharded, and in whatever dtype the tensors are here. Tensors of the checkpoint that are
    not asked for are not read, nor are checksums compared: ``latest_good`` did. All ranks of ``group`` call it alike.

    Raises:
        UserError: the checkpoint lacks a tensor or has it in another shape, or a file cannot be read.
    """
    saved = saved_tensors(folder, read_manifest(folder))
    for name, tensor in tensors.items():
        if name not in saved:
            raise UserError(f"{folder}: holds no {name!r}; it is of another model or of other settings of training")
        if saved[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: {name!r} has shape {list(saved[name].shape)}, expected {list(tensor.shape)}; "
                "it is of another model"
            )
    _expect_one_process(group)
    try:
        state_dict_loader.load(
            dict(tensors),
            storage_reader=Reader(folder, saved),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise _cause(error) from error
    gc.collect()  # PyTorch's planner is part of a cycle, and holds the tensors: 4.4 GiB of a GPU at XL


def latest_good(root: Path, warn: Callable[[str], Any], group: ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint under ``root`` that is complete and unchanged; None when there is no checkpoint at all.

    A damaged newer one is named through ``warn``, on the first rank, and passed over; when all are damaged, a
    UserError names each. The ranks of ``group`` share the work of comparing checksums and agree on the answer.
    """
    if group is None:
        return checkpoint_files.latest_good(root, warn)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def damage(folder: Path) -> str | None:
        found: list[str] = []
        try:
            manifest = read_manifest(folder)
            saved_tensors(folder, manifest)
            found = damaged_files(folder, {name: manifest["files"][name] for name in shares(manifest, ranks)[rank]})
        except UserError as error:
            found = [str(error)]
        of_ranks: list[list[str]] = [[] for _ in range(ranks)]
        dist.all_gather_object(of_ranks, found, group=group)
        return min((text for texts in of_ranks for text in texts), default=None)

    # One rank looks, as a folder may not be there yet for another that mounts the same disk.
    seen = [step_folders(root)[::-1]]
    dist.broadcast_object_list(seen, group=group, group_src=0)
    return newest_without_damage(root, seen[0], damage, warn if rank == 0 else lambda text: None)


def shares(manifest: Mapping[str, Any], ranks: int) -> Sequence[list[str]]:
    """The files of a checkpoint in as many parts, of about the same number of bytes."""
    parts: list[list[str]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name, file in sorted(manifest["files"].items(), key=lambda item: (-item[1]["size"], item[0])):
        least = sizes.index(min(sizes))
        parts[least].append(name)
        sizes[least] += file["size"]
    return parts


def rng_state() -> dict[str, Any]:
    """The random states of Python, of PyTorch on the CPU and, if in use, on the current CUDA device; fit for JSON."""
    kind, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [kind, list(words), gauss], "torch": _encoded(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encoded(torch.cuda.get_rng_state())
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` gave; a CUDA state is left out on a machine without CUDA."""
    kind, words, gauss = state["python"]
    random.setstate((kind, tuple(words), gauss))
    torch.set_rng_state(_decoded(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decoded(state["cuda"]))


# ---------------------------------------------------------------------------------------------------------------------


class _AlreadyStaged(AsyncStager):
    """What is to be saved are copies already."""

    _synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    def synchronize_staging(self) -> None:
        return None

    def close(self) -> None:
        return None


def _cause(error: BaseException) -> BaseException:
    """What went wrong, from PyTorch's account of every rank: a bug of any rank first, else what a user can mend."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    for cause in causes:
        if not isinstance(cause, UserError):
            return cause
    return UserError("\n".join(dict.fromkeys(str(cause) for cause in causes)))


def _expect_one_process(group: ProcessGroup | None) -> None:
    """Without a group, PyTorch warns that it assumes one process: here that is what was asked for.

    The filter stays, since the warning comes from another thread, and filters belong to all threads.
    """
    if group is None:
        message = "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def _encoded(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _decoded(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
