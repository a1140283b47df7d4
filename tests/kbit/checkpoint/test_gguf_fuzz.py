"""Mutated GGUF files: each is imported or refused with one sentence, never anything else.

The header of the small file below is most of it, so that most mutations meet the reader, the
tensor plan and the vocabulary. The slow form runs the thousands.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from kbit.checkpoint.gguf import import_gguf
from kbit.errors import KbitError

EXTREMES = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
FLOATS = [0x3F800000, 0x7F800000, 0x7FC00000, 0x80000000, 0x00000001, 0x7F7FFFFF]  # 1, inf, nan ..
NAME = re.compile(rb"(llama|tokenizer|general)\.[a-z_.]+|(blk\.0|output_norm|token_embd)[a-z_.]+")
MEMORY_LIMIT_KB = 300 << 10  # growth over all files; one claimed length believed would exceed it


def small_file(path: Path, kind: str) -> bytes:
    """A complete llama file of one layer, without torch: `kind` is gpt2 or llama."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 16,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", " ", "\u2581"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 4, 1] + [6] * 256)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    between = 1 / (np.float32(8192 / (2 * np.pi * 10000**0.75) - 1) / 3 * 7 / 8 + 1 / 8)
    writer.add_tensor("rope_freqs.weight", np.array([1] * 6 + [between, 8], np.float32))
    shapes = {
        "token_embd": (len(tokens), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "output_norm": (32,),
    }
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        if value.ndim == 2:
            packed = gguf.quantize(value, Type.Q4_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=Type.Q4_0)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def change_value(data: bytes, rng: random.Random) -> bytes:
    """Keep the framing: overwrite what follows a key or a tensor's name by other numbers."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([match for match in NAME.finditer(data) if match.end() + 60 < len(data)])
        place = name.end() + rng.choice((0, 4, 4, 4, 8, 12, 16, 20, 4 * rng.randrange(60)))
        value = rng.choice([*EXTREMES, rng.randrange(300), *FLOATS]) & 0xFFFFFFFF
        out[place : place + 4] = struct.pack("<I", value)
        if rng.random() < 0.3:  # a letter of the name or of a string that follows
            out[name.start() + rng.randrange(90)] = rng.randrange(32, 127)
    return bytes(out)


def mutate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return change_value(data, rng)
    out = bytearray(data)
    header = len(data) // 2
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(min(header, len(out)) if rng.random() < 0.9 else len(out))
        match rng.randrange(8):
            case 0:
                out[place] ^= 1 << rng.randrange(8)
            case 1:
                out[place] = rng.randrange(256)
            case 2:
                out[place : place + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 3:
                out[place : place + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
            case 4:
                del out[place : place + rng.randrange(1, 40)]
            case 5:
                out[place:place] = out[place : place + rng.randrange(1, 60)]
            case 6:
                del out[rng.randrange(len(out)) :]
            case 7:
                other = rng.randrange(header)
                size = rng.randrange(1, 30)
                out[place : place + size] = out[other : other + size]
        if len(out) < 64:
            break
    return bytes(out)


@contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(folder: Path, kind: str, seed: int, count: int) -> dict[str, int]:
    data = small_file(folder / "good.gguf", kind)
    import_gguf(folder / "good.gguf", folder / "good")
    before = peak_kb()
    rng = random.Random(seed)
    outcomes = {"imported": 0, "refused": 0}
    path, out = folder / "bad.gguf", folder / "out"
    for number in range(count):
        path.write_bytes(mutate(data, rng))
        sentence = ""
        try:
            with no_hang(30):
                import_gguf(path, out)
        except KbitError as error:
            sentence = str(error)
        if sentence:
            outcomes["refused"] += 1
            assert "\n" not in sentence, number
            assert str(path) in sentence, number
        else:
            outcomes["imported"] += 1
            assert (out / "config.json").exists()
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        left = {entry.name for entry in folder.iterdir()}
        assert left == {"good.gguf", "good", "bad.gguf"}, number
    assert peak_kb() - before < MEMORY_LIMIT_KB
    return outcomes


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    outcomes = run(tmp_path, kind, seed=1, count=200)
    assert outcomes["refused"] > 100
    assert outcomes["imported"] > 5  # else the mutations don't reach what follows the reader


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [2, 3])
def test_thousands_of_mutated_files(kind: str, seed: int, tmp_path: Path) -> None:
    outcomes: dict[str, Any] = run(tmp_path, kind, seed, count=1500)
    print(kind, seed, outcomes)
