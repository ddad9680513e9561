"""What a run will take before it is begun: memory, speed, days and dollars, from counts and measured rates alone.

Nothing is computed on a device and the data need not be there. ``budget_memory`` follows the tensors of a step,
``budget_speed`` its operations and bytes, ``budget_network`` what ranks send each other; the rates are in
``budget_gpus``, and ``budget_measurements`` holds what the whole is checked against (docs/budget.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig
from hrm_text.recipes import budget_gpus as rates
from hrm_text.recipes.budget_estimate import COLLECTIVES_GIB, CONTEXT_GIB, SLACK, Estimate, estimate
from hrm_text.recipes.budget_gpus import Gpu, find_gpu
from hrm_text.recipes.budget_options import Option, options_for
from hrm_text.recipes.budget_run import Question, check, run_of
from hrm_text.train.config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Everything that is told of a run."""

    title: str
    gpu: Gpu
    price: float
    parameters: dict[str, int]
    """By part."""
    estimates: tuple[Estimate, ...]
    options: tuple[Option, ...]
    """For the first estimate. Where it does not fit: what does. Where it does: what fits as well and is faster."""
    assumptions: tuple[str, ...]
    errors: dict[int, str] = field(default_factory=dict)
    """Numbers of GPUs of a table that cannot be had, and why."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        for one, found in zip(values["estimates"], self.estimates, strict=True):
            one["fits"] = found.fits
        for one, option in zip(values["options"], self.options, strict=True):
            one["estimate"]["fits"] = option.estimate.fits
        values["total_parameters"] = sum(self.parameters.values())
        return values


def budget(config: TrainConfig, question: Question | None = None, title: str = "", notes: Sequence[str] = ()) -> Budget:
    """What a configuration takes; ``notes``: what was assumed to read it.

    Raises:
        UserError: an unknown GPU, fewer micro-batches than GPUs, settings that the model of the budget does not know.
    """
    question = question or Question()
    gpu = find_gpu(question.gpu)
    check(config, gpu)
    run = run_of(config, question)
    estimates: list[Estimate] = []
    errors: dict[int, str] = {}
    for gpus in question.gpus:
        try:
            estimates.append(estimate(widened(config, gpus, question), run, gpus, gpu, question))
        except UserError as error:
            if len(question.gpus) == 1:
                raise
            errors[gpus] = str(error)
    if not estimates:
        raise UserError("\n".join(errors.values()))
    options = options_for(config, run, estimates[0], gpu, question) if len(question.gpus) == 1 else ()
    return Budget(
        title=title,
        gpu=gpu,
        price=question.price,
        parameters=parameters_by_part(run.model),
        estimates=tuple(estimates),
        options=tuple(options),
        assumptions=(*notes, *run.assumptions, *assumptions(gpu, question, estimates)),
        errors=errors,
    )


def widened(config: TrainConfig, gpus: int, question: Question) -> TrainConfig:
    """With a micro-batch for each GPU at least; more than the configuration has where several numbers are asked."""
    bins = config.data.micro_batches
    if gpus <= bins:
        return config
    if len(question.gpus) == 1:
        total = bins * config.data.tokens_per_batch
        raise UserError(
            f"--gpus: {gpus} GPUs cannot share {bins} micro-batches of {config.data.tokens_per_batch:,} tokens; take "
            f"at most {bins}, or add --data.micro_batches {gpus} (with --data.tokens_per_batch "
            f"{total // gpus} the global batch of {total:,} tokens stays as it is)"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batches=gpus))


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Trained parameters of each stack, the embedding and the head."""
    table = model.vocab_size * model.hidden_size
    stacks = {
        f"{name} stack, {layers} layers": layers * model.block_parameters for name, layers in model.stacks.items()
    }
    return {**stacks, "embedding": table, "head": table}


def assumptions(gpu: Gpu, question: Question, estimates: Sequence[Estimate]) -> list[str]:
    """What the numbers rest on."""
    notes = [
        f"Rates of {gpu.name}: "
        + (
            "measured in training steps (docs/performance.md)."
            if gpu.measured
            else "an H200's measured shares of its data sheet, on this one's; not measured."
        ),
        f"Memory: tensors are counted; {SLACK:.0%} of slack and {CONTEXT_GIB} GiB for the driver"
        f"{f', {COLLECTIVES_GIB} for NCCL' if max(e.gpus for e in estimates) > 1 else ''} are assumed.",
        f"The host launches {rates.TRAINING_HOST} times slower than in bare measurements. Validation is not counted.",
    ]
    if max(e.gpus for e in estimates) > 1:
        notes += [
            f"Links: {gpu.link_bytes_per_second / 1e9:,.0f} GB/s in a machine, of which {rates.LINKS:.1%} are reached; "
            f"{1e6 * rates.COLLECTIVE_SECONDS:.0f} us for a collective; a second of exchange hidden by computing slows "
            f"it by {rates.CONTENTION} s: measured between two H200.",
            f"More GPUs of a machine reach the same, and {1e6 * rates.HOP_SECONDS:.0f} us come for each. Between "
            f"machines of {question.gpus_per_node}, {rates.NETWORK:.0%} of {question.network_gbps:,.0f} Gb/s for each "
            f"GPU are reached, and a second of waiting costs {rates.WAITING} s of computing: assumed.",
            "Weights are gathered once a step in bf16, gradients reduced once, block by block: in bf16 where ranks "
            "share a copy and make one pass a step, otherwise in fp32.",
        ]
    widths = {e.micro_batches for e in estimates}
    if len(widths) > 1:
        least = min(widths)
        notes.append(f"More than {least} GPUs: a micro-batch for each, so the global batch grows with them.")
    return notes
