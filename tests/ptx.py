"""Runs what numba-cuda compiles kernels to: an interpreter of PTX, with a block's threads as the lanes of NumPy arrays.

The simulator (lockstep.py) takes Python's word for what an intrinsic means. Here it is the compiled code that counts:
`install` puts the interpreter where kernels would be launched, and NumPy's arrays where CuPy's would be. As a script it
holds single layers to the oracle, in a process of its own, for the simulator cannot be switched off
(tests/test_cuda_compiled.py):

    python tests/ptx.py             # prints a line for each layer
    python tests/ptx.py --short     # a few of them

Threads are run by the least program counter first, so those that diverge join again later. Asynchronous copies land
when they are waited for. What an instruction does is from the PTX ISA; one that is unknown here is an error.
"""

import functools
import os
import re
import sys

import numpy as np

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "0")

_SHARED, _GLOBAL = 1 << 24, 1 << 40  # where these memories begin; shared addresses fit 32 bits
_TYPES = {"f32": np.float32, "f64": np.float64, "s16": np.int16, "s32": np.int32, "s64": np.int64, "u8": np.uint8,
          "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "equ": lambda a, b: ~(a < b) & ~(a > b), "neu": lambda a, b: ~(a == b),
            "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
            "geu": lambda a, b: ~(a < b)}
_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": None, "rem": None, "max": np.fmax,
           "min": np.fmin, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_UNARY = {"abs": np.abs, "neg": np.negative, "not": np.invert, "rcp": np.reciprocal, "sqrt": np.sqrt}
_TO_INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TF32 = np.uint32(0xFFFFE000)


class Program:
    """An entry of PTX, parsed."""

    def __init__(self, text):
        text = re.sub(r"//[^\n]*", "", text)
        self.shared, at = {}, _SHARED
        for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", text):
            at = -(-at // int(align)) * int(align)
            self.shared[name], at = at, at + int(size)
        self.shared_bytes = at - _SHARED
        parameters, body = re.search(r"\.visible\s+\.entry\s+\w+\((.*?)\)[^{]*\{(.*)\}", text, re.DOTALL).groups()
        self.parameters = re.findall(r"\.param\s+\.\w+\s+(\w+)", parameters)
        body = re.sub(r"\{\.reg \.\w+ \w+;(.*?)\}\s*\n", r"\1\n", body)  # registers of inline assembly
        self.code, self.labels, operand = [], {}, r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+"
        for statement in body.replace(":", ":;").split(";"):
            words = statement.strip()
            if words.endswith(":"):
                self.labels[words[:-1]] = len(self.code)
            elif words and not words.startswith("."):
                guard, opcode, operands = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.]+)\s*(.*)", words, re.DOTALL).groups()
                self.code.append((guard, opcode.split("."), [word.strip() for word in re.findall(operand, operands)]))


class _Block:
    def __init__(self, program, memory, arguments, block, blocks, threads):
        self.program, self.memory, self.count = program, memory, threads
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        self.shared = np.full(-(-program.shared_bytes // 8) * 8, 0xFF, np.uint8)  # NaN
        self.registers = {}
        self.special = {"%tid.x": np.arange(threads), "%ctaid.x": block, "%ntid.x": threads, "%nctaid.x": blocks}
        self.groups = [[]]

    def run(self):
        at, waiting = np.zeros(self.count, np.int64), np.zeros(self.count, bool)
        alive = np.ones(self.count, bool)
        while alive.any():
            if waiting[alive].all():
                waiting[:] = False
            ready = alive & ~waiting
            here = at[ready].min()
            mask = ready & (at == here)
            guard, opcode, operands = self.program.code[here]
            at[mask] += 1
            if guard:
                holds = self.registers[guard.lstrip("!")]
                mask = mask & (~holds if guard.startswith("!") else holds)
            match opcode:
                case ["bra", *_]:
                    at[mask] = self.program.labels[operands[0]]
                case ["ret"]:
                    alive &= ~mask
                case ["bar", "sync"]:
                    waiting |= mask
                case _ if mask.any():
                    with np.errstate(all="ignore"):
                        self.do(opcode, operands, mask)
        assert not any(self.groups), "copies that nobody waited for"

    # -- Operands

    def get(self, operand, kind):
        if operand.startswith(("%", "p", "other")) and operand in self.registers:
            value = self.registers[operand]
            wanted = np.dtype(kind)
            if value.dtype == bool or value.dtype.itemsize == wanted.itemsize:
                return value if value.dtype == bool else value.view(kind)
            return value.astype(f"u{wanted.itemsize}").view(kind)
        if operand in self.special:
            return np.full(self.count, self.special[operand]).astype(kind)
        if operand in self.program.shared:
            number = self.program.shared[operand]
        elif operand.startswith("0f"):
            number = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
        elif operand.startswith("0d"):
            number = np.array(int(operand[2:], 16), np.uint64).view(np.float64)
        else:
            number = int(operand, 0)
        if not isinstance(number, int):
            return np.full(self.count, number, kind)
        bits = 8 * np.dtype(kind).itemsize
        return np.full(self.count, number % (1 << bits), f"u{bits // 8}").view(kind)

    def put(self, register, value, mask):
        value = np.broadcast_to(value, self.count)
        raw = value if value.dtype == bool else np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        old = self.registers.get(register)
        if old is None or old.dtype != raw.dtype:
            old = np.zeros(self.count, raw.dtype)
        self.registers[register] = np.where(mask, raw, old)

    def place(self, operand):
        """Addresses of [register + number]."""
        base, _, offset = operand.strip("[]").partition("+")
        address = self.get(base.strip(), np.uint64)
        return address + np.uint64(int(offset or 0) % (1 << 64))

    def bytes_at(self, address, kind, mask):
        """(memory as elements of a type, indices) of the threads of the mask, all in one memory."""
        address, size = address[mask], np.uint64(np.dtype(kind).itemsize)
        is_shared = bool(address[0] < _GLOBAL)
        memory, begin = (self.shared, _SHARED) if is_shared else (self.memory, _GLOBAL)
        offsets = address - np.uint64(begin)
        assert (offsets % size == 0).all()
        assert (offsets + size <= len(memory)).all(), "beyond all arrays"
        return memory[:len(memory) // int(size) * int(size)].view(kind), (offsets // size).astype(np.int64)

    # -- Instructions

    def do(self, opcode, operands, mask):
        name, kind = opcode[0], _TYPES.get(opcode[-1])
        first = operands[0] if operands else ""
        match opcode:
            case ["ld", "param", *_]:
                self.put(first, np.array(self.arguments[operands[1].strip("[]").partition("+")[0]]).astype(kind), mask)
            case ["ld", _, *rest]:
                targets, address = first.strip("{}").split(","), self.place(operands[1])
                for i, target in enumerate(targets):
                    numbers, at = self.bytes_at(address + np.uint64(i * np.dtype(kind).itemsize), kind, mask)
                    value = np.zeros(self.count, kind)
                    value[mask] = numbers[at]
                    self.put(target.strip(), value.astype(np.uint16) if kind is np.uint8 else value, mask)
                assert "v4" not in rest or (address[mask] % np.uint64(16) == 0).all()
            case ["st", *_]:
                address = self.place(first)
                for i, source in enumerate(operands[1].strip("{}").split(",")):
                    numbers, at = self.bytes_at(address + np.uint64(i * np.dtype(kind).itemsize), kind, mask)
                    numbers[at] = self.get(source.strip(), kind)[mask]
            case ["cp", "async", "commit_group"]:
                self.groups.append([])
            case ["cp", "async", "wait_group"]:
                while len(self.groups) > int(first) + 1:
                    for to, source, held in self.groups.pop(0):
                        numbers, at = self.bytes_at(to, np.float32, held)
                        numbers[at] = source
            case ["cp", "async", *_]:
                self.copy(operands, mask)
            case ["mma", *_]:
                self.multiply(operands, mask)
            case ["mov", "pred"]:
                self.put(first, self.predicate(operands[1]), mask)
            case ["cvta" | "mov", *_] if not first.startswith("{"):
                self.put(first, self.get(operands[1], kind), mask)
            case ["mov", "b64"]:  # {low, high} of 64 bits
                for i, half in enumerate(first.strip("{}").split(",")):
                    self.put(half.strip(), (self.get(operands[1], np.uint64) >> np.uint64(32 * i)).astype(np.uint32),
                             mask)
            case ["setp", comparison, _]:
                self.put(first, _COMPARE[comparison](self.get(operands[1], kind), self.get(operands[2], kind)), mask)
            case ["selp", _]:
                self.put(first, np.where(self.predicate(operands[3]), self.get(operands[1], kind),
                                         self.get(operands[2], kind)), mask)
            case ["and" | "or" | "xor" | "not", "pred"]:
                values = [self.predicate(operand) for operand in operands[1:]]
                self.put(first, ~values[0] if name == "not" else _BINARY[name](*values), mask)
            case ["cvt", *how, to, origin]:
                value = self.get(operands[1], _TYPES[origin])
                if how and (rounded := _TO_INTEGERS.get(how[0])):
                    value = rounded(value)
                self.put(first, value.astype(_TYPES[to]), mask)
            case ["mul" | "mad", "wide", _]:
                wide = np.int64 if kind is np.int32 else np.uint64
                value = self.get(operands[1], kind).astype(wide) * self.get(operands[2], kind).astype(wide)
                self.put(first, value + self.get(operands[3], wide) if name == "mad" else value, mask)
            case ["mad", "lo", _]:
                self.put(first, self.get(operands[1], kind) * self.get(operands[2], kind) + self.get(operands[3], kind),
                         mask)
            case ["fma", *_]:
                a, b, c = (self.get(operand, kind).astype(np.float64) for operand in operands[1:])
                self.put(first, (a * b + c).astype(kind), mask)
            case ["abs" | "neg" | "not" | "rcp" | "sqrt", *_]:
                self.put(first, _UNARY[name](self.get(operands[1], kind)).astype(kind), mask)
            case ["shl" | "shr", _]:
                value, by = self.get(operands[1], kind), self.get(operands[2], np.uint32)
                self.put(first, (np.left_shift if name == "shl" else np.right_shift)(value, by.astype(kind)), mask)
            case [("div" | "rem") as which, *_]:
                a, b = self.get(operands[1], kind), self.get(operands[2], kind)
                if kind in (np.float32, np.float64):
                    self.put(first, a / b, mask)
                else:
                    b = np.where(mask & (b != 0), b, 1).astype(kind)
                    quotient = np.abs(a) // np.abs(b) * np.sign(a).astype(kind) * np.sign(b).astype(kind)
                    self.put(first, (quotient if which == "div" else a - quotient * b).astype(kind), mask)
            case [("add" | "sub" | "mul" | "max" | "min" | "and" | "or" | "xor") as which, *_]:
                self.put(first, _BINARY[which](self.get(operands[1], kind), self.get(operands[2], kind)).astype(kind),
                         mask)
            case _:
                raise AssertionError(f"unknown instruction {'.'.join(opcode)} {', '.join(operands)}")

    def predicate(self, operand):
        return np.full(self.count, int(operand) != 0) if re.fullmatch(r"-?\d+", operand) else self.registers[operand]

    def copy(self, operands, mask):
        """4 or 16 bytes, of which the last operand, if there is one, says how many are read; the rest are zeros."""
        to, source, size = self.place(operands[0]), self.place(operands[1]), int(operands[2])
        read = self.get(operands[3], np.uint32) if len(operands) > 3 else np.full(self.count, size)
        assert (to[mask] % np.uint64(size) == 0).all()
        for i in range(0, size, 4):
            value, held = np.zeros(self.count, np.float32), mask & (read > i)
            if held.any():
                numbers, at = self.bytes_at(source + np.uint64(i), np.float32, held)
                value[held] = numbers[at]
            self.groups[-1].append((to + np.uint64(i), value[mask], mask))

    def multiply(self, operands, mask):
        """d = a b + c for each warp, with the fragments of mma.m16n8k8."""
        assert mask.all()
        lanes = (self.count // 32, 8, 4)  # warp, lane // 4, lane % 4

        def matrix(rows, columns, parts):
            full = np.zeros((lanes[0], rows, columns), np.float32)
            for register, index in parts:
                full[index] = self.get(register, np.float32).reshape(lanes)
            return full

        d, a, b, c = ([word.strip() for word in operand.strip("{}").split(",")] for operand in operands)
        low, high, every, odd = slice(0, 8), slice(8, 16), slice(0, None, 2), slice(1, None, 2)
        of_a = [(a[0], np.s_[:, low, :4]), (a[1], np.s_[:, high, :4]), (a[2], np.s_[:, low, 4:]),
                (a[3], np.s_[:, high, 4:])]
        of_c = [np.s_[:, low, every], np.s_[:, low, odd], np.s_[:, high, every], np.s_[:, high, odd]]
        first = (matrix(16, 8, of_a).view(np.uint32) & _TF32).view(np.float32).astype(np.float64)
        second = matrix(8, 8, [(b[0], np.s_[:, :, :4]), (b[1], np.s_[:, :, 4:])])  # position by depth
        second = (second.view(np.uint32) & _TF32).view(np.float32).astype(np.float64)
        result = (matrix(16, 8, list(zip(c, of_c, strict=True))) + first @ second.swapaxes(1, 2)).astype(np.float32)
        for register, index in zip(d, of_c, strict=True):
            self.put(register, np.ascontiguousarray(result[index]).reshape(-1), mask)


# ---- In the place of a GPU -------------------------------------------------------------------------------------------


@functools.cache
def _program(kernel, kinds):
    from numba import cuda
    return Program(cuda.compile_ptx(kernel.py_func, kinds, cc=(9, 0))[0])


def _launch(kernel, blocks, threads, *arguments):
    """Arrays are copied into one memory, with room between them that no kernel may read, and back."""
    from gpu_resources import _type_of
    program, flat, at, places = _program(kernel, tuple(map(_type_of, arguments))), [], 256, []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            places.append((argument, at))
            flat += [0, 0, argument.size, argument.itemsize, _GLOBAL + at, *argument.shape, *argument.strides]
            at += -(-argument.nbytes // 256) * 256
        else:
            flat.append(argument)
    memory = np.full(at, 0xFF, np.uint8)
    parts = [(argument.reshape(-1).view(np.uint8), slice(begin, begin + argument.nbytes)) for argument, begin in places]
    for numbers, part in parts:
        memory[part] = numbers
    before = memory.copy()
    for block in range(blocks):
        _Block(program, memory, flat, block, blocks, threads).run()
    for numbers, part in parts:  # of arrays that overlap each brings back what was written through it
        changed = memory[part] != before[part]
        if changed.any():
            numbers[changed] = memory[part][changed]


def install():
    """Kernels are interpreted, whatever GPU is asked for."""
    from gpu_resources import as_if_on_a_device
    from numba.cuda import dispatcher

    from fastdtd import devices
    dispatcher.get_current_device = lambda: type("Chip", (), {"compute_capability": (9, 0)})
    dispatcher.CUDADispatcher.__getitem__ = lambda kernel, shape: functools.partial(_launch, kernel, *shape[:2])
    device = as_if_on_a_device()
    devices._gpus = lambda _, precision: devices.Devices(device, (0,), precision)


def main(short):
    """Layers whose kernels have the compiled code that the simulator knows nothing of."""
    from pathlib import Path
    sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parent)]
    import gpu_resources
    from layers import BOX, KEPT, NON_NEGATIVE, REAL, conv, dense
    from single_layers import check

    from fastdtd.explainer import Explainer
    from fastdtd.model import Model, Preprocessing
    install()
    convolutions = KEPT["conv2d"].examples | {
        "128 rows, in planes": conv((16, 2, 3), 70, (2, 1), padding=(1, 0, 0, 0)),
        "64 rows backward, in planes": conv((40, 2, 2), 16, (1, 2), padding=(0, 0, 0, 1)),
    }
    for name, rule, domain, precision in (
            ("3 to 5", "z+", NON_NEGATIVE, "tf32"), ("small", "zB", BOX, "fp32")) if short else (
            ("channels by the sixteen, groups", "z+", NON_NEGATIVE, "tf32"),
            ("128 rows, in planes", "z+", NON_NEGATIVE, "tf32"),
            ("64 rows backward, in planes", "z+", REAL, "tf32"), ("groups of many", "z+", NON_NEGATIVE, "3xtf32"),
            ("several panels of outputs and inputs", "zB", BOX, "tf32"),
            ("channels by the sixteen", "z+", REAL, "fp32"),
            ("depthwise with a multiplier", "z+", NON_NEGATIVE, "fp32"), ("stride and dilation", "w2", BOX, "fp32")):
        check(convolutions[name], rule, domain, device="cuda", precision=precision,
              tolerance=5e-4 if precision == "tf32" else 1e-5)
        print(name, rule, domain, precision, flush=True)
    for rule, domain in (("zB", BOX), ("z+", NON_NEGATIVE), ("z+", REAL), ("w2", BOX))[:1 if short else None]:
        check(dense(3, 5) if short else dense(70, 21), rule, domain, device="cuda", precision="fp32")
        print("dense", rule, domain, flush=True)
    for kind, rule in (("max_pool2d", "winner"), ("average_pool2d", "z+")):
        check(KEPT[kind].examples["padded"], rule, NON_NEGATIVE, device="cuda", precision="fp32")
        print(kind, flush=True)
    if short:
        return
    graph = gpu_resources.every_layer(6, 8, 4, 6, 2)
    batch = np.random.default_rng(1).uniform(-1, 2, (2, *graph.input_shape)).astype(np.float32)
    for rules in gpu_resources.rules_of_every_kind():
        expected, e = (Explainer(Model(graph, Preprocessing(None)), rules, **options)(batch) for options in (
            {"threads": 1}, {"device": "cuda", "precision": "fp32"}))
        for ours, theirs in ((e.output, expected.output), (e.relevance, expected.relevance),
                             (e.at("few"), expected.at("few"))):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
        assert e.relevance.any()
        for name, absorbed in expected.ledger.items():
            np.testing.assert_allclose(e.ledger[name], absorbed, atol=1e-5 * np.abs(expected.output).max())
        print("every layer", rules, flush=True)


if __name__ == "__main__":
    main("--short" in sys.argv)
