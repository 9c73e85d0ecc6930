"""A SCSI controller on VMBus (storvsp): what Linux's hv_storvsc and a Windows guest drive.

The guest shakes hands on the primary channel, may ask for a sub-channel a further VP,
and sends SCSI requests on any of them to any unit. Units come and go while the guest
runs: it is told to look again.

Owner: the I/O loop; `inspect` any thread.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.abi.storvsp import Srb
from hvkvm.abi.vmbus import VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
from hvkvm.block.request import Request
from hvkvm.devices.scsi.command import Command
from hvkvm.devices.scsi.plain import Plain
from hvkvm.devices.scsi.saved import UnitState, load_unit, save_unit
from hvkvm.devices.scsi.target import Bus
from hvkvm.devices.scsi.unit import Unit
from hvkvm.devices.synth.storvsp_channel import MAX_IN_FLIGHT, Answer, SavedCompletion, StorvspChannel
from hvkvm.devices.synth.storvsp_handshake import Handshake, Phase
from hvkvm.errors import StateError
from hvkvm.runtime.guard import Guard
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Done, SubChannels
from hvkvm.vmbus.offer import Offer
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.pending import Pending

MAX_SUB_CHANNELS = 63

MAX_CONTROLLERS = 64

_INSTANCE = bytes.fromhex("6d7c1f5e2b9a4b7e9c3a68766b766d")
"""The first bytes of a controller's instance; the last is its index."""


class StorvspState(NamedTuple):
    """What was agreed, what the guest is still to be told, and each unit."""

    phase: str
    version: int
    notices: tuple[int, ...]
    done: tuple[SavedCompletion, ...]
    units: dict[str, UnitState]
    """By "target:lun"."""


class Storvsp:
    """The controller `index` of a machine of `vp_count` VPs. ValueError for an index that there is not.

    A MultiChannel, BusyDevice, SavedDevice and ResetDevice of `vmbus.device`.
    """

    State = StorvspState

    def __init__(self, index: int, memory: Ram, vp_count: int) -> None:
        if not 0 <= index < MAX_CONTROLLERS:
            raise ValueError(f"controller {index}: there are 0 to {MAX_CONTROLLERS - 1}")
        self._offer = Offer(
            wire.SCSI,
            _INSTANCE + bytes([index]),
            f"scsi{index}",
            flags=VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE,
        )
        self._memory = memory
        self._sub_channels = min(vp_count - 1, MAX_SUB_CHANNELS)
        self._subs: SubChannels | None = None
        self._primary = StorvspChannel(self._offer, self, memory)
        self._channels: dict[int, StorvspChannel] = {0: self._primary}
        self._bus = Bus(tells=False)
        self._saved: tuple[SavedCompletion, ...] = ()
        self._handshake = Handshake(self._sub_channels)

    # Units.

    @property
    def units(self) -> Bus:
        """The units by target and LUN; `attach` and `detach` change it."""
        return self._bus

    def attach(self, target: int, lun: int, unit: Unit) -> None:
        """Put `unit` there; a guest that runs looks for it. ValueError if that place is taken, or is none."""
        if not (0 <= target < wire.MAX_TARGETS and 0 <= lun < wire.MAX_LUNS):
            raise ValueError(f"target {target} LUN {lun}: there are 0 to 1, and 0 to {wire.MAX_LUNS - 1}")
        self._bus.add(target, lun, unit)
        self.rescan()

    def detach(self, target: int, lun: int, done: Callable[[Unit], object]) -> None:
        """Take the unit away; KeyError if none is there. A guest that runs looks, and finds it gone.

        `done(unit)` when none of its requests is in flight; those end as they would have.
        """
        unit = self._bus.remove(target, lun)
        self._notify(wire.REMOVE_DEVICE)
        unit.drain(lambda: done(unit))

    def rescan(self) -> None:
        """Have the guest look at its units again: one has come, or has another size."""
        self._notify(wire.ENUMERATE_BUS)

    def _notify(self, operation: int) -> None:
        if self.ready:  # else it has yet to look for the first time
            self._primary.notify(operation)

    # storvsp_channel.Controller

    @property
    def ready(self) -> bool:
        """Whether the handshake is over."""
        return self._handshake.ready

    @property
    def phase(self) -> Phase:
        """How far the guest's driver has come."""
        return self._handshake.phase

    def begin(self, srb: Srb, request: Request) -> bool:
        """Have a disk do it if it is a plain READ or WRITE; False, and nothing was done, if it is not."""
        unit = self._bus.get(srb.target, srb.lun)
        return unit is not None and not srb.path and unit.begin(srb.cdb, request)

    def plain(self, target: int, lun: int) -> Plain | None:
        """What a disk on path 0 does at once; None if there is none that would."""
        unit = self._bus.get(target, lun)
        return None if unit is None else unit.plain()

    def execute(self, srb: Srb, command: Command) -> bool:
        """Have the unit do it; False if nobody answers for that address.

        Never for a path that is none: Linux's storvsc_remove_lun() takes the unit of that target
        and LUN away on path 0, whichever path it was told of.
        """
        target, lun = srb.target, srb.lun
        unit = self._bus.get(target, lun) if not srb.path else None
        if unit is not None:
            unit.execute(command)
            return True
        if srb.path or srb.cdb[0] == scsi.INQUIRY or (srb.cdb[0] == scsi.REPORT_LUNS and lun == 0):
            self._bus.execute_absent(-1 if srb.path else target, lun, command)
            return True
        return False

    def poll(self) -> None:
        """Answer now what need not wait."""
        for unit in self._bus.units:
            unit.poll()

    def control(self, channel: StorvspChannel, operation: int, payload: bytes, reply: Answer) -> None:
        """The handshake, resets, and what there is not."""
        if operation in (wire.RESET_ADAPTER, wire.RESET_BUS):
            self._reset([unit for _target, _lun, unit in self._bus], reply)
        elif operation == wire.RESET_LUN:
            path, target, lun = wire.address_of(payload)
            unit = None if path else self._bus.get(target, lun)
            self._reset([] if unit is None else [unit], reply)
        elif channel is not self._primary:
            reply(wire.answer(wire.STATUS_INVALID_DEVICE_STATE))
        elif operation == wire.CREATE_SUB_CHANNELS and self.ready:
            self._create_sub_channels(wire.count_of(payload), reply)
        else:
            reply(self._handshake.answer(operation, payload))

    def closed(self, channel: StorvspChannel) -> None:
        """Without its primary channel, all begins anew; a sub-channel that goes is forgotten."""
        self._release()
        if channel is self._primary:
            self._handshake.begin_anew()
        elif self._channels.get(channel.index) is channel:
            channel.in_flight.when_none(lambda: self._forget(channel))

    def _forget(self, channel: StorvspChannel) -> None:
        if self._channels.get(channel.index) is channel and not channel.is_open:
            del self._channels[channel.index]

    def _release(self) -> None:
        for _target, _lun, unit in self._bus:
            unit.release()

    def _reset(self, units: list[Unit], reply: Answer) -> None:
        """Answer when all that was in flight is, and the units are as after power-on."""
        pending = Pending()
        for unit in units:
            unit.reset(pending.begin(lambda: None))
        pending.when_none(lambda: reply(wire.answer(wire.STATUS_SUCCESS)))

    def _create_sub_channels(self, count: int, reply: Answer) -> None:
        if self._subs is None or not 1 <= count <= self._sub_channels:
            reply(wire.answer(wire.STATUS_INVALID_PARAMETER))
            return
        reply(wire.answer(wire.STATUS_SUCCESS))
        for index in range(1, count + 1):
            self._subs.add(index)

    # vmbus.device: the primary channel.

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        return self._offer

    @property
    def guard(self) -> Guard:
        """Runs what is deferred for it."""
        return self._primary.guard

    def opened(self, io: ChannelIo) -> None:
        """The guest begins."""
        self._handshake.begin_anew()
        self._primary.opened(io)

    def rung(self) -> None:
        """The guest has sent something, or made room."""
        self._primary.rung()

    def close(self, done: Done) -> None:
        """See `vmbus.device.AnyDevice`."""
        self._primary.close(done)

    # vmbus.device.MultiChannel

    def bind(self, sub_channels: SubChannels) -> None:
        """See `vmbus.device.MultiChannel`."""
        self._subs = sub_channels

    def sub_channel(self, index: int) -> StorvspSubChannel:
        """See `vmbus.device.MultiChannel`."""
        if not 1 <= index <= self._sub_channels:
            raise ValueError(f"{self._offer.name} has no sub-channel {index}")
        channel = StorvspSubChannel(self._offer._replace(sub_channel_index=index), self, self._memory)
        self._channels[index] = channel
        return channel

    # At rest.

    def rest(self, done: Done) -> None:
        """See `vmbus.device.BusyDevice`."""
        self._release()
        pending = Pending()
        for channel in list(self._channels.values()):
            channel.in_flight.when_none(pending.begin(lambda: None))
        pending.when_none(done)

    def reset(self) -> None:
        """See `vmbus.device.ResetDevice`."""
        for _target, _lun, unit in self._bus:
            unit.power_on()

    def save(self) -> StorvspState:
        """See `vmbus.device.SavedDevice`."""
        done = [one for channel in self._channels.values() for one in channel.save_done()]
        units = {f"{target}:{lun}": save_unit(unit) for target, lun, unit in self._bus}
        hands = self._handshake
        return StorvspState(hands.phase.value, hands.version, self._primary.notices, tuple(done), units)

    def load(self, io: ChannelIo | None, state: StorvspState) -> None:
        """See `vmbus.device.SavedDevice`."""
        self._load_units(state.units)
        if io is None:
            return
        if len(state.done) > MAX_IN_FLIGHT * (self._sub_channels + 1):
            raise ValueError(f"{self._offer.name}: {len(state.done)} completions wait")
        if any(len(one.payload) != wire.PACKET_BYTES or one.trans_id < 0 for one in state.done):
            raise ValueError(f"{self._offer.name}: a completion that waits is none")
        self._handshake.load(state.phase, state.version)
        self._saved = state.done
        self.restore(self._primary, io)
        for operation in {wire.ENUMERATE_BUS, wire.REMOVE_DEVICE} & set(state.notices):
            self._notify(operation)

    def restore(self, channel: StorvspChannel, io: ChannelIo | None) -> None:
        """Give a channel that was open its completions back."""
        channel.go_on(io, [one for one in self._saved if one.channel == channel.index])

    def _load_units(self, states: dict[str, UnitState]) -> None:
        here = {f"{target}:{lun}": unit for target, lun, unit in self._bus}
        if set(here) != set(states):
            odd = min(set(here) ^ set(states))
            side = "this machine has" if odd in here else "the saved machine had"
            raise StateError(f"{self._offer.name}: only {side} a unit at {odd[:10]!r}")
        for place, unit in here.items():
            load_unit(unit, states[place])

    def inspect(self) -> dict[str, object]:
        """What was agreed, and what the channels and units do. Any thread."""
        version = self._handshake.version
        channels = list(self._channels.values())
        return {
            "driver": self.ready,
            "phase": self.phase.value,
            "version": f"{version >> 8}.{version & 0xFF}" if version else None,
            "channels": sum(channel.is_open for channel in channels),
            "requests": {channel.index: channel.requests for channel in channels},
            "in_flight": {channel.index: channel.in_flight.count for channel in channels},
            "units": {f"{target}:{lun}": unit.inspect() for target, lun, unit in self._bus},
        }


class StorvspSubChannel(StorvspChannel):
    """A sub-channel; its state is its controller's."""

    State = StorvspState

    def __init__(self, offer: Offer, controller: Storvsp, memory: Ram) -> None:
        super().__init__(offer, controller, memory)
        self._storvsp = controller

    def save(self) -> None:
        """See `vmbus.device.MultiChannel`."""

    def load(self, io: ChannelIo | None, _state: None) -> None:
        """See `vmbus.device.MultiChannel`."""
        self._storvsp.restore(self, io)
