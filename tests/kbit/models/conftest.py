"""One tiny model of transformers a case, shared by the tests of a module."""

from collections.abc import Callable

import pytest

pytest.importorskip("transformers", reason="the peer that the decoders are compared with")

import torch

from tests.kbit.models.tiny import CASES, Tiny, make

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """name of a case -> the model, made at the first call."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("tiny"))
        return made[name]

    return get


@pytest.fixture(params=sorted(CASES))
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[[str], Tiny]) -> Tiny:
    """Each case in turn."""
    return tiny_model(request.param)
