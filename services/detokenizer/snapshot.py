"""A partition's state as bytes, and an ended request's: what a new owner starts from instead of the whole log."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgpack

from services.detokenizer.answer import Answer
from services.detokenizer.decoding import NewDecoding
from shared.messages import Open, ReplyTo
from shared.tokenlog import PartitionFold, RequestState, Terminal

VERSION = 1
# Below this size compression costs more time than it saves (ids hardly compress).
COMPRESS_ABOVE = 2**20
# Of thousands of ended requests, which share them: more than half of what each would take.
_OPENED, _FINISHED = Open("", ReplyTo(""), 0, 0, 0), Terminal("finished")


class Snapshot(NamedTuple):
    """`seq` and `stamp` are those of the last entry folded; `settled` and `archived` are keys of ended requests."""

    seq: int
    stamp: float
    fold: PartitionFold
    answers: dict[str, Answer]
    settled: set[str]
    archived: set[str]


def pack(
    seq: int,
    stamp: float,
    fold: PartitionFold,
    answers: Mapping[str, Answer],
    settled: Collection[str],
    archived: Collection[str],
) -> bytes:
    rows = {key: answer.row() for key, answer in answers.items()}
    data: bytes = msgpack.packb((VERSION, seq, stamp, fold.snapshot(), rows, list(settled), list(archived)))
    return b"z" + zlib.compress(data, 1) if len(data) > COMPRESS_ABOVE else b"r" + data


def unpack(data: bytes, new_decoding: NewDecoding) -> Snapshot:
    """Raises ValueError for bytes that are no snapshot of this version."""
    try:
        body = zlib.decompress(data[1:]) if data[:1] == b"z" else data[1:]
        version, *rest = msgpack.unpackb(body, strict_map_key=False)
        if version != VERSION:
            raise ValueError(f"version {version}")
        seq, stamp, fold_data, rows, settled, archived = rest
        fold = PartitionFold.restore(fold_data)
        answers = {key: Answer.restore(fold.requests[key], new_decoding, row) for key, row in rows.items()}
        for key in archived:
            lighten(fold.requests[key])
    except Exception as error:
        raise ValueError(f"not a snapshot: {error!r}") from error
    return Snapshot(seq, stamp, fold, answers, set(settled), set(archived))


def pack_answer(answer: Answer) -> bytes:
    """An ended request, complete: it is kept apart from the partition's state, and only looked up when somebody asks."""
    fold = PartitionFold()
    fold.requests[answer.state.key] = answer.state
    return pack(0, 0.0, fold, {answer.state.key: answer}, (), ())


def unpack_answer(data: bytes, new_decoding: NewDecoding) -> Answer:
    (answer,) = unpack(data, new_decoding).answers.values()
    return answer


def lighten(state: RequestState) -> None:
    """Takes from an ended request what the fold's rules do not need: that it was opened and how it ended stays."""
    assert state.opened is not None and state.terminal is not None
    state.opened = _OPENED
    if state.terminal == _FINISHED:
        state.terminal = _FINISHED
    state.reply = None
    state.choices = []
    state.prompt = None
