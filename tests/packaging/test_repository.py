"""Files of the repository: what CI installs and calls, the site, the examples and the scripts."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

TOP = Path(__file__).parents[2]
WORKFLOWS = sorted((TOP / ".github" / "workflows").glob("*.yml"))


def locked() -> dict[str, list[tuple[Version, str]]]:
    """The versions of each package that CI may install, with the rest of their entry."""
    found: dict[str, list[tuple[Version, str]]] = {}
    text = (TOP / "packaging" / "ci-requirements.txt").read_text()
    for name, version, rest in re.findall(r"^([a-z0-9.-]+)==(\S+)(.*(?:\n[ #].*)*)", text, re.MULTILINE):
        found.setdefault(name, []).append((Version(version), rest))
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    extras = [each for group in project["project"]["optional-dependencies"].values() for each in group]
    groups = [
        each for group in project["dependency-groups"].values() for each in group if isinstance(each, str)
    ]
    found = map(Requirement, [*project["project"]["dependencies"], *extras, *groups])
    return [each for each in found if each.name != "ipfsfuse"]


def test_the_lock_file_has_every_dependency_with_hashes() -> None:
    """`scripts/lock` writes it anew."""
    lock = locked()
    for requirement in wanted():
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in lock, f"{name} is not locked: run scripts/lock"
        for version, _rest in lock[name]:
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement}: run scripts/lock"
            )
    assert len(lock) > 50
    assert all("--hash=sha256:" in rest for entries in lock.values() for _version, rest in entries)
    assert "://" not in (TOP / "packaging" / "ci-requirements.txt").read_text()


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_files_that_exist(path: Path) -> None:
    assert "permissions" in yaml.safe_load(path.read_text())
    called = set()
    for name, job in jobs(path).items():
        assert job["runs-on"], name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            called |= set(re.findall(r"\b(?:scripts|tests|packaging)/[\w/.-]+", step.get("run", "")))
    missing = {each for each in called if not (TOP / each).exists()}
    assert missing == set()
    assert called


def test_ci_runs_every_python_both_debians_the_sanitizers_and_fuzzing() -> None:
    ci = jobs(TOP / ".github/workflows/ci.yml")
    assert ci["quick"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert ci["debian"]["strategy"]["matrix"]["suite"] == ["bookworm", "trixie"]
    assert "scripts/sanitize" in str(ci["sanitizers"])
    fuzz = jobs(TOP / ".github/workflows/scheduled.yml")["fuzz"]["steps"]
    assert any("actions/cache" in step.get("uses", "") and "ipfsfuse-fuzz" in str(step) for step in fuzz)
    for path in [*(TOP / ".github").glob("*.yml"), *(TOP / ".github/ISSUE_TEMPLATE").glob("*.yml")]:
        assert yaml.safe_load(path.read_text()), path


def test_the_workflow_calls_all_scripts_of_ci_run() -> None:
    ci = yaml.safe_load((TOP / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for job in ci["jobs"].values() for step in job["steps"]]
    called = set(re.findall(r"scripts/\w+", (TOP / ".ci/run").read_text()))
    assert len(called) == 3
    assert {each for each in called if not any(each in step for step in steps)} == set()
    assert ci["env"]["IPFSFUSE_REQUIRE_KUBO"] == "1"
    whole = [step for step in steps if re.search(r"(scripts/test|\.ci/run tests)$", step)]
    assert len(whole) == 2, "all tests run on Ubuntu and on both Debians"


def package(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([TOP / "scripts/package", *words], capture_output=True, text=True, check=False)


def test_a_release_needs_its_version_and_its_changes() -> None:
    done = package("version", "99.0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "not 99.0" in done.stderr
    notes = package("notes", "0.1.0").stdout
    assert notes.startswith("## 0.1.0")
    assert notes.count("\n## ") == 0
    assert package("nothing").returncode == 2


def test_every_page_is_in_the_site_and_every_example_is_run() -> None:
    nav = (TOP / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(TOP / "docs")) for path in (TOP / "docs").rglob("*.md")}
    assert {page for page in pages if page not in nav} == set()
    tests = "".join(path.read_text() for path in (TOP / "tests").rglob("*.py"))
    examples = [path for path in (TOP / "examples").rglob("*") if path.suffix in (".py", ".sh")]
    assert len(examples) >= 2
    assert [path.name for path in examples if path.name not in tests] == []


def test_the_installation_page_names_every_extra() -> None:
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (TOP / "docs" / "INSTALL.md").read_text()
    assert [each for each in extras if f"| `{each}` |" not in page] == []


def test_scripts_are_executable() -> None:
    scripts = [path for path in (TOP / "scripts").iterdir() if path.is_file()]
    scripts += list((TOP / "packaging/deb").iterdir())
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []
    assert [path.name for path in scripts if not path.read_text().startswith("#!")] == []
