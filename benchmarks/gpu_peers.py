"""Other people's kernels, called the way their documentation does; each may be missing.

A peer is `make(n, k, x) -> calls` on rotating random weights; it raises where it can't run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_scale import SPAWN, Scale

Calls = list[Callable[[], Any]]
Peer = Callable[[int, int, Any], Calls]
WIDTHS = (2, 3, 5, 6, 7, 8)
PEER_ROWS = (1, 16, 64)  # theirs are compiled for every number of rows


def bitsandbytes_nf4(n: int, k: int, x: Any) -> Calls:
    """bitsandbytes NF4, block 64: gemv for one row, dequantize + cuBLAS above."""
    import bitsandbytes as bnb
    import torch

    from kbit_kernels.triton.measure import copies

    calls: Calls = []
    for _ in range(copies(n * k // 2)):
        weight = torch.randn((n, k), device="cuda", dtype=torch.float16)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        calls.append(partial(bnb.matmul_4bit, x, packed.t(), quant_state=state))
    return calls


def tinygemm_int4(n: int, k: int, x: Any) -> Calls:
    """torch's tinygemm, int4 in groups of 64, bf16 activations."""
    import torch

    from kbit_kernels.triton.measure import copies

    calls: Calls = []
    x = x.to(torch.bfloat16)
    for _ in range(copies(n * k // 2)):
        codes = torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand((k // 64, n, 2), device="cuda", dtype=torch.bfloat16)
        calls.append(partial(torch.ops.aten._weight_int4pack_mm, x, packed, 64, scales))
    return calls


def gemlite_int4(n: int, k: int, x: Any) -> Calls:
    """gemlite, 4-bit weights in groups of 64, fp16 activations."""
    import torch
    from gemlite.core import DType, GemLiteLinear

    from kbit_kernels.triton.measure import copies

    calls: Calls = []
    for _ in range(copies(n * k // 2)):
        layer = GemLiteLinear(
            4, group_size=64, in_features=k, out_features=n,
            input_dtype=DType.FP16, output_dtype=DType.FP16,
        )  # fmt: skip
        codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        scales = torch.rand((n * k // 64, 1), device="cuda", dtype=torch.float16)
        layer.pack(codes, scales, torch.full_like(scales, 8.0))
        calls.append(partial(layer, x))
    return calls


def humming(bits: int, n: int, k: int, x: Any) -> Calls:
    """humming, symmetric integers in groups of 64, fp16 activations; compiled at the first call."""
    import torch
    from humming.layer import HummingLayer

    from kbit_kernels.triton.measure import copies

    calls: Calls = []
    for _ in range(copies(n * k * bits // 8)):
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": f"int{bits}", "group_size": 64},
            torch_dtype=torch.float16,
        ).cuda()
        layer.load_from_unquantized(torch.randn((n, k), device="cuda", dtype=torch.float16))
        layer.transform()
        calls.append(partial(layer, x))
    return calls


PEERS: dict[str, Peer] = {
    "bitsandbytes nf4": bitsandbytes_nf4,
    "tinygemm int4": tinygemm_int4,
    "gemlite int4": gemlite_int4,
    "humming int4": partial(humming, 4),
}
WIDTH_PEERS: dict[str, Peer] = {f"humming int{k}": partial(humming, k) for k in WIDTHS}


def warm_peers(scale: Scale) -> list[Any]:
    """warm_peer for all of them, each in a process of its own, which may hang."""
    names = PEERS | WIDTH_PEERS if scale.device == "cuda" else ()
    processes = [SPAWN.Process(target=warm_peer, args=(n, scale), daemon=True) for n in names]
    for process in processes:
        process.start()
    return processes


def warm_peer(name: str, scale: Scale) -> None:
    """Let a peer compile and tune what it will be timed with; what fails here fails there too."""
    import torch

    n, k = scale.shapes[0]
    for m in PEER_ROWS if name in PEERS else PEER_ROWS[:1]:
        x = torch.randn((m, k), device=scale.device, dtype=torch.float16)
        (PEERS | WIDTH_PEERS)[name](n, k, x)[0]()
    torch.cuda.synchronize()
