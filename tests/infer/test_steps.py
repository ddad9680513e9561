from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.infer import steps
from hrm_text.infer.requests import Decode
from hrm_text.infer.steps import prepare, why_not
from hrm_text.model.config import preset
from hrm_text.model.kernels.cpu_decode import CompiledDecoding
from hrm_text.model.recurrence import build
from tests.infer.test_engine import DEVICE, make, requests, tokens_of

ON_A_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="the model lies on a GPU")


@ON_A_CPU
def test_compiled_loops_say_what_the_definition_says(tokenizer_dir: Path) -> None:
    asked = requests(8, seed=random.Random(1).randrange(100))
    plain, compiled = (
        tokens_of(make(tokenizer_dir), asked, decode=decode, page_size=4, max_batch=5, at_once=2)
        for decode in ("plain", "compiled")
    )
    assert plain == compiled


@ON_A_CPU
def test_large_models_have_compiled_loops_on_a_cpu(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(tokenizer_dir).engine().decode == "plain"
    monkeypatch.setattr(steps, "WORTH_COMPILING", 1000)
    engine = make(tokenizer_dir).engine()
    assert engine.decode == "compiled"
    attention = engine._lane(engine.cycles).step.attention  # type: ignore[attr-defined]
    assert attention is CompiledDecoding
    odd = build(preset("tiny", vocab_size=96, max_position_embeddings=64, hidden_size=60), seed=0)
    assert prepare(odd, "auto") == "plain"


@pytest.mark.parametrize(
    ("decode", "device", "reason"),
    [
        ("fused", "cpu", "needs a GPU with CUDA, and the device is 'cpu'"),
        ("compiled", "mps", "it is for CPUs, and this is mps"),
        ("plain", "mps", None),
    ],
)
def test_what_is_not_to_be_had_says_why(decode: Decode, device: str, reason: str | None) -> None:
    found = why_not(decode, preset("tiny"), torch.device(device))
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


@ON_A_CPU
def test_a_way_that_is_not_to_be_had_or_known(tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="decode: 'fused' is not to be had here: it needs a GPU"):
        make(tokenizer_dir).engine(decode="fused")
    with pytest.raises(UserError, match="decode: unknown 'fast'; choose from auto, plain, compiled, fused"):
        make(tokenizer_dir).engine(decode="fast")
