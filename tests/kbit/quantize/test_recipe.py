"""Recipes: first match decides, and nothing that is not understood passes."""

from pathlib import Path

import pytest

from kbit.quantize.recipe import parse_recipe, read_recipe
from kbit_kernels import QuantSpec
from kbit_kernels.errors import KbitError

ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.self_attn.v_proj.weight": "linear",
    "model.layers.0.mlp.down_proj.weight": "linear",
    "model.layers.11.mlp.down_proj.weight": "linear",
    "lm_head.weight": "head",
}
DEFAULT = QuantSpec.parse("nf4-b64")


def _assign(text: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    recipe = read_recipe(path)
    return [str(spec) for spec in recipe.assign(ROLES, recipe.default or DEFAULT).values()]


def test_no_rule_leaves_everything_to_the_default(tmp_path: Path) -> None:
    assert _assign("default = 'int3-b32'", tmp_path) == ["int3-b32"] * 5


def test_first_match_decides(tmp_path: Path) -> None:
    text = """
    [[rules]]
    tensors = ["*.layers.0.*down*", "*.v_proj.weight"]
    spec = "int8-row"
    [[rules]]
    tensors = "*.down_proj.weight"
    spec = "keep"
    [[rules]]
    roles = ["embedding", "head"]
    spec = "fp5e2-b128"
    """
    expected = ["fp5e2-b128", "int8-row", "int8-row", "None", "fp5e2-b128"]
    assert _assign(text, tmp_path) == expected


def test_names_and_roles_must_both_hold(tmp_path: Path) -> None:
    text = "[[rules]]\ntensors = 'model.*'\nroles = 'embedding'\nspec = 'int8-b64'"
    assert _assign(text, tmp_path) == ["int8-b64"] + ["nf4-b64"] * 4


BAD = {
    "nothing matches": (
        "[[rules]]\ntensors='*.q_prj.*'\nspec='int4-b64'",
        "rule 1 matches nothing",
    ),
    "case differs": ("[[rules]]\ntensors='LM_HEAD.*'\nspec='int4-b64'", "matches nothing"),
    "one of two matches nothing": (
        "[[rules]]\ntensors='*'\nspec='keep'\n[[rules]]\ntensors='x'\nspec='keep'",
        "rule 2 matches nothing",
    ),
    "no TOML": ("[[rules", "no valid TOML"),
    "empty": ("", "says nothing"),
    "unknown key": ("defualt = 'nf4-b64'", "unknown key 'defualt'"),
    "unknown key in a rule": ("[[rules]]\ntensor='*'\nspec='keep'", "rule 1: unknown key 'tensor'"),
    "no pattern": ("[[rules]]\nspec='keep'", "neither tensors nor roles"),
    "empty pattern": ("[[rules]]\ntensors=''\nspec='keep'", "tensors is ''"),
    "pattern a number": ("[[rules]]\ntensors=[3]\nspec='keep'", r"tensors is \[3\]"),
    "no spec": ("[[rules]]\ntensors='*'", "has no spec"),
    "bad spec": ("[[rules]]\ntensors='*'\nspec='int9-b64'", "rule 1: bits is 9"),
    "spec a number": ("[[rules]]\ntensors='*'\nspec=4", "spec is 4"),
    "unknown role": ("[[rules]]\nroles='norm'\nspec='keep'", "unknown role 'norm'"),
    "rules no table": ("rules = 3", "rules are written"),
    "default keep": ("default = 'keep'", "default is 'keep'"),
    "search no boolean": ("default='nf4-b64'\nsearch='yes'", "search is 'yes'"),
    "method no name": ("default='nf4-b64'\nmethod=1", "method is 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_understood_is_refused(tmp_path: Path, case: str) -> None:
    text, reason = BAD[case]
    with pytest.raises(KbitError, match=reason) as caught:
        _assign(text, tmp_path)
    assert "recipe.toml" in str(caught.value)
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(KbitError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(KbitError, match="no valid TOML"):
        read_recipe(tmp_path / "r.toml")


def test_where_stands_in_the_error() -> None:
    with pytest.raises(KbitError, match=r"^mine: unknown key 'x'"):
        parse_recipe({"x": 1}, "mine")
