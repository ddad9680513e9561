from __future__ import annotations

from pathlib import Path

import pytest

from hrm_text.data.tokenizer import train_tokenizer

TEXTS = ["What is 12 + 7?", "The sum is 19.", "Grüße 🙂🙃 aus Köln", "数を逆に読む", "reverse the word apple"] * 3


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(iter(TEXTS), 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer")
