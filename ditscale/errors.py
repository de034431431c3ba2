"""The two errors that every room raises for what a user can mend. Imports nothing."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: the message names the argument, what was expected and what came.

    The command line prints it as one line on stderr and exits with code 2.
    """


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run here; the message gives the reason."""
