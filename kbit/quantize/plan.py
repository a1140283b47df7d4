"""What quantizing a checkpoint will do, decided and checked before the first byte is written.

Without a recipe every linear layer, the embeddings and the head get the same spec; a tied head
stays tied, being the embedding. More bits for the embeddings than for the rest buy what the same
bytes buy elsewhere: on books-s2 (37 percent embeddings, KL in nats per token, 2,048 tokens)
nf3 everywhere is .0811 at 3.32 bits and nf4 .0186 at 4.32; nf3 with nf4 embeddings is .0503 at
3.69, where the line between those two is at .0469; nf4 with int5 embeddings is .0105 at 4.69 (line
.0111). 16-bit embeddings would more than double the size (8.03 bits) for .0387. Fewer bits for
them do harm: nf4 with nf3 embeddings is .0494 at 3.95 (line .0322). Norms, biases and learned
positions are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import kbit
from kbit.checkpoint.format import FORMAT_VERSION, part_name, sha256
from kbit.checkpoint.reader import Checkpoint
from kbit.checkpoint.safetensors import DTYPES
from kbit.checkpoint.writer import Parts
from kbit.models import describe, describe_checkpoint
from kbit.quantize.recipe import ROLES, Recipe
from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import SCALE_DTYPES, expected_parts

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Task:
    """One tensor: quantized under `spec` as [out, in], or kept (`spec` None, `shape` as stored)."""

    name: str
    role: str
    spec: QuantSpec | None
    shape: tuple[int, ...]
    transposed: bool
    source_bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """All tensors of the output in order; `dropped` are those of the source that nothing reads."""

    tasks: tuple[Task, ...]
    dropped: tuple[str, ...]
    method: str
    search: bool
    identity: str  # sha256 over source and options: work done under another is not reused

    @property
    def source_bytes(self) -> int:
        return sum(task.source_bytes for task in self.tasks)

    def parts(self, source: Checkpoint) -> dict[str, Parts]:
        """Logical name -> stored name -> dtype and shape, for the layout."""
        return {
            task.name: (
                {task.name: (source.dtype(task.name), task.shape)}
                if task.spec is None
                else {
                    part_name(task.name, suffix): part
                    for suffix, part in expected_parts(task.spec, _matrix(task)).items()
                }
            )
            for task in self.tasks
        }


def _matrix(task: Task) -> tuple[int, int]:
    return task.shape[0], task.shape[1]


def make_plan(
    source: Checkpoint, recipe: Recipe, default: QuantSpec, method: str, search: bool
) -> Plan:
    """Decide every tensor's fate.

    Raises KbitError for a source that is quantized already, an architecture kbit does not know,
    tensors that are missing, unknown or of another shape than config.json implies, weights of a
    dtype that cannot be quantized, and a rule that matches nothing.
    """
    if source.quantization is not None:
        raise KbitError(
            f"{source.path}: is quantized already; quantize the original, since a second rounding "
            "only adds error"
        )
    names = source.names()
    duplicate = _duplicate_head(source)
    decoder = describe_checkpoint(source, [name for name in names if name != duplicate])
    for name, info in decoder.tensors.items():
        if source.shape(name) != info.shape:
            raise KbitError(
                f"{source.path}: tensor {name!r} has the shape {list(source.shape(name))}, but by "
                f"config.json it is {list(info.shape)}"
            )
    roles: dict[str, str] = {
        name: info.role for name, info in decoder.tensors.items() if info.role in ROLES
    }
    for name in roles:
        if source.dtype(name) not in SCALE_DTYPES.values():
            raise KbitError(
                f"{source.path}: tensor {name!r} is {source.entry(name).dtype}, which is not "
                "quantized; weights have to be F32, F16 or BF16"
            )
    specs = recipe.assign(roles, default)
    tasks: list[Task] = []
    dropped: list[str] = []
    for name in names:
        if name not in decoder.tensors:  # buffers that nothing reads; a head stored a second time
            dropped.append(name)
            continue
        info, spec = decoder.tensors[name], specs.get(name)
        transposed = info.transposed and spec is not None
        shape = info.shape[::-1] if transposed else info.shape
        tasks.append(Task(name, info.role, spec, shape, transposed, source.nbytes(name)))
    return Plan(
        tuple(tasks), tuple(dropped), method, search, _identity(source, tasks, method, search)
    )


def _duplicate_head(source: Checkpoint) -> str | None:
    """A tied head that the source stores all the same, byte for byte the embedding: left out, so
    that tied stays tied."""
    decoder = describe_checkpoint(source)
    if not describe(source.config).tied:
        return None
    head, embedding = decoder.head.weight, decoder.embedding
    if decoder.tied or source.shape(head) != source.shape(embedding):
        return None
    return head if source.data(head) == source.data(embedding) else None


def _identity(source: Checkpoint, tasks: list[Task], method: str, search: bool) -> str:
    files: Mapping[str, object] = {
        name: (sha256(file.header), file.path.stat().st_size, file.path.stat().st_mtime_ns)
        for name, file in source.files.items()
    }
    work = [(task.name, str(task.spec), task.shape, task.transposed) for task in tasks]
    told = [FORMAT_VERSION, kbit.__version__, files, work, method, search]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def is_float(dtype: str) -> bool:
    """Whether a safetensors dtype can hold NaN and infinity."""
    assert dtype in DTYPES, dtype
    return dtype in FLOAT_DTYPES
