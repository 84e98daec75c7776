"""Minimum cost of a forecast: floating-point operations and bytes, by stage.

Operations are those of matrix products and attention, 2 per multiplication and addition; norms,
softmax and sampling are not counted. Bytes are what every implementation must read per step: each
weight once, and each cached key and value once. Causal attention counts only visible keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from kronos_stream.model.config import PredictorConfig, TokenizerConfig


@dataclass(frozen=True, slots=True)
class Workload:
    """Size of a call whose contexts have the same lookback and horizon."""

    contexts: int
    paths: int
    lookback: int
    horizon: int

    @property
    def path_steps(self) -> int:
        return self.contexts * self.paths * self.horizon


@dataclass(frozen=True, slots=True)
class Cost:
    """Minimum cost of one stage."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Lower bound on the time: the longer of compute and memory traffic."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def stage_costs(
    p: PredictorConfig, t: TokenizerConfig, work: Workload, itemsize: int
) -> dict[str, Cost]:
    """Cost by stage: encode, prefill, decode, detokenise. ``itemsize``: bytes per number."""
    bars = work.contexts * work.lookback
    rows = work.contexts * work.paths
    return {
        "encode": _encode(t, work, bars),
        "prefill": _prefill(p, work, bars, itemsize),
        "decode": _decode(p, work, rows, itemsize),
        "detokenise": _detokenise(t, work, bars, rows, itemsize),
    }


def _encode(t: TokenizerConfig, work: Workload, bars: int) -> Cost:
    blocks = t.n_enc_layers - 1
    weights = t.d_in * t.d_model + blocks * _block(t.d_model, t.ff_dim) + t.d_model * t.code_bits
    keys = (work.lookback + 1) / 2
    return Cost(2 * bars * (weights + blocks * 2 * keys * t.d_model), 4 * weights)


def _prefill(p: PredictorConfig, work: Workload, bars: int, itemsize: int) -> Cost:
    weights = p.n_layers * _block(p.d_model, p.ff_dim) + 2 * p.d_model**2
    attention = p.n_layers * 2 * (work.lookback + 1) / 2 * p.d_model
    return Cost(2 * bars * (weights + attention), itemsize * weights)


def _decode(p: PredictorConfig, work: Workload, rows: int, itemsize: int) -> Cost:
    d = p.d_model
    trunk = p.n_layers * _block(d, p.ff_dim) + 2 * d**2  # with the s2 layer's keys and values
    s1_head, s2_head = d * 2**p.s1_bits, d**2 + d * 2**p.s2_bits
    steps = work.horizon - 1  # the first bar uses the last state of the prefill
    own = steps * work.horizon / 2  # suffix keys over all later steps
    keys = steps * work.lookback + own
    macs = rows * (
        steps * (trunk + s1_head + s2_head)
        + s2_head
        + 2 * d * (p.n_layers * keys + keys + work.lookback)
    )
    macs += work.contexts * s1_head
    read = (steps * (trunk + s1_head + s2_head) + s1_head + s2_head) + 2 * d * (p.n_layers + 1) * (
        work.contexts * (steps * work.lookback) + rows * own
    )
    return Cost(2 * macs, itemsize * read)


def _detokenise(t: TokenizerConfig, work: Workload, bars: int, rows: int, itemsize: int) -> Cost:
    blocks, d = t.n_dec_layers - 1, t.d_model
    block = _block(d, t.ff_dim)
    # In the last block the prefix needs only keys and values.
    prefix = (blocks - 1) * (block + (work.lookback + 1) * d) + 2 * d**2
    new = blocks * (block + 2 * d * (work.lookback + work.horizon / 2)) + d * t.d_in
    macs = bars * prefix + rows * work.horizon * new
    return Cost(2 * macs, itemsize * blocks * block)


def _block(d_model: int, ff_dim: int) -> int:
    """Number of weights in the products of one block."""
    return 4 * d_model**2 + 3 * d_model * ff_dim
