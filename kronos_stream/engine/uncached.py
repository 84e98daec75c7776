"""Uncached generation on the unfolded modules: every step recomputes the whole window.

Slow and simple. It is exact beyond ``max_context``, where the window slides, every position changes
and the caches are invalid. It is also the reference in tests of the cached engine and the baseline
of ``kronos-stream bench``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronos_stream.engine.sampling import Sampling, draw
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    predictor: Predictor,
    tokenizer: Tokenizer,
    candles: Tensor,
    stamps: Tensor,
    uniforms: Tensor,
    *,
    max_context: int,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue B windows by H bars on P paths each; the window slides beyond ``max_context``.

    candles: (B, L, 6) normalised; stamps: (B, L + H, 5); uniforms: (H, 2, B, P).
    Returns normalised candles (B, P, H, 6) and tokens (B, P, H, 2). The modules must be in eval
    mode and on the tensors' device.
    """
    horizon, _, batch, paths = uniforms.shape
    length = candles.shape[1]
    first = max(0, length - max_context)
    tokens = torch.stack(tokenizer.tokenise(candles), dim=-1)[:, first:]
    tokens = tokens.repeat_interleave(paths, dim=0)  # (B P, kept, 2)
    stamps = stamps[:, first:].repeat_interleave(paths, dim=0)
    for step in range(horizon):
        window = tokens[:, -max_context:]
        start = tokens.shape[1] - window.shape[1]
        times = stamps[:, start : tokens.shape[1]]
        hidden = predictor.hidden(window[..., 0], window[..., 1], times)
        noise = uniforms[step].flatten(1)
        s1 = draw(predictor.s1_logits(hidden[:, -1]).float(), noise[0], sampling, step)
        s2 = draw(predictor.s2_logits_last(hidden, s1).float(), noise[1], sampling, step)
        tokens = torch.cat((tokens, torch.stack((s1, s2), dim=-1)[:, None]), dim=1)
        if progress is not None:
            progress(step + 1, horizon)
    window = tokens[:, -max_context:]
    decoded = tokenizer.detokenise(window[..., 0], window[..., 1])[:, -horizon:]
    shape = (batch, paths)
    return decoded.unflatten(0, shape), tokens[:, -horizon:].unflatten(0, shape)
