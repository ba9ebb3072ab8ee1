"""What the command line prints on: results on stdout, everything else on stderr.

On a terminal in colour and with bars; elsewhere (a pipe, a log, NO_COLOR) plain lines. Rich tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

ShowProgress = Callable[[str, int, int], None]  # what is being done, how much, of how much

# Not on a terminal, lines stay whole: whoever reads a pipe cuts them where it wants.
_PIPE_WIDTH = 160

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
if not out.is_terminal:
    out = Console(highlight=False, width=_PIPE_WIDTH)
if not err.is_terminal:
    err = Console(stderr=True, highlight=False, width=_PIPE_WIDTH, soft_wrap=True)


def show_error(message: str) -> None:
    err.print("[bold red]error:[/]", end=" ")
    err.print(message, markup=False, soft_wrap=True)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[ShowProgress]:
    """Bars for work that reports (label, done, total) and may change its label; plain lines at each tenth elsewhere."""
    if quiet or err.no_color or not err.is_terminal:
        yield _lines(quiet)
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=err) as progress:
        tasks = {}

        def show(label: str, done: int, total: int) -> None:
            # A single step has no share that is done: its bar pulses until it is over.
            known_total = None if total == 1 and not done else total
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=known_total)
            progress.update(tasks[label], completed=done, total=known_total)

        yield show


def _lines(quiet: bool) -> ShowProgress:
    shown: dict[str, int] = {}

    def show(label: str, done: int, total: int) -> None:
        tenth = done * 10 // max(total, 1)
        if quiet or tenth <= shown.get(label, -1):
            return
        is_one_step = total == 1
        if not is_one_step:
            err.print(f"{label}: {tenth * 10} %", markup=False)
        elif label not in shown:
            err.print(f"{label} ...", markup=False)
        shown[label] = tenth

    return show
