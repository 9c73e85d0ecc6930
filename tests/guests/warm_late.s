# A guest that waits for a command as our init does, and is slow to ask for the time once it has it: only when the
# console has said a byte to it. Then it prints the time that its host shows it, 16 bytes, and powers off.

    .set COM1, 0x3f8
    .set COM4, 0x2e8
    .set ORDERS, 0xd0000000

    .macro say text
    mov $\text, %esi
    call print
    .endm

    .text
    .code32
    mov $0x70000, %esp
    mov $COM4, %ebp
    say warm
    call line

    mov $COM1, %ebp
    call byte
    mov $COM4, %ebp
    say now
    call line

    mov $COM1, %edx
    mov $ORDERS + 16, %esi
    mov $16, %ecx
    rep outsb

    mov $0x604, %dx
    mov $0x2000, %ax
    out %ax, %dx
    mov $0x3400, %ax
    out %ax, %dx
1:  hlt
    jmp 1b

print:                          # what esi points to, to the port in ebp
    mov %ebp, %edx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  ret

line:                           # takes one from the port in ebp
    call byte
    cmp $'\n', %al
    jne line
    ret

byte:                           # al = one from the port in ebp, when there is one
    lea 5(%ebp), %edx
1:  pause
    in %dx, %al
    test $1, %al
    jz 1b
    mov %ebp, %edx
    in %dx, %al
    ret

warm:
    .asciz "warm memory\n"
now:
    .asciz "now\n"
