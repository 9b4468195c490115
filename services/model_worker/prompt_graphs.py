"""Forward passes with prompts in them, without the host's work: CUDA graphs of all that lies between two layers' attentions.

A step of prompts has as many shapes as there are ways to cut prompts up, so it cannot be captured whole. But only attention knows of
sequences; everything else sees rows. That is captured, padded to some number of rows, and attention is launched between the pieces.
Of a small model's step the host's launches take longer than the device's work: they are what this saves.

A step of few sequences is captured whole all the same: its attention is launched for as many sequences, each as long as the step,
as the graph is made for, and programs of those that are not there, or shorter, end at once. Where it holds prompts alone, all that
the graph reads comes from the host, and nothing needs to be launched before it but the copy of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionBatch, Product, whole
from services.model_worker.cuda_graphs import Graphs, padded_size
from services.model_worker.models.decoder import Decoder
from services.model_worker.step_state import Staging, round_up

# Parameters × rows of a pass from which the device takes longer than the host would without graphs.
WORTHWHILE = 4e12
# A third at most is filled up, from 256 rows on a quarter.
_SIZES = (
    16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
    3584, 4096, 5120, 6144, 7168, 8192,
)  # fmt: skip

# Most rows of steps that are captured whole, and the numbers of sequences that such graphs are made for. Longer steps keep the device
# busy for as long as the host launches their pieces.
WHOLE_ROWS = 2048
WHOLE_SEQUENCES = (1, 8)
_STARTS = round_up(WHOLE_SEQUENCES[-1] + 1, 4)  # words, so that what comes behind is aligned
# Tokens in the cache up to which a whole step also takes decodes, as prompts of one row: their contexts are not split.
WHOLE_CONTEXT = 2048

Caches = list[tuple[Tensor, Tensor]]
T = TypeVar("T", Tensor, NDArray[np.int32])


def prompt_sizes(parameters: int, most_rows: int) -> list[int]:
    """Numbers of rows for which graphs of a model's passes are worth their memory. parameters: of its layers; most_rows: of a step."""
    most = min(most_rows, int(WORTHWHILE / parameters))
    return [size for size in _SIZES if size <= most]


def whole_shapes(sizes: list[int]) -> list[tuple[int, int]]:
    """(rows, sequences) of the steps that are captured whole, by falling rows."""
    return [(size, sequences) for size in reversed(sizes) if size <= WHOLE_ROWS for sequences in WHOLE_SEQUENCES]


class PromptGraphs:
    """`Decoder.forward` for at most `sizes[-1]` rows; the caches are the model's own and stay where they are. rows int32 [3, ≥
    sizes[-1]]: where a step's ids, positions and places in the cache will be. max_blocks: columns of block tables, None: no step is
    captured whole. in_flight: see Staging.

    All sizes share what goes from piece to piece: a pass uses the first rows. Rows that only fill up are computed
    like the others, and reach neither the cache nor attention.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Caches,
        rows: Tensor,
        sizes: list[int],
        max_blocks: int | None,
        in_flight: int,
    ) -> None:
        config, embedding = decoder.config, decoder.weights.embedding
        most, device = sizes[-1], embedding.device
        self.sizes = sizes
        self._decoder = decoder
        self._caches = caches
        self._rows = rows
        self._ids, self._positions, self._slots = rows
        self._slots.fill_(-1)  # what is rehearsed and captured writes nothing
        shape = (most, config.num_heads, config.head_dim)
        self._queries = torch.zeros(shape, dtype=embedding.dtype, device=device)
        self._attended = torch.zeros(shape, dtype=embedding.dtype, device=device)
        self._residual = torch.zeros(most, config.hidden_size, dtype=embedding.dtype, device=device)
        self._added = torch.zeros_like(self._residual)
        self._whole_shapes = [] if max_blocks is None else whole_shapes(sizes)
        sequences = WHOLE_SEQUENCES[-1]
        self._layout = torch.zeros(2 * _STARTS + sequences * (max_blocks or 1), dtype=torch.int32, device=device)
        self._starts, self._contexts, self._table = self._parts(self._layout)
        longest = max((size for size, _ in self._whole_shapes), default=0)
        self._staging = Staging(3 * longest + len(self._layout), device, in_flight)
        self._row_each = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self._graphs: Graphs

    def fits(self, rows: int) -> bool:
        return rows <= self.sizes[-1]

    def rehearse(self) -> None:
        """The largest of each kind of piece, launched from the host: takes the memory that a capture takes."""
        size = self.sizes[-1]
        self._begin(size)
        self._between(size, min(1, len(self._caches) - 1))
        self._end(size)
        if self._whole_shapes:
            self._whole(*self._whole_shapes[0])

    def capture(self, graphs: Graphs, progress: Callable[[float], None]) -> None:
        """The largest first, so that the others fit into its memory."""
        self._graphs = graphs
        layers = len(self._caches)
        for done, size in enumerate(reversed(self.sizes)):
            progress(done / len(self.sizes))
            graphs.capture(("prompt", size, 0), partial(self._begin, size))
            for index in range(1, layers):
                graphs.capture(("prompt", size, index), partial(self._between, size, index), rehearsed=index > 1)
            graphs.capture(("prompt", size, layers), partial(self._end, size))
        for size, sequences in self._whole_shapes:
            whole = partial(self._whole, size, sequences)
            whole(self._decoder.rehearsal_layers)
            graphs.capture(("prompts", size, sequences), whole, rehearsed=True)

    def forward(
        self,
        rows: int,
        batch: AttentionBatch,
        wanted: Tensor,
        last: AttentionBatch | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.forward`, of so many rows. sequences int32 [R]: of `batch`, whose last rows are the `wanted` ones; None: others
        are wanted, too."""
        decoder = self._decoder
        size = padded_size(self.sizes, rows)
        if rows < size:
            self._slots[rows:size].fill_(-1)
        if sequences is not None and (shape := self._shape_for(rows, batch)) is not None:
            self._lay_out(batch, rows, shape[1])
            hidden: Tensor = self._graphs.replay(("prompts", *shape))
            return hidden.index_select(0, sequences)
        for index in range(len(self._caches)):
            self._graphs.replay(("prompt", size, index))
            if last is not None and index == len(self._caches) - 1:
                return decoder.last_rows(self._queries[:rows], self._residual[:rows], self._caches[index], wanted, last)
            self._attend(rows, index, batch)
        self._graphs.replay(("prompt", size, len(self._caches)))
        return decoder.hidden(self._added[:rows], self._residual[:rows], wanted)

    def whole_shape(self, rows: int, sequences: int) -> tuple[int, int] | None:
        """(rows, sequences) that the graph of a step of so many is made for; None: it is not captured whole."""
        if not self.fits(rows):
            return None
        size = padded_size(self.sizes, rows)
        fitting = [shape for shape in self._whole_shapes if shape[0] == size and shape[1] >= sequences]
        return min(fitting, default=None)

    def forward_prompts(
        self,
        shape: tuple[int, int],
        rows: NDArray[np.int32],
        ends: NDArray[np.int32],
        contexts: list[int],
        tables: list[list[int]],
    ) -> Tensor:
        """A step of prompts alone, by the graph of its `whole_shape`, told by the host: ids, positions and places in the cache int32
        [3, T]; of each sequence where its rows end, its context with them and its blocks → the final hidden states of the last rows,
        [≥ sequences, H], valid until the next pass is launched."""
        count, size = rows.shape[1], shape[0]
        padded = np.zeros((3, size), dtype=np.int32)
        padded[2, count:] = -1
        padded[:, :count] = rows
        layout = np.zeros(len(self._layout), dtype=np.int32)
        starts, contexts_of, table = self._parts(layout)
        starts[1:] = count  # of those that are not there
        starts[1 : len(ends) + 1] = ends
        contexts_of[: len(contexts)] = contexts
        for row, blocks in zip(table, tables, strict=False):
            row[: len(blocks)] = blocks
        self._staging.begin()
        staged_rows, staged_layout = self._staging.put(padded.ravel()), self._staging.put(layout)
        self._staging.upload()
        self._rows[:, :size].copy_(staged_rows.view(3, size))
        self._layout.copy_(staged_layout)
        hidden: Tensor = self._graphs.replay(("prompts", *shape))
        return hidden

    def _attend(self, rows: int, index: int, batch: AttentionBatch) -> None:
        decoder, (keys, values) = self._decoder, self._caches[index]
        queries, attended, window = self._queries[:rows], self._attended[:rows], decoder.config.windows[index]
        decoder.ops.attention(queries, keys, values, batch, decoder.scale, window, attended)

    # A step as a whole.

    @staticmethod
    def _parts(layout: T) -> tuple[T, T, T]:
        """Where the sequences' rows start, their contexts, their block tables [sequences, columns]."""
        return layout[:_STARTS], layout[_STARTS : 2 * _STARTS], layout[2 * _STARTS :].reshape(WHOLE_SEQUENCES[-1], -1)

    def _shape_for(self, rows: int, batch: AttentionBatch) -> tuple[int, int] | None:
        if batch.decode_seqs and (batch.decode_rows > 1 or batch.max_context > WHOLE_CONTEXT):
            return None
        return self.whole_shape(rows, batch.context_len.shape[0])

    def _lay_out(self, batch: AttentionBatch, rows: int, sequences: int) -> None:
        count = batch.context_len.shape[0]
        self._starts[: count + 1].copy_(batch.query_start)
        self._contexts[:count].copy_(batch.context_len)
        self._table[:count].copy_(batch.block_table)
        if count < sequences:
            self._starts[count + 1 : sequences + 1].fill_(rows)
            self._contexts[count:sequences].fill_(0)

    def _whole(self, size: int, sequences: int, layers: int | None = None) -> Tensor:
        """The final hidden state of each sequence's last row, [sequences, H]; of one that is not there, anything. layers: only
        so many, to rehearse."""
        starts, contexts, table = self._starts[: sequences + 1], self._contexts[:sequences], self._table[:sequences]
        longest = len(self._decoder.cos_sin)
        batch = AttentionBatch(starts, contexts, table, 0, 1, max_query=size, max_context=longest)
        of_last = AttentionBatch(
            self._row_each[: sequences + 1], contexts, table, sequences, 1, max_query=0, max_context=longest
        )
        self._begin(size)
        for index in range(len(self._caches[:layers]) - 1):
            self._attend(size, index, batch)
            self._between(size, index + 1)
        rows = (starts[1:] - 1).clamp_(min=0)  # nobody's, when it is captured
        return self._decoder.last_rows(self._queries[:size], self._residual[:size], self._caches[-1], rows, of_last)

    # The pieces: from the ids to the first layer's attention, from one attention to the next, from the last one on.

    def _begin(self, size: int) -> None:
        self._decoder.embed(self._ids[:size], self._residual[:size])
        self._query(size, 0, None)

    def _between(self, size: int, index: int) -> None:
        self._query(size, index, self._after_attention(size, index - 1))

    def _end(self, size: int) -> None:
        self._added[:size].copy_(whole(self._after_attention(size, len(self._caches) - 1)))

    def _after_attention(self, size: int, index: int) -> Product:
        return self._decoder.after_attention(index, self._attended[:size], self._residual[:size])

    def _query(self, size: int, index: int, x: Product | None) -> None:
        residual, positions, slots = self._residual[:size], self._positions[:size], self._slots[:size]
        self._decoder.queries(index, x, residual, positions, slots, self._caches[index], self._queries[:size])
