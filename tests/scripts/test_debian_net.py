"""How `make debian` is reached over ssh: its steps, with a script in hvkvm's place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[2] / "scripts/steps"
pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no openssh-client")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")


def made_key(folder):
    """What ssh_key.sh prints and says."""
    settings = os.environ | {"HVKVM_CACHE": str(folder)}
    done = subprocess.run(
        [STEPS / "ssh_key.sh"], env=settings, capture_output=True, text=True, timeout=60, check=True
    )
    return Path(done.stdout.strip()), done.stderr


def test_a_key_is_made_once_and_is_its_users_alone(tmp_path):
    key, said = made_key(tmp_path)
    assert "making a key" in said
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    public = Path(f"{key}.pub").read_text()
    assert public.startswith("ssh-ed25519 ")
    assert made_key(tmp_path) == (key, "")
    assert Path(f"{key}.pub").read_text() == public
    assert sorted(path.name for path in key.parent.iterdir()) == [key.name, f"{key.name}.pub"]


@pytest.fixture
def run(tmp_path):
    """`run(way, path)`: the step with a program that tells its options and ends with 7."""
    key, _said = made_key(tmp_path)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python").symlink_to(sys.executable)
    hvkvm = bin_ / "hvkvm"
    hvkvm.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    hvkvm.chmod(0o755)

    def started(way, path=None):
        settings = {name: value for name, value in os.environ.items() if name != "HVKVM_IN_LAB"}
        settings["PATH"] = path or settings["PATH"]
        command = [STEPS / "debian_net.sh", way, key, "", hvkvm, "run", "--disk", "a b"]
        return subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=60, check=False
        ), Path(f"{key}.pub").read_text().strip()

    return started


@needs_passt
def test_a_guest_with_a_console_lets_the_key_in_and_the_command_is_printed(run):
    done, public = run("console")
    assert done.returncode == 7
    told, append, words, net, forward, *rest = done.stdout.splitlines()
    assert (told, append, net, rest) == ("run", "--append", "--net", ["--disk", "a b"])
    assert words == f'quiet systemd.set_credential="ssh.authorized_keys.root:{public}"'
    port = re.fullmatch(r"user,forward=(\d+)-22", forward)[1]
    assert re.search(rf"^debian: ssh -i \S+/ssh/id_ed25519 -p {port} root@127\.0\.0\.1$", done.stderr, re.M)


@needs_passt
def test_a_guest_that_ends_before_ssh_answers_is_told_of(run):
    done, _public = run("ssh")
    assert done.returncode == 1
    assert "debian: the guest has ended" in done.stderr
    assert "a b" in done.stderr  # the last words of the program


def test_without_passt_the_console_is_left(run, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("sh", "printf", "cat"):
        (few / name).symlink_to(shutil.which(name))
    done, _public = run("console", str(few))
    assert done.stdout.split("\n") == ["run", "--append", "quiet", "--disk", "a b", ""]
    assert "nobody logs in over ssh" in done.stderr
    assert run("ssh", str(few))[0].returncode == 1
