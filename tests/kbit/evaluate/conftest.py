"""A tiny model for the evaluations, with and without BOS."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the peer that evaluations are compared with")

import torch

import kbit
from kbit.engine.model import Model
from tests.kbit.speaker import write_model

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture(scope="session", params=[True, False], ids=["bos", "no-bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_model(tmp_path_factory.mktemp("scored"), context=48, add_bos=request.param)
    return kbit.load(path, backend="torch")


@pytest.fixture(scope="session")
def quantized(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out: Path = tmp_path_factory.mktemp("quantized") / "q4"
    kbit.quantize(model.checkpoint.path, out, bits=4)
    return kbit.load(out, backend="torch")
