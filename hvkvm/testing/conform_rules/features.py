"""What CPUID and the synthetic MSRs say before a guest has set anything (TLFS 2, 3, 7, 11, 12)."""

from __future__ import annotations

from hvkvm.testing.conform_rules.rule import FAULT, Rule

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
)
