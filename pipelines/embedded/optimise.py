"""The optimiser of the transformer stages: Muon for the matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of a batch of matrices (N, rows, columns) towards 1 (Newton-Schulz; bf16 on a GPU)."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix learns at the same speed.

    Matrices of one shape are stacked and updated together, so that a step is a few dozen launches for any depth. The
    update is scaled to the size of an AdamW update, so learning rates carry over.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(list(parameters), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            for shape, parameters in shapes.items():
                self._update(shape, parameters, group)

    def _update(self, shape, parameters, group) -> None:
        grads = torch.stack([parameter.grad for parameter in parameters])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        state["momentum"].lerp_(grads, 1 - group["momentum"])
        update = orthogonalise(grads.lerp(state["momentum"], group["momentum"]))
        rate = group["lr"]  # a tensor on a GPU, so that a captured graph reads the present rate
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(parameters, list((update * (rate * 0.2 * max(shape) ** 0.5)).unbind()))


class Optimiser:
    """Muon and AdamW over the modules' parameters, with gradient clipping and a moving average of the weights.

    The average is what is shipped. Moments are not part of a saved state: after a resume they fill again within some
    twenty steps (beta2 is 0.95), under a short warm-up.
    """

    def __init__(self, modules: dict[str, torch.nn.Module], matrices: bool = True):
        self.names, self.parameters = [], []
        blocks, others = [], []
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                self.names.append(f"{prefix}.{name.replace('_orig_mod.', '')}")
                self.parameters.append(parameter)
                inside = matrices and parameter.ndim == 2 and "block" in name and "embed" not in name
                inside = inside and "relative_attention" not in name and "norm" not in name
                (blocks if inside else others).append(parameter)
        device = self.parameters[0].device
        self.rates = [torch.tensor(1e-5, device=device) for _ in range(2)]
        self.weight = torch.tensor(0.1, device=device)  # of the new weights in their moving average
        cuda = device.type == "cuda"
        settings = dict(betas=(0.9, 0.95), weight_decay=0.01, fused=cuda, capturable=cuda)
        self.parts = [torch.optim.AdamW(others, lr=self.rates[0], **settings)]
        if blocks:
            self.parts.append(Muon(blocks, lr=self.rates[1]))
        self.average = [parameter.detach().clone().float() for parameter in self.parameters]
        self.updates = 0

    def prepare(self, lr: float, matrix_lr: float, decay: float) -> None:
        """Set the rates of the next update; `decay` is the moving average's."""
        self.updates += 1
        decay = min(decay, (1 + self.updates) / (10 + self.updates))
        for tensor, value in zip((*self.rates, self.weight), (lr, matrix_lr, 1 - decay), strict=True):
            tensor.fill_(value)

    def zero(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """One update; without host values in it, so that a GPU can capture it."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()
        with torch.no_grad():
            moved = torch._foreach_sub([parameter.detach() for parameter in self.parameters], self.average)
            torch._foreach_mul_(moved, self.weight)
            torch._foreach_add_(self.average, moved)

    def averaged(self) -> dict[str, torch.Tensor]:
        """The moving average by name, "module.parameter"."""
        return dict(zip(self.names, self.average, strict=True))

    def load_average(self, values: dict[str, torch.Tensor]) -> None:
        """Take up the moving average of a saved state; it counts as well filled."""
        for name, mine in zip(self.names, self.average, strict=True):
            mine.copy_(values[name])
        self.updates = 10_000
