"""A program of some hundred bytes that gives another one a vsock connection to the host as a file.

Why: no busybox knows AF_VSOCK. Called by `boot.initramfs`, which puts it into
the guest as /bin/guest-vsock. Pure function, any thread.

Used as `guest-vsock PORT FD PROGRAM [ARGUMENT...]`, with the whole path of the
program: connects to the port of the host (CID 2, within CONNECT_SECONDS) and
becomes the program, which has the connection as that fd. Exit status
CANNOT_CONNECT where there is no AF_VSOCK, nobody listens or there is no such program.
"""

from __future__ import annotations

from hvkvm.boot import tiny_elf

CANNOT_CONNECT = 111

CONNECT_SECONDS = 10
"""Linux's own limit of 2 is little for a host that is busy or emulated."""

SOURCE = """
    mov rbp, rsp                # argc; argv[0] is at rbp + 8
    mov rdi, [rbp + 16]         # argv[1]: the port
    call number
    mov ebx, eax
    mov rdi, [rbp + 24]         # argv[2]: the fd
    call number
    mov r12d, eax
    mov edi, 40                 # socket(AF_VSOCK, SOCK_STREAM, 0)
    mov esi, 1
    xor edx, edx
    mov eax, 41
    syscall
    test eax, eax
    js fail
    mov r13d, eax
    push 0                      # struct timeval: seconds, microseconds
    push 10
    mov edi, r13d               # setsockopt(socket, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, ...)
    mov esi, 40
    mov edx, 6
    mov r10, rsp
    mov r8d, 16
    mov eax, 54
    syscall
    push 2                      # struct sockaddr_vm: svm_cid VMADDR_CID_HOST, zeros
    shl rbx, 32                 # svm_port
    or rbx, 40                  # svm_family
    push rbx
    mov edi, r13d               # connect(socket, address, 16)
    mov rsi, rsp
    mov edx, 16
    mov eax, 42
    syscall
    test eax, eax
    js fail
    cmp r13d, r12d
    je run
    mov edi, r13d               # dup2(socket, fd)
    mov esi, r12d
    mov eax, 33
    syscall
    mov edi, r13d               # close(socket)
    mov eax, 3
    syscall
run:
    mov rdi, [rbp + 32]         # execve(argv[3], argv + 3, envp)
    lea rsi, [rbp + 32]
    mov rax, [rbp]
    lea rdx, [rbp + rax * 8 + 16]
    mov eax, 59
    syscall
fail:
    mov edi, 111                # exit(111)
    mov eax, 60
    syscall
number:                         # eax = the decimal number at rdi
    xor eax, eax
digit:
    movzx ecx, byte ptr [rdi]
    sub ecx, 48
    cmp ecx, 9
    ja end
    imul eax, eax, 10
    add eax, ecx
    inc rdi
    jmp digit
end:
    ret
"""
"""What `_CODE` says, in GNU assembler's intel syntax; a test holds the two together."""

_CODE = (
    "4889e5488b7d10e8aa00000089c3488b7d18e89f0000004189c4bf28000000be0100000031d2b8290000000f0585"
    "c078794189c56a006a0a4489efbe28000000ba060000004989e241b810000000b8360000000f056a0248c1e32048"
    "83cb28534489ef4889e6ba10000000b82a0000000f0585c078344539e574174489ef4489e6b8210000000f054489"
    "efb8030000000f05488b7d20488d7520488b4500488d54c510b83b0000000f05bf6f000000b83c0000000f0531c0"
    "0fb60f83e93083f909770a6bc00a01c848ffc7ebebc3"
)


def code() -> bytes:
    """The machine code alone."""
    return bytes.fromhex(_CODE)


def program() -> bytes:
    """The static x86-64 ELF executable."""
    return tiny_elf.executable(code())
