"""The agent guest under QEMU: the same image, driven through RAM that QEMU shares with us.

What our machine must do, another VMM does too: a test that runs on both says
whether the test or the machine is odd. Owner: the test's thread.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import guest_images
from guest_agent import ABI, Agent, AgentCpu
from guest_machine import GUEST_OS_ID

from hvkvm.abi.tlfs import HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_HYPERCALL

QEMU = "qemu-system-x86_64"
MIB = 1 << 20


def missing() -> str | None:
    """Why QEMU cannot be used, or None."""
    return None if shutil.which(QEMU) else f"{QEMU} is not installed"


class SharedMemory:
    """Guest RAM as QEMU's memory-backend-file has it."""

    def __init__(self, path: Path, size: int) -> None:
        with open(path, "w+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)

    def read(self, gpa: int, size: int) -> bytes:
        return self._map[gpa : gpa + size]

    def write(self, gpa: int, data: bytes) -> None:
        self._map[gpa : gpa + len(data)] = data

    def read_u64(self, gpa: int) -> int:
        with memoryview(self._map) as whole, whole[gpa : gpa + 8].cast("Q") as word:
            return int(word[0])

    def write_u64(self, gpa: int, value: int) -> None:
        with memoryview(self._map) as whole, whole[gpa : gpa + 8].cast("Q") as word:
            word[0] = value

    def close(self) -> None:
        self._map.close()


class QemuGuest:
    """A running QEMU with the agent in it. `arguments` choose accelerator, CPU model and devices."""

    def __init__(self, cpus: int, *arguments: str, memory: int = 64 * MIB) -> None:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="hvkvm-qemu-", dir=folder)
        ram = Path(self._folder.name) / "ram"
        self.memory = SharedMemory(ram, memory)
        # Nobody can send this guest a doorbell, so its vCPUs never halt between commands.
        self.memory.write_u64(ABI["HEADER"] + ABI["HEADER_IDLE"], ABI["IDLE_SPIN"])
        backend = f"memory-backend-file,id=ram,size={memory},mem-path={ram},share=on"
        command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "pc,memory-backend=ram", "-object", backend, "-m", str(memory // MIB)]
        command += ["-smp", str(cpus), "-kernel", str(guest_images.image("agent")), *arguments]
        self.log = Path(self._folder.name) / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.agent = Agent(self.memory, cpus, lambda index: None, ended=self._ended)

    def _ended(self) -> str | None:
        status = self.process.poll()
        return None if status is None else f"QEMU ended with {status}: {self.log.read_text()}"

    def start(self) -> QemuGuest:
        self.agent.await_online()
        return self

    def __getitem__(self, index: int) -> AgentCpu:
        return self.agent[index]

    def enlighten(self) -> None:
        """As `guest_machine.Guest.enlighten`."""
        self[0].wrmsr(HV_X64_MSR_GUEST_OS_ID, GUEST_OS_ID)
        self[0].wrmsr(HV_X64_MSR_HYPERCALL, ABI["HYPERCALL_PAGE"] | 1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.memory.close()
        self._folder.cleanup()
