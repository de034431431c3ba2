"""The ``ditscale`` command. Each room brings its own commands in ``commands.py``; this page gathers them.

Exit codes: 0 done; 1 the work was done and what it found is bad (a failed check); 2 a user's mistake, one line on stderr;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ditscale import __version__
from ditscale.errors import BackendUnavailable, InputError

# Typer brings its own copy of click from 0.25 on and needs click before; both have these two above BadParameter.
_PARENTS: dict[str, Any] = {parent.__name__: parent for parent in typer.BadParameter.__mro__}
_UsageError, _ClickException = _PARENTS["UsageError"], _PARENTS["ClickException"]
# A message holds what came, and that may be a file's worth of characters.
_LONGEST = 1000

app = typer.Typer(
    name="ditscale",
    help="Fast kernels, exact compute accounting and scaling laws for diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _root(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@functools.cache
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
    _prepare_streams()
    try:
        _gather()
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except (InputError, BackendUnavailable) as error:
        _fail(str(error))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "ditscale"
        _fail(f"{_usage(error)} (see: {command} --help)")
    except _ClickException as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.filename is None and not _stdout_fails():
            raise
        _fail(f"{error.filename or 'stdout'}: expected a place that can be read or written, got {error.strerror}")
    except ModuleNotFoundError as error:
        if error.name != "torch":  # the counter and the laws do without it, and so may who installed them
            raise
        _fail("torch: expected to be installed for this command, got none (pip install torch)")
    if code == 130:  # typer makes that of Ctrl-C; who can go on where it was says so itself
        sys.stderr.write("ditscale: stopped\n")
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """A stream that was closed takes everything, and one of few letters (LC_ALL=C) shows what it lacks as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _stdout_fails() -> bool:
    """Whether stdout cannot take what was printed, as on a full disk; what is left of it is then given up."""
    try:
        sys.stdout.write("\n")  # what could not be written need not be waiting to be written any more
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _usage(error: Any) -> str:
    """What is wrong with the words of a command. (Where there are none, the help stands on stdout already.)"""
    if type(error).__name__ == "NoArgsIsHelpError":
        return "expected a command, got none"
    message = str(error.format_message())
    values = _given(getattr(getattr(error, "param", None), "opts", ())) if isinstance(error, typer.BadParameter) else []
    # Some versions of typer say what was expected and not what came.
    return message if not values or repr(values[-1]) in message else f"{message}, got {values[-1]!r}"


def _given(options: Sequence[str]) -> list[str]:
    """The values of an option on the command line."""
    words = sys.argv[1:]
    after = [value for name, value in zip(words, words[1:], strict=False) if name in options]
    return after + [word.partition("=")[2] for word in words if word.partition("=")[0] in options and "=" in word]


def _fail(message: str) -> None:
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 200]} ... {line[-195:]}"
    sys.stderr.write(f"ditscale: {line}\n")
    sys.exit(2)
