"""Packages of the machine's own distribution, unpacked beside it instead of installed.

Why: guest and lab kernels come from the distribution, but a kernel must not be
installed to be booted in a guest. apt does the fetching and the signature
checks, with the machine's own sources; other suites are reached through the
same addresses with the suite's name exchanged. Called by `steps.artifacts`.
Needs no root: apt's lists and downloads stay in the project's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache


class StepError(Exception):
    """A step cannot be done: the message says what is missing and what to do."""


class Source(NamedTuple):
    """One archive address from apt's configuration, with what a deb822 entry needs."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str


class Package(NamedTuple):
    """A package as apt would install it now."""

    name: str
    version: str
    depends: tuple[str, ...]


def say(text: str) -> None:
    """Tell the user, on standard error so that printed paths stay clean."""
    print(text, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str:
    """The error in one line; of the host's own, such as a full disk, which file it met, too."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """While packages are fetched into the cache: apt's lists there are for one process at a time.

    What one that was killed had begun to unpack is removed. StepError where nothing can be written.
    """
    folder = cache.root() / "packages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks keeps what is left
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say("artifacts: waiting for another run that fetches packages")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                for left in folder.glob(".*/"):
                    shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise StepError(f"{in_words(error)}; set HVKVM_CACHE to a folder of yours with room") from error


def release_codename() -> str:
    """This machine's suite (`bookworm`), from os-release."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise StepError("this system names no VERSION_CODENAME in /etc/os-release; a Debian release is needed")


def configured_sources() -> list[Source]:
    """Every binary archive entry of the machine's apt configuration, one-line and deb822 alike."""
    found: list[Source] = []
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".sources":
            found += _deb822(text)
        elif path.suffix == ".list":
            found += _one_line(text)
    return found


def _deb822(text: str) -> list[Source]:
    found: list[Source] = []
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            match[1].lower(): " ".join(match[2].split())
            for match in re.finditer(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza, re.M)
        }
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") not in ("no", "false"):
            suites, components = fields.get("suites", "").split(), fields.get("components", "").split()
            for uri in fields.get("uris", "").split():
                found.append(Source(uri, tuple(suites), tuple(components), fields.get("signed-by", "")))
    return found


def _one_line(text: str) -> list[Source]:
    found: list[Source] = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match:
            signed = re.search(r"signed-by=(\S+)", match[1] or "")
            components = tuple(match[4].split())
            found.append(Source(match[2], (match[3],), components, signed[1] if signed else ""))
    return found


def sources_of(suite: str | None) -> list[Source]:
    """The machine's own sources, or its main archive with the suite's name exchanged.

    Raises StepError when the machine configures no archive to start from.
    """
    own = release_codename()
    sources = [source for source in configured_sources() if "main" in source.components]
    if suite is None or suite == own:
        chosen = [s for s in sources if any(name.split("-")[0] == own for name in s.suites)]
    else:
        chosen = [s._replace(suites=(suite,), components=("main",)) for s in sources if own in s.suites][:1]
    if not chosen:
        raise StepError(
            f"apt has no archive of {own} configured, see sources.list(5): nothing can be fetched"
        )
    return chosen


class Archive:
    """One suite of the distribution, with apt's state for it kept in the project's cache."""

    def __init__(self, suite: str | None = None) -> None:
        self.suite = suite or release_codename()
        self.state = cache.root() / "apt" / self.suite
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise StepError("apt-get and dpkg-deb are needed to fetch kernels: a Debian system has them")

    def _options(self) -> list[str]:
        options = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": self.state / "sources",
            "Dir::State::Lists": self.state / "lists",
            "Dir::Cache": self.state / "cache",
            # Root's apt would drop to a user who cannot write here.
            "APT::Sandbox::User": "",
            # Hooks of the system's own apt runs (update notifiers) have no business with these lists.
            "APT::Update::Post-Invoke-Success": "",
            # A list that cannot be read is an error, and not a suite without packages.
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def _apt(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [tool, "-q", *self._options(), *words],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=dict(os.environ, LC_ALL="C"),
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
            # The first error is the cause: apt's last one only counts them.
            reason = next((line for line in lines if line.startswith("E: ")), lines[-1])
            raise StepError(f"{tool} {' '.join(words)} ({self.suite}): {reason}")
        return done.stdout

    def refresh(self) -> None:
        """Bring the suite's package lists up to date. Network."""
        sources = self.state / "sources"
        for folder in (sources, self.state / "lists/partial", self.state / "cache/archives/partial"):
            folder.mkdir(parents=True, exist_ok=True)
        stanzas = [
            f"Types: deb\nURIs: {s.uri}\nSuites: {' '.join(s.suites)}\nComponents: {' '.join(s.components)}\n"
            + (f"Signed-By: {s.signed_by}\n" if s.signed_by else "")
            for s in sources_of(None if self.suite == release_codename() else self.suite)
        ]
        (sources / "archive.sources").write_text("\n".join(stanzas))
        say(f"artifacts: reading the package lists of {self.suite}")
        self._apt("apt-get", "update")

    def candidate(self, name: str, version: str | None = None) -> Package:
        """What the suite offers under `name` (its newest, or `version`). Raises StepError when nothing."""
        wanted = f"{name}={version}" if version else name
        text = self._apt("apt-cache", "show", "--no-all-versions", wanted)
        fields = dict(re.findall(r"^(\w[\w-]*): (.*)$", text, re.M))
        if "Version" not in fields:
            raise StepError(f"{self.suite} has no package {wanted}")
        depends = tuple(re.split(r"[ (:|]", item.strip())[0] for item in fields.get("Depends", "").split(","))
        return Package(fields["Package"], fields["Version"], depends)

    def simulated_install(self, *words: str) -> str:
        """What `apt-get install` of `words` would do to a machine with no packages, in its own words."""
        options = ("-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false")
        return self._apt("apt-get", *options, "--simulate", "install", *words)

    def unpacked(self, package: Package, parts: Sequence[Package] = ()) -> Path:
        """The folder of the unpacked package and its `parts`, fetched first where the cache lacks it."""
        target = tree_of(package.name, package.version)
        if target.is_dir():
            return target
        say(f"artifacts: fetching {package.name} {package.version} ({self.suite})")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        (folder / "tree").mkdir()
        try:
            wanted = [f"{one.name}={one.version}" for one in (package, *parts)]
            self._apt("apt-get", "download", *wanted, cwd=folder)
            debs = sorted(folder.glob("*.deb"))
            if len(debs) != len(wanted):
                raise OSError(f"apt-get brought {len(debs)} packages of {len(wanted)}")
            for deb in debs:
                subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "tree")], check=True)
            if not target.is_dir():
                os.rename(folder / "tree", target)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StepError(f"{package.name} {package.version}: cannot be unpacked: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return target


def tree_of(name: str, version: str) -> Path:
    """Where the unpacked package is kept, whether or not it is there."""
    return cache.root() / "packages" / f"{name}_{version.replace(':', '%3a')}"
