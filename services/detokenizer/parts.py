"""Values of a bucket that may be larger than a message: such a one is stored in parts, and its key says which.

The parts of a key's newest value and of the one before lie in turn in two places, so that a writer which dies half-way has changed
nothing. A checksum tells if two writers at once have mixed their parts. (What is left of a large value when smaller ones follow
stays: at most two of the largest.)
"""

from __future__ import annotations

import zlib

import msgpack

from shared.bus import Bucket, PayloadTooLarge

PART_BYTES = 2**19  # fits into a message of every server that is not set to less than half of nats-server's default
MARK = b"p"  # no value that is stored whole begins so


async def put(bucket: Bucket, key: str, value: bytes, ttl: float | None = None) -> None:
    """Raises BusError: what was there is still there."""
    try:
        await bucket.put(key, value, ttl)
        return
    except PayloadTooLarge:
        present = await bucket.get(key)
    place = 1 - _index(present.value)[0] if present is not None and present.value and present.value[:1] == MARK else 0
    starts = range(0, len(value), PART_BYTES)
    for number, start in enumerate(starts):
        await bucket.put(_part(key, place, number), value[start : start + PART_BYTES], ttl)
    await bucket.put(key, MARK + msgpack.packb((place, len(starts), zlib.crc32(value))), ttl)


async def get(bucket: Bucket, key: str) -> bytes | None:
    """Raises ValueError for parts that do not belong together, BusError."""
    seen = 0
    while (entry := await bucket.get(key)) is not None and entry.value is not None:
        if entry.value[:1] != MARK:
            return entry.value
        if entry.revision == seen:
            raise ValueError("parts of several values")
        seen = entry.revision  # a newer value may have taken the place of this one's parts while they were read
        place, count, checksum = _index(entry.value)
        parts = [await bucket.get(_part(key, place, number)) for number in range(count)]
        value = b"".join(part.value for part in parts if part is not None and part.value is not None)
        if zlib.crc32(value) == checksum:
            return value
    return None


def _index(value: bytes) -> tuple[int, int, int]:
    """Where the parts are, how many, and the checksum of all."""
    place, count, checksum = msgpack.unpackb(value[1:])
    return place, count, checksum


def _part(key: str, place: int, number: int) -> str:
    return f"{key}.part.{place}.{number}"
