"""`rkd.symbolic`: true lines pass, false ones raise, the normal form keeps values, the ledger reads what was stored."""

import json

import nbformat
import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd import symbolic as s
from rkd.symbolic import T, Vector, alpha, canonical, i, j, k, n, p, q, v, z

UNIT = {s.total(lambda c: p[c], n): 1}


def at(expression, size, values):
    """The number that a symbolic-n expression takes for `size` classes."""
    expression = expression.subs(n, size).subs(j, 2).replace(sp.Sum, lambda f, *lim: sp.Sum(f, *lim).doit()).doit()
    return float(expression.subs(values).evalf(30))


def values(size, seed):
    draw = np.random.default_rng(seed)
    numbers = {base[c]: sp.Float(float(draw.normal()), 30) for base in (z, v) for c in range(1, size + 1)}
    for base in (p, q):
        weights = draw.dirichlet([1.0] * size)
        numbers |= {base[c]: sp.Float(float(weights[c - 1]), 30) for c in range(1, size + 1)}
    return numbers | {T: sp.Float(1.7), alpha: sp.Float(0.6)}


STUDENT = s.softmax(z, n, T)
EXPRESSIONS = {
    "gradient of KL": sp.diff(s.kl_divergence(p, STUDENT, n), z[j]),
    "KL": s.kl_divergence(p, q, n),
    "entropy": s.entropy(p, n),
    "cross-entropy of softmax": s.cross_entropy(s.softmax(v, n, T), STUDENT, n),
    "Rényi": s.renyi_divergence(p, q, alpha, n),
    "slope in the order": sp.diff(s.renyi_divergence(p, q, alpha, n), alpha),
    "softmax second derivative": sp.diff(STUDENT[j], z[j], 2),
    "nested sums": s.total(lambda a: p[a] * s.total(lambda b: q[b] * z[a] * z[b], n, k), n, i),
    "power of a ratio": s.total(lambda a: (p[a] / q[a]) ** alpha * q[a] / (alpha - 1), n),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@given(size=st.integers(2, 4), seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_normal_form_keeps_values(name, size, seed):
    expression, numbers = EXPRESSIONS[name], values(size, seed)
    assert at(canonical(expression), size, numbers) == pytest.approx(
        at(expression, size, numbers), rel=1e-12, abs=1e-14
    )


class TestHolds:
    def test_true_for_every_n(self):
        check = s.holds(
            "1.8", "gradient", sp.diff(s.kl_divergence(p, STUDENT, n), z[j]), (STUDENT[j] - p[j]) / T, given=UNIT
        )
        assert (check.scope, check.verdict, check.line) == ("every n", "holds", "1.8")

    @pytest.mark.parametrize(
        "wrong",
        [
            (p[j] - STUDENT[j]) / T,
            STUDENT[j] - p[j],
            (s.softmax(z, n)[j] - p[j]) / T,
            (STUDENT[j] - p[j]) / T + 1 / n,
        ],
        ids=["sign", "no 1/T", "printed (1.8)", "constant"],
    )
    def test_false_lines_raise(self, wrong):
        with pytest.raises(s.DoesNotHold, match="differ by"):
            s.holds("1.8", "gradient", sp.diff(s.kl_divergence(p, STUDENT, n), z[j]), wrong, given=UNIT)

    def test_conditions_are_needed(self):
        with pytest.raises(s.DoesNotHold):
            s.holds("1.8", "without Σp = 1", sp.diff(s.kl_divergence(p, STUDENT, n), z[j]), (STUDENT[j] - p[j]) / T)

    def test_nested_sums_are_not_dropped(self):
        double = s.total(lambda a: s.total(lambda b: p[a] * q[b], n, k), n, i)
        s.holds("x", "product", double, s.total(lambda a: p[a], n) * s.total(lambda b: q[b], n))
        with pytest.raises(s.DoesNotHold):
            s.holds("x", "one sum lost", double, s.total(lambda b: q[b], n))

    def test_written_out_entries_are_refused(self):
        with pytest.raises(ValueError, match="not a statement for every n"):
            s.holds("x", "three classes", p[1] + p[2], p[2] + p[1])

    def test_a_sum_of_any_sign_is_not_taken_for_positive(self):
        total = s.total(lambda a: z[a], n)
        with pytest.raises(s.DoesNotHold):
            s.holds("x", "root of a square", sp.sqrt(total**2), total)
        s.holds("x", "fine for probabilities", sp.sqrt(s.total(lambda a: p[a], n) ** 2), s.total(lambda a: p[a], n))

    def test_a_delta_needs_its_index_in_range(self):
        with pytest.raises(ValueError, match="its index may lie outside"):
            canonical(sp.Sum(sp.KroneckerDelta(j, k), (k, 1, n - 1)))

    def test_written_out_symbols_are_refused(self):
        p_ = s.positive_entries("p", 3)
        with pytest.raises(ValueError, match="not a statement for every n"):
            s.holds("x", "three classes", sum(p_.values()), p_[1] + p_[2] + p_[3])

    def test_other_verbs(self):
        assert (
            s.holds_for("x", "sum", lambda m: (sum(s.softmax(z, m)[c] for c in range(1, m + 1)), 1), 3).scope
            == "2 ≤ n ≤ 3"
        )
        assert s.agrees("x", "numbers", [1.0, sp.oo], (1, float("inf"))).scope == "numeric"
        assert s.true("x", "fact", sp.true).verdict == s.true("x", "fact", np.bool_(True)).verdict == "holds"
        for bad in (
            lambda: s.holds_for("x", "sum", lambda m: (p[1], q[1]), 3),
            lambda: s.agrees("x", "numbers", [1.0], [1.0 + 1e-9]),
            lambda: s.agrees("x", "lengths", [1.0], [1.0, 1.0]),
            lambda: s.agrees("x", "nan", [float("nan")], [1.0]),
            lambda: s.true("x", "fact", False),
            lambda: s.true("x", "fact", np.bool_(False)),
            lambda: s.true("x", "a number is not a statement", 1),
            lambda: s.true("x", "not decided", p[j] > 0.5),
        ):
            with pytest.raises(s.DoesNotHold):
                bad()

    def test_a_misprint_must_be_false(self):
        assert s.fails("x", "claim", sp.Rational(1, 2), 1, "here").verdict == "false as printed"
        with pytest.raises(s.DoesNotHold, match="said to be misprinted"):
            s.fails("x", "claim", sp.Rational(1, 2), 0.5, "here")


def test_vectors_and_objects_agree_for_three_classes():
    numbers = values(3, 7)
    kl = at(s.kl_divergence(p, q, n), 3, numbers)
    written_out = float(s.kl_divergence(p, q, 3).subs(numbers).evalf(30))
    assert kl == pytest.approx(written_out, rel=1e-14)
    assert at(Vector(lambda c: p[c] ** 2)[j], 3, numbers) == pytest.approx(float(numbers[p[2]]) ** 2)


class TestLedger:
    good = s.Check("1.1", "claim", "every n", "holds")
    conditional = s.Check("1.1", "claim", "2 ≤ n ≤ 5", "holds", "P ≪ Q")
    step = s.Check("1.1", "claim", "every n", "holds", kind="step")
    definition = s.Check("1.1", "claim", "numeric", "holds", kind="definition")
    misprint = s.Check("1.1", "claim", "counterexample", "false as printed")

    def notebook(self, tmp_path, checks):
        outputs = [nbformat.v4.new_output("execute_result", data=check._repr_mimebundle_()) for check in checks]
        cells = [nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("1", outputs=outputs)]
        path = tmp_path / "page.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    def test_round_trip(self, tmp_path):
        path = self.notebook(tmp_path, [self.good, self.misprint])
        assert s.recorded(path) == [(self.good, 1), (self.misprint, 1)]

    def test_not_a_notebook(self, tmp_path):
        path = tmp_path / "page.ipynb"
        for text in ("{", json.dumps([1]), json.dumps({"a": 1})):
            path.write_text(text)
            with pytest.raises(ValueError, match="is not a notebook"):
                s.recorded(path)

    def test_verdicts(self):
        assert s.verdict([self.good]) == "holds"
        assert s.verdict([self.good, self.conditional]) == "holds under P ≪ Q"
        assert s.verdict([self.misprint, self.conditional]) == "corrected under P ≪ Q"
        with pytest.raises(ValueError, match="nothing establishes line 1.1"):
            s.verdict([self.misprint])

    def test_widest_scope(self):
        numeric = s.Check("1.1", "claim", "numeric", "holds")
        assert s.scope([numeric, self.conditional]) == "2 ≤ n ≤ 5"
        assert s.scope([numeric, self.conditional, self.good]) == "every n"

    def test_a_step_does_not_establish_its_line(self):
        assert s.scope([self.conditional, self.step]) == "2 ≤ n ≤ 5"
        assert s.scope([self.step]) == "steps only"

    def test_a_definition_is_not_proved(self):
        assert s.scope([self.definition, self.step]) == s.verdict([self.definition, self.step]) == "definition"

    def test_shown_as_a_mark(self):
        bundle = self.misprint._repr_mimebundle_()
        assert bundle["text/plain"].startswith("✗ (1.1)")
        assert "rkd-check-fails" in bundle["text/html"]
