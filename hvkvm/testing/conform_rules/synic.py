"""The SynIC's pages, messages, events and timers (S2 to S36, S58)."""

from __future__ import annotations

from hvkvm.testing.conform_rules.rule import NO_DEVICE, Rule, post, slot, testdev

RULES: tuple[Rule, ...] = (
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
        {testdev(4, 7, 3)}
        {post(7, 8, 0x11111111, 0x22222222, message_type=0x33)}
        testl   %eax, %eax
        jnz     1f
        {slot(3)}
        jmp     2f
    1:  movl    $0xFFFF, %eax       # nobody there: no such device
    2:
        """,
        (0x33,),
        NO_DEVICE,
    ),
    Rule(
        "S28",
        "its flags, reserved bytes and sender are 0",
        "movl pages + 0x1304, %eax\nshrl $8, %eax\norq pages + 0x1308, %rax\n"
        "cmpl $0, pages + 0x1300\njne 1f\nmovl $0xFFFF, %eax\n1:",
        (0,),
        NO_DEVICE,
    ),
    Rule(
        "S27",
        "its interrupt comes",
        "movl $0x53, %edi\ncall wait_interrupt\ncmpl $0, pages + 0x1300\njne 1f\nmovl $0xFFFF, %eax\n1:",
        (1,),
        NO_DEVICE,
    ),
    Rule(
        "S26",
        "a second message sets the pending flag of the slot that is taken",
        f"""
        cmpl    $0, pages + 0x1300
        je      3f
        call    start_clock
    5:  {post(7, 8, 0x44444444, 0x55555555, message_type=0x34)}
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
        NO_DEVICE,
    ),
    Rule(
        "S26",
        "and changes nothing else",
        "movl pages + 0x1300, %eax\ntestl %eax, %eax\njnz 1f\nmovl $0xFFFF, %eax\n1:",
        (0x33,),
        NO_DEVICE,
    ),
    Rule(
        "S29",
        "end of message brings it",
        f"""
        cmpl    $0, pages + 0x1300
        je      3f
        movl    $(pages + 0x1300), %esi
        call    take_message
        {slot(3)}
        jmp     4f
    3:  movl    $0xFFFF, %eax
    4:
        """,
        (0x34,),
        NO_DEVICE,
    ),
    Rule(
        "S35",
        "a signalled event sets its flag (hyperv-testdev)",
        f"""
        movl    $(pages + 0x1300), %esi
        call    take_message
        {testdev(6, 8, 3)}
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
        NO_DEVICE,
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
        NO_DEVICE,
    ),
)
