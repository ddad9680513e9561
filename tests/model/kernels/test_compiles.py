"""Without a GPU: Triton's compiler makes the attention kernels for GPUs of several generations, within their memory."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton (Linux)")

# Shared memory in KiB that one program may have: A100, RTX 4090 (which RTX 3090 and A10 equal), H100.
SHARED_KIB = {80: 163, 89: 99, 90: 227}

PROGRAM = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hrm_text.model.kernels import attention_kernels as kernels
from hrm_text.model.kernels.triton_attention import launches

def shared_bytes(kernel, sizes, constants, capability):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {"scale": "fp32", "tiles": "*i32"}
    kinds |= dict.fromkeys(("lse", "delta", "cos", "sin"), "*fp32")
    kinds |= {name: "i32" for name in kernel.arg_names if name.endswith("stride") or name == "num_tokens"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    options = {name: value for name, value in sizes.options.items() if value is not None}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

capability, limit = map(int, sys.argv[1:])
sizes = launches(128, 2, limit)
shared = {"NUM_HEADS": 12, "HEAD_DIM": 128, "GATED": True, "ROTARY": True, "PRECISION": "tf32"}
print(json.dumps([
    shared_bytes(kernels.attention_forward, sizes.forward,
        {**shared, "BLOCK_M": sizes.forward.own, "BLOCK_C": sizes.forward.other}, capability),
    shared_bytes(kernels.attention_backward_keys, sizes.backward_keys,
        {**shared, "BLOCK_C": sizes.backward_keys.own, "BLOCK_M": sizes.backward_keys.other}, capability),
    shared_bytes(kernels.attention_backward_queries, sizes.backward_queries,
        {**shared, "BLOCK_M": sizes.backward_queries.own, "BLOCK_C": sizes.backward_queries.other}, capability),
]))
"""


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_attention_compiles_and_fits(capability: int, compiled: Callable[..., str]) -> None:
    limit = SHARED_KIB[capability] * 1024
    needed = json.loads(compiled(PROGRAM, capability, limit))
    assert len(needed) == 3
    assert all(0 < each <= limit for each in needed), needed
