"""Tests of grpo_flux.py and reward.py, each against something that others wrote or a person can
work out: torch.distributions, diffusers' scheduler and pipeline, a flow with a known solution.

    python -m pytest -q test_grpo_flux.py   # on the CPU; the first run builds the tiny models
    python test_grpo_flux.py                # the benchmark, on the best device there is
"""

import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image

import grpo_flux
import reward
from grpo_flux import Config, flux_step, group_advantages, grpo_loss
from reward import BadInput

HERE = Path(__file__).resolve().parent
SDES = ("dance", "flow", "cps")
GRID = (8, 8)  # latent pixels of the tiny FLUX
World = namedtuple("World", "folder cfg vae transformer encoded predict")


def settings(**changes):
    return Config(**grpo_flux.TINY | dict(num_prompts=1, dtype="fp32") | changes)


def load_world(device, **changes):
    folder = grpo_flux.tiny_models("")
    cfg = settings(model=str(folder / "flux"), **changes)
    encoded = grpo_flux.encode_prompts(cfg, reward.TINY_PROMPTS, device)
    vae, transformer = grpo_flux.load_models(cfg, device)
    predict = partial(grpo_flux.velocity, transformer, ids=grpo_flux.image_ids(*GRID).to(device),
                      guidance=3.5, bf16=False)
    return World(folder, cfg, vae, transformer, encoded, predict)


@pytest.fixture(scope="session")
def tiny():
    return load_world(torch.device("cpu"))


@pytest.fixture(scope="session")
def hps(tiny):
    return reward.HPS(tiny.folder / "hps" / "hps.pt", tiny.folder / "hps" / "tiny-clip.json")


def sample(world, cfg, keys, prompt="a red circle", eta=None):
    """The trajectory of some (step, prompt, sample), and its text."""
    text = grpo_flux.batch_text(world.encoded, [prompt] * len(keys), "cpu")
    x = grpo_flux.draw_latents(keys, (4, *GRID), cfg)
    eta = cfg.eta if eta is None else eta
    return grpo_flux.rollout(world.predict, x, text, keys, cfg, eta), text


class Linear:
    """A policy with a gradient that fits on a line, v = x W, and the W of an optimizer's steps."""

    def __init__(self, channels=3):
        self.W = (0.3 * torch.randn(channels, channels)).requires_grad_()
        self.start, self.calls, self.gradients = self.W.detach().clone(), [], []
        self.optimizer = torch.optim.AdamW([self.W], lr=1e-3)
        self.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append(self.W.grad.clone()))

    def __call__(self, x, sigma, text):
        self.calls.append(sigma.flatten())
        return x @ self.W

    def sample(self, cfg, L=5):
        keys = [(0, slot, i) for slot in range(cfg.num_prompts) for i in range(12)]
        x, text = torch.randn(len(keys), L, len(self.W)), [torch.zeros(len(keys), 1)]
        trajectory = grpo_flux.rollout(self, x, text, keys, cfg, cfg.eta)
        self.calls.clear()
        return trajectory, text, keys


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- flow SDE

def gaussian(sde, v, x, sigma, sigma_next, eta):
    """The step's distribution in float64, as Flow-GRPO (equation 9) and Flow-CPS write it."""
    v, x = v.double(), x.double()
    if sde == "cps":
        mean = (1 - sigma_next) * (x - sigma * v)
        mean = mean + sigma_next * math.cos(eta * math.pi / 2) * (x + (1 - sigma) * v)
        return torch.distributions.Normal(mean, sigma_next * math.sin(eta * math.pi / 2))
    level = sigma if sigma < 1 else sigma_next
    noise = eta if sde == "dance" else eta * math.sqrt(sigma / (1 - level))
    drift = v + noise**2 / (2 * sigma) * (x + (1 - sigma) * v)
    std = noise * math.sqrt(sigma - sigma_next)
    return torch.distributions.Normal(x + drift * (sigma_next - sigma), std)


@pytest.mark.parametrize("sde", SDES)
def test_logp_is_that_of_the_normal(sde):
    """A wrong std, a lost constant, a sum for a mean, the σ of another sample, 1 - σ = 0."""
    v, x, noise = torch.randn(3, 4, 6, 5)
    levels = [(1.0, 0.9), (0.9, 0.7), (0.5, 0.2), (0.2, 0.05)]
    steps = torch.tensor(levels).T[..., None, None]  # (2, B, 1, 1)
    x_next, x0, logp = flux_step(v, x, *steps, 0.6, sde, noise)
    for i, (sigma, sigma_next) in enumerate(levels):
        one, _, logp_one = flux_step(v[i:i + 1], x[i:i + 1], sigma, sigma_next, 0.6, sde, noise[i])
        normal = gaussian(sde, v[i], x[i], sigma, sigma_next, 0.6)
        expected = normal.mean + normal.stddev * noise[i]
        assert torch.allclose(one[0].double(), expected, atol=1e-6)
        assert torch.allclose(x_next[i].double(), expected, atol=1e-6)
        expected = normal.log_prob(x_next[i].double()).mean().float()
        assert torch.allclose(logp[i], expected, atol=2e-5)
        assert torch.allclose(logp_one[0], expected, atol=2e-5)
        assert torch.allclose(x0[i], x[i] - sigma * v[i])
    scored, _, again = flux_step(v, x, *steps, 0.6, sde, x_next=x_next)
    assert torch.equal(again, logp) and scored is x_next  # the same bits: the first ratio is 1
    assert flux_step(v, x, *steps, 0.0, sde)[2].isnan().all()  # an ODE step has no density


def end_of_flow(step, eta, s, T=200, mean=1.5, count=40_000):
    """Mean and deviation of samples that step takes along the exact flow to N(mean, s²)."""
    sigmas, x = grpo_flux.sigma_schedule(T, 1.0), torch.randn(8, 50, count // 400)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        variance = (1 - sigma)**2 * s**2 + sigma**2
        centred = (x - (1 - sigma) * mean) / variance
        v = sigma * centred - (mean + (1 - sigma) * s**2 * centred)  # E[x1 - x0 | x]
        x = step(v, x, sigma, sigma_next, eta if sigma_next else 0.0, noise=torch.randn_like(x))[0]
    return x.mean().item(), x.std().item()


# 40,000 samples leave an error of 0.0025 in the mean, 200 Euler steps one of 0.004 in the deviation
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sde", ["dance", "flow"])
def test_sde_keeps_the_distribution(sde, eta):
    """Noise without its score term blurs images; with the wrong sign they blur twice as much."""
    assert end_of_flow(partial(flux_step, sde=sde), eta, 0.5) == pytest.approx((1.5, 0.5), abs=0.01)


@pytest.mark.parametrize("score", [0, -1, 2])
def test_distribution_shows_a_wrong_score_term(score):
    """The test above would be blind if samples with score times a wrong factor passed it."""
    def wrong(v, x, sigma, sigma_next, eta, noise):
        ode = x + v * (sigma_next - sigma)
        mean = flux_step(v, x, sigma, sigma_next, eta, "dance", torch.zeros_like(x))[0]
        taken = flux_step(v, x, sigma, sigma_next, eta, "dance", noise)[0]
        return taken + (score - 1) * (mean - ode), None, None

    assert abs(end_of_flow(wrong, 0.7, 0.5)[1] - 0.5) > 0.03


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_cps_keeps_the_noise_level(eta):
    """Image and noise mixed with shares that do not fit σ': for one image it is exact."""
    x, sigmas = torch.randn(4, 100, 100), grpo_flux.sigma_schedule(8, 3.0)
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1]):
        v = (x - 1.5) / sigma  # the flow to the image 1.5
        x = flux_step(v, x, sigma, sigma_next, eta, "cps", torch.randn_like(x))[0]
        assert x.mean().item() == pytest.approx(1.5 * (1 - sigma_next), abs=0.02)
        assert x.std().item() == pytest.approx(sigma_next, rel=0.02)


def test_ode_is_that_of_diffusers():
    """A shift that is applied twice or to a grid with T - 1 gaps; x0 that is not the last step."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 16, 16))
    sigmas = grpo_flux.sigma_schedule(16, 3.0)
    assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas, atol=1e-7)
    x = ours = torch.randn(2, 6, 5)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.sin(3 * x + i)
        x = scheduler.step(v, t, x).prev_sample
        ours, x0, _ = flux_step(v, ours, sigmas[i], sigmas[i + 1], 0.0)
        assert torch.allclose(ours, x, atol=1e-5)
    assert torch.allclose(x0, x, atol=1e-5)


def test_packing_and_positions():
    """Rows for columns, or channels inside a patch in another order, look like a worse model."""
    z = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert grpo_flux.pack_latents(z)[0].tolist() == tokens
    z = torch.randn(2, 4, 6, 10)
    packed = grpo_flux.pack_latents(z)
    assert torch.equal(packed, FluxPipeline._pack_latents(z, 2, 4, 6, 10))
    assert torch.equal(grpo_flux.unpack_latents(packed, 6, 10), z)
    assert torch.equal(FluxPipeline._unpack_latents(packed, 48, 80, 8), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(grpo_flux.image_ids(6, 10), ids)


# -------------------------------------------------------------------------------------------- GRPO

def test_advantages():
    """Biased std, groups that mix, and a flat group whose rounded mean is divided by eps."""
    ramp, low = [1.0, 2.0, 3.0, 4.0], [0.1] * 4  # std² = 5/3: 1.5 / 1.2909944 = 1.1618950
    advantages = group_advantages(torch.tensor(ramp + low + [-3 * r for r in ramp]), 4)
    expected = torch.tensor([-1.1618950, -0.3872983, 0.3872983, 1.1618950])
    assert torch.allclose(advantages[:4], expected, atol=1e-6)
    assert torch.allclose(advantages[8:], -expected, atol=1e-6)
    assert not advantages[4:8].any()
    assert not group_advantages(torch.full((12,), 0.1), 12).any()


def test_loss_by_hand():
    """min for max, or an advantage's sign lost: the clip would free what it should hold."""
    old = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    ratios, A = torch.tensor([1.2, 0.8, 1.2, 0.8]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    for scale, cut in ((1, 1), (9, 5)):  # advantages of 9 are cut to 5
        logp = (old + ratios.log()).requires_grad_()
        loss, stats = grpo_loss(logp, old, scale * A, clip_range=0.1, adv_clip_max=5.0)
        loss.backward()
        # 1.2 with A > 0 and 0.8 with A < 0 have gone far enough; d ratio / d logp = ratio
        expected = cut * torch.tensor([0.0, -0.8, 1.2, 0.0]) / 4
        assert torch.allclose(logp.grad, expected, atol=1e-6)
        assert loss.item() == pytest.approx(cut * (-1.1 - 0.8 + 1.2 + 0.9) / 4, abs=1e-6)
    stats = {name: value.item() for name, value in stats.items()}
    assert stats == pytest.approx({"ratio": 1.0, "ratio_off": 0.2, "clipped": 0.5}, abs=1e-6)


# ----------------------------------------------------------------------------------------- rollout

def test_rollout_is_that_of_flux_pipeline(tiny):
    """A timestep that is 1000 times off, swapped text inputs, the VAE's shift left out."""
    prompts = ["a red circle", "a blue cross"]
    pipe = FluxPipeline.from_pretrained(tiny.folder / "flux", transformer=tiny.transformer)
    pipe.set_progress_bar_config(disable=True)
    keys = [(0, slot, 0) for slot in range(2)]
    x = grpo_flux.draw_latents(keys, (4, *GRID), tiny.cfg)
    text = grpo_flux.batch_text(tiny.encoded, prompts, "cpu")
    x0 = grpo_flux.rollout(tiny.predict, x, text, keys, tiny.cfg, eta=0).x0
    call = partial(pipe, prompts, height=32, width=32, num_inference_steps=8, guidance_scale=3.5,
                   latents=x, max_sequence_length=8)
    assert torch.allclose(x0, call(output_type="latent").images, atol=1e-4)
    images = grpo_flux.decode(tiny.vae, x0, GRID, 1)
    difference = (images - call(output_type="pt").images).abs().max().item()
    assert difference < 0.5 / 255 + 1e-4  # ours are rounded to 8 bits
    assert torch.equal((images * 255).round() / 255, images)


def test_images_do_not_depend_on_processes_or_batches(tiny):
    """Draws by call order or by rank: another number of GPUs would be another experiment."""
    cfg = settings(num_generations=4, micro_batch=4, gradient_accumulation_steps=4, steps=2)
    prompts, results = reward.TINY_PROMPTS[:5], []
    for world, per_rank in ((1, 2), (2, 1)):
        cfg.num_prompts = per_rank
        images = {}
        for rank in range(world):
            for slot, prompt in grpo_flux.plan_prompts(prompts, cfg, rank, world)[1]:
                keys = [(1, slot, i) for i in range(4)]
                images[slot] = sample(tiny, cfg, keys, prompt)[0]
        results.append(images)
    one, two = results
    assert one.keys() == two.keys() == {0, 1}
    assert all(torch.equal(one[slot].x0, two[slot].x0) for slot in one)
    assert not torch.equal(one[0].x0, one[1].x0)
    keys, starts = [(1, 0, i) for i in range(12)], []
    for n in (1, 4, 12):
        cfg = settings(micro_batch=n)
        starts.append(sample(tiny, cfg, keys)[0])
        assert torch.equal(starts[-1].x[:, 0], starts[0].x[:, 0])
        assert torch.allclose(starts[-1].x0, starts[0].x0, atol=1e-4)
    assert (starts[0].x[:, 0] == starts[0].x[0, 0]).all()  # init_same_noise
    assert len(starts[0].x0.unique(dim=0)) == 12


# ------------------------------------------------------------------------------------------ reward

@pytest.mark.parametrize("height, width", [(720, 720), (512, 768), (100, 224), (224, 90)])
def test_preprocessing_of_hps(height, width):
    """A crop where HPS pads, no antialias, a resize in another library: scores drift unseen."""
    images, rows = torch.randint(256, (2, 3, height, width), dtype=torch.uint8), []
    for image in images:  # the official code's way, one at a time
        scale = 224 / max(height, width)
        size = [round(height * scale), round(width * scale)]
        one = TF.resize(image.float() / 255, size, TF.InterpolationMode.BICUBIC, antialias=True)
        canvas, top, left = torch.zeros(3, 224, 224), (224 - size[0]) // 2, (224 - size[1]) // 2
        canvas[:, top:top + size[0], left:left + size[1]] = one
        rows.append(TF.normalize(canvas, open_clip.OPENAI_DATASET_MEAN,
                                 open_clip.OPENAI_DATASET_STD))
    assert torch.equal(reward.preprocess(images.float() / 255), torch.stack(rows))


def test_hps_is_the_cosine_of_open_clip(tiny, hps):
    """Prompts of two groups mixed up, features not of length 1, the logit scale left in."""
    prompts = ["a red circle", "a blue cross", "a red circle"]
    images = torch.rand(3, 3, 32, 32)
    model = open_clip.create_model("tiny-clip", pretrained=None)
    model.load_state_dict(torch.load(tiny.folder / "hps" / "hps.pt")["state_dict"])
    model.eval()
    with torch.no_grad():
        a = model.encode_image(reward.preprocess(images, 32))
        b = model.encode_text(open_clip.get_tokenizer("tiny-clip")(prompts))
    assert torch.allclose(hps(images, prompts), torch.cosine_similarity(a, b), atol=1e-5)


class Code:
    """What a checkpoint must not do."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


def test_checkpoints_that_are_refused(tiny, tmp_path, monkeypatch):
    """Code run out of a download, half a file, a web page, or weights that do not fit, in use."""
    monkeypatch.chdir(tmp_path)
    whole, arch = tiny.folder / "hps" / "hps.pt", tiny.folder / "hps" / "tiny-clip.json"
    state = torch.load(whole)["state_dict"]
    torch.save({"state_dict": Code()}, "code.pt")
    Path("page.pt").write_text("<!DOCTYPE html><title>404</title>")
    Path("half.pt").write_bytes(whole.read_bytes()[:20_000])
    Path("half.safetensors").write_bytes(b"\xff" * 100)
    torch.save(dict(list(state.items())[1:]), "missing.pt")
    torch.save(state | {"more": torch.zeros(1)}, "more.pt")
    torch.save([1], "list.pt")
    names = "code.pt page.pt half.pt half.safetensors missing.pt more.pt list.pt none.pt".split()
    for name in names:
        with pytest.raises(BadInput, match=name):
            reward.HPS(name, arch)
    assert not Path("made-by-a-checkpoint").exists()


def test_reward_specs(tmp_path, monkeypatch):
    """A weight that is dropped without a word; the user's own module not found."""
    assert reward.parse_rewards("hps:0.7,clip:0.3") == {"hps": 0.7, "clip": 0.3}
    assert reward.parse_rewards("hps, my.rewards:f:2") == {"hps": 1.0, "my.rewards:f": 2.0}
    for bad in ("", "hsp", "hps:", "hps:-1", "hps:0", "hps,hps", "hps:1.2.3", "a:b:c"):
        with pytest.raises(BadInput, match="must be"):
            reward.parse_rewards(bad)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def light(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert reward.load_reward("mine:light")(torch.ones(2, 3, 4, 4), []).tolist() == [1.0, 1.0]
    for bad in ("mine:dark", "nothing_here:light"):
        with pytest.raises(BadInput, match=bad):
            reward.load_reward(bad)
    images = torch.rand(3, 3, 4, 4)
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.tensor([0.0, 1.0, math.nan])):
        with pytest.raises(BadInput, match="finite"):
            grpo_flux.score({"bad": (1.0, lambda *_: bad)}, images, [""] * 3)


def test_reward_command_line(tiny, tmp_path, capsys):
    """Scores printed beside the wrong file; a grey or transparent picture, or none, in tears."""
    rng, hps = np.random.default_rng(0), tiny.folder / "hps"
    red = Image.fromarray(reward.draw("a red circle", rng))
    blue = Image.fromarray(reward.draw("a blue cross", rng))
    pictures = {"red.png": red, "blue.png": blue, "grey.png": red.convert("L"),
                "clear.png": red.convert("RGBA")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    flags = ["--hps", str(hps / "hps.pt"), "--hps_arch", str(hps / "tiny-clip.json"),
             "--device", "cpu", "--prompt", "a red circle"]
    reward.main([*flags, *(str(tmp_path / name) for name in pictures)])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    scores = {Path(path).name: float(score) for score, path in lines}
    assert list(scores) == list(pictures)
    assert scores["red.png"] > scores["blue.png"] + 0.2
    assert scores["clear.png"] == scores["red.png"] != scores["grey.png"]
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    done = shell("reward.py", *flags, "broken.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: broken.png: ")
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------ update

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_gradient_is_that_of_reinforce(sde, micro_batch):
    """Gradient through x_next, a step scored at another σ, a loss scaled by the batch count."""
    cfg = settings(sde=sde, micro_batch=micro_batch, max_grad_norm=1e9, adv_clip_max=1.0)
    linear = Linear()
    trajectory, text, keys = linear.sample(cfg)
    A = torch.linspace(-1.4, 1.6, 12) * (torch.arange(12) % 3 > 0)  # zeros: batches with fillers
    stats = grpo_flux.update(linear, linear.optimizer, trajectory, text, A, keys, cfg)

    T, W, loss = cfg.sampling_steps, linear.start.double().requires_grad_(), 0
    sigmas = grpo_flux.sigma_schedule(T, cfg.shift)
    for t in range(T - 1):
        x = trajectory.x[:, t].double()
        normal = gaussian(sde, x @ W, x, sigmas[t], sigmas[t + 1], cfg.eta)
        logp = normal.log_prob(trajectory.x[:, t + 1].double()).mean((1, 2))
        loss = loss - (A.clamp(-1, 1) * logp).mean() / (T - 1)
    loss.backward()
    assert len(linear.gradients) == stats["updates"] == 1
    assert torch.allclose(linear.gradients[0].double(), W.grad, rtol=1e-3, atol=1e-6)
    assert stats["grad_norm"] == pytest.approx(W.grad.norm().item(), rel=1e-3)
    assert stats["ratio_off"] == 0


@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_ratio_is_one(tiny, sde, micro_batch):
    """Rollout and update that compute other bits, and a policy that differs a little: refused."""
    cfg = settings(sde=sde, micro_batch=micro_batch, sampling_steps=4, timestep_fraction=0.7)
    keys, A = [(3, 0, i) for i in range(12)], torch.linspace(-1, 1, 12)
    trajectory, text = sample(tiny, cfg, keys)
    optimizer = torch.optim.SGD(tiny.transformer.parameters(), lr=0)  # the fixture is shared
    stats = grpo_flux.update(tiny.predict, optimizer, trajectory, text, A, keys, cfg)
    assert stats["ratio_off"] == 0 and stats["grad_norm"] > 0

    def rounded(x, sigma, text):
        return tiny.predict(x, sigma, text).bfloat16().float()

    with pytest.raises(RuntimeError, match="first ratio"):
        grpo_flux.update(rounded, optimizer, trajectory, text, A, keys, cfg)
    tiny.transformer.zero_grad()


def test_broken_numbers_are_refused():
    """An optimizer step with a gradient that is not a number ends a run of days in noise."""
    cfg, linear = settings(), Linear()
    trajectory, text, keys = linear.sample(cfg)
    A = torch.full((12,), math.nan)
    with pytest.raises(FloatingPointError):
        grpo_flux.update(linear, linear.optimizer, trajectory, text, A, keys, cfg)
    assert torch.equal(linear.W, linear.start)


def test_trained_steps():
    """The last, deterministic step trained; a step twice; all samples with the same steps."""
    cfg, linear = settings(sampling_steps=16, timestep_fraction=0.6), Linear()
    trajectory, text, keys = linear.sample(cfg)
    A = torch.linspace(-1, 1, 12)
    grpo_flux.update(linear, linear.optimizer, trajectory, text, A, keys, cfg)
    random = set(trajectory.sigmas[:15].tolist())
    chosen = [frozenset(steps) for steps in torch.stack(linear.calls, 1).tolist()]
    assert all(len(steps) == 9 and steps <= random for steps in chosen)  # int(0.6 * 15)
    assert len(linear.calls) == 9 and len(set(chosen)) > 6


def test_flat_groups_cost_nothing():
    """Forwards for gradients of 0, or weight decay and momentum that move on without a signal."""
    cfg, linear = settings(num_prompts=2, micro_batch=4), Linear()
    trajectory, text, keys = linear.sample(cfg)
    flat, live = torch.zeros(12), torch.tensor([1.0, -1.0, 0.0] * 4)
    args = linear, linear.optimizer, trajectory, text
    stats = grpo_flux.update(*args, torch.cat([flat, flat]), keys, cfg)
    assert not linear.calls and not linear.optimizer.state and torch.equal(linear.W, linear.start)
    assert stats["updates"] == 0 and all(map(math.isfinite, stats.values()))
    stats = grpo_flux.update(*args, torch.cat([flat, live]), keys, cfg)
    assert stats["updates"] == 1 and len(linear.calls) == 2 * 7  # 8 samples by 4, 7 random steps


# ------------------------------------------------------------------------------------------- draws

def test_draws_have_names():
    """Numbers that follow the order of calls, or another generator: no run can be repeated."""
    golden = [-0.8458674550056458, -0.03669758886098862, 0.7569313049316406, -0.37433308362960815]
    assert grpo_flux.randn((2, 2), 0, 1, 2, 3, 4, 5).flatten().tolist() == golden
    assert grpo_flux.randperm(8, 0, 1, 2, 3, 4, 5).tolist() == [1, 6, 0, 3, 5, 2, 7, 4]
    names = [(seed, purpose, step) for seed in range(3) for purpose in range(3) for step in (0, 7)]
    assert len({grpo_flux.randn((1,), *name).item() for name in names}) == len(names)


@pytest.mark.parametrize("count, num_prompts", [(24, 2), (5, 1), (3, 2)])
def test_prompts_go_round(count, num_prompts):
    """Two processes with the same prompts, a prompt never or twice in a round, one fixed order."""
    prompts = [f"prompt {i}" for i in range(count)]
    cfg = settings(num_prompts=num_prompts, steps=30)
    half = settings(num_prompts=num_prompts, steps=15)
    ranks = [grpo_flux.plan_prompts(prompts, half, rank, 2) for rank in range(2)]
    together = [sorted(a + b) for a, b in zip(*ranks)]
    seen = [prompt for step in together for _, prompt in step]
    assert [slot for slot, _ in together[0]] == list(range(2 * num_prompts))
    assert seen == [p for step in grpo_flux.plan_prompts(prompts, cfg, 0, 1) for _, p in step]
    rounds = [seen[i:i + count] for i in range(0, len(seen) - count + 1, count)]
    assert all(sorted(one) == sorted(prompts) for one in rounds)
    assert rounds[0] != rounds[1]


# ---------------------------------------------------------------------------- run and command line

def shell(*argv, cwd):
    argv = [str(HERE / word) if word.endswith("x.py") or word == "reward.py" else word
            for word in argv]
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True)


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run(tiny, tmp_path):
    """A run that ends in an error, writes beside --out, or exports something untrained."""
    flags = "--device cpu --num_prompts 1 --steps 3 --eval_every 2 --eval_images 24 --out run"
    done = shell("grpo_flux.py", *flags.split(), "--reward", "hps:0.7,clip:0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out reward" in done.stdout and "24 images" in done.stdout
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"run/{name}" for name in (
        "config.json", "metrics.jsonl", "reward.png", "before_after.png",
        "images/step_00000.png", "images/step_00002.png", "images/step_00003.png",
        "export/transformer/config.json",
        "export/transformer/diffusion_pytorch_model.safetensors")}
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["ratio"] == 1 and line["ratio_off"] == 0 and line["grad_norm"] > 0
        assert line["reward"] == pytest.approx(0.7 * line["hps"] + 0.3 * line["clip"], abs=1e-5)
        assert all(map(math.isfinite, line.values()))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["steps"] == 3 and config["versions"]["torch"] in torch.__version__
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "run" / "export" / "transformer")
    start = tiny.transformer.state_dict()
    moved = [(w - start[name]).abs().max() for name, w in model.state_dict().items()]
    assert len(moved) == len(start) and 1e-5 < max(moved) < 1e-2
    with pytest.raises(BadInput, match="holds a run already"):
        grpo_flux.main(["--out", str(tmp_path / "run")])


def test_two_processes_do_what_one_does(tmp_path):
    """Gradients summed instead of averaged, prompts or draws by rank, weights that differ."""
    flags = "--device cpu --steps 2 --sampling_steps 4 --eval_images 3 --out".split()
    grpo_flux.main([*flags, str(tmp_path / "one"), "--num_prompts", "2",
                    "--gradient_accumulation_steps", "24"])
    done = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                 "grpo_flux.py", *flags, "two", "--num_prompts", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    a, b = (FluxTransformer2DModel.from_pretrained(tmp_path / name / "export" / "transformer")
            for name in ("one", "two"))
    difference = [(u - v).abs().mean() for u, v in zip(a.parameters(), b.parameters())]
    assert max(difference) < 2e-5  # two steps of AdamW move weights by 2e-4


def test_reward_rises(tiny, tmp_path, monkeypatch):
    """An advantage or a loss with the wrong sign: everything runs, and the reward falls."""
    monkeypatch.chdir(tmp_path)
    Path("colour.py").write_text("def red(images, prompts):\n"
                                 "    return (images[:, 0] - images[:, 1]).mean((1, 2))\n")
    grpo_flux.main("--device cpu --reward colour:red --steps 12 --num_prompts 1 --eval_images 2 "
                   "--learning_rate 3e-4 --out run".split())
    rewards = [line["reward"] for line in read_metrics(Path("run"))]
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.05


BAD = [
    ("--steps 0", "from 1"), ("--steps ten", "invalid int"), ("--seed -1", "from 0"),
    ("--eta 0", "from 1e-06"), ("--learning_rate nan", "from"), ("--num_generations 1", "from 2"),
    ("--height 40", "multiple of 16"), ("--width 8", "from 16"), ("--sde ddpm", "dance flow cps"),
    ("--gradient_accumulation_steps 9", "12"), ("--micro_batch 5", "multiple of"),
    ("--reward hsp", "hps, clip or"), ("--reward hps,hps", "once"), ("--hps none.pt", "file"),
    ("--prompts none.txt", "UTF-8"), ("--prompts empty.txt", "empty"), ("--device tpu", "cuda"),
    ("--model nowhere", "tiny"), ("--model .", "model_index.json"), ("--unknown 1", "unrecognized"),
    ("--model a/b --prompts some.txt", "--hps"), ("--model a/b --hps some.txt", "--prompts")]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input(flags, words, tmp_path, monkeypatch, capsys):
    """A traceback after minutes of loading where one line at once would have done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo_flux, "start", lambda _: pytest.fail("was not refused at once"))
    Path("empty.txt").write_text("\n \n")
    Path("some.txt").write_text("a prompt\n")
    with pytest.raises((BadInput, SystemExit)) as caught:
        grpo_flux.main(flags.split())
    message = str(caught.value) if caught.type is BadInput else capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1
    assert caught.type is BadInput or caught.value.code == 2


@pytest.mark.parametrize("flags", ["--steps 0", "--unknown 1"])
def test_bad_input_from_outside(flags, tmp_path):
    """BadInput that nobody turns into one line and exit status 2."""
    done = shell("grpo_flux.py", *flags.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and flags.split()[0] in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_setting_is_explained_and_read(capsys):
    """A flag that nothing reads, or one that --help and the limits do not know."""
    names = [field.name for field in fields(Config)]
    assert list(grpo_flux.COMMENTS) == names and set(grpo_flux.TINY) <= set(names)
    source = inspect.getsource(grpo_flux)
    by_name = {"hps", "hps_arch", "clip", "clip_arch"}  # read with getattr
    assert [name for name in names if f"cfg.{name}" not in source and name not in by_name] == []
    with pytest.raises(SystemExit):
        grpo_flux.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Config):
        comment = grpo_flux.COMMENTS[field.name][1]
        assert f"--{field.name}" in text and f"{comment} (default " in text


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    """Half a tiny model that every later run would take for a whole one."""
    def build_tiny(folder):
        folder.mkdir()
        (folder / "half").touch()
        if broken:
            raise KeyboardInterrupt

    monkeypatch.setattr(grpo_flux, "build_tiny", build_tiny)
    broken = True
    with pytest.raises(KeyboardInterrupt):
        grpo_flux.tiny_models(str(tmp_path))
    assert not list(tmp_path.iterdir())
    broken = False
    folder = grpo_flux.tiny_models(str(tmp_path))
    assert list(tmp_path.iterdir()) == [folder] and (folder / "half").exists()


# --------------------------------------------------------------------------------------- benchmark

def ours(world, hps, optimizer, cfg, device):
    """One GRPO step as main does it; seconds of rollout, of decoding and reward, of the update."""
    keys, names = [(0, 0, i) for i in range(12)], ["a red circle"] * 12
    times = [grpo_flux.clock(device)]
    text = grpo_flux.batch_text(world.encoded, names, device)
    x = grpo_flux.draw_latents(keys, (4, *GRID), cfg).to(device)
    trajectory = grpo_flux.rollout(world.predict, x, text, keys, cfg, cfg.eta)
    times.append(grpo_flux.clock(device))
    rewards = hps(grpo_flux.decode(world.vae, trajectory.x0, GRID, cfg.micro_batch), names).cpu()
    times.append(grpo_flux.clock(device))
    A = group_advantages(rewards, 12)
    grpo_flux.update(world.predict, optimizer, trajectory, text, A, keys, cfg)
    times.append(grpo_flux.clock(device))
    return [end - begin for begin, end in zip(times, times[1:])]


def one_by_one(world, hps, optimizer, cfg, device, folder=tempfile.mkdtemp()):
    """The same step in the manner of DanceGRPO's code: one sample at a time, written to a file and
    scored, then one transition at a time, with a host read after each."""
    T, name, samples, rewards = cfg.sampling_steps, ["a red circle"], [], []
    sigmas = grpo_flux.sigma_schedule(T, 3.0)
    text = grpo_flux.batch_text(world.encoded, name, device)
    start, K = torch.randn(1, 16, 16, device=device), int(cfg.timestep_fraction * (T - 1))
    begin, total, level = grpo_flux.clock(device), 0.0, torch.ones(1, 1, 1, device=device)
    for _ in range(12):
        x, states, logps = start, [start], []
        for t in range(T):
            world.transformer.eval()  # at every call, as there
            with torch.no_grad():
                v = world.predict(x, sigmas[t] * level, text)
                x, x0, logp = flux_step(v, x, sigmas[t], sigmas[t + 1], cfg.eta if t < T - 1 else 0,
                                        noise=torch.randn_like(x))
            states.append(x)
            logps.append(logp)
        samples.append((states, logps))
        image = grpo_flux.decode(world.vae, x0, GRID, 1)
        pixels = (image[0].permute(1, 2, 0) * 255).byte().cpu().numpy()
        Image.fromarray(pixels).save(Path(folder) / f"{len(samples)}.png")
        rewards.append(hps(image, name).item())
    advantages = group_advantages(torch.tensor(rewards), 12).to(device)
    for i, (states, logps) in enumerate(samples):
        for t in torch.randperm(T - 1)[:K].tolist():
            world.transformer.train()
            v = world.predict(states[t], sigmas[t] * level, text)
            logp = flux_step(v, states[t], *sigmas[t:t + 2], cfg.eta, x_next=states[t + 1])[2]
            loss, _ = grpo_loss(logp, logps[t], advantages[i:i + 1], 1e-4, 5.0)
            (loss / (4 * K)).backward()
            total += loss.item()
        if i % 4 == 3:
            torch.nn.utils.clip_grad_norm_(world.transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [grpo_flux.clock(device) - begin]


def bare(world, hps, optimizer, cfg, device):
    """Nothing but the transformer calls of one step of ours."""
    calls, n = 12 // cfg.micro_batch, cfg.micro_batch
    text = grpo_flux.batch_text(world.encoded, ["a red circle"] * n, device)
    begin, x = grpo_flux.clock(device), torch.randn(n, 16, 16, device=device)
    inputs = dict(hidden_states=x, timestep=x[:, 0, 0].sigmoid(), guidance=x[:, 0, 0],
                  encoder_hidden_states=text[0], pooled_projections=text[1], return_dict=False,
                  img_ids=grpo_flux.image_ids(*GRID).to(device), txt_ids=x.new_zeros(8, 3))
    with torch.no_grad():
        for _ in range(calls * cfg.sampling_steps):
            world.transformer(**inputs)
    for _ in range(calls * int(cfg.timestep_fraction * (cfg.sampling_steps - 1))):
        world.transformer(**inputs)[0].backward(x)
    seconds = grpo_flux.clock(device) - begin
    optimizer.zero_grad()
    return [seconds]


def benchmark(repetitions=7):
    device = reward.select_device()
    world = load_world(device, sampling_steps=16, timestep_fraction=0.6, micro_batch=4,
                       gradient_accumulation_steps=4, eta=0.3)
    folder = world.folder / "hps"
    hps = reward.HPS(folder / "hps.pt", folder / "tiny-clip.json", device)
    fused = True if device.type == "cpu" else None  # as in main
    optimizer = torch.optim.AdamW(world.transformer.parameters(), 1e-8, fused=fused)
    loops = ours, one_by_one, bare
    seconds = {loop: [] for loop in loops}
    for i in range(repetitions + 1):
        for loop in loops:
            result = loop(world, hps, optimizer, world.cfg, device)
            if i:  # the first one warms up
                seconds[loop].append(result)
    parts = [statistics.median(column) for column in zip(*seconds[ours])]
    mine, theirs, least = (statistics.median(map(sum, seconds[loop])) for loop in loops)
    print(f"GRPO step of 12 samples, tiny FLUX, {device}, torch {torch.__version__}, medians of "
          f"{repetitions}\n  ours              {mine:6.3f} s  rollout {parts[0]:.3f}, images and "
          f"reward {parts[1]:.3f}, update {parts[2]:.3f}\n  one by one        {theirs:6.3f} s  "
          f"{theirs / mine:.2f} times ours\n  transformer alone {least:6.3f} s  ours is "
          f"{mine / least:.2f} times this")


if __name__ == "__main__":
    benchmark()
