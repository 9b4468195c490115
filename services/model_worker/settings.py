"""Settings of the model worker."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.config import StageSettings


class Fault(BaseModel):
    """What goes wrong when a request of the fixed engine comes to a position: "error" fails the request, "raise" the step, "hang" never
    ends the step, "kill" ends the process with SIGKILL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["error", "raise", "hang", "kill"]
    position: int = Field(0, ge=0)


class FixedEngineSettings(BaseModel):
    """The engine without a model (fixed_engine.py), for benchmarks of the pipeline and tests of its protocol.

    faults   by token id: the fault befalls every request whose prompt holds that id
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step_time: float = Field(0.025, ge=0, description="seconds")
    vocab_size: int = Field(512, ge=2)
    first_id: int = Field(3, ge=0, description="generated ids are first_id .. vocab_size - 1")
    eos_id: int = Field(2, ge=0)
    eos_after: int = Field(0, ge=0, description="tokens, the eos included; 0: never")
    max_model_len: int = Field(1 << 20, ge=2)
    kv_tokens: int = Field(1 << 24, ge=1)
    prompt_rows: int = Field(8, ge=1, description="tokens of a prompt whose log-probabilities a step tells")
    faults: dict[int, Fault] = {}


class WorkerSettings(StageSettings):
    stage: ClassVar[str] = "model_worker"

    engine: Literal["torch", "fixed"] = Field("torch", description="fixed: no model at all, for tests of the pipeline")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on a CPU"
    )
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights, only config.json is read")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: its own choice")
    max_model_len: int | None = Field(None, ge=2, description="tokens; default: what the model is made for")
    max_seqs: int = Field(256, ge=1, description="sequences that run at the same time")
    max_waiting: int = Field(
        64, ge=0, description="sequences that wait for a slot; beyond, runs are refused as overloaded"
    )
    max_batched_tokens: int = Field(8192, ge=1, description="rows of one step, prompts and decodes together")
    block_size: int | None = Field(
        None, ge=1, description="tokens in a block of the KV cache; default: 64 on CUDA, 16 on a CPU"
    )
    num_blocks: int | None = Field(None, ge=1, description="blocks of the KV cache; default: as many as fit")
    gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="of the device's memory, for weights, cache and all; less where workers share it"
    )
    cpu_cache_bytes: int = Field(1 << 30, ge=1, description="memory of the KV cache on a CPU")
    speculate: bool = Field(True, description="guess tokens ahead, if the model has a drafter; the output is the same")
    batch_invariant: bool = Field(
        False, description="tokens do not depend on what shares their steps, bit by bit; slower, without speculation"
    )
    eight_bit_drafts: bool = Field(
        True,
        description="on a GPU, guess with 8-bit copies of the drafter's large matrices; what counts is still checked in 16 bits",
    )
    heads: str | None = Field(None, description="folder of the drafter; default: medusa in the model's folder, if any")
    max_tree_rows: int = Field(512, ge=2, description="guessed tokens of all sequences in a step, at most")
    typical_acceptance: tuple[float, float] | None = Field(
        None, description="epsilon and delta: take plausible guesses for sampled tokens; changes the distribution"
    )
    amateur: str | None = Field(
        None, description="folder of the second model of contrastive decoding, with the same tokenizer; default: none"
    )
    memories: int = Field(
        4, ge=0, description="sequences of contrastive search at the same time; others wait. 0: refused"
    )
    memory_tokens: int = Field(4096, ge=2, description="longest sequence of contrastive search")
    prefix_cache: bool = Field(True, description="keep the KV blocks of prompts for those that begin alike")
    cuda_graphs: bool = Field(True, description="replay common steps as graphs: a longer start, shorter steps")
    min_step_bound: float = Field(2.0, gt=0, description="seconds; no step is taken for stalled before")
    first_step_bound: float = Field(
        60.0, gt=0, description="the same for the first step of a kind, which may have to compile"
    )
    outbox_limit: int = Field(
        256, ge=1, description="token messages not yet acknowledged by NATS; beyond, the engine pauses"
    )
    remember_ended: int = Field(8192, ge=1, description="at most so many ended requests' epochs are remembered")
    fixed: FixedEngineSettings = Field(FixedEngineSettings.model_validate({}), description="the engine without a model")
