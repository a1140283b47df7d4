"""`kbit family train`: every size of a preset, resumable, checkpoints at doubling token counts.

The learning rate is held after the warm-up and falls to a tenth over the last fifth before every
checkpoint, after which training goes on at the full rate. So each checkpoint is annealed and a
longer run adds checkpoints without repeating the shorter one.

    OUT/family.json              what was asked for; a run with other settings is refused
    OUT/tokenizer.json           one tokenizer for all
    OUT/s0/tokens-131072/        a Hugging Face checkpoint, with training.json beside the weights
    OUT/s0/state.safetensors     where to resume; gone when the size is done
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kbit.errors import KbitError

from . import data, model
from .presets import Preset, Size

WARMUP_STEPS = 40
DECAY_SHARE = 0.2
FINAL_RATE = 0.1
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
VALIDATION_WINDOWS = 64
SAVE_SECONDS = 60.0
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """What a caller may show after a step."""

    size: str
    tokens: int
    total_tokens: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: where it lies, tokens seen, validation loss in nats per token."""

    path: Path
    size: str
    tokens: int
    loss: float


def rate(step: int, peak: float, milestone_steps: tuple[int, ...]) -> float:
    """Learning rate of step 0, 1, ...; milestone_steps: steps done at each checkpoint."""
    end = next((m for m in milestone_steps if step < m), milestone_steps[-1])
    begin = max((m for m in milestone_steps if m <= step), default=0)
    decay = max(1, round(DECAY_SHARE * (end - begin)))
    left = end - step
    share = 1.0 if left > decay else FINAL_RATE + (1 - FINAL_RATE) * (left - 1) / decay
    # After a checkpoint the rate climbs back as it did at the start, not in one jump.
    warm = min(1.0, (step - begin + 1) / min(WARMUP_STEPS, max(1, (end - begin) // 4)))
    return peak * min(share, warm)


class _Trainer:
    """One size: parameters, AdamW and the place to resume from."""

    def __init__(self, size: Size, preset: Preset, folder: Path, seed: int, device: str):
        self.size, self.preset, self.folder, self.device = size, preset, folder, device
        self.params = model.init(size, preset.vocab, seed, device)
        decayed = [p for p in self.params.values() if p.ndim == 2]
        plain = [p for p in self.params.values() if p.ndim == 1]
        groups = [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = device != "cpu"
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)
        self.step = 0
        self.state_path = folder / "state.safetensors"

    def resume(self) -> None:
        """Goes on from the saved state, if there is one."""
        if not self.state_path.exists():
            return
        with safe_open(str(self.state_path), "pt", device=self.device) as file:
            self.step = int(file.metadata()["step"])
            for name, p in self.params.items():
                p.data.copy_(file.get_tensor(f"{name}/p"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step), device=self._step_device()),
                    "exp_avg": file.get_tensor(f"{name}/m"),
                    "exp_avg_sq": file.get_tensor(f"{name}/v"),
                }

    def _step_device(self) -> str:
        return "cpu" if self.device == "cpu" else self.device

    def save_state(self) -> None:
        tensors = {}
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            tensors[f"{name}/p"] = p.data
            tensors[f"{name}/m"], tensors[f"{name}/v"] = state["exp_avg"], state["exp_avg_sq"]
        aside = self.state_path.with_suffix(".part")
        save_file(tensors, str(aside), metadata={"step": str(self.step)})
        aside.replace(self.state_path)

    def train_step(self, window: np.ndarray, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        tokens = torch.from_numpy(window).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            loss = model.loss(self.params, self.size, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), CLIP)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, windows: np.ndarray) -> float:
        total = 0.0
        for part in np.array_split(windows, max(1, len(windows) // 16)):
            tokens = torch.from_numpy(part).to(self.device)
            total += float(model.loss(self.params, self.size, tokens)) * len(part)
        return total / len(windows)

    def save_checkpoint(self, loss: float, tokenizer: Path, notes: dict[str, Any]) -> Checkpoint:
        tokens = self.step * self.preset.tokens_per_step
        path = self.folder / f"tokens-{tokens}"
        aside = path.with_name(path.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        half = {name: p.data.half().cpu().contiguous() for name, p in self.params.items()}
        save_file(half, str(aside / "model.safetensors"), metadata={"format": "pt"})
        special = {"bos_token": data.END_OF_TEXT, "eos_token": data.END_OF_TEXT}
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.preset.context,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        training = {
            "tokens": tokens,
            "non_embedding_parameters": self.size.non_embedding,
            "parameters": self.size.total(self.preset.vocab),
            "validation_nats_per_token": loss,
            **notes,
        }
        config = model.config(self.size, self.preset.vocab, self.preset.context)
        for name, content in (
            ("config.json", config),
            ("tokenizer_config.json", tokenizer_config),
            ("training.json", training),
        ):
            (aside / name).write_text(json.dumps(content, indent=2) + "\n")
        shutil.copy(tokenizer, aside / "tokenizer.json")
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
        return Checkpoint(path, self.size.name, tokens, loss)


def _manifest(out: Path, preset: Preset, texts: str, seed: int) -> None:
    """Writes what this family is, or refuses to mix two families in one folder. More tokens of the
    same family are welcome."""
    path = out / "family.json"
    asked = asdict(preset) | {"format": _FORMAT, "texts": texts, "seed": seed}
    fixed = ("format", "texts", "seed", "vocab", "context", "batch", "first_tokens")
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise KbitError(f"{path}: not readable as JSON ({error}); use another --out") from error
        for name in fixed:
            if found.get(name) != asked[name]:
                raise KbitError(
                    f"{path}: this family was started with {name} = {found.get(name)!r}, now "
                    f"{asked[name]!r} is asked for; use another --out"
                )
        if found["tokens"] > asked["tokens"]:
            return
    path.write_text(json.dumps(asked, indent=2) + "\n")


def train(
    preset: Preset,
    texts: list[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
    stop_after_s: float | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> bool:
    """Trains every size of the preset that is not finished; True if all are.

    tokenizer: an existing tokenizer.json instead of a new one. workers: sizes trained side by side,
    each by torch's number of threads; the callbacks come from their threads. stop_after_s: save the
    state and return False after so many seconds; the next call goes on where this one stopped.
    """
    data.check_texts(texts)
    out.mkdir(parents=True, exist_ok=True)
    _manifest(out, preset, data.texts_hash(texts), seed)
    vocabulary = out / "tokenizer.json"
    if not vocabulary.exists():
        if tokenizer is None:
            data.train_tokenizer(texts, preset.vocab, vocabulary)
        else:
            shutil.copy(tokenizer, vocabulary)
    tokens = data.encode(texts, vocabulary, out / "tokens.u16")
    held_out = min(len(tokens) // 20, VALIDATION_WINDOWS * (preset.context + 1))
    if held_out < preset.context + 1:
        need = 20 * (preset.context + 1)
        raise KbitError(f"the text has {len(tokens)} tokens; at least {need} are needed")
    windows = held_out // (preset.context + 1)
    split = len(tokens) - windows * (preset.context + 1)
    validation = tokens[split:].reshape(windows, -1).astype(np.int64)
    notes = {"preset": preset.name, "seed": seed, "texts": data.texts_hash(texts)}
    deadline = time.monotonic() + stop_after_s if stop_after_s is not None else float("inf")
    milestones = preset.milestones()
    marks = tuple(mark // preset.tokens_per_step for mark in milestones)
    left = [s for s in preset.sizes if not (out / s.name / f"tokens-{milestones[-1]}").exists()]
    if workers > 1:  # the one that takes longest first
        left.sort(key=lambda size: size.non_embedding, reverse=True)
    stop = threading.Event()

    def one(size: Size) -> bool:
        folder = out / size.name
        folder.mkdir(exist_ok=True)
        trainer = _Trainer(size, preset, folder, seed, device)
        trainer.resume()
        begun, begun_step = time.monotonic(), trainer.step
        saved = begun
        while trainer.step < marks[-1]:
            step = trainer.step
            window = data.batch(
                tokens[:split], step, windows=preset.batch, context=preset.context, seed=seed
            )
            value = trainer.train_step(window, rate(step, size.peak_rate(), marks))
            if not np.isfinite(value):
                raise KbitError(f"{folder}: the loss is {value} at step {step}; lower the rate")
            now = time.monotonic()
            speed = (trainer.step - begun_step) * preset.tokens_per_step / (now - begun)
            done = trainer.step * preset.tokens_per_step
            on_step(Progress(size.name, done, milestones[-1], value, speed))
            if trainer.step in marks:
                loss = trainer.validate(validation)
                on_checkpoint(trainer.save_checkpoint(loss, vocabulary, notes))
            if now > deadline or stop.is_set():
                trainer.save_state()
                return False
            if now - saved > SAVE_SECONDS or trainer.step in marks:
                trainer.save_state()
                saved = now
        return True

    # Threads do: nearly all of a step is spent inside torch, which lets the others run.
    pool = ThreadPoolExecutor(workers)
    try:
        return all(done.result() for done in as_completed(pool.submit(one, s) for s in left))
    finally:  # after Ctrl-C or an error of one size, the others save where they are
        stop.set()
        pool.shutdown(cancel_futures=True)
