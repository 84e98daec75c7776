"""Streaming, real-time forecasting with Kronos."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronos_stream.engine import Context, ContextError, Forecaster

__all__ = ["Context", "ContextError", "Forecaster"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported on demand: the engine needs torch, but --help does not.
    if name in __all__:
        from kronos_stream import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
