"""Which packages the project boots, and where their files lie once unpacked.

Why: tests, the lab and `make run` need a guest kernel, the lab's kernel, a
static busybox and the Hyper-V daemons, by name and not by version. Called by
`scripts/artifacts` and `steps.lab_image`. What was once resolved is written down
in the cache, so that a later run neither waits for the network nor needs it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache, vmlinux
from steps.distribution import Archive, Package, StepError, fetching, release_codename, say, tree_of


class Artifact(NamedTuple):
    """A file or folder out of a package. `real` picks the package that a metapackage stands for."""

    package: str
    real: str | None
    find: Callable[[Path], Path]
    what: str
    each_suite: bool = False
    """Whether another suite's differs, and is fetched from there; so it is for what has a `real`."""
    beside: tuple[str, ...] = ()
    """Packages that are unpacked into the same folder."""
    backport: bool = False
    """Whether it comes from the suite's backports, and only for who asks for it."""
    only: str | None = None
    """The one suite that it comes from, whatever this machine's is."""


def _kernel(tree: Path) -> Path:
    return _one(tree, "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz")


def _modules(tree: Path) -> Path:
    # A package that holds the kernel only has the folder too, with its vmlinuz in it.
    return _one(tree, "lib/modules/*/kernel", "usr/lib/modules/*/kernel").parent


def _busybox(tree: Path) -> Path:
    return _one(tree, "bin/busybox", "usr/bin/busybox")


def _daemons(tree: Path) -> Path:
    return _one(tree, "usr/sbin")


def _firmware(tree: Path) -> Path:
    return _one(tree, "usr/share/ovmf/OVMF.fd")


def _boot_loader(tree: Path) -> Path:
    return _one(tree, "usr/lib/systemd/boot/efi/systemd-bootx64.efi")


def _u_boot(tree: Path) -> Path:
    return _one(tree, "usr/lib/u-boot/qemu-x86/u-boot.rom")


def _qemu(tree: Path) -> Path:
    return _one(tree, "usr/bin/qemu-system-x86_64")


def _efi_shell(tree: Path) -> Path:
    return _one(tree, "usr/share/efi-shell-ia32/shellia32.efi")


def _cloud_firmware(tree: Path) -> Path:
    return _one(tree, "usr/share/cloudhv-efi-x86-64/CLOUDHV.fd")


def _fwts(tree: Path) -> Path:
    return _one(tree, "usr/bin/fwts")


def _ipxe(tree: Path) -> Path:
    return _one(tree, "usr/lib/ipxe/ipxe-amd64.efi", "usr/lib/ipxe/ipxe.efi", "boot/ipxe.efi")


def _libc(tree: Path) -> Path:
    return _one(tree, "lib/*/libc.so.6", "usr/lib/*/libc.so.6").parent


def _one(tree: Path, *patterns: str) -> Path:
    for pattern in patterns:
        hits = sorted(tree.glob(pattern))
        if hits:
            return hits[-1]
    raise StepError(f"{tree.name} holds none of {', '.join(patterns)}; remove {tree} and fetch again")


_GUEST = ("linux-image-cloud-amd64", r"linux-image-\d\S*-cloud-amd64$")
_LAB = ("linux-image-amd64", r"linux-image-\d\S*(?<!cloud)-amd64$")

NEWEST_SUITE = "sid"
_FWTS_LIBRARIES = (
    *("libc6", "zlib1g", "libfdt1", "libglib2.0-0t64", "libffi8", "libpcre2-8-0"),
    *("libmount1", "libblkid1", "libselinux1", "libatomic1", "libsystemd0"),
)

ARTIFACTS = {
    "guest-kernel": Artifact(*_GUEST, _kernel, "bzImage of the cloud flavour, with the hv_* drivers"),
    "guest-modules": Artifact(*_GUEST, _modules, "its lib/modules/<version>"),
    "lab-kernel": Artifact(*_LAB, _kernel, "bzImage of the generic flavour, the nested lab's KVM host"),
    "lab-modules": Artifact(*_LAB, _modules, "its lib/modules/<version>"),
    "busybox": Artifact("busybox-static", None, _busybox, "the static busybox of every initramfs"),
    "hyperv-daemons": Artifact(
        "hyperv-daemons", None, _daemons, "the folder of hv_kvp_daemon and hv_vss_daemon"
    ),
    "firmware": Artifact(
        "ovmf", None, _firmware, "UEFI firmware, code and variables in one", each_suite=True
    ),
    "boot-loader": Artifact(
        "systemd-boot-efi", None, _boot_loader, "systemd-boot, which UEFI firmware starts from a disk"
    ),
    "u-boot": Artifact("u-boot-qemu", None, _u_boot, "U-Boot as firmware, with drivers of its own for disks"),
    "ipxe": Artifact(
        "ipxe", None, _ipxe, "iPXE as a UEFI program, with a VMBus driver of its own", each_suite=True
    ),
    "efi-shell": Artifact(
        "efi-shell-ia32",
        None,
        _efi_shell,
        "UEFI's shell as a 32-bit program, for U-Boot to start",
        only="trixie",  # Those before have none yet, and sid has none any more.
    ),
    "cloud-firmware": Artifact(
        "cloudhv-efi-x86-64",
        None,
        _cloud_firmware,
        "UEFI firmware for cloud-hypervisor, a PVH kernel",
        only=NEWEST_SUITE,
    ),
    "fwts": Artifact(
        "fwts",
        None,
        _fwts,
        "the Firmware Test Suite, in a folder with all libraries that it needs",
        beside=_FWTS_LIBRARIES,
        only=NEWEST_SUITE,
    ),
    "libc": Artifact("libc6", None, _libc, "the folder of libc.so.6 and the loader those need"),
    "qemu": Artifact(
        "qemu-system-x86",
        None,
        _qemu,
        "a newer QEMU than this suite has, for a lab with several processors",
        each_suite=True,
        beside=("qemu-system-common", "qemu-system-data", "seabios"),
        backport=True,
    ),
}


def path(name: str, suite: str | None = None, *, update: bool = False, offline: bool = False) -> Path:
    """The path of an artifact, fetched first when the cache lacks it.

    `update` asks the archive again for a newer version; `offline` never asks.
    Raises StepError when it cannot be had.
    """
    artifact = ARTIFACTS[name]
    if artifact.backport and suite is None:
        suite = f"{release_codename()}-backports"
    # A busybox is a busybox: one suite's serves kernels of all. So do the daemons.
    suite = (suite or release_codename()) if artifact.real or artifact.each_suite else release_codename()
    suite = artifact.only or suite
    noted = cache.root() / "resolved" / f"{suite}-{artifact.package}.json"
    found = None if update else _noted(artifact, noted)
    if found is None:
        if offline:
            option = "" if suite == release_codename() else f"--suite {suite} "
            raise StepError(
                f"{name} ({suite}) is not in the cache; run scripts/artifacts {option}fetch {name} first"
            )
        with fetching():
            # Another run may have brought it while this one waited.
            found = None if update else _noted(artifact, noted)
            found = found or _fetch(artifact, suite, noted)
    if artifact.find is _kernel:
        # Now and not when it boots: in the lab that costs ten times as much, and its cache forgets.
        vmlinux.extract(found)
    return found


def _noted(artifact: Artifact, noted: Path) -> Path | None:
    try:
        seen = json.loads(noted.read_text())
        tree = tree_of(str(seen["package"]), str(seen["version"]))
        # A tree may lack it that was unpacked when packages were split otherwise.
        return artifact.find(tree) if tree.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, StepError):
        return None


@functools.cache
def _refreshed(suite: str) -> Archive:
    archive = Archive(suite)
    archive.refresh()
    return archive


def _fetch(artifact: Artifact, suite: str, noted: Path) -> Path:
    """What `artifact` finds in its package as the archive has it now. Raises StepError."""
    archive = _refreshed(suite)
    package: Package = archive.candidate(artifact.package)
    parts = [archive.candidate(name) for name in artifact.beside]
    if artifact.real:
        names = [name for name in package.depends if re.match(artifact.real, name)]
        if not names:
            raise StepError(f"{artifact.package} of {suite} depends on no kernel image: {package.depends}")
        package = archive.candidate(names[0])
        parts = [archive.candidate(name, package.version) for name in parts_of(package)]
    tree = archive.unpacked(package, parts)
    try:
        found = artifact.find(tree)
    except StepError:
        shutil.rmtree(tree, ignore_errors=True)
        tree = archive.unpacked(package, parts)
        found = artifact.find(tree)
    entry = {"package": package.name, "version": package.version}
    cache.publish(noted, [json.dumps(entry).encode()])
    return found


def parts_of(image: Package) -> list[str]:
    """The packages among which a kernel is split: kernel, modules and the lists of both.

    Debian's linux-image-RELEASE holds all of them up to Linux 7.1. From 7.2 on it is empty
    and depends on linux-base-, linux-binary- and linux-modules-RELEASE.
    """
    release = image.name.removeprefix("linux-image-")
    return [name for name in image.depends if name.startswith("linux-") and name.endswith(f"-{release}")]


# The names under which tests and commands look for a guest to boot.
VARIABLES = {
    "HVKVM_GUEST_KERNEL": "guest-kernel",
    "HVKVM_GUEST_MODULES": "guest-modules",
    "HVKVM_GUEST_BUSYBOX": "busybox",
    "HVKVM_GUEST_HYPERV_DAEMONS": "hyperv-daemons",
    "HVKVM_GUEST_LIBC": "libc",
    "HVKVM_GUEST_FIRMWARE": "firmware",
    "HVKVM_GUEST_BOOT_LOADER": "boot-loader",
    "HVKVM_GUEST_U_BOOT": "u-boot",
}
# Tests boot a second kernel, of another major version.
NEWER_VARIABLES = {
    "HVKVM_NEWER_KERNEL": "guest-kernel",
    "HVKVM_NEWER_MODULES": "guest-modules",
    "HVKVM_NEWER_FIRMWARE": "firmware",
    # The lab of the firmware's tests: its KVM can slow the guest's ticks, and older ones cannot.
    "HVKVM_NEWER_LAB_KERNEL": "lab-kernel",
    "HVKVM_NEWER_LAB_MODULES": "lab-modules",
}
# And a third one, the newest there is.
NEWEST_VARIABLES = {
    "HVKVM_NEWEST_KERNEL": "guest-kernel",
    "HVKVM_NEWEST_MODULES": "guest-modules",
    # Those before boot nothing from a NIC that has no EFI device of its own, as one on the VMBus.
    "HVKVM_NEWEST_IPXE": "ipxe",
    "HVKVM_NEWEST_CLOUD_FIRMWARE": "cloud-firmware",
}
# Programs that come from one suite each.
SHELL_VARIABLES = {"HVKVM_EFI_SHELL": "efi-shell"}
FWTS_VARIABLES = {"HVKVM_FWTS": "fwts"}
_NEWER_SUITES = {"bullseye": "bookworm", "bookworm": "trixie"}


def newer_suite() -> str:
    """The suite after this machine's; sid where none is known."""
    return _NEWER_SUITES.get(release_codename(), NEWEST_SUITE)


def other_suites() -> list[tuple[str, dict[str, str]]]:
    """(suite, variables) of what tests boot that comes from other suites than this machine's own."""
    shell = ARTIFACTS["efi-shell"].only or NEWEST_SUITE
    return [
        (newer_suite(), NEWER_VARIABLES),
        (NEWEST_SUITE, NEWEST_VARIABLES),
        (shell, SHELL_VARIABLES),
        (NEWEST_SUITE, FWTS_VARIABLES),
    ]


def variables(suite: str | None = None) -> dict[str, str]:
    """The environment variables that name the cached artifacts; none for what is not cached."""
    found: dict[str, str] = {}
    for from_suite, names in ((suite, VARIABLES), *other_suites()):
        for variable, name in names.items():
            with contextlib.suppress(StepError):
                found[variable] = str(path(name, from_suite, offline=True))
    return found


def booted(name: str, suite: str | None = None) -> Path:
    """A kernel artifact in the form that starts fastest: its vmlinux when it can be taken out."""
    kernel = path(name, suite)
    found = vmlinux.extract(kernel)
    if found is None:
        say(f"artifacts: {kernel.name} does not give up its vmlinux here; booting it as it is")
    return found or kernel
