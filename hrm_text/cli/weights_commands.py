"""The commands about a weights folder: export, import, generate, eval."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from hrm_text.cli.terminal import print_json, progress_bar, tell, warn
from hrm_text.contracts import UserError


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


def say_what_is_next(folder: Path) -> None:
    """What was written, and what to type now."""
    tell(f"wrote {folder}. Next:")
    tell(f"  hrm-text generate {folder} --prompt TEXT")
