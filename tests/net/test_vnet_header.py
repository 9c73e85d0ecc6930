"""The vnet header's layout, as this machine's own headers have it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hvkvm.abi import virtio_net_hdr as v

PROGRAM = """
#include <stdio.h>
#include <stddef.h>
#include <linux/virtio_net.h>
#include <linux/if_tun.h>
#define OFFSET(field) printf("%zu ", offsetof(struct virtio_net_hdr_v1, field))
int main(void) {
    printf("%zu ", sizeof(struct virtio_net_hdr_v1));
    OFFSET(flags); OFFSET(gso_type); OFFSET(hdr_len); OFFSET(gso_size); OFFSET(csum_start);
    OFFSET(csum_offset); OFFSET(num_buffers);
    printf("%d %d %d %d %d %d ", VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_F_DATA_VALID,
           VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_TCPV6,
           VIRTIO_NET_HDR_GSO_ECN);
    printf("%d %d %d %d\\n", TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc; make setup installs it")
def test_layout_and_numbers_are_those_of_the_kernel_headers(tmp_path):
    source = tmp_path / "layout.c"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    numbers = list(map(int, printed.split()))
    assert numbers[0] == v.VIRTIO_NET_HDR_BYTES
    marks = [v.VnetHeader(*(1 if n == field else 0 for n in range(7))).pack().index(1) for field in range(7)]
    assert numbers[1:8] == marks
    assert numbers[8:14] == [
        v.VIRTIO_NET_HDR_F_NEEDS_CSUM,
        v.VIRTIO_NET_HDR_F_DATA_VALID,
        v.VIRTIO_NET_HDR_GSO_TCPV4,
        v.VIRTIO_NET_HDR_GSO_UDP,
        v.VIRTIO_NET_HDR_GSO_TCPV6,
        v.VIRTIO_NET_HDR_GSO_ECN,
    ]
    assert numbers[14:] == [v.TUN_F_CSUM, v.TUN_F_TSO4, v.TUN_F_TSO6, v.TUN_F_TSO_ECN]


def test_a_header_reads_as_it_was_written():
    header = v.VnetHeader(1, 4, 54, 1448, 34, 16, 1)
    assert v.parse(header.pack()) == header
    assert v.parse(v.PLAIN) == v.VnetHeader()
