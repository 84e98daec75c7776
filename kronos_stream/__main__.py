"""Entry point of ``python -m kronos_stream``."""

from kronos_stream.cli import main

if __name__ == "__main__":
    main()
