"""One model in one process: loads, reads a prompt, decodes, and prints what it took as JSON.

    python benchmarks/peers.py ENGINE PATH THREADS PROMPT TOKENS

Engines: kbit-float, -int8, -int16, -bf16 (checkpoint directories), llama.cpp, llama.cpp-unfused
and xllamacpp (a .gguf file), transformers-fp32, transformers-bf16, bitsandbytes-nf4, torch-int4
(Hugging Face directories). kbit-int8@avx2 takes that instruction set, and llama.cpp@haswell the
library for such processors of the build in .venv/variants. Every engine gets the same token ids.
`run` starts it as a child and says how much of the machine others used.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Read = Callable[[list[int], int], None]  # a prompt, and room for so many more tokens
Decode = Callable[[int], None]


def prompt_ids(count: int) -> list[int]:
    """Any ids do: a decoder's time does not depend on them."""
    return [100 + (37 * i) % 4000 for i in range(count)]


def kbit(path: str, threads: int, arithmetic: str, isa: str | None) -> tuple[Read, Decode, Any]:
    import numpy as np

    from kbit.checkpoint.reader import open_checkpoint
    from kbit.engine.executor import load_executor

    executor: Any = load_executor(
        open_checkpoint(path), "native", threads=threads, arithmetic=arithmetic, isa=isa
    )
    state: dict[str, Any] = {}

    def read(ids: list[int], room: int) -> None:
        state["cache"] = executor.new_cache(1, len(ids) + room)
        logits = executor.forward([np.array(ids)], state["cache"])[0]
        state["next"] = int(logits.argmax())

    def decode(count: int) -> None:
        for _ in range(count):
            logits = executor.forward([np.array([state["next"]])], state["cache"])[0]
            state["next"] = int(logits.argmax())

    return read, decode, executor


def read_gb_per_s(threads: int, nbytes: int) -> float:
    """What kbit's threads read of a buffer as large as a step's weights, over and over, as a
    decoder does: out of the last-level cache where it holds them, else from memory."""
    from statistics import median

    import numpy as np

    from kbit_kernels.cpu import library

    pool, data = library.Pool(threads), np.ones(nbytes // 8, np.uint64)
    taken = []
    for _ in range(9):
        begin = time.perf_counter()
        library.load().kbit_read(pool.handle, data.ctypes.data, data.size)
        taken.append(time.perf_counter() - begin)
    return data.nbytes / median(taken[1:]) / 1e9


def transformers(path: str, threads: int, kind: str) -> tuple[Read, Decode, Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    options: dict[str, Any] = {"dtype": torch.float32 if kind == "fp32" else torch.bfloat16}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if kind == "int4":
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, torch.nn.Linear):
                        setattr(part, name, torch_int4(module.weight))
    state: dict[str, Any] = {}

    def step(ids: Any) -> None:
        with torch.inference_mode():
            out = model(ids, past_key_values=state.get("cache"), logits_to_keep=1)
        state["cache"] = out.past_key_values
        state["next"] = out.logits[:, -1:].argmax(-1)

    def read(ids: list[int], room: int) -> None:
        state.clear()
        step(torch.tensor([ids]))

    def decode(count: int) -> None:
        for _ in range(count):
            step(state["next"])

    return read, decode, model


def torch_int4(weight: Any, group: int = 64) -> Any:
    """A linear layer on torch's own 4-bit product, rounded to the nearest of 16 steps a group."""
    import torch

    rows, columns = weight.shape
    w = weight.detach().float().reshape(rows, columns // group, group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((w - low) / scale).round().to(torch.int32).reshape(rows, columns)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zeros = low + 8 * scale
    scales = torch.cat([scale, zeros], -1).transpose(0, 1).to(torch.bfloat16).contiguous()

    class Int4(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", packed)
            self.register_buffer("scales", scales)

        def forward(self, x: Any) -> Any:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.reshape(-1, columns), self.packed, group, self.scales
            )
            return y.reshape(*x.shape[:-1], rows)

    return Int4()


VARIANTS = Path(__file__).parents[1] / ".venv" / "variants"  # see the Makefile


def llama_cpp(
    path: str, threads: int, context: int, kind: str, variant: str
) -> tuple[Read, Decode, Any]:
    """llama.cpp's C API, with its defaults; kind "unfused": without its flash attention. variant:
    whose library for the processor to load."""
    import ctypes

    if variant:
        sys.path.insert(0, str(VARIANTS))
    import llama_cpp as api
    import numpy as np

    @api.llama_log_callback
    def quiet(level: int, text: bytes, data: Any) -> None:
        pass

    api.llama_log_set(quiet, ctypes.c_void_p(0))
    if variant:
        load = ctypes.CDLL(str(VARIANTS / "llama_cpp" / "lib" / "libggml.so.0")).ggml_backend_load
        load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        library = VARIANTS / "bin" / f"libggml-cpu-{variant}.so"
        if not load(str(library).encode()):
            raise RuntimeError(f"{library}: llama.cpp does not load it")
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx = context
    options.n_threads = options.n_threads_batch = threads
    if kind == "unfused":
        options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    session = api.llama_init_from_model(model, options)
    words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    state: dict[str, Any] = {"quiet": quiet}

    def step(ids: list[int]) -> None:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(session, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode failed on {len(ids)} tokens")
        state["logits"] = np.ctypeslib.as_array(api.llama_get_logits_ith(session, -1), (words,))
        state["next"] = int(state["logits"].argmax())

    def read(ids: list[int], room: int) -> None:
        api.llama_memory_clear(api.llama_get_memory(session), True)
        for at in range(0, len(ids), options.n_batch):
            step(ids[at : at + options.n_batch])

    def decode(count: int) -> None:
        for _ in range(count):
            step([state["next"]])

    return read, decode, state


def measure(read: Read, decode: Decode, prompt: int, tokens: int) -> dict[str, float]:
    read(prompt_ids(8), 8)
    first = time.time()
    decode(4)
    read(prompt_ids(16), tokens)
    ready = time.perf_counter()
    decode(tokens)
    decoded = time.perf_counter()
    read(prompt_ids(prompt), tokens)
    end = time.perf_counter()
    decode(tokens)
    return {
        "first_token_at": first,
        "decode_tokens_per_second": tokens / (decoded - ready),
        "prompt_tokens_per_second": prompt / (end - decoded),
        "decode_after_prompt_tokens_per_second": tokens / (time.perf_counter() - end),
    }


def xllamacpp(path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """llama.cpp as the wheel xllamacpp has it; its own timings."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx = prompt + tokens + 64
    options.n_parallel = 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(options)

    def complete(count: int, made: int) -> dict[str, float]:
        request = {"prompt": prompt_ids(count), "n_predict": made, "temperature": 0}
        answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        timings: dict[str, float] = answer["timings"]
        return timings

    complete(8, 1)
    return {
        "first_token_at": time.time(),
        "decode_tokens_per_second": complete(16, tokens)["predicted_per_second"],
        "prompt_tokens_per_second": complete(prompt, 1)["prompt_per_second"],
    }


def child(engine: str, path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    begin = time.perf_counter()
    if engine == "xllamacpp":
        result = xllamacpp(path, threads, prompt, tokens)
    else:
        engine, _, isa = engine.partition("@")
        family, _, kind = engine.partition("-")
        if family == "kbit":
            read, decode, model = kbit(path, threads, kind, isa or None)
        elif family == "llama.cpp":
            read, decode, model = llama_cpp(path, threads, prompt + tokens + 64, kind, isa)
        else:
            read, decode, model = transformers(path, threads, kind)
        loaded = time.perf_counter() - begin
        result = {"load_seconds": loaded, **measure(read, decode, prompt, tokens)}
    # not getrusage, whose maximum a child takes over from its parent
    status = Path("/proc/self/status").read_text()
    result["peak_bytes"] = 1024.0 * int(status.split("VmHWM:")[1].split()[0])
    if "transformers" in sys.modules:
        result["model_bytes"] = float(model.get_memory_footprint())
    if engine.startswith("kbit"):
        rate = result["decode_tokens_per_second"] * model.step_bytes / 1e9
        result["decode_gb_per_s"] = rate
        result["bandwidth_share"] = rate / read_gb_per_s(threads, model.step_bytes)
    return result


def _busy_seconds() -> float:
    """Processor seconds that the machine has spent on anything but idling, stolen time too."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run(engine: str, path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """The child's result, `first_token_seconds` from the start of its process, and
    `foreign_share`: processor time of others over that of all cores."""
    arguments = [engine, path, str(threads), str(prompt), str(tokens)]
    busy, mine, begin, started = _busy_seconds(), os.times(), time.perf_counter(), time.time()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        raise RuntimeError(f"{engine} {path}: exit {done.returncode}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["first_token_seconds"] = result.pop("first_token_at") - started
    own = sum(after[:4]) - sum(mine[:4])
    foreign = max(0.0, _busy_seconds() - busy - own) / (seconds * (os.cpu_count() or 1))
    return {**result, "foreign_share": foreign}


if __name__ == "__main__":
    name, model, *numbers = sys.argv[1:]
    print(json.dumps(child(name, model, *map(int, numbers))))
