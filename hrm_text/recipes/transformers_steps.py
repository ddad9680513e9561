"""How fast Transformers takes a decoding step of a model of ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrm_text.contracts import UserError
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.model.weights import write_weights

SPECIAL_IDS = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}


class Theirs:
    """Transformers' model of the same weights."""

    def __init__(self, module: RecurrentLM, dtype: torch.dtype, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils.logging import disable_progress_bar
        except ImportError:
            raise UserError('--vs transformers needs the extra hf: pip install "hrm-text[hf]"') from None
        with tempfile.TemporaryDirectory() as folder:
            write_weights(Path(folder), module.config, module.state_dict(), dtype, SPECIAL_IDS)
            disable_progress_bar()
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.device = device

    def step_ms(self, prompts: Sequence[Sequence[int]], few: int = 2, many: int = 10) -> float:
        """A step of a batch of equally long prompts: what ``many`` new tokens take longer than ``few``, for each."""
        ids = torch.tensor(prompts, device=self.device)
        seconds: dict[int, list[float]] = {few: [], many: []}
        for _ in range(4):
            for count, times in seconds.items():
                times.append(self._seconds(ids, count))
        return 1e3 * (min(seconds[many][1:]) - min(seconds[few][1:])) / (many - few)

    @torch.inference_mode()
    def _seconds(self, ids: torch.Tensor, count: int) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started
