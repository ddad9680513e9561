"""Training of a draft head: the model is frozen, and what the head has to guess is the model's own choice.

One forward pass of the model over a packed batch gives every state and every choice. Where a text is not what the model
would have said, no guess counts: decoding never comes there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.contracts import IGNORE_INDEX, PackedBatch
from hrm_text.model.attention import Spans
from hrm_text.model.draft import DraftHead
from hrm_text.model.kernels import packed_attention, pick_backend
from hrm_text.model.recurrence import RecurrentLM

# T packed tokens, S positions that choose a token of a response, G guesses in a row, D width, V vocabulary


@dataclass(frozen=True)
class DraftExamples:
    """What a packed batch asks of a head."""

    states_SD: Tensor
    """The model's final states where it chose a token that is in the batch."""
    tokens_SG: Tensor
    """The token that was chosen, and those after it: what a guess is made behind."""
    choices_SG: Tensor
    """What the model chose after each; IGNORE_INDEX where the text has ended or is not the model's own."""


AttentionOf = Callable[[Spans, int, torch.device], Callable[..., Tensor]]


def default_attention(spans: Spans, num_tokens: int, device: torch.device) -> Callable[..., Tensor]:
    """The best way to attend on a device."""
    return packed_attention(spans, num_tokens, device, pick_backend(device))


@torch.no_grad()
def draft_examples(
    model: RecurrentLM, batch: PackedBatch, guesses: int, attention_of: AttentionOf = default_attention
) -> DraftExamples:
    """Run the frozen model over a batch; every sample's labels are those of its response, without a gap."""
    device = model.lm_head.weight.device
    ids_T, labels_T, positions_T = (
        torch.from_numpy(x).to(device) for x in (batch.input_ids, batch.labels, batch.position_ids)
    )
    lengths = torch.from_numpy(batch.sample_starts).diff()
    spans = Spans.of_samples(lengths, torch.from_numpy(batch.prefix_lengths))
    hidden_TD = model(ids_T, positions_T, attention_of(spans, len(ids_T), device))
    asked_T = labels_T != IGNORE_INDEX
    at_S = asked_T.nonzero().squeeze(1)
    choices_T = torch.full_like(ids_T, IGNORE_INDEX)
    for some in at_S.split(8192):
        choices_T[some] = model.lm_head(hidden_TD[some]).argmax(-1)
    last = len(ids_T) - 1
    tokens, choices = [], []
    own_S = torch.ones_like(at_S, dtype=torch.bool)
    for ahead in range(1, guesses + 1):
        here_S = (at_S + ahead).clamp(max=last)
        # A gap between labels, such as the next sample's prefix, ends a text.
        own_S = own_S & asked_T[here_S] & (at_S + ahead <= last) & (choices_T[here_S - 1] == ids_T[here_S])
        tokens.append(ids_T[here_S])
        choices.append(choices_T[here_S].where(own_S, IGNORE_INDEX))
    kept = choices[0] != IGNORE_INDEX
    return DraftExamples(hidden_TD[at_S[kept]], torch.stack(tokens, 1)[kept], torch.stack(choices, 1)[kept])


def guesses_of(model: RecurrentLM, head: DraftHead, examples: DraftExamples) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows [K], logits [K, V], choices [K]) of each guess in turn, at the K examples whose text goes on so far."""
    states, rows = examples.states_SD, torch.arange(len(examples.states_SD), device=examples.states_SD.device)
    for guess in range(examples.tokens_SG.shape[1]):
        alive = examples.choices_SG[rows, guess] != IGNORE_INDEX
        rows, states = rows[alive], states[alive]
        states = head(states, model.model.embed_tokens(examples.tokens_SG[rows, guess]))
        yield rows, F.linear(states, model.lm_head.weight.to(states.dtype)).float(), examples.choices_SG[rows, guess]


def train_head(
    model: RecurrentLM,
    head: DraftHead,
    batches: Iterable[PackedBatch],
    *,
    guesses: int = 3,
    seconds: float = 60.0,
    max_steps: int | None = None,
    lr: float = 3e-3,
    weight_decay: float = 0.01,
    attention_of: AttentionOf = default_attention,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> int:
    """Train a head, in fp32, for so many seconds or steps, the learning rate falling to nothing; the number of steps.

    The loss is the mean cross-entropy of each guess against the model's choice, the sum over guesses.
    """
    device = model.lm_head.weight.device
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    start, step = time.perf_counter(), 0
    for batch in batches:
        done = (time.perf_counter() - start) / seconds
        if max_steps is not None:
            done = max(done, step / max_steps)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        examples = draft_examples(model, batch, guesses, attention_of)
        with half:
            losses = [
                F.cross_entropy(logits, choices, reduction="sum") / max(len(choices), 1)
                for _, logits, choices in guesses_of(model, head, examples)
            ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item() if step % 50 == 0 else float("nan"))
        step += 1
    return step


@torch.no_grad()
def acceptance(
    model: RecurrentLM,
    head: DraftHead,
    batches: Iterable[PackedBatch],
    guesses: int = 3,
    attention_of: AttentionOf = default_attention,
) -> list[float]:
    """For each guess in a row, the share that is right of those that are made behind right ones."""
    right, made = [0] * guesses, [0] * guesses
    for batch in batches:
        examples = draft_examples(model, batch, guesses, attention_of)
        all_right_S = torch.ones(len(examples.states_SD), dtype=torch.bool, device=examples.states_SD.device)
        for guess, (rows_K, logits_KV, choices_K) in enumerate(guesses_of(model, head, examples)):
            made[guess] += int(all_right_S[rows_K].sum())
            right_K = all_right_S[rows_K] & (logits_KV.argmax(-1) == choices_K)
            right[guess] += int(right_K.sum())
            all_right_S = torch.zeros_like(all_right_S)
            all_right_S[rows_K] = right_K
    return [r / max(m, 1) for r, m in zip(right, made, strict=True)]
