"""Zero-shot tasks: tokens and scores as lm-evaluation-harness has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kbit
from kbit.engine.model import Model
from kbit.errors import KbitError
from kbit_scaling.study import Task
from kbit_scaling.tasks import CHANCE, encode_pair, load_items, log_likelihoods, score

from .conftest import Tiny, words

HELLASWAG = {
    "activity_label": "Roof",
    "ctx_a": "A man is on a roof. [header] he",
    "ctx_b": "starts pulling",
    "endings": ["up [x] tiles.", "it down.", "hair.", "cars."],
    "label": "1",
}


def load(tiny: Tiny) -> Model:
    return kbit.load(tiny.models[1], backend="torch", threads=1)


def write(folder: Path, name: str, rows: list[dict[str, object]], limit: int = 0) -> Task:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(name, path, limit)


def test_a_batch_scores_like_one_request_at_a_time(tiny: Tiny) -> None:
    model = load(tiny)
    rng = np.random.default_rng(0)
    requests = [(words(int(rng.integers(1, 40)), i), " " + words(int(rng.integers(1, 6)), 99 + i))
                for i in range(12)]  # fmt: skip
    together = log_likelihoods(model.executor, model.tokenizer, requests)
    for request, found in zip(requests, together, strict=True):
        [alone] = log_likelihoods(model.executor, model.tokenizer, [request])
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
        head, tail = encode_pair(model.tokenizer, *request)
        tokens = np.array((head + tail)[-65:])
        [logits] = model.executor.forward(
            [tokens[:-1]], model.executor.new_cache(1, 64), all_logits=True
        )
        rows = logits[-len(tail) :].astype(np.float64)
        log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        expected = log_p[np.arange(len(rows)), tokens[-len(rows) :]].sum()
        assert found.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert found.greedy == bool((rows.argmax(1) == tokens[-len(rows) :]).all())


def test_context_and_continuation_are_cut_as_the_harness_does(tiny: Tiny) -> None:
    tokenizer = load(tiny).tokenizer
    head, tail = encode_pair(tokenizer, "the of ", "and a")
    assert head == tokenizer.encode("the of").tolist()
    assert tokenizer.decode(tail) == " and a"
    head, tail = encode_pair(tokenizer, "", "the of")
    assert head == [tokenizer.bos_id]
    assert tokenizer.decode(tail) == "the of"


def test_items_are_asked_in_the_harness_words(tmp_path: Path) -> None:
    [item] = load_items(write(tmp_path, "hellaswag", [HELLASWAG]))
    assert item.requests[0] == ("Roof: A man is on a roof. he Starts pulling", " up tiles.")
    assert (item.gold, item.lengths) == (1, (9, 8, 5, 5))
    arc = {"question": "What?", "choices": {"text": ["x", "yy"], "label": ["A", "B"]},
           "answerKey": "B"}  # fmt: skip
    [item] = load_items(write(tmp_path, "arc", [arc]))
    assert item.requests == (
        ("Question: What?\nAnswer:", " x"),
        ("Question: What?\nAnswer:", " yy"),
    )
    assert item.gold == 1
    piqa = {"query": "Question: How?\n", "choices": ["so", "not"], "gold": 0}
    [item] = load_items(write(tmp_path, "piqa", [piqa]))
    assert item.requests[1] == ("Question: How?\nAnswer:", " not")
    wino = {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 1}
    [item] = load_items(write(tmp_path, "winogrande", [wino]))
    assert item.requests == (("A so A", " won."), ("A so B", " won."))


def test_scores_choose_by_sum_and_by_length(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny)
    rows = [{"query": f"Question: {words(5, i)}\n",
             "choices": [words(2, 50 + i), words(9, 90 + i)], "gold": i % 2}
            for i in range(20)]  # fmt: skip
    task = write(tmp_path, "piqa", rows)
    found = score(task, model.executor, model.tokenizer)
    # the longer answer has the lower sum here, whatever is asked; length undoes that
    assert found.correct == [int(i % 2 == 0) for i in range(20)]
    assert found.correct_norm != found.correct
    limited = Task("piqa", task.path, 7)
    assert len(score(limited, model.executor, model.tokenizer).correct) == 7


def test_cloze_asks_for_the_true_next_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    sentences = [f"Number {i} {'was here and ' * (3 + i % 4)}then it went." for i in range(400)]
    path.write_text(" ".join(sentences))
    items = load_items(Task("cloze", path, 20))
    assert len(items) == 20
    golds = [item.gold for item in items]
    assert len(set(golds)) == 4
    for item in items:
        context, answer = item.requests[item.gold]
        assert context + answer in " ".join(sentences)
        others = [r[1] for i, r in enumerate(item.requests) if i != item.gold]
        assert len(set(others)) == 3
        assert all(context + other not in " ".join(sentences) for other in others)


def test_items_that_do_not_fit_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(KbitError, match=r"piqa.jsonl: line 1 is no item of 'piqa'"):
        load_items(write(tmp_path, "piqa", [{"question": "?"}]))
    with pytest.raises(KbitError, match="no task named 'quiz'; known tasks: lambada"):
        load_items(Task("quiz", tmp_path / "x"))
    with pytest.raises(KbitError, match="cannot be read"):
        load_items(Task("piqa", tmp_path / "none"))
    assert set(CHANCE) == {"lambada", "piqa", "winogrande", "hellaswag", "arc", "cloze"}


def _raw(name: str, i: int) -> dict[str, Any]:
    """Made-up items in the form in which the harness finds each task on the Hub."""
    label = i % 2
    match name:
        case "piqa":
            return {"goal": words(6, i), "sol1": words(2 + i % 5, 50 + i),
                    "sol2": words(4, 90 + i), "label": label}  # fmt: skip
        case "hellaswag":
            endings = [words(2 + (i + j) % 5, 50 * j + i) + " [x] end." for j in range(4)]
            return {"activity_label": "Roof", "ctx_a": words(7, i) + " [title]",
                    "ctx_b": words(3, 40 + i), "endings": endings, "label": str(i % 4)}  # fmt: skip
        case "arc":
            texts = [words(1 + (i + j) % 4, 60 * j + i) for j in range(4)]
            return {"question": words(8, i), "answerKey": "ABCD"[i % 4],
                    "choices": {"text": texts, "label": list("ABCD")}}  # fmt: skip
        case "winogrande":
            return {"sentence": f"{words(6, i)} _ {words(4, 70 + i)}", "answer": str(1 + label),
                    "option1": words(1, 20 + i), "option2": words(1, 30 + i)}  # fmt: skip
        case _:
            return {"text": words(12, i)}


def _ours(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The same item as our local files have it."""
    match name:
        case "piqa":
            return {"query": f"Question: {raw['goal']}\n", "choices": [raw["sol1"], raw["sol2"]],
                    "gold": raw["label"]}  # fmt: skip
        case "winogrande":
            begin, _, end = raw["sentence"].partition("_")
            return {"context_options": [begin + raw["option1"], begin + raw["option2"]],
                    "continuation": end.strip(), "gold": int(raw["answer"]) - 1}  # fmt: skip
        case "lambada":
            context, _, word = raw["text"].rpartition(" ")
            return {"context": context, "continuation": word}
    return raw


HARNESS = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}


@pytest.mark.parametrize("name", list(HARNESS))
def test_scores_agree_with_the_harness_on_the_same_items(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The harness' own task definitions, reading a local file in place of the Hub's."""
    pytest.importorskip("lm_eval", reason="needs the harness: pip install 'kbit[lm-eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from kbit_scaling.lm_eval_adapter import KbitLM

    raw = [_raw(name, i) for i in range(30)]
    source = tmp_path / "items.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in raw))
    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / HARNESS[name])
    split = task.get("validation_split") or task["test_split"]
    task |= {
        "task": "local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(source)}},
        "training_split": None,
        "test_split": task["test_split"] if split == task.get("test_split") else None,
    }
    harness = KbitLM(str(tiny.models[1]), backend="torch", threads=1)
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert results is not None
    theirs = results["results"]["local"]
    ours = write(tmp_path, name, [_ours(name, row) for row in raw])
    found = score(ours, harness.model.executor, harness.model.tokenizer)
    assert np.mean(found.correct) == pytest.approx(theirs["acc,none"])
    if "acc_norm,none" in theirs:
        assert np.mean(found.correct_norm) == pytest.approx(theirs["acc_norm,none"])
    if name == "lambada":  # a word's perplexity; the tiny models never guess the word itself
        mean = np.mean(found.log_likelihood)
        assert np.exp(-mean) == pytest.approx(theirs["perplexity,none"], rel=1e-3)
    else:
        assert 0 < np.mean(found.correct) < 1
