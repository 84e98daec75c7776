"""Small text files: lists of symbols, secrets."""

from __future__ import annotations

from pathlib import Path

_MAX_BYTES = 2**20


def read_text_file(path: Path, encoding: str = "utf-8") -> str:
    """Return a file's text. Raises ValueError that names the cause.

    Only regular files are read: reading a pipe could block the daemon.
    """
    try:
        if not path.exists():
            raise ValueError("No such file or directory")
        if not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES:,} bytes")
        return path.read_text(encoding)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
