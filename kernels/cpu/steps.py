"""Lists of kernel calls that native code walks through, alone or together with other threads.

A call from Python costs five to ten microseconds, and threads that come back to Python contend for the interpreter's
lock, where the operating system needs 20 to 50 to wake the next one: as long as many a kernel takes. So a plan's calls
are bound once. A bound call is an address of code and one of memory that holds the arguments; `run_steps` needs no
interpreter to make it.

Threads that run a plan together wait at a barrier after each step: a counter in memory, which every arrival increments.
"""

import hashlib
import os

import llvmlite.binding as llvm
import numpy as np
from fastdtd.kernels.cpu.arrays import borrowed
from fastdtd.kernels.cpu.jit import ir_of, is_kept, kernel
from fastdtd.kernels.cpu.vector_code import F32, I32, I64
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

NO_STEP = -1  # among the steps that are wanted: workers meet at the barrier, and do nothing before
BROKEN = 1 << 62  # a counter that stands here or higher lets all threads go, and they stop
# Looks at the counter, of some 20 nanoseconds, before a waiting thread offers its processor to others, and before it
# goes back to Python, which makes it late: the interpreter's lock alone takes 70 microseconds to change hands.
_SPINS, _MAX_SPINS = 2_000, 400_000
_SIGNATURE = types.void(types.intp, types.intp, types.intp)

_bound = {}  # (kernel, types of its arguments) -> compiled function of (slots, first, last)


# ---- Binding ---------------------------------------------------------------------------------------------------------


def bind(function, arguments):
    """(address of code, slots): `run_steps` can make the call function(*arguments, first, last).

    slots (int64) holds addresses of the arrays among the arguments, which are to be C-contiguous; the caller keeps both
    alive. Others are integers, or floats, which arrive as float32.
    """
    kinds = tuple(map(kind_of, arguments))
    slots = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            slots += [argument.ctypes.data, *argument.shape]
        else:
            slots.append(number_slot(argument))
    return _address(_step(function, kinds)), np.array(slots, np.int64)


def table(calls):
    """What run_steps walks through, from calls that have `code`, `slots` (of `bind`), `first` and `last`."""
    return np.array([(call.code, call.slots.ctypes.data, call.first, call.last) for call in calls],
                    np.int64).reshape(-1, 4)


def steps_compiled():
    """What was bound in this process: (kernel, types of its arguments) -> compiled function."""
    return dict(_bound)


def kind_of(argument):
    """The type of a step's argument; that of an array is (dtype, number of axes), or follows from the array itself."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        argument = argument.dtype, argument.ndim
    if isinstance(argument, tuple):
        return types.Array(from_dtype(np.dtype(argument[0])), argument[1], "C")
    return types.float32 if isinstance(argument, float) else types.int64


def number_slot(argument):
    """What stands in a slot for an integer or a float."""
    return int(np.float32(argument).view(np.int32)) if isinstance(argument, float) else int(argument)


def step_ir(function, kinds, has_units=True):
    """(bitcode, name) of the function of (result, exception, slots, first, last) that makes a step's call, where
    jit.keep_ir() was called before; of a call without units, which ignores first and last."""
    return ir_of(_step(function, kinds, has_units).get_compile_result(_SIGNATURE))


def _step(function, kinds, has_units=True):
    if (function, kinds) not in _bound:
        arguments = _make_arguments(kinds)

        def step(slots, first, last):
            function(*arguments(slots), first, last)

        def call(slots, first, last):
            function(*arguments(slots))

        name = f"{function.py_func.__name__}-{hashlib.sha256(repr(kinds).encode()).hexdigest()[:8]}"
        _bound[function, kinds] = kernel(step if has_units else call, name, is_kept(function))
    return _bound[function, kinds]


def _address(step):
    result = step.get_compile_result(_SIGNATURE)
    return result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)


def _make_arguments(kinds):
    @intrinsic
    def arguments(typing_context, slots):
        def codegen(context, builder, signature, values):
            p_slots = builder.inttoptr(values[0], I64.as_pointer())
            at = iter(range(sum(1 + kind.ndim if isinstance(kind, types.Array) else 1 for kind in kinds)))

            def following():
                return builder.load(builder.gep(p_slots, [ir.Constant(I64, next(at))]))

            results = []
            for kind in kinds:
                if not isinstance(kind, types.Array):
                    bits = following()
                    results.append(builder.bitcast(builder.trunc(bits, I32), F32) if kind == types.float32 else bits)
                    continue
                address, shape = following(), [following() for _ in range(kind.ndim)]
                pointer = builder.inttoptr(address, context.get_value_type(kind.dtype).as_pointer())
                results.append(borrowed(context, builder, kind, pointer, shape))
            return context.make_tuple(builder, signature.return_type, results)

        return types.Tuple(kinds)(types.intp), codegen

    return arguments


# ---- Running ---------------------------------------------------------------------------------------------------------


@intrinsic
def _call(typing_context, address, slots, first, last):
    def codegen(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def _atomic_increment(typing_context, counter):
    """Adds one to the int64 at an address, in one indivisible step; returns what is there then."""
    def codegen(context, builder, signature, arguments):
        pointer, one = builder.inttoptr(arguments[0], I64.as_pointer()), ir.Constant(I64, 1)
        return builder.add(builder.atomic_rmw("add", pointer, one, "seq_cst"), one)

    return types.int64(types.intp), codegen


@intrinsic
def _atomic_load(typing_context, counter):
    """The int64 at an address, as the last thread that wrote it left it."""
    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def _pause(typing_context):
    """Lets a processor's other thread go on, where one is shared by two."""
    def codegen(context, builder, signature, arguments):
        if llvm.get_process_triple().startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_processor(typing_context):
    """To another thread that is ready to run, if there is one."""
    def codegen(context, builder, signature, arguments):
        if os.name == "posix":
            kind = ir.FunctionType(I32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@kernel
def run_steps(steps, wanted, progress, counter, workers):
    """Make the calls steps[i] for each i in wanted, as one of so many workers that wait at a barrier, `counter` (1,),
    after each.

    steps (S, 4) has addresses of code and slots, first and last of its units. progress (2,) is zero at first; where the
    others make this one wait for long, it returns False, so that the caller can give away the processor, and with the
    same progress it goes on. All int64.
    """
    p_counter = counter.ctypes.data
    while progress[0] < len(wanted):
        if progress[1] == 0:
            step = wanted[progress[0]]
            if step != NO_STEP:
                _call(steps[step, 0], steps[step, 1], steps[step, 2], steps[step, 3])
            if workers > 1:
                progress[1] = _atomic_increment(p_counter)
        if workers > 1:
            target = -(-progress[1] // workers) * workers
            spins, seen = 0, _atomic_load(p_counter)
            while seen < min(target, BROKEN):
                spins += 1
                _pause()
                if spins % _SPINS == 0:
                    _yield_processor()
                    if spins == _MAX_SPINS:
                        return False
                seen = _atomic_load(p_counter)
            if seen >= BROKEN:
                return True
        progress[0] += 1
        progress[1] = 0
    return True
