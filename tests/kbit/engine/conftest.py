"""Tokenizers and a model small enough to make for each run."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the peer that the engine is compared with")

import torch

import kbit
from kbit.engine.model import Model
from tests.kbit.speaker import write_model

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="session")
def model(model_path: Path) -> Model:
    return kbit.load(model_path, backend="torch")
