"""Recipes: which tensor gets which spec.

method = "rtn"                # optional, as are search and default; options of the command win
search = true
default = "nf4-b64"           # every linear layer, embedding and head that no rule takes

[[rules]]                     # the first rule that matches a tensor decides
tensors = "*.v_proj.weight"   # one pattern or a list: * ? [abc], over the whole name
spec = "int6-b32"

[[rules]]
roles = ["embedding", "head"]     # in place of tensors, or both: then both must hold
spec = "keep"                     # stays as it is in the source
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec

KEEP = "keep"
ROLES = ("linear", "embedding", "head")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches one of `tensors` and whose role is one of `roles` (empty: any)."""

    tensors: tuple[str, ...]
    roles: tuple[str, ...]
    spec: QuantSpec | None  # None: keep
    where: str = "rule"

    def matches(self, name: str, role: str) -> bool:
        return (not self.roles or role in self.roles) and (
            not self.tensors or any(fnmatchcase(name, pattern) for pattern in self.tensors)
        )


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; what no rule takes gets `default`. None: not said in the recipe."""

    rules: tuple[Rule, ...] = ()
    default: QuantSpec | None = None
    method: str | None = None
    search: bool | None = None

    def assign(self, roles: Mapping[str, str], default: QuantSpec) -> dict[str, QuantSpec | None]:
        """Name -> spec, or None for keep, over `roles` (name -> one of ROLES).

        Raises KbitError for a rule that matches nothing: it is a typing error, and silently
        quantizing by the default instead would hide it.
        """
        for rule in self.rules:
            if not any(rule.matches(name, role) for name, role in roles.items()):
                asked = " and ".join(
                    f"{key} = {list(value)}"
                    for key, value in (("tensors", rule.tensors), ("roles", rule.roles))
                    if value
                )
                example = next(iter(roles), "none")
                raise KbitError(
                    f"{rule.where} matches nothing ({asked}); the model has {len(roles)} tensors "
                    f"that can be quantized, such as {example}"
                )
        result: dict[str, QuantSpec | None] = {}
        for name, role in roles.items():
            first = next((rule for rule in self.rules if rule.matches(name, role)), None)
            result[name] = default if first is None else first.spec
        return result


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe; KbitError names the file and the rule for anything not understood."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KbitError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KbitError(f"recipe {path}: is no valid TOML ({error})") from None
    return parse_recipe(table, f"recipe {path}")


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from its parsed TOML; `where` stands in errors."""
    _only(table, ("method", "search", "default", "rules"), where)
    method, search, default = table.get("method"), table.get("search"), table.get("default")
    if method is not None and not isinstance(method, str):
        raise KbitError(f"{where}: method is {method!r}, no name")
    if search is not None and not isinstance(search, bool):
        raise KbitError(f"{where}: search is {search!r}; write true or false")
    rules = table.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise KbitError(f"{where}: rules are written as [[rules]] tables")
    parsed = tuple(_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(rules))
    if not parsed and default is None:
        raise KbitError(f"{where}: has neither rules nor a default, so it says nothing")
    default_spec = None if default is None else _spec(default, f"{where}: default")
    if default is not None and default_spec is None:
        raise KbitError(f"{where}: default is 'keep'; keep tensors by a last rule instead")
    return Recipe(parsed, default_spec, method, search)


def _rule(table: Mapping[str, Any], where: str) -> Rule:
    _only(table, ("tensors", "roles", "spec"), where)
    tensors, roles = _strings(table, "tensors", where), _strings(table, "roles", where)
    if not tensors and not roles:
        raise KbitError(f"{where}: says neither tensors nor roles")
    for role in roles:
        if role not in ROLES:
            raise KbitError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    if "spec" not in table:
        raise KbitError(f"{where}: has no spec; write a spec such as 'nf4-b64', or 'keep'")
    return Rule(tensors, roles, _spec(table["spec"], where), where)


def _only(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise KbitError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise KbitError(f"{where}: {key} is {value!r}, no string or list of strings")
    return tuple(values)


def _spec(value: object, where: str) -> QuantSpec | None:
    if not isinstance(value, str):
        raise KbitError(f"{where}: spec is {value!r}, no string such as 'nf4-b64' or 'keep'")
    if value == KEEP:
        return None
    try:
        return QuantSpec.parse(value)
    except KbitError as error:
        raise KbitError(f"{where}: {error}") from None
