"""What a guest can see of the SynIC's, the hypercalls' and VMBus's rules: a table of small programs.

Each row's code leaves what it saw in rax, in a micro guest (see `micro_macros.s`); the
rows run in order, and later ones stand on what earlier ones did. Rules with an S-number
are explained in docs/synic-rules.md, the others in the TLFS's chapter that is named.

Memory: the post's input lies at `pages`, SIMP at pages + 0x1000, SIEFP at
pages + 0x2000, and pages + 0x3000 on are free.
"""

from __future__ import annotations

from hvkvm.testing.conform_rules import features, hypercalls, synic, vmbus
from hvkvm.testing.conform_rules.rule import FAULT, Rule

__all__ = ["FAULT", "RULES", "Rule", "program"]

RULES: tuple[Rule, ...] = (*features.RULES, *hypercalls.RULES, *synic.RULES, *vmbus.RULES)

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
