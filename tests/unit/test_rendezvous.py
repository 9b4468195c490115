"""Rendezvous hashing: everybody agrees, and only what has to move moves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shared.rendezvous import owner, rank

nodes = st.lists(st.text("abcdef-0123", min_size=1, max_size=8), min_size=1, max_size=8, unique=True)
THINGS = [f"m.{i}" for i in range(64)]


@given(nodes, st.randoms())
def test_the_order_of_nodes_does_not_matter(names, random):
    shuffled = names[:]
    random.shuffle(shuffled)
    for thing in THINGS[:8]:
        assert owner(thing, names) == owner(thing, shuffled) == rank(thing, shuffled)[0]


@given(nodes)
def test_only_the_things_of_a_node_that_goes_move_and_each_to_its_second(names):
    gone, left = names[0], names[1:]
    for thing in THINGS:
        before = owner(thing, names)
        after = owner(thing, left)
        if before != gone:
            assert after == before
        elif left:
            assert after == rank(thing, names)[1]
        else:
            assert after is None


def test_things_are_spread():
    counts = Counter(owner(f"m.{i}", [f"node-{n}" for n in range(4)]) for i in range(4000))
    assert all(900 < count < 1100 for count in counts.values())
