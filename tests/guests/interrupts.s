# The IDT, exceptions, and the one interrupt handler.
#
# An exception resumes at MB_FIXUP if the running command armed it, and is then
# the command's answer; anywhere else it is printed and ends the run through the
# debug-exit port. Interrupts are counted per vCPU and per SINT; what else the
# handler does with a SINT is the host's choice (MB_POLICY).

    .include "abi.inc"
    .include "macros.inc"
    .include "guest_parts.inc"

    .text
    .globl  build_idt, halt
# Halt until an interrupt; called with interrupts off, after looking for work. One that comes after
# that look is held until the instruction after STI has begun, so it ends the HLT: none is slept
# through. At least one emulator of nested SVM (QEMU 7.2) forgets that shadow across a VM exit and
# interrupts between the two; the handler then steps over the HLT.
halt:
    movq    $1, %gs:MB_HALTING
    sti
halting:
    hlt
    movq    $0, %gs:MB_HALTING
    ret

# Fill all 256 gates; the stubs are 16 bytes apart. Clobbers rax, rcx, rdx, rdi.
build_idt:
    movl    $idt, %edi
    movl    $stubs, %eax
    movl    $256, %ecx
1:  movl    %eax, %edx
    andl    $0xFFFF, %edx
    orl     $(CODE64 << 16), %edx
    movl    %edx, (%rdi)
    movl    %eax, %edx
    andl    $0xFFFF0000, %edx
    orl     $0x8E00, %edx       # present, DPL 0, interrupt gate
    movl    %edx, 4(%rdi)
    movq    $0, 8(%rdi)
    addq    $16, %rdi
    addl    $16, %eax
    decl    %ecx
    jnz     1b
    ret

    vector_stubs

# Stack: vector, error code, rip, cs, rflags, rsp, ss.
exception:
    cmpq    $0, %gs:MB_FIXUP
    je      fatal
    cmpq    $0, %gs:MB_IN_IRQ
    jne     fatal
    popq    %rax
    orq     $FAULT_TAKEN, %rax
    movq    %rax, %gs:MB_FAULT
    popq    %rax
    movq    %rax, %gs:MB_FAULT_CODE
    movq    (%rsp), %rax
    movq    %rax, %gs:MB_FAULT_RIP
    movq    %gs:MB_FIXUP_RSP, %rax
    movq    %rax, 24(%rsp)
    movq    %gs:MB_FIXUP, %rax
    movq    %rax, (%rsp)
    # Back at CPL 0, should it have come from user.s.
    movq    $CODE64, 8(%rsp)
    movq    $DATA, 32(%rsp)
    andq    $~0x3000, 16(%rsp)  # IOPL
    iretq

fatal:
    movl    $fatal_text, %esi
    call    print
    movq    (%rsp), %rdi        # vector
    call    print_hex
    movl    $fatal_at, %esi
    call    print
    movq    16(%rsp), %rdi      # rip
    call    print_hex
    movl    $fatal_code, %esi
    call    print
    movq    8(%rsp), %rdi
    call    print_hex
    movl    $fatal_address, %esi
    call    print
    movq    %cr2, %rdi
    call    print_hex
    movl    $newline, %esi
    call    print
    movl    $DEATH_CODE, %eax
    outl    %eax, $DEBUG_EXIT
    jmp     stop

# Stack: vector, rip, cs, rflags, rsp, ss.
interrupt:
    testl   $0x200, 24(%rsp)    # RFLAGS.IF
    jz      interrupts_off
    pushq   %rax
    pushq   %rbx
    pushq   %rcx
    pushq   %rdx
    pushq   %rsi
    pushq   %rdi
    pushq   %r8
    pushq   %r9
    pushq   %r10
    cld
    incq    %gs:MB_IN_IRQ
    cmpq    $halting, 80(%rsp)  # the interrupted rip
    jne     1f
    incq    80(%rsp)
1:  movq    72(%rsp), %rbx
    subq    $SINT_VECTOR, %rbx
    cmpq    $16, %rbx
    jae     not_sint

    incq    %gs:MB_IRQS(, %rbx, 8)
    movq    %gs:MB_POLICY(, %rbx, 8), %r10
    testl   $POLICY_DRAIN, %r10d
    jz      1f
    call    drain_slot
1:  testl   $POLICY_EVENTS, %r10d
    jz      2f
    call    drain_events
2:  testl   $POLICY_NO_EOI, %r10d
    jnz     interrupt_done
interrupt_eoi:
    apic_write APIC_EOI, 0
interrupt_done:
    decq    %gs:MB_IN_IRQ
    popq    %r10
    popq    %r9
    popq    %r8
    popq    %rdi
    popq    %rsi
    popq    %rdx
    popq    %rcx
    popq    %rbx
    popq    %rax
    addq    $8, %rsp
    iretq

# No CPU interrupts while RFLAGS.IF is clear. QEMU's TCG (seen with 7.2, and still in its sources in 2025)
# may deliver an interrupt that VMRUN injects twice: what it leaves in exception_index is taken for an
# exception if the vCPU is called out of its loop just then. The second comes before the handler's first
# instruction; KVM does not know of it, and it is dropped here. It was seen with AutoEOI only, where KVM
# already asks for the next window. Anything else with interrupts off is a fault, and told as one.
interrupts_off:
    pushq   %rax
    movq    8(%rsp), %rax       # the vector
    shll    $4, %eax
    addl    $stubs, %eax
    cmpq    %rax, 16(%rsp)      # the interrupted rip
    popq    %rax
    jne     1f
    incq    %gs:MB_TWICE
    addq    $8, %rsp
    iretq
1:  pushq   (%rsp)              # the vector is the error code, too
    jmp     fatal

not_sint:
    addq    $SINT_VECTOR, %rbx
    cmpl    $DOORBELL_VECTOR, %ebx
    jne     1f
    incq    %gs:MB_DOORBELLS
    jmp     interrupt_eoi
1:  cmpl    $DIRECT_VECTOR, %ebx
    jne     2f
    incq    %gs:MB_DIRECT
    jmp     interrupt_eoi
2:  incq    %gs:MB_STRAY
    movq    %rbx, %gs:MB_STRAY_VECTOR
    cmpl    $0xFF, %ebx         # the LAPIC's spurious vector takes no EOI
    je      interrupt_done
    jmp     interrupt_eoi

    .section .rodata
fatal_text:     .asciz "\r\nguest: exception "
fatal_at:       .asciz " at "
fatal_code:     .asciz " error "
fatal_address:  .asciz " cr2 "
newline:        .asciz "\r\n"
    .globl  idt_pointer
    .align  8
idt_pointer:
    .word   256 * 16 - 1
    .quad   idt

    .bss
    .align  4096
idt:
    .skip   4096
