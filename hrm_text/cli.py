"""The command line: every command is a function, its options are the function's parameters."""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from tyro.conf import FlagConversionOff, Positional, UseAppendAction, arg

from hrm_text.contracts import UserError

# Rooms are imported inside the commands, so that `--help` and a mistyped option answer at once.


def notes() -> Console:
    """Where people are told things: stderr, so that stdout holds results alone."""
    return Console(stderr=True)


def tell(text: str, style: str = "") -> None:
    """One line to people, as it is: a path may hold square brackets, and a line to copy must stay one line."""
    notes().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def quickstart(
    out: Path | None = None,
    preset: Literal["cpu", "gpu"] = "cpu",
    seed: int = 0,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Generate data, train, evaluate, export and report: the whole system in minutes.

    Interrupted and started again, it continues. Without --preset, it is for two CPU cores.

    Args:
        out: folder for everything it makes; runs/quickstart-PRESET if not given
        preset: cpu takes a laptop a few minutes; gpu one large GPU about eight
        seed: of the data and the initial weights
        json: print the outcome as one JSON object
    """
    from hrm_text.recipes.quickstart import quickstart as run

    outcome = run(out or Path(f"runs/quickstart-{preset}"), preset, seed, notes())
    if json:
        print_json(
            {key: outcome.get(key) for key in ("title", "seconds", "parameters", "tokens_seen", "stages", "tasks")}
        )


def data() -> None:
    """From sources to sampled epochs: sources, clean, tokenizer, tokenize, sample, inspect (`hrm-text data --help`)."""
    raise AssertionError("main() hands the commands below `data` on")


def data_sources() -> None:
    """List the sources of training records that this package can make itself."""
    from rich.text import Text

    from hrm_text.data.sources import SOURCES

    console = Console(soft_wrap=True)
    for source in SOURCES.values():
        ready = "ready" if source.is_available or source.needs is None else f"needs: {source.needs.how}"
        console.print(Text.assemble((source.name, "bold"), f"  {sum(source.files.values()):,} records  {ready}"))
        console.print(Text(f"    {source.description}. Conditions: {source.condition}. Licence: {source.licence}."))


def data_clean(
    sources: Positional[tuple[str, ...]], out: Path, scale: float = 1.0, seed: int = 0, workers: int = 2
) -> None:
    """Write the records of some sources: training records to OUT/train, held-out ones to OUT/held_out.

    Args:
        sources: names as `hrm-text data sources` lists them, or all
        out: folder for the records; files that are finished are kept
        scale: factor on the number of records of every source
        seed: of the draws
        workers: processes
    """
    from hrm_text.data.sources import build_gpu_mixture

    reports = build_gpu_mixture(
        out,
        seed,
        scale=scale,
        workers=workers,
        sources=None if sources == ("all",) else sources,
        on_progress=lambda report, done, total: tell(
            f"{done}/{total} {report.source}/{report.file}: {report.examples:,} records [{report.seconds:.1f} s]"
        ),
    )
    tell(f"{sum(report.examples for report in reports):,} records in {out}/train. Next:")
    tell(f"  hrm-text data tokenizer {out}/train --out {out}/tokenizer")


def data_tokenizer(
    records: Positional[tuple[Path, ...]], out: Path, vocab_size: int = 65_536, strict: bool = False
) -> None:
    """Train a byte-level BPE tokenizer on records.

    Args:
        records: JSONL or Parquet files, or folders of them
        out: folder for tokenizer.json
        vocab_size: entries, special tokens included
        strict: stop at the first bad record instead of counting it
    """
    from hrm_text.data.records import BadRecords, find_record_files, read_texts
    from hrm_text.data.tokenizer import tokenizer_info, train_tokenizer

    bad = BadRecords(strict=strict)
    with notes().status("training the tokenizer"):
        train_tokenizer(read_texts(find_record_files(records), bad), vocab_size, out)
    tell_of_bad_records(bad)
    tell(f"wrote {out}: {tokenizer_info(out)['vocab_size']:,} entries. Next:")
    paths = " ".join(map(str, records))
    tell(f"  hrm-text data tokenize {paths} --tokenizer {out} --out STORE")


def data_tokenize(
    records: Positional[tuple[Path, ...]],
    tokenizer: Path,
    out: Path,
    max_seq_len: int | None = None,
    strict: bool = False,
) -> None:
    """Turn records into token ids, one folder per file; finished folders are kept.

    Args:
        records: JSONL or Parquet files, or folders of them
        tokenizer: folder of the tokenizer
        out: folder for the token store
        max_seq_len: report prompts that leave no room for a response in so many tokens
        strict: stop at the first bad record instead of counting it
    """
    from hrm_text.data.tokenize import tokenize_files

    with progress_bar("tokenising", "bytes") as on_progress:
        summary = tokenize_files(
            records, tokenizer, out, strict=strict, max_seq_len=max_seq_len, on_progress=on_progress
        )
    tell_of_bad_records(summary.bad)
    reused = f", {summary.reused} of them kept from before" if summary.reused else ""
    counts = f"{summary.tokens:,} tokens of {summary.records:,} records in {summary.files} files{reused}"
    tell(f"wrote {out}: {counts}. Next:")
    tell(f"  hrm-text data sample {out} --out SAMPLED --rules RULES.yaml --epochs 1")


def data_sample(
    store: Positional[Path],
    out: Path,
    epochs: int,
    rules: Path | None = None,
    seed: int = 0,
    max_seq_len: int = 4097,
) -> None:
    """Draw epochs from a token store: what training reads.

    Args:
        store: folder that `hrm-text data tokenize` wrote
        out: folder for the epochs
        epochs: how many to draw
        rules: YAML list of rules by file-name prefix (max_per_file, repeat, long_context); without it every row once
        seed: the same seed gives the same bytes
        max_seq_len: most tokens of a prompt and its response together: the context and one more
    """
    from hrm_text.data.sample import read_rules, sample_epochs

    with progress_bar("sampling", "strata") as on_progress:
        chosen = read_rules(rules) if rules is not None else []
        summary = sample_epochs(store, out, chosen, epochs, seed, max_seq_len, on_progress=on_progress)
    for kind in ("short_response", "too_long", "truncated"):
        if count := sum(getattr(stratum, kind) for stratum in summary.strata):
            tell(f"{kind.replace('_', ' ')}: {count:,} rows")
    for rule in summary.unused_rules:
        tell(f"rule with prefix {rule!r} matched no file", "yellow")
    samples = ", ".join(f"{count:,}" for count in summary.samples_per_epoch)
    tell(f"wrote {out}: {samples} samples per epoch. Next:")
    tell("  hrm-text train CONFIG.yaml --data.sampled " + str(out))


def data_inspect(folder: Positional[Path], limit: int = 5, tokenizer: Path | None = None) -> None:
    """Show samples of a token store or of a sampled folder as text, special tokens visible.

    Args:
        folder: token store or sampled folder
        limit: how many samples
        tokenizer: its folder, in case it has moved
    """
    from hrm_text.data.inspect import inspect_folder

    if limit < 1:
        raise UserError(f"limit: expected at least 1 sample, found {limit}")
    for sample in inspect_folder(folder, limit, tokenizer):
        print(sample, end="\n\n")


def train(config: Positional[Path]) -> None:
    """Train as a YAML file says; --section.key VALUE overrides it (`hrm-text train CONFIG.yaml --help` lists all).

    Started again, it continues from the newest good checkpoint. Ctrl-C saves and stops.

    Args:
        config: YAML file of the run, such as those in configs/
    """
    train_with_overrides([str(config)])


def train_with_overrides(arguments: Sequence[str]) -> None:
    """The train command: its options are the settings of the YAML file it names."""
    from hrm_text.settings import from_mapping, read_yaml, with_options
    from hrm_text.train.config import TrainConfig

    path, options = Path(arguments[0]), list(arguments[1:])
    asks_for_help = not {"-h", "--help"}.isdisjoint(options)
    options = [option for option in options if option not in ("-h", "--help")]
    where = " ".join([str(path), *options])
    # Merged before they are read: a setting may depend on another, as the recurrence does on the architecture.
    settings = from_mapping(TrainConfig, with_options(read_yaml(path), options, where), where)
    if asks_for_help:
        show_settings(TrainConfig, settings, f"hrm-text train {path}")

    from hrm_text.train.console import Console as TrainConsole
    from hrm_text.train.hooks import Hook, JsonlMetrics, TensorBoard, WandB
    from hrm_text.train.loop import Trainer

    hooks: list[Hook] = [TrainConsole(notes()), JsonlMetrics(settings.run / "metrics.jsonl")]
    if settings.logging.tensorboard:
        hooks.append(TensorBoard(settings.run / "tensorboard"))
    if settings.logging.wandb_project is not None:
        hooks.append(WandB(settings.logging.wandb_project, settings.run.name))
    summary = Trainer(settings, hooks).run()
    if summary.outcome == "finished":
        tell(f"wrote {summary.checkpoint}. Next:")
        tell(f"  hrm-text export {settings.run} WEIGHTS_DIR")
    else:
        tell(f"to continue: hrm-text train {shlex.join(arguments)}")


def export(
    checkpoint: Positional[Path],
    weights_dir: Positional[Path],
    raw: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint's averaged weights as a weights folder, which Transformers loads too.

    Args:
        checkpoint: a checkpoint folder, or a run folder: then its newest good checkpoint
        weights_dir: folder to write
        raw: the weights as they are instead of their average
        dtype: of the written weights; the dtype of training if not given
        tokenizer: folder of the run's tokenizer, in case it has moved
    """
    from hrm_text.convert.huggingface import export as run

    say_what_is_next(run(checkpoint, weights_dir, raw=raw, dtype=dtype, tokenizer=tokenizer, warn=warn))


def import_reference(
    reference_checkpoint: Positional[Path],
    weights_dir: Positional[Path],
    tokenizer: Path | None = None,
    raw: bool = False,
) -> None:
    """Convert a training checkpoint of the reference implementation (torch DCP) to a weights folder.

    Args:
        reference_checkpoint: its fsdp2_epoch_<n> folder, or the folder that holds them: then the newest
        weights_dir: folder to write
        tokenizer: folder of the tokenizer it was trained with
        raw: the weights as they are instead of their average
    """
    from hrm_text.convert.reference import import_reference as run

    say_what_is_next(run(reference_checkpoint, weights_dir, tokenizer=tokenizer, raw=raw, warn=warn))


def generate(
    weights_dir: Positional[Path],
    prompt: Annotated[tuple[tuple[str, ...], ...], UseAppendAction, arg(metavar="TEXT [TEXT ...]")] = (),
    file: Path | None = None,
    condition: str = "direct",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_size: int = 128,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Answer prompts: from --prompt, from a file, or line by line from stdin.

    One prompt on a terminal is answered as it is made; several are answered together.

    Args:
        weights_dir: weights folder
        prompt: one or more prompts
        file: text file with a prompt on every line; - is stdin
        condition: tags such as direct, or synth,cot
        max_new_tokens: longest response
        temperature: 0 is greedy
        top_p: keep the likeliest tokens that together reach this probability
        seed: the same seed draws the same response
        device: cpu, cuda or mps
        dtype: to compute in
        batch_size: prompts answered together; each needs memory for its keys and values
        json: print one JSON object per prompt
    """
    prompts = [text for texts in prompt for text in texts]
    if file is not None or not prompts:
        prompts += read_prompts(file)
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, --file FILE or lines on stdin")
    from hrm_text.infer.engine import load

    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, found {batch_size}")
    model = load(weights_dir, device=available_device(device), dtype=dtype)
    model.batch_size = batch_size
    options: dict[str, Any] = {
        "condition": condition,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    if len(prompts) == 1 and not json:
        for piece in model.stream(prompts[0], **options):
            print(piece, end="", flush=True)
        print()
        return
    for asked, response in zip(prompts, model.generate(prompts, **options), strict=True):
        if json:
            print_json({"prompt": asked, "condition": condition, "response": response})
        else:
            print(response)


def eval_(
    weights_dir: Positional[Path],
    tasks: str,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Ask held-out questions and score the answers by exact match, with 95 % intervals and the chance level.

    Args:
        weights_dir: weights folder
        tasks: comma-separated names (add, add:direct, quickstart) and files of records (questions.jsonl)
        limit: most questions of a task
        seed: of the questions that are drawn
        device: cpu, cuda or mps
        dtype: to compute in
        json: print one JSON object per task
    """
    from hrm_text.eval.runner import evaluate
    from hrm_text.eval.tasks import load_tasks
    from hrm_text.infer.engine import load

    chosen = load_tasks([name.strip() for name in tasks.split(",")], limit=limit, seed=seed)
    model = load(weights_dir, device=available_device(device), dtype=dtype)
    with progress_bar("evaluating", "questions") as on_progress:
        evaluation = evaluate(model, chosen, on_progress=on_progress)
    for score in evaluation.scores:
        if json:
            print_json(dataclasses.asdict(score))
        else:
            print(
                f"{score.task:20} {score.accuracy:6.1%}  (95 %: {score.low:.1%} to {score.high:.1%}; "
                f"n = {score.n}; chance {score.chance:.1%})"
            )
    if not json and len(chosen) > 1:
        print(f"{'mean':20} {evaluation.mean_accuracy:6.1%}")


# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(file: Path | None) -> list[str]:
    """The lines of a file, or of stdin; blank ones are left out."""
    if file is None or str(file) == "-":
        if sys.stdin.isatty():
            return []
        text = sys.stdin.read()
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except IsADirectoryError:
            raise UserError(f"{file}: is a folder, expected a text file with a prompt on every line") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not valid UTF-8 ({error})") from None
    return [line for line in text.splitlines() if line.strip()]


def available_device(name: str) -> str:
    """The name of a device that is there; any other is an error that lists those that are."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, colon, number = name.partition(":")
    numbers = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind) or (colon and not (number.isdecimal() and int(number) < numbers)):
        choices = ", ".join(device for device, there in available.items() if there)
        raise UserError(f"device: {name!r} is not available here; choose from {choices}")
    return name


def show_settings(cls: type, settings: Any, prog: str) -> NoReturn:
    """Print every setting with what it is and its value here, and exit."""
    tyro.cli(cls, default=settings, args=["--help"], prog=prog, use_underscores=True, config=(FlagConversionOff,))
    raise AssertionError("--help exits")


def warn(text: str) -> None:
    """What does not stop a command, but should be known."""
    notes().print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def progress_bar(what: str, unit: str) -> Any:
    """A context manager that yields an on_progress(done, total) which draws a bar with rate and time left."""
    import contextlib

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def bar() -> Any:
        console = notes()
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=True),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def tell_of_bad_records(bad: Any) -> None:
    """Nothing is lost silently: say what was left out and why."""
    if bad.total:
        tell(bad.summary(), style="yellow")


def say_what_is_next(folder: Path) -> None:
    """What was written, and what to type now."""
    tell(f"wrote {folder}. Next:")
    tell(f"  hrm-text generate {folder} --prompt TEXT")


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False))


DATA_COMMANDS: dict[str, Callable[..., None]] = {
    "sources": data_sources,
    "clean": data_clean,
    "tokenizer": data_tokenizer,
    "tokenize": data_tokenize,
    "sample": data_sample,
    "inspect": data_inspect,
}

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "data": data,
    "train": train,
    "export": export,
    "import": import_reference,
    "generate": generate,
    "eval": eval_,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 for an error of the user's, 2 for a mistyped command, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"] and len(arguments) > 2 and not arguments[1].startswith("-"):
            train_with_overrides(arguments[1:])
        else:
            within_data = arguments[:1] == ["data"]
            commands, rest = (DATA_COMMANDS if within_data else COMMANDS), arguments[within_data:]
            check_command(rest, commands)
            tyro.extras.subcommand_cli_from_dict(
                commands,
                args=rest,
                prog="hrm-text data" if within_data else "hrm-text",
                description="From records to the epochs that training reads."
                if within_data
                else "Pretrain, evaluate, export and run HRM-Text models.",
            )
    except UserError as error:
        notes().print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hrm-text ... | head` is not an error
        return 0
    return 0


def check_command(arguments: Sequence[str], commands: Mapping[str, Any]) -> None:
    """An unknown command is an error that suggests the right one."""
    if arguments and arguments[0] not in commands and not arguments[0].startswith("-"):
        close = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown command {arguments[0]!r}: {hint}The commands are {', '.join(commands)}")


def escape(text: str) -> str:
    """Text whose square brackets are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)


if __name__ == "__main__":
    sys.exit(main())
