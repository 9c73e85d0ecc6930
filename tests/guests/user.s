# Code at CPL 3: what a hypercall, or an OUT, does there.
#
# One vCPU at a time: there is one task state segment, made ready by each call.

    .include "abi.inc"
    .include "macros.inc"

    .text
    .globl  op_user_call
op_user_call:
    cli
    # An exception from CPL 3 starts on this stack.
    movq    %rsp, task + 4      # RSP0
    movw    $TASK_SIZE, task + 102      # no I/O bitmap: IOPL alone decides
    # A descriptor that LTR marked busy would fault the next time.
    movl    $(TASK_SIZE - 1), %eax
    movl    $task, %edx
    movl    %edx, %ecx
    shll    $16, %ecx
    orl     %ecx, %eax
    movl    %eax, gdt + TASK
    movl    %edx, %eax
    shrl    $16, %eax
    movl    %eax, %ecx
    andl    $0xFF, %eax
    andl    $0xFF00, %ecx
    shll    $16, %ecx
    orl     %ecx, %eax
    orl     $0x8900, %eax       # present, available 64-bit TSS
    movl    %eax, gdt + TASK + 4
    movl    $TASK, %eax
    ltr     %ax

    # IRET would take GS away, were it a segment of CPL 0: none at all it leaves alone. Then its base again.
    movl    $MSR_GS_BASE, %ecx
    rdmsr
    xorl    %ebx, %ebx
    movw    %bx, %gs
    wrmsr
    movw    %bx, %ds
    movw    %bx, %es
    movw    %bx, %fs

    argument 0, %rcx
    argument 1, %rdx
    argument 2, %rbx
    leaq    -1024(%rsp), %rax
    pushq   $USER_DATA
    pushq   %rax
    pushq   $0x3002             # IOPL 3
    pushq   $USER_CODE
    pushq   $user
    iretq

user:
    xorl    %eax, %eax
    call    *%rbx
    result  0, %rax
    hlt                         # not at CPL 3: the way back

    .bss
    .align  16
    .equ    TASK_SIZE, 104
task:
    .skip   TASK_SIZE
