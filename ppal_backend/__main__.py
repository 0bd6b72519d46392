"""Where ``ppal`` begins, and ``python -m ppal_backend``: SIGTERM is heard before anything else is imported.

The first process of a container has no default for SIGTERM: one that came while the command line is imported, which
takes a second, was lost, and the container was killed after its grace period.
"""

from __future__ import annotations

import io
import signal
import sys


def main() -> None:
    """Run the command line; SIGTERM ends it with 143 until a command sets a handler of its own.

    Text that standard output cannot hold (it may be ASCII) is escaped, as on standard error.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    from ppal_backend.cli import app

    app()


if __name__ == "__main__":
    main()
