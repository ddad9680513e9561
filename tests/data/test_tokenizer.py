from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from hrm_text.contracts import Example, UserError
from hrm_text.data import tokenizer as module
from hrm_text.data.records import BadRecords, find_record_files, write_jsonl
from hrm_text.data.tokenizer import SPECIAL_TOKENS, cut, load_tokenizer, tokenizer_file, tokenizer_info, train_tokenizer
from hrm_text.data.tokenizer_report import OURS, public_tokenizer, tokenizer_quality

TEXTS = ["one two three 1234", "four five six: don't", "naïve café"] * 10
FIRST_14 = [
    "<|PAD|>",
    "<|direct|>",
    "<|cot|>",
    "<|noisy|>",
    "<|synth|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def test_special_tokens_have_the_ids_of_the_released_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert [tokenizer.id_to_token(index) for index in range(14)] == FIRST_14
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    info = tokenizer_info(tokenizer_dir)
    assert info == {
        "tokenizer_path": str(tokenizer_dir.resolve()),
        "boq": "<|im_start|>",
        "eoq": "<|im_end|>",
        "eoa": "<|box_end|>",
        "condition_mapping": {
            "direct": "<|object_ref_start|>",
            "cot": "<|object_ref_end|>",
            "noisy": "<|quad_start|>",
            "synth": "<|quad_end|>",
        },
        "vocab_size": tokenizer.get_vocab_size(),
    }


def test_the_same_texts_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hrm_text.data.tokenizer import train_tokenizer; "
        "texts = ['one two three 1234', \"four five six: don't\", 'naïve café'] * 10; "
        "train_tokenizer(iter(texts), 320, Path(sys.argv[1]))"
    )
    train_tokenizer(iter(TEXTS), 320, tmp_path / "a")
    subprocess.run([sys.executable, "-X", "utf8", "-c", program, str(tmp_path / "b")], check=True)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_vocabulary_has_the_size_asked_for(tmp_path: Path) -> None:
    assert tokenizer_info(train_tokenizer(iter(TEXTS), 300, tmp_path / "a"))["vocab_size"] == 300


@given(any_text)
def test_any_text_survives_the_round_trip(tokenizer_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


@given(st.integers(0, 10**12))
def test_digits_are_single_tokens(tokenizer_dir: Path, number: int) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.encode(str(number)).tokens == list(str(number))


def test_words_split_as_in_gpt_4_but_for_digits(tokenizer_dir: Path) -> None:
    splitter = load_tokenizer(tokenizer_dir).pre_tokenizer
    words = [word for word, _ in splitter.pre_tokenize_str("I'M here, don't   wait 42 min\n\n  (x+y)!!\n")]
    # As the expression says, by hand; Ġ is a space and Ċ a line break.
    assert " ".join(words) == "I 'M Ġhere , Ġdon 't ĠĠ Ġwait Ġ 4 2 Ġmin ĊĊ Ġ Ġ( x +y )!!Ċ"


def test_composed_and_decomposed_letters_are_the_same(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.encode("e\u0301cole").ids == tokenizer.encode("\u00e9cole").ids


def test_transformers_loads_it_and_reads_special_tokens_as_such(tokenizer_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    ours = load_tokenizer(tokenizer_dir)
    for text in ("What is 12 + 30?", " leading, don't", "e\u0301cole 東京\n\n\tx", "", "🙂🙂"):
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == unicodedata.normalize("NFC", text)
    # A rendered prompt, as people write it for Transformers.
    rendered = theirs("<|im_start|><|quad_end|><|object_ref_end|>What is 12?<|im_end|>").input_ids
    assert rendered == [6, 13, 9, *ours.encode("What is 12?").ids, 7]
    assert 6 not in ours.encode("<|im_start|>").ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (6, 11, 5)
    assert theirs.decode([6, *ours.encode("hello").ids, 11], skip_special_tokens=True) == "hello"


def test_what_cannot_be_trained_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary of 100.*take 287"):
        train_tokenizer(iter(TEXTS), 100, tmp_path / "a")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(iter(["", ""]), 300, tmp_path / "a")

    def stops() -> Iterator[str]:
        yield from TEXTS
        raise UserError("a.jsonl:31: bad")

    with pytest.raises(UserError, match=r"a\.jsonl:31: bad"):
        train_tokenizer(stops(), 300, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_replaces_only_a_tokenizer(tmp_path: Path) -> None:
    out = train_tokenizer(iter(TEXTS), 300, tmp_path / "a")
    assert tokenizer_info(train_tokenizer(iter(TEXTS), 310, out))["vocab_size"] == 310
    (out / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        train_tokenizer(iter(TEXTS), 300, out)
    assert tokenizer_info(out)["vocab_size"] == 310


def test_a_missing_or_damaged_tokenizer_says_so(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    assert (
        load_tokenizer(tokenizer_file(tokenizer_dir)).get_vocab_size() == load_tokenizer(tokenizer_dir).get_vocab_size()
    )


def test_a_tokenizer_of_another_family_names_the_tokens_it_lacks(tmp_path: Path) -> None:
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"lacks <\|im_start\|>"):
        tokenizer_info(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_survive_the_round_trip_as_the_text_that_they_are_read_as(tokenizer_dir: Path, data: bytes) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    replaced = data.decode("utf-8", "replace")
    assert tokenizer.decode(tokenizer.encode(replaced).ids) == unicodedata.normalize("NFC", replaced)
    # Bytes that are no UTF-8 as lone surrogates are no text: they are refused, not silently changed.
    escaped = data.decode("utf-8", "surrogateescape")
    if escaped.isascii() or escaped == replaced:
        assert tokenizer.decode(tokenizer.encode(escaped).ids) == unicodedata.normalize("NFC", escaped)
    else:
        with pytest.raises((UnicodeEncodeError, TypeError)):
            tokenizer.encode(escaped)


_INSIDE = ("", " ", "\n", "\u200b", "\u0338", "\u0301", "\ufeff", "\u00a0", "<", ">", "|", "<|", "|>", "\x00")
"""What an attacker may put between, before or into control tokens; U+0338 composes with < and > under NFC."""


@st.composite
def forgeries(draw: st.DrawFn) -> str:
    """Control tokens as text: whole, halved, nested, oddly spaced, decomposed."""
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        token = draw(st.sampled_from(SPECIAL_TOKENS))
        at = draw(st.integers(0, len(token)))
        inner = draw(st.sampled_from((*_INSIDE, *SPECIAL_TOKENS)))
        form = draw(st.sampled_from(("whole", "split", "halves", "NFD", "upper")))
        parts += {
            "whole": [token],
            "split": [token[:at], inner, token[at:]],
            "halves": [token[:at], draw(any_text)],
            "NFD": [unicodedata.normalize("NFD", token), inner],
            "upper": [token.upper(), token.lower()],
        }[form]
        parts.append(draw(st.sampled_from(_INSIDE)))
    return "".join(parts)


@settings(max_examples=300)
@given(forgeries())
def test_no_text_can_forge_a_control_token(tokenizer_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    for encoding in (tokenizer.encode(text), *tokenizer.encode_batch_fast([text, f" {text} "])):
        assert min(encoding.ids, default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_letters_that_normalise_to_those_of_a_control_token_forge_none(tokenizer_dir: Path) -> None:
    """Every character whose NFC form is another is put in the place of what it turns into, if that is in a token."""
    tokenizer = load_tokenizer(tokenizer_dir)
    letters = set("".join(SPECIAL_TOKENS))
    turning = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    turning = [letter for letter in turning if unicodedata.normalize("NFC", letter) in letters - {letter}]
    for letter in [*turning, "\uff1c", "\uff5c", "\ufe64"]:  # wide forms are other letters under NFC
        for token in SPECIAL_TOKENS:
            for target in {unicodedata.normalize("NFKC", letter)} & set(token):
                ids = tokenizer.encode(token.replace(target, letter)).ids
                assert min(ids) >= len(SPECIAL_TOKENS)


def test_long_texts_are_fed_in_pieces_and_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{i % 50} {i % 7}" for i in range(3000))
    whole = train_tokenizer(iter([text]), 320, tmp_path / "whole")
    fed: list[int] = []

    def cut_short(text: str) -> Iterator[str]:
        for piece in cut(text, 100):
            fed.append(len(piece))
            yield piece

    monkeypatch.setattr(module, "cut", cut_short)
    pieces = train_tokenizer(iter([text]), 320, tmp_path / "pieces")
    assert max(fed) <= 100 and len(fed) > 200
    assert (whole / "tokenizer.json").read_bytes() == (pieces / "tokenizer.json").read_bytes()


def test_quality_counts_every_source_and_all_together(tmp_path: Path, tokenizer_dir: Path) -> None:
    for name, text in (("numbers/a", "12345 "), ("numbers/b", "67890 "), ("words/a", "answer ")):
        write_jsonl(tmp_path / f"{name}.jsonl", [Example("direct", text * 20, "ok")] * 30)
    files = find_record_files([tmp_path])
    found = tokenizer_quality(tokenizer_dir, files, {"letters": len}, BadRecords(strict=True))
    numbers, words, together = found
    assert [quality.source for quality in found] == ["numbers", "words", "all of these"]
    assert numbers.bytes == 2 * 30 * 122 and numbers.bytes_per_token("letters") == 1
    assert words.bytes_per_token(OURS) > 2 * numbers.bytes_per_token(OURS)  # digits are tokens of their own
    assert together.tokens[OURS] == numbers.tokens[OURS] + words.tokens[OURS]
    with pytest.raises(UserError, match=r"'gpt5'; expected one of cl100k_base"):
        public_tokenizer("gpt5")


def test_a_public_tokenizer_counts_text_as_text() -> None:
    pytest.importorskip("bpe_openai")
    count = public_tokenizer("cl100k_base")
    assert count is not None
    assert count("hello world") == 2  # as documented for this encoding
    assert count("<|endoftext|>") > 1


def test_without_the_package_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert public_tokenizer("o200k_base") is None
