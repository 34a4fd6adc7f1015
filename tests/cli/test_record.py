"""The record of what was used: complete, and bounded in memory."""

import io
import json

import pytest

from ipfsfuse import record
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid


def number(index: int) -> Cid:
    return cids.make(cids.RAW, b"\x12\x20" + index.to_bytes(32, "big"))


def lines(out: io.StringIO) -> list[tuple[Cid, str]]:
    return [(cids.parse(line["cid"]), line["use"]) for line in map(json.loads, out.getvalue().splitlines())]


def test_each_use_is_recorded_once() -> None:
    out = io.StringIO()
    record_use = record.UseRecord(out)
    for ahead in (True, True, False, False, True):
        record_use(number(1), ahead)
    record_use(number(2), False)
    record_use(number(2), True)
    assert lines(out) == [(number(1), "ahead"), (number(1), "read"), (number(2), "read")]


def test_all_uses_are_recorded_and_few_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MIN_USES_KEPT", 100)
    out = io.StringIO()
    record_use = record.UseRecord(out)
    for _ in range(2):
        for index in range(1000):
            record_use(number(index), False)
            record_use(number(max(0, index - 99)), False)
    assert len(record_use._seen) + len(record_use._before) <= 200
    found = lines(out)
    assert len(found) <= 2 * 1000 + 1
    assert {cid for cid, _use in found} == {number(index) for index in range(1000)}
