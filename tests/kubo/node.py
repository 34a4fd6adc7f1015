"""A real Kubo node for tests and measurements. It uses only the loopback network.

    with Node() as node:                        # own repository in a temporary folder, daemon started, ready
        cid = node.add(b"hello")                # or node.cmd("add", "-Q", path), which returns the output
        node.cmd("cat", cid, text=False)        # bytes
        node.rpc("pin/ls", arg=cid)             # the RPC API without starting a program, 100 times as fast
        node.api_url, node.gateway_url          # http://127.0.0.1:PORT, the same after a restart
        node.repo                               # its IPFS_PATH
        node.restart(); node.stop(); node.start(); node.kill()
        with Node() as other:
            node.connect(other)                 # the two are a network

In pytest use the fixtures `kubo_node` (one for the whole session: unpin what you pin, and do not stop it),
`own_node` (one for the test, which may stop it and collect its garbage) or `two_nodes` (two for the test,
connected). They skip the test if there is no `ipfs` on PATH, in $IPFSFUSE_IPFS or built by
`tests/kubo/build`. With IPFSFUSE_REQUIRE_KUBO=1 they fail it instead.

A node is ready after about 0.1 s. Do not `add` while garbage is collected in a loop: Kubo 0.43 deadlocks.

Concurrency: all calls block. Any thread may call them, but not an event loop.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

VERSION = "v0.43.0"
READY = "Daemon is ready"
PATIENCE = 60.0
"""Seconds for a daemon to be ready or to end. It is far more than they need, so that no test fails on a busy
machine."""


def cache_folder() -> Path:
    """Where `tests/kubo/build` puts the program."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ipfsfuse-tests" / f"kubo-{VERSION}"


def find_ipfs() -> Path | None:
    """The program: $IPFSFUSE_IPFS, else `ipfs` on PATH, else what `tests/kubo/build` made. None if there is
    none."""
    named = os.environ.get("IPFSFUSE_IPFS")
    if named:
        return Path(named)
    found = shutil.which("ipfs")
    if found:
        return Path(found)
    built = cache_folder() / "ipfs"
    return built if built.exists() else None


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports: two calls of `free_port` may return the same."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def keep_on_loopback(config: dict[str, Any], swarm: int, api: int, gateway: int) -> None:
    """Edits a node's configuration so that it connects to, and listens on, only 127.0.0.1."""
    config["AutoConf"] = {"Enabled": False}
    config["AutoTLS"] = {"Enabled": False}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Bootstrap"] = []
    config["DNS"] = {"Resolvers": {}}
    config["Discovery"] = {"MDNS": {"Enabled": False}}
    config["Ipns"]["DelegatedPublishers"] = []
    config["Routing"] = {"Type": "none", "DelegatedRouters": []}
    config["Swarm"] |= {
        "DisableNatPortMap": True,
        "RelayClient": {"Enabled": False},
        "RelayService": {"Enabled": False},
    }
    config["Version"] = {"SwarmCheckEnabled": False}
    config["Plugins"] = {"Plugins": {"telemetry": {"Config": {"Mode": "off"}}}}
    config["Addresses"] = {
        "Swarm": [f"/ip4/127.0.0.1/tcp/{swarm}"],
        "Announce": [],
        "AppendAnnounce": [],
        "NoAnnounce": [],
        "API": f"/ip4/127.0.0.1/tcp/{api}",
        "Gateway": f"/ip4/127.0.0.1/tcp/{gateway}",
    }


class Node:
    """One node. `settings` are laid over its configuration, one level deep: `{"Mounts": {"IPFS":
    "/..."}}`."""

    def __init__(
        self, program: Path | None = None, *, settings: dict[str, dict[str, Any]] | None = None
    ) -> None:
        found = program or find_ipfs()
        if found is None:
            raise FileNotFoundError("no ipfs program: run tests/kubo/build")
        self.program = found
        self.settings = settings or {}
        self.process: subprocess.Popen[bytes] | None = None
        self._swarm, api, gateway = free_ports(3)
        self.api_url = f"http://127.0.0.1:{api}"
        self.gateway_url = f"http://127.0.0.1:{gateway}"
        self._ports = self._swarm, api, gateway
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="ipfsfuse-kubo-", ignore_cleanup_errors=True)
                )
            )
            self.repo = self.folder / "repo"
            self.init()
            self.start()
            stack.callback(self.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def init(self) -> None:
        """Makes the repository, which must not exist."""
        self.cmd("init", "--profile=test")
        path = self.repo / "config"
        config = json.loads(path.read_text())
        keep_on_loopback(config, *self._ports)
        for section, values in self.settings.items():
            config[section] = config.get(section, {}) | values
        path.write_text(json.dumps(config, indent=2))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"IPFS_PATH": str(self.repo), "IPFS_TELEMETRY": "off"}

    @property
    def log(self) -> str:
        """What the daemon printed since it was last started."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def peer_address(self) -> str:
        return f"/ip4/127.0.0.1/tcp/{self._swarm}/p2p/{self.rpc('id')['ID']}"

    def start(self) -> None:
        """Starts the daemon and waits until it is ready."""
        with (self.folder / "log").open("wb") as log:
            command = [str(self.program), "daemon"]
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while READY not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the Kubo daemon did not start:\n{self.log}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the daemon as a user would, and waits for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process = None

    def kill(self) -> None:
        """Ends the daemon as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            # the file that a crash leaves would make the next command ask a dead port
            (self.repo / "api").unlink(missing_ok=True)
        self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Makes the daemon hang until `resume`: it accepts connections and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def connect(self, other: "Node") -> None:
        self.rpc("swarm/connect", arg=other.peer_address)

    @overload
    def cmd(self, *args: str | Path, stdin: bytes | str = b"", text: Literal[True] = True) -> str: ...

    @overload
    def cmd(self, *args: str | Path, stdin: bytes | str = b"", text: Literal[False]) -> bytes: ...

    def cmd(self, *args: str | Path, stdin: bytes | str = b"", text: bool = True) -> str | bytes:
        """Runs `ipfs ARGS`. Returns what it prints: as text without the newline at the end, or as bytes.

        Raises RuntimeError with its standard error."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [self.program, *args],
            env=self.environment,
            cwd=self.folder,
            input=data,
            capture_output=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"ipfs {' '.join(map(str, args))}: {done.stderr.decode(errors='replace').strip()}"
            )
        return done.stdout.decode().rstrip("\n") if text else done.stdout

    def rpc(self, path: str, timeout: float = 60.0, **args: str | int | bool) -> Any:
        """POSTs to the RPC API. Returns the JSON of the answer, or its text if it is not JSON. Raises
        RuntimeError with the node's message."""
        texts = {
            key.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
            for key, value in args.items()
        }
        query = urllib.parse.urlencode(texts)
        request = urllib.request.Request(f"{self.api_url}/api/v0/{path}?{query}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                body = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as exc:
            raise RuntimeError(f"{path}: {exc.read().decode(errors='replace').strip()}") from exc
        try:
            return json.loads(body)
        except ValueError:
            return body

    def add(self, data: bytes, *options: str) -> str:
        """The CID of `data`, added as one file (and pinned, unless --pin=false is among the options)."""
        return self.cmd("add", "-Q", *options, stdin=data)

    def has(self, cid: str) -> bool:
        """Whether the node has the block. The node does not ask other nodes for it."""
        try:
            self.rpc("block/stat", arg=cid, offline=True)
        except RuntimeError:
            return False
        return True

    def gc(self) -> None:
        self.rpc("repo/gc", quiet=True)
