"""What a worker does for a request: the calls of an image, and their result by name."""

from __future__ import annotations

from hvkvm.block.image import Image
from hvkvm.block.request import Op, Request, Result, Status


def perform(image: Image, request: Request) -> Result:
    """Carry it out. OSError, ImageError: `failure` makes results of them."""
    op = request.op
    if op is Op.READ:
        n = image.readv(request.offset, request.buffers)
        if n < request.length:
            return Result(Status.SHORT, n, f"{request} gave {n} bytes")
        return Result(Status.OK, n)
    if op is Op.WRITE:
        return Result(Status.OK, image.writev(request.offset, request.buffers, fua=request.fua))
    if op is Op.FLUSH:
        image.flush()
    elif op is Op.DISCARD:
        image.discard(request.offset, request.length)
    else:
        image.write_zeroes(request.offset, request.length, may_unmap=request.may_unmap)
        if request.fua:
            image.flush()
    return Result(Status.OK)
