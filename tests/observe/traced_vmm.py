"""A tiny VMM for the tracer's tests: one vCPU on a thread of its own, routes, doorbells, a few exits.

`run`: do all of it and exit with 7. `loop PAUSE`: say "up", then run the guest until standard
input ends, PAUSE seconds from exit to exit, answering each line with the number of exits so far.
"""

import contextlib
import ctypes
import mmap
import sys
import threading

from hvkvm.abi.kvm import KVM_CAP_HYPERV_SYNIC2, KVM_CAP_IRQFD
from hvkvm.abi.kvm_structs import kvm_irq_routing_entry, kvm_regs
from hvkvm.abi.tlfs import HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_STIMER0_CONFIG
from hvkvm.errors import HvkvmError
from hvkvm.kvm.doorbell import IoEventFd
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.irqfd import Irqfd
from hvkvm.kvm.system import Kvm

TWO_OUTS_AND_HALT = bytes.fromhex("b02a e680 e680 f4")  # mov al,42; out 0x80,al; out 0x80,al; hlt
OUT_FOR_EVER = bytes.fromhex("e680 ebfc")
RAM = []  # mappings that guests run in: they have to outlive them
refused = contextlib.suppress(HvkvmError)  # a KVM without Hyper-V refuses: the trace says so


def vcpu_of(vm, code):
    vm.set_tss_addr(0xFFFBD000)
    ram = mmap.mmap(-1, 0x10000)
    RAM.append(ram)
    ram[0x1000 : 0x1000 + len(code)] = code
    vm.set_user_memory_region(0, 0, 0x10000, ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=0x1000, rflags=2))
    return vcpu


def route(vm):
    vm.create_irqchip()
    gsis = GsiTable(vm)
    irqfd = Irqfd(vm, gsis.add_msi(0xFEE00000, 0x4021), resample=True)
    irqfd.close()
    IoEventFd(vm, 0x510, 2, datamatch=3, pio=True).close()
    sint = kvm_irq_routing_entry(gsi=30, type=4)
    sint.u.hv_sint.vcpu, sint.u.hv_sint.sint = 0, 2
    with refused:
        vm.set_gsi_routing([sint])
    with refused:
        vm.hyperv_eventfd(5, sys.stdin.fileno())
    vcpu = vm.create_vcpu(3)
    with refused:
        vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC2)
    with refused:
        vcpu.set_msrs({HV_X64_MSR_GUEST_OS_ID: 0x1234, HV_X64_MSR_STIMER0_CONFIG: 0})


def run(kvm):
    kvm.check_extension(KVM_CAP_IRQFD)
    with kvm.create_vm() as vm:
        route(vm)
    with kvm.create_vm() as vm:
        vcpu = vcpu_of(vm, TWO_OUTS_AND_HALT)
        thread = threading.Thread(target=lambda: [vcpu.enter() for _ in range(3)])
        thread.start()
        thread.join()
    sys.exit(7)


def loop(kvm):
    vcpu = vcpu_of(kvm.create_vm(), OUT_FOR_EVER)
    exits, pause = 0, float(sys.argv[2])
    stop = threading.Event()

    def turn():
        nonlocal exits
        while not (stop.wait(pause) if pause else stop.is_set()):
            vcpu.enter()
            exits += 1

    thread = threading.Thread(target=turn)
    thread.start()
    print("up", flush=True)
    for _line in sys.stdin:
        print(exits, flush=True)
    stop.set()
    thread.join()


with Kvm() as kvm:
    {"run": run, "loop": loop}[sys.argv[1]](kvm)
