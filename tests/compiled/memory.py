"""Global and shared memory of an executed kernel, and what may touch it when.

Shared memory keeps, for every byte, which warps read and wrote it since the block's last barrier,
and what in flight still reads or writes it. A bit per warp; an access of several bytes looks at
them all at once, as one integer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

UNSIGNED: dict[int, np.dtype] = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
ONES = {width: int.from_bytes(b"\x01" * width, "little") for width in UNSIGNED}  # in every byte
GARBAGE = 0xFF  # of every byte that nothing wrote: NaN in every float type


class Fault(Exception):
    """What a GPU would do silently wrong, or not at all; the message names the instruction."""


def _split(at: np.ndarray, width: int) -> tuple[np.ndarray, np.dtype]:
    """Indices [..., n] of the integers that make up `width` bytes at each byte offset."""
    if (at % width).any():
        raise Fault(f"{width} bytes at offset {int(at[at % width != 0][0])}, which is misaligned")
    if width == 16:
        return (at >> 3)[..., None] + np.arange(2), UNSIGNED[8]
    return (at // width)[..., None], UNSIGNED[width]


class Global:
    """The tensors that a launch may touch, where they lie in this process.

    Args:
        tensors: a tensor's extent is from its first element to its last, gaps between its rows
            included; the bytes around it are out of bounds.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + self._last(t)))
            for t in tensors
            if t.numel()
        )
        merged: list[list[int]] = []
        for begin, end in spans:
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self.begins, self.ends = np.array(merged or [[16, 16]], np.int64).T
        self.base = int(self.begins[0]) // 16 * 16
        size = (int(self.ends[-1]) - self.base) // 16 * 16 + 16
        everything = (ctypes.c_uint8 * size).from_address(self.base)
        self.bytes = np.frombuffer(
            memoryview(everything), np.uint8
        )  # a view; nothing is touched by making it

    @staticmethod
    def _last(tensor: Tensor) -> int:
        return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))

    def view(self, addresses: np.ndarray, width: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The memory as integers, and the indices [lanes, n] of `width` bytes at each address."""
        addresses = addresses.astype(np.int64)
        span = np.searchsorted(self.begins, addresses, "right") - 1
        bad = (span < 0) | (addresses + width > self.ends[span])
        if bad.any():
            address = int(addresses[bad][0])
            near = int(np.abs(self.begins - address).argmin())
            raise Fault(
                f"{what} of {width} bytes out of bounds: {address - int(self.begins[near])} from "
                f"the start of a tensor of {int(self.ends[near] - self.begins[near])} bytes"
            )
        index, dtype = _split(addresses - self.base, width)
        return self.bytes.view(dtype), index


class Shared:
    """Shared memory of `blocks` thread blocks, `size` bytes each, offsets counted through all."""

    def __init__(self, blocks: int, size: int, warps: int) -> None:
        if warps > 8:
            raise Fault(f"{warps} warps in a block; the bits of a byte tell 8 apart")
        self.size, self.warps = size, warps
        self.pitch = max(size + 1023, 1024) // 1024 * 1024  # swizzles look at address bits 4 to 9
        shape = (blocks, self.pitch)
        self.data = np.full(shape, GARBAGE, np.uint8)
        self.wrote = np.zeros(shape, np.uint8)  # by ordinary stores and finished copies
        self.read = np.zeros(shape, np.uint8)
        self.unfenced = np.zeros(shape, np.uint8)  # written, not yet visible to matrix products
        self.copying = np.zeros(shape, np.uint8)  # an asynchronous copy may still write it
        self.multiplying = np.zeros((blocks, self.pitch // 16), np.int16)  # products that read it

    def locate(self, blocks: np.ndarray, offsets: np.ndarray, width: int) -> np.ndarray:
        """Offsets through all blocks, of addresses within each lane's own."""
        bad = (offsets < 0) | (offsets + width > self.size)
        if bad.any():
            raise Fault(
                f"{width} bytes at {int(offsets[bad][0])} of {self.size} bytes of shared memory"
            )
        return blocks * self.pitch + offsets

    def load(self, at: np.ndarray, width: int, warp_bits: np.ndarray) -> np.ndarray:
        """Integers [lanes, n] that make up `width` bytes."""
        index, dtype = _split(at, width)
        bits = warp_bits[:, None].astype(dtype) * dtype.type(ONES[dtype.itemsize])
        if self.copying.reshape(-1).view(dtype)[index].any():
            raise Fault("reads shared memory that an asynchronous copy may still write")
        if (self.wrote.reshape(-1).view(dtype)[index] & ~bits).any():
            raise Fault("reads shared memory that another warp wrote, with no barrier between")
        self._note(self.read, index, bits)
        return self.data.reshape(-1).view(dtype)[index]

    @staticmethod
    def _note(plane: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
        seen = plane.reshape(-1).view(bits.dtype)
        while (lost := (bits & ~seen[index]) != 0).any():  # warps at one address undo each other's
            seen[index[lost]] |= np.broadcast_to(bits, index.shape)[lost]

    def store(self, at: np.ndarray, width: int, warp_bits: np.ndarray, values: np.ndarray) -> None:
        """`values` is [lanes, bytes] of any integer type."""
        index, dtype = _split(at, width)
        bits = warp_bits[:, None].astype(dtype) * dtype.type(ONES[dtype.itemsize])
        self.claim(at, index, bits)
        self.unfenced.reshape(-1).view(dtype)[index] |= bits
        self._write(index, bits, values)

    def claim(self, at: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
        """See that nothing else uses what is about to be written."""
        if self.copying.reshape(-1).view(bits.dtype)[index].any():
            raise Fault("writes shared memory that an asynchronous copy may still write")
        if self.multiplying.reshape(-1)[at >> 4].any():
            raise Fault("writes shared memory that a matrix product in flight may still read")
        if (self.read.reshape(-1).view(bits.dtype)[index] & ~bits).any():
            raise Fault("writes shared memory that another warp read, with no barrier between")

    def _write(self, index: np.ndarray, bits: np.ndarray, values: np.ndarray) -> None:
        """Several warps may write the same value to one address: Triton's layouts repeat values,
        and whichever comes last changes nothing."""
        values = np.ascontiguousarray(values).view(bits.dtype)
        data, wrote = (plane.reshape(-1).view(bits.dtype) for plane in (self.data, self.wrote))
        others = (wrote[index] & ~bits) != 0
        if (data[index] != values)[others].any():
            raise Fault("writes shared memory that another warp wrote, with no barrier between")
        data[index] = values
        if (data[index] != values).any():
            raise Fault("lanes write different values to one address of shared memory at once")
        self._note(self.wrote, index, bits)

    def begin_copy(self, at: np.ndarray, width: int, warp_bits: np.ndarray) -> None:
        """An asynchronous copy is issued: from now on until it is waited for, nobody else may."""
        index, dtype = _split(at, width)
        bits = warp_bits[:, None].astype(dtype) * dtype.type(ONES[dtype.itemsize])
        self.claim(at, index, bits)
        self.copying.reshape(-1).view(dtype)[index] |= bits

    def end_copy(
        self, at: np.ndarray, width: int, warp_bits: np.ndarray, values: np.ndarray
    ) -> None:
        """It is waited for: only now does it take effect, as a write of its warp.

        Matrix products need no fence.proxy.async before they read it: neither Triton nor CUTLASS
        puts one there.
        """
        index, dtype = _split(at, width)
        bits = warp_bits[:, None].astype(dtype) * dtype.type(ONES[dtype.itemsize])
        self.copying.reshape(-1).view(dtype)[index] = 0
        self._write(index, bits, values)

    def begin_product(self, granules: np.ndarray) -> None:
        """A matrix product that reads these 16-byte pieces is issued."""
        index = granules[..., None] * 2 + np.arange(2)
        if self.copying.reshape(-1).view(np.uint64)[index].any():
            raise Fault("a matrix product reads what an asynchronous copy may still write")
        if self.wrote.reshape(-1).view(np.uint64)[index].any():
            raise Fault("a matrix product reads what a warp wrote, with no barrier between")
        if self.unfenced.reshape(-1).view(np.uint64)[index].any():
            raise Fault("a matrix product reads what no fence.proxy.async made visible to it")
        np.add.at(self.multiplying.reshape(-1), granules.reshape(-1), np.int16(1))

    def end_product(self, granules: np.ndarray, warp_bits: int) -> None:
        """It is waited for: its reading counts as these warps'."""
        np.subtract.at(self.multiplying.reshape(-1), granules.reshape(-1), np.int16(1))
        index = granules[..., None] * 2 + np.arange(2)
        self.read.reshape(-1).view(np.uint64)[index] |= np.uint64(warp_bits * ONES[8])

    def barrier(self, blocks: np.ndarray | slice) -> None:
        self.wrote[blocks] = 0
        self.read[blocks] = 0

    def fence(self, blocks: np.ndarray | slice) -> None:
        """What all warps of these blocks wrote is visible to matrix products from now on."""
        self.unfenced[blocks] = 0
