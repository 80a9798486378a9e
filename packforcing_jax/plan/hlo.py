"""Reads what XLA made of a program: its operations, which of them only move data, and where it put their results."""

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

ITEM = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f16": 2,
    "bf16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "c64": 8,
}
MOVES = (
    "broadcast",
    "concatenate",
    "copy",
    "copy-done",
    "dynamic-slice",
    "gather",
    "pad",
    "parameter",
    "reverse",
    "slice",
    "transpose",
)
RENAMES = ("bitcast", "convert", "reshape", "get-tuple-element", "optimization-barrier")
MIXES = (
    "convolution",
    "custom-call",
    "dot",
    "reduce",
    "sort",
)  # what comes out is no longer what went in
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
PLACE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})? @\d+> \([^)]*\): (\w+)\[([\d,]*)\]")

Shape = tuple[str, tuple[int, ...]]  # type of the items as XLA spells it, sizes


@dataclass(frozen=True)
class Op:
    """One line of a compiled program. `shape` is its result's; a result of several arrays has none."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool = False  # the last of its computation
    calls: str = ""  # computation a fusion consists of
    element: int = 0  # which of a fusion's results this is

    @property
    def bytes(self) -> int:
        return size(self.shape)


@dataclass(frozen=True)
class Program:
    """A compiled program: operations by name, of every computation, in the order they are written in."""

    computations: dict[str, dict[str, Op]]

    def kernels(self) -> Iterator[tuple[str, Op]]:
        """(computation, operation) of everything that is not inside a fusion, so has a result of its own."""
        inside = {op.calls for ops in self.computations.values() for op in ops.values()} - {""}
        for name, ops in self.computations.items():
            if name not in inside:
                yield from ((name, op) for op in ops.values())

    def ends_in(self, op: Op) -> str:
        """The opcode of `op`, or of what a fusion's last operation is, apart from renaming and rounding."""
        if not op.calls:
            return op.opcode
        ops = self.computations[op.calls]
        last = next(one for one in ops.values() if one.root)
        if last.opcode == "tuple":
            last = ops[last.operands[op.element]]
        while last.opcode in RENAMES:
            last = ops[last.operands[0]]
        return last.opcode

    def mixes(self, op: Op) -> bool:
        """Whether `op` adds up over its operands, alone or inside its fusion."""
        return any(
            one.opcode in MIXES for one in (op, *self.computations.get(op.calls, {}).values())
        )

    def multiplies(self, op: Op) -> bool:
        """Whether `op` multiplies inside its fusion, as what turns keys does: it is no mere copy then."""
        return any(one.opcode == "multiply" for one in self.computations.get(op.calls, {}).values())


def size(shape: Shape) -> int:
    """Bytes of an array."""
    return ITEM.get(shape[0], 0) * prod(shape[1])


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations = {}
    ops = {}
    for line in text.splitlines():
        if head := HEAD.match(line):
            computations[head[1]] = ops = {}
        elif match := LINE.match(line):
            ops[match[2]] = _op(match, line)
    return Program({name: _joined(ops) for name, ops in computations.items()})


def _op(match: re.Match, line: str) -> Op:
    root, name, kind, opcode, rest = match.groups()
    calls = re.search(r", calls=%?([\w.\-]+)", rest) if opcode.startswith("fusion") else None
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
    return Op(
        name=name,
        shape=_shape(kind),
        opcode=opcode,
        operands=operands,
        text=line,
        root=root is not None,
        calls=calls[1] if calls else "",
    )


def _shape(kind: str) -> Shape:
    match = ARRAY.match(kind)
    return (match[1], tuple(int(n) for n in match[2].split(",") if n)) if match else ("", ())


def _joined(ops: dict[str, Op]) -> dict[str, Op]:
    """`ops`, in which one result of a fusion of several, or of one that ran beside others, is a fusion itself."""
    joined = {}
    for op in ops.values():
        made = (
            ops.get(op.operands[0]) if op.opcode in ("fusion-done", "get-tuple-element") else None
        )
        if made is not None and made.calls:
            index = re.search(r", index=(\d+)", op.text)
            op = dataclasses.replace(
                op,
                opcode="fusion",
                operands=made.operands,
                calls=made.calls,
                element=int(index[1]) if index else 0,
            )
        joined[op.name] = op
    return joined


def moved(program: Program, shapes: Collection[Shape]) -> list[Op]:
    """Operations with a result of one of `shapes` that only move data: copies by whatever name."""
    return [
        op
        for _, op in program.kernels()
        if op.shape in shapes and op.opcode != "parameter" and program.ends_in(op) in MOVES
    ]


def remade(program: Program, stores: Collection[Shape], at_least: int) -> list[Op]:
    """Results of `at_least` so many bytes and another shape that stem from a store without being mixed up with others.

    Stores are known by their shapes. What only moves data is a copy of them, what else there is a changed copy.
    """
    derived = set()
    results = []
    for computation, op in program.kernels():
        if op.shape in stores:
            derived.add((computation, op.name))
        elif (
            op.bytes >= at_least
            and not program.mixes(op)
            and derived & {(computation, name) for name in op.operands}
        ):
            derived.add((computation, op.name))
            results += [op] * (op.opcode not in RENAMES)
    return results


def written(program: Program, shapes: Collection[Shape]) -> list[Op]:
    """Operations with a result of one of `shapes` that overwrite a part of an operand of that shape."""
    return [
        op
        for _, op in program.kernels()
        if op.shape in shapes and program.ends_in(op) == "dynamic-update-slice"
    ]


def astray(assignment: str, shapes: Collection[Shape]) -> list[str]:
    """Results of one of `shapes` that XLA put anywhere but into a buffer handed in, from its buffer assignment."""
    results = []
    is_parameter = False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            is_parameter = ", parameter " in line
        elif (
            not is_parameter
            and (value := PLACE.match(line))
            and _shape(f"{value[2]}[{value[3]}]") in shapes
        ):
            results.append(value[1])
    return results
