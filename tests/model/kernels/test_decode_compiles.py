"""Without a GPU: Triton's compiler makes a decoding step's kernels for GPUs of several generations, at the size XL."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton (Linux)")

# Shared memory in KiB that one program may have: A100, RTX 4090 (which RTX 3090 and A10 equal), H100.
SHARED_KIB = {80: 163, 89: 99, 90: 227}

PROGRAM = """
import json, re, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hrm_text.model.config import preset
from hrm_text.model.kernels import decode
from hrm_text.model.paged import PagedKeyValues

capability, limit, texts, weight_bytes = map(int, sys.argv[1:])
pdl = capability >= 90
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.int32: "*i32"}
found = []

class Compiled:
    # A launch that compiles, as the launch of a GPU would.
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **keywords):
        kernel = self.kernel
        values = dict(zip(kernel.arg_names, arguments))
        values |= {name: value for name, value in keywords.items() if name in kernel.arg_names}
        options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
        signature, constants, aligned = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value = values[name]
            if kernel.params[place].is_constexpr:
                signature[name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], aligned[(place,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        done = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = done.asm["ptx"]
        reads = [each.start() for each in re.finditer(r"ld\\.global", ptx)]
        wait = ptx.find("griddepcontrol.wait")
        wide = re.search(r"ld\\.global[.\\w:]*\\.v4\\.b32|cp\\.async\\.cg", ptx) is not None
        barriers = len(re.findall("bar\\.sync", ptx))
        found.append([kernel.__name__, done.metadata.shared, sum(read < wait for read in reads), wait, wide, barriers])

for name in (
    "decode_vector", "decode_vector_int8", "decode_fragments", "decode_matrix", "decode_attention", "decode_enter",
    "decode_exit",
):
    setattr(decode, name, Compiled(getattr(decode, name)))
decode.shared_memory = lambda device: limit
decode.is_nvidia = lambda device: True

config = preset("XL")
D, A, I = config.hidden_size, config.attention_size, config.intermediate_size
empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")

def weight(rows, columns):
    if weight_bytes == 2:
        return decode.Weight(empty(rows, columns), None)
    return decode.Weight(empty(rows, columns, dtype=torch.int8), empty(rows, dtype=torch.float32))

settings = decode.Settings.of(texts, weight_bytes)
arrivals = decode.Arrivals(empty(1 << 24, dtype=torch.float32), empty(1 << 16, dtype=torch.int32))
squares = {
    name: empty(decode.row_blocks(getattr(settings, name), D), texts, dtype=torch.float32) for name in ("o", "down")
}
entered = empty(1, texts, dtype=torch.float32)
shape = (1, 64, config.num_heads, 16, config.head_dim)
cache = PagedKeyValues(empty(*shape), empty(*shape))
if weight_bytes == 1:
    scales = empty(*shape[:-1], dtype=torch.float32)
    cache = PagedKeyValues(empty(*shape, dtype=torch.int8), empty(*shape, dtype=torch.int8), scales, scales)
rotary = (empty(4096, 64, dtype=torch.float32),) * 2
options = {"squares": squares["down"], "pdl": pdl}
decode.multiply(empty(texts, D), weight(4 * A, D), empty(texts, 4 * A), settings.gqkv, arrivals, eps=1e-6, **options)
decode.attend(
    empty(texts, 4 * A), empty(texts, A), cache, 0, empty(texts, 64, dtype=torch.int32),
    empty(texts, dtype=torch.int32), rotary, settings.attention, arrivals, pdl=pdl,
)
options = {"squares": squares["o"], "pdl": pdl}
decode.multiply(empty(texts, A), weight(D, A), empty(texts, D), settings.o, arrivals, residual=True, **options)
decode.multiply(
    empty(texts, D), weight(2 * I, D), empty(texts, I), settings.gate_up, arrivals, eps=1e-6, pair=True, **options
)
options = {"squares": squares["down"], "pdl": pdl}
decode.multiply(empty(texts, I), weight(D, I), empty(texts, D), settings.down, arrivals, residual=True, **options)
x, norm = empty(texts, D), {"D": D, "BLOCK_D": 2048, "PDL": pdl}
ids = empty(texts, dtype=torch.int32)
decode.decode_enter[()](ids, empty(9, D), empty(D), x, x, x, entered, 2.0, BOTH=True, **norm)
decode.decode_exit[()](x, x, x, entered, 1e-6, NORM=True, BOTH=True, **norm, **decode.options(2, pdl))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("capability", "texts", "weight_bytes"),
    [(80, 16, 2), (89, 64, 2), (90, 1, 2), (90, 1, 1), (80, 16, 1), (90, 16, 1), (89, 32, 1), (90, 64, 2)],
)
def test_the_kernels_compile_and_fit_and_read_weights_before_they_wait(
    capability: int, texts: int, weight_bytes: int, compiled: Callable[..., str]
) -> None:
    limit = SHARED_KIB[capability] * 1024
    kernels = json.loads(compiled(PROGRAM, capability, limit, texts, weight_bytes))
    vector = "decode_vector_int8" if weight_bytes == 1 else "decode_vector"
    product = down = vector if texts == 1 else "decode_matrix"
    if (texts, weight_bytes) == (16, 1):
        product = "decode_fragments"
    names = [product, "decode_attention", product, product, down, "decode_enter", "decode_exit"]
    assert [name for name, *_ in kernels] == names
    for name, shared, early, wait, wide, barriers in kernels:
        assert shared <= limit
        if name not in ("decode_enter", "decode_exit"):
            assert wide, name  # 16 bytes at a time
            assert capability < 90 or early > 0 or name == "decode_matrix", name
        # Its operands are where the tensor cores want them: else they would pass through shared memory, tile by tile.
        assert name != "decode_fragments" or barriers < 10, barriers
        # All wait but the first, which is launched as an ordinary kernel.
        assert (wait >= 0) == (capability >= 90 and name != "decode_enter"), name
