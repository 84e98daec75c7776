"""Networks of the reference: this project's modules under its names and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronos_stream.model.checkpoint import (
    CONFIG_FILE,
    PINNED_REVISIONS,
    WEIGHTS_FILE,
    CheckpointError,
    load_predictor,
    load_tokenizer,
    save,
)
from kronos_stream.model.config import PredictorConfig, TokenizerConfig
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer
from kronos_stream.training.losses import bsq_loss

_Module = TypeVar("_Module", bound=nn.Module)


class HubOptions(TypedDict, total=False):
    """Options of ``from_pretrained`` that are passed to the hub client, under its names.

    force_download: download again even if cached.
    token: for private checkpoints; by default the one that ``hf auth login`` stored.
    cache_dir: replaces the cache under ``HF_HOME``.
    local_files_only: use only cached files, without network requests.
    """

    force_download: bool
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


class KronosTokenizer(Tokenizer):
    """The tokenizer under its reference name: normalised candles to tokens and back.

    Arguments are the entries of ``config.json``; ValueError for sizes that make no network.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        n_enc_layers: int,
        n_dec_layers: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        s1_bits: int,
        s2_bits: int,
        beta: float,
        gamma0: float,
        gamma: float,
        zeta: float,
        group_size: int,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(TokenizerConfig(**arguments))
        self.s1_bits, self.s2_bits, self.codebook_dim = s1_bits, s2_bits, s1_bits + s2_bits

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        **options: Unpack[HubOptions],
    ) -> Self:
        """Load a tokenizer from a folder or a hub id, in eval mode, float32, on the CPU.

        revision: a commit, branch or tag of the hub. ``options``: see :class:`HubOptions`; they
        go to the hub's client and mean nothing for a folder. Raises CheckpointError for what
        cannot be found or read, TypeError for an option of another name.
        """
        folder = _fetch_if_needed(pretrained_model_name_or_path, revision, **options)
        loaded = load_tokenizer(folder, revision)
        return _copy_weights(cls(**loaded.config.to_dict()), loaded)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; OSError where that cannot be."""
        save(self, save_directory)

    def encode(self, x: Tensor, half: bool = False) -> Tensor | list[Tensor]:
        """Encode normalised candles (B, S, d_in) to joint indices s1 + 2^s1_bits s2, (B, S) int64.

        half: return the two levels separately, as [s1, s2] of (B, S) each.
        """
        s1, s2 = self.tokenise(x)
        return [s1, s2] if half else s1 + (s2 << self.s1_bits)

    def decode(self, x: Tensor | Sequence[Tensor], half: bool = False) -> Tensor:
        """Decode indices in the form of :meth:`encode` to normalised candles (B, S, d_in).

        Raises TypeError for [s1, s2] without ``half``.
        """
        if half:
            s1, s2 = x
            return self.detokenise(s1, s2)
        if not isinstance(x, Tensor):
            raise TypeError("joint indices must be one tensor; for [s1, s2] use half=True")
        return self.detokenise(x & (1 << self.s1_bits) - 1, x >> self.s1_bits)

    def forward(  # type: ignore[override]
        self, x: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Run the training pass over normalised candles (B, S, d_in).

        Returns ((coarse, full), loss, code, indices): reconstructions (B, S, d_in) from s1 alone
        and from both levels, the quantiser's loss (a scalar), the quantised code
        (B, S, s1_bits + s2_bits) and joint indices (B, S).
        """
        out = super().forward(x)
        bits = (out.unit > 0).long() << torch.arange(self.codebook_dim, device=x.device)
        loss = bsq_loss(out.unit, out.quantised, self.config)
        return (out.coarse, out.full), loss, out.quantised, bits.sum(-1)


class Kronos(Predictor):
    """The predictor under its reference name: next-token logits for both levels.

    Arguments are the entries of ``config.json``; ValueError for sizes that make no network.
    """

    def __init__(
        self,
        s1_bits: int,
        s2_bits: int,
        n_layers: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        token_dropout_p: float,
        learn_te: bool,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(PredictorConfig(**arguments))
        self.s1_bits, self.s2_bits = s1_bits, s2_bits

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        **options: Unpack[HubOptions],
    ) -> Self:
        """Load a predictor from a folder or a hub id, in eval mode, float32, on the CPU.

        revision: a commit, branch or tag of the hub. ``options``: see :class:`HubOptions`; they
        go to the hub's client and mean nothing for a folder. Raises CheckpointError for what
        cannot be found or read, TypeError for an option of another name.
        """
        folder = _fetch_if_needed(pretrained_model_name_or_path, revision, **options)
        loaded = load_predictor(folder, revision)
        return _copy_weights(cls(**loaded.config.to_dict()), loaded)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; OSError where that cannot be."""
        save(self, save_directory)

    def forward(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        padding_mask: Tensor | None = None,
        use_teacher_forcing: bool = False,
        s1_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S, 2^s1_bits) and (B, S, 2^s2_bits) of the next tokens.

        s1_ids, s2_ids: (B, S) tokens. stamp: (B, S, 5) minute, hour, weekday, day and month.
        use_teacher_forcing: s2 is conditioned on ``s1_targets`` (B, S), else on a drawn s1.
        Raises ValueError for a padding_mask, or teacher forcing without targets.
        """
        s1_logits, hidden = self.decode_s1(s1_ids, s2_ids, stamp, padding_mask)
        if use_teacher_forcing:
            if s1_targets is None:
                raise ValueError("use_teacher_forcing=True needs s1_targets")
        else:
            drawn = torch.multinomial(F.softmax(s1_logits.detach(), -1).flatten(0, 1), 1)
            s1_targets = drawn.view(s1_ids.shape)
        return s1_logits, self.decode_s2(hidden, s1_targets)

    def decode_s1(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """s1 logits (B, S, 2^s1_bits) and the trunk's states (B, S, d_model).

        Arguments and errors are those of :meth:`forward`.
        """
        _reject_mask(padding_mask)
        hidden = self.hidden(s1_ids, s2_ids, None if stamp is None else stamp.long())
        return self.s1_logits(hidden), hidden

    def decode_s2(
        self, context: Tensor, s1_ids: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """s2 logits (B, S, 2^s2_bits) of the trunk's states (B, S, d_model), given s1 tokens.

        s1_ids: (B, 1) for inference, where only the last row is valid. With (B, S), for training,
        keys and queries are rotated, and attention is causal in training mode only, as in the
        reference. Raises ValueError for a padding_mask.
        """
        _reject_mask(padding_mask)
        if s1_ids.shape[1] == 1:
            query = self.embedding.emb_s1(s1_ids)
            conditioned = self.dep_layer(context, query, rotate=False, causal=False)
            out: Tensor = self.head.proj_s2(conditioned)
            return out
        return self.s2_logits(context, s1_ids, rotate=True, causal=self.training)


def _fetch_if_needed(
    source: str | Path,
    revision: str | None,
    *,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str | Path:
    """Return ``source``, or its local folder if hub options require a download first."""
    plain = not force_download and token is None and cache_dir is None and not local_files_only
    if plain or Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    name = str(source)
    try:
        return snapshot_download(
            name,
            revision=revision or PINNED_REVISIONS.get(name),
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except Exception as error:  # the hub client raises errors of several libraries
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"{name}: cannot be loaded with these options ({type(error).__name__}: {reason}); "
            "check the name, the token and cache_dir, or give a checkpoint folder"
        ) from error


def _reject_mask(padding_mask: Tensor | None) -> None:
    if padding_mask is not None:
        raise ValueError("padding_mask is not supported (it fails in the reference, too)")


def _copy_weights(module: _Module, loaded: nn.Module) -> _Module:
    module.load_state_dict(loaded.state_dict())
    return module.eval()
