"""Tests against what others wrote or a person can work out: torch.distributions, diffusers, a flow
with a known solution, numbers by hand. Each docstring names the mistakes that its test catches.

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
from grpo_flux import batch_text, clock, decode, flux_step, group_advantages, grpo_loss, rollout
from reward import BadInput

SDES, HERE = ("dance", "flow", "cps"), Path(__file__).resolve().parent
SHAPE = 4, 8, 8  # latents of a picture of the tiny FLUX
World = namedtuple("World", "cfg vae transformer encoded predict hps")


def settings(**changes):
    return grpo_flux.Config(**grpo_flux.TINY | dict(num_prompts=1, dtype="fp32") | changes)


def load_world(device, **changes):
    cfg, rewards = grpo_flux.prepare(settings(**changes), device)
    encoded = grpo_flux.encode_prompts(cfg, reward.TINY_PROMPTS, device)
    vae, transformer = grpo_flux.load_models(cfg, device)
    ids = grpo_flux.image_ids(*SHAPE[1:]).to(device)
    predict = partial(grpo_flux.velocity, transformer, ids=ids, guidance=3.5, bf16=False)
    return World(cfg, vae, transformer, encoded, predict, rewards["hps"][1])


@pytest.fixture(scope="session")
def tiny():
    world = load_world(torch.device("cpu"))
    torch.set_num_threads(1)  # two that wait for each other are very slow beside other work
    return world


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def sample(world, cfg, keys, prompt="a red circle"):
    """The trajectory of some (step, prompt, sample), and its text."""
    text, x = batch_text(world.encoded, [prompt] * len(keys), "cpu"), draw(keys, cfg)
    return rollout(world.predict, x, text, keys, cfg, cfg.eta), text


def draw(keys, cfg):
    return grpo_flux.draw_latents(keys, SHAPE, cfg)


def linear_policy(cfg):
    """A policy small enough to check, v = x W: W, the σ of its calls, a rollout, its update."""
    W, calls = (0.3 * torch.randn(3, 3)).requires_grad_(), []
    keys = [(0, i // 12, i % 12) for i in range(12 * cfg.num_prompts)]
    x, text = torch.randn(len(keys), 5, 3), [torch.zeros(len(keys), 1)]

    def predict(x, sigma, text):
        calls.append(sigma.flatten())
        return x @ W

    def update(optimizer, advantages):
        return grpo_flux.update(predict, optimizer, trajectory, text, advantages, keys, cfg)

    trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
    calls.clear()
    return W, calls, trajectory, update


# ---------------------------------------------------------------------------------------- flow SDE

def gaussian(sde, v, x, sigma, sigma_next, eta):
    """The step's distribution in float64, as the papers of Flow-GRPO and Flow-CPS write it."""
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
    """A wrong std, a lost constant, a sum for a mean, another sample's σ, 1 / (1 - σ) at 1."""
    v, x, noise = torch.randn(3, 4, 6, 5)
    levels = [(1.0, 0.9), (0.9, 0.7), (0.5, 0.2), (0.2, 0.05)]
    steps = torch.tensor(levels).T[..., None, None]  # (2, B, 1, 1)
    x_next, x0, logp = flux_step(v, x, *steps, 0.6, sde, noise)
    for i, (sigma, sigma_next) in enumerate(levels):
        normal = gaussian(sde, v[i], x[i], sigma, sigma_next, 0.6)
        one = flux_step(v[i:i + 1], x[i:i + 1], sigma, sigma_next, 0.6, sde, noise[i])
        for taken, image, density in (one, (x_next[i:i + 1], x0[i:i + 1], logp[i:i + 1])):
            assert torch.allclose(taken[0].double(), normal.mean + normal.stddev * noise[i])
            expected = normal.log_prob(taken[0].double()).mean().float()
            assert torch.allclose(density[0], expected, atol=2e-5)
            assert torch.allclose(image[0], x[i] - sigma * v[i])
    assert torch.equal(flux_step(v, x, *steps, 0.6, sde, x_next=x_next)[2], logp)  # the same bits
    assert flux_step(v, x, *steps, 0.0, sde)[2].isnan().all()  # an ODE step has no density


def end_of_flow(step, eta, T=200):
    """Mean and deviation of 40,000 samples that step takes along the flow to N(1.5, 0.5²)."""
    sigmas, x = grpo_flux.sigma_schedule(T, 1.0), torch.randn(8, 50, 100)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x1 = (x - (1 - sigma) * 1.5) / ((1 - sigma)**2 * 0.5**2 + sigma**2)
        v = sigma * x1 - (1.5 + (1 - sigma) * 0.5**2 * x1)  # E[x1 - x0 | x]
        x = step(v, x, sigma, sigma_next, eta if sigma_next else 0.0, noise=torch.randn_like(x))[0]
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sde", ["dance", "flow"])
def test_sde_keeps_the_distribution(sde, eta):
    """Noise with a score term of the wrong sign, size or std: images that blur as eta grows."""
    take = partial(flux_step, sde=sde)

    def wrong(v, x, sigma, sigma_next, eta, noise, factor):
        ode, mean = x + v * (sigma_next - sigma), take(v, x, sigma, sigma_next, eta, noise=0 * x)[0]
        x_next = take(v, x, sigma, sigma_next, eta, noise=noise)[0]
        return [x_next + (factor - 1) * (mean - ode)]

    # errors of 0.0025 from the number of samples, of 0.004 in std from 200 Euler steps
    assert end_of_flow(take, eta) == pytest.approx((1.5, 0.5), abs=0.01)
    for factor in (-1, 0, 2) if eta == 0.7 else ():  # score times this: the test can see it
        assert abs(end_of_flow(partial(wrong, factor=factor), eta)[1] - 0.5) > 0.03


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_cps_keeps_the_noise_level(eta):
    """Shares of image and noise that do not fit the next σ: exact where the image is known."""
    x, sigmas = torch.randn(4, 100, 100), grpo_flux.sigma_schedule(8, 3.0)
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1]):
        v = (x - 1.5) / sigma  # the flow to the image 1.5
        x = flux_step(v, x, sigma, sigma_next, eta, "cps", torch.randn_like(x))[0]
        assert x.mean().item() == pytest.approx(1.5 * (1 - sigma_next), abs=0.02)
        assert x.std().item() == pytest.approx(sigma_next, rel=0.02)


def test_ode_is_that_of_diffusers():
    """A shift applied twice, a grid with T - 1 gaps, an x0 that is not where the last step ends."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 16, 16))
    sigmas, x = grpo_flux.sigma_schedule(16, 3.0), torch.randn(2, 6, 5)
    assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas, atol=1e-7)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.sin(3 * x + i)
        ours, x0, _ = flux_step(v, x, sigmas[i], sigmas[i + 1], 0.0)
        x = scheduler.step(v, t, x).prev_sample
        assert torch.allclose(ours, x, atol=1e-6)
    assert torch.allclose(x0, x, atol=1e-6)


def test_packing_and_positions():
    """Rows for columns, or channels of a patch in another order: it looks like a worse model."""
    tokens = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert grpo_flux.pack_latents(torch.arange(16).view(1, 1, 4, 4))[0].tolist() == tokens
    z = torch.randn(2, 4, 6, 10)
    packed = grpo_flux.pack_latents(z)
    assert torch.equal(packed, FluxPipeline._pack_latents(z, 2, 4, 6, 10))
    assert torch.equal(FluxPipeline._unpack_latents(packed, 48, 80, 8), z)
    assert torch.equal(grpo_flux.unpack_latents(packed, 6, 10), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(grpo_flux.image_ids(6, 10), ids)


# -------------------------------------------------------------------------------------------- GRPO

def test_advantages():
    """A biased std, groups that mix, a flat group whose rounded mean is divided by eps."""
    ramp = torch.tensor([1.0, 2.0, 3.0, 4.0])  # std² = 5/3: 1.5 / 1.2909944 = 1.1618950
    advantages = group_advantages(torch.cat([ramp, torch.full((4,), 0.1), -3 * ramp]), 4)
    expected = torch.tensor([-1.1618950, -0.3872983, 0.3872983, 1.1618950])
    assert torch.allclose(advantages[:4], expected, atol=1e-6)
    assert torch.allclose(advantages[8:], -expected, atol=1e-6)
    assert not advantages[4:8].any() and not group_advantages(torch.full((12,), 0.1), 12).any()


def test_loss_by_hand():
    """min for max, or an advantage's sign lost: the clip frees what it should hold."""
    old, A = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    ratios = torch.tensor([1.2, 0.8, 1.2, 0.8, 1.3])
    for scale, cut in ((1, 1), (9, 5)):  # advantages of 9 are cut to 5
        logp = (old + ratios.log()).requires_grad_()
        loss, stats = grpo_loss(logp, old, scale * A, clip_range=0.1, adv_clip_max=5.0)
        loss.backward()
        # 1.2 or 1.3 with A > 0 and 0.8 with A < 0 are far enough; d ratio / d logp = ratio
        assert torch.allclose(logp.grad, cut * torch.tensor([0, -0.8, 1.2, 0, 0]) / 5, atol=1e-6)
        assert loss.item() == pytest.approx(cut * (-1.1 - 0.8 + 1.2 + 0.9 - 1.1) / 5, abs=1e-6)
    stats = {name: value.item() for name, value in stats.items()}
    assert stats == pytest.approx({"ratio": 1.06, "ratio_off": 0.3, "clipped": 0.6}, abs=1e-6)


# ----------------------------------------------------------------------------------------- rollout

def test_rollout_is_that_of_flux_pipeline(tiny):
    """A timestep 1000 times too large, text inputs that swap, the VAE's shift left out."""
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, transformer=tiny.transformer)
    pipe.set_progress_bar_config(disable=True)
    prompts, keys = ["a red circle", "a blue cross"], [(0, 0, 0), (0, 1, 0)]
    x, text = draw(keys, tiny.cfg), batch_text(tiny.encoded, prompts, "cpu")
    x0 = rollout(tiny.predict, x, text, keys, tiny.cfg, eta=0).x0
    call = partial(pipe, prompts, height=32, width=32, num_inference_steps=8, guidance_scale=3.5,
                   latents=x, max_sequence_length=8)
    assert torch.allclose(x0, call(output_type="latent").images, atol=1e-4)
    images, theirs = decode(tiny.vae, x0, SHAPE[1:], 1), call(output_type="pt").images
    assert torch.allclose(images, theirs, rtol=0, atol=0.5 / 255 + 1e-4)  # ours have 8 bits
    assert torch.equal((images * 255).round() / 255, images)


def test_images_do_not_depend_on_processes_or_batches(tiny):
    """Draws named by the order of calls or by rank: more GPUs would be another experiment."""
    cfg, results = settings(num_generations=4, micro_batch=4, gradient_accumulation_steps=4), []
    for world, cfg.num_prompts in ((1, 2), (2, 1)):
        plans = [grpo_flux.plan_prompts(reward.TINY_PROMPTS[:5], cfg, rank, world)[1]
                 for rank in range(world)]
        results.append({slot: sample(tiny, cfg, [(1, slot, i) for i in range(4)], prompt)[0].x0
                        for plan in plans for slot, prompt in plan})
    one, two = results
    assert one.keys() == two.keys() == {0, 1} and not torch.equal(one[0], one[1])
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    keys = [(1, 0, i) for i in range(12)]
    first, *others = [sample(tiny, settings(micro_batch=n), keys)[0] for n in (1, 4, 12)]
    for other in others:
        assert torch.equal(other.x[:, 0], first.x[:, 0])
        assert torch.allclose(other.x0, first.x0, atol=1e-4)
    assert (first.x[:, 0] == first.x[0, 0]).all() and len(first.x0.unique(dim=0)) == 12


# ------------------------------------------------------------------------------------------ reward

@pytest.mark.parametrize("height, width", [(720, 720), (512, 768), (100, 224), (224, 90)])
def test_preprocessing_of_hps(height, width):
    """A crop where HPS pads, no antialias, a resize by another library: scores drift unseen."""
    images, rows = torch.randint(256, (2, 3, height, width)) / 255, []
    for image in images:  # the official code's way
        size = [round(side * 224 / max(height, width)) for side in (height, width)]
        small = TF.resize(image, size, TF.InterpolationMode.BICUBIC, antialias=True)
        canvas, top, left = torch.zeros(3, 224, 224), (224 - size[0]) // 2, (224 - size[1]) // 2
        canvas[:, top:top + size[0], left:left + size[1]] = small
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        rows.append(TF.normalize(canvas, mean, std))
    assert torch.equal(reward.preprocess(images), torch.stack(rows))


def test_hps_is_the_cosine_of_open_clip(tiny):
    """Prompts of two groups mixed up, features that are not of length 1, a logit scale left in."""
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "a blue cross", "a red circle"]
    model = open_clip.create_model("tiny-clip").eval()
    model.load_state_dict(torch.load(tiny.cfg.hps)["state_dict"])
    with torch.no_grad():
        a = model.encode_image(reward.preprocess(images, 32))
        b = model.encode_text(open_clip.get_tokenizer("tiny-clip")(prompts))
    assert torch.allclose(tiny.hps(images, prompts), torch.cosine_similarity(a, b), atol=1e-5)


class Code:
    def __reduce__(self):  # what a checkpoint would do if it could
        return os.mkdir, ("made-by-a-checkpoint",)


def test_checkpoints_that_are_refused(tiny, tmp_path, monkeypatch):
    """Code run out of a download; half a file, a web page or weights that do not fit, in use."""
    monkeypatch.chdir(tmp_path)
    state = torch.load(tiny.cfg.hps)["state_dict"]
    torch.save({"state_dict": Code()}, "code.pt")
    torch.save(dict(list(state.items())[1:]), "missing.pt")
    torch.save(state | {"more": torch.zeros(1)}, "more.pt")
    torch.save([1], "list.pt")
    Path("page.pt").write_text("<!DOCTYPE html><title>404</title>")
    Path("half.pt").write_bytes(Path(tiny.cfg.hps).read_bytes()[:20_000])
    Path("half.safetensors").write_bytes(b"\xff" * 100)
    for name in [*os.listdir(), "none.pt"]:
        with pytest.raises(BadInput, match=name):
            reward.HPS(name, tiny.cfg.hps_arch)
    assert not Path("made-by-a-checkpoint").exists()


def test_reward_specs(tmp_path, monkeypatch):
    """A weight dropped without a word, a user's module not found, scores of a wrong shape."""
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
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.tensor([0.0, 1.0, math.nan])):
        with pytest.raises(BadInput, match="finite"):
            grpo_flux.score({"bad": (1.0, lambda *_: bad)}, torch.rand(3, 3, 4, 4), [""] * 3)


def test_reward_command_line(tiny, tmp_path, capsys):
    """Scores beside the wrong file; a traceback for a grey, transparent or broken picture."""
    red, blue = (Image.fromarray(reward.draw(prompt, np.random.default_rng(0)))
                 for prompt in ("a red circle", "a blue cross"))
    pictures = dict(red=red, blue=blue, grey=red.convert("L"), clear=red.convert("RGBA"))
    paths = [tmp_path / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values()):
        picture.save(path)
    flags = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu",
             "--prompt", "a red circle"]
    reward.main([*flags, *map(str, paths)])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    scores = {Path(path).stem: float(score) for score, path in lines}
    assert list(scores) == list(pictures) and scores["red"] > scores["blue"] + 0.2
    assert scores["clear"] == scores["red"] != scores["grey"]
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:60])
    check_refusal(shell("reward.py", *flags, "broken.png", cwd=tmp_path), "broken.png")


# ------------------------------------------------------------------------------------------ update

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_gradient_is_that_of_reinforce(sde, micro_batch):
    """A gradient through x_next, a step scored at another σ, a loss divided by the batch count."""
    cfg = settings(sde=sde, micro_batch=micro_batch, max_grad_norm=1e9, adv_clip_max=1.0)
    W, _, trajectory, update = linear_policy(cfg)
    A = torch.linspace(-1.4, 1.6, 12) * (torch.arange(12) % 3 > 0)  # zeros: batches with fillers
    start, loss = W.detach().double().requires_grad_(), 0
    sigmas, steps = grpo_flux.sigma_schedule(cfg.sampling_steps, cfg.shift), range(7)
    for t in steps:
        x, x_next = trajectory.x[:, t].double(), trajectory.x[:, t + 1].double()
        normal = gaussian(sde, x @ start, x, sigmas[t], sigmas[t + 1], cfg.eta)
        logp = normal.log_prob(x_next).mean((1, 2))
        loss = loss - (A.clamp(-1, 1) * logp).mean() / len(steps)
    loss.backward()
    stats = update(torch.optim.SGD([W], lr=1.0), A)  # W moves by its gradient
    assert torch.allclose(start - W, start.grad, rtol=1e-3, atol=1e-6)
    assert stats["grad_norm"] == pytest.approx(start.grad.norm().item(), rel=1e-3)
    assert stats["updates"] == 1 and stats["ratio_off"] == 0


@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_ratio_is_one(tiny, sde, micro_batch):
    """Rollout and update that compute other bits; a policy that differs a little, and goes on."""
    cfg = settings(sde=sde, micro_batch=micro_batch, sampling_steps=4, timestep_fraction=0.7)
    keys, A = [(3, 0, i) for i in range(12)], torch.linspace(-1, 1, 12)
    trajectory, text = sample(tiny, cfg, keys)
    optimizer = torch.optim.SGD(tiny.transformer.parameters(), lr=0)  # other tests use it too
    stats = grpo_flux.update(tiny.predict, optimizer, trajectory, text, A, keys, cfg)
    assert stats["ratio_off"] == 0 and stats["grad_norm"] > 0

    def rounded(x, sigma, text):
        return tiny.predict(x, sigma, text).bfloat16().float()

    for predict, signal, error in ((rounded, A, RuntimeError),
                                   (tiny.predict, A + math.nan, FloatingPointError)):
        with pytest.raises(error):
            grpo_flux.update(predict, optimizer, trajectory, text, signal, keys, cfg)
        optimizer.zero_grad()


def test_trained_steps():
    """The last, deterministic step trained; a step twice; all samples with the same steps."""
    W, calls, trajectory, update = linear_policy(settings(sampling_steps=16, timestep_fraction=0.6))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    chosen = [frozenset(steps) for steps in torch.stack(calls, 1).tolist()]
    random = set(trajectory.sigmas[:15].tolist())
    assert len(calls) == 9 and len(set(chosen)) > 6  # int(0.6 * 15)
    assert all(len(steps) == 9 and steps <= random for steps in chosen)


def test_flat_groups_cost_nothing():
    """Forwards for gradients of 0; weight decay and momentum that move on without a signal."""
    W, calls, _, update = linear_policy(settings(num_prompts=2, micro_batch=4))
    optimizer, start, flat = torch.optim.AdamW([W], lr=0.1), W.detach().clone(), torch.zeros(12)
    stats = update(optimizer, torch.cat([flat, flat]))
    assert not calls and not optimizer.state and torch.equal(W, start)
    assert stats["updates"] == 0 and all(map(math.isfinite, stats.values()))
    stats = update(optimizer, torch.cat([flat, torch.tensor([1.0, -1.0, 0.0] * 4)]))
    assert stats["updates"] == 1 and len(calls) == 2 * 7  # 8 samples by 4, 7 random steps


# ------------------------------------------------------------------------------------------- draws

def test_draws_have_names():
    """Numbers that follow the order of calls, or another generator: no run can be repeated."""
    golden = [-0.8458674550056458, -0.03669758886098862, 0.7569313049316406, -0.37433308362960815]
    assert grpo_flux.randn((2, 2), 0, 1, 2, 3, 4, 5).flatten().tolist() == golden
    assert grpo_flux.randperm(8, 0, 1, 2, 3, 4, 5).tolist() == [1, 6, 0, 3, 5, 2, 7, 4]
    names = [(seed, purpose, step) for seed in range(3) for purpose in range(3) for step in (0, 7)]
    assert len({grpo_flux.randn((1,), *name).item() for name in names}) == len(names)


@pytest.mark.parametrize("count, per_rank", [(24, 2), (5, 1), (3, 2)])
def test_prompts_go_round(count, per_rank):
    """Two processes with the same prompts, a prompt twice or never in a round, one fixed order."""
    prompts, cfg = [f"prompt {i}" for i in range(count)], settings(num_prompts=per_rank, steps=15)
    ranks = [grpo_flux.plan_prompts(prompts, cfg, rank, 2) for rank in range(2)]
    one = grpo_flux.plan_prompts(prompts, settings(num_prompts=2 * per_rank, steps=15), 0, 1)
    assert [sorted(a + b) for a, b in zip(*ranks)] == one
    seen = [prompt for step in one for _, prompt in step]
    rounds = [seen[i:i + count] for i in range(0, len(seen) - count + 1, count)]
    assert all(sorted(part) == sorted(prompts) for part in rounds) and rounds[0] != rounds[1]


# ---------------------------------------------------------------------------- run and command line

def shell(*argv, cwd):
    argv = [str(HERE / word) if (HERE / word).suffix == ".py" else word for word in argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def check_refusal(done, words):
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: ") and words in done.stderr


def results(out):
    """The lines of metrics.jsonl, and the exported model."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, FluxTransformer2DModel.from_pretrained(out / "export" / "transformer")


def test_run(tiny, tmp_path):
    """A run that ends in an error, writes outside of --out, or exports what it began with."""
    flags = "--device cpu --num_prompts 1 --steps 3 --eval_every 2 --eval_images 24 --out run"
    done = shell("grpo_flux.py", *flags.split(), "--reward", "hps:0.7,clip:0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out reward" in done.stdout and "24 images" in done.stdout
    names = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*.*")}
    model_files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert names == {"config.json", "metrics.jsonl", "reward.png", "before_after.png",
                     *(f"images/step_{step:05d}.png" for step in (0, 2, 3)),
                     *(f"export/transformer/{name}" for name in model_files)}
    lines, model = results(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["ratio"] == 1 and line["ratio_off"] == 0 and line["grad_norm"] > 0
        assert line["reward"] == pytest.approx(0.7 * line["hps"] + 0.3 * line["clip"], abs=1e-5)
        assert all(map(math.isfinite, line.values()))
    start, end = tiny.transformer.state_dict(), model.state_dict()
    moved = [(end[name] - start[name]).abs().max() for name in start]
    assert start.keys() == end.keys() and 1e-5 < max(moved) < 1e-2
    with pytest.raises(BadInput, match="holds a run already"):
        grpo_flux.main(["--out", str(tmp_path / "run")])


def test_two_processes_do_what_one_does(tiny, tmp_path):
    """Gradients summed and not averaged, prompts or draws by rank, weights that part."""
    flags = "--device cpu --steps 2 --sampling_steps 4 --eval_images 3 --out".split()
    grpo_flux.main([*flags, str(tmp_path / "one"), "--num_prompts", "2",
                    "--gradient_accumulation_steps", "24"])
    done = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                 "grpo_flux.py", *flags, "two", "--num_prompts", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (one, model), (two, sharded) = results(tmp_path / "one"), results(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    parts = [(a - b).abs().mean() for a, b in zip(model.parameters(), sharded.parameters())]
    assert max(parts) < 2e-5  # AdamW has moved each weight by about 2e-4


def test_reward_rises(tiny, tmp_path, monkeypatch):
    """An advantage or a loss of the wrong sign: everything runs, and the reward falls."""
    monkeypatch.chdir(tmp_path)
    Path("colour.py").write_text("def red(images, prompts):\n"
                                 "    return (images[:, 0] - images[:, 1]).mean((1, 2))\n")
    grpo_flux.main("--device cpu --reward colour:red --steps 12 --num_prompts 1 --eval_images 2 "
                   "--learning_rate 3e-4 --out run".split())
    rewards = [line["reward"] for line in results(Path("run"))[0]]
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.05


BAD = [
    ("--steps 0", "from 1"), ("--steps ten", "invalid int"), ("--seed -1", "from 0"),
    ("--eta 0", "from 1e-06"), ("--learning_rate nan", "from"), ("--num_generations 1", "from 2"),
    ("--height 40", "multiple of 16"), ("--width 8", "from 16"), ("--sde ddpm", "dance flow cps"),
    ("--gradient_accumulation_steps 9", "12"), ("--micro_batch 5", "multiple of"),
    ("--reward hsp", "hps, clip or"), ("--reward hps,hps", "once"), ("--hps none.pt", "file"),
    ("--prompts none.txt", "UTF-8"), ("--prompts empty.txt", "empty"), ("--device tpu", "cuda"),
    ("--model nowhere", "tiny"), ("--model .", "model_index.json"), ("--unknown 1", "unrecognized"),
    ("--step 3", "unrecognized"), ("--model a/b --prompts some.txt", "--hps"),
    ("--model a/b --hps some.txt", "--prompts")]


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
    check_refusal(shell("grpo_flux.py", *flags.split(), cwd=tmp_path), flags.split()[0])
    assert not list(tmp_path.iterdir())


def test_every_setting_is_explained_and_read(capsys):
    """A flag that nothing reads, or that --help and the limits do not know."""
    names, source = [field.name for field in fields(grpo_flux.Config)], inspect.getsource(grpo_flux)
    assert list(grpo_flux.COMMENTS) == names and set(grpo_flux.TINY) <= set(names)
    by_name = {"hps", "hps_arch", "clip", "clip_arch"}  # read with getattr
    assert [name for name in names if f"cfg.{name}" not in source and name not in by_name] == []
    with pytest.raises(SystemExit):
        grpo_flux.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{comment} (default {default}" in text
               for default, comment in grpo_flux.COMMENTS.values())
    sides = [(cfg.height, cfg.width) for cfg in map(grpo_flux.read_command_line, (
        [], ["--width", "64"], ["--model", "a/b"], ["--model", "a/b", "--width", "64"]))]
    assert sides == [(32, 32), (32, 64), (720, 720), (720, 64)]  # a flag, then TINY, then Config


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    """Half a tiny model that every later run would take for a whole one."""
    def build_tiny(folder):
        folder.mkdir()
        (folder / "half").touch()
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo_flux, "build_tiny", build_tiny)
    with pytest.raises(KeyboardInterrupt):
        grpo_flux.tiny_models(str(tmp_path))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- benchmark

def ours(world, optimizer, cfg, device):
    """A GRPO step as main does it; seconds of rollout, images and reward, update."""
    keys, names = [(0, 0, i) for i in range(12)], ["a red circle"] * 12
    times = [clock(device)]
    text, x = batch_text(world.encoded, names, device), draw(keys, cfg).to(device)
    trajectory = rollout(world.predict, x, text, keys, cfg, cfg.eta)
    times.append(clock(device))
    rewards = world.hps(decode(world.vae, trajectory.x0, SHAPE[1:], cfg.micro_batch), names).cpu()
    times.append(clock(device))
    A = group_advantages(rewards, 12)
    grpo_flux.update(world.predict, optimizer, trajectory, text, A, keys, cfg)
    times.append(clock(device))
    return [end - begin for begin, end in zip(times, times[1:])]


def one_by_one(world, optimizer, cfg, device):
    """The same in the manner of DanceGRPO's code: one sample at a time, written to a file and
    scored, then one transition at a time, with a host read after each."""
    begin, T, name, samples, rewards = clock(device), cfg.sampling_steps, ["a red circle"], [], []
    sigmas, text = grpo_flux.sigma_schedule(T, cfg.shift), batch_text(world.encoded, name, device)
    K, first = int(cfg.timestep_fraction * (T - 1)), draw([(0, 0, 0)], cfg).to(device)
    level = torch.ones(1, 1, 1, device=device)
    for _ in range(12):
        states, logps = [first], []
        for t in range(T):
            world.transformer.eval()  # at every call, as there
            with torch.no_grad():
                v, eta = world.predict(states[t], sigmas[t] * level, text), cfg.eta * (t < T - 1)
                x, x0, logp = flux_step(v, states[t], *sigmas[t:t + 2], eta,
                                        noise=torch.randn_like(v))
            states.append(x)
            logps.append(logp)
        samples.append((states, logps))
        image = decode(world.vae, x0, SHAPE[1:], 1)
        pixels = (image[0].permute(1, 2, 0) * 255).byte().cpu().numpy()
        with tempfile.TemporaryFile() as file:
            Image.fromarray(pixels).save(file, "png")
        rewards.append(world.hps(image, name).item())
    advantages = group_advantages(torch.tensor(rewards), 12).to(device)
    for i, (states, logps) in enumerate(samples):
        for t in torch.randperm(T - 1)[:K].tolist():
            world.transformer.train()
            v = world.predict(states[t], sigmas[t] * level, text)
            logp = flux_step(v, states[t], *sigmas[t:t + 2], cfg.eta, x_next=states[t + 1])[2]
            loss, _ = grpo_loss(logp, logps[t], advantages[i:i + 1], 1e-4, 5.0)
            (loss / (4 * K)).backward()
            loss.item()
        if i % 4 == 3:
            torch.nn.utils.clip_grad_norm_(world.transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [clock(device) - begin]


def transformer_alone(world, optimizer, cfg, device):
    """The transformer calls of one step of ours, and nothing else."""
    n, calls = cfg.micro_batch, 12 // cfg.micro_batch
    K, x = int(cfg.timestep_fraction * (cfg.sampling_steps - 1)), torch.randn(n, 16, 16).to(device)
    text, inputs = batch_text(world.encoded, ["a red circle"] * n, device), world.predict.keywords
    ids, ones = inputs["ids"], x.new_ones(n)  # for σ and guidance
    call = partial(world.transformer, x, *text, ones, ids, 0 * ids[:8], ones)
    optimizer.zero_grad()
    begin = clock(device)
    with torch.no_grad():
        for _ in range(calls * (cfg.sampling_steps - 1) + 1):  # the first v is shared
            call()
    for _ in range(calls * K):
        call().sample.backward(x)
    return [clock(device) - begin]


def benchmark(repetitions=7):
    device, loops = reward.select_device(), (ours, one_by_one, transformer_alone)
    world = load_world(device, sampling_steps=16, timestep_fraction=0.6, micro_batch=4,
                       gradient_accumulation_steps=4, eta=0.3)
    fused = True if device.type == "cpu" else None  # as in main
    optimizer = torch.optim.AdamW(world.transformer.parameters(), lr=1e-8, fused=fused)
    runs = [[loop(world, optimizer, world.cfg, device) for loop in loops]
            for _ in range(repetitions + 1)][1:]  # the first warms up
    totals, median = [list(map(sum, run)) for run in runs], statistics.median
    mine, theirs, least = map(median, zip(*totals))
    parts = [median(column) for column in zip(*(run[0] for run in runs))]
    gain, cost = median(b / a for a, b, _ in totals), median(a / c for a, _, c in totals)
    print(f"A GRPO step of 12 samples of the tiny FLUX on {device}, torch {torch.__version__}, "
          f"medians of {repetitions}\n"
          f"ours               {mine:7.3f} s   rollout {parts[0]:.3f}, images and reward "
          f"{parts[1]:.3f}, update {parts[2]:.3f}\n"
          f"one by one         {theirs:7.3f} s   {gain:.2f} times ours\n"
          f"transformer alone  {least:7.3f} s   ours is {cost:.2f} times this")


if __name__ == "__main__":
    benchmark()
