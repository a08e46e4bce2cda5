"""A run that is told to stop ends where its state can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Ended by a signal after the state was saved; `code` is the exit code that shells expect (130 for Ctrl-C)."""

    def __init__(self, number: int, note: str) -> None:
        super().__init__(note)
        self.code = 128 + number


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is noted in; a second one acts at once, as without us."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def note(kind: int, _: FrameType | None) -> None:
        noted.append(kind)
        for other, handler in before.items():
            signal.signal(other, handler)

    for kind in before:
        signal.signal(kind, note)
    try:
        yield noted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
