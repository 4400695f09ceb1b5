"""Tests against what others wrote or a person can work out: torch.distributions, diffusers, a flow
with a known solution, numbers by hand. Each docstring names the mistakes that its test catches.

    python -m pytest -q test_grpo_flux.py   # on the CPU; the first run builds the tiny models
    python test_grpo_flux.py                # the benchmark, on the best device there is
    python test_grpo_flux.py --size flux-dev  # what FLUX.1-dev costs, counted on any machine
"""

import ctypes
import gc
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import fields, replace
from functools import partial
from io import StringIO
from pathlib import Path

import diffusers
import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

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
    vae, transformer = grpo_flux.load_vae(cfg, device), grpo_flux.load_transformer(cfg, device)
    ids = grpo_flux.image_ids(*SHAPE[1:]).to(device)
    predict = partial(grpo_flux.velocity, transformer, ids=ids, guidance=3.5, bf16=False)
    return World(cfg, vae, transformer, encoded, predict, rewards["hps"][1])


JOBS, STARTED = [], {}  # functions of a folder; {name: the folder, what becomes of it}


def job(function):
    """A fixture with the function's result. It works in processes of its own, beside the tests:
    all that are needed are started, two at a time, as soon as there are tiny models."""
    JOBS.append(function)

    @pytest.fixture(scope="session", name=function.__name__)
    def result(tiny):
        return STARTED[function.__name__].result()

    return result


@pytest.fixture(scope="session")
def tiny(request, tmp_path_factory):
    world = load_world(torch.device("cpu"))
    torch.set_num_threads(1)  # two that wait for each other are very slow beside other work
    needed = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        for function in JOBS:
            if (name := function.__name__) in needed:
                STARTED[name] = pool.submit(function, tmp_path_factory.mktemp(name))
        yield world
        pool.shutdown(cancel_futures=True)


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


def test_reward_command_line(tiny, tmp_path, capsys):
    """Scores beside the wrong file; a traceback for a grey, transparent or broken picture."""
    red, blue = (Image.fromarray(reward.draw(prompt, np.random.default_rng(0)))
                 for prompt in ("a red circle", "a blue cross"))
    pictures = dict(red=red, blue=blue, grey=red.convert("L"), wide=red.resize((64, 32)),
                    clear=red.convert("RGBA"))
    paths = [tmp_path / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values()):
        picture.save(path)
    flags = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu"]
    reward.main([*flags, "--prompt", "a red circle", "--batch", "2", *map(str, paths)])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    scores = {Path(path).stem: float(score) for score, path in lines}
    assert list(scores) == list(pictures) and scores["red"] > scores["blue"] + 0.2
    assert scores["clear"] == scores["red"] != scores["grey"]
    (tmp_path / "0001.png").write_bytes(paths[0].read_bytes())
    with pytest.raises(SystemExit):
        reward.main([*flags, str(tmp_path / "0001.png")])
    assert "--prompt (not given)" in capsys.readouterr().err


def test_scores_of_two_devices(tiny, tmp_path, capsys):
    """Scores compared with those of another picture or prompt; an error that is not relative."""
    folder, rng, saved = tmp_path / "pictures", np.random.default_rng(0), tmp_path / "scores.jsonl"
    folder.mkdir()
    for i, prompt in enumerate(reward.TINY_PROMPTS[:5]):
        picture = Image.fromarray(reward.draw(prompt, rng, size=32 + 16 * (i == 2)))
        picture.save(folder / f"{i:04d}_{prompt.replace(' ', '_')}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(reward.TINY_PROMPTS[:5]))
    flags = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu", str(folder)]
    reward.main([*flags, "--save", str(saved)])
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    for line, prompt in zip(lines, reward.TINY_PROMPTS[:5], strict=True):
        alone = tiny.hps(reward.read_image(folder / line["image"]), [prompt]).item()
        assert line["prompt"] == prompt and line["score"] == pytest.approx(alone, abs=1e-6)
    capsys.readouterr()
    for factor, status in ((1.000146, 0), (1.000152, 3)):
        scaled = [json.dumps(line | dict(score=line["score"] * factor)) for line in reversed(lines)]
        saved.write_text("\n".join(scaled))
        with pytest.raises(SystemExit) as end:
            reward.main([*flags, "--against", str(saved),
                         "--prompts", str(tmp_path / "prompts.txt")])
        assert end.value.code == status
        assert capsys.readouterr().out.endswith(f"reward {'OFF' if status else 'OK'}\n")
    with pytest.raises(SystemExit):
        reward.main([*flags, "--against", str(saved), "--prompt", "a red circle"])
    assert "--against" in capsys.readouterr().err


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

    with pytest.raises(FloatingPointError, match="first ratio"):
        grpo_flux.update(rounded, optimizer, trajectory, text, A, keys, cfg)
    optimizer.zero_grad()


def test_a_gradient_that_is_not_finite_moves_nothing():
    """One nan in a score, and every weight is nan from then on."""
    W, _, _, update = linear_policy(settings(micro_batch=4, gradient_accumulation_steps=4))
    optimizer, start = torch.optim.AdamW([W], lr=0.1), W.detach().clone()
    stats = update(optimizer, torch.tensor([math.nan] + [1.0] * 3 + [0.0] * 8))
    assert stats["skipped"] == 1 and stats["updates"] == 0 and torch.equal(W, start)
    stats = update(optimizer, torch.tensor([0.0] * 8 + [-1.0, 1.0] * 2))
    assert stats["skipped"] == 0 and stats["updates"] == 1 and not torch.equal(W, start)
    assert all(map(math.isfinite, stats.values())) and W.isfinite().all()


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


@pytest.mark.parametrize("sde", SDES)
def test_kl_divergence(sde):
    """One that forgets the std, is a sum, or has no gradient."""
    cfg = settings(sde=sde, eta=0.6)
    v, reference, x = torch.randn(3, 4, 6, 5)
    kl = grpo_flux.gaussian_kl(v.requires_grad_(), reference, x, 0.7, 0.5, cfg)
    normals = [gaussian(sde, w, x, 0.7, 0.5, 0.6) for w in (v.detach(), reference)]
    expected = torch.distributions.kl_divergence(*normals).mean().item()
    assert kl.item() == pytest.approx(expected, rel=1e-3)
    kl.backward()
    assert v.grad.abs().min() > 0
    same = reference.clone().requires_grad_()
    grpo_flux.gaussian_kl(same, reference, x, 0.7, 0.5, cfg).backward()
    assert same.grad.abs().max() < 1e-6


def test_window(tiny):
    """Noise or training outside of the window; a window that never moves, or leaves its place."""
    cfg = settings(sampling_steps=6, sde_window=3, window_shift_every=2, timestep_fraction=0.7)
    starts = [grpo_flux.random_steps(step, cfg).start for step in range(7)]
    assert starts == [0, 0, 1, 1, 2, 2, 0]
    drawn = settings(sampling_steps=6, sde_window=3)
    assert {grpo_flux.random_steps(step, drawn).start for step in range(30)} == {0, 1, 2}
    trajectory, text = sample(tiny, cfg, [(3, 0, i) for i in range(12)])
    sigmas, x = trajectory.sigmas, trajectory.x
    for t in range(5):
        with torch.no_grad():
            v = tiny.predict(x[:, t], sigmas[t].expand(12, 1, 1), text)
        off = (x[:, t + 1] - x[:, t] - v * (sigmas[t + 1] - sigmas[t])).abs().max()
        assert off > 0.1 if t in (1, 2, 3) else off < 1e-5
        assert trajectory.logp[:, t].isnan().all() == (t not in (1, 2, 3))
    W, calls, _, update = linear_policy(cfg)
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    assert len(calls) == 2 and set(torch.cat(calls).tolist()) == set(sigmas[:3].tolist())


def test_moving_average():
    """A decay that is taken the other way round; weights that the average replaces for good."""
    layer = torch.nn.Linear(2, 3)
    average = {name: p.detach().clone() for name, p in layer.named_parameters()}
    parameters, weight = dict(layer.named_parameters()), layer.weight
    policy = grpo_flux.Policy(layer, parameters, None, None, None, average)
    values = [weight.detach().clone() + i for i in range(4)]
    for value in values[1:]:
        weight.data = value.clone()
        grpo_flux.follow(policy, 0.9)
    mean = 0.9**3 * values[0] + 0.1 * (0.9**2 * values[1] + 0.9 * values[2] + values[3])
    with grpo_flux.averaged(policy):
        assert torch.allclose(weight, mean)
    assert torch.equal(weight, values[3]) and torch.allclose(average["weight"], mean)


# What DanceGRPO's own functions (15cc71d, fp32, told sigma and not int(1000 sigma)) computed in two
# GRPO steps of 6 images and 3 optimizer steps each, for the policy v = x w + 0.3 sin(3 sigma + i).
DANCEGRPO = {name: np.array(figures.split(), dtype=np.float32) for name, figures in dict(
    reward="""
        0.42739126 0.48668209 0.44580472 0.48225969 0.4566488 0.48617125 0.30387068
        0.25368619 0.28586107 0.23054038 0.29102647 0.3009879""",
    advantages="""
        -1.4851539 0.90973026 -0.74139488 0.73110014 -0.30337906 0.88909626 0.89661705
        -0.82023555 0.28049374 -1.6120727 0.45720625 0.79799485""",
    first_logp="""
        0.98884469 1.426424 1.1537061 1.1425065 1.2966925 1.4525263 1.1608117 1.2877618
        1.0129161 1.2460586 1.2468963 1.3811078""",
    loss="""
        0.2877118 0.0052646995 -0.29223198 -0.038190767 0.66618311 -0.6271258""",
    grad_norm="""
        0.082764395 0.026293114 0.023101633 0.045325775 0.06406194 0.05158158""",
    x0_sum="""
        6.0705961 8.723246 7.2648838 8.4566955 8.7853545 10.209719 -0.19436888
        -2.4998316 -0.98139713 -2.8375956 -1.1712507 0.31419774""",
    weights="""
        -0.4899995 -0.3899996 -0.3099997 -0.20999977 -0.089999899 -0.0099999849
        0.089999907 0.2099998 0.30999967 0.38999957 0.4899995 0.58999944 0.68999928
        0.78999919 0.88999909 1.0099989 -0.48609054 -0.38429335 -0.31248835 -0.20947316
        -0.080263659 -0.016041527 0.083991215 0.21967971 0.31280178 0.39219147
        0.48072407 0.58243632 0.68384856 0.78513813 0.88276201 1.0148077 -0.48623443
        -0.37999907 -0.31775212 -0.20691103 -0.072960891 -0.021456381 0.080779575
        0.22727911 0.30932373 0.39281425 0.47562027 0.57598752 0.68160784 0.78114706
        0.878645 1.0115527 -0.48639166 -0.37782729 -0.32137311 -0.20172453 -0.067361794
        -0.028165678 0.078478567 0.23081118 0.31001225 0.39428034 0.47037879 0.57556021
        0.68051624 0.78079736 0.87967271 1.0169595 -0.49032843 -0.37765282 -0.32454714
        -0.19537738 -0.070252925 -0.030704228 0.07562992 0.22964996 0.31503466
        0.39676389 0.46956116 0.57817787 0.67853045 0.78014898 0.88108957 1.0199155
        -0.49244046 -0.37983811 -0.32492036 -0.19225812 -0.070821829 -0.027744763
        0.073171489 0.22818655 0.31878331 0.40134692 0.47272703 0.57949859 0.67853296
        0.77879047 0.87912416 1.0243599""").items()}


def test_dancegrpo_gives_the_same_figures(monkeypatch):
    """A sampler, log-probability, advantage, order of training or loss that is not DanceGRPO's."""
    cfg = grpo_flux.Config(num_generations=6, sampling_steps=6, gradient_accumulation_steps=2,
                           micro_batch=1, timestep_fraction=0.6)
    w, seen = torch.linspace(-0.5, 1.0, 16).requires_grad_(), defaultdict(list)
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=1e-4)

    def predict(x, sigma, text):
        return x * w + 0.3 * torch.sin(3 * sigma + torch.arange(16))

    def descend(*args, descend=grpo_flux.descend, **named):
        result = descend(*args, **named)
        for name, value in dict(loss=result[0], grad_norm=result[-2], weights=w.tolist()).items():
            seen[name] += value if name == "weights" else [value]
        return result

    monkeypatch.setattr(grpo_flux, "descend", descend)
    for step, rewards in enumerate(torch.tensor(DANCEGRPO["reward"]).view(2, 6)):
        keys, text = [(step, 0, i) for i in range(6)], [torch.zeros(6, 1)]
        x = grpo_flux.draw_latents(keys, (4, 2, 4), cfg)
        trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
        advantages = group_advantages(rewards, 6)
        grpo_flux.update(predict, optimizer, trajectory, text, advantages, keys, cfg)
        for name, value in dict(advantages=advantages, first_logp=trajectory.logp[:, 0],
                                x0_sum=trajectory.x0.sum((1, 2))).items():
            seen[name] += value.tolist()
    for name, values in seen.items():
        assert values == pytest.approx(DANCEGRPO[name], rel=2e-6, abs=1e-6), name


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

def shell(*argv, cwd, **environment):
    argv = [str(HERE / word) if (HERE / word).suffix == ".py" else word for word in argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def torchrun(ranks):
    arguments = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return ["-m", *arguments] if ranks > 1 else []


def check_refusal(done, words):
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: ") and words in done.stderr


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    """The lines of metrics.jsonl, and the exported model."""
    return read_metrics(out), FluxTransformer2DModel.from_pretrained(out / "export" / "transformer")


@job
def short_run(folder):
    flags = "--device cpu --num_prompts 1 --steps 3 --eval_every 2 --eval_images 24 --out run"
    done = shell("grpo_flux.py", *flags.split(), "--reward", "hps:0.7,clip:0.3", cwd=folder)
    return folder / "run", succeed(done)


def test_run(tiny, short_run):
    """A run that ends in an error, writes outside of --out, or exports what it began with."""
    run, out = short_run
    assert "held-out reward" in out and "24 images" in out and "7 of 8 steps trained" in out
    names = {str(path.relative_to(run)) for path in run.parent.rglob("*.*")
             if "tensorboard" not in path.parts}
    model_files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert names == {"config.json", "metrics.jsonl", "reward.png", "before_after.png",
                     "checkpoints/step_00003/shard-00001-model-00001-of-00001.safetensors",
                     *(f"images/step_{step:05d}.png" for step in (0, 2, 3)),
                     *(f"export/transformer/{name}" for name in model_files)}
    lines, model = results(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["ratio"] == 1 and line["ratio_off"] == 0 and line["grad_norm"] > 0
        assert line["reward"] == pytest.approx(0.7 * line["hps"] + 0.3 * line["clip"], abs=1e-5)
        assert all(map(math.isfinite, line.values()))
    start, end = tiny.transformer.state_dict(), model.state_dict()
    moved = [(end[name] - start[name]).abs().max() for name in start]
    assert start.keys() == end.keys() and 1e-5 < max(moved) < 1e-2
    with pytest.raises(BadInput, match="holds a run already"):
        grpo_flux.main(["--out", str(run), "--resume", "none"])


SHORT = "--steps 2 --num_prompts 1 --sampling_steps 4 --eval_images 3 --device cpu".split()
THREE = "--steps 3 --sampling_steps 3 --eval_images 3 --device cpu".split()


@job
def two_ranks(folder):
    """The folder of a run of two processes with its record A, and what a replay of it printed; a
    run from its checkpoint."""
    start = [*torchrun(2), "grpo_flux.py"]
    succeed(shell(*start, *THREE, "--num_prompts", "1", "--out", "run", "--save_every", "2",
                  "--record", "A", "--deterministic", cwd=folder))
    replay = shell(*start, "--device", "cpu", "--deterministic", "--replay", "A", cwd=folder)
    succeed(shell(*start, *THREE, "--num_prompts", "1", "--out", "again",
                  "--resume", "run/checkpoints/step_00002", cwd=folder))
    return folder, succeed(replay)


def test_processes_and_batches_do_not_matter(two_ranks, tmp_path):
    """Gradients summed and not averaged, prompts or draws by rank, weights that part."""
    def run(micro_batch):
        grpo_flux.main([*THREE, "--num_prompts", "2", "--gradient_accumulation_steps", "24",
                        "--micro_batch", micro_batch, "--out", str(tmp_path / micro_batch)])
        return tmp_path / micro_batch

    def read(folder):
        lines, model = results(folder)
        return lines, torch.cat([p.detach().flatten() for p in model.parameters()])

    expected, weights = read(two_ranks[0] / "run")
    for lines, others in (read(run(micro_batch)) for micro_batch in ("12", "4", "1")):
        for a, b in zip(expected, lines, strict=True):
            assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        # moved by 4e-3 of it; a pixel that rounds the other way, and its reward, by 2e-6
        assert (others - weights).norm() < 1e-5 * weights.norm()


def test_reward_rises(tiny, tmp_path, monkeypatch):
    """An advantage or a loss of the wrong sign: everything runs, and the reward falls."""
    monkeypatch.chdir(tmp_path)
    Path("colour.py").write_text("def red(images, prompts):\n"
                                 "    return (images[:, 0] - images[:, 1]).mean((1, 2))\n")
    grpo_flux.main("--device cpu --reward colour:red --steps 12 --num_prompts 1 --eval_images 2 "
                   "--learning_rate 3e-4 --out run".split())
    rewards = [line["reward"] for line in results(Path("run"))[0]]
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.05


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


# ---------------------------------------------------------------------------------- what goes wrong

with warnings.catch_warnings():  # pytest wants a file of its own for the names of marks
    warnings.simplefilter("ignore")
    faults = pytest.mark.faults


@pytest.fixture
def heavy(request):
    """For what takes minutes: only when it is asked for."""
    if "faults" not in request.config.option.markexpr:
        pytest.skip("python -m pytest -m faults test_grpo_flux.py runs this, too")


class Code:
    def __reduce__(self):  # what a checkpoint would do if it could
        return os.mkdir, ("made-by-a-file",)


JUDGES = """import torch
number = 3
calls = []
def fine(images, prompts): return images.mean((1, 2, 3))
def shape(images, prompts): return images.mean((2, 3))
def text(images, prompts): return ["good"] * len(images)
def nothing(images, prompts): return None
def nan(images, prompts): return torch.tensor([0.0, float("nan")] * (len(images) // 2))
def meta(images, prompts): return torch.zeros(len(images), device="meta")
def raises(images, prompts): return {}["key"]
def later(images, prompts):
    calls.append(1)
    return fine(images, prompts) / (len(calls) < 4)
"""


@pytest.fixture(scope="session")
def mess(tiny, tmp_path_factory):
    """A folder full of files with something wrong, and some that are only unusual."""
    folder = tmp_path_factory.mktemp("mess")
    state, flux = torch.load(tiny.cfg.hps)["state_dict"], Path(tiny.cfg.model)
    first, *rest = state.items()
    wider = {name: torch.zeros(2 * x.numel()) for name, x in state.items()}
    more = dict([*rest, first, ("x", first[1])])
    for name, content in dict(code=Code(), missing=dict(rest), more=more, list=[1],
                              wider=wider).items():
        torch.save({"state_dict": content}, folder / f"{name}.pt")
    half = Path(tiny.cfg.hps).read_bytes()[:20_000]
    prompt = "a red circle\na blue cross\n"
    for name, content in {
            "half.pt": half, "half.safetensors": b"\xff" * 100, "page.pt": b"<!DOCTYPE html>404",
            "empty.txt": b"\n \n", "binary.txt": half, "utf16.txt": prompt.encode("utf-16"),
            "utf16le.txt": prompt.encode("utf-16-le"), "one.txt": b"a red circle",
            "crlf.txt": prompt.replace("\n", "\r\n").encode(), "page.png": b"<html>",
            "bom.txt": prompt.encode("utf-8-sig"),
            "bad.json": b"{", "judges.py": JUDGES.encode(), "syntax.py": b"def", "nan.jsonl": b"{}",
            "exits.py": b"raise OSError('no licence')"}.items():
        (folder / name).write_bytes(content)

    def broken(name, change):  # a FLUX.1 folder
        shutil.copytree(flux, folder / name)
        change(folder / name)

    def cut(path, to=-10):
        path.write_bytes(path.read_bytes()[:to])

    def rename_class(model):
        text = (model / "model_index.json").read_text()
        (model / "model_index.json").write_text(text.replace("FluxPipeline", "OtherPipeline"))

    def lose_shard(model):
        index = {"weight_map": {"x": "diffusion_pytorch_model-00002-of-00003.safetensors"}}
        index_file = "transformer/diffusion_pytorch_model.safetensors.index.json"
        (model / index_file).write_text(json.dumps(index))

    weights = "diffusion_pytorch_model.safetensors"
    broken("other_model", rename_class)
    broken("no_vae", lambda model: shutil.rmtree(model / "vae"))
    broken("no_tokenizer", lambda model: shutil.rmtree(model / "tokenizer_2"))
    broken("cut_shard", lambda model: cut(model / "transformer" / weights))
    broken("no_shard", lose_shard)
    broken("cut_config", lambda model: cut(model / "vae" / "config.json"))
    broken("pickled", lambda model: torch.save({}, (model / "vae" / weights).rename(
        model / "vae" / "diffusion_pytorch_model.bin")))

    def run(name, step="step_00004", **facts):
        last = folder / name / "checkpoints" / step
        last.mkdir(parents=True)
        save_file({"weights.x": torch.zeros(4)}, last / "shard.safetensors")
        facts = grpo_flux.asdict(settings()) | dict(model="tiny", machine="", versions={}) | facts
        (folder / name / "config.json").write_text(json.dumps(facts))
        (folder / name / "metrics.jsonl").touch()
        return last

    run("run")
    run("run", step="step_00003")
    run("lora_run", lora_rank=4)
    run("seed_run", seed=7)
    run("new_run", sde_of_2030=1)
    run("other_run", model="FLUX.1-dev")
    cut(run("cut_run") / "shard.safetensors")
    (run("lost_run").parent.parent / "config.json").unlink()
    (folder / "record").mkdir()
    (folder / "record" / "config.json").write_text("{}")
    (folder / "record" / "step_00001_rank_0.safetensors").touch()
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    red = Image.fromarray(reward.draw("a red circle", rng))
    deep = Image.fromarray(np.asarray(red.convert("L")).astype("uint16") * 257)
    for name, picture in dict(dot=red.resize((1, 1)), grey=red.convert("L"), deep=deep,
                              alpha=red.convert("RGBA")).items():
        picture.save(folder / "pictures" / f"{name}.png")
    cut(Path(shutil.copy(folder / "pictures" / "grey.png", folder / "cut.png")), 60)
    (folder / "no_pictures").mkdir()
    return folder


# (flags, words of the message): refused before a process group, a device or a model is touched
EARLY = [
    *((f"--{name} {value}", words) for words, cases in {
        "from 1 to": "steps=0 steps=-3 steps=99999999999 num_prompts=-2 micro_batch=0 save_every=0 "
                     "keep_last=0 eval_every=0 eval_images=0 text_length=513 text_length=0",
        "from 2 to": "num_generations=1 sampling_steps=1 sampling_steps=1001",
        "from 0 to": "seed=-1 seed=4294967296 lora_rank=-1 lora_rank=4096 kl_beta=-1 kl_beta=nan "
                     "ema_decay=1 guidance=nan weight_decay=-1 sde_window=-1 window_shift_every=-1",
        "invalid int": "steps=ten steps=1e3 seed=0.5", "invalid float": "eta=much",
        "must be from": "eta=0 eta=nan eta=inf eta=1e9 learning_rate=nan learning_rate=0 "
                        "learning_rate=2 shift=0 clip_range=0 clip_range=-1 adv_clip_max=inf "
                        "max_grad_norm=0 lora_alpha=0 timestep_fraction=0 timestep_fraction=1.5 "
                        "width=8 height=99999",
        "multiple of 16": "height=40 width=721", "must be below": "sde_window=8",
        "divide the step's": "gradient_accumulation_steps=9 micro_batch=5 num_generations=11",
        "must be one of": "sde=ddpm dtype=fp16 device=tpu", "attention": "attention=nonsense",
        "hps, clip or": "reward=hsp reward=hps,hps reward=hps:0 reward=,",
        "function": "reward=hps:nan reward=judges:none reward=nothing_here:f reward=syntax:f "
                    "reward=judges:number reward=exits:f",
        "file with its weights": "hps=none.pt hps=pictures",
        "text file in UTF-8": "prompts=none.txt prompts=binary.txt prompts=utf16.txt "
                              "prompts=utf16le.txt prompts=pictures",
        "is empty": "prompts=empty.txt",
        "model_index.json": "model=nowhere model=. model=other_model model=one.txt "
                            "model=\x1b[31mred",
        "config.json and whole": "model=no_vae model=cut_shard model=no_shard model=cut_config "
                                 "model=pickled",
        "folder tokenizer_2": "model=no_tokenizer", "new folder": "record=record",
        "can be written to": "cache=one.txt record=one.txt/x",
        "folder of --record": "replay=. replay=none",
        "whole folder such as": "resume=nowhere resume=run resume=cut_run/checkpoints/step_00004 "
                                "resume=lost_run/checkpoints/step_00004 out=cut_run",
        "this version": "out=new_run", "must be 4": "out=lora_run", "must be 7": "out=seed_run",
        "must be FLUX.1-dev": "out=other_run",
    }.items() for name, value in (case.split("=") for case in cases.split())),
    ("--steps", "expected one argument"), ("--unknown 1", "unrecognized"),
    ("--step 3", "unrecognized"), ("3", "unrecognized"),
    ("--resume none --out run", "a run already"),
    ("--resume run/checkpoints/step_00003 --out run", "has gone on to"),
    ("--out run --steps 2", "at least 4"), ("--out run --ema_decay 0.9", "holds no average"),
    ("--record a --replay record", "one of them"), ("--reward clip --clip none.pt", "its weights"),
    ("--model a/b --prompts one.txt", "--hps (not given)"),
    ("--model a/b --hps page.pt", "--prompts (not given)"),
    ("--compare record .", "two runs"), ("--compare record", "2 arguments")]

# refused by what must be opened, or called, to know; without --hps the tiny one
LATE = [
    ("--device npu", "CANN"), ("--device cuda", "NVIDIA driver"), ("--hps page.pt", "broken on"),
    ("--hps half.pt", "broken on"), ("--hps half.safetensors", "broken on"),
    ("--hps code.pt", "broken on"), ("--hps missing.pt --hps_arch {arch}", "Missing key"),
    ("--hps more.pt --hps_arch {arch}", "Unexpected key"),
    ("--hps list.pt --hps_arch {arch}", "not the weights"),
    ("--hps wider.pt --hps_arch {arch}", "size mismatch"),
    ("--hps_arch ViT-Z-1 --hps page.pt", "open_clip knows"),
    ("--hps_arch bad.json --hps page.pt", "description"),
    ("--hps_arch none.json --hps page.pt", "description"), ("--out one.txt", "written to"),
    ("--out one.txt/x", "written to"), ("--out /proc/x", "written to"),
    ("--out busy", "at work in"),
    ("--out run", "must hold this policy"), ("--replay record", "of 1 processes"),
    ("--model a/b --prompts one.txt --hps {hps} --hps_arch {arch}", "hf auth login"),
    *((f"--reward judges:{name}", f"an evaluation{words}") for name, words in dict(
        text=", prompts 'a red circle'", nothing=", prompts", meta=", prompts", raises=", prompts",
        shape=", prompts", nan=" for the prompt 'a red square'").items()),
    ("--reward judges:later", "step 3 for the prompt 'a")]

# the same of reward.py
SCORING = [
    ("pictures/dot.png --device npu", "CANN"), ("pictures/dot.png --device tpu", "auto or cuda"),
    ("cut.png", "cut.png: must be a picture"), ("page.png", "must be a picture"),
    ("none.png", "none.png"),
    ("no_pictures", "must be a picture"), ("pictures --batch 0", "at least 1"),
    ("pictures --batch many", "invalid int"), ("pictures --prompts one.txt", "1 prompts for 4"),
    ("pictures --prompt x --prompts one.txt", "not allowed with"),
    ("pictures --save none/x", "folder that exists"),
    ("pictures --against nan.jsonl", "--save wrote"),
    ("pictures --against none.jsonl", "--against none.jsonl"),
    ("pictures --hps none.pt", "none.pt")]


@pytest.fixture
def refusal(mess, tiny, monkeypatch, capfd):
    """A function of a script and its flags: the line that ends it."""
    monkeypatch.chdir(mess)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delattr("torch.npu", raising=False)

    def run(script, flags):
        with pytest.raises(SystemExit) as end:
            try:
                script.main(flags.format(hps=tiny.cfg.hps, arch=tiny.cfg.hps_arch).split())
            except BadInput as problem:
                reward.refuse(problem)
        *before, line = capfd.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and line.isprintable()
        assert not any("Traceback" in text for text in before)
        assert not Path("made-by-a-file").exists()
        words = [*flags.split(), "(not given)"]  # the flag, or its file
        assert any(word in line for word in words)
        print(f"\n{flags}\n    {line}")  # shown by pytest -rP
        return line

    return run


@faults
@pytest.mark.parametrize("flags, words", EARLY)
def test_refused_before_anything_is_loaded(flags, words, refusal, monkeypatch):
    """A traceback after minutes of loading where one line at once would have done."""
    monkeypatch.setattr(grpo_flux, "start", lambda _: pytest.fail("was not refused at once"))
    assert words in refusal(grpo_flux, flags)


@faults
@pytest.mark.parametrize("flags, words", LATE)
def test_refused_when_it_shows(flags, words, refusal, tmp_path, mess):
    """Code that runs out of a download; half a file, a web page or a reward of another shape in
    use; two runs that write into one folder."""
    (mess / "busy").mkdir(exist_ok=True)
    with FileLock(mess / "busy" / "lock"):
        flags = flags if "--out" in flags else f"{flags} --out {tmp_path}/out"
        flags = flags if "--device" in flags else f"{flags} --device cpu"
        assert words in refusal(grpo_flux, f"{flags} --eval_images 4 --num_prompts 1")


@faults
@pytest.mark.parametrize("flags, words", SCORING)
def test_scoring_refuses(flags, words, refusal):
    """A traceback for a picture of a thousand that is broken, or nothing said about it."""
    flags = flags if "--hps" in flags else f"{flags} --hps {{hps}} --hps_arch {{arch}}"
    assert words in refusal(reward, flags if "--device" in flags else f"{flags} --device cpu")


def test_refusal_from_outside(tmp_path):
    """BadInput that nobody turns into one line and exit status 2."""
    check_refusal(shell("grpo_flux.py", "--steps", "0", cwd=tmp_path), "--steps")
    assert not list(tmp_path.iterdir())


@faults
def test_refusal_of_two_processes(tmp_path, heavy):
    """The same line from each of eight processes, between torchrun's own."""
    done = shell(*torchrun(2), "grpo_flux.py", "--steps", "0", cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and lines == ["error: --steps 0: must be from 1 to 1000000000"]


@faults
def test_unusual_files_that_are_fine(mess, tiny, capsys):
    """A byte order mark or a carriage return in the first prompt; white for 16 bits of grey."""
    for name in ("crlf", "bom"):
        assert reward.read_prompts(mess / f"{name}.txt") == ["a red circle", "a blue cross"]
    lines = [f"a prompt with\x85and\u2028and \U0001f600 {i}" for i in range(10**6)]
    (mess / "million.txt").write_text("\n".join(lines))
    cfg = settings(prompts=str(mess / "million.txt"), steps=3)
    prompts, _ = grpo_flux.check_files(cfg)
    assert prompts == lines and len(grpo_flux.plan_prompts(prompts, cfg, 0, 1)) == 3
    (mess / "million.txt").unlink()
    alone = settings(prompts=str(mess / "one.txt"), steps=3, num_prompts=2)
    plan = grpo_flux.plan_prompts(grpo_flux.check_files(alone)[0], alone, 1, 2)
    assert plan == 3 * [[(1, "a red circle"), (3, "a red circle")]]
    flags = "--hps {} --hps_arch {} --device cpu --prompt".format(tiny.cfg.hps, tiny.cfg.hps_arch)
    reward.main([*flags.split(), "a red circle", str(mess / "pictures")])
    lines = map(str.split, capsys.readouterr().out.splitlines())
    scores = {Path(path).stem: score for score, path in lines}
    assert len(scores) == 4 and scores["deep"] == scores["grey"] != scores["dot"]


def like_a_real_one(tiny, model):
    """Flags that name the tiny models as if they were others."""
    sizes = [f"--{name}={value}" for name, value in grpo_flux.TINY.items() if value]
    return [*sizes, *SHORT, "--model", str(model), "--hps", tiny.cfg.hps, "--hps_arch",
            tiny.cfg.hps_arch]


@faults
def test_prompts_can_hold_anything(tiny, tmp_path, capfd):
    """A prompt that names a file, steers the terminal, or is as long as a book."""
    evil = ["../../etc/passwd", "/abs/path\\..", "\x1b[31mred\x1b]0;title\x07", "$(rm -rf .)",
            "'\";--", "\U0001f600\u202eabc", "$x^{", "%s {step} {0}", "a red circle " * 8_000]
    (tmp_path / "prompts.txt").write_text("\n".join(evil))
    grpo_flux.main([*like_a_real_one(tiny, tiny.cfg.model), "--eval_images", "9", "--prompts",
                    str(tmp_path / "prompts.txt"), "--cache", str(tmp_path / "cache"),
                    "--out", str(tmp_path / "run")])
    printed = "".join(capfd.readouterr())
    assert "\x1b[31m" not in printed and "\x07" not in printed and "6 of 9 new prompts" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "cache", "run"}
    names = {path.stem for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert all(name == "lock" or (len(name) == 32 and name.isalnum()) for name in names)


@faults
def test_schnell(tiny, tmp_path):
    """A model without the guidance input, refused or given one."""
    model = tmp_path / "FLUX.1-schnell"
    shutil.copytree(tiny.cfg.model, model)
    config = model / "transformer" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | dict(guidance_embeds=False)))
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: x for n, x in load_file(weights).items() if "guidance" not in n}, weights)
    (tmp_path / "prompts.txt").write_text("a red circle")
    grpo_flux.main([*like_a_real_one(tiny, model), "--prompts", str(tmp_path / "prompts.txt"),
                    "--shift", "1", "--out", str(tmp_path / "run")])
    model = results(tmp_path / "run")[1]
    assert not model.config.guidance_embeds and len(read_metrics(tmp_path / "run")) == 2


def wrong_after(function, calls, wrong):
    """The function, but what it returns after so many calls is spoilt."""
    count = iter(range(10**9))
    return lambda *args, **kwargs: (wrong if next(count) >= calls else lambda x: x)(
        function(*args, **kwargs))


@faults
@pytest.mark.parametrize("name, calls, wrong, words", [
    ("velocity", 40, lambda v: v * math.nan, "not finite"),
    ("group_advantages", 1, lambda A: A * math.nan, "the gradient was not finite in steps 2 to 4"),
    ("rollout", 2, lambda t: t._replace(logp=t.logp + 1e-4), "the first ratio is off by 1")])
def test_numbers_that_go_wrong(name, calls, wrong, words, tiny, tmp_path, monkeypatch):
    """Two days of steps that train nothing; the reward blamed for what the policy did."""
    monkeypatch.setattr(grpo_flux, name, wrong_after(getattr(grpo_flux, name), calls, wrong))
    with pytest.raises(grpo_flux.Stopped, match=words) as end:
        grpo_flux.main([*SHORT, "--steps", "9", "--save_every", "1", "--out", str(tmp_path)])
    last = grpo_flux.checkpoints(tmp_path)[-1]
    assert str(end.value).endswith(f"; the same command goes on from {last}")
    skipped = [line["skipped"] for line in read_metrics(tmp_path)]
    assert name != "group_advantages" or skipped == [0, 1, 1, 1]


@faults
def test_warnings():
    """No word about rewards that do not tell images apart, or that fall; or one at every step."""
    rng = np.random.default_rng(0)

    def warn(rewards, flat=0.0):
        history = [dict(reward=r, flat=flat) for r in rewards]
        said = [grpo_flux.find_trouble(history[:n]) for n in range(1, len(history) + 1)]
        return {n + 1: text for n, text in enumerate(said) if text}

    noise = 0.02 * rng.standard_normal(200)
    assert not warn(noise) and not warn(noise + np.linspace(0, 1, 200))
    falling = warn(noise - np.linspace(0, 0.1, 200))
    assert list(falling) == [100, 120, 140, 160, 180, 200] and "fallen" in falling[100]
    assert list(warn(noise[:45], flat=1.0)) == [20, 40] and not warn(noise[:45], flat=0.9)


FAULTY = ("--device cpu --num_prompts 1 --num_generations 2 --micro_batch 2 --sampling_steps 2 "
          "--gradient_accumulation_steps 2 --eval_images 2 --eval_every 2 --save_every 1 "
          "--learning_rate 1e-3").split()


CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.truncate")


def kill_often(kills, ranks, seed):
    """Kill runs of some processes so often, at random moments, and go on with the same command; at
    their end compare them with one that was left alone. Prints a line for each kill.

    A third of the kills come at a random time; the others up to 5 ms after a file in the run's
    folder or the cache has been opened to be written, renamed or removed, each kind of file in its
    turn. Of two processes one or both are killed; the other then gets what torchrun would send it.
    """
    rng, real = np.random.default_rng(seed), reward.fit
    folder = Path(tempfile.mkdtemp(dir="."))

    def fit(model, loss, count, steps, batch, rate, title):  # building takes two seconds
        real(model, loss, count, 3, batch, rate, title)

    reward.fit = fit

    def arm(doom, watched):
        """Kill this process at its doom: in so many seconds, or at the n-th event of a kind."""
        def die(after):
            timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

        def see(event, args):
            opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            path = os.path.abspath(str(args[0])) if opened or event in CHANGES else ""
            if watched in path:
                kind = re.sub(r"[0-9a-f]{8,}|\d+", "N", path.removeprefix(watched))
                kind = f"{event} " + re.sub("(writing-tiny-N/).*", r"\1...", kind)
                os.write(log, f"{kind}\n".encode())
                seen.update([kind])
                if doom == (kind, seen[kind]):
                    die(0.005 * np.random.default_rng(seed).random())

        seen, log = Counter(), os.open("events", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        if isinstance(doom, float):
            die(doom)
        sys.addaudithook(see)

    def launch(flags, out, dooms):
        """Run to the end or to the doom of a process; the exit statuses."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(ranks):
            if pid := os.fork():
                children.append(pid)
                continue
            status = 1
            try:
                os.setpgid(0, 0)
                log = os.open(f"log_{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                if ranks > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                        LOCAL_WORLD_SIZE=str(ranks), MASTER_PORT=str(port),
                        MASTER_ADDR="127.0.0.1")
                arm(dooms[rank], str(out.parent.resolve()))
                cache = str(out.parent / "cache")
                grpo_flux.main([*flags, "--out", str(out), "--cache", cache])
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException as problem:
                traceback.print_exc()
                print("ended by", repr(problem))
            finally:
                os._exit(status)
        statuses, deadline = {}, None
        while len(statuses) < ranks:
            for pid in set(children) - statuses.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid] and not deadline:
                        deadline = time.monotonic() + 30
                        for other in set(children) - statuses.keys():
                            os.kill(other, signal.SIGTERM)
            if deadline and time.monotonic() > deadline:
                for other in set(children) - statuses.keys():
                    os.kill(other, signal.SIGKILL)
                raise TimeoutError("a process hangs after the other's death")
            time.sleep(0.02)
        return [statuses[pid] for pid in children]

    def check_whole(out):
        """Whatever has its final name is complete."""
        for path in out.parent.rglob("*"):
            if any(part.startswith(("writing-", "old-")) for part in path.parts):
                continue
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                lines = read_metrics(path.parent)
                assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".safetensors":
                load_file(path)
        for checkpoint in grpo_flux.checkpoints(out):
            assert len(list(checkpoint.iterdir())) == ranks

    def content(out):
        """All that a run left behind, but for times."""
        files = {}
        for path in out.rglob("*"):
            if path.is_file() and path.parent.name != "tensorboard" and path.name != "lock":
                name = str(path.relative_to(out))
                if path.suffix == ".safetensors":  # the order in their headers varies
                    files[name] = {k: x.numpy().tobytes() for k, x in load_file(path).items()}
                elif name == "metrics.jsonl":
                    files[name] = [{k: v for k, v in line.items() if not k.endswith("_s")}
                                   for line in read_metrics(out)]
                else:
                    files[name] = path.read_bytes()
        return files

    commands = [[*FAULTY, "--steps", "4"], [*FAULTY, *LORA, "--ema_decay", "0.9", "--steps", "4"]]
    commands = commands[:1 + (kills > 3)]
    references, survived, started, chain, out = [], 0, 0, 0, folder / "now" / "run"
    for flags in commands:  # the first one builds
        begin = time.monotonic()
        assert launch(flags, out, ranks * [None]) == ranks * [0]
        seconds = time.monotonic() - begin
        counts = Counter(Path("events").read_text().splitlines())
        references.append((content(out), [(kind, counts[kind]) for kind in rng.permutation(
            sorted(counts))]))
        shutil.rmtree(out)
    while survived < kills or started < survived:
        if survived == started and chain % 4 == 3:
            shutil.rmtree(out.parent, ignore_errors=True)
        reference, turns = references[chain % len(commands)]
        moment = rng.uniform(0, seconds)
        if survived % 3:
            turns.append(turns.pop(0))
            moment = str(turns[-1][0]), int(rng.integers(min(turns[-1][1], 2))) + 1
        victims = [[0], [0, 1], [1]][rng.integers(3)] if ranks > 1 else [0]
        if survived - started > 3 or survived == kills:
            victims = []  # let it end
        dooms = [moment if rank in victims else None for rank in range(ranks)]
        statuses = launch(commands[chain % len(commands)], out, dooms)
        check_whole(out)
        if any(statuses):
            logs = [Path(f"log_{rank}").read_text() for rank in range(ranks)]
            assert -signal.SIGKILL in statuses, logs
            survived += 1
            place = f"at {moment}" if isinstance(moment, tuple) else f"in {moment:.1f} s"
            print(f"kill {survived} {place} of processes {victims}, exit statuses {statuses}, last "
                  f"checkpoint {[path.name for path in grpo_flux.checkpoints(out)[-1:]]}",
                  *(f"    {log.splitlines()[-1][-100:]}" for log in logs if log), sep="\n")
            continue
        ended = content(out)
        names = reference.keys() | ended.keys()
        differ = [name for name in names if ended.get(name) != reference.get(name)]
        assert not differ, differ
        print(f"run {chain} ended after {survived - started} kills: 0 bits of difference")
        shutil.rmtree(out)
        chain, started = chain + 1, survived
    print(f"{survived} of {kills} kills survived, 0 bits of difference")


@job
def few_kills(folder):
    return shell("test_grpo_flux.py", "--kill", "3", "1", "7", cwd=folder)


@faults
def test_few_kills(few_kills):
    """Half a checkpoint, picture, model or line that the next run takes for a whole one."""
    assert "3 of 3 kills survived" in succeed(few_kills)


@faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_kills(ranks, tmp_path, heavy):
    """What only one moment in forty shows."""
    done = shell("test_grpo_flux.py", "--kill", "40", str(ranks), "2", cwd=tmp_path)
    print(done.stdout)
    assert "40 of 40 kills survived" in succeed(done)


@faults
@pytest.mark.parametrize("victim, number", [("torchrun", signal.SIGTERM), ("rank", signal.SIGTERM),
                                            ("rank", signal.SIGKILL)])
def test_signals_to_two_processes(victim, number, tmp_path, heavy):
    """A process that waits for ever for one that is gone; a step that is lost without need."""
    argv = [*torchrun(2), str(HERE / "grpo_flux.py"), *SHORT, "--steps", "500", "--save_every", "2"]
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen([sys.executable, *argv, "--out", "run"], cwd=tmp_path, stdout=log,
                               stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text()) > 1000):
        time.sleep(0.1)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if victim == "torchrun" else int(ranks[-1]), number)
    begin = time.monotonic()
    status = process.wait(60)
    print(f"{victim} {number!r}: exit status {status} after {time.monotonic() - begin:.1f} s")
    text = (tmp_path / "log").read_text()
    last = grpo_flux.checkpoints(tmp_path / "run")[-1].name
    steps = len(read_metrics(tmp_path / "run"))
    if number == signal.SIGKILL:
        assert status == 1 and "another process has ended" in text and "goes on from" in text
        assert 0 <= steps - int(last[5:]) <= 2
    else:
        assert (status == 0 or victim == "torchrun") and last == f"step_{steps:05d}"


@faults
def test_full_disk(tmp_path, heavy):
    """The old checkpoint gone before the new one is whole; a traceback of eighty lines."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk]).returncode:
        pytest.skip("this user cannot mount a disk of its own")
    try:
        flags = [*SHORT, "--steps", "4", "--save_every", "1", "--out", str(disk / "run")]
        done = shell("grpo_flux.py", *flags, cwd=tmp_path)  # a checkpoint has 22 MB
        *_, line = done.stderr.splitlines()
        print(line)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert line.startswith("error: ") and "No space left" in line
        assert line.endswith("goes on from " + str(disk / "run" / "checkpoints" / "step_00001"))
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step_00001"]
        assert load_file(next((disk / "run" / "checkpoints" / "step_00001").iterdir()))
        assert len(read_metrics(disk / "run")) == 2
        (disk / "filler").write_bytes(bytes(16 * 2**20))
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        succeed(shell("grpo_flux.py", *flags, cwd=tmp_path))
    finally:
        subprocess.run(["umount", disk])


@faults
def test_long_run(tmp_path, heavy):
    """Memory, open files or seconds of a step that grow until the machine is full."""
    flags = [*FAULTY, "--steps", "2000", "--save_every", "100", "--eval_every", "100"]
    argv = [sys.executable, str(HERE / "grpo_flux.py"), *flags, "--out", "run"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(argv, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   stdout=log, stderr=log)
    metrics, seen = tmp_path / "run" / "metrics.jsonl", {}
    while process.poll() is None:
        time.sleep(0.5)
        if metrics.exists() and (step := metrics.read_bytes().count(b"\n")):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if memory := re.search(r"VmRSS:\s*(\d+)", status):
                files = len(os.listdir(f"/proc/{process.pid}/fd"))
                seen[step] = int(memory[1]) / 1024, files
    lines = read_metrics(tmp_path / "run")
    assert process.returncode == 0 and [line["step"] for line in lines] == list(range(1, 2001))
    seconds = [sum(line[f"{part}_s"] for part in ("rollout", "reward", "update")) for line in lines]
    early = [seen[step] for step in seen if 200 <= step < 500]
    late = [seen[step] for step in seen if step >= 1700]
    memory, files = ([max(row[i] for row in part) for part in (early, late)] for i in (0, 1))
    first, last = statistics.median(seconds[10:110]), statistics.median(seconds[-100:])
    print(f"at most {memory[0]:.0f} MB in steps 200 to 500, {memory[1]:.0f} MB after 1700; "
          f"{files[0]} and {files[1]} open files; median of the first hundred steps {first:.4f} s, "
          f"of the last {last:.4f} s ({last / first - 1:+.1%})")
    assert memory[1] < 1.02 * memory[0] + 5 and files[1] <= files[0]


# ------------------------------------------------------------------------------------- checkpoints

LORA = "--lora_rank 4 --lora_alpha 8 --learning_rate 1e-3".split()


@pytest.mark.parametrize("flags", [[], [*LORA, *"--ema_decay 0.9 --kl_beta 0.1".split()]])
def test_resume_is_bit_for_bit(tiny, tmp_path, flags):
    """A moment, an average or a draw that starts anew; a line of metrics twice."""
    flags = [*SHORT, *flags, "--save_every", "2", "--keep_last", "1", "--eval_every", "3"]
    for steps, name in (("4", "whole"), ("2", "parts"), ("4", "parts")):
        grpo_flux.main([*flags, "--steps", steps, "--out", str(tmp_path / name)])
        if steps == "2":  # as if it had been killed in step 4
            with open(tmp_path / name / "metrics.jsonl", "a") as file:
                file.write('{"step": 3}\n')
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step_00004"]
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    for line in whole + parts:
        for name in ("rollout_s", "reward_s", "update_s"):
            del line[name]
    assert whole == parts
    whole, parts = (load_file(next((tmp_path / name / "export").rglob("*.safetensors")))
                    for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())


def test_resume_without_metrics(tiny, tmp_path):
    """A finished run that cannot be gone on with, as somebody has cleared away its pictures."""
    flags = [*SHORT, *LORA, "--save_every", "1", "--eval_every", "5", "--out", str(tmp_path)]
    grpo_flux.main([*flags, "--steps", "1"])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "images" / "step_00000.png").unlink()
    grpo_flux.main([*flags, "--steps", "1"])
    grpo_flux.main([*flags, "--steps", "2"])
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]


def test_two_ranks_resume_on_two_and_on_one(two_ranks, tmp_path):
    """Shards that come back in another order, or only where as many processes read them."""
    run, again = (two_ranks[0] / name for name in ("run", "again"))
    grpo_flux.main([*THREE, "--num_prompts", "2", "--gradient_accumulation_steps", "24", "--out",
                    str(tmp_path), "--resume", str(run / "checkpoints" / "step_00002")])
    whole, again, alone = (results(folder)[1].state_dict() for folder in (run, again, tmp_path))
    assert all(torch.equal(again[name], x) for name, x in whole.items())
    assert all(torch.allclose(alone[name], x, atol=1e-6) for name, x in whole.items())


@pytest.mark.parametrize("rank", [0, 4])
def test_export_is_the_trained_policy(tiny, tmp_path, rank):
    """An export that diffusers cannot read, or reads with another alpha; frozen weights that move
    or are saved."""
    flags = ["--lora_rank", str(rank), "--lora_alpha", "8", "--learning_rate", "1e-3"]
    grpo_flux.main([*SHORT, *flags, "--out", str(tmp_path)])
    folder = tmp_path / "checkpoints" / "step_00002"
    assert not rank or all("lora" in name for name in load_file(next(folder.iterdir())))
    cfg = settings(lora_rank=rank, lora_alpha=8.0, model=tiny.cfg.model)
    policy = grpo_flux.make_policy(cfg, SHAPE[1:], torch.device("cpu"))
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), batch_text(
        tiny.encoded, ["a red circle", "a blue cross"], "cpu")
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, vae=None)
    if rank:
        pipe.load_lora_weights(tmp_path / "export")
    else:
        pipe.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "export/transformer")
    with torch.no_grad():
        start = policy.predict(*inputs)
        assert torch.equal(start, tiny.predict(*inputs))  # adapters begin at 0
        assert not rank or policy.transformer.peft_config["default"].lora_alpha == 8
        assert grpo_flux.load_checkpoint(folder, policy) == 2
        assert policy.optimizer.param_groups[0]["lr"] == cfg.learning_rate  # not the run's 1e-3
        trained = policy.predict(*inputs)
        loaded = partial(tiny.predict.func, pipe.transformer, **tiny.predict.keywords)(*inputs)
    assert torch.allclose(loaded, trained, atol=1e-5) and (trained - start).abs().max() > 1e-3
    before = tiny.transformer.state_dict()
    frozen = {name.replace(".base_layer", ""): p
              for name, p in policy.transformer.named_parameters() if "lora" not in name}
    assert before.keys() == frozen.keys()
    assert all(torch.equal(p, before[name]) for name, p in frozen.items()) == bool(rank)


def test_kl_refers_to_the_start(tiny):
    """A reference that is the trained policy itself, or leaves the adapters switched off."""
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), batch_text(
        tiny.encoded, ["a red circle", "a blue cross"], "cpu")
    for rank in (0, 4):
        cfg = settings(kl_beta=0.1, lora_rank=rank, model=tiny.cfg.model)
        policy = grpo_flux.make_policy(cfg, SHAPE[1:], torch.device("cpu"))
        with torch.no_grad():
            start = policy.predict(*inputs)
            for p in grpo_flux.trained_parameters(policy.transformer).values():
                p.add_(0.01)
            moved, reference = policy.predict(*inputs), policy.reference(*inputs)
            assert torch.equal(reference, start) and not torch.allclose(moved, start, atol=1e-3)
            assert torch.equal(policy.predict(*inputs), moved)


def test_blocks_are_gathered_once(tiny):
    """FSDP that gathers all weights again at every call of a rollout."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        policy = grpo_flux.make_policy(tiny.cfg, SHAPE[1:], torch.device("cpu"))
        keys = [(0, 0, i) for i in range(12)]
        text = batch_text(tiny.encoded, ["a red circle"] * 12, "cpu")
        with CommDebugMode() as communication:
            rollout(policy.predict, draw(keys, tiny.cfg), text, keys, tiny.cfg, 0.7)
        counts = {str(op): n for op, n in communication.get_comm_counts().items()}
    finally:
        dist.destroy_process_group()
    assert len(counts) == 1 and counts.popitem() == ("c10d._allgather_base_", 2 + 2 + 1)  # a root


def test_prompts_are_encoded_once(tiny, tmp_path, monkeypatch, capsys):
    """Encoders that are loaded for nothing; embeddings of another length or dtype; a silent cut."""
    cfg = settings(model=tiny.cfg.model, cache=str(tmp_path), text_length=6)
    prompts = ["a red circle", "a red circle and a blue cross"]
    files = grpo_flux.encode_prompts(cfg, prompts, "cpu")
    assert "1 of 2 new prompts have more than 6 tokens" in capsys.readouterr().out
    one, two = (batch_text(files, [prompts[0]] * n, "cpu")[0] for n in (1, 2))
    assert one.shape == (1, 6, 64) and two.shape == (2, 6, 64)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert grpo_flux.encode_prompts(cfg, prompts, "cpu") == files
    for change in (dict(text_length=8), dict(dtype="bf16"), dict(model="another")):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            grpo_flux.encode_prompts(replace(cfg, **change), prompts[:1], "cpu")


@job
def stopped_run(folder):
    """Exit status of a run that SIGTERM ends after its first step."""
    argv = [sys.executable, str(HERE / "grpo_flux.py"), *SHORT, "--steps", "500", "--out", "run"]
    process = subprocess.Popen(argv, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    return folder / "run", process.wait(60)


def test_signal_saves_and_stops(stopped_run):
    """A run that loses its last steps when its machine is taken away."""
    run, status = stopped_run
    last = read_metrics(run)[-1]["step"]
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert status == 0 and names == [f"step_{last:05d}"]


# -------------------------------------------------------------------------------------------- tape

def replay(folder, out, *flags):
    """Exit status, {stage: row of the table}, the lines below the table, metrics.jsonl."""
    flags = [*flags, "--replay", str(folder), "--out", str(out), "--device", "cpu"]
    with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit) as end:
        grpo_flux.main(flags)
        sys.exit(0)
    lines = text.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("stage ")) + 1
    table = [line.split() for line in lines[first:]][:len(grpo_flux.TOLERANCES)]
    rows, rest = {row[0]: row for row in table}, lines[first + len(table):]
    return end.value.code, rows, rest, results(out)[0]


@pytest.fixture(scope="module")
def record(tiny, tmp_path_factory):
    """A record of two steps on one prompt, made with --deterministic."""
    folder = tmp_path_factory.mktemp("tape")
    (folder / "prompt.txt").write_text("a red circle")
    grpo_flux.main([*SHORT, "--record", str(folder / "A"), "--out", str(folder / "run"),
                    "--prompts", str(folder / "prompt.txt"), "--deterministic"])
    yield folder / "A"
    torch.use_deterministic_algorithms(False)


def test_replay_on_two_processes(two_ranks):
    """Draws or results of one rank taken for another's; a run that is not deterministic."""
    folder, out = two_ranks
    rows = [line.split() for line in out.splitlines() if line.endswith(" OK")][:-1]
    assert [row[0] for row in rows] == list(grpo_flux.TOLERANCES)
    assert all(float(number) == 0 for row in rows for number in row[2:6])
    assert out.endswith("replay OK\n") and len(list((folder / "A").iterdir())) == 7
    counts = {row[0]: int(row[1]) for row in rows}  # 3 steps, 2 ranks, 12 samples, T = 3
    assert counts["velocity"] == 3 * 2 * 12 * 3 * 256 and counts["grad_norm"] == 6


def test_replay_takes_all_draws_from_the_tape(record, tmp_path):
    """A random number that is drawn beside the tape: it would change with the seed."""
    assert replay(record, tmp_path, "--seed", "7", "--deterministic")[::2] == (0, ["replay OK"])


def test_names_on_the_tape(record):
    """Names, shapes or an order of the draws in which a run of DanceGRPO's code has others."""
    first, second = (load_file(record / f"step_0000{i}_rank_0.safetensors") for i in (1, 2))
    assert first["input_latents_1_0"].shape == (1, 4, 8, 8) and first["perms_1_0"].shape == (12, 3)
    assert sorted(first["perms_1_0"][5].tolist()) == [0, 1, 2]
    coff = [{int(name.split("_")[1]) for name in f if "coff" in name} for f in (first, second)]
    assert coff[0] == {n for n in range(48) if n % 4 < 3}  # none in the last step
    assert coff[1] == {n + 48 for n in coff[0]}
    drawn = grpo_flux.randn((16, 16), 0, grpo_flux.NOISE, 1, 0, 5, 2)
    assert torch.equal(second["coff_70_0"], drawn[None])  # (12 + 5) * 4 + 2
    states, noise = first["latents.0"], first["coff_21_0"]  # sample 5, step 1
    sigmas = grpo_flux.sigma_schedule(4, 3.0)
    after = flux_step(first["velocity.1"][5:6], states[5:6, 1], *sigmas[1:3], 0.7, noise=noise)[0]
    assert torch.allclose(after, states[5:6, 2], atol=1e-5)


def test_replay_of_draws_alone(record, tmp_path):
    """A tape of another code's draws that asks for our results or settings."""
    for file in record.glob("*.safetensors"):
        draws = {name: x for name, x in load_file(file).items() if "." not in name}
        save_file(draws, tmp_path / file.name)
    facts = dict(steps=2, num_prompts=1, sampling_steps=4, eval_images=3)
    (tmp_path / "config.json").write_text(json.dumps(facts))
    flags = "--prompts", str(record.parent / "prompt.txt"), "--seed", "9"
    status, rows, end, lines = replay(tmp_path, tmp_path / "run", *flags)
    assert (status, end) == (0, ["replay without results to compare"])
    recorded = results(record.parent / "run")[0]
    assert [line["reward"] for line in lines] == [line["reward"] for line in recorded]


def test_replay_finds_a_changed_weight(record, tmp_path, monkeypatch):
    """One weight of 1.85 million that is off by 0.001."""
    def load_transformer(*args, load=grpo_flux.load_transformer):
        transformer = load(*args)
        transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] += 1e-3
        return transformer

    monkeypatch.setattr(grpo_flux, "load_transformer", load_transformer)
    status, rows, end, _ = replay(record, tmp_path, "--deterministic")
    assert end[0].startswith("first OFF: step 1, rank 0, stage velocity;")
    assert (status, end[1]) == (3, "replay OFF")
    assert rows["text"][-1] == "OK" and rows["velocity"][-1] == "OFF"


def test_replay_finds_a_changed_reward(record, tmp_path, monkeypatch):
    """A reward that is off by 0.02 %, of the same pictures."""
    monkeypatch.setattr(reward.HPS, "__call__",
                        lambda *args, call=reward.HPS.__call__: call(*args) * 1.0002)
    status, rows, end, _ = replay(record, tmp_path)
    assert end[0].startswith("first OFF: step 1, rank 0, stage reward;")
    assert (status, end[1]) == (3, "replay OFF")
    assert float(rows["reward"][4]) == pytest.approx(2e-4, rel=0.05)


def test_replay_finds_a_wrong_rotary_embedding(record, tmp_path, monkeypatch):
    """Pictures turn into noise while loss and ratio look right: pairs that are halves of a head
    where FLUX has neighbours, in rollout and update alike."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", partial(
        transformer_flux.apply_rotary_emb, use_real_unbind_dim=-2))
    status, rows, end, lines = replay(record, tmp_path)
    assert end[0].startswith("first OFF: step 1, rank 0, stage velocity;") and status == 3
    for line, right in zip(lines, results(record.parent / "run")[0], strict=True):
        assert abs(line["loss"] - right["loss"]) < 1e-6 > abs(line["ratio"] - right["ratio"])
    assert rows["loss"][-1] == "OK" and float(rows["velocity"][4]) > 0.05
    assert rows["images"][-1] == "OFF" and rows["reward"][-1] == "OK"  # given the recorded images


def test_compare_two_runs(tmp_path, capsys):
    """A mean over everything that hides ten bad steps; steps that only one run has."""
    def run(name, rewards):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / name / "images" / "step_00000.png")
        lines = [json.dumps(dict(step=i + 1, reward=r, loss=1e-6)) for i, r in enumerate(rewards)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        return str(tmp_path / name)

    runs = [run(*each) for each in (("a", [0.5] * 40), ("b", [0.5] * 10 + [0.52] * 20),
                                    ("c", [0.5] * 10 + [0.53] * 10))]
    for other, status, words in ((runs[1], 0, "+2.67%"), (runs[2], 3, "worst step: 11")):
        with pytest.raises(SystemExit) as end:
            grpo_flux.main(["--compare", runs[0], other])
        out = capsys.readouterr().out
        assert end.value.code == status and words in out
        assert out.endswith(f"compare {'OFF' if status else 'OK'}\n")
        assert Image.open(Path(other) / "compare.png").size > (500, 500)


def test_deterministic_sets_every_switch(monkeypatch):
    """A switch that has another name than its library reads."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(
        conv=types.SimpleNamespace(), matmul=types.SimpleNamespace()), raising=False)
    try:
        reward.make_deterministic(3)
        assert torch.are_deterministic_algorithms_enabled() and torch.initial_seed() == 3
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ == dict(
        HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1", CLOSE_MATMUL_K_SHIFT="1",
        ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0",
        CUBLAS_WORKSPACE_CONFIG=":4096:8", PYTHONHASHSEED="3")
    cudnn = torch.backends.cudnn
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
    assert torch.npu.conv.allow_hf32 is torch.npu.matmul.allow_hf32 is False


# ------------------------------------------------------------------------------------------ README

README = (HERE / "README.md").read_text()


def test_readme_names_what_exists():
    """A flag that was renamed, a function that moved, a count of lines that has rotted."""
    flags = {f"--{name}" for name in grpo_flux.COMMENTS} | {
        name for name in re.findall(r'"(--\w+)"', inspect.getsource(reward.main))}
    torchrun = "nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts shutdown_timeout"
    others = {f"--{name}" for name in [*torchrun.split(), "help", "size", "extra-index-url",
                                       "local-dir"]}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags | others
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 20
    for name, file, number in links:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name.split('.')[-1]}\b", line), name
    for file in ("grpo_flux.py", "reward.py", "test_grpo_flux.py"):
        count = len((HERE / file).read_text().splitlines())
        assert re.search(rf"`{file}`( has)? {count:,}\b", README), (file, count)
    algorithm = inspect.getsource(grpo_flux).split("- draws\n")[0].count("\n")
    assert f"the algorithm is the first {algorithm} of them" in README
    packages = (HERE / "requirements.txt").read_text().splitlines()
    assert f"{len(packages)} packages" in README
    assert f"{', '.join(reward.DEVICES[1:3])} (Huawei Ascend) and {reward.DEVICES[3]}" in README
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")]
    assert {link for link in re.findall(r"\]\(#(.*?)\)", README)} <= set(headings)
    for name in re.findall(r'src="(.*?)"', README):
        assert (HERE / name).is_file()
    known = inspect.getsource(grpo_flux) + inspect.getsource(reward)
    names = set(re.findall(r"`([a-z_]{3,}|TOLERANCES|TAPE)`", README))
    assert {name for name in names if not re.search(rf"\b{name}\b", known)} <= {"interleave"}


def test_readme_commands_are_those_of_ci():
    """A first command that nobody has run since it was written."""
    ran = (HERE / ".ci" / "run").read_text().replace(" --quiet", "")
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:2]
    for command in "\n".join(blocks).replace("source .venv", "source $venv").splitlines():
        assert command in ran or "venv" in command, command


def test_functions_that_stand_alone():
    """A copied function that needs more than README says."""
    x, r = torch.randn(2, 4, 8), torch.rand(8)
    calls = dict(
        sigma_schedule=(16, 3.0), group_advantages=(r, 4), grpo_loss=(r, r, r, 0.1, 5.0),
        pack_latents=(torch.randn(2, 4, 4, 4),), unpack_latents=(x, 4, 4), image_ids=(4, 4),
        flux_step=(x, x, 0.5, 0.4, 0.3, "dance", x), preprocess=(torch.rand(1, 3, 9, 9),))
    for name, arguments in calls.items():
        original = getattr(grpo_flux, name, None) or getattr(reward, name)
        world = dict(torch=torch, math=math, F=torch.nn.functional)
        exec(inspect.getsource(original), world)
        copy, expected = (tree_leaves(f(*arguments)) for f in (world[name], original))
        assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(copy, expected))


def test_readme_python_runs(tiny, tmp_path, monkeypatch):
    """An example that the code has left behind."""
    monkeypatch.chdir(tmp_path)
    grpo_flux.main([*SHORT, *LORA, "--steps", "1", "--out", "runs/lora"])
    small = {"black-forest-labs/FLUX.1-dev": tiny.cfg.model, '"cuda"': '"cpu"', "100_000": "1000",
             "16, 12, 90, 90": "4, 2, 8, 8", '("a cat in a hat")':
             '("a cat in a hat", height=32, width=32, num_inference_steps=2)'}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        for old, new in small.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), {})
    assert Path("marginals.png").is_file() and Path("cat.png").is_file()
    assert load_file("DIR/step_00001_rank_0.safetensors")["coff_7_0"].shape == (1, 16, 64)


# -------------------------------------------------------------------------------------------- NPU

# A device that torch really calls npu, without hardware: its tensors are host memory, and every
# operator runs on the CPU. Like an NPU it refuses float64 and tensors of the CPU among its own;
# hccl is gloo. It says nothing of NPU kernels, and each process has only npu:0. It cannot be taken
# out of a process again: `python test_grpo_flux.py --npu grpo_flux.py ...` is a process for it.
NO_NPU = "this torch cannot carry the stand-in for an NPU"
AUTOCAST = "conv2d linear matmul mm bmm addmm baddbmm scaled_dot_product_attention"
COLLECTIVES = ("allreduce_ broadcast_ allgather_ _allgather_base_ _reduce_scatter_base_ barrier "
               "allgather_into_tensor_coalesced_")
GROUPS = {}  # the group of gloo behind each of hccl


def recast(x, kind):
    """The same memory on another device: in DLPack, integer 1 is the cpu and 12 is ours."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = torch._C._to_dlpack(x)
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = kind
    return torch._C._from_dlpack(capsule)


def run_on_cpu(op, *args, **kwargs):
    """Every operator with an npu tensor ends here, below autograd and autocast."""
    twins, strays = {}, []  # twins: {id of an npu tensor: (it, its memory as a CPU tensor)}

    def to_cpu(x):
        if isinstance(x, torch.Tensor) and x.is_npu:
            if id(x) not in twins:
                twins[id(x)] = x, recast(x, 1) if x.numel() else torch.empty(x.shape, dtype=x.dtype)
            return twins[id(x)][1]
        if isinstance(x, torch.Tensor) and x.dim() and op is not torch.ops.aten.index.Tensor:
            strays.append(x)
        if isinstance(x, torch.ScriptObject) and x._type().name().endswith("ProcessGroup"):
            return GROUPS[dist.ProcessGroup.unbox(x).group_name].boxed()
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def to_npu(x):
        if getattr(x, "dtype", None) in (torch.float64, torch.complex128):
            raise TypeError(f"{op}: {x.dtype} on npu")
        return own[id(x)] if id(x) in own else recast(x, 12) if isinstance(x, torch.Tensor) else x

    inputs, options = tree_map(to_cpu, (args, kwargs))
    if op is torch.ops.aten._copy_from.default:  # of .to and copy_, which may see both devices
        inputs[1].copy_(inputs[0])
        return args[1]
    if strays:
        raise RuntimeError(f"{op}: npu tensors meet a tensor {tuple(strays[0].shape)} of the cpu")
    result, own = op(*inputs, **options), {id(twin): x for x, twin in twins.values()}
    if op.namespace == "c10d":  # torch finds the work by storage, and views here have their own
        dist.Work.unbox(result[-1] if isinstance(result, tuple) else result).wait()
    for x, twin in twins.values():
        if twin.shape != x.shape or twin.data_ptr() != x.data_ptr():  # out= and resize_
            x.data = recast(twin, 12)
    return tree_map(to_npu, result)


def autocast(op, *args, **kwargs):
    def cast(x):
        low = isinstance(x, torch.Tensor) and x.is_npu and x.is_floating_point()
        return x.to(torch.get_autocast_dtype("npu")) if low else x

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


def hccl(o, _):
    gloo = dist.ProcessGroupGloo(o.store, o.group_rank, o.group_size, o.timeout)
    GROUPS[o.group_id] = dist.ProcessGroup(o.store, o.group_rank, o.group_size)
    kind = dist.ProcessGroup.BackendType.GLOO
    GROUPS[o.group_id]._register_backend(torch.device("cpu"), kind, gloo)
    return gloo


def install_npu():
    npu, half = types.ModuleType("torch.npu"), [torch.float16, torch.bfloat16]
    values = dict(is_available=True, is_initialized=True, device_count=8, current_device=0,
                  set_device=None, synchronize=None, _is_in_bad_fork=False, manual_seed_all=None,
                  get_amp_supported_dtype=half, get_device_name="stand-in")
    for name, value in values.items():
        setattr(npu, name, lambda *_, value=value: value)
    parts = dict(stream_id=0, device_index=0, device_type=20, synchronize=lambda _: None)
    npu.Stream = type("Stream", (torch.cpu.Stream,), parts)
    npu.conv, npu.matmul = types.SimpleNamespace(), types.SimpleNamespace()
    npu.Event, npu.stream, npu.current_stream = torch.cpu.Event, torch.cpu.stream, npu.Stream
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    dist.Backend.register_backend("hccl", hccl, extended_api=True, devices=["npu"])
    every, aten, c10d, cast = libraries = [torch.library.Library(*names) for names in (
        ("_", "IMPL"), ("aten", "IMPL", "PrivateUse1"), ("c10d", "IMPL", "PrivateUse1"),
        ("aten", "IMPL", "AutocastPrivateUse1"))]
    every.fallback(run_on_cpu, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("convolution_overrideable", partial(run_on_cpu, torch.ops.aten.convolution.default))
    for name in COLLECTIVES.split():
        c10d.impl(name, partial(run_on_cpu, getattr(torch.ops.c10d, name).default))
    for name in AUTOCAST.split():
        cast.impl(name, partial(autocast, getattr(torch.ops.aten, name).default))
    resize = torch.UntypedStorage.resize_  # FSDP frees memory with it; here it stays
    torch.UntypedStorage.resize_ = lambda s, n: s if s.device.type == "npu" else resize(s, n)
    assert (torch.ones(2).to("npu") + 1).tolist() == [2, 2]
    return libraries  # they take their operators along when they go


def with_npu(name, *argv, cwd, ranks=1):
    """Run a script, or a function of this file, in processes of their own that have the npu."""
    done = shell(*torchrun(ranks), __file__, "--npu", name, *argv, cwd=cwd,
                 CUDA_VISIBLE_DEVICES="")  # torch_npu refuses to start beside a GPU
    if NO_NPU in done.stderr:
        pytest.skip(done.stderr[done.stderr.index(NO_NPU):].splitlines()[0])
    assert done.returncode == 0, done.stderr[-3000:]


NPU_FLAGS = ("--steps 2 --sampling_steps 4 --num_generations 4 --micro_batch 4 --eval_images 3 "
             "--gradient_checkpointing --dtype fp32 --reward_fp32 --device").split()


@job
def npu_pair(folder):
    with_npu("grpo_flux.py", *NPU_FLAGS, "npu", "--out", "npu", "--num_prompts", "1",
             "--gradient_accumulation_steps", "4", cwd=folder, ranks=2)
    return folder


def test_npu_does_what_a_cpu_does(tiny, npu_pair, tmp_path):
    """Under torchrun: a CPU tensor, float64, a device or backend by name, gradients of one rank."""
    grpo_flux.main([*NPU_FLAGS, "cpu", "--out", str(tmp_path / "cpu"), "--num_prompts", "2",
                    "--gradient_accumulation_steps", "8"])
    (cpu, a), (npu, b) = results(tmp_path / "cpu"), results(npu_pair / "npu")
    assert len(cpu) == len(npu) == 2
    for one, two in zip(cpu, npu):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["ratio_off"] == 0
    difference = [(u - v).abs().mean() for u, v in zip(a.parameters(), b.parameters())]
    assert max(difference) < 2e-5  # two steps of AdamW move weights by 2e-4


FAULTS = [  # (old, new, words of the error): nothing, then what a port gets wrong
    ("", "", ""),
    ("gather(counts.to(device))", "gather(counts)", "device type cpu"),  # 1 and 2: with RANK
    ("dist.get_default_backend_for_device(device)", "'nccl'", "nccl"),
    ("torch.get_device_module(device).set_device", "torch.cuda.set_device", "cuda"),
    ("keys, shape, cfg).to(device)", "keys, shape, cfg).to('cuda')", ""),
    ("dtype=torch.float32, device=x.device)", "dtype=torch.float64, device=x.device)", "float64"),
    (".standard_normal(shape).astype(np.float32)", ".standard_normal(shape)", "float64"),
    ("torch.stack(noise).to(z.device)", "torch.stack(noise)", "cpu"),
    ("torch.stack(noise).to(z.device)",
     "torch.randn(z.shape, device=z.device, generator=torch.Generator(z.device))", "Generator"),
    ("for prompt in prompts]).to(device)", "for prompt in prompts])", "of the cpu"),
    ("self.tokenizer(unique).to(self.device)", "self.tokenizer(unique)", "of the cpu"),
    ("torch.autocast(x.device.type", "torch.autocast('cuda'", "computes in fp32"),
    ("torch.autocast(self.device.type", "torch.autocast('cuda'", "computes in fp32"),
    ("import reward\n",
     "import reward\nfrom diffusers.models.transformers import transformer_flux\n"
     "transformer_flux.maybe_adjust_dtype_for_device = lambda dtype, _: dtype\n", "float64"),
]


def run_with_faults():
    """A short run in bf16 of a copy of the code with each fault; error.txt says how it ended."""
    def refuse_fp32(layer, inputs, output):
        if isinstance(layer, torch.nn.Linear) and (output.is_npu, output.dtype) == (
                True, torch.float32):
            raise TypeError(f"{layer} computes in fp32")

    torch.nn.modules.module.register_module_forward_hook(refuse_fp32)
    flags = ("--device npu --steps 1 --sampling_steps 3 --num_prompts 1 --num_generations 4 "
             "--micro_batch 2 --gradient_accumulation_steps 4 --eval_images 3 --out").split()
    os.environ |= dict(WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    for i, (old, new, _) in enumerate(FAULTS):
        folder = Path(str(i)).resolve()
        folder.mkdir()
        for name in ("reward", "grpo_flux"):
            path = folder / f"{name}.py"
            path.write_text((HERE / path.name).read_text().replace(old, new))
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        module.show = module.side_by_side = lambda *_: None  # they take a second
        os.environ |= dict(RANK="0") if i in (1, 2) else {}
        try:
            module.main([*flags, str(folder / "run")])
        except Exception as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        os.environ.pop("RANK", None)
        if dist.is_initialized():
            dist.destroy_process_group()


def run_at_real_size():
    """A rollout and an update of FLUX.1-dev at 720x720, with tensors that have no memory."""
    cfg = grpo_flux.Config(num_generations=2, sampling_steps=2, gradient_accumulation_steps=2)
    keys, grid, A = [(0, 0, 0), (0, 0, 1)], (90, 90), np.array([1.0, -1.0])
    # what the host reads: one batch, 0.0 for loss, norm and ratio, and the number of AdamW's step
    FakeTensor.tolist = lambda x: [0.0 if x.is_floating_point() else 1] * x.numel()
    FakeTensor.item = lambda x: 1.0
    seen = defaultdict(set)  # {(device, dtype): names of the operators that made such a tensor}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
            result = op(*args, **kwargs or {})
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    seen[x.device.type, x.dtype].add(op.__name__.split(".")[0])
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), Watch():  # refuses devices that mix
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device="npu") by way of the CPU
        with torch.device("npu"):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
            text = torch.empty(2, 512, 4096), torch.empty(2, 768)
        transformer.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=cfg.learning_rate)
        ids = grpo_flux.image_ids(*grid).to("npu")
        predict = partial(grpo_flux.velocity, transformer, ids=ids, guidance=3.5, bf16=True)
        x = grpo_flux.draw_latents(keys, (16, *grid), cfg).to("npu")
        trajectory = grpo_flux.rollout(predict, x, text, keys, cfg, cfg.eta)
        stats = grpo_flux.update(predict, optimizer, trajectory, text, A, keys, cfg)
    assert trajectory.x.shape == (2, 2, 2025, 64) and stats["updates"] == 1
    assert sum(p.numel() for p in optimizer.state) == 11_901_408_320
    assert not {dtype for _, dtype in seen} & {torch.float64, torch.complex128}
    assert {k for k, names in seen.items() if names & {"mm", "addmm"}} == {("npu", torch.bfloat16)}
    moves = set("arange expand clone view permute _unsafe_view _to_copy zeros_like stack unbind "
                "slice lift_fresh".split())  # draws and positions, and AdamW's number with add_
    for (device, _), names in seen.items():
        assert device == "npu" or device == "cpu" and names <= moves | {"add_"}


@job
def npu_at_real_size(folder):
    with_npu("run_at_real_size", cwd=folder)


@job
def npu_faults(folder):
    with_npu("run_with_faults", cwd=folder)
    return folder


def test_npu_at_real_size(npu_at_real_size):
    """float64, a tensor on the CPU, a matmul in fp32 that only a large or deep FLUX would have."""


@pytest.mark.parametrize("i", range(len(FAULTS)))
def test_npu_shows_what_a_port_gets_wrong(npu_faults, i):
    """0: a run without torchrun, in bf16. Then: a stand-in that is blind to what it stands for."""
    (old, new, words), folder = FAULTS[i], npu_faults / str(i)
    if old == new:
        assert [line["ratio_off"] for line in results(folder / "run")[0]] == [0]
    else:
        assert any(old in (HERE / name).read_text() for name in ("grpo_flux.py", "reward.py"))
        assert words.lower() in (folder / "error.txt").read_text().lower()


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


# ------------------------------------------------------------------- benchmark: FLUX.1-dev, counted

class Meter(TorchDispatchMode):
    """Counts FLOP, collectives, the bytes that a rank receives by them, and live bytes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.counted = {}, 0, Counter()
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage, size):
            resize(storage, size)
            self.note_size(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize_and_note  # no operator: FSDP frees weights by it

    def restart(self):
        """What was counted so far; from now on all is counted anew, but for what is live."""
        counted, self.counted = self.counted, Counter(peak=self.live)
        return counted

    def note_size(self, storage, size):
        """A storage, known by its address, has come, was resized, or died: size 0."""
        self.live += size - self.sizes.get(storage, 0)
        self.sizes[storage] = size
        self.counted["peak"] = max(self.counted["peak"], self.live)

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in kinds):
            return NotImplemented  # then it comes again, with what this rank holds
        result = op(*args, **kwargs or {})
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and not self.sizes.get(storage._cdata):
                self.note_size(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.note_size, storage._cdata, 0)
        if formula := flop_registry.get(op._overloadpacket):  # those of FlopCounterMode
            self.counted["flop"] += formula(*args, **kwargs or {}, out_val=result)
        if op.namespace == "c10d" and "_base_" in op.__name__:  # all-gather or reduce-scatter
            name = "gather" if "gather" in op.__name__ else "scatter"
            self.counted[f"{name}s"] += 1
            self.counted[f"{name}_bytes"] += abs(args[0].nbytes - args[1].nbytes)
        return result


def build_without_memory(cfg, world):
    """The policy as load_transformer makes it, on the device meta."""
    dtype = torch.bfloat16 if cfg.lora_rank else torch.float32
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(dtype)
        transformer = grpo_flux.prepare_policy(transformer, cfg)
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        grpo_flux.shard(transformer, torch.device("cpu"), torch.bfloat16)
    return transformer


def count_at_real_size(lora_rank, world):
    """Count a rollout of 3 forwards and an update of 2 backwards on one of `world` ranks."""
    torch.set_num_threads(1)
    gc.freeze()  # else the collector walks through all that was imported, again and again
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    cfg = grpo_flux.Config(
        dtype="bf16", lora_rank=lora_rank, num_generations=2, sampling_steps=3,
        gradient_accumulation_steps=2, timestep_fraction=1.0)
    keys, grid, A, counted = [(0, 0, 0), (0, 0, 1)], (90, 90), np.array([1.0, -1.0]), {}
    # what the host reads: one batch, 0.0 for loss, norm and ratio; AdamW's step 1, the window's 0
    FakeTensor.tolist = lambda x: [0.0 if x.is_floating_point() else 1] * x.numel()
    FakeTensor.item = lambda x: 1.0 if x.is_floating_point() else 0
    transformer, descend = build_without_memory(cfg, world), grpo_flux.descend

    def descend_locally(*args, **named):
        counted["backward"] = meter.restart()
        for part, p in zip(parts, whole):
            (part.grad,), p.grad = grpo_flux.local_parts([p.grad]), None
        return descend(*args, **named)

    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        transformer.to_empty(device="cpu")
        counted["weights"] = meter.live
        held = grpo_flux.local_parts(transformer.parameters())
        assert meter.live == sum(p.nbytes for p in held)  # else the meter is wrong
        whole = list(grpo_flux.trained_parameters(transformer).values())
        # AdamW gets plain tensors: for 1000 DTensors torch seeks sharding rules for two minutes
        parts = [part.detach() for part in grpo_flux.local_parts(whole)]
        optimizer = torch.optim.AdamW(parts, foreach=True)  # torch's choice on an accelerator
        for part in parts:
            part.grad = torch.zeros_like(part)
        counted["gradients"] = meter.live - counted["weights"]
        optimizer.step()  # makes its moments, which all steps but the first find there
        optimizer.zero_grad()
        counted["moments"] = meter.live - counted["weights"]
        text = torch.empty(2, 512, 4096), torch.empty(2, 768)
        x, ids = grpo_flux.draw_latents(keys, (16, *grid), cfg), grpo_flux.image_ids(*grid)
        predict = partial(grpo_flux.velocity, transformer, ids=ids, guidance=3.5, bf16=True)
        for name in ("let_go", "rollout")[world == 1:]:
            if world > 1:  # what it costs to gather at each call, and what we do
                transformer.set_reshard_after_forward(name == "let_go")
            meter.restart()
            trajectory = grpo_flux.rollout(predict, x, text, keys, cfg, cfg.eta)
            counted[name] = meter.restart()
        grpo_flux.let_go(transformer)  # as it is after the first of an update's optimizer steps
        meter.restart()
        grpo_flux.descend = descend_locally
        grpo_flux.update(predict, optimizer, trajectory, text, A, keys, cfg)
        counted["step"] = meter.restart()
    return counted


def benchmark_at_real_size():
    """FLOP, peak memory and collectives of FLUX.1-dev, from a process for each way to run it."""
    cfg, ways = grpo_flux.Config(), [(64, 1), (0, 1), (64, 8), (0, 8)]  # (LoRA's rank, ranks)
    n, T, samples = cfg.micro_batch, cfg.sampling_steps, cfg.num_generations
    K, GIB = int(cfg.timestep_fraction * (T - 1) + 1e-9), 2**30
    forwards, backwards = samples // n * (T - 1) + 1, samples // n * K  # the first v is shared
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        results = dict(zip(ways, pool.starmap(count_at_real_size, ways, chunksize=1)))
    print(f"FLUX.1-dev, 720x720, 512 text tokens, micro-batch {n}, bf16, gradient checkpointing: "
          f"counted\non tensors without memory, torch {torch.__version__}. A GRPO step has "
          f"{samples} samples, {forwards} forwards in\nits rollout and {backwards} forwards and "
          "backwards in its update.\n\n"
          "TFLOP         forward of a sample   and backward   rollout    update   GRPO step")
    for way in ways[:2]:
        forward = results[way]["rollout"]["flop"] / 3 / 2e12  # 3 calls, 2 samples
        both = results[way]["backward"]["flop"] / 2 / 2e12
        rollout, update = forward * n * forwards, both * n * backwards
        print(f"{name_way(way):14}{forward:19.1f}{both:15.1f}{rollout:10.0f}{update:10.0f}"
              f"{rollout + update:12.0f}")
    print("\nGiB of a rank     weights  gradients  moments   peak of: rollout  backward   AdamW")
    for way, r in results.items():
        row = [r[name] for name in ("weights", "gradients", "moments")]
        row += [r[name]["peak"] for name in ("rollout", "backward", "step")]
        print("{:18}{:7.1f}{:11.1f}{:9.1f}{:19.1f}{:10.1f}{:8.1f}".format(
            f"{name_way(way)}, ranks: {way[1]}", *(x / GIB for x in row)))
    print("\n8 ranks, a GRPO step: calls, GiB a rank receives   all-gathers       reduce-scatters")
    for way in ways[2:]:
        r = results[way]
        for text, name, gathers, scatters in (
                ("rollout", "rollout", 1, 0), ("rollout, gathering at each call", "let_go",
                                               forwards / 3, 0),
                ("update", "backward", samples // cfg.gradient_accumulation_steps - 1,
                 backwards / 2)):
            row = [r[name].get(kind, 0) * factor for factor, kind in (
                (gathers, "gathers"), (gathers, "gather_bytes"), (scatters, "scatters"),
                (scatters, "scatter_bytes"))]
            print(f"{name_way(way):8} {text:35}{row[0]:10.0f}{row[1] / GIB:9.1f}"
                  f"{row[2]:12.0f}{row[3] / GIB:9.1f}")


def name_way(way):
    return f"LoRA {way[0]}" if way[0] else "full"


if __name__ == "__main__" and sys.argv[1:2] == ["--npu"]:
    try:
        libraries = install_npu()
    except Exception as problem:
        sys.exit(f"{NO_NPU}: {problem!r}")
    del sys.argv[:2]
    if sys.argv[0] in globals():
        globals()[sys.argv[0]]()
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
elif __name__ == "__main__" and sys.argv[1:2] == ["--kill"]:
    kill_often(*map(int, sys.argv[2:]))
elif __name__ == "__main__" and sys.argv[1:] == ["--size", "flux-dev"]:
    benchmark_at_real_size()
elif __name__ == "__main__":
    benchmark()
