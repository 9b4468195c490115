"""What the fuzzer (test_gateway_fuzz.py) cannot guess: a model that is there, and requests of few fields, of which each may be wrong in
its own way without always another one being wrong first. Loaded by schemathesis' command."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import schemathesis

MODEL = "demo"
NEEDED = ("model", "prompt", "messages")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    draw = random.Random(repr(body))
    body = dict(body)
    if draw.random() < 0.7:
        others = [name for name in body if name not in NEEDED]
        for name in draw.sample(others, max(0, len(others) - draw.randint(0, 3))):
            del body[name]
    if draw.random() < 0.9 and isinstance(body.get("model"), str):
        body["model"] = MODEL
    if draw.random() < 0.7 and "messages" in body:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    if draw.random() < 0.5 and "prompt" in body:
        body["prompt"] = draw.choice(["Hello", [5, 6], ["a", "b"], [[1], [2, 3]]])
    return body


@schemathesis.hook
def map_headers(context: Any, headers: Any) -> Any:
    """Most without headers; a deadline that passes is rightly answered with 504."""
    if not headers:
        return headers
    draw = random.Random(repr(headers))
    headers = {name: value for name, value in headers.items() if draw.random() < 0.3}
    with contextlib.suppress(ValueError, TypeError):
        if 0 < float(headers.get("X-Request-Timeout", 0)) < 30:
            headers["X-Request-Timeout"] = "30"
    return headers


@schemathesis.hook
def map_path_parameters(context: Any, parameters: Any) -> Any:
    if parameters and len(str(parameters.get("model", ""))) % 2:
        parameters["model"] = MODEL
    return parameters
