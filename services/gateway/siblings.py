"""The processes that were started beside this one (`gorgon up`): for the web page's kill button, on one's own machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Sibling(NamedTuple):
    pid: int
    name: str


def siblings() -> list[Sibling]:
    """Stages with this process's parent, by the name that the supervisor gave them. Linux only; elsewhere there are none."""
    found = []
    for folder in _PROC.glob("[0-9]*"):
        try:
            # The command's name, which may hold anything, stands in brackets before the state and the parent's id.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == os.getppid() and "--name" in arguments and "--nats-url" in arguments:
            found.append(Sibling(int(folder.name), arguments[arguments.index("--name") + 1]))
    return found


def kill(instance: str) -> bool:
    """SIGKILL to the process of an instance (`<name>-<boot id>`), as heartbeats call it. False if there is none."""
    name = instance.rpartition("-")[0]
    for sibling in siblings():
        if sibling.name == name:
            os.kill(sibling.pid, signal.SIGKILL)
            return True
    return False
