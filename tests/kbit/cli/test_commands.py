"""generate, eval and doctor as a person calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import kbit
from tests.kbit.cli.conftest import Ran
from tests.kbit.speaker import TEXT

Run = Callable[..., Ran]


def test_generate_prints_what_the_model_says(run: Run, speaker: Path) -> None:
    model = kbit.load(speaker)
    expected = model.generate(["It was", "the"], max_tokens=12)
    told = run("generate", speaker, "-p", "It was", "--max-tokens", 12)
    assert told.status == 0
    assert told.out == expected[0].text + "\n"
    assert told.err == ""
    both = run("generate", speaker, "It was", "-p", "the", "--max-tokens", 12)
    assert both.out == (
        f"== prompt 1, sample 1\n{expected[0].text}\n== prompt 2, sample 1\n{expected[1].text}\n"
    )


def test_prompts_from_files_and_standard_input(run: Run, speaker: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("Ça va, œuvre?\n".encode())
    options = ("--max-tokens", 6, "--json")
    file = json.loads(run("generate", speaker, "-f", tmp_path / "prompt.txt", *options).out)
    piped = json.loads(run("generate", speaker, *options, stdin="Ça va, œuvre?\n".encode()).out)
    assert file["samples"][0]["prompt"] == "Ça va, œuvre?"
    assert file["samples"][0]["token_ids"] == piped["samples"][0]["token_ids"]


def test_generate_json(run: Run, speaker: Path) -> None:
    told = run(
        *("generate", speaker, "-p", "It was", "-p", "the", "-n", 2, "--temperature", 0.9),
        *("--seed", 4, "--max-tokens", 8, "--logprobs", 3, "--json"),
    )
    assert told.out.count("\n") == 1
    found = json.loads(told.out)
    assert [(s["prompt"], s["sample"]) for s in found["samples"]] == [
        ("It was", 0),
        ("It was", 1),
        ("the", 0),
        ("the", 1),
    ]
    for sample in found["samples"]:
        assert sample["tokens"] == len(sample["token_ids"]) == len(sample["logprobs"]) <= 8
        assert sample["finish_reason"] in ("stop", "length")
        assert sample["prompt_tokens"] > 0
        assert sample["seed"] == 4
        assert len(sample["logprobs"][0]["top"]) == 3
    for name in (
        "seconds_to_first_token",
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "peak_memory_bytes",
    ):
        assert found[name] > 0
    again = run(
        *("generate", speaker, "-p", "the", "-n", 2, "--temperature", 0.9),
        *("--seed", 4, "--max-tokens", 8, "--json"),
    )
    texts = [s["text"] for s in json.loads(again.out)["samples"]]
    assert texts == [s["text"] for s in found["samples"][2:]]


def test_generate_options_reach_the_sampler(run: Run, speaker: Path) -> None:
    def ids(*options: object) -> list[int]:
        told = run("generate", speaker, "-p", "It was", "--max-tokens", 10, "--json", *options)
        return json.loads(told.out)["samples"][0]["token_ids"]

    plain = ids()
    assert plain[0] not in ids("--logit-bias", f"{plain[0]}=-100", "--temperature", 0)
    assert ids("--logit-bias", "77=1000") == [77] * 10
    assert len(set(ids("--logit-bias", "77=40", "--frequency-penalty", 30))) > 1
    assert len(set(ids("--logit-bias", "77=40", "--presence-penalty", 90))) > 1
    assert len(set(ids("--logit-bias", "77=40", "--repetition-penalty", 50))) > 1
    hot = ("--temperature", 5, "--seed", 1)
    free = ids(*hot)
    assert free != plain
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert ids(*hot, *narrow) == plain
    assert len(ids("--context", 6)) <= 6


def test_stop_understands_line_breaks(run: Run, speaker: Path) -> None:
    newline = kbit.load(speaker).tokenizer.encode("\n", special=False)
    assert len(newline) == 1
    told = run(
        *("generate", speaker, "-p", "It was", "--logit-bias", f"{newline[0]}=1000"),
        *("--stop", r"\n\n", "--max-tokens", 9, "--json"),
    )
    sample = json.loads(told.out)["samples"][0]
    assert (sample["text"], sample["finish_reason"], sample["tokens"]) == ("", "stop", 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-p", "x", "--logit-bias", "many=3"), "--logit-bias 'many=3'"),
        (("-p", "x", "--temperature", -1), "temperature is -1"),
        (("-p", "x", "--top-p", 2), "top_p is 2"),
        (("-p", "x", "--logprobs", 1), "--logprobs needs --json"),
        (("-p", "x", "--backend", "abacus"), "'abacus' is not known"),
        (("-p", "x", "--context", 1000), "context is 1000"),
        (("-p", "the clocks " * 90), "tokens, but the context holds 96"),
        (("-f", "/no/such/file"), "/no/such/file: cannot be read"),
    ],
)
def test_generate_refuses(
    run: Run, speaker: Path, arguments: tuple[object, ...], told: str
) -> None:
    ran = run("generate", speaker, *arguments)
    assert ran.status == 2
    assert told in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_text_that_is_no_utf8(run: Run, speaker: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for command in (("generate", speaker, "-f"), ("eval", speaker, "--text")):
        ran = run(*command, tmp_path / "latin.txt")
        assert ran.status == 2
        assert "no UTF-8 text (byte 3)" in ran.err
    ran = run("generate", speaker, "-p", "a\udce9")
    assert ran.status == 2
    assert "no UTF-8" in ran.err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_eval_json(run: Run, speaker: Path, text: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q3"
    kbit.quantize(speaker, quantized, bits=3)
    told = run("eval", quantized, "--text", text, "--against", speaker, "--json", "--context", 32)
    assert told.out.count("\n") == 1
    found = json.loads(told.out)
    assert found["bytes"] == len(TEXT.encode())
    for name in (
        *("perplexity", "bits_per_byte", "kl_mean", "kl_mean_stderr", "kl_median", "kl_p90"),
        *("kl_p99", "kl_p999", "kl_max", "tokens", "top1_agreement", "top1_agreement_stderr"),
        *("reference_perplexity", "perplexity_stderr", "bits_per_byte_stderr"),
    ):
        assert found[name] > 0, name
    assert "log_likelihood_change" in found
    assert found["protocol"] | {"about": ""} == {
        "name": "kbit",
        "about": "",
        "text": "verbatim",
        "context": 32,
        "stride": 32,
        "shared": True,
        "bos": "window",
        "score": "new",
        "tail": "keep",
        "bos_added": True,
    }
    direct = kbit.load(quantized).evaluate(TEXT, context=32)
    assert found["perplexity"] == pytest.approx(direct.estimates["perplexity"].value, rel=1e-6)


def test_eval_table_and_protocols(run: Run, speaker: Path, text: Path) -> None:
    told = run("eval", speaker, "--text", text, "--protocol", "hf-strided", "--context", 32)
    assert told.status == 0
    assert "protocol hf-strided: context 32, stride 16, BOS added" in told.out
    assert "perplexity per token" in told.out
    assert "KL" not in told.out
    told = run("eval", speaker, "--text", text, "--no-bos", "--max-windows", 2)
    assert "no BOS" in told.out
    assert "2 windows" in told.out
    piped = run("eval", speaker, "--text", "-", "--json", stdin=TEXT.encode())
    assert json.loads(piped.out)["bytes"] == len(TEXT.encode())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--protocol", "abc"), "'abc' is not known"),
        (("--protocol", "gptq"), "2048 tokens: this model takes 2 to 96"),
        (("--stride", 600), "stride of 600"),
        (("--against", "/no/such/model"), "/no/such/model"),
        (("--max-windows", 0), "max_windows is 0"),
    ],
)
def test_eval_refuses(
    run: Run, speaker: Path, text: Path, arguments: tuple[object, ...], told: str
) -> None:
    ran = run("eval", speaker, "--text", text, *arguments)
    assert ran.status == 2
    assert told in ran.err
    assert ran.out == ""


def test_doctor(run: Run, speaker: Path) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert found["kbit"] == kbit.__version__
    assert found["packages"]["numpy"]
    assert {k["name"] for k in found["kernels"]} >= {"cpu", "reference", "triton"}
    cpu = found["executors"]["cpu"]
    assert [e["name"] for e in cpu] == ["native", "torch"]
    assert sum(e["used"] for e in cpu) == 1
    assert all(e["reason"] for e in cpu + found["executors"]["cuda"])
    told = run("doctor", speaker)
    assert f"executors of {speaker} on cpu" in told.out
    assert run("doctor", "/no/such/model").status == 2
