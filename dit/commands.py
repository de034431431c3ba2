"""This room's part of the command line. Heavy imports stand inside the functions."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this room's commands to ``app``."""
