"""Medusa heads: the arithmetic, the layouts they are published in, what cannot be loaded, and their training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from kernels.eight_bit import EightBit
from kernels.reference import ReferenceOps
from services.model_worker import train_heads
from services.model_worker.engine import EngineRequest
from services.model_worker.models.config import ModelConfig, ModelError, load_config
from services.model_worker.speculation import drafter as drafter_module
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.drafter import DraftInputs, MedusaDrafter, load_drafter
from services.model_worker.speculation.measure import Backbone, head_targets, target_ranks, top_accuracies
from services.model_worker.speculation.medusa import MedusaHeads, load_heads, save_heads, tied_output
from services.model_worker.speculation.tree import Tree, TreeSet
from shared.sampling import SamplingParams
from tests.unit.engine_harness import dummy_model, needs_weights, running, weights

HEADS, LAYERS, HIDDEN, VOCABULARY = 3, 2, 32, 96


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(dummy_model(tmp_path_factory.mktemp("dummy")))


class ResBlock(torch.nn.Module):
    """As published: a linear layer named `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(self.linear(x))


def published(own_output: bool) -> torch.nn.ModuleList:
    torch.manual_seed(5)

    def head() -> torch.nn.Sequential:
        output = [torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)] if own_output else []
        return torch.nn.Sequential(*[ResBlock() for _ in range(LAYERS)], *output)

    return torch.nn.ModuleList([head() for _ in range(HEADS)])


def vllm_names(heads: torch.nn.ModuleList) -> dict[str, Tensor]:
    named = {}
    for index, head in enumerate(heads):
        for layer in range(LAYERS):
            named[f"blocks.{index}.layers.{layer}.weight"] = head[layer].linear.weight.detach().clone()
            named[f"blocks.{index}.layers.{layer}.bias"] = head[layer].linear.bias.detach().clone()
        if len(head) > LAYERS:
            named[f"lm_heads.{index}.weight"] = head[LAYERS].weight.detach().clone()
    return named


@pytest.mark.parametrize("own_output", [True, False])
@pytest.mark.parametrize("layout", ["authors, pickle", "authors, prefixed", "vllm", "ours"])
def test_every_layout_gives_the_published_heads(
    tmp_path: Path, model: ModelConfig, layout: str, own_output: bool
) -> None:
    heads = published(own_output)
    state = {name: tensor.detach() for name, tensor in heads.state_dict().items()}
    if layout == "authors, pickle":
        torch.save(state, tmp_path / "medusa_lm_head.pt")
    elif layout == "authors, prefixed":
        prefixed = {f"medusa_head.{name}": t for name, t in state.items()}
        save_file(prefixed, tmp_path / "medusa_lm_head.safetensors")
    else:
        save_file(vllm_names(heads), tmp_path / "model.safetensors")
        if layout == "ours":
            save_heads(load_heads(tmp_path, model), tmp_path, torch.float32, {"note": 1})
            (tmp_path / "model.safetensors").unlink()
            config = json.loads((tmp_path / "config.json").read_text())
            assert (config["num_heads"], config["num_layers"], config["tied"]) == (HEADS, LAYERS, not own_output)
    loaded = load_heads(tmp_path, model)
    hidden, model_head = torch.randn(7, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    with torch.no_grad():
        wanted = [head(hidden) if own_output else head(hidden) @ model_head.T for head in heads]
        for used in (HEADS, 1):
            got = loaded.logits(loaded.states(hidden, used), model_head)
            torch.testing.assert_close(got, torch.stack(wanted[:used]))


def test_layers_of_a_head_are_each_their_own(tmp_path: Path, model: ModelConfig) -> None:
    """The authors' code shares one block among a head's layers, so their files repeat it; files of others need not."""
    torch.save(published(False).state_dict(), tmp_path / "medusa_lm_head.pt")
    loaded = load_heads(tmp_path, model)
    assert not torch.equal(loaded.weights[0], loaded.weights[1])
    assert MedusaHeads.initial(2, 3, 4).weights.unflatten(0, (3, 1)).shape == (3, 1, 2, 4, 4)


def test_a_truncated_vocabulary(tmp_path: Path, model: ModelConfig) -> None:
    heads = published(True)
    token_map = torch.arange(3, VOCABULARY, 4)
    save_file({**vllm_names(heads), "token_map": token_map}, tmp_path / "model.safetensors")
    model_head, hidden = torch.randn(VOCABULARY, HIDDEN), torch.randn(4, HIDDEN)
    drafter, _ = load_drafter(tmp_path, model, model_head, ReferenceOps())
    tree = Tree.of([(0,), (1,), (0, 0)])
    last = torch.tensor([1, 2, 3, 4])
    inputs = DraftInputs(torch.arange(4), last.int(), last, hidden)
    tokens = drafter.draft(inputs, DeviceTree(tree, torch.device("cpu")))
    with torch.no_grad():
        best = [head(hidden)[:, token_map].topk(2).indices for head in heads]
    assert torch.equal(tokens, torch.stack([last, *token_map[best[0]].T, token_map[best[1][:, 0]]], dim=1))


def test_node_tokens(model: ModelConfig) -> None:
    heads = MedusaHeads(torch.randn(1, 2, HIDDEN, HIDDEN), torch.randn(1, 2, HIDDEN))
    model_head, hidden, last = torch.randn(VOCABULARY, HIDDEN), torch.randn(5, HIDDEN), torch.arange(5)
    drafter = MedusaDrafter(heads, model_head, ReferenceOps())
    tree = Tree.of([(2,), (0,), (0, 1), (2, 3)])
    slots = torch.tensor([3, 0, 4])
    tokens = drafter.draft(DraftInputs(slots, last.int(), last, hidden), DeviceTree(tree, torch.device("cpu")))
    top = heads.logits(heads.states(hidden[slots]), model_head).topk(4).indices
    wanted = [slots, top[0, :, 0], top[0, :, 2], top[1, :, 1], top[1, :, 3]]
    assert torch.equal(tokens, torch.stack(wanted, dim=1))


@pytest.mark.parametrize("own", [False, True])
def test_guesses_with_eight_bits(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """Of large matrices only, and with tied heads only of few rows; what is guessed with are the rounded weights."""
    heads = MedusaHeads(torch.randn(1, 2, HIDDEN, HIDDEN), torch.randn(1, 2, HIDDEN))
    heads.outputs = torch.randn(2, VOCABULARY, HIDDEN) if own else None
    model_head, hidden, last = torch.randn(VOCABULARY, HIDDEN), torch.randn(5, HIDDEN), torch.arange(5)
    tree = DeviceTree(Tree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]), torch.device("cpu"))

    def guesses(heads: MedusaHeads, head: Tensor, eight_bit: bool, rows: int = 5) -> Tensor:
        drafter = MedusaDrafter(heads, head, ReferenceOps(), eight_bit)
        return drafter.draft(DraftInputs(torch.arange(rows), last.int(), last, hidden), tree)

    def rounded(weight: Tensor) -> Tensor:
        return EightBit.of(weight).expanded(torch.float32)

    assert torch.equal(guesses(heads, model_head, True), guesses(heads, model_head, False))  # so small: as they are
    monkeypatch.setattr(drafter_module, "EIGHT_BIT_FROM", 2 * HIDDEN * HIDDEN)
    monkeypatch.setattr(drafter_module, "EIGHT_BIT_ROWS", 10)
    outputs = rounded(heads.outputs) if heads.outputs is not None else None
    small = MedusaHeads(rounded(heads.weights[0])[None], heads.biases, outputs)
    coarse = guesses(small, rounded(model_head), False)
    assert torch.equal(guesses(heads, model_head, True), coarse)
    monkeypatch.setattr(drafter_module, "EIGHT_BIT_ROWS", 9)
    wanted = coarse if own else guesses(small, model_head, False)
    assert torch.equal(guesses(heads, model_head, True), wanted)


def test_what_cannot_be_loaded(tmp_path: Path, model: ModelConfig) -> None:
    def code(named: dict[str, Tensor] | bytes | None, file: str = "medusa_lm_head.safetensors") -> str:
        for old in tmp_path.iterdir():
            old.unlink()
        if isinstance(named, bytes):
            (tmp_path / file).write_bytes(named)
        elif named is not None:
            save_file(named, tmp_path / file)
        with pytest.raises(ModelError) as caught:
            load_drafter(tmp_path, model, torch.zeros(VOCABULARY, HIDDEN), ReferenceOps())
        return caught.value.code

    good = vllm_names(published(True))
    assert code(None) == "heads_missing"
    assert code(b"no", "medusa_lm_head.pt") == code(b"no") == "heads_corrupt"
    assert code(b"junk" * 10, "medusa_lm_head.pt") == "heads_corrupt"
    assert (
        code({"nothing": torch.zeros(1)}) == code({"x": torch.zeros(1)}, "heads.safetensors") == "heads_unknown_layout"
    )
    own = MedusaHeads(torch.zeros(1, 2, HIDDEN, HIDDEN), torch.zeros(1, 2, HIDDEN)).tensors()
    for name, tensor in (("weights", torch.zeros(3)), ("token_map", torch.zeros(2)), ("outputs", torch.zeros(3))):
        damaged = own | {"token_map": torch.arange(VOCABULARY), name: tensor}
        assert code(damaged, "heads.safetensors") == "heads_wrong_shape"
    for missing in ("blocks.1.layers.1.weight", "lm_heads.2.weight"):
        assert code({name: t for name, t in good.items() if name != missing}) == "heads_corrupt"
    assert code({**good, "blocks.0.layers.0.weight": torch.zeros(HIDDEN, HIDDEN + 1)}) == "heads_wrong_shape"
    assert code({name: t[..., : HIDDEN - 1].contiguous() for name, t in good.items()}) == "heads_wrong_shape"
    assert code({**good, "token_map": torch.tensor([VOCABULARY])}) == "heads_wrong_shape"
    assert code({**good, "blocks.0.layers.0.weight": torch.zeros(HIDDEN)}) == "heads_wrong_shape"
    save_file(good, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "trees.json").write_text("{}")
    with pytest.raises(ModelError, match="trees_invalid"):
        load_drafter(tmp_path, model, torch.zeros(VOCABULARY, HIDDEN), ReferenceOps())


def test_targets_and_ranks() -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    assert head_targets(ids, 2).tolist() == [[[5, 6, 7, -1, -1]], [[6, 7, -1, -1, -1]]]
    assert head_targets(ids, 2, first=4).tolist() == [[[-1, -1, 7, -1, -1]], [[-1, 7, -1, -1, -1]]]
    heads, hidden, model_head = MedusaHeads.initial(1, 1, 4), torch.randn(6, 4), torch.randn(9, 4)
    targets = torch.tensor([[0, 8, 3, -1, 5, 5]])
    ranks = target_ranks(heads, model_head, hidden, targets)
    order = (hidden @ model_head.T).argsort(-1, descending=True).tolist()
    assert ranks.tolist() == [[-1 if t < 0 else order[i].index(t) for i, t in enumerate(targets[0].tolist())]]
    assert top_accuracies(torch.tensor([[0, 2, -1, 1]]), torch.tensor([[True, True, True, False]]), 3) == [
        [pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3)]
    ]


@needs_weights
def test_the_backbone_is_the_model() -> None:
    transformers = pytest.importorskip("transformers")
    folder = weights("stories260K")
    backbone = Backbone(folder, torch.device("cpu"), torch.float32)
    ids = torch.randint(3, 512, (3, 41), generator=torch.Generator().manual_seed(1))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(ids).logits
    got = backbone.decoder.logits(backbone.hidden(ids).flatten(0, 1)).view_as(wanted)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


@needs_weights
@pytest.mark.parametrize("own", ["tied", "untied", "distilled", "few tokens", "hard targets"])
def test_training_learns_and_resumes(tmp_path: Path, own: str) -> None:
    """The heads of a tiny model on a text of one sentence: they learn it by heart, in one go or in two."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 60)
    quiet = Console(quiet=True)

    def config(out: str, steps: int) -> train_heads.TrainConfig:
        return train_heads.TrainConfig(
            weights("stories260K"), (text,), tmp_path / out, heads=2, tied=own in ("tied", "distilled"), rows=4, length=48,
            vocabulary=40 if own == "few tokens" else 0,
            steps=steps, learning_rate=1e-2, distil=400 if own == "distilled" else 0, device="cpu", temperature=0.0,
            hard_targets=own == "hard targets",
        )  # fmt: skip

    report = train_heads.train(config("whole", 40), quiet)
    assert report["heads"][0][0] > (0.05 if own == "distilled" else 0.8)
    written = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"heads.safetensors", "config.json", "accuracies.json", "trees.json"} <= written
    loaded = load_heads(tmp_path / "whole", load_config(weights("stories260K")))
    assert (
        loaded.num_heads == 2
        and loaded.weights.abs().max() > 0
        and (loaded.outputs is None) == (own in ("tied", "distilled"))
    )
    assert (loaded.token_map is not None) == (own == "few tokens")
    with pytest.raises(ModelError, match="checkpoint_mismatch"):
        train_heads.train(dataclasses.replace(config("whole", 40), rows=5), quiet)


@needs_weights
@pytest.mark.parametrize("few", [False, True])
def test_a_distilled_loss_is_the_cross_entropy_to_what_the_model_expects(few: bool) -> None:
    """Position by position, over whole rows; the last positions of a row, whose targets lie beyond it, count for nothing."""
    backbone = Backbone(weights("stories260K"), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    heads, head = MedusaHeads.initial(2, 1, backbone.config.hidden_size), backbone.decoder.weights.head
    heads.weights = torch.randn(heads.weights.shape, generator=generator) * 0.1
    heads.token_map = torch.arange(5, 95) if few else None
    known = slice(None) if heads.token_map is None else heads.token_map
    ids = torch.randint(3, 512, (3, 12), generator=generator)
    hidden = backbone.hidden(ids)
    itself = (hidden @ head.T).softmax(-1)[..., known]
    wanted = torch.zeros(2)
    for row in range(3):
        guessed = (heads.states(hidden[row]) @ head[known].T).log_softmax(-1)
        for position in range(12):
            for k in range(2):
                if position + 2 + k < 12:
                    wanted[k] -= (itself[row, position + 1 + k] * guessed[k, position]).sum()
    flat = hidden.flatten(0, 1)
    behind = torch.cat((flat, torch.zeros(2, flat.shape[1])))
    valid = (head_targets(ids, 2) >= 0).flatten(1)
    got = torch.zeros(2)
    for start, end in ((0, 7), (7, 36)):
        expected = train_heads.expected_tokens(backbone, heads, behind[start : end + 2])
        got += train_heads.distilled_losses(
            heads, tied_output(heads, head), flat[start:end], expected, valid[:, start:end]
        )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@needs_weights
def test_training_in_two_parts_is_training_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Tom and Sue saw a big red ball. They ran to the park to play with the ball. " * 40)
    quiet = Console(quiet=True)

    def run(out: str) -> dict[str, Tensor]:
        config = train_heads.TrainConfig(
            weights("stories260K"), (text,), tmp_path / out, heads=2, rows=2, length=32, steps=6, device="cpu"
        )
        train_heads.train(config, quiet)
        return load_heads(tmp_path / out, load_config(weights("stories260K"))).tensors()

    step = train_heads._train_step

    def interrupted(trainer: train_heads.Trainer, *arguments: object) -> list[float]:
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(trainer, *arguments)  # type: ignore[arg-type]

    whole = run("whole")
    monkeypatch.setattr(train_heads, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(train_heads, "_train_step", step)
    parts = run("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_weights
def test_a_tuned_tree_keeps_its_promise(tmp_path: Path) -> None:
    """Tokens per step on other prompts are those that the design foretold."""
    folder, prompts = weights("stories260K"), tmp_path / "prompts.txt"
    prompts.write_text(
        "Once upon a time, there was a little girl named Lily. One day, Tim saw a big dog in the park. " * 90
    )
    quiet = Console(quiet=True)
    out = tmp_path / "heads"
    train_heads.train(
        train_heads.TrainConfig(
            folder, (prompts,), out, heads=3, rows=4, length=64, steps=25, learning_rate=1e-2, distil=1200, device="cpu"
        ),
        quiet,
    )
    (out / "trees.json").unlink()
    report = train_heads.tune_tree(folder, out, (prompts,), 1.0, 3000, "cpu", quiet)
    trees = TreeSet.load(out / "trees.json").trees
    assert report["trees"] == {tree.size: pytest.approx(1 + tree.expected_extra, abs=1e-3) for tree in trees}
    assert report["trees"][64] > report["trees"][2] > 1
    with running(folder, heads=out, max_seqs=4) as started:
        controller = started.engine.trees
        assert controller is not None
        controller.pick = lambda *_: controller.trees[3]  # type: ignore[method-assign]
        params = {"temperature": 1.0, "max_tokens": 256, "ignore_eos": True}
        starts = [[1, *range(300, 300 + 20 * i, 20)] for i in range(1, 9)]
        started.run([
            EngineRequest(str(i), 0, 1, ids, SamplingParams(seed=1000 + i, **params)) for i, ids in enumerate(starts)
        ])  # fmt: skip
        stats = started.engine.stats().speculation
    assert stats is not None and stats.tokens_per_step == pytest.approx(report["trees"][16], rel=0.12)


def test_the_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = [str(tmp_path / "missing"), "--device", "cpu"]
    for command, files in (("train-heads", "--data"), ("tune-tree", "--prompts")):
        assert train_heads.main([command, files, str(tmp_path / "no.txt"), "--model", *missing]) == 1
        assert "config_missing" in capsys.readouterr().err
    for option in ("--heads", "--layers", "--rows", "--length", "--steps"):
        with pytest.raises(SystemExit):
            train_heads.main(["train-heads", "--data", "no.txt", "--model", *missing, option, "0"])
        assert f"argument {option}: must be at least 1" in capsys.readouterr().err
