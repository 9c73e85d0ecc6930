# What every micro guest begins with: a multiboot header, 64-bit mode on the boot CPU and,
# where the test has a label `ap_main`, on all others; a stack for each; an IDT; serial output.
# The first 4 GiB are mapped one to one. The test's text follows behind the label `guest_main`.

    .equ    COM1, 0x3F8
    .equ    TRAMPOLINE, 0x8000
    .equ    STACK_BYTES, 0x4000

    .section .multiboot, "a"
    .align  4
    .long   0x1BADB002, 0, -0x1BADB002

    .text
    .code32
    .globl  _start
_start:
    cli
    cld
    map_four_gib 3
    copy_trampoline
    lgdt    gdt_pointer
    ljmp    $8, $enter_long_mode

enter_long_mode:
    movw    $16, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movl    $pml4, %eax
    movl    %eax, %cr3
    movl    %cr4, %eax
    orl     $0x620, %eax        # PAE; SSE as OSFXSR, OSXMMEXCPT
    movl    %eax, %cr4
    movl    $0xC0000080, %ecx   # EFER
    rdmsr
    orl     $0x100, %eax        # LME
    wrmsr
    movl    %cr0, %eax
    andl    $0x9FFFFFFB, %eax   # caches on, no x87 emulation
    orl     $0x80000003, %eax   # PG, MP, PE
    movl    %eax, %cr0
    ljmp    $24, $cpu_start

    trampoline_code
cpu_start:
    movl    $1, %eax
    cpuid
    shrl    $24, %ebx           # initial APIC id, which is the VP index too
    cmpl    $MAX_CPUS, %ebx
    jae     stop
    movl    %ebx, %edi
    imull   $STACK_BYTES, %ebx, %eax
    leaq    stacks + STACK_BYTES(%rax), %rsp
    # The local APIC, by its page.
    movl    $0x1B, %ecx
    rdmsr
    orl     $0x800, %eax
    wrmsr
    movl    $0xFEE000F0, %eax
    movl    $0x1FF, (%rax)
    testl   %edi, %edi
    jnz     other_cpu
    movb    $0xFF, %al          # no interrupts of the PICs
    outb    %al, $0x21
    outb    %al, $0xA1
    call    build_idt
    lidt    idt_pointer
    .weak   ap_main
    movq    $ap_main, %rax
    testq   %rax, %rax
    jz      1f
    movl    $0xFEE00300, %eax
    movl    $0xC4500, (%rax)    # INIT to all but self
    movl    $(0xC4600 + TRAMPOLINE / 4096), (%rax)
1:  xorl    %edi, %edi
    call    guest_main
    exit    0
other_cpu:
    lidt    idt_pointer
    movq    $ap_main, %rax
    call    *%rax

    .globl  stop
stop:
    cli
    hlt
    jmp     stop

# All 256 gates; the stubs are 16 bytes apart.
build_idt:
    movl    $idt, %edi
    movl    $stubs, %eax
    movl    $256, %ecx
1:  call    write_gate
    addq    $16, %rdi
    addl    $16, %eax
    decl    %ecx
    jnz     1b
    ret

# rdi: a gate, eax: its handler. Clobbers rdx.
write_gate:
    movl    %eax, %edx
    andl    $0xFFFF, %edx
    orl     $(24 << 16), %edx
    movl    %edx, (%rdi)
    movl    %eax, %edx
    andl    $0xFFFF0000, %edx
    orl     $0x8E00, %edx       # present, interrupt gate
    movl    %edx, 4(%rdi)
    movq    $0, 8(%rdi)
    ret

    vector_stubs

# Stack: vector, error code, rip, cs, rflags, rsp, ss. With `catch` armed it goes on there,
# else it is told and ends the guest.
exception:
    cmpq    $0, fixup
    je      1f
    popq    %rax
    movq    %rax, fault_vector
    popq    %rax
    movq    %rax, fault_code
    movq    fixup, %rax
    movq    $0, fixup
    movq    %rax, (%rsp)
    movq    fixup_rsp, %rax
    movq    %rax, 24(%rsp)
    iretq
1:  popq    %rax
    result  %rax
    popq    %rax
    result  %rax
    popq    %rax
    result  %rax
    movq    %cr2, %rax
    result  %rax
    movw    $FAULT_PORT, %dx
    outb    %al, %dx
    jmp     stop

# An interrupt for which the test has no handler is counted, by vector.
interrupt:
    pushq   %rax
    movq    8(%rsp), %rax
    lock incl interrupts(, %rax, 4)
    movl    $0xFEE000B0, %eax   # EOI
    movl    $0, (%rax)
    popq    %rax
    addq    $8, %rsp
    iretq

# rsi: text that ends in NUL. Keeps all registers.
print_text:
    pushq   %rax
    pushq   %rdx
    pushq   %rsi
1:  movb    (%rsi), %al
    testb   %al, %al
    jz      2f
    call    put
    incq    %rsi
    jmp     1b
2:  popq    %rsi
    popq    %rdx
    popq    %rax
    ret

    put_code

# rdi: printed as hexadecimal digits, without leading zeros. Keeps all registers.
print_number:
    pushq   %rax
    pushq   %rcx
    pushq   %rdx
    pushq   %rdi
    pushq   %rbx
    movl    $16, %ecx
    xorl    %ebx, %ebx
1:  rolq    $4, %rdi
    movl    %edi, %eax
    andl    $15, %eax
    orl     %eax, %ebx
    cmpl    $1, %ecx
    je      2f
    testl   %ebx, %ebx
    jz      4f
2:  cmpb    $10, %al
    jb      3f
    addb    $('a' - 10 - '0'), %al
3:  addb    $'0', %al
    call    put
4:  decl    %ecx
    jnz     1b
    popq    %rbx
    popq    %rdi
    popq    %rdx
    popq    %rcx
    popq    %rax
    ret

    .data
    .align  8
gdt:
    .quad   0
    .quad   0x00CF9B000000FFFF  # 8: 32-bit code
    .quad   0x00CF93000000FFFF  # 16: data
    .quad   0x00AF9B000000FFFF  # 24: 64-bit code
gdt_end:
gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
    .align  8
idt_pointer:
    .word   256 * 16 - 1
    .quad   idt
    .globl  fixup, fixup_rsp, fault_vector, fault_code
fixup:
    .quad   0
fixup_rsp:
    .quad   0
fault_vector:
    .quad   0
fault_code:
    .quad   0

    .bss
    .align  4096
pml4:
    .skip   4096
pdpt:
    .skip   4096
page_directories:
    .skip   4 * 4096
idt:
    .skip   4096
    .globl  pages, hypercall_page
hypercall_page:
    .skip   4096
pages:                          # the test's own, zero at the start
    .skip   16 * 4096
interrupts:
    .skip   256 * 4
stacks:
    .skip   MAX_CPUS * STACK_BYTES

    .text
guest_main:
