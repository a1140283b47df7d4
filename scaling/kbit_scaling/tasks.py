"""Zero-shot tasks over local files, asked and scored as lm-evaluation-harness does.

| name       | items (JSON lines)                         | asked                          |
|------------|--------------------------------------------|--------------------------------|
| lambada    | context, continuation                      | greedy: is it the last word?   |
| piqa       | query ("Question: ..."), choices, gold     | query, "Answer:" + choice      |
| winogrande | context_options, continuation, gold        | the same end after each option |
| hellaswag  | activity_label, ctx_a, ctx_b, endings, label | "activity: context" + ending |
| arc        | question, choices {text, label}, answerKey | "Question: ...", "Answer:"     |
| cloze      | plain text                                 | passage + its next sentence or |
|            |                                            | one of three from elsewhere    |

Scores: `correct` by the sum of log-likelihoods, `correct_norm` by that sum over the answer's
length in characters (its leading space not counted).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kbit.engine.executor import Executor
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError

from .records import Items
from .study import Task

BATCH_TOKENS = 4096
CLOZE_ITEMS = 400
CLOZE_CONTEXT_BYTES = 400


@dataclass(frozen=True)
class Item:
    """Requests (context, continuation) of one item, the index of the right one, and the lengths in
    characters that normalize. One request alone asks for the greedy continuation."""

    requests: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


def _choices(context: str, choices: Sequence[str], gold: int) -> Item:
    return Item(
        tuple((context, " " + choice) for choice in choices), gold, tuple(len(c) for c in choices)
    )


def _lambada(row: dict[str, Any]) -> Item:
    return Item(((row["context"], " " + row["continuation"]),), 0, (len(row["continuation"]),))


def _piqa(row: dict[str, Any]) -> Item:
    return _choices(row["query"].rstrip("\n") + "\nAnswer:", row["choices"], row["gold"])


def _winogrande(row: dict[str, Any]) -> Item:
    end = row["continuation"]
    requests = tuple((context, " " + end) for context in row["context_options"])
    return Item(requests, row["gold"], tuple(len(end) for _ in requests))


def _hellaswag(row: dict[str, Any]) -> Item:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    query = clean(f"{row['activity_label']}: {context}")
    return _choices(query, [clean(ending) for ending in row["endings"]], int(row["label"]))


def _arc(row: dict[str, Any]) -> Item:
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return _choices(f"Question: {row['question']}\nAnswer:", choices["text"], gold)


FORMS: dict[str, Callable[[dict[str, Any]], Item]] = {
    "lambada": _lambada,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "arc": _arc,
}
CHANCE = {"lambada": 0.0, "piqa": 0.5, "winogrande": 0.5, "hellaswag": 0.25, "arc": 0.25}
CHANCE["cloze"] = 0.25


def _cloze(text: str, limit: int) -> list[Item]:
    """Passages spread over the text, each with its true next sentence and three that follow other
    passages, of the most similar length, so that length does not give it away."""
    sentences = [
        (m.start(), m.end())
        for m in re.finditer(r"(?<=[.!?] )[A-Z\"'][^.!?\n]{40,160}[.!?](?= )", text)
        if m.start() > CLOZE_CONTEXT_BYTES
    ]
    count = min(limit or CLOZE_ITEMS, len(sentences) // 8)
    if count < 1:
        raise KbitError("the text for the cloze is too short: it has fewer than 8 whole sentences")
    pick = [sentences[round(i * (len(sentences) - 1) / count)] for i in range(count)]
    rng = np.random.default_rng(0)
    lengths = np.array([end - begin for begin, end in pick])
    items = []
    for i, (begin, end) in enumerate(pick):
        near = np.argsort(np.abs(lengths - lengths[i]), kind="stable")
        others = [j for j in near if j != i][:12]
        wrong = rng.choice(len(others), size=min(3, len(others)), replace=False)
        choices = [text[slice(*pick[others[j]])] for j in wrong]
        gold = int(rng.integers(len(choices) + 1))
        choices.insert(gold, text[begin:end])
        context = text[begin - CLOZE_CONTEXT_BYTES : begin].partition(" ")[2].rstrip()
        items.append(_choices(context, choices, gold))
    return items


@lru_cache(maxsize=16)
def load_items(task: Task) -> tuple[Item, ...]:
    """The task's items, at most `limit` of them; KbitError names the line that does not fit."""
    if task.name not in CHANCE:
        raise KbitError(f"no task named {task.name!r}; known tasks: {', '.join(CHANCE)}")
    try:
        text = task.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KbitError(f"{task.path}: items of {task.name!r} cannot be read ({error})") from None
    if task.name == "cloze":
        return tuple(_cloze(text, task.limit))
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(FORMS[task.name](json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KbitError(
                f"{task.path}: line {number} is no item of {task.name!r} ({error!r})"
            ) from None
        if task.limit and len(items) == task.limit:
            break
    if not items:
        raise KbitError(f"{task.path}: holds no items of {task.name!r}")
    return tuple(items)


def items_digest(task: Task) -> str:
    """Hash of what is asked."""
    return hashlib.sha256(repr(load_items(task)).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation in nats, and whether every token of it is the greedy one."""

    log_likelihood: float
    greedy: bool


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation, cut where the context's own tokens end."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if start is None:
            raise KbitError("a request without context needs a BOS or EOS token, and this "
                            "tokenizer names neither")  # fmt: skip
        return [start], tokenizer.encode(continuation, special=False).tolist()
    whole = tokenizer.encode(context + continuation).tolist()
    head = tokenizer.encode(context).tolist()
    return head, whole[len(head) :]


def log_likelihoods(
    executor: Executor, tokenizer: Tokenizer, requests: Sequence[tuple[str, str]]
) -> list[Scored]:
    """Score continuations after their contexts, in batches of similar length.

    A request longer than the model's context loses its beginning, as in the harness.
    """
    longest = executor.decoder.max_positions
    encoded = []
    for context, continuation in requests:
        head, tail = encode_pair(tokenizer, context, continuation)
        encoded.append((np.array((head + tail)[-(longest + 1) :]), len(tail)))
    found: list[Scored | None] = [None] * len(requests)
    for batch in _batches([len(tokens) for tokens, _ in encoded]):
        inputs = [encoded[i][0][:-1] for i in batch]
        cache = executor.new_cache(len(batch), max(len(x) for x in inputs))
        logits = executor.forward(inputs, cache, all_logits=True)
        for i, rows in zip(batch, logits, strict=True):
            tokens, length = encoded[i]
            length = min(length, len(tokens) - 1)
            goal = torch.from_numpy(tokens[len(tokens) - length :].astype(np.int64))
            log_p = torch.log_softmax(torch.from_numpy(rows[len(rows) - length :]), dim=1)
            total = float(log_p.gather(1, goal[:, None]).double().sum())
            found[i] = Scored(total, bool((log_p.argmax(1) == goal).all()))
    return [scored for scored in found if scored is not None]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score(task: Task, executor: Executor, tokenizer: Tokenizer) -> Items:
    """The task's items answered by a model."""
    items = load_items(task)
    requests = [request for item in items for request in item.requests]
    scored = iter(log_likelihoods(executor, tokenizer, requests))
    correct, normed, gold = [], [], []
    for item in items:
        answers = [next(scored) for _ in item.requests]
        values = np.array([a.log_likelihood for a in answers])
        if not np.isfinite(values).all():
            raise KbitError(f"the model's logits hold NaN or infinity on the task {task.name!r}")
        if len(answers) == 1:
            right = right_norm = answers[0].greedy
        else:
            right = int(values.argmax()) == item.gold
            right_norm = int((values / np.array(item.lengths)).argmax()) == item.gold
        correct.append(int(right))
        normed.append(int(right_norm))
        gold.append(round(float(values[item.gold]), 4))
    return Items(correct=correct, correct_norm=normed, log_likelihood=gold)
