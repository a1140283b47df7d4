"""Mutated checkpoints: a sentence or the truth, never a crash, a hang or unbounded memory.

A mutated plain checkpoint may still be a valid other one; then everything in it must be readable.
Of a kbit checkpoint nothing may change unnoticed: either opening refuses it, or `verify` names a
damaged tensor, or the mutation touched neither weights nor their description.
"""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import kbit
from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.checkpoint.verify import verify_checkpoint
from kbit_kernels import QuantizedTensor, dequantize
from kbit_kernels.errors import KbitError
from tests.kbit.checkpoint.build import write_llama

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))]
MUTATIONS_PER_SEED = 100
FILES = {
    "plain": ["model.safetensors", "config.json"],
    "sharded": ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    "kbit": ["model.safetensors", "config.json"],
}
NUMBERS = [
    b"-1",
    b"0",
    b"1",
    b"7",
    b"4294967296",
    b"9223372036854775808",
    b"1e400",
    b"0.5",
    b"null",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("originals")
    plain = write_llama(base / "plain", num_hidden_layers=1)
    sharded = write_llama(base / "sharded", shards=2, num_hidden_layers=1)
    recipe = base / "recipe.toml"
    recipe.write_text(
        """default = "uint3-b32-dq"
        rules = [
            {tensors = "*.q_proj.weight", spec = "lloyd2-b16"},
            {tensors = "*.o_proj.weight", spec = "int5-row-center-out0.1"},
        ]"""
    )
    kbit.quantize(plain, base / "kbit", recipe=recipe)
    return {"plain": plain, "sharded": sharded, "kbit": base / "kbit"}


def _mutate(rng: random.Random, data: bytes, text_bytes: int) -> bytes:
    """One damage; `text_bytes` is how far the JSON reaches, where damage is most telling."""
    bad = bytearray(data)
    reach = text_bytes if rng.random() < 0.7 else len(data)
    at = rng.randrange(max(reach, 1))
    kind = rng.randrange(8)
    if kind == 0:
        bad[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        bad[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 2:
        del bad[at:]
    elif kind == 3:
        del bad[at : at + rng.randrange(1, 64)]
    elif kind == 4:
        bad[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == 5:  # a number in the JSON becomes another
        digits = [i for i in range(at, min(at + 200, len(bad))) if 48 <= bad[i] <= 57]
        if digits:
            stop = digits[0]
            while stop < len(bad) and 48 <= bad[stop] <= 57:
                stop += 1
            bad[digits[0] : stop] = rng.choice(NUMBERS)
    elif kind == 6:  # a piece lands elsewhere
        piece = bad[at : at + rng.randrange(1, 80)]
        to = rng.randrange(max(reach, 1))
        bad[to : to + len(piece)] = piece
    else:
        length = rng.choice([0, 1, len(data), len(data) - 8, 1 << 31, (1 << 64) - 1])
        bad[:8] = length.to_bytes(8, "little")
    return bytes(bad)


def _read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert tuple(checkpoint.shape(name)) == tensor.shape
        if isinstance(tensor, QuantizedTensor):
            with np.errstate(all="ignore"):
                dequantize(tensor)
        else:
            tensor.tobytes()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_checkpoints(
    originals: dict[str, Path], tmp_path: Path, kind: str, seed: int
) -> None:
    rng = random.Random(f"{kind}{seed}")
    original = originals[kind]
    intact = open_checkpoint(original)
    truth = {name: intact.tensor(name) for name in intact.names()}
    target = tmp_path / "model"
    target.mkdir()
    for path in original.iterdir():
        (target / path.name).symlink_to(path)
    for _ in range(MUTATIONS_PER_SEED):
        name = rng.choice(FILES[kind])
        data = (original / name).read_bytes()
        text_bytes = len(data) if name.endswith("json") else int.from_bytes(data[:8], "little") + 8
        bad = _mutate(rng, data, text_bytes)
        (target / name).unlink()  # a new file each time: a mapping of the old one stays whole
        (target / name).write_bytes(bad)
        try:
            checkpoint = open_checkpoint(target)
            _read_all(checkpoint)
        except KbitError as error:
            assert len(str(error)) < 2000  # noqa: PT017
            assert str(target) in str(error)  # noqa: PT017
        else:
            if kind == "kbit" and name.endswith("safetensors") and bad != data:
                assert verify_checkpoint(checkpoint), "changed bytes went unnoticed"
            if kind == "kbit" and name.endswith("json") and not verify_checkpoint(checkpoint):
                assert _same(checkpoint, truth), "another description went unnoticed"
        (target / name).unlink()
        (target / name).symlink_to(original / name)


def _same(checkpoint: Checkpoint, truth: dict[str, np.ndarray | QuantizedTensor]) -> bool:
    def raw(tensor: np.ndarray | QuantizedTensor) -> bytes:
        return (dequantize(tensor) if isinstance(tensor, QuantizedTensor) else tensor).tobytes()

    return set(checkpoint.names()) == set(truth) and all(
        raw(checkpoint.tensor(name)) == raw(tensor) for name, tensor in truth.items()
    )


def test_a_lying_header_costs_no_memory(originals: dict[str, Path], tmp_path: Path) -> None:
    """Lengths and shapes of terabytes are refused before anything of the size is made."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").symlink_to(originals["kbit"] / "config.json")
    huge = {"t": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(huge).encode()
    config = json.loads((originals["kbit"] / "config.json").read_text())
    tensors = config["quantization_config"]["tensors"]
    for entry in tensors.values():
        entry["shape"] = [1 << 20, 1 << 20]
    tracemalloc.start()
    try:
        for length in (len(text), 1 << 40):
            raw = length.to_bytes(8, "little") + text
            (target / "model.safetensors").write_bytes(raw)
            with pytest.raises(KbitError):
                open_checkpoint(target)
            (target / "model.safetensors").unlink()
        (target / "model.safetensors").symlink_to(originals["kbit"] / "model.safetensors")
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps(config))
        with pytest.raises(KbitError):
            open_checkpoint(target)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
