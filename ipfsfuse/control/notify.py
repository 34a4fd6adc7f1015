"""Tells systemd how a service does (sd_notify(3)): ready, reloading, stopping, alive."""

import logging
import os
import socket
import time
from collections.abc import Callable

import trio

log = logging.getLogger("ipfsfuse.mount")

STATUS_SECONDS = 30.0


class Notifier:
    """Sends to the socket that NOTIFY_SOCKET names; does nothing where it names none."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
        usec = os.environ.get("WATCHDOG_USEC", "")
        self._watchdog = int(usec) / 1e6 if usec.isdecimal() and pid == str(os.getpid()) else None

    def send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as exc:
            log.warning("the service manager can't be reached: %s", exc.strerror)

    def reloading(self) -> None:
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def run(self, status: Callable[[], str]) -> None:
        """Says again and again that the event loop runs, and `status`."""
        if not self._address:
            return
        seconds = STATUS_SECONDS if self._watchdog is None else min(self._watchdog / 2, STATUS_SECONDS)
        while True:
            self.send("WATCHDOG=1", f"STATUS={status()}")
            await trio.sleep(seconds)
