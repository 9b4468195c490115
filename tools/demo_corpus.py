"""Corpus of the demo model: novels -> clean paragraphs -> byte-level BPE -> one array of token ids.

The novels come as plain text of three shapes: one line per paragraph, lines wrapped by hand with blank lines between
paragraphs, and wrapped lines without any. All three become a list of paragraphs, so that the model writes running prose.
Dialogues found in the novels are also laid out as chat turns, which teaches the model the chat format and where to stop.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<pad>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Llama 3's pattern: unlike GPT-2's it keeps a run of newlines in one piece and numbers in groups of three.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whole books, never seen in training (their authors are, with other books).
HELD_OUT = ("Doyle_Lost_1912", "Forster_View_1908", "Gissing_Warburton_1903")
# Its paragraphs cannot be told from its line breaks.
LEFT_OUT = ("Ford_Soldier_1915",)
CHAT_SHARE = 0.1  # of the training rows

_PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "`": "'", "\xa0": " ", "\t": " ", "\f": " "})
_SENTENCE_END = re.compile(r"[.!?:;]['\")\]]*$|[-,]['\"]+$")
_HEADING = re.compile(r"(?i)^(chapter|book|part|volume|vol|section|the end|contents|by)\b")
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass
class PreparedCorpus:
    """Token ids ready for training.

    train, chat, held_out: uint16 [tokens]. train_starts, chat_starts: int32 [paragraphs or dialogues], offsets at which a
    training window may begin. held_out_bytes: UTF-8 length of the held-out text. train_bytes: likewise.
    """

    train: NDArray[np.uint16]
    train_starts: NDArray[np.int32]
    chat: NDArray[np.uint16]
    chat_starts: NDArray[np.int32]
    held_out: NDArray[np.uint16]
    held_out_bytes: int
    train_bytes: int
    books: int
    tokenizer: Tokenizer

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        np.savez_compressed(folder / "corpus.npz", **arrays)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(cls, folder: Path) -> PreparedCorpus:
        with np.load(folder / "corpus.npz") as arrays:
            values = {name: (arrays[name] if arrays[name].ndim else int(arrays[name])) for name in arrays.files}
        return cls(**values, tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")))


def read_novels(corpora: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each novel in a corpora archive (.tar.*) or in its unpacked folder."""
    if corpora.is_dir():
        for path in sorted(corpora.rglob("100_english_novels/*.txt")):
            yield path.stem, path.read_text("utf-8-sig")
        return
    with tarfile.open(corpora) as archive:
        members = [
            m for m in archive.getmembers() if m.isfile() and re.search(r"100_english_novels/[^/]+\.txt$", m.name)
        ]
        for member in sorted(members, key=lambda m: m.name):
            file = archive.extractfile(member)
            assert file is not None  # isfile() above
            yield Path(member.name).stem, file.read().decode("utf-8-sig")


def paragraphs_of(text: str) -> list[str]:
    """Split a novel into paragraphs without hard line wraps, headings, tables of contents and damaged passages."""
    text = text.replace("\r\n", "\n").translate(_PUNCTUATION).replace("_", "")
    text = re.sub(r" *(?:—|–|--+) *", " - ", text)
    lines = [re.sub(r" +", " ", line).strip() for line in text.split("\n")]
    filled = sorted(len(line) for line in lines if line)
    if not filled:
        return []
    width = filled[int(len(filled) * 0.95)]
    blank_lines_separate = lines.count("") > len(lines) * 0.05

    paragraphs, current = [], ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line:
            glue = "" if not current or re.search(r"\w-$", current) else " "
            current += glue + line
        if width > 150 or not line or not following:
            ends = True  # one line per paragraph, or a blank line
        elif blank_lines_separate:
            ends = False
        else:
            # The next word would have fitted on this line: it was broken on purpose.
            room_left = len(line) + 1 + len(following.split(" ", 1)[0]) < width - 1
            ends = room_left and (bool(_SENTENCE_END.search(line)) or len(line) < width * 0.6)
        if ends and current:
            paragraphs.append(current)
            current = ""
    return [p for p in paragraphs if _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    letters = [c for c in paragraph if c.isalpha()]
    if len(letters) < 2 or sum(c.isupper() for c in letters) > 0.5 * len(letters):
        return False
    # Greek quotations, and characters that an earlier conversion of the file broke.
    if sum(ord(c) > 0xFF for c in letters) > 0.01 * len(letters):
        return False
    if len(paragraph) < 80 and _HEADING.match(paragraph):
        return False
    return len(paragraph) >= 80 or bool(_SENTENCE_END.search(paragraph))


def dialogues_of(paragraphs: Iterable[str], max_turns: int = 12) -> Iterator[tuple[str | None, list[str]]]:
    """Find runs of spoken paragraphs; yield (the narration before it or None, an even number of turns)."""
    scene: str | None = None
    turns: list[str] = []
    for paragraph in [*paragraphs, ""]:
        spoken = _spoken(paragraph)
        if spoken and len(turns) < max_turns:
            turns.append(spoken)
            continue
        if len(turns) >= 2:
            yield scene, turns[: len(turns) // 2 * 2]
            scene = None
        turns = [spoken] if spoken else []
        if not spoken:
            scene = paragraph if 40 < len(paragraph) < 500 and '"' not in paragraph else None


def _spoken(paragraph: str) -> str | None:
    """What is said in a paragraph that is mostly direct speech, without the "said he"; None for any other."""
    if not paragraph.startswith('"') or paragraph.count('"') % 2:
        return None
    quotes = _QUOTED.findall(paragraph)
    if sum(map(len, quotes)) < 0.6 * len(paragraph):
        return None
    speech = " ".join(quote.strip() for quote in quotes)
    return re.sub(r",(?=$| (?!I\b)[A-Z])", ".", speech)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, so every string round-trips; <s> is put before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def prepare(corpora: Path, vocab_size: int) -> PreparedCorpus:
    """Clean the novels, train the tokenizer on the training books, and encode everything."""
    books = {name: paragraphs_of(text) for name, text in read_novels(corpora) if name not in LEFT_OUT}
    missing = [name for name in HELD_OUT if name not in books]
    if missing:
        raise ValueError(f"{corpora} holds {len(books)} novels, but not the held-out ones: {missing}")
    training = {name: paragraphs for name, paragraphs in books.items() if name not in HELD_OUT}
    tokenizer = train_tokenizer(("\n\n".join(p) for p in training.values()), vocab_size)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_books(chosen: Iterable[list[str]]) -> tuple[list[list[int]], int]:
        pieces, size = [], 0
        for paragraphs in chosen:
            texts = [p + "\n\n" for p in paragraphs]
            texts[-1] = texts[-1].rstrip("\n") + EOS
            pieces += encode(texts)
            size += sum(len(t.encode()) for t in texts) - len(EOS)
        return pieces, size

    train, train_bytes = encode_books(training.values())
    held_out, held_out_bytes = encode_books(books[name] for name in HELD_OUT)
    chats = []
    for paragraphs in training.values():
        for scene, turns in dialogues_of(paragraphs):
            text = f"{SYSTEM}{scene}{EOS}" if scene else ""
            for i, turn in enumerate(turns):
                text += (ASSISTANT if i % 2 else USER) + turn + EOS
            chats.append(text + BOS)
    chat = encode(chats)
    return PreparedCorpus(
        train=_join(train),
        train_starts=_offsets(train),
        chat=_join(chat),
        chat_starts=_offsets(chat),
        held_out=_join(held_out),
        held_out_bytes=held_out_bytes,
        train_bytes=train_bytes,
        books=len(training),
        tokenizer=tokenizer,
    )


def _join(pieces: list[list[int]]) -> NDArray[np.uint16]:
    return np.fromiter((i for piece in pieces for i in piece), dtype=np.uint16)


def _offsets(pieces: list[list[int]]) -> NDArray[np.int32]:
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
    return np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int32)
