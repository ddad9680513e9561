"""The command eval: benchmarks, drawn problems or records, asked of one model or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from hrm_text.cli.terminal import print_json, progress_bar, tell
from hrm_text.cli.weights_commands import available_device

MOST_SUBJECTS = 12
"""Subjects of a task that are shown; all are in results.json."""


def eval_(
    weights_dir: Positional[Path],
    tasks: str,
    limit: int | None = None,
    conditions: str = "",
    against: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    mixture: Path | None = None,
    seed: int = 0,
    batch: int = 128,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Literal["none", "int8"] = "none",
    kv_cache: Literal["auto", "int8"] = "auto",
    allow_code: bool = False,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Ask benchmarks or held-out problems and score the answers, with 95 % intervals and the chance level.

    Killed and started again, it goes on where it stopped. Strict scores count what cannot be read as wrong; published
    ones follow the rules of the published protocol.

    Args:
        weights_dir: weights folder, training run or checkpoint
        tasks: comma-separated names (gsm8k, published, quickstart, add:direct, gsm8k:synth+cot) and files of records
            (questions.jsonl)
        limit: most questions of a task: the same ones for every model
        conditions: a grid: direct,cot,synth+cot asks every task three times; each under its own if not given
        against: other weights that are asked the same, and compared question by question
        data: folder with the benchmarks' files, DATA/gsm8k/test.jsonl and so on; the Hugging Face hub if not given
        out: folder for results.json, answers.jsonl and the report; one below runs/eval if not given, a different one
            for whatever changes a score
        mixture: sampled folder the model was trained upon, which tells held-in from held-out, or "released"; what a
            training run names if not given, else unknown
        seed: of the questions that are drawn, of --limit and of responses that are sampled
        batch: questions answered together; each needs memory for its keys and values
        device: cpu, cuda or mps
        dtype: to compute in
        quantize: int8 keeps the weights of the blocks in 8 bits
        kv_cache: int8 keeps keys and values in 8 bits
        allow_code: score tasks by running, in a sandbox, what the model wrote
        json: print one JSON object per task and condition, and with --against one per comparison
    """
    from hrm_text.recipes.evaluation import Settings, compare_weights, evaluate_weights

    settings = Settings(
        tasks=_split(tasks),
        conditions=tuple(condition.replace("+", ",") for condition in _split(conditions)),
        limit=limit,
        seed=seed,
        data=data,
        mixture=mixture,
        batch=batch,
        device=available_device(device),
        dtype=dtype,
        quantize=quantize,
        kv_cache=kv_cache,
        allow_code=allow_code,
    )
    rows: Sequence[Mapping[str, Any]] = []
    with progress_bar("evaluating", "responses") as on_progress:
        if against is None:
            outcomes = [evaluate_weights(weights_dir, settings, out, on_progress=on_progress, say=tell)]
        else:
            *outcomes, rows = compare_weights(weights_dir, against, settings, out, on_progress=on_progress, say=tell)
    for outcome in outcomes:
        show_scores(outcome.results["scores"], json=json)
        if not json:
            show_speed(outcome.results["speed"])
    for row in rows:
        show_comparison(row, json=json)
    tell(f"wrote {outcomes[0].out}/results.json, answers.jsonl and report.md")
    tell(f"open {outcomes[0].out}/report.html to read the answers")


def show_scores(scores: Sequence[Mapping[str, Any]], *, json: bool) -> None:
    """A line per task and condition, with the subjects below; the mean of all where there are several."""
    for score in scores:
        if json:
            print_json(score)
            continue
        print(
            f"{score['task']:20} {score['condition']:10} {score['strict']:6.1%}  "
            f"(95 %: {score['low']:.1%} to {score['high']:.1%}; published {score['published']:.1%}; "
            f"n = {score['n']}; chance {score['chance']:.1%}; held-{score['held']}; "
            f"unreadable {score['unreadable']:.1%}, truncated {score['truncated']:.1%}; "
            f"{score['mean_tokens']:.1f} tokens)"
        )
    if json:
        return
    for score in scores:
        for name, value in score["also"].items():
            print(f"  {score['task']} {name}: {value:.1%}")
        for name, subject in list(score["subjects"].items())[:MOST_SUBJECTS]:
            print(f"  {name:30} {subject['strict']:6.1%}  published {subject['published']:.1%}  n = {subject['n']}")
        if (left := len(score["subjects"]) - MOST_SUBJECTS) > 0:
            print(f"  and {left} subjects more")
        for what, share in (
            ("filled the context and were not asked", score["no_room"]),
            ("had fewer examples than the protocol's", score["shortened"]),
        ):
            if share:
                tell(f"{score['task']}: {share:.1%} of the questions {what}", style="yellow")
    if len(scores) > 1:
        print(f"{'mean':20} {'':10} {sum(score['strict'] for score in scores) / len(scores):6.1%}")


def show_speed(speed: Mapping[str, float]) -> None:
    """One line about the asking, unless all was there already."""
    if speed["seconds"]:
        busy = ""
        if speed["steps"] > speed["steps_of_tail"]:
            busy = f"; {speed['busy_slots']:.1%} of {speed['batch']:.0f} slots busy until the tail"
        tell(
            f"{speed['seconds']:.1f} s, {speed['tokens_per_second']:,.0f} tokens/s of responses, "
            f"{speed['prompt_tokens_per_second']:,.0f} of prompts{busy}"
        )


def show_comparison(row: Mapping[str, Any], *, json: bool) -> None:
    """A line: both scores, their difference, and how often equal models would differ so much."""
    if json:
        print_json(row)
        return
    pairs = row["paired"]
    print(
        f"{row['task']:20} {row['condition']:10} {row['first']:6.1%} against {row['second']:.1%}: "
        f"difference {pairs['difference']:+.1%} (95 %: {pairs['low']:+.1%} to {pairs['high']:+.1%}), better on "
        f"{pairs['first_better']} and {pairs['second_better']} of {pairs['n']}, p = {pairs['p']:.3g}"
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
