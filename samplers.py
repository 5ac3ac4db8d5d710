"""From noise to data: time grids, guidance and solvers of dz = v(z, t) dt (Eq. 1; Sec. 5.1, Tab. 6).

A sampler is one function, `sample_x(velocity, z, ts, callback=None) -> z`, its body the update rule from t to the next time s:
    velocity(z, t)           (B, ...), (B,) -> (B, ...)
    z                        (B, ...) at ts[0];  ts (steps + 1,), falling from noise to data, or rising to invert
    callback(i, t, z, v)     once a step, with the velocity v found at the step's beginning
Those whose rule knows the path z_t = a x_0 + b eps take `path`: STRAIGHT (Eq. 13) unless given, any `flow.Formulation` else.
No rule assumes that the grid is equally spaced.
"""
import math
from itertools import pairwise

import torch

import flow

STRAIGHT = flow.RectifiedFlow()


# ---- time grids, (steps + 1,), from t_max down to t_min, both included -------------------------------------------------

def timesteps(steps, shift=1.0, t_max=1.0, t_min=0.0, schedule="uniform", t_last=0.0):
    """A grid on [1, 0], shifted once (Eq. 23), then scaled to [t_max, t_min].

    t_last: where the last step begins, which goes down to t_min at once, as from k-diffusion's sigma_min; the grid above it has the other steps.

    schedule: 'uniform'; 'logit-normal', quantiles of Eq. 19 with s = 1 (and, by the shift, m = log(shift)); 'released', what Stability
    and diffusers do, shifting the low end twice (the last t before 0 is 0.0089 for shift 3 in the limit, not 0.0030); or any
    function from [0, 1] onto [0, 1], such as the quantile function of a density, `formulation(...).pi.sample`.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"timesteps: steps must be at least 1 and shift above 0, not {steps} and {shift}")
    if not t_last < t_max:
        raise ValueError(f"timesteps: t_last must be below t_max, {t_max}, not {t_last}")
    if t_last > t_min and steps > 1:
        return torch.cat([timesteps(steps - 1, shift, t_max, t_last, schedule), torch.tensor([t_min])])
    u = torch.linspace(1, 0, steps + 1)
    if schedule == "released":
        u = torch.cat([torch.linspace(1, flow.shift(0.001, shift), steps), torch.zeros(1)])
    elif schedule == "logit-normal":
        u = torch.sigmoid(torch.special.ndtri(u))
    elif callable(schedule):
        u = schedule(u).sort(descending=True).values
    elif schedule != "uniform":
        raise ValueError(f"unknown schedule {schedule!r}; known are uniform, logit-normal, released (log-snr is `timesteps_log_snr`), or a function")
    t = t_min + (t_max - t_min) * flow.shift(u, shift)
    t[0], t[-1] = t_max, t_min                    # exactly, whatever float32 made of them
    return t


def timesteps_log_snr(steps, path, shift=1.0, limit=14.0):
    """Uniform in lambda_t between -limit and limit, as far as the path's range goes. What curved paths want: EDM's t crowds at its ends.

    shift: of Eq. 23, on the share of that range that is left; above 1 more of the steps are near noise."""
    low, high = (torch.full((steps + 1,), t, dtype=torch.float64) for t in (path.t_min, path.t_max))
    left = flow.shift(torch.linspace(1, 0, steps + 1).double(), shift)
    goal = torch.lerp(*path.log_snr(torch.stack([low, high])).clamp(-limit, limit), left)
    for _ in range(150):                          # bisection, down to the smallest t that float32 holds
        t = (low + high) / 2
        above = path.log_snr(t) > goal
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    t[0], t[-1] = path.t_max, path.t_min
    return t.float()


def timesteps_adapted(steps, velocity, z, ts, order=1):
    """A grid for these trajectories: a step's local error, (step)^(order + 1) |dv/dt|, is made the same for all. ts: a fine grid to measure on."""
    vs = []
    sample_euler(velocity, z, ts, lambda i, t, z, v: vs.append(v))
    bend = torch.stack([(w - v).square().mean().sqrt() for v, w in pairwise(vs)]).to(ts) / -ts.diff()[:-1]
    bend = torch.cat([bend, bend[-1:]]) ** (1 / (order + 1)) + 1e-6       # straight paths: the uniform grid
    travelled = torch.cat([torch.zeros(1), (bend * -ts.diff()).cumsum(0)])
    goal = torch.linspace(0, 1, steps + 1) * travelled[-1]
    i = torch.searchsorted(travelled, goal).clamp(1, len(ts) - 1)
    grid = torch.lerp(ts[i - 1], ts[i], (goal - travelled[i - 1]) / (travelled[i] - travelled[i - 1]))
    grid[0], grid[-1] = ts[0], ts[-1]
    return grid


# ---- guidance -----------------------------------------------------------------------------------------------------------

def guided(velocity, null_velocity, scale, interval=(0, 1), rescale=0.0, joint=None):
    """Classifier-free guidance, v_0 + scale (v - v_0), while t is in the interval (Kynkaanniemi et al. 2024); v alone outside, and for scale 1.

    rescale in [0, 1]: how far to bring the standard deviation of each sample back to that of v (Lin et al. 2023).
    joint: one network call for both instead of two, (2B, ...), (2B,) -> (2B, ...), conditional half first; null_velocity is then unused.
    """
    if scale == 1:
        return velocity

    def field(z, t):
        if not (interval[0] <= t[0] and t[0] <= interval[1]):       # torch compares in t's own precision
            return velocity(z, t)
        if joint:
            v, v_0 = joint(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
        else:
            v, v_0 = velocity(z, t), null_velocity(z, t)
        out = v_0 + scale * (v - v_0)
        if rescale:
            dims = tuple(range(1, z.ndim))
            out = out * (1 - rescale + rescale * v.std(dims, keepdim=True) / out.std(dims, keepdim=True))
        return out
    return field


def guided_edit(joint, image_scale, text_scale):
    """Guidance towards a picture and a text (App. D, after Brooks et al. 2023): v_0 + image_scale (v_image - v_0) + text_scale (v - v_image).

    joint: one network call for all three, (3B, ...), (3B,) -> (3B, ...): shown the picture and the text, the picture alone, nothing."""
    def field(z, t):
        v, v_image, v_0 = joint(torch.cat([z] * 3), torch.cat([t] * 3)).chunk(3)
        return v_0 + image_scale * (v_image - v_0) + text_scale * (v - v_image)
    return field


# ---- noise --------------------------------------------------------------------------------------------------------------

def randn(shape, generator=None, dtype=None, device=None):
    """Gaussian noise on the generator's device, `device` without one; of a list of generators, a row of each."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([randn((1, *shape[1:]), one, dtype) for one in generator])
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device if generator else device)


# ---- from the velocity to x_0 and eps -----------------------------------------------------------------------------------

def parts(v, z, t, path=STRAIGHT):
    """(x_0, eps): the two unknowns of z = a x_0 + b eps and v = a' x_0 + b' eps."""
    a, b, da, db = path.a(t), path.b(t), path.da(t), path.db(t)
    d = a * db - da * b
    return (db * z - b * v) / d, (a * v - da * z) / d


def start_from(x0, eps, ts, strength, path=STRAIGHT):
    """Image to image: (z, ts) to begin at t = `strength` in [0, 1], or where the grid does, and go on at the grid's next t."""
    if strength < ts[0]:
        ts = torch.cat([ts.new_tensor([strength]), ts[ts < strength]])
    return path.a(ts[0]) * x0 + path.b(ts[0]) * eps, ts


def keeping(velocity, x0, eps, mask, path=STRAIGHT):
    """Inpainting: the velocity where `mask` is 1; where it is 0 that of the path through z to the known x0 (Eq. 5), at which any solver then arrives. eps: where that path
    began, for an evaluation at its very end."""
    def field(z, t):
        t_ = t.view(-1, *[1] * (z.ndim - 1))
        b = path.b(t_)
        left = torch.where(b > 0, (z - path.a(t_) * x0) / b, eps)
        return torch.where(mask > 0, velocity(z, t), path.da(t_) * x0 + path.db(t_) * left)
    return field


def path_length(velocity, z, ts):
    """(B,): sum over Euler's steps of |v dt| (Tab. 6: 50 steps)."""
    total = torch.zeros(len(z), device=z.device)

    def add(i, t, z, v):
        total.add_((v * (ts[i + 1] - ts[i])).reshape(len(z), -1).norm(dim=1))
    sample_euler(velocity, z, ts, add)
    return total


# ---- solvers --------------------------------------------------------------------------------------------------------------

def stepping(velocity, z, ts, callback):
    """What the solvers share: v(z, t) for a scalar t, and (i, t, s) for each step that moves; i names the step to the callback."""
    ts = ts.to(z.device)

    def v(z, t, i=None):
        out = velocity(z, t.expand(len(z)))
        if callback and i is not None:
            callback(i, t, z, out)
        return out
    return v, [(i, t, s) for i, (t, s) in enumerate(pairwise(ts)) if t != s]


def sample_euler(velocity, z, ts, callback=None):
    """First order, one evaluation a step; exact where paths are straight."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        z = z + (s - t) * v(z, t, i)
    return z


def sample_midpoint(velocity, z, ts, callback=None):
    """Second order, two evaluations."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        h = s - t
        z = z + h * v(z + h / 2 * v(z, t, i), t + h / 2)
    return z


def sample_heun(velocity, z, ts, callback=None):
    """Second order, two evaluations: the trapezoid rule."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        k1 = v(z, t, i)
        k2 = v(z + (s - t) * k1, s)
        z = z + (s - t) * (k1 + k2) / 2
    return z


def sample_rk4(velocity, z, ts, callback=None):
    """Fourth order, four evaluations."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        h = s - t
        k1 = v(z, t, i)
        k2 = v(z + h / 2 * k1, t + h / 2)
        k3 = v(z + h / 2 * k2, t + h / 2)
        k4 = v(z + h * k3, s)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def adams_bashforth(z, t, s, v, last):
    """z at s: the line through the velocity at t and the last one, (t, v), integrated. Euler when there is no last one."""
    return z + (s - t) * (v + (s - t) / (2 * (t - last[0])) * (v - last[1]) if last else v)


def sample_ab2(velocity, z, ts, callback=None):
    """Adams-Bashforth: second order, one evaluation."""
    v, steps = stepping(velocity, z, ts, callback)
    last = None
    for i, t, s in steps:
        k = v(z, t, i)
        z = adams_bashforth(z, t, s, k, last)
        last = t, k
    return z


def sample_abm2(velocity, z, ts, callback=None):
    """Adams-Bashforth-Moulton: second order, one evaluation. AB2 predicts; the velocity found there also corrects the step taken, by the
    trapezoid rule, at no further cost (the idea of UniPC, Zhao et al. 2023, in t). The last step has no velocity to be corrected with."""
    v, steps = stepping(velocity, z, ts, callback)
    last = start = None
    for i, t, s in steps:
        k = v(z, t, i)
        if last:
            z = start + (t - last[0]) * (k + last[1]) / 2
        start, z = z, adams_bashforth(z, t, s, k, last)
        last = t, k
    return z


def sample_bs23(velocity, z, ts, callback=None, tolerance=1e-3):
    """Bogacki-Shampine, third order with an embedded second: picks its own steps from ts[0] to ts[-1], the first being ts[1] - ts[0], so
    that each one's error is below `tolerance` (1 + |z|), as root mean square over a sample. Three evaluations a step."""
    v, _ = stepping(velocity, z, ts, callback)
    ts = ts.to(z.device)
    t, end, h = ts[0], ts[-1], ts[1] - ts[0]
    i, k1 = 0, v(z, t, 0)
    while t != end:
        s = t + h if abs(h) < abs(end - t) else end
        nearest = torch.nextafter(t, end)
        if smallest := s in (t, nearest):             # at the resolution of t: go on, it cannot be done better
            s = nearest
        h = s - t
        k2 = v(z + h / 2 * k1, t + h / 2)
        k3 = v(z + 3 / 4 * h * k2, t + 3 / 4 * h)
        z_new = z + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
        k4 = v(z_new, s)
        error = h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8) / (1 + z.abs())
        error = float(error.reshape(len(z), -1).square().mean(1).sqrt().max()) / tolerance
        if error <= 1 or (smallest and error < math.inf):
            i, t, z, k1 = i + 1, s, z_new, k4
            if callback and t != end:
                callback(i, t, z, k1)
        elif smallest:
            raise ArithmeticError(f"sample_bs23: the velocity is not finite near t = {float(t):.6f}")
        h = h * (min(5, max(0.2, 0.9 * max(error, 1e-9) ** (-1 / 3))) if error < math.inf else 0.2)
    return z


def sample_ddim(velocity, z, ts, callback=None, path=STRAIGHT):
    """First order: z_s = a_s x_0 + b_s eps with the x_0 and eps of t (Song et al. 2020). On the straight path it is Euler."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        x0, eps = parts(v(z, t, i), z, t, path)
        z = path.a(s) * x0 + path.b(s) * eps
    return z


def sample_dpmpp_2m(velocity, z, ts, callback=None, path=STRAIGHT):
    """DPM-Solver++ 2M (Lu et al. 2022): DDIM, with x_0 extrapolated to the middle of the step on a line in the log-SNR. Second order, one
    evaluation. A step from or to an infinite log-SNR is of first order."""
    v, steps = stepping(velocity, z, ts, callback)
    last = None
    for i, t, s in steps:
        a_t, b_t, a_s, b_s = path.a(t), path.b(t), path.a(s), path.b(s)
        x0, eps = parts(v(z, t, i), z, t, path)
        h = (a_s / b_s).log() - (a_t / b_t).log()
        z = a_s * x0 + b_s * eps
        if last and h.isfinite() and last[0].isfinite():
            z = z + (a_s - a_t * b_s / b_t) * h / (2 * last[0]) * (x0 - last[1])
        last = h, x0
    return z


def sample_sde(velocity, z, ts, callback=None, path=STRAIGHT, noise=1.0, generator=None):
    """Euler-Maruyama on dz = (v + g^2 eps / (2 b)) dt + g dW, t falling: the same p_t as the ODE's for any g, as the score is -eps / b
    (Fokker-Planck). g^2 = 2 noise b b' needs no division where b = 0 and is EDM's own at noise 1. Half order, falling t only. The last step is
    DDIM's: nothing comes after it to take its noise away. generator: as `randn` has it."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        k = v(z, t, i)
        x0, eps = parts(k, z, t, path)
        if i == steps[-1][0]:
            return path.a(s) * x0 + path.b(s) * eps
        fresh = randn(z.shape, generator, z.dtype, z.device).to(z)
        z = z + (s - t) * (k + noise * path.db(t) * eps) + (2 * noise * path.b(t) * path.db(t) * (t - s)).sqrt() * fresh
    return z


def sample_ancestral(velocity, z, ts, callback=None, path=STRAIGHT, noise=1.0, generator=None):
    """DDIM, some of whose eps is drawn anew in each step, t falling: the SDE with g^2 = noise b^2 times the rate of the log-SNR, solved exactly as long as x_0 stays.
    Noise 1 is DDPM (Ho et al. 2020), k-diffusion's Euler ancestral. What was begun wrong can be mended later. generator: as `randn` has it."""
    v, steps = stepping(velocity, z, ts, callback)
    for i, t, s in steps:
        x0, eps = parts(v(z, t, i), z, t, path)
        kept = (path.a(t) * path.b(s) / (path.a(s) * path.b(t))) ** (2 * noise)       # of the variance: exp(-noise times the rise of the log-SNR)
        fresh = randn(z.shape, generator, z.dtype, z.device).to(z)
        z = path.a(s) * x0 + path.b(s) * (kept.sqrt() * eps + (1 - kept).sqrt() * fresh)
    return z


SAMPLERS = {"euler": sample_euler, "midpoint": sample_midpoint, "heun": sample_heun, "rk4": sample_rk4, "ab2": sample_ab2, "abm2": sample_abm2,
            "bs23": sample_bs23, "ddim": sample_ddim, "dpmpp_2m": sample_dpmpp_2m, "sde": sample_sde, "ancestral": sample_ancestral}
