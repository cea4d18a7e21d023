"""`python -m errseg` is the `errseg` command."""

from __future__ import annotations

from errseg.cli import main

if __name__ == "__main__":
    main()
