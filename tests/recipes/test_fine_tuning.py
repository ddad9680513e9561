"""Fine-tuning from end to end: `hrm-text train configs/sft.yaml --data.records ...`, resumed, exported, asked."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
import yaml
from torch import Tensor

from hrm_text.cli import main
from hrm_text.contracts import UserError
from hrm_text.convert.huggingface import export
from hrm_text.data.procedural import generate
from hrm_text.data.records import write_jsonl
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.infer.text_model import load
from hrm_text.model.checkpoint_files import find_checkpoint, load_state, read_tensors
from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import merged
from hrm_text.model.origin import checksum, find_origin, model_tensors
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.recipes.train import train
from hrm_text.recipes.tuning_data import prepared
from hrm_text.settings import from_mapping, read_yaml
from hrm_text.train.config import TrainConfig
from hrm_text.train.hooks import Hook, StepRecord
from hrm_text.train.loop import Trainer
from hrm_text.train.starting import train_config

SFT = Path(__file__).parents[2] / "configs" / "sft.yaml"
TASKS = {"upper": 1.0, "repeat": 1.0}
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
RANK = {"rank": 4, "alpha": 8.0}
Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ to start from, and my.jsonl."""
    folder = tmp_path_factory.mktemp("shared")
    texts = (text for each in generate(TASKS, 200, 1) for text in (each.instruction, each.response))
    train_tokenizer(texts, 320, folder / "weights")
    config = from_mapping(ModelConfig, SIZES | {"vocab_size": 512, "max_position_embeddings": 64}, "test")
    special = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    write_weights(folder / "weights", config, build(config, seed=3).state_dict(), torch.float32, special)
    write_jsonl(folder / "my.jsonl", generate(TASKS, 40, 0))
    return folder


@pytest.fixture
def values(shared: Path, tmp_path: Path) -> Values:
    """configs/sft.yaml, small and quick."""

    def make(run: str = "run", **changes: Any) -> dict[str, Any]:
        found = read_yaml(SFT)
        found |= {"run": str(tmp_path / run), "init": str(shared / "weights"), "device": "cpu", "dtype": "float32"}
        found["data"] |= {"records": str(shared / "my.jsonl"), "tokens_per_batch": 128, "micro_batches": 2, "epochs": 2}
        found["optimizer"] |= {"lr": {"peak": 1e-3, "warmup_steps": 0, "decay": "cosine", "floor": 0.1}}
        found |= {"logging": {"tensorboard": False}, "checkpoint": {"every_steps": 3}}
        return found | changes

    return make


class StopAfter(Hook):
    """Asks the run to stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            signal.raise_signal(signal.SIGINT)


def run(values: dict[str, Any], *hooks: Hook) -> Path:
    """Train, or go on; the folder of the run."""
    settings: TrainConfig = train_config(values, "test")
    Trainer(prepared(settings), hooks).run()
    return settings.run


def state(folder: Path) -> dict[str, Tensor]:
    return read_tensors(find_checkpoint(folder, pytest.fail))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_command_trains_upon_records(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--run", str(tmp_path / "run"), "--init", str(shared / "weights"), "--device", "cpu"]
    small = ["--data.tokens_per_batch", "128", "--data.epochs", "2", "--logging.tensorboard", "false"]
    records = ["--data.records", str(shared / "my.jsonl"), "--validation.share", "0.2"]
    assert main(["train", str(SFT), *records, *where, *small]) == 0
    told = capsys.readouterr().err
    assert "records are held out and validated on" in told and "hrm-text export" in told
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in metrics if each["kind"] == "step"]
    assert [each["k"] for each in steps] == [5] * len(steps)  # all of K from the first step on
    assert steps[0]["lr"] == 3e-5 and steps[-1]["lr"] == pytest.approx(3e-6)
    assert [each["kind"] for each in metrics].count("validation") == 1
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["init"] == str(shared / "weights") and recorded["model"]["hidden_size"] == 32
    # A second start has nothing left to do; the exported model answers.
    assert main(["train", str(SFT), *records, *where, *small]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tuned")]) == 0
    assert main(["generate", str(tmp_path / "tuned"), "--prompt", "Upper case a b", "--max-new-tokens", "4"]) == 0
    base, tuned = (find_origin(folder).weights() for folder in (shared / "weights", tmp_path / "tuned"))
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert set(base) - set(changed) == {"model.z_L_init"}


def test_the_first_loss_is_that_of_the_weights(values: Values, shared: Path) -> None:
    """Of the untouched weights, by another way to the same number."""
    losses: list[float] = []

    class Losses(Hook):
        def on_step(self, record: StepRecord) -> None:
            losses.append(record.loss)

    first = values(max_steps=1)
    run(first, Losses())
    trainer = Trainer(prepared(train_config(first | {"run": first["run"] + "2"}, "test")))
    step = trainer.loader.load(0, 0)
    module = load(shared / "weights").module
    total = torch.zeros((), dtype=torch.float64)
    for batch in step.batches:
        starts = batch.sample_starts
        for start, end, prefix in zip(starts[:-1], starts[1:], batch.prefix_lengths, strict=True):
            ids = torch.from_numpy(batch.input_ids[start:end])[None]
            logits = module.logits(ids, torch.tensor([prefix]))[0].double()
            labels = torch.from_numpy(batch.labels[start:end])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert losses == [pytest.approx(total.item() / step.supervised, rel=1e-5)]


@pytest.mark.parametrize("lora", [{}, RANK], ids=["full", "lora"])
def test_resume_is_invisible(values: Values, shared: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    whole = state(run(values("whole", lora=lora)))
    assert int(whole["step"]) > 6
    origin = shutil.copytree(shared / "weights", tmp_path / "origin")
    cut = values("cut", lora=lora) | {"init": str(origin)}
    for step in (2, 5):
        run(cut, StopAfter(step))
    if not lora:
        shutil.rmtree(origin)  # what a run that trains all weights started from is needed no more
    assert_same(state(run(cut)), whole)


def test_other_data_than_before_is_an_error(values: Values, shared: Path, tmp_path: Path) -> None:
    mine = shutil.copyfile(shared / "my.jsonl", tmp_path / "mine.jsonl")
    found = values()
    found["data"]["records"] = str(mine)
    run(found, StopAfter(2))
    with mine.open("a") as file:
        file.write('{"condition": "direct", "instruction": "a", "response": "b"}\n')
    with pytest.raises(UserError, match=r"begun with other records or settings: mine.jsonl has changed"):
        run(found)


def test_a_run_starts_from_the_averages_of_another(values: Values, tmp_path: Path) -> None:
    first = run(values("first"))
    averaged = model_tensors(find_checkpoint(first, pytest.fail))[1]
    second = values("second", init=str(first), max_steps=1)
    second["data"] = dict(second["data"])
    trainer = Trainer(prepared(train_config(second, "test")))
    begun = trainer.training.state()
    for name, weight in averaged.items():
        assert torch.equal(begun[f"weights/{name}"], weight), name
    assert int(begun["step"]) == 0 and trainer.step == 0


def test_another_tokenizer_is_an_error(values: Values, tmp_path: Path) -> None:
    """Data of one tokenizer, weights of another with the same number of entries."""
    other = train_tokenizer(iter(["quite another text", "of other words entirely"] * 3), 300, tmp_path / "other")
    sampled = prepared(
        from_mapping(
            TrainConfig,
            values("made", init=None, model=SIZES | {"max_position_embeddings": 64})
            | {"data": values()["data"] | {"tokenizer": str(other)}},
            "test",
        )
    ).data.sampled
    given = values()
    given["data"] |= {"records": None, "sampled": str(sampled)}
    with pytest.raises(UserError, match="is not that of the weights to start from"):
        Trainer(train_config(given, "test"))
    named = values()
    named["data"] |= {"tokenizer": str(other)}
    with pytest.raises(UserError, match=r"data.tokenizer .*other is another one than that of the weights"):
        prepared(train_config(named, "test"))


# ------------------------------------------------------------------------------------------------------- adapters --


def test_a_checkpoint_of_adapters_holds_them_alone_and_names_its_base(values: Values, shared: Path) -> None:
    folder = find_checkpoint(run(values(lora=RANK)), pytest.fail)
    saved, tensors = load_state(folder), read_tensors(folder)
    assert {name.rpartition(".")[2] for name in tensors if name != "step"} == {"lora_A", "lora_B"}
    assert {name.partition("/")[0] for name in tensors} == {"weights", "exp_avg", "exp_avg_sq", "ema", "step"}
    weights = find_origin(shared / "weights").weights()
    assert saved.state["base"] == {"path": str((shared / "weights").resolve()), "sha256": checksum(weights)}


@pytest.mark.parametrize("raw", [False, True])
def test_export_merges(values: Values, shared: Path, tmp_path: Path, raw: bool) -> None:
    folder = run(values(lora=RANK))
    out = export(folder, tmp_path / "tuned", raw=raw)
    settings = train_config(values(lora=RANK), "test")
    base, tensors = find_origin(shared / "weights").weights(), state(folder)
    group = "weights/" if raw else "ema/"
    adapters = {name.removeprefix(group): tensor for name, tensor in tensors.items() if name.startswith(group)}
    expected = merged(base, adapters, settings.lora, settings.model)
    assert_same(find_origin(out).weights(), expected)
    assert {name for name in base if not torch.equal(base[name], expected[name])} == {n for n in base if "layers" in n}
    if not raw:  # a checkpoint may be asked without exporting it
        ids, prefixes = torch.arange(12)[None], torch.tensor([5])
        assert torch.equal(load(folder).logits(ids, prefixes), load(out).logits(ids, prefixes))


def test_a_base_that_moved_or_changed_is_an_error(values: Values, shared: Path, tmp_path: Path) -> None:
    origin = shutil.copytree(shared / "weights", tmp_path / "origin")
    given = values(lora=RANK, init=str(origin))
    folder = run(given, StopAfter(2))
    kept = (origin / "model.safetensors").read_bytes()
    (origin / "model.safetensors").write_bytes(kept[:-4] + b"\x00\x00\x80\x3f")
    for action in (lambda: export(folder, tmp_path / "tuned"), lambda: run(given)):
        with pytest.raises(UserError, match=rf"trained upon the weights at {origin}, and these are other weights now"):
            action()
    origin.rename(tmp_path / "moved")
    for action in (lambda: export(folder, tmp_path / "tuned"), lambda: run(given)):
        with pytest.raises(UserError, match=rf"weights at {origin}, which cannot be read: .*Put them back there"):
            action()
    (tmp_path / "moved").rename(origin)
    (origin / "model.safetensors").write_bytes(kept)
    assert export(folder, tmp_path / "tuned").is_dir()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": RANK | {"alpha": 4.0}}, "was trained otherwise: lora.alpha is 8.0 there and 4.0 here"),
        ({"lora": {}}, "was trained otherwise: lora.rank is 4 there and 0 here; lora.alpha is 8.0 there and 16.0 here"),
    ],
)
def test_adapters_go_on_as_they_began(values: Values, changes: dict[str, Any], told: str) -> None:
    run(values(lora=RANK), StopAfter(2))
    with pytest.raises(UserError, match=told):
        run(values(**changes))


def test_the_recipe_tells_what_it_made(values: Values, shared: Path) -> None:
    told = io.StringIO()
    train(train_config(values(max_steps=1), "test"), rich.console.Console(file=told, width=400))
    assert "40 records of" in told.getvalue()
