# From the loader to 64-bit C-less code on every vCPU.
#
# A multiboot loader (QEMU's -kernel, hvkvm's boot.multiboot) enters _start in
# 32-bit protected mode without paging. The boot CPU builds page tables and the
# IDT, starts the others with INIT/SIPI and calls guest_main; each AP comes
# through the trampoline and calls it too. guest_main(edi = APIC id) is what a
# guest program supplies, and must not return.

    .include "abi.inc"
    .include "macros.inc"
    .include "guest_parts.inc"

    .section .multiboot, "a"
    .align  4
    .long   0x1BADB002          # magic
    .long   0                   # flags: load by the ELF headers, no demands
    .long   -0x1BADB002

    .text
    .code32
    .globl  _start
_start:
    cli
    cld
    # The header's first words live on; everything else that we report starts at zero.
    # A machine reset comes through here again with RAM as it was; whoever sees the new count of boots
    # must not find the old life's words still standing.
    movl    $(HEADER + 0x40), %edi
    movl    $((MAILBOX - HEADER - 0x40) / 4), %ecx
    xorl    %eax, %eax
    rep stosl
    incl    HEADER + HEADER_BOOTS

    # RAM, and the holes that tests put pages into.
    map_four_gib 7
    copy_trampoline

    lgdt    gdt_pointer
    ljmp    $CODE32, $enter_long_mode

# Any vCPU in flat 32-bit mode with our GDT; ends in cpu_start.
enter_long_mode:
    movw    $DATA, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    %ax, %fs
    movw    %ax, %gs
    movl    $pml4, %eax
    movl    %eax, %cr3
    movl    %cr4, %eax
    orl     $0x20, %eax         # PAE
    movl    %eax, %cr4
    movl    $MSR_EFER, %ecx
    rdmsr
    orl     $0x100, %eax        # LME
    wrmsr
    movl    %cr0, %eax
    andl    $0x9FFFFFFF, %eax   # caches on: CD and NW are set after INIT
    orl     $0x80000001, %eax   # PG, PE
    movl    %eax, %cr0
    ljmp    $CODE64, $cpu_start

    trampoline_code
cpu_start:
    movl    $1, %eax
    cpuid
    movl    %ecx, %r12d         # bit 21: x2APIC
    shrl    $24, %ebx           # initial APIC id; hvkvm makes it the VP index too
    cmpl    $MAX_VCPUS, %ebx
    jae     stop
    movl    %ebx, %edi
    imull   $0x2000, %ebx, %eax
    leaq    stacks + 0x2000(%rax), %rsp
    imull   $MAILBOX_SIZE, %ebx, %eax
    addl    $MAILBOX, %eax
    xorl    %edx, %edx
    movl    $MSR_GS_BASE, %ecx
    wrmsr

    # A clean mailbox; the host does not write to it before HEADER_ONLINE counts us.
    pushq   %rdi
    imull   $MAILBOX_SIZE, %edi, %edi
    addl    $MAILBOX, %edi
    movl    $(MAILBOX_SIZE / 8), %ecx
    xorl    %eax, %eax
    rep stosq
    popq    %rdi
    movq    %rdi, %gs:MB_APIC_ID

    # LAPIC on; x2APIC where CPUID offers it.
    movl    $MSR_APIC_BASE, %ecx
    rdmsr
    orl     $0x800, %eax
    xorl    %r13d, %r13d
    btl     $21, %r12d
    jnc     3f
    orl     $0x400, %eax
    incl    %r13d
3:  wrmsr
    movq    %r13, %gs:MB_X2APIC
    apic_write APIC_SVR, 0x1FF

    testl   %edi, %edi
    jnz     4f
    # The boot CPU: mask the PICs, fill the IDT, then let the others loose.
    movb    $0xFF, %al
    outb    %al, $0x21
    outb    %al, $0xA1
    pushq   %rdi
    call    build_idt
    apic_write APIC_ICR, 0xC4500                            # INIT to all but self
    apic_write APIC_ICR, (0xC4600 | TRAMPOLINE >> 12)       # SIPI
    popq    %rdi
4:  lidt    idt_pointer
    call    guest_main

    .globl  stop
stop:
    cli
    hlt
    jmp     stop

    .data
    .globl  gdt
    .align  8
gdt:
    .quad   0
    .quad   0x00CF9B000000FFFF  # CODE32
    .quad   0x00CF93000000FFFF  # DATA
    .quad   0x00AF9B000000FFFF  # CODE64
    .quad   0x00CFF3000000FFFF  # USER_DATA
    .quad   0x00AFFB000000FFFF  # USER_CODE
    .quad   0, 0                # TASK, filled by user.s
gdt_end:
gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt

    .bss
    .align  4096
pml4:
    .skip   4096
pdpt:
    .skip   4096
page_directories:
    .skip   4 * 4096
stacks:
    .skip   MAX_VCPUS * 0x2000
