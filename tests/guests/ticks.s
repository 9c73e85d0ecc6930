# One operation that times a periodic synthetic timer: when each tick was due, and when the guest saw it.

    .include "abi.inc"
    .include "macros.inc"

    .equ HV_X64_MSR_TIME_REF_COUNT, 0x40000020
    .equ READINGS, 8

    .text
    .globl  op_ticks
# rdi: the log's next place. One entry is four u64.
.macro  log register
    movq    \register, (%rdi)
    addq    $8, %rdi
.endm

.macro  read_tsc register
    rdtsc
    join_rdx_rax
    movq    %rax, \register
.endm

# READINGS entries {tsc, reference time, tsc, 0}: the narrowest ties the two clocks together.
clocks:
    movl    $READINGS, %r15d
1:  read_tsc %r8
    movl    $HV_X64_MSR_TIME_REF_COUNT, %ecx
    rdmsr
    join_rdx_rax
    movq    %rax, %r9
    read_tsc %r10
    log     %r8
    log     %r9
    log     %r10
    log     $0
    decl    %r15d
    jnz     1b
    ret

# Write rax to the MSR in argument 3, plus ecx.
write_timer:
    argument 3, %rdx
    addl    %edx, %ecx
    split_rax
    wrmsr
    ret

# The SINT's handler must leave the slot alone. Entries: clocks, {tsc, due, delivered, flags} a tick, clocks.
op_ticks:
    argument 2, %rdi
    call    clocks
    argument 1, %r13
    movl    $1, %ecx
    argument 4, %rax
    call    write_timer         # COUNT: a period, AutoEnable starts it
    argument 0, %rsi
    andl    $15, %esi
    shll    $8, %esi
    addq    %gs:MB_SIMP, %rsi
next:
    testq   %r13, %r13
    jz      done
1:  cli
    cmpq    $0, %gs:MB_CANCEL
    jne     done
    cmpl    $0, (%rsi)
    jne     2f
    call    halt
    jmp     1b
2:  read_tsc %r8
    sti
    log     %r8
    movq    24(%rsi), %rax      # expiration_time
    log     %rax
    movq    32(%rsi), %rax      # delivery_time
    log     %rax
    xorl    %eax, %eax
    xchgl   %eax, (%rsi)
    movzbl  5(%rsi), %ebx
    log     %rbx
    incq    %gs:MB_RESULT
    decq    %r13
    testl   $1, %ebx
    jz      next
    movl    $HV_X64_MSR_EOM, %ecx
    xorl    %eax, %eax
    xorl    %edx, %edx
    wrmsr
    jmp     next
done:
    sti
    movl    $1, %ecx
    xorl    %eax, %eax
    call    write_timer
    jmp     clocks
