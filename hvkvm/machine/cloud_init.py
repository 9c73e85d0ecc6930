"""A seed for cloud-init (its data source NoCloud): a folder's files as a small ISO image labelled cidata.

The image is kept in the cache by its content, so that a saved machine finds it again. Made with pycdlib,
which is imported here only. Called while a machine is made; blocks.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm import given_file
from hvkvm.boot import cache
from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.machine.disk_spec import CdromSpec
from hvkvm.machine.own_files import CLOUD_INIT_FILES

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig

NEEDED = CLOUD_INIT_FILES[0]
MOST_BYTES = 16 << 20
LABEL = "cidata"
_RECIPE = "1"
"""Goes up when the same files become another image."""


def with_seed(config: MachineConfig) -> MachineConfig:
    """`config` with the image of its folder as a last drive, or read-only disk where firmware starts it."""
    if config.cloud_init is None:
        return config
    medium = CdromSpec(str(seed(config.cloud_init)), serial="cloud-init")
    return config._replace(cdroms=(*config.cdroms, medium), cloud_init=None).validate()


def seed(folder: Path) -> Path:
    """The image of `folder`. ConfigError in one line for what is none; CapabilityMissing without pycdlib."""
    files = _read(folder)
    digest = hashlib.sha256(_RECIPE.encode())
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    # Without a meta-data cloud-init does nothing; another instance is what runs everything anew.
    files.setdefault("meta-data", f"instance-id: {digest.hexdigest()[:16]}\n".encode())
    path = cache.root() / "cloud-init" / f"{digest.hexdigest()[:32]}.iso"
    if not cache.holds(path):
        try:
            cache.publish(path, [_image(files)])
        except OSError as error:
            raise ConfigError(
                f"--cloud-init {folder}: {path}: {error.strerror}; set HVKVM_CACHE to a folder with room"
            ) from None
    return path


def _read(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    left = MOST_BYTES
    for name in CLOUD_INIT_FILES:
        try:
            found[name] = given_file.read(folder / name, left + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(
                f"--cloud-init {folder}: {name}: {error.strerror}; give a folder with {NEEDED}"
            ) from None
        left -= len(found[name])
        if left < 0:
            raise ConfigError(f"--cloud-init {folder}: more than {MOST_BYTES >> 20} MiB; give smaller files")
    if NEEDED not in found:
        raise ConfigError(
            f"--cloud-init {folder}: has no file {NEEDED}; write one that begins with #cloud-config"
        )
    return found


def _image(files: dict[str, bytes]) -> bytes:
    """An ISO 9660 file system with Rock Ridge's and Joliet's names: each reader finds those it knows."""
    try:
        import pycdlib
    except ImportError:
        raise CapabilityMissing(
            "--cloud-init: needs the module pycdlib; pip install 'hvkvm[cloud]'"
        ) from None
    iso, out = pycdlib.PyCdlib(), BytesIO()
    iso.new(interchange_level=1, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    for number, (name, content) in enumerate(files.items()):
        iso.add_fp(BytesIO(content), len(content), f"/F{number}.;1", rr_name=name, joliet_path=f"/{name}")
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
