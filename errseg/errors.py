"""The one exception that the command line turns into a single line."""

from __future__ import annotations


class ErrSegError(Exception):
    """A mistake that a person can make and mend; its text is one line: what was wrong and what to do."""
