"""A worked example: hv_netvsc sees its cable pulled and put back, and packets go through again.

The wire is a Unix socket at which this test is the peer: connected is plugged in.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

FLAPS = 3
SCRIPT = f"""
    carrier() {{ until [ "$(cat /sys/class/net/eth0/carrier)" = $1 ]; do sleep 0.05; done; }}
    until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    ip addr add 192.0.2.1/24 dev eth0
    ip link set eth0 up
    for flap in $(seq {FLAPS}); do
        carrier 1; echo up $flap
        ping -c 1 -W 1 192.0.2.2 >/dev/null     # nobody answers; its question is on the wire
        carrier 0; echo down $flap
    done
"""


def frame(peer: socket.socket) -> bytes:
    """The next frame: 4 bytes of length before each."""
    size = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
    return peer.recv(size, socket.MSG_WAITALL)


def test_the_link_goes_down_and_up(linux_guest: Callable[..., Any], net: Callable[[str], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        guest = linux_guest("sh", "-c", SCRIPT, nets=[net(f"listen={folder}/wire")])
        guest.start()
        for flap in range(1, FLAPS + 1):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(f"{folder}/wire")
                guest.wait_for_stdout(f"up {flap}\n")
                peer.settimeout(guest.seconds)
                while b"\xc0\x00\x02\x02" not in frame(peer):  # the guest asks who has 192.0.2.2
                    pass
            guest.wait_for_stdout(f"down {flap}\n")
        assert guest.run().status == 0
