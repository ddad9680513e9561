"""The model under lm-evaluation-harness: its numbers against the definition and Transformers, and its command line."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import hrm_text
from hrm_text.contracts import UserError
from hrm_text.convert.card import Card
from hrm_text.convert.huggingface import write_folder
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build

if TYPE_CHECKING:
    from hrm_text.recipes import harness
else:
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    from hrm_text.recipes import harness

TEXTS = ["What is 12 + 7?", "The sum is 19.", "reverse the word apple", "Grüße 🙂"] * 3
CONTEXT = 96
PAIRS = [
    ("What is 12 + 7?", " 19"),
    ("What is 12 + 7?", " The sum is 19."),
    ("What is 12 + 7?", "20"),
    ("", "apple"),
    ("reverse the word apple\nAnswer:", "\n elppa "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer(iter(TEXTS), 310, root / "tokenizer")
    config = preset("tiny", vocab_size=320, max_position_embeddings=CONTEXT)
    tensors = build(config, seed=3).state_dict()
    card = Card(name="w", config=config, dtype="float32", weights="", origin="")
    return write_folder(root / "weights", config, tensors, torch.float32, tokenizer, card, "synth,cot")


def make(folder: Path, **options: Any) -> harness.HarnessModel:
    return harness.HarnessModel(str(folder), **{"condition": "direct", "device": "cpu"} | options)


@pytest.fixture(scope="module")
def model(folder: Path) -> harness.HarnessModel:
    return make(folder)


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def loglikelihood(model: harness.HarnessModel, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)


def generate(model: harness.HarnessModel, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    return model.generate_until([ask(*request) for request in requests], disable_tqdm=True)


def logprob_of(model: harness.HarnessModel, prompt_ids: list[int], response_ids: list[int]) -> float:
    """One full forward pass."""
    ids, prefix = torch.tensor([[*prompt_ids, *response_ids]]), torch.tensor([len(prompt_ids)])
    logits = model.model.logits(ids, prefix)[0, len(prompt_ids) - 1 : -1, : model.model.vocab_size]
    scores = logits.log_softmax(-1)
    return float(scores[torch.arange(len(response_ids)), response_ids].sum()) if response_ids else 0.0


# ------------------------------------------------------------------------------------------------------- numbers ---


@pytest.mark.parametrize("end", [False, True])
def test_a_context_is_a_prompt_and_a_continuation_a_response(folder: Path, end: bool) -> None:
    model = make(folder, condition="synth+cot", end=end)
    form = model.model.prompt_format
    for (context, continuation), (logprob, _) in zip(PAIRS, loglikelihood(model, PAIRS), strict=True):
        response = form.response_ids(continuation.lstrip())[: None if end else -1]
        expected = logprob_of(model, form.prefix_ids("synth,cot", context), response)
        assert logprob == pytest.approx(expected, rel=2e-6)


def test_transformers_gives_the_same_numbers(folder: Path, model: harness.HarnessModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as theirs_logging

    theirs_logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs_logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    entries = len(tokenizer)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, loglikelihood(model, PAIRS), strict=True):
        prompt = tokenizer(f"<|im_start|><|object_ref_start|>{context}<|im_end|>")["input_ids"]
        response = tokenizer(continuation.lstrip())["input_ids"]
        ids = torch.tensor([prompt + response])
        types = torch.tensor([[1] * len(prompt) + [0] * len(response)])
        with torch.no_grad():
            logits = theirs(ids, token_type_ids=types).logits[0, len(prompt) - 1 : -1, :entries]
            causal = theirs(ids).logits[0, len(prompt) - 1 : -1, :entries]
        each = torch.arange(len(response))
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[each, response].sum()), rel=1e-5)
        assert abs(logprob - float(causal.log_softmax(-1)[each, response].sum())) > 1e-3  # the mask is told apart
        assert greedy == (logits.argmax(-1).tolist() == response)


def test_greedy_is_what_it_generates(folder: Path) -> None:
    model = make(folder)
    letters = torch.tensor([model.model.prompt_format.response_ids(letter)[0] for letter in "abcdefghijklmnopqrst"])
    head = model.model.module.lm_head.weight
    head[:] = torch.zeros_like(head).index_copy(0, letters, head[letters])  # an untrained model says anything else
    contexts = [f"{word} {number}" for word in ("apple", "sum", "word") for number in range(20)]
    said = generate(model, *((context, {"max_gen_toks": 1}) for context in contexts))
    assert len(set(said)) > 1
    assert all(greedy for _, greedy in loglikelihood(model, list(zip(contexts, said, strict=True))))
    assert not any(greedy for _, greedy in loglikelihood(model, [(context, "?") for context in contexts]))
    assert loglikelihood(model, [("apple", "")]) == [(0.0, True)]


def test_a_long_prompt_loses_its_beginning_and_that_is_told(
    model: harness.HarnessModel, caplog: pytest.LogCaptureFixture
) -> None:
    form = model.model.prompt_format
    long = "one two three " * 40 + "What is 12 + 7?"
    with caplog.at_level(logging.WARNING, "lm_eval"):
        ((logprob, _),) = loglikelihood(model, [(long, " 19")])
    response = form.response_ids("19")[:-1]
    ids = form.prefix_ids("direct", long)
    kept = [*ids[:2], *ids[2:][len(ids) + len(response) - CONTEXT :]]
    assert len(kept) + len(response) == CONTEXT
    assert logprob == pytest.approx(logprob_of(model, kept, response), rel=2e-6)
    assert "1 of 1 prompts leave no room for their response in the context of 96" in caplog.text


def test_rolling_scores_every_token_once_also_of_a_text_longer_than_the_context(model: harness.HarnessModel) -> None:
    form = model.model.prompt_format
    begin, tag, close = form.prefix_ids("direct", "")
    short, long = " What is it?\n", "reverse the word apple, " * 20
    found = model.loglikelihood_rolling([ask(short), ask(""), ask(long)], disable_tqdm=True)
    assert found[0] == pytest.approx(logprob_of(model, [begin, tag, close], form.response_ids(short)[:-1]), rel=2e-6)
    assert found[1] == 0
    ids, room = form.response_ids(long)[:-1], CONTEXT - 3
    assert len(ids) > 2 * room
    expected, start = logprob_of(model, [begin, tag, close], ids[:room]), room
    while start < len(ids):
        end = start + room - room // 2
        expected += logprob_of(model, [begin, tag, *ids[start - room // 2 : start], close], ids[start:end])
        start = end
    assert found[2] == pytest.approx(expected, rel=2e-6)


# ----------------------------------------------------------------------------------------------------- generation ---


def test_texts_end_where_the_task_says_whatever_runs_beside(folder: Path, model: harness.HarnessModel) -> None:
    prompts = ["What is 12 + 7?", "apple", "reverse the word apple"]
    whole = generate(model, *((prompt, {"max_gen_toks": 24}) for prompt in prompts))
    assert whole == hrm_text.load(folder).generate(prompts, condition="direct", max_new_tokens=24)
    until = whole[0][5:7]
    asked: list[tuple[str, dict[str, Any]]] = [
        (prompts[0], {"max_gen_toks": 24, "until": [until, "", "zzz"]}),
        (prompts[1], {"max_gen_toks": 3}),
        (prompts[2], {"max_gen_toks": 24, "do_sample": False, "temperature": 0.9}),
    ]
    mixed = generate(model, *asked)
    assert mixed[0] == whole[0].partition(until)[0] and len(mixed[0]) < len(whole[0])
    assert whole[1].startswith(mixed[1]) and len(mixed[1]) < len(whole[1])
    assert mixed[2] == whole[2]
    assert generate(make(folder, batch_size=2), *asked) == mixed


def test_a_question_asked_again_is_sampled_anew_and_a_run_is_repeatable(folder: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [("apple", {"do_sample": True, "max_gen_toks": 12})] * 4
    texts = generate(make(folder, seed=1), *asked)
    assert len(set(texts)) == 4
    assert generate(make(folder, seed=1), *asked) == texts
    assert generate(make(folder, seed=2), *asked) != texts


def test_a_prompt_makes_room_for_its_response(model: harness.HarnessModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lm_eval"):
        (cut,) = generate(model, ("one two three " * 40, {"max_gen_toks": 8}))
    assert "1 of 1 prompts leave no room" in caplog.text
    caplog.clear()
    short = "one two three " * 3
    (text,) = generate(model, (short, {"max_gen_toks": 4096}))  # longer than the context: half of it is enough
    assert not caplog.text and text and cut


@pytest.mark.parametrize(
    ("asked", "most", "expected"), [(1, None, 64), ("auto", None, 64), ("auto:4", 16, 16), (8, None, 8), ("8", 4, 8)]
)
def test_the_batch_size_is_a_number_or_auto(asked: int | str, most: int | None, expected: int) -> None:
    assert harness.read_batch_size(asked, most) == expected
    with pytest.raises(UserError, match="batch_size must be auto or a number from 1 on, found 'many'"):
        harness.read_batch_size("many", None)


def test_what_is_asked_is_checked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(folder, condition=None).condition == "synth,cot"  # the folder's own
    with pytest.raises(UserError, match="unknown condition tag 'cott'"):
        make(folder, condition="synth+cott")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [harness.choose_device(asked) for asked in (None, "cpu", "cuda:0")] == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [harness.choose_device(asked) for asked in (None, "cpu", "cuda:0")] == ["cuda", "cpu", "cuda:0"]


# ----------------------------------------------------------------------------------------------- the harness itself ---


def test_the_package_names_the_model_and_the_registry_takes_it(tmp_path: Path) -> None:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, value), *rest = project["entry-points"]["lm_eval.models"].items()
    assert not rest
    info = tmp_path / "stand_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lm_eval.models]\n{name} = {value}\n")
    (installed,) = importlib.metadata.Distribution.discover(name="stand-in", path=[str(tmp_path)])
    (entry,) = installed.entry_points
    registry = Registry("model", base_cls=LM)
    registry.register(entry.name, target=entry)  # what a harness that looks for entry points does
    assert registry.get(harness.NAME) is harness.HarnessModel
    assert value == harness.ENTRY_POINT


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three tasks over one local file: a choice, a text, and a text without a prompt.

    The harness is spared what takes it long: reading its own thousands of tasks, and asking the machine what it is.
    """
    import lm_eval.evaluator
    import lm_eval.tasks

    monkeypatch.setattr("sys.argv", ["lm_eval"])
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    rows = [
        {"question": f"What is {a} + {b}?", "choices": [str(a + b), str(a - b), "apple"], "answer": 0}
        for a, b in [(12, 7), (3, 1), (9, 9), (40, 2)]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    of_kind: dict[str, dict[str, Any]] = {
        "choose": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"},
        "say": {
            "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in of_kind.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | settings))  # JSON is YAML
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    yield folder
    enable_progress_bar()


@pytest.mark.filterwarnings("default")  # the harness's own, and of what it imports
def test_the_command_line_of_the_harness_gives_our_numbers(
    folder: Path,
    model: harness.HarnessModel,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    harness.main(
        f"--model hrm_text --model_args path={folder},condition=direct --include_path {tasks} --tasks choose,say,roll "
        f"--device cpu --output_path {out} --log_samples".split()
    )
    assert "|choose" in capsys.readouterr().out
    (written,) = out.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["condition"] == "direct" and len(results["config"]["model_sha256"]) == 64

    samples = {
        name: [
            json.loads(line) for file in out.rglob(f"samples_{name}_*.jsonl") for line in file.read_text().splitlines()
        ]
        for name in ("choose", "say", "roll")
    }
    prompts = [sample["doc"]["question"] for sample in samples["choose"]]
    assert len(prompts) == 4
    right = 0
    for sample in samples["choose"]:
        pairs = [(sample["doc"]["question"], f" {choice}") for choice in sample["doc"]["choices"]]
        expected = [logprob for logprob, _ in loglikelihood(model, pairs)]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(expected, rel=1e-5)
        right += expected.index(max(expected)) == 0
    assert results["results"]["choose"]["acc,none"] == right / 4
    said = [sample["resps"][0][0] for sample in samples["say"]]
    assert said == generate(model, *((prompt, {"until": ".", "max_gen_toks": 6}) for prompt in prompts))
    rolled = model.loglikelihood_rolling([ask(prompt) for prompt in prompts], disable_tqdm=True)
    bits = -sum(rolled) / sum(len(prompt.encode()) for prompt in prompts) / torch.tensor(2.0).log().item()
    assert results["results"]["roll"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_a_mistake_is_told_in_one_line(folder: Path, tasks: Path) -> None:
    arguments = f"path={folder},condition=synth+cott"
    with pytest.raises(SystemExit, match="^error: unknown condition tag 'cott'"):
        harness.main([*f"--model hrm_text --include_path {tasks} --tasks say --model_args".split(), arguments])
