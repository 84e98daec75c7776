"""The engine: from contexts to sample paths, exact and fast."""

from kronos_stream.engine.context import Context, ContextError
from kronos_stream.engine.forecaster import Forecaster
from kronos_stream.engine.runner import SampledPaths

__all__ = ["Context", "ContextError", "Forecaster", "SampledPaths"]
