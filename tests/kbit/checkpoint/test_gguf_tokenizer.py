"""Tokenizers out of GGUF metadata: the same tokens as the libraries that defined them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kbit.checkpoint.gguf import import_gguf
from kbit.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from kbit.errors import KbitError
from tests.kbit.checkpoint.gguf_build import tiny_model, write_gguf

TEXTS = [
    "The quick brown fox can't jump over 12345 lazy dogs; I'LL pay $3.14 (or 2,718)!",
    "def f(x):\n    return x ** 2  # squares\n\n\n\tif x==1:\r\n\t\tpass\n",
    "  leading and trailing   spaces   ",
    "naïve café cafe\u0301 — “quotes” … ½ ² Ⅷ ٣٤٥",
    "Привет, мир! 你好。世界。こんにちは 안녕하세요 שלום नमस्ते",
    "👩‍👩‍👧 🇩🇪 emoji \u200b zero\u00a0width \u3000 wide",
    "<b>html</b> a_b CamelCaseWord snake_case http://a.b/c?d=e&f=g",
    "",
    " ",
    "\n",
]
CORPUS = TEXTS * 3 + ["the cat sat on the mat and the dog sat on the cat " * 5, "hello world " * 9]

# As the models' own tokenizer.json files have them.
PUBLISHED = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def vocabulary(kind: Any, pre: str | None, tokens: list[str], types: list[int], **more: Any) -> Any:
    """A function that writes these tokenizer keys (and fills the embedding up)."""

    def write(writer: gguf.GGUFWriter, size: int) -> None:
        fill = [f"<fill{index}>" for index in range(size - len(tokens))]
        if isinstance(kind, str):
            writer.add_tokenizer_model(kind)
        else:
            writer.add_array("tokenizer.ggml.model", kind)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens + fill)
        writer.add_token_types(types + [5] * len(fill))
        for key, value in more.items():
            if key == "scores":
                writer.add_token_scores(list(value) + [-1e4] * len(fill))
            elif key == "chat_template":
                writer.add_chat_template(value)
            elif isinstance(value, list):
                writer.add_array(f"tokenizer.ggml.{key}", value)
            elif isinstance(value, bool):
                writer.add_bool(f"tokenizer.ggml.{key}", value)
            else:
                writer.add_uint32(f"tokenizer.ggml.{key}", value)

    return write


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def rebuilt(model: Any, folder: Path, write: Any) -> tuple[Tokenizer, dict[str, Any], Path]:
    write_gguf(folder / "m.gguf", model, vocabulary=write)
    out = import_gguf(folder / "m.gguf", folder / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    return Tokenizer.from_file(str(out / "tokenizer.json")), config, out


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_tokens(pre: str, model: Any, tmp_path: Path) -> None:
    """A tokenizer trained with the published pre-tokenizer, through GGUF and back."""
    original = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
    original.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[pre])
    original.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>", "<|user|>"],
    )
    original.train_from_iterator(CORPUS, trainer)
    parts = json.loads(original.to_str())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    assert len(parts["merges"]) > 40
    write = vocabulary(
        "gpt2",
        pre,
        tokens,
        [3, 3] + [1] * (len(tokens) - 2),
        merges=[" ".join(merge) for merge in parts["merges"]],
        add_bos_token=False,
        eos_token_id=0,
    )
    found, _, _ = rebuilt(model, tmp_path, write)
    for text in [*TEXTS, "<|user|>hi<|end|>\n"]:
        encoded = found.encode(text)
        assert encoded.ids == original.encode(text).ids, text
        if pre != "qwen2":  # NFC changes the text
            assert found.decode(encoded.ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXTS[0], *CORPUS[-2:]] * 3),  # all else falls back to bytes
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        user_defined_symbols=["▁▁", "\n\n", "<b>"],
        pad_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="module")
def wide_model() -> Any:
    import torch

    model = tiny_model("gemma3")
    model.resize_token_embeddings(448)
    assert isinstance(model, torch.nn.Module)
    return model


def pieces(path: Path, prefix: bool) -> tuple[Any, Any]:
    """The SentencePiece processor, and what llama.cpp's converter writes of it."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    spec = proto.ModelProto()
    spec.ParseFromString(path.read_bytes())
    spec.normalizer_spec.add_dummy_prefix = prefix
    processor = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
    types = [piece.type for piece in spec.pieces]  # the numbers are GGUF's
    tokens = [piece.piece for piece in spec.pieces]
    tokens = [
        token.replace("▁", " ") if kind == 4 else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    write = vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=[piece.score for piece in spec.pieces],
        bos_token_id=processor.bos_id(),
        eos_token_id=processor.eos_id(),
        unknown_token_id=processor.unk_id(),
        padding_token_id=processor.pad_id(),
        add_space_prefix=prefix,
    )
    return processor, write


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens(
    prefix: bool, wide_model: Any, sentencepiece_file: Path, tmp_path: Path
) -> None:
    processor, write = pieces(sentencepiece_file, prefix)
    found, config, _ = rebuilt(wide_model, tmp_path, write)
    assert config["add_bos_token"] is True  # the kind's default
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False).ids
        # Symbols are matched in the raw text: behind one a prefix is added again, and the first
        # prefix never becomes a part of one. llama.cpp does the same, SentencePiece does not.
        symbols = any(symbol in f" {text}" for symbol in ("  ", "\n\n", "<b>"))
        if not (prefix and symbols):
            assert ids == processor.encode(text), text
            assert found.decode(ids) == text
    assert found.encode("hi").ids[0] == processor.bos_id()
    byte_tokens = found.encode("\u4e16", add_special_tokens=False).tokens
    assert byte_tokens[-3:] == ["<0xE4>", "<0xB8>", "<0x96>"]


def byte_tokens() -> list[str]:
    return ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def byte_level(tokens: list[str] | None = None, pre: str = "gpt-2", **more: Any) -> Any:
    tokens = tokens or [*byte_tokens(), "th"]
    options: dict[str, Any] = {"merges": ["t h"], "bos_token_id": 1, "eos_token_id": 2}
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    return vocabulary("gpt2", pre, tokens, types, **(options | more))


def test_bos_and_eos_flags(model: Any, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], list[int], list[int]]] = [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ]
    for number, (options, before, after) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        found, config, _ = rebuilt(model, tmp_path / str(number), byte_level(**options))
        plain = found.encode("a th", add_special_tokens=False).ids
        assert found.encode("a th").ids == before + plain + after, options
        assert (config["add_bos_token"], config["add_eos_token"]) == (bool(before), bool(after))


def test_chat_template_and_every_stop_token(model: Any, tmp_path: Path) -> None:
    """The answer ends with eos, eot, and with the turn marker that the template writes."""
    tokens = ["<pad>", "<bos>", "<eos>", *byte_tokens()[3:], "th", "<|im_end|>", "<end_of_turn>"]
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    write = byte_level(tokens, chat_template=template, eot_token_id=tokens.index("th"))
    _, config, out = rebuilt(model, tmp_path, write)
    assert config["chat_template"] == template
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, tokens.index("th"), tokens.index("<|im_end|>")]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"merges": ["t q"]}, "the merge 't q' is not made of tokens"),
        ({"merges": ["th"]}, "the merge 'th' is not made of tokens"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000 of 320 tokens"),
        ({"add_bos_token": 1}, "add_bos_token is a int, no bool"),
    ],
)
def test_damaged_vocabularies(
    change: dict[str, Any], sentence: str, model: Any, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", model, vocabulary=byte_level(**change))
    with pytest.raises(KbitError, match=sentence):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_vocabularies_that_do_not_fit(model: Any, tmp_path: Path) -> None:
    def fails(write: Any, sentence: str) -> None:
        write_gguf(tmp_path / "m.gguf", model, vocabulary=write)
        with pytest.raises(KbitError, match=sentence):
            import_gguf(tmp_path / "m.gguf", tmp_path / "out")

    fails(vocabulary("gpt2", "gpt-2", ["a", "a"], [1, 1], merges=["a a"]), "'a' stands there twice")
    many = [f"t{index}" for index in range(321)]
    fails(vocabulary("gpt2", "gpt-2", many, [1] * 321, merges=["t h"]), "321 tokens for an embed")
    fails(vocabulary("bert", "gpt-2", ["a"], [1], merges=["t h"]), "kind 'bert' is not supported")
    fails(vocabulary([1, 2], "gpt-2", ["a"], [1], merges=["t h"]), "tokenizer.ggml.model is a ndar")
    fails(vocabulary("llama", None, ["a"], [2], scores=[float("nan")]), "NaN or infinity")
    fails(vocabulary("llama", None, ["a"], [1], scores=[0.0]), "neither an unknown token nor")
