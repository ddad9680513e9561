"""Where PyTorch's distributed checkpoint puts tensors: safetensors files under checksums, in a folder whole or absent.

What is written by whom, and read by whom, is planned by PyTorch: of replicas one is written, and shards of one layout
are read into another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from hrm_text.contracts import UserError
from hrm_text.files import explained_disk_errors, sync
from hrm_text.model.checkpoint_files import FORMAT, Chunk, SavedTensor, is_complete, step_folders, step_of
from hrm_text.model.tensorfile import opened, read_part, save_tensors

FILE_BYTES = 1 << 30
"""A file takes tensors until it is about this large, so that several threads can write and verify what a rank has."""

WRITTEN_AT_ONCE = 4
"""Files that a rank writes at the same time: the checksum alone takes a second for 0.5 to 2 GB."""


COPIES = "copies"
"""The one entry of what is given to PyTorch to save."""


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk in its file, and what the manifest says of that file."""

    chunk: Chunk
    size: int
    sha256: str


class StagedPlanner(DefaultSavePlanner):
    """A planner of copies in host memory, for what was to be written of the tensors that they are copies of."""

    def __init__(self, plan: SavePlan) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local_plan = plan

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the copies, which come as one entry: PyTorch logs its handling of every entry, which takes its time."""
        super().set_up_planner(state_dict[COPIES], storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """What this rank could write, replicas included."""
        self.plan = self._local_plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of what lies here of a tensor, which is the chunk of it that is written."""
        copy: Tensor = self.state_dict[index.fqn]
        return copy


class Writer(StorageWriter):
    """Writes one checkpoint: all ranks beside, then the first one renames, and deletes what is no longer kept."""

    def __init__(self, root: Path, step: int, texts: Mapping[str, str], keep_last: int, keep_every: int | None) -> None:
        """``texts``: small files by name, which the first rank writes."""
        self.root, self.step, self.texts = root, step, texts
        self.keep_last, self.keep_every = keep_last, keep_every
        self.folder = root / f"step_{step:08d}"
        self.beside = root / f".step_{step:08d}.tmp"
        self.rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn which rank this is."""
        self.rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any rank writes: make the folder, and clear what killed saves left."""
        with explained_disk_errors(self.folder):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                in_the_way = next(path for path in (self.root, *self.root.parents) if path.exists())
                raise UserError(
                    f"{self.folder}: {in_the_way} is a file, expected a folder; choose another place"
                ) from None
            clear_leftovers(self.root)
            self.beside.mkdir(exist_ok=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks, and force them to the disk."""
        with explained_disk_errors(self.folder), ThreadPoolExecutor(WRITTEN_AT_ONCE) as pool:
            batches = list(in_batches(plan.items))
            numbers = range(len(batches))
            results = list(pool.map(self._write_file, numbers, batches, [planner] * len(batches)))
            sync(self.beside)
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for batch in results for result in batch])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once all have written: add the manifest, rename the folder, delete old checkpoints."""
        with explained_disk_errors(self.folder):
            for name, text in self.texts.items():
                self._write_text(name, text)
            self._write_text("manifest.json", json.dumps(self._manifest(metadata, results), indent=1) + "\n")
            sync(self.beside)
            rename_whole(self.beside, self.folder)
            prune(self.root, self.step, self.keep_last, self.keep_every)

    def discard(self) -> None:
        """Remove what was written of a checkpoint that failed; for the first rank, once no rank writes any more."""
        shutil.rmtree(self.beside, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never: a writer is made for its folder."""
        return False

    def _write_file(self, number: int, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        path = self.beside / f"rank_{self.rank:05d}_{number:02d}.safetensors"
        chunks, tensors = [], {}
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None and item.index.offset is not None
            offset, shape = tuple(item.index.offset), tuple(item.tensor_data.chunk.sizes)
            assert tuple(tensor.shape) == shape, (
                f"{item.index.fqn}: {tuple(tensor.shape)} is staged, {shape} is planned"
            )
            whole = shape == tuple(item.tensor_data.size)
            name = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, offset))}"
            chunks.append(Chunk(path.name, name, offset, shape))
            tensors[name] = tensor
        digest = hashlib.sha256()
        save_tensors(path, tensors, observe=digest.update)
        sync(path)
        size = path.stat().st_size
        return [
            WriteResult(item.index, tensors[chunk.name].nbytes, Written(chunk, size, digest.hexdigest()))
            for item, chunk in zip(items, chunks, strict=True)
        ]

    def _write_text(self, name: str, text: str) -> None:
        (self.beside / name).write_bytes(text.encode())
        sync(self.beside / name)

    def _manifest(self, metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
        contents = {name: text.encode() for name, text in self.texts.items()}
        files = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        tensors: dict[str, dict[str, Any]] = {}
        for name, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            dtype = str(saved.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(saved.size), "chunks": []}
        for result in (result for of_rank in results for result in of_rank):
            written: Written = result.storage_data
            chunk = written.chunk
            files[chunk.file] = {"size": written.size, "sha256": written.sha256}
            tensors[result.index.fqn]["chunks"].append(
                {"file": chunk.file, "name": chunk.name, "offset": list(chunk.offset), "shape": list(chunk.shape)}
            )
        for tensor in tensors.values():
            tensor["chunks"].sort(key=lambda chunk: chunk["offset"])
        return {
            "format": FORMAT,
            "step": self.step,
            "versions": versions(),
            "files": dict(sorted(files.items())),
            "tensors": tensors,
        }


class Reader(StorageReader):
    """Reads tensors of one checkpoint into whatever part of them each rank holds."""

    def __init__(self, folder: Path, tensors: Mapping[str, SavedTensor]) -> None:
        self.folder, self.tensors = folder, tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the manifest says of the tensors, in PyTorch's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks],
                )
                for name, tensor in self.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: every rank reads on its own."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts that this rank holds, file by file."""
        chunks = {(name, chunk.offset): chunk for name, tensor in self.tensors.items() for chunk in tensor.chunks}
        by_file = defaultdict(list)
        for item in plan.items:
            if math.prod(item.lengths):
                assert item.storage_index.offset is not None
                chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset)]
                by_file[chunk.file].append((chunk, item))
        for name, items in by_file.items():
            with opened(self.folder / name) as file:
                for chunk, item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(read_part(file, chunk.name, tuple(item.storage_offsets), tuple(item.lengths)))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never: a reader is made for its folder."""
        return False


def in_batches(items: Iterable[WriteItem]) -> Iterable[list[WriteItem]]:
    """What goes into one file each, in order; a chunk without elements, as uneven shards have, goes nowhere."""
    batch: list[WriteItem] = []
    total = 0
    for item in items:
        assert item.tensor_data is not None
        size = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if not size:
            continue
        if batch and total + size > FILE_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def rename_whole(beside: Path, folder: Path) -> None:
    """Put a folder that is complete in its place; one of that name is there until then, and replaced."""
    replaced = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(beside, folder)
    except OSError:
        if replaced.exists():
            os.replace(replaced, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(root: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Delete old checkpoints.

    Those that stay: the newest ``keep_last`` complete ones up to ``step`` and all younger than the oldest of these,
    complete ones of steps that are multiples of ``keep_every``, and later ones, of a run that was set back.
    """
    folders = [folder for folder in step_folders(root) if step_of(folder) <= step]
    oldest = [folder for folder in folders if is_complete(folder)][-keep_last:][0]
    for folder in folders:
        if step_of(folder) >= step_of(oldest):
            break
        if keep_every is None or step_of(folder) % keep_every or not is_complete(folder):
            # Renamed first, so that a kill in the middle leaves a leftover and not half a checkpoint.
            doomed = root / f".{folder.name}.tmp"
            os.replace(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # a reader elsewhere may hold a file; the next save tries again


def clear_leftovers(root: Path) -> None:
    """Remove what a killed process left: half-written folders, and a replaced one unless it is the only copy."""
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step_*.old"):
        original = root / path.name.removeprefix(".").split(".")[0]
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, original)


def versions() -> dict[str, str]:
    """What writes."""
    try:
        own = version("hrm-text")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "not installed"
    return {"hrm-text": own, "python": platform.python_version(), "torch": str(torch.__version__)}
