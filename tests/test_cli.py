from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hrm_text import cli
from hrm_text.data.procedural import generate
from hrm_text.data.records import write_jsonl

SECONDARY = [f"{group} {name}" for group, commands in cli.GROUPS.items() for name in commands]
BAD_LINES = [
    "not json",
    '{"condition": "direct", "instruction": "a"}',
    '{"condition": "guess", "instruction": "a", "response": "b"}',
]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def run(*arguments: Any) -> Outcome:
    """What the command line does, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def fails(*arguments: Any) -> str:
    """The one message of a command that ends with exit code 1."""
    outcome = run(*arguments)
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")


@dataclass
class Chain:
    """Everything from records to weights, made by the commands that each names as the next."""

    folder: Path
    outcomes: dict[str, Outcome]

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    for split in ("train", "held_out"):
        write_jsonl(folder / split / "tasks.jsonl", generate({"upper": 1}, 100, 0, split))
    (folder / "rules.yaml").write_text("- {prefix: '', max_per_file: 80}\n")
    settings = {
        "run": str(folder / "run"),
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16},
        "data": {"sampled": str(folder / "sampled"), "tokens_per_batch": 256},
        "optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 2}, "ema_decay": 0.5},
        "validation": {"sampled": str(folder / "sampled_held_out")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    outcomes: dict[str, Outcome] = {}

    def do(name: str, *arguments: Any) -> None:
        outcomes[name] = run(*arguments)
        assert outcomes[name].code == 0, outcomes[name].err

    do("tokenizer", "data", "tokenizer", folder / "train", "--out", folder / "tokenizer", "--vocab-size", 320)
    for split, store, sampled in (("train", "store", "sampled"), ("held_out", "store_held_out", "sampled_held_out")):
        do("tokenize", "data", "tokenize", folder / split, "--tokenizer", folder / "tokenizer", "--out", folder / store)
        rules = ["--rules", folder / "rules.yaml", "--max-seq-len", 65]
        do("sample", "data", "sample", folder / store, "--out", folder / sampled, "--epochs", 2, *rules)
    do("train", "train", folder / "run.yaml", "--optimizer.lr.peak", "1e-3", "--max-steps", 4)
    do("export", "export", folder / "run", folder / "weights")
    return Chain(folder, outcomes)


# --------------------------------------------------------------------------------------------------------- the chain --


def test_every_command_says_what_it_wrote_and_what_is_next(chain: Chain) -> None:
    folder, told = chain.folder, {name: outcome.err for name, outcome in chain.outcomes.items()}
    assert all(outcome.out == "" for outcome in chain.outcomes.values())
    assert f"wrote {folder}/tokenizer: " in told["tokenizer"]
    assert f"hrm-text data tokenize {folder}/train --tokenizer {folder}/tokenizer --out STORE" in told["tokenizer"]
    assert "tokens of 100 records in 1 files" in told["tokenize"]
    assert f"hrm-text data sample {folder}/store_held_out --out SAMPLED" in told["tokenize"]
    assert "80, 80 samples per epoch" in told["sample"]
    assert f"hrm-text train CONFIG.yaml --data.sampled {folder}/sampled_held_out" in told["sample"]
    assert "validation loss" in told["train"]
    assert f"wrote {folder}/run/checkpoints/step_00000004" in told["train"]
    assert f"hrm-text export {folder}/run WEIGHTS_DIR" in told["train"]
    assert f"hrm-text generate {folder}/weights --prompt TEXT" in told["export"]


def test_the_run_leaves_its_files_and_the_overridden_settings(chain: Chain) -> None:
    assert {path.name for path in chain.run.iterdir()} == {"checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}
    assert list((chain.run / "tensorboard").glob("events.*"))
    written = yaml.safe_load((chain.run / "config.yaml").read_text())
    assert written["optimizer"]["lr"]["peak"] == 1e-3
    assert written["max_steps"] == 4
    kinds = [json.loads(line)["kind"] for line in (chain.run / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["step"] * 4 + ["validation"]


def test_inspect_shows_stores_and_samples_with_their_special_tokens(chain: Chain) -> None:
    for folder in (chain.store, chain.sampled):
        outcome = run("data", "inspect", folder, "--limit", 2)
        assert outcome.out.count("<|im_start|>") == outcome.out.count("<|box_end|>") == 2
    assert "at least 1 sample, found -1" in fails("data", "inspect", chain.store, "--limit", -1)
    assert "expected a token store" in fails("data", "inspect", chain.train)


def test_finished_work_is_found_again(chain: Chain) -> None:
    arguments = ("--tokenizer", chain.tokenizer, "--out", chain.store)
    assert "1 of them kept from before" in run("data", "tokenize", chain.train, *arguments).err
    again = run("train", chain.folder / "run.yaml", "--optimizer.lr.peak", "1e-3", "--max-steps", 4)
    assert again.code == 0
    assert "finished after 4 of 4 steps" in again.err
    steps = (chain.run / "metrics.jsonl").read_text().count('"kind": "step"')
    assert steps == 4


def test_eval_scores_held_out_questions(chain: Chain) -> None:
    ask = ("eval", chain.weights, "--limit", 3, "--out", chain.folder / "eval")
    asked = run(*ask, "--tasks", "upper, upper:direct", "--json")
    scores = [json.loads(line) for line in asked.out.splitlines()]
    assert [(score["task"], score["n"]) for score in scores] == [("upper", 3), ("upper:direct", 3)]
    assert all(0 <= score["low"] <= score["strict"] <= score["high"] <= 1 for score in scores)
    table = run(*ask, "--tasks", "upper,upper:direct").out.splitlines()
    assert [line.split()[0] for line in table] == ["upper", "upper:direct", "mean"]
    assert "chance" in table[0]


# ---------------------------------------------------------------------------------------------------------- generate --


def responses(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_prompts_come_from_the_command_line_a_file_and_stdin(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["Say cat.", "Say dog loudly.", "Säg hund!"]
    options = ("--json", "--max-new-tokens", 4, "--condition", "direct")
    expected = responses(run("generate", chain.weights, "--prompt", *asked, *options))
    assert [answer["prompt"] for answer in expected] == asked
    assert {answer["condition"] for answer in expected} == {"direct"}
    repeated = [part for text in asked for part in ("--prompt", text)]
    assert responses(run("generate", chain.weights, *repeated, *options)) == expected
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(asked) + "\n")
    assert responses(run("generate", chain.weights, "--file", file, *options)) == expected
    for source in ([], ["--file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
        assert responses(run("generate", chain.weights, *source, *options)) == expected
    mixed = responses(run("generate", chain.weights, "--prompt", "Say cow.", "--file", file, *options))
    assert [answer["prompt"] for answer in mixed] == ["Say cow.", *asked]


def test_one_prompt_is_answered_as_it_is_made(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_text.infer.text_model import TextModel

    pieces: list[str] = []
    stream = TextModel.stream

    def observed(model: TextModel, prompt: str, **options: Any) -> Any:
        for piece in stream(model, prompt, **options):
            assert isinstance(sys.stdout, io.StringIO)
            assert sys.stdout.getvalue() == "".join(pieces)
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(TextModel, "stream", observed)
    options = ("--prompt", "Say cat.", "--temperature", 1, "--seed", 3, "--max-new-tokens", 8)
    streamed = run("generate", chain.weights, *options)
    assert len(pieces) > 2
    [answer] = responses(run("generate", chain.weights, *options, "--json"))
    assert streamed.out == answer["response"] + "\n"


def test_several_prompts_are_answered_a_line_each(chain: Chain) -> None:
    outcome = run("generate", chain.weights, "--prompt", "Say cat.", "Say dog.", "--max-new-tokens", 1)
    assert len(outcome.out.splitlines()) == 2


# ------------------------------------------------------------------------------------------------------------ errors --


def test_prompts_that_cannot_be_answered_are_errors(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("generate", chain.weights)
    assert "context is 64: no room for a response" in fails(*ask, "--prompt", "ok", "word " * 80)
    assert "context is 64: no room for a response" in fails(*ask, "--prompt", "word " * 80)
    message = fails(*ask, "--prompt", "a", "--condition", "direkt")
    assert "did you mean 'direct'" in message or "direct, cot, noisy, synth" in message
    assert "no such file" in fails(*ask, "--file", tmp_path / "none.txt")
    assert "is a folder" in fails(*ask, "--file", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    assert "not valid UTF-8" in fails(*ask, "--file", tmp_path / "latin.txt")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "no prompt: give --prompt TEXT" in fails(*ask)
    assert "max_new_tokens must be at least 1, found 0" in fails(*ask, "--prompt", "a", "--max-new-tokens", 0)
    assert "temperature must be" in fails(*ask, "--prompt", "a", "--temperature", -1)
    assert "no such folder, expected a weights folder" in fails("generate", tmp_path / "none", "--prompt", "a")


@pytest.mark.parametrize("device", ["tpu", "cuda", "cuda:0", "cpu:x", ""])
def test_a_device_that_is_not_there_lists_the_others(
    chain: Chain, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    expected = f"device: {device!r} is not available here; choose from cpu"
    assert fails("generate", chain.weights, "--prompt", "a", f"--device={device}") == expected
    assert fails("eval", chain.weights, "--tasks", "upper", f"--device={device}") == expected
    assert "choose from ['cpu']" in fails("train", chain.folder / "run.yaml", "--device", "cuda")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("uper", "unknown task 'uper': did you mean 'upper'? The tasks are quickstart, procedural, published, add, "),
        ("upper:cot", "task 'upper' has no condition 'cot'"),
        ("none.jsonl", "none.jsonl: no such file"),
    ],
)
def test_tasks_that_are_not_there_are_errors(chain: Chain, tasks: str, message: str) -> None:
    assert message in fails("eval", chain.weights, "--tasks", tasks)
    assert "at least 1 item per task, found -1" in fails("eval", chain.weights, "--tasks", "upper", "--limit", -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "unknown command 'tran': did you mean 'train'? The commands are quickstart, data, train, "),
        (["data", "tokenise"], "unknown command 'tokenise': did you mean 'tokenize'? The commands are sources, "),
        (["bench", "trian"], "unknown command 'trian': did you mean 'train'? The commands are train, decode, "),
        (["bench", "train", "--size", "XM"], "unknown size 'XM'; the sizes are tiny, "),
        (["bench", "train", "--blocks", "fusd"], "bench train: blocks: Input should be 'auto', 'plain', 'compiled' or"),
        (["bench", "train", "--compare", "block=plain"], "--compare: unknown key 'block'; did you mean 'blocks'?"),
        (
            ["bench", "train", "--compare", "plain"],
            "--compare: expected KEY=VALUE, such as blocks=compiled, found 'plain",
        ),
        (["data", "clean", "wordnt", "--out", "x"], "unknown source 'wordnt'"),
        (["data", "sample", "none", "--out", "x", "--epochs", "1"], "none"),
        (["data", "sample", "none", "--out", "x", "--epochs", "0"], "epochs is 0, expected at least 1"),
        (["data", "tokenizer", "none", "--out", "x"], "none: no such file or folder"),
        (["data", "tokenize", "none", "--tokenizer", "none", "--out", "x"], "none"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "none.yaml", "--seed", "1"], "none.yaml: no such file"),
        (["export", "none", "x"], "none: is not there; expected the folder of a training run"),
        (["import", "none", "x"], "none: no such folder; expected a checkpoint of the reference trainer"),
    ],
)
def test_what_is_misspelt_or_missing_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.micro_batch", "2"], "unknown key 'data.micro_batch'; did you mean 'micro_batches'?"),
        (["--modl.hidden_size", "2"], "unknown key 'modl'; did you mean 'model'?"),
        (["--data.micro-batches", "0"], "data.micro_batches: Input should be greater than or equal to 1 (found '0')"),
        (["--model.architecture", "hrmm"], "model.architecture: Input should be 'hrm', 'trm', "),
        (["--model.cycles", "3"], "cycles = 3 means nothing to architecture 'hrm'"),
        (["--seed"], "--seed has no value; settings are given as --section.key VALUE"),
        (["seed", "3"], "unexpected 'seed'; settings are given as --section.key VALUE"),
        (["--run.folder", "x"], "'run' is "),
        (["--optimizer.lr.peak", "fast"], "optimizer.lr.peak: Input should be a valid number"),
    ],
)
def test_settings_that_are_wrong_name_the_key(chain: Chain, options: list[str], message: str) -> None:
    told = fails("train", chain.folder / "run.yaml", *options)
    assert told.startswith(f"{chain.folder / 'run.yaml'} {' '.join(options)}: ")
    assert message in told


def test_every_kind_of_setting_can_be_overridden(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_text.recipes import train

    seen: list[Any] = []

    class NoTrainer:
        def __init__(self, config: Any, hooks: Any, world: Any, evaluator: Any) -> None:
            seen.append(config)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "Trainer", NoTrainer)
    options = "--model.architecture looped --optimizer.betas 0.8 0.9 --logging.tensorboard false --data.epochs=1"
    nothing = "--validation.sampled null --max-steps None --credit.k-min 3"
    assert run("train", chain.folder / "run.yaml", *options.split(), *nothing.split()).code == 130
    [config] = seen
    assert (config.model.architecture, config.model.cycles, config.model.H_cycles) == ("looped", 4, 0)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.logging.tensorboard is False
    assert (config.data.epochs, config.validation.sampled, config.max_steps) == (1, None, None)
    assert config.credit.k_min == 3


def test_bad_records_are_counted_by_kind_or_stop_the_command(chain: Chain, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    good = (chain.train / "tasks.jsonl").read_text()
    records.write_text(good + "\n".join(BAD_LINES))
    tokenize = ("data", "tokenize", records, "--tokenizer", chain.tokenizer, "--out", tmp_path / "store")
    train_tokenizer = ("data", "tokenizer", records, "--out", tmp_path / "tokenizer", "--vocab-size", 320)
    for command in (tokenize, train_tokenizer):
        assert f"{records}:101: not valid JSON" in fails(*command, "--strict")
        outcome = run(*command)
        assert outcome.code == 0
        assert "3 bad records skipped: 1 not_json, 1 missing_key, 1 unknown_tag" in outcome.err
        assert f"{records}:103: " in outcome.err
    assert "100 records in 1 files" in run(*tokenize).err


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(chain: Chain, tmp_path: Path) -> None:
    settings = ("--run", tmp_path / "run", "--max-steps", 2, "--checkpoint.every_steps", 1, "--logging.tensorboard", 0)
    assert run("train", chain.folder / "run.yaml", *settings).code == 0
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "rank_00000_00.safetensors").write_bytes(b"")
    outcome = run("export", tmp_path / "run", tmp_path / "weights", "--raw", "--dtype", "bfloat16")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: ")
    assert "Continuing from the previous good one" in outcome.err
    assert "for 1 of 2 steps" in (tmp_path / "weights" / "README.md").read_text()


# -------------------------------------------------------------------------------------------------------------- help --


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *SECONDARY])
def test_help_describes_every_command_and_option(command: str) -> None:
    outcome = run(*command.split(), "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.replace("│", " ").split())
    if command == "" or command in cli.GROUPS:
        for name in cli.GROUPS.get(command, cli.COMMANDS):
            assert f" {name} " in text
        return
    group, _, name = command.rpartition(" ")
    function = cli.GROUPS[group][name] if group else cli.COMMANDS[name]
    summary, _, described = (function.__doc__ or "").partition("\n")
    assert summary in text
    options = re.findall(r"^        (\w+): (.+)$", described, re.MULTILINE)
    assert {name for name, _ in options} == function.__annotations__.keys() - {"return"}
    for name, description in options:
        assert description in text, name


def test_help_of_a_run_lists_every_setting_with_its_value(chain: Chain) -> None:
    outcome = run("train", chain.folder / "run.yaml", "--max_steps", "7", "--help")
    assert outcome.code == 0
    for name in ("--model.hidden_size", "--optimizer.lr.peak", "--credit.k_min", "--logging.tensorboard"):
        assert name in outcome.out
    assert "(default: 7)" in outcome.out
    assert not (chain.folder / "7").exists()


def test_a_misspelt_option_suggests_the_right_one(chain: Chain) -> None:
    outcome = run("generate", chain.weights, "--promt", "a")
    assert outcome.code == 2
    assert "--prompt" in outcome.out + outcome.err
    outcome = run("quickstart", "--preset", "tpu")
    assert outcome.code == 2
    assert "cpu" in outcome.out + outcome.err and "gpu" in outcome.out + outcome.err


def test_sources_are_listed_and_cleaned(tmp_path: Path) -> None:
    listed = run("data", "sources")
    assert listed.code == 0
    assert "procedural" in listed.out and "Licence" in listed.out
    outcome = run("data", "clean", "procedural", "--out", tmp_path, "--scale", "1e-4", "--workers", 1)
    assert outcome.code == 0
    assert f"hrm-text data tokenizer {tmp_path}/train" in outcome.err
    assert list((tmp_path / "train" / "procedural").glob("*.jsonl"))


# ------------------------------------------------------------------------------------------------- the whole process --


def test_bench_compares_two_configurations(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--tokens", 64, "--steps", 2, "--warmup", 1, "--device", "cpu")
    compared = ("--compare", "attention=plain", "recompute=full")
    table = run("bench", "train", *options, *compared)
    assert table.code == 0, table.err
    for told in ("tokens/s", "ratio", "attention grouped", "attention plain", "recompute full"):
        assert told in table.out
    measured = [json.loads(line) for line in run("bench", "train", *options, *compared, "--json").out.splitlines()]
    assert [timing["settings"]["attention"] for timing in measured] == ["grouped", "plain"]
    assert all(timing["steps"] == 2 and timing["tokens_per_second"] > 0 for timing in measured)


def test_a_closed_pipe_and_ctrl_c_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def closed() -> None:
        raise BrokenPipeError

    for function, code in ((interrupted, 130), (closed, 0)):
        monkeypatch.setitem(cli.GROUPS["data"], "sources", function)
        assert run("data", "sources").code == code


def test_the_package_runs_as_a_module_without_importing_torch_for_an_error(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hrm_text", "tran"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: unknown command 'tran'")
    assert "| torch\n" not in ended.stderr
