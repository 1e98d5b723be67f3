# mypy: disable-error-code="no-untyped-def"
"""Value and gradient of each row on a GPU: the kernel that most rows take. In Triton; imported when it is needed.

With weights x of the student and o of the teacher (swapped for orders below 1/2, by skew symmetry), measured from one
class j, r = log(o/x) and the sums, over classes,

    Z = Σ x,    V = Σ x(e^r − 1),    H = Σ xψ(r),    ψ(r) = (e^{αr} − 1 − α(e^r − 1))/(α − 1),    h = α − 1,

one reading of the logits gives every order, without division by a small h and with nothing lost near convergence:

    m = V/Z,    S₁ = 1 + m,    y = (m + H/Z)/S₁,    D_α = log(1 + hy)/h − log S₁,    S_α = S₁(1 + hy).

ψ is a polynomial where r is small and a difference of powers elsewhere. Class j is the likeliest so far: when a
likelier one comes, what the old one held is carried over as if it were a class itself. The sums carry seven digits; how
many of them are left in D_α follows from the sums, and a row where they do not suffice (or that holds NaN, infinite
ratios, powers out of range) is left to `rkd.exact_kernel`. A second reading writes (q − w)/T as −q·expm1(log(w/q))/T.
Explained in the book: 2.1.1, "The Objective".
"""

import triton
import triton.language as tl

# (e^x − 1 − x)/x² on |x| <= 3/4, relative error 5e-9
_C2 = tl.constexpr(0.5)
_C3 = tl.constexpr(0.166666720793)
_C4 = tl.constexpr(0.0416666720712)
_C5 = tl.constexpr(0.00833256402634)
_C6 = tl.constexpr(0.00138881206465)
_C7 = tl.constexpr(0.000201142780522)
_C8 = tl.constexpr(2.50743045482e-5)
_RADIUS = tl.constexpr(0.75)
_BITS = tl.constexpr(1.4426950408889634)  # in a nat
_NATS = tl.constexpr(0.6931471805599453)  # in a bit
_DEAD = tl.constexpr(-1e30)  # stands for -inf, so that differences of two are 0
_LIFT = tl.constexpr(60.0)  # weights are times 2^60: where one vanishes and its product with e^r counts, e^r is inf
_LOST = tl.constexpr(24.0)  # how many times the rounding of its sums D_α may carry
# kinds of orders: 1 (or 0, over α); at least 0.4 from them, so that (e^{αr} − e^r)/h is a difference to be taken; any
ONE, APART, ANY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def growth_of(y):
    """(e^y − 1)/y for |y| <= 3/4."""
    return 1.0 + y * (_C2 + y * (_C3 + y * (_C4 + y * (_C5 + y * (_C6 + y * (_C7 + y * _C8))))))


@triton.jit
def log_1p(x):
    """log(1 + x) in float64, to rounding."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(tl.where(exact, 2.0, u)) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def load_pair(
    z_row,
    v_row,
    mask_row,
    columns,
    n,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Logits of the student and of the teacher in float32; -1e30 for -inf, beyond the row and in masked classes."""
    if EVEN:
        z, v = tl.load(z_row + columns).to(tl.float32), tl.load(v_row + columns).to(tl.float32)
        inside = columns >= 0
    else:
        inside = columns < n
        z = tl.load(z_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        v = tl.load(v_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_MASK:
        kept = tl.load(mask_row + columns, mask=inside, other=0) != 0
        z, v = tl.where(kept, z, float("-inf")), tl.where(kept, v, float("-inf"))
    z = tl.maximum(z, _DEAD, propagate_nan=tl.PropagateNan.ALL)
    return z, tl.maximum(v, _DEAD, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gap_of(x, o, x_j, o_j, HALF: tl.constexpr):
    """(o − x) − (o_j − x_j) from exact differences."""
    if HALF:  # a difference of short numbers is exact
        d = (o - x) - (o_j - x_j)
    else:
        s = o - x
        t = s - o
        s_j = o_j - x_j
        t_j = s_j - o_j
        d = (s - s_j) + (((o - (s - t)) - (x + t)) - ((o_j - (s_j - t_j)) - (x_j + t_j)))
    return d


@triton.jit
def powers_of(d, per_t, order, h, per_h, p2, p3, p4, p5, p6, p7, p8, KIND: tl.constexpr):
    """e^r, e^{αr}, e^r − 1, ψ(r) and e^r(e^{hr} − 1)/h of classes whose gap to class j is d = rT."""
    r = d * per_t
    size = tl.abs(r)
    e_r = tl.exp2(d * (per_t * _BITS))
    rise = tl.where(size < _RADIUS, r * growth_of(r), e_r - 1.0)
    psi = (r * r) * (p2 + r * (p3 + r * (p4 + r * (p5 + r * (p6 + r * (p7 + r * p8))))))
    if KIND == ONE:
        e_m = e_r
        growth = e_r * r
        near = size < _RADIUS
    else:
        e_m = tl.exp2(d * (order * per_t * _BITS))
        growth = (e_m - e_r) * per_h
        if KIND == ANY:
            y = h * r
            growth = tl.where(tl.abs(y) < _RADIUS, (e_r * r) * growth_of(y), growth)
        near = size * tl.maximum(order, 1.0) < _RADIUS
    return e_r, e_m, rise, tl.where(near, psi, growth - rise), growth


@triton.jit
def write_gradient(
    z_row, v_row, mask_row, g_row, label, n, alpha, temperature, soft,
    hard, z_j, v_j, log_q, kappa, log_sharp, KIND: tl.constexpr, FLIP: tl.constexpr,
    PER_ORDER: tl.constexpr, HALF: tl.constexpr, HARD: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr,
    SUB: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """soft·(q − w)/T, over α if asked for, + hard·(softmax(z) − 1 at the label), of one row."""
    columns = tl.arange(0, SUB)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    per_t = 1.0 / temperature
    bits = per_t * _BITS
    at_zero = KIND == ONE and FLIP
    if at_zero:
        slope, factor = per_t, -soft * per_t
    else:
        slope, factor = alpha * per_t, -soft * per_t
        if PER_ORDER:
            factor = factor / alpha
    for start in tl.range(0, n, SUB * WIDTH, num_stages=STAGES):
        z, v = load_pair(z_row, v_row, mask_row, start + columns, n, EVEN, HAS_MASK)
        q_bits = (z - z_j) * bits - log_q
        q = tl.exp2(q_bits)
        y = slope * gap_of(z, v, z_j, v_j, HALF) - kappa
        if at_zero:
            g = tl.where(q == 0.0, 0.0, q * y)
        else:
            g = tl.where(tl.abs(y) < _RADIUS, q * (y * growth_of(y)), tl.exp2(q_bits + y * _BITS) - q)
        g = g * factor
        if HARD:
            sharp = tl.exp2((z - z_j) * _BITS - log_sharp)
            g += hard * tl.where(start + columns == label, sharp - 1.0, sharp)
        g = g.to(g_row.dtype.element_ty)
        if EVEN:
            tl.store(g_row + start + columns, g)
        else:
            tl.store(g_row + start + columns, g, mask=start + columns < n)


@triton.jit
def visit_rows(
    z_ptr, v_ptr, mask_ptr, labels_ptr, alphas_ptr, temperatures_ptr, softs_ptr,
    hards_ptr, values_ptr, state_ptr, g_ptr, n, z_stride, v_stride,
    mask_stride, g_stride, alpha, temperature, soft, hard, lowest, highest,
    KIND: tl.constexpr, FLIP: tl.constexpr, PER_ORDER: tl.constexpr, HALF: tl.constexpr, HARD: tl.constexpr,
    HAS_MASK: tl.constexpr, ALPHAS: tl.constexpr, TEMPERATURES: tl.constexpr, SOFTS: tl.constexpr,
    HARDS: tl.constexpr, GRADIENT: tl.constexpr, EVEN: tl.constexpr, SUB: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program: its weighted loss, its state, and its gradient if asked for; g may be z."""
    row = tl.program_id(0).to(tl.int64)
    z_row, v_row, mask_row = z_ptr + row * z_stride, v_ptr + row * v_stride, mask_ptr + row * mask_stride
    if ALPHAS:
        alpha = tl.load(alphas_ptr + row).to(tl.float32)
    if TEMPERATURES:
        temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if SOFTS:
        soft = tl.load(softs_ptr + row).to(tl.float32)
    if HARDS:
        hard = tl.load(hards_ptr + row).to(tl.float32)
    columns = tl.arange(0, SUB)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if (soft == 0.0) & (hard == 0.0):
        tl.store(values_ptr + row, 0.0)
        tl.store(state_ptr + row * 6 + 5, 1.0)
        if GRADIENT:
            for start in range(0, n, SUB * WIDTH):
                tl.store(g_ptr + row * g_stride + start + columns, 0.0, mask=start + columns < n)
    else:
        per_t = 1.0 / temperature
        bits = per_t * _BITS
        flip = alpha < 0.5 if ALPHAS else FLIP
        h = tl.where(flip, -alpha, alpha - 1.0)
        order = 1.0 + h
        per_h = 1.0 / h
        q = order
        p2 = q * _C2
        q = order + order * q
        p3 = q * _C3
        q = order + order * q
        p4 = q * _C4
        q = order + order * q
        p5 = q * _C5
        q = order + order * q
        p6 = q * _C6
        q = order + order * q
        p7 = q * _C7
        q = order + order * q
        p8 = q * _C8

        total = tl.zeros([WIDTH], tl.float32)
        difference = tl.zeros([WIDTH], tl.float32)
        excess = tl.zeros([WIDTH], tl.float32)
        sharp = tl.zeros([WIDTH], tl.float32)
        x_j = tl.full([], -3e38, tl.float32)
        o_j = tl.full([], 0.0, tl.float32)
        for start in tl.range(0, n, SUB * WIDTH, num_stages=STAGES):
            z, v = load_pair(z_row, v_row, mask_row, start + columns, n, EVEN, HAS_MASK)
            x, o = tl.where(flip, v, z), tl.where(flip, z, v)
            top = tl.max(tl.max(x, 0), 0)
            if top > x_j:
                at_top = tl.max(tl.max(tl.where(x == top, o, _DEAD), 0), 0)
                d = gap_of(x_j, o_j, top, at_top, HALF)
                if KIND == ONE:
                    e_r, e_m, rise, psi, growth = powers_of(d, per_t, order, h, per_h, p2, p3, p4, p5, p6, p7, p8, ONE)
                else:
                    e_r, e_m, rise, psi, growth = powers_of(d, per_t, order, h, per_h, p2, p3, p4, p5, p6, p7, p8, ANY)
                w = tl.exp2((x_j - top) * bits)
                fresh = x_j < -2e38
                w, e_r, e_m = tl.where(fresh, 0.0, w), tl.where(fresh, 0.0, e_r), tl.where(fresh, 0.0, e_m)
                rise, psi, growth = tl.where(fresh, 0.0, rise), tl.where(fresh, 0.0, psi), tl.where(fresh, 0.0, growth)
                excess = w * (e_m * excess + (order * growth) * difference + psi * total)
                difference = w * (e_r * difference + rise * total)
                total = w * total
                if HARD:
                    move = tl.where(flip, o_j - at_top, x_j - top)
                    sharp = sharp * tl.where(fresh, 0.0, tl.exp2(move * _BITS))
                x_j, o_j = top, at_top
            d = gap_of(x, o, x_j, o_j, HALF)
            _, _, rise, psi, _ = powers_of(d, per_t, order, h, per_h, p2, p3, p4, p5, p6, p7, p8, KIND)
            w = tl.exp2((x - x_j) * bits + _LIFT)
            total += tl.sum(w, 0)
            difference += tl.sum(w * rise, 0)
            excess += tl.sum(w * psi, 0)
            if HARD:
                sharp += tl.sum(tl.exp2(tl.where(flip, o - o_j, x - x_j) * _BITS), 0)

        mass = tl.sum(total.to(tl.float64), 0)
        m = tl.sum(difference.to(tl.float64), 0) / mass
        big_h = tl.sum(excess.to(tl.float64), 0) / mass
        wide_h, wide_order = h.to(tl.float64), order.to(tl.float64)
        s_1 = 1.0 + m
        y = (m + big_h) / s_1
        log_s1 = log_1p(m)
        if KIND == ONE:
            log_tilt = y * 0.0
            divergence = y - log_s1
            s_order = s_1
        else:
            log_tilt = log_1p(wide_h * y)
            divergence = tl.where(wide_h == 0.0, y, log_tilt / tl.where(wide_h == 0.0, 1.0, wide_h)) - log_s1
            s_order = s_1 * (1.0 + wide_h * y)
        # what the rounding of H and m does to D_α, in units of that rounding; moved = Σ x|e^r − 1|/Z
        moved = tl.minimum(tl.sqrt(2.0 * big_h * (2.0 + m)), 2.0 + m)
        carried = (big_h + wide_order * tl.abs(m + big_h) * moved / s_1) / s_order
        done = (carried <= divergence * _LOST) & (mass < 1e30) & (x_j > -1e29) & (o_j > -1e29) & (temperature > 0.0)
        done = done & (s_1 > 1e-9) & (s_order > 1e-9) & (s_1 < 1e15) & (s_order < 1e15)
        done = done & (alpha >= lowest) & (alpha <= highest)

        z_j, v_j = tl.where(flip, o_j, x_j), tl.where(flip, x_j, o_j)
        log_q = tl.log2(tl.where(flip, mass * s_1, mass).to(tl.float32)) - _LIFT
        if KIND == ONE:  # at order 0 the slope of log(w/q) in α
            kappa = tl.where(flip, -y, log_s1).to(tl.float32)
        else:
            kappa = tl.where(flip, log_tilt, log_s1 + log_tilt).to(tl.float32)
        divergence = tl.where(divergence > 0.0, divergence, 0.0).to(tl.float32)
        divergence = divergence / order if PER_ORDER else tl.where(flip, divergence / order * alpha, divergence)
        value = tl.where(soft == 0.0, 0.0, soft * divergence)
        log_sharp = tl.full([], 0.0, tl.float32)
        label = -1
        if HARD:
            label = tl.load(labels_ptr + row).to(tl.int64)
            known = (label >= 0) & (label < n)
            z_label = tl.load(z_row + tl.where(known, label, 0)).to(tl.float32)
            if HAS_MASK:
                allowed = tl.load(mask_row + tl.where(known, label, 0)) != 0
                z_label = tl.where(allowed, z_label, float("-inf"))
            log_sharp = tl.log2(tl.sum(sharp, 0))
            cross = log_sharp * _NATS - (z_label - z_j)
            done = done & (log_sharp < 1e30) & (log_sharp > -1e30) & known
            value += tl.where(hard == 0.0, 0.0, hard * cross)
        tl.store(values_ptr + row, value, mask=done)
        tl.store(state_ptr + row * 6, z_j)
        tl.store(state_ptr + row * 6 + 1, v_j)
        tl.store(state_ptr + row * 6 + 2, log_q)
        tl.store(state_ptr + row * 6 + 3, kappa)
        tl.store(state_ptr + row * 6 + 4, log_sharp)
        tl.store(state_ptr + row * 6 + 5, tl.where(done, 1.0, 0.0))
        if GRADIENT and done:
            tl.debug_barrier()  # g may be z
            write_gradient(
                z_row, v_row, mask_row, g_ptr + row * g_stride, label, n, alpha, temperature, soft, hard, z_j, v_j,
                log_q, kappa, log_sharp, KIND, FLIP, PER_ORDER, HALF, HARD, HAS_MASK, EVEN, SUB, WIDTH, STAGES,
            )  # fmt: skip


@triton.jit
def differentiate_rows(
    z_ptr, v_ptr, mask_ptr, labels_ptr, alphas_ptr, temperatures_ptr, softs_ptr,
    hards_ptr, upstream_ptr, state_ptr, g_ptr, n, z_stride, v_stride,
    mask_stride, g_stride, upstream_stride, alpha, temperature, soft, hard,
    KIND: tl.constexpr, FLIP: tl.constexpr, PER_ORDER: tl.constexpr, HALF: tl.constexpr, HARD: tl.constexpr,
    HAS_MASK: tl.constexpr, ALPHAS: tl.constexpr, TEMPERATURES: tl.constexpr, SOFTS: tl.constexpr,
    HARDS: tl.constexpr, EVEN: tl.constexpr, SUB: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program: the gradient of a row that `visit_rows` has done, times what comes from above."""
    row = tl.program_id(0).to(tl.int64)
    if ALPHAS:
        alpha = tl.load(alphas_ptr + row).to(tl.float32)
    if TEMPERATURES:
        temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if SOFTS:
        soft = tl.load(softs_ptr + row).to(tl.float32)
    if HARDS:
        hard = tl.load(hards_ptr + row).to(tl.float32)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    soft, hard = soft * upstream, hard * upstream
    if (soft == 0.0) & (hard == 0.0):
        columns = tl.arange(0, SUB)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        for start in range(0, n, SUB * WIDTH):
            tl.store(g_ptr + row * g_stride + start + columns, 0.0, mask=start + columns < n)
    elif tl.load(state_ptr + row * 6 + 5) != 0.0:
        label = tl.full([], -1, tl.int64)
        if HARD:
            label = tl.load(labels_ptr + row).to(tl.int64)
        write_gradient(
            z_ptr + row * z_stride, v_ptr + row * v_stride, mask_ptr + row * mask_stride, g_ptr + row * g_stride,
            label, n, alpha, temperature, soft, hard, tl.load(state_ptr + row * 6), tl.load(state_ptr + row * 6 + 1),
            tl.load(state_ptr + row * 6 + 2), tl.load(state_ptr + row * 6 + 3), tl.load(state_ptr + row * 6 + 4),
            KIND, FLIP, PER_ORDER, HALF, HARD, HAS_MASK, EVEN, SUB, WIDTH, STAGES,
        )  # fmt: skip


@triton.jit
def scale_rows(
    g_ptr, upstream_ptr, n, g_stride, upstream_stride, WIDTH: tl.constexpr
):  # fmt: skip
    """g times what comes from above, in place; nothing is read where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    if upstream != 1.0:
        for start in range(0, n, WIDTH):
            at = g_ptr + row * g_stride + start + tl.arange(0, WIDTH)
            inside = start + tl.arange(0, WIDTH) < n
            g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(upstream == 0.0, 0.0, g * upstream)
            tl.store(at, g.to(g_ptr.dtype.element_ty), mask=inside)
