from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.block import rms_norm, rotary_table
from hrm_text.model.config import RECURRENCE, ModelConfig, preset
from hrm_text.model.kernels import packed_attention
from hrm_text.model.plan import Step, plan
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import fused, write_weights

VOCAB = 96
IDS = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
CPU = torch.device("cpu")


def tiny(**changes: Any) -> ModelConfig:
    return preset("tiny", vocab_size=VOCAB, max_position_embeddings=64, **changes)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    # From 12 on: Transformers gives the row of the padding id (5) no gradient.
    return torch.randint(12, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def transformers_twin(model: RecurrentLM, folder: Path) -> Any:
    """Transformers' own class with the same weights."""
    from transformers import AutoModelForCausalLM

    write_weights(folder, model.config, model.state_dict(), torch.float32, IDS)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# --------------------------------------------------------------------------------------------- against Transformers --


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 6, "H_cycles": 3, "L_cycles": 2},
        {"H_cycles": 1, "L_cycles": 1, "head_dim": 16, "init": "normal", "rope_theta": 500.0, "norm_eps": 1e-3},
        {"prefix_lm": False},
    ],
    ids=["released", "deep", "other-sizes", "causal"],
)
def test_logits_equal_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(tiny(**changes), seed=3)
    twin = transformers_twin(model, tmp_path)
    ids = random_ids(5, 24)
    prefixes = torch.tensor([0, 24, 1, 9, 17]) if model.config.prefix_lm else torch.zeros(5, dtype=torch.long)
    token_types = (torch.arange(24) < prefixes[:, None]).long()
    with torch.no_grad():
        expected = twin(ids, token_type_ids=token_types).logits
    assert relative(model.logits(ids, prefixes), expected) < 1e-5
    if model.config.prefix_lm:  # and the prefix matters, so the comparison could fail
        assert relative(model.logits(ids, prefixes * 0), expected) > 1e-3


@pytest.mark.parametrize("k", [3, 4, 5, 6, 7, 8])
def test_gradients_equal_those_of_transformers_for_every_k_it_can_express(k: int, tmp_path: Path) -> None:
    model = build(tiny(num_layers=4, bp_steps=k), seed=3)
    twin = transformers_twin(model, tmp_path)
    ids = random_ids(2, 16)
    prefixes = torch.tensor([5, 11])
    direction = torch.randn(2, 16, VOCAB, generator=torch.Generator().manual_seed(1))
    twin_logits = twin(ids, token_type_ids=(torch.arange(16) < prefixes[:, None]).long()).logits
    (twin_logits * direction).sum().backward()
    attention = packed_attention(Spans.of_samples(torch.tensor([16, 16]), prefixes), 32, CPU)
    hidden = model(ids.flatten(), torch.arange(16).repeat(2), attention)
    (model.lm_head(hidden).view(2, 16, VOCAB) * direction).sum().backward()

    expected = fused({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    ours = dict(model.named_parameters())
    assert set(expected) == set(ours)
    for name, parameter in ours.items():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[name]) < 1e-4, name


# -------------------------------------------------------------------------------------------- against the equations --


def by_hand(model: RecurrentLM, ids: Tensor, prefix: int) -> Tensor:
    """The final state of one sample, each architecture's recurrence written out as in the paper."""
    config, core = model.config, model.model
    attention = PlainAttention(Spans.of_samples(torch.tensor([len(ids)]), torch.tensor([prefix])), len(ids), CPU)
    table = rotary_table(torch.arange(len(ids)), config.head_dim, config.rope_theta)

    def call(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: core.stack(name)(x, table, attention, 0)

    x = core.embed_tokens(ids) / config.embedding_std
    z_init = core.z_L_init.expand_as(x)
    match config.architecture:
        case "hrm" | "trm" | "trm_match_recurrence":
            low, high = (call(name) for name in (("L", "H") if config.architecture == "hrm" else ("S", "S")))
            z_h, z_l = x, z_init
            for _ in range(config.H_cycles):
                for _ in range(config.L_cycles):
                    z_l = low(z_l + z_h)
                z_h = high(z_h + z_l)
            z = z_h
        case "rins":
            z = z_init
            for _ in range(config.cycles):
                z = call("L")(z + x)
            z = call("H")(z)
        case "looped":
            z = z_init
            for _ in range(config.cycles):
                z = call("S")(z + x)
        case "transformer":
            z = call("S")(x)
    return rms_norm(z, config.norm_eps) if config.norm == "pre" else z


@pytest.mark.parametrize("norm", ["magic", "pre", "post"])
@pytest.mark.parametrize("architecture", list(RECURRENCE))
def test_every_architecture_follows_its_equations(architecture: str, norm: str) -> None:
    model = build(tiny(architecture=architecture, norm=norm), seed=1)
    ids = random_ids(14)
    with torch.no_grad():
        expected = model.lm_head(by_hand(model, ids, prefix=6))
    found = model.logits(ids[None], torch.tensor([6]))[0]
    assert found.isfinite().all()
    assert relative(found, expected) < 1e-5


def test_norms_and_architectures_are_different_models() -> None:
    ids, prefix = random_ids(1, 12), torch.tensor([4])
    kinds = [(a, n) for a in RECURRENCE for n in ("magic", "pre", "post")]
    kinds.remove(("transformer", "pre"))  # with a single call, its exit is the place before the head
    logits = [build(tiny(architecture=a, norm=n), seed=1).logits(ids, prefix) for a, n in kinds]
    for index, one in enumerate(logits):
        assert all(relative(one, other) > 1e-2 for other in logits[:index]), kinds[index]


def test_a_call_without_gradient_changes_no_value_and_a_call_with_it_gives_the_full_derivative() -> None:
    """K routes gradients alone: all K give the same state, and K = all is plain autograd through the equations."""
    model = build(tiny(), seed=1)
    ids = random_ids(10)
    attention = packed_attention(Spans.of_samples(torch.tensor([10]), torch.tensor([4])), 10, CPU)
    states = [model(ids, torch.arange(10), attention, k) for k in range(2, 9)]
    assert all(torch.equal(state, states[0]) for state in states)
    direction = torch.randn_like(states[0])
    (states[-1] * direction).sum().backward()
    found = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (by_hand(model, ids, 4) * direction).sum().backward()
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad) < 1e-4, name


def test_the_embedding_learns_from_k_3_on_and_the_first_fast_state_never() -> None:
    model = build(tiny(), seed=1)
    attention = packed_attention(Spans.of_samples(torch.tensor([10]), torch.tensor([4])), 10, CPU)
    for k in range(2, 9):
        model.zero_grad()
        model(random_ids(10), torch.arange(10), attention, k).square().sum().backward()
        assert (model.model.embed_tokens.weight.grad is None) == (k == 2)
        assert model.model.get_parameter("L_module.layers.0.mlp.down_proj.weight").grad is not None
    assert "model.z_L_init" not in dict(model.named_parameters())


# ---------------------------------------------------------------------------------------------------------- packing --


LENGTHS, PREFIXES = [9, 1, 30, 17, 12], [4, 1, 0, 17, 1]


def packed_logits(model: RecurrentLM, samples: list[Tensor], padding: int = 0, backend: str = "grouped") -> Tensor:
    lengths = torch.tensor([len(sample) for sample in samples])
    total = int(lengths.sum()) + padding
    attention = packed_attention(Spans.of_samples(lengths, torch.tensor(PREFIXES)), total, CPU, backend)
    ids = torch.cat([*samples, torch.zeros(padding, dtype=torch.long)])
    positions = torch.cat([*(torch.arange(len(sample)) for sample in samples), torch.zeros(padding, dtype=torch.long)])
    with torch.no_grad():
        return model.lm_head(model(ids, positions, attention))


@pytest.mark.parametrize("backend", ["grouped", "plain"])
@pytest.mark.parametrize("architecture", list(RECURRENCE))
def test_a_packed_batch_equals_its_samples_one_by_one(architecture: str, backend: str) -> None:
    model = build(tiny(architecture=architecture), seed=2)
    samples = [random_ids(length, seed=length) for length in LENGTHS]
    packed = packed_logits(model, samples, padding=7, backend=backend)
    for sample, prefix, found in zip(samples, PREFIXES, packed.split([*LENGTHS, 7]), strict=False):
        assert relative(found, model.logits(sample[None], torch.tensor([prefix]))[0]) < 1e-5


@pytest.mark.parametrize("backend", ["grouped", "plain"])
@pytest.mark.parametrize("disturbed", range(5))
def test_disturbing_one_sample_changes_it_and_no_other_to_the_bit(disturbed: int, backend: str) -> None:
    model = build(tiny(), seed=2)
    samples = [random_ids(length, seed=length) for length in LENGTHS]
    before = packed_logits(model, samples, padding=3, backend=backend).split([*LENGTHS, 3])
    samples[disturbed] = random_ids(LENGTHS[disturbed], seed=99)
    after = packed_logits(model, samples, padding=3, backend=backend).split([*LENGTHS, 3])
    for index in range(6):
        assert torch.equal(before[index], after[index]) == (index != disturbed)


# -------------------------------------------------------------------------------------- initialisation and the rest --


@pytest.mark.parametrize(
    ("init", "stds"),
    [
        ("lecun", {"embed": 256**-0.5, "gqkv": 256**-0.5, "o_proj": 256**-0.5, "down": 768**-0.5, "head": 256**-0.5}),
        ("normal", {"embed": 0.02, "gqkv": 0.02, "o_proj": 0.02, "down": 0.02, "head": 0.02}),
        ("megatron", {"embed": 0.02, "gqkv": 0.02, "o_proj": 0.01, "down": 0.01, "head": 0.02}),  # / sqrt(2 * 2)
    ],
)
def test_weights_have_the_deviation_their_initialisation_says(init: str, stds: dict[str, float]) -> None:
    changes: dict[str, Any] = {"hidden_size": 256, "num_heads": 8, "vocab_size": 512, "inner_multiple": 256}
    model = build(preset("tiny", init=init, **changes), seed=0)
    layer = "L_module.layers.0"
    weights = {
        "embed": model.model.embed_tokens.weight,
        "gqkv": model.model.get_parameter(f"{layer}.attn.gqkv_proj.weight"),
        "o_proj": model.model.get_parameter(f"{layer}.attn.o_proj.weight"),
        "down": model.model.get_parameter(f"{layer}.mlp.down_proj.weight"),
        "head": model.lm_head.weight,
    }
    for name, weight in weights.items():
        assert float(weight.detach().std()) == pytest.approx(stds[name], rel=0.02), name
        assert float(weight.detach().abs().max()) <= 3.05 * stds[name], name
    assert float(model.model.z_L_init.std()) == pytest.approx(1.0, rel=0.2)
    hidden = model.model.embed_tokens.weight.detach() / model.config.embedding_std
    assert float(hidden.std()) == pytest.approx(1.0, rel=0.02)


def test_the_seed_decides_the_weights_whatever_the_dtype() -> None:
    one, two, other = build(tiny(), seed=1), build(tiny(), seed=1, dtype=torch.bfloat16), build(tiny(), seed=2)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight.bfloat16(), two.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])


def test_an_observer_sees_every_call_of_the_plan() -> None:
    model = build(tiny(), seed=1)
    seen: list[tuple[int, Step]] = []
    sizes: list[float] = []

    def observe(index: int, step: Step, before: Tensor, after: Tensor) -> None:
        seen.append((index, step))
        sizes.append(float(after.square().mean()))

    attention = packed_attention(Spans.of_samples(torch.tensor([10]), torch.tensor([4])), 10, CPU)
    with torch.no_grad():
        model.model(random_ids(10), torch.arange(10), attention, observer=observe)
    assert seen == list(enumerate(plan(model.config)))
    assert sizes == pytest.approx([1.0] * 8, rel=1e-3)  # MagicNorm bounds the state at every call


def test_logits_refuse_what_does_not_fit() -> None:
    model = build(tiny())
    with pytest.raises(UserError, match="65 tokens are longer than the model's context of 64"):
        model.logits(random_ids(1, 65), torch.tensor([3]))
    with pytest.raises(UserError, match=r"prefix_lengths must be 2 numbers from 0 to 8, found \[3, 9\]"):
        model.logits(random_ids(2, 8), torch.tensor([3, 9]))
    with pytest.raises(UserError, match="needs vocab_size and max_position_embeddings"):
        build(preset("tiny", vocab_size=0))
