"""`kbit.load` on a tiny model: the same text as transformers, alone or in company."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kbit
from kbit.engine.model import Model
from kbit.errors import KbitError

PROMPTS = ["It was a", "the clocks", "She said: “"]


def test_greedy_text_is_transformers(model: Model, model_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(model_path)
    completions = model.generate(PROMPTS, max_tokens=24)
    for prompt, mine in zip(PROMPTS, completions, strict=True):
        ids = model.encode(prompt)
        out = theirs.generate(
            torch.from_numpy(ids)[None], max_new_tokens=24, do_sample=False, pad_token_id=1
        )[0, len(ids) :].tolist()
        if 1 in out:
            out = out[: out.index(1)]
        assert mine.tokens == out
        assert (mine.finish_reason == "length") == (len(out) == 24)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_sample_does_not_depend_on_its_company(model: Model, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5, "n": 2, "max_tokens": 16}
    together = model.generate(PROMPTS, **options)
    alone = [c for p in PROMPTS for c in model.generate(p, **options)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [(c.prompt, c.sample) for c in together] == [(p, s) for p in range(3) for s in range(2)]


def test_prompt_forms(model: Model) -> None:
    ids = model.encode(PROMPTS[0])
    assert ids[0] == model.tokenizer.bos_id
    text = model.generate(PROMPTS[0], max_tokens=8)[0]
    assert model.generate(ids.tolist(), max_tokens=8)[0].tokens == text.tokens
    assert model.generate(ids, max_tokens=8)[0].tokens == text.tokens
    assert [c.tokens for c in model.generate([ids, ids], max_tokens=8)] == [text.tokens] * 2
    streamed = "".join(p.text for p in model.stream(PROMPTS[0], max_tokens=8))
    assert streamed == text.text


def test_logprobs_sum_to_the_sequences(model: Model) -> None:
    done = model.generate(PROMPTS[0], max_tokens=6, logprobs=2)[0]
    assert done.logprobs is not None
    ids = model.encode(PROMPTS[0])
    whole = np.concatenate([ids, done.tokens])
    cache = model.executor.new_cache(1, len(whole))
    logits = model.executor.forward([whole[:-1]], cache, all_logits=True)[0]
    rows = torch.log_softmax(torch.from_numpy(np.asarray(logits)).double(), -1).numpy()
    expected = rows[np.arange(len(ids) - 1, len(whole) - 1), done.tokens]
    np.testing.assert_allclose([c.logprob for c in done.logprobs], expected, atol=1e-4)
    assert all(c.top[0][1] >= c.top[1][1] for c in done.logprobs)
    assert all(c.top[0][0] == c.token for c in done.logprobs)  # greedy


def test_chat_follows_the_template(model: Model) -> None:
    messages = [{"role": "user", "content": "the day"}]
    ids = model.encode_chat(messages)
    assert model.tokenizer.decode(ids, skip_special=False) == "<|user|>the day</s>\n<|assistant|>"
    assert model.tokenizer.token(int(ids[0])) == "<|user|>"
    done = model.chat(messages, max_tokens=5)
    assert done.tokens == model.generate(ids, max_tokens=5)[0].tokens


def test_quantized_checkpoints_speak_too(model_path: Path, tmp_path: Path) -> None:
    kbit.quantize(model_path, tmp_path / "q8", bits=8)
    quantized = kbit.load(tmp_path / "q8", backend="torch")
    done = quantized.generate(PROMPTS[0], max_tokens=4)[0]
    assert len(done.tokens) <= 4
    assert quantized.chat_template is not None


def test_refusals(model: Model, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(KbitError, match=r"71 tokens.*holds 64|tokens, but the context holds 64"):
        model.generate("the clocks " * 40)
    with pytest.raises(KbitError, match="context is 65"):
        kbit.load(model_path, backend="torch", context=65)
    with pytest.raises(KbitError, match="threads is 0"):
        kbit.load(model_path, backend="torch", threads=0)
    with pytest.raises(KbitError, match="ids from 0"):
        model.generate([5, 100000])
    with pytest.raises(KbitError, match="no prompt"):
        model.generate([])
    with pytest.raises(KbitError, match="backend 'abacus'"):
        kbit.load(model_path, backend="abacus")
    shorter = kbit.load(model_path, backend="torch", context=8)
    with pytest.raises(KbitError, match="holds 8"):
        shorter.generate("the clocks were striking thirteen")
    assert len(shorter.generate("the", max_tokens=99, ignore_eos=True)[0].tokens) <= 8
