"""The terminal: tables, by rich where it is installed, aligned text elsewhere; and what a command refuses."""

import argparse
import contextlib
import logging
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

WIDTH = 100


class UsageError(Exception):
    """What the user asked for cannot be done as asked: printed, exit code 2."""


def make_folder(path: Path) -> None:
    """The folder of an --out option. Raises UsageError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {error}") from error


def refuse_foreign(options: argparse.Namespace, mode: str, modes: Mapping[str, Collection[str]]) -> None:
    """Raise UsageError for an option, not at its default, that only other modes of the command have.

    modes: mode -> its options beside those that all have; options.default_of: a parser's get_default.
    """
    for name in dict.fromkeys(name for names in modes.values() for name in names):
        if name not in modes[mode] and getattr(options, name) != options.default_of(name):
            flag = f"--{name.replace('_', '-')}"
            takers = " or ".join(other for other, names in modes.items() if name in names)
            raise UsageError(f"{flag} is no option of {mode}: {flag} needs {takers}")


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Without what bitsandbytes and torchao, which PEFT imports where they are, say of a machine without a GPU."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def progress(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces; nothing where stderr is a file."""
    if sys.stderr.isatty():
        fits = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line would not be replaced
        print(f"\r\033[K{fits}", end="", file=sys.stderr, flush=True)


def rich_console():
    """A rich Console, WIDTH columns wide where the output is not a terminal; None without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows of strings under `columns`; the first `left` columns are left-aligned, the others right-aligned."""
    console = rich_console()
    if console is None:
        print(_plain(title, columns, rows, left))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i < left else "right", no_wrap=i < left)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    text = [title]
    for line in lines:
        cells = zip(line, widths, strict=True)
        text.append(
            "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()
        )
    return "\n".join([*text, ""])
