"""The VMBus host: contact, offers, unload (S50, S62)."""

from __future__ import annotations

from hvkvm.testing.conform_rules.rule import NO_BUS, Rule, post, slot

RULES: tuple[Rule, ...] = (
    Rule(
        "S50",
        "a VMBus message that is none is INVALID_HYPERCALL_INPUT",
        post(1, 16, 0xFFFF, 0),
        (3,),
        NO_BUS,
    ),
    Rule(
        "S62",
        "INITIATE_CONTACT is answered by VERSION_RESPONSE",
        f"""
        {post(1, 48, 14, 0, 0x40000, 0, 0, 0, 0, 0, 0, 0)}
        testl   %eax, %eax
        jnz     1f
        {slot(2)}
        movl    16(%rsi), %eax
    1:
        """,
        (15,),
        NO_BUS,
    ),
    Rule(
        "S62",
        "version 4.0 is supported",
        "cmpl $0, pages + 0x1200\njne 1f\nmovl $18, %eax\njmp 2f\n1: movzbl pages + 0x1218, %eax\n2:",
        (1,),
        NO_BUS,
    ),
    Rule(
        "S62",
        "REQUESTOFFERS brings offers, and their end",
        f"""
        cmpl    $0, pages + 0x1200
        je      3f
        movl    $(pages + 0x1200), %esi
        call    take_message
        {post(1, 8, 3, 0)}
        movl    $2048, %r12d
    1:  {slot(2)}
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
        NO_BUS,
    ),
    Rule(
        "S62",
        "a contact at any time starts over, and an unknown version is declined",
        f"""
        cmpl    $18, pages + 0x3000
        je      3f
        {post(1, 48, 14, 0, 0x7FFF0000, 0, 2, 0, 0, 0, 0, 0)}
        {slot(2)}
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
        NO_BUS,
    ),
    Rule(
        "S62",
        "UNLOAD is answered by UNLOAD_RESPONSE",
        f"""
        cmpl    $18, pages + 0x3000
        je      3f
        {post(1, 48, 14, 0, 0x40000, 0, 0, 0, 0, 0, 0, 0)}
        {slot(2)}
        call    take_message
        {post(1, 8, 16, 0)}
        {slot(2)}
        movl    16(%rsi), %ebx
        call    take_message
        movl    %ebx, %eax
        jmp     4f
    3:  movl    $18, %eax
    4:
        """,
        (17,),
        NO_BUS,
    ),
)
