# SPDX-License-Identifier: Apache-2.0
"""The command from its first instant on: importing it takes a second, in which Ctrl-C is to end it without a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
