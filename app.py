"""The demo app: `python app.py [--model ID_OR_FOLDER ...]`. Its parts are in dit_sparse/app."""

from __future__ import annotations

import sys

from dit_sparse.app import build, main

__all__ = ["build", "main"]

if __name__ == "__main__":
    sys.exit(main())
