"""What the compiler made of the kernels: registers, spills, shared memory and instructions. Needs no GPU.

    python -m kernels.resources [--capability 90] [--only attention]

Each operation is called as in production, on CPU tensors, with the launch replaced by a compilation for the GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # must be unset when Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.int8: "*i8",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel; spills in bytes of stores and loads, shared memory in bytes."""

    kernel: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared: int
    wgmma: int
    mma: int
    tma: int
    async_copies: int
    serialized: bool

    @property
    def programs_per_sm(self) -> int:
        """On Hopper: 64 Ki registers, 227 KiB of shared memory, 64 warps, 32 blocks."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        return min(by_registers, 227 * 1024 // (self.shared + 1024), 64 // self.num_warps, 32)

    def __str__(self) -> str:
        note = " WGMMA-SERIALIZED" if self.serialized else ""
        return (
            f"{self.kernel:22} warps {self.num_warps:2} regs {self.registers:3} spill {self.spill_bytes:4} "
            f"smem {self.shared:6} per SM {self.programs_per_sm:2} wgmma {self.wgmma:3} mma {self.mma:3} "
            f"tma {self.tma:2} cp.async {self.async_copies:3}{note}"
        )


@contextmanager
def compiled_launches(capability: int = 90) -> Iterator[list[Resources]]:
    """Within it every kernel launch compiles for the GPU and adds to the list; nothing runs."""
    found: list[Resources] = []
    run = JITFunction.run

    def record(self: Any, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        found.append(_compile(self, args, kwargs, capability))

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


def _compile(fn: Any, args: tuple[object, ...], kwargs: dict[str, object], capability: int) -> Resources:
    options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    constants = {p.name: values[p.name] for p in fn.params if p.is_constexpr}
    signature, attributes = {}, {}
    for index, name in enumerate(fn.arg_names):
        value = values[name]
        special = isinstance(value, int) and not fn.params[index].do_not_specialize
        if name in constants or (special and value == 1):
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = _type_name(value)
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if fn.is_gluon() else ASTSource
    source = kind(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _inspect(fn.__name__, binary)


def _type_name(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, GluonDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def _inspect(name: str, binary: Any) -> Resources:
    ptx = binary.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        ptxas = get_ptxas(int(re.search(r"\d+", target)[0])).path
        command = [ptxas, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return Resources(
        kernel=name,
        num_warps=binary.metadata.num_warps,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared=binary.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
        async_copies=ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
        serialized="serializ" in report,
    )


def production_calls() -> dict[str, Callable[[], object]]:
    """Calls of every operation at the shapes of an 8B model (32 query and 8 KV heads of 128, bf16)."""
    from kernels.attention_prefill_hopper import new_counters
    from kernels.eight_bit import EightBit
    from kernels.gemm_choice import choose, choose_gated, invariant
    from kernels.ops import AttentionBatch, LogitEdits, Product, SamplingBatch, Sums
    from kernels.skinny_gemm import skinny_gated_product, skinny_linear
    from kernels.triton_ops import TritonOps

    ops, hopper, same_bits = TritonOps(), TritonOps(hopper_counters=new_counters("cpu")), TritonOps(fixed_split=512)
    bf16 = torch.bfloat16
    hidden, intermediate, vocabulary, q_heads, kv_heads, head_dim = 4096, 14336, 128256, 32, 8, 128
    x = torch.zeros(2, hidden, dtype=bf16)
    ints = torch.zeros(8, dtype=torch.int32)
    floats = torch.zeros(2)
    logits = torch.zeros(2, vocabulary)
    long = torch.zeros(2, dtype=torch.int64)
    sampling = SamplingBatch(floats, ints, floats, floats, long, ints, ints)
    unfiltered = SamplingBatch(floats, ints, floats, floats, long, ints, ints, any_filter=False)
    greedy = SamplingBatch.greedy(floats, ints, long)
    typical = SamplingBatch(floats, ints, floats, floats, long, ints, ints, typical_p=floats)
    edits = LogitEdits(
        torch.zeros(1, 512, dtype=torch.int32),
        torch.zeros(1, 512),
        torch.zeros(1, 512, dtype=torch.int32),
        torch.zeros(1, 256, dtype=torch.int32),
        torch.zeros(1, 256, 16, dtype=torch.int32),
    )
    recent = torch.zeros(2, 16, dtype=torch.int32)
    qkv = torch.zeros(2, (q_heads + 2 * kv_heads) * head_dim, dtype=bf16)
    counts, mask = torch.zeros(1, vocabulary, dtype=torch.int32), torch.zeros(1, vocabulary, dtype=torch.bool)
    token_bits = torch.zeros(2, vocabulary // 32, dtype=torch.int32)

    def cache(page: int, kv: int = kv_heads) -> torch.Tensor:
        return torch.zeros(2, page, kv, head_dim, dtype=bf16)

    def attend(
        decodes: int,
        rows: int,
        page: int,
        window: int = 0,
        tree: bool = False,
        ops: TritonOps = ops,
        heads: tuple[int, int] = (q_heads, kv_heads),
    ) -> object:
        batch = AttentionBatch(
            torch.zeros(3, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(2, 256, dtype=torch.int32),
            decodes,
            rows,
            0 if decodes else 2048,
            16384,
            torch.zeros(rows, dtype=torch.int64) if tree else None,
        )
        q = torch.zeros(2 * rows, heads[0], head_dim, dtype=bf16)
        return ops.attention(q, cache(page, heads[1]), cache(page, heads[1]), batch, 0.1, window)

    def rope(norm: torch.Tensor | None, qkv: Product = qkv) -> object:
        k = cache(64)
        table = torch.zeros(8, head_dim)
        return ops.rope_and_cache(qkv, table, ints[:2], ints[:2], k, k, q_heads, kv_heads, norm, norm, 1e-6)

    def product(rows: int) -> object:
        x, weight = torch.zeros(rows, hidden, dtype=bf16), torch.zeros(hidden, hidden, dtype=bf16)
        return skinny_linear(x, weight, None, choose(rows, *weight.shape) or invariant(*weight.shape))

    def gated(rows: int) -> object:
        x, weight = torch.zeros(rows, hidden, dtype=bf16), torch.zeros(2 * intermediate, hidden, dtype=bf16)
        config = choose_gated(rows, *weight.shape)
        assert config is not None
        return skinny_gated_product(x, weight, None, config)

    def same_product(rows: int) -> object:
        x, weight = torch.zeros(rows, hidden, dtype=bf16), torch.zeros(hidden, hidden, dtype=bf16)
        return skinny_linear(x, weight, None, invariant(*weight.shape))

    def sums(width: int) -> Sums:
        return Sums(torch.zeros(8, 2, width), bf16)

    def accept(nodes: int, depth: int) -> object:
        def ints64(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        tree = SimpleNamespace(parents=ints64(nodes), words=ints64(nodes), paths=ints64(nodes, depth + 1))
        tokens, states = ints64(2, nodes), torch.zeros(2 * nodes, hidden, dtype=bf16)
        rows = torch.zeros(2, nodes, dtype=torch.int32)
        return ops.accept_tree(tree, long, tokens, tokens, rows, states, ints[:2], ints, ints64(8), states)

    def heads(rows: int, eight_bit: bool = False) -> object:
        weight, slots = torch.zeros(4, hidden, hidden, dtype=bf16), torch.zeros(rows, dtype=torch.int64)
        read = EightBit.of(weight) if eight_bit else weight
        return ops.residual_block(x[None], read, weight[:, 0], slots)

    table = torch.zeros(8, 264, dtype=torch.int32)
    return {
        "linear, 1 row": lambda: product(1),
        "linear, 4 rows": lambda: product(4),
        "linear, 16 rows": lambda: product(16),
        "linear, 128 rows": lambda: product(128),
        "gated, 1 row": lambda: gated(1),
        "gated, 64 rows": lambda: gated(64),
        "rms_norm": lambda: ops.rms_norm(x, x[0], 1e-6),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, x[0], 1e-6),
        "add_rms_norm of sums": lambda: ops.add_rms_norm(sums(hidden), x, x[0], 1e-6),
        "silu_mul of sums": lambda: ops.silu_mul(sums(2 * intermediate)),
        "rope_and_cache of sums": lambda: rope(qkv[0, :head_dim].clone(), sums(qkv.shape[1])),
        "silu_mul": lambda: ops.silu_mul(torch.zeros(2, 2 * intermediate, dtype=bf16)),
        "rope_and_cache": lambda: rope(None),
        "rope_and_cache, qk-norm": lambda: rope(qkv[0, :head_dim].clone()),
        "attention prefill, P 64": lambda: attend(0, 1, 64),
        "attention prefill, P 16": lambda: attend(0, 1, 16),
        "prefill on Hopper, P 64": lambda: attend(0, 1, 64, ops=hopper),
        "prefill on Hopper, P 16": lambda: attend(0, 1, 16, ops=hopper),
        "prefill on Hopper, 7 heads a group": lambda: attend(0, 1, 64, ops=hopper, heads=(28, 4)),
        "attention prefill, window": lambda: attend(0, 1, 64, window=4096),
        "attention decode, P 64": lambda: attend(2, 1, 64),
        "attention decode, P 16": lambda: attend(2, 1, 16),
        "attention decode, window": lambda: attend(2, 1, 64, window=4096),
        "batch-invariant prefill": lambda: attend(0, 1, 64, ops=same_bits),
        "batch-invariant decode": lambda: attend(2, 1, 64, ops=same_bits),
        "batch-invariant, window": lambda: attend(2, 1, 64, window=4096, ops=same_bits),
        "batch-invariant linear": lambda: same_product(1),
        "attention tree of 16": lambda: attend(2, 16, 64, tree=True),
        "attention tree of 64": lambda: attend(2, 64, 64, tree=True),
        "sample": lambda: ops.sample(logits, sampling),
        "sample, typical": lambda: ops.sample(logits, typical),
        "edit_logits": lambda: ops.edit_logits(logits, edits, ints[:2], ints[:2], recent),
        "sample, no filter": lambda: ops.sample(logits, unfiltered),
        "sample, greedy": lambda: ops.sample(logits, greedy),
        "apply_penalties": lambda: ops.apply_penalties(logits, counts, mask, ints[:2], floats, floats, floats),
        "apply_token_bitmask": lambda: ops.apply_token_bitmask(logits, token_bits, ints[:2]),
        "lay_out, decodes": lambda: ops.lay_out(long, ints[:1], ints, long, table, 64, advance=True),
        "lay_out, tree of 64": lambda: ops.lay_out(long, torch.zeros(64, dtype=torch.int32), ints, long, table, 64),
        "embed": lambda: ops.embed(long, torch.zeros(8, hidden, dtype=bf16)),
        "keep_chosen": lambda: ops.keep_chosen(long, long, long, x, x),
        "accept_tree of 8": lambda: accept(8, 3),
        "accept_tree of 64": lambda: accept(64, 5),
        "residual_block, 1 row": lambda: heads(1),
        "residual_block, 64 rows": lambda: heads(64),
        "residual_block in 8 bits, 1 row": lambda: heads(1, eight_bit=True),
        "residual_block in 8 bits, 64 rows": lambda: heads(64, eight_bit=True),
        "guess_tokens of 64": lambda: ops.guess_tokens(
            torch.zeros(4, 2, vocabulary, dtype=bf16),
            None,
            long,
            torch.zeros(8, dtype=torch.int64),
            long[:1].expand(63),
            10,
        ),
        "move_kv": lambda: ops.move_kv(cache(64)[None], cache(64)[None], ints, ints),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", default="", help="part of an operation's name")
    arguments = parser.parse_args()
    for name, call in production_calls().items():
        if arguments.only in name:
            with compiled_launches(arguments.capability) as launches:
                call()
            for launch in launches:
                print(f"{name:26} {launch}", flush=True)


if __name__ == "__main__":
    main()
