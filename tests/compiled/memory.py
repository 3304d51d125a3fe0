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
ONES_16 = {
    width: sum(1 << 8 * i for i in range(0, width, 2)) for width in (2, 4, 8)
}  # every 16 bits
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
        extents: the same of others, (first byte, byte behind the last one).
    """

    def __init__(self, tensors: Sequence[Tensor], extents: Sequence[tuple[int, int]] = ()) -> None:
        found = [
            (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + self._last(t)))
            for t in tensors
            if t.numel()
        ]
        spans = sorted([*found, *extents])
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
    """Shared memory of `blocks` thread blocks, `size` bytes each, offsets counted through all.

    Blocks of more than 8 warps are made of warpgroups that go their own ways: a byte then keeps, in
    16 bits, which of 12 warps touched it since their warpgroup's last barrier, and above these
    which of the three warpgroups did before it, but since the block's last one.
    """

    def __init__(self, blocks: int, size: int, warps: int) -> None:
        if warps > 12:
            raise Fault(f"{warps} warps in a block; the bits of a byte tell 12 apart")
        self.size, self.warps = size, warps
        self.unit = 1 if warps <= 8 else 2  # bytes that a plane has for one of memory
        self.pitch = max(size + 1023, 1024) // 1024 * 1024  # swizzles look at address bits 4 to 9
        shape = (blocks, self.pitch)
        self.data = np.full(shape, GARBAGE, np.uint8)
        kind = UNSIGNED[self.unit]
        self.wrote = np.zeros(shape, kind)  # by ordinary stores and finished copies
        self.read = np.zeros(shape, kind)
        self.unfenced = np.zeros(shape, kind)  # written, not yet visible to matrix products
        self.copying = np.zeros(shape, kind)  # an asynchronous copy may still write it
        self.multiplying = np.zeros((blocks, self.pitch // 16), np.int16)  # products that read it
        self.touched = 0  # warps, by their bits, of which planes may know
        # of warpgroups: at which of its barriers each had last written and read 16-byte pieces, and
        # what one of a block has been told of another: [block, who, of whom]
        pieces = (3, blocks, self.pitch // 16) if self.unit == 2 else (0,)
        self.wrote_at, self.read_at = np.zeros(pieces, np.int64), np.zeros(pieces, np.int64)
        self.told = np.full((blocks, 3, 3), -1)

    def locate(self, blocks: np.ndarray, offsets: np.ndarray, width: int) -> np.ndarray:
        """Offsets through all blocks, of addresses within each lane's own."""
        bad = (offsets < 0) | (offsets + width > self.size)
        if bad.any():
            raise Fault(
                f"{width} bytes at {int(offsets[bad][0])} of {self.size} bytes of shared memory"
            )
        return blocks * self.pitch + offsets

    def _split(self, at: np.ndarray, width: int) -> tuple[np.ndarray, np.dtype]:
        """Indices [..., n] of the integers that make up `width` bytes, and their type in a plane:
        8 bytes at most."""
        index, dtype = _split(at, width)
        if self.unit == 1:
            return index, dtype
        if width >= 8:  # in pieces of 4 bytes
            pieces = width // 4
            return (at // 4)[..., None] + np.arange(pieces), UNSIGNED[8]
        return index, UNSIGNED[2 * width]

    def _bits(self, warp_bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """[lanes, 1]: a bit per warp, in every byte."""
        every = ONES[dtype.itemsize] if self.unit == 1 else ONES_16[dtype.itemsize]
        return warp_bits[:, None].astype(dtype) * dtype.type(every)

    def _own(self, warp_bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The same with what a warp's accesses come behind: all of its warpgroup's before their
        last barrier."""
        if self.unit == 1:
            return self._bits(warp_bits, dtype)
        group = np.select([warp_bits < 1 << 4, warp_bits < 1 << 8], [1 << 12, 1 << 13], 1 << 14)
        return self._bits(warp_bits | group.astype(warp_bits.dtype), dtype)

    def plane(self, plane: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return plane.reshape(-1).view(dtype)

    def _data(self, dtype: np.dtype) -> np.ndarray:
        """The memory as the integers that `dtype` is for in a plane."""
        return self.data.reshape(-1).view(UNSIGNED[dtype.itemsize // self.unit])

    def load(self, at: np.ndarray, width: int, warp_bits: np.ndarray) -> np.ndarray:
        """Integers [lanes, n] that make up `width` bytes."""
        index, dtype = self._split(at, width)
        self.see(at, width, warp_bits)
        self._note(self.read, index, self._bits(warp_bits, dtype))
        return self._data(dtype)[index]

    def see(self, at: np.ndarray, width: int, warp_bits: np.ndarray) -> None:
        """That warps may read it."""
        index, dtype = self._split(at, width)
        if self.plane(self.copying, dtype)[index].any():
            raise Fault("reads shared memory that an asynchronous copy may still write")
        if self._foreign(self.wrote, self.wrote_at, index, warp_bits, dtype).any():
            raise Fault("reads shared memory that another warp wrote, with no barrier between")

    def _foreign(
        self,
        plane: np.ndarray,
        since: np.ndarray,
        index: np.ndarray,
        warp_bits: np.ndarray,
        dtype: np.dtype,
    ) -> np.ndarray:
        """bool [lanes, n]: pieces that another warp has touched, with no barrier between."""
        others = self.plane(plane, dtype)[index] & ~self._own(warp_bits, dtype)
        foreign = others != 0
        if self.unit == 2 and foreign.any():
            of = np.select([warp_bits < 1 << 4, warp_bits < 1 << 8], [0, 1], 2)
            for lane, n in np.argwhere(foreign):
                piece = int(index[lane, n]) * (dtype.itemsize // 2) // 16
                block, piece = divmod(piece, self.pitch // 16)
                bits, told = int(others[lane, n]), self.told[block, of[lane]]
                known = [g for g in range(3) if since[g, block, piece] <= told[g]]
                foreign[lane, n] = bits & ~sum((1 << 12 + g) * ONES_16[8] for g in known)
        return foreign

    def _note(self, plane: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
        seen = self.plane(plane, bits.dtype)
        while (lost := (bits & ~seen[index]) != 0).any():  # warps at one address undo each other's
            seen[index[lost]] |= np.broadcast_to(bits, index.shape)[lost]
        if len(bits):
            self.touched |= int(np.bitwise_or.reduce(bits.reshape(-1)))

    def store(self, at: np.ndarray, width: int, warp_bits: np.ndarray, values: np.ndarray) -> None:
        """`values` is [lanes, bytes] of any integer type."""
        index, dtype = self._split(at, width)
        self.claim(at, index, warp_bits, dtype)
        self.plane(self.unfenced, dtype)[index] |= self._bits(warp_bits, dtype)
        self._write(index, warp_bits, dtype, values)

    def claim(
        self, at: np.ndarray, index: np.ndarray, warp_bits: np.ndarray, dtype: np.dtype
    ) -> None:
        """See that nothing else uses what is about to be written."""
        if self.plane(self.copying, dtype)[index].any():
            raise Fault("writes shared memory that an asynchronous copy may still write")
        if self.multiplying.reshape(-1)[at >> 4].any():
            raise Fault("writes shared memory that a matrix product in flight may still read")
        if self._foreign(self.read, self.read_at, index, warp_bits, dtype).any():
            raise Fault("writes shared memory that another warp read, with no barrier between")

    def _write(
        self, index: np.ndarray, warp_bits: np.ndarray, dtype: np.dtype, values: np.ndarray
    ) -> None:
        """Several warps may write the same value to one address: Triton's layouts repeat values,
        and whichever comes last changes nothing."""
        data = self._data(dtype)
        values = np.ascontiguousarray(values).view(data.dtype)
        others = self._foreign(self.wrote, self.wrote_at, index, warp_bits, dtype)
        if (data[index] != values)[others].any():
            raise Fault("writes shared memory that another warp wrote, with no barrier between")
        data[index] = values
        if (data[index] != values).any():
            raise Fault("lanes write different values to one address of shared memory at once")
        self._note(self.wrote, index, self._bits(warp_bits, dtype))

    def begin_copy(self, at: np.ndarray, width: int, warp_bits: np.ndarray) -> None:
        """An asynchronous copy is issued: from now on until it is waited for, nobody else may."""
        index, dtype = self._split(at, width)
        self.claim(at, index, warp_bits, dtype)
        self.plane(self.copying, dtype)[index] |= self._bits(warp_bits, dtype)

    def end_copy(
        self, at: np.ndarray, width: int, warp_bits: np.ndarray, values: np.ndarray
    ) -> None:
        """It is waited for: only now does it take effect, as a write of its warp.

        Matrix products need no fence.proxy.async before they read it: neither Triton nor CUTLASS
        puts one there.
        """
        index, dtype = self._split(at, width)
        self.plane(self.copying, dtype)[index] = 0
        self._write(index, warp_bits, dtype, values)

    def _granules(self, granules: np.ndarray) -> np.ndarray:
        """Indices [..., n] of the 64-bit integers of a plane that 16-byte pieces take."""
        count = 2 * self.unit
        return granules[..., None] * count + np.arange(count)

    def begin_product(self, granules: np.ndarray, group: int | None = None) -> None:
        """A matrix product that reads these 16-byte pieces is issued, by a warpgroup of blocks
        that are made of several."""
        index = self._granules(granules)
        if self.plane(self.copying, UNSIGNED[8])[index].any():
            raise Fault("a matrix product reads what an asynchronous copy may still write")
        behind = 0 if group is None else 1 << 12 + group
        if (self.plane(self.wrote, UNSIGNED[8])[index] & ~np.uint64(behind * ONES_16[8])).any():
            raise Fault("a matrix product reads what a warp wrote, with no barrier between")
        if self.plane(self.unfenced, UNSIGNED[8])[index].any():
            raise Fault("a matrix product reads what no fence.proxy.async made visible to it")
        np.add.at(self.multiplying.reshape(-1), granules.reshape(-1), np.int16(1))

    def end_product(self, granules: np.ndarray, warp_bits: int) -> None:
        """It is waited for: its reading counts as these warps'."""
        np.subtract.at(self.multiplying.reshape(-1), granules.reshape(-1), np.int16(1))
        every = ONES[8] if self.unit == 1 else ONES_16[8]
        self.plane(self.read, UNSIGNED[8])[self._granules(granules)] |= np.uint64(warp_bits * every)
        self.touched |= warp_bits * every

    def barrier(self, blocks: np.ndarray | slice) -> None:
        self.wrote[blocks] = 0
        self.read[blocks] = 0

    def barrier_of(self, blocks: np.ndarray, group: int, counts: np.ndarray) -> None:
        """A barrier of one warpgroup's warps alone, which has been at `counts` before."""
        warps, before = 0xF << 4 * group, 1 << 12 + group
        if not self.touched & warps * ONES_16[8]:
            return
        for plane, since in ((self.wrote, self.wrote_at), (self.read, self.read_at)):
            for block, count in zip(blocks, counts, strict=True):
                of_block = plane[block]
                touched = (of_block & warps) != 0
                since[group, block][touched.reshape(-1, 16).any(1)] = count
                of_block |= np.where(touched, before, 0).astype(np.uint16)
                of_block &= np.uint16(~warps & 0xFFFF)
        if len(blocks) == len(self.data):
            self.touched &= ~(warps * ONES_16[8])

    def fence(self, blocks: np.ndarray | slice, group: int | None = None) -> None:
        """What all warps of these blocks, or of a warpgroup of theirs, wrote is visible to matrix
        products and TMA from now on."""
        if group is None:
            self.unfenced[blocks] = 0
        else:
            self.unfenced[blocks] &= np.uint16(~(0xF << 4 * group) & 0xFFFF)
