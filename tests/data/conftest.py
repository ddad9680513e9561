from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from hrm_text.data.tokenizer import train_tokenizer

# A busy machine is not a failure.
settings.register_profile("no deadline", deadline=None, max_examples=50)
settings.load_profile("no deadline")

TEXTS = [
    "What is 12 + 30? The answer is 42.",
    "Reverse the word hello: olleh. <|im_start|> <|im_end|> <|box_end|> <|quad_end|> <think> </think>",
    "Une école à Zürich, naïve café; 東京は大きい。",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Text that names special tokens is part of the training text: no merge may lead to one of them.
    return train_tokenizer(iter(TEXTS * 20), 400, tmp_path_factory.mktemp("tokenizer") / "bpe")
