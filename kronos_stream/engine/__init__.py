"""Inference engine: contexts in, sample paths out."""

from kronos_stream.engine.context import Context, ContextError
from kronos_stream.engine.forecaster import Forecaster
from kronos_stream.engine.runner import SampledPaths

__all__ = ["Context", "ContextError", "Forecaster", "SampledPaths"]
