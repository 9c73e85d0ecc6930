# Firmware of our own, for any KVM: what starts at the reset vector, asks the board what firmware asks, prints a
# letter for each answer that is right ("-" for one that is not), resets once and then powers off.
# 64 KiB that end at 4 GiB, and at 1 MiB when a CPU starts: there the code runs in real mode, above in flat
# protected mode.

    .include "letters.inc"
    .set PM, 0xb000
    .set BASE, 0xffff0000
    .set BAR, 0xc0000000
    .set VARIABLES, BASE - 0x2000
    .set FLAG, 0x500
    .set SHADOW, 0xf0000

    .macro put letter
    mov $COM1, %dx
    mov \letter, %al
    out %al, %dx
    .endm

    .text
    .code16
start:
    cli
    mov %cs, %ax
    put $'R'
    lgdtl %cs:(gdt_pointer - text)
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $8, $(BASE + flat - text)

    .code32
flat:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x8000, %esp

    config 0x80000000
    in %dx, %eax
    cmp $0x12378086, %eax
    check $'P'

    # By these two SeaBIOS knows that there is fw_cfg, and no SMI.
    config 0x8000002c
    in %dx, %eax
    cmp $0x11001af4, %eax
    jne 8f
    config 0x80000b58
    in %dx, %eax
    cmp $0x02000000, %eax
8:  check $'S'

    # Nobody in slot 31.
    config 0x8000f800
    in %dx, %eax
    cmp $0xffffffff, %eax
    check $'E'

    # The PM blocks at 0xb000, and a timer there that counts.
    config 0x80000b40
    mov $PM + 1, %eax
    out %eax, %dx
    config 0x80000b80
    mov $1, %al
    out %al, %dx
    mov $PM + 8, %dx
    in %dx, %eax
    mov %eax, %ebx
    mov $1000000, %ecx
2:  in %dx, %eax
    cmp %eax, %ebx
    loope 2b
    setne %al
    cmp $1, %al
    check $'T'

    # An NVMe controller in slot 2: its BAR placed, its version read, the size of its BAR asked for.
    config 0x80001010
    mov $0xffffffff, %eax
    out %eax, %dx
    in %dx, %eax
    cmp $0xffffc000, %eax
    check $'B'
    config 0x80001010
    mov $BAR, %eax
    out %eax, %dx
    config 0x80001004
    mov $6, %ax
    out %ax, %dx
    mov BAR + 8, %eax
    cmp $0x00010400, %eax
    check $'N'

    # Unassigned memory reads all ones.
    mov BAR + 0x8000000, %eax
    cmp $0xffffffff, %eax
    check $'U'

    # ROM is read-only, and goes on being read.
    mov BASE + word - text, %ebx
    notl BASE + word - text
    cmp %ebx, BASE + word - text
    check $'W'

    # fw_cfg by DMA: item 0 is "QEMU".
    movl $0x0a000000, 0x1000
    movl $0x04000000, 0x1004
    movl $0, 0x1008
    movl $0x00200000, 0x100c
    mov $0x514, %dx
    xor %eax, %eax
    out %eax, %dx
    mov $0x518, %dx
    mov $0x00100000, %eax
    out %eax, %dx
    cmpl $0x554d4551, 0x2000
    check $'D'

    # Where there are variables below this ROM: the status is 0, a byte is programmed, and is there.
    cmpl $0x4856465f, VARIABLES + 40
    jne 5f
    movb $0x70, VARIABLES
    mov VARIABLES, %bl
    movb $0xff, VARIABLES
    movb $0x10, VARIABLES + 0x1000
    movb $0x5a, VARIABLES + 0x1000
    movb $0xff, VARIABLES
    add VARIABLES + 0x1000, %bl
    cmp $0x5a, %bl
    check $'F'
5:
    # The first file of fw_cfg takes 28 bytes: it is a framebuffer's. XR24 at 0x3000, two rows of two pixels.
    movl $0, 0x2000
    movl $0x00300000, 0x2004
    movl $0x58523234, 0x2008
    movl $0, 0x200c
    movl $0x02000000, 0x2010
    movl $0x02000000, 0x2014
    movl $0x08000000, 0x2018
    movl $0x18002000, 0x1000
    movl $0x1c000000, 0x1004
    movl $0, 0x1008
    movl $0x00200000, 0x100c
    mov $0x514, %dx
    xor %eax, %eax
    out %eax, %dx
    mov $0x518, %dx
    mov $0x00100000, %eax
    out %eax, %dx
    mov 0x1000, %ebp
    test %ebp, %ebp
    jnz 6f
    movl $0x00112233, 0x3000
    movl $0xff445566, 0x3004
    movl $0x00000000, 0x3008
    movl $0x00ffffff, 0x300c
    put $'V'
6:
    # RAM outlives a reset, but for the ROM's end below 1 MiB; nothing else does.
    cmpl $0x12345678, FLAG
    je 3f
    movl $0x12345678, FLAG
    movb $0xf4, SHADOW + start - text
    mov $0xcf9, %dx
    mov $6, %al
    out %al, %dx
4:  hlt
    jmp 4b
3:
    # With a framebuffer it stays, to be looked at.
    test %ebp, %ebp
    jnz 7f
    put $'\n'
    jmp 4b
7:  mov $PM + 4, %dx
    mov $0x2000, %ax
    out %ax, %dx
    hlt
    jmp 3b

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long BASE + gdt - text
word:
    .long 0x13579bdf

    .set text, start
    .org 0xfff0
    .code16
    # As a BIOS begins: far, and so below 1 MiB.
    ljmp $SHADOW >> 4, $start - text
    .org 0x10000
