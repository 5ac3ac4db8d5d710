"""samplers.py on fields with a closed form: orders of convergence, round trips, grids and guidance."""
import math

import pytest
import torch

from flow import PAPER_FORMULATIONS, formulation
from samplers import (
    SAMPLERS,
    guided,
    guided_edit,
    parts,
    path_length,
    sample_abm2,
    sample_ancestral,
    sample_bs23,
    sample_ddim,
    sample_euler,
    sample_heun,
    sample_rk4,
    sample_sde,
    start_from,
    timesteps,
    timesteps_adapted,
    timesteps_log_snr,
)

F64 = torch.float64
ORDERS = {"euler": 1, "ddim": 1, "midpoint": 2, "heun": 2, "ab2": 2, "abm2": 2, "dpmpp_2m": 2, "rk4": 4}
EVALUATIONS = {"midpoint": 2, "heun": 2, "rk4": 4}            # a step; 1 for the others
WITH_PATH = "ddim", "dpmpp_2m", "sde", "ancestral"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, std, path):
    """(velocity, solution) for data N(mean, std^2): z keeps its place c in a mean + sqrt(a^2 std^2 + b^2) c."""
    def velocity(z, t):
        a, b, da, db = path.a(t), path.b(t), path.da(t), path.db(t)
        var, dvar = a ** 2 * std ** 2 + b ** 2, a * da * std ** 2 + b * db
        return (da * mean)[:, None] + (dvar / var)[:, None] * (z - (a * mean)[:, None])

    def solution(c, t):
        return path.a(t) * mean + (path.a(t) ** 2 * std ** 2 + path.b(t) ** 2).sqrt() * c
    return velocity, solution


def swing():
    """(velocity, solution) of dz/dt = cos(4 t) z + t: linear, not autonomous, and of no path."""
    def velocity(z, t):
        return torch.cos(4 * t)[:, None] * z + t[:, None]

    def solution(c, t):                                        # variation of constants, the integral by Gauss-Legendre
        x, w = torch.tensor([[-0.9602898564975363, 0.1012285362903763], [-0.7966664774136267, 0.2223810344533745],
                             [-0.5255324099163290, 0.3137066458778873], [-0.1834346424956498, 0.3626837833783620]], dtype=F64).T
        x, w = torch.cat([x, -x]), torch.cat([w, w])
        cells = torch.linspace(1, float(t), 21, dtype=F64)
        half = (cells[1:] - cells[:-1])[:, None] / 2
        tau = cells[:-1, None] + half * (1 + x)
        integral = (half * w * tau * torch.exp(-torch.sin(4 * tau) / 4)).sum()
        return torch.exp(torch.sin(4 * t) / 4) * (c + integral)
    return velocity, solution


def line(grid, t_max, t_min, steps):
    return timesteps(steps, grid, t_max, t_min).double()


def slope(name, velocity, solution, grids, **options):
    """The least-squares slope of log2(error) over log2(steps); the error is the largest on the way, as at one t it may vanish by chance."""
    c = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    logs = []
    for ts in grids:
        errors = []

        def note(i, t, z, v, errors=errors):
            errors.append((z - solution(c, t)).abs().max())
        note(None, ts[-1], SAMPLERS[name](velocity, solution(c, ts[0]), ts, note, **options), None)
        logs.append((math.log2(len(ts) - 1), math.log2(max(errors))))
    x, y = torch.tensor(logs).T
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# ---- orders of convergence

@pytest.mark.parametrize("shift", [1.0, 2.0], ids=["uniform", "shifted"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_gaussian_data(name, shift):
    """At least the order: z runs along hyperbolas, on which midpoint, RK4 and AB-M gain one by symmetry."""
    velocity, solution = gaussian(0.7, 0.5, formulation("rf"))
    grids = [line(shift, 0.95, 0.05, n) for n in (64, 128, 256)]
    assert slope(name, velocity, solution, grids) > ORDERS[name] - 0.15


@pytest.mark.parametrize("name", [name for name in ORDERS if name not in WITH_PATH])
def test_order_on_any_field(name):
    velocity, solution = swing()
    grids = [line(1.5, 1.0, 0.0, n) for n in (32, 64, 128, 256)]
    assert slope(name, velocity, solution, grids) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("form", ["eps/linear", "v/cos", "edm(-1.20,1.20)", "edm/rf"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_curved_paths(name, form):
    f = formulation(form)
    velocity, solution = gaussian(0.7, 0.5, f)
    grids = [line(1.0, 0.9, 0.1, n) for n in (64, 128, 256)]
    options = {"path": f} if name in WITH_PATH else {}
    assert slope(name, velocity, solution, grids, **options) == pytest.approx(ORDERS[name], abs=0.15)


def test_adaptive_keeps_its_tolerance():
    velocity, solution = swing()
    c = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    ends = torch.tensor([1.0, 0.7, 0.0], dtype=F64)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        count = []

        def counting(z, t, count=count):
            count.append(t)
            return velocity(z, t)
        z = sample_bs23(counting, solution(c, ends[0]), ends, tolerance=tolerance)
        errors.append(float((z - solution(c, ends[-1])).abs().max()))
        calls.append(len(count))
        assert errors[-1] < 10 * tolerance
    assert errors[2] < errors[1] < errors[0]
    assert calls[2] / calls[1] == pytest.approx(100 ** (1 / 3), rel=0.35)      # third order: error ~ tolerance, steps ~ tolerance^(-1/3)


def test_adaptive_gives_up_on_nan():
    with pytest.raises(ArithmeticError, match="finite"):
        sample_bs23(lambda z, t: z * math.nan, torch.ones(2, 1), timesteps(4))


# ---- exactness and round trips

@pytest.mark.parametrize("name", SAMPLERS)
def test_straight_paths_take_one_step(name):
    """One data point: every line ends in it."""
    point, z = torch.tensor([[0.3, -1.0]]), torch.randn(5, 2, generator=seeded())
    for steps in (1, 2, 7):
        out = SAMPLERS[name](lambda z, t: (z - point) / t[:, None].clamp(min=1e-6) if float(t[0]) else eps - point, eps := z, timesteps(steps))
        torch.testing.assert_close(out, point.expand(5, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("sde", "ancestral")])
def test_round_trip(name):
    """Noise to data and back: the reversed grid inverts, from the very ends of t."""
    velocity, _ = gaussian(0.7, 0.5, formulation("rf"))
    z = torch.randn(16, 1, generator=seeded(), dtype=F64)
    ts = timesteps(400).double()
    data = SAMPLERS[name](velocity, z, ts)
    assert (data - (0.7 + 0.5 * z)).abs().max() < 0.02
    back = SAMPLERS[name](velocity, data, ts.flip(0))
    assert (back - z).abs().max() < (0.02 if ORDERS.get(name, 3) == 1 or name == "dpmpp_2m" else 1e-3)


def test_ddim_on_the_straight_path_is_euler():
    velocity, _ = gaussian(0.7, 0.5, formulation("rf"))
    z, ts = torch.randn(4, 1, generator=seeded(), dtype=F64), timesteps(9, 3.0).double()
    torch.testing.assert_close(sample_ddim(velocity, z, ts), sample_euler(velocity, z, ts))


@pytest.mark.parametrize("form", PAPER_FORMULATIONS)
def test_every_sampler_serves_every_formulation(form):
    f = formulation(form)
    velocity, _ = gaussian(0.3, 1.0, f)
    z = float(f.b(torch.tensor(f.t_max))) * torch.randn(3, 1, generator=seeded())
    for name, sample in SAMPLERS.items():
        options = {"path": f} if name in WITH_PATH else {"tolerance": 0.1} if name == "bs23" else {}
        out = sample(velocity, z, timesteps_log_snr(12, f), **options)
        assert out.isfinite().all() and out.shape == z.shape, name


@pytest.mark.parametrize("sample", [sample_sde, sample_ancestral])
@pytest.mark.parametrize("form", ["rf", "v/cos", "eps/linear", "edm/rf"])
def test_stochastic_samplers_keep_the_marginals(form, sample):
    f, n = formulation(form), 20000
    velocity, solution = gaussian(0.4, 0.6, f)
    c = torch.randn(n, 1, generator=seeded())
    ts = timesteps_log_snr(300, f) if form != "rf" else timesteps(300)
    z = sample(velocity, solution(c, ts[0]), ts, path=f, generator=seeded(1))
    assert float(z.mean()) == pytest.approx(0.4, abs=0.03) and float(z.std()) == pytest.approx(0.6, abs=0.03)
    assert abs(float((z * c).mean())) < 0.5 * 0.6               # and has forgotten much of where it began; the ODE has 0.6


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["rf", "v/cos", "edm/rf"])
def test_ancestral_steps_of_any_size_have_the_law_of_the_path(form, noise):
    """Where x_0 is known: z_s is N(a x_0, b^2), and its noise has as much of the first one's as the log-SNRs say."""
    f, n = formulation(form), 40000
    ts = torch.tensor([0.9, 0.6, 0.2]) if form == "edm/rf" else torch.tensor([0.8, 0.6, 0.3])
    velocity, _ = gaussian(0.7, 0.0, f)
    c = torch.randn(n, 1, generator=seeded())
    z = sample_ancestral(velocity, f.a(ts[0]) * 0.7 + f.b(ts[0]) * c, ts, path=f, noise=noise, generator=seeded(1))
    eps = (z - f.a(ts[-1]) * 0.7) / f.b(ts[-1])
    assert float(eps.mean()) == pytest.approx(0, abs=0.02) and float(eps.std()) == pytest.approx(1, abs=0.02)
    ratio = f.a(ts[0]) * f.b(ts[-1]) / (f.a(ts[-1]) * f.b(ts[0]))
    assert float((eps * c).mean()) == pytest.approx(float(ratio) ** noise, abs=0.02)


@pytest.mark.parametrize("sample", [sample_sde, sample_ancestral])
def test_stochastic_samplers_without_noise_are_euler(sample):
    velocity, _ = gaussian(0.4, 0.6, formulation("rf"))
    z, ts = torch.randn(4, 1, generator=seeded()), timesteps(9)
    torch.testing.assert_close(sample(velocity, z, ts, noise=0.0), sample_euler(velocity, z, ts))


# ---- few evaluations

def test_the_benchmark_of_solvers_runs(cli, tiny, tmp_path):
    status, lines, errors = cli("benchmarks/solvers.py", "--weights", tiny, "--per-category", 1, "--reference", 4, "--evaluations", 4, "--shifts", 1, "--out", tmp_path)
    assert status == 0 and len(lines) == 7 * 2 and {path.name for path in tmp_path.iterdir()} == {"solvers.json", "solvers.png"}, errors


def mixture_field(scale, points=12, dims=16, std=0.15):
    """Guided velocity of 12 narrow Gaussians in 16 dimensions, 4 of which are the condition: strongly curved, like guided images."""
    means = torch.randn(points, dims, generator=seeded(), dtype=F64)

    def field(means):
        def velocity(z, t):
            t = t[0].clamp(min=1e-9)
            var = ((1 - t) * std) ** 2 + t ** 2
            off = z[:, None] - (1 - t) * means
            mean = (-off.square().sum(-1) / (2 * var)).softmax(1) @ means
            return (z - mean - (1 - t) * std ** 2 / var * (z - (1 - t) * mean)) / t
        return velocity
    return guided(field(means[:4]), field(means), scale), torch.randn(128, dims, generator=seeded(1), dtype=F64)


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ten_evaluations_of_abm2(scale):
    """Half of Euler's error at 10; without guidance, less than Euler's at 50."""
    velocity, z = mixture_field(scale)
    truth = sample_heun(velocity, z, timesteps(1000).double())

    def error(sampler, steps):
        return rms(sampler(velocity, z, timesteps(steps).double()) - truth)
    assert error(sample_abm2, 10) < 0.5 * error(sample_euler, 10)
    if scale == 1:
        assert error(sample_abm2, 10) < error(sample_euler, 50)


def test_adapted_grid_beats_the_uniform_one():
    velocity, z = mixture_field(1.0)
    truth = sample_heun(velocity, z, timesteps(1000).double())
    ts = timesteps_adapted(10, velocity, z, timesteps(200))
    assert len(ts) == 11 and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
    median = [float((sample_euler(velocity, z, grid.double()) - truth).norm(dim=1).median()) for grid in (ts, timesteps(10))]
    assert median[0] < median[1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_callbacks_and_shapes(name):
    calls, seen = [], []

    def velocity(z, t):
        assert t.shape == (2,) and t.dtype == torch.float32 and z.shape == (2, 4, 3, 3)
        calls.append(t)
        return -z
    z = torch.randn(2, 4, 3, 3, generator=seeded())
    out = SAMPLERS[name](velocity, z, timesteps(6), lambda i, t, z, v: seen.append((i, float(t), z, v)))
    assert out.shape == z.shape and out.dtype == torch.float32
    if name != "bs23":
        assert len(calls) == 6 * EVALUATIONS.get(name, 1)
        assert [i for i, *_ in seen] == list(range(6)) and [t for _, t, *_ in seen] == timesteps(6)[:-1].tolist()
    assert torch.equal(seen[0][2], z) and torch.equal(seen[0][3], -z)


# ---- time grids

@pytest.mark.parametrize("schedule", ["uniform", "logit-normal", "released", formulation("rf/mode(1.29)").pi.sample])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_grids(schedule, shift):
    for steps, t_max, t_min in ((1, 1.0, 0.0), (28, 1.0, 0.0), (50, 0.7, 1e-5)):
        ts = timesteps(steps, shift, t_max, t_min, schedule)
        assert ts.shape == (steps + 1,) and ts.dtype == torch.float32
        assert ts[0] == t_max and float(ts[-1]) == pytest.approx(t_min, rel=1e-6) and (ts.diff() < 0).all()


def test_uniform_grid_is_shifted_once():
    u = torch.linspace(1, 0, 11)
    torch.testing.assert_close(timesteps(10), u)
    torch.testing.assert_close(timesteps(10, 3.0), 3 * u / (1 + 2 * u))


def test_logit_normal_grid_is_quantiles():
    ts = timesteps(8, shift=2.0, schedule="logit-normal")[1:-1].double()
    torch.testing.assert_close(torch.special.ndtr(torch.logit(ts) - math.log(2)), torch.linspace(1, 0, 9, dtype=F64)[1:-1], atol=1e-6, rtol=0)


def test_released_grid_is_diffusers():
    assert float(timesteps(1000, 3.0, schedule="released")[-2]) == pytest.approx(0.0089, abs=1e-4)
    assert float(timesteps(1000, 3.0)[-2]) == pytest.approx(0.0030, abs=1e-4)
    diffusers = pytest.importorskip("diffusers")
    for steps, shift in ((28, 3.0), (50, 3.0), (10, 1.0)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(timesteps(steps, shift, schedule="released"), scheduler.sigmas, atol=1e-6, rtol=0)


def test_log_snr_grid_is_uniform():
    for form in ("rf", "v/cos", "eps/linear", "edm(0.00,1.20)", "edm/rf"):
        f = formulation(form)
        ts = timesteps_log_snr(20, f)
        assert ts[0] == torch.tensor(f.t_max) and ts[-1] == torch.tensor(f.t_min) and (ts.diff() < 0).all()
        gaps = f.log_snr(ts.double())[1:-1].diff()
        assert gaps.min() > 0 and gaps.max() / gaps.min() < 1.02


def test_last_step_begins_at_t_last():
    ts = timesteps(28, 3.0, t_last=0.4)
    assert len(ts) == 29 and ts[-2:].tolist() == pytest.approx([0.4, 0.0]) and (ts.diff() < 0).all()
    assert torch.allclose(ts[:-1], 0.4 + 0.6 * timesteps(27, 3.0))
    assert timesteps(1, t_last=0.4).tolist() == [1.0, 0.0]
    assert torch.equal(timesteps(5, t_min=0.1, t_last=0.1), timesteps(5, t_min=0.1))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 5, "shift": 0}, {"steps": 5, "shift": math.nan}, {"steps": 5, "schedule": "karras"}, {"steps": 5, "t_last": 1},
                                 {"steps": 5, "t_last": math.nan}])
def test_bad_grids_say_why(bad):
    with pytest.raises(ValueError, match=r"at least 1|known are|below t_max"):
        timesteps(**bad)


# ---- guidance

def counted(value):
    def velocity(z, t):
        velocity.calls += 1
        return value * z
    velocity.calls = 0
    return velocity


def test_guidance():
    z, t = torch.randn(3, 2, 2, generator=seeded()), torch.full((3,), 0.5)
    v, null = counted(2.0), counted(1.0)
    torch.testing.assert_close(guided(v, null, 4.0)(z, t), 5 * z)               # 1 + 4 (2 - 1)
    assert (v.calls, null.calls) == (1, 1)
    torch.testing.assert_close(guided(v, null, 1)(z, t), 2 * z)
    assert (v.calls, null.calls) == (2, 1)                                      # scale 1 costs one evaluation
    torch.testing.assert_close(guided(v, null, 0.0)(z, t), z)


def test_guidance_on_an_interval():
    z, v, null = torch.ones(1, 2), counted(2.0), counted(1.0)
    field = guided(v, null, 4.0, interval=(0.2, 0.8))
    assert [float(field(z, torch.tensor([t]))[0, 0]) for t in (1.0, 0.8, 0.5, 0.2, 0.1)] == pytest.approx([2, 5, 5, 5, 2])
    assert null.calls == 3


def test_rescaled_guidance_has_the_standard_deviation_of_v():
    z, t = torch.randn(3, 4, 8, 8, generator=seeded()), torch.full((3,), 0.5)
    for rescale, std in ((1.0, 2), (0.5, 3.5), (0.0, 5)):
        out = guided(counted(2.0), counted(1.0), 4.0, rescale=rescale)(z, t)
        torch.testing.assert_close(out.std((1, 2, 3)), std * z.std((1, 2, 3)))


def test_joint_guidance_is_one_call():
    z, t = torch.randn(3, 2, generator=seeded()), torch.full((3,), 0.5)
    calls = []

    def joint(z, t):
        calls.append(z)
        assert z.shape == (6, 2) and t.shape == (6,)
        return z * torch.tensor([2.0] * 3 + [1.0] * 3)[:, None]
    out = guided(counted(2.0), None, 4.0, joint=joint)(z, t)
    torch.testing.assert_close(out, guided(counted(2.0), counted(1.0), 4.0)(z, t))
    assert len(calls) == 1


# ---- path length, image to image

def test_path_length():
    """Tab. 6. A straight path is as long as the distance between its ends; every detour is longer."""
    point, z = torch.tensor([[0.3, -1.0]]), torch.randn(5, 2, generator=seeded())
    torch.testing.assert_close(path_length(lambda z, t: (z - point) / t[:, None], z, timesteps(50)), (z - point).norm(dim=1))
    velocity, z = mixture_field(1.0)
    end = sample_euler(velocity, z, timesteps(50).double())
    assert (path_length(velocity, z, timesteps(50).double()) > (z - end).norm(dim=1)).all()


def test_parts():
    for form in ("rf", "v/cos", "eps/linear", "edm/rf"):
        f, t = formulation(form), torch.tensor(0.37, dtype=F64)
        x0, eps = torch.randn(2, 3, 2, generator=seeded(), dtype=F64)
        found = parts(f.da(t) * x0 + f.db(t) * eps, f.interpolate(x0, eps, t), t, f)
        torch.testing.assert_close(found, (x0, eps))


def test_start_from_an_image():
    x0, eps = torch.randn(2, 3, 2, generator=seeded())
    for strength in (1.0, 0.6, 0.0):
        z, ts = start_from(x0, eps, timesteps(10, 2.0), strength)
        assert ts[0] == torch.tensor(strength) and ts[-1] == 0 and len(ts) <= 11
        torch.testing.assert_close(z, (1 - ts[0]) * x0 + ts[0] * eps)
        torch.testing.assert_close(sample_rk4(lambda z, t: eps - x0, z, ts), x0, atol=1e-6, rtol=0)


def test_guidance_towards_a_picture_and_a_text():
    """App. D: with scales 1 the conditional velocity; each scale moves along its own difference."""
    z, t = torch.randn(2, 3), torch.ones(2)
    both, image, none = (torch.randn(2, 3) for _ in range(3))

    def joint(zs, ts):
        assert zs.equal(torch.cat([z, z, z])) and ts.shape == (6,)
        return torch.cat([both, image, none])
    assert torch.allclose(guided_edit(joint, 1, 1)(z, t), both)
    assert torch.allclose(guided_edit(joint, 3, 1)(z, t), both + 2 * (image - none), atol=1e-6)
    assert torch.allclose(guided_edit(joint, 1, 3)(z, t), both + 2 * (both - image), atol=1e-6)
