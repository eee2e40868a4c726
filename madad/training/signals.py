"""A first Ctrl-C or SIGTERM asks training to stop after its step; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from madad._runtime.distributed import Team


class StopRequest:
    """What a signal leaves for the training that looks at it after each step.

    Attributes
    ----------
    signal : signal.Signals or None
        The first one that came.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame) -> None:
        """Note the signal ``number``; ``frame`` is what Python hands to a handler."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def agree(self, team: Team, elapsed_s: float = 0.0) -> tuple[bool, float]:
        """Whether a signal came to any process of ``team``, and the longest of their times ``elapsed_s``."""
        number, longest_s = team.highest(self.signal or 0, elapsed_s)
        if number:
            self.signal = self.signal or signal.Signals(int(number))
        return bool(number), longest_s


_surrounding: StopRequest | None = None


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM end every `Trainer.optimise` inside in good order, instead of the process.

    Around several calls: a signal during the first makes the later ones stop after their first step. A second
    SIGINT raises KeyboardInterrupt at once. The former handlers come back at the end. Inside another one it
    gives that one's request; outside the main thread, where Python handles no signals, one that never comes.

    Yields
    ------
    StopRequest
    """
    global _surrounding
    if _surrounding is not None or threading.current_thread() is not threading.main_thread():
        yield _surrounding or StopRequest()
        return
    request, former = StopRequest(), {}
    try:
        _surrounding = request
        for number in (signal.SIGINT, signal.SIGTERM):
            # what is ignored (nohup) stays so, and what C code handles could not be put back
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                former[number] = signal.signal(number, request)
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _surrounding = None
