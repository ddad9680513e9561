"""Adam-atan2 with fp32 weights behind bf16 parameters, and an exponential moving average of the weights."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hrm_text.contracts import UserError
from hrm_text.model.kernels import why_not_gpu, why_not_triton
from hrm_text.train.config import Override


class AdamAtan2:
    """Adam whose quotient is an arc tangent: no epsilon, and blind to the scale of the gradient.

    Step t = 1, 2, ... of a weight p with gradient g (HRM-Text, arXiv 2605.20613; atan2 in the place of the quotient
    is from Everett et al., arXiv 2407.05872)::

        p   = p * (1 - lr * weight_decay)                      every parameter, embeddings too
        m   = b1 * m + (1 - b1) * g
        v   = b2 * v + (1 - b2) * g^2
        p   = p - lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))
        ema = ema_decay * ema + (1 - ema_decay) * p

    The moments and the EMA are fp32. The EMA starts as the initial weights and follows the fp32 weights.

    Behind a bf16 parameter is an fp32 weight, on which the step acts. It is kept as the parameter and a 16-bit
    remainder, together the weight to the bit, in half the memory of a copy::

        bits(weight) = bits(parameter) * 2^16 + remainder      -2^15 <= remainder < 2^15

    So the parameter is the weight rounded to the nearest, with ties away from zero.

    A parameter without a gradient (``grad is None``; with K = 2 none reaches the embedding) is treated as having a
    zero gradient: its moments decay, weight decay applies, and before its first gradient atan2(0, 0) = 0 moves nothing.
    So a step means the same for every parameter and one counter serves all.

    Parameters that are DTensors (fp32) have state sharded as they are, and every rank steps its own shards.
    A plain step needs temporary memory of two fp32 copies of the largest parameter, a fused one none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema_decay: float = 0.9999,
        overrides: Sequence[Override] = (),
        fused: bool | None = None,
    ) -> None:
        """``named_parameters``: what ``module.named_parameters()`` gives; one that is frozen is refused.

        overrides: where several match a parameter, the last one counts. fused: one Triton kernel a parameter;
        None is wherever Triton runs.
        """
        named = list(named_parameters)
        self.parameters = dict(named)
        if not named or not len(named) == len(self.parameters) == len({id(parameter) for _, parameter in named}):
            raise ValueError("expected at least one parameter, each under one name of its own")
        for name, parameter in named:
            if not parameter.requires_grad:
                raise ValueError(f"parameter {name!r} is frozen: weight decay would still shrink it; leave it out")
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(
                    f"parameter {name!r} is {parameter.dtype}: this optimizer trains torch.float32 and torch.bfloat16"
                )
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= decay < 1 for decay in (*betas, ema_decay))):
            raise ValueError(
                "expected lr and weight_decay >= 0 and betas and ema_decay in [0, 1), found "
                f"lr={lr}, weight_decay={weight_decay}, betas={betas}, ema_decay={ema_decay}"
            )
        self.lr = lr
        """Learning rate of the next step; a schedule sets it."""
        self.betas, self.ema_decay = betas, ema_decay
        self._settings = _settings(self.parameters, weight_decay, overrides)
        device = named[0][1].device
        self.fused = not (why_not_gpu(device) or why_not_triton()) if fused is None else fused
        """Whether steps are those of ``model.kernels.adam_atan2``."""

        plain = {name: parameter.detach() for name, parameter in named}
        self._remainder = {
            name: torch.zeros_like(p, dtype=torch.int16) for name, p in plain.items() if p.dtype == torch.bfloat16
        }
        self._exp_avg = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in plain.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in plain.items()}
        self._ema = {name: p.to(torch.float32, copy=True) for name, p in plain.items()}
        # On the device, as only the device knows whether a step is taken.
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        if self.fused:
            self._betas_2 = torch.tensor(betas, dtype=torch.float64, device=device)
            self._always = torch.ones((), dtype=torch.bool, device=device)

    @property
    def step_count(self) -> int:
        """Steps taken: t of the last one. Reading it waits for the device."""
        return int(self._step)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor] | None = None, finite: Tensor | None = None) -> None:
        """Update moments, weights and EMA from these gradients by name, or from those that the parameters hold.

        finite: bool tensor [] on the device of the parameters; where it is False nothing changes, the step count
        included. A fused step never waits for the device; a plain one reads ``finite`` and the step count, which is
        free on a CPU.
        """
        if gradients is None:
            gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        assert gradients.keys() <= self.parameters.keys()
        if self.fused:
            self._fused_step(gradients, finite)
        elif finite is None or bool(finite):
            self._plain_step(gradients)

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, fp32; live: the next step changes them, clone what you keep."""
        return dict(self._ema)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """All state by parameter name.

        ``step`` is an int64 tensor [], the rest are groups of fp32 tensors with one for every parameter: ``weights``,
        ``exp_avg``, ``exp_avg_sq``, ``ema``. The weights behind bf16 parameters are put together for the purpose, the
        rest is live.
        """
        weights = {
            name: joined(parameter, self._remainder[name]) if name in self._remainder else parameter.detach()
            for name, parameter in self.parameters.items()
        }
        return {"step": self._step, "weights": weights, **{key: dict(group) for key, group in self._groups().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another run of the same parameters, wherever it lies.

        Parameters are set from the fp32 weights, in whatever dtype they are here.
        Raises UserError, before anything is changed, when names or shapes are not those of the parameters.
        """
        problems = [] if "step" in state else ["no 'step'"]
        for key in ("weights", *self._groups()):
            found = state.get(key, {})
            problems += [f"{key} of {name!r} is missing" for name in sorted(set(self.parameters) - set(found))]
            problems += [f"{key} of unknown parameter {name!r}" for name in sorted(set(found) - set(self.parameters))]
            problems += [
                f"{key} of {name!r} has shape {list(found[name].shape)}, expected {list(parameter.shape)}"
                for name, parameter in self.parameters.items()
                if name in found and found[name].shape != parameter.shape
            ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                f"the optimizer state does not fit this model: {'; '.join(problems[:3])}{more}. "
                "It is from a run with another model: continue it with the config saved beside it "
                "(config.yaml in the checkpoint), or start a new run in another folder."
            )

        self._step.fill_(int(state["step"]))
        for key, group in self._groups().items():
            for name, tensor in group.items():
                tensor.copy_(state[key][name])
        for name, weight in state["weights"].items():
            parameter = self.parameters[name]
            if name in self._remainder:
                split_(weight.to(parameter.device), parameter, self._remainder[name])
            else:
                parameter.copy_(weight)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at these fp32 weights by name, to which the parameters were set: bf16 ones hold them rounded."""
        for name, remainder in self._remainder.items():
            weight = weights[name].to(remainder.device, torch.float32)
            split_(weight, self.parameters[name], remainder)
            self._ema[name].copy_(weight)

    @torch.no_grad()
    def exchange_averages(self) -> None:
        """Put the averages in the place of fp32 parameters, and those in the place of the averages."""
        assert not self._remainder, "bf16 parameters cannot hold the averages"
        for name, parameter in self.parameters.items():
            weight, average = local(parameter), local(self._ema[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _plain_step(self, gradients: Mapping[str, Tensor]) -> None:
        """The definition, parameter by parameter."""
        t = int(self._step.add_(1))
        for name, parameter in self.parameters.items():
            remainder, gradient = self._remainder.get(name), gradients.get(name)
            weight = local(parameter) if remainder is None else joined(parameter, remainder)
            lr_scale, weight_decay = self._settings[name]
            update(
                weight,
                None if gradient is None else local(gradient).float(),
                local(self._exp_avg[name]),
                local(self._exp_avg_sq[name]),
                local(self._ema[name]),
                t,
                lr=self.lr * lr_scale,
                weight_decay=weight_decay,
                betas=self.betas,
                ema_decay=self.ema_decay,
            )
            if remainder is not None:
                split_(weight, parameter, remainder)

    def _fused_step(self, gradients: Mapping[str, Tensor], finite: Tensor | None) -> None:
        """The same in one pass over each parameter's memory, queued on the device."""
        from hrm_text.model.kernels import adam_atan2

        taken = self._always if finite is None else finite
        self._step += taken
        corrections_2 = (1 - self._betas_2**self._step).float()
        for name, parameter in self.parameters.items():
            remainder, gradient = self._remainder.get(name), gradients.get(name)
            lr_scale, weight_decay = self._settings[name]
            adam_atan2.update(
                local(parameter),
                None if remainder is None else local(remainder),
                None if gradient is None else local(gradient),
                local(self._exp_avg[name]),
                local(self._exp_avg_sq[name]),
                local(self._ema[name]),
                corrections_2,
                taken,
                lr=self.lr * lr_scale,
                weight_decay=weight_decay,
                betas=self.betas,
                ema_decay=self.ema_decay,
            )

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "ema": self._ema}


def update(
    weight: Tensor,
    gradient: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    t: int,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    ema_decay: float,
) -> None:
    """Step t of one weight, in place; all tensors fp32 and of its shape, a gradient of None is zero."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1)
    exp_avg_sq.mul_(beta2)
    if gradient is not None:
        exp_avg.add_(gradient, alpha=1 - beta1)
        exp_avg_sq.addcmul_(gradient, gradient, value=1 - beta2)
    angle = exp_avg_sq.sqrt().mul_(1 / math.sqrt(1 - beta2**t))
    torch.atan2(exp_avg, angle, out=angle)
    weight.mul_(1 - lr * weight_decay).add_(angle, alpha=-lr / (1 - beta1**t))
    ema.lerp_(weight, 1 - ema_decay)


def joined(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 weight behind a bf16 parameter and its int16 remainder."""
    bits = parameter.detach().view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(remainder).view(torch.float32)


def split_(weight: Tensor, parameter: Tensor, remainder: Tensor) -> None:
    """Store an fp32 weight in a bf16 parameter, rounded to the nearest, and the int16 remainder."""
    bits = weight.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    parameter.copy_(high.to(torch.int16).view(torch.bfloat16))
    remainder.copy_(bits - high.bitwise_left_shift_(16))


def _settings(
    names: Iterable[str], weight_decay: float, overrides: Sequence[Override]
) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight_decay) of each parameter."""
    settings = dict.fromkeys(names, (1.0, weight_decay))
    for override in overrides:
        own = weight_decay if override.weight_decay is None else override.weight_decay
        matched = [name for name in settings if fnmatch.fnmatchcase(name, override.match)]
        if not matched:
            close = difflib.get_close_matches(override.match, settings, n=1, cutoff=0)
            raise UserError(
                f"optimizer.overrides: {override.match!r} matches none of the {len(settings)} parameters, which have "
                f"names such as {close[0]!r}"
            )
        settings.update(dict.fromkeys(matched, (override.lr_scale, own)))
    return settings


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that lies here; any other tensor itself."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard
