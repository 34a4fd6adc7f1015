"""`--replay`: repeats a recorded run offline from its CAR file, and compares the results."""

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import UsageError
from ipfsfuse.text import printable
from ipfsfuse_run import host_folders, limits, read_paths, receipts, sandbox, supervisor
from ipfsfuse_run.child import MAX_GUEST, Plan
from ipfsfuse_run.errors import ReceiptRefused, trap_text
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.options import Dir, Options
from ipfsfuse_run.receipts import Digest, Receipt
from ipfsfuse_run.record import Record, check_content, check_signature, open_record, receipt_alone, tree_cid
from ipfsfuse_run.recording import digest_of, logged_blocks, open_mount, this_machine
from ipfsfuse_run.supervisor import Outcome, RunFiles


class Verdict(NamedTuple):
    """One result, as recorded and as repeated."""

    what: str
    recorded: object
    now: object

    @property
    def same(self) -> bool:
        return self.recorded == self.now


REPLAY_LIMITS = Limits(
    timeout=600.0,
    max_memory_size=1 << 30,
    max_wasm_stack=8 << 20,
    max_stdout=64 << 20,
    max_out=1 << 30,
    max_stdin=64 << 20,
)
"""The limits of a replay without -W. A recording may come from anyone, so its own limits can only be
stricter."""

_DATA_SPARE = 512 << 20
"""Bytes that a replay's process may use besides the guest's memory."""


def limits_for(path: Path, receipt: Receipt, given: Limits) -> Limits:
    """The limits of `given`, by default the recorded ones, by default REPLAY_LIMITS. Raises ReceiptRefused if
    the recording needs more; the message names the -W to give."""
    shown = {
        "timeout": receipt.seconds,
        "max_stdout": max(
            receipt.stdout.size, 0 if receipt.trapped and receipt.format == 1 else receipt.stderr.size
        ),
        "max_stdin": receipt.stdin.size,
    }
    chosen = given.with_defaults(receipt.limits)
    for name, most in REPLAY_LIMITS._asdict().items():
        if most is None:
            continue
        needed = max(shown.get(name, 0), getattr(receipt.limits, name) or 0)
        if getattr(given, name) is None:
            if needed > most:
                text = limits.value_text(name, math.ceil(needed))
                raise ReceiptRefused(
                    f"{path} needs more than a replay gives "
                    f"({limits.option(name)}={limits.value_text(name, most)}): "
                    f"if you trust it, give -W {limits.option(name)}={text}"
                )
            if getattr(chosen, name) is None and name != "max_wasm_stack":  # wasmtime's own is smaller
                chosen = chosen._replace(**{name: most})
    if chosen.max_stdin is not None and receipt.stdin.size > chosen.max_stdin:
        raise ReceiptRefused(
            f"{path} has {receipt.stdin.size} bytes of standard input: more than the given max-stdin"
        )
    return chosen


def replay(options: Options) -> int:
    """Repeats a recorded run and prints which results are the same. Returns 0 if all are, else DIFFERENT; the
    negated number of a signal if one ended it.

    The limits of `options` take precedence over those of the receipt. Raises ReceiptRefused if the run could
    not be repeated."""
    assert options.replay is not None
    path, given = Path(options.replay), options.limits
    if receipt_alone(path) is not None:
        raise ReceiptRefused(
            f"{path} is a receipt alone, without the guest and the blocks: record to a .car to replay"
        )
    key = None
    if options.key is not None:
        from ipfsfuse_run import signatures

        key = signatures.public_key(options.key)
    with contextlib.ExitStack() as stack:
        files = RunFiles(*(stack.enter_context(tempfile.TemporaryFile()) for _ in RunFiles._fields))
        with open_record(path) as (car, receipt):
            chosen = limits_for(path, receipt, given)
            if key is not None:
                check_signature(car, receipt, key, chosen.out_bytes)
            for name in receipt.contents or [receipts.STDIN]:
                # a smaller max-stdout is for the guest that runs now: the recorded streams are only hashed
                bound = (
                    chosen.max_stdin
                    if name == receipts.STDIN
                    else max(chosen.max_stdout or 0, REPLAY_LIMITS.max_stdout or 0)
                )
                check_content(car, receipt, name, files.stdin if name == receipts.STDIN else None, bound)
            if options.out is not None and receipt.out is None:
                raise UsageError(f"--out {options.out}: the recorded run had no /out")
            recorded = repeated_options(path, receipt, options, chosen)
            most_of_guest = min(MAX_GUEST, max(64 << 20, 4 * car.size))
            files.guest.writelines(car.content(receipt.guest, most_of_guest))
            files.guest.seek(0)
            files.stdin.seek(0)
            dirs = _blocks_below(car, receipt)
            folder = None
            if receipt.out is not None:
                given_out = (
                    host_folders.scratch_folder("out", os.getpid()) if options.out is None else options.out
                )
                folder = host_folders.results_folder(given_out)
        try:
            repeated = _repeat(recorded, receipt, files, folder)
        finally:
            if folder is not None and options.out is None:
                host_folders.remove_tree(folder.path)
        outcome = repeated.outcome
        if outcome.signal is not None:
            return -outcome.signal
        if outcome.refused is not None:
            raise ReceiptRefused(f"the recorded run can't be repeated here: {outcome.refused}")
        known = given.with_defaults(receipt.limits)._asdict()
        ours = {
            limits.option(name): limits.value_text(name, most)
            for name, most in chosen._asdict().items()
            if most is not None and known[name] is None
        }
        name = limits.option(outcome.limit or "")
        if name in ours:
            raise ReceiptRefused(
                f"{path} needs more than a replay gives ({name}={ours[name]}): if you trust it, give a "
                f"larger -W {name}"
            )
        if options.show:
            for file, target in ((files.stdout, 1), (files.stderr, 2)):
                file.seek(0)
                with open(target, "wb", closefd=False) as shown:
                    shutil.copyfileobj(file, shown)
        return _say_verdicts(receipt, repeated.verdicts(receipt, dirs), ours, show=options.show)


def _say_verdicts(receipt: Receipt, verdicts: Sequence[Verdict], ours: Mapping[str, str], show: bool) -> int:
    """Prints the verdicts and returns the exit code. With `show`, they go to standard error, because standard
    output is the guest's."""
    to = sys.stderr if show else sys.stdout
    now = this_machine()
    for name, then in receipt.versions.items():
        if name in now and then != now[name]:
            print(f"{name}: {printable(then)} then, {now[name]} now", file=to)
    for each in verdicts:
        print(
            f"{each.what}: the same"
            if each.same
            else f"{each.what}: DIFFERENT, recorded {each.recorded}, now {each.now}",
            file=to,
        )
    if all(each.same for each in verdicts):
        return 0
    print(f"not fixed in this record: {', '.join(receipt.differs)}", file=to)
    if ours:
        limited = ", ".join(f"{name}={most}" for name, most in ours.items())
        print(f"limits of this replay alone: {limited}", file=to)
    return DIFFERENT


DIFFERENT = 3
"""The exit code of a replay with different results."""


class _Repeated(NamedTuple):
    outcome: Outcome
    stdout: Digest
    stderr: Digest
    out: Cid | None
    read: Sequence[Cid]

    def verdicts(self, receipt: Receipt, of_dirs: frozenset[bytes]) -> list[Verdict]:
        """`of_dirs`: the blocks of the folders of --dir. Only a replay reads them from the mount."""
        found = [
            Verdict("stdout", receipt.stdout, self.stdout),
            Verdict("stderr", receipt.stderr, self.stderr),
            Verdict(
                "exit code",
                _end(receipt.exit_code, receipt.trapped, receipt.limit),
                _end(
                    self.outcome.code,
                    self.outcome.trapped,
                    self.outcome.limit if receipt.format > 1 else None,
                ),
            ),
        ]
        if receipt.format == 1:
            return found
        if receipt.out is not None:
            found.append(Verdict("out", cids.text(receipt.out), self.out and cids.text(self.out)))
        held = {cids.multihash(each) for each in receipt.read}
        asked = {cids.multihash(each) for each in self.read}
        found.append(_compared("read", held, (asked & held) | (held & of_dirs)))
        lacked = {cids.multihash(each) for each in receipt.missing}
        found.append(_compared("missing", lacked, asked - held - of_dirs))
        return found


def _compared(what: str, then: set[bytes], now: set[bytes]) -> Verdict:
    sides = {"only recorded": len(then - now), "only now": len(now - then)}
    alone = ", ".join(f"{count} {side}" for side, count in sides.items() if count)
    return Verdict(what, _blocks_text(then), _blocks_text(now) + (f" ({alone})" if alone else ""))


def _blocks_text(blocks: set[bytes]) -> str:
    return "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"


def repeated_options(path: Path, receipt: Receipt, options: Options, chosen: Limits) -> Options:
    """The options that repeat the recorded run. Raises ReceiptRefused, UsageError if it needs an option that
    was not given."""
    tmp = receipt.tmp if options.tmp is None else options.tmp
    if tmp > max(sandbox.TMP_BYTES, options.tmp or 0):
        raise ReceiptRefused(
            f"{path} needs more than a replay gives (--tmp {sandbox.TMP_BYTES}): if you trust it, give "
            f"--tmp {tmp}"
        )
    in_mount = receipt.format > 1 and receipt.name.startswith(sandbox.IPFS + "/")
    return Options(
        guest=receipt.name if in_mount else "",
        args=tuple(receipt.argv[1:]),
        argv0=receipt.argv[0],
        env=_environment(path, receipt, options.env),
        cwd=receipt.cwd,
        root=receipt.root,
        tmp=tmp,
        limits=chosen,
        deterministic=receipt.deterministic,
        isolated=True,
        mount_options=(f"--from={os.path.abspath(path)}", "--offline"),
    )


def _environment(
    path: Path, receipt: Receipt, given: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """The variables with their recorded values, or the given ones if the values were not recorded. Raises
    ReceiptRefused if a value is missing or different."""
    values = dict(given)
    for name in values.keys() - {each.name for each in receipt.env}:
        raise ReceiptRefused(f"{path}: the recorded run had no variable {name}")
    found = []
    for each in receipt.env:
        value = values.get(each.name, each.value)
        if value is None:
            raise ReceiptRefused(
                f"{path} does not hold the value of {each.name}: give --env {each.name}=VALUE"
            )
        if each.sha256 and receipts.variable_hash(receipt.salt, each.name, value) != each.sha256:
            raise ReceiptRefused(f"{path}: --env {each.name} had another value in the recorded run")
        found.append((each.name, value))
    return tuple(found)


def _blocks_below(car: Record, receipt: Receipt) -> frozenset[bytes]:
    """The blocks of the folders of --dir."""
    found: set[bytes] = set()
    stack = [each.cid for each in receipt.dirs if each.cid is not None]
    while stack:
        cid = stack.pop()
        if cids.multihash(cid) not in found:
            found.add(cids.multihash(cid))
            if cid in car:
                stack.extend(read_paths.links(cid, car.block(cid)))
    return frozenset(found)


def _repeat(
    options: Options, receipt: Receipt, files: RunFiles, out: host_folders.ResultsFolder | None
) -> _Repeated:
    chosen = options.limits
    with open_mount(options, files.block_log) as mount:
        given = options._replace(
            guest=options.guest or f"/proc/self/fd/{files.guest.fileno()}",
            dirs=_dirs(receipt, mount.mountpoint),
            out=None if out is None else out.path,
        )
        plan = Plan(
            given,
            mount.mountpoint,
            sandbox.build(given, mount.mountpoint, mount.mount_id),
            mount.mount_id,
            shown_as=receipt.name,
            max_data=(chosen.max_memory_size or 0) + 2 * (chosen.max_wasm_stack or 0) + _DATA_SPARE,
            guest_sha256=digest_of(files.guest).sha256,
        )
        outcome = supervisor.run(plan, files=files, show=False)
    if outcome.trap is not None and receipt.format == 1:  # format 1 counts the trap as standard error
        files.stderr.seek(0, os.SEEK_END)
        files.stderr.write(trap_text(plan.name, outcome.trap).encode())
    cid = None
    if out is not None and outcome.refused is None and outcome.limit != "max_out":
        cid = tree_cid(out.path, chosen.out_bytes)
    return _Repeated(
        outcome,
        digest_of(files.stdout),
        digest_of(files.stderr),
        cid,
        logged_blocks(files.block_log)[0],
    )


def _end(code: int, trapped: bool, limit: str | None) -> str:
    why = ", by a trap" if trapped else f", by {limits.option(limit)}" if limit else ""
    return f"{code}{why}"


def _dirs(receipt: Receipt, mountpoint: str) -> tuple[Dir, ...]:
    """The recorded folders, by their CIDs in the mount."""
    found = []
    for each in receipt.dirs:
        if each.cid is None:
            raise ReceiptRefused(f"the folder {each.guest} is not part of the record")
        found.append(Dir(os.path.join(mountpoint, cids.text(each.cid)), each.guest, writable=False))
    return tuple(found)
