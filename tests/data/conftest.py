"""A small random model that can write."""

import pytest

from ctxext.model.load import load_model


@pytest.fixture(scope="session")
def loaded_small(model_dir):
    return load_model(model_dir(), device="cpu")
