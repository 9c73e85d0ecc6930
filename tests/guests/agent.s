# The agent: every vCPU serves its mailbox, so that a host test can drive the guest while it runs.
#
# One image instead of twenty: a test on the host says what each vCPU does next (write this MSR,
# make that hypercall, halt, spin, hammer a page) and reads what the handlers saw. A command that
# faults is answered with the exception instead of ending the guest.

    .include "abi.inc"
    .include "macros.inc"

    .text
    .globl  guest_main
# edi: APIC id. Interrupts are off.
guest_main:
    movl    %edi, %ebp
    movq    HEADER + HEADER_IDLE, %rax
    movq    %rax, %gs:MB_IDLE
    movq    $1, %gs:MB_ONLINE
    lock incq HEADER + HEADER_ONLINE
    testl   %ebp, %ebp
    jnz     serve
    movabsq $AGENT_MAGIC, %rax
    movq    %rax, HEADER + HEADER_MAGIC

serve:
    cli
    movq    %gs:MB_COMMAND, %rax
    cmpq    %gs:MB_DONE, %rax
    jne     execute
    incq    %gs:MB_HEARTBEAT
    movq    %gs:MB_IDLE, %rax
    cmpq    $IDLE_SPIN, %rax
    je      spin
    ja      deaf
    call    halt
    jmp     serve
spin:
    sti                         # and long enough for an interrupt that needs a moment of its own
    nop                         # an emulated CPU keeps STI's shadow up over any number of pauses
    .rept   8
    pause
    .endr
    jmp     serve
deaf:
    pause
    jmp     serve

execute:
    movq    %rax, %rbp          # no operation touches rbp or rsp's start
    movq    $0, %gs:MB_FAULT
    movq    $0, %gs:MB_RESULT
    movq    $0, %gs:(MB_RESULT + 8)
    movq    $0, %gs:(MB_RESULT + 16)
    movq    $0, %gs:(MB_RESULT + 24)
    movq    %rsp, %gs:MB_FIXUP_RSP
    movq    $answered, %gs:MB_FIXUP
    cmpq    $0, %gs:MB_DEAF
    jne     1f
    sti
1:  movq    %gs:MB_OPCODE, %rax
    cmpq    $OP_COUNT, %rax
    jae     answered
    call    *operations(, %rax, 8)
answered:
    movq    $0, %gs:MB_FIXUP
    movq    %rbp, %gs:MB_DONE
    jmp     serve

    .section .rodata
    .align  8
operations:
    .quad   op_nop, op_rdmsr, op_wrmsr, op_cpuid, op_read, op_write, op_in, op_out
    .quad   op_hypercall, op_simp, op_siefp, op_wait_hlt, op_wait_spin, op_drain, op_hammer, op_post
    .quad   op_signal, op_post_echo, op_signal_echo, op_print, op_triple_fault, op_out_loop
    .quad   op_user_call, op_ticks
    .if     . - operations != 8 * OP_COUNT
    .error  "operations and OP_COUNT differ"
    .endif

    .text
op_nop:
    ret

op_rdmsr:
    argument 0, %rcx
    rdmsr
    join_rdx_rax
    result  0, %rax
    ret

op_wrmsr:
    argument 0, %rcx
    argument 1, %rax
    split_rax
    wrmsr
    ret

op_cpuid:
    argument 0, %rax
    argument 1, %rcx
    cpuid
    movl    %eax, %eax
    result  0, %rax
    movl    %ebx, %ebx
    result  1, %rbx
    movl    %ecx, %ecx
    result  2, %rcx
    movl    %edx, %edx
    result  3, %rdx
    ret

op_read:
    argument 0, %rsi
    argument 1, %rcx
    xorl    %eax, %eax
    cmpl    $1, %ecx
    jne     1f
    movb    (%rsi), %al
1:  cmpl    $2, %ecx
    jne     2f
    movw    (%rsi), %ax
2:  cmpl    $4, %ecx
    jne     3f
    movl    (%rsi), %eax
3:  cmpl    $8, %ecx
    jne     4f
    movq    (%rsi), %rax
4:  result  0, %rax
    ret

op_write:
    argument 0, %rsi
    argument 1, %rcx
    argument 2, %rax
    cmpl    $1, %ecx
    jne     1f
    movb    %al, (%rsi)
1:  cmpl    $2, %ecx
    jne     2f
    movw    %ax, (%rsi)
2:  cmpl    $4, %ecx
    jne     3f
    movl    %eax, (%rsi)
3:  cmpl    $8, %ecx
    jne     4f
    movq    %rax, (%rsi)
4:  ret

op_in:
    argument 0, %rdx
    argument 1, %rcx
    xorl    %eax, %eax
    cmpl    $1, %ecx
    jne     1f
    inb     %dx, %al
1:  cmpl    $2, %ecx
    jne     2f
    inw     %dx, %ax
2:  cmpl    $4, %ecx
    jne     3f
    inl     %dx, %eax
3:  result  0, %rax
    ret

op_out:
    argument 0, %rdx
    argument 1, %rcx
    argument 2, %rax
    cmpl    $1, %ecx
    jne     1f
    outb    %al, %dx
1:  cmpl    $2, %ecx
    jne     2f
    outw    %ax, %dx
2:  cmpl    $4, %ecx
    jne     3f
    outl    %eax, %dx
3:  ret

op_hypercall:
    argument 0, %rcx
    argument 1, %rdx
    argument 2, %r8
    movl    $HYPERCALL_PAGE, %eax
    call    *%rax
    result  0, %rax
    ret

# Interrupts stay off between the MSR and the handler's idea of it, so that the handler never
# drains a page that is not there.
op_simp:
    cli
    movl    $HV_X64_MSR_SIMP, %ecx
    movl    $MB_SIMP, %ebx
    jmp     synic_page
op_siefp:
    cli
    movl    $HV_X64_MSR_SIEFP, %ecx
    movl    $MB_SIEFP, %ebx
synic_page:
    argument 0, %rax
    movq    $0, %gs:(%rbx)
    split_rax
    wrmsr
    argument 0, %rax
    testl   $1, %eax
    jz      1f
    andq    $-4096, %rax
    movq    %rax, %gs:(%rbx)
1:  jmp     interrupts_back

# STI unless the host wants this vCPU's commands run deaf.
interrupts_back:
    cmpq    $0, %gs:MB_DEAF
    jne     1f
    sti
1:  ret

op_wait_hlt:
    argument 0, %rsi
    argument 1, %rdi
1:  cli
    movq    (%rsi), %rax
    cmpq    %rdi, %rax
    jae     2f
    cmpq    $0, %gs:MB_CANCEL
    jne     2f
    incq    %gs:MB_HEARTBEAT
    call    halt
    jmp     1b
2:  result  0, %rax
    jmp     interrupts_back

op_wait_spin:
    argument 0, %rsi
    argument 1, %rdi
1:  movq    (%rsi), %rax
    cmpq    %rdi, %rax
    jae     2f
    cmpq    $0, %gs:MB_CANCEL
    jne     2f
    incq    %gs:MB_HEARTBEAT
    pause
    jmp     1b
2:  result  0, %rax
    ret

# By hand: the slot is logged (or checked) as the handler would, but no EOM is written.
op_drain:
    cli
    argument 0, %rbx
    andl    $15, %ebx
    movq    %gs:MB_POLICY(, %rbx, 8), %r10
    andl    $POLICY_CHECK, %r10d
    call    drain_slot
    movl    %eax, %eax
    result  0, %rax
    result  1, %rdx
    jmp     interrupts_back

op_hammer:
    argument 0, %rsi
    argument 1, %rdi
    argument 2, %r8
1:  movq    (%rsi), %rax
    incq    8(%rsi)
    cmpq    %rdi, %rax
    jne     2f
    incq    %gs:MB_RESULT
    jmp     4f
2:  cmpq    %r8, %rax
    jne     3f
    incq    %gs:(MB_RESULT + 8)
    jmp     4f
3:  incq    %gs:(MB_RESULT + 16)
    result  3, %rax
4:  incq    %gs:MB_HEARTBEAT
    cmpq    $0, %gs:MB_CANCEL
    je      1b
    ret

op_print:
    argument 0, %rsi
    jmp     print

op_triple_fault:
    cli
    lidt    no_idt
    movabsq $0x500000000000, %rax
    movq    (%rax), %rax        # #PF without a gate, #GP, #DF
    ret

    .section .rodata
    .align  8
no_idt:
    .word   0
    .quad   0
