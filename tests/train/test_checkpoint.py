from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.checkpoint_files import read_tensors, verified_manifest
from hrm_text.model.tensorfile import save_tensors
from hrm_text.train import checkpoint, checkpoint_storage
from hrm_text.train.checkpoint import Saved, Saver
from hrm_text.train.staging import Staging

CONFIG = {"model": {"name": "tiny", "width": 8}, "learning_rate": 2.2e-4, "note": "naïve"}
STATE = {"loader": {"epoch": 1, "step": 7}, "skipped": 0, "best": None, "ratio": 0.1}
FILES = ["config.yaml", "manifest.json", "rank_00000_00.safetensors", "state.json"]
TENSORS = FILES[2]


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    """Of several dtypes and shapes, with none, one and many elements, contiguous and not."""
    return {
        "weights/a.weight": torch.full((3, 2), value),
        "weights/b": torch.arange(5.0, dtype=torch.bfloat16),
        "weights/transposed": torch.arange(6.0).view(2, 3).T + value,
        "weights/flags": torch.tensor([True, False, True]),
        "weights/empty": torch.zeros(0, 3),
        "ema/a.weight": torch.full((3, 2), value + 1),
        "step": torch.tensor(7),
    }


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    saver = Saver(tmp_path, keep_last=9, keep_every=None, group=None)
    yield saver
    saver.close()


def save(root: Path, step: int, keep_last: int = 3, keep_every: int | None = None, **changes: Any) -> Path:
    saver = Saver(root, keep_last=keep_last, keep_every=keep_every, group=None)
    values: dict[str, Any] = {"tensors": tensors(float(step)), "state": STATE, "config": CONFIG} | changes
    try:
        saver.begin(step, **values)
        saved = saver.finished(wait=True)
    finally:
        saver.close()
    assert saved is not None
    return saved.folder


def names(root: Path) -> list[str]:
    """Everything under the root, hidden leftovers too."""
    return sorted(path.name for path in root.iterdir())


def flip_a_bit(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


# ------------------------------------------------------------------------------------------------ what is written --


def test_what_was_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 1200)
    assert folder == tmp_path / "step_00001200"
    assert names(tmp_path) == ["step_00001200"]
    assert names(folder) == FILES
    loaded = checkpoint.load_state(folder)
    assert (loaded.step, loaded.state, loaded.config) == (1200, STATE, CONFIG)
    assert set(loaded.versions) == {"hrm-text", "python", "torch"}
    expected = tensors(1200.0)
    assert {name: saved.shape for name, saved in loaded.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert same(read_tensors(folder), expected)
    assert same(read_tensors(folder, "ema/"), {"ema/a.weight": expected["ema/a.weight"]})
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    assert not same(into, expected)
    checkpoint.load_into(folder, into)
    assert same(into, expected)


def test_random_bits_survive_every_dtype(tmp_path: Path) -> None:
    """NaNs with their payload, negative zeros, denormals: as bytes, equal."""
    noise = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int16, torch.uint8)
    values = {f"weights/{dtype}": noise.view(dtype).clone() for dtype in dtypes}
    folder = save(tmp_path, 1, tensors=values)
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    checkpoint.load_into(folder, into)
    for found in (into, read_tensors(folder)):
        assert all(torch.equal(found[name].view(torch.uint8), noise) for name in values)


def test_the_files_are_those_of_the_documented_layout(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with safe_open(folder / TENSORS, "pt") as file:  # the library's own reader
        assert set(file.keys()) == tensors().keys() - {"weights/empty"}
        assert torch.equal(file.get_tensor("weights/transposed"), tensors()["weights/transposed"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"format", "step", "versions", "files", "tensors"}
    assert sorted([*manifest["files"], "manifest.json"]) == FILES
    for name, file in manifest["files"].items():
        assert file["size"] == (folder / name).stat().st_size
    assert manifest["tensors"]["weights/a.weight"] == {
        "dtype": "float32",
        "shape": [3, 2],
        "chunks": [{"file": TENSORS, "name": "weights/a.weight", "offset": [0, 0], "shape": [3, 2]}],
    }


def test_all_files_may_be_read_by_those_who_may_read_the_state(tmp_path: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in save(tmp_path, 1).iterdir()}
    assert len(modes) == 1


def test_tensors_are_spread_over_files_of_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_storage, "FILE_BYTES", 40)
    folder = save(tmp_path, 1)
    assert len(list(folder.glob("rank_00000_*.safetensors"))) == 3
    assert same(read_tensors(folder), tensors(1.0))


def test_a_tensor_is_read_into_another_dtype(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, tensors={"weights/w": torch.tensor([1.0, 1.00390625, -0.1])})
    into = {"weights/w": torch.zeros(3, dtype=torch.bfloat16)}
    checkpoint.load_into(folder, into)
    assert torch.equal(into["weights/w"], torch.tensor([1.0, 1.00390625, -0.1]).bfloat16())


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, tensors={"weights/w": torch.arange(4.0)})
    parameter = torch.nn.Parameter(torch.zeros(4))
    checkpoint.load_into(folder, {"weights/w": parameter})
    assert parameter.tolist() == [0, 1, 2, 3]


def test_a_missing_tensor_and_another_shape_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"step_00000001: holds no 'weights/c'; it is of another model"):
        checkpoint.load_into(folder, {"weights/c": torch.zeros(1)})
    with pytest.raises(UserError, match=r"'weights/a\.weight' has shape \[3, 2\], expected \[2, 3\]"):
        checkpoint.load_into(folder, {"weights/a.weight": torch.zeros(2, 3)})


# --------------------------------------------------------------------------------------------------- asynchronous --


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until it is set."""
    opened = threading.Event()

    def held(*arguments: Any, **options: Any) -> None:
        assert opened.wait(30)
        save_tensors(*arguments, **options)

    monkeypatch.setattr(checkpoint_storage, "save_tensors", held)
    return opened


def test_what_training_changes_after_begin_is_not_what_is_saved(
    saver: Saver, tmp_path: Path, gate: threading.Event
) -> None:
    values, state = tensors(1.0), {"loader": {"step": 7}}
    saver.begin(1, values, state, CONFIG)
    assert saver.finished() is None
    for tensor in values.values():
        tensor.zero_()
    state["loader"]["step"] = 8
    assert names(tmp_path) in ([], [".step_00000001.tmp"])
    gate.set()
    saved = saver.finished(wait=True)
    assert saved is not None
    assert saved == Saved(1, tmp_path / "step_00000001", saved.stalled_seconds, saved.seconds)
    assert 0 < saved.stalled_seconds < saved.seconds
    assert same(read_tensors(tmp_path / "step_00000001"), tensors(1.0))
    assert not same(values, tensors(1.0))
    assert checkpoint.load_state(tmp_path / "step_00000001").state == {"loader": {"step": 7}}
    assert saver.finished() is saver.finished(wait=True) is None


def test_a_save_that_runs_is_waited_for_by_the_next(saver: Saver, tmp_path: Path, gate: threading.Event) -> None:
    saver.begin(1, tensors(1.0), STATE, CONFIG)
    threading.Timer(0.2, gate.set).start()
    started = time.monotonic()
    saver.begin(2, tensors(2.0), STATE, CONFIG)
    assert time.monotonic() - started > 0.15
    assert (tmp_path / "step_00000001" / "manifest.json").exists()
    told = [saver.finished(wait=True), saver.finished(wait=True)]
    assert [saved.step for saved in told if saved is not None] == [1, 2]
    assert told[1] is not None and told[1].stalled_seconds > 0.15
    for step in (1, 2):  # buffers are used again, contents do not mix
        assert same(read_tensors(tmp_path / f"step_{step:08d}"), tensors(float(step)))


def test_tensors_may_be_made_one_after_another(saver: Saver, tmp_path: Path) -> None:
    alive = 0

    class Made(dict[str, Tensor]):
        def items(self) -> Any:
            nonlocal alive
            for name, tensor in super().items():
                alive += 1
                yield name, tensor.clone()

    saver.begin(1, Made(tensors(4.0)), STATE, CONFIG)
    saver.finished(wait=True)
    assert alive == len(tensors())  # each was asked for once
    assert same(read_tensors(tmp_path / "step_00000001"), tensors(4.0))


def test_copies_are_made_into_the_same_memory_until_shapes_change() -> None:
    staging = Staging()
    _, first = staging.copy({"a": torch.ones(3), "b": torch.ones(2)})
    places = {name: copy.data_ptr() for name, copy in first.items()}
    _, second = staging.copy({"a": torch.zeros(3), "b": torch.zeros(4)})
    assert second["a"].data_ptr() == places["a"]
    assert (second["a"].tolist(), second["b"].tolist()) == ([0] * 3, [0] * 4)
    staging.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_copies_of_a_gpu_are_pinned_and_complete() -> None:
    staging = Staging()
    values = {"large": torch.randn(3_000_001, device="cuda"), "small": torch.tensor(7, device="cuda")}
    for _ in range(2):
        _, copies = staging.copy(values)
        assert all(torch.equal(copies[name], value.cpu()) for name, value in values.items())
        assert all(copy.is_pinned() for copy in copies.values())
        values["large"] += 1
    staging.close()


def test_closing_waits_and_leaves_no_thread(tmp_path: Path, gate: threading.Event) -> None:
    before = set(threading.enumerate())
    saver = Saver(tmp_path, keep_last=1, keep_every=None, group=None)
    saver.begin(1, tensors(), STATE, CONFIG)
    assert set(threading.enumerate()) > before
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    saver.close()
    timer.join()
    assert names(tmp_path) == ["step_00000001"]
    until = time.monotonic() + 10  # the thread ends after it has told
    while set(threading.enumerate()) != before and time.monotonic() < until:
        time.sleep(0.01)
    assert set(threading.enumerate()) == before


# --------------------------------------------------------------------------------------------------------- damage --


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    verified_manifest(folder)
    flip_a_bit(folder / name)
    with pytest.raises(UserError, match=rf"{name}: damaged, found SHA-256 .*, expected .*; use another checkpoint"):
        verified_manifest(folder)


def test_missing_cut_and_incomplete_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    os.truncate(folder / TENSORS, 10)
    with pytest.raises(UserError, match=rf"{TENSORS}: damaged, found 10 bytes, expected \d+"):
        verified_manifest(folder)
    with pytest.raises(UserError, match=rf"{TENSORS}: damaged or not a safetensors file"):
        checkpoint.load_into(folder, {"step": torch.tensor(0)})
    (folder / TENSORS).unlink()
    with pytest.raises(UserError, match=rf"{TENSORS}: missing"):
        verified_manifest(folder)
    with pytest.raises(UserError, match=rf"{TENSORS}: no such file"):
        read_tensors(folder)
    unreadable: tuple[Any, ...] = ([], {"w": {"dtype": "float31", "shape": [1], "chunks": []}})
    for listed in unreadable:
        (folder / "manifest.json").write_text(json.dumps({**manifest, "tensors": listed}))
        with pytest.raises(UserError, match=r"manifest\.json: damaged, its list of tensors cannot be read"):
            verified_manifest(folder)
    manifest["tensors"]["weights/a.weight"]["chunks"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"damaged, the chunks of weights/a\.weight are not the whole of it"):
        read_tensors(folder)
    with pytest.raises(UserError, match=r"damaged, the chunks of weights/a\.weight are not the whole of it"):
        checkpoint.load_into(folder, {"weights/a.weight": torch.zeros(3, 2)})
    (folder / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=r"manifest\.json: damaged, expected the keys"):
        verified_manifest(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        verified_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        verified_manifest(folder)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        checkpoint.load_state(tmp_path / "step_00000002")


def test_another_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    old = {"format": 1, "step": 1, "versions": {"hrm-text": "0.1.0", "torch": "2.9"}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"checkpoint format 1, expected 2; .*written by hrm-text 0\.1\.0, torch 2\.9"):
        checkpoint.load_state(folder)


def test_the_newest_good_one_is_found_and_damaged_newer_ones_are_named(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert checkpoint.latest_good(tmp_path, warnings.append) is None
    assert checkpoint.latest_good(tmp_path / "nowhere", warnings.append) is None
    for step in (9, 10, 11, 12):
        save(tmp_path, step, keep_last=9)
    assert checkpoint.latest_good(tmp_path, warnings.append) == tmp_path / "step_00000012"
    assert warnings == []

    flip_a_bit(tmp_path / "step_00000012" / TENSORS)
    (tmp_path / "step_00000011" / "manifest.json").unlink()
    assert checkpoint.latest_good(tmp_path, warnings.append) == tmp_path / "step_00000010"
    assert len(warnings) == 2
    assert f"step_00000012/{TENSORS}: damaged" in warnings[0]
    assert "step_00000011: not a complete checkpoint" in warnings[1]
    assert all(warning.endswith("step_00000010") for warning in warnings)

    for step in (9, 10):
        flip_a_bit(tmp_path / f"step_{step:08d}" / "state.json")
    with pytest.raises(UserError, match="none of its 4 checkpoints can be used") as error:
        checkpoint.latest_good(tmp_path, warnings.append)
    assert all(f"step_{step:08d}" in str(error.value) for step in (9, 10, 11, 12))


# ------------------------------------------------------------------------------------------------------ retention --


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    wrongs: tuple[dict[str, Any], ...] = ({"keep_last": 0, "keep_every": None}, {"keep_last": 1, "keep_every": 0})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="expected keep_last and keep_every >= 1"):
            Saver(tmp_path, **wrong, group=None)


def test_multiples_stay_for_good_unless_they_are_damaged(tmp_path: Path) -> None:
    for step in (2, 4, 5, 8, 9):
        save(tmp_path, step, keep_last=1, keep_every=4)
    assert names(tmp_path) == ["step_00000004", "step_00000008", "step_00000009"]
    os.truncate(tmp_path / "step_00000004" / TENSORS, 1)
    save(tmp_path, 10, keep_last=1, keep_every=4)
    assert names(tmp_path) == ["step_00000008", "step_00000010"]


def test_steps_beyond_eight_digits_still_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == ["step_100000000"]
    assert checkpoint.latest_good(tmp_path, pytest.fail) == tmp_path / "step_100000000"


def test_damaged_and_later_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=9)
    os.truncate(tmp_path / "step_00000003" / TENSORS, 1)
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    save(tmp_path, 2, keep_last=1)  # a run set back to an earlier step leaves the later ones alone
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, state={"run": "first"})
    save(tmp_path, 1, state={"run": "second"})
    assert checkpoint.load_state(tmp_path / "step_00000001").state == {"run": "second"}
    assert names(tmp_path) == ["step_00000001"]


# ---------------------------------------------------------------------------------------------- what may go wrong --


@pytest.mark.parametrize("what", ["save_tensors", "sync", "rename_whole"])
def test_a_full_disk_is_explained_once_and_the_next_save_is_whole(
    what: str, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the system notices: while writing, while forcing to the disk, at the end."""
    saver.keep_last = 1
    saver.begin(1, tensors(1.0), STATE, CONFIG)
    assert saver.finished(wait=True) is not None

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_storage, what, full)
        saver.begin(2, tensors(2.0), STATE, CONFIG)
        with pytest.raises(UserError, match="/step_00000002: the disk is full; nothing that existed was changed"):
            saver.finished(wait=True)
    assert names(tmp_path) == ["step_00000001"]
    assert saver.finished(wait=True) is None
    assert same(read_tensors(tmp_path / "step_00000001"), tensors(1.0))
    saver.begin(3, tensors(3.0), STATE, CONFIG)
    assert saver.finished(wait=True) is not None
    assert names(tmp_path) == ["step_00000003"]


def test_a_failed_save_is_told_after_the_next_has_begun(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_storage, "save_tensors", full)
        saver.begin(1, tensors(1.0), STATE, CONFIG)
        saver._unreported[0].exception()
    saver.begin(2, tensors(2.0), STATE, CONFIG)
    with pytest.raises(UserError, match="step_00000001: the disk is full"):
        saver.finished()
    assert saver.finished(wait=True) is not None
    assert names(tmp_path) == ["step_00000002"]


def test_a_bug_stays_a_bug(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(checkpoint_storage, "save_tensors", broken)
    saver.begin(1, tensors(), STATE, CONFIG)
    with pytest.raises(ZeroDivisionError, match="of ours"):
        saver.finished(wait=True)
    assert names(tmp_path) == []


def test_a_write_that_the_system_refuses_is_explained_and_leaves_the_old_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="step_00000002: a file exceeds the largest size allowed"):
            save(tmp_path, 2, tensors={"weights/w": torch.ones(100_000)}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_00000001"]
    verified_manifest(tmp_path / "step_00000001")


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file, expected a folder"):
        save(tmp_path / "checkpoints", 1)


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from hrm_text.train import checkpoint_storage
from hrm_text.train.checkpoint import Saver
for where in sys.argv[2:]:
    if not os.fork():
        setattr(checkpoint_storage, where, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        saver = Saver(Path(sys.argv[1], where), keep_last=1, keep_every=None, group=None)
        saver.begin(2, {"weights/w": torch.ones(1000)}, {}, {})
        saver.finished(wait=True)
    print(os.wait()[1])
"""


def test_a_kill_leaves_a_hidden_folder_which_the_next_save_removes(tmp_path: Path) -> None:
    moments = ["save_tensors", "sync", "rename_whole"]
    for moment in moments:
        save(tmp_path / moment, 1)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), *moments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 3, done.stderr
    for moment in moments:
        root = tmp_path / moment
        assert names(root) == [".step_00000002.tmp", "step_00000001"]
        assert checkpoint.latest_good(root, pytest.fail) == root / "step_00000001"
        save(root, 3)
        assert names(root) == ["step_00000001", "step_00000003"]


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.replace(tmp_path / "step_00000001", tmp_path / ".step_00000001.old")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    verified_manifest(tmp_path / "step_00000001")


# -------------------------------------------------------------------------------------------------- several ranks --

RANKS = Path(__file__).with_name("checkpoint_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], str]:
    """The folder of the scenarios, how the ranks of each ended, and what they said."""
    root = tmp_path_factory.mktemp("ranks")
    runs = [
        ("save", 2, "shards"),
        ("save_replicas", 4, "replicas"),
        ("load", 3, "shards"),
        ("load", 2, "replicas"),
        ("full_disk", 2, "full"),
        ("killed", 2, "killed"),
    ]
    arguments = [str(part) for scenario, number, folder in runs for part in (scenario, number, root / folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(RANKS), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout), done.stderr


def whole_tensors(step: int) -> dict[str, Tensor]:
    """What the scenarios save, drawn again."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"weights/even": (6, 4), "weights/uneven": (7, 3), "weights/one_row": (1, 5), "exp_avg/vector": (5,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return drawn | {"step": torch.tensor(step)}


def test_ranks_write_shards_that_other_numbers_of_ranks_read(ranks: tuple[Path, list[list[int]], str]) -> None:
    """What each scenario asserts within the ranks: see ``checkpoint_ranks``; here, that none of them failed."""
    _, ended, said = ranks
    assert ended == [[0] * 2, [0] * 4, [0] * 3, [0] * 2, [0] * 2, [0, signal.SIGKILL]], said
    assert "Warning" not in said


@pytest.mark.parametrize(("folder", "number"), [("shards", 2), ("replicas", 4)])
def test_one_process_reads_what_ranks_wrote_once(
    ranks: tuple[Path, list[list[int]], str], folder: str, number: int
) -> None:
    saved = ranks[0] / f"{folder}_kept" / "step_00000001"
    files = [f"rank_{rank:05d}_00.safetensors" for rank in range(number)]
    assert names(saved) == ["config.yaml", "manifest.json", *files, "state.json"]
    verified_manifest(saved)
    assert same(read_tensors(saved), whole_tensors(1))
    into = {name: torch.zeros_like(tensor) for name, tensor in whole_tensors(1).items()}
    checkpoint.load_into(saved, into)
    assert same(into, whole_tensors(1))
    entries = json.loads((saved / "manifest.json").read_text())["tensors"]
    offsets = {name: [chunk["offset"][:1] for chunk in entry["chunks"]] for name, entry in entries.items()}
    assert (
        offsets
        == {  # of two shards each, in both layouts: a replica is not written again, an empty shard not at all
            "weights/even": [[0], [3]],
            "weights/uneven": [[0], [4]],
            "weights/one_row": [[0]],
            "exp_avg/vector": [[0], [3]],
            "step": [[]],
        }
    )


def test_all_ranks_name_the_same_damage(ranks: tuple[Path, list[list[int]], str]) -> None:
    for folder, number in (("shards", 3), ("replicas", 2)):
        errors = {(ranks[0] / folder / f"error_of_{rank}").read_text() for rank in range(number)}
        assert len(errors) == 1
        assert "none of its 2 checkpoints can be used" in errors.pop()


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(
    ranks: tuple[Path, list[list[int]], str],
) -> None:
    root = ranks[0] / "killed"
    assert checkpoint.latest_good(root, pytest.fail) == root / "step_00000001"
    save(root, 3)
    assert names(root) == ["step_00000001", "step_00000003"]


def test_ranks_share_the_checking_by_size() -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 2, "e": 0}
    parts = checkpoint.shares({"files": {name: {"size": size} for name, size in sizes.items()}}, 2)
    assert sorted(name for part in parts for name in part) == list(sizes)
    assert [sum(sizes[name] for name in part) for part in parts] == [7, 7]
    assert len(checkpoint.shares({"files": {"a": {"size": 1}}}, 3)) == 3


# -------------------------------------------------------------------------------------------------- random states --


def test_random_states_survive_json() -> None:
    random.seed(5)
    torch.manual_seed(5)
    random.gauss(0, 1)  # leaves a second value waiting, which is part of the state
    saved = json.loads(json.dumps(checkpoint.rng_state()))
    drawn = (random.gauss(0, 1), random.random(), torch.rand(3).tolist())
    random.seed(6)
    torch.manual_seed(6)
    checkpoint.restore_rng(saved)
    assert (random.gauss(0, 1), random.random(), torch.rand(3).tolist()) == drawn
