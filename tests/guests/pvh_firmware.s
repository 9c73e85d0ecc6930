# Firmware that is entered as a PVH kernel, as CLOUDHV.fd is: it has no fw_cfg to ask and finds all in what it
# is handed. A letter for each answer that is right, "-" for one that is not, then power-off.

    .include "letters.inc"
    .set BAR, 0xc0000000
    .set SLEEP_CONTROL, 0x600

    .text
    .code32
    mov $0x70000, %esp

    cmpl $0x336ec578, (%ebx)
    check $'S'

    # The memory map's first entry is RAM at 0.
    mov 0x28(%ebx), %esi
    mov (%esi), %eax
    or 4(%esi), %eax
    sub $1, %eax
    add 16(%esi), %eax
    cmp $0, %eax
    check $'M'

    # RSDP, XSDT, and in that the FADT.
    mov 0x20(%ebx), %esi
    cmpl $0x20445352, (%esi)
    check $'R'
    mov 24(%esi), %esi
    cmpl $0x54445358, (%esi)
    check $'X'
    mov 4(%esi), %ecx
    sub $36, %ecx
    shr $3, %ecx
    add $36, %esi
2:  mov (%esi), %ebp
    cmpl $0x50434146, (%ebp)
    je 3f
    add $8, %esi
    loop 2b
3:  cmpl $0x50434146, (%ebp)
    check $'F'

    # Its PM timer counts.
    mov 76(%ebp), %edx
    in %dx, %eax
    mov %eax, %edi
    mov $1000000, %ecx
4:  in %dx, %eax
    cmp %eax, %edi
    loope 4b
    setne %al
    cmp $1, %al
    check $'T'

    # The DSDT has a PCI root: "PCI0".
    mov 40(%ebp), %esi
    cmpl $0x54445344, (%esi)
    check $'D'
    mov 4(%esi), %ecx
5:  cmpl $0x30494350, (%esi)
    je 6f
    inc %esi
    loop 5b
6:  cmpl $0x30494350, (%esi)
    check $'P'

    # The bridge by which firmware tells boards apart, and NVMe in slot 2, whose BAR it places.
    mov $0x12378086, %ebx
    cmpl $0x4856465f, signature
    jne 8f
    mov $0x0d578086, %ebx
8:  config 0x80000000
    in %dx, %eax
    cmp %ebx, %eax
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

    # S5: firmware of cloud-hypervisor knows a sleep control register.
    cmpl $0x4856465f, signature
    jne 9f
    mov $SLEEP_CONTROL, %dx
    mov $0x34, %al
    out %al, %dx
    hlt

    # Others: by the FADT's PM1a control port; its type is 0 or 5: both are tried.
9:  mov 64(%ebp), %edx
    mov $0x2000, %ax
    out %ax, %dx
    mov $0x3400, %ax
    out %ax, %dx
7:  hlt
    jmp 7b

    # Of the firmware volume behind the page that CLOUDHV.fd leaves for its ELF header.
    .org 0x1028
signature:
    .ascii "_FVH"
