"""Installed as users install it: by pipx, by uv, and as a Debian package in a fresh Debian. Each test takes
minutes, so they run only with IPFSFUSE_PACKAGES=1 (CI has a job for it)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import not_source

TOP = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("IPFSFUSE_PACKAGES") != "1", reason="takes minutes: set IPFSFUSE_PACKAGES=1"
    ),
]


@pytest.mark.parametrize("tool", ["pipx", "uv"])
def test_a_tool_installs_the_sdist_and_the_commands_run(tool: str, release: Path, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install {tool}")
    [sdist] = release.glob("*.tar.gz")
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "UV_TOOL_DIR": str(tmp_path / "uv"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "bin"),
    }
    env.pop("PYTHONPATH", None)
    command = ["pipx", "install", str(sdist)] if tool == "pipx" else ["uv", "tool", "install", str(sdist)]
    subprocess.run(command, env=env, check=True)
    for name in ("ipfsfuse", "ipfsfuse-run"):
        done = subprocess.run([tmp_path / "bin" / name, "--help"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    refused = subprocess.run(
        [tmp_path / "bin" / "ipfsfuse-run", "/dev/null"], env=env, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 125
    assert "its extra [run]" in refused.stderr
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "f").write_text("hello")
    added = subprocess.run(
        [tmp_path / "bin" / "ipfsfuse", "add", "-Q", folder],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "m").mkdir()
    subprocess.run([tmp_path / "bin" / "ipfsfuse", "mount", tmp_path / "m"], env=env, check=True)
    try:
        assert (tmp_path / "m" / added.stdout.strip() / "f").read_text() == "hello"
    finally:
        subprocess.run([tmp_path / "bin" / "ipfsfuse", "unmount", tmp_path / "m"], env=env, check=True)


def mirror() -> list[str]:
    """The mirror from which this machine's apt installs Debian, for debootstrap. If it is not known, the list
    is empty, and debootstrap uses its default."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split()[:1]


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("debootstrap"), reason="needs root and debootstrap")
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_debian_package_in_a_fresh_debian(suite: str, tmp_path: Path) -> None:
    """Built in one Debian, and installed, used, removed and purged in another (packaging/deb/check)."""
    base = tmp_path / "base"
    include = "--include=ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", include, suite, base, *mirror()], check=True)
    for path in Path("/etc/apt/apt.conf.d").iterdir():
        if "roxy" in path.read_text():
            shutil.copy(path, base / "etc/apt/apt.conf.d")
    for path in map(
        Path, ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
    ):
        if path.exists():
            shutil.copy(path, base / path.relative_to("/"))
    source = tmp_path / "source"
    shutil.copytree(TOP, source, ignore=not_source)
    (source / "dist").mkdir()
    script = f"""
    set -e
    for each in "$@"; do
      root=$(mktemp -d -p {tmp_path})
      mkdir $root/upper $root/work $root/root
      mount -t overlay overlay -o lowerdir={base},upperdir=$root/upper,workdir=$root/work $root/root
      mkdir -p $root/root/source
      mount --bind {source} $root/root/source
      mount -t proc proc $root/root/proc
      mount --rbind /sys $root/root/sys
      mount --rbind /dev $root/root/dev
      chroot $root/root sh -ec "cd /source && $each"
    done
    """
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    steps = ["scripts/package deb", "packaging/deb/check dist/ipfsfuse_*.deb"]
    done = subprocess.run([*command, *steps], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.endswith("all right\n")
