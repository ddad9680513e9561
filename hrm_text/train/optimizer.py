"""Adam-atan2 with fp32 master weights and an exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hrm_text.contracts import UserError


class AdamAtan2:
    """Adam whose quotient is an arc tangent: no epsilon, and blind to the scale of the gradient.

    Step t = 1, 2, ... of a weight p with gradient g (HRM-Text, arXiv 2605.20613; atan2 in the place of the quotient
    is from Everett et al., arXiv 2407.05872)::

        p   = p * (1 - lr * weight_decay)                      every parameter, embeddings too
        m   = b1 * m + (1 - b1) * g
        v   = b2 * v + (1 - b2) * g^2
        p   = p - lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))
        ema = ema_decay * ema + (1 - ema_decay) * p

    All state is fp32. A parameter of another dtype keeps an fp32 master weight, on which the step acts; the parameter
    is the rounded copy of it. The EMA starts as the initial weights and follows the fp32 weights.

    A parameter without a gradient (``grad is None``; with K = 2 none reaches the embedding) is treated as having a
    zero gradient: its moments decay, weight decay applies, and before its first gradient atan2(0, 0) = 0 moves nothing.
    So a step means the same for every parameter and one counter serves all.

    State is elementwise and made with ``*_like``: parameters that are DTensors get state sharded as they are.
    A step needs temporary memory of one fp32 copy of the parameters, and of the gradients where they are not fp32.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema_decay: float = 0.9999,
    ) -> None:
        """``named_parameters``: what ``module.named_parameters()`` gives; one that is frozen is refused."""
        named = list(named_parameters)
        self.parameters = dict(named)
        if not named or not len(named) == len(self.parameters) == len({id(parameter) for _, parameter in named}):
            raise ValueError("expected at least one parameter, each under one name of its own")
        for name, parameter in named:
            if not parameter.requires_grad:
                raise ValueError(f"parameter {name!r} is frozen: weight decay would still shrink it; leave it out")
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= decay < 1 for decay in (*betas, ema_decay))):
            raise ValueError(
                "expected lr and weight_decay >= 0 and betas and ema_decay in [0, 1), found "
                f"lr={lr}, weight_decay={weight_decay}, betas={betas}, ema_decay={ema_decay}"
            )
        self.lr = lr
        """Learning rate of the next step; a schedule sets it."""
        self.betas, self.weight_decay, self.ema_decay = betas, weight_decay, ema_decay
        self.step_count = 0
        """Steps taken: t of the last one."""

        plain = {name: parameter.detach() for name, parameter in named}
        self._master = {name: p.float() for name, p in plain.items() if p.dtype != torch.float32}
        self._exp_avg = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in plain.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in plain.items()}
        self._ema = {name: p.to(torch.float32, copy=True) for name, p in plain.items()}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Update moments, weights and EMA from these gradients by name, or from those that the parameters hold."""
        self.step_count += 1
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.step_count
        correction2 = 1 - beta2**self.step_count
        weights = [self._master.get(name, parameter) for name, parameter in self.parameters.items()]
        exp_avg, exp_avg_sq = list(self._exp_avg.values()), list(self._exp_avg_sq.values())

        torch._foreach_mul_(exp_avg, beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        if gradients is None:
            gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        grads = {name: gradient.float() for name, gradient in gradients.items()}
        if grads:
            values = list(grads.values())
            torch._foreach_add_([self._exp_avg[name] for name in grads], values, alpha=1 - beta1)
            torch._foreach_addcmul_([self._exp_avg_sq[name] for name in grads], values, values, value=1 - beta2)

        updates = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_mul_(updates, 1 / math.sqrt(correction2))
        for mean, update in zip(exp_avg, updates, strict=True):  # atan2 has no foreach form
            torch.atan2(mean, update, out=update)
        torch._foreach_mul_(weights, 1 - self.lr * self.weight_decay)
        torch._foreach_add_(weights, updates, alpha=-self.lr / correction1)

        torch._foreach_lerp_(list(self._ema.values()), weights, 1 - self.ema_decay)
        self._refresh_parameters()

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, fp32; live: the next step changes them, clone what you keep."""
        return dict(self._ema)

    def state_dict(self) -> dict[str, Any]:
        """All state by parameter name, live.

        ``step`` is an int64 tensor [], the rest are groups of fp32 tensors: ``exp_avg``, ``exp_avg_sq``, ``ema`` for
        every parameter, ``master`` for those that are not fp32. fp32 weights themselves belong to the model's state.
        """
        return {"step": torch.tensor(self.step_count), **{key: dict(group) for key, group in self._groups().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another run of the same parameters, wherever it lies.

        Master weights are the truth: parameters are set from them, in whatever dtype they are here. A state without
        them (an fp32 run) needs fp32 parameters, which the model's own weights must fill.
        Raises UserError, before anything is changed, when names or shapes are not those of the parameters.
        """
        groups = self._groups()
        wanted = {key: set(self.parameters) for key in groups}
        wanted["master"] = set(self._master)
        problems = [] if "step" in state else ["no 'step'"]
        for key in groups:
            found = state.get(key, {})
            optional = set(self.parameters) if key == "master" else set()  # fp32 here, another dtype in that run
            problems += [f"{key} of {name!r} is missing" for name in sorted(wanted[key] - set(found))]
            problems += [f"{key} of unknown parameter {name!r}" for name in sorted(set(found) - wanted[key] - optional)]
            problems += [
                f"{key} of {name!r} has shape {list(found[name].shape)}, expected {list(parameter.shape)}"
                for name, parameter in self.parameters.items()
                if name in found and found[name].shape != parameter.shape
            ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                f"the optimizer state does not fit this model: {'; '.join(problems[:3])}{more}. "
                "It is from a run with another model or dtype: continue it with the config saved beside it "
                "(config.yaml in the checkpoint), or start a new run in another folder."
            )

        self.step_count = int(state["step"])
        for key, group in groups.items():
            for name, tensor in group.items():
                tensor.copy_(state[key][name])
        for name in set(state.get("master", {})) - set(self._master):
            self.parameters[name].copy_(state["master"][name])
        self._refresh_parameters()

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"master": self._master, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "ema": self._ema}

    def _refresh_parameters(self) -> None:
        """Round the master weights into their parameters."""
        for name, master in self._master.items():  # _foreach_copy_ has no rule for DTensors (PyTorch 2.13)
            self.parameters[name].copy_(master)
