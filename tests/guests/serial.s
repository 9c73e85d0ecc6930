# COM1 output, polled.

    .include "abi.inc"

    .text
    .globl  print, print_hex
# rsi: a string that ends in NUL. Clobbers rax, rdx, rsi.
print:
    movb    (%rsi), %al
    testb   %al, %al
    jz      2f
    call    put
    incq    %rsi
    jmp     print
2:  ret

# al: one byte. Waits for the transmitter (LSR bit 5). Clobbers rdx.
put:
    pushq   %rax
    movw    $(COM1 + 5), %dx
1:  inb     %dx, %al
    testb   $0x20, %al
    jz      1b
    popq    %rax
    movw    $COM1, %dx
    outb    %al, %dx
    ret

# rdi: printed as 16 hexadecimal digits. Clobbers rax, rcx, rdx, rdi.
print_hex:
    movl    $16, %ecx
1:  rolq    $4, %rdi
    movl    %edi, %eax
    andl    $15, %eax
    cmpb    $10, %al
    jb      2f
    addb    $('a' - 10 - '0'), %al
2:  addb    $'0', %al
    call    put
    decl    %ecx
    jnz     1b
    ret
