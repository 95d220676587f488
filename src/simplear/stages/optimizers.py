"""Parameter groups of a language model, and Muon with AdamW as one optimizer.

Any `torch.optim` class works with the groups; `MuonWithAdamW` orthogonalises the updates of the decoder's weight
matrices and gives everything else to `torch.optim.AdamW`. The pair is a single optimizer, with one ``param_groups``
and one ``state_dict``, so that Lightning keeps automatic optimization, counts each step once and clips and accumulates
as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from simplear.errors import UserError

MATRICES = "matrices"


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups by kind of parameter, each with a ``name`` that learning-rate monitors show.

    ``embeddings``: input and output embeddings; ``matrices``: all other weights of two or more dimensions; ``vectors``:
    norms and biases, without weight decay. The first two take the optimizer's own weight decay.
    """
    groups: dict[str, list[nn.Parameter]] = {MATRICES: [], "embeddings": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            groups["vectors"].append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            groups["embeddings"].append(parameter)
        else:
            groups[MATRICES].append(parameter)
    made: list[dict[str, Any]] = [{"name": name, "params": members} for name, members in groups.items() if members]
    for group in made:
        if group["name"] == "vectors":
            group["weight_decay"] = 0.0
    return made


class MuonWithAdamW(Optimizer):
    """Muon for the group named ``matrices``, AdamW for the others.

    Muon is computed here rather than by `torch.optim.Muon`, which orthogonalises in bfloat16 always: a CPU without
    bfloat16 arithmetic multiplies such matrices some 30 times slower than float32 ones (3 against 91 GFLOP/s measured).
    Here it is bfloat16 on GPUs and float32 on CPUs; the update is otherwise the same, and tested to be.

    Args:
        params: groups from `parameter_groups`.
        lr: Muon's learning rate.
        adamw_lr: AdamW's learning rate.
        weight_decay: decoupled, for both; a group's own value takes precedence.
        momentum: Muon's (Nesterov) momentum.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        ValueError: sharded parameters, for Muon orthogonalises whole matrices, which no rank of FSDP2 holds; or a
            parameter of more than two dimensions among the matrices.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.02,
        adamw_lr: float = 3e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        groups = [{**group, "lr": lr if group.get("name") == MATRICES else adamw_lr} for group in params]
        for group in groups:
            if any(isinstance(parameter, DTensor) for parameter in group["params"]):
                raise UserError(
                    "MuonWithAdamW needs whole matrices, and FSDP2 shards them: use DDP, or torch.optim.AdamW with "
                    "FSDP2 (--model.init_args.optimizer torch.optim.AdamW)."
                )
            if group.get("name") == MATRICES and any(parameter.ndim != 2 for parameter in group["params"]):
                raise UserError("MuonWithAdamW takes matrices of two dimensions; use torch.optim.AdamW here.")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        # AdamW completes its groups once; afterwards it only computes, on this object's own groups and state.
        self._adamw = AdamW(self._groups(False), lr=adamw_lr, weight_decay=weight_decay, betas=betas, eps=eps)
        for group, completed in zip(self._groups(False), self._adamw.param_groups, strict=True):
            group.update(completed)

    def _groups(self, matrices: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if (group.get("name") == MATRICES) == matrices]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of both kinds; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.param_groups = self._groups(False)
        self._adamw.state = self.state
        self._adamw.step()
        for group in self._groups(True):
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._muon_step(parameters, shape, group)
        return loss

    def _muon_step(self, parameters: list[nn.Parameter], shape: torch.Size, group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(buffer, group["momentum"]))
        # Tall matrices get a larger step, so that an update's effect on the output does not depend on the shape.
        step_size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, update in zip(parameters, orthogonalize(torch.stack(directions)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-step_size)


NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes singular values towards 1 fastest (K. Jordan, Muon, 2024); `torch.optim.Muon`'s too."""
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end near 1, singular vectors stay.

    Args:
        matrices: (N, rows, columns) of one shape.

    Returns:
        (N, rows, columns) in the given dtype; computed in bfloat16 on GPUs.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
