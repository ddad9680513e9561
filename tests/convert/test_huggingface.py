from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hrm_text
from hrm_text.contracts import UserError
from hrm_text.convert.huggingface import export
from hrm_text.data.tokenizer import tokenizer_info, train_tokenizer
from hrm_text.infer.requests import Request, Sampling, Turn
from hrm_text.model.checkpoint_files import load_state
from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import read_model
from hrm_text.settings import to_mapping
from hrm_text.train.checkpoint import Saver
from hrm_text.train.optimizer import AdamAtan2

FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def config_of(**changes: Any) -> ModelConfig:
    return preset("tiny", vocab_size=512, max_position_embeddings=128, **changes)


def save_run(
    run: Path, tokenizer: Path, step: int = 40, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[RecurrentLM, AdamAtan2]:
    """A checkpoint as the trainer leaves it, whose averaged weights differ from the raw ones."""
    config = config_of(**changes)
    model = build(config, seed=step, dtype=dtype)
    info = tokenizer_info(tokenizer)
    with torch.no_grad():  # of ids that no text has, training leaves nothing: here, not even the untrained chance
        model.lm_head.weight[info["vocab_size"] :] = 0
    optimizer = AdamAtan2(model.named_parameters(), lr=0.01, ema_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = (parameter != 0).to(parameter.dtype)
    optimizer.step()
    state = {
        "step": step,
        "total_steps": 50,
        "tokens_seen": 12345,
        "skipped": 0,
        "tokenizer_info": info,
    }
    settings = {
        "model": to_mapping(config),
        "data": {"sampled": "data/sampled", "tokens_per_batch": 2048, "micro_batches": 2, "supervise": "response"},
        "optimizer": {
            "lr": {"peak": 0.01, "warmup_steps": 10, "decay": "constant", "floor": 0.1},
            "betas": [0.9, 0.95], "weight_decay": 0.1, "ema_decay": 0.5,
        },
        "credit": {"k_min": 2, "warmup_ratio": 0.2},
        "seed": 7, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    write_checkpoint(run, step, checkpoint_tensors(model, optimizer), state, settings)
    return model, optimizer


def checkpoint_tensors(model: RecurrentLM, optimizer: AdamAtan2) -> dict[str, Tensor]:
    """By the names of the layout."""
    tensors = {f"weights/{name}": buffer for name, buffer in model.named_buffers()}
    for group, value in optimizer.state_dict().items():
        if isinstance(value, Tensor):
            tensors[group] = value
        else:
            tensors |= {f"{group}/{name}": tensor for name, tensor in value.items()}
    return tensors


def write_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], settings: dict[str, Any]
) -> None:
    saver = Saver(run / "checkpoints", keep_last=3, keep_every=None, group=None)
    saver.begin(step, tensors, state, settings)
    saver.finished(wait=True)
    saver.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def exported(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    save_run(root / "run", tokenizer_dir)
    return export(root / "run", root / "weights", about_data="Sums and reversed words.")


# ------------------------------------------------------------------------------------------------------- the folder --


def test_the_folder_holds_the_averaged_weights_and_all_it_takes_to_use_them(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    model, optimizer = save_run(tmp_path / "run", tokenizer_dir)
    out = export(tmp_path / "run" / "checkpoints" / "step_00000040", tmp_path / "weights")
    assert out == tmp_path / "weights"
    assert names(out) == FILES
    assert names(tmp_path) == ["run", "weights"]
    found = read_model(out).state_dict()
    assert torch.equal(found.pop("model.z_L_init"), model.model.z_L_init)
    assert set(found) == set(optimizer.ema_weights())
    for name, average in optimizer.ema_weights().items():
        assert torch.equal(found[name], average)
    config = json.loads((out / "config.json").read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [6, 11, 5]
    assert config["dtype"] == "float32"
    assert (out / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_raw_weights_are_those_of_the_last_step(tokenizer_dir: Path, tmp_path: Path) -> None:
    model, _ = save_run(tmp_path / "run", tokenizer_dir)
    found = read_model(export(tmp_path / "run", tmp_path / "weights", raw=True)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_in_bfloat16_is_stored_so_unless_told_otherwise(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, optimizer = save_run(tmp_path / "run", tokenizer_dir, dtype=torch.bfloat16)
    out = export(tmp_path / "run", tmp_path / "weights")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for raw, group in ((False, optimizer.ema_weights()), (True, optimizer.state_dict()["weights"])):
        found = read_model(export(tmp_path / "run", out, raw=raw, dtype="float32")).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in group.items())  # not rounded on the way
    with pytest.raises(UserError, match="unknown dtype 'fp4'"):
        export(tmp_path / "run", out, dtype="fp4")


@pytest.mark.parametrize(
    "changes", [{"architecture": "looped"}, {"architecture": "trm_match_recurrence"}, {"norm": "post"}]
)
def test_baselines_are_read_back(changes: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    _, optimizer = save_run(tmp_path / "run", tokenizer_dir, **changes)
    loaded = hrm_text.load(export(tmp_path / "run", tmp_path / "weights"))
    assert loaded.config.architecture == changes.get("architecture", "hrm")
    assert torch.equal(loaded.module.lm_head.weight, optimizer.ema_weights()["lm_head.weight"])
    assert len(loaded.generate(["What is 1 + 1?"], max_new_tokens=3)) == 1
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "library_name: hrm-text" in card
    assert "AutoModelForCausalLM" not in card


# ----------------------------------------------------------------------------------------------------- Transformers --


def test_transformers_gives_our_logits_and_our_greedy_text(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = hrm_text.load(exported)
    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert type(theirs).__module__.startswith("transformers.models.hrm_text")  # not code from the folder
    for prompt in ("What is 12 + 7?", "reverse the word apple", "x", "The sum " * 9):
        ids = ours.prompt_format.prefix_ids("synth,cot", prompt)
        text = f"<|im_start|><|quad_end|><|object_ref_end|>{prompt}<|im_end|>"
        assert tokenizer(text)["input_ids"] == ids
        batch, prefix = torch.tensor([ids]), torch.tensor([len(ids)])
        with torch.no_grad():
            logits = theirs(batch, token_type_ids=torch.ones_like(batch)).logits
            causal = theirs(batch).logits
        assert relative(ours.logits(batch, prefix), logits) < 1e-5
        assert relative(ours.logits(batch, prefix * 0), causal) < 1e-5
        output = theirs.generate(batch, token_type_ids=torch.ones_like(batch), max_new_tokens=64, do_sample=False)
        expected = [token for token in output[0, len(ids) :].tolist() if token != 11]
        engine = ours.engine()
        engine.submit(Request((Turn(tuple(ids)),), 64, Sampling(logprobs=0)))
        pieces = []
        while engine.has_work:
            pieces += engine.step()
        assert [score.token_id for piece in pieces for score in piece.scores] == expected
        assert ours.generate([prompt], condition="synth,cot", max_new_tokens=64) == [
            tokenizer.decode(expected, skip_special_tokens=True)
        ]
    assert len(expected) == 64


def test_what_the_card_says_to_type_works(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    snippets = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    printed = []
    for snippet in snippets:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(snippet, {})
        printed.append(stdout.getvalue())
    assert printed[0] == printed[1] != "\n"


@pytest.mark.parametrize(("asked", "kept"), [(" synth, cot", "synth,cot"), ("direct", "direct"), (None, None)])
def test_the_condition_of_prompts_that_name_none_is_kept_and_disturbs_nobody(
    asked: str | None, kept: str | None, tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as theirs_logging

    theirs_logging.enable_propagation()  # or caplog sees nothing
    save_run(tmp_path / "run", tokenizer_dir)
    out = export(tmp_path / "run", tmp_path / "weights", condition=asked)
    assert json.loads((out / "generation_config.json").read_text()).get("condition") == kept
    assert hrm_text.load(out).default_condition == (kept or "direct")
    theirs: Any = AutoModelForCausalLM.from_pretrained(out)  # a warning fails the test
    theirs.generate(torch.tensor([[6, 8, 40, 7]]), attention_mask=torch.ones(1, 4), max_new_tokens=2)
    GenerationConfig.from_pretrained(out).validate(strict=True)
    theirs.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()).get("condition") == kept
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []
    theirs_logging.get_logger("transformers.generation").warning("a warning")
    assert caplog.records[-1].getMessage() == "a warning"  # it would have been seen
    theirs_logging.disable_propagation()


# ----------------------------------------------------------------------------------------------------------- errors --


def test_a_condition_that_does_not_exist_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown condition tag 'cott'"):
        export(tmp_path / "nowhere", tmp_path / "weights", condition="synth,cott")


def test_a_run_gives_its_newest_good_checkpoint(tokenizer_dir: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_run(tmp_path / "run", tokenizer_dir, step=step)
    with (tmp_path / "run/checkpoints/step_00000030/rank_00000_00.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    warnings: list[str] = []
    for place in ("run", "run/checkpoints"):
        out = export(tmp_path / place, tmp_path / "weights", warn=warnings.append)
        assert "| Steps | 20 of 50 |" in (out / "README.md").read_text()
    assert len(warnings) == 2 and "step_00000030/rank_00000_00.safetensors: damaged" in warnings[0]
    with pytest.raises(UserError, match=r"rank_00000_00\.safetensors: damaged, found SHA-256"):
        export(tmp_path / "run/checkpoints/step_00000030", tmp_path / "weights")


def test_a_place_without_a_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: is not there; expected the folder of a training run, or one of its"):
        export(tmp_path / "nowhere", tmp_path / "weights")
    with pytest.raises(UserError, match="holds no checkpoint; expected the folder of a training run"):
        export(tmp_path, tmp_path / "weights")


def test_a_checkpoint_of_another_shape_than_its_config_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    model, optimizer = save_run(tmp_path / "run", tokenizer_dir)
    saved = load_state(tmp_path / "run/checkpoints/step_00000040")
    saved.config["model"]["num_layers"] = 4
    tensors = checkpoint_tensors(model, optimizer)
    write_checkpoint(tmp_path / "run", 41, tensors, saved.state, saved.config)
    with pytest.raises(UserError, match="step_00000041: 8 tensors are missing.*belong to different models"):
        export(tmp_path / "run", tmp_path / "weights")
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema/")}
    write_checkpoint(tmp_path / "run", 42, without, saved.state, saved.config)
    with pytest.raises(UserError, match="step_00000042: holds no averaged weights; --raw"):
        export(tmp_path / "run", tmp_path / "weights")
    assert names(tmp_path) == ["run"]


def test_the_tokenizer_must_be_the_runs(tokenizer_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, moved)
    save_run(tmp_path / "run", moved)
    shutil.rmtree(moved)
    with pytest.raises(
        UserError, match="tokenizer: the run's tokenizer is not there; name its folder with --tokenizer"
    ):
        export(tmp_path / "run", tmp_path / "weights")
    export(tmp_path / "run", tmp_path / "weights", tokenizer=tokenizer_dir)
    other = train_tokenizer(iter(["abc abc"]), 288, tmp_path / "other")
    with pytest.raises(
        UserError, match="not the tokenizer that the run was trained with: vocab_size is 288, in the run 310"
    ):
        export(tmp_path / "run", tmp_path / "weights", tokenizer=other)


def test_a_folder_with_anything_else_is_never_replaced(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tokenizer_dir)
    out = export(tmp_path / "run", tmp_path / "weights")
    export(tmp_path / "run", out)  # a weights folder is
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"weights: holds thesis\.tex, which would be lost; choose another folder"):
        export(tmp_path / "run", out)
    assert names(out) == sorted([*FILES, "thesis.tex"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: holds file, which would be lost"):
        export(tmp_path / "run", tmp_path / "file")


def test_a_full_disk_leaves_the_old_folder(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "run", tokenizer_dir)
    out = export(tmp_path / "run", tmp_path / "weights")
    before = (out / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hrm_text.model.weights.save_tensors", full)
    with pytest.raises(UserError, match="weights: the disk is full; nothing that existed was changed"):
        export(tmp_path / "run", out, raw=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == ["run", "weights"]
