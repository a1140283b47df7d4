"""The correctness gate of gpu.py: every width and data type against the reference."""

import itertools
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gpu_scale import DTYPES, SPAWN, Scale


def gate(text: str, half: str, scale: Scale, until: float) -> list[str]:
    """Run in a process of its own: a spec in one half precision against the reference; what is
    wrong.

    Compiling for the gate also fills Triton's cache for the timings.
    """
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    import torch

    from kbit_kernels import QuantSpec

    if half == "bfloat16" and time.monotonic() > until:
        print(f"the gate has no time left for {text} in bf16", flush=True)
        return []
    dtype = getattr(torch, half)
    try:
        return check(text, dtype, scale, configs_of(QuantSpec.parse(text), dtype, scale))
    except Exception as problem:  # does not compile, does not launch
        return [f"{text} {dtype}: {type(problem).__name__}: {problem}"[:500]]


def configs_of(spec: Any, dtype: Any, scale: Scale) -> set[Any]:
    """Every configuration that is timed with `spec`."""
    import torch

    from kbit_kernels.triton.configs import SHIPPED_SHAPES, choose_for, gpu_class, heuristic

    gpu, sms = gpu_class(torch.device(scale.device))
    shapes = scale.shapes if scale.device == "cpu" else SHIPPED_SHAPES
    configs = set()
    for (n, k), m in itertools.product(shapes, scale.rows):
        chosen, _ = choose_for(spec, m, n, k, gpu, sms)
        configs |= {heuristic(spec, m, n, k, gpu, sms), *([] if chosen is None else [chosen])}
    if dtype == torch.bfloat16:  # timed in fp16 only; one configuration a bucket is enough
        configs = set({c.rows_x: c for c in configs}.values())
    return configs


def check(text: str, dtype: Any, scale: Scale, configs: set[Any]) -> list[str]:
    """What is wrong with one spec in one half precision."""
    import numpy as np
    import torch

    from kbit_kernels import QuantSpec, quantize, reference
    from kbit_kernels.triton import dequantize, fused_linear, prepare

    N, K = scale.gate_shape
    wrong = []
    rng = np.random.default_rng(0)
    spec = QuantSpec.parse(text)
    tensor = quantize(rng.standard_normal((N, K)).astype(np.float32) * 0.02, spec)
    weights = reference.dequantize(tensor)
    weight = prepare(tensor, scale.device, dtype)
    # half a unit of the result, plus half a unit of each table entry or scaled weight, fp32 sums
    rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    if dtype == torch.bfloat16 and scale.device == "cpu":
        rounding = 2.0**-7  # the interpreter cuts off
    restored = dequantize(
        weight, torch.full(tensor.shape, float("nan"), device=scale.device, dtype=dtype)
    )
    error = np.abs(restored.float().cpu().numpy() - weights)
    if not (error <= 2.1 * rounding * np.abs(weights) + 2.0**-24).all():
        wrong.append(f"{text} {dtype} dequantize: {np.nanmax(error):.3g}")
    for config in configs:
        m = config.rows_x - 3
        x = torch.randn((m, K), device=scale.device).to(dtype)
        out = torch.full((m, N), float("nan"), device=scale.device, dtype=dtype)
        for _ in range(2):
            first = out.clone()
            fused_linear(x, weight, config, out=out)
        x_f32 = x.float().cpu().numpy()
        expected = reference.linear(x_f32, tensor)
        terms = np.abs(x_f32) @ np.abs(weights).T
        bound = 1.1 * rounding * np.abs(expected) + (rounding + 2.0**-18) * terms / 8
        bound += rounding * np.sqrt((x_f32**2) @ (weights**2).T) * 4 + 2.0**-24
        error = np.abs(out.float().cpu().numpy() - expected)
        if not (error <= bound).all():
            wrong.append(f"{text} {dtype} {config}: {np.nanmax(error / bound):.3g} x bound")
        if not torch.equal(first, out):
            wrong.append(f"{text} {dtype} {config}: two calls differ")
    return wrong


def attention_gate(scale: Scale) -> list[str]:
    """kbit's attention kernel against torch's own in fp32, on ragged lengths."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from gpu_decode import LLAMA_3_8B
    from kbit.engine.cuda_attention import Attend
    from kbit.engine.torch_attention import rotate
    from kbit.engine.torch_cache import TorchCache
    from kbit.models import describe

    decoder = describe(LLAMA_3_8B | {"num_hidden_layers": 1})
    attention = decoder.layers[0].attention
    assert attention.rotary is not None
    B, capacity = 5, 600
    H, G, D = attention.heads, attention.kv_heads, attention.head_dim
    cache = TorchCache(decoder, B, capacity, torch.float16, scale.device)
    keys, values = cache.keys[0], cache.values[0]
    keys.normal_()
    values.normal_()
    at = torch.tensor([0, 63, 64, 300, capacity - 1], device=scale.device)
    new = torch.randn((B, H + 2 * G, D), device=scale.device, dtype=torch.float16)
    q, k, v = new.split((H, G, G), dim=1)
    attend = Attend(attention, None)
    attend(0, q, k, v, cache, at)
    found = attend(0, q, k, v, cache, at).float()
    cos, sin = (table[at, None] for table in cache.rotary[attention.rotary])
    rows = torch.arange(B, device=scale.device)
    wrong = [
        f"attention stored other {name} than it was given"
        for name, stored, given in (("keys", keys, rotate(k, cos, sin)), ("values", values, v))
        if not torch.allclose(stored[rows, :, at], given, rtol=2e-3, atol=2e-3)
    ]
    seen = torch.arange(capacity, device=scale.device) <= at[:, None]
    expected = scaled_dot_product_attention(
        rotate(q, cos, sin).float().view(B, G, H // G, D),
        keys.float(),
        values.float(),
        attn_mask=seen[:, None, None],
        scale=attention.scale,
    ).reshape(B, H, D)
    error = (found - expected).abs().max().item()
    return wrong if error < 4e-3 else [*wrong, f"attention is off by {error:.3g}"]


def steps_gate(scale: Scale) -> list[str]:
    """Tokens of decode steps that begin before the host knows the ones before, against those of
    steps that wait: with pauses, and with other tokens than were chosen."""
    import numpy as np
    import torch

    from gpu_decode import TINY, RandomLoader
    from kbit.engine.cuda_executor import CudaExecutor
    from kbit.engine.sampler import GREEDY
    from kbit.models import describe

    kind = type("Executor", (CudaExecutor,), {"loader_class": RandomLoader})
    executor = kind({}, describe(TINY), scale.device, torch.float16, torch.float16)
    prompts = [np.arange(length) for length in (3, 9)]
    waiting, ahead = executor.new_cache(2, 200), executor.new_cache(2, 200)
    for cache in (waiting, ahead):
        executor.forward(prompts, cache)
    feed = [np.array([1]), np.array([2])]
    wrong = 0
    for step in range(150 if scale.device == "cuda" else 4):
        expected = executor.forward(feed, waiting)
        found = executor.sample(feed, ahead, [GREEDY] * 2)
        for (token, largest), row in zip(found, expected, strict=True):
            wrong += row.size > 0 and (token, largest) != (int(row.argmax()), float(row.max()))
        feed = [np.array([token]) for token, _ in found]
        if step % 7 == 1:
            feed = [np.array([step % 60]), np.array([], dtype=np.int64)]
    return [f"{wrong} tokens of steps ahead are others"] if wrong else []


def gate_specs(widths: tuple[int, ...]) -> list[str]:
    """What is checked: all that is timed, and blocks and decodings that differ from it."""
    specs = [f"{name}{k}-b64" for k in widths for name in DTYPES]
    specs += ["int4-row", "int3-b32", "uint3-b32", "uint5-b128", "nf4-b256", "lloyd4-b64"]
    return [*specs, "int4-b64-center"]


def run_gate(scale: Scale, until: float) -> dict[str, list[str]]:
    """The gate over several processes: what is wrong, by spec, "attention" or "steps ahead"."""
    specs = gate_specs(scale.widths)
    for library in ("OMP", "OPENBLAS", "MKL"):  # a thread a process is enough for all cores
        os.environ[f"{library}_NUM_THREADS"] = "1"
    # the longest code first, each to whoever is free: the last to end bounds the time
    tables = ("nf", "fp")
    specs.sort(key=lambda t: (t.startswith(tables), next(filter(str.isdigit, t))), reverse=True)
    jobs = min(16, os.cpu_count() or 1)
    wrong: dict[str, list[str]] = {}
    with ProcessPoolExecutor(jobs, mp_context=SPAWN) as pool:
        found = {
            ("attention", ""): pool.submit(attention_gate, scale),
            ("steps ahead", ""): pool.submit(steps_gate, scale),
        }
        for half in ("float16", "bfloat16"):
            for text in specs:
                found[text, half] = pool.submit(gate, text, half, scale, until)
        for (name, _), answer in found.items():
            try:
                problems = answer.result()
            except Exception as problem:  # its process died, and whether it is right is not known
                problems = [f"{name} not checked: {type(problem).__name__}: {problem}"[:500]]
            if problems:
                wrong.setdefault(name, []).extend(problems)
    return wrong
