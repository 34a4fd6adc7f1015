"""`scripts/bench compare` reads what `scripts/bench mount --json` writes."""

import json
import subprocess
import sys
from pathlib import Path

from scripts.benches._table import Result


def write_result(path: Path, seconds: dict[str, float]) -> Path:
    result = Result("read-warm", "native", "0.95")
    for way, duration in seconds.items():
        result.note(way, duration, 0.0)
    path.write_text(json.dumps({"rows": [result.as_json()], "memory": {}}))
    return path


def compare(*paths: Path) -> "subprocess.CompletedProcess[str]":
    command = "import sys; from scripts.benches.compare import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", command, *paths], capture_output=True, text=True)


def test_the_change_of_each_ratio_is_shown(tmp_path: Path) -> None:
    before = write_result(tmp_path / "before", {"native": 1.0, "root": 2.0, "user": 3.0})
    after = write_result(tmp_path / "after", {"native": 2.0, "root": 2.0, "passthrough": 2.1})
    done = compare(before, after)
    assert done.returncode == 0, done.stderr
    [root] = [line for line in done.stdout.splitlines() if "| root" in line]
    assert [cell.strip() for cell in root.split("|")[3:6]] == ["0.50x", "1.00x", "2.00x"]
    assert "only before: read-warm user" in done.stdout
    assert "only after: read-warm passthrough" in done.stdout


def test_a_file_that_is_not_a_result_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("[]")
    done = compare(tmp_path / "other", tmp_path / "other")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    assert "not a result" in done.stderr
