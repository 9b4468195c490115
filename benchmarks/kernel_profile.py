"""Where the time of GPU steps goes: kernels by total time, and the gaps between them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType

GAP_MICROSECONDS = 100.0  # a longer gap is one that the host left


def profile_steps(run: Callable[[], None], step_times: list[float], trace: Path, top: int = 25) -> str:
    """Profiles what the device does while `run` waits; `step_times` grows by one with each step. Returns Markdown."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        first, start = len(step_times), time.perf_counter()
        run()
        steps, seconds = len(step_times) - first, time.perf_counter() - start
    profiler.export_chrome_trace(str(trace))
    return summary(profiler, max(steps, 1), seconds, top)


def summary(profiler: torch.profiler.profile, steps: int, seconds: float, top: int) -> str:
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    lines = [f"{steps} steps in {seconds * 1e3:.1f} ms with the profiler on: {seconds / steps * 1e3:.3f} ms each"]
    if not kernels:
        return "\n".join([*lines, "no kernels on a CUDA device"])
    times: dict[str, list[float]] = defaultdict(list)
    for begin, end, name in kernels:
        times[name].append(end - begin)
    busy = sum(sum(of_kernel) for of_kernel in times.values())
    span = kernels[-1][1] - kernels[0][0]
    # Kernels may overlap: a gap begins where the latest end so far lies.
    ends = np.maximum.accumulate([end for _, end, _ in kernels])
    gaps = np.maximum(0.0, np.array([begin for begin, _, _ in kernels[1:]]) - ends[:-1])
    lines += [
        f"kernels: {len(kernels) / steps:.0f} a step, busy {busy / span:.1%} of {span / 1e3:.1f} ms",
        f"gaps: {gaps.sum() / span:.1%} of the time, median {np.median(gaps):.2f} µs, p99 {np.percentile(gaps, 99):.1f} µs, "
        f"longest {gaps.max():.1f} µs, {int((gaps > GAP_MICROSECONDS).sum())} above {GAP_MICROSECONDS:.0f} µs",
        "",
        "| kernel | µs a step | share | calls a step | µs a call |",
        "|---|---|---|---|---|",
    ]
    for name, of_kernel in sorted(times.items(), key=lambda item: -sum(item[1]))[:top]:
        total = sum(of_kernel)
        lines.append(
            f"| `{name[:90]}` | {total / steps:.1f} | {total / busy:.1%} | {len(of_kernel) / steps:.1f} "
            f"| {np.median(of_kernel):.2f} |"
        )
    return "\n".join(lines)
