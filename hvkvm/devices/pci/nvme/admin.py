"""Admin commands: queues made and deleted, features, logs, identification.

Each is answered from the copy that the controller made. I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.abi import nvme
from hvkvm.devices.pci.nvme import identify
from hvkvm.devices.pci.nvme.io_commands import Answer, Command, Namespace
from hvkvm.devices.pci.nvme.prp import PAGE, Memory, PrpError, copy_out
from hvkvm.devices.pci.nvme.queue_table import QueueTable
from hvkvm.devices.pci.nvme.queues import Completion, Shadow, Submission
from hvkvm.devices.pci.nvme.self_test import SelfTest

MAX_IO_QUEUES = 32
"""Pairs of queues for I/O."""
MAX_ENTRIES = 1024
"""Of one queue."""
SAVED_FEATURES = (
    nvme.NVME_FEAT_ARBITRATION,
    nvme.NVME_FEAT_POWER_MGMT,
    nvme.NVME_FEAT_TEMP_THRESH,
    nvme.NVME_FEAT_ERR_RECOVERY,
    nvme.NVME_FEAT_IRQ_COALESCE,
    nvme.NVME_FEAT_WRITE_ATOMIC,
    nvme.NVME_FEAT_ASYNC_EVENT,
)
"""Values that are kept and given back, and change nothing."""
_DNR = nvme.NVME_STATUS_DNR
_IRQ_NO_COALESCING = 1 << 16
_SERIOUS_FEATURE_BITS = {nvme.NVME_FEAT_POWER_MGMT: 0x1F}


class Owner(Protocol):
    """What admin commands look at, and change, in their controller."""

    memory: Memory
    namespace: Namespace
    serial: str
    read_only: bool
    vectors: int
    queues: QueueTable
    self_test: SelfTest

    def keep_open(self) -> None: ...
    def counters(self) -> tuple[int, int, int, int]: ...


class Admin:
    """The admin commands of one controller."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.features = dict.fromkeys(SAVED_FEATURES, 0)
        self.events: list[int] = []
        """Command ids of asynchronous event requests: they are answered if anything ever happens."""
        self._commands: dict[int, Callable[[Command, Answer], object]] = {
            nvme.NVME_ADMIN_DELETE_SQ: self._delete_sq,
            nvme.NVME_ADMIN_CREATE_SQ: self._create_sq,
            nvme.NVME_ADMIN_DELETE_CQ: self._delete_cq,
            nvme.NVME_ADMIN_CREATE_CQ: self._create_cq,
            nvme.NVME_ADMIN_IDENTIFY: self._identify,
            nvme.NVME_ADMIN_ABORT_CMD: lambda _command, answer: answer(0, 1),  # none is ever aborted
            nvme.NVME_ADMIN_SET_FEATURES: self._set_features,
            nvme.NVME_ADMIN_GET_FEATURES: self._get_features,
            nvme.NVME_ADMIN_GET_LOG_PAGE: self._log,
            nvme.NVME_ADMIN_DEV_SELF_TEST: self._self_test,
            nvme.NVME_ADMIN_DBBUF: self._doorbell_buffer,
        }

    def reset(self) -> None:
        """Power-on values."""
        self.features = dict.fromkeys(SAVED_FEATURES, 0)
        self.events.clear()

    def perform(self, command: Command, answer: Answer) -> None:
        """Carry out a command; nearly all are answered at once."""
        if command.flags & nvme.CMD_FUSE_AND_PSDT:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            return
        if command.opcode == nvme.NVME_ADMIN_ASYNC_EVENT:
            if len(self.events) > identify.ASYNC_EVENT_LIMIT:
                answer(nvme.NVME_SC_ASYNC_LIMIT | _DNR, 0)
            else:
                self.events.append(command.id)
                self._owner.keep_open()
            return
        perform = self._commands.get(command.opcode)
        if perform is None:
            answer(nvme.NVME_SC_INVALID_OPCODE | _DNR, 0)
            return
        try:
            perform(command, answer)
        except PrpError as error:
            answer(error.status, 0)

    # Queues.

    def _queue(self, command: Command) -> tuple[int, int, int]:
        """(id, entries, status) of a create command."""
        qid, entries = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 1 <= qid <= MAX_IO_QUEUES:
            return qid, entries, nvme.NVME_SC_QID_INVALID
        if not 2 <= entries <= MAX_ENTRIES:
            return qid, entries, nvme.NVME_SC_QUEUE_SIZE
        if not command.cdw11 & nvme.NVME_QUEUE_PHYS_CONTIG:
            return qid, entries, nvme.NVME_SC_INVALID_FIELD
        if command.prp1 % PAGE:
            return qid, entries, nvme.NVME_SC_PRP_INVALID_OFFSET
        return qid, entries, nvme.NVME_SC_SUCCESS

    def _create_cq(self, command: Command, answer: Answer) -> None:
        owner = self._owner
        qid, entries, status = self._queue(command)
        vector = command.cdw11 >> 16
        if not status and qid in owner.queues.completions:
            status = nvme.NVME_SC_QID_INVALID
        if not status and vector >= owner.vectors:
            status = nvme.NVME_SC_INVALID_VECTOR
        if not status and not owner.memory.contains(command.prp1, entries * nvme.CQE_SIZE):
            status = nvme.NVME_SC_INVALID_FIELD
        if status:
            answer(status | _DNR, 0)
            return
        interrupts = bool(command.cdw11 & nvme.NVME_CQ_IRQ_ENABLED)
        owner.queues.add_completion(Completion(qid, command.prp1, entries, vector, interrupts=interrupts))
        answer(nvme.NVME_SC_SUCCESS, 0)

    def _create_sq(self, command: Command, answer: Answer) -> None:
        owner = self._owner
        qid, entries, status = self._queue(command)
        if not status and qid in owner.queues.submissions:
            status = nvme.NVME_SC_QID_INVALID
        completion = owner.queues.completions.get(command.cdw11 >> 16)
        if not status and (completion is None or completion.id == 0):
            status = nvme.NVME_SC_CQ_INVALID
        if not status and not owner.memory.contains(command.prp1, entries * nvme.SQE_SIZE):
            status = nvme.NVME_SC_INVALID_FIELD
        if status or completion is None:
            answer(status | _DNR, 0)
            return
        owner.queues.add_submission(Submission(qid, command.prp1, entries, completion))
        answer(nvme.NVME_SC_SUCCESS, 0)

    def _delete_sq(self, command: Command, answer: Answer) -> None:
        queue = self._owner.queues.submissions.get(command.cdw10 & 0xFFFF)
        if queue is None or queue.id == 0 or queue.deleting:
            answer(nvme.NVME_SC_QID_INVALID | _DNR, 0)
        else:
            self._owner.queues.delete_submission(queue, lambda: answer(nvme.NVME_SC_SUCCESS, 0))

    def _delete_cq(self, command: Command, answer: Answer) -> None:
        queue = self._owner.queues.completions.get(command.cdw10 & 0xFFFF)
        if queue is None or queue.id == 0:
            answer(nvme.NVME_SC_QID_INVALID | _DNR, 0)
        elif queue.users:
            answer(nvme.NVME_SC_INVALID_QUEUE | _DNR, 0)
        else:
            self._owner.queues.delete_completion(queue)
            answer(nvme.NVME_SC_SUCCESS, 0)

    def _doorbell_buffer(self, command: Command, answer: Answer) -> None:
        """From now on I/O queues' doorbells have their values in guest memory, and ring when asked to."""
        shadow, event = command.prp1, command.prp2
        memory = self._owner.memory
        if (
            shadow % PAGE
            or event % PAGE
            or not memory.contains(shadow, PAGE)
            or not memory.contains(event, PAGE)
        ):
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            return
        self._owner.queues.use_shadow(Shadow(shadow, event))
        answer(nvme.NVME_SC_SUCCESS, 0)

    def _self_test(self, command: Command, answer: Answer) -> None:
        """Begin a test, which is looked for in its log, or end it."""
        code, test = command.cdw10 & 0xF, self._owner.self_test
        if command.nsid not in (0, 1, nvme.NVME_NSID_ALL):
            answer(nvme.NVME_SC_INVALID_NS | _DNR, 0)
        elif code == nvme.NVME_ST_CODE_ABORT:
            test.abort()
            answer(nvme.NVME_SC_SUCCESS, 0)
        elif code not in (nvme.NVME_ST_CODE_SHORT, nvme.NVME_ST_CODE_EXTENDED):
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
        elif test.start(code, command.nsid):
            answer(nvme.NVME_SC_SUCCESS, 0)
        else:
            answer(nvme.NVME_SC_SELT_TEST_IN_PROGRESS, 0)

    # Everything that is only told.

    def _identify(self, command: Command, answer: Answer) -> None:
        owner = self._owner
        cns = command.cdw10 & 0xFF
        if cns == nvme.NVME_ID_CNS_CTRL:
            data = identify.controller(owner.serial)
        elif cns == nvme.NVME_ID_CNS_NS_ACTIVE_LIST:
            if command.nsid >= nvme.NVME_NSID_ALL - 1:
                answer(nvme.NVME_SC_INVALID_NS | _DNR, 0)
                return
            data = identify.active_list(command.nsid)
        elif cns in (nvme.NVME_ID_CNS_NS, nvme.NVME_ID_CNS_NS_DESC_LIST):
            if command.nsid != 1:
                answer(nvme.NVME_SC_INVALID_NS | _DNR, 0)
                return
            if cns == nvme.NVME_ID_CNS_NS:
                one = owner.namespace
                data = identify.namespace(one.disk.size, one.sector_size, read_only=owner.read_only)
            else:
                data = identify.descriptors(owner.serial)
        else:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            return
        copy_out(owner.memory, command.prp1, command.prp2, data)
        answer(nvme.NVME_SC_SUCCESS, 0)

    def _set_features(self, command: Command, answer: Answer) -> None:
        which, value = command.cdw10 & 0xFF, command.cdw11
        if command.cdw10 >> 31:
            answer(nvme.NVME_SC_FEATURE_NOT_SAVEABLE | _DNR, 0)
        elif which == nvme.NVME_FEAT_NUM_QUEUES:
            if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
                answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            else:
                answer(nvme.NVME_SC_SUCCESS, (MAX_IO_QUEUES - 1) * 0x10001)
        elif which in self.features:
            if value & _SERIOUS_FEATURE_BITS.get(which, 0):  # there is power state 0 only
                answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            else:
                self.features[which] = value
                answer(nvme.NVME_SC_SUCCESS, 0)
        elif which in (nvme.NVME_FEAT_IRQ_CONFIG, nvme.NVME_FEAT_VOLATILE_WC):
            answer(nvme.NVME_SC_SUCCESS, 0)  # the host's cache is not the guest's to switch
        else:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)

    def _get_features(self, command: Command, answer: Answer) -> None:
        which = command.cdw10 & 0xFF
        if which == nvme.NVME_FEAT_NUM_QUEUES:
            answer(nvme.NVME_SC_SUCCESS, (MAX_IO_QUEUES - 1) * 0x10001)
        elif which == nvme.NVME_FEAT_VOLATILE_WC:
            answer(nvme.NVME_SC_SUCCESS, 1)
        elif which == nvme.NVME_FEAT_IRQ_CONFIG:
            vector = command.cdw11 & 0xFFFF
            good = vector < self._owner.vectors
            status = nvme.NVME_SC_SUCCESS if good else nvme.NVME_SC_INVALID_FIELD | _DNR
            answer(status, vector | _IRQ_NO_COALESCING if good else 0)
        elif which in self.features:
            answer(nvme.NVME_SC_SUCCESS, self.features[which])
        else:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)

    def _log(self, command: Command, answer: Answer) -> None:
        which = command.cdw10 & 0xFF
        length = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        if which == nvme.NVME_LOG_ERROR:
            data = bytes(64)
        elif which == nvme.NVME_LOG_SMART:
            data = identify.smart(*self._owner.counters())
        elif which == nvme.NVME_LOG_FW_SLOT:
            data = identify.firmware_slots()
        elif which == nvme.NVME_LOG_DEVICE_SELF_TEST:
            data = self._owner.self_test.log()
        else:
            answer(nvme.NVME_SC_INVALID_LOG_PAGE | _DNR, 0)
            return
        if offset > len(data) or length > PAGE:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            return
        data = data[offset : offset + length].ljust(length, b"\0")
        copy_out(self._owner.memory, command.prp1, command.prp2, data)
        answer(nvme.NVME_SC_SUCCESS, 0)


def command_of(raw: bytes) -> Command:
    """The fields of a submission queue entry."""
    return Command(*nvme.SQE.unpack(raw))
