"""What a guest can see of the SynIC's, the hypercalls' and VMBus's rules: a table of small programs.

Each row's code leaves what it saw in rax, in a micro guest (see `micro_macros.s`); the
rows run in order, and later ones stand on what earlier ones did. Rules with an S-number
are explained in docs/synic-rules.md, the others in the TLFS's chapter that is named.

Memory: the post's input lies at `pages`, SIMP at pages + 0x1000, SIEFP at
pages + 0x2000, and pages + 0x3000 on are free.
"""

from __future__ import annotations

from typing import NamedTuple

FAULT = 1 << 32
"""Added to an exception's vector: what a row saw that took it."""


class Rule(NamedTuple):
    """One row. `expected` values are right; `absent` ones say that this VMM has no such thing."""

    name: str
    title: str
    code: str
    expected: tuple[int, ...]
    absent: tuple[int, ...] = ()
    least: bool = False
    """Whether what is more than expected is right too."""

    def verdict(self, seen: int) -> str:
        """ "ok", "absent" or "not ok"."""
        if seen in self.expected or (self.least and not seen & FAULT and seen >= self.expected[0]):
            return "ok"
        return "absent" if seen in self.absent else "not ok"


def _post(connection: int, size: int, *words: int, message_type: int = 1, at: str = "pages") -> str:
    """Post a message whose payload begins with `words`, 4 bytes each."""
    lines = [f"movl ${at}, %ebx", f"movl ${connection}, (%rbx)", "movl $0, 4(%rbx)"]
    lines += [f"movl ${message_type}, 8(%rbx)", f"movl ${size}, 12(%rbx)"]
    lines += [f"movl ${word}, {16 + 4 * index}(%rbx)" for index, word in enumerate(words)]
    lines += [f"hypercall $0x5c, ${at}"]
    return "\n".join(lines)


def _slot(sint: int) -> str:
    """Wait for a message in a slot: its type is in eax, the slot in rsi."""
    return f"movl $(pages + 0x1000 + 256 * {sint}), %esi\ncall wait_message"


def _testdev(command: int, connection: int, sint: int) -> str:
    value = connection << 24 | command << 16 | sint
    return f"movl ${value:#x}, %eax\nmovw $0x3000, %dx\noutl %eax, %dx"


_NO_DEVICE = (0xFFFF,)
_NO_BUS = (18,)

RULES: tuple[Rule, ...] = (
    Rule("TLFS 2.4", "leaf 0x40000001 says Hv#1", "movl $0x40000001, %eax\ncpuid", (0x31237648,)),
    Rule(
        "TLFS 2.4",
        "leaf 0x40000000 counts to 0x40000005",
        "movl $0x40000000, %eax\ncpuid",
        (0x40000005,),
        least=True,
    ),
    Rule(
        "TLFS 2.4",
        "leaf 0x40000003 grants the SynIC's MSRs",
        "movl $0x40000003, %eax\ncpuid\nshrl $2, %eax\nandl $1, %eax",
        (1,),
    ),
    Rule("TLFS 11.8", "SVERSION is 1", "read_msr 0x40000081", (1,)),
    Rule("TLFS 11.8", "SCONTROL is 0 at reset", "read_msr 0x40000080", (0,)),
    Rule(
        "TLFS 11.8",
        "every SINT is masked at reset",
        """
        movl    $0x40000090, %ecx
        xorl    %ebx, %ebx
    1:  rdmsr
        cmpl    $0x10000, %eax
        jne     2f
        incl    %ebx
    2:  incl    %ecx
        cmpl    $0x400000A0, %ecx
        jne     1b
        movl    %ebx, %eax
        """,
        (16,),
    ),
    Rule(
        "TLFS 11.8",
        "SIMP and SIEFP are off at reset",
        "read_msr 0x40000083\nmovq %rax, %rbx\nread_msr 0x40000082\norq %rbx, %rax\nandl $1, %eax",
        (0,),
    ),
    Rule(
        "TLFS 11.8",
        "an unmasked SINT with a vector below 16 is #GP",
        "write_msr 0x4000009F, $5\nread_msr 0x4000009F",
        (FAULT + 13,),
    ),
    Rule(
        "TLFS 3.13",
        "no hypercall page before the guest has said who it is",
        "movl $hypercall_page, %eax\norl $1, %eax\nwrite_msr 0x40000001, %rax\nread_msr 0x40000001\n"
        "andl $1, %eax",
        (0,),
    ),
    Rule("TLFS 7.8", "the boot CPU is VP 0", "read_msr 0x40000002", (0,)),
    Rule(
        "TLFS 12.4",
        "TIME_REF_COUNT grows",
        "read_msr 0x40000020\nmovq %rax, %rbx\nmovl $100000, %ecx\n1: pause\nloop 1b\nread_msr 0x40000020\n"
        "cmpq %rbx, %rax\nseta %al\nmovzbl %al, %eax",
        (1,),
    ),
    Rule("S56", "an unknown hypercall is INVALID_HYPERCALL_CODE", "hyperv_on\nhypercall $0x7FFF", (2,)),
    Rule(
        "S53",
        "a simple hypercall with a repetition is INVALID_HYPERCALL_INPUT",
        "movabsq $0x10000005c, %rbx\nhypercall %rbx, $pages",
        (3,),
    ),
    Rule("S44", "HvPostMessage as a fast call is INVALID_HYPERCALL_CODE", "hypercall $0x1005C", (2,)),
    Rule("S44", "HvPostMessage with odd input is INVALID_ALIGNMENT", "hypercall $0x5C, $(pages + 2)", (4,)),
    Rule(
        "S45",
        "HvPostMessage takes input at 4 bytes, or asks the TLFS's 8",
        _post(0xABCDEF, 8, at="pages + 4"),
        (18, 4),
    ),
    Rule(
        "S47",
        "HvPostMessage with input outside RAM is INSUFFICIENT_MEMORY",
        "movl $0xD0000000, %ebx\nhypercall $0x5C, %rbx",
        (11,),
    ),
    Rule("S44", "more than 240 bytes are INVALID_HYPERCALL_INPUT", _post(0xABCDEF, 241), (3,)),
    Rule("S44", "a message for nobody is INVALID_CONNECTION_ID", _post(0xABCDEF, 240), (18,)),
    Rule(
        "S46",
        "HvSignalEvent with high bits in its connection is INVALID_HYPERCALL_INPUT",
        "movl $0xFF000001, %ebx\nhypercall $0x1005D, %rbx",
        (3,),
    ),
    Rule(
        "S51",
        "HvSignalEvent with a flag number is INVALID_PORT_ID",
        "movabsq $0x100ABCDEF, %rbx\nhypercall $0x1005D, %rbx",
        (17,),
    ),
    Rule("S51", "a signal for nobody is INVALID_CONNECTION_ID", "hypercall $0x1005D, $0xABCDEF", (18,)),
    Rule(
        "S51",
        "HvSignalEvent with odd input is INVALID_ALIGNMENT",
        "hypercall $0x5D, $(pages + 1)",
        (4,),
    ),
    Rule(
        "S52",
        "a signal for nobody, by memory, is INVALID_CONNECTION_ID",
        "movq $0xABCDEF, pages + 0x3000\nhypercall $0x5D, $(pages + 0x3000)",
        (18,),
    ),
    Rule(
        "S4",
        "the message page is zero when it first comes on",
        "movq $0x5A5A, pages + 0x1F10\nmovl $(pages + 0x1001), %eax\nwrite_msr 0x40000083, %rax\n"
        "movq pages + 0x1F10, %rax",
        (0,),
    ),
    Rule(
        "S4",
        "RAM below it reappears as it was",
        "movq $0x1234, pages + 0x1F10\nwrite_msr 0x40000083, $0\nmovq pages + 0x1F10, %rax",
        (0x5A5A,),
    ),
    Rule(
        "S4",
        "its contents stay with it, off and elsewhere",
        "movl $(pages + 0x4001), %eax\nwrite_msr 0x40000083, %rax\nmovq pages + 0x4F10, %rax",
        (0x1234,),
    ),
    Rule(
        "S2",
        "address 0 is an address for it",
        "movq $0x7777, 0xF10\nwrite_msr 0x40000083, $1\nmovq 0xF10, %rbx\n"
        "write_msr 0x40000083, $0\nmovq %rbx, %rax",
        (0x1234,),
    ),
    Rule(
        "S5",
        "both pages come on, and the SynIC",
        """
        movl    $(pages + 0x1001), %eax
        write_msr 0x40000083, %rax
        movl    $(pages + 0x2001), %eax
        write_msr 0x40000082, %rax
        write_msr 0x40000080, $1
        write_msr 0x40000092, $0x52
        write_msr 0x40000093, $0x53
        write_msr 0x40000094, $0x54
        movq    $0, pages + 0x1F10
        sti
        read_msr 0x40000080
        """,
        (1,),
    ),
    Rule(
        "S27",
        "a message comes into its slot (hyperv-testdev's echo)",
        f"""
        {_testdev(4, 7, 3)}
        {_post(7, 8, 0x11111111, 0x22222222, message_type=0x33)}
        testl   %eax, %eax
        jnz     1f
        {_slot(3)}
        jmp     2f
    1:  movl    $0xFFFF, %eax       # nobody there: no such device
    2:
        """,
        (0x33,),
        _NO_DEVICE,
    ),
    Rule(
        "S28",
        "its flags, reserved bytes and sender are 0",
        "movl pages + 0x1304, %eax\nshrl $8, %eax\norq pages + 0x1308, %rax\n"
        "cmpl $0, pages + 0x1300\njne 1f\nmovl $0xFFFF, %eax\n1:",
        (0,),
        _NO_DEVICE,
    ),
    Rule(
        "S27",
        "its interrupt comes",
        "movl $0x53, %edi\ncall wait_interrupt\ncmpl $0, pages + 0x1300\njne 1f\nmovl $0xFFFF, %eax\n1:",
        (1,),
        _NO_DEVICE,
    ),
    Rule(
        "S26",
        "a second message sets the pending flag of the slot that is taken",
        f"""
        cmpl    $0, pages + 0x1300
        je      3f
        call    start_clock
    5:  {_post(7, 8, 0x44444444, 0x55555555, message_type=0x34)}
        cmpl    $19, %eax           # the device is not done with the first yet
        jne     6f
        call    time_left
        jc      5b
    6:  movl    $(pages + 0x1305), %esi
        call    wait_byte
        jmp     4f
    3:  movl    $0xFFFF, %eax
    4:
        """,
        (1,),
        _NO_DEVICE,
    ),
    Rule(
        "S26",
        "and changes nothing else",
        "movl pages + 0x1300, %eax\ntestl %eax, %eax\njnz 1f\nmovl $0xFFFF, %eax\n1:",
        (0x33,),
        _NO_DEVICE,
    ),
    Rule(
        "S29",
        "end of message brings it",
        f"""
        cmpl    $0, pages + 0x1300
        je      3f
        movl    $(pages + 0x1300), %esi
        call    take_message
        {_slot(3)}
        jmp     4f
    3:  movl    $0xFFFF, %eax
    4:
        """,
        (0x34,),
        _NO_DEVICE,
    ),
    Rule(
        "S35",
        "a signalled event sets its flag (hyperv-testdev)",
        f"""
        movl    $(pages + 0x1300), %esi
        call    take_message
        {_testdev(6, 8, 3)}
        hypercall $0x1005D, $8
        testl   %eax, %eax
        jnz     3f
        movl    $(pages + 0x2000 + 256 * 3 + 1), %esi
        call    wait_byte
        jmp     4f
    3:  movl    $0xFFFF, %eax
    4:
        """,
        (1,),
        _NO_DEVICE,
    ),
    Rule(
        "S58",
        "a timer that expired with the message page off is heard when it comes on",
        """
        movl    $0x40000003, %eax
        cpuid
        testl   $8, %eax
        jz      3f
        write_msr 0x40000083, $0
        write_msr 0x400000B0, $0x40008      # SINT 4, enabled by its count
        read_msr 0x40000020
        addq    $1000, %rax
        movq    %rax, %rbx
        write_msr 0x400000B1, %rax
    1:  read_msr 0x40000020
        subq    $100000, %rax               # 10 ms later
        cmpq    %rbx, %rax
        jb      1b
        movl    $(pages + 0x1001), %eax
        write_msr 0x40000083, %rax
        movl    $(pages + 0x1400), %esi
        call    wait_message
        movl    %eax, %ebx
        movl    $0, (%rsi)
        movl    %ebx, %eax
        jmp     4f
    3:  movl    $0xFFFF, %eax
    4:
        """,
        (0x80000010,),
        _NO_DEVICE,
    ),
    Rule(
        "S50",
        "a VMBus message that is none is INVALID_HYPERCALL_INPUT",
        _post(1, 16, 0xFFFF, 0),
        (3,),
        _NO_BUS,
    ),
    Rule(
        "S62",
        "INITIATE_CONTACT is answered by VERSION_RESPONSE",
        f"""
        {_post(1, 48, 14, 0, 0x40000, 0, 0, 0, 0, 0, 0, 0)}
        testl   %eax, %eax
        jnz     1f
        {_slot(2)}
        movl    16(%rsi), %eax
    1:
        """,
        (15,),
        _NO_BUS,
    ),
    Rule(
        "S62",
        "version 4.0 is supported",
        "cmpl $0, pages + 0x1200\njne 1f\nmovl $18, %eax\njmp 2f\n1: movzbl pages + 0x1218, %eax\n2:",
        (1,),
        _NO_BUS,
    ),
    Rule(
        "TLFS 11",
        "REQUESTOFFERS brings offers, and their end",
        f"""
        cmpl    $0, pages + 0x1200
        je      3f
        movl    $(pages + 0x1200), %esi
        call    take_message
        {_post(1, 8, 3, 0)}
        movl    $2048, %r12d
    1:  {_slot(2)}
        movl    16(%rsi), %ebx
        call    take_message
        cmpl    $1, %ebx
        jne     2f
        decl    %r12d
        jnz     1b
    2:  movl    %ebx, %eax
        jmp     4f
    3:  movl    $18, %eax
    4:  movl    %eax, pages + 0x3000
        """,
        (4,),
        _NO_BUS,
    ),
    Rule(
        "S62",
        "a contact at any time starts over, and an unknown version is declined",
        f"""
        cmpl    $18, pages + 0x3000
        je      3f
        {_post(1, 48, 14, 0, 0x7FFF0000, 0, 2, 0, 0, 0, 0, 0)}
        {_slot(2)}
        movl    16(%rsi), %ebx
        shll    $8, %ebx
        orb     24(%rsi), %bl
        call    take_message
        movl    %ebx, %eax
        jmp     4f
    3:  movl    $18, %eax
    4:
        """,
        (15 << 8,),
        _NO_BUS,
    ),
    Rule(
        "S62",
        "UNLOAD is answered by UNLOAD_RESPONSE",
        f"""
        cmpl    $18, pages + 0x3000
        je      3f
        {_post(1, 48, 14, 0, 0x40000, 0, 0, 0, 0, 0, 0, 0)}
        {_slot(2)}
        call    take_message
        {_post(1, 8, 16, 0)}
        {_slot(2)}
        movl    16(%rsi), %ebx
        call    take_message
        movl    %ebx, %eax
        jmp     4f
    3:  movl    $18, %eax
    4:
        """,
        (17,),
        _NO_BUS,
    ),
)

_HELPERS = """
# rsi: a slot. Its message's type in eax; 0 after some seconds without one. Keeps rsi.
wait_message:
    call    start_clock
1:  movl    (%rsi), %eax
    testl   %eax, %eax
    jnz     2f
    pause
    call    time_left
    jc      1b
    xorl    %eax, %eax
2:  ret

# rsi: a byte. It in eax, once it is not 0.
wait_byte:
    call    start_clock
1:  movzbl  (%rsi), %eax
    testl   %eax, %eax
    jnz     2f
    pause
    call    time_left
    jc      1b
    xorl    %eax, %eax
2:  ret

# edi: a vector. 1 in eax once it was taken.
wait_interrupt:
    call    start_clock
1:  movl    $1, %eax
    cmpl    $0, interrupts(, %rdi, 4)
    jne     2f
    pause
    call    time_left
    jc      1b
    xorl    %eax, %eax
2:  ret

start_clock:
    rdtsc
    shlq    $32, %rdx
    orq     %rax, %rdx
    movabsq $40000000000, %rax       # some 10 s: a busy host is slow
    addq    %rax, %rdx
    movq    %rdx, deadline
    ret

# Carry while there is time left. Clobbers rax, rdx.
time_left:
    rdtsc
    shlq    $32, %rdx
    orq     %rdx, %rax
    cmpq    deadline, %rax
    ret

# rsi: a slot. Free it, and say so if more waits. Keeps rsi, rbx.
take_message:
    movl    $0, (%rsi)
    mfence
    testb   $1, 5(%rsi)
    jz      1f
    write_msr 0x40000084, $0
1:  ret

    .data
    .align 8
deadline: .quad 0
"""


def program() -> str:
    """The guest: each rule's line "R number seen", or "F number vector" for an exception; END."""
    parts = []
    for number, rule in enumerate(RULES):
        parts.append(f"""
    catch   fault_{number}
{rule.code}
    no_catch
    movq    %rax, %rdi
    print   "R {number:x} "
    call    print_number
    print   "\\r\\n"
    jmp     next_{number}
fault_{number}:
    movq    fault_vector, %rdi
    print   "F {number:x} "
    call    print_number
    print   "\\r\\n"
next_{number}:
""")
    ending = '    print "END\\r\\n"\n    movl $1, %eax\n    outl %eax, $DEBUG_EXIT_PORT\n    exit 0\n'
    return "".join(parts) + ending + _HELPERS
