"""Medusa-2: model and heads trained together become another model, whose output with its heads is the one without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

pytest.importorskip("transformers")

from services.model_worker import joint_training, train_heads
from services.model_worker.joint_training import JointConfig, joint_losses, train_joint, weight_at
from services.model_worker.models.config import ModelError, load_config
from services.model_worker.speculation.measure import Backbone, head_targets
from services.model_worker.speculation.medusa import MedusaHeads, load_heads
from tests.unit.engine_harness import greedy, needs_weights, running, weights

STORY = "Tom and Sue saw a big red ball. They ran to the park to play with the ball. The dog saw them and ran too. "
QUIET = Console(quiet=True)


def config_of(tmp_path: Path, out: str, steps: int) -> JointConfig:
    text = tmp_path / "text.txt"
    text.write_text(STORY * 40)
    first = train_heads.TrainConfig(
        weights("stories260K"), (text,), tmp_path / "first", heads=2, rows=4, length=48, steps=15, learning_rate=1e-2,
        tied=False, device="cpu",
    )  # fmt: skip
    return JointConfig(first, tmp_path / out, steps, learning_rate=1e-3)


@needs_weights
def test_joint_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, "new", 12)
    report = train_joint(config, QUIET)
    assert report["steps"] == 12
    assert report["held_out_loss"]["after"] < 0.8 * report["held_out_loss"]["before"], "the model learns, too"
    before = load_heads(tmp_path / "first", load_config(weights("stories260K")))
    after = load_heads(tmp_path / "new/medusa", load_config(tmp_path / "new"))
    assert not torch.equal(before.weights.float(), after.weights.float())
    old, new = (load_file(folder / "model.safetensors") for folder in (weights("stories260K"), tmp_path / "new"))
    moved = [name for name in new if name in old and not torch.equal(old[name].float(), new[name].float())]
    assert len(moved) > len(new) / 2
    assert not (tmp_path / "new/checkpoint.pt").exists()

    prompts = [[1, 400 + i, 410 + 2 * i] for i in range(6)]
    outputs, stats = [], []
    for options in ({"speculate": False}, {}):
        with running(tmp_path / "new", max_seqs=4, **options) as harness:
            outputs.append([o.ids for o in harness.run([greedy(f"{i}", p, 60) for i, p in enumerate(prompts)])])
            stats.append(harness.engine.stats().speculation)
    assert outputs[0] == outputs[1]


@needs_weights
def test_joint_training_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_joint(config_of(tmp_path, "whole", 6), QUIET)
    step = joint_training._step

    def interrupted(joint: joint_training.Joint, *arguments: object) -> list[float]:
        if joint.step == 3:
            raise KeyboardInterrupt
        return step(joint, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(joint_training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_joint(config_of(tmp_path, "parts", 6), QUIET)
    with pytest.raises(ModelError, match="checkpoint_mismatch"):
        train_joint(dataclasses.replace(config_of(tmp_path, "parts", 6), weight=0.3), QUIET)
    monkeypatch.setattr(joint_training, "_step", step)
    train_joint(config_of(tmp_path, "parts", 6), QUIET)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_weights
def test_the_losses_are_those_of_the_engines_own_decoder(tmp_path: Path) -> None:
    folder = weights("stories260K")
    backbone = Backbone(folder, torch.device("cpu"), torch.float32)
    model = joint_training._trainable(folder, torch.device("cpu")).eval()
    heads = MedusaHeads.initial(2, 1, backbone.config.hidden_size)
    heads.weights.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, of_heads = joint_losses(model, heads, ids, 0)
    hidden, head = backbone.hidden(ids), backbone.decoder.weights.head
    expected = torch.nn.functional.cross_entropy(
        backbone.decoder.logits(hidden[:, :-1].flatten(0, 1)), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    scores = heads.logits(heads.states(hidden.flatten(0, 1)), head)
    for index, wanted in enumerate(head_targets(ids, 2).flatten(1)):
        loss = torch.nn.functional.cross_entropy(scores[index], wanted, ignore_index=-1)
        torch.testing.assert_close(of_heads[index], loss, rtol=1e-4, atol=1e-4)


def test_the_weight_of_the_heads_grows() -> None:
    assert weight_at(0.2, 0) == 0 and weight_at(0.2, 1) == pytest.approx(0.2) == weight_at(0.2, 1.5)
    assert weight_at(0.2, 0.5) == pytest.approx(0.2 * 0.70710678)
