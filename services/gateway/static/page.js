// Chat and picture of the pipeline. Talks to this gateway only.

const $ = (id) => document.getElementById(id);
const STAGES = [
  ["gateway", "HTTP ↔ NATS"],
  ["tokenizer", "text → tokens"],
  ["scheduler", "which worker, when"],
  ["model_worker", "the model's steps"],
  ["detokenizer", "tokens → text"],
];
const GONE_FOR = 4000; // ms that a dead instance stays in the picture
const RETRIES = 120;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function note(text) {
  const line = element("li");
  line.append(element("time", "", new Date().toLocaleTimeString([], { hour12: false })), text);
  $("events").prepend(line);
  while ($("events").childElementCount > 100) $("events").lastChild.remove();
}

// Server-sent events of a fetch (EventSource can send neither a body nor a key): yields {id, data}.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = {};
      for (const line of text.slice(0, end).split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      if (event.data !== undefined) yield event;
    }
  }
}

// ---------------------------------------------------------------- chat

const turns = [];
let running = null;

class Refused extends Error {}

// Yields the chunks of one request. The gateway may die meanwhile: the same request with the id of the last event goes on exactly there.
async function* ask(path, body, signal) {
  const key = crypto.randomUUID();
  let last = "";
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(path, {
        method: "POST",
        signal,
        headers: {
          ...headers(), "Content-Type": "application/json", "Idempotency-Key": key, ...(last && { "Last-Event-ID": last }),
        },
        body: JSON.stringify(body),
      });
      if (!response.ok) {
        const { error } = await response.json();
        if (response.status !== 503 && response.status !== 429) throw new Refused(error.message);
        throw new TypeError(error.message);
      }
      for await (const event of events(response)) {
        if (event.data === "[DONE]") return;
        const chunk = JSON.parse(event.data);
        if (chunk.error) throw new Refused(chunk.error.message);
        if (event.id) last = event.id;
        attempt = 0;
        yield chunk;
      }
      throw new TypeError("the stream broke off");
    } catch (error) {
      if (signal.aborted || error instanceof Refused || attempt >= RETRIES) throw error;
      if (attempt === 0) note(last ? "the stream broke off: going on where it was" : "no answer: asking again");
      await sleep(Math.min(100 * (attempt + 1), 1000));
    }
  }
}

function turn(role, text) {
  const box = element("div", `turn ${role}`);
  box.append(element("p", "", text), element("small"));
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return box;
}

async function answer(text) {
  turns.push({ role: "user", content: text });
  turn("user", text);
  const box = turn("assistant running", "");
  const [shown, line] = box.children;
  const common = {
    model: $("model").value,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const began = performance.now();
  let first = 0, usage = null, said = "";
  const read = async (path, body, piece) => {
    for await (const chunk of ask(path, body, running.signal)) {
      usage = chunk.usage ?? usage;
      const more = chunk.choices.length ? piece(chunk.choices[0]) : "";
      if (!more) continue;
      first ||= performance.now();
      said += more;
      shown.append(more);
      const log = $("log");
      if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
    }
  };
  try {
    try {
      await read("/v1/chat/completions", { ...common, messages: turns }, (c) => c.delta.content);
    } catch (error) {
      if (!(error instanceof Refused) || !/no chat template/.test(error.message)) throw error;
      await read("/v1/completions", { ...common, prompt: text }, (c) => c.text);
    }
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 && seconds > 0 ? `, ${Math.round((usage.completion_tokens - 1) / seconds)} tokens/s` : "";
    line.textContent = `${usage.completion_tokens} tokens, first after ${Math.round(first - began)} ms${rate}`;
    box.dataset.state = "finished";
  } catch (error) {
    const stopped = running.signal.aborted;
    line.textContent = stopped ? "stopped" : "";
    if (!stopped) { box.classList.add("failed"); shown.append(said ? `\n${error.message}` : error.message); }
    box.dataset.state = stopped ? "stopped" : "failed";
  } finally {
    turns.push({ role: "assistant", content: said });
    box.classList.remove("running");
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  answer(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("log").replaceChildren();
});

// ---------------------------------------------------------------- pipeline

const cards = new Map(); // instance → {box, row, goneAt, killed}
const boxes = new Map(); // stage → {box, instances}
let before = null; // the last picture, for rates
let killToken = null;
let pictured = false;

for (const [stage, text] of STAGES) {
  const box = element("div", "stage");
  const title = element("h2", "", stage.replace("_", " "));
  title.append(element("small", "", text));
  const instances = element("div", "instances");
  box.append(title, instances);
  box.dataset.stage = stage;
  $("stages").append(box);
  boxes.set(stage, { box, instances });
}

function describe(row) {
  const parts = [row.max_seqs ? `${row.running} requests` : `${row.in_flight} in flight`];
  if (row.max_seqs) parts.push(`KV ${row.kv_used} of ${row.kv_total} tokens`, `step ${row.step}`);
  if (row.detail.partitions !== undefined) parts.push(`${row.detail.partitions} partitions`, `${row.detail.tokens} tokens`);
  if (row.detail.waiting !== undefined) parts.push(`${row.detail.waiting} waiting`);
  if (row.stage === "tokenizer" && row.detail.accepted !== undefined) parts.push(`${row.detail.accepted} accepted`);
  if (row.draining) parts.push("draining");
  return parts.join(" · ");
}

function card(row) {
  let found = cards.get(row.instance);
  if (!found) {
    const box = element("div", `instance${pictured ? " new" : ""}`);
    const name = element("b", "", row.instance.replace(/-[^-]*$/, ""));
    name.append(element("i", "", row.instance.replace(/^.*-/, "").slice(0, 6)));
    const text = element("span");
    const meter = element("meter");
    Object.assign(meter, { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0 });
    meter.setAttribute("aria-label", "load");
    box.append(name, text, meter);
    box.dataset.instance = row.instance;
    boxes.get(row.stage)?.instances.append(box);
    found = { box, text, meter, kill: null };
    cards.set(row.instance, found);
    if (pictured) note(`${row.instance.replace(/-[^-]*$/, "")} is here (${row.instance.replace(/^.*-/, "").slice(0, 6)})`);
  }
  found.row = row;
  found.goneAt = 0;
  found.box.classList.remove("gone");
  found.text.textContent = describe(row);
  const kv = row.kv_total ? row.kv_used / row.kv_total : 0;
  found.meter.value = Math.max(row.load, kv);
  if (killToken && !found.kill) {
    found.kill = element("button", "kill", "Kill");
    found.kill.type = "button";
    found.kill.addEventListener("click", () => kill(row.instance));
    found.box.append(found.kill);
  }
}

async function kill(instance) {
  const response = await fetch("/api/kill", {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json", "X-Gorgon-Token": killToken },
    body: JSON.stringify({ instance }),
  }).catch(() => null);
  const name = instance.replace(/-[^-]*$/, "");
  if (response && !response.ok) note(`${name}: ${(await response.json()).error.message}`);
  else note(`kill -9 ${name}`);
}

function draw(picture) {
  const now = performance.now();
  killToken = picture.kill;
  const live = new Set(picture.stages.map((row) => row.instance));
  picture.stages.forEach(card);
  for (const [instance, found] of cards) {
    if (live.has(instance)) continue;
    if (!found.goneAt) {
      found.goneAt = now;
      found.box.classList.add("gone");
      found.text.textContent = "gone";
      found.kill?.remove();
      note(`${instance.replace(/-[^-]*$/, "")} is gone`);
    } else if (now - found.goneAt > GONE_FOR) {
      found.box.remove();
      cards.delete(instance);
    }
  }
  for (const [stage, { box, instances }] of boxes) {
    const there = picture.stages.some((row) => row.stage === stage);
    box.classList.toggle("empty", !there);
    const none = instances.querySelector(".none");
    if (!there && !instances.childElementCount) instances.append(element("div", "none", "nobody"));
    else if (there) none?.remove();
  }
  const model = $("model");
  const names = picture.models.map((m) => m.name);
  if ([...model.options].map((o) => o.value).join() !== names.join()) {
    const chosen = model.value;
    model.replaceChildren(...names.map((name) => element("option", "", name)));
    if (names.includes(chosen)) model.value = chosen;
  }
  const sum = (rows, field) => rows.reduce((total, row) => total + field(row), 0);
  const workers = picture.stages.filter((row) => row.stage === "model_worker");
  $("in-flight").textContent = sum(workers, (row) => row.running);
  $("count").textContent = picture.stages.length;
  if (before) {
    // Of each instance by itself: a new one begins at zero.
    const seconds = (now - before.at) / 1000;
    const rate = (field) => picture.stages.reduce((total, row) => {
      const last = before.stages.get(row.instance);
      return total + (last ? Math.max(0, (field(row) ?? 0) - (field(last) ?? 0)) : 0);
    }, 0) / seconds;
    $("rate").textContent = Math.round(rate((row) => row.stage === "detokenizer" ? row.detail.tokens : 0));
    $("steps").textContent = Math.round(rate((row) => row.step));
  }
  if (!before || now - before.at > 900) before = { at: now, stages: new Map(picture.stages.map((row) => [row.instance, row])) };
  const ready = picture.models.filter((m) => m.ready).length;
  const missing = picture.models.flatMap((m) => m.missing).map((s) => s.replace("_", " "));
  const good = picture.connected && ready > 0;
  $("link").className = `pill ${good ? "good" : "bad"}`;
  $("link").textContent = !picture.connected ? "no NATS" : good ? "ready" : missing.length ? `no ${missing.join(", ")}` : "no model";
  pictured = true;
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/api/pipeline", { headers: headers() });
      if (response.ok) for await (const event of events(response)) draw(JSON.parse(event.data));
      else $("link").textContent = (await response.json()).error.message;
    } catch { /* the gateway is gone: it may come back */ }
    $("link").className = "pill bad";
    if (pictured) $("link").textContent = "no gateway";
    await sleep(400);
  }
}

watch();
