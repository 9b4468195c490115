"""How small arrays get to the device: every view holds what was put, whatever was left out because the device had it already."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.model_worker.step_state import Staging

arrays = st.lists(st.integers(0, 2), max_size=6)
large = st.integers(0, 3).map(lambda value: [value] * 1500)


@given(st.lists(st.lists(arrays | large, max_size=4), max_size=12))
def test_views_hold_what_was_put(steps: list[list[list[int]]]) -> None:
    staging = Staging(8000, torch.device("cpu"), 1)
    for step in steps:
        staging.begin()
        views = [staging.put(values) for values in step]
        staging.upload()
        assert [view.tolist() for view in views] == step


def test_what_the_device_has_is_not_sent_again() -> None:
    staging = Staging(64, torch.device("cpu"), 2)
    view = staging.send(np.array([3, 1, 2, 0], np.int32))
    view.zero_()  # which nobody may do, but it shows what is sent
    assert staging.send(np.array([3, 1, 2, 0], np.int32)).tolist() == [0] * 4
    assert staging.send(np.array([3, 1, 2, 1], np.int32)).tolist() == [3, 1, 2, 1]
    assert staging.send(np.array([3, 1, 2, 0], np.int32)).tolist() == [3, 1, 2, 0]
