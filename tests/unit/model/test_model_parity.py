"""Parity of the modules with the reference implementation: outputs, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronos_stream.model import Predictor, Tokenizer, load_predictor, load_tokenizer
from kronos_stream.training.losses import bsq_loss, predictor_loss, tokenizer_loss

Cases = dict[str, NDArray[Any]]

FORWARD = 1e-4
"""Absolute tolerance of the outputs of a forward pass."""
LOSS = 1e-5
"""Absolute tolerance of training losses."""
GRADIENT = 1e-3
"""Relative tolerance of gradient norms."""


def tensors(cases: Cases, *names: str) -> list[Tensor]:
    """Return copies of the named arrays as tensors."""
    return [torch.from_numpy(cases[name].copy()) for name in names]


def assert_close(actual: Tensor, wanted: NDArray[Any], tolerance: float = FORWARD) -> None:
    """Assert equal shapes and absolute differences of at most ``tolerance``."""
    np.testing.assert_allclose(actual.detach().numpy(), wanted, rtol=0, atol=tolerance, strict=True)


def assert_gradients(module: nn.Module, norms: dict[str, float]) -> None:
    """Assert that the same parameters as in the reference have gradients, with equal norms."""
    actual = {
        name: p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None
    }
    assert actual == pytest.approx(norms, rel=GRADIENT)


def test_tokens_equal_the_references(tiny_tokenizer: Tokenizer, parity_cases: Cases) -> None:
    """Every candle of every series has the reference's s1 and s2."""
    s1, s2 = tiny_tokenizer.tokenise(*tensors(parity_cases, "x_norm"))
    np.testing.assert_array_equal(s1, parity_cases["s1"], strict=True)
    np.testing.assert_array_equal(s2, parity_cases["s2"], strict=True)


def test_decoded_candles_equal_the_references(
    tiny_tokenizer: Tokenizer, parity_cases: Cases
) -> None:
    """Tokens decode to the reference's candles."""
    assert_close(
        tiny_tokenizer.detokenise(*tensors(parity_cases, "s1", "s2")), parity_cases["decoded"]
    )


def test_reconstructions_equal_the_references(
    tiny_tokenizer: Tokenizer, parity_cases: Cases
) -> None:
    """The training pass gives the reference's coarse and full reconstruction."""
    out = tiny_tokenizer(*tensors(parity_cases, "x_norm"))
    assert_close(out.coarse, parity_cases["recon_coarse"])
    assert_close(out.full, parity_cases["recon"])


def test_code_of_tokens_is_the_quantised_code(
    tiny_tokenizer: Tokenizer, parity_cases: Cases
) -> None:
    """The code computed from tokens equals the quantiser's output: bit j has the value 2^j."""
    quantised = tiny_tokenizer(*tensors(parity_cases, "x_norm")).quantised
    assert_close(tiny_tokenizer.code(*tensors(parity_cases, "s1", "s2")), quantised.numpy(), 1e-6)


@pytest.mark.parametrize("length", [1, 40])
def test_tokenizer_is_causal(tiny_tokenizer: Tokenizer, parity_cases: Cases, length: int) -> None:
    """A prefix of the candles gives a prefix of the tokens and of the decoded candles."""
    x, s1, s2 = tensors(parity_cases, "x_norm", "s1", "s2")
    head1, head2 = tiny_tokenizer.tokenise(x[:, :length])
    assert torch.equal(head1, s1[:, :length])
    assert torch.equal(head2, s2[:, :length])
    assert_close(tiny_tokenizer.detokenise(head1, head2), parity_cases["decoded"][:, :length])


def test_hidden_states_and_s1_logits_equal_the_references(
    tiny_predictor: Predictor, parity_cases: Cases
) -> None:
    """The trunk's last state and the s1 logits at every position are the reference's."""
    hidden = tiny_predictor.hidden(*tensors(parity_cases, "s1", "s2", "stamp"))
    assert_close(hidden[:, -1], parity_cases["hidden_last"])
    assert_close(tiny_predictor.s1_logits(hidden), parity_cases["s1_logits"])
    assert_close(tiny_predictor.s1_logits(hidden[:, -1]), parity_cases["s1_logits_last"])


def test_s2_logits_of_the_greedy_s1_equal_the_references(
    tiny_predictor: Predictor, parity_cases: Cases
) -> None:
    """At the last position, given the most likely s1, the s2 logits are the reference's."""
    hidden = tiny_predictor.hidden(*tensors(parity_cases, "s1", "s2", "stamp"))
    greedy = tiny_predictor.s1_logits(hidden[:, -1]).argmax(-1)
    assert_close(tiny_predictor.s2_logits_last(hidden, greedy), parity_cases["s2_logits_last"])


def test_full_and_last_position_s2_logits_are_equal(
    tiny_predictor: Predictor, parity_cases: Cases
) -> None:
    """The s2 pass over all positions, used in training, equals that of inference."""
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    hidden = tiny_predictor.hidden(s1, s2, stamp)
    s1_next = s1.roll(-1, dims=1)
    full = tiny_predictor.s2_logits(hidden, s1_next)
    for t in (0, 1, 50, 95):
        last = tiny_predictor.s2_logits_last(hidden[:, : t + 1], s1_next[:, t])
        assert_close(full[:, t], last.numpy())


def test_tokenizer_training_step_equals_the_references(
    parity_folder: Path, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """Losses and the gradient norms of all parameters are equal."""
    wanted = parity_expected["tokenizer_train"]
    tokenizer = load_tokenizer(parity_folder / "tiny" / "tokenizer").train().requires_grad_()
    (x,) = tensors(parity_cases, "x_norm")
    out = tokenizer(x)
    loss = tokenizer_loss(x, out, tokenizer.config)
    loss.total.backward()
    names = ("recon_coarse", "recon_fine", "bsq", "loss")
    assert [part.item() for part in loss] == pytest.approx([wanted[n] for n in names], abs=LOSS)
    assert_gradients(tokenizer, wanted["grad_norm"])


def test_quantiser_loss_in_eval_mode_equals_the_references(
    tiny_tokenizer: Tokenizer, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """The quantiser's loss does not depend on the mode."""
    out = tiny_tokenizer(*tensors(parity_cases, "x_norm"))
    loss = bsq_loss(out.unit, out.quantised, tiny_tokenizer.config)
    assert loss.item() == pytest.approx(parity_expected["bsq_loss_eval"], abs=LOSS)


def test_predictor_training_step_equals_the_references(
    parity_folder: Path, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """Losses and gradient norms are equal in the reference's mode, with a rotated s2 layer."""
    wanted = parity_expected["predictor_train"]
    predictor = load_predictor(parity_folder / "tiny" / "predictor").train().requires_grad_()
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    hidden = predictor.hidden(s1[:, :-1], s2[:, :-1], stamp[:, :-1])
    s1_next, s2_next = s1[:, 1:], s2[:, 1:]
    s2_logits = predictor.s2_logits(hidden, s1_next, rotate=True)
    loss = predictor_loss(predictor.s1_logits(hidden), s2_logits, s1_next, s2_next)
    loss.total.backward()
    names = ("ce_s1", "ce_s2", "loss")
    assert [part.item() for part in loss] == pytest.approx([wanted[n] for n in names], abs=LOSS)
    assert_gradients(predictor, wanted["grad_norm"])
