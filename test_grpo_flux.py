"""Tests against what others wrote or a person can work out: torch.distributions, diffusers, a flow
with a known solution, numbers by hand. Each docstring names the mistake that its test catches.

    python -m pytest -q test_grpo_flux.py   # on the CPU; the first run builds the tiny models
    python test_grpo_flux.py                # the benchmark, on the best device there is
    python test_grpo_flux.py --size flux-dev  # what FLUX.1-dev costs, counted on any machine
"""

import argparse
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
import types
import warnings
import weakref
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from filelock import FileLock
from matplotlib.figure import Figure
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
from grpo_flux import decode, flux_step, group_advantages, grpo_loss, rollout
from reward import BadInput

SDES, HERE = ("dance", "flow", "cps"), Path(__file__).resolve().parent
CPU, SHAPE = torch.device("cpu"), (4, 8, 8)  # latents of a picture of the tiny FLUX
TWO = ["a red circle", "a blue cross"]

def settings(**changes):
    return grpo_flux.Config(**grpo_flux.TINY | dict(
        num_prompts=1, dtype="fp32", ema_decay=0.0, sampling_steps=8, text_length=8) | changes)

def load_run(out, device=CPU, **changes):
    """The models of a run of the tiny FLUX, without the run."""
    prompts = [reward.TINY_PROMPTS], reward.TINY_PROMPTS
    return grpo_flux.Run(settings(steps=1, **changes), prompts, Path(out), device, 0, 1)

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
    """A Run of the tiny FLUX: cfg (with the paths of its models), policy, vae, text, rewards."""
    run = load_run(tmp_path_factory.mktemp("tiny"))
    run.hps = run.rewards["hps"][1]
    torch.set_num_threads(1)  # two that wait for each other are very slow beside other work
    needed = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        for function in JOBS:
            if (name := function.__name__) in needed:
                STARTED[name] = pool.submit(function, tmp_path_factory.mktemp(name))
        yield run
        pool.shutdown(cancel_futures=True)

@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)

def sample(tiny, cfg, keys, prompt="a red circle"):
    """The trajectory of some (step, prompt_index, sample), and its text."""
    text, x = tiny.text([prompt] * len(keys)), grpo_flux.draw_latents(keys, SHAPE, cfg)
    return rollout(tiny.policy.predict, x, text, keys, cfg, cfg.eta), text

def linear_policy(cfg):
    """A policy small enough to check, v = x W: W, the σ of its calls, a rollout, its update."""
    W, calls = (0.3 * torch.randn(3, 3)).requires_grad_(), []
    keys = grpo_flux.plan_step(0, cfg)
    x, text = torch.randn(len(keys), 5, 3), [torch.zeros(len(keys), 1)]

    def predict(x, sigma, text):
        calls.append(sigma.flatten())
        return x @ W

    def update(optimizer, advantages):
        return grpo_flux.update(predict, optimizer, trajectory, text, advantages, keys, cfg)

    trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
    calls.clear()
    return W, calls, trajectory, update

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

def read_metrics(out):
    """The lines of metrics.jsonl of GRPO steps; that of step 0 is an evaluation alone."""
    return [line for line in grpo_flux.read_metrics(out) if "loss" in line]

def results(out):
    """The lines of metrics.jsonl, and the exported model."""
    return read_metrics(out), FluxTransformer2DModel.from_pretrained(out / "export" / "transformer")

# flags of short runs of the tiny FLUX
SHORT = "--steps 2 --num_prompts 1 --sampling_steps 4 --eval_images 3 --device cpu".split()
THREE = "--steps 3 --sampling_steps 3 --eval_images 3 --device cpu".split()
LORA = "--lora_rank 4 --lora_alpha 8 --learning_rate 1e-3".split()

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
    assert stats == pytest.approx({"ratio": 1.06, "ratio_max_dev": 0.3, "clip_frac": 0.6}, abs=1e-6)

# ----------------------------------------------------------------------------------------- rollout

def test_rollout_is_that_of_flux_pipeline(tiny):
    """A timestep 1000 times too large, text inputs that swap, the VAE's shift left out."""
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, transformer=tiny.policy.transformer)
    pipe.set_progress_bar_config(disable=True)
    keys = [(0, 0, 0), (0, 1, 0)]
    x, text = grpo_flux.draw_latents(keys, SHAPE, tiny.cfg), tiny.text(TWO)
    x0 = rollout(tiny.policy.predict, x, text, keys, tiny.cfg, eta=0).x0
    call = partial(pipe, TWO, height=32, width=32, num_inference_steps=8, guidance_scale=3.5,
                   latents=x, max_sequence_length=8)
    assert torch.allclose(x0, call(output_type="latent").images, atol=1e-4)
    images, theirs = decode(tiny.vae, x0, SHAPE[1:], 1), call(output_type="pt").images
    assert torch.allclose(images, theirs, rtol=0, atol=0.5 / 255 + 1e-4)  # ours have 8 bits
    assert torch.equal((images * 255).round() / 255, images)

@pytest.mark.parametrize("P, G, S, runs", [
    (4, 12, 12, "p0 0-11, p1 0-11, p2 0-11, p3 0-11"),  # whole groups, prompt by prompt
    (2, 12, 24, "p0 0-11, p1 0-11"),
    (2, 12, 8, "p0 0-3, p1 0-3, p0 4-7, p1 4-7, p0 8-11, p1 8-11"),  # DanceGRPO's 4 of 12 of each
    (1, 6, 2, "p0 0-5")])
def test_samples_are_dealt_by_optimizer_step(P, G, S, runs):
    """Processes that count for themselves: more of them would be another experiment."""
    cfg = settings(num_prompts=P, num_generations=G, batch_size=S)
    order = []
    for run in runs.split(", "):
        p, first, last = map(int, re.match(r"p(\d) (\d+)-(\d+)", run).groups())
        order += [(5, p, i) for i in range(first, last + 1)]
    assert grpo_flux.plan_step(5, cfg) == order
    for world in (n for n in range(1, S + 1) if S % n == 0):
        plans = [grpo_flux.plan_step(5, cfg, rank, world) for rank in range(world)]
        part = S // world
        batches = [plan[i:i + part] for i in range(0, P * G // world, part) for plan in plans]
        assert sum(batches, []) == order

def test_images_do_not_depend_on_processes_or_batches(tiny):
    """Draws named by the order of calls or by rank; a group split over processes that differs."""
    cfg = settings(num_prompts=2, num_generations=4, micro_batch=4, batch_size=8)
    one, keys = sample(tiny, cfg, grpo_flux.plan_step(1, cfg))[0].x0, grpo_flux.plan_step(1, cfg)
    for world in (2, 4):
        parts = [sample(tiny, cfg, grpo_flux.plan_step(1, cfg, r, world))[0] for r in range(world)]
        assert torch.allclose(torch.cat([part.x0 for part in parts]), one, atol=1e-5)
    assert len(one.unique(dim=0)) == len(keys) == 8
    keys = [(1, 0, i) for i in range(12)]
    first, *others = [sample(tiny, settings(micro_batch=n), keys)[0] for n in (1, 4, 12)]
    for other in others:
        assert torch.equal(other.x[:, 0], first.x[:, 0])
        assert torch.allclose(other.x0, first.x0, atol=1e-4)
    assert (first.x[:, 0] == first.x[0, 0]).all()
    apart = sample(tiny, settings(init_same_noise=False), keys)[0]
    assert len(apart.x[:, 0].unique(dim=0)) == 12

@pytest.mark.parametrize("flags, steps, trained", [
    ("", 16, 9), ("--timestep_fraction 0.3", 16, 4), ("--sde_window 4", 16, 4), ("", 4, 3),
    ("--sde_window 4 --timestep_fraction 0.5", 16, 2), ("--timestep_fraction 0.29", 101, 29)])
def test_number_of_trained_steps(flags, steps, trained):
    """--sde_window 4 that trains 2 steps; the 4 steps of FLUX.1-schnell that train 1."""
    cfg, _ = grpo_flux.read_command_line(
        ["--model", "a/b", "--sampling_steps", str(steps), *flags.split()])
    assert grpo_flux.num_train_steps(cfg) == trained

def test_window(tiny):
    """Noise or training outside of the window; a window that never moves, or leaves its place; a
    path before it that is not every sample's own."""
    cfg = settings(sampling_steps=6, sde_window=3, window_shift_every=2, timestep_fraction=0.7,
                   num_prompts=2, batch_size=24)
    starts = [grpo_flux.sde_steps(step, cfg).start for step in range(7)]
    assert starts == [0, 0, 1, 1, 2, 2, 0]
    drawn = settings(sampling_steps=6, sde_window=3)
    assert {grpo_flux.sde_steps(step, drawn).start for step in range(30)} == {0, 1, 2}
    keys = grpo_flux.plan_step(3, cfg)
    x, text = grpo_flux.draw_latents(keys, SHAPE, cfg), tiny.text([TWO[p] for _, p, _ in keys])
    calls = []

    def predict(x, sigma, text):
        calls.append(len(x))
        return tiny.policy.predict(x, sigma, text)

    trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
    assert calls == [2] + 2 * [12] * 5  # one path a prompt, then all samples
    sigmas, x = trajectory.sigmas, trajectory.x
    for t in range(5):
        with torch.no_grad():
            v = tiny.policy.predict(x[:, t], sigmas[t].expand(24, 1, 1), text)
        off = (x[:, t + 1] - x[:, t] - v * (sigmas[t + 1] - sigmas[t])).abs().amax((1, 2))
        assert off.min() > 0.1 if t in (1, 2, 3) else off.max() < 1e-5
        assert trajectory.logp[:, t].isnan().all() == (t not in (1, 2, 3))
    W, sigma_calls, _, update = linear_policy(replace(cfg, num_prompts=1, batch_size=12))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    assert len(sigma_calls) == 2
    assert set(torch.cat(sigma_calls).tolist()) == set(sigmas[:3].tolist())

# ------------------------------------------------------------------------------------------ update

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
    cfg = grpo_flux.Config(num_prompts=1, num_generations=6, sampling_steps=6, batch_size=2,
                           micro_batch=1, timestep_fraction=0.6)
    w, seen = torch.linspace(-0.5, 1.0, 16).requires_grad_(), defaultdict(list)
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=1e-4)

    def predict(x, sigma, text):
        return x * w + 0.3 * torch.sin(3 * sigma + torch.arange(16))

    def optimizer_step(*args, real=grpo_flux.optimizer_step, **named):
        stats = real(*args, **named)
        for name, values in (("loss", [stats["loss"]]), ("grad_norm", [stats["grad_norm"]]),
                             ("weights", w.tolist())):
            seen[name] += values
        return stats

    monkeypatch.setattr(grpo_flux, "optimizer_step", optimizer_step)
    for step, rewards in enumerate(torch.tensor(DANCEGRPO["reward"]).view(2, 6)):
        keys, text = grpo_flux.plan_step(step, cfg), [torch.zeros(6, 1)]
        x = grpo_flux.draw_latents(keys, (4, 2, 4), cfg)
        trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
        advantages = group_advantages(rewards, 6)
        grpo_flux.update(predict, optimizer, trajectory, text, advantages, keys, cfg)
        for name, value in dict(advantages=advantages, first_logp=trajectory.logp[:, 0],
                                x0_sum=trajectory.x0.sum((1, 2))).items():
            seen[name] += value.tolist()
    for name, values in seen.items():
        assert values == pytest.approx(DANCEGRPO[name], rel=2e-6, abs=1e-6), name

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_gradient_is_that_of_reinforce(sde, micro_batch):
    """A gradient through x_next, a step scored at another σ, a loss divided by the batch count."""
    cfg = settings(sde=sde, micro_batch=micro_batch, max_grad_norm=1e9, adv_clip_max=1.0)
    W, _, trajectory, update = linear_policy(cfg)
    A = torch.linspace(-1.4, 1.6, 12) * (torch.arange(12) % 3 > 0)
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
    assert stats["updates"] == 1 and stats["first_ratio_dev"] == 0

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_ratio_is_one(tiny, sde, micro_batch):
    """Rollout and update that compute other bits; a policy that differs a little, and goes on."""
    cfg = settings(sde=sde, micro_batch=micro_batch, sampling_steps=4, timestep_fraction=0.7)
    keys, A = [(3, 0, i) for i in range(12)], torch.linspace(-1, 1, 12)
    (trajectory, text), predict = sample(tiny, cfg, keys), tiny.policy.predict
    optimizer = torch.optim.SGD(tiny.policy.transformer.parameters(), lr=0)  # others use it, too
    stats = grpo_flux.update(predict, optimizer, trajectory, text, A, keys, cfg)
    assert stats["first_ratio_dev"] == 0 and stats["grad_norm"] > 0

    def rounded(x, sigma, text):
        return predict(x, sigma, text).bfloat16().float()

    with pytest.raises(FloatingPointError, match="first ratio"):
        grpo_flux.update(rounded, optimizer, trajectory, text, A, keys, cfg)
    optimizer.zero_grad()

def test_a_gradient_that_is_not_finite_moves_nothing():
    """One nan in a score, and every weight is nan from then on."""
    W, _, _, update = linear_policy(settings(micro_batch=4, batch_size=4))
    optimizer, start = torch.optim.AdamW([W], lr=0.1), W.detach().clone()
    stats = update(optimizer, torch.tensor([math.nan] + [1.0] * 3 + [0.0] * 8))
    assert stats["skipped"] == 1 and stats["updates"] == 0 and torch.equal(W, start)
    stats = update(optimizer, torch.tensor([0.0] * 8 + [-1.0, 1.0] * 2))
    assert stats["skipped"] == 0 and stats["updates"] == 1 and not torch.equal(W, start)
    assert all(map(math.isfinite, stats.values())) and W.isfinite().all()

def test_steps_are_chosen_for_each_sample():
    """The last, deterministic step trained; a step twice; all samples with the same steps."""
    W, calls, trajectory, update = linear_policy(settings(sampling_steps=16))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    chosen = [frozenset(steps) for steps in torch.stack(calls, 1).tolist()]
    stochastic = set(trajectory.sigmas[:15].tolist())
    assert len(calls) == 9 and len(set(chosen)) > 6  # int(0.6 * 15)
    assert all(len(steps) == 9 and steps <= stochastic for steps in chosen)

def test_equal_rewards_cost_no_optimizer_step():
    """Forwards for gradients of 0; weight decay and momentum that move on without a signal."""
    W, calls, _, update = linear_policy(settings(num_prompts=2, micro_batch=4))
    optimizer, start, flat = torch.optim.AdamW([W], lr=0.1), W.detach().clone(), torch.zeros(12)
    stats = update(optimizer, torch.cat([flat, flat]))
    assert not calls and not optimizer.state and torch.equal(W, start)
    assert stats["updates"] == 0 and all(map(math.isfinite, stats.values()))
    stats = update(optimizer, torch.cat([flat, torch.tensor([1.0, -1.0, 0.0] * 4)]))
    assert stats["updates"] == 1 and len(calls) == 3 * 7  # 12 samples by 4, 7 SDE steps

@pytest.mark.parametrize("sde", SDES)
def test_kl_divergence(sde):
    """One that forgets the std, is a sum, or has no gradient."""
    v, reference, x = torch.randn(3, 4, 6, 5)
    kl = partial(grpo_flux.gaussian_kl, v_reference=reference, x=x, sigma=0.7, sigma_next=0.5,
                 eta=0.6, sde=sde)
    ours = kl(v.requires_grad_())
    normals = [gaussian(sde, w, x, 0.7, 0.5, 0.6) for w in (v.detach(), reference)]
    expected = torch.distributions.kl_divergence(*normals).mean((1, 2)).float()
    assert torch.allclose(ours, expected, rtol=1e-3)
    ours.sum().backward()
    assert v.grad.abs().min() > 0
    same = reference.clone().requires_grad_()
    kl(same).sum().backward()
    assert same.grad.abs().max() < 1e-6

def test_ema_weights(tiny):
    """A decay that is taken the other way round; weights that the average replaces for good."""
    cfg = replace(tiny.cfg, ema_decay=0.9)
    policy = grpo_flux.Policy(cfg, SHAPE[1:], CPU)
    name, weight = next(iter(policy.parameters.items()))
    values = [weight.detach().clone() + i for i in range(4)]
    for value in values[1:]:
        weight.data.copy_(value)
        policy.update_ema(0.9)
    mean = 0.9**3 * values[0] + 0.1 * (0.9**2 * values[1] + 0.9 * values[2] + values[3])
    with policy.ema_weights():
        assert torch.allclose(weight, mean, atol=1e-6)
    assert torch.equal(weight, values[3]) and torch.allclose(policy.averages[name], mean, atol=1e-6)

def test_kl_refers_to_the_start(tiny):
    """A reference that is the trained policy itself, or leaves the adapters switched off."""
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), tiny.text(TWO)
    for rank in (0, 4):
        cfg = replace(tiny.cfg, kl_beta=0.1, lora_rank=rank, gradient_checkpointing=0.5)
        policy = grpo_flux.Policy(cfg, SHAPE[1:], CPU)
        with torch.no_grad():
            start = policy.predict(*inputs)
            for p in policy.parameters.values():
                p.add_(0.01)
            moved, reference = policy.predict(*inputs), policy.reference(*inputs)
            assert torch.equal(reference, start) and not torch.allclose(moved, start, atol=1e-3)
            assert torch.equal(policy.predict(*inputs), moved)
        assert all(p.requires_grad for p in policy.parameters.values())

# ------------------------------------------------------------------------------------------- draws

def test_draws_have_keys():
    """Numbers that follow the order of calls, or another generator: no run can be repeated."""
    golden = [-0.8458674550056458, -0.03669758886098862, 0.7569313049316406, -0.37433308362960815]
    assert grpo_flux.randn((2, 2), 0, 1, 2, 3, 4, 5).flatten().tolist() == golden
    assert grpo_flux.randperm(8, 0, 1, 2, 3, 4, 5).tolist() == [1, 6, 0, 3, 5, 2, 7, 4]
    keys = [(seed, purpose, step) for seed in range(3) for purpose in range(3) for step in (0, 7)]
    assert len({grpo_flux.randn((1,), *key).item() for key in keys}) == len(keys)

@pytest.mark.parametrize("count, P", [(24, 4), (5, 1), (3, 4)])
def test_prompts_go_round(count, P, tmp_path):
    """A prompt twice or never in a round, one fixed order."""
    prompts = [f"prompt {i}" for i in range(count)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    cfg = settings(num_prompts=P, steps=15, prompts=str(tmp_path / "prompts.txt"))
    steps, shown = grpo_flux.check_inputs(cfg, [], 1)
    assert [len(step) for step in steps] == [P] * 15 and shown == prompts
    seen = sum(steps, [])
    rounds = [seen[i:i + count] for i in range(0, len(seen) - count + 1, count)]
    assert all(sorted(part) == sorted(prompts) for part in rounds) and rounds[0] != rounds[1]

# ---------------------------------------------------------------------------- run and command line

RIGHT = {"right_colour", "right_shape", "right_both"}  # metrics of the independent judge

@job
def short_run(folder):
    flags = "--device cpu --num_prompts 1 --steps 3 --eval_every 2 --eval_images 24 --out run"
    done = shell("grpo_flux.py", *flags.split(), "--reward", "hps:0.7,clip:0.3", cwd=folder)
    return folder / "run", succeed(done)

def test_run(tiny, short_run):
    """A run that ends in an error, writes outside of --out, or exports what it began with."""
    run, out = short_run
    assert "1 prompts x 12 images, 5 of 6 denoising steps trained, 60 transitions" in out
    assert "1 optimizer steps, 100% on-policy" in out and "24 prompts, the first: a red" in out
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
        assert line["ratio"] == 1 and line["first_ratio_dev"] == 0 and line["grad_norm"] > 0
        assert "reward" not in line and {"hps", "hps_std", "clip", "clip_std"} <= line.keys()
        assert all(map(math.isfinite, line.values()))
    judged = {"held_out_hps", "held_out_clip", "accuracy", *RIGHT}
    evaluated = {line["step"]: line for line in grpo_flux.read_metrics(run)
                 if judged <= line.keys()}
    assert list(evaluated) == [0, 2, 3] and evaluated[0].keys() == judged | {"step"}
    start, end = tiny.policy.transformer.state_dict(), model.state_dict()
    moved = [(end[name] - start[name]).abs().max() for name in start]
    assert start.keys() == end.keys() and 1e-5 < max(moved) < 1e-2

def test_a_reward_of_weight_zero_is_only_logged(tiny, tmp_path):
    """A second opinion that is trained on after all; a sum of raw scores of two scales."""
    for name, flags in (("one", "hps"), ("two", "hps,clip:0")):
        grpo_flux.main([*SHORT, "--reward", flags, "--out", str(tmp_path / name)])
    (one, a), (two, b) = (results(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(*pair) for pair in zip(a.parameters(), b.parameters()))
    for x, y in zip(one, two, strict=True):
        assert x["reward"] == y["reward"] == y["hps"] != y["clip"]
        assert x["loss"] == y["loss"] and "hps" not in x

def test_zero_std_is_that_of_advantages(tiny):
    """Groups of twelve equal fp32 numbers, whose std is 1e-7 and not 0, that count as different."""
    scores = {"hps": torch.rand(300, 1).expand(300, 12).flatten()}
    tiny_run = types.SimpleNamespace(rewards=tiny.rewards, cfg=tiny.cfg)
    tiny_run.label = partial(grpo_flux.Run.label, tiny_run)
    line = grpo_flux.Run.metrics(tiny_run, 1, scores, group_advantages(scores["hps"], 12), {})
    assert line["zero_std_frac"] == 1

SLICES = "--num_prompts 2 --batch_size 8 --learning_rate 1e-4".split()  # 4 images of each prompt

@job
def two_ranks(folder):
    """The folder of a run of two processes with its record A, and what a replay of it printed; a
    run from its checkpoint."""
    start = [*torchrun(2), "grpo_flux.py"]
    flags = [*THREE, *SLICES]
    succeed(shell(*start, *flags, "--out", "run", "--save_every", "2", "--record", "A",
                  "--deterministic", cwd=folder))
    replay = shell(*start, "--device", "cpu", "--deterministic", "--replay", "A", cwd=folder)
    succeed(shell(*start, *flags, "--out", "again", "--resume", "run/checkpoints/step_00002",
                  cwd=folder))
    return folder, succeed(replay)

def test_the_same_experiment_on_any_number_of_processes(two_ranks, tmp_path):
    """Counts, prompts or draws by process; gradients summed and not averaged; weights that part;
    a checkpoint that goes on only with as many processes."""
    def read(folder):
        lines, model = results(folder)
        return lines, torch.cat([p.detach().flatten() for p in model.parameters()])

    expected, weights = read(two_ranks[0] / "run")
    checkpoint = str(two_ranks[0] / "run" / "checkpoints" / "step_00002")
    for name, flags in dict(all=["--micro_batch", "8"], four=["--micro_batch", "4"],
                            resumed=["--resume", checkpoint]).items():
        grpo_flux.main([*THREE, *SLICES, *flags, "--out", str(tmp_path / name)])
        lines, others = read(tmp_path / name)
        for b in lines:
            a = expected[b["step"] - 1]
            assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert [line["step"] for line in lines] == ([3] if name == "resumed" else [1, 2, 3])
        assert (others - weights).norm() < 1e-5 * weights.norm()
    _, again = read(two_ranks[0] / "again")
    assert torch.equal(again, weights)

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
    """A flag that nothing reads, or whose help or limits --help does not know."""
    settings, source = fields(grpo_flux.Config), inspect.getsource(grpo_flux)
    names = [f.name for f in settings]
    by_name = {"hps", "hps_arch", "clip", "clip_arch", "pickscore"}  # read with getattr
    assert set(grpo_flux.TINY) <= set(names)
    assert [name for name in names if f"cfg.{name}" not in source and name not in by_name] == []
    with pytest.raises(SystemExit):
        grpo_flux.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in settings:
        limits = "" if f.metadata["low"] is None else f"{f.metadata['low']:.10g} to "
        assert f.metadata["help"] in text and f"default {f.default}" in text and limits in text
    sides = [(cfg.height, cfg.width) for cfg, _ in map(grpo_flux.read_command_line, (
        [], ["--width", "64"], ["--model", "a/b"], ["--model", "a/b", "--width", "64"]))]
    assert sides == [(32, 32), (32, 64), (720, 720), (720, 64)]  # a flag, then TINY, then Config

def test_prompts_are_encoded_once(tiny, tmp_path, monkeypatch, capsys):
    """Encoders that are loaded for nothing; embeddings of another run's length or model."""
    def encode(prompts=tuple(TWO), **changes):
        run = types.SimpleNamespace(out=tmp_path, rank=0, device=CPU, eval_prompts=list(prompts),
                                    step_prompts=[])
        run.text_files = grpo_flux.Run.encode_prompts(run, replace(tiny.cfg, **changes))
        return run

    long = "a red circle and a blue cross"
    run = encode(["a red circle", long], text_length=6)
    assert "1 of 2 prompts are cut to 6 tokens" in capsys.readouterr().out
    one, two = (grpo_flux.Run.text(run, ["a red circle"] * n)[0] for n in (1, 2))
    assert one.shape == (1, 6, 64) and two.shape == (2, 6, 64)
    assert {path.parent for path in run.text_files.values()} == {tmp_path / "text"}
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert encode(["a red circle"], text_length=6).text_files.keys() == {"a red circle"}
    for change in (dict(text_length=7), dict(dtype="bf16"), dict(model="another")):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            encode(["a red circle"], **{"text_length": 6} | change)

def test_blocks_are_gathered_once(tiny):
    """FSDP that gathers all weights again at every call of a rollout."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        policy = grpo_flux.Policy(tiny.cfg, SHAPE[1:], CPU)
        keys = [(0, 0, i) for i in range(12)]
        x, text = grpo_flux.draw_latents(keys, SHAPE, tiny.cfg), tiny.text(["a red circle"] * 12)
        with CommDebugMode() as communication:
            rollout(policy.predict, x, text, keys, tiny.cfg, 0.7)
        counts = {str(op): n for op, n in communication.get_comm_counts().items()}
    finally:
        dist.destroy_process_group()
    assert len(counts) == 1 and counts.popitem() == ("c10d._allgather_base_", 2 + 2 + 1)  # a root

# -------------------------------------------------------------------------------------------- tape

def replay(folder, *flags):
    """Exit status, {stage: row of the table}, the lines below the table."""
    with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit) as end:
        grpo_flux.main([*flags, "--replay", str(folder), "--device", "cpu", "--out",
                        str(folder) + "-replay"])
        sys.exit(0)
    lines = text.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("stage ")) + 1
    table = [line.split() for line in lines[first:]][:len(grpo_flux.TOLERANCES)]
    return end.value.code, {row[0]: row for row in table}, lines[first + len(table):]

@pytest.fixture(scope="module")
def record(tiny, tmp_path_factory):
    """A record of two steps on one prompt, made with --deterministic."""
    folder = tmp_path_factory.mktemp("tape")
    grpo_flux.main([*SHORT, "--record", str(folder / "A"), "--out", str(folder / "run"),
                    "--deterministic"])
    yield folder / "A"
    torch.use_deterministic_algorithms(False)

def test_replay_on_two_processes(two_ranks):
    """Draws or results of one rank taken for another's; a run that is not deterministic."""
    folder, out = two_ranks
    rows = [line.split() for line in out.splitlines() if line.endswith(" OK")][:-1]
    assert [row[0] for row in rows] == list(grpo_flux.TOLERANCES)
    assert all(float(number) == 0 for row in rows for number in row[2:4])
    assert out.endswith("replay OK\n") and len(list((folder / "A").iterdir())) == 7
    counts = {row[0]: int(row[1]) for row in rows}  # 3 steps, 2 ranks, 12 samples, T = 3
    assert counts["velocity"] == 3 * 2 * 12 * 3 * 256 and counts["grad_norm"] == 6
    assert not (folder / "runs" / "tiny" / "metrics.jsonl").exists()  # a replay is not a run

def test_replay_takes_all_draws_from_the_tape(record):
    """A random number that is drawn beside the tape: it would change with the seed."""
    assert replay(record, "--seed", "7")[::2] == (0, ["replay OK"])

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

def foreign_record(tiny, folder, settings):
    """A record of one GRPO step made by plain Python from README's table: random draws, and the
    results of functions called one by one."""
    cfg, prompts, B, T, K = replace(tiny.cfg, **settings), ["a blue cross"], 12, 4, 3
    draws = {"input_latents_1_0": torch.randn(1, *SHAPE)}
    draws |= {f"coff_{n}_0": torch.randn(1, 16, 16) for n in range(B * T)}
    draws["perms_1_0"] = torch.stack([torch.randperm(T - 1) for _ in range(B)])
    policy, sigmas = grpo_flux.Policy(cfg, SHAPE[1:], CPU), grpo_flux.sigma_schedule(T, cfg.shift)
    levels, text = torch.tensor(sigmas), tiny.text(prompts * B)
    x, result = grpo_flux.pack_latents(draws["input_latents_1_0"]).expand(B, -1, -1), {}
    states, logps = [], []
    with torch.no_grad():
        for t in range(T):
            result[f"velocity.{t}"] = v = policy.predict(x, levels[t].expand(B, 1, 1), text)
            noise = torch.cat([draws[f"coff_{i * T + t}_0"] for i in range(B)])
            states.append(x)
            x, x0, logp = flux_step(v, x, *sigmas[t:t + 2], cfg.eta * (t < T - 1), noise=noise)
            logps.append(logp)
        images = decode(tiny.vae, x0, SHAPE[1:], B)
    states, logps = torch.stack(states, 1), torch.stack(logps[:-1], 1)
    scores = tiny.rewards["hps"][1](images, prompts * B)
    A = group_advantages(scores, B)
    result |= {"text.0": text[0], "text.1": text[1], "latents.0": states, "latents.1": x0,
               "logp.0": logps, "images.0": images, "reward.0": scores, "advantages.0": A}
    losses, rows = [], torch.arange(B)
    for k in range(K):
        t = draws["perms_1_0"][:, k]
        level, after = (levels[t + i].view(-1, 1, 1) for i in (0, 1))
        x_next = torch.cat([states, x0[:, None]], 1)[rows, t + 1]
        result[f"velocity_in_update.{k}"] = v = policy.predict(states[rows, t], level, text)
        logp = flux_step(v, states[rows, t], level, after, cfg.eta, x_next=x_next)[2]
        loss, _ = grpo_loss(logp, logps[rows, t], A, cfg.clip_range, cfg.adv_clip_max)
        (loss / K).backward()
        losses.append(loss.item() / K)
    norm = torch.nn.utils.clip_grad_norm_(policy.transformer.parameters(), cfg.max_grad_norm)
    result |= {"loss.0": torch.tensor(sum(losses)), "grad_norm.0": norm}
    folder.mkdir()
    save_file({name: x.detach().contiguous() for name, x in (draws | result).items()},
              folder / "step_00001_rank_0.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | dict(step_prompts=[prompts])))
    return draws | result

def test_replay_of_a_foreign_record(tiny, tmp_path):
    """A record by plain Python that cannot be replayed, or whose prompts, names or shapes are not
    looked at: the wrong prompts, `rewards.0` and a wrong velocity were called OK."""
    settings = dict(steps=1, num_prompts=1, sampling_steps=4, dtype="fp32", text_length=8)
    tensors, file = foreign_record(tiny, tmp_path / "A", settings), "step_00001_rank_0.safetensors"
    status, rows, end = replay(tmp_path / "A")
    assert (status, end) == (0, ["replay OK"])
    assert all(row[-1] == "OK" for row in rows.values())
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}

    def spoil(change, **info):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        save_file(changed, tmp_path / "A" / file)
        (tmp_path / "A" / "config.json").write_text(json.dumps(
            settings | dict(step_prompts=[["a blue cross"]]) | info))

    spoil({"velocity.2": tensors["velocity.2"] + 1e-2})
    status, _, end = replay(tmp_path / "A")
    assert status == 3 and end[0].startswith("first OFF: step 1, rank 0, stage velocity;")
    spoil({name: None for name in tensors if "." in name})
    assert replay(tmp_path / "A")[::2] == (0, ["replay without results to compare"])
    for change, info, words in (
            ({"rewards.0": torch.ones(12) + 1}, {}, "nothing reads rewards.0"),
            ({}, dict(guidance_scale=3.5), "nothing reads guidance_scale"),
            ({}, dict(step_prompts=[]), "step_prompts"),
            ({"velocity.0": torch.ones(12, 16, 8)}, {}, r"velocity.0 \(12, 16, 8\): must be"),
            ({"reward.0": torch.ones(11)}, {}, r"reward.0 \(11,\): must be \(12,\)"),
            ({"coff_5_0": None}, {}, "coff_5_0 is missing")):
        spoil(change, **info)
        with pytest.raises(BadInput, match=words) as refusal:
            grpo_flux.main(["--replay", str(tmp_path / "A"), "--device", "cpu"])
        assert "--reward" not in str(refusal.value) and "--steps" not in str(refusal.value)

def test_replay_finds_a_changed_weight(record, monkeypatch):
    """One weight of 1.85 million that is off by 0.001."""
    def load_transformer(*args, load=grpo_flux.load_transformer):
        transformer = load(*args)
        transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] += 1e-2
        return transformer

    monkeypatch.setattr(grpo_flux, "load_transformer", load_transformer)
    status, rows, end = replay(record, "--deterministic")
    assert float(rows["text"][3]) == 0 < float(rows["velocity"][3])

def test_replay_finds_a_changed_reward(record, monkeypatch):
    """A reward that is off by 0.02 %, of the same images."""
    monkeypatch.setattr(reward.HPS, "__call__",
                        lambda *args, call=reward.HPS.__call__: call(*args) * 1.0002)
    status, rows, end = replay(record)
    assert end[0].startswith("first OFF: step 1, rank 0, stage reward;")
    assert (status, end[1]) == (3, "replay OFF")
    assert float(rows["reward"][3]) == pytest.approx(2e-4, rel=0.05)

def test_replay_finds_a_wrong_rotary_embedding(record, monkeypatch):
    """Images turn into noise while loss and ratio look right: pairs that are halves of a head
    where FLUX has neighbours, in rollout and update alike."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", partial(
        transformer_flux.apply_rotary_emb, use_real_unbind_dim=-2))
    status, rows, end = replay(record)
    assert end[0].startswith("first OFF: step 1, rank 0, stage velocity;") and status == 3
    assert rows["loss"][-1] == "OK" and float(rows["velocity"][3]) > 0.05
    assert rows["images"][-1] == "OFF" and rows["reward"][-1] == "OK"  # given the recorded images

@pytest.mark.parametrize("seed", range(2))
def test_replay_in_bf16_forgives_rounding_alone(tiny, tmp_path, seed, monkeypatch):
    """A correct port called OFF, as after the first optimizer step a ratio at the clip flips and
    AdamW amplifies it; or, if more is allowed, a wrong one called OK."""
    flags = ("--steps 2 --num_prompts 1 --num_generations 6 --batch_size 2 --sampling_steps 16 "
             "--eta 0.3 --learning_rate 1e-5 --dtype bf16 --device cpu --eval_images 2 --seed")
    record = tmp_path / "A"
    grpo_flux.main([*flags.split(), str(seed), "--record", str(record), "--out",
                    str(tmp_path / "run")])
    status, rows, end = replay(record, "--attention", "_native_math")
    tiny.policy.transformer.set_attention_backend("native")  # diffusers keeps one for all models
    assert (status, end) == (0, ["replay OK"]) and int(rows["loss"][1]) == 2
    assert float(rows["velocity"][3]) > 0  # another kernel, indeed
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", partial(
        transformer_flux.apply_rotary_emb, use_real_unbind_dim=-2))
    assert replay(record)[1]["velocity"][-1] == "OFF"

def test_compare_two_runs(tmp_path, capsys):
    """A mean over everything that hides ten bad steps; steps that only one run has."""
    def run(name, rewards):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / name / "images" / "step_00000.png")
        lines = [dict(step=i + 1, reward=r, reward_std=0.1, loss=1e-6)
                 for i, r in enumerate(rewards)]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in [dict(step=0, held_out=0.5), *lines]))
        return str(tmp_path / name)

    runs = [run(*each) for each in (("a", [0.5] * 40), ("b", [0.5] * 10 + [0.52] * 20),
                                    ("c", [0.5] * 10 + [0.53] * 10))]
    for other, status, words in ((runs[1], 0, "+2.67%"), (runs[2], 3, "+6.00%")):
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
    assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert torch.npu.conv.allow_hf32 is torch.npu.matmul.allow_hf32 is False

def test_the_tiny_start_is_miscaptioned():
    """A start that listens already, or whose share of wrong captions is not what it says."""
    labels = torch.arange(24_000) % 24
    captions = grpo_flux.miscaption(labels, grpo_flux.MISCAPTIONED)
    assert (captions != labels).float().mean().item() == pytest.approx(0.6 * 23 / 24, abs=0.01)
    wrong = captions[captions != labels].bincount(minlength=24)
    assert wrong.min() > 0.8 * wrong.float().mean()

def test_judge_of_the_tiny_world():
    """A judge that calls a drawn picture wrong, or another prompt's right."""
    images, labels = reward.tiny_dataset(480, seed=7)
    prompts = [reward.TINY_PROMPTS[i] for i in labels]
    judged = reward.judge_tiny(images, prompts, {})
    assert judged.keys() == RIGHT
    assert all(value.mean() == 1 for value in judged.values())
    turn = {name: names[i - 1] for names in (list(reward.COLORS), list(reward.SHAPES))
            for i, name in enumerate(names)}
    swapped = [" ".join(turn.get(word, word) for word in prompt.split()) for prompt in prompts]
    assert all(not value.any() for value in reward.judge_tiny(images, swapped, {}).values())
    empty = torch.ones(1, 3, 32, 32) * torch.tensor(reward.BACKGROUND).view(3, 1, 1) / 255
    assert not any(value.any() for value in reward.judge_tiny(empty, TWO[:1], {}).values())

# ------------------------------------------------------------------------------------------ reward

@pytest.mark.parametrize("height, width", [(720, 720), (512, 768), (224, 90)])
def test_preprocessing_of_hps(height, width):
    """A crop where HPS pads, no antialias, a resize by another library: scores drift unseen."""
    image, canvas = torch.randint(256, (1, 3, height, width)) / 255, torch.zeros(1, 3, 224, 224)
    size = [round(side * 224 / max(height, width)) for side in (height, width)]  # officially
    top, left = (224 - size[0]) // 2, (224 - size[1]) // 2
    canvas[..., top:top + size[0], left:left + size[1]] = TF.resize(
        image, size, TF.InterpolationMode.BICUBIC, antialias=True)
    expected = TF.normalize(canvas, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert torch.equal(reward.preprocess(image), expected)

def test_hps_is_the_cosine_of_open_clip(tiny):
    """Prompts of two groups mixed up, features that are not of length 1, a logit scale left in."""
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "a blue cross", "a red circle"]
    model = open_clip.create_model("tiny-clip").eval()
    model.load_state_dict(torch.load(tiny.cfg.hps)["state_dict"])
    with torch.no_grad():
        a = model.encode_image(reward.preprocess(images, 32))
        b = model.encode_text(open_clip.get_tokenizer("tiny-clip")(prompts))
    assert torch.allclose(tiny.hps(images, prompts), torch.cosine_similarity(a, b), atol=1e-5)

@pytest.fixture(scope="session")
def pick(tmp_path_factory):
    """A folder with a small random CLIP in PickScore's format, with letters for tokens."""
    folder, ends = tmp_path_factory.mktemp("pick"), ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(i) + end for end in ("", "</w>") for i in range(97, 123)] + ends
    vocab = {letter: i for i, letter in enumerate(letters)}
    transformers.CLIPTokenizer(vocab, merges=[], model_max_length=16).save_pretrained(folder)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = size | dict(vocab_size=54, max_position_embeddings=16, bos_token_id=52, eos_token_id=53)
    config = transformers.CLIPConfig(text_config=text, projection_dim=16, vision_config=size | dict(
        image_size=32, patch_size=8))
    transformers.CLIPModel(config).half().save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize("height, width", [(32, 32), (720, 720), (51, 768), (100, 37), (31, 57)])
def test_pickscore_is_that_of_transformers(height, width, pick):
    """A side rounded, a crop off by one, features not projected, a scale of 100 left in, prompts
    of a batch mixed up, padding that is attended to, weights kept in fp16."""
    images = torch.randint(256, (3, 3, height, width)) / 255
    prompts = ["blue", "a red circle with a long tail", "blue"]
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        transformers.AutoTokenizer.from_pretrained(pick))
    inputs = processor(images=list(images), text=prompts, do_rescale=False, return_tensors="pt",
                       padding=True, truncation=True, max_length=16)
    pixels, close = reward.preprocess(images, 32, crop=True), dict(rtol=0, atol=1e-6)
    assert torch.allclose(pixels, inputs["pixel_values"], **close)
    with torch.no_grad():
        out = transformers.CLIPModel.from_pretrained(pick, dtype=torch.float32)(**inputs)
    expected, score = (out.image_embeds * out.text_embeds).sum(-1), reward.PickScore(pick)
    assert torch.allclose(score(images, prompts), expected, **close)
    assert torch.allclose(score(images[1:2], prompts[1:2]), expected[1:2], **close)

@pytest.mark.parametrize("part", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pickscore_that_lacks_a_part(part, pick, tmp_path):
    """Weights or words that transformers makes up at random where there are none."""
    for file in Path(pick).iterdir():
        if file.name != part:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="--pickscore .*: must be transformers' CLIP model"):
        reward.PickScore(str(tmp_path))

def test_checkpoints_of_others(tiny, tmp_path):
    """Weights refused for how they were saved; code that runs out of a file; a message that does
    not say what is in the way; another model's mean and std."""
    state, images = torch.load(tiny.cfg.hps)["state_dict"], torch.rand(2, 3, 40, 32)
    prefixed, file = {f"module.{name}": x for name, x in state.items()}, tmp_path / "clip.pt"
    numbers = dict(loss=np.float64(0.3), epoch=np.int64(3), half=np.float16(1), done=np.bool_(True))
    expected = tiny.hps(images, ["a", "b"])
    for saved in (prefixed, {"model": state}, {"state_dict": prefixed} | numbers,
                  {name: x.half() for name, x in state.items()}):
        torch.save(saved, file)
        hps = reward.HPS(file, tiny.cfg.hps_arch)
        assert torch.allclose(hps(images, ["a", "b"]), expected, atol=1e-3)
        assert {p.dtype for p in hps.model.parameters()} == {torch.float32}
    for saved, words in (({"state_dict": state, "args": argparse.Namespace()}, "Namespace"),
                         ([state], "weights of --clip_arch"), ({"model": {1: 2}}, "weights of")):
        torch.save(saved, file)
        with pytest.raises(BadInput, match=f"(?s)--clip .*clip.pt: .*{words}"):
            reward.HPS(file, tiny.cfg.hps_arch, flag="--clip")
    assert reward.new_clip("MobileCLIP-S1")[0].visual.image_mean == (0, 0, 0)  # as all its weights

def test_weights_from_the_hub(tmp_path, monkeypatch):
    """Half a minute and five lines of retries, a traceback, or a message without flag or remedy;
    a file in the cache that is not found offline; a folder's name taken for a file's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"--hps \(not given\): .*no connection; .* path with --hps"):
        reward.resolve_weights("--hps", "")
    folder = tmp_path / "models--owner--name"
    cached = folder / "snapshots" / "1" / "a.pt"
    for file, text in ((folder / "refs" / "main", "1"), (cached, "")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert reward.resolve_weights("--clip", "owner/name/a.pt") == str(cached)
    session = types.SimpleNamespace(head=lambda *args, **options: None)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    download = mock.Mock(side_effect=OSError(28, "No space left"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(BadInput, match=r"--clip o/n/a.pt: .*correct.*licence on https.*No space"):
        reward.resolve_weights("--clip", "o/n/a.pt")
    download.assert_called_once_with("o/n", "a.pt", local_files_only=False)
    for flag, value in (("--clip", "x.pt"), ("--clip", "a/b"), ("--clip", "/x/a.pt"),
                        ("--pickscore", "a/b/c")):
        with pytest.raises(BadInput, match=f"{flag} {value}: not found; must be a f"):
            reward.resolve_weights(flag, value)

def test_reward_specs():
    """A weight dropped without a word; a reward of weight 0 refused; a run without any reward."""
    assert reward.parse_rewards("hps:0.7,clip:0.3") == {"hps": 0.7, "clip": 0.3}
    assert reward.parse_rewards("hps:0, my.rewards:f:2") == {"hps": 0.0, "my.rewards:f": 2.0}
    for bad in ("", "hsp", "hps:", "hps:-1", "hps,hps", "hps:1.2.3", "a:b:c", "hps:0,a:f:0"):
        with pytest.raises(BadInput, match="must be"):
            reward.parse_rewards(bad)

SPOILER = """import signal, sys, warnings, torch
def spoil():
    sys.path[:], sys.argv[1:] = [], ["spoiled"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
spoil()
def f(images, prompts):
    import spoiler_late
    spoil()
    images.zero_()
    return [len(prompts.pop())] * 2"""

def test_own_rewards_spoil_nothing(tmp_path, monkeypatch):
    """One reward that changes the images, prompts or settings of all others and of the run."""
    def settings():
        return (list(sys.path), list(sys.argv), signal.getsignal(signal.SIGTERM),
                list(warnings.filters), torch.get_default_dtype(), torch.get_default_device(),
                torch.is_grad_enabled())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    Path("spoiler.py").write_text(SPOILER)
    Path("spoiler_late.py").touch()
    before, images, prompts = settings(), torch.ones(2, 3, 4, 4), ["a", "bc"]
    function = reward.load_reward("spoiler:f")
    assert settings() == before
    rewards = {"spoiler:f": (0.0, function), "g": (1.0, lambda x, p: x.sum((1, 2, 3)) + len(p))}
    scores = reward.score(rewards, images, prompts, "step 1")
    assert settings() == before and images.min() == 1 and prompts == ["a", "bc"]
    assert {name: r.tolist() for name, r in scores.items()} == {"spoiler:f": [2, 2], "g": [50, 50]}

@pytest.mark.parametrize("module, text, words", [
    ("own_exit", "import sys; sys.exit('bye')", "calls sys.exit .*bye"),
    ("own_parser", "import argparse as a\np = a.ArgumentParser()\np.add_argument('--x', required=1)"
     "\np.parse_args()", "parses arguments"), ("own_async", "async def f(i, p): pass", "async"),
    ("json", "def f(i, p): pass", "rename"), ("reward", "def f(i, p): pass", "rename"),
    ("own_number", "f = 3", "of type int"), ("own_none", "", "no attribute 'f'"),
    ("own_syntax", "def", "SyntaxError")])
def test_own_rewards_refused(module, text, words, tmp_path, monkeypatch, capsys):
    """A traceback, argparse's usage, the end of the program, another module of the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    Path(f"{module}.py").write_text(text)
    with pytest.raises(BadInput, match=f"^--reward {module}:f: .*{words}"):
        reward.load_reward(f"{module}:f")
    assert "".join(capsys.readouterr()) == ""

def out_of_memory(images, prompts):
    raise torch.OutOfMemoryError("of the device")

@pytest.mark.parametrize("function, error, words", [
    (lambda i, p: i, BadInput, r"--reward x: .*2 finite numbers .* in step 3, .*\(2, 3, 4, 4\)"),
    (lambda i, p: 1 / 0, BadInput, "Zero"), (lambda i, p: sys.exit(1), BadInput, "SystemExit"),
    (lambda i, p: [1.0, float("nan")], BadInput, r"in step 3, prompts 'a' .*\[1.0, nan\]"),
    (out_of_memory, torch.OutOfMemoryError, "^of the device"),
    (None, FloatingPointError, "step 3")])
def test_scores_refused(function, error, words):
    """Scores of another shape, or nan, that end in the weights; the end of a run without a word."""
    images = torch.full((2, 3, 4, 4), 0.5 if function else float("inf"))
    with pytest.raises(error, match=words):
        reward.score({"x": (1.0, function)}, images, ["a", "b"], "step 3")

ROWS = [dict(id=1, prompt="a cat, red"), dict(id=2, prompt='a "dog"')]

@pytest.mark.parametrize("text", [
    json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n".join(map(json.dumps, ROWS)),
    json.dumps([row["prompt"] for row in ROWS]),
    'id,Prompt\n1,"a cat, red"\n2,"a ""dog"""\n', 'caption\tn\na cat, red\t1\n"a ""dog"""\t2\n',
    '"prompt"\n"a cat, red"\n"a ""dog"""\n'])
def test_prompts_in_other_formats(text, tmp_path):
    """Braces, quotes and columns trained on as prompts; a remedy that does not work."""
    (tmp_path / "x.dat").write_text(text)
    must = "^--prompts .*x.dat: is (JSON|CSV or TSV); must be"
    with pytest.raises(BadInput, match=must) as error:
        reward.read_prompts(tmp_path / "x.dat")
    command = str(error.value).split("such as from: ")[1].replace("python", sys.executable)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert reward.read_prompts(tmp_path / "prompts.txt") == ["a cat, red", 'a "dog"']

@pytest.mark.parametrize("lines", [
    ["[a cat], red", "{red|blue} car"], ['"quoted"', '"a, b"'], ["1", "true"], ["text"],
    ["text, bold, 4k", "a cat, red"], ["a\ttab", "a prompt"], ["x" * 200_000],
    ["[" * 100_000, "a;b"]])
def test_prompts_that_look_like_other_formats(lines, tmp_path):
    """Prompts with brackets, quotes, commas, tabs refused as JSON or CSV."""
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert reward.read_prompts(tmp_path / "prompts.txt") == lines

def test_atomic_write(tmp_path):
    """Half a file under its name; a folder that a crash takes away; ranks that remove each other's
    files; a leftover of an earlier crash in the result; half a folder that is being removed."""
    for name in ("writing-x", "old-x", "x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "before").touch()
    with pytest.raises(KeyboardInterrupt), reward.atomic_write(tmp_path / "x") as path:
        path.mkdir()
        raise KeyboardInterrupt
    assert (tmp_path / "x" / "before").exists() and not path.exists()
    with reward.atomic_write(tmp_path / "x") as path:
        path.mkdir()
        with reward.atomic_write(tmp_path / "x", rank=1) as other:
            (other / "shard").touch()
        with pytest.raises(OSError), reward.atomic_write(tmp_path / "x", rank=1):
            raise OSError
        assert path == other and path.exists()
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["x", "x/shard"]
    killed = mock.patch("shutil.rmtree", side_effect=[0, KeyboardInterrupt])
    with killed, pytest.raises(KeyboardInterrupt):
        reward.remove(tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["old-x"]
    reward.remove(tmp_path / "old-x")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("given, used", [(None, "1200"), ("300", "300")])
def test_npus(given, used, monkeypatch):
    """HCCL's 120 s, too few for a slow disk; a setting of the user's that is overwritten; counts of
    processes that HCCL fails over, and a missing compiler, noticed after hours."""
    npu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 8)
    monkeypatch.setattr("torch.npu", npu, raising=False)
    monkeypatch.setattr("torch.device", lambda *args: types.SimpleNamespace(type="npu", args=args))
    environment = dict(LOCAL_RANK="1") | (dict(HCCL_CONNECT_TIMEOUT=given) if given else {})
    monkeypatch.setattr("os.environ", environment)
    assert reward.select_device("npu").args == ("npu", 1)
    assert environment["HCCL_CONNECT_TIMEOUT"] == used
    for size in (3, 5, 6, 7):
        environment["LOCAL_WORLD_SIZE"] = str(size)
        with pytest.raises(BadInput, match=f"--nproc_per_node {size}: must be 1, 2, 4, 8"):
            reward.select_device("npu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="--compile: .*triton-ascend"):
        reward.check_compile("npu")

# ------------------------------------------------------------------------- scoring from a command

def score_lines(tiny, capsys, *flags):
    """The lines that reward.py prints for flags: {path: score}, in their order."""
    flags = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu", *flags]
    reward.main([str(flag) for flag in flags])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {Path(path).name: float(value) for value, path in lines}

def test_pictures_as_people_have_them(tiny, tmp_path, capsys):
    """A photo that lies on its side, black for transparent, formats or hidden files of a folder
    taken for something else; scores beside the wrong file."""
    rng = np.random.default_rng(0)
    red, blue = (Image.fromarray(reward.draw(p, rng)) for p in ("a red circle", "a blue cross"))
    exif, clear = Image.Exif(), red.convert("RGBA")
    exif[274] = 6  # to be turned to the right
    clear.putalpha(Image.fromarray((np.asarray(red) != (236, 236, 230)).any(-1)).convert("L"))
    white = Image.new("RGBA", clear.size, "white")
    white.paste(clear, mask=clear)
    pictures = {"red.png": red, "blue.png": blue, "red.gif": red.quantize(), "red.tiff": red,
                "grey.png": red.convert("L"), "wide.png": red.resize((64, 32)), "clear.png": clear,
                "white.png": white.convert("RGB"), "red.jpg": red, ".hidden.png": red}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    red.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    (tmp_path / "red.jpg").rename(tmp_path / "red.jfif")
    (tmp_path / "notes.txt").touch()
    scores = score_lines(tiny, capsys, "--prompt", "a red circle", "--batch", 2, tmp_path)
    assert len(scores) == 10 and {"side.png", "red.gif", "red.jfif"} < scores.keys()
    assert scores["red.png"] == scores["red.tiff"] == scores["side.png"] > scores["blue.png"] + 0.2
    assert scores["clear.png"] == scores["white.png"] != scores["red.png"] != scores["grey.png"]
    files = reward.find_pictures([tmp_path / ".hidden.png", tmp_path])
    assert files[0].name == ".hidden.png"  # asked for by name
    assert "left out 2, hidden or no picture: .hidden.png, notes.txt" in capsys.readouterr().err

def test_reward_command_line(tiny, tmp_path, capsys, monkeypatch, pick):
    """Names without words as prompts; a reward of the user's, or PickScore, that is not called; a
    terminal that cannot print a name."""
    name = os.fsdecode(b"0_a_caf\xc3\xa9\xff.png")
    Image.fromarray(reward.draw("a red circle", np.random.default_rng(0))).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("own_light.py").write_text("def f(images, prompts):\n    return [len(p) for p in prompts]")
    assert list(score_lines(tiny, capsys, "--reward", "own_light:f", tmp_path).values()) == [6]
    score = reward.PickScore(pick)(reward.read_image(name), ["a"]).item()
    printed = score_lines(tiny, capsys, "--reward", "pickscore", "--pickscore", pick, "--prompt",
                          "a", tmp_path)
    assert list(printed.values()) == [pytest.approx(score, abs=1e-5)]
    with pytest.raises(SystemExit):
        Path(name).rename("0001.png")
        score_lines(tiny, capsys, tmp_path)
    assert "--prompt (not given)" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdout", argparse.Namespace(encoding="ascii"))
    assert reward.printable(name + "\x1b\u4e2d") == r"0_a_caf\xe9\udcff.png\x1b\u4e2d"

def test_scores_of_two_devices(tiny, tmp_path, capsys):
    """Pictures 0, 1, 10, 11, 2, each with another's prompt; scores compared with those of another
    picture or prompt; an error that is not relative."""
    folder, prompts, saved = tmp_path / "x", reward.TINY_PROMPTS[:12], tmp_path / "scores.jsonl"
    folder.mkdir()
    for i, prompt in enumerate(prompts):
        picture = reward.draw(prompt, np.random.default_rng(0), size=32 + 16 * (i == 2))
        Image.fromarray(picture).save(folder / f"{i}_{prompt.replace(' ', '_')}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    score_lines(tiny, capsys, folder, "--save", saved)
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    for line, prompt in zip(lines, prompts, strict=True):
        alone = tiny.hps(reward.read_image(folder / line["image"]), [prompt]).item()
        assert line["prompt"] == prompt and line["score"] == pytest.approx(alone, abs=1e-6)
    for factor, status in ((1.000146, 0), (1.000152, 3)):
        scaled = [json.dumps(line | dict(score=line["score"] * factor)) for line in reversed(lines)]
        saved.write_text("\n".join(scaled))
        with pytest.raises(SystemExit) as end:
            score_lines(tiny, capsys, folder, "--against", saved, "--prompts",
                        tmp_path / "prompts.txt")
        assert end.value.code == status
        assert capsys.readouterr().out.endswith(f"reward {'OFF' if status else 'OK'}\n")
    with pytest.raises(SystemExit):
        score_lines(tiny, capsys, folder, "--against", saved, "--prompt", "a red circle")
    assert "--against" in capsys.readouterr().err

# ---------------------------------------------------------------------------------- what goes wrong

with warnings.catch_warnings():  # pytest wants a file of its own for the names of marks
    warnings.simplefilter("ignore")
    faults = pytest.mark.faults

@pytest.fixture
def heavy(request):
    """For what takes minutes: only when it is asked for."""
    if "faults" not in request.config.option.markexpr:
        pytest.skip("python -m pytest -m faults test_grpo_flux.py runs this, too")

JUDGES = b"""import torch
number, calls = 3, []
def nan(images, prompts): return torch.tensor([0.0, float("nan")] * (len(images) // 2))
def later(images, prompts):
    calls.append(1)
    return images.mean((1, 2, 3)) / (len(calls) < 4)
"""
FILES = {
    "judges.py": JUDGES, "syntax.py": b"def", "exits.py": b"raise OSError('no licence')",
    "one.txt": b"a red circle", "empty.txt": b"\n \n", "binary.txt": b"\xff\xd8",
    "utf16.txt": "a".encode("utf-16-le"), "p.json": json.dumps(TWO).encode(),
    "p.jsonl": b'{"prompt": "a"}\n{"prompt": "b"}\n', "p.csv": b'id,prompt\n1,"a, b"\n2,c\n'}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 424\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"

MODELS = {  # a copy of the tiny FLUX: (file or folder, what it becomes, words of the message)
    "fill": ("model_index.json", {"_class_name": "FluxFillPipeline"}, "it is a FluxFillPipeline"),
    "kontext": ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "FluxKontextPipeline"),
    "quantized": ("transformer/config.json", {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
    "fp16": (f"transformer/{WEIGHTS}", "a.fp16.safetensors", "a variant such as fp16"),
    "fp16_text": ("text_encoder/model.safetensors", "model.fp16.safetensors", "such as fp16"),
    "pickled": (f"vae/{WEIGHTS}", "diffusion_pytorch_model.bin", WEIGHTS),
    "cut": (f"transformer/{WEIGHTS}", b"", "its files whole"),
    "cut_config": ("vae/config.json", b"{", "config"),
    "pointer": ("tokenizer_2/tokenizer.json", POINTER, "git lfs pull"),
    "no_words": ("tokenizer/tokenizer.json", None, "2 tokens, its encoder"),
    "no_words_2": ("tokenizer_2/tokenizer.json", None, "4 tokens, its encoder"),
    "no_vae": ("vae", None, "vae"), "no_tokenizer": ("tokenizer_2", None, "104 tokens, its"),
    "no_shard": (f"transformer/{WEIGHTS}.index.json", b'{"metadata": {}, "weight_map": {"x": '
                 b'"part-00002-of-00003.safetensors"}}', "part-00002")}
RECORDS = dict(  # the name of a tensor, or settings
    record={}, name=dict(name="rewards.0"), setting=dict(sde_of_2030=1), text=dict(seed="a"),
    no=dict(step_prompts=[]), few=dict(num_prompts=2), null=dict(step_prompts=None), ranks={},
    long=dict(steps=2), zero=dict(steps=0), shape=dict(name="input_latents_1_0"), cut={})
RUNS = dict(run={}, lora=dict(lora_rank=4), seed=dict(seed=7), other=dict(model="FLUX.1-dev"),
            null=dict(model=None), cut={}, lost={})

def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def write_info(folder, tensors, file, **info):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps({"model": "tiny"} | info))

@pytest.fixture(scope="session")
def mess(tiny, tmp_path_factory):
    """A folder full of files with something wrong."""
    folder = tmp_path_factory.mktemp("mess")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name, (file, change, _) in MODELS.items():
        path = Path(shutil.copytree(tiny.cfg.model, folder / name)) / file
        if isinstance(change, dict):
            change_json(path, **change)
        elif isinstance(change, bytes):
            path.write_bytes(change)
        elif change:
            path.rename(path.with_name(change))
        else:
            reward.remove(path)
    for name, info in RECORDS.items():
        info = dict(steps=1, num_prompts=1, step_prompts=[TWO[:1]]) | info
        tensors, file = {info.pop("name", "loss.0"): torch.ones(1, 4, 4, 4)}, "step_00001_rank_{}"
        for rank in range(1 + (name == "ranks")):
            write_info(folder / f"{name}_tape", tensors, f"{file.format(rank)}.safetensors", **info)
    for name, info in RUNS.items():
        for step in range(3, 5):
            write_info(folder / f"{name}_run", {"weights.x": torch.ones(4)},
                       f"checkpoints/step_0000{step}/x.safetensors",
                       **asdict(settings()) | {"model": "tiny"} | info)
    for file in ("cut_tape/step_00001_rank_0", "cut_run/checkpoints/step_00004/x"):
        os.truncate(folder / f"{file}.safetensors", 80)
    (folder / "lost_run" / "config.json").unlink()
    (folder / "cache" / f"tiny-{grpo_flux.TINY_VERSION}").mkdir(parents=True)
    (folder / "busy").mkdir()
    return folder

def table(cases):
    return [(f"--{name} {value}", words) for words, flags in cases.items()
            for name, value in (flag.split("=") for flag in flags.split())]

# (flags, words of the message): refused before a process group, a device or a model is touched
EARLY = [
    *table({
        "from 1 to": "steps=0 steps=99999999999 num_prompts=-2 micro_batch=0 save_every=0 "
                     "keep_last=0 eval_every=0 eval_images=0 text_length=513 batch_size=0",
        "from 0 to": "seed=4294967296 lora_rank=-1 kl_beta=nan ema_decay=1 guidance=nan "
                     "weight_decay=-1 window_shift_every=-1 gradient_checkpointing=2 sde_window=-1",
        "must be from": "eta=0 eta=inf learning_rate=nan shift=0 width=8 clip_range=0 height=99999 "
                        "adv_clip_max=inf max_grad_norm=0 lora_alpha=0 timestep_fraction=1.5",
        "from 2 to": "num_generations=1 sampling_steps=1", "below": "sde_window=8",
        "invalid int": "steps=1e3 seed=0.5", "invalid float": "eta=much",
        "must divide the": "batch_size=9 batch_size=6 batch_size=96 num_generations=11",
        "must be one of": "sde=ddpm dtype=fp16 device=tpu", "multiple of 16": "height=40 width=721",
        "hps, clip, pickscore or": "reward=hsp reward=hps,hps reward=,", "above 0": "reward=hps:0",
        "function": "reward=hps:nan reward=judges:none reward=nothing_here:f reward=syntax:f "
                    "reward=judges:number reward=exits:f",
        "text file in UTF-8": "prompts=none.txt prompts=binary.txt prompts=utf16.txt prompts=busy",
        "is empty": "prompts=empty.txt", "new folder": "record=run_run",
        "> prompts.txt": "prompts=p.json prompts=p.jsonl prompts=p.csv",
        "folder of --record": "replay=. replay=none replay=text_tape",
        "nothing reads rewards.0 in step_00001_rank_0": "replay=name_tape",
        "with --replay zero_tape": "replay=zero_tape", "rank_0.safetensors": "replay=cut_tape",
        "nothing reads sde_of_2030": "replay=setting_tape", "--steps 2": "replay=long_tape",
        "must have step_prompts": "replay=no_tape replay=few_tape replay=null_tape",
        "of as many processes, 1": "replay=ranks_tape",
        "whole folder such as": "resume=nowhere resume=run_run out=cut_run out=lost_run "
                                "resume=cut_run/checkpoints/step_00004",
        "must be 4": "out=lora_run", "must be 7": "out=seed_run", "must be None": "out=null_run",
        "must be FLUX.1-dev": "out=other_run"}),
    ("--steps", "one argument"), ("--step 3", "unrecognized"), ("3", "unrecognized"),
    ("--resume none --out run_run", "holds a run"), ("--out run_run --steps 2", "at least 4"),
    ("--resume run_run/checkpoints/step_00003 --out run_run", "has gone on to"),
    ("--record a --replay record_tape", "one of them"), ("--compare run_run .", "two runs"),
    ("--model a/b", "--prompts (not given)"), ("--compare run_run", "2 arguments"),
    ("RANK=0 WORLD_SIZE=8 --num_prompts 1 --batch_size 12", "number of processes, 8")]

# refused by what must be opened, or called, to know; without --hps the tiny one
LATE = [
    *table({
        "CANN": "device=npu", "CUDA build": "device=cuda", "new folder": "record=one.txt/x",
        "not found; must be a file": "hps=none.pt", "can be written to": "cache=one.txt",
        f"cache/tiny-{grpo_flux.TINY_VERSION}": "cache=cache",
        "error: --attention x: diff": "attention=x",
        "written to, and that no other": "out=one.txt out=one.txt/x out=/proc/x out=busy",
        "not of this policy": "out=run_run", "in step 3, prompts 'a": "reward=judges:later",
        "in the evaluation of step 0, prompts 'a red circle'": "reward=judges:nan",
        "(1, 4, 4, 4): must be (1, 4, 8, 8)": "replay=shape_tape",
        "input_latents_1_0 is missing": "replay=record_tape"}),
    ("RANK=0", "not all of torchrun's"), ("RANK=0 WORLD_SIZE=1", "not all of torchrun's"),
    *((f"--model {name} --prompts one.txt {{hps}}", words) for name, words in [
        *((name, words) for name, (*_, words) in MODELS.items()), ("a/b", "hf auth login"),
        *((name, "a folder or hub name") for name in ("nowhere", ".", "\x1b[31mred"))])]

@faults
@pytest.mark.parametrize("late, flags, words", [
    *((False, *row) for row in EARLY), *((True, *row) for row in LATE)])
def test_refused_in_one_line(late, flags, words, tiny, mess, tmp_path, monkeypatch, capfd):
    """A traceback, or hours of training on half a file, in the place of one line about the flag; a
    download that ends in a traceback; two runs that write into one folder."""
    monkeypatch.chdir(mess)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delattr("torch.npu", raising=False)
    given = flags.format(hps=f"--hps {tiny.cfg.hps} --hps_arch {tiny.cfg.hps_arch}").split(" ")
    environment = [word for word in given if re.match("[A-Z_]+=", word)]
    for word in environment:
        monkeypatch.setenv(*word.split("="))
    argv = [word for word in given if word not in environment]
    if late:
        argv += f"--out {tmp_path}/out".split() if "--out" not in argv else []
        argv += "--device cpu".split() if "--device" not in argv else []
        short = "--eval_images 4 --num_prompts 1 --batch_size 12"
        argv += short.split() if "--replay" not in argv else []
    else:
        monkeypatch.setattr(grpo_flux, "init_distributed", lambda _: pytest.fail("was not at once"))
    with FileLock("busy/lock"), pytest.raises(SystemExit) as end:
        try:
            grpo_flux.main(argv)
        except BadInput as problem:
            reward.exit_with_error(problem)
    *before, line = capfd.readouterr().err.splitlines()
    assert words in line and line.startswith("error: ") and line.isprintable()
    assert end.value.code == 2 and not any("Traceback" in text for text in before)
    assert any(word in line for word in [*given, "(not given)", "RANK"])

@job
def strange_place(folder):
    """A run where much is strange or broken around it, and one without docstrings."""
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "__init__.py").write_text("raise TypeError('no descriptors')")
    (folder / "prompts.txt").write_text("ein grüner Bär\n\U0001f600", encoding="utf-8")
    environment = {name: x for name, x in os.environ.items() if name not in ("HOME", "LANG")}
    environment |= dict(
        MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONPATH=str(folder),
        PYTHONOPTIMIZE="1", LC_ALL="C", PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1",
        SLURM_PROCID="1", SLURM_NTASKS="4", SLURM_LOCALID="1", WORLD_SIZE="4", LOCAL_RANK="1")
    flags = [str(HERE / "grpo_flux.py"), *SHORT, "--prompts", "prompts.txt", "--out", "run"]
    return [subprocess.run([sys.executable, *python, *flags], cwd=folder, env=environment,
                           capture_output=True, text=True) for python in ([], ["-OO"])]

@faults
def test_surroundings(strange_place):
    """A run that ends late because of its terminal, TensorBoard, environment or stripped docs."""
    done, refused = strange_place
    assert "no TensorBoard (TypeError" in succeed(done) and "look at run" in done.stdout
    assert "ein gr\\xfcner B\\xe4r" in done.stdout and "Traceback" not in done.stderr
    assert refused.returncode == 2 and re.fullmatch("error: PYTHONOPTIMIZE 2.*\n", refused.stderr)

@faults
def test_other_models_and_prompts(tiny, tmp_path, capfd):
    """FLUX.1-schnell refused, given guidance, or trained in one of four steps; a scheduler's folder
    that nothing reads. A prompt that names a file, steers the terminal, or is as long as a book; a
    replay that wants the file of prompts, though they are in the record."""
    model = Path(shutil.copytree(tiny.cfg.model, tmp_path / "models" / "FLUX.1-schnell"))
    shutil.rmtree(model / "scheduler")
    change_json(model / "transformer" / "config.json", guidance_embeds=False)
    file, prompts, tape = model / "transformer" / WEIGHTS, tmp_path / "p.txt", tmp_path / "tape"
    save_file({name: x for name, x in load_file(file).items() if "guidance" not in name}, file)
    prompts.write_text("\n".join([
        "\x1b[31mred\x1b]0;title\x07", "../../etc/passwd", "/abs/path\\..", "$(rm -rf .)", "'\";--",
        "\U0001f600\u202eabc\x85\u2028", "$x^{", "%s {step} {0}", "a red circle " * 8_000]))
    sizes = [f"--{name}={value}" for name, value in grpo_flux.TINY.items() if value]
    grpo_flux.main([*sizes, *SHORT, *map(str, [
        "--model", model, "--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--prompts",
        prompts, "--eval_images", 9, "--shift", 1, "--record", tape, "--out", tmp_path / "run"])])
    printed = "".join(capfd.readouterr())
    assert "3 of 4 denoising steps trained" in printed and r"\x1b[31mred" in printed
    assert "\x1b[31m" not in printed and "\x07" not in printed and "of 9 prompts are" in printed
    assert not results(tmp_path / "run")[1].config.guidance_embeds
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "run", "tape", "models"}
    assert not (tmp_path / "run" / "text").exists()
    prompts.unlink()
    grpo_flux.main(["--replay", str(tape), "--out", str(tmp_path / "again"), "--device", "cpu"])
    assert "replay OK" in capfd.readouterr().out
    names = [path.stem for path in (tmp_path / "again" / "text").iterdir()]
    assert names and all(re.fullmatch("[0-9a-f]{32}", name) for name in names)

def wrong_after(function, calls, wrong):
    """The function, but what it returns after so many calls is spoilt."""
    count = iter(range(10**9))
    return lambda *x, **y: (wrong if next(count) >= calls else lambda x: x)(function(*x, **y))

def no_memory(_):
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")

@faults
@pytest.mark.parametrize("name, calls, wrong, words", [
    ("velocity", 19, lambda v: v * math.nan, "an image of step . is not finite"),
    ("group_advantages", 1, lambda A: A * math.nan, "the gradient was not finite in steps 2 to 4"),
    ("rollout", 2, lambda t: t._replace(logp=t.logp + 1e-4), "the first ratio is off by 1"),
    ("load_transformer", 0, no_memory, "a lower --micro_batch")])
def test_numbers_that_go_wrong(name, calls, wrong, words, tiny, tmp_path, monkeypatch):
    """Two days of steps that train nothing; the reward blamed for what the policy did, or the
    model for want of memory."""
    monkeypatch.setattr(grpo_flux, name, wrong_after(getattr(grpo_flux, name), calls, wrong))
    with pytest.raises((FloatingPointError, torch.OutOfMemoryError)) as end:
        grpo_flux.main([*SHORT, "--steps", "9", "--save_every", "1", "--out", str(tmp_path)])
    assert re.search(words, grpo_flux.explain(end.value))
    last = grpo_flux.checkpoints(tmp_path)[-1:]
    notes = [f"the same command goes on from {path}" for path in last]
    assert notes == getattr(end.value, "__notes__", [])
    skipped = [line["skipped"] for line in read_metrics(tmp_path)]
    assert name != "group_advantages" or skipped == [0, 1, 1, 1]

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_stops(number, tiny, tmp_path, monkeypatch, capfd):
    """A run that loses its last steps when its terminal or its machine goes; one without --out that
    starts again; a handler that stays, so that the next signal is swallowed."""
    def stop_in_step_1(step, run):
        os.kill(os.getpid(), number if step == 0 else 0)
        return train_step(step, run)

    train_step = grpo_flux.train_step
    monkeypatch.setattr(grpo_flux, "train_step", stop_in_step_1)
    monkeypatch.chdir(tmp_path)
    flags, before = [*SHORT, "--eval_images", "1"], signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        grpo_flux.main(flags)
    assert end.value.code == (130 if number == signal.SIGINT else 0)
    assert signal.getsignal(number) == before
    assert [path.name for path in grpo_flux.checkpoints("runs/tiny")] == ["step_00001"]
    if number == signal.SIGTERM:
        grpo_flux.main(flags)  # goes on
        assert [line["step"] for line in grpo_flux.read_metrics("runs/tiny")] == [0, 1, 2]
        assert "look at runs/tiny/before_after.png" in capfd.readouterr().out
        grpo_flux.main(flags)
        assert capfd.readouterr().out.startswith("runs/tiny has ended after 2 steps; more --steps")
        for name in ("metrics.jsonl", "before_after.png", "images/step_00000.png"):
            Path("runs/tiny", name).unlink()  # somebody has cleared them away
        grpo_flux.main(flags)

def test_handlers_of_others():
    """nohup that does not protect a run from its terminal; a handler of a device's library, which
    Python cannot put back."""
    handler, numbers = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None), (1, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    ctypes.CDLL(None).signal(signal.SIGUSR1, handler)
    with grpo_flux.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    after = [signal.signal(number, old) for number, old in zip(numbers, before)]
    assert not received and after[0] == signal.SIG_IGN

def start(folder, *flags, ranks=1):
    """Start a long run in folder/run; the process, after its third step."""
    argv = [sys.executable, *torchrun(ranks), str(HERE / "grpo_flux.py"), *SHORT]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*argv, "--steps", "500", "--out", "run", *flags], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(grpo_flux.read_metrics(folder / "run")) < 4:
        time.sleep(0.1)
    return process

def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return list(map(int, path.read_text().split()))

@faults
@pytest.mark.parametrize("victim, number", [("torchrun", signal.SIGTERM), ("rank", signal.SIGTERM),
                                            ("rank", signal.SIGKILL)])
def test_signals_to_two_processes(victim, number, tmp_path, heavy):
    """A process that waits for ever for one that is gone; a step that is lost without need."""
    process = start(tmp_path, "--save_every", "2", ranks=2)
    os.kill(process.pid if victim == "torchrun" else children(process)[-1], number)
    status, text = process.wait(60), (tmp_path / "log").read_text()
    last = grpo_flux.checkpoints(tmp_path / "run")[-1].name
    steps = len(read_metrics(tmp_path / "run"))
    if number == signal.SIGKILL:
        assert status == 1 and "another process has ended" in text and "goes on from" in text
        assert 0 <= steps - int(last[5:]) <= 2
    else:
        assert (status == 0 or victim == "torchrun") and last == f"step_{steps:05d}"

FAULTY = ("--device cpu --num_prompts 1 --num_generations 2 --micro_batch 2 --sampling_steps 2 "
          "--batch_size 2 --eval_images 2 --eval_every 2 --save_every 1 --learning_rate 1e-3 "
          "--ema_decay 0 --steps 4").split()

@faults
def test_full_disk(tmp_path, heavy):
    """The old checkpoint gone before the new one is whole; a traceback of eighty lines."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00001"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", tmp_path]).returncode:
        pytest.skip("this user cannot mount a disk of its own")
    try:
        argv = ["grpo_flux.py", *FAULTY, "--out", str(tmp_path / "run")]
        done = shell(*argv, cwd=HERE)  # a checkpoint has 22 MB
        *_, line = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("error: ") and "No space left" in line
        assert line.endswith(f"goes on from {checkpoint}") and "Traceback" not in done.stderr
        assert [*checkpoint.parent.iterdir()] == [checkpoint] and len(
            load_file(next(checkpoint.iterdir()))) > 100
        subprocess.run(["mount", "-o", "remount,size=400m", tmp_path], check=True)
        succeed(shell(*argv, cwd=HERE))
    finally:
        subprocess.run(["umount", tmp_path])

@faults
def test_long_run(tmp_path, heavy):
    """Memory, open files or seconds of a step that grow until the machine is full."""
    process = start(tmp_path, *FAULTY, *"--steps 2000 --save_every 100 --eval_every 99".split())
    rows, status = [], Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        time.sleep(0.5)
        if memory := re.search(r"VmRSS:\s*(\d+)", status.read_text()):
            step, files = read_metrics(tmp_path / "run")[-1]["step"], status.with_name("fd")
            rows.append([step, int(memory[1]) / 1024, len(os.listdir(files)), time.monotonic()])
    assert process.returncode == 0 and len(read_metrics(tmp_path / "run")) == 2000
    early, late = (np.array([row for row in rows if a <= row[0] < a + 300]) for a in (200, 1700))
    pace = [(part[-1] - part[0])[3] / (part[-1] - part[0])[0] for part in (early, late)]
    print(f"step, MB, open files, s: at most {early.max(0)}, {late.max(0)}; {pace} s a step")
    assert late[:, 1].max() < 1.02 * early[:, 1].max() + 5 and pace[1] < 1.3 * pace[0]
    assert late[:, 2].max() <= early[:, 2].max()

CHANGES = "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.remove"

def arm(doom, watched, seed):
    """Kill this process at its doom: in so many seconds, or soon after the n-th event of a kind."""
    seen, log = Counter(), os.open("events", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def die(after):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def see(event, args):
        writes = event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and watched in (path := os.path.abspath(str(args[0]))):
            kind = re.sub(r"[0-9a-f]{8,}|\d+", "N", path.removeprefix(watched))
            kind = f"{event} " + re.sub("(writing-tiny-N/).*", r"\1...", kind)
            os.write(log, f"{kind}\n".encode())
            seen.update([kind])
            if doom == (kind, seen[kind]):
                die(0.005 * np.random.default_rng(seed).random())

    sys.addaudithook(see)
    if isinstance(doom, float):
        die(doom)

def child(flags, out, seed, doom, **environment):
    log = os.open(f"log_{environment.get('RANK', 0)}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    arm(doom, str(out.parent.resolve()), seed)
    grpo_flux.main([*flags, "--out", str(out), "--cache", str(out.parent / "cache")])

def launch(flags, out, dooms, seed):
    """Run to the end, or to the doom of a process: the exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(dooms)))
    processes = []
    for rank, doom in enumerate(dooms):
        place = common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if len(dooms) > 1 else {}
        processes.append(multiprocessing.get_context("fork").Process(
            target=child, args=(flags, out, seed, doom), kwargs=place))
        processes[-1].start()
    while {process.exitcode for process in processes} == {None}:
        time.sleep(0.02)
    if any(process.exitcode for process in processes):
        for process in processes:  # torchrun ends the others
            process.terminate()
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    assert None not in statuses, "a process hangs after another's death"
    return statuses

def content(folder):
    """All files that have their final names; those that are not whole raise. TensorBoard's have
    times in them."""
    readers, files = defaultdict(lambda: Path.read_bytes), {}
    readers |= {".png": lambda path: Image.open(path).tobytes(), ".safetensors": lambda path: {
        name: x.numpy().tobytes() for name, x in load_file(path).items()},  # in any order
        ".json": lambda path: json.loads(path.read_text())}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not re.search("writing-|old-|tensorboard/|lock$", name):
            files[name] = readers[path.suffix](path)
    return files

def kill_often(kills, ranks, seed):
    """Kill runs of some processes so often, at random moments, and go on with the same command; at
    their end compare them with one that was left alone. Prints a line for each kill.

    A third come at a random time; the others up to 5 ms after a file has been opened to be written,
    renamed or removed, each kind in its turn. Of two processes one or both are killed.
    """
    rng, fit = np.random.default_rng(seed), reward.fit
    reward.fit = lambda *args, **kwargs: fit(*args, **kwargs | {"steps": 3})  # two seconds
    out = Path(tempfile.mkdtemp(dir=".")) / "now" / "run"
    references, survived, started, chain = [], 0, 0, 0
    for flags in [FAULTY, [*FAULTY, *LORA, "--ema_decay", "0.9"]][:1 + (kills > 3)]:
        begin = time.monotonic()
        assert launch(flags, out, ranks * [None], seed) == ranks * [0]  # the first one builds
        seconds = time.monotonic() - begin
        counts = Counter(Path("events").read_text().splitlines())
        turns = [(str(kind), counts[kind]) for kind in rng.permutation(sorted(counts))]
        references.append((flags, content(out), turns))
        shutil.rmtree(out)
    while survived < kills or started < survived:
        if survived == started and chain % 4 == 3:
            shutil.rmtree(out.parent, ignore_errors=True)
        flags, reference, turns = references[chain % len(references)]
        moment = float(rng.uniform(0, seconds))
        if survived % 3:
            turns.append(turns.pop(0))
            moment = turns[-1][0], int(rng.integers(min(turns[-1][1], 2))) + 1
        victims = [[0], [0, 1], [1]][rng.integers(3)] if ranks > 1 else [0]
        if survived - started > 3 or survived == kills:
            victims = []  # let it end
        dooms = [moment if rank in victims else None for rank in range(ranks)]
        statuses = launch(flags, out, dooms, seed)
        ended, lines = content(out), grpo_flux.read_metrics(out)
        content(out.parent)
        assert [line["step"] for line in lines] == list(range(len(lines)))
        if any(statuses):
            logs = [Path(f"log_{rank}").read_text().splitlines()[-1:] for rank in range(ranks)]
            assert -signal.SIGKILL in statuses, logs
            survived += 1
            last = [path.name for path in grpo_flux.checkpoints(out)[-1:]]
            print(f"kill {survived} at {moment} of {victims}: {statuses}, has {last}, {logs}")
            continue
        differ = [x for x in reference.keys() | ended.keys() if ended.get(x) != reference.get(x)]
        assert not differ and not [*out.rglob("writing-*"), *out.rglob("old-*")], differ
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
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_many_kills(ranks, tmp_path, heavy):
    """What only one moment in forty shows."""
    done = shell("test_grpo_flux.py", "--kill", "40", ranks, "2", cwd=tmp_path)
    assert "40 of 40 kills survived" in succeed(done)

# ------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("flags", [[], [*LORA, *"--ema_decay 0.9 --kl_beta 0.1".split()]])
def test_resume_is_bit_for_bit(tiny, tmp_path, flags):
    """A moment, an average or a draw that starts anew; a line of metrics twice."""
    flags = [*SHORT, *flags, "--save_every", "2", "--keep_last", "1", "--eval_every", "2"]
    for steps, name in (("4", "whole"), ("2", "parts"), ("4", "parts")):
        grpo_flux.main([*flags, "--steps", steps, "--out", str(tmp_path / name)])
        if steps == "2":  # as if it had been killed in step 4; and a copy lies about
            with open(tmp_path / name / "metrics.jsonl", "a") as file:
                file.write('{"step": 3}\n{"st')
            checkpoint = tmp_path / name / "checkpoints" / "step_00002"
            shutil.copytree(checkpoint, tmp_path / name / "checkpoints" / "step_00002.bak")
    assert [path.name for path in grpo_flux.checkpoints(tmp_path / "parts")] == ["step_00004"]
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert grpo_flux.read_metrics(parts) == grpo_flux.read_metrics(whole)
    assert content(parts / "export") == content(whole / "export")

@pytest.mark.parametrize("rank", [0, 4])
def test_export_is_the_trained_policy(tiny, tmp_path, rank):
    """An export that diffusers cannot read, or another program with another alpha; frozen weights
    that move or are saved."""
    flags = ["--lora_rank", str(rank), "--lora_alpha", "8", "--learning_rate", "1e-3"]
    grpo_flux.main([*SHORT, *flags, "--ema_decay", "0", "--out", str(tmp_path)])
    folder = tmp_path / "checkpoints" / "step_00002"
    assert not rank or all("lora" in name for name in load_file(next(folder.iterdir())))
    cfg = settings(lora_rank=rank, lora_alpha=8.0, model=tiny.cfg.model)
    policy = grpo_flux.Policy(cfg, SHAPE[1:], CPU)
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), tiny.text(TWO)
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, vae=None)
    if rank:
        pipe.load_lora_weights(tmp_path / "export")
    else:
        pipe.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "export/transformer")
    with torch.no_grad():
        before = policy.predict(*inputs)
        assert torch.equal(before, tiny.policy.predict(*inputs))  # adapters begin at 0
        policy.load(folder)
        trained = policy.predict(*inputs)
        loaded = partial(tiny.policy.predict.func, pipe.transformer,
                         **tiny.policy.predict.keywords)(*inputs)
    assert torch.allclose(loaded, trained, atol=1e-5) and (trained - before).abs().max() > 1e-3
    start = tiny.policy.transformer.state_dict()
    frozen = {name.replace(".base_layer", ""): p
              for name, p in policy.transformer.named_parameters() if "lora" not in name}
    assert start.keys() == frozen.keys()
    assert all(torch.equal(p, start[name]) for name, p in frozen.items()) == bool(rank)
    if rank:  # as those read it that know nothing of alpha: B A is the difference of the weights
        lora = load_file(next((tmp_path / "export").iterdir()))
        policy.transformer.fuse_lora()
        pairs = [name for name in lora if name.endswith(".lora_A.weight")]
        assert 2 * len(pairs) == len(lora) and len(pairs) == 2 * 12 + 2 * 5
        for name in pairs:
            layer, product = name[12:-14], lora[name.replace("lora_A", "lora_B")] @ lora[name]
            fused = policy.transformer.get_parameter(f"{layer}.base_layer.weight")
            assert torch.allclose(product, fused - start[f"{layer}.weight"], rtol=0, atol=1e-6)

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with pictures, and with files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("pictures", "no_pictures"):
        (folder / name).mkdir()
    red = Image.fromarray(reward.draw("a red circle", np.random.default_rng(0)))
    deep = Image.fromarray(np.asarray(red.convert("L")).astype("uint16") * 257)
    for name, picture in dict(dot=red.resize((1, 1)), grey=red.convert("L"), deep=deep,
                              alpha=red.convert("RGBA")).items():
        picture.save(folder / "pictures" / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "pictures" / "grey.png").read_bytes()[:60])
    for name, text in {"page.png": "<html>", "page.pt": "<html>", "one.txt": "a red circle",
                       "nan.jsonl": "nan"}.items():
        (folder / name).write_text(text)
    return folder

# what reward.py refuses: (flags, words of the message)
SCORING = [
    ("pictures/dot.png --device npu", "CANN"), ("pictures/dot.png --device tpu", "auto or cuda"),
    ("cut.png", "cut.png: must be a picture"), ("page.png", "must be a picture"),
    ("none.png", "none.png"), ("no_pictures", "must be a picture"),
    ("pictures --batch 0", "at least 1"), ("pictures --batch many", "invalid int"),
    ("pictures --prompts one.txt", "1 prompts for 4"),
    ("pictures --prompt x --prompts one.txt", "not allowed with"),
    ("pictures --save none/x", "folder that exists"),
    ("pictures --against nan.jsonl", "--save wrote"),
    ("pictures --against none.jsonl", "--against none.jsonl"),
    ("pictures --hps none.pt", "--hps none.pt"),
    ("pictures --hps page.pt", "--hps page.pt: must be a whole"),
    ("pictures --hps a/b/c.pt", "no connection"),
    ("pictures --pickscore a/b --reward pickscore", "no connection"),
    ("pictures --reward clip", "--clip (not given)"),
    ("pictures --reward none", "must be hps, clip"), ("pictures --reward hps,clip", "one reward")]

@pytest.mark.parametrize("flags, words", SCORING)
def test_scoring_refuses(flags, words, tiny, pictures, monkeypatch, capfd):
    """A traceback for a picture of a thousand that is broken, or nothing said about it."""
    monkeypatch.chdir(pictures)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delattr("torch.npu", raising=False)
    if "--hps" not in flags:
        flags = f"{flags} --hps {tiny.cfg.hps} --hps_arch {tiny.cfg.hps_arch}"
    with pytest.raises(SystemExit) as end:
        reward.main((flags if "--device" in flags else f"{flags} --device cpu").split())
    *before, line = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and words in line
    assert not any("Traceback" in text for text in before)

# -------------------------------------------------------------------------------------------- NPU

# A device that torch really calls npu, without hardware: its tensors are host memory, and every
# operator runs on the CPU. Like an NPU it refuses float64, tensors of the CPU among its own, and
# some collectives of 3, 5, 6 or 7 processes; gelu and the autocast lists are torch_npu's. It says
# nothing of NPU kernels, each process has only npu:0, and it stays for the life of a process:
# `python test_grpo_flux.py --npu grpo_flux.py ...` starts one that has it.
NO_NPU = "this torch cannot carry the stand-in for an NPU"
LOW = "conv2d linear matmul mm bmm addmm baddbmm scaled_dot_product_attention"  # in autocast
FP32 = "layer_norm group_norm softmax.int norm.Scalar pow.Tensor_Scalar"  # rms_norm, gelu: neither
COLLECTIVES = ("allreduce_ broadcast_ allgather_ _allgather_base_ _reduce_scatter_base_ barrier "
               "allgather_into_tensor_coalesced_")

def recast(x, kind):
    """The same memory on another device: in DLPack, integer 1 is the cpu and 12 is ours."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = torch._C._to_dlpack(x)
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = kind
    return torch._C._from_dlpack(capsule)

def run_on_cpu(op, *args, **kwargs):
    """Every operator with an npu tensor ends here, below autograd and autocast."""
    twins, strays = {}, []  # {id of an npu tensor: (it, its memory as a CPU tensor)}

    def to_cpu(x):
        if isinstance(x, torch.Tensor) and x.is_npu:
            if id(x) not in twins:
                twins[id(x)] = x, recast(x, 1) if x.numel() else torch.empty(x.shape, dtype=x.dtype)
            return twins[id(x)][1]
        if isinstance(x, torch.Tensor) and x.dim() and op is not torch.ops.aten.index.Tensor:
            strays.append(x)
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
    if op.overloadpacket in (torch.ops.aten.gelu, torch.ops.aten.gelu_backward):
        options["approximate"] = "tanh"
    run = partial(communicate, op) if op.namespace == "c10d" else op
    result = run(*inputs, **options)
    own = {id(twin): x for x, twin in twins.values()}
    for x, twin in twins.values():
        if twin.shape != x.shape or twin.data_ptr() != x.data_ptr():  # out= and resize_
            x.data = recast(twin, 12)
    return tree_map(to_npu, result)

def communicate(op, *inputs):
    """HCCL: gloo carries it, in the group that has gloo for the cpu; all errors are of one kind."""
    [group] = [dist.ProcessGroup.unbox(x) for x in inputs if isinstance(x, torch.ScriptObject)
               and x._type().name().endswith("ProcessGroup")]
    try:
        if re.search("allgather_(base|into)|reduce_scatter", op.__name__):
            assert group.size() not in (3, 5, 6, 7), f"world size {group.size()}"
        result = op(*inputs)  # torch finds the work by storage, and views here have their own
        dist.Work.unbox(result[-1] if isinstance(result, tuple) else result).wait()
    except Exception as error:
        raise RuntimeError(f"{op}: HCCL function error, {type(error).__name__}") from error
    return result

def set_autocast(library, kind, names, dtype=None):
    """Cast inputs of these operators, on a kind of device, to a dtype; None: autocast's own."""
    key = getattr(torch._C.DispatchKey, dict(npu="AutocastPrivateUse1", cpu="AutocastCPU")[kind])

    def run(op, *args, **kwargs):
        def cast(x):
            fits = isinstance(x, torch.Tensor) and x.device.type == kind and x.is_floating_point()
            return x.to(dtype or torch.get_autocast_dtype(kind)) if fits else x

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    for name in names.split():
        packet, overload = f"{name}.default".split(".")[:2]
        library.impl(name, partial(run, getattr(getattr(torch.ops.aten, packet), overload)))

def install_npu():
    npu, half = types.ModuleType("torch.npu"), [torch.float16, torch.bfloat16]
    values = dict(is_available=True, is_initialized=True, device_count=8, current_device=0,
                  set_device=None, synchronize=None, _is_in_bad_fork=False, manual_seed_all=None,
                  get_amp_supported_dtype=half, get_device_name="stand-in")
    for name, value in values.items():
        setattr(npu, name, lambda *_, value=value: value)
    npu.Stream = type("Stream", (torch.cpu.Stream,), dict(
        stream_id=0, device_index=0, device_type=20, synchronize=lambda _: None))
    npu.conv, npu.matmul = types.SimpleNamespace(), types.SimpleNamespace()
    npu.Event, npu.stream, npu.current_stream = torch.cpu.Event, torch.cpu.stream, npu.Stream
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    dist.Backend.register_backend(  # what torch asks it for, communicate does
        "hccl", lambda o, _: dist.ProcessGroupGloo(o.store, o.group_rank, o.group_size, o.timeout),
        extended_api=True, devices=["npu"])
    every, aten, c10d, cast = libraries = [torch.library.Library(*names) for names in (
        ("_", "IMPL"), ("aten", "IMPL", "PrivateUse1"), ("c10d", "IMPL", "PrivateUse1"),
        ("aten", "IMPL", "AutocastPrivateUse1"))]
    every.fallback(run_on_cpu, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("convolution_overrideable", partial(run_on_cpu, torch.ops.aten.convolution.default))
    for name in COLLECTIVES.split():
        c10d.impl(name, partial(run_on_cpu, getattr(torch.ops.c10d, name).default))
    set_autocast(cast, "npu", LOW)
    set_autocast(cast, "npu", FP32, torch.float32)
    resize = torch.UntypedStorage.resize_  # FSDP frees memory with it; here it stays
    torch.UntypedStorage.resize_ = lambda s, n: s if s.device.type == "npu" else resize(s, n)
    assert (torch.ones(2).to("npu") + 1).tolist() == [2, 2]
    return libraries  # they take their operators along when they go

def with_npu(name, *argv, cwd, ranks=1, fails=False):
    """Run a script, or a function of this file, in processes of their own that have the npu."""
    done = shell(*torchrun(ranks), __file__, "--npu", name, *argv, cwd=cwd,
                 CUDA_VISIBLE_DEVICES="")  # torch_npu refuses to start beside a GPU
    if NO_NPU in done.stderr:
        pytest.skip(done.stderr[done.stderr.index(NO_NPU):].splitlines()[0])
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done

# README's list for the first run on an NPU, and what each command must print
SMALL = "--steps 2 --num_prompts 1 --sampling_steps 4 --eval_images 12"
SCORE = "python reward.py runs/cpu/images --prompt circle --reward_fp32 $hps --device"
CHECKLIST = {
    "python grpo_flux.py --device cpu $small --out runs/cpu --record record": "look at runs/cpu/",
    "torchrun --nproc_per_node 2 grpo_flux.py --device npu $small --dtype fp32 --reward_fp32 "
    "--out runs/two": "look at runs/two/",
    f"{SCORE} cpu --save scores.jsonl": "step_00002.png",
    f"{SCORE} npu --against scores.jsonl": "reward OK",
    "python grpo_flux.py --device npu --replay record --reward_fp32": "replay OK",
    "python grpo_flux.py --device npu $small --out runs/npu": "look at runs/npu/",
    "python grpo_flux.py --device npu $small --lora_rank 8 --out runs/lora": "look at runs/lora/",
    "python grpo_flux.py --device npu $small --steps 3 --out runs/two": "look at runs/two/",
    "python grpo_flux.py --compare runs/cpu runs/npu": "compare OK"}

def run_checklist():
    """Run all but torchrun's command in this process; output.json says what each printed."""
    folder, output, grpo_flux.draw = sys.argv[1], [], lambda *_: None  # which takes a second
    hps = f"--hps {folder}/hps.pt --hps_arch {folder}/tiny-clip.json"
    for command in CHECKLIST:
        program, script, *argv = command.replace("$small", SMALL).replace("$hps", hps).split()
        with redirect_stdout(StringIO()) as printed:
            try:
                if program == "python":
                    (reward if script == "reward.py" else grpo_flux).main(argv)
            except SystemExit as end:
                print("exit status", end.code)
        output.append(printed.getvalue())
    Path("output.json").write_text(json.dumps(output))

def run_twice():
    """A run, then one more whose second process dies at its first optimizer step."""
    dist.destroy_process_group = lambda: None
    grpo_flux.main(sys.argv[1:])
    dist.init_process_group = lambda *_: None  # it is there
    if dist.get_rank() == 1:
        torch.optim.AdamW.step = lambda *_: os._exit(1)
    sys.argv += "--num_generations 4 --batch_size 2 --out died".split()
    runpy.run_path(str(HERE / "grpo_flux.py"), run_name="__main__")

@job
def checklist(folder):
    argv = [*CHECKLIST][1].replace("$small", SMALL).split()[4:]
    two = with_npu("run_twice", *argv, cwd=folder, ranks=2, fails=True)
    shutil.copytree(folder / "runs/two", folder / "two")  # before a later command goes on with it
    with_npu("run_checklist", str(Path(load_run(folder).cfg.hps).parent), cwd=folder)
    first, _, *rest = json.loads((folder / "output.json").read_text())
    return folder, [first, two.stdout, *rest], two.stderr

def test_npu_passes_the_first_run_checklist(checklist):
    """A command of README's list that does not work, or a device that fails one of its checks."""
    folder, printed, _ = checklist
    for (command, words), output in zip(CHECKLIST.items(), printed, strict=True):
        assert words in output, (command, output)
    for name in ("npu", "lora"):  # in bf16
        assert [line["first_ratio_dev"] for line in read_metrics(folder / "runs" / name)] == [0, 0]

def test_npu_does_what_a_cpu_does(checklist):
    """Under torchrun: a CPU tensor, float64, a device or backend by name, gradients of one rank."""
    (cpu, a), (npu, b) = results(checklist[0] / "runs/cpu"), results(checklist[0] / "two")
    for one, two in zip(cpu, npu, strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-4)  # gelu is tanh's there
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
        assert two["first_ratio_dev"] == 0
    difference = [(u - v).abs().mean() for u, v in zip(a.parameters(), b.parameters())]
    assert max(difference) < 4e-5  # two steps of AdamW move weights by 4e-4

def test_npu_is_refused_where_hccl_lacks_collectives(monkeypatch, tmp_path):
    """Three processes that load FLUX for minutes, then fail in their first all-gather."""
    card = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 16)
    monkeypatch.setattr(torch, "npu", card, raising=False)
    monkeypatch.setenv("RANK", "0")
    for world in "3567":
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, world)
        with pytest.raises(BadInput, match=rf"{world}.* 8"):
            grpo_flux.main(["--device", "npu", "--num_prompts", world, "--batch_size", world,
                            "--out", str(tmp_path / "run")])
    assert not [*tmp_path.iterdir()]

def test_npu_says_in_one_line_that_a_process_died(checklist):
    """HCCL's plain RuntimeError as a traceback, in which the cause is not to be found."""
    [line] = re.findall(r"error: .*", checklist[2])
    assert "another process has ended, see its message" in line and "HCCL" in line

FAULTS = [  # (old, new, words of the error): nothing, then what a port gets wrong
    ("", "", ""),
    ("dist.get_default_backend_for_device(device)", "'nccl'", "nccl"),  # with RANK
    ("torch.get_device_module(device).set_device", "torch.cuda.set_device", "cuda"),
    ("run.shape, cfg).to(run.device)", "run.shape, cfg)", ""),
    ("dtype=x.dtype, device=x.device)", "dtype=torch.float64, device=x.device)", "float64"),
    (".standard_normal(shape).astype(np.float32)", ".standard_normal(shape)", "float64"),
    ("torch.stack(noise).to(x.device)", "torch.stack(noise)", "npu:0 and cpu"),
    ("torch.stack(noise).to(x.device)",
     "torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device))", "Generator"),
    ("for prompt in prompts]).to(self.device)", "for prompt in prompts])", "of the cpu"),
    ("advantages, results = advantages.to(device), []", "results = []", "indexed tensor"),
    ("self.tokenizer(unique).to(self.device)", "self.tokenizer(unique)", "of the cpu"),
    ("torch.autocast(x.device.type", "torch.autocast('cuda'", "computes in fp32"),
    ("torch.autocast(self.device.type", "torch.autocast('cuda'", "computes in fp32"),
    ("import reward\n",
     "import reward\nfrom diffusers.models.transformers import transformer_flux\n"
     "transformer_flux.maybe_adjust_dtype_for_device = lambda dtype, _: dtype\n", "float64"),
]

def run_with_faults():
    """A short run in bf16 of a copy of the code with each fault; error.txt says how it ended."""
    def refuse_fp32(layer, _, y):
        if isinstance(layer, torch.nn.Linear) and y.is_npu and y.dtype == torch.float32:
            raise TypeError(f"{layer} computes in fp32")

    torch.nn.modules.module.register_module_forward_hook(refuse_fp32)
    flags = ("--device npu --steps 1 --sampling_steps 3 --num_prompts 1 --num_generations 4 "
             "--micro_batch 2 --batch_size 4 --eval_images 3 --out").split()
    os.environ |= dict(WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    for i, (old, new, _) in enumerate(FAULTS):
        (folder := Path(str(i)).resolve()).mkdir()
        for name in ("reward.py", "grpo_flux.py"):
            (folder / name).write_text((HERE / name).read_text().replace(old, new))
            sys.modules.pop(name[:-3], None)
        sys.path.insert(0, str(folder))
        module = importlib.import_module("grpo_flux")
        module.draw = lambda *_: None  # it takes a second
        os.environ |= dict(RANK="0") if "nccl" in new else {}
        try:
            module.main([*flags, str(folder / "run")])
        except Exception as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        os.environ.pop("RANK", None)
        if dist.is_initialized():
            dist.destroy_process_group()

@job
def npu_faults(folder):
    return folder if with_npu("run_with_faults", cwd=folder) else None

@pytest.mark.parametrize("i", range(len(FAULTS)))
def test_npu_shows_what_a_port_gets_wrong(npu_faults, i):
    """0: a run without torchrun, in bf16. Then: a stand-in that is blind to what it stands for."""
    (old, new, words), folder = FAULTS[i], npu_faults / str(i)
    if old == new:
        assert [line["first_ratio_dev"] for line in read_metrics(folder / "run")] == [0]
    else:
        assert any(old in (HERE / name).read_text() for name in ("grpo_flux.py", "reward.py"))
        assert words.lower() in (folder / "error.txt").read_text().lower()

def run_at_real_size():
    """A rollout and an update of FLUX.1-dev at 720x720; and the tables of the stand-in."""
    x, f = torch.ones(1, 2).to("npu"), torch.nn.functional
    assert torch.equal(f.gelu(x).cpu(), f.gelu(x.cpu(), approximate="tanh"))
    with torch.autocast("npu", torch.bfloat16):
        assert (x @ x.T).dtype == f.rms_norm(x.bfloat16(), (2,)).dtype == torch.bfloat16
        assert f.layer_norm(x.bfloat16(), (2,)).dtype == torch.float32
    seen = count_at_real_size(0, 1, 1, "npu", shares=[0])["seen"]
    assert not {dtype for _, dtype in seen} & {torch.float64, torch.complex128}
    assert {k for k, names in seen.items() if names & {"mm", "addmm"}} == {("npu", torch.bfloat16)}
    on_cpu = set().union(*(names for (device, _), names in seen.items() if device == "cpu"))
    assert on_cpu <= set(  # draws, positions and which batches count
        "arange expand clone view permute _unsafe_view _to_copy zeros_like stack unbind slice "
        "lift_fresh add_ ne any select ones".split()), on_cpu

def test_npu_at_real_size(tmp_path):
    """float64, a tensor on the CPU, a matmul in fp32 that only a large or deep FLUX would have."""
    with_npu("run_at_real_size", cwd=tmp_path)

# ---------------------------------------------------------------------- checkpointing and its price

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_share_of_checkpointed_blocks(tiny, tmp_path, monkeypatch, lora_rank):
    """A share that is ignored, or that changes the first ratio or a bit of the gradients."""
    calls, gradients, original = Counter(), defaultdict(list), grpo_flux.checkpoint
    for share in (1, 0.5, 0):
        def counting(block, *inputs, share=share, **options):
            calls[share] += 1
            return original(block, *inputs, **options)

        def keep(*_, share=share):
            gradients[share] += [p.grad.clone() for p in run.policy.parameters.values()]

        monkeypatch.setattr(grpo_flux, "checkpoint", counting)
        run = load_run(tmp_path, gradient_checkpointing=share, lora_rank=lora_rank, batch_size=2,
                       num_generations=4, sampling_steps=3)
        run.policy.optimizer.register_step_pre_hook(keep)
        grpo_flux.TAPE.start(run.cfg, {}, 0)
        _, _, stats = grpo_flux.train_step(0, run)
        assert stats["updates"] == 2 and stats["first_ratio_dev"] == 0
        assert all(map(torch.equal, gradients[share], gradients[1]))
    assert calls == {1: 4 * 4, 0.5: 2 * 4}  # blocks times backwards
    assert any(g.any() for g in gradients[1][-len(run.policy.parameters):])

def test_meter_counts_all_flop(tiny):
    """Attention that torch's own table leaves out, and a backward that counts as a forward."""
    text, x, linear = tiny.text(TWO), torch.randn(2, 16, 16), Counter()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda layer, _, y: linear.update(
        flop=2 * y.numel() * layer.in_features if isinstance(layer, torch.nn.Linear) else 0))
    with hook, Meter() as meter:
        tiny.policy.predict(x, torch.ones(2, 1, 1), text).sum().backward()
    tiny.policy.optimizer.zero_grad()
    # 4 S² D of each layer and sample, and 10 S² D in the backward
    assert meter.counted["attention"] == 14 * (16 + 8) ** 2 * 128 * 4 * 2
    assert 2.9 < meter.counted["flop"] / linear["flop"] <= 3  # none for gradients of inputs

# ------------------------------------------------------------------------------------------ README

README = (HERE / "README.md").read_text()

def test_readme_names_what_exists():
    """A flag that was renamed, a function that moved, a count of lines that has rotted."""
    sources = {name: (HERE / name).read_text()
               for name in ("grpo_flux.py", "reward.py", "test_grpo_flux.py")}
    flags = {*(f.name for f in fields(grpo_flux.Config)), *(name for name, *_ in reward.FLAGS),
             *("nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts shutdown_timeout "
               "signals-to-handle size help extra-index-url local-dir no-init_same_noise").split()}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)) <= flags
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 20
    for name, file, number in links:
        line = sources[file].splitlines()[int(number) - 1]
        assert re.match(rf" *(def|class) {name.split('.')[-1]}\b", line), name
    for file, text in sources.items():
        assert re.search(rf"`{file}`( has)? {text.count(chr(10)):,}\b", README), file
    algorithm = sources["grpo_flux.py"].split("\n# The algorithm ends here")[0].rstrip()
    assert f"the algorithm is the first {len(algorithm.splitlines())}." in README
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
                for line in re.findall(r"(?m)^#+ (.*)", README)}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings
    assert all((HERE / name).is_file() for name in re.findall(r'src="(.*?)"', README))
    rows = re.findall(r"(?m)^\| ([a-z_]+(?:, [a-z_]+)*) \| .* \| .* \|$", README)
    names = {*re.findall(r"`([A-Za-z_]{3,})`", README), *", ".join(rows).split(", ")}
    names = {name.removeprefix("held_out_").removesuffix("_std") for name in names}
    assert {name for name in names if not re.search(rf"\b{name}\b", "".join(
        sources.values()))} <= {"interleave", "symbol"}
    stages = re.findall(r"(?m)^\| ([a-z_]+(?:, [a-z_]+)*) \| [a-z_]+\.[0N] ", README)
    assert ", ".join(stages).split(", ") == [*grpo_flux.TOLERANCES]
    lines = [line for line in README.splitlines() if not line.lstrip().startswith("|")]
    assert README.count("\n") <= 330 and max(map(len, lines)) <= 160 and "@@" not in README

def test_readme_says_what_the_defaults_are():
    """A table of symbols, or the numbers of a GRPO step, of other defaults than the code's."""
    tiny, text = grpo_flux.Config(**grpo_flux.TINY), " ".join(README.split())
    for cfg in (grpo_flux.Config(), tiny):
        P, G, S = cfg.num_prompts, cfg.num_generations, cfg.batch_size
        K = grpo_flux.num_train_steps(cfg)
        for cell in (f"T = {cfg.sampling_steps}, K = {K} of {cfg.sampling_steps - 1}",
                     f"η = {cfg.eta}", f"P = {P}, G = {G}, S = {S}",
                     "ε = " + f"{cfg.clip_range:.0e}".replace("e-0", "e-"),
                     *[f"{P} prompts x {G} images = {P * G} images, ", f"{P * G * K} transitions, "
                       f"and {P * G // S} optimizer steps of {S} images"] * (cfg is not tiny)):
            assert cell in text, cell
    assert f"after {tiny.steps} GRPO steps of a FLUX in miniature" in text
    assert f"{100 * grpo_flux.MISCAPTIONED:.0f} % of the captions" in text

def test_readme_commands_are_those_of_ci():
    """A first command, or one of the list for an NPU, that nobody has run since it was written."""
    ran = (HERE / ".ci" / "run").read_text().replace(" --quiet", "")
    first, *blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = first.strip().replace("\n", " && ").split(" && ")
    assert len(commands) == 5 and all(line in ran for line in commands if "venv" not in line)
    [[small, _, *lines]] = [block.splitlines() for block in blocks if "small=" in block]
    assert f'small="{SMALL}"' in small and f"tiny-{grpo_flux.TINY_VERSION}/hps" in small
    assert [line.split("  #")[0] for line in lines] == [*CHECKLIST]
    assert all(words in line for line, words in zip(lines, CHECKLIST.values()))

def test_functions_that_stand_alone():
    """A copied function that needs more than README says."""
    x, r, F = torch.randn(2, 4, 8), torch.rand(8), torch.nn.functional
    calls = dict(
        sigma_schedule=(16, 3.0), group_advantages=(r, 4), grpo_loss=(r, r, r, 0.1, 5.0),
        pack_latents=(torch.randn(2, 4, 4, 4),), unpack_latents=(x, 4, 4), image_ids=(4, 4),
        flux_step=(x, x, 0.5, 0.4, 0.3, "dance", x), preprocess=(torch.rand(1, 3, 9, 9),))
    for name, arguments in calls.items():
        original = getattr(grpo_flux, name, None) or getattr(reward, name)
        exec(inspect.getsource(original), world := dict(torch=torch, math=math, F=F))
        copy, expected = (tree_leaves(f(*arguments)) for f in (world[name], original))
        assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(copy, expected))

def test_readme_python_runs(tiny, tmp_path, monkeypatch):
    """An export, a reward, a record of saved files or a sampler that the code has left behind."""
    monkeypatch.chdir(tmp_path)
    grpo_flux.main([*SHORT, *LORA, "--steps", "1", "--out", "runs/lora"])
    tensors = foreign_record(tiny, tmp_path / "A", dict(
        steps=1, num_prompts=1, sampling_steps=4, dtype="fp32"))
    Path("saves").mkdir()
    for name, x in tensors.items():
        torch.save(x.detach(), f"saves/{name}{'_1_0' * ('.' in name)}.pt")
    Path("saves/prompts.json").write_text('[["a blue cross"]]')
    small = {"black-forest-labs/FLUX.1-dev": tiny.cfg.model, '"cuda"': '"cpu"', "s=16)": "s=2)",
             "height=720, width=720": "height=32, width=32", "45 * 45, 64": "16, 16", "90": "8",
             "schedule(16": "schedule(2", "16, 12, 3, {}": "4, 12, 1, {}", "prompts=8": "prompts=1",
             "batch_size=32, micro_batch=1": "batch_size=12, micro_batch=12",
             '"bf16"': f'"fp32", text_length={tiny.cfg.text_length}'}
    world, blocks = {}, re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        for old, new in small.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), world)
    assert len(blocks) == 4 and Path("cat.png").is_file()
    Path("my_reward.py").write_text(blocks[1])
    rewards = reward.parse_rewards(re.search(r"--reward (hps\S+my_reward\S+)`", README)[1])
    scores = reward.load_reward([*rewards][1])(torch.rand(2, 3, 8, 8), TWO)
    assert [*rewards.values()] == [0.5, 0.5] and scores.shape == (2,)
    assert [logp.isnan().item() for logp in world["logps"]] == [False, True]  # SDE, then ODE
    status, rows, end = replay(Path("DIR"))
    assert (status, end) == (0, ["replay OK"]) and all(row[-1] == "OK" for row in rows.values())

def test_ode_and_sde_have_the_same_marginals(tmp_path):
    """A step that does not keep the distribution of x, on a mixture of two bells where the velocity
    is known. It draws marginals.png, which is README's .github/marginals.png."""
    means, weights, width = torch.tensor([-1.0, 1.5]), torch.tensor([0.4, 0.6]), 0.3
    sigmas, axis = grpo_flux.sigma_schedule(100, 3.0), torch.linspace(-2.95, 2.95, 60)

    def mixture(x, s):  # of each bell: variance at σ = s, distance from its mean, density
        var, gap = (1 - s)**2 * width**2 + s**2, x[..., None] - (1 - s) * means
        return var, gap, weights * torch.exp(-gap**2 / (2 * var)) / (2 * torch.pi * var)**0.5

    panels = dict(zip((40, 80, 93, 100), Figure((11, 2.6), layout="constrained").subplots(1, 4)))
    styles = {0: dict(alpha=0.35, label="ODE"), 0.7: dict(histtype="step", label="SDE, η = 0.7")}
    for eta, style in styles.items():
        x = torch.randn(1, 100_000, 1)
        for i, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:]), 1):
            var, gap, density = mixture(x, s)
            v = (s - (1 - s) * width**2) * gap / var - means  # E[x1 - x0 | x] of each bell
            v = (v * density).sum(-1) / density.sum(-1)
            x = flux_step(v, x, s, s_next, eta if s_next else 0, noise=torch.randn_like(x))[0]
            if panel := panels.get(i):
                counts, _, _ = panel.hist(x.flatten(), 60, range=(-3, 3), density=True, **style)
                exact = mixture(axis, s_next)[2].sum(-1)
                assert (torch.as_tensor(counts) - exact).abs().max() < 0.04, (eta, s_next)
                panel.plot(axis, exact, "k", lw=0.8, label="exact" if eta else None)
                panel.set(title=f"σ = {s_next:.2f}", yticks=[])
    panels[40].legend(frameon=False, fontsize=8)
    panels[40].figure.savefig(tmp_path / "marginals.png", dpi=110)

# --------------------------------------------------------------------------------------- benchmark

def one_step(run, cfg):
    """A GRPO step of 12 samples as train_step does it: seconds of rollout, reward and update."""
    n, keys, names = cfg.micro_batch, grpo_flux.plan_step(0, cfg), ["a red circle"] * 12
    times = [clock(run)]
    text, x = run.text(names), grpo_flux.draw_latents(keys, SHAPE, cfg).to(run.device)
    trajectory = rollout(run.policy.predict, x, text, keys, cfg, cfg.eta)
    times.append(clock(run))
    images = decode(run.vae, trajectory.x0, SHAPE[1:], n)
    scores = torch.cat([
        reward.score(run.rewards, part, names[:len(part)], "")["hps"] for part in images.split(n)])
    advantages = group_advantages(scores, 12)
    times.append(clock(run))
    grpo_flux.update(run.policy.predict, run.policy.optimizer, trajectory, text, advantages, keys,
                     cfg)
    return [end - begin for begin, end in zip(times, [*times[1:], clock(run)])]

def transformer_alone(run, cfg):
    """The transformer calls of one step, and nothing else."""
    n, calls = cfg.micro_batch, 12 // cfg.micro_batch
    x, text = torch.randn(n, 16, 16).to(run.device), run.text(["a red circle"] * n)
    ids, ones = run.policy.predict.keywords["ids"], x.new_ones(n)  # for σ and guidance
    call = partial(run.policy.transformer, x, *text, ones, ids, 0 * ids[:8], ones)
    begin = clock(run)
    for _ in range(calls * cfg.sampling_steps):
        torch.no_grad()(call)()
    for _ in range(calls * grpo_flux.num_train_steps(cfg)):
        call().sample.backward(x)
    run.policy.optimizer.zero_grad()
    return [clock(run) - begin]

def clock(run):
    if reward.is_accelerator(run.device):
        torch.get_device_module(run.device).synchronize()
    return time.perf_counter()

def benchmark(repetitions=7):
    """Print the seconds of a step, and of its transformer calls alone, at some batch sizes."""
    torch.set_num_threads(1)
    out, device = tempfile.mkdtemp(), reward.select_device()
    run = load_run(out, device, sampling_steps=16, learning_rate=1e-8)
    grpo_flux.TAPE.start(run.cfg, {}, 0)
    ways = [replace(run.cfg, micro_batch=n, batch_size=max(n, 4)) for n in (12, 4, 1)]
    runs = [[loop(run, cfg) for cfg in ways for loop in (one_step, transformer_alone)]
            for _ in range(repetitions + 1)][1:]  # the first warms up
    shutil.rmtree(out)
    print(f"A GRPO step of 12 samples of the tiny FLUX on {run.device}, torch {torch.__version__}, "
          f"medians of {repetitions}\nmicro-batch   seconds   rollout, reward, update   of its "
          "transformer calls   of micro-batch 4")
    for i, cfg in enumerate(ways):
        rows = [(sum(row[2 * i]), sum(row[2 * i + 1]), sum(row[2]), *row[2 * i]) for row in runs]
        seconds, _, _, *parts = map(statistics.median, zip(*rows))
        print(f"{cfg.micro_batch:11}{seconds:10.3f}  " + "".join(f"{x:9.3f}" for x in parts),
              *(f"{statistics.median(row[0] / row[k] for row in rows):18.2f}" for k in (1, 2)))

# ------------------------------------------------------------------- benchmark: FLUX.1-dev, counted

ATTENTION = {  # FLOP of what torch 2.14's flop_registry leaves out: q k' and p v, then five like it
    "_scaled_dot_product_flash_attention_for_cpu":
        lambda q, k, *_, **__: 4 * q.numel() * k.shape[-2],
    "_scaled_dot_product_flash_attention_for_cpu_backward":
        lambda _, q, k, *__, **___: 10 * q.numel() * k.shape[-2]}

class Meter(TorchDispatchMode):
    """Counts FLOP, collectives, the bytes that a rank receives by them, and live bytes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.counted = {}, 0, Counter()
        self.seen = defaultdict(set)  # {(device, dtype): operators that made such a tensor}
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
        for x in filter(torch.is_tensor, tree_leaves(result)):
            self.seen[x.device.type, x.dtype].add(op.overloadpacket.__name__)
            if not self.sizes.get((storage := x.untyped_storage())._cdata):
                self.note_size(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.note_size, storage._cdata, 0)
        if formula := ATTENTION.get(op.overloadpacket.__name__):
            self.counted["attention"] += formula(*args)
        elif formula := flop_registry.get(op.overloadpacket):  # those of FlopCounterMode
            self.counted["flop"] += formula(*args, **kwargs or {}, out_val=result)
        if op.namespace == "c10d" and "_base_" in op.__name__:  # all-gather or reduce-scatter
            name = "gather" if "gather" in op.__name__ else "scatter"
            self.counted[f"{name}s"] += 1
            self.counted[f"{name}_bytes"] += abs(args[0].nbytes - args[1].nbytes)
        return result

def count_at_real_size(lora_rank, world, n, device="cpu", shares=(1, 0.5, 0)):
    """Count, on one of `world` ranks, a rollout of two denoising steps and, for each share of
    checkpointed blocks, an update of one backward of n samples."""
    torch.set_num_threads(1)
    gc.freeze()  # else the collector walks through all that was imported, again and again
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    set_autocast(library, "cpu", "layer_norm rms_norm", torch.float32)  # as autocast on CUDA
    cfg = grpo_flux.Config(dtype="bf16", lora_rank=lora_rank, num_prompts=1, num_generations=2,
                           batch_size=2, sampling_steps=2, micro_batch=n)
    keys, counted = [(0, 0, i) for i in range(n)], {}
    # what the host reads: 0.0 for loss, norm and ratio; AdamW's step 1; batch and window 0
    FakeTensor.tolist = lambda x: [0.0 if x.is_floating_point() else 0] * x.numel()
    FakeTensor.item = lambda x: 1.0 if x.is_floating_point() else 0
    grpo_flux.gather = lambda item: [item] * world
    grpo_flux.load_transformer = lambda cfg, device: transformer.to_empty(device=device)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        transformer.to(torch.bfloat16 if lora_rank else torch.float32)
        grpo_flux.prepare_policy(transformer, cfg)
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        grpo_flux.shard(transformer, CPU, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:  # refuses devices that mix
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device="npu") by way of the CPU
        policy = grpo_flux.Policy(cfg, (90, 90), torch.device(device))
        assert sum(p.numel() for p in transformer.parameters()) >= 11_901_408_320
        text = [torch.empty(n, *size, dtype=torch.bfloat16, device=device)
                for size in ((512, 4096), (768,))]
        x = grpo_flux.draw_latents(keys, (16, 90, 90), cfg).to(device)
        trajectory = rollout(policy.predict, x, text, keys, cfg, cfg.eta)
        counted["rollout"] = meter.restart()
        for share in ("warm up", *shares):
            for p in policy.parameters.values():  # as after an earlier backward
                p.grad = torch.zeros_like(p)
            zeros = torch.zeros(4, device=device), torch.zeros((), device=device)
            if share == "warm up":  # AdamW makes its moments, and DTensor infers shapes, once
                grpo_flux.optimizer_step(policy.optimizer, *zeros, cfg, 0)
                continue
            transformer.disable_gradient_checkpointing()
            grpo_flux.prepare_policy(transformer, replace(
                cfg, lora_rank=0, gradient_checkpointing=share))
            policy.reshard()  # as it is after an optimizer step
            meter.restart()
            stats = grpo_flux.update(policy.predict, policy.optimizer, trajectory, text,
                                     torch.ones(n), keys, cfg)
            assert stats["updates"] == 1
            counted[share] = meter.restart()
    return counted | {"seen": meter.seen}

def benchmark_at_real_size():
    """Print FLOP, peak memory and collectives of FLUX.1-dev, from a process for each way."""
    GIB, cfg, sizes = 2**30, grpo_flux.Config(), (1, 2, 4)
    kinds = {"LoRA 64, 1 rank": (64, 1), "LoRA 64, 8 ranks": (64, 8), "full, 8 ranks": (0, 8)}
    ways = [(*kind, n) for n in sizes[::-1] for kind in kinds.values()]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        counted = dict(zip(ways, pool.starmap(count_at_real_size, ways, chunksize=1)))
    images, T, K = cfg.num_prompts * cfg.num_generations, cfg.sampling_steps, 9
    assert K == grpo_flux.num_train_steps(cfg)
    print(f"FLUX.1-dev at 720x720 in bf16, counted on torch {torch.__version__}: {T} forwards and "
          f"{K} with a\nbackward for each of the {images} images of a GRPO step. PFLOP are for 12."
          f"\n{'':17}share  GiB of a rank, at most   PFLOP  without    GiB reduce-scattered\n"
          f"{'micro-batch':20}{1:8}{2:9}{4:9}{'attention':>21}{1:8}{2:9}{4:9}")
    for name, kind in kinds.items():
        runs = [counted[*kind, n] for n in sizes]
        for share in (1, 0.5, 0):
            one, two = runs[0]["rollout"], runs[0][share]
            matmuls, attention = (12e-15 * (one[key] / 2 * T + two[key] * K)
                                  for key in ("flop", "attention"))
            peaks = [max(r["rollout"]["peak"], r[share]["peak"]) / GIB for r in runs]
            scattered = [r[share]["scatter_bytes"] * images / 8 * K / n / GIB
                         for r, n in zip(runs, sizes)]
            print(f"{name:17}{share:5}", *(f"{x:8.1f}" for x in [
                *peaks, matmuls + attention, matmuls, *scattered]))
    print(f"full, 8 ranks: {images // cfg.batch_size} times all-gathers of "
          f"{counted[0, 8, 1]['rollout']['gather_bytes'] / GIB:.1f} GiB for a rank")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--npu"]:
        try:
            libraries = install_npu()
        except Exception as problem:
            sys.exit(f"{NO_NPU}: {problem!r}")
        del sys.argv[:2]
        name = sys.argv[0]
        globals()[name]() if name in globals() else runpy.run_path(name, run_name="__main__")
    elif sys.argv[1:2] == ["--kill"]:
        kill_often(*map(int, sys.argv[2:]))
    elif sys.argv[1:] == ["--size", "flux-dev"]:
        benchmark_at_real_size()
    else:
        benchmark()
