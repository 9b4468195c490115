"""The web page in a real, headless Chromium: a prompt, its tokens, a killed worker, and the stream that ends all the same.

GORGON_SCREENSHOT   where to put a picture of the page (docs/page.png)
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.cli import DEMO_MODEL
from tests.pipeline.harness import Deployment, deployed
from tests.pipeline.http_client import call

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [pytest.mark.asyncio(loop_scope="module")]
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (Debian: chromium, chromium-driver)"
)
WAIT = 60.0
SCREENSHOT = os.environ.get("GORGON_SCREENSHOT")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """With two workers, of which one may be killed. The demo model stops when it likes, so it speaks only for the picture."""
    flags = {"gateway": ["--dev-kill", "true"]}
    if not SCREENSHOT:
        vocabulary = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
        flags["model_worker"] = [
            "--engine",
            "fixed",
            "--fixed.step-time",
            "0.02",
            "--fixed.vocab-size",
            str(vocabulary),
        ]
    copies = {"gateway": 1, "model_worker": 2}
    async with deployed(tmp_path_factory.mktemp("page"), "demo", DEMO_MODEL, flags, copies) as deployment:
        yield deployment


class Page:
    """The browser's calls block: each runs in a thread, so that the test's own loop goes on."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
        for flag in ("headless", "no-sandbox", "no-first-run", *(f"disable-{what}" for what in quiet)):
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument("--window-size=1360,900")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))

    async def run(self, script: str, *args: Any) -> Any:
        return await asyncio.to_thread(self.driver.execute_script, script, *args)

    async def until(self, script: str, what: str, good: Callable[[Any], bool] = bool) -> Any:
        value = None
        try:
            async with asyncio.timeout(WAIT):
                while not good(value := await self.run(script)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{what}: still {value!r}; {self.driver.get_log('browser')[-5:]}") from None
        return value

    async def say(self, text: str, tokens: int) -> None:
        await self.run(
            "document.getElementById('prompt').value = arguments[0];"
            "document.getElementById('max-tokens').value = arguments[1];"
            "document.getElementById('send').click();",
            text,
            tokens,
        )


@pytest_asyncio.fixture(loop_scope="module")
async def page(deployment: Deployment, tmp_path: Path) -> AsyncIterator[Page]:
    page = await asyncio.to_thread(Page, tmp_path)
    try:
        url = f"http://127.0.0.1:{deployment.supervisor.plan.http_port}/"
        await asyncio.to_thread(page.driver.get, url)
        yield page
    finally:
        await asyncio.to_thread(page.driver.quit)


SAID = "return document.querySelector('.assistant:last-child p')?.textContent ?? ''"
STATE = "return document.querySelector('.assistant:last-child')?.dataset.state ?? ''"


async def background(deployment: Deployment, number: int) -> int:
    """Something for the pipeline to do. Returns how many tokens came."""
    body = dict(model="demo", prompt=[5 + number, 7], max_tokens=300, ignore_eos=True)
    answer = await call(deployment.supervisor.plan.http_port, "/v1/completions", body)
    tokens: int = (await answer.body())["usage"]["completion_tokens"]
    return tokens


@needs_browser
async def test_a_stream_outlives_its_worker(page: Page, deployment: Deployment) -> None:
    await page.until("return document.getElementById('link').textContent", "ready", lambda text: text == "ready")
    others = [asyncio.create_task(background(deployment, number)) for number in range(6)]
    await page.say("Good morning, captain.", 350)
    await page.until(SAID, "tokens come", lambda text: len(text) > (5 if SCREENSHOT else 40))
    busy = "return [...document.querySelectorAll('[data-stage=model_worker] .instance')]"
    busy += ".find((box) => !/^0 requests/.test(box.querySelector('span').textContent))?.dataset.instance"
    victim = await page.until(busy, "a worker is seen at work")
    name = victim.rpartition("-")[0]
    deployment.expected_deaths[name] = 1
    seen = len(await page.run(SAID))
    await page.run("document.querySelector(`[data-instance='${arguments[0]}'] .kill`).click()", victim)
    gone = f"return document.querySelector(\"[data-instance='{victim}']\")?.classList.contains('gone') ?? true"
    await page.until(gone, "the dead worker is marked")
    if SCREENSHOT:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(page.driver.save_screenshot, SCREENSHOT)
    await page.until(STATE, "the stream ends", lambda state: state in ("finished", "failed"))
    assert await page.run(STATE) == "finished", await page.run(SAID)
    if not SCREENSHOT:
        assert len(await page.run(SAID)) > seen, "after the kill it went on"
    assert await asyncio.gather(*others) == [300] * len(others)
    new = "return [...document.querySelectorAll('[data-stage=model_worker] .instance:not(.gone)')]"
    await page.until(f"{new}.length", "the worker is back", lambda count: count == 2)
    await page.say("And then?", 5)
    await page.until(STATE, "a second answer", lambda state: state == "finished")
    await deployment.until_idle()
    errors = [line for line in page.driver.get_log("browser") if line["level"] == "SEVERE"]
    assert errors == []


@needs_browser
async def test_stop_and_a_killed_gateway(page: Page, deployment: Deployment) -> None:
    await page.until("return document.getElementById('link').textContent", "ready", lambda text: text == "ready")
    await page.say("Tell me a long story.", 900)
    await page.until(SAID, "tokens come", lambda text: len(text) > 20)
    await page.run("document.getElementById('stop').click()")
    await page.until(STATE, "it stops", lambda state: state == "stopped")
    await page.say("Good morning, captain.", 400)
    await page.until(SAID, "tokens come", lambda text: len(text) > 20)
    deployment.expected_deaths["gateway-1"] = 1
    await page.run("document.querySelector('[data-stage=gateway] .kill').click()")
    await page.until(STATE, "the stream ends", lambda state: state in ("finished", "failed"))
    assert await page.run(STATE) == "finished", await page.run(SAID)


async def test_who_may_kill(deployment: Deployment) -> None:
    """Nobody without the page's token, from another site, or by another host's name."""
    port = deployment.supervisor.plan.http_port
    instance = next(
        b.instance for b in map(lambda b: getattr(b, "base", b), await deployment.beats()) if b.stage == "scheduler"
    )
    answer = await call(port, "/api/pipeline")
    event = await anext(answer.events())
    token, answer_origin = event.json["kill"], "http://localhost"
    answer.close()
    assert token
    good = {"X-Gorgon-Token": token, "Origin": answer_origin}
    for headers in (
        {},
        {"X-Gorgon-Token": token},
        {"Origin": answer_origin},
        good | {"X-Gorgon-Token": token + "x"},
        good | {"Origin": "http://evil.example"},
        good | {"Origin": "null"},
    ):
        assert (await call(port, "/api/kill", {"instance": instance}, headers)).status == 403, headers
    for host in ("evil.example", "[::1"):
        rebound = await call(port, "/api/pipeline", headers={"Host": host})
        assert (await anext(rebound.events())).json["kill"] is None, host
        rebound.close()
    missing = await call(port, "/api/kill", {"instance": "nobody-1"}, good)
    assert missing.status == 404
    assert deployment.deaths() == deployment.expected_deaths
