"""From records with a known answer to frames, laws, widths, worths, figures, report and advice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kbit.errors import KbitError
from kbit_scaling import report
from kbit_scaling.advise import advise, describe, describe_beyond, parse_memory
from kbit_scaling.analysis import (
    best_widths,
    compare_laws,
    draw_models,
    pareto,
    rows_of,
    worth_in_bits,
)
from kbit_scaling.beyond import beyond
from kbit_scaling.frame import Frame, frame, group_of
from kbit_scaling.laws import get_laws
from kbit_scaling.plot import draw_all
from kbit_scaling.published import published_laws, read_grid
from kbit_scaling.records import Documents, Items, Record
from kbit_scaling.summary import Summary, law_table, summarize

SIZES = (1e5, 4e5, 1.6e6, 6.4e6, 2.5e7)
WIDTHS = (2, 3, 4, 5, 6)
DOCUMENTS = 12
TOKENS = 200
BYTES = 700
SHIFT = 0.5  # nf is worth half a bit here


def degradation(n: float, bits: float) -> float:
    """Nats per byte, by Kumar's formula."""
    return 8.0 * (n / 1e6) ** -0.3 * np.exp(-bits / 0.6)


def records(noise: float = 0.0) -> list[Record]:
    rng = np.random.default_rng(0)
    per_document = rng.normal(0, 0.02, DOCUMENTS)  # shared by all cells: differences cancel it
    out = []
    for i, n in enumerate(SIZES):
        base = 1.0 + 0.4 * (n / 1e6) ** -0.25
        cells = [("none", 16.0, 0.0)]
        cells += [(f"int{k}-b64", k + 0.25, degradation(n, k)) for k in WIDTHS]
        cells += [(f"nf{k}-b64", k + 0.25, degradation(n, k + SHIFT)) for k in WIDTHS]
        for spec, bits, delta in cells:
            loss = base + delta * (1 + noise * rng.normal()) + per_document
            out.append(
                Record(
                    cell=f"{i}-{spec}",
                    identity={"model": {"weights": str(i)}, "metric": {"text": "t"}},
                    status="ok",
                    model=f"m{i}",
                    family="f",
                    parameters=int(n * 1.2),
                    non_embedding=int(n),
                    training_tokens=1e9,
                    spec=spec,
                    bytes=round(n * 1.2 * bits / 8),
                    embedding_bytes=1,
                    metric="t",
                    documents=Documents(
                        tokens=[TOKENS] * DOCUMENTS,
                        bytes=[BYTES] * DOCUMENTS,
                        log_likelihood=(-loss * BYTES).tolist(),
                        kl=[3 * delta * TOKENS] * DOCUMENTS,
                        agree=[int(TOKENS * np.exp(-delta))] * DOCUMENTS,
                    ),
                )
            )
    lost = {"status": "failed", "error": "out of memory"}
    failed = out[3].model_copy(update={"cell": "x", "search": True, **lost})
    mended = out[3].model_copy(update={"cell": "y", **lost})  # measured since, as another cell
    tasks = [
        r.model_copy(
            update={
                "cell": r.cell + "q",
                "metric": "quiz",
                "documents": None,
                "items": Items(
                    correct=[1, 0, 1, 1], correct_norm=[0] * 4, log_likelihood=[-1.0] * 4
                ),
            }
        )
        for r in out[:2]
    ]
    return [*out, failed, mended, *tasks]


@pytest.fixture(scope="module")
def known() -> Frame:
    return frame(records(), "t")


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(records(0.02), groups=("int-b64", "nf-b64"), replicates=8)


def test_paired_differences_lose_what_documents_share(known: Frame) -> None:
    delta, error = known.degradation()
    expected = [
        degradation(r.non_embedding, k) for r, k in zip(known.records, known.widths, strict=True)
    ]
    rows = np.array([g == "int-b64" for g in known.groups])
    np.testing.assert_allclose(delta[rows], np.array(expected)[rows], rtol=1e-9)
    assert error[rows].max() < 1e-12
    loss, stderr = known.bits_per_byte()
    assert stderr.min() > 1e-3
    np.testing.assert_allclose(known.divergence()[rows], 3 * delta[rows], rtol=1e-9)
    assert loss.shape == (55,)


def test_checkpoints_of_a_run_are_drawn_together_and_every_table_stays_filled() -> None:
    some = records()
    later = [
        r.model_copy(update={"cell": r.cell + "l", "model": r.model + "-later",
                             "training_tokens": 2e9})
        for r in some if r.documents is not None and r.model in ("m0", "m1")
    ]  # fmt: skip
    lone = [r for r in some if not (r.spec == "int6-b64" and r.model != "m4")]
    both = frame([*lone, *later], "t")
    points = both.select(both.quantized).points("divergence")
    assert len(points.models) == 7
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_models(points, rng)
        for size in "01":
            assert drawn.count(f"m{size}") == drawn.count(f"m{size}-later")
        rows = points.select(rows_of(points, drawn))
        assert len(set(rows.params)) >= 3
        assert len(set(rows.tokens)) == 2
        assert set(zip(rows.bits, rows.group, strict=True)) == set(
            zip(points.bits, points.group, strict=True)
        )


def test_cells_without_their_unquantized_model_are_counted_and_left_out() -> None:
    found = frame([r for r in records() if r.cell != "2-none"], "t")
    assert (len(found), found.orphans) == (44, 10)
    with pytest.raises(KbitError, match="no finished cells of the text 'wiki'"):
        frame(records(), "wiki")


def test_groups_are_named_by_all_but_the_width() -> None:
    base = records()[1]
    changes: list[dict[str, object]] = [
        {},
        {"spec": "int8-b64"},
        {"search": True},
        {"spec": "fp4e2-b32"},
        {"embedding": "keep"},
        {"spec": "nf4-row-center"},
    ]
    names = {group_of(base.model_copy(update=change)) for change in changes}
    assert names == {
        "int-b64", "int-b64+search", "fp-b32", "int-b64+embedding keep", "nf-row-center",
    }  # fmt: skip


def test_worth_of_a_data_type_is_its_shift_in_bits(known: Frame) -> None:
    found = worth_in_bits(known, "nf-b64", "int-b64", replicates=20)
    assert [w.bits for w in found] == [2, 3, 4, 5]  # at 6 no int is as good: nothing to compare
    for w in found:
        assert w.saved == pytest.approx(SHIFT, abs=1e-6)
        assert w.low <= w.saved + 1e-9
        assert w.high >= w.saved - 1e-9


def test_best_width_is_that_of_the_formula(known: Frame) -> None:
    found = best_widths(known, "int-b64", replicates=20)
    assert found
    for b in found:
        for k, loss in b.loss.items():
            n = np.array(SIZES)
            bits = n * 1.2 * (k + 0.25 if k < 16 else 16)
            delta = np.array([degradation(x, k) if k < 16 else 0.0 for x in n])
            curve = 1.0 + 0.4 * (n / 1e6) ** -0.25 + delta
            expected = np.interp(np.log(b.total_bits), np.log(bits), curve)
            assert loss == pytest.approx(expected, abs=0.01)  # documents' own noise is shared
        assert b.best == min(b.loss, key=lambda k: b.loss[k])
        assert len(b.loss) >= 2
        assert sum(b.share.values()) == pytest.approx(1.0)


def test_laws_of_a_study_recover_the_truth_and_predict_the_largest(summary: Summary) -> None:
    study = next(s for s in summary.laws if s.target == "divergence")
    results = {r.name: r for r in study.results}
    fitted = results["kumar"].fit
    assert fitted is not None
    assert fitted["gamma"] == pytest.approx(0.6, rel=0.05)
    assert fitted["gamma_N"] == pytest.approx(0.3, rel=0.1)
    shift = next(e for e in fitted.estimates if e.name.startswith("shift"))
    assert shift.value == pytest.approx(SHIFT, abs=0.05)
    assert study.held_out == "m4"
    assert results["kumar"].held_out_log < 0.1
    assert results["kumar"].held_out_log < results["offset"].held_out_log
    best = study.best_aic
    assert best is not None
    assert best.name == "kumar"
    text = law_table(study)
    assert "H2 kumar" in text
    assert re.search(r"gamma 0\.\d+ \[0\.\d+, 0\.\d+\]", text)


def test_fewer_models_than_parameters_still_say_what_can_be_said() -> None:
    few = [r for r in records() if r.model == "m0"]
    found = summarize(few, replicates=0)
    results = {r.name: r for r in found.laws[0].results}
    assert "base curve" in results["effective"].note
    kumar = results["kumar"].fit
    assert kumar is not None
    status = {e.name: e.status for e in kumar.estimates}
    assert status["gamma_N"] == "unidentified"
    assert "none to hold out" in results["kumar"].note


def test_a_store_of_failures_says_why() -> None:
    failed = [r for r in records() if r.status == "failed"]
    with pytest.raises(KbitError, match=r"no successful cell .*out of memory.*--retry-failed"):
        summarize(failed)


def test_summary_is_plain_json(summary: Summary) -> None:
    text = json.dumps(summary.as_json(), allow_nan=False)
    assert json.loads(text)["main_group"] == "nf-b64"
    assert summary.tasks[0].accuracy == 0.75
    assert summary.failed[0][0].endswith("out of memory")


def test_pareto_front_holds_what_nothing_beats() -> None:
    size, loss = np.array([1.0, 2, 3, 4, 4]), np.array([3.0, 2, 2.5, 1, 0.5])
    assert pareto(size, loss).tolist() == [0, 1, 4]


def test_figures_are_written(summary: Summary, tmp_path: Path) -> None:
    figures = summary.figures()
    slugs = {f.slug for f in figures}
    assert {
        "loss-t-nf-b64",
        "types-t-m4",
        "pareto-t",
        "held-out",
        "residuals-t-loss-int-b64-nf-b64",
    } <= slugs
    assert len(slugs) == len(figures)
    paths = draw_all(figures[:2], tmp_path, ".svg")
    first = paths[0].read_bytes()
    assert b"<svg" in first
    assert draw_all(figures[:1], tmp_path / "again", ".svg")[0].read_bytes() == first


def test_report_stands_alone_and_shows_failures(summary: Summary) -> None:
    text = report.page(
        summary,
        title="A <study>",
        question="Which?",
        commands=["kbit sweep s.toml"],
        findings="Yes.",
    )
    assert "A &lt;study&gt;" in text
    assert not re.search(r"(src|href)=|https?://|@import", text)
    assert "out of memory" in text
    assert text.count('<figure class="chart"') == len(summary.figures())
    assert "kbit sweep s.toml" in text
    assert len(text) < 3_000_000


def test_advice_names_the_best_that_fits(known: Frame) -> None:
    room = 4e6
    found = advise(known, None, room, context=1, overhead_bytes=0)
    value = known.loss()
    fits = [i for i, r in enumerate(known.records) if r.bytes < room * 0.99]
    best = min(fits, key=lambda i: value[i])
    assert (found.ranked[0].model, found.ranked[0].spec) == (
        known.records[best].model,
        known.records[best].spec,
    )
    assert found.behind >= 0
    assert found.behind_stderr < 1e-3  # paired: what documents share cancels
    assert "measured" in describe(found.ranked[0])
    assert found.too_large > 0


def test_advice_predicts_cells_that_were_not_measured() -> None:
    left_out = ("4-nf3-b64", "4-nf4-b64", "4-int3-b64", "4-int4-b64")
    some = [r for r in records() if r.cell not in left_out]
    found = summarize(some, laws=["kumar"], replicates=0)
    law = next(s for s in found.laws if s.target == "loss")
    room = 2.5e7 * 1.2 * 4.3 / 8
    advice = advise(found.frames["t"], law, room, context=1, overhead_bytes=0)
    first = advice.ranked[0]
    assert (first.model, first.spec, first.measured) == ("m4", "nf4-b64", False)
    truth = 1.0 + 0.4 * 25**-0.25 + degradation(2.5e7, 4 + SHIFT)
    assert first.loss == pytest.approx(truth, rel=1e-3)
    assert first.low <= first.loss <= first.high


def test_laws_name_the_best_size_beyond_the_study(known: Frame) -> None:
    """With the true law and base curve known, the best size and width for an amount of memory."""
    study = compare_laws(known, get_laws(["kumar"]), groups=["int-b64"], replicates=0)
    plain = known.select(~known.quantized).points("loss")
    room = 4e8
    found = beyond(study, plain, room, context=1, replicates=10)
    assert found is not None
    assert [s.behind for s in found.sizes] == sorted(s.behind for s in found.sizes)
    assert found.sizes[0].behind == 0
    for s in found.sizes:
        assert s.parameters == pytest.approx(8 * room / (s.bits + 0.25), rel=0.01)
        truth = 1.0 + 0.4 * (s.parameters / 1e6) ** -0.25 + degradation(s.parameters, s.bits)
        assert s.loss == pytest.approx(truth, abs=0.02)
        assert s.low <= s.loss <= s.high
    assert found.times == pytest.approx(max(s.parameters for s in found.sizes) / 2.5e7)
    assert "extrapolated to" in describe_beyond(found, "int-b64")
    assert "open" not in describe_beyond(found, "int-b64")
    unbounded = replace(found, sizes=(replace(found.sizes[0], high=1e5), *found.sizes[1:]))
    assert "open: the law bounds it no better than guessing]" in describe_beyond(unbounded, "int")
    # what the study has answers for itself
    assert beyond(study, plain, 1e6, context=1, replicates=2) is None


def test_cells_of_a_model_before_it_was_trained_anew_are_left_out() -> None:
    old = [r for r in records() if r.model == "m1" and r.status == "ok" and r.documents]
    new = [
        r.model_copy(
            update={
                "cell": r.cell + "new",
                "identity": {**r.identity, "model": {"weights": "again"}},
                "made": {"time": "2030-01-01T00:00:00Z"},
            }
        )
        for r in old[:3]
    ]
    found = frame([*records(), *new], "t")
    assert [r.cell for r in found.records if r.model == "m1"] == [r.cell for r in new]
    assert len(found) == 44 + 3


def test_advice_counts_cache_and_overhead_and_refuses_too_little(known: Frame) -> None:
    short = advise(known, None, 1e7, context=10, overhead_bytes=0)
    long = advise(known, None, 1e7, context=4000, overhead_bytes=0)
    assert len(long.ranked) < len(short.ranked)
    with pytest.raises(KbitError, match="nothing in the study fits 0 MB: the smallest is m0"):
        advise(known, None, 10.0, overhead_bytes=0)
    with pytest.raises(KbitError, match="no family named 'opt' in the study; it has: f"):
        advise(known, None, 1e9, family="opt")


@pytest.mark.parametrize(
    ("text", "value"), [("6GB", 6e9), ("1.5 GiB", 1.5 * 2**30), ("512", 512.0), ("20mb", 2e7)]
)
def test_memory_is_read_with_its_unit(text: str, value: float) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["six", "-1GB", "0", "4 bits"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(KbitError, match="memory"):
        parse_memory(text)


def test_published_grid(shared: Path) -> None:
    """Under GPTQ one fall per bit for all sizes describes OPT; effective parameters predict the
    largest model best; two widths cannot tell an exponential from a power of the bits."""
    grids = read_grid(shared / "data/laws/gptq_opt_bloom_wikitext2.csv")
    assert [(g.family, g.method, len(g.quantized)) for g in grids] == [
        ("opt", "rtn", 10), ("opt", "gptq", 10), ("bloom", "rtn", 10), ("bloom", "gptq", 10),
    ]  # fmt: skip
    gptq = published_laws(grids[1], get_laws([]), replicates=0)
    results = {r.name: r for r in gptq.results}
    assert gptq.held_out == "opt-6.7b"
    assert gptq.best_held_out is results["effective"]
    kumar, ouyang = results["kumar"].fit, results["ouyang"].fit
    assert kumar is not None
    assert ouyang is not None
    assert kumar.aic == pytest.approx(ouyang.aic, abs=1e-6)
    assert kumar["gamma"] == pytest.approx(0.58, abs=0.02)


def test_published_grid_with_a_hole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_text("family,model,params,method,bits,ppl\nf,m,1e6,rtn,4,20\n")
    with pytest.raises(KbitError, match="m has no row with 16 bits"):
        read_grid(path)
    path.write_text("family,model,params,method,bits,ppl\nf,m,big,rtn,4,20\n")
    with pytest.raises(KbitError, match="line 2"):
        read_grid(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(KbitError, match="lacks"):
        read_grid(path)
