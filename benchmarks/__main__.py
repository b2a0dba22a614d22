"""Measures Valkyrie beside its peers, and writes the tables of docs/performance.md.

python -m benchmarks --quick            about a minute; shows, writes nothing
python -m benchmarks --only wkv train   two of them in full, results and tables are kept
python -m benchmarks                    all of them in full: let nothing else run meanwhile
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import quiet, result, tables
from benchmarks.menu import MENU, Benchmark
from benchmarks.result import Result, ResultError
from benchmarks.timing import Announce
from valkyrie_core.errors import ValkyrieError

log = logging.getLogger("valkyrie")
STOPPED = 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with 2 and one helpful line where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them; see --list")
    parser.add_argument("--list", action="store_true", help="name them and stop")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results there instead")
    parser.add_argument(
        "--tables", action="store_true", help="make the tables from the kept results and stop"
    )
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in MENU:
            near = difflib.get_close_matches(name, MENU, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MENU)}"
            parser.error(f"no benchmark {name!r}: {hint}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks that the command line names.

    Returns:
        0; 1 where one could not run; 130 after Ctrl-C, with what was finished kept.
    """
    options = parse(arguments)
    errors = Console(stderr=True)
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    if options.list:
        for entry in MENU.values():
            print(f"{entry.name:10} {entry.title}")
        return 0
    try:
        if options.tables:
            tables.write()
            return 0
        names = options.only or list(MENU)
        return _run([MENU[name] for name in names], options, errors)
    except ResultError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        return 1


def _run(chosen: list[Benchmark], options: argparse.Namespace, errors: Console) -> int:
    with tempfile.TemporaryDirectory() as empty:
        # a first call that finds its graph in yesterday's cache would look cheaper than it is
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        return _run_all(chosen, options, errors)


def _run_all(chosen: list[Benchmark], options: argparse.Namespace, errors: Console) -> int:
    if (sentence := quiet.disturbance()) is not None:
        log.warning(sentence)
    keep_memory()
    failed = False
    keeps, folder = options.out is not None or not options.quick, options.out or result.RESULTS
    if keeps:
        # before minutes of measuring, not after
        result.check_writable(folder)
    for position, entry in enumerate(chosen):
        try:
            with _progress(entry.name, errors) as announce:
                found = measure(entry, "QUICK" if options.quick else "FULL", announce)
        except KeyboardInterrupt:
            done = ", ".join(x.name for x in chosen[:position]) or "nothing"
            kept = "finished and kept" if keeps else "finished"
            errors.print(f"stopped; {kept}: {done}")
            return STOPPED
        except (ValkyrieError, ValueError, MemoryError, OSError) as error:
            errors.print(f"[red]{entry.name} could not run:[/] {escape(str(error))}")
            failed = True
            continue
        old = result.load(entry.name, found.origin.kind, folder) if found.absent else None
        found = found if old is None or not keeps else found.keeping(old)
        print(tables.text(found), flush=True)
        if keeps:
            result.save(found, folder)
        if options.out is None and not options.quick:
            tables.write()
    return int(failed)


def measure(entry: Benchmark, sizes: str, announce: Announce) -> Result:
    """Runs one benchmark and says where, when and how disturbed."""
    watch = quiet.Watch()
    began = time.perf_counter()
    findings = entry.run(entry.sizes(sizes), announce)
    others = watch.others_share()
    if others is not None and others >= quiet.NOISY:
        log.warning("%s: other processes used %.0f%% of the cores", entry.name, 100 * others)
    for peer, reason in findings.absent.items():
        log.warning("%s is left out: %s", peer, reason)
    return Result(
        entry.name,
        result.origin(entry.packages),
        time.perf_counter() - began,
        others,
        tuple(findings.ratios),
        tuple(findings.measurements),
        tuple(findings.notes),
        findings.absent,
    )


def keep_memory() -> None:
    """Lets the C library keep freed memory, as training does: all peers profit alike."""
    importlib.import_module("valkyrie_core.train.allocator").keep_memory()


@contextmanager
def _progress(name: str, console: Console) -> Iterator[Announce]:
    """A line on stderr that says what is measured now."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # one frame a second: what draws takes time from what is measured
    with Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress:
        task = progress.add_task(name)
        yield lambda text: progress.update(task, description=escape(f"{name}: {text}"))


if __name__ == "__main__":
    sys.exit(main())
