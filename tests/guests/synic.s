# The guest's half of the SynIC: taking messages and event flags off their pages.

    .include "abi.inc"
    .include "macros.inc"

    .text
    .globl  drain_slot, drain_events

# Take one message out of slot rbx under policy r10; returns its type in eax, flags in edx
# (type 0: the slot was empty). The order is the TLFS's and Linux's: use the message, set its type
# to 0, full barrier, only then look at the pending flag; a host that sets the flag must read the
# type again afterwards. Clobbers rax, rcx, rdx, rsi, rdi, r8, r9.
drain_slot:
    movq    %gs:MB_SIMP, %rsi
    testq   %rsi, %rsi
    jz      empty
    movl    %ebx, %eax
    shll    $8, %eax
    addq    %rax, %rsi
    movq    %rsi, %r8
    movl    (%rsi), %r9d
    testl   %r9d, %r9d
    jz      empty
    cmpl    $HVMSG_TIMER_EXPIRED, %r9d
    jne     1f
    incq    %gs:MB_TIMERS(, %rbx, 8)
    jmp     take
1:  testl   $POLICY_CHECK, %r10d
    jnz     check
    # Log it: {serial, sint} and, 64 bytes on, the slot as it was.
    movq    %gs:MB_LOG_HEAD, %rax
    movl    %eax, %edi
    andl    $(LOG_ENTRIES - 1), %edi
    imull   $LOG_ENTRY, %edi
    movq    %gs:MB_APIC_ID, %rcx
    imull   $LOG_SIZE, %ecx
    leaq    LOG(%rdi, %rcx), %rdi
    movq    %rax, (%rdi)
    movq    %rbx, 8(%rdi)
    addq    $64, %rdi
    movl    $32, %ecx
    rep movsq
    incq    %gs:MB_LOG_HEAD
count:
    incq    %gs:MB_MESSAGES(, %rbx, 8)
take:
    xorl    %ecx, %ecx
    xchgl   %ecx, (%r8)         # locked: the barrier
    movzbl  5(%r8), %edx
    testl   $1, %edx
    jz      2f
    incq    %gs:MB_PENDING(, %rbx, 8)
    testl   $POLICY_EOM_PENDING, %r10d
    jnz     3f
2:  testl   $POLICY_EOM, %r10d
    jz      4f
3:  pushq   %rdx
    movl    $HV_X64_MSR_EOM, %ecx
    xorl    %eax, %eax
    xorl    %edx, %edx
    wrmsr
    popq    %rdx
4:  movl    %r9d, %eax
    ret
empty:
    incq    %gs:MB_EMPTY(, %rbx, 8)
    xorl    %eax, %eax
    xorl    %edx, %edx
    ret

# POLICY_CHECK: payload = u64 sequence number, anything, u64 complement of it in the last 8 bytes.
check:
    movq    16(%r8), %rax
    movzbl  4(%r8), %ecx        # payload_size: 16 to 240, in steps of 8
    cmpl    $16, %ecx
    jb      wrong
    cmpl    $240, %ecx
    ja      wrong
    movq    8(%r8, %rcx), %rcx
    notq    %rcx
    cmpq    %rcx, %rax          # both ends agree, so the body is from one message
    jne     wrong
    cmpq    %rax, %gs:MB_NEXT(, %rbx, 8)
    jne     wrong
    incq    %gs:MB_NEXT(, %rbx, 8)
    jmp     count
wrong:
    cmpq    $0, %gs:MB_WRONG(, %rbx, 8)
    jne     5f
    movq    %rax, %gs:MB_WRONG_GOT
    movq    %gs:MB_NEXT(, %rbx, 8), %rcx
    movq    %rcx, %gs:MB_WRONG_DUE
5:  incq    %gs:MB_WRONG(, %rbx, 8)
    incq    %rax
    movq    %rax, %gs:MB_NEXT(, %rbx, 8)
    jmp     count

# Clear every flag of SINT rbx, 64 at a time, counting them. Clobbers rax, rcx, rdx, rsi, rdi.
drain_events:
    movq    %gs:MB_SIEFP, %rsi
    testq   %rsi, %rsi
    jz      4f
    movl    %ebx, %eax
    shll    $8, %eax
    addq    %rax, %rsi
    movq    %gs:MB_APIC_ID, %rdi
    shlq    $12, %rdi
    leaq    SEEN(%rdi, %rax), %rdi
    movl    $32, %ecx
1:  cmpq    $0, (%rsi)
    je      3f
    xorl    %eax, %eax
    xchgq   %rax, (%rsi)        # atomic against a host that sets more
    testq   %rax, %rax          # gone again: the page was switched under us
    jz      3f
    orq     %rax, (%rdi)
2:  movq    %rax, %rdx          # rax &= rax - 1 drops the lowest set bit
    decq    %rdx
    incq    %gs:MB_EVENTS(, %rbx, 8)
    andq    %rdx, %rax
    jnz     2b
3:  addq    $8, %rsi
    addq    $8, %rdi
    decl    %ecx
    jnz     1b
4:  ret
