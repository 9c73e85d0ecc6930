# COM1 output, polled.

    .include "abi.inc"
    .include "guest_parts.inc"

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

    put_code

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
