"""Processes that load the next items of a list while this one works on an item."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

Item = TypeVar("Item")
Load = Callable[[], Item]


@contextmanager
def read_ahead(loads: Sequence[Load[Item]], n_readers: int) -> Iterator[Iterator[Load[Item]]]:
    """Load items in other processes, in order and no more than one ahead for each process.

    Parameters
    ----------
    loads : sequence of callable
        Each gives an item. With readers, all that it refers to and the item itself must be picklable.
    n_readers : int
        How many processes; 0 = this one, when an item is asked for.

    Yields
    ------
    iterator of callable
        One for each of ``loads``, to be called before the next is taken: gives the item, or raises what its
        load raised.

    Raises
    ------
    RuntimeError
        By such a callable, if the reader ended while it loaded that item. Another takes its place.
    ImportError
        If a reader cannot even begin.

    Notes
    -----
    Each reader has one item at a time: what it loads, or has loaded and waits to hand over. A reader whose
    death ends a load is thus known, as is the load. Readers end with this process, however it ends.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(_reader()) for _ in range(min(n_readers, len(loads)))]
        yield _answers(loads, readers) if readers else iter(loads)


def _answers(loads: Sequence[Load], readers: Sequence[_Reader]) -> Iterator[Load]:
    todo = iter(loads)
    for reader in readers:
        reader.ask(next(todo))
    for reader, _ in zip(cycle(readers), loads, strict=False):
        yield partial(reader.answer, then=next(todo, None))


@contextmanager
def _reader() -> Iterator[_Reader]:
    reader = _Reader()
    try:
        yield reader
    finally:
        reader.end()


class _Reader:
    """A process that loads one item after the other, as it is asked to."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # torch's threads do not survive a fork, and a lock that one of them held stays locked
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.has_begun = False

    def ask(self, load: Load) -> None:
        """Have an item loaded."""
        with suppress(OSError):  # it is dead: `answer` says so
            self.pipe.send(load)

    def answer(self, then: Load | None) -> Any:
        """The item asked for; the next one is asked for at once."""
        outcome = self._outcome()
        if then is not None:
            self.ask(then)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _outcome(self) -> Any:
        try:
            if not self.has_begun:
                self.has_begun = self.pipe.recv()
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            if not self.has_begun:
                raise ImportError(
                    f"a reader must be able to import madad and the main script, got exit code {code}. Put "
                    'what the script does under `if __name__ == "__main__":`, or use --readers 0.'
                ) from None
            self.end()
            self._start()
            return RuntimeError(
                f"the process that prepares a scan must live until it has, got exit code {code}. See whether "
                "there is enough memory, or use --readers 0."
            )

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any) -> None:
    """What a reader does: load what comes through the pipe, and send it back, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the one that asks has ended
        pipe.send(True)
        while True:
            pipe.send(_attempt(pipe.recv()))


def _end_with_parent() -> None:
    """Leave no orphan, even if the one that asks is killed in the middle of a load."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(load: Load[Item]) -> Item | Exception:
    try:
        return load()
    except Exception as error:
        error.add_note(f"In a reader:\n{traceback.format_exc()}")  # a traceback cannot be sent
        return error
