"""In which of shared.tool_calls' formats a model writes its calls, by what its chat template shows it."""

from __future__ import annotations

from collections.abc import Collection


def tool_format_of(templates: Collection[str], added_tokens: Collection[str]) -> str:
    """`templates` are Jinja sources, `added_tokens` those that the tokenizer knows beside its vocabulary. "" for a format that is not
    known, which is then not looked for."""
    source = "\n".join(templates)
    if "<function=" in source or "<|tool_call_begin|>" in source or "<\uff5ctool" in source:
        return ""  # Qwen 3 Coder's, Kimi's and DeepSeek's own
    if "<tool_call>" in source:
        return "hermes" if "arguments" in source else ""
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<|python_tag|>" in source or ("<|start_header_id|>" in source and '"parameters": ' in source):
        return "llama3"
    # A template that does not show it: the tokens that were made for it do. Llama 3.0 has no <|python_tag|>.
    for token, name in (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3")):
        if token in added_tokens:
            return name
    return ""
