"""A study file (TOML): models x treatments x metrics, read into cells.

    name = "books"
    records = "records.jsonl"
    prepare = ["kbit family train ..."]   # commands that make the models, for the report

    [paths]                       # names for folders; --path NAME=DIR of `kbit sweep` overrides
    shared = "../../../shared"

    [[models]]
    family = "books"
    path = "{shared}/models/books-s*"   # a directory, a pattern, or a Hub id
    training_tokens = 4194304     # if the checkpoint has no training.json that says so

    [[texts]]
    name = "books"
    path = "{shared}/data/books/valid.txt"
    cut_bytes = 200000
    pieces = 40

    [[tasks]]
    name = "piqa"                 # see kbit_scaling.tasks
    path = "{shared}/data/tasks/piqa.jsonl"
    limit = 500

    [[grid]]                      # every combination; several grids add up
    families = ["books"]          # default: all
    models = ["books-s[0-3]"]     # patterns over model names, default: all
    dtypes = ["int", "nf"]
    bits = [2, 3, 4, 5, 6, 7, 8]
    blocks = [64]                 # 0 or "row": the whole row
    search = [false, true]
    embedding = ["same"]          # or "keep", or a spec
    options = [""]                # spec suffixes such as "-center", "-out0.02", "-dq"
    metrics = ["books"]           # default: all texts and tasks

Widths for which a data type is not defined are left out and counted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kbit.errors import KbitError
from kbit.quantize.methods import get_method
from kbit.quantize.recipe import KEEP
from kbit_kernels.formats import DATA_TYPES
from kbit_kernels.spec import QuantSpec

from .texts import Text
from .weights import NONE, Treatment


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelTable(_Table):
    """[[models]]: one model or a family of them."""

    path: str
    family: str
    training_tokens: float | None = None


class TextTable(_Table):
    """[[texts]]."""

    name: str
    path: str
    cut_bytes: int = Field(0, ge=0)
    pieces: int = Field(32, ge=1)
    protocol: str = "kbit"
    context: int | None = None


class TaskTable(_Table):
    """[[tasks]]."""

    name: str
    path: str
    limit: int = Field(0, ge=0)
    label: str = ""


class GridTable(_Table):
    """[[grid]]."""

    families: list[str] = []
    models: list[str] = []
    dtypes: list[str] = ["int"]
    bits: list[int] = [2, 3, 4, 5, 6, 7, 8]
    blocks: list[int | str] = [64]
    method: str = "rtn"
    search: list[bool] = [False]
    embedding: list[str] = ["same"]
    options: list[str] = [""]
    metrics: list[str] = []

    def treatments(self) -> tuple[list[Treatment], int]:
        """All combinations that exist, and how many do not. KbitError for what no study has."""
        get_method(self.method)
        for embedding in self.embedding:
            if embedding not in ("same", KEEP):
                QuantSpec.parse(embedding)
        found, left_out = [], 0
        for dtype in self.dtypes:
            if dtype not in DATA_TYPES:
                raise KbitError(f"unknown data type {dtype!r}; known: {', '.join(DATA_TYPES)}")
            row = DATA_TYPES[dtype]
            for bits in self.bits:
                for block in self.blocks:
                    size = 0 if block == "row" else block
                    combinations = len(self.search) * len(self.embedding) * len(self.options)
                    if bits not in row.widths or (row.blocks and size not in row.blocks):
                        left_out += combinations
                        continue
                    name = dtype if dtype[-1].isdigit() else f"{dtype}{bits}"
                    place = f"b{size}" if size else "row"
                    for option in self.options:
                        spec = QuantSpec.parse(f"{name}-{place}{option}")
                        found += [
                            Treatment(str(spec), self.method, search, embedding)
                            for search in self.search
                            for embedding in self.embedding
                        ]
        if not found:
            axes = ("dtypes", "bits", "blocks", "search", "embedding", "options")
            empty = next((f"{axis} is empty" for axis in axes if not getattr(self, axis)), None)
            raise KbitError(empty or "no data type of it has such a width or block")
        return found, left_out


_TABLES: dict[str, type[_Table]] = {
    "models": ModelTable,
    "texts": TextTable,
    "tasks": TaskTable,
    "grid": GridTable,
}


class StudyTable(_Table):
    """The whole file."""

    name: str
    records: str = "records.jsonl"
    paths: dict[str, str] = {}
    models: list[ModelTable] = Field(min_length=1)
    texts: list[TextTable] = []
    tasks: list[TaskTable] = []
    grid: list[GridTable] = Field(min_length=1)
    title: str = ""
    question: str = ""
    prepare: list[str] = []


@dataclass(frozen=True)
class StudyModel:
    """A model of the study: where it lies, and what is known of it."""

    path: Path
    name: str
    family: str
    training_tokens: float | None = None


@dataclass(frozen=True)
class Task:
    """A zero-shot task: `name` says how it is asked, `path` holds its items."""

    name: str
    path: Path
    limit: int = 0
    label: str = ""

    @property
    def metric(self) -> str:
        """Its name in records."""
        return self.label or self.name


@dataclass(frozen=True)
class Job:
    """One model at one treatment with all metrics asked of it: what is quantized once."""

    model: StudyModel
    treatment: Treatment
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study file with its patterns resolved."""

    name: str
    folder: Path
    records: Path
    models: tuple[StudyModel, ...]
    texts: tuple[Text, ...]
    tasks: tuple[Task, ...]
    jobs: tuple[Job, ...]
    left_out: int  # combinations that no data type has
    missing: tuple[str, ...]  # models entries that matched nothing
    title: str = ""
    question: str = ""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*(t.name for t in self.texts), *(t.metric for t in self.tasks))


def read_study(path: Path, paths: dict[str, str] | None = None) -> Study:
    """The study at `path`; `paths` replaces entries of its [paths].

    Raises KbitError that names the file and the key for whatever is not understood, and if no
    model is found at all.
    """
    try:
        table = StudyTable.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise KbitError(f"{path}: the study file cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KbitError(f"{path}: is no valid TOML ({error})") from None
    except ValidationError as error:
        raise KbitError(f"{path}: {_first(error)}") from None
    folder = path.resolve().parent
    if unknown := set(paths or {}) - set(table.paths):
        known = ", ".join(table.paths) or "none"
        raise KbitError(f"{path}: [paths] has no name {min(unknown)!r} for --path; known: {known}")
    named = {**table.paths, **(paths or {})}
    overridden = set(paths or {})

    def place(text: str) -> Path:
        for name, value in named.items():
            base = Path.cwd() if name in overridden else folder
            text = text.replace("{" + name + "}", str((base / value).resolve()))
        if "{" in text:
            known = ", ".join(named) or "none"
            raise KbitError(f"{path}: {text!r} uses a name that [paths] lacks; known: {known}")
        return folder / text

    try:
        models, missing = _models(table, place)
    except KbitError as error:
        raise KbitError(f"{path}: {error}") from None
    if not models:
        raise KbitError(
            f"{path}: none of its models is there ({'; '.join(missing)}); give their folder with "
            "--path NAME=DIR"
        )
    texts = tuple(
        Text(t.name, place(t.path), t.cut_bytes, t.pieces, t.protocol, t.context)
        for t in table.texts
    )
    tasks = tuple(Task(t.name, place(t.path), t.limit, t.label) for t in table.tasks)
    study = Study(
        table.name,
        folder,
        folder / table.records,
        models,
        texts,
        tasks,
        (),
        0,
        tuple(missing),
        table.title,
        table.question,
    )
    names = study.metric_names
    if not names:
        raise KbitError(f"{path}: has neither [[texts]] nor [[tasks]], so nothing is measured")
    if len(set(names)) < len(names):
        raise KbitError(f"{path}: two texts or tasks share a name; give each its own")
    return _with_jobs(study, table, path)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in the words of the file: `[[texts]] 2: ...`."""
    first = error.errors()[0]
    loc, where = list(first["loc"]), ""
    table: type[_Table] = StudyTable
    if len(loc) > 1 and loc[0] in _TABLES and isinstance(loc[1], int):
        table, where = _TABLES[str(loc[0])], f"[[{loc[0]}]] {loc[1] + 1}: "
        loc = loc[2:]
    key = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {key!r}; the keys here are {', '.join(table.model_fields)}"
    if first["type"] == "missing":
        return f"{where}lacks {f'[[{key}]]' if key in _TABLES else repr(key)}"
    return f"{where}{key}: {first['msg']} (found {first['input']!r})"


def _models(
    table: StudyTable, place: Callable[[str], Path]
) -> tuple[tuple[StudyModel, ...], list[str]]:
    found: dict[str, StudyModel] = {}
    missing = []
    for entry in table.models:
        path = place(entry.path)
        base = path
        while any(c in str(base) for c in "*?["):
            base = base.parent
        hits = sorted(base.glob(str(path.relative_to(base)))) if base != path else [path]
        hits = [hit for hit in hits if (hit / "config.json").exists()]
        if not hits and _is_hub_id(entry.path):
            from kbit.hub import resolve

            hits = [Path(resolve(entry.path))]
        if not hits:
            missing.append(entry.path)
        for hit in hits:
            name = hit.name
            if name.startswith("tokens-"):  # of `kbit family train`
                name = f"{entry.family}-{hit.parent.name}-{name.removeprefix('tokens-')}"
            if name in found:
                raise KbitError(
                    f"two models are called {name!r}, {found[name].path} and {hit}; rename a folder"
                )
            found[name] = StudyModel(hit, name, entry.family, entry.training_tokens)
    return tuple(found.values()), missing


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "{"))


def _with_jobs(study: Study, table: StudyTable, path: Path) -> Study:
    families = {entry.family for entry in table.models}
    wanted: dict[tuple[str, Treatment], dict[str, None]] = {}
    first: dict[tuple[str, Treatment], int] = {}
    left_out = 0
    for number, grid in enumerate(table.grid):
        for family in grid.families:
            if family not in families:
                raise KbitError(f"{path}: the grid asks for family {family!r}, which no model has")
        for metric in grid.metrics:
            if metric not in study.metric_names:
                known = ", ".join(study.metric_names)
                raise KbitError(f"{path}: the grid asks for metric {metric!r}; known: {known}")
        try:
            treatments, absent = grid.treatments()
        except KbitError as error:
            raise KbitError(f"{path}: [[grid]] {number + 1}: {error}") from None
        models = [
            m
            for m in study.models
            if (not grid.families or m.family in grid.families)
            and (not grid.models or any(fnmatchcase(m.name, p) for p in grid.models))
        ]
        if not models and not study.missing:
            raise KbitError(
                f"{path}: [[grid]] {number + 1}: asks for no model of the study; its models are "
                f"{', '.join(m.name for m in study.models)}"
            )
        for model in models:
            left_out += absent
            metrics = grid.metrics or study.metric_names
            for treatment in (Treatment(NONE), *treatments):
                key = (model.name, treatment)
                wanted.setdefault(key, {}).update(dict.fromkeys(metrics))
                first.setdefault(key, number)
    by_name = {model.name: model for model in study.models}
    order = {model.name: i for i, model in enumerate(study.models)}
    # Grids in their order, and in each by model, the unquantized one first: neighbours share
    # tensors and reference logits, and a sweep that is cut short has the first grids whole.
    keys = sorted(wanted, key=lambda key: (first[key], order[key[0]], key[1].quantized))
    jobs = [
        Job(by_name[name], treatment, tuple(wanted[name, treatment])) for name, treatment in keys
    ]
    return replace(study, jobs=tuple(jobs), left_out=left_out)
