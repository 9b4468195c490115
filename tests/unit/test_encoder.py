"""Ids are those of transformers, and the model's files are read as transformers reads them."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from services.tokenizer.model_files import ModelFilesError, load_model_files

DEMO = Path(__file__).parents[2] / "models/demo"
DATA = Path(__file__).parents[3] / "shared/data"
TEXTS = [
    "Hello, world",
    " ",
    "  two  blanks\n\n",
    "naïve café 你好 🦜🏽",
    "<s>x</s>",
    "e\u0301",
    "\x00\ufffd",
    "a" * 3000,
]


def folder_of(name: str) -> Path:
    folder = DATA / name if name != "demo" else DEMO
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: this test data is not part of the repository")
    return folder


def with_config(folder: Path, target: Path) -> Path:
    """A copy of a tokenizer's folder with what a model would add."""
    shutil.copytree(folder, target)
    if not (target / "config.json").exists():
        (target / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    return target


@pytest.mark.parametrize(
    "name", ["demo", "weights/stories260K", "weights/babyllama-tok361", "tokenizers/qwen2", "tokenizers/gpt2"]
)
@pytest.mark.parametrize("special", [True, False])
def test_ids_of_transformers(name: str, special: bool, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast  # slow to import

    folder = with_config(folder_of(name), tmp_path / "model")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = load_model_files(folder).encoder
    for text in TEXTS:
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text


@pytest.mark.parametrize(
    "flags", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_flags_in_the_config_do_not_change_the_post_processor(flags: dict, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    folder = with_config(DEMO, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = load_model_files(folder).encoder.encode("Hello", True)
    assert ours == theirs.encode("Hello")
    assert ours[0] == theirs.bos_token_id


def test_chat_template_of_the_folder_and_its_special_tokens(tmp_path: Path):
    messages = [{"role": "user", "content": "x"}]
    template = load_model_files(DEMO).template
    assert template is not None
    assert template.render(messages) == "<s><|user|>x</s><|assistant|>"
    folder = with_config(DEMO, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    template = load_model_files(folder).template
    assert template is not None
    assert (template.render(messages), template.render(messages, [{}])) == ("</s>", "tools")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "{{ bos_token }}"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": named, "bos_token": {"content": "<B>"}})
    )
    (folder / "chat_template.jinja").unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    template = load_model_files(folder).template
    assert template is not None
    assert template.render(messages) == "<B>"


def test_facts_and_defaults(tmp_path: Path):
    files = load_model_files(DEMO)
    assert (files.vocab_size, files.context) == (4096, 1024)
    assert files.defaults == {"temperature": 0.8, "top_p": 0.95}
    folder = with_config(DEMO, tmp_path / "model")
    (folder / "config.json").write_text(
        json.dumps({"text_config": {"vocab_size": 5000, "max_position_embeddings": 77}})
    )
    (folder / "generation_config.json").unlink()
    files = load_model_files(folder)
    assert (files.vocab_size, files.context, files.defaults) == (5000, 77, {})


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("tokenizer.json", None, "missing_file"),
        ("config.json", None, "missing_file"),
        ("tokenizer.json", "{}", "invalid_file"),
        ("tokenizer.json", '{"trunc', "invalid_file"),
        ("config.json", "[]", "invalid_file"),
        ("config.json", '{"vocab_size": "x"}', "invalid_file"),
        ("tokenizer_config.json", "{", "invalid_file"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "invalid_file"),
        ("generation_config.json", '{"temperature": -1}', "invalid_file"),
    ],
)
def test_wrong_files_are_named(name: str, content: str | None, code: str, tmp_path: Path):
    folder = with_config(DEMO, tmp_path / "model")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ModelFilesError) as caught:
        load_model_files(folder)
    assert caught.value.code == code
    assert str(folder) in str(caught.value)


def test_no_folder(tmp_path: Path):
    with pytest.raises(ModelFilesError, match="missing_file"):
        load_model_files(tmp_path / "none")


def test_a_long_text_leaves_the_other_threads_running():
    """The event loop goes on while a thread encodes: the library must not hold the GIL."""
    encoder = load_model_files(DEMO).encoder
    text = " ".join(f"word{i}" for i in range(100_000))
    thread = threading.Thread(target=encoder.encode, args=(text, True))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


def test_longest_text_is_an_upper_bound():
    encoder = load_model_files(DEMO).encoder
    for text in TEXTS:
        if ids := encoder.encode(text, False):
            assert len(text) <= encoder.longest_text(len(ids))
