"""One model in one process: loads, reads a prompt, decodes, and prints what it took as JSON.

    python benchmarks/peers.py ENGINE PATH THREADS PROMPT TOKENS

Engines: kbit-float, kbit-int8 (checkpoint directories), llama.cpp (a .gguf file),
transformers-fp32, transformers-bf16, bitsandbytes-nf4 (Hugging Face directories). Every engine gets
the same token ids. `run` starts it as a child and says how much of the machine others used.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Decode = Callable[[int], None]


def prompt_ids(count: int) -> list[int]:
    """Any ids do: a decoder's time does not depend on them."""
    return [100 + (37 * i) % 4000 for i in range(count)]


def kbit(path: str, threads: int, arithmetic: str) -> tuple[Any, Any]:
    import numpy as np

    from kbit.checkpoint.reader import open_checkpoint
    from kbit.engine.executor import load_executor

    executor: Any = load_executor(
        open_checkpoint(path), "native", threads=threads, arithmetic=arithmetic
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

    return read, decode


def transformers(path: str, threads: int, kind: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if kind == "bf16" else torch.float32}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
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

    return read, decode


def measure(read: Any, decode: Any, prompt: int, tokens: int) -> dict[str, float]:
    begin = time.perf_counter()
    read(prompt_ids(8), 8)
    first = time.perf_counter()
    decode(4)
    read(prompt_ids(16), tokens)
    ready = time.perf_counter()
    decode(tokens)
    decoded = time.perf_counter()
    read(prompt_ids(prompt), 1)
    end = time.perf_counter()
    return {
        "first_token_seconds": first - begin,
        "decode_tokens_per_second": tokens / (decoded - ready),
        "prompt_tokens_per_second": prompt / (end - decoded),
    }


def llama_cpp(path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """Its own timings: prompt evaluation and decoding, without sampling's and HTTP's overhead."""
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
        return answer["timings"]

    begin = time.perf_counter()
    complete(8, 1)
    first = time.perf_counter() - begin
    return {
        "first_token_seconds": first,
        "decode_tokens_per_second": complete(16, tokens)["predicted_per_second"],
        "prompt_tokens_per_second": complete(prompt, 1)["prompt_per_second"],
    }


def child(engine: str, path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    begin = time.perf_counter()
    if engine == "llama.cpp":
        result = llama_cpp(path, threads, prompt, tokens)
    else:
        family, kind = engine.split("-")
        load = kbit if family == "kbit" else transformers
        read, decode = load(path, threads, kind)
        loaded = time.perf_counter() - begin
        result = {"load_seconds": loaded, **measure(read, decode, prompt, tokens)}
    # not getrusage, whose maximum a child takes over from its parent
    status = Path("/proc/self/status").read_text()
    result["peak_bytes"] = 1024.0 * int(status.split("VmHWM:")[1].split()[0])
    return result


def _busy_seconds() -> float:
    """Processor seconds that the machine has spent on anything but idling, stolen time too."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run(engine: str, path: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """The child's result and `foreign_share`: processor time of others over that of all cores."""
    arguments = [engine, path, str(threads), str(prompt), str(tokens)]
    busy, mine, begin = _busy_seconds(), os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        raise RuntimeError(f"{engine} {path} failed: {done.stderr[-2000:]}")
    own = sum(after[:4]) - sum(mine[:4])
    foreign = max(0.0, _busy_seconds() - busy - own) / (seconds * (os.cpu_count() or 1))
    return {**json.loads(done.stdout.splitlines()[-1]), "foreign_share": foreign}


if __name__ == "__main__":
    name, model, *numbers = sys.argv[1:]
    print(json.dumps(child(name, model, *map(int, numbers))))
