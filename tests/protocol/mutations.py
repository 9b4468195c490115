"""The mutation table: each rule of the fold is taken away in turn, and the two simulations say what breaks.

    python -m tests.protocol.mutations [--seeds 400] [--fold-seeds 3000]      (make mutations)

Prints Markdown; ends with status 1 if some rule is missed by no seed of either simulation.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from shared.tokenlog import PartitionFold
from tests.protocol.fold_simulation import Broken, Simulation
from tests.protocol.test_simulation import _SPAWN, PROCESSES, chunks, outcomes_of
from tests.protocol.test_tokenlog import RULES

WIDTH = 90  # characters of a complaint


def fold_complaints(seeds: range, rule: str) -> list[str | None]:
    """What the fold's own simulation says of each seed without the rule. (Runs in other processes.)"""
    mutant = next((fold for fold in RULES if fold.__name__ == rule), PartitionFold)
    found: list[str | None] = []
    for seed in seeds:
        try:
            Simulation(seed, mutant).simulate()
        except Broken as broken:
            found.append(str(broken))
        else:
            found.append(None)
    return found


def protocol_complaints(seeds: range, rule: str) -> list[str | None]:
    """The same of the simulation of the whole protocol."""
    return [outcome if isinstance(outcome, str) else None for outcome in outcomes_of(seeds, rule)]


def summary(complaints: Sequence[str | None]) -> tuple[str, str]:
    """(share of the seeds that break and the first of them, what it said)."""
    broken = [(seed, text) for seed, text in enumerate(complaints) if text is not None]
    if not broken:
        return f"0 of {len(complaints)}", ""
    seed, text = broken[0]
    text = re.sub(r"^seed \d+: ", "", text).split("; ")[0].replace("|", "/")
    return (
        f"{len(broken)} of {len(complaints)}, first {seed}",
        text if len(text) <= WIDTH else text[: WIDTH - 1] + "…",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=400, help="of the whole protocol's simulation")
    parser.add_argument("--fold-seeds", type=int, default=3000, help="of the fold's own")
    args = parser.parse_args()
    missed = False
    print("| without the rule | fold's simulation, seeds that break | whole protocol's | what the first one says |")
    print("|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(PROCESSES, _SPAWN) as pool:
        for rule in ["", *(fold.__name__ for fold in RULES)]:
            fold, whole = (
                [
                    complaint
                    for future in [pool.submit(function, seeds, rule) for seeds in chunks(count)]
                    for complaint in future.result()
                ]
                for function, count in ((fold_complaints, args.fold_seeds), (protocol_complaints, args.seeds))
            )
            (fold_share, fold_says), (whole_share, whole_says) = summary(fold), summary(whole)
            says = fold_says or whole_says
            print(f"| {rule or '(none: the fold as it is)'} | {fold_share} | {whole_share} | {says} |", flush=True)
            missed |= bool(says) is not bool(rule)
    return missed


if __name__ == "__main__":
    sys.exit(main())
