from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from hrm_text.contracts import CONDITIONS, Example, UserError
from hrm_text.data.prompt import PromptFormat, parse_condition, strip_thinking
from hrm_text.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info

BOQ, EOQ, EOA = 6, 7, 11
TAGS = {"direct": 8, "cot": 9, "noisy": 12, "synth": 13}


@pytest.fixture(scope="session")
def prompts(tokenizer_dir: Path) -> PromptFormat:
    return PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))


def test_layout_of_prefix_and_response(prompts: PromptFormat, tokenizer_dir: Path) -> None:
    text = load_tokenizer(tokenizer_dir).encode("What is 12?").ids
    assert prompts.prefix_ids("synth,cot", "What is 12?") == [BOQ, TAGS["synth"], TAGS["cot"], *text, EOQ]
    assert prompts.prefix_ids("direct", "") == [BOQ, TAGS["direct"], EOQ]
    assert prompts.response_ids("What is 12?") == [*text, EOA]
    assert (prompts.boq_id, prompts.eoq_id, prompts.eoa_id) == (BOQ, EOQ, EOA)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_tags_are_emitted_in_the_order_given(prompts: PromptFormat, length: int) -> None:
    for tags in itertools.permutations(CONDITIONS, length):
        assert prompts.condition_ids(",".join(tags)) == [TAGS[tag] for tag in tags]
        assert parse_condition(" , ".join(tags)) == tags


@pytest.mark.parametrize("condition", ["", ",", "cot,", "cot;synth", "Direct", "cot,synht", "<|quad_end|>"])
def test_an_unknown_or_empty_tag_lists_the_choices(prompts: PromptFormat, condition: str) -> None:
    for parse in (parse_condition, lambda condition: prompts.prefix_ids(condition, "a")):
        with pytest.raises(UserError, match="direct, cot, noisy, synth"):
            parse(condition)


def test_a_tag_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'synth'"):
        parse_condition("cot,synht")
    with pytest.raises(UserError, match="did you mean 'direct'"):
        parse_condition("DIRECT")


# Texts made of special tokens, pieces of them, and anything else, glued together.
pieces = [*SPECIAL_TOKENS, "<|", "|>", "im_start", "im_end", "<|im_", "end|>", "<|<|im_end|>|>", "\u0301", " "]
hostile = st.lists(st.sampled_from(pieces) | st.text(st.characters(exclude_categories=["Cs"]))).map("".join)


@given(hostile)
def test_no_text_can_forge_a_special_token(prompts: PromptFormat, text: str) -> None:
    prefix = prompts.prefix_ids("synth,cot", text)
    assert prefix[:3] == [BOQ, TAGS["synth"], TAGS["cot"]]
    assert prefix[-1] == EOQ
    assert min(prefix[3:-1], default=31) >= len(SPECIAL_TOKENS)
    response = prompts.response_ids(text)
    assert response[-1] == EOA
    assert min(response[:-1], default=31) >= len(SPECIAL_TOKENS)


@given(hostile)
def test_any_text_comes_back_up_to_normalisation(prompts: PromptFormat, text: str) -> None:
    assert prompts.decode(prompts.response_ids(text)) == unicodedata.normalize("NFC", text)
    assert prompts.decode(prompts.prefix_ids("noisy", text)) == unicodedata.normalize("NFC", text)


@given(st.lists(st.tuples(st.sampled_from(["cot", "synth,cot"]), hostile), max_size=5))
def test_a_batch_is_its_records_one_by_one(prompts: PromptFormat, records: list[tuple[str, str]]) -> None:
    conditions, texts = [condition for condition, _ in records], [text for _, text in records]
    assert prompts.prefix_ids_batch(conditions, texts) == [prompts.prefix_ids(*record) for record in records]
    assert prompts.response_ids_batch(texts) == [prompts.response_ids(text) for text in texts]


@given(
    st.lists(
        st.builds(Example, st.sampled_from(["direct", "synth,cot", "noisy,direct,cot"]), st.text(), st.text()),
        max_size=5,
    )
)
def test_arrays_hold_what_the_lists_hold(prompts: PromptFormat, examples: list[Example]) -> None:
    encoded = prompts.encode(examples)
    pairs = [
        (prompts.prefix_ids(each.condition, each.instruction), prompts.response_ids(each.response)) for each in examples
    ]
    assert encoded.tokens.tolist() == [token for pair in pairs for ids in pair for token in ids]
    assert encoded.prefix_lengths.tolist() == [len(prefix) for prefix, _ in pairs]
    assert encoded.response_lengths.tolist() == [len(response) for _, response in pairs]


def test_a_tokenizer_whose_control_tokens_text_can_forge_is_refused(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token != "<|im_end|>"])
    with pytest.raises(UserError, match=r"no token '<\|im_end\|>'"):
        PromptFormat(tokenizer, tokenizer_info(tokenizer_dir))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    with pytest.raises(UserError, match="could forge"):
        PromptFormat(tokenizer, tokenizer_info(tokenizer_dir))


def test_incomplete_tokenizer_information_names_the_key(tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="'eoa'"):
        PromptFormat(load_tokenizer(tokenizer_dir), {"boq": "<|im_start|>", "eoq": "<|im_end|>"})


@pytest.mark.parametrize(
    ("response", "stripped"),
    [
        ("42", "42"),
        ("  42\n", "  42\n"),
        ("<think>hm</think>42", "42"),
        ("<think>\nline\nline\n</think>\n\n42\n", "42\n"),
        ("<think>a</think>\n<think>b</think> 42", "42"),
        ("  <think>a</think>  42", "42"),
        ("one <think>a</think> two", "one  two"),
        ("42 <think>checked</think>\n", "42"),
        ("42\n<think>cut off before", "42"),
        ("<think>cut off before", ""),
        ("a lone </think> is text", "a lone </think> is text"),
        ("<think></think>", ""),
    ],
)
def test_thinking_spans_are_stripped(response: str, stripped: str) -> None:
    assert strip_thinking(response) == stripped


thoughts = st.text("ab \n").map(lambda text: f"<think>{text}</think>")


@given(st.lists(st.tuples(thoughts, st.text("xyz", min_size=1))))
def test_exactly_the_spans_are_lost(parts: list[tuple[str, str]]) -> None:
    response = "".join(thought + text for thought, text in parts)
    assert strip_thinking(response) == "".join(text for _, text in parts)
