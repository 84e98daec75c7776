"""``python -m kronos_stream`` is ``kronos-stream``."""

from kronos_stream.cli import main

if __name__ == "__main__":
    main()
