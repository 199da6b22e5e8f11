"""What several tests of the bundled model share."""

import pytest

from jaxwan.pipelines.prompt import load_tokenizer
from jaxwan.tiny.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)
