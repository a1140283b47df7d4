"""`kbit family train`: it learns, it resumes exactly, and what it writes others read."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kbit.errors import KbitError
from kbit_scaling.family import data, model
from kbit_scaling.family.presets import PRESETS, get_preset
from kbit_scaling.family.train import Checkpoint, _Trainer, rate, train

from .conftest import PRESET, Tiny, words

SMALL = replace(PRESET.with_sizes(("s0",)), tokens=4096, first_tokens=1024)


def run(folder: Path, tiny: Tiny, **options: object) -> list[Checkpoint]:
    torch.set_num_threads(1)
    found: list[Checkpoint] = []
    train(SMALL, [tiny.text], folder, on_checkpoint=found.append, **options)  # type: ignore[arg-type]
    return found


def weights(folder: Path) -> bytes:
    return (folder / "s0" / "tokens-4096" / "model.safetensors").read_bytes()


def test_training_learns_and_keeps_checkpoints_at_doublings(tiny: Tiny, tmp_path: Path) -> None:
    found = run(tmp_path, tiny)
    assert [c.tokens for c in found] == [1024, 2048, 4096]
    assert found[-1].loss < found[0].loss < np.log(320)


def test_an_interrupted_training_ends_in_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    run(tmp_path / "whole", tiny)
    calls = 0
    while not (tmp_path / "parts/s0/tokens-4096").exists():
        run(tmp_path / "parts", tiny, stop_after_s=0.0)  # one step a call
        calls += 1
        assert calls <= 16
    assert calls == 16
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert run(tmp_path / "parts", tiny) == []  # nothing left to do


def test_sizes_side_by_side_end_in_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    family = replace(SMALL, sizes=PRESET.sizes)
    for workers in (1, 2):
        assert train(family, [tiny.text], tmp_path / f"{workers}", workers=workers)
    for size in ("s0", "s1"):
        alone, beside = (tmp_path / w / size / "tokens-4096/model.safetensors" for w in "12")
        assert alone.read_bytes() == beside.read_bytes()


def test_an_error_in_one_size_ends_the_others_where_they_can_go_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_run = threading.Barrier(2)
    original = _Trainer.train_step

    def step(self: _Trainer, window: np.ndarray, rate: float) -> float:
        if self.step == 0:
            both_run.wait(60)
        return float("nan") if self.size.name == "s0" else original(self, window, rate)

    monkeypatch.setattr(_Trainer, "train_step", step)
    family = replace(SMALL, sizes=PRESET.sizes, tokens=1 << 20)
    with pytest.raises(KbitError, match="the loss is nan"):
        train(family, [tiny.text], tmp_path, workers=2)
    assert (tmp_path / "s1" / "state.safetensors").exists()


def test_another_seed_or_text_needs_another_folder(tiny: Tiny, tmp_path: Path) -> None:
    run(tmp_path, tiny, stop_after_s=0.0)
    with pytest.raises(KbitError, match="started with seed = 0, now 1"):
        run(tmp_path, tiny, seed=1)


def test_transformers_reads_the_same_logits(tiny: Tiny) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.models[1], dtype=torch.float32
    ).eval()
    params = {k: v.float() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (2, 40)))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = model.forward(params, PRESET.sizes[1], tokens)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_tied_loss_and_its_gradients_are_those_of_autograd() -> None:
    params = model.init(PRESET.sizes[0], 320, 0, "cpu")
    window = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (11, 65)))
    logits = model.forward(params, PRESET.sizes[0], window[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    found = model.loss(params, PRESET.sizes[0], window)  # 704 rows: more than one piece
    torch.testing.assert_close(found, expected)
    every = list(params.values())
    for a, b in zip(
        torch.autograd.grad(found, every), torch.autograd.grad(expected, every), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_rate_is_annealed_at_every_checkpoint() -> None:
    marks = (100, 200, 400)
    rates = [rate(step, 1.0, marks) for step in range(400)]
    for mark in marks:
        assert rates[mark - 1] == pytest.approx(0.1)
    assert rates[50] == rates[150] == rates[300] == 1.0
    assert max(rates) == 1.0


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one = data.batch(tokens, 3, windows=4, context=16, seed=0)
    np.testing.assert_array_equal(one, data.batch(tokens, 3, windows=4, context=16, seed=0))
    assert not np.array_equal(one, data.batch(tokens, 4, windows=4, context=16, seed=0))
    assert one.shape == (4, 17)
    np.testing.assert_array_equal(np.diff(one), 1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_five_rising_sizes(name: str) -> None:
    preset = get_preset(name)
    totals = [size.total(preset.vocab) for size in preset.sizes]
    assert len(totals) == 5
    assert totals == sorted(totals)
    for size in preset.sizes:
        assert size.width % size.heads == 0
        assert (size.width // size.heads) % 2 == 0
    assert preset.milestones()[-1] == preset.tokens


def test_parameter_counts_are_those_of_the_tensors() -> None:
    for size in PRESET.sizes:
        params = model.init(size, 320, 0, "cpu")
        assert size.total(320) == sum(p.numel() for p in params.values())


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    empty, short, binary = (tmp_path / name for name in ("empty", "short", "binary"))
    empty.touch()
    short.write_text(words(400))
    binary.write_bytes(b"\xff\xfe" * 400)
    for text, message in ((tmp_path / "none", "no such text"), (empty, "is empty"),
                          (short, "tokens"), (binary, "not UTF-8")):  # fmt: skip
        with pytest.raises(KbitError, match=message):
            train(SMALL, [text], tmp_path / f"out-{text.name}")
    with pytest.raises(KbitError, match="no preset named 'phone'; known presets: pocket"):
        get_preset("phone")
    with pytest.raises(KbitError, match="no size 's9'; its sizes: s0"):
        PRESET.with_sizes(("s9",))
