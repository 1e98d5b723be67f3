# mypy: disable-error-code="no-untyped-def"
"""Value and gradient of a row on a GPU in float64, whatever the row holds: the kernel for what `rkd.kernels` leaves.

It reads each row two to four times: for the normalisers; for the sums of `rkd.kernels` and the log-sum-exp of the
mixture w; for the normaliser of w where D_α is infinite or α = ∞; for the gradient. Half of a Hopper GPU's arithmetic
is in float64, so a few such rows cost nothing, and small batches take one launch instead of two.
Impossible classes and the ends of the orders are treated as in `rkd.divergence` and `rkd.logits`.
Book: 2.1.1, "The Objective".
"""

import triton
import triton.language as tl

from rkd.kernels import log_1p

_SMALL = tl.constexpr(0.0625)  # series below it
_TINY_ORDER = tl.constexpr(1e-30)
_FLOOR = tl.constexpr(-1e30)


@triton.jit
def load_wide(z_row, v_row, mask_row, columns, n, HAS_MASK: tl.constexpr):
    """Logits in float64, and whether a class is inside the row and the mask."""
    kept = columns < n
    if HAS_MASK:
        kept = kept & (tl.load(mask_row + columns, mask=kept, other=0) != 0)
    z = tl.load(z_row + columns, mask=kept, other=float("-inf")).to(tl.float64)
    v = tl.load(v_row + columns, mask=kept, other=float("-inf")).to(tl.float64)
    return z, v, kept


@triton.jit
def growth_series(y):
    """(e^y − 1)/y."""
    near = tl.abs(y) < _SMALL
    s = tl.where(near, y, 0.0)
    series = 1.0 + s / 2 * (1.0 + s / 3 * (1.0 + s / 4 * (1.0 + s / 5 * (1.0 + s / 6 * (1.0 + s / 7)))))
    return tl.where(near, series, (tl.exp(y) - 1.0) / tl.where(near, 1.0, y))


@triton.jit
def psi_series(r, order):
    """ψ(r) of `rkd.kernels` for small r and αr."""
    total = r * 0.0
    c2 = order
    c3 = order + order * c2
    c4 = order + order * c3
    c5 = order + order * c4
    c6 = order + order * c5
    c7 = order + order * c6
    c8 = order + order * c7
    total = c7 / 5040 + r * (c8 / 40320)
    total = c3 / 6 + r * (c4 / 24 + r * (c5 / 120 + r * (c6 / 720 + r * total)))
    return r * r * (c2 / 2 + r * total)


@triton.jit
def visit_rows_exactly(
    z_ptr, v_ptr, mask_ptr, labels_ptr, alphas_ptr, temperatures_ptr, softs_ptr,
    hards_ptr, upstream_ptr, values_ptr, state_ptr, g_ptr, rows, n, z_stride,
    v_stride, mask_stride, g_stride, upstream_stride, alpha, temperature, soft,
    hard, PER_ORDER: tl.constexpr, HARD: tl.constexpr, HAS_MASK: tl.constexpr, ALPHAS: tl.constexpr,
    TEMPERATURES: tl.constexpr, SOFTS: tl.constexpr, HARDS: tl.constexpr, UPSTREAM: tl.constexpr,
    ONLY_LEFT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every so manieth row, of those left over or of all; g may be z."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        left = True
        if ONLY_LEFT:
            left = tl.load(state_ptr + row * 6 + 5) == 0.0
        if left:
            visit_exactly(
                z_ptr + row * z_stride, v_ptr + row * v_stride, mask_ptr + row * mask_stride, labels_ptr + row,
                alphas_ptr + row, temperatures_ptr + row, softs_ptr + row, hards_ptr + row,
                upstream_ptr + row * upstream_stride, values_ptr + row, state_ptr + row * 6 + 5,
                g_ptr + row * g_stride, n, alpha, temperature, soft, hard, PER_ORDER, HARD, HAS_MASK, ALPHAS,
                TEMPERATURES, SOFTS, HARDS, UPSTREAM, ONLY_LEFT, GRADIENT, BLOCK,
            )  # fmt: skip


@triton.jit
def visit_exactly(
    z_row, v_row, mask_row, label_at, alpha_at, temperature_at, soft_at,
    hard_at, upstream_at, value_at, state_at, g_row, n, alpha, temperature,
    soft, hard, PER_ORDER: tl.constexpr, HARD: tl.constexpr, HAS_MASK: tl.constexpr, ALPHAS: tl.constexpr,
    TEMPERATURES: tl.constexpr, SOFTS: tl.constexpr, HARDS: tl.constexpr, UPSTREAM: tl.constexpr,
    ONLY_LEFT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a = tl.load(alpha_at).to(tl.float64) if ALPHAS else tl.cast(alpha, tl.float64)
    t = tl.load(temperature_at).to(tl.float64) if TEMPERATURES else tl.cast(temperature, tl.float64)
    soft_weight = tl.load(soft_at).to(tl.float64) if SOFTS else tl.cast(soft, tl.float64)
    hard_weight = tl.load(hard_at).to(tl.float64) if HARDS else tl.cast(hard, tl.float64)
    if UPSTREAM:
        upstream = tl.load(upstream_at).to(tl.float64)
        soft_weight, hard_weight = soft_weight * upstream, hard_weight * upstream
    columns = tl.arange(0, BLOCK)
    if (soft_weight == 0.0) & (hard_weight == 0.0):
        if not UPSTREAM:
            tl.store(value_at, 0.0)
        if GRADIENT:
            for start in range(0, n, BLOCK):
                tl.store(g_row + start + columns, 0.0, mask=start + columns < n)
    else:
        bad = ~((a >= 0.0) & (t > 0.0) & (t < float("inf")))
        a = tl.where(a < _TINY_ORDER, 0.0, a)
        infinite = a > 1.0 / _TINY_ORDER
        order_p = tl.where(infinite, 1.0, a)
        flip = order_p < 0.5
        h = tl.where(flip, -order_p, order_p - 1.0)
        order = 1.0 + h

        # normalisers
        z_top = tl.full([], float("-inf"), tl.float64)
        v_top = tl.full([], float("-inf"), tl.float64)
        z_sum = tl.full([], 0.0, tl.float64)
        v_sum = tl.full([], 0.0, tl.float64)
        sharp_sum = tl.full([], 0.0, tl.float64)
        for start in range(0, n, BLOCK):
            z, v, _ = load_wide(z_row, v_row, mask_row, start + columns, n, HAS_MASK)
            bad = bad | (tl.max(((z != z) | (v != v)).to(tl.int32), 0) > 0)
            new = tl.maximum(z_top, tl.max(z, 0))
            shift = tl.where(new == float("-inf"), 0.0, new)
            z_sum = z_sum * tl.exp((z_top - shift) / t) + tl.sum(tl.exp((z - shift) / t), 0)
            if HARD:
                sharp_sum = sharp_sum * tl.exp(z_top - shift) + tl.sum(tl.exp(z - shift), 0)
            z_top = new
            new = tl.maximum(v_top, tl.max(v, 0))
            shift = tl.where(new == float("-inf"), 0.0, new)
            v_sum = v_sum * tl.exp((v_top - shift) / t) + tl.sum(tl.exp((v - shift) / t), 0)
            v_top = new
        bad = bad | (tl.abs(z_top) == float("inf")) | (tl.abs(v_top) == float("inf"))
        z_top, v_top = tl.where(bad, 0.0, z_top), tl.where(bad, 0.0, v_top)
        log_z, log_v = tl.log(z_sum), tl.log(v_sum)
        shift = log_v - log_z  # log(p/q) = ((v − z) − (v_top − z_top))/T − shift

        # the sums, the mixture's log-sum-exp, and what the ends of the orders need
        difference = tl.zeros([BLOCK], tl.float64)
        excess = tl.zeros([BLOCK], tl.float64)
        lost = tl.zeros([BLOCK], tl.float64)
        kept_mass = tl.zeros([BLOCK], tl.float64)
        w_top = tl.full([], float("-inf"), tl.float64)
        w_sum = tl.full([], 0.0, tl.float64)
        largest = tl.full([], float("-inf"), tl.float64)
        only_other = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK):
            z, v, _ = load_wide(z_row, v_row, mask_row, start + columns, n, HAS_MASK)
            dead_q, dead_p = z == float("-inf"), v == float("-inf")
            alive = ~dead_q & ~dead_p
            log_q, log_p = (z - z_top) / t - log_z, (v - v_top) / t - log_v
            gap = tl.where(alive, v - z, 0.0)
            rho = tl.where(alive, (gap - (v_top - z_top)) / t - shift, 0.0)
            r = tl.where(flip, -rho, rho)
            log_x, log_o = tl.where(flip, log_p, log_q), tl.where(flip, log_q, log_p)
            x, o = tl.exp(log_x), tl.exp(log_o)
            away = tl.where(flip, dead_p & ~dead_q, dead_q & ~dead_p)  # the base alone is 0
            mixed = tl.where(alive, log_x + order * r, float("-inf"))
            near = alive & (tl.abs(r) < _SMALL) & (tl.abs(order * r) < _SMALL)
            step = tl.where(near, x * (r * growth_series(tl.where(near, r, 0.0))), o - x)
            growth = tl.where(
                tl.abs(h * r) < _SMALL,
                o * (r * growth_series(tl.where(tl.abs(h * r) < _SMALL, h * r, 0.0))),
                (tl.exp(mixed) - o) / tl.where(h == 0.0, 1.0, h),
            )
            psi = tl.where(near, x * psi_series(tl.where(near, r, 0.0), order), growth - step)
            psi = tl.where(alive, psi, tl.where(away, o * (order / tl.where(h < 0.0, -h, 1.0)), x))
            difference += step
            excess += psi
            only_other = only_other | tl.max(away.to(tl.int32), 0)
            lost += tl.where(dead_p, tl.exp(log_q), 0.0)
            kept_mass += tl.where(dead_p, 0.0, tl.exp(log_q))
            new = tl.maximum(w_top, tl.max(mixed, 0))
            at = tl.where(new == float("-inf"), 0.0, new)
            w_sum = w_sum * tl.exp(w_top - at) + tl.sum(tl.exp(mixed - at), 0)
            w_top = new
            reach = tl.where(dead_p, float("-inf"), tl.where(dead_q, float("inf"), gap))
            largest = tl.maximum(largest, tl.max(reach, 0))

        # D_α and D_α/α
        m, big_h = tl.sum(difference, 0), tl.sum(excess, 0)
        s_1 = 1.0 + m
        y = (m + big_h) / s_1
        log_s1, tilt = log_1p(m), h * y
        disjoint = w_top == float("-inf")
        log_w = tl.where(disjoint, 0.0, w_top) + tl.log(tl.where(disjoint, 1.0, w_sum))  # log S_α
        by_tilt = (tl.abs(tilt) <= 0.5) | (h == 0.0)
        log_tilt = tl.where(by_tilt, log_1p(tl.where(by_tilt, tilt, 0.0)), log_w - log_s1)
        value = tl.where(h == 0.0, y, log_tilt / tl.where(h == 0.0, 1.0, h)) - log_s1
        value = tl.where(value > 0.0, value, 0.0)
        value = tl.where(disjoint | ((only_other > 0) & (h >= 0.0)), float("inf"), value)
        ratio = value / order
        divergence = tl.where(flip, tl.where(a == 0.0, 0.0, ratio * a), value)
        reach = tl.where(largest == float("inf"), float("inf"), (largest - (v_top - z_top)) / t - shift)
        reach = tl.where(reach > 0.0, reach, 0.0)
        divergence = tl.where(infinite, reach, divergence)
        ratio = tl.where(infinite, tl.where(reach == float("inf"), reach, 0.0), ratio)
        lost_mass, held_mass = tl.sum(lost, 0), tl.sum(kept_mass, 0)
        at_zero = tl.where(lost_mass < 0.5, -log_1p(-tl.where(lost_mass < 0.5, lost_mass, 0.0)), -tl.log(held_mass))
        divergence = tl.where(a == 0.0, tl.where(at_zero > 0.0, at_zero, 0.0), divergence)
        value = ratio if PER_ORDER else divergence
        value = tl.where(bad, float("nan"), value)
        value = tl.where(soft_weight == 0.0, 0.0, soft_weight * value)
        label = -1
        log_sharp = tl.full([], 0.0, tl.float64)
        if HARD:
            label = tl.load(label_at).to(tl.int64)
            known = (label >= 0) & (label < n)
            z_label = tl.load(z_row + tl.where(known, label, 0)).to(tl.float64)
            if HAS_MASK:
                allowed = tl.load(mask_row + tl.where(known, label, 0)) != 0
                z_label = tl.where(allowed, z_label, float("-inf"))
            log_sharp = tl.log(sharp_sum)
            cross = tl.where(known & ~bad, log_sharp - (z_label - z_top), float("nan"))
            value += tl.where(hard_weight == 0.0, 0.0, hard_weight * cross)
        if not UPSTREAM:
            tl.store(value_at, value.to(tl.float32))

        if GRADIENT:
            unbounded = ratio == float("inf")
            limit = (unbounded | infinite) & ~bad
            is_p = (a == 1.0) | ((a < 1.0) & (disjoint | (a > 0.0)))  # there the limit of w is p
            e_top = tl.full([], float("-inf"), tl.float64)
            e_sum = tl.full([], 0.0, tl.float64)
            if limit:
                for start in range(0, n, BLOCK):
                    z, v, _ = load_wide(z_row, v_row, mask_row, start + columns, n, HAS_MASK)
                    e = limit_of(z, v, z_top, v_top, log_z, log_v, t, a, infinite, largest)
                    new = tl.maximum(e_top, tl.max(e, 0))
                    at = tl.where(new == float("-inf"), 0.0, new)
                    e_sum = e_sum * tl.exp(e_top - at) + tl.sum(tl.exp(e - at), 0)
                    e_top = new
            e_top = tl.where(e_sum > 0.0, e_top, 0.0)
            e_sum = tl.where(e_sum > 0.0, e_sum, 1.0)
            kappa = tl.where(flip, log_tilt, log_s1 + log_tilt)  # log(w/q) = α·log(p/q) − κ
            slope = tl.where(a == 0.0, -y, kappa / tl.where(a == 0.0, 1.0, a))
            factor = tl.where(infinite & ~unbounded, 0.0, 1.0) if PER_ORDER else tl.where(limit, 1.0, a)
            others = tl.zeros([BLOCK], tl.float64)  # rows of q − w sum to 0: a class with most of both is left to them
            own_hard = tl.zeros([BLOCK], tl.float64)
            place = tl.full([], -1, tl.int32)
            tl.debug_barrier()  # g may be z
            for start in range(0, n, BLOCK):
                z, v, kept = load_wide(z_row, v_row, mask_row, start + columns, n, HAS_MASK)
                alive = (z > float("-inf")) & (v > float("-inf"))
                log_q, log_p = (z - z_top) / t - log_z, (v - v_top) / t - log_v
                q = tl.exp(log_q)
                rho = tl.where(alive, (v - z - (v_top - z_top)) / t - shift, 0.0)
                ratio_log = tl.where(alive, rho - slope, 0.0)  # log(w/q)/α
                tilted = a * ratio_log
                near = tl.abs(tilted) < _SMALL
                small = q * (ratio_log * growth_series(tl.where(near, tilted, 0.0)))
                w = tl.where(alive, tl.exp(log_q + tilted), 0.0)
                large = (w - q) / tl.where(a == 0.0, 1.0, a)
                g = -tl.where(alive, tl.where(near, small, large), -q / tl.where(a == 0.0, 1.0, a))
                if limit:
                    e = limit_of(z, v, z_top, v_top, log_z, log_v, t, a, infinite, largest)
                    w = tl.where(is_p, tl.exp(log_p), tl.exp(e - e_top) / e_sum)
                    g = q - w
                g = soft_weight * (g * factor / t)
                g = tl.where(bad, float("nan"), g)
                g = tl.where(soft_weight == 0.0, 0.0, g)
                dominant = (q > 0.5) & (w > 0.5)
                others += tl.where(dominant, 0.0, g)
                place = tl.maximum(place, tl.max(tl.where(dominant, start + columns, -1), 0))
                if HARD:
                    sharp = tl.exp(z - z_top - log_sharp)
                    by_hard = tl.where(start + columns == label, sharp - 1.0, sharp)
                    by_hard = tl.where((label >= 0) & (label < n) & ~bad, by_hard, float("nan"))
                    by_hard = tl.where(hard_weight == 0.0, 0.0, hard_weight * by_hard)
                    own_hard += tl.where(dominant, by_hard, 0.0)
                    g += by_hard
                if HAS_MASK:
                    g = tl.where(kept, g, 0.0)
                written = (start + columns < n) & ~dominant
                tl.store(g_row + start + columns, g.to(tl.float32).to(g_row.dtype.element_ty), mask=written)
            own = (tl.sum(own_hard, 0) - tl.sum(others, 0)).to(tl.float32)
            if place >= 0:
                tl.store(g_row + place, own.to(g_row.dtype.element_ty))


@triton.jit
def limit_of(
    z,
    v,
    z_top,
    v_top,
    log_z,
    log_v,
    t,
    a,
    infinite,
    largest,
):
    """The exponent of w: at α = ∞ of the classes of largest p/q; at 0 of those where p > 0; else where only q is 0."""
    dead_q, dead_p = z == float("-inf"), v == float("-inf")
    log_q, log_p = (z - z_top) / t - log_z, (v - v_top) / t - log_v
    reach = tl.where(dead_p, float("-inf"), tl.where(dead_q, float("inf"), v - z))
    at_end = tl.where((reach == largest) & ~dead_p, tl.where(log_q > _FLOOR, log_q, _FLOOR), float("-inf"))
    blocked = tl.where(dead_q & ~dead_p, a * log_p, float("-inf"))
    at_zero = tl.where(dead_p, float("-inf"), log_q)
    return tl.where(infinite, at_end, tl.where(a == 0.0, at_zero, blocked))
