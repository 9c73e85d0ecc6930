# Operations that repeat a hypercall or a port write, measured with the TSC: throughput, round trips
# and long soaks at the guest's full speed, without a host command each time.

    .include "abi.inc"
    .include "macros.inc"

    .text
    .globl  op_post, op_signal, op_post_echo, op_signal_echo, op_out_loop
.macro  read_tsc register
    rdtsc
    join_rdx_rax
    movq    %rax, \register
.endm

# Answer with the TSC ticks since \start, in result 3.
.macro  ticks_since start
    rdtsc
    join_rdx_rax
    subq    \start, %rax
    result  3, %rax
.endm

# Fill the start of this vCPU's HvPostMessage input; rbx = its address, r12 = first sequence number.
prepare_post:
    movq    %gs:MB_APIC_ID, %rbx
    shlq    $12, %rbx
    addq    $POST_BUFFER, %rbx
    argument 0, %rax
    movl    %eax, (%rbx)        # connection_id
    movl    $0, 4(%rbx)
    movl    $1, 8(%rbx)         # message_type
    argument 3, %rax
    movl    %eax, 12(%rbx)      # payload_size
    argument 2, %r12
    ret

# One HvPostMessage of sequence number r12; rax = status (low 16 bits of the result).
post_once:
    movq    %r12, 16(%rbx)
    movq    %r12, %rax
    notq    %rax
    movl    12(%rbx), %ecx
    movq    %rax, 8(%rbx, %rcx) # the payload's last 8 bytes, what POLICY_CHECK compares
    movl    $HVCALL_POST_MESSAGE, %ecx
    movq    %rbx, %rdx
    xorl    %r8d, %r8d
    movl    $HYPERCALL_PAGE, %eax
    call    *%rax
    movzwl  %ax, %eax
    ret

op_post:
    call    prepare_post
    argument 1, %r13
    read_tsc %r14
1:  testq   %r13, %r13
    jz      5f
2:  cmpq    $0, %gs:MB_CANCEL
    jne     5f
    call    post_once
    testl   %eax, %eax
    jnz     3f
    incq    %gs:MB_RESULT
    incq    %r12
    decq    %r13
    jmp     1b
3:  cmpl    $HV_STATUS_INSUFFICIENT_BUFFERS, %eax
    jne     4f
    incq    %gs:(MB_RESULT + 8)
    pause
    jmp     2b
4:  result  2, %rax
5:  ticks_since %r14
    ret

op_signal:
    argument 1, %r13
    read_tsc %r14
1:  testq   %r13, %r13
    jz      5f
    cmpq    $0, %gs:MB_CANCEL
    jne     5f
    call    signal_once
    testl   %eax, %eax
    jnz     4f
    incq    %gs:MB_RESULT
    decq    %r13
    jmp     1b
4:  result  2, %rax
5:  ticks_since %r14
    ret

# A fast HvSignalEvent of argument 0; rax = status.
signal_once:
    movl    $HVCALL_SIGNAL_EVENT_FAST, %ecx
    argument 0, %rdx
    xorl    %r8d, %r8d
    movl    $HYPERCALL_PAGE, %eax
    call    *%rax
    movzwl  %ax, %eax
    ret

op_post_echo:
    call    prepare_post
    argument 4, %rax
    movl    %eax, 12(%rbx)
    xorl    %r12d, %r12d
    movl    $MB_MESSAGES, %r15d
    movl    $post_once, %esi
    jmp     echo
op_signal_echo:
    movl    $MB_EVENTS, %r15d
    movl    $signal_once, %esi
# rsi = how to ask, r15 = the counter array that answers.
echo:
    pushq   %rsi
    argument 1, %r13
    argument 2, %rax
    andl    $15, %eax
    leaq    (%r15, %rax, 8), %r15
    read_tsc %r14
1:  testq   %r13, %r13
    jz      8f
2:  cmpq    $0, %gs:MB_CANCEL
    jne     8f
    movq    %gs:(%r15), %rdi
    pushq   %rdi
    call    *8(%rsp)
    popq    %rdi
    testl   %eax, %eax
    jnz     6f
    # The answer may have come already; look with interrupts off before halting.
3:  cli
    cmpq    %gs:(%r15), %rdi
    jne     5f
    cmpq    $0, %gs:MB_CANCEL
    jne     5f
    cmpq    $0, %gs:(MB_ARGUMENT + 24)
    jne     4f
    call    halt
    jmp     3b
4:  sti
    nop                         # as in the agent's spin
    pause
    jmp     3b
5:  sti
    cmpq    %gs:(%r15), %rdi
    je      8f                  # cancelled
    incq    %gs:MB_RESULT
    incq    %r12
    decq    %r13
    jmp     1b
6:  cmpl    $HV_STATUS_INSUFFICIENT_BUFFERS, %eax
    jne     7f
    incq    %gs:(MB_RESULT + 8)
    pause
    jmp     2b
7:  result  2, %rax
8:  ticks_since %r14
    popq    %rsi
    ret

op_out_loop:
    argument 0, %rdx
    argument 1, %rcx
    movq    %rdx, %rsi
    read_tsc %r14
    movl    %esi, %edx
    xorl    %eax, %eax
1:  testq   %rcx, %rcx
    jz      2f
    outl    %eax, %dx
    decq    %rcx
    jmp     1b
2:  ticks_since %r14
    ret
