"""The two training stages: network, loss and evaluation of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kronos_stream.channels import PRICES
from kronos_stream.model import (
    Predictor,
    PredictorConfig,
    Tokenizer,
    TokenizerConfig,
    load_predictor,
    load_tokenizer,
)
from kronos_stream.model.checkpoint import PINNED_REVISIONS
from kronos_stream.model.config import check_matching_bits
from kronos_stream.training import codebook
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.losses import predictor_loss, tokenizer_loss
from kronos_stream.training.processes import ProcessGroup
from kronos_stream.training.settings import TrainSettings
from kronos_stream.training.windows import Batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out metrics; early stopping minimises ``score``."""

    score: float
    figures: dict[str, float]
    warning: str | None = None


class StageRun(Protocol):
    """One network in training."""

    @property
    def network(self) -> Tokenizer | Predictor: ...

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise and its parts."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Compute metrics over held-out batches."""
        ...


class TokenizerRun:
    """Training of the tokenizer."""

    def __init__(
        self, settings: TrainSettings, device: torch.device, processes: ProcessGroup
    ) -> None:
        s = self._settings = settings
        if s.init:
            network = load_tokenizer(s.init, PINNED_REVISIONS.get(s.init)).requires_grad_(
                requires_grad=True
            )
            network.config = replace(  # the loss is that of the settings
                network.config, beta=s.beta, gamma0=s.gamma0, gamma=s.gamma, zeta=s.zeta
            )
        else:
            bits = s.s1_bits + s.s2_bits
            network = Tokenizer(
                TokenizerConfig(
                    d_model=s.d_model,
                    n_heads=s.n_heads,
                    ff_dim=s.ff_dim,
                    n_enc_layers=s.enc_layers,
                    n_dec_layers=s.dec_layers,
                    s1_bits=s.s1_bits,
                    s2_bits=s.s2_bits,
                    ffn_dropout_p=s.dropout,
                    resid_dropout_p=s.dropout,
                    beta=s.beta,
                    gamma0=s.gamma0,
                    gamma=s.gamma,
                    zeta=s.zeta,
                    group_size=next(g for g in (4, 3, 5, 2, 1) if bits % g == 0),
                )
            )
        self.network = network.to(device).train()
        channels = torch.ones(network.config.d_in, device=device)
        channels[PRICES] = s.price_weight
        self._channels = channels / channels.mean()
        self._processes = processes

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Coarse and full reconstruction error, weighted, plus the quantiser's loss."""
        with _autocast(batch, enabled=self._settings.bf16):
            out = self.network(batch.x)
        loss = tokenizer_loss(
            batch.x,
            type(out)(*(part.float() for part in out)),
            self.network.config,
            weights=batch.weights,
            channels=self._channels,
            scale=self._settings.entropy_scale,
            group=self._settings.entropy_group,
            average=self._processes.average,
        )
        return loss.total, {"coarse": loss.coarse, "full": loss.full, "bsq": loss.bsq}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Price errors of both codes over the lookback, as shares of the variance."""
        self.network.eval()
        errors, s1, s2 = torch.zeros(3, dtype=torch.float64), [], []
        for batch in batches:
            out = self.network(batch.x)
            inside = torch.arange(batch.x.shape[1], device=batch.x.device) < batch.origins[:, None]
            x, full, coarse = (
                t[inside][:, PRICES].double() for t in (batch.x, out.full, out.coarse)
            )
            errors += torch.stack(
                [(full - x).square().sum(), (coarse - x).square().sum(), x.square().sum()]
            ).cpu()
            tokens = self.network.tokenise(batch.x)
            s1.append(tokens[0])
            s2.append(tokens[1])
        self.network.train()
        c = self.network.config
        book = codebook.measure_usage(torch.cat(s1), torch.cat(s2), c.s1_bits, c.s2_bits)
        full_mse, coarse_mse = (errors[:2] / errors[2]).tolist()
        figures = {"full_mse": full_mse, "coarse_mse": coarse_mse, **book.to_dict()}
        return Evaluation(full_mse + coarse_mse, figures, book.warning())


class PredictorRun:
    """Training of the predictor, in the mode of inference: s2 unrotated and causal."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        s = self._settings = settings
        if not s.tokenizer:
            raise TrainingError(
                "the predictor needs a trained tokenizer: give its folder as --tokenizer"
            )
        self._tokenizer = load_tokenizer(s.tokenizer, PINNED_REVISIONS.get(s.tokenizer)).to(device)
        bits = self._tokenizer.config
        if s.init:
            network = load_predictor(s.init, PINNED_REVISIONS.get(s.init)).requires_grad_(
                requires_grad=True
            )
            try:
                check_matching_bits(network.config, bits)
            except ValueError as error:
                raise TrainingError(f"{s.init} and {s.tokenizer}: {error}") from None
        else:
            network = Predictor(
                PredictorConfig(
                    bits.s1_bits,
                    bits.s2_bits,
                    s.n_layers,
                    s.d_model,
                    s.n_heads,
                    s.ff_dim,
                    ffn_dropout_p=s.dropout,
                    resid_dropout_p=s.dropout,
                )
            )
            scale_embeddings(network)
        self.network = network.to(device).train()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of both levels in nats, weighted by the position of the target."""
        with torch.no_grad():  # always in fp32: bits are sign thresholds
            s1, s2 = self._tokenizer.tokenise(batch.x)
        weights = batch.weights[:, 1:]
        weights = weights / weights.sum(1, keepdim=True)
        with _autocast(batch, enabled=self._settings.bf16):
            hidden = self.network.hidden(s1[:, :-1], s2[:, :-1], batch.stamps[:, :-1])
            s1_logits = self.network.s1_logits(hidden)
            given = s1[:, 1:]
            if self._settings.s2_on == "sampled":
                shares = s1_logits.detach().float().softmax(-1).flatten(0, 1)
                given = torch.multinomial(shares, 1).view_as(given)
            s2_logits = self.network.s2_logits(hidden, given)
        loss = predictor_loss(s1_logits.float(), s2_logits.float(), s1[:, 1:], s2[:, 1:], weights)
        return loss.total, {"s1": loss.s1, "s2": loss.s2}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Cross-entropy of the bars after the origin, s2 given the true s1."""
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            s1, s2 = self._tokenizer.tokenise(batch.x)
            logits = self.network(s1[:, :-1], s2[:, :-1], batch.stamps[:, :-1], s1[:, 1:])
            after = torch.arange(1, s1.shape[1], device=s1.device) >= batch.origins[:, None]
            for i, target in enumerate((s1, s2)):
                nats = F.cross_entropy(logits[i][after], target[:, 1:][after], reduction="sum")
                sums[i] += nats.double().cpu()
            sums[2] += after.sum().cpu()
        self.network.train()
        s1_nats, s2_nats = (sums[:2] / sums[2]).tolist()
        return Evaluation(s1_nats + s2_nats, {"s1_nats": s1_nats, "s2_nats": s2_nats})


@torch.no_grad()
def scale_embeddings(network: Predictor) -> None:
    """Initialise embeddings with small values, since token embeddings are scaled by sqrt(d)."""
    for token in (network.embedding.emb_s1, network.embedding.emb_s2):
        token.weight.normal_(0.0, network.config.d_model**-0.5)
    for table in network.time_emb.parameters():
        table.normal_(0.0, 0.02)


def _autocast(batch: Batch, *, enabled: bool) -> torch.autocast:
    return torch.autocast(batch.x.device.type, torch.bfloat16, enabled=enabled)
