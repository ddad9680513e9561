"""The load test's own clients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serve_load import main
from tests.infer.server.fake import make_service, running


def test_many_clients_and_a_full_queue_are_no_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with running(make_service(tokenizer_dir, seconds=0.001, max_queue=4)) as server:
        assert main(["--url", server.url, "--clients", "8", "--seconds", "2", "--json", str(file)]) == 0
        figures = json.loads(file.read_text())
        lines = [line for line in server.service.metrics.text().decode().splitlines() if "requests_total{" in line]
    assert figures["finished"] > 10 and figures["sent_away_429"] > 0 and figures["errors"] == {}
    assert sum(float(line.split()[-1]) for line in lines if 'status="200"' in line) == pytest.approx(
        figures["finished"] + figures["left_by_clients"], abs=8
    )
    assert 0 < figures["first_text_seconds"]["p50"] <= figures["total_seconds"]["p99"]


def test_any_other_answer_is_an_error(tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(make_service(tokenizer_dir, keys=["key"])) as server:
        assert main(["--url", server.url, "--clients", "1", "--seconds", "0.2"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert error.startswith("401 ") and "a key is needed" in error
    with pytest.raises(SystemExit):
        main([])
    assert "either a weights folder or --url" in capsys.readouterr().err
