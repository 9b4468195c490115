"""Steps before the first request, so that no kernel is compiled while somebody waits and the step's bound runs."""

from __future__ import annotations

from itertools import count

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.interface import EngineRequest
from services.model_worker.logit_edits import edit_row
from services.model_worker.model_runner import ModelRunner
from services.model_worker.sampler import SamplingMode
from services.model_worker.speculation.controller import ENOUGH, TreeController
from services.model_worker.speculation.tree import Tree
from services.model_worker.step_plan import SchedulerLimits
from services.model_worker.step_state import field_row
from shared.sampling import SamplingParams

# Triton compiles a kernel anew for an integer argument of 1, for multiples of 16, and for all others.
_BATCHES = (1, 3, 16)
_KINDS = (
    SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0),
    SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0),
    SamplingParams(
        max_tokens=4,
        ignore_eos=True,
        temperature=1.0,
        top_k=4,
        top_p=0.9,
        presence_penalty=1.0,
        logprobs=1,
        typical_p=0.9,
        prompt_logprobs=1,
        bad_words=((1, 2),),
    ),
)
# Attention of many sequences that need not be split is computed by other programs than that of few; where there are prompts beside
# them it is no part of a graph.
_MANY = (32, 128)
_PROMPT = 20  # tokens


def warm_up(runner: ModelRunner, limits: SchedulerLimits, num_blocks: int) -> int:
    """Runs prompts alone, decodes alone and both together, with each kind of sampling. Returns the number of steps.

    It has a scheduler of its own; what it leaves in the cache and in slots is overwritten before it is read.
    """
    scheduler = BatchScheduler(limits, BlockPool(num_blocks, prefix_cache=False))

    names = map(str, count())

    def add(params: SamplingParams, name: str = "") -> None:
        length = min(_PROMPT, limits.max_model_len - 1)
        request = EngineRequest(
            name or next(names), 0, 0, [0] * length, params, prompt_done=0 if params.logprobs else None
        )
        sequence = scheduler.add(request)
        sequence.device_row = field_row(params, 0, length)
        sequence.edit_row = edit_row(params, ())
        sequence.sampling_mode = SamplingMode.of(params)

    def step(tree: Tree | None = None) -> bool:
        plan = scheduler.schedule(lambda _: tree)
        if plan is None:
            return False
        result = runner.launch(plan).result()
        scheduler.retire(plan, result.decoded, result.ids, result.logprobs, result.reports, result.candidates)
        return True

    def beside_a_prompt(decodes: int, tree: Tree | None = None) -> None:
        for _ in range(decodes):
            add(_KINDS[0])
        step()
        add(_KINDS[0])
        while step(tree):
            pass

    last_rows_from = runner.last_rows_from
    with runner.context():
        for batch in _BATCHES:
            if batch < limits.max_seqs:
                for params in _KINDS:
                    runner.last_rows_from = 0 if params is _KINDS[0] else last_rows_from
                    for _ in range(batch):
                        add(params)
                    step()
                    step()
                    add(params)  # its prompt runs together with the others' decodes
                    while step():
                        pass
        runner.last_rows_from = last_rows_from
        for batch in _many(_BATCHES[-1], limits.max_seqs - 1):
            beside_a_prompt(batch)
        if limits.max_seqs > 1:
            for _ in range(2):
                add(_KINDS[0], "choices of one request")
            while step():
                pass
        for params in _searches(runner, limits):
            for _ in range(3):
                add(params)
            while step():
                pass
        for tree in (
            [] if runner.verifier is None else [device_tree.tree for device_tree in runner.verifier.trees.values()]
        ):
            sizes = [size for size, nodes in runner.decode_shapes() if nodes == tree.size]
            few = max(size for size in sizes if size <= 4)
            for drafting in (few, *_many(few, max(sizes))):
                beside_a_prompt(drafting - 1, tree)
    return scheduler.steps


def _many(fewer: int, most: int) -> list[int]:
    """Batches of more than `fewer` sequences, of `most` at most."""
    return sorted({size for size in (*_MANY, most) if fewer < size <= most})


def _searches(runner: ModelRunner, limits: SchedulerLimits) -> list[SamplingParams]:
    """Those that can run here."""
    kinds = []
    if limits.max_seqs > 2:
        kinds.append(SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0, num_beams=3))
    if runner.search.memories is not None:
        kinds.append(SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0, penalty_alpha=0.5, top_k=3))
    if runner.search.amateur is not None:
        kinds.append(SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, cd_alpha=0.1, top_k=4))
    return kinds


def time_decodes(runner: ModelRunner, controller: TreeController) -> None:
    """What captured decode steps take on an empty cache, for all sizes: the controller's first idea of them."""
    with runner.context():
        shapes = runner.decode_shapes()
        runner.time_graph(*shapes[0], times=20)  # a device that has waited for compilers may have to wake up first
        for size, nodes in shapes:
            tree = None if runner.verifier is None or nodes == 1 else runner.verifier.trees[nodes].tree
            controller.expect(size, tree, runner.time_graph(size, nodes, ENOUGH))
