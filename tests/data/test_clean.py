from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.cli import main
from hrm_text.contracts import Example, UserError
from hrm_text.data import clean, strata
from hrm_text.data.clean import CleanReport, clean_datasets
from hrm_text.data.cleaner import CleanSettings, Tally
from hrm_text.data.engine import Engine
from hrm_text.data.records import BadRecord, find_record_files, read_records
from hrm_text.data.sources.upstream import DATASETS, Dataset, Drop, Hub, Row
from hrm_text.data.strata import BUCKETS, bucket_of, stratum_file
from hrm_text.data.tokenize import tokenize_files
from hrm_text.data.tokenizer import train_tokenizer

OWN = '''
from hrm_text.contracts import Example
from hrm_text.data.sources.upstream import Drop, dataset

ABOUT = dict(
    group="test", licence="none", home="nowhere", condition="direct", hub=None, rows=1, megabytes=1,
    columns={"task": "string", "q": "string", "a": "string or null"}, files=("**/*.jsonl",),
)

@dataset("test_plain", **ABOUT)
def plain(row):
    """One example a row."""
    if row["q"] == "twice":
        yield Example("direct", "first", "1")
        yield Drop("second half")
    elif row["q"] == "raise":
        yield Example("direct", row["a"]["x"], "1")
    elif row["q"] == "nothing":
        return
    else:
        yield Example("cot" if row["q"] != "odd" else "odd", row["q"], row["a"] or "")

@dataset("test_tasks", stratum=lambda row: row["task"], **ABOUT)
def tasks(row):
    """One example a row, in strata."""
    yield Example("direct", row["q"], row["a"])
'''


@pytest.fixture
def own(tmp_path: Path) -> Iterator[CleanSettings]:
    """Settings with a file that registers test_plain and test_tasks."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    before = dict(DATASETS)
    yield CleanSettings(sources=(path,))
    DATASETS.clear()
    DATASETS.update(before)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def random_rows(seed: int, count: int, tasks: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"task": f"task/{draw.randrange(tasks)}", "q": f"question {seed} {i}", "a": "x" * draw.randrange(1, 40)}
        for i in range(count)
    ]


def refuse(bad: BadRecord) -> None:
    raise AssertionError(bad)


def records(folder: Path) -> dict[str, list[Example]]:
    """The records below a folder by file, all of them good."""
    return {file.safe_name: list(read_records(file.path, refuse)) for file in find_record_files([folder])}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but logs, hidden ones too."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".logs" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def report_of(reports: list[CleanReport]) -> CleanReport:
    (report,) = reports
    return report


def test_every_row_is_kept_or_counted_with_its_place(tmp_path: Path, own: CleanSettings) -> None:
    questions = {
        "fine": None,
        "": "empty instruction",
        " \n": "empty instruction",
        "odd": "unknown condition",
        "twice": "second half",
        "raise": "the cleaner raised TypeError",
        "nothing": "the cleaner gave nothing",
    }
    rows = [{"task": "t", "q": question, "a": "a"} for question in questions]
    answers = {
        "<think>hm</think> ": "nothing but thinking in the response",
        "": "empty response",
        "\t": "empty response",
    }
    rows += [{"task": "t", "q": "fine", "a": answer} for answer in answers]
    write_rows(tmp_path / "in" / "below" / "a.v1.jsonl", rows)
    with (tmp_path / "in" / "below" / "a.v1.jsonl").open("a") as file:
        file.write("not json\n")
    report = report_of(clean_datasets(["test_plain"], tmp_path / "out", tmp_path / "in", own))
    expected = Counter(filter(None, [*questions.values(), *answers.values(), "not JSON"]))
    assert report.tally.dropped == expected
    assert report.tally.rows == len(rows) + 1
    assert report.tally.kept == 2 and report.tally.characters == len("finea") + len("first1")
    assert report.tally.examples["not JSON"] == [f"below/a.v1.jsonl:{len(rows) + 1}"]
    assert report.tally.examples["empty instruction"] == ["below/a.v1.jsonl:2", "below/a.v1.jsonl:3"]
    assert records(tmp_path / "out") == {
        "test_plain__below__a.v1.parquet": [Example("cot", "fine", "a"), Example("direct", "first", "1")]
    }


def test_records_are_as_the_published_ones(tmp_path: Path, own: CleanSettings) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", random_rows(0, 5, 1))
    clean_datasets(["test_plain"], tmp_path / "out", tmp_path / "in", own)
    file = pq.ParquetFile(tmp_path / "out" / "test_plain" / "a.parquet")
    assert file.schema_arrow == pa.schema([(name, pa.string()) for name in ("condition", "instruction", "response")])
    assert file.metadata.row_group(0).column(1).compression == "ZSTD"


def test_published_parquet_goes_straight_to_tokenize(tmp_path: Path) -> None:
    columns = {"condition": ["synth,cot", "direct"], "instruction": ["one?", "two?"], "response": ["1", "2"]}
    (tmp_path / "published" / "flan").mkdir(parents=True)
    pq.write_table(pa.table(columns), tmp_path / "published" / "flan" / "a.parquet", compression="zstd")
    train_tokenizer(iter(["one two ? 1 2"] * 9), 320, tmp_path / "tokenizer")
    summary = tokenize_files([tmp_path / "published"], tmp_path / "tokenizer", tmp_path / "store")
    assert (summary.files, summary.records, summary.bad.total) == (1, 2, 0)
    assert (tmp_path / "store" / "flan__a.parquet" / "tokens.npy").exists()


def test_cleaned_records_go_to_tokenize_reports_and_all(tmp_path: Path, own: CleanSettings) -> None:
    for number in range(2):
        write_rows(tmp_path / "in" / f"{number}.jsonl", random_rows(number, 50, 3))
    clean_datasets(["test_tasks"], tmp_path / "out", tmp_path / "in", own)
    train_tokenizer(iter(["question x"] * 9), 320, tmp_path / "tokenizer")
    summary = tokenize_files([tmp_path / "out"], tmp_path / "tokenizer", tmp_path / "store")
    assert (summary.files, summary.records, summary.bad.total) == (3, 100, 0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcdefgh"), st.text("xyz", min_size=1)), max_size=60)
)
def test_strata_hold_the_rows_of_their_task_in_the_order_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Bounds so small that runs, writes, buckets and groups all end somewhere in the middle.
        patch.setattr(strata, "RUN_ROWS", 7)
        patch.setattr(strata, "PENDING_BYTES", 30)
        patch.setattr(strata, "BUCKETS", 3)
        patch.setattr(clean, "OPEN_FILES", 2)
        patch.setitem(DATASETS, "strata", dataset_of(lambda row: [Example("cot", row["q"], "a")], lambda r: r["task"]))
        folder = tmp_path_factory.mktemp("strata")
        for number in range(3):
            mine = [{"task": task, "q": question} for of, task, question in rows if of == number]
            write_rows(folder / "in" / f"{number}.jsonl", mine)
        clean_datasets(["strata"], folder / "out", folder / "in")
        expected: dict[str, list[Example]] = {}
        for _, task, question in sorted(rows, key=lambda row: row[0]):
            expected.setdefault(f"strata__{task}.parquet", []).append(Example("cot", question, "a"))
        assert (records(folder / "out") if expected else {}) == expected
        assert not list((folder / "out").rglob("*.arrow"))


def dataset_of(cleaner: Any, stratum: Any = None, hub: Hub | None = None, **fields: Any) -> Dataset:
    about: dict[str, Any] = {
        **dict.fromkeys(("description", "licence", "condition"), ""), "home": "there", "rows": 1, "megabytes": 1,
        "name": "strata", "group": "test", "columns": {"task": "string", "q": "string"}, "files": ("*.jsonl",),
        "clean": cleaner, "hub": hub, "stratum": stratum,
    }  # fmt: skip
    return Dataset(**about | fields)


@given(st.lists(st.text(max_size=200), unique=True))
def test_task_names_become_safe_and_different_file_names(names: list[str]) -> None:
    files = [stratum_file(name) for name in names]
    assert len(set(files)) == len(files)
    for file in files:
        assert file.isascii() and "/" not in file and not file.startswith(".") and len(file) < 200
        assert 0 <= bucket_of(file) < BUCKETS
    assert stratum_file("task_001.a-b") == "task_001.a-b.parquet"


def test_many_tasks_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    tasks = 500
    monkeypatch.setattr(strata, "BUCKETS", 4)  # so that a bucket has more tasks than may be open
    monkeypatch.setitem(
        DATASETS, "strata", dataset_of(lambda row: [Example("cot", row["q"], "a")], lambda row: row["task"])
    )
    rows = [{"task": f"t{i % tasks}", "q": str(i)} for i in range(3 * tasks)]
    write_rows(tmp_path / "in" / "a.jsonl", rows)
    write_rows(tmp_path / "in" / "b.jsonl", rows[:tasks])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 64 + 16, limits[1]))
    try:
        report = report_of(clean_datasets(["strata"], tmp_path / "out", tmp_path / "in"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert report.files == tasks and report.tally.kept == 4 * tasks
    table = pq.read_table(tmp_path / "out" / "strata" / "t7.parquet")
    assert table.column("instruction").to_pylist() == ["7", "507", "1007", "7"]


@pytest.mark.parametrize("name", ["test_plain", "test_tasks"])
def test_what_is_finished_is_kept_and_a_changed_source_is_cleaned_again(
    tmp_path: Path, own: CleanSettings, name: str
) -> None:
    for number in range(3):
        write_rows(tmp_path / "in" / f"{number}.jsonl", random_rows(number, 20, 4))
    first = report_of(clean_datasets([name], tmp_path / "out", tmp_path / "in", own))
    before = tree(tmp_path / "out")
    stats = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    second = report_of(clean_datasets([name], tmp_path / "out", tmp_path / "in", own))
    assert (first.reused, second.reused) == (0, 3)
    assert first.tally == second.tally and first.files == second.files
    assert stats == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    # A file that is gone, a source that has changed, other filters: what depends on it is made again.
    next((tmp_path / "out").rglob("*.parquet")).unlink()
    clean_datasets([name], tmp_path / "out", tmp_path / "in", own)
    assert tree(tmp_path / "out") == before
    write_rows(tmp_path / "in" / "1.jsonl", random_rows(9, 20, 2))
    changed = report_of(clean_datasets([name], tmp_path / "out", tmp_path / "in", own))
    clean_datasets([name], tmp_path / "fresh", tmp_path / "in", own)
    assert changed.reused == (2 if name == "test_plain" else 0)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh") != before
    filtered = CleanSettings(("english",), own.sources)
    assert report_of(clean_datasets([name], tmp_path / "out", tmp_path / "in", filtered)).reused == 0


def test_another_cleaner_cleans_again_and_tasks_that_are_no_more_go(tmp_path: Path, own: CleanSettings) -> None:
    write_rows(tmp_path / "in" / "0.jsonl", random_rows(0, 20, 4))
    clean_datasets(["test_tasks"], tmp_path / "out", tmp_path / "in", own)
    assert len(records(tmp_path / "out")) == 4
    (own.sources[0].with_name("later.py")).write_text(
        OWN.replace('lambda row: row["task"]', '(lambda row: "only")').replace("test_", "later_")
    )
    later = CleanSettings(sources=(own.sources[0].with_name("later.py"),))
    clean_datasets(["later_tasks"], tmp_path / "out2", tmp_path / "in", later)
    (tmp_path / "out2" / "later_tasks").rename(tmp_path / "out2" / "test_tasks")
    DATASETS["test_tasks"] = Dataset(**{**vars(DATASETS["later_tasks"]), "name": "test_tasks"})
    clean_datasets(["test_tasks"], tmp_path / "out", tmp_path / "in", later)
    assert list(records(tmp_path / "out")) == ["test_tasks__only.parquet"]


def test_records_of_something_else_are_refused(tmp_path: Path, own: CleanSettings) -> None:
    write_rows(tmp_path / "in" / "0.jsonl", random_rows(0, 5, 2))
    for name in ("test_plain", "test_tasks"):
        write_rows(tmp_path / "out" / name / "foreign.jsonl", [])
        with pytest.raises(UserError, match="foreign.jsonl: records that come from none"):
            clean_datasets([name], tmp_path / "out", tmp_path / "in", own)


def test_two_workers_give_the_bytes_of_one(tmp_path: Path, own: CleanSettings) -> None:
    for number in range(4):
        write_rows(tmp_path / "in" / "test_plain" / f"{number}.jsonl", random_rows(number, 30, 9))
        write_rows(tmp_path / "in" / "test_tasks" / f"{number}.jsonl", random_rows(number, 30, 9))
    names = ["test_plain", "test_tasks"]
    clean_datasets(names, tmp_path / "one", tmp_path / "in", own)
    engine = Engine(workers=2, folder=tmp_path / "two" / ".logs")
    clean_datasets(names, tmp_path / "two", tmp_path / "in", own, engine)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(find_record_files([tmp_path / "one"])) == 4 + 9


KILLED = """
import sys
from pathlib import Path
from hrm_text.data import strata
from hrm_text.data.clean import clean_datasets
from hrm_text.data.cleaner import CleanSettings
strata.RUN_ROWS, strata.PENDING_BYTES = 50, 2000
folder = Path(sys.argv[1])
settings = CleanSettings(sources=(folder / "own.py",))
print("ready", flush=True)
clean_datasets(["test_plain", "test_tasks"], Path(sys.argv[2]), folder / "in", settings)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path, own: CleanSettings) -> None:
    for number in range(6):
        write_rows(tmp_path / "in" / "test_plain" / f"{number}.jsonl", random_rows(number, 300, 1))
        write_rows(tmp_path / "in" / "test_tasks" / f"{number}.jsonl", random_rows(number, 300, 40))

    def start(out: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process

    begun = time.perf_counter()
    whole = start(tmp_path / "whole")
    assert whole.communicate()[1] == b"" and whole.returncode == 0
    seconds = time.perf_counter() - begun
    draw = random.Random()
    kills = 0
    for _ in range(4):
        process = start(tmp_path / "killed")
        time.sleep(draw.uniform(0, 0.3 * seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    last = start(tmp_path / "killed")
    assert last.communicate()[1] == b"" and last.returncode == 0
    assert kills
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_one_row_files_become_one_file_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(row: Row) -> list[Example | Drop]:
        return [Example("direct", row["question"], row["answer"])]

    monkeypatch.setitem(
        DATASETS,
        "strata",
        dataset_of(
            problems, columns={"question": "string", "answer": "string"}, files=("m/*/*.txt",), text="problem_answer",
            one_row_per_file=True,
        ),
    )  # fmt: skip
    for topic, count in {"algebra": 3, "logic": 2}.items():
        (tmp_path / "in" / "m" / topic).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "in" / "m" / topic / f"{i}.txt").write_text(f"Problem:\n{topic} {i}\nAnswer:\n{i}\n")
    report = report_of(clean_datasets(["strata"], tmp_path / "out", tmp_path / "in"))
    assert (report.sources, report.files, report.tally.kept) == (2, 2, 5)
    found = records(tmp_path / "out")
    assert found["strata__m__logic.parquet"] == [Example("direct", f"logic {i}", str(i)) for i in range(2)]
    (tmp_path / "in" / "m" / "logic" / "9.txt").write_text("no heading")
    report = report_of(clean_datasets(["strata"], tmp_path / "out", tmp_path / "in"))
    assert report.reused == 1 and report.tally.examples == {"no line 'Problem:'": ["m/logic/9.txt:1"]}


def test_a_folder_stands_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    hub = Hub(str(tmp_path / "hub"))
    monkeypatch.setitem(DATASETS, "strata", dataset_of(lambda row: [Example("cot", row["q"], "a")], hub=hub))
    (tmp_path / "hub").mkdir()
    for number in range(3):
        rows = [{"task": "t", "q": f"{number} {i}"} for i in range(4)] + [{"task": "t", "q": None}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / f"train-{number:05d}-of-00003.parquet")
    report = report_of(clean_datasets(["strata"], tmp_path / "out"))
    assert (report.sources, report.files) == (3, 3)
    assert report.tally.dropped == {"column 'q' is of type null, not string": 3}
    assert records(tmp_path / "out") == {
        f"strata__train-{n:05d}-of-00003.parquet": [Example("cot", f"{n} {i}", "a") for i in range(4)] for n in range(3)
    }
    assert report_of(clean_datasets(["strata"], tmp_path / "out")).reused == 3


def test_without_the_hub_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(DATASETS, "strata", dataset_of(lambda row: [], hub=Hub("some/where")))
    with pytest.raises(UserError, match="pip install 'hrm-text\\[hub\\]'"):
        clean_datasets(["strata"], tmp_path / "out")


def test_what_cannot_be_found_is_told_at_once(tmp_path: Path, own: CleanSettings) -> None:
    with pytest.raises(UserError, match="no such folder"):
        clean_datasets(["test_plain"], tmp_path / "out", tmp_path / "nowhere", own)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"test_plain: no file in .*/in matches \*\*/\*.jsonl"):
        clean_datasets(["test_plain"], tmp_path / "out", tmp_path / "in", own)
    with pytest.raises(UserError, match=r"(?s)test_plain: no file.*test_tasks: no file"):
        clean_datasets(["test_plain", "test_tasks"], tmp_path / "out", tmp_path / "in", own)
    with pytest.raises(UserError, match=r"(?s)not on the hub.*test_plain: nowhere"):
        clean_datasets(["test_plain"], tmp_path / "out", None, own)
    with pytest.raises(UserError, match="did you mean 'test_plain'"):
        clean_datasets(["test_plan"], tmp_path / "out", tmp_path / "in", own)
    assert not (tmp_path / "out").exists()


def test_files_that_would_become_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "strata", dataset_of(lambda row: [], files=("*.jsonl", "*.jsonl.gz")))
    write_rows(tmp_path / "in" / "a.jsonl", [])
    (tmp_path / "in" / "a.jsonl.gz").touch()
    with pytest.raises(UserError, match="would both become a.parquet"):
        clean_datasets(["strata"], tmp_path / "out", tmp_path / "in")


def test_a_damaged_file_fails_the_run_by_name_and_leaves_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "strata", dataset_of(lambda row: [], files=("*.parquet",)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="a.parquet: not readable as .parquet"):
        clean_datasets(["strata"], tmp_path / "out", tmp_path / "in")
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_reasons_without_end_are_bounded() -> None:
    tally = Tally()
    for i in range(1000):
        tally.drop(f"reason {i}", "a:1")
    assert len(tally.dropped) < 300 and tally.dropped.total() == 1000
    assert Tally.from_dict(json.loads(json.dumps(tally.as_dict()))) == tally


def test_the_command_says_what_became_of_the_rows_and_what_is_next(
    tmp_path: Path, own: CleanSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"task": "t", "q": "fine", "a": "a"},
        {"task": "t", "q": "", "a": "a"},
        {"task": "t", "q": "f@g.org", "a": "a"},
    ]
    write_rows(tmp_path / "in" / "a.jsonl", rows)
    (tmp_path / "in" / "empty").mkdir()
    command = ["data", "clean", "test_plain", "--sources", str(own.sources[0]), "--out", str(tmp_path / "out")]
    assert main([*command, "--from", str(tmp_path / "in"), "--filters", "pii", "--json"]) == 0
    said = capsys.readouterr()
    about = json.loads(said.out)["datasets"]["test_plain"]
    assert (about["rows"], about["kept"], about["dropped"]) == (3, 1, {"an e-mail address": 1, "empty instruction": 1})
    assert "1 an e-mail address" in said.err and f"hrm-text data tokenizer {tmp_path / 'out'}" in said.err
    for arguments, message in {
        ("test_plan",): "did you mean 'test_plain'",
        (): "name a dataset or a generator",
        ("wordnet", "test_plain"): "need an --out each",
        ("generators", "--from", "x"): "generators take neither",
        ("test_plain", "--from", str(tmp_path / "in" / "empty")): "matches **/*.jsonl",
    }.items():
        assert main(["data", "clean", *arguments, *command[3:]]) == 1
        assert message in capsys.readouterr().err


def test_a_dataset_of_which_nothing_is_kept_is_an_error(
    tmp_path: Path, own: CleanSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", [{"task": "t"}])
    command = ["data", "clean", "test_plain", "--sources", str(own.sources[0]), "--out", str(tmp_path / "out")]
    assert main([*command, "--from", str(tmp_path / "in")]) == 1
    said = capsys.readouterr().err
    assert "1 no column 'q'" in said and "no example was kept" in said


def test_sources_are_listed_with_what_they_need(own: CleanSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sources", "--sources", str(own.sources[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert any(line.startswith("test_tasks") for line in lines) and any(line.startswith("wordnet") for line in lines)
    assert main(["data", "sources", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    columns = {found["name"]: found["columns"] for found in listed["datasets"]}["alpaca"]
    assert columns["output"] == "string" and listed["generators"]
