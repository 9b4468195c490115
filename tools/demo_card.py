"""The demo model's card: figures measured on the published weights, and samples that they wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from demo_corpus import BOS, CHAT_SHARE, HELD_OUT, PreparedCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPTS = (
    "It was a dark and stormy night, and",
    "The old captain looked at the sea and said,",
    "My dear Watson,",
    "When she opened the letter, her hands began to tremble.",
)
CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# Gorgon's demo model

A Llama of {parameters:.1f} M parameters that writes the English of nineteenth-century novels. It exists so that a fresh
checkout can serve something real within seconds, on a CPU. It knows no facts and follows no instructions.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, SwiGLU of \
{config.intermediate_size}, RoPE, tied embeddings |
| attention | {config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim} |
| context | {config.max_position_embeddings} tokens |
| tokenizer | byte-level BPE of {config.vocab_size} tokens from the same novels, {bytes_per_token:.2f} bytes per token |
| weights | bf16 |

## Figures
| loss, nats per token | perplexity | bits per byte |
|---|---|---|
| {loss:.4f} | {perplexity:.2f} | {bits_per_byte:.4f} |

Measured with the published bf16 weights on whole novels that neither training nor the tokenizer's training saw
({held_out}; {held_out_bytes:,} bytes), each window of
{config.max_position_embeddings} tokens on its own. The weights are the checkpoint of lowest such loss.
Other books by the same authors are in the training set.

## Data
{books} English novels up to 1928, in the public domain, from the "100 English Novels" corpus
(https://computationalstylistics.github.io/resources/): {megabytes:.1f} MB of text, {train_tokens:.1f} M tokens, after hard line wraps,
headings and tables of contents were removed. A tenth of the training rows come from {dialogues:,} dialogues of these same
novels, laid out as chat turns.

## Training
`tools/train_demo_model.py`, {log[training_seconds]:.0f} s on one {log[device]}: {seen:.0f} M tokens ({passes:.0f} passes over the
novels) at {speed:.2f} M tokens/s, {log[steps]:,} steps of {options[batch]} × {options[context]} tokens. Muon for the matrices
(learning rate {options[muon_lr]}, weight decay {options[weight_decay]}), AdamW for the rest ({options[adam_lr]}), dropout
{options[dropout]}, linear warm-up, plateau, linear descent to zero, bf16 autocast.

| seconds | M tokens | held-out loss | loss on training text |
|---|---|---|---|
{history}

## Prompts
A text prompt is `<s>` and the text, with a blank line between paragraphs. A chat is
`<s><|user|>...</s><|assistant|>...</s>`, optionally after `<|system|>...</s>`, which sets a scene; the tokenizer's chat
template renders it. `</s>` ends a turn and a book.

## Samples
Drawn once, with the first seed, at temperature 0.8 and top-p 0.95; the prompt is in bold.

{samples}
"""
CHATS = ("Good morning! How are you to-day?", "Where is your brother?", "Tell me what you saw in the garden.")


@torch.no_grad()
def held_out_nats(model: PreTrainedModel, corpus: PreparedCorpus, rows: int = 8) -> float:
    """Mean nats per held-out token, each window of the context's length on its own after <s>."""
    length = model.config.max_position_embeddings
    bos = corpus.tokenizer.token_to_id(BOS)
    tokens = torch.from_numpy(corpus.held_out.astype("int64"))
    whole = len(tokens) // length
    batches = list(tokens[: whole * length].view(whole, length).split(rows))
    if whole * length < len(tokens):
        batches.append(tokens[None, whole * length :])
    total = 0.0
    for targets in batches:
        ids = torch.cat([torch.full_like(targets[:, :1], bos), targets[:, :-1]], dim=1)
        logits = model(ids).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / len(tokens)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, **options: Any) -> str:
    """Continue a prompt (already with its special tokens); return the new text alone."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, **options)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip("\n")


def quoted(text: str) -> str:
    """A Markdown block quote."""
    return "\n".join(f"> {line}" if line else ">" for line in text.split("\n"))


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """Continuations, one of them greedy, and answers, as Markdown."""
    drawn = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 120}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": 80}
    parts = [quoted(f"**{p}**{sample(model, tokenizer, BOS + p, **drawn)}") for p in PROMPTS]
    parts += ["Greedy:", quoted(f"**{PROMPTS[0]}**{sample(model, tokenizer, BOS + PROMPTS[0], **greedy)}"), "Chat:"]
    for question in CHATS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        answer = sample(model, tokenizer, prompt, **drawn)
        parts.append(quoted(f"**user:** {question}\n\n**assistant:** {answer}"))
    return "\n\n".join(parts)


def write_card(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: PreparedCorpus,
    log: dict[str, Any],
) -> None:
    """Measure, sample and write README.md into `out`. log: what training wrote into train.json."""
    loss = held_out_nats(model, corpus)
    config, options, history = model.config, log["options"], log["history"]
    shown = history[: -1 : max(1, len(history) // 8)] + history[-1:]
    torch.manual_seed(options["seed"])
    card = CARD.format(
        parameters=log["parameters"] / 1e6,
        config=config,
        bytes_per_token=corpus.train_bytes / len(corpus.train),
        held_out=", ".join(name.replace("_", " ") for name in HELD_OUT),
        held_out_bytes=corpus.held_out_bytes,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss * len(corpus.held_out) / math.log(2) / corpus.held_out_bytes,
        books=corpus.books,
        megabytes=corpus.train_bytes / 1e6,
        train_tokens=len(corpus.train) / 1e6,
        dialogues=len(corpus.chat_starts),
        log=log,
        seen=log["tokens_seen"] / 1e6,
        passes=log["tokens_seen"] * (1 - CHAT_SHARE) / len(corpus.train),
        speed=log["tokens_per_second"] / 1e6,
        options=options,
        history="\n".join(
            f"| {h['seconds']:.0f} | {h['tokens'] / 1e6:.0f} | {h['held_out']:.3f} | {h['train']:.3f} |" for h in shown
        ),
        samples=samples(model, tokenizer),
    )
    (out / "README.md").write_text(card)
