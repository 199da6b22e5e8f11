"""A tiny checkpoint of two experts, and one pipeline of it for all tests."""

import checkpoints
import pytest

from jaxwan.pipelines.pipeline import WanPipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t2v-A14B")
    checkpoints.make_checkpoint(path, "t2v-A14B")
    return path


@pytest.fixture(scope="module")
def pipe(folder, optimised):
    return WanPipeline.from_pretrained(folder, "pp=2", progress=False)
