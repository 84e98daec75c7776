"""Health check of the container: exit code 0 if /healthz answers, else 1.

For the image's HEALTHCHECK. Uses only the standard library, and the daemon's own variables for the
address. The endpoint never requires a token.
"""

from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException

_SECONDS = 4.0


def main() -> int:
    """Send one request; report a failure on stderr."""
    # On Linux a connection to 0.0.0.0 or :: reaches this machine, so any address works.
    host = os.environ.get("KRONOS_STREAM_HTTP__HOST", "") or "127.0.0.1"
    port = os.environ.get("KRONOS_STREAM_HTTP__PORT", "") or "8080"
    try:
        connection = HTTPConnection(host, int(port), timeout=_SECONDS)
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException, ValueError) as error:
        print(f"no answer from {host}:{port}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if status != 200:
        print(f"/healthz answers {status}", file=sys.stderr)  # noqa: T201
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
