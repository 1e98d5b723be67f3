"""The thesis's objects in SymPy, and what it means that one of its lines holds.

A distribution or a logit vector is anything that can be indexed by a class: an `IndexedBase`, or a `Vector` made from
a formula. The number of classes `n` is a symbol (statements for every n) or an integer (statements for that n).

`holds`, `holds_for` and `agrees` raise `DoesNotHold` when a line is false, `fails` when a line that is said to be
misprinted turns out true. Each returns a `Check`, which a notebook shows as a small mark and stores with its output;
the book's equation ledger is read back from those stored outputs (`recorded`), never typed.
Book: A.1, "Equation ledger".
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sympy as sp
from sympy import Expr, IndexedBase, Integer, Sum, Symbol
from sympy.concrete.delta import deltasummation

__all__ = [
    *("Check", "DoesNotHold", "Vector", "agrees", "canonical", "cross_entropy", "entropy", "fails", "holds"),
    *("holds_for", "kl_divergence", "positive_entries", "renyi_divergence", "renyi_sum", "softmax", "total", "true"),
    *("N", "T", "alpha", "beta", "i", "j", "k", "n", "p", "q", "v", "z"),
]

MIME = "application/vnd.rkd.check+json"

n = Symbol("n", integer=True, positive=True)
N = Symbol("N", integer=True, positive=True)
i, j, k = sp.symbols("i j k", integer=True, positive=True)
T = Symbol("T", positive=True)
alpha = Symbol("alpha", positive=True)
beta = Symbol("beta", nonnegative=True)
p, q = (IndexedBase(name, positive=True) for name in "pq")
z, v = (IndexedBase(name, real=True) for name in "zv")


# --------------------------------------------------------------------------- objects of the thesis


class Vector:
    """A vector given by a formula for its entry c."""

    def __init__(self, entry: Callable[[Expr], Expr]) -> None:
        self._entry = entry

    def __getitem__(self, c: Any) -> Expr:
        return self._entry(sp.sympify(c))


class Entries(Protocol):
    """What stands for a distribution or a logit vector: a `Vector`, an `IndexedBase` or a dictionary."""

    def __getitem__(self, c: Any, /) -> Any: ...


def total(entry: Callable[[Expr], Expr], n: Any, index: Symbol = k) -> Expr:
    """entry(1) + ... + entry(n): written out for an integer n, a `Sum` over `index` for a symbol."""
    if isinstance(n, int | Integer):
        return sp.Add(*(entry(Integer(c)) for c in range(1, int(n) + 1)))
    return Sum(entry(index), (index, 1, n))


def softmax(z: Entries, n: Any, T: Any = 1) -> Vector:
    """Eq. (1.2), and (1.3) with temperature T."""
    return Vector(lambda c: sp.exp(z[c] / T) / total(lambda k: sp.exp(z[k] / T), n))


def entropy(p: Entries, n: Any) -> Expr:
    """H(P), in nats."""
    return -total(lambda i: p[i] * sp.log(p[i]), n, i)


def cross_entropy(p: Entries, q: Entries, n: Any) -> Expr:
    """H(P‖Q), the second term of (1.5)."""
    return -total(lambda i: p[i] * sp.log(q[i]), n, i)


def kl_divergence(p: Entries, q: Entries, n: Any) -> Expr:
    """Definition 1, eq. (1.4)."""
    return total(lambda i: p[i] * sp.log(p[i] / q[i]), n, i)


def renyi_sum(p: Entries, q: Entries, alpha: Any, n: Any) -> Expr:
    """Σ p_i^α q_i^(1−α), the argument of the logarithm in (1.16)."""
    return total(lambda i: p[i] ** alpha * q[i] ** (1 - alpha), n, i)


def renyi_divergence(p: Entries, q: Entries, alpha: Any, n: Any) -> Expr:
    """Definition 2, eq. (1.16)."""
    return sp.log(renyi_sum(p, q, alpha, n)) / (alpha - 1)


def positive_entries(name: str, n: int) -> dict[Integer, Symbol]:
    """n positive symbols name_1 … name_n, indexed from 1."""
    return {Integer(c): Symbol(f"{name}_{c}", positive=True) for c in range(1, n + 1)}


# --------------------------------------------------------------------------- what it means that a line holds


class DoesNotHold(AssertionError):
    """A line of the book is not true."""


@dataclass(frozen=True)
class Check:
    """What one cell established about one line: shown as a mark, stored as JSON in the notebook."""

    line: str
    claim: str
    scope: str  # "every n", "2 ≤ n ≤ 5", "numeric"
    verdict: str  # "holds", "false as printed"
    under: str = ""
    kind: str = "line"  # "line": the line itself; "step": a part or a consequence of it; "definition": it defines

    def __str__(self) -> str:
        condition = f", under {self.under}" if self.under else ""
        mark = "✓" if self.verdict == "holds" else "✗"
        return f"{mark} ({self.line}) {self.claim}: {self.verdict} [{self.scope}{condition}]"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        tone = "holds" if self.verdict == "holds" else "fails"
        html = f'<p class="rkd-check rkd-check-{tone}">{escape(str(self))}</p>'
        return {"text/plain": str(self), "text/html": html, MIME: asdict(self)}


def holds(
    line: str,
    claim: str,
    lhs: Any,
    rhs: Any,
    *,
    given: Mapping[Any, Any] | None = None,
    under: str = "",
    kind: str = "line",
) -> Check:
    """lhs = rhs, as expressions; `given` maps sums to known values, such as Σ p_i to 1.

    The scope is "every n": the number of classes is a symbol, or the statement is about one generic class, which makes
    it a step of its line. Expressions with entries 1, 2, … written out belong to `holds_for`.
    """
    for side in map(sp.sympify, (lhs, rhs)):
        written_out = any(isinstance(c, Integer) for entry in side.atoms(sp.Indexed) for c in entry.indices)
        if written_out or any(re.fullmatch(r"\w+_\d+", symbol.name) for symbol in side.free_symbols):
            raise ValueError(f"({line}) {claim}: entries are written out, so this is not a statement for every n")
    difference = canonical(sp.sympify(lhs) - sp.sympify(rhs))
    for key, value in (given or {}).items():
        difference = difference.subs(canonical(key), canonical(value))
    if _simplified(difference) != 0:
        raise DoesNotHold(f"({line}) {claim}: the two sides differ by {_simplified(difference)}")
    return Check(line, claim, "every n", "holds", under, kind)


def holds_for(
    line: str,
    claim: str,
    sides: Callable[[int], tuple[Any, Any]],
    up_to: int,
    *,
    start: int = 2,
    under: str = "",
    kind: str = "line",
) -> Check:
    """lhs = rhs for n = start … up_to classes, where `sides(n)` gives both."""
    for size in range(start, up_to + 1):
        lhs, rhs = (sp.sympify(side) for side in sides(size))
        if sp.simplify(lhs - rhs) != 0:
            raise DoesNotHold(f"({line}) {claim}: false for n = {size}: {sp.simplify(lhs - rhs)}")
    return Check(line, claim, f"{start} ≤ n ≤ {up_to}", "holds", under, kind)


def agrees(
    line: str, claim: str, computed: Any, expected: Any, *, rel: float = 1e-12, under: str = "", kind: str = "step"
) -> Check:
    """Two numbers, or two sequences of numbers, agree to the relative error `rel` (absolute below 1)."""
    ours, theirs = ([float(x) for x in _flat(side)] for side in (computed, expected))
    if len(ours) != len(theirs) or not ours:
        raise DoesNotHold(f"({line}) {claim}: {len(ours)} numbers against {len(theirs)}")
    for a, b in zip(ours, theirs, strict=True):
        if not (a == b or abs(a - b) <= rel * max(1.0, abs(b))):
            raise DoesNotHold(f"({line}) {claim}: {a!r} is not {b!r} within {rel:g}")
    return Check(line, claim, "numeric", "holds", under, kind)


def true(
    line: str, claim: str, statement: Any, *, scope: str = "numeric", under: str = "", kind: str = "step"
) -> Check:
    """A statement that is not an equation: raises unless it is true (SymPy's, Python's or NumPy's)."""
    if statement is not sp.true and not (isinstance(statement, bool | np.bool_) and statement):
        raise DoesNotHold(f"({line}) {claim}: {statement}")
    return Check(line, claim, scope, "holds", under, kind)


def fails(line: str, claim: str, lhs: Any, rhs: Any, at: str) -> Check:
    """The line as printed is false: its sides, evaluated at the counterexample `at`, differ by more than 1e-6."""
    a, b = (complex(sp.N(side, 30)) for side in (lhs, rhs))
    if not abs(a - b) > 1e-6:
        raise DoesNotHold(f"({line}) {claim}: said to be misprinted, but both sides are {a}")
    return Check(
        line, f"{claim}; at {at} the sides are {a.real:.4f} and {b.real:.4f}", "counterexample", "false as printed"
    )


def canonical(expression: Any) -> Expr:
    """Sums split into terms, constants pulled out, Kronecker deltas collapsed (indices lie in 1 … n), dummies renamed.

    Logarithms and powers are expanded as for positive arguments, which all probabilities here are; take no logarithm
    of a logit. A delta may only be summed over all classes or all samples.
    """
    expression = sp.sympify(expression)
    if isinstance(expression, Sum):
        return _canonical_sum(expression)
    if expression.args and not isinstance(expression, sp.Indexed):
        expression = expression.func(*(canonical(argument) for argument in expression.args))
    return expression


def _canonical_sum(expression: Sum) -> Expr:
    result = canonical(expression.function)
    for limits in expression.limits:  # innermost first
        result = _split_sum(result, *limits)
    return result


def _split_sum(summand: Expr, index: Symbol, lower: Expr, upper: Expr) -> Expr:
    settled = {inner: _stand_in(inner) for inner in summand.atoms(Sum) if not inner.has(index)}
    factor, summand = summand.xreplace(settled).as_independent(index, as_Add=False)
    summand = sp.expand(sp.expand_power_base(sp.expand_log(summand, force=True), force=True), force=True)
    result = Integer(0)
    for term in sp.Add.make_args(summand):
        constant, varying = term.as_independent(index, as_Add=False)
        if varying.has(sp.KroneckerDelta):
            if (lower, upper) not in ((1, n), (1, N)):
                raise ValueError(f"a Kronecker delta is summed over {lower} … {upper}: its index may lie outside")
            result += constant * canonical(deltasummation(varying, (index, lower, upper), no_piecewise=True))
        elif varying == 1:
            result += constant * (upper - lower + 1)
        else:
            name = Symbol(f"c_{1 + max(map(_depth, varying.atoms(Sum)), default=0)}", integer=True, positive=True)
            result += constant * Sum(sp.powsimp(varying).subs(index, name), (name, lower, upper))
    return (factor * result).xreplace({dummy: inner for inner, dummy in settled.items()})


def _stand_in(expression: Sum) -> sp.Dummy:
    return sp.Dummy("S", positive=True) if expression.is_positive else sp.Dummy("S", real=True)


def _depth(expression: Sum) -> int:
    """How many sums are nested here, itself included."""
    return len(expression.limits) + max(map(_depth, expression.function.atoms(Sum)), default=0)


def _simplified(expression: Expr) -> Expr:
    """Simplify with each outermost sum as one symbol, positive where the sum is."""
    sums = sorted((s for s in expression.atoms(Sum)), key=_depth, reverse=True)
    names = {s: _stand_in(s) for s in sums}
    for s, name in names.items():
        expression = expression.subs(s, name)
    return sp.simplify(sp.expand(sp.expand_log(expression, force=True)))


def _flat(x: Any) -> Iterable[Any]:
    if hasattr(x, "tolist"):
        x = x.tolist()
    if isinstance(x, list | tuple):
        for part in x:
            yield from _flat(part)
    else:
        yield x


# --------------------------------------------------------------------------- the ledger


def recorded(notebook: str | Path) -> list[tuple[Check, int]]:
    """The checks stored in an executed notebook, each with the number of the code cell that made it (from 1).

    Raises:
        ValueError: the file is no notebook, or a stored check is not one.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a notebook: {error}") from None
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    for number, cell in enumerate(code, start=1):
        for output in cell["outputs"]:
            if MIME in output.get("data", {}):
                found.append((Check(**output["data"][MIME]), number))
    return found


def verdict(checks: Iterable[Check]) -> str:
    """One line's verdict from all of its checks: a definition, corrected, holds under a condition, or holds."""
    checks = list(checks)
    good = [check for check in checks if check.verdict == "holds"]
    if not good:
        raise ValueError(f"nothing establishes line {checks[0].line if checks else '?'}")
    if any(check.kind == "definition" for check in good):
        return "definition"
    conditions = list(dict.fromkeys(check.under for check in good if check.kind == "line" and check.under))
    parts = ["corrected" if len(good) < len(checks) else "holds"]
    if conditions:
        parts.append("under " + "; ".join(conditions))
    return " ".join(parts)


def scope(checks: Iterable[Check]) -> str:
    """How far a line was established: the widest scope of the checks of the line itself; its steps do not count."""
    good = [check for check in checks if check.verdict == "holds"]
    if any(check.kind == "definition" for check in good):
        return "definition"
    scopes = [check.scope for check in good if check.kind == "line"] or ["steps only"]
    return min(scopes, key=lambda s: (s != "every n", "≤" not in s, s))
