"""Instructions that Numba does not offer: tensor cores, copies that go on by themselves, four values at a time.

Besides, loads and stores here take an index as it is. Numba's own check that it is not negative, in 64 bits, which in
the loops of a product takes longer than the product. Indices of shared memory, and what is compared, are 32 bits.

In Numba's simulator each is the Python that it means. There mma cuts its sums off, the worst that a tensor core may do;
and what a copy brings is there as late as can be, or at once if copies_are_late is set to False: a kernel that is right
in both waits for what it reads, and overwrites nothing that is still to be read (tests/lockstep.py).

PTX ISA: mma.m16n8k8 with .tf32, cp.async, div.full.
"""

import numpy as np
from fastdtd.kernels.cuda.jit import part
from fastdtd.kernels.scalar import ZERO
from numba import config, cuda

copies_are_late = True

if config.ENABLE_CUDASIM:
    ALIGNED = None
    _lanes = np.zeros((256, 10), np.float32)  # what each thread of a block brings to mma
    begun = {}  # thread -> groups of copies that it has not waited for

    def address_of(array, begin):
        return array, begin

    def load(array, begin, offset):
        return array[begin + offset]

    def load_inside(address, offset, inside):
        array, begin = address
        return array[begin + offset] if inside else ZERO

    def load_four(array, begin, offset):
        assert begin % 4 == offset % 4 == 0
        return tuple(array[begin + offset:begin + offset + 4])

    def store(array, begin, offset, value):
        array[begin + offset] = value

    def load_shared(tile, at):
        return tile[at]

    def load_four_shared(tile, at):
        assert at % 4 == 0
        return tuple(tile[at:at + 4])

    def store_shared(tile, at, value):
        tile[at] = value

    def store_four_shared(tile, at, four):
        assert at % 4 == 0
        tile[at:at + 4] = four

    def low_half(number):
        return int(number) & 0xFFFFFFFF

    def high_half(number):
        return int(number) >> 32

    def is_below(number, limit):
        return 0 <= number < limit

    def split(number, size):
        return number // size, number % size

    def divide(a, b):
        return a / b

    def truncate(number):
        return (np.float32(number).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def round_for_mma(number):
        return (np.float32(number).view(np.uint32) + np.uint32(0x1000)).view(np.float32)

    @part
    def mma(w0, w1, w2, w3, b0, b1, c0, c1, c2, c3):
        t = cuda.threadIdx.x
        _lanes[t] = w0, w1, w2, w3, b0, b1, c0, c1, c2, c3
        cuda.syncthreads()
        cut = (_lanes[t & ~31:(t | 31) + 1, :6].view(np.uint32) &
               np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        g, q = (t & 31) >> 2, t & 3
        w, b = cut[4 * g:4 * g + 4, :4], [cut[4 * pointer:4 * pointer + 4, 4:] for pointer in (2 * q, 2 * q + 1)]
        sums = _lanes[t, 6:] + np.array([(w[:, row::2] * values).sum() for row in (0, 1) for values in b])
        nearest = sums.astype(np.float32)
        cuda.syncthreads()
        return tuple(np.where(abs(nearest) > abs(sums), np.nextafter(nearest, ZERO), nearest))

    @part
    def copy_later(tile, at, address, offset, inside):
        _begin_copy(cuda.threadIdx.x, tile, at, np.array([load_inside(address, offset, inside)]))

    @part
    def copy_four_later(tile, at, source, begin, offset):
        assert at % 4 == begin % 4 == offset % 4 == 0
        _begin_copy(cuda.threadIdx.x, tile, at, np.array(source[begin + offset:begin + offset + 4]))

    def _begin_copy(thread, tile, at, values):
        if copies_are_late:
            begun.setdefault(thread, [[]])[-1].append((tile, at, values))
        else:
            tile[at:at + len(values)] = values

    @part
    def end_copies():
        begun.setdefault(cuda.threadIdx.x, [[]]).append([])

    @part
    def await_copies():
        _await(cuda.threadIdx.x, 1)

    @part
    def await_all_copies():
        _await(cuda.threadIdx.x, 0)

    def _await(thread, groups_left):
        groups = begun.setdefault(thread, [[]])
        while len(groups) > groups_left + 1:
            for tile, at, values in groups.pop(0):
                tile[at:at + len(values)] = values

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
    from numba.cuda.types import UniTuple, boolean, float32, int32, int64, uint64, void

    ALIGNED = 16
    _F32, _I32, _I64, _VOID = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.VoidType()
    _QUAD = ir.LiteralStructType([_F32] * 4)

    def _instruction(signature, emit):
        """What an @intrinsic returns; emit(builder, pointer_of, arguments) makes its code, pointer_of(i) is argument
        i's memory."""
        def codegen(context, builder, signature, arguments):
            def pointer_of(i):
                return context.make_array(signature.args[i])(context, builder, arguments[i]).data

            result = emit(builder, pointer_of, arguments)
            return context.get_dummy_value() if result is None else result

        return signature, codegen

    def _narrow(builder, number):
        width = number.type.width
        return builder.trunc(number, _I32) if width > 32 else builder.sext(number, _I32) if width < 32 else number

    def _offset_pointer(builder, pointer, begin, offset):
        """pointer + begin + offset, added one after the other: what does not change in a loop leaves it."""
        begin, offset = (builder.sext(number, _I64) if number.type.width < 64 else number for number in (begin, offset))
        return builder.gep(builder.gep(pointer, [begin]), [offset])

    def _shared(builder, pointer, at):
        """The address of a value in shared memory. LLVM would add in 64 bits, of which such addresses have no use."""
        begin = builder.ptrtoint(builder.addrspacecast(pointer, _F32.as_pointer(3)), _I32)
        return builder.add(begin, builder.shl(_narrow(builder, at), ir.Constant(_I32, 2)))

    def _asm(builder, result, kinds, text, constraints, arguments, side_effect=False):
        return builder.asm(ir.FunctionType(result, kinds), text, constraints, arguments, side_effect=side_effect)

    @intrinsic
    def load(typing_context, array, begin, offset):
        """array[begin + offset]"""
        return _instruction(array.dtype(array, begin, offset),
                            lambda builder, pointer_of,
                            arguments: builder.load(_offset_pointer(builder, pointer_of(0), *arguments[1:])))

    @intrinsic
    def address_of(typing_context, array, begin):
        """The address of array[begin], for load_inside and copy_later. How it came about is hidden from LLVM, which
        would otherwise add begin anew to each offset."""
        return _instruction(uint64(array, begin), lambda builder, pointer_of, arguments: _asm(
            builder, _I64, [_I64], "mov.b64 $0, $1;", "=l,l",
            [builder.ptrtoint(_offset_pointer(builder, pointer_of(0), arguments[1], ir.Constant(_I64, 0)), _I64)]))

    def _float_address(builder, address, offset):
        """One instruction, which LLVM would not find."""
        return _asm(builder, _I64, [_I32, _I64], "mad.wide.s32 $0, $1, 4, $2;", "=l,r,l",
                    [_narrow(builder, offset), address])

    @intrinsic
    def load_inside(typing_context, address, offset, inside):
        """The float32 so many after an address, 0 if not `inside`, without a branch. The kernel may not write it."""
        return _instruction(float32(uint64, offset, boolean), lambda builder, _, arguments: _asm(
            builder, _F32, [_I64, _I32],
            "{.reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.f32 $0, [$1];}", "=f,l,r",
            [_float_address(builder, *arguments[:2]), builder.zext(arguments[2], _I32)]))

    @intrinsic
    def load_four(typing_context, array, begin, offset):
        """array[begin + offset:begin + offset + 4]; aligned to four."""
        def emit(builder, pointer_of, arguments):
            pointer = _offset_pointer(builder, pointer_of(0), *arguments[1:])
            four = builder.load(builder.bitcast(pointer, ir.VectorType(_F32, 4).as_pointer()))
            four.align = 16
            return cgutils.pack_array(builder, [builder.extract_element(four, ir.Constant(_I32, i)) for i in range(4)])

        return _instruction(UniTuple(float32, 4)(array, begin, offset), emit)

    @intrinsic
    def store(typing_context, array, begin, offset, value):
        """array[begin + offset] <- value"""
        return _instruction(void(array, begin, offset, array.dtype), lambda builder, pointer_of, arguments: (
            builder.store(arguments[3], _offset_pointer(builder, pointer_of(0), *arguments[1:3])), None)[1])

    @intrinsic
    def load_shared(typing_context, tile, at):
        """tile[at]"""
        return _instruction(float32(tile, at), lambda builder, pointer_of, arguments: _asm(
            builder, _F32, [_I32], "ld.shared.f32 $0, [$1];", "=f,r,~{memory}",
            [_shared(builder, pointer_of(0), arguments[1])], True))

    @intrinsic
    def load_four_shared(typing_context, tile, at):
        """tile[at:at + 4]; aligned to four."""
        def emit(builder, pointer_of, arguments):
            four = _asm(builder, _QUAD, [_I32], "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", "=f,=f,=f,=f,r,~{memory}",
                        [_shared(builder, pointer_of(0), arguments[1])], True)
            return cgutils.pack_array(builder, [builder.extract_value(four, i) for i in range(4)])

        return _instruction(UniTuple(float32, 4)(tile, at), emit)

    @intrinsic
    def store_shared(typing_context, tile, at, value):
        """tile[at] <- value"""
        return _instruction(void(tile, at, float32), lambda builder, pointer_of, arguments: (_asm(
            builder, _VOID, [_I32, _F32], "st.shared.f32 [$0], $1;", "r,f,~{memory}",
            [_shared(builder, pointer_of(0), arguments[1]), arguments[2]], True), None)[1])

    @intrinsic
    def store_four_shared(typing_context, tile, at, four):
        """tile[at:at + 4] <- four; aligned to four."""
        def emit(builder, pointer_of, arguments):
            _asm(builder, _VOID, [_I32] + [_F32] * 4, "st.shared.v4.f32 [$0], {$1,$2,$3,$4};", "r,f,f,f,f,~{memory}",
                 [_shared(builder, pointer_of(0), arguments[1]),
                  *(builder.extract_value(arguments[2], i) for i in range(4))], True)

        return _instruction(void(tile, at, UniTuple(float32, 4)), emit)

    @intrinsic
    def low_half(typing_context, number):
        """The low 32 bits of an int64."""
        return _half("{.reg .b32 other; mov.b64 {$0, other}, $1;}")

    @intrinsic
    def high_half(typing_context, number):
        """The high 32 bits of an int64, with their sign."""
        return _half("{.reg .b32 other; mov.b64 {other, $0}, $1;}")

    def _half(text):
        """LLVM's own shift would be joined with what is added to it, in 64 bits."""
        return _instruction(int32(int64), lambda builder, _,
                            arguments: _asm(builder, _I32, [_I64], text, "=r,l", arguments))

    @intrinsic
    def is_below(typing_context, number, limit):
        """0 <= number < limit, in 32 bits"""
        return _instruction(boolean(number, limit), lambda builder, _, arguments: builder.icmp_unsigned(
            "<", *(_narrow(builder, argument) for argument in arguments)))

    @intrinsic
    def split(typing_context, number, size):
        """(number // size, number % size), neither negative and in 32 bits: in 64 they take a hundred instructions."""
        def emit(builder, _, arguments):
            number, size = (_narrow(builder, argument) for argument in arguments)
            quotient = builder.udiv(number, size)
            rest = builder.sub(number, builder.mul(quotient, size))
            return cgutils.pack_array(builder, [builder.zext(value, _I64) for value in (quotient, rest)])

        return _instruction(UniTuple(int64, 2)(number, size), emit)

    @intrinsic
    def divide(typing_context, a, b):
        """a / b to the last bit but one, in a third of the instructions."""
        return _instruction(float32(float32, float32), lambda builder, _, arguments: _asm(
            builder, _F32, [_F32] * 2, "div.full.f32 $0, $1, $2;", "=f,f,f", arguments))

    @intrinsic
    def truncate(typing_context, number):
        """The eleven leading bits, as tensor cores read a value."""
        return _instruction(float32(float32), lambda builder, _, arguments: builder.bitcast(
            builder.and_(builder.bitcast(arguments[0], _I32), ir.Constant(_I32, 0xFFFFE000)), _F32))

    @intrinsic
    def round_for_mma(typing_context, number):
        """The nearest number of eleven bits once mma cuts it off; without it, sums of positive values are too small."""
        return _instruction(float32(float32), lambda builder, _, arguments: builder.bitcast(
            builder.add(builder.bitcast(arguments[0], _I32), ir.Constant(_I32, 0x1000)), _F32))

    @intrinsic
    def mma(typing_context, w0, w1, w2, w3, b0, b1, c0, c1, c2, c3):
        """c + w b, by a warp together (microkernel.py says which lane has what)."""
        def emit(builder, _, arguments):
            factors = [builder.bitcast(factor, _I32) for factor in arguments[:6]]
            product = _asm(builder, _QUAD, [_I32] * 6 + [_F32] * 4,
                           "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                           "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
                           "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*factors, *arguments[6:]])
            return cgutils.pack_array(builder, [builder.extract_value(product, i) for i in range(4)])

        return _instruction(UniTuple(float32, 4)(*[float32] * 10), emit)

    @intrinsic
    def copy_later(typing_context, tile, at, address, offset, inside):
        """tile[at] <- the float32 so many after an address, or 0 if not `inside`; done once await_copies says so."""
        def emit(builder, pointer_of, arguments):
            _asm(builder, _VOID, [_I32, _I64, _I32], "cp.async.ca.shared.global [$0], [$1], 4, $2;", "r,l,r,~{memory}",
                 [_shared(builder, pointer_of(0), arguments[1]), _float_address(builder, *arguments[2:4]),
                  builder.select(arguments[4], ir.Constant(_I32, 4), ir.Constant(_I32, 0))], True)

        return _instruction(void(tile, at, uint64, offset, boolean), emit)

    @intrinsic
    def copy_four_later(typing_context, tile, at, source, begin, offset):
        """tile[at:at + 4] <- source[begin + offset:begin + offset + 4], both aligned to four."""
        def emit(builder, pointer_of, arguments):
            _asm(builder, _VOID, [_I32, _I64], "cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}",
                 [_shared(builder, pointer_of(0), arguments[1]),
                  builder.ptrtoint(_offset_pointer(builder, pointer_of(2), *arguments[3:]), _I64)], True)

        return _instruction(void(tile, at, source, begin, offset), emit)

    @intrinsic
    def end_copies(typing_context):
        """All copies begun since the last such call are one group."""
        return _instruction(void(), lambda builder, _, arguments: (
            _asm(builder, _VOID, [], "cp.async.commit_group;", "~{memory}", [], True), None)[1])

    @intrinsic
    def await_copies(typing_context):
        """All of the calling thread's groups but the last one are there."""
        return _await(1)

    @intrinsic
    def await_all_copies(typing_context):
        """All of the calling thread's groups are there."""
        return _await(0)

    def _await(groups_left):
        return _instruction(void(), lambda builder, _, arguments: (
            _asm(builder, _VOID, [], f"cp.async.wait_group {groups_left};", "~{memory}", [], True), None)[1])
