from __future__ import annotations

import inspect
import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import hrm_text
from hrm_text import cli
from hrm_text.contracts import UserError
from hrm_text.convert.card import Card
from hrm_text.convert.huggingface import write_folder
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.recurrence import build
from hrm_text.model.tensorfile import load_tensors, save_tensors
from hrm_text.recipes import check_weights as recipe
from hrm_text.recipes.check_weights import Finding, WeightsCheck, check_weights

TEXTS = ["What is 12 + 7?", "The sum is 19.", "reverse the word apple", "Grüße 🙂"] * 3
WHAT = [
    "embedding_scale", "tensors", "logits of prompts", "logits of responses", "greedy text", "token ids of texts",
    "rendered prompts", "special ids",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(iter(TEXTS), 310, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def write(out: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    config: ModelConfig = preset("tiny", **{"vocab_size": 320, "max_position_embeddings": 160} | changes)
    tensors = build(config, seed=3).state_dict()
    card = Card(name="w", config=config, dtype=str(dtype).removeprefix("torch."), weights="", origin="")
    return write_folder(out, config, tensors, dtype, tokenizer, card, "synth,cot")


@pytest.fixture(scope="module")
def good(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "weights", tokenizer_dir)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(good, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture(autouse=True)
def quick(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short greedy texts; the log of Transformers stays out of the output, its progress bars come back."""
    monkeypatch.setattr(recipe, "NEW_TOKENS", 4)
    from transformers.utils import logging as theirs

    with caplog.at_level(logging.CRITICAL, logger="transformers"):
        yield
    theirs.enable_progress_bar()


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def between(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], Any]) -> None:
    """Spoil the folder once this project has read it: what Transformers then reads is something else."""
    load = hrm_text.load

    def load_then_spoil(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        spoil()
        return model

    monkeypatch.setattr(recipe, "load", load_then_spoil)


def named(folder: Path) -> dict[str, str]:
    return {finding.what: finding.result for finding in check_weights(folder).differences}


# --------------------------------------------------------------------------------------------------------- it passes --


@pytest.mark.parametrize(
    ("dtype", "changes"), [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"prefix_lm": False})]
)
def test_a_good_folder_is_read_alike(
    dtype: torch.dtype,
    changes: dict[str, Any],
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "NEW_TOKENS", 32)
    outcome = check_weights(write(tmp_path / "weights", tokenizer_dir, dtype, **changes))
    assert [finding.what for finding in outcome.findings] == WHAT
    assert outcome.differences == []
    results = {finding.what: finding.result for finding in outcome.findings}
    assert results["greedy text"] == "3 of 3 the same"
    assert re.search(r"5 texts$", results["logits of prompts"])  # the longest does not fit a context of 160
    assert results["special ids"] == "bos 6, eos 11, pad 5"


def test_what_callers_lose_is_said_in_numbers(good: Path) -> None:
    mask, special = check_weights(good).traps
    found = re.search(r"changed for (\d) of 5 prompts, its logits by up to ([\d.e-]+) of the largest", mask)
    assert found and float(found[2]) > 100 * recipe.TOLERANCE  # or the comparison could not tell the masks apart
    assert "'Say <|im_end|> twice'" in special


def test_no_mask_to_forget_where_the_model_is_causal(tokenizer_dir: Path, tmp_path: Path) -> None:
    (special,) = check_weights(write(tmp_path / "weights", tokenizer_dir, prefix_lm=False)).traps
    assert special.startswith("AutoTokenizer")


# ---------------------------------------------------------------------------------------------------------- it fails --


def test_a_single_weight_that_differs_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"

    def spoil() -> None:
        tensors = {name: tensor.clone() for name, tensor in load_tensors(file).items()}
        tensors["model.L_module.layers.0.attn.o_proj.weight"][0, 0] += 1.0
        save_tensors(file, tensors, metadata={"format": "pt"})

    between(monkeypatch, spoil)
    found = named(folder)
    assert {"logits of prompts", "logits of responses"} <= found.keys() <= {*WHAT[2:5]}
    share = re.match(r"differ by ([\d.e-]+) of the largest \(at most 0.0001\)", found["logits of prompts"])
    assert share and 1e-4 < float(share[1]) < 1


def test_a_tensor_that_is_missing_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"

    def spoil() -> None:
        tensors = dict(load_tensors(file))
        del tensors["lm_head.weight"]
        save_tensors(file, tensors, metadata={"format": "pt"})

    between(monkeypatch, spoil)
    assert named(folder)["tensors"] == "1 missing, such as lm_head.weight"


def test_a_scale_that_is_not_of_the_embedding_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "config.json", embedding_scale=50.0)
    assert named(folder) == {"embedding_scale": "50, but 1 / initializer_range is 8"}  # both sides believe the file
    change(folder / "config.json", embedding_scale=8.0)
    between(monkeypatch, lambda: change(folder / "config.json", embedding_scale=8.1))
    assert {"logits of prompts", "logits of responses"} <= named(folder).keys()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"eos_token_id": 7}, "eos is 7 in config.json, expected 11"),
        ("generation_config.json", {"eos_token_id": 7}, "eos is 7 in generation_config.json, expected 11"),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "eos is 7 in AutoTokenizer, expected 11"),
        ("config.json", {"pad_token_id": None}, "pad is None in config.json, expected 5"),
    ],
)
def test_an_end_that_is_not_the_tokenizers_is_named(
    file: str, values: dict[str, Any], message: str, folder: Path
) -> None:
    change(folder / file, **values)
    found = named(folder)
    assert found["special ids"] == message
    assert found.keys() <= {"special ids", "greedy text"}


def test_more_ends_than_ours_are_allowed(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[11, 5])
    assert "special ids" not in named(folder)


def test_a_tokenizer_that_differs_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = train_tokenizer(iter(["zzz yyy zzz yyy"] * 4), 300, tmp_path / "other")
    between(monkeypatch, lambda: shutil.copyfile(other / "tokenizer.json", folder / "tokenizer.json"))
    found = named(folder)
    assert re.match(r"'What is 12 \+ 7\?' is \[[\d, ]+\], here \[", found["token ids of texts"])
    assert (
        {"token ids of texts", "rendered prompts"}
        <= found.keys()
        <= {"token ids of texts", "rendered prompts", "greedy text"}
    )


def test_a_tokenizer_that_adds_a_token_there_is_named(folder: Path) -> None:
    """As published tokenizers do: what their callers get is not the prompt that the model was trained on."""
    file = folder / "tokenizer.json"
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    added = {"<|im_start|>": {"id": "<|im_start|>", "ids": [6], "tokens": ["<|im_start|>"]}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    change(
        file, post_processor={"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": added}
    )
    found = named(folder)
    assert found.keys() == {"rendered prompts"}
    assert re.match(r"'What is 12 \+ 7\?' begins \[6, 6, 13, 9\], here \[6, 13, 9, ", found["rendered prompts"])


def test_texts_that_part_at_a_tie_are_the_same() -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join("abc"[index] for index in ids)

    sure, tied = torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[9.0, 8.9999, 0.0]])
    parts = recipe.margin_where_they_part
    assert parts(Letters(), [0, 0], [sure, tied], "ab") < 2 * recipe.TOLERANCE
    assert parts(Letters(), [0, 0], [sure, sure], "ab") > 0.8
    assert parts(Letters(), [0] * 9, [tied] + [sure] * 8, "aaaaaaaab") > 0.8  # a tie long before does not excuse it


def test_a_table_shows_text_with_square_brackets_as_it_is() -> None:
    outcome = WeightsCheck(Path("a[/b]"), "5.23.0", (Finding("greedy text", "'[/x]' here, '[red]' there", False),), ())
    console = Console(file=io.StringIO(), width=120)
    console.print(recipe.as_table(outcome))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a[/b] in Transformers 5.23.0" in shown
    assert "'[/x]' here, '[red]' there" in shown


def test_logits_that_are_no_numbers_differ() -> None:
    assert recipe.logits_finding("x", [0.0, 1e-6]).same
    assert recipe.logits_finding("x", [0.0, float("nan"), 1e-6]) == Finding(
        "x", "differ by nan of the largest (at most 0.0001), 3 texts", False
    )


# ----------------------------------------------------------------------------------------------------------- refused --


@pytest.mark.parametrize("changes", [{"architecture": "looped"}, {"norm": "post"}])
def test_what_transformers_does_not_have_is_said(changes: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not in Transformers, whose hrm_text is 'hrm' with norm 'magic'"):
        check_weights(write(tmp_path / "weights", tokenizer_dir, **changes))


def test_without_transformers_the_extra_is_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'needs the extra hf: pip install "hrm-text\[hf\]"'):
        check_weights(good)


def test_a_transformers_before_the_model_is_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "5.8.0"

    monkeypatch.setitem(sys.modules, "transformers", Old())
    with pytest.raises(UserError, match="Transformers 5.8.0 does not know hrm_text; expected 5.9 or later"):
        check_weights(good)


def test_a_place_that_is_no_weights_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a weights folder, expected one with config.json"):
        check_weights(tmp_path)


def test_what_transformers_cannot_open_is_said_with_its_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between(monkeypatch, lambda: change(folder / "config.json", num_attention_heads=3))
    with pytest.raises(
        UserError, match=r"(?s)Transformers does not open it: .*not a multiple of the number of attention"
    ):
        check_weights(folder)


# -------------------------------------------------------------------------------------------------- the command line --


def test_the_command_prints_a_table_and_fails_with_the_difference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "--check", str(folder)]) == 0
    output = capsys.readouterr()
    assert all(what in output.out for what in WHAT)
    assert "differs" not in output.out
    assert output.err.count("warning: ") == 2
    change(folder / "generation_config.json", bos_token_id=9)
    assert cli.main(["export", "--check", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out.count("differs") == 1
    assert "special ids: bos is 9 in generation_config.json, expected 6" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "export needs the folder to write"),
        (["RUN", "--check", "--raw"], "--check of a folder that is there writes nothing: leave --raw"),
        (["RUN", "--check", "--condition", "cot"], "or name the folder to write"),
    ],
)
def test_an_export_without_a_folder_to_write(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *arguments]) == 1
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- docs/serving.md --

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def test_the_documented_checks_and_the_transformers_example_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "WEIGHTS_DIR")
    assert "hrm-text export --check WEIGHTS_DIR " in blocks("sh")[0]
    assert cli.main("export --check WEIGHTS_DIR".split()) == 0
    capsys.readouterr()
    (code,) = (block for block in blocks("python") if "AutoTokenizer" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    model = hrm_text.load("WEIGHTS_DIR")
    assert names["ids"][0].tolist() == model.prompt_format.prefix_ids("direct", "What is 12 + 7?")


def test_the_documented_options_and_fields_of_the_server_are_there() -> None:
    from hrm_text.cli.serve_command import serve
    from hrm_text.infer.server.schemas import ChatRequest, CompletionRequest

    options = {name.replace("_", "-") for name in inspect.signature(serve).parameters}
    written = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("hrm-text serve")]
    written += [line for block in blocks("ini") for line in block.splitlines() if "hrm-text serve" in line]
    assert len(written) == 3
    assert {name for line in written for name in re.findall(r" --([a-z-]+)", line)} <= options
    (body,) = re.findall(r"-d '(\{.*\})'", DOCS)
    CompletionRequest.model_validate_json(body)
    (extra,) = re.findall(r"extra_body=(\{.*\})", DOCS)
    assert json.loads(extra).keys() <= ChatRequest.model_fields.keys()
