"""Text to ids and back: BOS as the checkpoint says, and pieces that join to the whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from kbit.engine.tokenizer import Detokenizer, Tokenizer
from kbit.errors import KbitError
from tests.kbit.speaker import TEXT, byte_level, sentencepiece, write_tokenizer

KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, KINDS[request.param]())
    return Tokenizer.load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "</s>"}},
    ],
)
@pytest.mark.parametrize("template", ["<s>:0 $A:0", "<s>:0 $A:0 </s>:0", "$A:0"])
def test_special_tokens_as_transformers_adds_them(
    tmp_path: Path, kind: str, config: dict[str, object], template: str
) -> None:
    backend = KINDS[kind]()
    special = [(s, backend.token_to_id(s)) for s in ("<s>", "</s>") if s in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    write_tokenizer(tmp_path, backend, **config)
    mine, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the clocks", "", "</s> inside <s>", TEXT):
        assert mine.encode(text).tolist() == theirs(text)["input_ids"]
        assert (
            mine.encode(text, special=False).tolist()
            == theirs(text, add_special_tokens=False)["input_ids"]
        )
    assert mine.adds_bos == (theirs("x")["input_ids"][0] == theirs.bos_token_id)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [5]),
        ({"add_bos_token": True}, [0, 5]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 5, 1]),
        ({"add_bos_token": True, "bos_token": None}, [5]),
    ],
)
def test_flags_decide_where_there_is_no_post_processor(
    tmp_path: Path, config: dict[str, object], expected: list[int]
) -> None:
    write_tokenizer(tmp_path, byte_level(), **config)
    assert Tokenizer.load(tmp_path).encode("!").tolist() == expected


def in_pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(text=st.text(max_size=40), split=st.floats(0, 1))
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str, split: float) -> None:
    ids = tokenizer.encode(text, special=False).tolist()
    cut = int(split * len(ids))
    prompt = tokenizer.decode(ids[:cut])
    if "\ufffd" in prompt.removesuffix("\ufffd") or prompt.endswith("\ufffd"):
        return  # a prompt that ends inside a character has no text of its own
    pieces = in_pieces(tokenizer, ids[cut:], ids[:cut])
    assert prompt + "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 400), max_size=60))
@settings(max_examples=200)
def test_any_ids_are_decoded_without_waiting_for_ever(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = in_pieces(tokenizer, ids, [])
    "".join(pieces).encode("utf-8")
    held = 0
    for token, piece in zip(ids, pieces, strict=False):
        spoken = tokenizer.decode([token]) != ""
        held = 0 if piece else held + spoken
        assert held < 5


def test_a_character_of_four_bytes_comes_whole(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("A").tolist()
    ids = tokenizer.encode("A🦙").tolist()[len(prompt) :]
    assert len(ids) >= 3
    assert [p for p in in_pieces(tokenizer, ids, prompt) if p] == ["🦙"]


def test_a_leading_space_survives_the_prompt(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("It was").tolist()
    whole = tokenizer.encode("It was the day").tolist()
    assert whole[: len(prompt)] == prompt
    assert "".join(in_pieces(tokenizer, whole[len(prompt) :], prompt)) == " the day"


@given(text=st.text(max_size=40))
def test_byte_ends_cover_the_text(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode_with_bytes(text)
    assert encoding.ids.tolist() == tokenizer.encode(text, special=False).tolist()
    assert np.all(np.diff(encoding.byte_ends, prepend=0) >= 0)
    if len(encoding.ids):
        assert encoding.byte_ends[-1] == len(text.encode())


def test_byte_ends_of_plain_tokens(tokenizer: Tokenizer) -> None:
    text = "the day"
    encoding = tokenizer.encode_with_bytes(text)
    for token, end in zip(encoding.ids, encoding.byte_ends, strict=True):
        spelled = tokenizer.decode([*encoding.ids[: list(encoding.ids).index(token) + 1]])
        assert text.startswith(spelled)
        assert end == len(spelled)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(KbitError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(KbitError, match="no tokenizer that can be read"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(KbitError, match="JSON object"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, byte_level())
    with pytest.raises(KbitError, match="no UTF-8"):
        Tokenizer.load(tmp_path).encode("a\ud800")
