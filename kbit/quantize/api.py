"""`kbit.quantize`: from a model to a kbit checkpoint in one call."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.checkpoint.writer import check_replaceable, plan_layout
from kbit.engine.memory import peak_memory_bytes
from kbit.quantize.methods import get_method
from kbit.quantize.pipeline import Pipeline, default_threads
from kbit.quantize.plan import Plan, make_plan
from kbit.quantize.progress import Progress, Silent
from kbit.quantize.recipe import Recipe, read_recipe
from kbit.quantize.workdir import WorkDirectory
from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec

DEFAULT_BITS = 4
DEFAULT_METHOD = "rtn"


def default_dtype(bits: int) -> str:
    """The data type of `--bits k` where none is named: of least KL divergence at its size.

    Measured on stories260k, books-s2 and books-s4 (block 64, 8,192 tokens, KL in nats per token to
    the unquantized model; books-s2 below, the others rank the same):

        bits   int      uint (+0.16 bits)   nf       dynamic  lloyd
        2      1.711    .478                1.234    .497     .391
        3      .1213    .0722               .0813    .1433    .0714
        4      .0226    .0154               .0183    .0412    .0159
        5      .00459   .00365              .00496   .01030   .00360
        8      .000071  .000052             .000531  .000174  .000051

    nf2 has three useful values and fails (4.7 on books-s4, where lloyd2 has .234), so 2 bits take
    the learned codebook. At 3 and 4 bits lloyd's lead over nf is an eighth, less than half of what
    `--search` gives nf, and not worth a table for each tensor. From 5 bits on int is better than
    nf, level with uint at equal size, and needs no table at all.
    """
    return "lloyd" if bits == 2 else "nf" if bits <= 4 else "int"


@dataclass(frozen=True)
class QuantizeResult:
    """What was written. Bytes count tensors only, kept ones included; `bits_per_param` is all of
    them times 8 over all parameters."""

    path: Path
    spec: str  # the default; a recipe may give single tensors others
    method: str
    parameters: int
    source_bytes: int
    bytes: int
    bits_per_param: float
    quantized_tensors: int
    quantized_specs: dict[str, int]  # spec -> tensors stored in it
    kept_tensors: int
    kept_roles: dict[str, int]  # role (norm, bias, ...) -> tensors kept as they were
    kept_bytes: int
    dropped_tensors: tuple[str, ...]
    resumed_tensors: int  # taken over from a run that was interrupted
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    bits: int | None = None,
    *,
    dtype: str | None = None,
    block: int | None = None,
    exponent: int | None = None,
    scale_dtype: str | None = None,
    double_quant: bool = False,
    center: bool = False,
    outliers: float = 0.0,
    spec: str | QuantSpec | None = None,
    search: bool | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    method: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a model and write it as a kbit checkpoint directory.

    Args:
        model: a checkpoint directory, a .gguf file, an alias or a Hugging Face id.
        out: the directory to write; None: MODEL-SPEC in the current directory.
        bits, dtype, block, exponent, scale_dtype, double_quant, center, outliers: the QuantSpec
            of every tensor that no rule of the recipe takes (default: 4 bits, `default_dtype`,
            block 64, fp16 scales). block 0 is the whole row.
        spec: the same in one string, such as "nf4-b64"; excludes those above.
        search: choose each block's scale for the least squared error (default: no).
        recipe: a TOML file or a Recipe.
        method: a module of kbit.quantize.methods (default "rtn").
        force: replace an existing checkpoint, in one step when the new one is whole.
        threads: default: the cores this process may use.
        progress: default: silent.

    The work lies in `.OUT.partial` until it is whole; after an interruption the same call resumes.
    Raises KbitError for everything that a user can mend; nothing then lies under the output's name.
    """
    began = time.monotonic()
    progress = progress or Silent()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe)) if recipe else None
    recipe = recipe or Recipe()
    options = {
        "bits": bits,
        "dtype": dtype,
        "block": block,
        "exponent": exponent,
        "scale_dtype": scale_dtype,
        "double_quant": double_quant or None,
        "center": center or None,
        "outliers": outliers or None,
    }
    default = _default_spec(spec, {k: v for k, v in options.items() if v is not None}, recipe)
    if threads is not None and threads < 1:
        raise KbitError(f"threads is {threads}; at least one is needed")
    method = method or recipe.method or DEFAULT_METHOD
    get_method(method)
    search = bool(recipe.search if search is None else search)
    source_path = resolve_model(model)
    target = Path(out) if out is not None else default_output(model, source_path, default, recipe)
    target = Path(os.path.abspath(target))
    check_replaceable(target, force)
    _check_apart(source_path, target)
    source = open_checkpoint(source_path)
    plan = make_plan(source, recipe, default, method, search)
    with closing(progress):
        resumed = _write(source, plan, target, force, threads or default_threads(), progress)
    return _result(source, plan, target, default, resumed, time.monotonic() - began)


def _default_spec(
    spec: str | QuantSpec | None, options: dict[str, Any], recipe: Recipe
) -> QuantSpec:
    if spec is not None:
        if options:
            raise KbitError(f"spec says everything; leave out {', '.join(options)}")
        return spec if isinstance(spec, QuantSpec) else QuantSpec.parse(spec)
    if not options and recipe.default is not None:
        return recipe.default
    bits = options.setdefault("bits", DEFAULT_BITS)
    if type(bits) is int and 2 <= bits <= 8:
        options.setdefault("dtype", default_dtype(bits))
    return QuantSpec(**options)


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The checkpoint directory of a path, .gguf file, alias or hub id (kbit.hub fetches it)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from kbit.hub import resolve

    return Path(resolve(str(model)))


def default_output(
    model: str | os.PathLike[str], source: Path, spec: QuantSpec, recipe: Recipe
) -> Path:
    """MODEL-SPEC in the current directory, such as SmolLM2-135M-nf4-b64."""
    given = Path(model)
    name = (source.resolve() if given.is_dir() else given).name.removesuffix(".gguf")
    name = name.partition("@")[0] if not given.exists() else name  # OWNER/NAME@REVISION
    return Path(f"{name}-{spec}" + ("-recipe" if recipe.rules else ""))


def _check_apart(source: Path, target: Path) -> None:
    real_source, real_target = source.resolve(), target.resolve()
    if real_source.is_relative_to(real_target) or real_target.is_relative_to(real_source):
        raise KbitError(f"{target}: overlaps the model's own directory {source}; choose another -o")


def _write(
    source: Checkpoint, plan: Plan, target: Path, force: bool, threads: int, progress: Progress
) -> int:
    layout = plan_layout(plan.parts(source))
    try:
        work = WorkDirectory(target, plan.identity, force)
    except OSError as error:
        raise _plain(error, target, layout.nbytes) from error
    try:
        if work.done:
            progress.note(f"resuming: {len(work.done)} of {len(plan.tasks)} tensors are there")
        resumed = Pipeline(source, plan, layout, work, threads, progress).run()
        work.publish()
    except OSError as error:
        work.leave() if work.done else work.discard()
        raise _plain(error, target, layout.nbytes) from error
    except Exception:  # the same command would fail again: nothing to resume
        work.discard()
        raise
    except BaseException:  # Ctrl-C
        if work.done:
            progress.note(
                f"stopped with {len(work.done)} of {len(plan.tasks)} tensors finished; "
                "the same command goes on from there"
            )
        work.leave() if work.done else work.discard()
        raise
    return resumed


def _plain(error: OSError, target: Path, needed_bytes: int) -> KbitError:
    """A sentence for an operating system's error on the way to the output."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        if target.parent.exists():
            free = f", {shutil.disk_usage(target.parent).free / 1e6:.0f} MB are free"
        return KbitError(
            f"{target}: the disk is full ({needed_bytes / 1e6:.0f} MB are needed{free}); make room "
            "and run the same command again"
        )
    where = error.filename if error.filename and error.filename != str(target) else ""
    return KbitError(f"{target}: cannot be written ({reason}{f': {where}' if where else ''})")


def _result(
    source: Checkpoint, plan: Plan, target: Path, default: QuantSpec, resumed: int, seconds: float
) -> QuantizeResult:
    written = open_checkpoint(target)
    sizes = {task.name: written.nbytes(task.name) for task in plan.tasks}
    parameters = sum(task.parameters for task in plan.tasks)
    kept = [task for task in plan.tasks if task.spec is None]
    specs = Counter(str(task.spec) for task in plan.tasks if task.spec is not None)
    total = sum(sizes.values())
    return QuantizeResult(
        path=target,
        spec=str(default),
        method=plan.method,
        parameters=parameters,
        source_bytes=plan.source_bytes,
        bytes=total,
        bits_per_param=8.0 * total / max(parameters, 1),
        quantized_tensors=specs.total(),
        quantized_specs=dict(specs.most_common()),
        kept_tensors=len(kept),
        kept_roles=dict(Counter(task.role for task in kept)),
        kept_bytes=sum(sizes[task.name] for task in kept),
        dropped_tensors=plan.dropped,
        resumed_tensors=resumed,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )
