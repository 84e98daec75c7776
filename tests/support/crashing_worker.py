"""A worker process without a model, which kills itself at requests for certain symbols.

Arguments: the symbols, and the file descriptor of the daemon's socket.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from kronos_stream.daemon.inference.protocol import (
    InferenceFailure,
    InferenceResult,
    ModelIdentity,
    ModelLoaded,
    ResultChunk,
    encode_frame,
    read_frames,
)
from kronos_stream.forecast.message import Engine, Model

RESULT: InferenceResult | InferenceFailure = InferenceFailure("answered")
"""Result of every request that is answered."""

_IDENTITY = ModelIdentity(
    Model(name="none", revision=None, tokenizer="none"),
    Engine(version="0", device="cpu", dtype="float32"),
)


def main() -> None:
    """Answer the daemon until its socket is closed."""
    *symbols, descriptor = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    messages = read_frames(connection.makefile("rb"))
    next(messages)
    connection.sendall(encode_frame(ModelLoaded(_IDENTITY, 1, 0.001)))
    for chunk in messages:
        if any(request.series.split(":")[1] in symbols for request in chunk.requests):
            os.kill(os.getpid(), signal.SIGKILL)
        results = [RESULT] * len(chunk.requests)
        connection.sendall(encode_frame(ResultChunk(results, is_last=True, seconds=0.001)))


if __name__ == "__main__":
    main()
