"""The commands about a weights folder: export, import, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from hrm_text.cli.terminal import print_json, progress_bar, tell, warn
from hrm_text.contracts import UserError


def export(
    checkpoint: Positional[Path],
    weights_dir: Positional[Path | None] = None,
    raw: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    tokenizer: Path | None = None,
    condition: str | None = None,
    check: bool = False,
) -> None:
    """Write a checkpoint's averaged weights as a weights folder, which Transformers loads too.

    With --check alone (`hrm-text export --check WEIGHTS_DIR`) a weights folder that is there already is compared.

    Args:
        checkpoint: a checkpoint folder, or a run folder: then its newest good checkpoint
        weights_dir: folder to write
        raw: the weights as they are instead of their average
        dtype: of the written weights; the dtype of training if not given
        tokenizer: folder of the run's tokenizer, in case it has moved
        condition: of prompts that name none, such as direct, or synth,cot; kept in the folder; direct if not given
        check: open the folder with Transformers too and compare logits, text and token ids; a difference is an error
    """
    if weights_dir is not None:
        from hrm_text.convert.huggingface import export as run

        options: dict[str, Any] = {"raw": raw, "dtype": dtype, "tokenizer": tokenizer, "condition": condition}
        folder = run(checkpoint, weights_dir, **options, warn=warn)
    elif not check:
        raise UserError("export needs the folder to write: hrm-text export CHECKPOINT WEIGHTS_DIR")
    elif raw or dtype or tokenizer or condition:
        raise UserError(
            "--check of a folder that is there writes nothing: leave --raw, --dtype, --tokenizer and --condition out, "
            "or name the folder to write (hrm-text export CHECKPOINT WEIGHTS_DIR --check)"
        )
    else:
        folder = checkpoint
    if check:
        compare_with_transformers(folder)
    if weights_dir is not None:
        say_what_is_next(folder)


def compare_with_transformers(folder: Path) -> None:
    """Print how the folder fares there; a difference is an error that names it."""
    from rich.console import Console

    from hrm_text.recipes.check_weights import as_table, check_weights

    outcome = check_weights(folder)
    Console().print(as_table(outcome))
    for trap in outcome.traps:
        warn(trap)
    if outcome.differences:
        named = "; ".join(f"{finding.what}: {finding.result}" for finding in outcome.differences)
        raise UserError(f"{folder}: Transformers {outcome.transformers} does not read it as hrm-text does. {named}")


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
    condition: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = (),
    seed: int = 0,
    h_cycles: int | None = None,
    l_cycles: int | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Literal["none", "int8"] = "none",
    kv_cache: Literal["auto", "int8"] = "auto",
    batch_size: int = 128,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Answer prompts: from --prompt, from a file, or line by line from stdin.

    One prompt on a terminal is answered as it is made; several are answered together.

    Args:
        weights_dir: weights folder
        prompt: one or more prompts
        file: text file with a prompt on every line; - is stdin
        condition: tags such as direct, or synth,cot; the folder's own if not given
        max_new_tokens: longest response
        temperature: 0 is greedy
        top_p: keep the likeliest tokens that together reach this probability
        top_k: keep so many of the likeliest tokens; 0 keeps all
        min_p: keep the tokens with this share of the likeliest one's probability
        repetition_penalty: above 1, tokens that are there already count for less
        stop: end before this text; may be given again
        seed: the same seed draws the same response
        h_cycles: rounds of the recurrence; as many as in training if not given
        l_cycles: fast calls in each of them; as many as in training if not given
        device: cpu, cuda or mps
        dtype: to compute in
        quantize: int8 keeps the weights of the blocks in 8 bits
        kv_cache: int8 keeps keys and values in 8 bits
        batch_size: prompts answered together; each needs memory for its keys and values
        json: print one JSON object per prompt
    """
    prompts = [text for texts in prompt for text in texts]
    if file is not None or not prompts:
        prompts += read_prompts(file)
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, --file FILE or lines on stdin")
    from hrm_text.infer.text_model import load

    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, found {batch_size}")
    model = load(
        weights_dir,
        device=available_device(device),
        dtype=dtype,
        quantize=quantize,
        kv_cache=kv_cache,
        h_cycles=h_cycles,
        l_cycles=l_cycles,
    )
    model.batch_size = batch_size
    condition = condition or model.default_condition
    options: dict[str, Any] = {
        "condition": condition,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    if len(prompts) == 1 and not json:
        for piece in model.stream(prompts[0], **options):
            print(piece, end="", flush=True)
        print()
        return
    with progress_bar("answering", "prompts") as on_progress:
        responses = model.generate(prompts, **options, on_progress=on_progress)
    for asked, response in zip(prompts, responses, strict=True):
        if json:
            print_json({"prompt": asked, "condition": condition, "response": response})
        else:
            print(response)


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
