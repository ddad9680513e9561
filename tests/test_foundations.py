"""settings, files and contracts: what every room stands on."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from hrm_text.contracts import IGNORE_INDEX, Engine, PackedBatch, UserError
from hrm_text.files import (
    explained_disk_errors,
    only_process,
    read_json,
    remove_leftovers,
    sha256,
    whole_file,
    whole_folder,
    write_json,
)
from hrm_text.settings import from_mapping, read_yaml, settings, to_mapping, with_options


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------------- contracts --


def test_a_packed_batch_counts_what_belongs_to_samples() -> None:
    batch = PackedBatch(
        input_ids=np.array([5, 6, 7, 8, 9, 0, 0]),
        labels=np.array([IGNORE_INDEX, 7, 8, IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX]),
        position_ids=np.array([0, 1, 2, 0, 1, 0, 0]),
        sample_starts=np.array([0, 3, 5]),
        prefix_lengths=np.array([2, 0]),
    )
    assert (batch.num_samples, batch.num_tokens, batch.num_supervised) == (2, 5, 3)


def test_an_engine_is_whatever_generates() -> None:
    class Echo:
        def generate(self, prompts: list[str], **options: Any) -> list[str]:
            return prompts

    assert isinstance(Echo(), Engine)
    assert not isinstance("text", Engine)


# ------------------------------------------------------------------------------------------------------------- files --


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as beside:
        beside.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

    def fail() -> None:
        with whole_file(path) as beside:
            beside.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.txt"]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with whole_folder(path) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "old.txt").write_text("old")
        assert not path.exists()

    def fail() -> None:
        with whole_folder(path) as beside:
            (beside / "half.txt").write_text("half")
            raise ValueError("of ours")

    with pytest.raises(ValueError, match="of ours"):
        fail()
    assert (path / "inner" / "old.txt").read_text() == "old"
    with whole_folder(path) as beside:
        (beside / "new.txt").write_text("new")
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["store"]


def test_a_folder_whose_renaming_fails_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "old.txt").write_text("old")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == path and source.suffix == ".tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    def write() -> None:
        with whole_folder(path) as beside:
            (beside / "new.txt").write_text("new")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="the disk is full"):
        write()
    assert (path / "old.txt").read_text() == "old"
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; nothing that existed was changed"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, r"a file exceeds the largest size allowed here; .*ulimit -f"),
        (errno.EACCES, r"may not be written \(Permission denied\); choose another place"),
        (errno.EROFS, r"may not be written \(Read-only file system\)"),
    ],
)
@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_what_the_disk_refuses_is_explained(
    tmp_path: Path, writer: Callable[[Path], Any], code: int, message: str
) -> None:
    def write() -> None:
        with writer(tmp_path / "a"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=message) as error:
        write()
    assert str(tmp_path / "a") in str(error.value)
    assert names(tmp_path) == []


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="Input/output error"), explained_disk_errors(Path("a")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_larger_than_allowed_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match="exceeds the largest size"):
            write_json(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_json(path) == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_a_folder_that_may_not_be_made_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path], Any]
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", refused)  # by hand: root may do everything
    for path in (tmp_path / "locked" / "a", tmp_path / "a"):
        if writer is whole_folder or path.parent != tmp_path:
            with pytest.raises(UserError, match=r"a: may not be written \(Permission denied\)"):
                writer(path).__enter__()


def test_a_file_in_the_place_of_a_folder_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for writer in (whole_file, whole_folder):
        for path in (file / "a", file / "b" / "a"):
            with pytest.raises(UserError, match=f"{path}: {file} is a file, expected a folder"):
                writer(path).__enter__()
    with pytest.raises(UserError, match="is a file, expected a folder or nothing"):
        whole_folder(file).__enter__()
    assert file.read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_json_comes_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, None, 2.5]})
    assert read_json(path) == {"ü": [1, None, 2.5]}
    assert "ü" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    for damaged in (b'{"a": ', b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
            read_json(path)
    with pytest.raises(TypeError):  # a bug of ours, and no half file
        write_json(tmp_path / "b.json", {1, 2})
    assert names(tmp_path) == ["a.json"]


def test_the_checksum_is_sha_256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


# ---------------------------------------------------------------------------------------------------------- settings --


@settings
class Inner:
    rate: Annotated[float, Field(gt=0)]
    warmup_steps: int = 10


@settings
class Middle:
    inner: Inner
    optional: Inner | None = None


@settings
class Outer:
    name: Literal["left", "right"] = "left"
    folder: Path | None = None
    middle: Middle
    pair: tuple[float, float] = (1.0, 2.0)
    switch: bool = True


GOOD: dict[str, Any] = {"middle": {"inner": {"rate": 0.5}}}


def changed(key: str, value: Any) -> dict[str, Any]:
    """GOOD with the value of a dotted key changed."""
    values: dict[str, Any] = json.loads(json.dumps(GOOD))
    *sections, last = key.split(".")
    section = values
    for part in sections:
        section = section.setdefault(part, {})
    section[last] = value
    return values


def test_settings_are_frozen_and_come_back_from_their_mapping() -> None:
    outer = from_mapping(Outer, GOOD, "x.yaml")
    assert outer.middle.inner == Inner(rate=0.5, warmup_steps=10)
    assert from_mapping(Outer, to_mapping(outer), "x.yaml") == outer
    with pytest.raises(AttributeError):
        outer.switch = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("nam", "left"), "unknown key 'nam'; did you mean 'name'?"),
        (changed("middle.iner", 1), "unknown key 'middle.iner'; did you mean 'inner'?"),
        (changed("middle.inner.warmup", 1), "unknown key 'middle.inner.warmup'; did you mean 'warmup_steps'?"),
        (
            changed("middle.optional", {"rate": 1.0, "warm_up_steps": 1}),
            "unknown key 'middle.optional.warm_up_steps'; did you mean 'warmup_steps'?",
        ),
        (changed("zzz", 1), "unknown key 'zzz'; known keys: folder, middle, name, pair, switch"),
        ({}, "missing key 'middle'"),
        ({"middle": {"inner": {}}}, "missing key 'middle.inner.rate'"),
        (changed("name", "up"), "name: Input should be 'left' or 'right' (found 'up')"),
        (changed("middle.inner.rate", -1), "middle.inner.rate: Input should be greater than 0 (found -1)"),
        (changed("middle.inner.warmup_steps", "ten"), "middle.inner.warmup_steps: Input should be a valid integer"),
        (changed("middle.inner", 3), "middle.inner: "),
        ([1], "expected keys and values, found list"),
    ],
)
def test_wrong_settings_name_the_source_and_the_key(values: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_mapping(Outer, values, "x.yaml")
    assert str(error.value).startswith("x.yaml: ")
    assert message in str(error.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        from_mapping(Outer, {**changed("name", "up"), "swich": True}, "x.yaml")
    assert [line.partition(" ")[0] for line in str(error.value).splitlines()] == ["x.yaml:", "x.yaml:"]


def test_yaml_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1, 2\n")
    for path, message in (("a.yaml", "not valid YAML"), ("none.yaml", "no such file"), (".", "is a directory")):
        with pytest.raises(UserError, match=message):
            read_yaml(tmp_path / path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(UserError, match="missing key 'middle'"):
        from_mapping(Outer, read_yaml(tmp_path / "a.yaml"), "a.yaml")


def test_options_of_the_command_line_replace_values_and_leave_the_mapping() -> None:
    options = "--middle.inner.rate 1e-3 --middle.inner.warmup-steps=-1 --pair 3 4 --switch false --folder runs/5"
    merged = with_options(GOOD, options.split(), "x")
    assert GOOD == {"middle": {"inner": {"rate": 0.5}}}
    outer = from_mapping(Outer, merged, "x")
    assert outer.middle.inner == Inner(rate=1e-3, warmup_steps=-1)
    assert (outer.pair, outer.switch, outer.folder) == ((3.0, 4.0), False, Path("runs/5"))
    assert from_mapping(Outer, with_options(merged, ["--folder", "null"], "x"), "x").folder is None
    # A section that the file leaves out or empty can be given; of an option given twice the last counts.
    for values in (None, {}, {"middle": None}):
        given = with_options(values, ["--middle.inner.rate", "1", "--middle.inner.rate", "2"], "x")
        assert from_mapping(Outer, given, "x").middle.inner.rate == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["5"], "x: unexpected '5'; settings are given as --section.key VALUE"),
        (["--switch"], "x: --switch has no value"),
        (["--name", "left", "--name.sub", "1"], "x: --name.sub: 'name' is 'left' and has no keys"),
    ],
)
def test_options_without_form_are_errors(options: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        with_options(GOOD, options, "x")
    assert message in str(error.value)


def test_leftovers_of_dead_processes_go_and_nothing_else(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the largest number of a process
    long_ago = time.time() - 3600
    for name, old in (
        (f".a.npy.{dead}.tmp", True),
        (f".b.npy.{dead}.tmp", False),  # a process of another machine may be at it
        (f".c.npy.{os.getpid()}.tmp", True),
        ("d.npy", True),
        (".hidden", True),
    ):
        (tmp_path / name).write_text("x")
        if old:
            os.utime(tmp_path / name, (long_ago, long_ago))
    for name, old in ((f".e.{dead}.old", True), (f".f.{dead}.tmp", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.npy").write_text("x")
        if old:
            os.utime(tmp_path / name / "tokens.npy", (long_ago, long_ago))
        os.utime(tmp_path / name, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".b.npy.{dead}.tmp", f".c.npy.{os.getpid()}.tmp", "d.npy", ".hidden", f".f.{dead}.tmp"}
    remove_leftovers(tmp_path / "nothing")


def test_two_processes_cannot_be_at_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = (
        "import sys; from pathlib import Path; from hrm_text.files import only_process\n"
        "with only_process(Path(sys.argv[1])):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", other, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        message = rf"run: process {process.pid} on .* is writing to this folder; wait"
        with pytest.raises(UserError, match=message), only_process(folder):
            pass
        process.kill()
        process.wait()
    with only_process(folder), only_process(tmp_path / "another"):  # what was killed stands in nobody's way
        (folder / "result").write_text("there")
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), only_process(folder):
            pass
    assert [path.name for path in folder.iterdir()] == ["result"]
    with pytest.raises(UserError, match="result is a file, expected a folder"), only_process(folder / "result"):
        pass


def test_json_takes_half_a_character_and_gives_it_back(tmp_path: Path) -> None:
    value = {"subject \ud83d": ["\\\udc00", "é"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").read_bytes().decode("utf-8")
