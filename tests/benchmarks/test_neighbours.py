"""How texts of a batch are compared with the same texts alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.neighbours import Said, listen, main, neighbours
from hrm_text.data.procedural import CPU_WEIGHTS, generate
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.recipes.decode_loads import RandomModel, RandomRequests, RandomText


def tiny(dtype: torch.dtype, seed: int = 0) -> RandomModel:
    config = preset("tiny", vocab_size=320, max_position_embeddings=64)
    return RandomModel(build(config, seed=seed, dtype=dtype).eval(), RandomText())


def test_in_fp32_no_text_depends_on_its_neighbours() -> None:
    requests = RandomRequests(320, seed=1)
    asked = [requests.make(5 + number, 8) for number in range(6)]
    for each in neighbours(tiny(torch.float32), asked, (2, 4)):
        assert (each.tokens, each.same_tokens, each.texts, each.same_texts) == (48, 48, 6, 6)
        assert each.largest_gap is None


def test_in_bf16_there_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--random --size tiny --count 5 --prompt 6 --new 4 --batches 3 --dtype bfloat16"
    assert main(options.split()) == 0
    *_, row = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r" +3 +20 +(\d+\.\d+)% +(\d+\.\d)% +(-|\d+\.\d+)", row)
    assert found is not None, row
    assert 50 < float(found[1]) <= 100 and (found[3] == "-") == (float(found[1]) == 100)


def test_a_text_that_is_told_what_to_say_goes_on_from_there() -> None:
    """Places are compared given the same context: what follows a token that the text itself would not have said."""
    model, requests = tiny(torch.float32), RandomRequests(320, seed=2)
    asked = [requests.make(7, 5) for _ in range(3)]
    alone = listen(model, asked, 1)
    told = [Said([said.ids[0], (said.ids[1] + 1) % 320, *said.ids[2:]], said.gaps) for said in alone]
    forced = listen(model, asked, 3, told)
    for a, b in zip(alone, forced, strict=True):
        assert b.ids[:2] == a.ids[:2] and len(b.ids) == 5, "until the wrong token has been said nothing is different"
    assert any(b.ids[2:] != a.ids[2:] for a, b in zip(alone, forced, strict=True))
    with torch.inference_mode():
        ids = torch.tensor([[*asked[0].turns[0].prefix_ids, *told[0].ids[:4]]])
        logits = model.module.logits(ids, torch.tensor([7]))[0, 6:]
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == forced[0].ids
    torch.testing.assert_close(
        best.values[:, 0] - best.values[:, 1], torch.tensor(forced[0].gaps), rtol=1e-3, atol=1e-4
    )


def test_places_that_differ_are_counted_with_how_close_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(torch.float32)
    asked = [RandomRequests(320, seed=3).make(7, 3)] * 2
    answers = iter(
        [
            [Said([1, 2, 3], [0.5, 0.25, 0.125]), Said([4, 5], [1.0, 2.0])],
            [Said([1, 9, 9], [0, 0, 0]), Said([4, 5], [0, 0])],
            [Said([1, 9, 8], [0, 0, 0]), Said([4, 5], [0, 0])],
        ]
    )
    monkeypatch.setattr("benchmarks.neighbours.listen", lambda *_, **__: next(answers))
    [found] = neighbours(model, asked, [2])
    assert (found.tokens, found.same_tokens, found.texts, found.same_texts, found.largest_gap) == (5, 3, 2, 1, 0.25)


def test_the_questions_of_a_folder_s_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = (text for each in generate(CPU_WEIGHTS, 200, 1) for text in (each.instruction, each.response))
    train_tokenizer(texts, 300, tmp_path)
    config = preset("tiny", vocab_size=512, max_position_embeddings=256, num_layers=2)
    special = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    write_weights(tmp_path, config, build(config, seed=3).state_dict(), torch.float32, special)
    assert main([str(tmp_path), "--tasks", "add,upper", "--limit", "2", "--batches", "4"]) == 0
    assert re.search(r"4 prompts.*\n.*\n +4 +\d+ +100\.000% +100\.0% +-\n", capsys.readouterr().out)
    assert main([str(tmp_path), "--tasks", "nonsense"]) == 1
    assert "unknown task 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
