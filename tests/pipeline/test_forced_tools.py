"""A demanded call of real functions: whatever the model would like to say, it is a valid call."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import jsonschema
import pytest

from shared.client import Client
from tests.pipeline.harness import deployed, needs_prompts
from tests.structured_schemas import bfcl_tools

DEMO = Path(__file__).parents[2] / "models/demo"
TOOLS = int(os.environ.get("GORGON_FORCED_TOOLS", "60"))  # there are some 600
WANTED = 50


@needs_prompts
@pytest.mark.timeout(300)
async def test_a_demanded_call_is_valid_at_temperature_1(tmp_path: Path):
    every = bfcl_tools(TOOLS)
    flags = {"tokenizer": ["--tool-format", "hermes"]}
    async with deployed(tmp_path, "demo", DEMO, flags) as deployment, Client(deployment.bus, "demo") as client:
        streams = []
        for seed, tool in enumerate(every):
            messages = [{"role": "user", "content": f"Call {tool['function']['name']}."}]
            choice = {"name": tool["function"]["name"]}
            options = dict(tools=[tool], tool_choice=choice, temperature=1.0, seed=seed, max_tokens=200)
            streams.append(client.generate(messages=messages, **options))
        results = await asyncio.gather(*(stream.result() for stream in streams))
        await deployment.until_idle()
    valid, unfinished = 0, 0
    for tool, result in zip(every, results, strict=True):
        (choice,) = result.choices
        function = tool["function"]
        (call,) = choice.tool_calls
        assert call.name == function["name"]
        assert choice.content == ""
        if choice.finish_reason == "length":
            unfinished += 1
            assert call.error
            continue
        assert (choice.finish_reason, call.error) == ("tool_calls", None), choice
        jsonschema.validate(json.loads(call.arguments), function["parameters"])
        valid += 1
    print(f"{valid} valid calls, {unfinished} unfinished")
    assert valid >= WANTED * TOOLS / 60
