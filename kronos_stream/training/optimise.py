"""Optimisers, learning-rate schedule, gradient clipping and gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.layers import Block
from kronos_stream.training.settings import TrainSettings

Network = Tokenizer | Predictor


class Optimisers:
    """AdamW, or Muon (Jordan 2024) for the blocks' matrices and AdamW for the rest.

    Muon normalises its updates, so it has a separate learning rate; both follow one schedule.
    """

    def __init__(self, network: Network, settings: TrainSettings) -> None:
        self._settings = s = settings
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        in_blocks = {id(p) for b in _blocks(network) for p in b.parameters() if p.ndim == 2}
        for parameter in network.parameters():
            muon = s.optimizer == "muon" and id(parameter) in in_blocks
            (matrices if muon else rest).append(parameter)
        decayed = [p for p in rest if p.ndim > 1]
        plain = [p for p in rest if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": s.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95))
        ]
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, lr=s.lr_muon, weight_decay=s.weight_decay)
            )
        self._peak_rates = [s.lr, s.lr_muon]

    def step(self, step: int) -> float:
        """Apply the gradients with the learning rate of ``step``; return AdamW's rate."""
        share = learning_rate_factor(step, self._settings)
        for optimizer, peak in zip(self._optimizers, self._peak_rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._peak_rates[0] * share

    def state(self) -> list[dict[str, object]]:
        """Return the state that a resumed run needs."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def restore(self, state: list[dict[str, object]]) -> None:
        """Restore the result of :meth:`state`."""
        for optimizer, saved in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(saved)


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at ``step``: a linear rise, then a cosine to the floor."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return settings.lr_floor + (1 - settings.lr_floor) * cosine


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a joint norm of ``max_norm``; return the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def checkpoint_blocks(network: Network) -> None:
    """Make every block recompute its activations in the backward pass.

    Set on the instances, so parameter names, and therefore checkpoints, do not change.
    """
    for block in _blocks(network):
        block.forward = _CheckpointedForward(block.forward)  # type: ignore[method-assign]


class _CheckpointedForward:
    def __init__(self, forward: object) -> None:
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self._forward, x, use_reentrant=False)
        return out


def _blocks(network: Network) -> Iterator[Block]:
    for module in network.modules():
        if isinstance(module, Block):
            yield module
