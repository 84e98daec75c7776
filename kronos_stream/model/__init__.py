"""Kronos model: tokenizer, predictor and their checkpoints.

Architecture after "Kronos: A Foundation Model for the Language of Financial Markets"
(arXiv 2508.02739). Parameter names are those of the published checkpoints.
"""

from kronos_stream.model.checkpoint import CheckpointError, load_predictor, load_tokenizer, save
from kronos_stream.model.config import PredictorConfig, TokenizerConfig
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "Predictor",
    "PredictorConfig",
    "Tokenizer",
    "TokenizerConfig",
    "load_predictor",
    "load_tokenizer",
    "save",
]
