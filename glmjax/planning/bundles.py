"""Cycles of a compiled TPU kernel without a TPU: count the instruction bundles that would issue.

libtpu writes the final program of a kernel as text, one very long instruction word (a bundle) a
line; a bundle takes one cycle unless it waits. `execute` runs the scalar half of that program
(loop counters, branches, predicates, scalar memory) for given scalar-prefetch operands, and so
knows how often every bundle issues: loops, skipped blocks and grid steps are counted, not assumed.
What it does not know is waiting: for copies, memory and results of other units. The counts are
static figures, a lower bound of the cycles.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Value = int | bool | None  # None: not known, since a vector unit or an address decides it

# Where operands and scalar memory are put, far from all numbers a program counts with.
_OPERAND = 2**44
_MEMORY = 2**40

UNITS = (
    "MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU"
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One scalar instruction: registers and immediates as text, the guard as (sign, register)."""

    opcode: str
    destination: str
    operands: tuple[str, ...]
    guard: tuple[bool, str] | None
    otherwise: str | None
    """What a guarded instruction writes when its guard does not hold; None writes nothing."""


@dataclass(frozen=True)
class Program:
    """A kernel as bundles of scalar instructions, with the use that each makes of the units."""

    bundles: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]
    """Bundle at which each region, the target of branches, starts."""
    operand_layouts: dict[int, tuple[str, tuple[int, ...]]]
    """Element type and shape of each operand, by its number."""
    usage: np.ndarray
    """Slots of each unit that each bundle fills, int [bundles, units]."""
    capacity: np.ndarray
    """Slots of each unit in a bundle, int [units]."""


@dataclass(frozen=True)
class Counts:
    """How often the bundles of a program issued on one core."""

    issued: np.ndarray
    """Times that each bundle issued, int [bundles]."""
    program: Program

    @property
    def cycles(self) -> int:
        """Bundles issued."""
        return int(self.issued.sum())

    def slots(self, unit: str) -> int:
        """Slots of a unit that were filled; over `capacity` it is the cycles the unit needs."""
        return int(self.issued @ self.program.usage[:, UNITS.index(unit)])

    def busiest(self) -> tuple[str, float]:
        """The unit whose slots are fullest, and which share of them is filled."""
        filled = (self.issued @ self.program.usage) / (self.program.capacity * self.cycles)
        return UNITS[int(filled.argmax())], float(filled.max())


def read_program(folder: Path, kernel: str) -> Program:
    """The program of the kernel of that name among the files that libtpu wrote.

    Raises:
        FileNotFoundError: no file, or more than one, belongs to the kernel.
    """
    # Differentiation wraps names: transpose_jvp_name__.
    final = re.compile(rf"\d+-([a-z]+_)*{re.escape(kernel)}_*(\.\d+)*-\d+-final_bundles\.txt")
    files = [file for file in folder.iterdir() if final.fullmatch(file.name)]
    if len(files) != 1:
        raise FileNotFoundError(f"{len(files)} programs named {kernel!r} in {folder}, wanted one")
    stem = re.sub(r"-\d+-final_bundles\.txt", "", files[0].name)
    (usage,) = folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
    return parse_program(files[0].read_text(), usage.read_text())


def parse_program(bundles_text: str, usage_text: str) -> Program:
    """A program from the text of its bundles and of their use of the units."""
    bundles: list[tuple[Instruction, ...]] = []
    labels: dict[str, int] = {}
    layouts: dict[int, tuple[str, tuple[int, ...]]] = {}
    lines = bundles_text.split("= control target key end", 1)[1]
    for text in re.split(r"\n(?= *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2}:| *:))", lines)[1:]:
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", text):
            labels[f"$region{region}"] = len(bundles)
        for layout in re.finditer(r"\[shape: (\w+)\[([\d,]*)\], index: (\d+)", text):
            type, shape, index = layout.groups()
            layouts[int(index)] = type, tuple(int(size) for size in shape.split(",") if size)
        text = text.replace("<no memory space>", "register")
        body = _without_comments(text).split("{", 1)[1].rsplit("}", 1)[0]
        parsed = [_parse_instruction(part.strip()) for part in body.split(";;")]
        bundles.append(tuple(instruction for instruction in parsed if instruction))
    head, table = usage_text.split("== UTILIZATION:")
    usage = np.array([row.split() for row in table.strip().splitlines()], np.int64)
    capacity = np.array(head.strip().splitlines()[-1].split(), np.int64)
    return Program(tuple(bundles), labels, layouts, usage[: len(bundles)], capacity)


def _without_comments(text: str) -> str:
    """Text without its comments, which may be nested."""
    kept, depth = [], 0
    for part in re.split(r"(/\*|\*/)", text):
        if part == "/*":
            depth += 1
        elif part == "*/":
            depth -= 1
        elif depth == 0:
            kept.append(part)
    return "".join(kept)


_INSTRUCTION = re.compile(
    r"%(?P<destination>\S+) = (?P<opcode>[\w.]+) *"
    r"(?:\[smem:\[(?P<place>[^\]]*)\]\])? *"
    r"(?:\((?P<negated>!?)%(?P<guard>\w+)(?:, (?P<otherwise>[^)]*))?\),?)? *"
    r"(?P<operands>.*)",
    re.DOTALL,
)


def _parse_instruction(text: str) -> Instruction | None:
    match = _INSTRUCTION.match(text)
    if match is None or match["opcode"].startswith(_ALIASES):
        return None
    writes_scalar = re.fullmatch(r"[sp]\d+", _register(match["destination"]))
    if not writes_scalar and not re.fullmatch(r"sst|sbr.*|dma\..*_to_smem", match["opcode"]):
        return None
    operands = tuple(part.strip() for part in match["operands"].split(",") if part.strip())
    place = (f"[{match['place']}]",) if match["place"] else ()
    guard = (not match["negated"], _register(match["guard"])) if match["guard"] else None
    destination = _register(match["destination"])
    return Instruction(
        match["opcode"], destination, place + operands, guard, match["otherwise"]
    )  # fmt: skip


def _register(name: str) -> str:
    """The machine register of a value: s12_s4 lives in s4."""
    return name.rsplit("_", 1)[-1].lstrip("%")


def _wrap(value: int) -> int:
    """Registers are 32 bits wide."""
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32 if value < _MEMORY else value


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip

_ARITHMETIC: dict[str, Callable[..., int]] = {
    "smov": lambda a: a,
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "sand.u32": lambda a, b: _unsigned(a) & _unsigned(b),
    "sor.u32": lambda a, b: _unsigned(a) | _unsigned(b),
    "sxor.u32": lambda a, b: _unsigned(a) ^ _unsigned(b),
    "sshll.u32": operator.lshift,
    "sshrl.u32": lambda a, b: _unsigned(a) >> b,
    "sshra.s32": operator.rshift,
    "smin.u32": lambda a, b: min(_unsigned(a), _unsigned(b)),
    "smax.u32": lambda a, b: max(_unsigned(a), _unsigned(b)),
    "smin.s32": min,
    "smax.s32": max,
    "scalar_select": lambda p, a, b: a if p else b,
    "pmov": lambda a: a,
    "pneg": lambda a: not a,
    "por": lambda a, b: bool(a or b),
    "pand": lambda a, b: bool(a and b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pxor": lambda a, b: bool(a) != bool(b),
    **{f"scmp.{name}.s32.totalorder": compare for name, compare in _COMPARE.items()},
    **{
        f"scmp.{name}.u32.totalorder": lambda a, b, compare=compare: compare(
            _unsigned(a), _unsigned(b)
        )
        for name, compare in _COMPARE.items()
    },
}


def _arithmetic(opcode: str, values: list[Value]) -> Value:
    """The result, unknown if an operand is. Addresses are not wrapped to 32 bits."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    result = _ARITHMETIC[opcode](*known)
    return result if isinstance(result, bool) or max(known) >= _MEMORY else _wrap(result)


# Names for what a register holds already.
_ALIASES = ("sphi", "int_to_ptr")


def execute(
    program: Program,
    operands: Sequence[np.ndarray],
    delay_slots: int | None,
    most: int = 10_000_000,
) -> Counts:
    """Runs the scalar instructions of a kernel on its first core.

    Args:
        program: The kernel.
        operands: Its scalar-prefetch operands, int32 or int8, in order.
        delay_slots: How many bundles issue after a branch before the program goes on elsewhere;
            None where that is not known.
        most: Bundles after which the run is given up.

    Raises:
        ValueError: an operand does not fit, a branch depends on something that only a vector unit
            knows, or the program does not end.
    """
    if delay_slots is None:
        raise ValueError("cycles cannot be counted where it is not known how branches take effect")
    core = _ScalarCore(program, operands)
    issued = np.zeros(len(program.bundles), np.int64)
    at, target, delay = 0, 0, 0
    for _ in range(most):
        if at == len(program.bundles):
            return Counts(issued, program)
        issued[at] += 1
        label = core.issue(program.bundles[at])
        if label is not None:
            target, delay = program.labels[label], delay_slots + 1
        delay -= 1
        at = target if delay == 0 else at + 1
    raise ValueError(f"the program did not end within {most} bundles")


class _ScalarCore:
    """Registers and scalar memory, in which every allocation has addresses of its own."""

    def __init__(self, program: Program, operands: Sequence[np.ndarray]) -> None:
        self.layouts, self.operands = program.operand_layouts, operands
        self.registers: dict[str, Value] = {}
        self.allocations: dict[str, int] = {}
        # The first allocation holds the number of the core.
        self.memory: dict[Value, Value] = {self.address("#allocation0"): 0}

    def address(self, allocation: str) -> int:
        return self.allocations.setdefault(allocation, (len(self.allocations) + 1) * _MEMORY)

    def issue(self, bundle: Sequence[Instruction]) -> str | None:
        """Runs one bundle, whose instructions all read before any writes; the branch it takes."""
        writes: dict[str, Value] = {}
        label = None
        for instruction in bundle:
            positive, register = instruction.guard or (True, "")
            guard: Value = self.registers.get(register) if register else True
            holds = guard is not None and bool(guard) == positive
            if guard is None and instruction.opcode == "sbr.rel":
                raise ValueError(f"{instruction} depends on an unknown predicate")
            if instruction.opcode == "sbr.rel":
                label = instruction.operands[0].split("=")[1].strip() if holds else label
            elif guard is None:
                self.forget(instruction, writes)
            elif holds:
                self.run(instruction, writes)
            elif instruction.otherwise is not None:
                writes[instruction.destination] = self.value(instruction.otherwise)
        self.registers.update(writes)
        return label

    def run(self, instruction: Instruction, writes: dict[str, Value]) -> None:
        opcode, texts = instruction.opcode, instruction.operands
        if opcode == "inlined_call_operand.register":
            writes[instruction.destination] = int(self.operands[_index(texts)].item())
        elif opcode.startswith("inlined_call_operand"):
            writes[instruction.destination] = _OPERAND + _index(texts)
        elif opcode.endswith("_to_smem"):
            self.prefetch(self.value(texts[0]), self.value(texts[2]))
        elif opcode == "sld":
            writes[instruction.destination] = self.memory.get(self.value(texts[0]))
        elif opcode == "sst":
            self.memory[self.value(texts[0])] = self.value(texts[1])
        elif opcode not in _ARITHMETIC:
            # An address, or a value from a vector unit.
            writes[instruction.destination] = None
        else:
            values = [self.value(text) for text in texts]
            writes[instruction.destination] = _arithmetic(opcode, values)

    def forget(self, instruction: Instruction, writes: dict[str, Value]) -> None:
        """What an instruction would write is not known."""
        if instruction.opcode == "sst":
            self.memory[self.value(instruction.operands[0])] = None
        else:
            writes[instruction.destination] = None

    def value(self, text: str) -> Value:
        """The value of an operand: a number, a register, or a sum of those and an allocation."""
        terms = [self.term(part.strip()) for part in text.strip("[]").split("+")]
        return terms[0] if len(terms) == 1 else None if None in terms else sum(terms)  # type: ignore[arg-type]

    def term(self, text: str) -> Value:
        if text.startswith("#"):
            return self.address(text)
        if text.startswith("%"):
            return self.registers.get(_register(text.split()[0]))
        return _wrap(int(text.removeprefix("$").split()[0], 0))

    def prefetch(self, source: Value, destination: Value) -> None:
        """Copies an operand as it lies in scalar memory: rows of 128 words, bytes in columns."""
        # Addresses in vector memory are counted in words there and in rows of words here.
        places: dict[Value, int] = {
            address: i for i in self.layouts for address in (_OPERAND + i, (_OPERAND + i) << 4)
        }
        index = places[source]
        array, (type, shape) = np.asarray(self.operands[index]), self.layouts[index]
        if array.dtype.name != {"s32": "int32", "s8": "int8"}[type] or array.shape != shape:
            raise ValueError(f"operand {index} is {type} {shape}, got {array.dtype} {array.shape}")
        if array.ndim == 1:
            words_rc = array[None]
        else:
            words_rc = array.reshape(-1, shape[-1])
            if shape[-1] > 128:
                raise ValueError(f"operand {index} has rows of {shape[-1]} words, more than 128")
        if array.dtype == np.int8:
            padded_rc = np.pad(words_rc, ((0, -len(words_rc) % 4), (0, 0)))
            quads = padded_rc.reshape(-1, 4, shape[-1]).swapaxes(1, 2).copy()
            words_rc = quads.view("<i4")[..., 0]
        assert isinstance(destination, int)
        for r, row in enumerate(words_rc.tolist()):
            self.memory.update({destination + 128 * r + c: word for c, word in enumerate(row)})


def _index(texts: Sequence[str]) -> int:
    """The number of an operand."""
    (index,) = re.findall(r"index: (\d+)", ",".join(texts))
    return int(index)
