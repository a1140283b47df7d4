"""The sweep of gpu.py: every width, data type, shape and number of rows beside cuBLAS and peers."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_peers import PEER_ROWS, PEERS, WIDTH_PEERS, Peer
from gpu_scale import DTYPES, Scale

# x cuBLAS at 8192 x 8192, M = 1, of the best published kernels (peers.md)
TO_BEAT = {8: 1.60, 7: 1.68, 6: 1.86, 5: 1.96, 4: 2.24, 3: 2.26, 2: 2.58}
# some peers tune themselves for longer than all of kbit's measurements take
PEER_LIMIT_S = 40.0
PEERS_LIMIT_S = 160.0  # all of them

Key = tuple[str, tuple[int, int], int]  # data type, shape, rows of x


def dense_calls(n: int, k: int, x: Any) -> list[Callable[[], Any]]:
    """cuBLAS fp16 on rotating weights."""
    from functools import partial

    import torch

    from kbit_kernels.triton.measure import copies

    weights = [
        torch.randn((n, k), device=x.device, dtype=torch.float16) for _ in range(copies(2 * n * k))
    ]
    return [partial(torch.nn.functional.linear, x, w) for w in weights]


def sweep(
    scale: Scale,
    copy_gb_s: float,
    until: float,
    plan: list[tuple[tuple[int, int], str]],
    wrong: set[str],
    done: set[Key],
    with_peers: bool,
) -> Iterator[tuple[Key, list[dict[str, Any]]]]:
    """Shapes and data types of `plan`, all widths and rows; what tells most first, so that a
    deadline costs least. Leaves out what is `wrong` or `done`."""
    from functools import partial

    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import linear
    from kbit_kernels.triton.configs import choose_for, gpu_class
    from kbit_kernels.triton.measure import Timed, copies, medians_us, random_weight

    device = scale.device
    gpu, sms = gpu_class(torch.device(device))
    spent: dict[str, float] = {}
    for (n, k), name in plan:
        counts = [m for m in scale.rows if (name, (n, k), m) not in done]
        weights = {}
        for bits in scale.widths if counts else ():
            spec = QuantSpec(name, bits)
            if str(spec) in wrong:
                continue
            first = random_weight(spec, (n, k), device=device)
            count = copies(first.nbytes) if device == "cuda" else 1
            others = (random_weight(spec, (n, k), device=device) for _ in range(count - 1))
            weights[spec] = [first, *others]
        for m in counts:
            if time.monotonic() > until:
                return
            x = torch.randn((m, k), device=device, dtype=torch.float16)
            timed = {"cublas": Timed(dense_calls(n, k, x), device)}
            for spec, held in weights.items():
                timed[str(spec)] = Timed([partial(linear, x, w) for w in held], device)
            failed: dict[str, str] = {}
            peers: dict[str, Peer] = {}
            if name == "int" and with_peers and (n, k) == scale.shapes[0] and m in PEER_ROWS:
                peers = PEERS | (WIDTH_PEERS if m == 1 else {})
            for peer, make in peers.items():
                if spent.get(peer, 0.0) > PEER_LIMIT_S or sum(spent.values()) > PEERS_LIMIT_S:
                    failed[peer] = (
                        f"left out: setting it up took {spent.get(peer, 0.0):.0f} s already,"
                        f" all peers {sum(spent.values()):.0f} s"
                    )
                    continue
                started = time.monotonic()
                try:
                    timed[peer] = Timed(make(n, k, x), device)
                except Exception as problem:  # another library's, of any kind
                    failed[peer] = f"{type(problem).__name__}: {problem}"[:300]
                spent[peer] = spent.get(peer, 0.0) + time.monotonic() - started
            us = medians_us(timed, scale.rounds)
            rows = []
            for spec, held in weights.items():
                nbytes = held[0].nbytes + 2 * m * (n + k)
                rows.append(
                    {
                        "spec": str(spec),
                        "shape": [n, k],
                        "rows": m,
                        "us": us[str(spec)],
                        "cublas_us": us["cublas"],
                        "x_cublas": us["cublas"] / us[str(spec)],
                        "percent_of_copy": 100 * nbytes / us[str(spec)] / 1e3 / copy_gb_s,
                        "choice": str(choose_for(spec, m, n, k, gpu, sms)),
                    }
                )
            for peer in peers:
                row: dict[str, Any] = {"peer": peer, "shape": [n, k], "rows": m}
                if peer in failed:
                    row["failed"] = failed[peer]
                else:
                    row |= {"us": us[peer], "cublas_us": us["cublas"]}
                    row["x_cublas"] = us["cublas"] / us[peer]
                rows.append(row)
            del timed
            yield (name, (n, k), m), rows
        del weights
        if device == "cuda":
            torch.cuda.empty_cache()


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """The goals at 8192 x 8192 beside what was measured."""
    lines = []
    for row in rows:
        if (
            row.get("spec", "").startswith("int")
            and row["shape"] == [8192, 8192]
            and row["rows"] == 1
        ):
            bits = int(row["spec"][3])
            lines.append(
                f"k={bits}: {row['x_cublas']:.2f} x cuBLAS (to beat {TO_BEAT[bits]:.2f}), "
                f"{row['percent_of_copy']:.0f}% of copy bandwidth (goal 75)"
            )
    return lines


def plots(rows: list[dict[str, Any]], stem: Path, shape: tuple[int, int]) -> None:
    """Percent of bandwidth over k; x cuBLAS over M with the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n, k = shape
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in DTYPES:
        at = {
            int(r["spec"][len(name)]): r["percent_of_copy"]
            for r in rows
            if r.get("spec", "").startswith(f"{name}")
            and r["spec"][len(name)].isdigit()
            and r["shape"] == [n, k]
            and r["rows"] == 1
        }
        if at:
            axes.plot(sorted(at), [at[bits] for bits in sorted(at)], marker="o", label=name)
    axes.axhline(75, color="grey", linestyle=":")
    axes.set(
        xlabel="bits", ylabel="percent of copy bandwidth", title=f"{n} x {k}, M = 1", ylim=(0, 105)
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(f"{stem}-bandwidth.png", dpi=150)

    figure, axes = plt.subplots(figsize=(6, 4))
    lines = [*(f"int{k}-b64" for k in (2, 4, 8)), *PEERS]
    for name in lines:
        at = {
            r["rows"]: r["x_cublas"]
            for r in rows
            if name in (r.get("spec"), r.get("peer")) and r["shape"] == [n, k] and "us" in r
        }
        if at:
            style = "-" if name.startswith("int") else "--"
            axes.plot(sorted(at), [at[m] for m in sorted(at)], style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda rows, _: f"{rows:g}")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xlabel="rows of x", ylabel="x cuBLAS fp16", title=f"{n} x {k}")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2, fontsize="small", loc="upper right")
    figure.tight_layout()
    figure.savefig(f"{stem}-rows.png", dpi=150)


def cross_overs(scale: Scale) -> Iterator[dict[str, Any]]:
    """The most rows for which the fused kernel wins, at some widths."""
    from kbit_kernels import QuantSpec
    from kbit_kernels.triton.measure import cross_over_rows

    for bits in (4, 2, 8):
        if bits in scale.widths:
            spec = QuantSpec("int", bits)
            rows = cross_over_rows(spec, scale.shapes[0], scale.device, scale.rounds)
            yield {"spec": str(spec), "shape": list(scale.shapes[0]), "rows": rows}
