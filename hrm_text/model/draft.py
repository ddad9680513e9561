"""A head that guesses the token after next, so that one pass of the model can check several tokens at once.

The model's final state at a token, from which the next one was chosen, and the embedding of that next one go through
one small block; the model's own head reads its result. The result takes the final state's place for the guess after
that. A guess costs a hundredth of a model's step, and none is ever believed: what the model itself chooses counts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hrm_text.contracts import UserError
from hrm_text.model.block import SwiGLU, rms_norm
from hrm_text.model.config import ModelConfig
from hrm_text.model.tensorfile import load_tensors, save_tensors

FILE = "draft.safetensors"
"""Its name in a weights folder."""

# T tokens, D width


class DraftHead(nn.Module):
    """state' = norm(x + SwiGLU(norm(x))) with x = W [norm(state), norm(embedding)]; the norms have no parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.enter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.mlp = SwiGLU(config)

    def forward(self, state_TD: Tensor, embedding_TD: Tensor) -> Tensor:
        """[T, D] for the model's head: a guess of what follows the tokens whose embeddings these are.

        state: what chose them, the model's final state or this head's result. embedding: at any scale.
        """
        x_TD = self.enter(torch.cat([rms_norm(state_TD, self.eps), rms_norm(embedding_TD, self.eps)], dim=-1))
        return rms_norm(x_TD + self.mlp(rms_norm(x_TD, self.eps)), self.eps)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every weight anew: normal, with a standard deviation of 1 / sqrt(inputs)."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)


def save_head(head: DraftHead, folder: Path) -> None:
    """Write the head beside a model's weights."""
    save_tensors(folder / FILE, {name: weight.detach() for name, weight in head.state_dict().items()})


def load_head(folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DraftHead:
    """The head in a weights folder.

    Raises:
        UserError: the folder has none, or one for a model of another size.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}: this model has no draft head; train one")
    with torch.device("meta"):
        head = DraftHead(config)
    tensors = load_tensors(path)
    expected = {name: weight.shape for name, weight in head.state_dict().items()}
    if {name: weight.shape for name, weight in tensors.items()} != expected:
        raise UserError(f"{path}: the head belongs to a model of another size; train one for this model")
    head.load_state_dict({name: weight.to(device, dtype) for name, weight in tensors.items()}, assign=True)
    return head.requires_grad_(False)
