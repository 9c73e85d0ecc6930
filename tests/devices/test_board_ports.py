"""The small port devices: fw_cfg, exit ports, resets, ACPI power, quiet ports, complaints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import board
from hvkvm.devices.port.acpi_pm import AcpiControlBlock, AcpiEventBlock
from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.cmos import Cmos
from hvkvm.devices.port.complaints import Complaints
from hvkvm.devices.port.debug_exit import DebugExit, GuestExit, debug_exit_status
from hvkvm.devices.port.fw_cfg import FwCfg
from hvkvm.devices.port.quiet import quiet_ports
from hvkvm.devices.port.reset import I8042Reset, PciConfigPorts, SystemControlA
from hvkvm.events import BURST, limited


@pytest.fixture
def bus():
    return PortBus()


def fw_cfg_item(bus, key, length):
    bus.write(0x510, 2, key)
    return bytes(bus.read(0x511, 1) for _ in range(length))


# --- fw_cfg ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (0x00, b"QEMU"),
        (0x01, b"\x01\0\0\0"),
        (0x03, (512 << 20).to_bytes(8, "little")),
        (0x05, b"\x03\0"),
        (0x0F, b"\x03\0"),
        (0x11, bytes(8)),
        (0x19, bytes(4)),
        (0x1234, b""),
    ],
)
def test_fw_cfg_gives_an_item_then_zeros(bus, key, value):
    FwCfg(3, 512 << 20).attach(bus)
    assert fw_cfg_item(bus, key, len(value) + 300) == value + bytes(300)
    assert fw_cfg_item(bus, key, len(value)) == value, "selecting again starts over"


def test_fw_cfg_reads_zero_before_anything_is_selected(bus):
    FwCfg(1, 1 << 20).attach(bus)
    assert bus.read(0x511, 1) == 0


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0x50C, 0x512), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFFFFFF)
        )
    )
)
def test_fw_cfg_takes_any_sequence_of_accesses(accesses):
    bus = PortBus()
    device = FwCfg(2, 1 << 30)
    device.attach(bus)
    for is_write, port, size, value in accesses:
        if is_write:
            bus.write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(port, size) < 1 << 8 * size
    assert device._cursor <= 8


# --- exits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_debug_exit_reports_the_first_value_only(bus, size):
    values = []
    DebugExit(values.append).attach(bus)
    assert bus.read(0xF4, size) == 0
    bus.write(0xF4, size, 3)
    bus.write(0xF4, size, 0)
    assert values == [3]


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0x80, 1), (0xFFFFFFFF, 0xFF)])
def test_debug_exit_status_is_odd_and_a_byte(value, status):
    assert debug_exit_status(value) == status


def test_guest_exit_takes_a_byte_at_its_own_port(bus):
    values = []
    GuestExit(values.append).attach(bus)
    DebugExit(pytest.fail).attach(bus)
    bus.write(board.GUEST_EXIT_PORT, 1, 42)
    bus.write(board.GUEST_EXIT_PORT, 1, 0)
    assert values == [42]


# --- resets ---------------------------------------------------------------------------------------


@pytest.fixture
def resets(bus):
    seen = []
    for device in (PciConfigPorts, I8042Reset, SystemControlA):
        device(lambda name=device.__name__: seen.append(name)).attach(bus)
    return seen


@pytest.mark.parametrize("value", [0x04, 0x06, 0x0E])
def test_cf9_resets(bus, resets, value):
    bus.write(board.RESET_PORT, 1, 0x02)
    assert resets == []
    assert bus.read(board.RESET_PORT, 1) == 0x02
    bus.write(board.RESET_PORT, 1, value)
    assert resets == ["PciConfigPorts"]


def test_a_pci_probe_finds_mechanism_1_and_nobody_and_resets_nothing(bus, resets):
    """As Linux's pci_check_type1(), which wants the address back, and a scan behind it."""
    bus.write(0xCFB, 1, 1)
    for address in (0x80000000, 0x80000400, 0x80FFFFFC):
        bus.write(0xCF8, 4, address)
        assert bus.read(0xCF8, 4) == address
        assert bus.read(0xCFC, 2) == 0xFFFF
        assert bus.read(0xCFE, 1) == 0xFF
    bus.write(0xCF8, 1, 0xFF)
    bus.write(0xCF8, 2, 0xFFFF)
    bus.write(0xCFA, 1, 0xFF)
    assert bus.read(0xCF8, 4) == address
    assert resets == []


def test_configuration_address_and_reset_control_are_saved():
    ports, other = PciConfigPorts(lambda: None), PciConfigPorts(lambda: None)
    ports.write(0, 4, 0xFFFFFFFF)
    ports.write(1, 1, 0x02)
    other.load(ports.save())
    assert (other.address, other.read(1, 1), other.save()) == (0x80FFFFFC, 0x02, ports.save())
    other.load(0)
    assert (other.read(0, 4), other.read(1, 1)) == (0, 0)


@pytest.mark.parametrize(("value", "count"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xAA, 0), (0xD1, 0)])
def test_the_keyboard_controllers_pulse_resets(bus, resets, value, count):
    bus.write(0x64, 1, value)
    bus.write(0x60, 1, value)
    assert len(resets) == count


def test_linux_finds_no_keyboard_controller_at_once_and_reboots_without_waiting(bus, resets):
    # i8042_flush: more than 16 bytes in the output buffer is "No controller found".
    assert all(bus.read(0x64, 1) & 0x01 and bus.read(0x60, 1) == 0xFF for _ in range(17))
    # kb_wait: goes on when the input buffer is empty.
    assert not bus.read(0x64, 1) & 0x02


def test_port_92_resets_and_keeps_a20(bus, resets):
    bus.write(0x92, 1, 0x02)
    assert resets == []
    assert bus.read(0x92, 1) == 0x02
    bus.write(0x92, 1, 0x03)
    assert resets == ["SystemControlA"]


# --- ACPI -----------------------------------------------------------------------------------------


def test_s5_powers_off_and_nothing_else_does(bus):
    offs = []
    AcpiControlBlock(lambda: offs.append(1)).attach(bus)
    enable, s5 = board.PM1_CNT_SLP_EN, board.S5_SLP_TYP << board.PM1_CNT_SLP_TYP_SHIFT
    for value in (s5, enable, enable | 1 << board.PM1_CNT_SLP_TYP_SHIFT):
        bus.write(board.PM1A_CNT_PORT, 2, value)
    assert offs == []
    bus.write(board.PM1A_CNT_PORT, 2, s5 | enable)
    assert offs == [1]


def test_s5_in_two_byte_writes_powers_off_too(bus):
    offs = []
    AcpiControlBlock(lambda: offs.append(1)).attach(bus)
    bus.write(board.PM1A_CNT_PORT, 1, 0)
    bus.write(board.PM1A_CNT_PORT + 1, 1, (board.S5_SLP_TYP << 10 | board.PM1_CNT_SLP_EN) >> 8)
    assert offs == [1]


def test_sci_en_always_reads_one_and_slp_en_zero(bus):
    AcpiControlBlock(lambda: None).attach(bus)
    assert bus.read(board.PM1A_CNT_PORT, 2) == 1
    bus.write(board.PM1A_CNT_PORT, 2, 0x3000)
    assert bus.read(board.PM1A_CNT_PORT, 2) == 0x1001
    assert bus.read(board.PM1A_CNT_PORT + 1, 1) == 0x10


def test_the_power_button_holds_the_sci_until_it_is_acknowledged(bus):
    levels = []
    events = AcpiEventBlock(levels.append)
    events.attach(bus)
    events.press_power_button()
    assert levels == [], "not enabled yet"
    bus.write(board.PM1A_EVT_PORT + 2, 2, 0x100)
    assert levels == [True]
    assert bus.read(board.PM1A_EVT_PORT, 4) == 0x01000100
    bus.write(board.PM1A_EVT_PORT, 2, 0x00FF)
    assert levels == [True]
    bus.write(board.PM1A_EVT_PORT + 1, 1, 0x01)
    assert levels == [True, False]
    assert bus.read(board.PM1A_EVT_PORT, 2) == 0


def test_an_alarm_shares_the_sci_with_the_power_button(bus):
    levels = []
    events = AcpiEventBlock(levels.append)
    events.attach(bus)
    bus.write(board.PM1A_EVT_PORT + 2, 2, 0x500)
    events.raise_alarm()
    events.press_power_button()
    saved = events.save()
    assert (levels, saved.status) == ([True], 0x500)
    bus.write(board.PM1A_EVT_PORT, 2, 0x100)
    assert levels == [True]
    bus.write(board.PM1A_EVT_PORT, 2, 0x400)
    assert levels == [True, False]
    events.load(saved)
    assert levels == [True, False, True]


def test_enabling_one_byte_leaves_the_other(bus):
    events = AcpiEventBlock()
    events.attach(bus)
    bus.write(board.PM1A_EVT_PORT, 4, 0xFFFF0000)
    assert bus.read(board.PM1A_EVT_PORT + 2, 2) == 0x0721
    bus.write(board.PM1A_EVT_PORT + 2, 1, 0)
    assert bus.read(board.PM1A_EVT_PORT + 2, 2) == 0x0700


def test_a_sleep_byte_powers_off_where_it_is_wired_only(bus):
    offs = []
    events = AcpiEventBlock()
    events.attach(bus)
    bus.write(board.PM1A_EVT_PORT, 1, 0x34)
    events.on_sleep = lambda: offs.append(1)
    for port, size, value in ((0, 2, 0x34), (1, 1, 0x34), (0, 1, 0x30), (0, 1, 0x14)):
        bus.write(board.PM1A_EVT_PORT + port, size, value)
    assert offs == []
    bus.write(board.PM1A_EVT_PORT, 1, 0x34)
    assert offs == [1]


# --- quiet ports, complaints, all together --------------------------------------------------------


def test_complaints_are_few_but_counted(recorder):
    complaints = Complaints(limited(recorder), "subject")
    for _ in range(1000):
        complaints.add("wrong")
    assert complaints.count == 1000
    assert len(recorder.events) == BURST + 6  # 16, 32, ..., 512
    assert {event.subject for event in recorder.events} == {"subject"}


def whole_board() -> PortBus:
    """Every device of this room on one bus: they must not overlap."""
    bus = PortBus()
    bus.expect(quiet_ports())
    for device in (
        FwCfg(1, 1 << 20),
        DebugExit(lambda value: None),
        GuestExit(lambda value: None),
        PciConfigPorts(lambda: None),
        I8042Reset(lambda: None),
        SystemControlA(lambda: None),
        AcpiEventBlock(),
        AcpiControlBlock(lambda: None),
        Cmos(),
    ):
        device.attach(bus)
    return bus


BOARD = whole_board()


@given(
    st.integers(0, 0xFFFF) | st.sampled_from(sorted(BOARD._claims)),
    st.sampled_from((1, 2, 4)),
    st.integers(0),
)
def test_no_port_raises_and_every_answer_fits(port, size, value):
    BOARD.write(port, size, value & (1 << 8 * size) - 1)
    assert 0 <= BOARD.read(port, size) < 1 << 8 * size
