"""flow.py against the paper's formulas, automatic differentiation and closed forms: all 61 formulations."""
import math

import pytest
import torch

from flow import PAPER_FORMULATIONS, Formulation, formulation, shift, shift_alpha
from samplers import sample_dpmpp_2m, sample_rk4, timesteps, timesteps_log_snr

ALL = [formulation(name) for name in PAPER_FORMULATIONS]
FAMILIES = [formulation(name) for name in ("rf", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)", "edm(1.20,0.60)",
                                           "edm/rf", "edm/cos")]                 # every path and prediction
each = pytest.mark.parametrize("f", ALL, ids=PAPER_FORMULATIONS)
each_family = pytest.mark.parametrize("f", FAMILIES, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def inner(f, n=2000):
    """float64 t inside the ODE's range."""
    t = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return f.t_min + (f.t_max - f.t_min) * t


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(n, dims):
    """(n, dims) quasi-random points of (0, 1): sums over them converge almost like 1 / n."""
    return torch.quasirandom.SobolEngine(dims, scramble=True, seed=0).draw(n, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)


# ---- names

def test_the_61_of_section_5_1():
    assert len(PAPER_FORMULATIONS) == len(set(PAPER_FORMULATIONS)) == 61
    assert sum("lognorm" in n for n in PAPER_FORMULATIONS) == 30 and sum("edm" in n for n in PAPER_FORMULATIONS) == 17
    in_tables = {"rf/lognorm(0.00,1.00)", "rf/lognorm(1.00,0.60)", "rf/lognorm(-0.50,1.00)", "rf/mode(1.29)", "rf/mode(1.75)", "rf/cosmap",
                 "edm(0.00,0.60)", "edm(-1.20,1.20)", "edm/rf", "edm/cos", "eps/linear", "v/linear", "v/cos", "rf"}
    assert in_tables <= set(PAPER_FORMULATIONS)
    assert all(isinstance(f, Formulation) and f.name == n for f, n in zip(ALL, PAPER_FORMULATIONS, strict=True))


def test_any_parameters_parse():
    assert formulation("rf/lognorm( -0.123, 3 )").pi.std == 3 and formulation("rf/mode(1e-1)").pi.s == 0.1
    assert formulation("edm(0.4,0.01)").path.mean == 0.4


@pytest.mark.parametrize("name, reason", [
    ("rg", "known are rf, "), ("rf/lognorm", "2 finite numbers"), ("rf/lognorm(0)", "2 finite numbers"), ("rf(1)", "0 finite numbers"),
    ("rf/lognorm(0,nan)", "finite"), ("rf/lognorm(a,b)", "finite"), ("rf/lognorm(0,0)", "above 0"), ("edm(0,-1)", "above 0"),
    ("rf/mode(-1.01)", "1.7519"), ("rf/mode(1.76)", "1.7519"), ("", "known"), ("rf/lognorm(0,1", "known"), ("edm/linear", "known")])
def test_bad_names_say_why(name, reason):
    with pytest.raises(ValueError, match=reason):
        formulation(name)


# ---- Sec. 2 and 3: paths

@each_family
def test_derivatives_agree_with_autodiff(f):
    t = inner(f).requires_grad_()
    for value, derivative in ((f.a, f.da), (f.b, f.db), (f.log_snr, f.dlog_snr)):
        y = value(t)
        expected = torch.autograd.grad(y.sum(), t)[0] if y.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-8, atol=1e-10)
        assert derivative(t).abs().max() > 0 or (f.prediction == "F" and value == f.a)       # a = 1 for EDM alone


def test_paths_are_the_papers():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    rf, cos, linear = formulation("rf"), formulation("v/cos"), formulation("eps/linear")
    for f in (rf, cos):                                                                     # Eq. 2's ends
        ends = torch.tensor([0.0, 1.0])
        assert torch.allclose(f.a(ends), 1 - ends, atol=1e-7) and torch.allclose(f.b(ends), ends, atol=1e-7)
    assert torch.equal(rf.a(t), 1 - t) and torch.equal(rf.b(t), t)
    assert torch.allclose(cos.a(t)[:-1].acos(), math.pi * t[:-1] / 2) and torch.allclose(cos.b(t), (1 - cos.a(t) ** 2).sqrt())
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2    # LDM's own table
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(linear.a(steps), (1 - betas).cumprod(0).sqrt(), atol=1e-6)
    assert linear.a(torch.zeros(1)) == 1 and linear.b(torch.zeros(1)) == 0


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.6, 0.6)])
def test_edm_log_snr_is_normal(mean, std):
    f = formulation(f"edm({mean},{std})")
    lam = f.log_snr((torch.arange(100000, dtype=torch.float64) + 0.5) / 100000)             # under uniform t, Eq. 15
    assert lam.mean() == pytest.approx(-2 * mean, abs=1e-3) and lam.std() == pytest.approx(2 * std, rel=1e-3)


@each_family
def test_rescaled_clocks_keep_the_log_snr(f):
    if f.matched:
        torch.testing.assert_close(f.log_snr(inner(f)), f.matched.log_snr(inner(f)))


# ---- predictions

@each_family
def test_conversions_are_mutually_inverse(f):
    t = inner(f, 500)
    if f.prediction == "eps":
        t = t[f.a(t) > 0.01]                                                                # eps hides x_0 as a -> 0
    x0, eps = torch.randn(2, len(t), 3, 2, 2, generator=seeded(), dtype=torch.float64)
    z, out = f.interpolate(x0, eps, t), f.target(x0, eps, t)
    torch.testing.assert_close(f.data(out, z, t), x0, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(f.noise(out, z, t), eps, rtol=1e-9, atol=1e-8)
    some = torch.randn(out.shape, generator=seeded(1), dtype=torch.float64)                 # not only the true output
    x0, eps = f.data(some, z, t), f.noise(some, z, t)
    torch.testing.assert_close(f.interpolate(x0, eps, t), z, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(f.target(x0, eps, t), some, rtol=1e-9, atol=1e-7)


@each_family
def test_velocity_is_eq_9_and_10(f):
    t = inner(f, 500)
    x0, eps = torch.randn(2, len(t), 4, generator=seeded(), dtype=torch.float64)
    z = f.interpolate(x0, eps, t)
    v = f.velocity(f.target(x0, eps, t), z, t)
    a, b, da, db, dlam = (g(t)[:, None] for g in (f.a, f.b, f.da, f.db, f.dlog_snr))
    near = {"rtol": 1e-7, "atol": 1e-6}
    torch.testing.assert_close(v / (1 + db), (da * x0 + db * eps) / (1 + db), **near)
    torch.testing.assert_close(v / (1 + db), (da / a * z - b / 2 * dlam * eps) / (1 + db), **near)


def test_predictions_are_the_literatures():
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, generator=seeded(), dtype=torch.float64)
    assert torch.equal(formulation("rf").target(x0, eps, t), eps - x0)
    for name in ("v/cos", "v/linear"):                                                      # Salimans & Ho 2022
        f = formulation(name)
        assert torch.allclose(f.target(x0, eps, t), f.a(t) * eps - f.b(t) * x0)
    f = formulation("edm(-1.20,1.20)")                                                      # Karras et al. 2022, Tab. 1
    z, sigma, data = f.interpolate(x0, eps, t), f.b(t), 0.5
    c_skip, c_out = data ** 2 / (sigma ** 2 + data ** 2), sigma * data / (sigma ** 2 + data ** 2).sqrt()
    assert torch.allclose(f.target(x0, eps, t), (x0 - c_skip * z) / c_out)
    assert torch.allclose(f.input(z, t), z / (sigma ** 2 + data ** 2).sqrt())
    assert torch.equal(formulation("rf").input(z, t), z)


def test_rf_velocity_is_the_output():
    z, out = torch.randn(2, 64, 3, generator=seeded())
    v = formulation("rf").velocity(out, z, torch.linspace(0, 1, 64))
    torch.testing.assert_close(v, out, rtol=2e-7, atol=0)


# ---- numbers in float32

@each
def test_finite_at_half_a_million_t(f):
    t = torch.cat([torch.tensor([0.0, 1.0, f.t_min, f.t_max, 1 - 2 ** -24, 1e-8]), f.sample_t(250_000, seeded()), torch.rand(250_000, generator=seeded(1))])
    assert t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
    x0, eps = torch.randn(2, len(t), generator=seeded(2))
    z, out = f.interpolate(x0, eps, t), f.target(x0, eps, t)
    for g in (f.a, f.b, f.da, f.db, f.log_snr, f.dlog_snr, f.density, f.weight):
        assert g(t).isfinite().all(), g.__name__
    for g in (f.velocity, f.noise, f.data):
        assert g(out, z, t).isfinite().all(), g.__name__
    assert f.loss(lambda z, t: f.input(z, t), x0, t, eps).isfinite().all()
    assert (f.weight(t) >= 0).all()


@each_family
def test_float32_agrees_with_float64(f):
    t = timesteps_log_snr(50, f)
    x0, eps = torch.randn(2, len(t), generator=seeded())
    z, out = f.interpolate(x0, eps, t), f.target(x0, eps, t)
    scale = 1 + f.db(t)
    torch.testing.assert_close(f.velocity(out, z, t) / scale, (f.da(t.double()) * x0 + f.db(t.double()) * eps).float() / scale, rtol=2e-3, atol=2e-3)


@each_family
def test_any_shape(f):
    t = torch.tensor([0.3, 0.6])
    for shape in ((2,), (2, 5), (2, 4, 3, 3), (2, 1, 2, 3, 4)):
        x0, eps = torch.randn(2, *shape, generator=seeded())
        z, out = f.interpolate(x0, eps, t), f.target(x0, eps, t)
        assert f.velocity(out, z, t).shape == f.data(out, z, t).shape == f.noise(out, z, t).shape == f.input(z, t).shape == z.shape == shape
        one = f.velocity(out[1:], z[1:], t[1])                                              # a scalar t does, too
        torch.testing.assert_close(one, f.velocity(out, z, t)[1:])
        assert f.loss(lambda z, t: 0 * z, x0, generator=seeded()).shape == (2,)


# ---- Sec. 3.1: densities

def clustered(n=200_000):
    """Rising t of (0, 1) and their widths, dense where densities are steep: at the ends (1 / sqrt(t)) and in the middle (mode)."""
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    s = 0.5 + 4 * (x - 0.5) ** 3
    return torch.sin(math.pi / 2 * s) ** 2, math.pi / 2 * torch.sin(math.pi * s) * 12 * (x - 0.5) ** 2 / n


@pytest.mark.parametrize("f", [f for f in ALL if f.name.startswith("rf")], ids=lambda f: f.name)
def test_density_integrates_to_one_and_is_sampled(f):
    t, width = clustered()
    cdf = (f.density(t) * width).cumsum(0)
    assert cdf[-1] == pytest.approx(1, abs=2e-3)
    n = 50_000
    drawn = f.sample_t(n, seeded()).double().sort().values
    at = cdf[torch.searchsorted(t, drawn).clamp(max=len(t) - 1)]
    distance = (at - (torch.arange(n) + 0.5) / n).abs().max()                               # Kolmogorov-Smirnov
    assert distance < 1.95 / math.sqrt(n)                                                   # passes 99.9 % of honest draws


def test_sampling_is_seeded():
    f = formulation("rf/lognorm(0.00,1.00)")
    assert torch.equal(f.sample_t(8, seeded(3)), f.sample_t(8, seeded(3))) and not torch.equal(f.sample_t(8, seeded(3)), f.sample_t(8, seeded(4)))


def test_densities_are_the_papers():
    t = inner(formulation("rf"), 99)
    f = formulation("rf/lognorm(0.50,0.60)")                                                # Eq. 19
    logit = torch.log(t / (1 - t))
    assert torch.allclose(f.density(t), torch.exp(-(logit - 0.5) ** 2 / (2 * 0.6 ** 2)) / (0.6 * math.sqrt(2 * math.pi) * t * (1 - t)))
    for s in (-1, 0.5, 1.29):                                                               # Eq. 20: d f^-1 / dt
        pi, u = formulation(f"rf/mode({s})").pi, t.clone().requires_grad_()
        slope = torch.autograd.grad(pi.sample(u).sum(), u)[0]
        assert torch.allclose(pi.pdf(pi.sample(t)), 1 / slope.abs(), rtol=1e-6)
    pi = formulation("rf/cosmap").pi                                                        # Eq. 21, and the log-SNR it is made for
    assert torch.allclose(pi.sample(t), 1 - 1 / (torch.tan(math.pi * t / 2) + 1))
    assert torch.allclose(formulation("rf").log_snr(pi.sample(t)), formulation("v/cos").log_snr(t))
    assert torch.allclose(formulation("rf/mode(0)").density(t), torch.ones_like(t))


# ---- Eq. 8, 12, 18 and the unified loss

@each
def test_weight_is_the_papers(f):
    """Up to the constant that the paper drops: 1, 1 / pi, 2 / pi, 8."""
    t = inner(f, 999)
    t, lam = t[f.b(t) > 1e-6], f.log_snr(t[f.b(t) > 1e-6])
    if f.name.startswith("rf"):
        expected, constant = t / (1 - t) * f.density(t), 1                                  # Eq. 18
    elif f.name == "eps/cos":
        expected, constant = 1 / torch.cosh(lam / 2), 1 / math.pi
    elif f.name in ("v/cos", "edm/cos"):
        expected, constant = torch.exp(-lam / 2), 2 / math.pi
    elif f.name == "edm/rf":
        expected, constant = torch.exp(-lam / 2), 1                                         # rf's t / (1 - t)
    elif f.name.startswith("edm"):
        normal = torch.distributions.Normal(-2 * f.path.mean, 2 * f.path.std)
        expected, constant = normal.log_prob(lam).exp() * (torch.exp(-lam) + 0.5 ** 2), 8
    else:                                                                                   # linear: |eps|^2, |v|^2 = |eps|^2 / a^2
        expected, constant = -2 / f.dlog_snr(t) / (f.a(t) ** 2 if f.prediction == "v" else 1), 1
    torch.testing.assert_close(f.weight(t), constant * expected, rtol=1e-6, atol=0)


@each
def test_loss_is_the_unified_loss(f):
    """E_pi[loss] = -1/2 E_{t ~ U}[w_t lambda_t' |eps_theta - eps|^2] for a network that is wrong, by integration over t."""
    n = 1 << 15
    u, x0, eps = spread(n, 3).unbind(1)
    x0, eps = torch.special.ndtri(x0), torch.special.ndtri(eps)

    def network(z, t):
        return torch.sin(2 * f.input(z, t)) + 0.3 * t
    left = f.loss(network, x0, f.pi.sample(u), eps).mean()                                  # t drawn from pi
    t, width = torch.sin(math.pi / 2 * u) ** 2, math.pi / 2 * torch.sin(math.pi * u)        # t uniform, denser at the ends
    z = f.interpolate(x0, eps, t)
    error = f.noise(network(z, t), z, t) - eps
    right = (-0.5 * f.weight(t) * f.dlog_snr(t) * error ** 2 * width).mean()
    assert float(left) == pytest.approx(float(right), rel=0.01)


@each_family
def test_eq_12_flow_matching_as_noise_prediction(f):
    t = inner(f, 300)
    x0, eps, out = torch.randn(3, len(t), 4, generator=seeded(), dtype=torch.float64)
    z = f.interpolate(x0, eps, t)
    v, truth = f.velocity(out, z, t), f.velocity(f.target(x0, eps, t), z, t)
    factor = (-f.b(t) / 2 * f.dlog_snr(t))[:, None]
    torch.testing.assert_close((v - truth) / factor, f.noise(out, z, t) - eps, rtol=1e-6, atol=1e-6)
    if f.name == "rf":                                                                      # L_CFM, Eq. 8
        torch.testing.assert_close(f.loss(lambda z, t: out, x0, t, eps), (v - truth).square().mean(1))


@pytest.mark.parametrize("name", ["rf", "v/cos", "eps/linear"])
def test_appendix_b1_both_losses_have_one_gradient(name):
    """L_FM (Eq. 7) against L_CFM (Eq. 8) on five data points in 1-D: Eq. 6 summed over the points, both integrals by quadrature."""
    f = formulation(name)
    points = torch.tensor([-1.5, -0.4, 0.1, 0.9, 2.0], dtype=torch.float64)
    eps = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    p_eps = torch.exp(-eps ** 2 / 2) / math.sqrt(2 * math.pi) * 18 / 1200
    theta = torch.randn(4, generator=seeded(), dtype=torch.float64)
    fm, cfm = torch.zeros(2, 4, dtype=torch.float64)
    for t in torch.tensor([0.1, 0.35, 0.7, 0.95], dtype=torch.float64):
        a, b, da, db = f.a(t), f.b(t), f.da(t), f.db(t)

        def features(z, t=t):
            return torch.stack([torch.ones_like(z), z, torch.sin(2 * z + t), z * t], -1)
        z = a * points[:, None] + b * eps                                                   # (point, eps)
        error = features(z) @ theta - (da * points[:, None] + db * eps)
        cfm += 2 * (error[..., None] * features(z) * p_eps[:, None]).sum((0, 1)) / len(points)

        grid = torch.linspace(-13, 13, 20001, dtype=torch.float64)                          # z itself
        noise = (grid[:, None] - a * points) / b
        p = torch.exp(-noise ** 2 / 2) / (b * math.sqrt(2 * math.pi)) / len(points)         # p_t(z, point)
        u = ((da * points + db * noise) * p).sum(1) / p.sum(1).clamp(min=1e-300)            # Eq. 6
        fm += 2 * ((features(grid) @ theta - u)[:, None] * features(grid) * p.sum(1)[:, None]).sum(0) * 26 / 20000
    torch.testing.assert_close(fm, cfm, rtol=1e-6, atol=1e-8)


# ---- Eq. 23-25

def test_shift():
    t = inner(formulation("rf"))
    for alpha in (0.5, 1.0, 3.0):
        lam = formulation("rf").log_snr
        torch.testing.assert_close(lam(shift(t, alpha)), lam(t) - 2 * math.log(alpha))      # Eq. 25
        torch.testing.assert_close(shift(shift(t, alpha), 1 / alpha), t)
        assert shift(torch.tensor([0.0, 1.0]), alpha).tolist() == [0, 1]
    assert shift_alpha(1024 ** 2, 256 ** 2) == 4 and shift_alpha(64, 64) == 1
    n, m = 256 ** 2, 1024 ** 2                                                              # Eq. 23 as printed
    torch.testing.assert_close(shift(t, shift_alpha(m, n)), math.sqrt(m / n) * t / (1 + (math.sqrt(m / n) - 1) * t))
    for alpha in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            shift(t, alpha)


def test_shift_keeps_the_uncertainty():
    """Eq. 24: the standard error of a constant image's mean over n pixels, t / (1 - t) / sqrt(n), is the same at m pixels and shifted t."""
    t, n, m = inner(formulation("rf")), 64 ** 2, 256 ** 2
    s = shift(t, shift_alpha(m, n))
    torch.testing.assert_close(s / (1 - s) / math.sqrt(m), t / (1 - t) / math.sqrt(n))


def test_shift_moves_a_logit_normal():
    u = spread(1000, 1)[:, 0]
    torch.testing.assert_close(shift(formulation("rf/lognorm(0,1)").pi.sample(u), 3.0), formulation(f"rf/lognorm({math.log(3)},1)").pi.sample(u))


# ---- the strongest: the exact network gives back the data

class Mixture:
    """Three Gaussians in the plane, mean 0 and covariance I as latents have, each with the covariance diag(var); one is plain Gaussian data."""
    def __init__(self, components=3):
        self.weight = torch.tensor([0.3, 0.4, 0.3] if components == 3 else [1.0], dtype=torch.float64)
        means = torch.tensor([[1.2, 0.3], [-0.9, 0.9], [0.0, -1.5]] if components == 3 else [[0.0, 0.0]], dtype=torch.float64)
        means = means - self.weight @ means
        cov = (means.T * self.weight) @ means + 0.09 * torch.eye(2, dtype=torch.float64)
        whiten = torch.linalg.inv(torch.linalg.cholesky(cov))
        self.var, axes = torch.linalg.eigh(0.09 * whiten @ whiten.T)
        self.means = means @ whiten.T @ axes

    def draw(self, n):
        u = spread(n, 3)
        k = torch.searchsorted(self.weight.cumsum(0), u[:, 0].contiguous()).clamp(max=len(self.weight) - 1)
        return self.means[k] + self.var.sqrt() * torch.special.ndtri(u[:, 1:])

    def network(self, f):
        """The minimiser of f's loss: the posterior mean of f's target, in closed form."""
        def out(z, t):
            t = t[:1]
            a, b = f.a(t), f.b(t)
            total = a ** 2 * self.var + b ** 2
            off = z[:, None] - a * self.means                                               # (B, component, 2)
            log_p = self.weight.log() - (off ** 2 / total).sum(-1) / 2
            r = log_p.softmax(1)[..., None]
            x0, eps = (r * (self.means + a * self.var / total * off)).sum(1), (r * b / total * off).sum(1)
            return f.target(x0, eps, t)
        return out


def energy_distance(x, y):
    def mean(x, y):
        return torch.cdist(x, y).mean()
    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def returned(f, mixture, sampler, n, ts, **options):
    network = mixture.network(f)
    z = f.start(torch.special.ndtri(spread(n, 2)))
    return sampler(lambda z, t: f.velocity(network(z, t), z, t), z, ts.double(), **options)


@each
@pytest.mark.parametrize("components", [1, 3], ids=["gaussian", "mixture"])
def test_exact_network_gives_back_the_data(f, components):
    """Path, prediction, conversion, range and solver agree: noise becomes the data's distribution."""
    mixture, n = Mixture(components), 2048
    ts = timesteps(60) if f.name.startswith("rf") else timesteps_log_snr(60, f)
    z = returned(f, mixture, sample_dpmpp_2m, n, ts, path=f)
    data = mixture.draw(n)
    assert z.mean(0).abs().max() < 0.015
    assert (z.T.cov() - torch.eye(2)).abs().max() < 0.02
    assert ((z ** 3).mean(0) - (data ** 3).mean(0)).abs().max() < 0.06
    assert energy_distance(z, data) < 1e-3                                                  # two honest draws: 1.6e-3


@each_family
def test_exact_network_by_a_solver_that_knows_no_path(f):
    mixture = Mixture()
    ts = timesteps(60) if f.name == "rf" else timesteps_log_snr(100, f)
    z = returned(f, mixture, sample_rk4, 512, ts)
    assert z.mean(0).abs().max() < 0.02 and (z.T.cov() - torch.eye(2)).abs().max() < 0.04
    assert energy_distance(z, mixture.draw(512)) < 3e-3


@each_family
def test_exact_network_minimises_the_loss(f):
    """Its gradient under a perturbation vanishes at every t: what the network is asked for is what the velocity assumes."""
    mixture, n = Mixture(), 1 << 14
    u = spread(n, 5)
    k = torch.searchsorted(mixture.weight.cumsum(0), u[:, 0].contiguous()).clamp(max=2)
    x0, eps = mixture.means[k] + mixture.var.sqrt() * torch.special.ndtri(u[:, 1:3]), torch.special.ndtri(u[:, 3:])
    for share in (0.2, 0.5, 0.8):
        t = (f.t_min + share * (f.t_max - f.t_min)) * torch.ones(n, dtype=torch.float64)
        for bump in (lambda y: torch.ones_like(y), torch.sin, torch.tanh):
            strength = torch.zeros((), dtype=torch.float64, requires_grad=True)
            network = mixture.network(f)
            loss = f.loss(lambda z, t, network=network, bump=bump, strength=strength: network(z, t) + strength * bump(f.input(z, t)), x0, t, eps).mean()
            assert torch.autograd.grad(loss, strength)[0].abs() < 0.02
