# What a micro guest's text may use. \value is a register or a number with $, as GNU as writes them.

    .equ    RESULT_PORT, 0x5C0
    .equ    FAULT_PORT, 0x5C8
    .equ    EXIT_PORT, 0x5F8
    .equ    DEBUG_EXIT_PORT, 0xF4
    .equ    MAX_CPUS, 16

# Give the test a 64-bit number. Keeps all registers.
.macro result value
    pushq   %rax
    pushq   %rdx
    movq    \value, %rax
    movw    $RESULT_PORT, %dx
    outl    %eax, %dx
    shrq    $32, %rax
    addw    $4, %dx
    outl    %eax, %dx
    popq    %rdx
    popq    %rax
.endm

# End the guest with a status, 0 to 255.
.macro exit status
    movb    $\status, %al
    movw    $EXIT_PORT, %dx
    outb    %al, %dx
    jmp     stop
.endm

# Text on the serial console. Keeps all registers.
.macro print text
    pushq   %rsi
    leaq    .Ltext\@(%rip), %rsi
    call    print_text
    popq    %rsi
    jmp     .Lbehind\@
.Ltext\@:
    .asciz  "\text"
.Lbehind\@:
.endm

# A number on the serial console, in hexadecimal. Keeps all registers.
.macro print_hex value
    pushq   %rdi
    movq    \value, %rdi
    call    print_number
    popq    %rdi
.endm

# The MSR's value in rax. Clobbers rcx, rdx.
.macro read_msr number
    movl    $\number, %ecx
    rdmsr
    shlq    $32, %rdx
    orq     %rdx, %rax
.endm

# Clobbers rax, rcx, rdx.
.macro write_msr number, value
    movq    \value, %rax
    movq    %rax, %rdx
    shrq    $32, %rdx
    movl    $\number, %ecx
    wrmsr
.endm

# An exception from here on goes to \label once, with `fault_vector` and `fault_code` set. Clobbers rax.
.macro catch label
    movq    $\label, %rax
    movq    %rsp, fixup_rsp
    movq    %rax, fixup
.endm

.macro no_catch
    movq    $0, fixup
.endm

# \handler serves interrupts of \vector: it ends by `eoi` and iretq. Clobbers rax, rdx, rdi.
.macro on_interrupt vector, handler
    movl    $(idt + 16 * \vector), %edi
    movl    $\handler, %eax
    call    write_gate
.endm

# End of interrupt, by the local APIC's page. Clobbers rax.
.macro eoi
    movl    $0xFEE000B0, %eax
    movl    $0, (%rax)
.endm

# Say who we are and have the hypercall page. Clobbers rax, rcx, rdx.
.macro hyperv_on
    movabsq $0x8100000000000000, %rax
    write_msr 0x40000000, %rax
    movl    $hypercall_page, %eax
    orl     $1, %eax
    write_msr 0x40000001, %rax
.endm

# The hypercall's result in rax. \input and \output: numbers, or gpas. Clobbers rcx, rdx, r8 to r11.
.macro hypercall control, input=$0, output=$0
    movq    \input, %rdx
    movq    \output, %r8
    movq    \control, %rcx
    movl    $hypercall_page, %eax
    call    *%rax
.endm
