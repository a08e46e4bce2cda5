"""A run that is told to stop by a signal first saves its state."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Stopped by a signal after the state was saved; `code` is the exit code that shells expect (130 for Ctrl-C)."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list to which the first SIGINT or SIGTERM is appended; a second one acts as it would without this."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def catch(kind: int, _: FrameType | None) -> None:
        caught.append(kind)
        for other, handler in before.items():
            signal.signal(other, handler)

    for kind in before:
        signal.signal(kind, catch)
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
