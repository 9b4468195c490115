"""Which tokens a step may choose where sequences follow grammars, worked out on the host while the forward pass runs.

The masks of a step depend on the tokens of the step before it, so they are made when that one has been read back and the forward pass
of this one is under way. They are uploaded beside it and awaited by the choice of tokens alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from collections.abc import Sequence as SequenceABC
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLExecutor
from numpy.typing import NDArray

from kernels.ops import Ops
from services.model_worker.sampler import RowMasks
from services.model_worker.sequence import Sequence, Status
from services.model_worker.speculation.tree import Tree
from services.model_worker.step_plan import StepPlan
from shared.structured import Matcher

_MOST_THREADS = 16


class TokenMasks:
    """Static tables, one row for each sampled row at most, in pinned memory and on the device. The engine's thread alone calls it.

    rows: the most that a step samples, nodes of trees among them; special_ids: tokens that are no text, ends not among them.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device, special_ids: Collection[int]) -> None:
        pinned = device.type == "cuda"
        self._words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._host = torch.zeros(rows, self._words, dtype=torch.int32, pin_memory=pinned)
        self._host_rows = torch.full((rows,), -1, dtype=torch.int32, pin_memory=pinned)
        self._array, self._row_array = self._host.numpy(), self._host_rows.numpy()
        self._masks = torch.zeros(rows, self._words, dtype=torch.int32, device=device) if pinned else self._host
        self._mask_rows = torch.full((rows,), -1, dtype=torch.int32, device=device) if pinned else self._host_rows
        self._uploads = torch.cuda.Stream(device) if pinned else None
        self._uploaded = torch.cuda.Event() if pinned else None
        self._special_ids = sorted(token for token in special_ids if token < vocab_size)
        special = np.zeros(self._words, dtype=np.uint32)
        ids = np.array(self._special_ids, dtype=np.int64)
        np.bitwise_or.at(special, ids >> 5, (1 << (ids & 31)).astype(np.uint32))
        self._special_words = special.nonzero()[0]
        self._special_bits = special[self._special_words].view(np.int32)
        threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - 1))
        self._executor = LLExecutor(threads)
        self._walkers = ThreadPoolExecutor(threads, "masks")

    def fill(self, plan: StepPlan, guesses: list[list[int]] | None) -> RowMasks:
        """The masks of the rows that `plan` samples; every step launched before it has been read back. guesses: of the decodes' trees
        by sequence and node. A matcher that fails says so by its `error`; its sequence's tokens are not to be used."""
        nodes, decodes = plan.nodes, len(plan.decodes)
        total = decodes * nodes + len(plan.sampled) - decodes
        rows = self._row_array[:total]
        rows[:] = -1
        single: list[tuple[Matcher, int]] = []  # (matcher, row of masks)
        walks: list[tuple[Sequence, list[int], int, int]] = []  # (sequence, guesses, first row, first row of masks)
        used = 0
        for place, sequence in enumerate(plan.sampled):
            matcher = sequence.matcher
            if matcher is None or matcher.error or sequence.status is Status.FINISHED:
                continue
            if place < decodes and nodes > 1:
                assert guesses is not None
                walks.append((sequence, guesses[place], place * nodes, used))
                used += nodes
            else:
                rows[place + decodes * (nodes - 1)] = used
                single.append((matcher, used))  # type: ignore[arg-type]
                used += 1
        self._fill_single(single)
        if walks:
            assert plan.tree is not None
            self._fill_trees(plan.tree, walks)
        self._upload(total, used)
        return RowMasks(self._masks, self._mask_rows[:total])

    def _address(self, row: int) -> int:
        return self._host.data_ptr() + row * self._words * 4

    def _fill_single(self, matchers: list[tuple[Matcher, int]]) -> None:
        """All at once, by the library's own threads and without the GIL."""
        try:
            self._executor.unsafe_compute_mask_ptr(
                [(matcher.raw, row) for matcher, row in matchers], self._address(0), self._words * 4, len(self._array)
            )
            for matcher, _ in matchers:
                matcher.check()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is no Exception
            # One of them is broken, and only that one may suffer for it.
            for matcher, row in matchers:
                matcher.fill_mask(self._address(row), self._words * 4)
        for matcher, row in matchers:
            if matcher.error:
                self._array[row] = -1
            else:
                self._mend(matcher, row)

    def _mend(self, matcher: Matcher, row: int) -> None:
        """See Matcher.mistaken."""
        mask = self._array[row]
        if not (mask[self._special_words] & self._special_bits).any():
            return
        for token in self._special_ids:
            if _has(mask, token) and (ordinary := matcher.mistaken(token)) is not None:
                mask[token >> 5] &= ~_bit(token)
                mask[ordinary >> 5] |= _bit(ordinary)

    def _fill_trees(self, tree: Tree, walks: list[tuple[Sequence, list[int], int, int]]) -> None:
        def walk(sequence: Sequence, tokens: list[int], first: int, base: int) -> None:
            filled = self._walk(tree, sequence, tokens, base)
            self._row_array[first : first + tree.size] = filled

        if len(walks) == 1:
            walk(*walks[0])
        else:
            list(self._walkers.map(lambda item: walk(*item), walks))

    def _walk(self, tree: Tree, sequence: Sequence, tokens: SequenceABC[int], base: int) -> list[int]:
        """Follows every path of the tree that the grammar allows, and leaves the matcher where it was. Returns each node's row of
        masks; -1 for what can never be accepted, since its parent's mask forbids it."""
        matcher, stops, children = sequence.matcher, sequence.stops, _children(tree)
        rows = [-1] * tree.size

        def visit(node: int) -> bool:
            row = base + node
            if not matcher.fill_mask(self._address(row), self._words * 4):  # type: ignore[union-attr]
                return False
            rows[node] = row
            self._mend(matcher, row)  # type: ignore[arg-type]
            mask = self._array[row]
            for child in children[node]:
                token = tokens[child]
                # What follows a token that ends the sequence is never looked at.
                if token in stops or not _has(mask, token):
                    continue
                if not (matcher.advance((token,)) and visit(child) and matcher.rollback(1)):  # type: ignore[union-attr]
                    return False
            return True

        visit(0)
        return rows

    def _upload(self, total: int, used: int) -> None:
        if self._uploads is None or self._uploaded is None:
            return
        # The last choice that read the device's tables has been read back, so they are free.
        with torch.cuda.stream(self._uploads):
            self._masks[:used].copy_(self._host[:used], non_blocking=True)
            self._mask_rows[:total].copy_(self._host_rows[:total], non_blocking=True)
            self._uploaded.record()
        torch.cuda.current_stream().wait_event(self._uploaded)

    def warm_up(self, ops: Ops, dtype: torch.dtype) -> None:
        """Compiles what the choice of tokens does with `fill`'s result. Triton compiles a kernel anew for a pointer that is not
        aligned, as that of a part of the rows may be."""
        for kind in {dtype, torch.float32}:
            logits = torch.zeros(1, self._vocab_size, dtype=kind, device=self._masks.device)
            for first in (0, 1):
                ops.apply_token_bitmask(logits, self._masks, self._mask_rows[first : first + 1])

    def close(self) -> None:
        self._walkers.shutdown(wait=False, cancel_futures=True)


def _bit(token: int) -> np.int32:
    return np.uint32(1 << (token & 31)).view(np.int32)


def _has(mask: NDArray[np.int32], token: int) -> bool:
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


@lru_cache(maxsize=64)
def _children(tree: Tree) -> list[list[int]]:
    """By node."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for node, parent in enumerate(tree.parents[1:], start=1):
        children[parent].append(node)
    return children
