"""A running `ipfsfuse serve`, and requests to it."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from tests.mounting import PATIENCE, Home


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def blocks(self) -> list[str]:
        """The CIDs of a CAR's blocks, in order; each block is verified."""
        at, found = car.header_length(self.body), []
        car.decode_header(self.body[:at])
        while at < len(self.body):
            section = car.section(self.body, at)
            cids.verify(section.cid, self.body[section.block : section.end])
            found.append(cids.text(section.cid))
            at = section.end
        return found


class Server:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        (self.url,) = json.loads(line)["listening"]
        self.address = self.url.removeprefix("http://")

    def ask(self, target: str, *, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, target, headers=named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@contextmanager
def serving(home: Home, *options: str | Path) -> Iterator[Server]:
    command = [
        sys.executable,
        "-m",
        "ipfsfuse",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--json",
        *map(str, options),
    ]
    process = subprocess.Popen(
        command, env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _out, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors
