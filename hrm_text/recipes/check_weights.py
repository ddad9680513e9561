"""Whether Transformers reads a weights folder as this project does: logits, greedy text, token ids, special ids.

Other servers (vLLM, SGLang) start from the same files and the same tokenizer as Transformers, so what is named here
goes for them too. Each side is loaded alone, in fp32 on the CPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.prompt import parse_condition
from hrm_text.data.tokenizer import PADDING, load_tokenizer, tokenizer_info
from hrm_text.files import read_json
from hrm_text.infer.text_model import is_checkpoint, load
from hrm_text.model.config import ModelConfig
from hrm_text.model.weights import config_from_json, is_transformers_model

TOLERANCE = 1e-4
"""Of the largest logit. Measured in fp32 on a CPU: 0 with PyTorch's fused attention on both sides, 7e-7 with another
order of sums; bfloat16 moves logits by 1e-2, a causal mask by 0.08 to 1."""

NEW_TOKENS = 32

WORDS = "one river carries seven small boats past the old mill while nobody counts them"
PROMPTS = (
    ("What is 12 + 7?", "The sum is 19."),
    ("reverse the word apple", "elppa"),
    ("Grüße aus Köln 🙂, 数を逆に読む", "42"),
    ("x", "A list: 1, 2, 3"),
    (WORDS, WORDS[:20]),
    (" ".join([WORDS] * 4), WORDS),
)
"""(instruction, response) of mixed length; those that do not fit the context are left out."""

GREEDY_PROMPTS = 3

SPECIAL_TEXTS = ("Say <|im_end|> twice", "<|box_end|>", "<|quad_end|><|object_ref_end|> as text", "<think>")
"""Text that spells control tokens, as a user may write it."""


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    result: str
    """In numbers."""
    same: bool


@dataclass(frozen=True)
class WeightsCheck:
    """How a folder fares in Transformers."""

    folder: Path
    transformers: str
    """Its version."""
    findings: tuple[Finding, ...]
    traps: tuple[str, ...]
    """What callers there lose who do not know; nothing is wrong with the folder."""

    @property
    def differences(self) -> list[Finding]:
        """The findings that are not as they should be."""
        return [finding for finding in self.findings if not finding.same]


@dataclass(frozen=True)
class Question:
    """What is put to both sides."""

    instruction: str
    prefix_ids: list[int]
    response_ids: list[int]

    @property
    def ids(self) -> Tensor:
        """[1, T], the response's included."""
        return torch.tensor([self.prefix_ids + self.response_ids])


@dataclass(frozen=True)
class OurSide:
    """What this project makes of the folder."""

    config: ModelConfig
    questions: list[Question]
    prefix_logits: list[Tensor]
    """Of each question alone, [T, V]."""
    whole_logits: list[Tensor]
    """Of each question with its response, [T, V]."""
    greedy_texts: list[str]
    condition: str
    text_ids: list[list[int]]
    """Of PROMPTS' instructions, then of SPECIAL_TEXTS."""
    special_ids: dict[str, int]
    vocab_size: int
    """Entries of the tokenizer; the model's rows beyond them are never chosen here."""


def check_weights(folder: Path) -> WeightsCheck:
    """Open a weights folder here and with Transformers, and compare.

    A difference is no exception: it stands in the result.

    Raises:
        UserError: Transformers is not installed, or does not know such a model; the folder cannot be read.
    """
    version = transformers_version()
    check_kind(folder)
    ours = our_side(folder)
    gc.collect()  # a model of 1 B in fp32 is 5 GB: ours goes before theirs comes
    findings, traps = compare(folder, ours)
    return WeightsCheck(folder, version, (scale_finding(folder), *findings), tuple(traps))


def transformers_version() -> str:
    """Of the Transformers that is installed; UserError if it is missing, or older than the model."""
    try:
        import transformers
    except ImportError:
        raise UserError('the check needs the extra hf: pip install "hrm-text[hf]"') from None
    version = str(transformers.__version__)
    try:
        from transformers import HrmTextConfig  # noqa: F401
    except ImportError:
        raise UserError(f"Transformers {version} does not know hrm_text; expected 5.9 or later") from None
    return version


def check_kind(folder: Path) -> None:
    """UserError unless this is a weights folder of the kind that Transformers has."""
    file = folder / "config.json"
    if is_checkpoint(folder) or not file.is_file():
        raise UserError(f"{folder}: not a weights folder, expected one with config.json; `hrm-text export` writes it")
    config = config_from_json(read_json(file), file)
    if not is_transformers_model(config):
        raise UserError(
            f"{folder}: architecture {config.architecture!r} with norm {config.norm!r} is not in Transformers, whose "
            "hrm_text is 'hrm' with norm 'magic' and a width that the heads divide. hrm_text.load reads this folder."
        )


def our_side(folder: Path) -> OurSide:
    """The answers of this project."""
    model = load(folder, device="cpu", dtype="float32")
    form, context = model.prompt_format, model.config.max_position_embeddings
    questions = []
    for instruction, response in PROMPTS:
        ids = form.prefix_ids(model.default_condition, instruction), form.response_ids(response)
        if sum(map(len, ids)) <= context:
            questions.append(Question(instruction, *ids))
    if not questions:
        raise UserError(
            f"{folder}: the context of {context} tokens is too short for the shortest question of the check"
        )
    prefix_logits, whole_logits = [], []
    with torch.inference_mode():
        for question in questions:
            ids_1T, prefix = question.ids, len(question.prefix_ids)
            both_ways = torch.tensor([prefix if model.config.prefix_lm else 0])
            prefix_logits.append(model.logits(ids_1T[:, :prefix], both_ways)[0])
            whole_logits.append(model.logits(ids_1T, both_ways)[0])
    asked = [question.instruction for question in questions[:GREEDY_PROMPTS]]
    texts = [instruction for instruction, _ in PROMPTS] + list(SPECIAL_TEXTS)
    padding = load_tokenizer(folder).token_to_id(PADDING)
    return OurSide(
        config=model.config,
        questions=questions,
        prefix_logits=prefix_logits,
        whole_logits=whole_logits,
        greedy_texts=model.generate(asked, condition=model.default_condition, max_new_tokens=NEW_TOKENS),
        condition=model.default_condition,
        text_ids=[form.response_ids(text)[:-1] for text in texts],
        special_ids={"bos": form.boq_id, "eos": form.eoa_id} | ({} if padding is None else {"pad": padding}),
        vocab_size=model.vocab_size,
    )


def compare(folder: Path, ours: OurSide) -> tuple[list[Finding], list[str]]:
    """Ask Transformers the same."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    open_model: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = open_model(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"{folder}: Transformers does not open it: {error}") from None
    model.eval()
    logits, mask_trap = logits_findings(model, ours)
    ids, tokenizer_trap = token_findings(folder, tokenizer, ours)
    findings = [
        loading_finding(loading),
        *logits,
        text_finding(model, tokenizer, ours),
        *ids,
        special_ids_finding(folder, model, tokenizer, ours.special_ids),
    ]
    return findings, mask_trap + tokenizer_trap


def loading_finding(loading: dict[str, Any]) -> Finding:
    """A tensor that is missing is drawn at random there, with no more than a warning."""
    problems = [
        f"{len(names)} {kind}, such as {min(map(str, names))}"
        for kind in ("missing", "unexpected", "mismatched")
        if (names := loading.get(f"{kind}_keys"))
    ]
    return Finding("tensors", "; ".join(problems) or "all read", not problems)


def scale_finding(folder: Path) -> Finding:
    """Both sides believe config.json, so only its two statements of one thing can show that the scale is wrong."""
    values = read_json(folder / "config.json")
    scale, std = values.get("embedding_scale"), values.get("initializer_range")
    if not scale or not std:
        return Finding("embedding_scale", "stated once", True)
    same = math.isclose(scale, 1 / std, rel_tol=1e-3)
    result = f"{scale:.6g}" if same else f"{scale:.6g}, but 1 / initializer_range is {1 / std:.6g}"
    return Finding("embedding_scale", result, same)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite if shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def logits_findings(model: Any, ours: OurSide) -> tuple[list[Finding], list[str]]:
    """Logits of prompts, and of prompts with their responses; and what becomes of them without token_type_ids."""
    prefixes, wholes, causal, changed = [], [], [], 0
    for question, prefix_logits, whole_logits in zip(
        ours.questions, ours.prefix_logits, ours.whole_logits, strict=True
    ):
        ids_1T, prefix = question.ids, len(question.prefix_ids)
        kinds_1T = (torch.arange(ids_1T.shape[1]) < prefix).long()[None]
        given = {"token_type_ids": kinds_1T} if ours.config.prefix_lm else {}
        alone = {name: kinds[:, :prefix] for name, kinds in given.items()}
        theirs = model(ids_1T[:, :prefix], **alone).logits[0]
        prefixes.append(relative(theirs, prefix_logits))
        wholes.append(relative(model(ids_1T, **given).logits[0], whole_logits))
        forgotten = model(ids_1T[:, :prefix]).logits[0]
        causal.append(relative(forgotten[-1], theirs[-1]))
        changed += int(forgotten[-1].argmax() != theirs[-1].argmax())
    findings = [logits_finding("logits of prompts", prefixes), logits_finding("logits of responses", wholes)]
    trap = (
        f"without token_type_ids (1 over the prompt) Transformers reads the prompt causally and says nothing: the "
        f"first token changed for {changed} of {len(causal)} prompts, its logits by up to {max(causal):.2g} of the "
        "largest"
    )
    return findings, [trap] if ours.config.prefix_lm else []


def logits_finding(what: str, differences: Sequence[float]) -> Finding:
    """The worst of several; NaN is no agreement."""
    same = all(difference <= TOLERANCE for difference in differences)
    worst = max(differences, key=lambda difference: (math.isnan(difference), difference))
    return Finding(
        what, f"differ by {worst:.2g} of the largest (at most {TOLERANCE:g}), {len(differences)} texts", same
    )


@torch.inference_mode()
def text_finding(model: Any, tokenizer: Any, ours: OurSide) -> Finding:
    """Greedy texts. Where they part at two tokens that are equally likely within the tolerance, neither is wrong."""
    same, ties, first = 0, 0, ""
    asked = ours.questions[: len(ours.greedy_texts)]
    for question, expected in zip(asked, ours.greedy_texts, strict=True):
        ids_1T = torch.tensor([question.prefix_ids])
        ones = torch.ones_like(ids_1T)
        output = model.generate(
            ids_1T,
            attention_mask=ones,
            **({"token_type_ids": ones} if ours.config.prefix_lm else {}),
            suppress_tokens=list(range(ours.vocab_size, ours.config.vocab_size)) or None,
            max_new_tokens=min(NEW_TOKENS, ours.config.max_position_embeddings - ids_1T.shape[1]),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, ids_1T.shape[1] :].tolist()
        found = tokenizer.decode(new, skip_special_tokens=True)
        if found == expected:
            same += 1
        elif margin_where_they_part(tokenizer, new, output.logits, expected) <= 2 * TOLERANCE:
            ties += 1
        else:
            first = first or f"; {question.instruction[:30]!r}: {expected[:40]!r} here, {found[:40]!r} there"
    tied = f" ({ties} part at two equally likely tokens)" if ties else ""
    return Finding("greedy text", f"{same + ties} of {len(asked)} the same{tied}{first}", not first)


def margin_where_they_part(tokenizer: Any, new: list[int], logits: Sequence[Tensor], expected: str) -> float:
    """How much likelier the first choice is than the second, as a share of the largest logit, where texts part.

    A character may be of four tokens, of which the last shows the difference.
    """
    step = 0
    for step in range(len(new)):
        text = tokenizer.decode(new[: step + 1], skip_special_tokens=True).rstrip("\ufffd")
        if not expected.startswith(text):
            break
    margins = []
    for logits_1V in logits[max(0, step - 3) : step + 1]:
        first, second = logits_1V[0].topk(2).values
        margins.append(float((first - second) / logits_1V.abs().max()))
    return min(margins)


def token_findings(folder: Path, tokenizer: Any, ours: OurSide) -> tuple[list[Finding], list[str]]:
    """Token ids of plain text, of rendered prompts, and of text that spells control tokens."""
    plain = len(PROMPTS)
    texts = [instruction for instruction, _ in PROMPTS] + list(SPECIAL_TEXTS)
    wrong = []
    for number, (text, ids) in enumerate(zip(texts, ours.text_ids, strict=True)):
        # Read as here: control tokens that a text spells are text.
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=number >= plain)["input_ids"]
        if found != ids:
            wrong.append(f"{text[:30]!r} is {found[:6]}, here {ids[:6]}")
    findings = [Finding("token ids of texts", wrong[0] if wrong else f"{len(texts)} texts the same", not wrong)]
    info = tokenizer_info(folder)
    tags = "".join(info["condition_mapping"][tag] for tag in parse_condition(ours.condition))
    wrong = []
    for question in ours.questions:
        found = tokenizer(f"{info['boq']}{tags}{question.instruction}{info['eoq']}")["input_ids"]
        if found != question.prefix_ids:
            wrong.append(f"{question.instruction[:30]!r} begins {found[:4]}, here {question.prefix_ids[:4]}")
    findings.append(Finding("rendered prompts", wrong[0] if wrong else f"{len(ours.questions)} the same", not wrong))
    read = [
        text
        for text in SPECIAL_TEXTS
        if tokenizer(text)["input_ids"] != tokenizer(text, split_special_tokens=True)["input_ids"]
    ]
    trap = (
        f"AutoTokenizer reads control tokens that a text spells ({', '.join(repr(text) for text in read[:2])}), so a "
        "user can end the prompt or forge its condition; split_special_tokens=True over the user's text reads them as "
        "text, as hrm-text does"
    )
    return findings, [trap] if read else []


def special_ids_finding(folder: Path, model: Any, tokenizer: Any, expected: dict[str, int]) -> Finding:
    """Where generation begins, ends and pads: three files say so. More ends than ours are none of our business."""
    values = read_json(folder / "config.json")
    problems = []
    for role, index in expected.items():
        said = {
            "config.json": values.get(f"{role}_token_id"),
            "generation_config.json": getattr(model.generation_config, f"{role}_token_id"),
            "AutoTokenizer": getattr(tokenizer, f"{role}_token_id"),
        }
        for place, found in said.items():
            if found != index and not (isinstance(found, list) and index in found):
                problems.append(f"{role} is {found} in {place}, expected {index}")
    stated = ", ".join(f"{role} {index}" for role, index in expected.items())
    return Finding("special ids", "; ".join(problems) or stated, not problems)


def as_table(check: WeightsCheck) -> Table:
    """For people."""
    title = f"{escape(str(check.folder))} in Transformers {check.transformers}, fp32"
    table = Table("check", "result", "", title=title, title_justify="left", box=None, pad_edge=False)
    for finding in check.findings:
        table.add_row(finding.what, escape(finding.result), "ok" if finding.same else "[bold red]differs[/]")
    return table
