"""One tiny checkpoint of each family a session, and the pipelines of both sides on it, made when first asked for."""

from functools import cache

import checkpoints
import pytest
import torch

from jaxwan.pipelines.pipeline import WanPipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> its checkpoint."""

    @cache
    def make(family):
        path = tmp_path_factory.mktemp(family)
        checkpoints.make_checkpoint(path, family)
        return path

    return make


@pytest.fixture(scope="session")
def reference(folder):
    """(family, dtype, pipeline class) -> diffusers' pipeline."""

    @cache
    def load(family, dtype=torch.float32, cls=None):
        return checkpoints.load_reference(folder(family), family, dtype, cls)

    return load


@pytest.fixture(scope="session")
def pipeline(folder):
    """(family, mesh, dtype) -> ours."""

    @cache
    def load(family, mesh=None, dtype="float32"):
        return WanPipeline.from_pretrained(folder(family), mesh, dtype, progress=False)

    return load
