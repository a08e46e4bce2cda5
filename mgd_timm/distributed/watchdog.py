"""A process that dies or hangs ends the others within a minute and by name; else they wait for it until a collective
times out.

Every process has a thread that gives a sign of life over a connection of its own: all to the first process, and the
first to all. The main thread may meanwhile decode for an hour or wait in a collective: a process that is only slow is
never ended. One that was killed closes its connection; one that is stopped, or on a machine that is gone, falls silent.
Clocks are not compared, and the time in which the watching process stood still itself (Ctrl-Z) does not count.

One whose main thread hangs while the process lives (a read that never returns, a deadlock, a reader of images that is
stuck) is found by what `headway` says with the signs of life: in a loop of training, of evaluation or of the teacher's
outputs, from its fourth step on, the others wait in a collective that it has not come to, and for the limit, or ten of
its longest steps, it has neither computed nor read. That much is on Linux. What is not found, and left to the
collective's time-out: a process that computes for ever, or waits for a device that does; one that hangs outside of such
a loop; a deadlock of all, of whom none is behind. What cannot be told from a hang is storage that answers again only
after the limit: give a longer one. A stream from the hub has it.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from mgd_timm.distributed.headway import Headway, Place

LIMIT = 40.0
"""Seconds of silence, or of doing nothing while others wait for it, after which a process counts as hung.

The environment variable MGD_TIMM_SILENCE sets others; 0 watches none (for a debugger).

A library that holds the interpreter's lock for as long would look hung: raise it then.
"""
GRACE = 5.0
"""Seconds that the main thread has for ending by itself (a checkpoint under way, an error of its own) once a process is
lost."""
CODE = 75
"""Exit code of a process that another one's end has ended: sysexits.h's temporary failure, worth another start with
--resume."""
_CONNECT = 10.0  # seconds for all processes to reach the first


@dataclass
class _Peer:
    """A process at the other end of a connection."""

    rank: int
    link: socket.socket
    unread: bytes = b""
    silent: float = 0.0


class Watchdog:
    """The thread of one process; `start` makes it.

    Args:
        rank: Of this process.
        processes: Host, pid, start time and parent's pid of every process, by rank.
        links: Connections by rank: of the first process to all others, of these to the first.
        limit: Seconds of silence after which a process counts as hung.
    """

    def __init__(
        self, rank: int, processes: list[tuple[str, int, float, int]], links: dict[int, socket.socket], limit: float
    ) -> None:
        self.rank, self.processes, self.limit = rank, processes, limit
        self.headway = Headway(limit)
        self.places: dict[int, Place] = {}
        self.last: list[int] = []
        self.waited: dict[int, float] = {}  # seconds that others have waited for those that are last and idle
        self.hung: int | None = None
        self.interval = min(2.0, limit / 8)
        self.peers = [_Peer(rank, link) for rank, link in links.items()]
        self.ended, self.wake = socket.socketpair()
        self.lost, self.stopping = threading.Event(), threading.Event()
        self.verdict, self.said = "", False
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def name(self, rank: int) -> str:
        """What messages call a process."""
        host, pid, *_ = self.processes[rank]
        return f"rank {rank} ({host}, pid {pid})"

    # -- of the main thread
    # -----------------------------------------------------------------------------------------------------

    def stop(self, failure: str | None = None) -> None:
        """Part from the others: this process ends, or has failed, which ends them too."""
        self.stopping.set()
        self.wake.send(b".")
        self.thread.join(GRACE)
        self._send(["left"] if failure is None else ["failed", failure])
        self.close()

    def close(self) -> None:
        """Close this process's ends of the connections."""
        for end in (self.ended, self.wake, *(peer.link for peer in self.peers)):
            end.close()

    def end_if_lost(self) -> None:
        """End this process, quietly after one line, if another one is gone: why a collective failed just now."""
        if self.lost.wait(GRACE):
            self._end()

    # -- of the thread
    # ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.ended, selectors.EVENT_READ)
            for peer in self.peers:
                selector.register(peer.link, selectors.EVENT_READ, peer)
            before = beaten = time.monotonic()
            while not self.stopping.is_set() and not self.lost.is_set():
                ready = [key.data for key, _ in selector.select(self.interval) if key.data is not None]
                now = time.monotonic()
                passed, before = min(now - before, 2 * self.interval), now  # longer: this process stood still as well
                for peer in list(self.peers):
                    peer.silent += passed
                    if peer in ready and not self._read(peer):
                        selector.unregister(peer.link)
                        self.peers.remove(peer)
                        self.places.pop(peer.rank, None)
                        peer.link.close()
                    elif peer in ready:
                        peer.silent = 0.0
                    elif peer.silent >= self.limit:
                        self._lose(
                            peer.rank,
                            f"has given no sign of life for {self.limit:g} s: it hangs, or its machine is gone",
                        )
                        self._kill_sibling(peer.rank)
                if now - beaten >= self.interval:
                    self._beat(min(now - beaten, 2 * self.interval))
                    beaten = now
        # One that hangs has nothing to end: it goes before the others, who would have to kill it, but once they have
        # read why.
        if self.lost.is_set() and not self.stopping.wait(GRACE / 5 if self.hung == self.rank else GRACE):
            if self.hung is not None and self.hung != self.rank:
                self._kill_sibling(self.hung)
            self._end()

    def _beat(self, passed: float) -> None:
        place = self.headway.look(passed)
        if self.rank:
            self._send(["at", *place])
        else:
            self._send(None)
            self._judge(0, place, passed)

    def _judge(self, rank: int, place: Place, passed: float) -> None:
        """In the first process: note where a process is, and end them all if those that are last have hung for too
        long.

        All of the last: one of them might wait for another one, such as for its lock on a file, which is only slow.
        """
        self.places[rank] = place
        begun = [known.collectives for known in self.places.values()]
        alike = len(begun) == 1 + len(self.peers) and len({known.serial for known in self.places.values()}) == 1
        waited_for = alike and min(begun) < max(begun)
        last = sorted(other for other, known in self.places.items() if waited_for and known.collectives == min(begun))
        if last != self.last or (rank in last and not place.idle):
            self.last, self.waited = last, dict.fromkeys(last, 0.0)
        elif rank in last:
            self.waited[rank] += passed
        if last and all(self.waited[other] >= self.places[other].allowed for other in last):
            place = self.places[last[0]]
            waited = f"for {self.waited[last[0]]:.0f} s others have waited for it while it neither computed nor read"
            self._lose(last[0], f"hangs in {place.step} at {place.where}: {waited}", hung=True)

    def _read(self, peer: _Peer) -> bool:
        """Take in what a process says; False once it says no more."""
        try:
            said = peer.link.recv(1 << 16)
        except OSError:  # reset: it was killed with words of ours unread
            said = b""
        *lines, peer.unread = (peer.unread + said).split(b"\n")
        for line in filter(None, lines):
            word, *rest = json.loads(line)
            if word == "at":
                self._judge(peer.rank, Place(*rest), min(peer.silent, 2 * self.interval))
                peer.silent = 0.0
                continue
            if word == "left":
                return False
            if word == "failed":
                self._lose(
                    peer.rank, f"failed: {rest[0]}", quietly=True
                )  # it has said so itself, and the same may come here
                return False
            self._lose(*rest)
        if not said:
            self._lose(peer.rank, "is gone: it was killed, or its machine was")
        return bool(said)

    def _lose(self, rank: int, why: str, quietly: bool = False, hung: bool = False) -> None:
        if self.lost.is_set():
            return
        self.verdict = (
            f"{self.name(rank)} {why.rstrip('.')}. All processes end; whole checkpoints stay: start again with "
            "--resume."
        )
        if self.rank == 0:  # the first process tells the others
            self._send(["lost", rank, why, quietly, hung])
        if hung:
            self.hung = rank
        if self.hung == self.rank:
            self.verdict += f"\nIts main thread is here:\n{self.headway.stack()}"
        if not quietly:
            self._say()
        self.lost.set()

    def _kill_sibling(self, rank: int) -> None:
        """End a process that hangs beside this one: their launcher would ask it to, and wait."""
        _, pid, started, parent = self.processes[rank]
        with contextlib.suppress(psutil.Error, OSError):
            hung = psutil.Process(pid)
            if parent == os.getppid() == hung.ppid() and abs(hung.create_time() - started) < 1:
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _send(self, words: list[Any] | None) -> None:
        line = (json.dumps(words) if words is not None else "").encode() + b"\n"
        for peer in self.peers:
            with contextlib.suppress(OSError):  # gone: to be read from the connection
                peer.link.sendall(line)

    def _say(self) -> None:
        with self.lock:
            if not self.said:
                os.write(2, f"\nmgd-timm: error: {self.verdict}\n".encode())  # whatever the main thread holds
            self.said = True

    def _end(self) -> None:
        """The main thread may wait in a collective, which nothing but the end of the process interrupts."""
        self._say()
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                if child.daemon:  # as Python does at its exit; a reader that hangs would live on
                    child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(CODE)


_running: Watchdog | None = None
_started = False  # on all processes alike, also on one that does not reach the first


def start(accelerator: Accelerator) -> None:
    """Watch over the processes of a launch, once; called by all of them."""
    global _running, _started
    if _started or accelerator.num_processes == 1:
        return
    limit = _limit()
    server, token = None, secrets.token_hex()
    if accelerator.is_main_process:
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(accelerator.num_processes)
        server = socket.create_server(("127.0.0.1" if alone else "", 0), backlog=accelerator.num_processes)
        place = "127.0.0.1" if alone else os.environ.get("MASTER_ADDR", "127.0.0.1")
        told = [(place, server.getsockname()[1], token, limit)]
    else:
        told = [("", 0, "", 0.0)]
    broadcast_object_list(told)
    place, port, token, limit = told[0]
    own = psutil.Process()
    processes = gather_object([(socket.gethostname(), own.pid, own.create_time(), os.getppid())])
    if not limit:
        links = {}
    elif server is not None:
        links = _accept(server, token, accelerator.num_processes)
    else:
        links = _connect(place, port, token, accelerator.process_index)
    if server is not None:
        server.close()
        missing = set(range(1, accelerator.num_processes)) - set(links) if limit else set()
        for rank in sorted(missing):
            accelerator.print(
                f"warning: rank {rank} does not reach {place}:{port}: if it hangs, it is noticed late. Open the "
                "network between the machines, or silence this with MGD_TIMM_SILENCE=0."
            )
    _started = True
    if links:
        _running = Watchdog(accelerator.process_index, processes, links, limit)


def _limit() -> float:
    """Seconds of silence that are allowed.

    Raises:
        ValueError: MGD_TIMM_SILENCE is no number of seconds.
    """
    text = os.environ.get("MGD_TIMM_SILENCE", str(LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf") or 0 < limit < 1:
        raise ValueError(
            f"MGD_TIMM_SILENCE={text!r}: expected seconds of silence, 1 or more, or 0 for no watch over the processes."
        )
    return limit


def _accept(server: socket.socket, token: str, processes: int) -> dict[int, socket.socket]:
    """The others' connections, by rank; a stranger's is closed."""
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT
    while len(links) < processes - 1 and time.monotonic() < deadline:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            link, _ = server.accept()
            link.settimeout(1.0)
            with contextlib.suppress(OSError, ValueError):
                given, rank = link.recv(256).decode().split()
                if secrets.compare_digest(given, token):
                    link.send(b"\n")
                    links[int(rank)] = link
                    continue
            link.close()
    return links


def _connect(place: str, port: int, token: str, rank: int) -> dict[int, socket.socket]:
    """The connection to the first process; none where it cannot be reached."""
    try:
        link = socket.create_connection((place, port), timeout=_CONNECT)
        link.settimeout(6 * _CONNECT)  # it answers or closes; who goes away before would count as killed
        link.sendall(f"{token} {rank}".encode())
        if link.recv(1) == b"\n":
            return {0: link}
    except OSError:
        pass
    return {}


def stop(failure: str | None = None) -> None:
    """End the watch of this process, which parts from the others in peace, or has failed."""
    global _running, _started
    _started = False
    if _running is not None:
        dog, _running = _running, None
        dog.stop(failure)


def end_if_lost() -> None:
    """Where another process is gone, end this one: that is why it failed. Waits a few seconds for the news."""
    if _running is not None:
        _running.end_if_lost()


@atexit.register
def _at_exit() -> None:
    """Of a script that does not say `processes.leave`."""
    error = getattr(sys, "last_value", None)
    stop(f"{type(error).__name__}: {error}" if error is not None else None)


def _in_fork() -> None:
    """A loader's worker would hold the connections open after its parent's death."""
    global _running
    if _running is not None:
        _running.close()
        _running = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)
