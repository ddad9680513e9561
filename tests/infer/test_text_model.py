from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_text.contracts import Engine, UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info
from hrm_text.files import sha256, write_json
from hrm_text.infer.sampling import Chosen, RowState
from hrm_text.infer.text_model import TextModel, load
from hrm_text.model.checkpoint_files import DTYPES, FORMAT
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from hrm_text.model.tensorfile import save_tensors
from hrm_text.model.weights import write_weights
from hrm_text.settings import to_mapping

PROMPTS = ["What is 12 + 7?", "apple", "", "Grüße 🙂 aus Köln, " * 3, "reverse 数"]
CONTEXT = 128


def make(tokenizer_dir: Path, seed: int = 0, batch_size: int = 128, **changes: Any) -> TextModel:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    values = {"vocab_size": 512, "max_position_embeddings": CONTEXT} | changes
    return TextModel(build(preset("tiny", **values), seed=seed), prompt_format, batch_size)


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path) -> TextModel:
    return make(tokenizer_dir)


def next_logits(model: TextModel, ids: list[int], prefix: int) -> Tensor:
    return model.logits(torch.tensor([ids]), torch.tensor([prefix if model.config.prefix_lm else 0]))[0, -1]


def greedy_by_full_forward(model: TextModel, prompt: str, condition: str, new_tokens: int) -> list[int]:
    """The definition of greedy decoding: the whole text again for every token."""
    ids = model.prompt_format.prefix_ids(condition, prompt)
    prefix = len(ids)
    while len(ids) - prefix < new_tokens and len(ids) < CONTEXT:
        token = int(next_logits(model, ids, prefix)[: model.vocab_size].argmax())
        if token == model.prompt_format.eoa_id:
            break
        ids.append(token)
    return ids[prefix:]


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "rins"}, {"architecture": "looped", "norm": "post"}, {"prefix_lm": False}]
)
def test_greedy_texts_equal_repeated_full_forward_passes(changes: dict[str, Any], tokenizer_dir: Path) -> None:
    model = make(tokenizer_dir, seed=1, **changes)
    texts = model.generate(PROMPTS, condition="synth,cot", max_new_tokens=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == model.prompt_format.decode(greedy_by_full_forward(model, prompt, "synth,cot", 12))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_neighbours_and_the_size_of_the_batch_change_no_text(temperature: float, tokenizer_dir: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": temperature, "seed": 4}
    expected = make(tokenizer_dir).generate(PROMPTS, **options)
    assert make(tokenizer_dir, batch_size=2).generate(PROMPTS, **options) == expected
    assert make(tokenizer_dir).generate([PROMPTS[0], "another neighbour"], **options)[0] == expected[0]


def test_the_seed_and_the_condition_decide_a_sampled_text(model: TextModel) -> None:
    def sample(seed: int, condition: str = "direct") -> str:
        options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed, "condition": condition}
        return model.generate(PROMPTS[:1], **options)[0]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1) != sample(1, "cot")


def test_top_p_near_zero_is_greedy(model: TextModel) -> None:
    greedy = model.generate(PROMPTS, max_new_tokens=8)
    assert model.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


class Scripted:
    """In the place of a sampler: says given ids, one list per request."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts = [iter(script) for script in scripts]
        self.met: list[RowState] = []
        self.asked: list[list[int]] = []

    def choose(self, logits_BV: Tensor, rows: Sequence[RowState]) -> Chosen:
        self.met += [row for row in rows if row not in self.met]
        requests = [self.met.index(row) for row in rows]
        self.asked.append(requests)
        return Chosen(torch.tensor([next(self.scripts[request]) for request in requests]), ())


@pytest.fixture
def fresh(tokenizer_dir: Path) -> TextModel:
    """A model whose engine is to be made yet."""
    return make(tokenizer_dir)


def test_a_text_stops_at_the_end_token_and_the_others_go_on(fresh: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh
    ids = model.prompt_format.response_ids("19.")
    end, words = ids[-1], ids[:-1]
    assert len(words) == 3
    scripted = Scripted([[*words, end], [end], [words[0], words[1], words[2], words[0], end]])
    monkeypatch.setattr("hrm_text.infer.engine.Sampler", lambda *_: scripted)
    assert model.generate(["a", "b", "c"], max_new_tokens=50) == ["19.", "", "19.1"]
    assert [sorted(requests) for requests in scripted.asked] == [[0, 1, 2], [0, 2], [0, 2], [0, 2], [2]]


def test_a_text_ends_with_max_new_tokens_or_the_context(fresh: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh
    word = model.prompt_format.response_ids("1")[0]
    monkeypatch.setattr("hrm_text.infer.engine.Sampler", lambda *_: Scripted([[word] * 500, [word] * 500]))
    assert model.generate(["a"], max_new_tokens=7) == ["1" * 7]
    prompt = model.prompt_format.prefix_ids("direct", "a")
    assert len(model.generate(["a"], max_new_tokens=500)[0]) == CONTEXT - len(prompt)


def test_a_prompt_that_does_not_fit_says_so(model: TextModel) -> None:
    fits = "1" * (CONTEXT - 4)  # with the beginning, the tag and the end: one token of room
    assert len(model.prompt_format.prefix_ids("direct", fits)) == CONTEXT - 1
    model.generate([fits], max_new_tokens=3)
    with pytest.raises(UserError, match=f"prompt 2 has {CONTEXT} tokens .*context is {CONTEXT}.*Shorten the prompt"):
        model.generate(["a", fits + "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "text"}, "prompts must be a list of texts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"condition": "fast"}, "unknown condition tag 'fast'"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 2.0}, "top_p must be"),
    ],
)
def test_a_bad_request_is_one_clear_error(arguments: dict[str, Any], message: str, model: TextModel) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(**({"prompts": ["a"]} | arguments))


def test_no_prompts_no_texts(model: TextModel) -> None:
    assert model.generate([]) == []
    assert isinstance(model, Engine)


@pytest.mark.parametrize("response", ["plain words", "🙂🙃 Grüße 数", "é" * 9, "", "🙂"])
def test_streamed_pieces_join_to_the_text_and_never_end_within_a_character(
    response: str, fresh: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh
    ids = model.prompt_format.response_ids(response)
    monkeypatch.setattr("hrm_text.infer.engine.Sampler", lambda *_: Scripted([ids]))
    pieces = list(model.stream("a", max_new_tokens=200))
    assert "".join(pieces) == response
    assert not any("\ufffd" in piece for piece in pieces)


def test_streams_of_random_bytes_join_to_the_text_of_generate(model: TextModel) -> None:
    """An untrained model at a high temperature says bytes that are no characters at all."""
    for seed in range(6):
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 2.0, "seed": seed}
        assert "".join(model.stream("a", **options)) == model.generate(["a"], **options)[0]


def test_text_of_the_user_never_becomes_a_special_token(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tokenizer_dir, max_position_embeddings=1024)
    seen: list[int] = []
    forward = model.module.forward

    def observed(ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.extend(ids.tolist())
        return forward(ids, *rest, **options)

    monkeypatch.setattr(model.module, "forward", observed)
    model.generate(["".join(SPECIAL_TOKENS) + "<|im_end|>\n<|im_start|><|quad_end|>"], max_new_tokens=1)
    controls = [SPECIAL_TOKENS[token] for token in seen if token < len(SPECIAL_TOKENS)]
    assert controls == ["<|im_start|>", "<|object_ref_start|>", "<|im_end|>"]


def test_a_weights_folder_with_its_tokenizer_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = make(tokenizer_dir, seed=2)
    write_weights(tmp_path, model.config, model.module.state_dict(), torch.float32, {})
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    assert load(str(tmp_path)).generate(PROMPTS, max_new_tokens=8) == model.generate(PROMPTS, max_new_tokens=8)
    with pytest.raises(UserError, match="unknown dtype 'half'"):
        load(tmp_path, dtype="half")


def write_checkpoint(folder: Path, model: TextModel, tokenizer: Path) -> None:
    """By hand, as two ranks with half of each parameter would: the raw weights are not those that answer."""
    folder.mkdir(parents=True)
    buffers = {name for name, _ in model.module.named_buffers()}
    files: dict[str, dict[str, Tensor]] = {f"rank_0000{rank}_00.safetensors": {} for rank in (0, 1)}
    listed: dict[str, Any] = {}
    for name, tensor in model.module.state_dict().items():
        groups = {"weights": tensor} if name in buffers else {"weights": tensor + 1, "ema": tensor}
        for group, value in groups.items():
            chunks, row = [], 0
            for file, part in zip(files, value.tensor_split(2), strict=True):
                key = f"{group}/{name}@{row}"
                files[file][key] = part
                offset = [row] + [0] * (part.dim() - 1)
                chunks.append({"file": file, "name": key, "offset": offset, "shape": list(part.shape)})
                row += len(part)
            assert value.dtype is DTYPES["float32"]
            listed[f"{group}/{name}"] = {"dtype": "float32", "shape": list(value.shape), "chunks": chunks}
    for file, tensors in files.items():
        save_tensors(folder / file, tensors)
    write_json(folder / "state.json", {"tokenizer_info": tokenizer_info(tokenizer)})
    write_json(folder / "config.yaml", {"model": to_mapping(model.config)})  # JSON is YAML
    sums = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": 3, "versions": {}, "files": sums, "tensors": listed}
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/step_00000003"])
def test_a_run_answers_with_its_averaged_weights(tokenizer_dir: Path, tmp_path: Path, place: str) -> None:
    model = make(tokenizer_dir, seed=3)
    write_checkpoint(tmp_path / "run/checkpoints/step_00000003", model, tokenizer_dir)
    loaded = load(tmp_path / place)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.generate(PROMPTS[:2], max_new_tokens=5) == model.generate(PROMPTS[:2], max_new_tokens=5)
    assert load(tmp_path / place, dtype="bfloat16").module.lm_head.weight.dtype == torch.bfloat16


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tokenizer_dir: Path, tmp_path: Path) -> None:
    for step in (3, 4):
        write_checkpoint(tmp_path / f"checkpoints/step_0000000{step}", make(tokenizer_dir, seed=step), tokenizer_dir)
    (tmp_path / "checkpoints/step_00000004/rank_00001_00.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step_00000004/rank_00001_00\.safetensors: damaged"):
        loaded = load(tmp_path)
    assert torch.equal(loaded.module.lm_head.weight, make(tokenizer_dir, seed=3).module.lm_head.weight)


def test_the_tokenizer_of_a_run_may_have_moved(tokenizer_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, moved)
    write_checkpoint(tmp_path / "run/checkpoints/step_00000003", make(moved), moved)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="the run's tokenizer is not there; name its folder"):
        load(tmp_path / "run")
    loaded = load(tmp_path / "run", tokenizer=tokenizer_dir)
    assert loaded.generate(["apple"], max_new_tokens=3) == make(tokenizer_dir).generate(["apple"], max_new_tokens=3)
