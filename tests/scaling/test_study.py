"""Study files and texts: what is understood, and what is refused in one sentence."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.errors import KbitError
from kbit_scaling.study import read_study
from kbit_scaling.texts import cut

from .conftest import Tiny

STUDY = """
name = "tiny"
[paths]
family = "{family}"
[[models]]
family = "tiny"
path = "{{family}}/s*/tokens-*"
[[texts]]
name = "words"
path = "{{family}}/text.txt"
cut_bytes = 3000
pieces = 5
{more}
"""
GRID = '[[grid]]\ndtypes = ["int", "nf"]\nbits = [3, 8]\n'


def write(folder: Path, tiny: Tiny, more: str = GRID) -> Path:
    path = folder / "study.toml"
    path.write_text(STUDY.format(family=tiny.folder, more=more))
    return path


def test_jobs_are_ordered_by_grid_and_model_with_the_unquantized_first(
    tmp_path: Path, tiny: Tiny
) -> None:
    more = GRID + '[[grid]]\ndtypes = ["af4", "bnb"]\nbits = [3, 4]\nmodels = ["*-s1-*"]\n'
    study = read_study(write(tmp_path, tiny, more))
    names = [(job.model.name, job.treatment.spec) for job in study.jobs]
    assert names == [
        *(("tiny-s0-0", spec) for spec in ("none", "int3-b64", "int8-b64", "nf3-b64", "nf8-b64")),
        *(("tiny-s1-0", spec) for spec in ("none", "int3-b64", "int8-b64", "nf3-b64", "nf8-b64")),
        ("tiny-s1-0", "af4-b64"),
        ("tiny-s1-0", "bnb4-b64"),
    ]
    assert study.left_out == 2  # af4 and bnb have no 3-bit form


def test_paths_can_be_given_from_outside(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(family="nowhere", more=GRID))
    with pytest.raises(KbitError, match=r"none of its models is there .*--path"):
        read_study(path)
    assert len(read_study(path, {"family": str(tiny.folder)}).models) == 2
    with pytest.raises(KbitError, match=r"no name 'famly' for --path; known: family"):
        read_study(path, {"famly": str(tiny.folder)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (GRID + "colour = 3\n", "[[grid]] 1: unknown key 'colour'; the keys here are families"),
        ('[[grid]]\ndtypes = ["nf9"]\n', "[[grid]] 1: unknown data type 'nf9'; known: int"),
        ('[[grid]]\nbits = ["four"]\n', "[[grid]] 1: bits.0: Input"),
        (GRID + "[[grid]]\nbits = []\n", "[[grid]] 2: bits is empty"),
        ("[[grid]]\nbits = [9]\n", "[[grid]] 1: no data type of it has such a width"),
        (GRID + 'method = "magic"\n', "[[grid]] 1: unknown method 'magic'"),
        (GRID + 'embedding = ["none"]\n', "[[grid]] 1: 'none' is no spec"),
        (GRID + 'models = ["opt*"]\n', "asks for no model of the study; its models are tiny-s0"),
        ('[[grid]]\nfamilies = ["opt"]\n', "family 'opt', which no model has"),
        ('[[grid]]\nmetrics = ["wiki"]\n', "metric 'wiki'; known: words"),
        ("", "lacks [[grid]]"),
        (GRID + '[[texts]]\nname = "words"\npath = "x"\n', "share a name"),
        (GRID + '[[texts]]\nname = "b"\npath = "{else}/x"\n', "lacks; known: family"),
        ("[[grid", "no valid TOML"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, tiny: Tiny, more: str, message: str
) -> None:
    with pytest.raises(KbitError, match=re.escape(message)):
        read_study(write(tmp_path, tiny, more))


def test_a_missing_study_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(KbitError, match="cannot be read"):
        read_study(tmp_path / "none.toml")


@given(
    text=st.text(min_size=70, max_size=900).filter(lambda t: t.strip()),
    total=st.integers(64, 900),
    pieces=st.integers(1, 9),
)
def test_documents_are_whole_characters_from_all_over_the_text(
    text: str, total: int, pieces: int
) -> None:
    data = text.encode()
    documents = cut(data, total, pieces)
    assert len(documents) <= pieces
    for document in documents:
        assert document in text
        # a border moves by at most a tenth of a piece, or to the end of a character
        size = min(total, len(data)) // max(1, min(pieces, min(total, len(data)) // 64 or 1))
        assert len(document.encode()) <= size + size // 10 + 5


def test_the_whole_text_is_cut_without_loss() -> None:
    data = "".join(f"line {i}\n" for i in range(500)).encode()
    assert "".join(cut(data, len(data), 7)).encode() == data
