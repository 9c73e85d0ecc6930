"""What HvPostMessage and HvSignalEvent answer to input that is wrong (S44 to S56)."""

from __future__ import annotations

from hvkvm.testing.conform_rules.rule import Rule, post

RULES: tuple[Rule, ...] = (
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
        post(0xABCDEF, 8, at="pages + 4"),
        (18, 4),
    ),
    Rule(
        "S47",
        "HvPostMessage with input outside RAM is INSUFFICIENT_MEMORY",
        "movl $0xD0000000, %ebx\nhypercall $0x5C, %rbx",
        (11,),
    ),
    Rule("S44", "more than 240 bytes are INVALID_HYPERCALL_INPUT", post(0xABCDEF, 241), (3,)),
    Rule("S44", "a message for nobody is INVALID_CONNECTION_ID", post(0xABCDEF, 240), (18,)),
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
)
