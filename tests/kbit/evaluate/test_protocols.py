"""The presets against the loops that they stand for, run on transformers directly."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kbit.cli.eval import PROTOCOL_NAMES
from kbit.engine.model import Model
from kbit.errors import KbitError
from kbit.evaluate.protocols import (
    PROTOCOLS,
    detokenize_wikitext,
    protocol,
    windows,
)
from tests.kbit.speaker import TEXT

L = 16  # window length of these tests
PAGES = (
    " \n = The First = \n \n It was a @-@ bright , cold day ; he ( the clerk ) said : 3 @,@ 0 . \n"
    " = = A section = = \n \n The clocks ' hands did n't move ! They 's gone . \n \n"
    " = Another Page = \n \n Thirteen struck [ twice ] . \n = = = Deeper = = = \n Yes .\n"
)


class Peer:
    """The same checkpoint in transformers: log-likelihoods of target tokens."""

    def __init__(self, model: Model) -> None:
        path = model.checkpoint.path
        self.model = AutoModelForCausalLM.from_pretrained(path).double()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def log_likelihoods(self, tokens: list[int]) -> np.ndarray:
        """Of tokens 1.. given those before, [T - 1]."""
        ids = torch.tensor([tokens])
        rows = torch.log_softmax(self.model(ids).logits[0, :-1], -1)
        return rows.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def peer(model: Model) -> Peer:
    # tokenizer.json has no post-processor here, and transformers then ignores add_bos_token.
    found = Peer(model)
    if model.tokenizer.adds_bos:
        found.tokenizer.add_bos_token = True
    assert found.tokenizer(TEXT)["input_ids"] == model.encode(TEXT).tolist()
    return found


def close(value: float, expected: float) -> None:
    assert value == pytest.approx(expected, rel=2e-5)  # fp32 logits against fp64 ones


def rows_joined(text: str) -> str:
    """As datasets.load_dataset("wikitext") and '\\n\\n'.join(rows) give it."""
    rows = [row if row.strip() else "" for row in text.splitlines(keepends=True)]
    return "\n\n".join(rows)


def test_gptq(model: Model, peer: Peer) -> None:
    ids = peer.tokenizer(rows_joined(TEXT))["input_ids"]
    count = len(ids) // L
    losses = []
    for i in range(count):
        window = ids[i * L : (i + 1) * L]
        losses.append(-peer.log_likelihoods(window).mean() * L)
    found = model.evaluate(TEXT, protocol="gptq", context=L)
    assert found.tokens == count * (L - 1)
    close(found.estimates["perplexity"].value, math.exp(sum(losses) / (count * L)))


@pytest.mark.parametrize("stride", [5, 16])
def test_hf_strided(model: Model, peer: Peer, stride: int) -> None:
    ids = peer.tokenizer(rows_joined(TEXT))["input_ids"]
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + L, len(ids))
        target = end - before
        scores = peer.log_likelihoods(ids[begin:end])[-target:]
        total, count = total - scores.sum(), count + len(scores)
        before = end
        if end == len(ids):
            break
    found = model.evaluate(TEXT, protocol="hf-strided", context=L, stride=stride)
    assert found.tokens == count
    close(found.estimates["nats_per_token"].value, total / count)


def test_llama_cpp(model: Model, peer: Peer) -> None:
    ids = peer.tokenizer(TEXT)["input_ids"]
    total, count = 0.0, 0
    for chunk in range(len(ids) // L):
        window = ids[chunk * L : (chunk + 1) * L]
        if model.tokenizer.adds_bos:
            window[0] = model.tokenizer.bos_id
        first = L // 2
        scores = peer.log_likelihoods(window)[first:]  # the logits at positions first .. L - 2
        assert len(scores) == L - first - 1
        total, count = total - scores.sum(), count + len(scores)
    found = model.evaluate(TEXT, protocol="llama.cpp", context=L)
    assert found.tokens == count
    close(found.estimates["perplexity"].value, math.exp(total / count))


def test_llama_cpp_scores_255_of_512() -> None:
    chosen = PROTOCOLS["llama.cpp"].resolved(512)
    assert chosen.context == 512
    assert chosen.context - chosen.context // 2 - 1 == 255


def test_lm_eval(model: Model, peer: Peer) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="the harness that the preset stands for")
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    total, words, n_bytes = 0.0, 0, 0
    pages = [p for p in re.split(r"(?m)^(?= = [^=])", PAGES) if p.strip()]
    assert len(pages) == 2
    for page in pages:
        page = page.removesuffix("\n") if page is not pages[-1] else page
        text = preprocess.wikitext_detokenizer({"page": page})
        assert detokenize_wikitext(page) == text
        ids = peer.tokenizer(text, add_special_tokens=False)["input_ids"]
        rolling = utils.get_rolling_token_windows(
            token_list=ids, prefix_token=peer.tokenizer.bos_token_id, max_seq_len=L, context_len=1
        )
        for context, target in map(utils.make_disjoint_window, rolling):
            scores = peer.log_likelihoods(context + target)
            total += scores[-len(target) :].sum()
        result = preprocess.process_results({"page": page}, (0.0,))
        words += result["word_perplexity"][1]
        n_bytes += result["bits_per_byte"][1]
    found = model.evaluate(PAGES.removeprefix(" \n"), protocol="lm-eval", context=L)
    assert found.documents == 2
    assert found.bytes == n_bytes
    close(found.estimates["word_perplexity"].value, math.exp(-total / words))
    close(found.estimates["bits_per_byte"].value, -total / n_bytes / math.log(2))


def test_kbit(model: Model, peer: Peer) -> None:
    ids = peer.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    bos = [model.tokenizer.bos_id] if model.tokenizer.adds_bos else []
    total, count = 0.0, 0
    for begin in range(0, len(ids), L):
        # With BOS the window is fed BOS and L - 1 tokens; without, L tokens.
        window = bos + ids[begin : begin + L] if bos else ids[begin : begin + L + 1]
        scores = peer.log_likelihoods(window)
        total, count = total - scores.sum(), count + len(scores)
    found = model.evaluate(TEXT, protocol="kbit", context=L)
    assert found.tokens == count == len(ids) - (not bos)
    close(found.estimates["nats_per_token"].value, total / count)
    skipped = 0 if bos else len(model.tokenizer.decode(ids[:1]).encode())
    assert found.bytes == len(TEXT.encode()) - skipped
    close(found.estimates["bits_per_byte"].value, total / math.log(2) / found.bytes)


def test_bos_options(model: Model) -> None:
    bos_id = model.tokenizer.bos_id
    for name in PROTOCOLS:
        chosen = protocol(name, context=L).resolved(48)
        text = PAGES if name == "lm-eval" else TEXT
        added = windows(text, model.tokenizer, chosen, bos=True)
        assert added[0].tokens[0] == bos_id
        every = chosen.bos in ("window", "replace")
        assert all(w.tokens[0] == bos_id for w in added) == every
    record = model.evaluate(TEXT, context=L, bos=False).record()
    assert record["protocol"]["bos_added"] is False
    assert record["protocol"]["bos"] == "never"
    assert model.evaluate(TEXT, context=L, bos=True).record()["protocol"]["bos_added"] is True


@pytest.mark.parametrize("name", PROTOCOLS)
def test_windows_fit_and_score_each_token_once(model: Model, name: str) -> None:
    chosen = protocol(name, context=L).resolved(48)
    text = PAGES if name == "lm-eval" else TEXT
    cut = windows(text, model.tokenizer, chosen)
    assert all(1 <= w.first < len(w.tokens) for w in cut)
    assert all(len(w.tokens) - 1 <= L for w in cut)
    prepared = rows_joined(text) if chosen.text == "rows" else text
    total = len(prepared.encode())
    assert sum(w.bytes for w in cut) <= total
    if chosen.tail != "drop" and name != "lm-eval":
        scored = sum(w.scored for w in cut)
        assert scored >= len(model.tokenizer.encode(prepared, special=False)) - 1


def test_wikitext_has_62_pages(shared: Any) -> None:
    from kbit.evaluate.protocols import _wikitext_pages

    text = (shared / "data" / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    assert len(list(_wikitext_pages(text))) == 62


def test_a_small_context_halves_the_stride() -> None:
    assert protocol("hf-strided", context=16).stride == 8
    assert protocol("hf-strided", context=16, stride=3).stride == 3
    assert protocol("hf-strided", context=2048).stride == 512


def test_the_command_knows_the_names() -> None:
    assert tuple(PROTOCOLS) == PROTOCOL_NAMES


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("kbit", {"context": 49}, "49 tokens: this model takes 2 to 48"),
        ("kbit", {"context": 1}, "1 tokens: this model takes"),
        ("gptq", {}, "2048 tokens: this model takes"),
        ("kbit", {"context": 8, "stride": 9}, "stride of 9"),
        ("hf-strided", {"context": 8, "stride": 0}, "stride of 0"),
        ("llama.cpp", {"context": 8, "stride": 4}, "no stride other"),
        ("nope", {}, "'nope' is not known"),
    ],
)
def test_refusals(name: str, changes: dict[str, int], told: str) -> None:
    with pytest.raises(KbitError, match=told):
        protocol(name, **changes).resolved(48)


def test_a_text_too_short(model: Model) -> None:
    for name in ("gptq", "llama.cpp", "kbit"):
        with pytest.raises(KbitError, match="too short"):
            model.evaluate("" if name == "kbit" else "I", protocol=name, context=L)
