"""What fills the memory of a device, from what XLA writes about a compiled program.

With `--xla_dump_to` XLA writes down where in memory every value lies and which values are alive at
the busiest moment. It does so before it generates code, and also for a program that it then refuses.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contributor:
    """Buffers of one kind that are alive at the busiest moment."""

    name: str
    """The argument it is, such as state.params.blocks.qkv.kernel, or the operation it comes from."""
    shape: str
    """Its part on one device, such as bf16[70,1,2048,12288]."""
    count: int
    """How many such buffers there are."""
    bytes: int
    """Of all of them together."""


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory that a program takes on every device."""

    arguments: int
    """Parameters, optimizer state and batch. Results that replace them take no room of their own."""
    temporaries: int
    """Everything else, gaps between buffers included."""
    peak: int
    """What is alive at the busiest moment, arguments included."""
    contributors: tuple[Contributor, ...]
    """What is alive then, the largest first; without what is less than a thousandth of the peak."""

    @property
    def needed(self) -> int:
        """What must be free on the device: what libtpu compares with its memory."""
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class _Buffer:
    """Where a value lies. Values in the same place are the same buffer under several names."""

    allocation: int
    is_argument: bool
    offset: int
    size: int
    shape: str


def read_memory(dump: Path, module: str) -> Memory:
    """The memory of the program of that name among the files that XLA dumped.

    Raises:
        FileNotFoundError: the program has not come that far.
    """
    return parse_memory(
        dump_text(dump, module, "after_optimizations-buffer-assignment"),
        dump_text(dump, module, "after_optimizations-live-range"),
        dump_text(dump, module, "after_optimizations"),
    )


def dump_text(dump: Path, module: str, kind: str) -> str:
    """One of the files that XLA dumped about a program.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(dump.glob(f"*.{module}.*.{kind}.txt")) or sorted(
        dump.glob(f"*.{module}.{kind}.txt")
    )
    if not files:
        raise FileNotFoundError(f"XLA wrote no {kind} of {module}")
    return files[-1].read_text()


def parse_memory(assignment: str, live_ranges: str, program: str) -> Memory:
    """Memory from XLA's buffer assignment, live ranges and program text."""
    sizes = Counter[bool]()
    buffers: dict[str, _Buffer] = {}
    allocation, is_argument, in_hbm = 0, False, False
    for line in assignment.splitlines():
        if start := re.match(r"allocation (\d+): size (\d+), (.*)", line):
            # Other memory than that of the device has another color.
            allocation, in_hbm = int(start[1]), "color" not in start[3]
            is_argument = "parameter" in start[3]
            sizes[is_argument] += in_hbm * int(start[2])
        elif in_hbm and (value := _VALUE.match(line)):
            offset, size = int(value["offset"]), int(value["size"])
            buffers[value["name"]] = _Buffer(allocation, is_argument, offset, size, value["shape"])
    busiest = live_ranges.split("(peak):", 1)[1].split("Stack trace", 1)[0]
    alive = {buffers[name] for name in _ALIVE.findall(busiest) if name in buffers}
    names = _names(buffers, program)
    peak = sum(buffer.size for buffer in alive)
    kinds = Counter((names[buffer], buffer.shape, buffer.size) for buffer in alive)
    contributors = [
        Contributor(name, shape, count, count * size)
        for (name, shape, size), count in kinds.items()
        if 1000 * count * size >= peak
    ]
    contributors.sort(key=lambda contributor: (-contributor.bytes, contributor.name))
    return Memory(sizes[True], sizes[False], peak, tuple(contributors))


_VALUE = re.compile(
    r" value: <\d+ (?P<name>\S+)(?: \(phi\))? @0> \(size=(?P<size>\d+),offset=(?P<offset>\d+)\): "
    r"(?P<shape>\w+\[[\d,]*\])"
)
_ALIVE = re.compile(r"^ +(\S+?)(?:\{\})?: \d+ bytes", re.MULTILINE)
_OPERATION = re.compile(r'^ +(?:ROOT )?%?(\S+) = .*?op_name="([^"]+)"', re.MULTILINE)


def _names(buffers: dict[str, _Buffer], program: str) -> dict[_Buffer, str]:
    """What to call each buffer: the argument it is, the operation of the source that writes it, or
    a value of the compiled program."""
    operations = dict(_OPERATION.findall(program))
    names: dict[_Buffer, str] = {}
    for value, buffer in buffers.items():
        name = operations.get(value.partition("{")[0], value)
        known = names.setdefault(buffer, name)
        if _tells(name, buffer) > _tells(known, buffer):
            names[buffer] = name
    return {buffer: _describe(name) for buffer, name in names.items()}


def _tells(name: str, buffer: _Buffer) -> int:
    """How much a name says: an argument goes by its own, which is no path in the source; elsewhere a
    path says something, and most where it is an update of what a loop collects."""
    if buffer.is_argument:
        return int("/" not in name)
    return 2 if name.endswith("dynamic_update_slice") else int("/" in name)


def _describe(operation: str) -> str:
    """The name of an operation in words where they are shorter: jit(f)/jvp()/while/body/add."""
    if operation.endswith("dynamic_update_slice") and "while/body" in operation:
        is_backward = "transpose" in operation
        return "gradients, layer by layer" if is_backward else "kept for the backward pass"
    if re.fullmatch(r"jit\(train_step\)/while/body/(closed_call/)?add", operation):
        return "gradients, added up over microbatches"
    parts = re.sub(r"jit\([^()]*\)/|while/body/|closed_call/", "", operation)
    return parts.replace("transpose(jvp())", "backward").replace("jvp()", "forward")
