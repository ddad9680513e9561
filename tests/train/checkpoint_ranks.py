"""What several ranks do in ``test_checkpoint``: ``python checkpoint_ranks.py [SCENARIO RANKS FOLDER] ...``, on the CPU.

The ranks are forks of one process, so that PyTorch is imported once. Printed is how each rank of each scenario ended.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what DTensors import when they are first used: before the fork, that all ranks have it
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hrm_text.contracts import UserError
from hrm_text.train import checkpoint
from hrm_text.train.checkpoint import Saver

SHAPES = {"weights/even": (6, 4), "weights/uneven": (7, 3), "weights/one_row": (1, 5), "exp_avg/vector": (5,)}
CONFIG = {"model": {"name": "tiny"}}


def whole(step: int) -> dict[str, Tensor]:
    """What is saved at a step, before it is sharded."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded(step: int, replicas: int = 1) -> dict[str, Tensor]:
    """The same as DTensors over all ranks, in so many replicas; the step itself is a plain tensor."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replica", "shard"))
    tensors: dict[str, Tensor] = {
        name: distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]) for name, tensor in whole(step).items()
    }
    return tensors | {"step": torch.tensor(step)}


def check(tensors: dict[str, Tensor], step: int) -> None:
    """The tensors are those of this step, to the bit."""
    assert int(tensors["step"]) == step
    for name, expected in whole(step).items():
        found = tensors[name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, expected), name


def saver(root: Path, **options: Any) -> Saver:
    return Saver(root, **({"keep_last": 3, "keep_every": None, "group": dist.new_group(backend="gloo")} | options))


def save(root: Path) -> None:
    """Shards over all ranks; what training does right after ``begin`` does not reach the disk."""
    saves = saver(root)
    tensors = sharded(1)
    saves.begin(1, tensors, {"rank": dist.get_rank()}, CONFIG)
    for tensor in tensors.values():
        tensor.zero_()
    saved = saves.finished(wait=True)
    assert saved is not None and saved.folder == root / "step_00000001"
    saves.close()
    checkpoint.load_into(saved.folder, tensors, dist.new_group(backend="gloo"))
    check(tensors, 1)


def save_replicas(root: Path) -> None:
    """Two replicas of two shards."""
    saves = saver(root)
    saves.begin(1, sharded(1, replicas=2), {}, CONFIG)
    saves.close()


def load(root: Path) -> None:
    """Ranks of another number agree on the newest good one and read it."""
    group = dist.new_group(backend="gloo")
    if dist.get_rank() == 0:
        shutil.copytree(root, root.with_name(f"{root.name}_kept"))
        shutil.copytree(root / "step_00000001", root / "step_00000002")
        with (root / "step_00000002" / "rank_00001_00.safetensors").open("r+b") as damaged:
            damaged.seek(-1, os.SEEK_END)
            damaged.write(b"\x7f")
    dist.barrier()
    warned: list[str] = []
    found = checkpoint.latest_good(root, warned.append, group)
    assert found == root / "step_00000001"
    assert bool(warned) == (dist.get_rank() == 0)
    if warned:
        assert "step_00000002/rank_00001_00.safetensors: damaged, found SHA-256" in warned[0]
    tensors = sharded(5)
    checkpoint.load_into(found, tensors, group)
    check(tensors, 1)
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items() if name != "step"}
    for tensor in narrow.values():
        tensor.zero_()
    checkpoint.load_into(found, narrow, group)
    for name, tensor in narrow.items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), whole(1)[name].bfloat16())
    for wrong, message in (
        ({"weights/other": torch.ones(1)}, "holds no 'weights/other'"),
        ({"weights/even": torch.ones(5, 4)}, r"has shape \[6, 4\], expected \[5, 4\]"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load_into(found, wrong, group)
    file = next(found.glob("rank_*.safetensors"))
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(b"no tensors")
    dist.barrier()
    with pytest.raises(UserError, match=f"{file.name}: damaged or not a safetensors file"):
        checkpoint.load_into(found, tensors, group)  # damaged between the check and the reading
    with pytest.raises(UserError) as told:
        checkpoint.latest_good(root, warned.append, group)
    (root / f"error_of_{dist.get_rank()}").write_text(str(told.value))


def full_disk(root: Path) -> None:
    """The disk is full for one rank, once: all ranks hear of it, and the next save is whole."""
    saves, patch = saver(root), pytest.MonkeyPatch()
    saves.begin(1, sharded(1), {}, CONFIG)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert saves.finished(wait=True) is not None
    if dist.get_rank() == 1:
        patch.setattr("hrm_text.train.checkpoint_storage.save_tensors", full)
    saves.begin(2, sharded(2), {}, CONFIG)
    with pytest.raises(UserError, match="/step_00000002: the disk is full; nothing that existed was changed"):
        saves.finished(wait=True)
    dist.barrier()
    assert saves.finished(wait=True) is None
    assert sorted(path.name for path in root.iterdir()) == ["step_00000001"]
    dist.barrier()
    patch.undo()
    saves.begin(3, sharded(3), {}, CONFIG)
    saved = saves.finished(wait=True)
    saves.close()
    assert saved is not None
    tensors = sharded(4)
    checkpoint.load_into(saved.folder, tensors, dist.new_group(backend="gloo"))
    check(tensors, 3)


def killed(root: Path) -> None:
    """One rank dies in the middle of its write."""
    saves = saver(root)
    saves.begin(1, sharded(1), {}, CONFIG)
    assert saves.finished(wait=True) is not None
    if dist.get_rank() == 1:

        def die(path: Path, *_: Any, **__: Any) -> None:
            path.write_bytes(b"half of a file")
            os.kill(os.getpid(), 9)

        pytest.MonkeyPatch().setattr("hrm_text.train.checkpoint_storage.save_tensors", die)
    saves.begin(2, sharded(2), {}, CONFIG)
    with pytest.raises(RuntimeError):  # which no user can mend
        saves.finished(wait=True)


SCENARIOS: dict[str, Callable[[Path], None]] = {
    scenario.__name__: scenario for scenario in (save, save_replicas, load, full_disk, killed)
}


def rank_of(rank: int, ranks: int, scenario: str, folder: Path, store: Path) -> None:
    """One rank, from beginning to end."""
    warnings.simplefilter("error")
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    SCENARIOS[scenario](folder)
    if scenario != "killed":
        dist.barrier()
        dist.destroy_process_group()


def statuses(scenario: str, ranks: int, folder: Path) -> list[int]:
    """Run a scenario; how each rank ended, as ``os.waitpid`` tells it."""
    store = folder.parent / f"store_of_{scenario}_in_{folder.name}"
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                rank_of(rank, ranks, scenario, folder, store)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    wanted = iter(sys.argv[1:])
    runs = zip(wanted, wanted, wanted, strict=True)
    ended = [statuses(scenario, int(ranks), Path(folder)) for scenario, ranks, folder in runs]
    print(json.dumps(ended))
