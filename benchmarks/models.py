"""The models that the benchmarks run, made once each under build/bench.

    python benchmarks/models.py NAME      make everything of smollm2-135m-instruct or llama-1b

`smollm2-135m-instruct` is a real model. `llama-1b` has TinyLlama's shapes (1.1 billion parameters)
and random weights: speed does not depend on them. Each exists as a Hugging Face directory, from
which kbit quantizes, and as a GGUF file in F16 with the same weights, from which llama.cpp's own
quantizer makes the other types.
"""

import ctypes
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

import kbit
from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.hub import resolve

ROOT = Path(__file__).resolve().parents[1] / "build" / "bench"
NAMES = ("smollm2-135m-instruct", "llama-1b")
LLAMA_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
GGML_LOG_LEVEL_ERROR = 4  # of ggml.h
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Hugging Face Llama's tensors, in the model's order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head
    rows = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    rows |= {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for part in LAYER:
            last = part.rpartition(".")[2]
            shape = (rows[last], inner if last == "down_proj" else hidden) if last in rows else None
            yield f"model.layers.{layer}.{part}.weight", shape or (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_random_llama(folder: Path, config: dict[str, Any]) -> None:
    """config.json and model.safetensors in bfloat16, one tensor in memory at a time."""
    entries, place = {}, 0
    for name, shape in llama_shapes(config):
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # as the safetensors library does: data lies aligned
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for _, shape in llama_shapes(config):
            values = np.ones(shape, np.float32)
            if len(shape) == 2:
                values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            out.write(values.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_f16_gguf(source: Checkpoint, path: Path) -> None:
    """A Llama as llama.cpp reads it; its words are numbers, the benchmarks give token ids."""
    config = source.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([str(i) for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["1 0"])
    names = {}
    for name in source.names():
        stem = name.removesuffix(".weight")
        parts = stem.split(".", 3)
        layered = parts[:2] == ["model", "layers"]
        short = f"blk.{parts[2]}.{LAYER[parts[3]]}" if layered else OUTSIDE[stem]
        dtype = np.dtype(np.float16 if len(source.shape(name)) == 2 else np.float32)
        names[name] = dtype
        nbytes = int(np.prod(source.shape(name))) * dtype.itemsize
        writer.add_tensor_info(f"{short}.weight", source.shape(name), dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dtype in names.items():
        values = np.asarray(source.tensor(name)).astype(dtype)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # ggml rotates neighbouring rows
            count = heads if name.endswith("q_proj.weight") else kv_heads
            halves = values.reshape(count, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.write_tensor_data(np.ascontiguousarray(values))
    writer.close()


def llama_quantize(source: Path, kind: str, path: Path) -> None:
    """llama.cpp's own quantizer, on all cores; of what it prints, only errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def errors_only(level: int, text: bytes, data: Any) -> None:
        if level == GGML_LOG_LEVEL_ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    llama_cpp.llama_log_set(errors_only, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options)
    if failed:
        raise kbit.KbitError(f"llama.cpp could not quantize {source} to {kind}")


def gguf_tensor_bytes(path: Path) -> int:
    """As kbit counts: without the vocabulary and other metadata."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


class Model:
    """One of NAMES; what is asked for is made where it does not exist yet."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, ROOT / name
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def source(self) -> Path:
        """The unquantized Hugging Face directory."""
        if self.name != "llama-1b":
            return resolve(self.name)
        path = self.folder / "source"
        if not path.exists():
            made = _aside(path)
            made.mkdir()
            write_random_llama(made, LLAMA_1B)
            made.rename(path)
        return path

    def kbit(self, bits: int) -> Path:
        """`kbit quantize --bits BITS` with its defaults."""
        path = self.folder / f"kbit-{bits}"
        if not path.exists():
            kbit.quantize(self.source, path, bits=bits)
            for file in path.glob("*.safetensors"):
                _settle(file)
        return path

    def gguf(self, kind: str) -> Path:
        """A GGUF file of one of LLAMA_TYPES."""
        path = self.folder / f"{kind}.gguf"
        if not path.exists():
            made = _aside(path)
            if kind == "F16":
                write_f16_gguf(open_checkpoint(self.source), made)
            else:
                llama_quantize(self.gguf("F16"), kind, made)
            made.rename(path)
            _settle(path)
        return path


def _settle(path: Path) -> None:
    """Out of the page cache, as after a restart: just written, a file lies there in small pages,
    and a large model was decoded from those at two thirds of its speed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _aside(path: Path) -> Path:
    """A free name to write under; what an interrupted run left there is removed."""
    aside = path.with_name(f".{path.name}.partial")
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.unlink(missing_ok=True)
    return aside


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        model = Model(wanted)
        for bits in range(8, 1, -1):
            print(model.kbit(bits), flush=True)
        for kind in LLAMA_TYPES:
            print(model.gguf(kind), flush=True)
