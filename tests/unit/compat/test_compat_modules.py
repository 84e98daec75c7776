"""Modules of the compatible API equal those of the reference implementation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kronos_stream.compat import Kronos, KronosPredictor, KronosTokenizer
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.checkpoint import CheckpointError
from tests.support.parity import FORWARD, Cases, tensors


def test_encode_and_decode(tokenizer: KronosTokenizer, parity_cases: Cases) -> None:
    """Half and joint indices are the fixture's, and both decode to the fixture's candles."""
    (x,) = tensors(parity_cases, "x_norm")
    s1, s2 = tokenizer.encode(x, half=True)
    np.testing.assert_array_equal(s1, parity_cases["s1"], strict=True)
    np.testing.assert_array_equal(s2, parity_cases["s2"], strict=True)
    joint = tokenizer.encode(x)
    assert isinstance(joint, Tensor)
    np.testing.assert_array_equal(joint, parity_cases["s1"] + 64 * parity_cases["s2"])
    for decoded in (tokenizer.decode(joint), tokenizer.decode([s1, s2], half=True)):
        np.testing.assert_allclose(decoded.detach(), parity_cases["decoded"], rtol=0, atol=FORWARD)


def test_tokenizer_forward(
    tokenizer: KronosTokenizer, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """The training pass: both reconstructions, the quantiser's loss, the joint indices."""
    (x,) = tensors(parity_cases, "x_norm")
    (coarse, full), loss, quantised, joint = tokenizer(x)
    np.testing.assert_allclose(coarse.detach(), parity_cases["recon_coarse"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(full.detach(), parity_cases["recon"], rtol=0, atol=FORWARD)
    assert loss.item() == pytest.approx(parity_expected["bsq_loss_eval"], abs=1e-5)
    assert torch.equal(quantised > 0, tokenizer.code(*tensors(parity_cases, "s1", "s2")) > 0)
    np.testing.assert_array_equal(joint, parity_cases["s1"] + 64 * parity_cases["s2"])


def test_decode_s1_and_s2(model: Kronos, tiny_predictor: Predictor, parity_cases: Cases) -> None:
    """Logits of both levels equal the fixture's and the modules'; float stamps are accepted."""
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    with torch.no_grad():
        s1_logits, hidden = model.decode_s1(s1, s2, stamp.float())
        last = s1_logits[:, -1:].argmax(-1)
        s2_logits = model.decode_s2(hidden, last)
        wanted = tiny_predictor.s2_logits_last(hidden, last[:, 0])
    np.testing.assert_allclose(s1_logits, parity_cases["s1_logits"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(hidden[:, -1], parity_cases["hidden_last"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(
        s2_logits[:, -1], parity_cases["s2_logits_last"], rtol=0, atol=FORWARD
    )
    torch.testing.assert_close(s2_logits[:, -1], wanted)


def test_the_training_pass(
    model: Kronos, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """In training mode the teacher-forced pass has the reference's cross entropies."""
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    s1_next, s2_next = s1[:, 1:], s2[:, 1:]
    s1_logits, s2_logits = model.train()(
        s1[:, :-1], s2[:, :-1], stamp[:, :-1], use_teacher_forcing=True, s1_targets=s1_next
    )
    wanted = parity_expected["predictor_train"]
    for logits, target, name in ((s1_logits, s1_next, "ce_s1"), (s2_logits, s2_next, "ce_s2")):
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        assert loss.item() == pytest.approx(wanted[name], abs=1e-5)


def test_round_trip(model: Kronos, tokenizer: KronosTokenizer, tmp_path: Path) -> None:
    """A saved model loads again with the same settings and weights, in eval mode."""
    pairs: list[tuple[Predictor | Tokenizer, Callable[[Path], Predictor | Tokenizer]]] = [
        (model, Kronos.from_pretrained),
        (tokenizer, KronosTokenizer.from_pretrained),
    ]
    for module, load in pairs:
        folder = tmp_path / type(module).__name__
        next(module.parameters()).data.add_(1)
        assert isinstance(module, Kronos | KronosTokenizer)
        module.save_pretrained(folder)
        again = load(folder)
        assert type(again) is type(module)
        assert again.config == module.config
        assert not again.training
        for name, tensor in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_hub_options_are_passed_on(parity_folder: Path, tmp_path: Path) -> None:
    """Hub options reach the hub client; other options are rejected."""
    commit = "0123456789abcdef" * 2 + "01234567"
    source = parity_folder / "tiny" / "predictor"
    shutil.copytree(source, tmp_path / "models--some--model" / "snapshots" / commit)
    loaded = Kronos.from_pretrained(
        "some/model", revision=commit, cache_dir=tmp_path, local_files_only=True
    )
    assert loaded.config == Kronos.from_pretrained(source, local_files_only=True).config
    with pytest.raises(CheckpointError, match="some/other: cannot be loaded with these options"):
        Kronos.from_pretrained("some/other", cache_dir=tmp_path, local_files_only=True)
    for kind in (Kronos, KronosTokenizer):
        with pytest.raises(TypeError, match="token_dropout_p"):
            kind.from_pretrained(source, token_dropout_p=0.0)  # type: ignore[call-arg]


def test_mismatched_tokenizer_and_predictor_are_rejected(
    model: Kronos, tokenizer: KronosTokenizer
) -> None:
    """Different numbers of bits are rejected immediately."""
    sizes = tokenizer.config.to_dict()
    other = KronosTokenizer(**{**sizes, "s1_bits": 8, "s2_bits": 4})
    with pytest.raises(ValueError, match="use the tokenizer with which the predictor was trained"):
        KronosPredictor(model, other, device="cpu")
