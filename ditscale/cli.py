"""The ``ditscale`` command. Each room brings its own commands in ``commands.py``; this page gathers them.

Exit codes: 0 done; 1 the work was done and what it found is bad (a failed check); 2 a user's mistake, one line on stderr;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from ditscale import __version__
from ditscale.errors import BackendUnavailable, InputError

# Typer brings its own copy of click from 0.25 on and needs click before; both have these two above BadParameter.
_PARENTS: dict[str, Any] = {parent.__name__: parent for parent in typer.BadParameter.__mro__}
_UsageError, _ClickException = _PARENTS["UsageError"], _PARENTS["ClickException"]

app = typer.Typer(
    name="ditscale",
    help="Fast kernels, exact compute accounting and scaling laws for diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _gather() -> None:
    # Light by contract: a commands.py imports typer at its top and everything else inside its functions.
    from ditscale.bench import commands as bench
    from ditscale.dit import commands as dit
    from ditscale.kernels import commands as kernels
    from ditscale.scaling import commands as scaling

    for room in (kernels, dit, scaling, bench):
        room.register(app)


def main() -> None:
    """Run the command line and exit."""
    _gather()
    try:
        code = app(standalone_mode=False)
    except (InputError, BackendUnavailable) as error:
        _fail(str(error))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "ditscale"
        _fail(f"{error.format_message()} (see: {command} --help)")
    except _ClickException as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("ditscale: stopped; the same command goes on where it was\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    sys.stderr.write("ditscale: " + " ".join(message.split()) + "\n")
    sys.exit(2)
