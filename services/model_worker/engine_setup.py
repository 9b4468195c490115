"""From a configuration to an engine's parts: reads the model, sizes the cache, compiles and captures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from kernels import select_ops
from kernels.ops import Ops
from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.cuda_graphs import CudaGraphs, padded_sizes
from services.model_worker.kv_cache import KVCache, block_bytes
from services.model_worker.loader import Progress, load_weights, tokenizer_vocabulary
from services.model_worker.model_runner import ModelRunner
from services.model_worker.models.config import ModelConfig, ModelError, load_config
from services.model_worker.models.decoder import Decoder, Weights, dummy_weights
from services.model_worker.search.contrastive import Amateur, Memories
from services.model_worker.speculation.controller import TreeController
from services.model_worker.speculation.drafter import load_drafter
from services.model_worker.speculation.verify import Speculation
from services.model_worker.step_plan import SchedulerLimits
from services.model_worker.warm_up import time_decodes, warm_up
from shared.sampling import MAX_CONTRASTIVE

log = structlog.get_logger()

# Of a process that computes on a CUDA device, beside what PyTorch's allocator holds: the context, kernels, the libraries' own.
_CONTEXT_BYTES = 1 << 30

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """model                a Hugging Face folder
    load_format          "auto", or "dummy": random weights, only config.json is read
    device, dtype        "auto": CUDA if there is one, in bfloat16; else the CPU, in float32
    max_model_len        None: what the model is made for; always at most what the cache holds
    max_batched_tokens   rows of a step
    block_size           tokens in a block of the cache; None: 64 on CUDA, 16 on a CPU
    num_blocks           None: as many as fit, on CUDA into gpu_memory_fraction of the device's memory (of this process,
                         whatever others hold), on a CPU into cpu_cache_bytes
    heads                folder of a drafter for the model; None: `medusa` in the model's folder, if there is one
    speculate            False: no drafter is loaded
    eight_bit_drafts     on CUDA: a copy in 8 bits of the large matrices that guesses are made with, where it is faster
    max_tree_rows        speculation trees of all sequences in a step have at most so many nodes
    batch_invariant      tokens do not depend on what shares their steps, bit by bit; slower, without speculation, on CUDA in bfloat16
    typical_acceptance   (ε, δ): sampled tokens are taken from the drafter when they are plausible, though the distribution is no longer
                         the model's; see speculation.acceptance.typical_match
    amateur              folder of the second model of contrastive decoding, with the same vocabulary; None: there is none
    memories             sequences of contrastive search at a time, 0: it is refused; each keeps up to memory_tokens hidden states
    whole_prompts        with CUDA graphs: steps of few prompts are captured whole, see prompt_graphs
    overlap              plan and launch a step before the one before it is read back; None: on CUDA
    max_waiting          sequences that may wait beside those that run; more are refused
    min_step_bound       seconds; no step is declared to take less, see EngineStats.step_bound
    first_step_bound     the same for the first step, which has no predecessor to learn from
    """

    model: Path
    load_format: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_seqs: int = 256
    max_batched_tokens: int = 8192
    block_size: int | None = None
    num_blocks: int | None = None
    gpu_memory_fraction: float = 0.9
    cpu_cache_bytes: int = 1 << 30
    heads: Path | None = None
    speculate: bool = True
    eight_bit_drafts: bool = True
    batch_invariant: bool = False
    max_tree_rows: int = 512
    typical_acceptance: tuple[float, float] | None = None
    amateur: Path | None = None
    memories: int = 0
    memory_tokens: int = 4096
    prefix_cache: bool = True
    cuda_graphs: bool = True
    whole_prompts: bool = True
    overlap: bool | None = None
    max_waiting: int = 4096
    min_step_bound: float = 2.0
    first_step_bound: float = 60.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    family: str
    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    tree_sizes: tuple[int, ...] = ()
    amateur: bool = False
    memory_tokens: int = 0  # 0: no contrastive search


def build(
    config: EngineConfig, report: Progress
) -> tuple[ModelInfo, BatchScheduler, ModelRunner, TreeController | None]:
    """Raises ModelError. `report` is called with the fraction done and what is being done."""
    report(0.0, "reading the configuration")
    device = _device(config.device)
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in _DTYPES:
        raise ModelError("unsupported_dtype", f"cannot compute in {name}, only in {', '.join(_DTYPES)}")
    dtype = _DTYPES[name]
    model = load_config(config.model)
    longest = min(config.max_model_len or model.max_position, model.max_position)
    with torch.inference_mode():
        if config.load_format == "dummy":
            weights = dummy_weights(model, dtype, device)
        else:
            weights = load_weights(config.model, model, dtype, device, lambda part, text: report(0.8 * part, text))
        ops = _ops(config, device, weights)
        speculation = _speculation(config, model, weights, ops)
        overshoot = 0 if speculation is None else speculation.depth + speculation.trees[-1].size
        if config.memories:
            overshoot = max(overshoot, MAX_CONTRASTIVE)
        decoder = Decoder(model, weights, ops, longest + overshoot)
        amateur = None if config.amateur is None else _amateur(config, model, dtype, device, longest + overshoot)
    limits = SchedulerLimits(
        block_size=config.block_size or (64 if device.type == "cuda" else 16),
        max_model_len=longest,
        max_seqs=config.max_seqs,
        # Whatever else runs, each candidate of contrastive search has a row.
        max_batched_tokens=max(config.max_batched_tokens, config.max_seqs + config.memories * (MAX_CONTRASTIVE - 1)),
        eos_ids=model.eos_ids,
        window=_window(model, amateur),
        overshoot=overshoot,
        memories=config.memories,
    )

    def cache(blocks: int, of_model: ModelConfig = model) -> KVCache:
        return KVCache(of_model, blocks, limits.block_size, dtype, device)

    report(0.8, "sizing the cache")
    memory_tokens = min(config.memory_tokens, longest) if config.memories else 0
    memories = Memories(config.memories, memory_tokens, model.hidden_size, dtype, device) if config.memories else None
    second = None if amateur is None else Amateur(amateur, cache(1, amateur.config))
    whole_prompts = config.whole_prompts and not config.batch_invariant
    runner = ModelRunner(decoder, ops, limits, cache(1), speculation, second, memories, whole_prompts)
    bytes_each = block_bytes(model, limits.block_size, dtype)
    if amateur is not None:
        bytes_each += block_bytes(amateur.config, limits.block_size, dtype)
    blocks = config.num_blocks or _fitting_blocks(config, bytes_each, runner)
    runner.cache = cache(blocks)
    if second is not None:
        second.cache = cache(blocks, second.decoder.config)
    if device.type == "cuda" and config.cuda_graphs:
        runner.capture_graphs(CudaGraphs(), lambda part: report(0.85 + 0.13 * part, "capturing CUDA graphs"))
    # A sequence that has the cache to itself must always be able to go on.
    limits = replace(limits, max_model_len=min(longest, blocks * limits.block_size))
    if device.type == "cuda":
        report(0.98, "warming up")
        warm_up(runner, limits, blocks)
    info = ModelInfo(
        model.family,
        limits.max_model_len,
        model.vocab_size,
        model.eos_ids,
        blocks,
        limits.block_size,
        str(device),
        name,
        () if speculation is None else tuple(tree.size for tree in speculation.trees),
        second is not None,
        memory_tokens,
    )
    controller = None
    if speculation is not None:
        sizes = padded_sizes(limits.max_seqs) if runner.graphs is not None else _powers(limits.max_seqs)
        controller = TreeController(speculation.trees, sizes, speculation.max_rows)
        if runner.graphs is not None:
            report(0.99, "timing trees")
            time_decodes(runner, controller)
    report(1.0, "ready")
    return info, BatchScheduler(limits, BlockPool(blocks, config.prefix_cache)), runner, controller


def _ops(config: EngineConfig, device: torch.device, weights: Weights) -> Ops:
    """Raises ModelError if the batch-invariant mode is wanted and cannot be had."""
    if not config.batch_invariant:
        return select_ops(device)
    if config.heads is not None or config.amateur is not None:
        raise ModelError("unsupported_option", "the batch-invariant mode is without speculation and without an amateur")
    try:
        ops = select_ops(device, batch_invariant=True)
    except ValueError as error:
        raise ModelError("unsupported_option", str(error)) from None
    from kernels.skinny_gemm import invariant_fits  # Triton's: a CPU does without

    for name, weight in _products(weights):
        if not invariant_fits(weight):
            text = f"the batch-invariant mode has no product for {name} ({weight.dtype}, {tuple(weight.shape)})"
            raise ModelError("unsupported_option", text)
    return ops


def _products(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of all matrix products."""
    for number, layer in enumerate(weights.layers):
        for name in ("qkv", "o", "gate_up", "down"):
            yield f"layers.{number}.{name}", getattr(layer, name)
    yield "head", weights.head


def _speculation(config: EngineConfig, model: ModelConfig, weights: Weights, ops: Ops) -> Speculation | None:
    folder = config.heads or config.model / "medusa"
    if not config.speculate or config.batch_invariant or (config.heads is None and not folder.is_dir()):
        return None
    eight_bit = config.eight_bit_drafts and weights.head.is_cuda
    drafter, trees = load_drafter(folder, model, weights.head, ops, eight_bit)
    # Prompts must get on beside sequences with trees.
    max_rows = min(config.max_tree_rows, max(config.max_batched_tokens, config.max_seqs) // 2)
    usable = [tree for tree in trees.trees if tree.size <= max_rows]
    return Speculation(drafter, usable, max_rows, config.typical_acceptance) if usable else None


def _amateur(
    config: EngineConfig, expert: ModelConfig, dtype: torch.dtype, device: torch.device, positions: int
) -> Decoder:
    """Raises ModelError("amateur_mismatch") for a model that cannot follow the expert's tokens."""
    assert config.amateur is not None
    model = load_config(config.amateur)
    if model.vocab_size != expert.vocab_size:
        message = f"the amateur has {model.vocab_size} tokens, the model {expert.vocab_size}"
        raise ModelError("amateur_mismatch", message)
    vocabularies = [tokenizer_vocabulary(folder) for folder in (config.model, config.amateur)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ModelError("amateur_mismatch", "the amateur's tokenizer is another one")
    if model.max_position < min(config.max_model_len or expert.max_position, expert.max_position):
        message = f"the amateur is made for {model.max_position} positions only: set max_model_len"
        raise ModelError("amateur_mismatch", message)
    if config.load_format == "dummy":
        weights = dummy_weights(model, dtype, device, seed=1)
    else:
        weights = load_weights(config.amateur, model, dtype, device)
    return Decoder(model, weights, select_ops(device), positions)


def _window(model: ModelConfig, amateur: Decoder | None) -> int:
    """A block is needed as long as one of the models needs it."""
    windows = [model.window] if amateur is None else [model.window, amateur.config.window]
    return max(windows) if all(windows) else 0


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length() + 1)]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError("unsupported_device", f"{name} is no device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("unsupported_device", "there is no CUDA device here")
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _fitting_blocks(config: EngineConfig, bytes_each: int, runner: ModelRunner) -> int:
    """As many blocks as there is memory for, and no more than all slots could fill."""
    limits, device = runner.limits, runner.device
    if device.type == "cuda":
        reserve = runner.profile()
        free, total = torch.cuda.mem_get_info(device)
        # What others hold of the device is not ours to count: several workers may share it. What is free is not ours alone, either.
        share = int(total * config.gpu_memory_fraction) - torch.cuda.memory_reserved(device)
        if free < share:
            log.warning("others_hold_the_share", free=free, share=share, fraction=config.gpu_memory_fraction)
        room = min(share, free) - _CONTEXT_BYTES - reserve
    else:
        room = config.cpu_cache_bytes
    blocks = min(room // bytes_each, limits.max_seqs * limits.blocks_of(limits.max_model_len))
    if blocks < 1:
        raise ModelError("out_of_memory", f"{room / 1e9:.2f} GB are left for the KV cache, not enough for one block")
    return int(blocks)
