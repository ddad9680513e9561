"""From a weights folder and sampled data to a draft head beside the weights, which texts are then made with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hrm_text
from hrm_text import cli
from hrm_text.contracts import Example, UserError
from hrm_text.convert.card import Card
from hrm_text.convert.huggingface import write_folder
from hrm_text.data.loader import Loader
from hrm_text.data.records import write_jsonl
from hrm_text.data.sample import sample_epochs
from hrm_text.data.tokenize import tokenize_files
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.draft import FILE
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.recipes.check_weights import check_weights
from hrm_text.recipes.draft_heads import SampledBatches, train_draft_head

CONFIG = ModelConfig(
    architecture="hrm", vocab_size=320, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=2,
    head_dim=16, inner_multiple=8, H_cycles=1, L_cycles=1,
)  # fmt: skip
ANSWER = "a, b, c, a, b, c, a, b, c."
TEXTS = ["What comes after a, b, c? " + ANSWER]
CARD = Card(name="w", config=CONFIG, dtype="float32", weights="", origin="")


def sample(folder: Path, tokenizer: Path, examples: int = 60) -> Path:
    write_jsonl(folder / "my.jsonl", [Example("direct", f"abc {n}", ANSWER) for n in range(examples)])
    tokenize_files([folder / "my.jsonl"], tokenizer, folder / "store")
    sample_epochs(folder / "store", folder / "sampled", [], 1, max_seq_len=65)
    return folder / "sampled"


def taught(sampled: Path) -> RecurrentLM:
    """A model that has learnt to say one thing."""
    model = build(CONFIG, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, _ in Loader(sampled, tokens_per_batch=256):
        (batch,) = step.batches
        spans = Spans.of_samples(torch.from_numpy(batch.sample_starts).diff(), torch.from_numpy(batch.prefix_lengths))
        ids, labels, positions = map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids))
        logits = model.lm_head(model(ids, positions, PlainAttention(spans, len(ids), torch.device("cpu"))))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ and sampled/."""
    folder = tmp_path_factory.mktemp("shared")
    train_tokenizer(iter(TEXTS), 290, folder / "bpe")
    tensors = taught(sample(folder, folder / "bpe")).state_dict()
    return write_folder(folder / "weights", CONFIG, tensors, torch.float32, folder / "bpe", CARD).parent


def test_a_trained_head_guesses_what_it_has_not_seen(shared: Path) -> None:
    seen: list[tuple[float, float]] = []
    report = train_draft_head(
        shared / "weights", shared / "sampled", minutes=1, guesses=2, batch_tokens=128, max_steps=60,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert report.steps == 60 == len(seen) and seen == sorted(seen) and {total for _, total in seen} == {60.0}
    first, second = report.acceptance
    assert first > 0.8 and second > 0.7
    assert report.tokens_per_pass == pytest.approx(1 + first + first * second)
    model, plain = (hrm_text.load(shared / "weights", drafts=drafts) for drafts in (2, None))
    assert (model.drafts, plain.drafts) == (2, 0), "a CPU gains nothing by guesses"
    prompts = ["abc 7", "abc 600", "c"]
    for prompt in prompts:
        assert model.generate([prompt], max_new_tokens=20) == plain.generate([prompt], max_new_tokens=20)
    assert model._engine is not None and plain._engine is not None
    status = model._engine.status
    assert status.accepted_tokens_total > status.drafted_tokens_total / 2
    assert status.steps_total < plain._engine.status.steps_total * 0.7


def test_the_folder_is_still_a_weights_folder(shared: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    model = build(CONFIG, seed=5)
    folder = write_folder(tmp_path / "weights", CONFIG, model.state_dict(), torch.float32, tokenizer_dir, CARD)
    (folder / FILE).write_bytes((shared / "weights" / FILE).read_bytes())
    pytest.importorskip("transformers")
    assert check_weights(folder).differences == []
    # Other weights take its place, and their choices are not what the head has learnt.
    write_folder(folder, CONFIG, model.state_dict(), torch.float32, tokenizer_dir, CARD)
    assert not (folder / FILE).exists()


@pytest.fixture(scope="module")
def tokenizer_dir(shared: Path) -> Path:
    return shared / "bpe"


def test_the_same_seed_gives_the_same_head(shared: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        train_draft_head(shared / "weights", shared / "sampled", guesses=1, batch_tokens=256, max_steps=2, seed=seed)
        heads.append((shared / "weights" / FILE).read_bytes())
    assert heads[0] == heads[1] != heads[2]


def test_held_out_batches_are_not_trained_on(shared: Path) -> None:
    batches = SampledBatches(shared / "sampled", shared / "weights", CONFIG, 128)
    stream = batches.shuffled(0)
    trained = {next(stream).input_ids.tobytes() for _ in range(2 * batches.num_trained_on)}
    held_out = {batch.input_ids.tobytes() for batch in batches.held_out()}
    assert (len(trained), len(held_out)) == (batches.num_trained_on, batches.num_held_out)
    assert len(held_out) > 0 and not trained & held_out


def test_data_that_do_not_fit(shared: Path, tmp_path: Path) -> None:
    other = train_tokenizer(iter(TEXTS), 300, tmp_path / "bpe")
    sampled = sample(tmp_path, other, 4)
    with pytest.raises(UserError, match="made with another tokenizer .* vocab_size is"):
        train_draft_head(shared / "weights", sampled)
    with pytest.raises(UserError, match="one batch of 4,096 tokens holds all samples"):
        train_draft_head(shared / "weights", shared / "sampled")
    short = dataclasses.replace(CONFIG, max_position_embeddings=32)
    with pytest.raises(UserError, match=r"samples of up to 65 tokens, .* sample with --max-seq-len 33"):
        SampledBatches(shared / "sampled", shared / "weights", short, 128)


def test_settings_out_of_range(shared: Path) -> None:
    with pytest.raises(UserError, match="minutes must be positive, found 0"):
        train_draft_head(shared / "weights", shared / "sampled", minutes=0)
    with pytest.raises(UserError, match="guesses must be from 1 to 7, found 8"):
        train_draft_head(shared / "weights", shared / "sampled", guesses=8)


def test_the_command_says_what_it_found_and_what_is_next(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["draft", str(shared / "weights"), str(shared / "sampled"), "--minutes", "0.005", "--batch-tokens", "256"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert "guess 3:" in told.out and "tokens a pass with 3 guesses:" in told.out
    assert f"hrm-text generate {shared / 'weights'} --device cuda" in told.err
    assert cli.main([*command, "--guesses", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["file"] == str(shared / "weights" / FILE) and len(values["acceptance"]) == 1
