"""The settings of a training run: one YAML file, every key known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hrm_text.data.storage import Location, location
from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import LoraConfig
from hrm_text.settings import settings, to_mapping
from hrm_text.train.schedule import CreditAssignment, LearningRate

Count = Annotated[int, Field(ge=1)]


def _located(place: Location | None) -> Location | None:
    return None if place is None else location(place)


Place = Annotated[Path | str | None, AfterValidator(_located)]
"""A path, the URL of a store that fsspec knows, or null."""
Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda given: [given] if isinstance(given, (str, Path)) else given)]
"""One path or several."""
Names = Annotated[tuple[str, ...], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)]
"""Several names: a list, or one text with commas between them."""
AttentionBackend = Literal["auto", "plain", "grouped", "varlen", "flex", "flash", "triton"]


@settings
class DataConfig:
    """Where the batches come from and how large they are."""

    sampled: Place = None
    """Sampled folder (hrm-text data sample): its epochs are the run."""
    records: Paths | None = None
    """In its place, records: JSONL or Parquet files, or folders of them. They are tokenised and sampled into RUN/data
    first."""
    tokenizer: Path | None = None
    """Tokenizer folder for the records; null is that of init."""
    tokens_per_batch: Count
    """Token budget of one micro-batch: what one forward pass takes."""
    micro_batches: Count = 1
    """Micro-batches of one optimizer step over all ranks; their gradients are added. What is trained on, and in which
    order, depends on these two numbers and on nothing else of how a run is computed."""
    at_once: Count = 1
    """Micro-batches of a rank that share one forward pass: fewer and larger passes, and more memory."""
    epochs: Count | None = None
    """Epochs to train on; null is all that were sampled, or one of records."""
    supervise: Literal["response", "all"] = "response"
    """response: loss on the response alone. all: on every token."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that assemble batches ahead."""

    def __post_init__(self) -> None:
        if (self.sampled is None) == (self.records is None):
            found = "neither" if self.sampled is None else "both; put null in the place of one"
            raise ValueError(f"expected sampled (a sampled folder) or records (JSONL or Parquet), found {found}")
        if self.tokenizer is not None and self.records is None:
            raise ValueError("tokenizer is for records; a sampled folder has its own")


@settings
class Override:
    """Other settings of the optimizer for some of the parameters."""

    match: str
    """Which: a shell pattern for whole names of parameters, such as lm_head.* or *.o_proj.weight."""
    lr_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Their learning rate is the run's times this, for weight decay as well."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Their weight decay; null is the run's."""


@settings
class OptimizerConfig:
    """Adam-atan2 and the average of its weights."""

    lr: LearningRate
    """Learning rate over the run."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on all parameters."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights, which are evaluated and released."""
    overrides: tuple[Override, ...] = ()
    """Parameters that learn otherwise; where several match a parameter, the last one counts."""


@settings
class ValidationConfig:
    """Loss and accuracy on records that were not trained on."""

    sampled: Place = None
    """Sampled folder of held-out records; null is no validation."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With data.records: the share of them that is held out and validated on, chosen by their content alone."""
    every_steps: Count = 500
    """Validate after every so many steps, and after the last."""


@settings
class EvaluateConfig:
    """Questions that are asked of the averaged weights while the run trains: scores as curves."""

    tasks: Names = ()
    """Tasks as hrm-text eval names them (gsm8k, add:direct, quickstart), and files of records; none is no evaluation.
    Those that run what the model wrote are refused."""
    every_steps: Count = 1000
    """Evaluate after every so many steps, and after the last."""
    limit: Count = 100
    """Most questions of a task: the same ones every time, and those of hrm-text eval --limit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the questions that are drawn, as of hrm-text eval --seed."""
    data: Path | None = None
    """Folder with the benchmarks' files, DATA/gsm8k/test.jsonl and so on; null is the Hugging Face hub."""
    most_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of the run's wall time, what evaluations may take together; one that would take more waits for another turn."""
    batch: Count = 32
    """Questions answered together; each needs memory for its keys and values."""


@settings
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: Count | None = 1000
    """Save after every so many steps; null is never for that reason. The last step and an interruption always save."""
    every_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Save as well when so much time has passed since the last save; null is never for that reason."""
    keep_last: Count = 3
    """How many of the newest checkpoints stay."""
    keep_every: Count | None = None
    """Checkpoints of steps that are multiples of this stay for good; null is none."""


@settings
class DistributedConfig:
    """Many ranks: processes that torchrun started, one to a device. One process has no use for these."""

    sharding: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """What each rank holds of fp32 weights, moments and averages. ddp: all of it. fsdp: a part, over all ranks. hsdp: a
    part, over the ranks of a machine. auto: by size; the run prints the reason."""
    shard_ranks: Count | None = None
    """hsdp: ranks that share one copy; null is the ranks of a machine."""
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """A run that makes no step for so long ends with an error that names the ranks that hang."""


@settings
class LoggingConfig:
    """What is recorded beside metrics.jsonl, which always is."""

    tensorboard: bool = True
    """Write event files to RUN/tensorboard."""
    wandb_project: str | None = None
    """Send the metrics to this Weights & Biases project (extra: wandb)."""


@settings
class ExecutionConfig:
    """How to compute, which changes nothing of what is computed, rounding aside."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, then MPS, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; auto: bfloat16 on CUDA, float32 elsewhere. Master weights are always fp32."""
    blocks: Literal["auto", "plain", "compiled", "fused"] = "auto"
    """How the blocks are computed. plain: PyTorch. compiled: torch.compile, once. fused: kernels of our own in Triton.
    auto: fused on CUDA where it can be, compiled on other CUDA, plain elsewhere."""
    attention: AttentionBackend = "auto"
    """How attention is computed; auto: the fastest that the machine has. Fused blocks have their own: triton."""
    recompute: Literal["auto", "none", "some", "full"] = "auto"
    """What the backward pass computes again, to save memory. none: nothing. some: what is cheap (fused blocks alone).
    full: all but the input of each block. auto: some with fused blocks, none otherwise."""
    fp8: bool = False
    """Matrix products of the blocks in FP8; needs fused blocks, and a GPU of compute capability 8.9 or more."""


@settings
class TrainConfig(ExecutionConfig):
    """A training run."""

    run: Path
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the initial weights and the order of records; that of a sampled folder was drawn when it was sampled."""
    init: Path | None = None
    """Start from these weights, with a fresh optimizer: a weights folder, a checkpoint or the folder of a run (its
    averaged weights). A run that has begun continues from its own."""
    model: ModelConfig
    """Architecture and sizes; vocabulary and context come from the data. With init all of it comes from there, and what
    is given must agree, but for bp_steps."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """With a rank: train adapters upon init, and leave its weights alone."""
    data: DataConfig
    """Batches."""
    optimizer: OptimizerConfig
    """Learning."""
    credit: CreditAssignment = Field(default_factory=CreditAssignment)
    """Warm-up of K, for the architecture that has one (hrm); the model's bp_steps is where it ends."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Held-out records."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Benchmarks."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Many ranks."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Recording."""
    max_steps: Count | None = None
    """End the run, and its schedules, after so many steps; null is the end of the data."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest good checkpoint in RUN. never: an error if there is one."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.init is None:
            raise ValueError("lora trains adapters upon given weights: name them (init: WEIGHTS_DIR)")
        if self.lora.rank and self.distributed.sharding in ("fsdp", "hsdp"):
            raise ValueError(
                f"lora goes with distributed.sharding ddp, found {self.distributed.sharding!r}; leave it at auto"
            )
        if self.data.records is not None and self.data.tokenizer is None and self.init is None:
            raise ValueError("data.records need a tokenizer: name weights to start from (init) or data.tokenizer")
        if self.validation.share and self.data.records is None:
            raise ValueError("validation.share is a share of data.records, and there are none; use validation.sampled")
        if self.validation.share and self.validation.sampled is not None:
            raise ValueError("expected one of validation.share and validation.sampled, found both")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as values that YAML and JSON know."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simple(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [simple(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    mapping: dict[str, Any] = simple(to_mapping(config))
    return mapping
