import dataclasses
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from services.model_worker.models.config import load_config
from services.tokenizer.admission import Admission, Admitted, Refused
from services.tokenizer.model_files import ModelFiles, ModelFilesError, load_model_files
from shared import codec
from shared.errors import ErrorCode
from shared.messages import ReplyTo
from shared.structured import Vocabulary

CONTEXT = 1024


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return load_model_files(Path(__file__).parents[2] / "models/demo")


@pytest.fixture(scope="module")
def admission(files: ModelFiles) -> Admission:
    return Admission(files, "demo", 256)


def admit(admission: Admission, body: dict[str, Any], context: int | None = CONTEXT, **options: Any) -> Admitted:
    outcome = admission.admit(json.dumps(body).encode(), "inbox", context, **options)
    assert isinstance(outcome, Admitted), outcome
    return outcome


def refuse(admission: Admission, body: dict[str, Any] | bytes, context: int | None = CONTEXT) -> Refused:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    outcome = admission.admit(data, "inbox", context)
    assert isinstance(outcome, Refused), outcome
    return outcome


def test_a_request_with_everything(admission: Admission, files: ModelFiles):
    body = {
        "id": "a", "tenant": "t", "prompt": "Once", "max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 7,
        "min_p": 0.1, "seed": 9, "n": 2, "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "repetition_penalty": 1.2,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "logprobs": 3, "priority": 4, "deadline": 2.5, "stream": False,
        "batched": True, "metadata": {"k": 1}, "traceparent": f"00-{1:032x}-{2:016x}-01", "model": "demo",
    }  # fmt: skip
    request = admit(admission, body).request
    assert codec.decode(codec.encode(request)) == request
    ids = files.encoder.encode("Once", True)
    assert (request.key, codec.unpack_ids(request.prompt_ids), request.choices) == ("t.a", ids, 2)
    assert request.reply == ReplyTo("inbox", "json", True, False)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        5,
        0.5,
        0.5,
        7,
        0.1,
    )
    assert (sampling.seed, sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == (9, (3,), True, 3)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.1, 0.2)
    assert (request.stop, request.priority, request.deadline, request.metadata) == (("x",), 4, 2.5, {"k": 1})
    assert (request.trace, request.durable) == (f"00-{1:032x}-{2:016x}-01", False)
    assert 0 < request.tokenize_ms < 1000


def test_what_changes_single_logits(admission: Admission, files: ModelFiles) -> None:
    body = {
        "prompt": "Once",
        "logit_bias": {"5": -100, "9": 1.5},
        "bad_words": ["sea", " sea", "the old man"],
        "min_tokens": 7,
    }
    body |= {"typical_p": 0.5}
    request = admit(admission, body).request
    assert codec.decode(codec.encode(request)) == request
    sampling = request.sampling
    assert (sampling.logit_bias, sampling.min_tokens, sampling.typical_p) == (((5, -100.0), (9, 1.5)), 7, 0.5)
    encoded = [files.encoder.encode(text, False) for text in ("sea", " sea", "the old man", " the old man")]
    assert sampling.bad_words == tuple(dict.fromkeys(map(tuple, encoded)))
    assert len(sampling.bad_words) == 4 and max(map(len, sampling.bad_words)) > 1

    for field, value in (("logit_bias", {"1000000": 1}), ("bad_words", ["zq" * 100]), ("min_tokens", 300)):
        error = refuse(admission, {"prompt": "Once", field: value}).error
        assert error.code == ErrorCode.INVALID_REQUEST and error.message.startswith(f"{field}: "), error.message


def test_best_of_echo_and_prompt_logprobs(admission: Admission) -> None:
    def admitted(**body: Any) -> Any:
        request = admit(admission, {"prompt": "Once"} | body).request
        assert codec.decode(codec.encode(request)) == request
        return request

    request = admitted(n=2, best_of=5)
    assert (request.choices, request.best, request.sampling.ranked, request.sampling.logprobs) == (5, 2, True, None)
    assert request.sampling.worker_logprobs == 0
    request = admitted(n=3, best_of=3)
    assert (request.choices, request.best, request.sampling.ranked) == (3, 0, False)
    request = admitted(echo=True, max_tokens=0)
    assert (request.echo, request.sampling.max_tokens, request.sampling.prompt_logprobs) == (True, 0, None)
    assert admitted(echo=True, logprobs=1).sampling.prompt_logprobs == 1
    assert admitted(echo=True, logprobs=1, prompt_logprobs=4).sampling.prompt_logprobs == 4
    assert admitted(logprobs=1).sampling.prompt_logprobs is None
    brim = [5] * CONTEXT
    assert admitted(prompt=brim, max_tokens=0, prompt_logprobs=0).sampling.max_tokens == 0
    for more in ({}, {"max_tokens": 1}):
        refused = refuse(admission, {"prompt": brim, "prompt_logprobs": 0} | more)
        assert refused.error.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED
    for field, body in (("max_tokens", {"max_tokens": 0}), ("best_of", {"n": 2, "best_of": 1})):
        error = refuse(admission, {"prompt": "Once"} | body).error
        assert error.code == ErrorCode.INVALID_REQUEST and field in error.message


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [(1, [1, 4096, 4101], {1}), (1, None, {1}), ([1, 2], {}, {1, 2}), (1, [3], {3}), (None, None, set())],
)
def test_the_stages_agree_where_a_text_may_end(tmp_path: Path, own: object, generation: object, ends: set[int]) -> None:
    """Ids without logits never end one, and null says nothing. Constraints take these ids, and no others."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((Path(__file__).parents[2] / "models/demo" / file).read_bytes())
    config = json.loads((Path(__file__).parents[2] / "models/demo/config.json").read_text()) | {"eos_token_id": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = {} if generation == {} else {"eos_token_id": generation}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    files = load_model_files(tmp_path)
    assert files.eos_ids == load_config(tmp_path).eos_ids == ends
    if ends:
        Vocabulary(files.encoder.to_json(), files.vocab_size, files.eos_ids)


def test_generation_config(tmp_path: Path) -> None:
    """Every default that is taken from it, and that the request's own values go before."""
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((Path(__file__).parents[2] / "models/demo" / file).read_bytes())
    eos = json.loads((tmp_path / "config.json").read_text())["eos_token_id"]
    config = {
        "temperature": 0.7, "top_k": 11, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8, "repetition_penalty": 1.1,
        "max_new_tokens": 99, "min_new_tokens": 2, "bad_words_ids": [[7], [8, 9], [eos], [77], [10**6]],
        "eos_token_id": [eos, 77, 10**6],
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    admission = Admission(load_model_files(tmp_path), "demo", 256)
    sampling = admit(admission, {"prompt": "Once"}).request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.7, 11, 0.9, 0.05)
    assert (sampling.typical_p, sampling.repetition_penalty, sampling.max_tokens, sampling.min_tokens) == (
        0.8,
        1.1,
        99,
        2,
    )
    assert sampling.bad_words == ((7,), (8, 9))
    own = admit(admission, {"prompt": "Once", "bad_words": [], "typical_p": 1, "max_tokens": 1}).request.sampling
    assert (own.bad_words, own.typical_p, own.min_tokens, own.temperature) == ((), 1.0, 1, 0.7)
    for wrong in ([["x"]], [[]], 5, [[1] * 17], [[10**6]]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"bad_words_ids": wrong}))
        with pytest.raises(ModelFilesError, match="bad_words_ids"):
            load_model_files(tmp_path)


def test_defaults_of_the_model(admission: Admission):
    sampling = admit(admission, {"prompt": "Once"}).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.8, 0.95, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.max_tokens, sampling.logprobs) == (1.0, 256, None)
    assert admit(admission, {"prompt": "Once", "temperature": 0}).request.sampling.greedy


def test_chat(admission: Admission, files: ModelFiles):
    request = admit(admission, {"messages": [{"role": "user", "content": "x"}]}).request
    assert codec.unpack_ids(request.prompt_ids) == files.encoder.encode("<s><|user|>x</s><|assistant|>", False)
    refused = refuse(admission, {"id": "a", "messages": [{"role": "wizard", "content": "x"}]})
    assert (refused.error.code, refused.to.id) == (ErrorCode.INVALID_REQUEST, "a")
    assert "unknown role wizard" in refused.error.message


def test_ids(admission: Admission):
    assert codec.unpack_ids(admit(admission, {"prompt": [5, 4095]}).request.prompt_ids) == [5, 4095]
    assert "4096" in refuse(admission, {"prompt": [5, 4096]}).error.message
    assert "stop_token_ids" in refuse(admission, {"prompt": [5], "stop_token_ids": [4096]}).error.message


def test_context(admission: Admission):
    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED
    prompt = [5] * 1000
    assert admit(admission, {"prompt": prompt, "max_tokens": 24}).request.sampling.max_tokens == 24
    assert refuse(admission, {"prompt": prompt, "max_tokens": 25}).error.code == code
    assert admit(admission, {"prompt": prompt}).request.sampling.max_tokens == 24
    assert admit(admission, {"prompt": [5] * 1023}).request.sampling.max_tokens == 1
    assert refuse(admission, {"prompt": [5] * 1024}).error.code == code
    assert refuse(admission, {"prompt": "word " * 5000}).error.code == code
    assert refuse(admission, {"prompt": "x" * 3_000_000}).error.code == code
    assert admit(admission, {"prompt": [5] * 5000, "max_tokens": 10**6}, None).request.sampling.max_tokens == 10**6


def test_what_is_wrong_is_told_to_the_right_one(admission: Admission):
    refused = refuse(admission, msgpack.packb({"id": "a", "tenant": "t", "batched": True, "bogus": 1}))
    assert refused.to[:3] == (ReplyTo("inbox", "msgpack", True), "a", "t")
    assert refused.error.code == ErrorCode.INVALID_REQUEST
    assert refuse(admission, b"{").to.id is None
    assert refuse(admission, {"id": "a b", "prompt": "x"}).to.id is None
    assert refuse(admission, {"prompt": "x", "model": "other", "metadata": {"k": 1}}).to.metadata == {"k": 1}


def test_repetition_has_the_same_seed_and_hash(admission: Admission):
    body = {"id": "a", "prompt": "Once"}
    first, again = admit(admission, body).request, admit(admission, body | {"stream": False}).request
    assert (first.body_hash, first.sampling) == (again.body_hash, again.sampling)
    other = admit(admission, body | {"max_tokens": 3}).request
    assert other.body_hash != first.body_hash
    seeds = {admit(admission, {"prompt": "Once"}).request.sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_jobs(admission: Admission):
    job = admit(admission, {"prompt": "Once"}, job_id="job-7").request
    assert (job.key, job.durable) == ("default.job-7", True)
    assert admit(admission, {"prompt": "Once", "id": "mine"}, job_id="job-7").request.key == "default.mine"
    waiting = admit(admission, {"prompt": "Once", "id": "job-7"}).request
    assert waiting.body_hash != job.body_hash


def test_a_search_does_not_take_the_defaults_of_sampling(files: ModelFiles):
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 99}
    admission = Admission(dataclasses.replace(files, defaults=defaults), "demo", 256)
    params = admit(admission, {"prompt": "Once"}).request.sampling
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (0.6, 1.1, 99)
    beams = admit(admission, {"prompt": "Once", "num_beams": 3, "n": 2, "early_stopping": "never"}).request
    assert beams.choices == 2 and beams.sampling.slots(beams.choices) == 3
    assert codec.decode(codec.encode(beams)) == beams
    params = beams.sampling
    assert (params.num_beams, params.early_stopping, params.max_tokens) == (3, "never", 99)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.0, 1.0, 0, 1.0)
    params = admit(admission, {"prompt": "Once", "penalty_alpha": 0.6, "top_k": 4}).request.sampling
    assert (params.penalty_alpha, params.top_k, params.top_p, params.repetition_penalty) == (0.6, 4, 1.0, 1.0)
    params = admit(admission, {"prompt": "Once", "cd_alpha": 0.1, "cd_beta": 0.0, "top_p": 0.5}).request.sampling
    assert (params.cd_alpha, params.cd_beta, params.temperature, params.top_k, params.top_p) == (0.1, 0.0, 0.6, 20, 0.5)
    assert params.repetition_penalty == 1.0
