# The benchmark guest: one operation, COUNT times a batch, timed by the guest itself.
#
# Linked with the test guests' runtime (tests/guests: boot, interrupts, serial, synic), so one
# multiboot image runs unmodified under hvkvm and QEMU. What it needs of the machine: COM1,
# isa-debug-exit's port and, but for OPERATION 0, hyperv-testdev and a SynIC.
#
# The assembler is given OPERATION (below), COUNT and BATCHES. A batch answers with one line:
#   bench: COUNT TSC REFERENCE REFUSED
# in hexadecimal: operations done, TSC ticks, HV_X64_MSR_TIME_REF_COUNT ticks of 100 ns (0 without
# that MSR), and requests that were refused for want of buffers and so were made again. After
# "bench: done" the guest halts for ever, so that its host can look at its counters in peace.

    .include "abi.inc"
    .include "macros.inc"

.equ OPERATION_PORT,    0       # IN from isa-debug-exit's port
.equ OPERATION_MESSAGE, 1       # HvPostMessage, hyperv-testdev's echo, SINT, EOM
.equ OPERATION_EVENT,   2       # HvSignalEvent, hyperv-testdev's answer, SINT
.equ OPERATION_IPI,     3       # an IPI to itself by the LAPIC's ICR, HLT, its handler, EOI
.equ OPERATION_HYPERCALL, 4     # a hypercall that does nothing: an unknown code and its status

.equ HV_X64_MSR_GUEST_OS_ID,    0x40000000
.equ HV_X64_MSR_HYPERCALL,      0x40000001
.equ HV_X64_MSR_TIME_REF_COUNT, 0x40000020
.equ HV_X64_MSR_SCONTROL,       0x40000080
.equ HV_X64_MSR_SINT0,          0x40000090

.equ TESTDEV,           0x3000
.equ TESTDEV_MSG_CONN_CREATE,   4
.equ TESTDEV_EVT_CONN_CREATE,   6
.equ MESSAGE_SINT,      2
.equ MESSAGE_CONN,      0x10
.equ MESSAGE_SIZE,      64      # QEMU's testdev aborts at 240
.equ EVENT_SINT,        3
.equ EVENT_CONN,        0x20
.equ IPI_VECTOR,        SINT_VECTOR + 15        # of a SINT that stays masked
.equ UNKNOWN_CODE,      0xFFFF
.equ HV_STATUS_INVALID_HYPERCALL_CODE, 2
.equ SIMP,              SCRATCH
.equ SIEFP,             SCRATCH + 0x1000

.macro  write_msr msr, value
    movl    $\msr, %ecx
    movl    $\value, %eax
    xorl    %edx, %edx
    wrmsr
.endm

    .text
    .globl  guest_main
# edi: APIC id. Interrupts are off. Registers that no handler touches: rbp, r11 to r15.
guest_main:
    testl   %edi, %edi
    jnz     stop
    xorl    %r15d, %r15d        # whether the reference counter exists
    movl    $0x40000001, %eax
    cpuid
    cmpl    $0x31237648, %eax   # "Hv#1"
    jne     .Lno_hyperv
    movl    $0x40000003, %eax
    cpuid
    testl   $2, %eax
    jz      .Lno_clock
    incl    %r15d
.Lno_clock:
    testl   $4, %eax
    jz      .Lno_synic
    movl    $1, %r14d
    jmp     .Lready
.Lno_hyperv:
.Lno_synic:
    xorl    %r14d, %r14d
.Lready:
    .if     OPERATION != OPERATION_PORT
    testl   %r14d, %r14d
    jz      .Lno_machine
    call    open
    .endif
    movl    $BATCHES, %r13d
.Lbatch:
    call    batch
    decl    %r13d
    jnz     .Lbatch
    movl    $done_text, %esi
    call    print
    jmp     stop
.Lno_machine:
    movl    $no_synic_text, %esi
    call    print
    jmp     stop

# Give the guest its SynIC and ask hyperv-testdev for a connection to it.
open:
    write_msr HV_X64_MSR_GUEST_OS_ID, 1
    write_msr HV_X64_MSR_HYPERCALL, (HYPERCALL_PAGE | 1)
    write_msr HV_X64_MSR_SCONTROL, 1
    write_msr HV_X64_MSR_SIMP, (SIMP | 1)
    write_msr HV_X64_MSR_SIEFP, (SIEFP | 1)
    write_msr (HV_X64_MSR_SINT0 + MESSAGE_SINT), (SINT_VECTOR + MESSAGE_SINT)
    write_msr (HV_X64_MSR_SINT0 + EVENT_SINT), (SINT_VECTOR + EVENT_SINT)
    movq    $SIMP, %gs:MB_SIMP
    movq    $SIEFP, %gs:MB_SIEFP
    movq    $(POLICY_DRAIN | POLICY_EOM), %gs:(MB_POLICY + 8 * MESSAGE_SINT)
    movq    $POLICY_EVENTS, %gs:(MB_POLICY + 8 * EVENT_SINT)
    movl    $POST_BUFFER, %edi
    movl    $MESSAGE_CONN, (%rdi)
    movl    $0, 4(%rdi)
    movl    $1, 8(%rdi)
    movl    $MESSAGE_SIZE, 12(%rdi)
    movw    $TESTDEV, %dx
    movl    $(MESSAGE_CONN << 24 | TESTDEV_MSG_CONN_CREATE << 16 | MESSAGE_SINT), %eax
    outl    %eax, %dx
    movl    $(EVENT_CONN << 24 | TESTDEV_EVT_CONN_CREATE << 16 | EVENT_SINT), %eax
    outl    %eax, %dx
    ret

# The reference counter in rax, 0 where there is none. Clobbers rcx, rdx.
reference:
    xorl    %eax, %eax
    testl   %r15d, %r15d
    jz      1f
    movl    $HV_X64_MSR_TIME_REF_COUNT, %ecx
    rdmsr
    join_rdx_rax
1:  ret

# COUNT operations, then the line that says what they took.
batch:
    movl    $COUNT, %ebp
    xorl    %r12d, %r12d
    call    reference
    pushq   %rax
    rdtsc
    join_rdx_rax
    pushq   %rax
.Lnext:
    testl   %ebp, %ebp
    jz      .Lover
    .if     OPERATION == OPERATION_PORT
    inl     $DEBUG_EXIT, %eax
    .elseif OPERATION == OPERATION_IPI
    cli
    movq    %gs:(MB_IRQS + 8 * 15), %r14
    apic_write APIC_ICR, (0x44000 | IPI_VECTOR)     # fixed, edge, to self
    call    halt                                    # else a software MMU might see it late
    movl    $IPI_VECTOR, %eax
    cmpq    %gs:(MB_IRQS + 8 * 15), %r14
    je      .Lbroken                                # something else woke us
    .elseif OPERATION == OPERATION_HYPERCALL
    movl    $(1 << 16 | UNKNOWN_CODE), %ecx         # fast
    xorl    %edx, %edx
    xorl    %r8d, %r8d
    movl    $HYPERCALL_PAGE, %eax
    call    *%rax
    movzwl  %ax, %eax
    cmpl    $HV_STATUS_INVALID_HYPERCALL_CODE, %eax
    jne     .Lbroken
    .else
    call    round_trip
    testl   %eax, %eax
    jnz     .Lbroken
    .endif
    decl    %ebp
    jmp     .Lnext
.Lover:
    rdtsc
    join_rdx_rax
    popq    %rcx
    subq    %rcx, %rax
    pushq   %rax
    call    reference
    popq    %rbx                # TSC ticks
    popq    %rcx
    subq    %rcx, %rax
    pushq   %rax                # reference ticks
    movl    $line_text, %esi
    call    print
    movl    $COUNT, %edi
    call    print_number
    movq    %rbx, %rdi
    call    print_number
    popq    %rdi
    call    print_number
    movq    %r12, %rdi
    call    print_number
    movl    $end_text, %esi
    jmp     print

.Lbroken:
    addq    $16, %rsp
    movl    %eax, %ebx
    movl    $broken_text, %esi
    call    print
    movl    %ebx, %edi
    call    print_number
    movl    $end_text, %esi
    call    print
    jmp     stop

print_number:
    call    print_hex
    movl    $space_text, %esi
    jmp     print

    .if     OPERATION == OPERATION_MESSAGE || OPERATION == OPERATION_EVENT
    .if     OPERATION == OPERATION_MESSAGE
    .equ    ANSWERS, MB_MESSAGES + 8 * MESSAGE_SINT
    .else
    .equ    ANSWERS, MB_EVENTS + 8 * EVENT_SINT
    .endif
# Ask, then halt until the interrupt handler has counted the answer. eax: 0, or the hypercall's status.
round_trip:
    movq    %gs:ANSWERS, %r14
1:
    .if     OPERATION == OPERATION_MESSAGE
    movl    $HVCALL_POST_MESSAGE, %ecx
    movl    $POST_BUFFER, %edx
    .else
    movl    $HVCALL_SIGNAL_EVENT_FAST, %ecx
    movl    $EVENT_CONN, %edx
    .endif
    xorl    %r8d, %r8d
    movl    $HYPERCALL_PAGE, %eax
    call    *%rax
    movzwl  %ax, %eax
    cmpl    $HV_STATUS_INSUFFICIENT_BUFFERS, %eax
    jne     2f
    # The answer came before its sender had finished with it.
    incq    %r12
    pause
    jmp     1b
2:  testl   %eax, %eax
    jnz     5f
3:  cli
    cmpq    %gs:ANSWERS, %r14
    jne     4f
    call    halt
    jmp     3b
4:  sti
    xorl    %eax, %eax
5:  ret
    .endif

    .section .rodata
line_text:      .asciz "bench: "
space_text:     .asciz " "
end_text:       .asciz "\r\n"
done_text:      .asciz "bench: done\r\n"
no_synic_text:  .asciz "bench: no SynIC\r\n"
broken_text:    .asciz "bench: broken, hypercall status "
