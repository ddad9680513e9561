from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from hrm_text.contracts import UserError
from hrm_text.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_file, tokenizer_info, train_tokenizer

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
