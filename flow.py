"""Flow matching: trajectories, predictions, weightings and timestep densities (Sec. 2, Sec. 3, Eq. 1-25).

A path is four formulas, a, b, a', b':          z_t = a_t x_0 + b_t eps                             (Eq. 2)
A prediction is two more, p and q:              the network outputs p_t x_0 + q_t eps
A density pi says how often a t is trained on.  Everything else follows from these:

    two linear equations in x_0 and eps         -> every conversion, the velocity a' x_0 + b' eps among them (Eq. 9)
    D_t = a q - b p, their determinant          -> |error of the output|^2 = (D / a)^2 |error of eps|^2
    w_t = -2 (D / a)^2 pi / lambda'             -> the effective weighting in the unified loss L_w

Everywhere t is in [0, 1] and float32; 0 is data and 1 is noise. B: batch; t is (B,), data are (B, ...).
The formulas stay finite at both ends: where the paper's diverge, a and b are kept above TINY.
Departs from the paper: weightings carry the constant that makes `loss` equal L_w (the paper drops it); the network's clock
is t itself, for EDM too (Karras: log(sigma) / 4).
"""
import math
import re
from dataclasses import dataclass

import torch

TINY = 1e-8                  # float32 tells 1 - t from 0 down to 6e-8
SIGMA_DATA = 0.5             # Sec. 3, EDM
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0      # Karras et al. 2022, Tab. 1: where EDM's ODE begins and ends


def like(t, x):
    """t (B,) or a scalar as (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


# ---- Eq. 23: the same signal-to-noise ratio at another resolution -----------------------------------------------------

def shift(t, alpha):
    """Eq. 23. Moves the log-SNR of rf by -2 log(alpha) (Eq. 25); alpha > 1 spends more on high noise."""
    if not alpha > 0:
        raise ValueError(f"shift: alpha must be above 0, not {alpha}")
    return alpha * t / (1 + (alpha - 1) * t)


def shift_alpha(pixels, base_pixels):
    """Eq. 23: alpha = sqrt(m / n) for m pixels when n are the base."""
    return math.sqrt(pixels / base_pixels)


# ---- Sec. 3: trajectories ---------------------------------------------------------------------------------------------

class Path:
    """Four formulas a, b, da, db of t; from t_min to t_max the ODE is integrated."""
    t_min, t_max = 0.0, 1.0

    def log_snr(self, t):
        """lambda_t = log(a^2 / b^2)."""
        return 2 * (self.a(t).clamp(min=TINY).log() - self.b(t).clamp(min=TINY).log())

    def dlog_snr(self, t):
        """lambda_t' = 2 (a' / a - b' / b)."""
        return 2 * (self.da(t) / self.a(t).clamp(min=TINY) - self.db(t) / self.b(t).clamp(min=TINY))

    def v(self, t):
        """(p, q) of v-prediction on the unit circle a^2 + b^2 = 1 (Salimans & Ho 2022): v = a eps - b x_0."""
        return -self.b(t), self.a(t)


class RectifiedFlow(Path):
    """Eq. 13: straight lines. v is the velocity itself, eps - x_0."""
    def a(self, t): return 1 - t
    def b(self, t): return t
    def da(self, t): return -torch.ones_like(t)
    def db(self, t): return torch.ones_like(t)
    def v(self, t): return self.da(t), self.db(t)


class Cosine(Path):
    """Eq. 17."""
    def a(self, t): return torch.cos(math.pi / 2 * t).clamp(min=0)      # float32 cos(pi / 2) is -4e-8
    def b(self, t): return torch.sin(math.pi / 2 * t)
    def da(self, t): return -math.pi / 2 * self.b(t)
    def db(self, t): return math.pi / 2 * self.a(t)


class Linear(Path):
    """(LDM-)Linear: a_t^2 = prod (1 - beta_s) over the first 1000 t steps, sqrt(beta_s) linear in s.

    Between the steps: -log a_t^2 is the sum's integral, by four Gauss-Legendre nodes (exact up to beta^3), so that the path
    is smooth and meets LDM's table at t = (s + 1) / 1000 to 1e-6.
    """
    t_min = 1e-5             # b ~ sqrt(t) has an infinite slope at 0; here b = 0.003
    steps, beta_first, beta_last = 1000, 0.00085, 0.012
    nodes = [(0.5 + side * math.sqrt(3 / 7 + far * 2 / 7 * math.sqrt(6 / 5)) / 2, (18 - far * math.sqrt(30)) / 72)
             for side in (-1, 1) for far in (-1, 1)]

    def rate(self, t):
        """-d log(a_t^2) / dt; step s spans [s, s + 1] / 1000 and has its beta in the middle."""
        first, last = math.sqrt(self.beta_first), math.sqrt(self.beta_last)
        root = first + (last - first) * (self.steps * t - 0.5) / (self.steps - 1)
        return -self.steps * torch.log1p(-root.square())

    def decay(self, t):
        """-log(a_t^2)."""
        return t * sum(w * self.rate(t * x) for x, w in self.nodes)

    def a(self, t): return torch.exp(-self.decay(t) / 2)
    def b(self, t): return torch.sqrt(-torch.expm1(-self.decay(t)))
    def da(self, t): return -self.rate(t) / 2 * self.a(t)
    def db(self, t): return self.rate(t) / 2 * self.a(t).square() / self.b(t).clamp(min=TINY)


class EDM(Path):
    """Eq. 14-16: a = 1, b = exp(F_N^-1(t | P_m, P_s^2)), so that log b ~ N(P_m, P_s^2) under uniform t."""
    smallest, largest = 1e-30, 1 - 2 ** -24                              # t in float32, both quantiles finite

    def __init__(self, mean, std):
        self.mean, self.std = mean, std
        t_of = [0.5 * math.erfc((mean - math.log(sigma)) / (std * math.sqrt(2))) for sigma in (SIGMA_MIN, SIGMA_MAX)]
        self.t_min, self.t_max = max(t_of[0], self.smallest), min(t_of[1], self.largest)

    def quantile(self, t): return torch.special.ndtri(t.clamp(self.smallest, self.largest))
    def a(self, t): return torch.ones_like(t)
    def b(self, t): return torch.exp(self.mean + self.std * self.quantile(t))
    def da(self, t): return torch.zeros_like(t)
    def db(self, t): return self.b(t) * self.std * math.sqrt(2 * math.pi) * torch.exp(self.quantile(t).square() / 2)


class Rescaled(Path):
    """Another path divided by its a: EDM's form z = x_0 + b eps with the log-SNR of that path (edm/rf, edm/cos)."""
    def __init__(self, path, t_max):
        self.path, self.t_max = path, t_max

    def a(self, t): return torch.ones_like(t)
    def b(self, t): return self.path.b(t) / self.path.a(t).clamp(min=TINY)
    def da(self, t): return torch.zeros_like(t)

    def db(self, t):
        path, a = self.path, self.path.a(t).clamp(min=TINY)
        return (path.db(t) - path.da(t) * path.b(t) / a) / a


# ---- Sec. 3.1: densities of t, each by its quantile function (u ~ U(0, 1) -> t) and its pdf ---------------------------

class Uniform:
    def sample(self, u): return u
    def pdf(self, t): return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal:
    """Eq. 19."""
    mean: float
    std: float

    def sample(self, u):
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, t):
        t = t.clamp(TINY, 1 - 2 ** -24)
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode:
    """Eq. 20, heavy tails; monotonic for -1 <= s <= 2 / (pi - 2)."""
    s: float

    def sample(self, u):
        return 1 - u - self.s * (torch.cos(math.pi / 2 * u).square() - 1 + u)

    def pdf(self, t):
        """|d/dt f^-1(t)| = 1 / |f'(u)| at u = f^-1(t), found by bisection (f falls from 1 to 0)."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(50):
            u = (low + high) / 2
            above = self.sample(u) > t
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 / (1 + self.s - self.s * math.pi / 2 * torch.sin(math.pi * u)).clamp(min=TINY)


class CosMap:
    """Eq. 21, 22: the density that gives rf the log-SNR of the cosine path."""
    def sample(self, u):
        sin, cos = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sin / (sin + cos)                                         # = 1 - 1 / (tan(pi u / 2) + 1)

    def pdf(self, t):
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t.square())


# ---- Sec. 2: a formulation --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Formulation:
    """A path, a prediction and a density. t is (B,) or a scalar tensor; x0, eps, z and out are (B, ...)."""
    name: str
    path: Path
    prediction: str                                   # 'v', 'eps' or 'F'
    pi: object = Uniform()
    matched: "Formulation | None" = None              # weigh the log-SNR as this one does (edm/rf, edm/cos)

    @property
    def t_min(self): return self.path.t_min

    @property
    def t_max(self):                                  # eps alone does not tell x_0 where a = 0
        return 0.999 if self.prediction == "eps" and isinstance(self.path, Cosine) else self.path.t_max

    def a(self, t): return self.path.a(t)
    def b(self, t): return self.path.b(t)
    def da(self, t): return self.path.da(t)
    def db(self, t): return self.path.db(t)
    def log_snr(self, t): return self.path.log_snr(t)
    def dlog_snr(self, t): return self.path.dlog_snr(t)
    def density(self, t): return self.pi.pdf(t)

    def sample_t(self, n, generator=None, device=None):
        """(n,) of pi. Drawn on the generator's device, so that a seed means the same everywhere."""
        source = device if generator is None else generator.device
        return self.pi.sample(torch.rand(n, generator=generator, device=source)).to(device or source)

    # -- the network outputs p x_0 + q eps

    def pq(self, t):
        if self.prediction == "v":
            return self.path.v(t)
        if self.prediction == "eps":
            return torch.zeros_like(t), torch.ones_like(t)
        norm = self.norm(t)                           # F: (x_0 - c_skip z) / c_out, which is -v of the data / sigma_data
        return self.b(t) / (norm * SIGMA_DATA), -SIGMA_DATA / norm

    def norm(self, t):
        """EDM: the standard deviation of z."""
        return (self.b(t).square() + SIGMA_DATA ** 2).sqrt()

    def determinant(self, t):
        """D_t = a q - b p."""
        p, q = self.pq(t)
        d = self.a(t) * q - self.b(t) * p
        return d.clamp(min=TINY) if self.prediction == "eps" else d

    def input(self, z, t):
        """What a network should be shown for z: unit variance. Only EDM's z changes (Karras's c_in)."""
        return z / self.norm(like(t, z)) if self.prediction == "F" else z

    def start(self, eps):
        """z at t_max: eps with the variance that data of unit variance have there."""
        t = torch.full((), self.t_max, dtype=eps.dtype, device=eps.device)
        return torch.hypot(self.a(t), self.b(t)) * eps

    # -- to and fro

    def interpolate(self, x0, eps, t):
        """Eq. 2: z_t."""
        t = like(t, x0)
        return self.a(t) * x0 + self.b(t) * eps

    def target(self, x0, eps, t):
        p, q = self.pq(like(t, x0))
        return p * x0 + q * eps

    def data(self, out, z, t):
        t = like(t, z)
        _, q = self.pq(t)
        return (q * z - self.b(t) * out) / self.determinant(t)

    def noise(self, out, z, t):
        t = like(t, z)
        p, _ = self.pq(t)
        return (self.a(t) * out - p * z) / self.determinant(t)

    def velocity(self, out, z, t):
        """Eq. 9: a' x_0 + b' eps, written so that on rf the coefficient of z is zero and that of out is one."""
        t = like(t, z)
        (p, q), a, b, da, db = self.pq(t), self.a(t), self.b(t), self.da(t), self.db(t)
        return ((da * q - db * p) * z + (a * db - da * b) * out) / self.determinant(t)

    # -- Eq. 8, 12 and the unified L_w

    def gain(self, t):
        """|error of the output| / |error of eps| at the same z."""
        return self.determinant(t).abs() / self.a(t).clamp(min=TINY)

    def emphasis(self, t):
        """What the squared error of the output is multiplied with: 1, but for edm/rf and edm/cos."""
        return (self.matched.gain(t) / self.gain(t)).square() if self.matched else torch.ones_like(t)

    def weight(self, t):
        """w_t of L_w = -1/2 E_{t ~ U}[w_t lambda_t' |eps_theta - eps|^2]; Eq. 18: the density is part of it."""
        return -2 * self.emphasis(t) * self.gain(t).square() * self.density(t) / self.dlog_snr(t)

    def loss(self, network, x0, t=None, eps=None, generator=None):
        """(B,): the mean squared error of network(z, t) over all but the batch; t ~ pi unless given.
        z is passed as it is: a network for EDM begins with `input(z, t)`."""
        if t is None:
            t = self.sample_t(len(x0), generator, x0.device)
        if eps is None:
            source = x0.device if generator is None else generator.device
            eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=source).to(x0.device)
        error = network(self.interpolate(x0, eps, t), t) - self.target(x0, eps, t)
        return error.square().reshape(len(x0), -1).mean(1) * self.emphasis(t)


# ---- Sec. 5.1: names --------------------------------------------------------------------------------------------------

FORMS = ("rf", "rf/lognorm(m,s)", "rf/mode(s)", "rf/cosmap", "eps/linear", "v/linear", "eps/cos", "v/cos",
         "edm(Pm,Ps)", "edm/rf", "edm/cos")


def formulation(name):
    """'rf/lognorm(0.00,1.00)' -> Formulation; any of FORMS, with any numbers."""
    match = re.fullmatch(r"([a-z/]+)(?:\(([^()]*)\))?", name.replace(" ", ""))
    base, inside = match.groups() if match else (None, None)
    forms = {form.partition("(")[0]: form for form in FORMS}
    if base not in forms:
        raise ValueError(f"unknown formulation {name!r}; known are {', '.join(FORMS)}")
    try:
        numbers = [float(x) for x in inside.split(",")] if inside is not None else []
    except ValueError:
        numbers = [math.nan]
    expected = forms[base].count(",") + 1 if "(" in forms[base] else 0
    if len(numbers) != expected or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name!r} must read {forms[base]} with {expected} finite numbers")
    if base in ("rf/lognorm", "edm") and numbers[1] <= 0:
        raise ValueError(f"{name!r}: the scale must be above 0, not {numbers[1]}")
    if base == "rf/mode" and not -1 <= numbers[0] <= 2 / (math.pi - 2):
        raise ValueError(f"{name!r}: s must be in [-1, 2 / (pi - 2) = 1.7519], or Eq. 20 is not monotonic")

    if base.startswith("rf"):
        pi = {"rf": Uniform, "rf/lognorm": LogitNormal, "rf/mode": Mode, "rf/cosmap": CosMap}[base](*numbers)
        return Formulation(name, RectifiedFlow(), "v", pi)
    if base == "edm":
        return Formulation(name, EDM(*numbers), "F")
    if base == "edm/rf":                              # the clock and the weighting of rf, of v/cos, in EDM's form
        return Formulation(name, Rescaled(RectifiedFlow(), t_max=SIGMA_MAX / (1 + SIGMA_MAX)), "F", matched=formulation("rf"))
    if base == "edm/cos":
        return Formulation(name, Rescaled(Cosine(), t_max=math.atan(SIGMA_MAX) * 2 / math.pi), "F", matched=formulation("v/cos"))
    prediction, path = base.split("/")
    return Formulation(name, {"linear": Linear, "cos": Cosine}[path](), prediction)


PAPER_FORMULATIONS = (
    "eps/linear", "v/linear", "eps/cos", "v/cos", "rf", "rf/mode(1.00)",
    *(f"rf/mode({-1 + 2.75 * i / 6:.2f})" for i in range(7)),
    *(f"rf/lognorm({m:.2f},{s:.2f})" for m in (-1, -0.5, 0, 0.5, 1) for s in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)),
    "rf/cosmap",
    *(f"edm({m:.2f},{s:.2f})" for m in (-1.2, -0.6, 0, 0.6, 1.2) for s in (0.6, 1.2, 1.8)), "edm/rf", "edm/cos",
)
