"""`kbit fit`, `plot`, `report` and `advise`: what is made of records; light at import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import Paths, Records, _paths

if TYPE_CHECKING:
    from .analysis import LawStudy
    from .records import Store
    from .summary import Summary

Source = Annotated[
    Path,
    typer.Argument(
        help="A study file, records (.jsonl, .jsonl.gz), or a published grid (.csv).",
        show_default=False,
        metavar="STUDY",
    ),
]
Laws = Annotated[
    str,
    typer.Option(help="Laws to fit, by name, with commas.", show_default="all", metavar="NAMES"),
]
Groups = Annotated[
    str,
    typer.Option(
        help="Cells to fit, such as nf-b64,int-b64.", show_default="the main ones", metavar="NAMES"
    ),
]
Replicates = Annotated[int, typer.Option(help="Draws of the bootstrap; 0 is none.", min=0)]
Paper = Annotated[Path | None, typer.Option("--out", help="Folder for the results.", metavar="DIR")]


def fit(
    source: Source,
    laws: Laws = "",
    groups: Groups = "",
    replicates: Replicates = 200,
    records: Records = None,
    out: Paper = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit the k-bit laws to a study, with intervals and a held-out test."""
    import json

    from .summary import law_json, law_table

    studies, document = _fitted(source, laws, groups, replicates, records)
    text = json.dumps(document or {"laws": [law_json(s) for s in studies]}, indent=1)
    if out is not None:
        _write(out / "fits.json", text + "\n")
    print(text if as_json else "\n\n".join(law_table(s) for s in studies))


def _fitted(
    source: Path, laws: str, groups: str, replicates: int, records: Path | None
) -> tuple[tuple[LawStudy, ...], dict[str, object] | None]:
    from .laws import get_laws

    if source.suffix == ".csv":
        from .published import published_laws, read_grid

        chosen = get_laws(_names(laws))
        grids = read_grid(source)
        return tuple(published_laws(g, chosen, replicates=replicates) for g in grids), None
    summary = _summary(source, records, laws, groups, replicates)
    return summary.laws, summary.as_json()


def _summary(
    source: Path, records: Path | None, laws: str = "", groups: str = "", replicates: int = 100
) -> Summary:
    import os

    from .summary import summarize

    return summarize(
        _store(source, records),
        laws=_names(laws),
        groups=_names(groups),
        replicates=replicates,
        processes=os.cpu_count() or 1,
    )


def _store(source: Path, records: Path | None) -> Store:
    """The records of a study file, or the records themselves."""
    import tomllib

    from kbit.errors import KbitError

    from .records import Store

    if source.suffix == ".toml" and records is None:
        try:
            name = tomllib.loads(source.read_text(encoding="utf-8")).get("records", "records.jsonl")
        except (OSError, ValueError) as error:
            raise KbitError(f"{source}: cannot be read as a study ({error})") from None
        records = source.parent / str(name)
        packed = records.with_name(records.name + ".gz")
        if not records.exists() and packed.exists():
            records = packed
    path = records or source
    if not path.exists():
        raise KbitError(f"{path}: there are no records yet; run `kbit sweep {source}` first")
    store = Store(path)
    if store.damaged:
        lines = ", ".join(map(str, store.damaged[:5]))
        print(f"{path}: line {lines} is damaged and left out", file=sys.stderr)
    if store.torn:
        print(f"{path}: ends in half a record, which is left out", file=sys.stderr)
    return store


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _write(path: Path, text: str) -> None:
    from .report import write

    write(path, text)
    print(path, file=sys.stderr)


def plot(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for the figures.", metavar="DIR")] = Path(
        "figures"
    ),
    kind: Annotated[str, typer.Option(help="svg, png or pdf.")] = "svg",
    replicates: Replicates = 100,
    records: Records = None,
) -> None:
    """Draw a study's figures: loss over size, divergence over bits, laws, Pareto front."""
    from kbit.errors import KbitError

    if kind not in ("svg", "png", "pdf"):
        raise KbitError(f"--kind {kind!r}: write svg, png or pdf")
    from .figures import held_out, law_residuals
    from .plot import draw_all

    if source.suffix == ".csv":
        studies, _ = _fitted(source, "", "", 0, None)
        drawn = [*(law_residuals(s) for s in studies), held_out(studies)]
    else:
        drawn = _summary(source, records, replicates=replicates).figures()
    for path in draw_all(drawn, out, f".{kind}"):
        print(path)


def report(
    source: Source,
    out: Annotated[Path, typer.Option(help="The page.", metavar="FILE")] = Path("report.html"),
    replicates: Replicates = 100,
    records: Records = None,
    findings: Annotated[
        Path | None,
        typer.Option(help="Text for the top: plain, or the head of Markdown.", metavar="FILE"),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Beside the page, also figures/*.svg and fits.json.")
    ] = False,
) -> None:
    """Write a study as one HTML page: method, figures, tables, intervals, failures."""
    import json
    import tomllib

    from kbit.errors import KbitError

    from . import report as pages
    from .findings import fill, plain
    from .plot import draw_all

    if source.suffix == ".csv":
        raise KbitError(f"{source}: a published grid has no cells to report; use kbit fit and plot")
    if out.is_dir():
        raise KbitError(
            f"{out} is a folder; --out takes the page's name, such as {out}/report.html"
        )
    summary = _summary(source, records, replicates=replicates)
    if everything:
        _write(out.parent / "fits.json", json.dumps(summary.as_json(), indent=1) + "\n")
        draw_all(summary.figures(), out.parent / "figures")
    title, question = source.stem, "Which model at which width, for a given number of bytes?"
    commands: list[str] = []
    if source.suffix == ".toml":
        study = tomllib.loads(source.read_text(encoding="utf-8"))
        title = study.get("title") or study.get("name", title)
        question = study.get("question") or question
        commands = [*study.get("prepare", []), f"kbit sweep {source}"]
    told = f" --findings {findings}" if findings else ""
    commands.append(f"kbit report {source} --out {out} --replicates {replicates}{told}")
    words = ""
    if findings:
        given = findings.read_text(encoding="utf-8")
        fits = json.loads(json.dumps(summary.as_json()))  # with the keys that fits.json has
        words = fill(given, fits)
        if words != given:
            _write(findings, words)
        words = plain(words)
    if words.startswith("# "):  # of a Markdown file: the paragraphs before its first section
        words = words.partition("\n")[2].partition("\n## ")[0]
    page = pages.page(summary, title=title, question=question, commands=commands, findings=words)
    _write(out, page)


def advise(
    source: Source,
    memory: Annotated[str, typer.Option(help="Memory there is, such as 6GB.", metavar="BYTES")],
    context: Annotated[int, typer.Option(help="Tokens that the cache has to hold.", min=1)] = 2048,
    overhead: Annotated[str, typer.Option(help="Memory besides weights and cache.")] = "120MB",
    family: Annotated[
        str | None, typer.Option(help="This family only.", show_default="all")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Rank by this text.", show_default="that of most cells")
    ] = None,
    top: Annotated[int, typer.Option(help="Places to show.", min=1)] = 3,
    path: Paths = None,
    records: Records = None,
) -> None:
    """Name the best model and width for an amount of memory."""
    from kbit.errors import KbitError

    from . import advise as advice
    from .analysis import compare_laws
    from .beyond import beyond
    from .frame import frame, text_metrics
    from .laws import get_laws
    from .summary import main_group

    store = _store(source, records)
    metrics = text_metrics(r for r in store if r.status == "ok")
    metric = text or next(iter(metrics), "")
    if metric not in metrics:
        raise KbitError(f"no text named {metric!r}; the study has: {', '.join(metrics) or 'none'}")
    cells = frame(store, metric)
    group = main_group(cells)
    law = compare_laws(cells, get_laws([]), groups=[group], target="loss", replicates=0)
    room = advice.parse_memory(memory)
    shapes = {}
    if source.suffix == ".toml":
        from .study import read_study

        try:
            shapes = advice.shapes_of(read_study(source, _paths(path)))
        except KbitError as reason:
            print(f"the cache is estimated: {reason}", file=sys.stderr)
    found = advice.advise(
        cells,
        law,
        room,
        context=context,
        overhead_bytes=advice.parse_memory(overhead),
        family=family,
        shapes=shapes,
    )
    print(f"{memory} ({overhead} of it overhead, a cache for {context} tokens), text {metric}:")
    for place, candidate in enumerate(found.ranked[:top], 1):
        print(f"{place}. {advice.describe(candidate)}")
    if len(found.ranked) > 1:
        scale = 1.4426950408889634
        error = found.behind_stderr * scale
        known = f" ± {error:.4f} (paired)" if error == error else ""
        print(f"second place is {found.behind * scale:.4f}{known} bits per byte behind")
    best = law.best_held_out
    if best is not None:
        print(f"law: {best.full_name}, off by x{2.718281828 ** best.held_out_log:.2f} (median) on "
              f"the held-out {law.held_out}")  # fmt: skip
    if found.too_large:
        print(f"{found.too_large} more would not fit")
    plain = cells.select(~cells.quantized).points("loss")
    larger = beyond(law, plain, room - advice.parse_memory(overhead), context)
    if larger is not None and family is None:
        print(advice.describe_beyond(larger, group))
