"""Counts what a traced program does from the shapes of its operands alone; nothing runs and nothing is allocated."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

import jax
from jax.extend import core

Program: TypeAlias = core.Jaxpr | core.ClosedJaxpr
Tree: TypeAlias = Any  # any pytree of arrays or of their shapes


def trace(f: Callable, *args: Any) -> core.ClosedJaxpr:
    """The program of `f` on arguments of which only shapes and dtypes count (`jax.ShapeDtypeStruct`)."""
    return jax.make_jaxpr(f)(*args)


def walk(program: Program, times: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every innermost equation with how often one run executes it: a scan's body `length` times, else once.

    What no result needs is left out, as compilers do. Of a `cond` the branch with most operations counts. A `while`
    has no known number of turns and counts one.
    """
    for eqn in _needed(_opened(program)):
        inside = _inside(eqn)
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if not inside:
            yield eqn, times
        for body in inside:
            yield from walk(body, times * turns)


def _opened(program: Program) -> core.Jaxpr:
    """A program without the constants that it closes over."""
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _needed(program: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that results or effects depend on."""
    needed = []
    wanted = _variables(program.outvars)
    for eqn in reversed(program.eqns):
        if eqn.effects or wanted.intersection(eqn.outvars):
            needed.append(eqn)
            wanted |= _variables(eqn.invars)
    return needed[::-1]


def _inside(eqn: core.JaxprEqn) -> list[Program]:
    """The programs that an equation runs: the body of a loop, a call, a checkpoint, a custom derivative."""
    if eqn.primitive.name == "cond":
        return [max(eqn.params["branches"], key=operations)]
    return [
        value for value in eqn.params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)
    ]


def _product(eqn: core.JaxprEqn) -> int:
    """Operations of a matrix product: every output element sums over the contracted axes; an outer product has none."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = _shape(eqn.invars[0])
    return (
        bool(contracted)
        * 2
        * math.prod(_shape(eqn.outvars[0]))
        * math.prod(left[axis] for axis in contracted)
    )


def _convolution(eqn: core.JaxprEqn) -> int:
    """Operations of a convolution, zeros of its padding included: every output element sums over one kernel."""
    kernel = _shape(eqn.invars[1])
    spec = eqn.params["dimension_numbers"].rhs_spec
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // max(kernel[spec[0]], 1)


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    return variable.aval.shape  # type: ignore[attr-defined]  operands are arrays


COSTS: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
}


def operations(program: Program, on: tuple[int, ...] | None = None) -> int:
    """Operations of all matrix products and convolutions of one run; a multiplication with its addition is two.

    `on`: only of those with an operand of that shape.
    """
    return sum(
        times * COSTS[eqn.primitive.name](eqn)
        for eqn, times in walk(program)
        if eqn.primitive.name in COSTS and (on is None or on in map(_shape, eqn.invars))
    )


def writes(program: Program, shape: tuple[int, ...], axis: int = 1) -> list[int]:
    """Lengths along `axis` of the pieces laid into arrays of `shape`, in the order of one run."""
    lengths = []
    for eqn, times in walk(program):
        if eqn.primitive.name == "dynamic_update_slice":
            whole, piece = map(_shape, eqn.invars[:2])
            lengths += [piece[axis]] * times * (whole == shape)
    return lengths


def peak(
    program: Program,
    besides: Collection[tuple[int, ...]] = (),
    *,
    results: bool = True,
) -> int:
    """Most bytes of intermediate values alive at once, before compilers fuse anything; arguments are not among them.

    `besides`: arrays of these shapes are not counted, such as those that are updated in place. Without `results`
    neither are the program's own, as in what XLA calls temporary memory.
    """
    jaxpr = _opened(program)
    return _peak(jaxpr, besides, set() if results else _variables(jaxpr.outvars))


def _peak(jaxpr: core.Jaxpr, besides: Collection[tuple[int, ...]], elsewhere: set[core.Var]) -> int:
    """`peak` without the variables `elsewhere`."""
    eqns = _needed(jaxpr)
    alive = 0
    most = 0
    last = {variable: at for at, eqn in enumerate(eqns) for variable in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(eqns))
    own = {variable for eqn in eqns for variable in eqn.outvars} - elsewhere

    def weigh(variables: Iterable[core.Var]) -> int:
        return sum(
            nbytes(one.aval)
            for one in variables
            if one in last and one not in elsewhere and _shape(one) not in besides
        )

    def inside(body: Program, eqn: core.JaxprEqn) -> int:
        inner = _opened(body)
        placed = (
            one for one, out in zip(inner.outvars, eqn.outvars, strict=False) if out in elsewhere
        )
        return _peak(inner, besides, _variables(placed))

    for at, eqn in enumerate(eqns):
        made = weigh(eqn.outvars)
        used = _variables(eqn.invars) & own
        most = max(most, alive + max([made, *(inside(body, eqn) for body in _inside(eqn))]))
        alive += made - weigh(variable for variable in used if last[variable] == at)
    return most


def _variables(atoms: Iterable[Any]) -> set[core.Var]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}


def count(tree: Tree) -> int:
    """Numbers in all leaves of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
