"""The text of a scheduled HLO module as data: instructions, shapes, replica groups, costs."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """An instruction by name; shapes and attributes are left as text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses: the value of a constant, the number of a parameter."""
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """What the group of a regular expression matches among the attributes."""
        match = re.search(pattern, self.attributes)
        return match and match[1]

    def called(self, key: str) -> str:
        """The computation that an attribute names."""
        return self.attribute(rf"\b{key}=%([\w.\-]+)") or ""

    @property
    def source(self) -> str:
        return self.attribute(r'op_name="([^"]*)"') or ""


Computation: TypeAlias = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A compiled program of one of `num_partitions` devices."""

    entry: str
    computations: dict[str, Computation]
    num_partitions: int
    functions: dict[int, str]
    """Python function of each stack frame."""


_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
"""An array in a shape: element type, dimensions, and the layout with its memory space, which is HBM
unless it says S(n): 1 is vector memory, 5 the host's."""


def parse(text: str) -> Module:
    """A module from its text, where names have the sigil %."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry, pending = "", ""

    def finish() -> None:
        if match := _INSTRUCTION.match(pending):
            instruction = _instruction(match[1], match[2])
            for operand in instruction.operands:
                if "#" in operand:
                    current[operand] = _element(current, operand)
            current[instruction.name] = instruction

    head, *lines = text.split("\n")
    for line in lines:
        header = _HEADER.match(line)
        if header or _INSTRUCTION.match(line):
            finish()
            pending = "" if header else line
        elif pending and not _END.match(line):
            pending += line  # attributes of Pallas kernels run over several lines
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
    finish()
    partitions = re.search(r"num_partitions=(\d+)", head)
    return Module(entry, computations, int(partitions[1]) if partitions else 1, _functions(text))


def _instruction(name: str, rest: str) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _balanced("(" + rest)
    operands = tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", inside))
    return Instruction(name, shape, opcode, operands, inside[1:-1], attributes)


def _element(computation: Computation, operand: str) -> Instruction:
    """What newer compilers write as %name#1: an element of a tuple, without an instruction."""
    name, _, index = operand.partition("#")
    shapes = [match[0] for match in ARRAY.finditer(computation[name].shape)]
    return Instruction(
        operand, shapes[int(index)], "get-tuple-element", (name,), f"%{name}", f", index={index}"
    )


def _balanced(text: str) -> tuple[str, str]:
    """The parenthesis that text starts with, and what follows."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"no closing parenthesis in the instruction {text[:80]!r}")


def _functions(text: str) -> dict[int, str]:
    """Python functions by stack frame, from the tables that head the module."""
    table = dict(
        re.findall(r'^(\d+) "([^"]*)"$', text.partition("\nFunctionNames\n")[2], re.MULTILINE)
    )
    locations = dict(re.findall(r"^(\d+) \{.*function_name_id=(\d+)", text, re.MULTILINE))
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", text, re.MULTILINE)
    return {int(frame): table.get(locations.get(place, ""), "") for frame, place in frames}


def arrays(shape: str) -> list[list[int]]:
    """Dimensions of each array of a shape, which may be a tuple."""
    return [
        [int(size) for size in sizes.split(",") if size] for _, sizes, _ in ARRAY.findall(shape)
    ]


def dimensions(shape: str) -> list[int]:
    """Dimensions of an array, or of the first of a tuple."""
    return next(iter(arrays(shape)), [])


def byte_count(shape: str, hbm_only: bool = False) -> float:
    """Bytes of all arrays of a shape, or of those of them that lie in HBM."""
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes, layout in ARRAY.findall(shape)
        if dtype in BYTES and not (hbm_only and re.search(r"S\([1-9]", layout))
    )


def called_computations(at: Instruction) -> list[str]:
    """Names of the computations that a fusion, call or conditional runs."""
    keys = r"(?:calls|to_apply|branch_computations|true_computation|false_computation)"
    names = re.findall(keys + r"=(\{[^}]*\}|%[\w.\-]+)", at.attributes)
    return re.findall(r"%([\w.\-]+)", " ".join(names))


def inner_instructions(module: Module, at: Instruction) -> list[tuple[Instruction, Computation]]:
    """Instructions inside a fusion or asynchronous computation, nested ones included."""
    if at.opcode not in ("fusion", "async-start", "call-start"):
        return []
    found = []
    for called in called_computations(at):
        computation = module.computations[called]
        for inside in computation.values():
            found += [(inside, computation), *inner_instructions(module, inside)]
    return found


def device_groups(attributes: str, num_partitions: int) -> tuple[tuple[int, ...], ...]:
    """Devices of each group, from any of the notations for replica groups."""
    if pairs := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", attributes):
        return tuple(
            tuple(int(device) for device in group.split(","))
            for group in re.findall(r"\{([\d,]+)\}", pairs[1])
        )
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", attributes):
        devices = _iota(match[2], match[3]).reshape(_integers(match[1]))
    elif match := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", attributes
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        names = re.findall(r"'(\w+)'", match[4])
        shape = [int(size) for size in sizes.values()]
        devices = _iota(match[2] or str(math.prod(shape)), match[3]).reshape(shape)
        along = [list(sizes).index(name) for name in names]
        across = [axis for axis in range(len(shape)) if axis not in along]
        group_size = math.prod(shape[axis] for axis in along)
        devices = devices.transpose(across + along).reshape(-1, group_size)
    else:
        devices = np.arange(num_partitions)[None]
    return tuple(tuple(int(device) for device in group) for group in devices)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(shape: str, transpose: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return devices.transpose(_integers(transpose)) if transpose else devices


def product_flops(at: Instruction, shapes: Computation) -> float:
    """FLOPs of a matrix product or convolution."""
    if at.opcode == "dot":
        contracted = at.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        left = dimensions(shapes[at.operands[0]].shape)
        inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * math.prod(dimensions(at.shape)) * inner
    if at.opcode != "convolution":
        return 0
    left, right = (dimensions(shapes[name].shape) for name in at.operands[:2])
    labels = at.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    out = dict(zip(out_labels, dimensions(at.shape), strict=True))
    total = 2.0 * out["b"] * out["f"] * right[right_labels.index("i")]
    window = at.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in window.split())
    for d in range(len(out) - 2):
        size, stride, left_dilate, right_dilate = (
            int(fields[key].split("x")[d]) if key in fields else 1
            for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(fields["pad"].split("x")[d].split("_")[0]) if "pad" in fields else 0
        total *= _pairs(
            left[left_labels.index(str(d))], out[str(d)], size, stride, low, left_dilate,
            right_dilate,
        )  # fmt: skip
    return total


@lru_cache
def _pairs(
    length: int, out: int, size: int, stride: int, low: int, left_dilate: int, right_dilate: int
) -> int:
    """Pairs of an output position and a window position that meet an element and not padding.

    Products of batched matrices come as convolutions whose window covers the batch and is dilated
    so that one position of it counts.
    """
    at = np.arange(out)[:, None] * stride + np.arange(size) * right_dilate - low
    return int(((at >= 0) & (at <= (length - 1) * left_dilate) & (at % left_dilate == 0)).sum())


def hbm_traffic(module: Module, computation: Computation, at: Instruction) -> float:
    """HBM bytes that an instruction reads and writes."""
    shapes = [computation[name].shape for name in at.operands]
    match at.opcode:
        case "custom-call" if "tpu_custom_call" not in at.attributes:
            return 0  # allocates a buffer, or says something about indices
        case "dynamic-slice" | "gather":
            return 2 * byte_count(at.shape, hbm_only=True)
        case "dynamic-update-slice":
            return 2 * byte_count(shapes[1], hbm_only=True)
        case "fusion":
            fused = module.computations[called_computations(at)[0]]
            reads = sum(
                _read(module, fused, inside)
                for inside in fused.values()
                if inside.opcode == "parameter" and byte_count(shapes[int(inside.literal)], True)
            )
            return reads + _written(fused, at.shape)
    reads = sum(byte_count(shape, hbm_only=True) for shape in shapes)
    return reads + (0 if at.opcode.endswith("-start") else byte_count(at.shape, hbm_only=True))


def _read(module: Module, fused: Computation, value: Instruction) -> float:
    """Bytes of a fusion's parameter that it reads: slices of it where it only takes slices."""
    total = 0.0
    for at in fused.values():
        for position in (i for i, name in enumerate(at.operands) if name == value.name):
            if at.opcode == "dynamic-slice" or (at.opcode == "gather" and position == 0):
                total += byte_count(at.shape)
            elif at.opcode == "bitcast" or _only_copies(module, at):
                total += _read(module, fused, at)
            elif at.opcode == "fusion":
                nested = module.computations[called_computations(at)[0]]
                total += sum(
                    _read(module, nested, inside)
                    for inside in nested.values()
                    if inside.opcode == "parameter" and int(inside.literal) == position
                )
            elif at.opcode != "dynamic-update-slice" or position != 0:
                total += byte_count(value.shape)
    return min(total, byte_count(value.shape))


def _only_copies(module: Module, at: Instruction) -> bool:
    """Whether it is a fusion inside a fusion that changes how an array is laid out, of which nothing
    is made but what is used."""
    inside = inner_instructions(module, at)
    return bool(inside) and all(
        instruction.opcode in ("parameter", "copy", "bitcast") for instruction, _ in inside
    )


def _written(fused: Computation, shape: str) -> float:
    """Bytes that a fusion writes: the slices where it updates an array in place."""
    *_, root = fused.values()
    outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for output, array in zip(outputs, ARRAY.finditer(shape), strict=False):
        while output.opcode in ("bitcast", "copy"):
            output = fused[output.operands[0]]
        if byte_count(array[0], hbm_only=True):
            update = output.opcode == "dynamic-update-slice"
            total += byte_count(fused[output.operands[1]].shape if update else array[0])
    return total
