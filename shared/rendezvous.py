"""Rendezvous hashing (Thaler & Ravishankar 1998, "Using name-based mappings to increase hit rates"): everybody who knows the same
nodes names the same owner of a thing, and when a node comes or goes only the things it owns move.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b


def _weight(thing: str, node: str) -> bytes:
    return blake2b(f"{node}\0{thing}".encode(), digest_size=8).digest()


def rank(thing: str, nodes: Iterable[str]) -> list[str]:
    """The nodes in order of their claim to `thing`, best first. The order of `nodes` does not matter."""
    return sorted(set(nodes), key=lambda node: (_weight(thing, node), node), reverse=True)


def owner(thing: str, nodes: Iterable[str]) -> str | None:
    """The node that owns `thing`, None if there is no node."""
    return max(nodes, key=lambda node: (_weight(thing, node), node), default=None)
