"""The demo model that the repository ships, and the parts of the script that made it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
sys.path.insert(0, str(ROOT / "tools"))

from demo_corpus import dialogues_of, paragraphs_of  # noqa: E402
from demo_llama import LlamaForTraining, LlamaShape  # noqa: E402
from train_demo_model import learning_rate_at, shuffled_starts, windows  # noqa: E402

# Jane Austen, Pride and Prejudice (1813): no book of hers is in the training corpus.
AUSTEN = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."
    "\n\nHowever little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth "
    "is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one "
    'or other of their daughters.\n\n"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield '
    'Park is let at last?"\n\nMr. Bennet replied that he had not.\n\n"But it is," returned she; "for Mrs. Long has just '
    'been here, and she told me all about it."\n\nMr. Bennet made no answer.'
)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def nats_per_token(model: transformers.PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_folder_is_complete_and_small() -> None:
    files = {str(path.relative_to(DEMO)): path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "medusa/README.md",
        "medusa/accuracies.json",
        "medusa/config.json",
        "medusa/heads.safetensors",
        "medusa/trees.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 25_000_000


def test_shape(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 8_000_000 <= sum(p.numel() for p in model.parameters()) <= 12_000_000
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize(
    "text",
    [
        AUSTEN,
        "naïve café, 東京, Ελλάδα",
        "👩‍👩‍👧 🇪🇺 😀",
        "\x00\t  \r\n\n x  ",
        "x = {'a': 1_000}  # don't",
        "</notspecial> <s",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "A garden."},
        {"role": "user", "content": " Hello! \n"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Who are you?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><|system|>A garden.</s><|user|>Hello!</s><|assistant|>Good day.</s><|user|>Who are you?</s><|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 4
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_predicts_english(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    ids = tokenizer(AUSTEN, return_tensors="pt")["input_ids"]
    perplexity = math.exp(nats_per_token(model, ids))
    assert perplexity < 25
    shuffled = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], dim=1)
    assert math.exp(nats_per_token(model, shuffled)) > 20 * perplexity


def test_a_chat_answer_ends_by_itself(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is your brother?"}], return_tensors="pt", add_generation_prompt=True
    )
    out = model.generate(**prompt, do_sample=False, temperature=None, top_p=None, max_new_tokens=60)
    assert out[0, -1] == tokenizer.eos_token_id


def test_training_model_is_the_same_function(model: transformers.PreTrainedModel) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    mine = LlamaForTraining(LlamaShape(**{k: v for k, v in config.items() if k in LlamaShape.__annotations__})).eval()
    mine.load_state_dict({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})
    assert mine.state_for_hugging_face().keys() == model.state_dict().keys() - {"lm_head.weight"}
    ids = torch.randint(0, config["vocab_size"], (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(mine(ids[:, :-1], ids[:, 1:]), expected, atol=1e-4, rtol=1e-4)


LONG = "The quick brown fox had jumped over the lazy dog before anybody in the house was awake"
WRAPPED = [
    "He said to them all that the old hearth-",
    "rug was his since his father, and nobody",
    "should take it from him.",
    '"Then keep it," said she.',
]


@pytest.mark.parametrize("between", ["\n", "\n\n"])
def test_wrapped_lines_become_paragraphs(between: str) -> None:
    # With and without blank lines between paragraphs, whose last lines are short.
    first = "\n".join(WRAPPED[:3])
    text = f"CHAPTER I{between}" + (between.join([first, WRAPPED[3]]) + between) * 20
    paragraphs = paragraphs_of(text.replace("\n", "\r\n"))
    assert len(paragraphs) == 40
    assert (
        paragraphs[0]
        == "He said to them all that the old hearth-rug was his since his father, and nobody should take it from him."
    )
    assert paragraphs[1] == WRAPPED[3]


def test_a_line_a_paragraph() -> None:
    text = f"CHAPTER I\n{LONG}, {LONG}.\n“Yes,” he said—and left.\nΟὐκ ἔλαβον πόλιν, ἀλλὰ γὰρ ἐλπὶς ἔφη κακά.\n{LONG}, {LONG}!\n"
    assert paragraphs_of(text) == [f"{LONG}, {LONG}.", '"Yes," he said - and left.', f"{LONG}, {LONG}!"]


def test_dialogues() -> None:
    scene = "They met in the garden on a summer evening, as they had done for years."
    told = [
        scene,
        '"Who is there in the dark?" cried John.',
        '"It is I," said Mary, "and nobody else."',
        '"Come in!"',
        scene,
        '"Alone."',
    ]
    assert list(dialogues_of(told)) == [(scene, ["Who is there in the dark?", "It is I, and nobody else."])]


def test_training_windows() -> None:
    tokens = torch.arange(100, 200)
    ids, targets = windows(tokens, torch.tensor([0, 50]), bos=1, length=4)
    assert ids.tolist() == [[1, 100, 101, 102], [1, 150, 151, 152]]
    assert targets.tolist() == [[100, 101, 102, 103], [150, 151, 152, 153]]
    starts = np.arange(0, 1000, 7, dtype=np.int32)
    chosen = shuffled_starts(starts, total=1000, length=50, rng=np.random.default_rng(0))
    assert len(chosen) in (19, 20)
    assert len(set(chosen.tolist())) == len(chosen)
    assert set(chosen.tolist()) <= set(starts.tolist())
    assert chosen.max() <= 950


def test_learning_rate() -> None:
    factors = [learning_rate_at(p) for p in (0.0, 0.01, 0.02, 0.4, 0.7, 1.0)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
