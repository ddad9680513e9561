from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import generated_text, upstream_corpus
from benchmarks.generated_text import bank, lengths, near_copy, texts
from benchmarks.upstream_corpus import SPECIAL, json_lines, main, make_corpus, plan, pool, records, row_bytes, write_job
from benchmarks.upstream_layouts import LAYOUTS
from hrm_text.contracts import Example, UserError
from hrm_text.data.sources import flan, general, knowledge, mathematics, reasoning, symbolic, web
from hrm_text.data.sources.upstream import DATASETS
from hrm_text.data.sources.upstream_files import BadRow, read_rows

GIGABYTES = 0.012
MODULES = {module.__name__ for module in (flan, general, knowledge, mathematics, reasoning, symbolic, web)}
NAMES = sorted(name for name, found in DATASETS.items() if found.clean.__module__ in MODULES)


def files_of(name: str, corpus: Path) -> list[Path]:
    found = {file for pattern in DATASETS[name].files for file in (corpus / name).glob(pattern)}
    return sorted(file for file in found if file.is_file())


def digests(corpus: Path) -> dict[str, str]:
    files = (file for file in corpus.rglob("*") if file.is_file())
    return {str(file.relative_to(corpus)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module", autouse=True)
def _small_vocabulary() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated_text, "PHRASES", 1 << 13)
        patch.setattr(generated_text, "WORDS", 3000)
        patch.setattr(upstream_corpus, "POOL", 64)
        yield
    bank.cache_clear()
    pool.cache_clear()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    make_corpus(out, GIGABYTES, workers=1)
    return out


@pytest.fixture(scope="module")
def cleaned(corpus: Path) -> dict[str, Any]:
    """What the cleaners make of all of it: the examples of each dataset, and the bad rows by reason."""
    bad: Counter[str] = Counter()

    def on_bad(row: BadRow) -> None:
        bad[row.reason] += 1

    examples: dict[str, list[Example]] = {}
    for name in NAMES:
        found = DATASETS[name]
        rows = (
            row.row for file in files_of(name, corpus) for row in read_rows(file, found.columns, on_bad, found.text)
        )
        examples[name] = [item for row in rows for item in found.clean(row) if isinstance(item, Example)]
    return {"examples": examples, "bad": bad}


def test_every_dataset_finds_files_in_its_folder_and_keeps_most_of_their_rows(
    corpus: Path, cleaned: dict[str, Any]
) -> None:
    assert set(NAMES) == {name for layout in LAYOUTS for name in (layout.name, *layout.also)}
    for name in NAMES:
        assert files_of(name, corpus), name
        assert cleaned["examples"][name], name
    assert {file.suffix for file in corpus.rglob("*") if file.is_file()} >= {
        ".parquet", ".jsonl", ".gz", ".csv", ".txt", ".json",
    }  # fmt: skip


def test_its_size_is_what_was_asked_for() -> None:
    jobs = plan(5.0)
    assert sum(job.size for job in jobs) == pytest.approx(5e9, rel=0.02)
    large = [job.size for job in jobs if job.layout.share * 5e9 > 3e8]
    assert min(large) > 1e8
    assert max(large) < 2.5e8


def test_copies_lie_inside_and_across_datasets(cleaned: dict[str, Any]) -> None:
    several = [name for name in NAMES if len(cleaned["examples"][name]) > 200]
    pairs = [(name, each.instruction, each.response) for name in several for each in cleaned["examples"][name]]
    within = Counter(pairs)
    copies = sum(count - 1 for count in within.values()) / len(pairs)
    assert 0.005 < copies < 0.05
    homes: dict[tuple[str, str], set[str]] = {}
    for name, question, answer in within:
        homes.setdefault((question, answer), set()).add(name)
    assert sum(len(names) > 1 for names in homes.values()) > 5


def test_three_in_a_hundred_are_copies_and_three_near_copies() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "numinamath")
    questions, answers = records(layout, 0, np.random.default_rng(0), 20_000)
    originals = dict(pool(0))
    of_pool = [(asked, said) for asked, said in zip(questions, answers, strict=True) if asked in originals]
    assert 0.01 < len(of_pool) / 20_000 < 0.02
    assert sum(originals[asked or ""] == said for asked, said in of_pool) / len(of_pool) > 0.95
    starts = Counter((asked or "")[:60] for asked in questions if asked and len(asked) > 200)
    twice = sum(count - 1 for count in starts.values() if count > 1) / starts.total()
    assert 0.03 < twice < 0.05  # of 4.5 % that are copied here, a few are changed within their first words


def test_hostile_rows_are_among_them(cleaned: dict[str, Any], tmp_path: Path) -> None:
    assert any(reason.endswith("is of type null, not string") for reason in cleaned["bad"])
    assert any(SPECIAL in each.instruction for examples in cleaned["examples"].values() for each in examples)
    path = tmp_path / "a.jsonl"
    columns: dict[str, list[Any]] = {"question": ["why?"] * 10_000, "answer": ["so"] * 10_000}
    path.write_bytes(json_lines(columns, np.random.default_rng(0)))
    bad: list[BadRow] = []
    good = list(read_rows(path, {"question": "string", "answer": "string"}, bad.append))
    assert {row.reason for row in bad} == {
        "not valid UTF-8", "not JSON", "not a JSON object", "column 'question' is of type number, not string",
    }  # fmt: skip
    assert 9900 < len(good) < 9990


def test_flan_and_tasksource_have_hundreds_of_tasks(cleaned: dict[str, Any], corpus: Path) -> None:
    strata = set()
    for name in NAMES:
        find = DATASETS[name].stratum
        if name.startswith(("flan_", "tasksource")) and find is not None:
            for file in files_of(name, corpus):
                rows = read_rows(file, DATASETS[name].columns, lambda bad: None)
                strata |= {(name, find(row.row)) for row in rows}
    assert len(strata) > 300


def test_a_file_depends_on_the_seed_alone_and_what_is_finished_is_kept(corpus: Path, tmp_path: Path) -> None:
    expected = digests(corpus)
    for job in reversed(plan(GIGABYTES)):
        write_job(tmp_path, 0, job)
    made = digests(tmp_path)
    assert made == {name: digest for name, digest in expected.items() if name in made}
    assert len(made) > 200

    lost = corpus / "synth" / "synth_000.parquet"
    kept = corpus / "omnimath" / "test.jsonl"
    written = kept.stat().st_mtime_ns
    lost.unlink()
    make_corpus(corpus, GIGABYTES, workers=1)
    assert digests(corpus) == expected
    assert kept.stat().st_mtime_ns == written

    other = plan(GIGABYTES)[0]
    write_job(tmp_path / "other", 1, other)
    assert other.path(tmp_path / "other").read_bytes() != other.path(tmp_path).read_bytes()


def test_a_folder_of_other_settings_is_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="other settings"):
        make_corpus(corpus, GIGABYTES, seed=1, workers=1)
    assert main([str(corpus), "--gigabytes", "0.5"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_datasets_of_the_same_files_share_them_on_the_disk(corpus: Path) -> None:
    for layout in LAYOUTS:
        for name in layout.also:
            for mine, theirs in zip(files_of(layout.name, corpus), files_of(name, corpus), strict=True):
                assert mine.samefile(theirs)


def test_a_near_copy_differs_in_a_few_words() -> None:
    rng = np.random.default_rng(0)
    original = " ".join(f"w{number}" for number in range(100))
    for _ in range(20):
        copy = near_copy(0, rng, original).split(" ")
        changed = sum(mine != theirs for mine, theirs in zip(copy, original.split(" "), strict=True))
        assert 1 <= changed <= 3


def test_lengths_are_lognormal_and_texts_grow_with_them() -> None:
    rng = np.random.default_rng(0)
    tokens = lengths(rng, 20_000, np.exp(4.8), 1.2)
    assert np.median(tokens) == pytest.approx(np.exp(4.8), rel=0.05)
    assert np.std(np.log(tokens)) == pytest.approx(1.2, rel=0.05)
    sizes = [len(text) for text in texts(0, rng, np.array([10.0, 100.0, 1000.0, 5000.0]), "prose")]
    assert all(6 * small < large for small, large in pairwise(sizes[:3]))
    assert 3.5 < sizes[3] / 5000 < 6.5
    assert all(row_bytes(layout) > 0 for layout in LAYOUTS)
