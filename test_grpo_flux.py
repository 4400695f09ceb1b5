"""Tests against what others wrote or a person can work out: torch.distributions, diffusers, a flow
with a known solution, numbers by hand. Each docstring names the mistake that its test catches.

    python -m pytest -q test_grpo_flux.py   # on the CPU; the first run builds the tiny models
    python test_grpo_flux.py                # the benchmark, on the best device there is
    python test_grpo_flux.py --size flux-dev  # FLUX.1-dev: measured on a device, else counted
"""

import argparse
import ctypes
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import runpy
import shutil
import signal
import socket
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
import torch.multiprocessing as multiprocessing
import torchvision.transforms.functional as TF
import transformers
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import grpo_flux
import reward
from grpo_flux import decode, flux_step, group_advantages, grpo_loss, rollout
from reward import BadInput

SDES, HERE = ("dance", "flow", "cps"), Path(__file__).resolve().parent
CPU, SHAPE = torch.device("cpu"), (4, 8, 8)  # latents of a picture of the tiny FLUX
TWO = ["a red circle", "a blue cross"]
README = (HERE / "README.md").read_text()

def settings(**changes):
    return grpo_flux.Config(**grpo_flux.TINY | dict(
        num_prompts=1, dtype="fp32", ema_decay=0.0, sampling_steps=8, text_length=8) | changes)

def load_run(out, device=CPU, **changes):
    """The models of a run of the tiny FLUX, without the run."""
    prompts = [reward.TINY_PROMPTS], reward.TINY_PROMPTS
    return grpo_flux.Run(settings(steps=1, **changes), prompts, Path(out), device, 0, 1)

JOBS, STARTED = [], {}  # functions of a folder; {name: the folder, what becomes of it}

def job(function):
    """A fixture with the result of a function that waits for processes, beside the tests."""
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
    """Run Python in a process of its own; None takes a variable out of its environment."""
    argv = [str(HERE / word) if (HERE / word).suffix == ".py" else word for word in argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)

def succeed(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def read_metrics(out):
    """The lines of metrics.jsonl of GRPO steps; that of step 0 is an evaluation alone."""
    return [line for line in grpo_flux.read_metrics(out) if "loss" in line]

def results(out):
    """The lines of metrics.jsonl, and the exported model."""
    return read_metrics(out), FluxTransformer2DModel.from_pretrained(out / "export" / "transformer")

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
# flags of short runs of the tiny FLUX
SHORT = "--steps 2 --num_prompts 1 --sampling_steps 4 --eval_images 3 --device cpu".split()
THREE = "--steps 3 --sampling_steps 3 --eval_images 3 --device cpu".split()
LORA = "--lora_rank 4 --lora_alpha 8 --learning_rate 1e-3".split()

with warnings.catch_warnings():  # pytest wants a file of its own for the names of marks
    warnings.simplefilter("ignore")
    faults = pytest.mark.faults

@pytest.fixture
def heavy(request):
    """For what takes minutes: only when it is asked for."""
    if "faults" not in request.config.option.markexpr:
        pytest.skip("python -m pytest -m faults test_grpo_flux.py runs this, too")

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

@pytest.mark.parametrize("sde", ["dance", "flow"])
def test_ode_and_sde_have_the_same_marginals(sde, tmp_path):
    """A score term of the wrong sign, size or std, on a mixture of two bells where v is known. That
    of dance draws marginals.png, which is README's .github/marginals.png."""
    means, weights, width = torch.tensor([-1.0, 1.5]), torch.tensor([0.4, 0.6]), 0.3
    sigmas, axis = grpo_flux.sigma_schedule(100, 3.0), torch.linspace(-2.95, 2.95, 60)

    def mixture(x, s):  # of each bell: variance at σ = s, distance from its mean, density
        var, gap = (1 - s)**2 * width**2 + s**2, x[..., None] - (1 - s) * means
        return var, gap, weights * torch.exp(-gap**2 / (2 * var)) / (2 * torch.pi * var)**0.5

    panels = dict(zip((40, 80, 93, 100), Figure((11, 2.6), layout="constrained").subplots(1, 4)))
    styles = {0: dict(alpha=0.35, fill=True, label="ODE"), 0.7: dict(label="SDE, η = 0.7")}
    for eta in (0, 0.3, 0.7, 1.0):
        x = torch.randn(1, 100_000, 1)
        for i, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:]), 1):
            var, gap, density = mixture(x, s)
            v = (s - (1 - s) * width**2) * gap / var - means  # E[x1 - x0 | x] of each bell
            v = (v * density).sum(-1) / density.sum(-1)
            noise, level = torch.randn_like(x), eta if s_next else 0
            x = flux_step(v, x, s, s_next, level, sde, noise)[0]
            if panel := panels.get(i):
                counts, edges = np.histogram(x, 60, (-3, 3), density=True)
                exact = mixture(axis, s_next)[2].sum(-1)
                assert np.abs(counts - exact.numpy()).max() < 0.04, (eta, s_next)
                if eta in styles:
                    panel.stairs(counts, edges, **styles[eta])
                    panel.plot(axis, exact, "k", lw=0.8, label="exact" if eta else None)
                    panel.set(title=f"σ = {s_next:.2f}", yticks=[])
    panels[40].legend(frameon=False, fontsize=8)
    panels[40].figure.savefig(tmp_path / "marginals.png", dpi=110)

def test_packing_and_positions():
    """Rows for columns, or channels of a patch in another order: it looks like a worse model."""
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
    assert torch.allclose(advantages[8:], -expected, atol=1e-6) and not advantages[4:8].any()
    assert not group_advantages(torch.rand(300, 1).expand(300, 12).flatten(), 12).any()

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

@pytest.mark.parametrize("P, G, S, batches", [
    (2, 12, 12, [(0, range(12)), (1, range(12))]),  # whole groups, prompt by prompt
    (2, 12, 24, [(0, range(12)), (1, range(12))]),
    (2, 12, 8, [(p, range(i, i + 4)) for i in (0, 4, 8) for p in (0, 1)]),  # DanceGRPO's 4 of 12
    (1, 6, 2, [(0, range(6))])])
def test_samples_are_dealt_by_optimizer_step(P, G, S, batches):
    """Processes that count for themselves: more of them would be another experiment."""
    cfg = settings(num_prompts=P, num_generations=G, batch_size=S)
    order = [(5, p, i) for p, samples in batches for i in samples]
    for world in (n for n in range(1, S + 1) if S % n == 0):
        plans = [grpo_flux.plan_step(5, cfg, rank, world) for rank in range(world)]
        parts = zip(*(np.array_split(np.array(plan), P * G // S) for plan in plans))
        assert np.concatenate([*itertools.chain(*parts)]).tolist() == [*map(list, order)]

def test_images_do_not_depend_on_processes_or_batches(tiny):
    """Draws named by the order of calls or by rank; a group split over processes that differs."""
    cfg = settings(num_prompts=2, num_generations=4, micro_batch=4, batch_size=8)
    one = sample(tiny, cfg, grpo_flux.plan_step(1, cfg))[0].x0
    for world in (2, 4):
        parts = [sample(tiny, cfg, grpo_flux.plan_step(1, cfg, r, world))[0] for r in range(world)]
        assert torch.allclose(torch.cat([part.x0 for part in parts]), one, atol=1e-5)
    assert len(one.unique(dim=0)) == 8
    keys = [(1, 0, i) for i in range(12)]
    first, *others = [sample(tiny, settings(micro_batch=n), keys)[0] for n in (1, 4, 12)]
    for other in others:
        assert torch.equal(other.x[:, 0], first.x[:, 0])
        assert torch.allclose(other.x0, first.x0, atol=1e-4)
    apart = sample(tiny, settings(init_same_noise=False), keys)[0]
    assert [len(each.x[:, 0].unique(dim=0)) for each in (first, apart)] == [1, 12]

@pytest.mark.parametrize("flags, steps, trained", [
    ("", 16, 9), ("--timestep_fraction 0.3", 16, 4), ("--sde_window 4", 16, 4), ("", 4, 3),
    ("--sde_window 4 --timestep_fraction 0.5", 16, 2), ("--timestep_fraction 0.29", 101, 29)])
def test_number_of_trained_steps(flags, steps, trained):
    """--sde_window 4 that trains 2 steps; the 4 steps of FLUX.1-schnell that train 1."""
    cfg, _ = grpo_flux.read_command_line(
        ["--model", "a/b", "--sampling_steps", str(steps), *flags.split()])
    assert grpo_flux.num_train_steps(cfg) == trained

def test_window(tiny):
    """Noise or training outside of the window; one that never moves; paths of another prompt."""
    cfg = settings(sampling_steps=6, sde_window=3, window_shift_every=2, timestep_fraction=0.7,
                   num_prompts=2, batch_size=24)
    starts = [grpo_flux.sde_steps(step, cfg).start for step in range(7)]
    assert starts == [0, 0, 1, 1, 2, 2, 0]
    drawn = replace(cfg, window_shift_every=0)
    assert {grpo_flux.sde_steps(step, drawn).start for step in range(30)} == {0, 1, 2}
    keys, predict = grpo_flux.plan_step(3, cfg), mock.Mock(side_effect=tiny.policy.predict)
    x, text = grpo_flux.draw_latents(keys, SHAPE, cfg), tiny.text([TWO[p] for _, p, _ in keys])
    sigmas, x, _, logp = rollout(predict, x, text, keys, cfg, cfg.eta)
    # one path a prompt, then all samples
    assert [len(call.args[0]) for call in predict.call_args_list] == [2] + 2 * [12] * 5
    for t in range(5):
        with torch.no_grad():
            v = tiny.policy.predict(x[:, t], sigmas[t].expand(24, 1, 1), text)
        off = (x[:, t + 1] - x[:, t] - v * (sigmas[t + 1] - sigmas[t])).abs().amax((1, 2))
        assert off.min() > 0.1 if t in (1, 2, 3) else off.max() < 1e-5
        assert logp[:, t].isnan().all() == (t not in (1, 2, 3))
    W, calls, _, update = linear_policy(replace(cfg, num_prompts=1, batch_size=12))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    assert len(calls) == 2 and set(torch.cat(calls).tolist()) == set(sigmas[:3].tolist())

# ------------------------------------------------------------------------------------------ update

# What DanceGRPO's own functions (15cc71d, fp32, told sigma and not int(1000 sigma)) computed in two
# GRPO steps of 6 images and 3 optimizer steps each, for the policy v = x w + 0.3 sin(3 sigma + i);
# weights: after the last of them.
DANCEGRPO = {name: np.array(figures.split(), dtype=np.float32) for name, figures in dict(
    reward="""
        0.42739126 0.48668209 0.44580472 0.48225969 0.4566488 0.48617125 0.30387068
        0.25368619 0.28586107 0.23054038 0.29102647 0.3009879""",
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
        seen["loss"].append(stats["loss"])
        seen["grad_norm"].append(stats["grad_norm"])
        return stats

    monkeypatch.setattr(grpo_flux, "optimizer_step", optimizer_step)
    for step, rewards in enumerate(torch.tensor(DANCEGRPO["reward"]).view(2, 6)):
        keys, text = grpo_flux.plan_step(step, cfg), [torch.zeros(6, 1)]
        x = grpo_flux.draw_latents(keys, (4, 2, 4), cfg)
        trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
        grpo_flux.update(predict, optimizer, trajectory, text, group_advantages(rewards, 6),
                         keys, cfg)
        seen["first_logp"] += trajectory.logp[:, 0].tolist()
        seen["x0_sum"] += trajectory.x0.sum((1, 2)).tolist()
    for name, values in (seen | dict(weights=w.tolist())).items():
        assert values == pytest.approx(DANCEGRPO[name], rel=2e-6, abs=1e-6), name

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_gradient_is_that_of_reinforce(sde, micro_batch):
    """A gradient through x_next, a step scored at another σ, a loss divided by the batch count."""
    cfg = settings(sde=sde, micro_batch=micro_batch, max_grad_norm=1e9, adv_clip_max=1.0)
    W, _, trajectory, update = linear_policy(cfg)
    A = torch.linspace(-1.4, 1.6, 12) * (torch.arange(12) % 3 > 0)
    start, loss = W.detach().double().requires_grad_(), 0
    sigmas = grpo_flux.sigma_schedule(cfg.sampling_steps, cfg.shift)
    for t in range(7):
        x, x_next = trajectory.x[:, t].double(), trajectory.x[:, t + 1].double()
        normal = gaussian(sde, x @ start, x, sigmas[t], sigmas[t + 1], cfg.eta)
        logp = normal.log_prob(x_next).mean((1, 2))
        loss = loss - (A.clamp(-1, 1) * logp).mean() / 7
    loss.backward()
    stats = update(torch.optim.SGD([W], lr=1.0), A)  # W moves by its gradient
    assert torch.allclose(start - W, start.grad, rtol=1e-3, atol=1e-6)
    assert stats["grad_norm"] == pytest.approx(start.grad.norm().item(), rel=1e-3)
    assert stats["updates"] == 1 and stats["first_ratio_dev"] == 0

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_ratio_is_one(tiny, sde, micro_batch):
    """Rollout and update that compute other bits."""
    cfg = settings(sde=sde, micro_batch=micro_batch, sampling_steps=4, timestep_fraction=0.7)
    keys, A = [(3, 0, i) for i in range(12)], torch.linspace(-1, 1, 12)
    trajectory, text = sample(tiny, cfg, keys)
    optimizer = torch.optim.SGD(tiny.policy.transformer.parameters(), lr=0)  # others use it, too
    stats = grpo_flux.update(tiny.policy.predict, optimizer, trajectory, text, A, keys, cfg)
    assert stats["first_ratio_dev"] == 0 and stats["grad_norm"] > 0

@faults
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_compiled_first_ratio(tiny, lora_rank, tmp_path, heavy):
    """A rollout without gradients, or of fewer rows, for which inductor compiles another graph."""
    torch._dynamo.reset()
    run = load_run(tmp_path, compile=True, dtype="bf16", lora_rank=lora_rank, sampling_steps=4,
                   gradient_checkpointing=0.5, sde_window=2, num_generations=4, batch_size=2,
                   micro_batch=2, eval_images=3)
    run.step_prompts *= 3
    (run.out / "images").mkdir()
    windows = {grpo_flux.sde_steps(step, run.cfg) for step in range(3)}
    counts, graphs = torch._dynamo.utils.counters["stats"], []
    for step in range(3):
        _, _, stats = grpo_flux.train_step(step, run)
        graphs.append(counts["unique_graphs"])
        assert stats["first_ratio_dev"] == 0 and stats["updates"] == 2
        run.evaluate(step)
    assert len(windows) > 1 and graphs[0] > 0 and graphs == [counts["unique_graphs"]] * 3

def test_batches_that_move_nothing():
    """Weights that are nan after one nan; calls, weight decay, momentum for a gradient of 0."""
    W, calls, _, update = linear_policy(settings(num_prompts=2, micro_batch=4))
    optimizer, start = torch.optim.AdamW([W], lr=0.1), W.detach().clone()
    flat, good = torch.zeros(12), torch.tensor([1.0, -1.0, 0.0] * 4)
    for batch, updates, skipped in ((flat, 0, 0), (math.nan * good, 0, 1), (good, 1, 0)):
        assert torch.equal(W, start)
        calls.clear()
        stats = update(optimizer, torch.cat([flat, batch]))
        assert (stats["updates"], stats["skipped"]) == (updates, skipped)
        assert len(calls) == 3 * 7 * (updates + skipped)  # 12 samples by 4, 7 SDE steps
        assert bool(optimizer.state) == updates and all(map(math.isfinite, stats.values()))
    assert not torch.equal(W, start) and W.isfinite().all()

def test_steps_are_chosen_for_each_sample():
    """The last, deterministic step trained; a step twice; all samples with the same steps."""
    W, calls, trajectory, update = linear_policy(settings(sampling_steps=16))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    chosen = [frozenset(steps) for steps in torch.stack(calls, 1).tolist()]
    stochastic = set(trajectory.sigmas[:15].tolist())
    assert len(calls) == 9 and len(set(chosen)) > 6  # int(0.6 * 15)
    assert all(len(steps) == 9 and steps <= stochastic for steps in chosen)

@pytest.mark.parametrize("sde", SDES)
def test_kl_divergence(sde):
    """One that forgets the std, is a sum, or has no gradient."""
    v, reference, x = torch.randn(3, 4, 6, 5)
    ours = grpo_flux.gaussian_kl(v.requires_grad_(), reference, x, 0.7, 0.5, 0.6, sde)
    normals = [gaussian(sde, w, x, 0.7, 0.5, 0.6) for w in (v.detach(), reference)]
    expected = torch.distributions.kl_divergence(*normals).mean((1, 2)).float()
    assert torch.allclose(ours, expected, rtol=1e-3)
    ours.sum().backward()
    assert v.grad.abs().min() > 0

def test_ema_weights(tiny):
    """A decay that is taken the other way round; weights that the average replaces for good."""
    policy = grpo_flux.Policy(replace(tiny.cfg, ema_decay=0.9), SHAPE[1:], CPU)
    weight, *_ = policy.parameters.values()
    values = [weight.detach().clone() + i for i in range(4)]
    for value in values[1:]:
        weight.data.copy_(value)
        policy.update_ema(0.9)
    mean = 0.9**3 * values[0] + 0.1 * (0.9**2 * values[1] + 0.9 * values[2] + values[3])
    for _ in range(2):  # it leaves both as they were
        with policy.ema_weights():
            assert torch.allclose(weight, mean, atol=1e-6)
        assert torch.equal(weight, values[3])

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
    file, prompts = tmp_path / "prompts.txt", [f"prompt {i}" for i in range(count)]
    file.write_text("\n".join(prompts))
    cfg = settings(num_prompts=P, steps=15, prompts=str(file))
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
    return folder / "run", succeed(shell(
        "grpo_flux.py", *flags.split(), "--reward", "hps:0.7,clip:0.3", cwd=folder))

def test_run(tiny, short_run):
    """A run that ends in an error, writes outside of --out, or exports what it began with."""
    run, out = short_run
    assert "1 prompts x 12 images, 5 of 6 denoising steps trained, 60 transitions" in out
    assert "1 optimizer steps, 100% on-policy" in out and "24 prompts, the first: a red" in out
    names = {str(path.relative_to(run)) for path in run.parent.rglob("*.*")
             if "tensorboard" not in path.parts}
    assert names == {"config.json", "metrics.jsonl", "reward.png", "before_after.png",
                     "checkpoints/step_00003/shard-00001-model-00001-of-00001.safetensors",
                     *(f"images/step_{step:05d}.png" for step in (0, 2, 3)),
                     "export/transformer/config.json", f"export/transformer/{WEIGHTS}"}
    lines, model = results(run)
    for line in lines:
        assert line["ratio"] == 1 and line["first_ratio_dev"] == 0 and line["grad_norm"] > 0
        assert line["zero_std_frac"] == 0 and all(map(math.isfinite, line.values()))
        assert "reward" not in line and {"hps", "hps_std", "clip", "clip_std"} <= line.keys()
    judged = {"held_out_hps", "held_out_clip", "accuracy", *RIGHT}
    evaluated = [line for line in grpo_flux.read_metrics(run) if judged <= line.keys()]
    assert [line["step"] for line in evaluated] == [0, 2, 3] and len(lines) == 3
    assert evaluated[0].keys() == judged | {"step"}
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

SLICES = "--num_prompts 2 --batch_size 8 --learning_rate 1e-4".split()  # 4 images of each prompt

@job
def two_ranks(folder):
    """The folder of a run of two processes and of one from its checkpoint; a replay's output."""
    def run(*flags):
        return succeed(shell(*TORCHRUN, "grpo_flux.py", *flags, cwd=folder))

    run(*THREE, *SLICES, *"--out run --save_every 2 --record A --deterministic".split())
    run(*THREE, *SLICES, "--out", "again", "--resume", "run/checkpoints/step_00002")
    return folder, run("--device", "cpu", "--deterministic", "--replay", "A")

def test_the_same_experiment_on_any_number_of_processes(two_ranks, tmp_path):
    """Counts, prompts or draws by process; gradients summed and not averaged; weights that part."""
    def read(folder):
        lines, model = results(folder)
        return lines, torch.nn.utils.parameters_to_vector(model.parameters())

    expected, weights = read(two_ranks[0] / "run")
    checkpoint = str(two_ranks[0] / "run" / "checkpoints" / "step_00002")
    for name, *flags in (("all", "--micro_batch", "8"), ("four", "--micro_batch", "4"),
                         ("resumed", "--resume", checkpoint)):
        grpo_flux.main([*THREE, *SLICES, *flags, "--out", str(tmp_path / name)])
        lines, others = read(tmp_path / name)
        for b in lines:
            a = expected[b["step"] - 1]
            assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert [line["step"] for line in lines] == ([3] if name == "resumed" else [1, 2, 3])
        assert (others - weights).norm() < 1e-5 * weights.norm()
    assert torch.equal(read(two_ranks[0] / "again")[1], weights)

def test_reward_rises(tiny, tmp_path, monkeypatch):
    """An advantage or a loss of the wrong sign: everything runs, and the reward falls."""
    monkeypatch.chdir(tmp_path)
    write(Path("colour.py"), "red = lambda x, prompts: (x[:, 0] - x[:, 1]).mean((1, 2))")
    grpo_flux.main("--device cpu --reward colour:red --steps 12 --num_prompts 1 --eval_images 2 "
                   "--learning_rate 3e-4 --out run".split())
    rewards = [line["reward"] for line in read_metrics(Path("run"))]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.02

def test_every_setting_is_explained_and_read(capsys):
    """A flag that nothing reads, a number without limits, help or limits that --help lacks."""
    settings, source = fields(grpo_flux.Config), inspect.getsource(grpo_flux)
    by_name = {"hps", "hps_arch", "clip", "clip_arch", "pickscore"}  # read with getattr
    with pytest.raises(SystemExit):
        grpo_flux.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in settings:
        assert f"cfg.{f.name}" in source or f.name in by_name
        assert (f.metadata["low"] is None) == (f.type not in (int, float))
        default = "" if f.default in ("", ()) else f"default {f.default}"
        limits = "" if f.metadata["low"] is None else f"{f.metadata['low']} to "
        assert f.metadata["help"] in text and default in text and limits in text
    sides = [(cfg.height, cfg.width) for cfg, _ in map(grpo_flux.read_command_line, (
        [], ["--width", "64"], ["--model", "a/b"], ["--model", "a/b", "--width", "64"]))]
    assert sides == [(32, 32), (32, 64), (720, 720), (720, 64)]  # a flag, then TINY, then Config

def test_prompts_are_encoded_once(tiny, tmp_path, monkeypatch, capsys):
    """Encoders that are loaded for nothing; embeddings of another run's length or model."""
    def encode(*prompts, **changes):
        run = types.SimpleNamespace(out=tmp_path, rank=0, device=CPU, eval_prompts=prompts,
                                    step_prompts=[])
        run.text_files = grpo_flux.Run.encode_prompts(run, replace(tiny.cfg, **changes))
        return run

    run = encode("a red circle", "a red circle and a blue cross", text_length=6)
    assert "1 of 2 prompts are cut to 6 tokens" in capsys.readouterr().out
    one, two = (grpo_flux.Run.text(run, ["a red circle"] * n)[0] for n in (1, 2))
    assert one.shape == (1, 6, 64) and two.shape == (2, 6, 64)
    assert {path.parent for path in run.text_files.values()} == {tmp_path / "text"}
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert encode("a red circle", text_length=6).text_files.keys() == {"a red circle"}
    for change in (dict(text_length=7), dict(dtype="bf16"), dict(model="another")):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            encode("a red circle", **{"text_length": 6} | change)

def test_blocks_are_gathered_once(tiny):
    """FSDP that gathers all weights again at every call of a rollout."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        sharded = types.SimpleNamespace(
            policy=grpo_flux.Policy(tiny.cfg, SHAPE[1:], CPU), text=tiny.text)
        with torch.profiler.profile() as profile:
            sample(sharded, tiny.cfg, [(0, 0, i) for i in range(12)])
    finally:
        dist.destroy_process_group()
    gathers = [event for event in profile.events() if event.name == "c10d::_allgather_base_"]
    assert len(gathers) == 2 + 2 + 1  # blocks, and a root

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
    assert all(float(number) == 0 for row in rows for number in row[2:3])
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
    coff = [{int(name.split("_")[1]) for name in f if "coff" in name} for f in (first, second)]
    assert coff[0] == {n for n in range(48) if n % 4 < 3}  # none in the last step
    assert coff[1] == {n + 48 for n in coff[0]}
    drawn = grpo_flux.randn((16, 16), 0, grpo_flux.NOISE, 1, 0, 5, 2)
    assert torch.equal(second["coff_70_0"], drawn[None])  # (12 + 5) * 4 + 2

def foreign_record(tiny, folder, settings):
    """A record by plain Python from README's table: random draws, results of single functions."""
    cfg, prompts, B, T = replace(tiny.cfg, **settings), ["a blue cross"], 12, 4
    draws = {"input_latents_1_0": torch.randn(1, *SHAPE)}
    draws |= {f"coff_{n}_0": torch.randn(1, 16, 16) for n in range(B * T)}
    draws["perms_1_0"] = torch.stack([torch.randperm(T - 1) for _ in range(B)])
    predict, sigmas = tiny.policy.predict, grpo_flux.sigma_schedule(T, cfg.shift)
    levels, text = torch.tensor(sigmas).view(-1, 1, 1), tiny.text(prompts * B)
    x = grpo_flux.pack_latents(draws["input_latents_1_0"]).expand(B, -1, -1)
    result, states, logps = {"text.0": text[0], "text.1": text[1]}, [], []
    with torch.no_grad():
        for t in range(T):
            result[f"velocity.{t}"] = v = predict(x, levels[t].expand(B, 1, 1), text)
            noise = torch.cat([draws[f"coff_{i * T + t}_0"] for i in range(B)])
            states.append(x)
            x, x0, logp = flux_step(v, x, *sigmas[t:t + 2], cfg.eta * (t < T - 1), noise=noise)
            logps.append(logp)
        images, states = decode(tiny.vae, x0, SHAPE[1:], B), torch.stack(states, 1)
        for k, t in enumerate(draws["perms_1_0"].T):
            v = predict(states[torch.arange(B), t], levels[t], text)
            result[f"velocity_in_update.{k}"] = v
    scores = tiny.hps(images, prompts * B)
    result |= {"latents.0": states, "latents.1": x0, "logp.0": torch.stack(logps[:-1], 1),
               "images.0": images, "reward.0": scores, "advantages.0": group_advantages(scores, B)}
    tensors = {name: x.contiguous() for name, x in (draws | result).items()}
    write_info(folder, tensors, "step_00001_rank_0.safetensors", **settings, step_prompts=[prompts])
    return tensors

def test_replay_of_a_foreign_record(tiny, tmp_path):
    """`rewards.0`, the wrong prompts or shapes, or a wrong velocity that are called OK."""
    settings = dict(steps=1, num_prompts=1, sampling_steps=4, dtype="fp32", text_length=8)
    tensors = foreign_record(tiny, tmp_path / "A", settings)
    status, rows, end = replay(tmp_path / "A")
    assert (status, end) == (0, ["replay OK"])
    assert [name for name, row in rows.items() if row[-1] != "OK"] == ["loss", "grad_norm"]

    def spoil(change, **info):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        write_info(tmp_path / "A", changed, "step_00001_rank_0.safetensors", **settings | dict(
            model="tiny", step_prompts=[["a blue cross"]]) | info)

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
            grpo_flux.main(f"--replay {tmp_path}/A --out {tmp_path}/B --device cpu".split())
        assert "--reward" not in str(refusal.value) and "--steps" not in str(refusal.value)

def change_weight(transformer):
    transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] += 1e-2
    return transformer

HALVES = partial(transformer_flux.apply_rotary_emb, use_real_unbind_dim=-2)  # FLUX has neighbours

@pytest.mark.parametrize("target, change, off, measured", [
    # one weight of 1.85 million; a reward that is off by 0.02 % on the same images; a rotary
    # embedding, in rollout and update alike, that makes noise while loss and ratio look right
    ("grpo_flux.load_transformer", change_weight, "", (1e-6, 1e-3)),
    ("reward.HPS.__call__", lambda scores: scores * 1.0002, "reward", (1.9e-4, 2.1e-4)),
    ("diffusers.models.transformers.transformer_flux.apply_rotary_emb", HALVES, "velocity",
     (0.05, 1))])
def test_replay_finds(target, change, off, measured, record, monkeypatch):
    """A change of one stage that is not seen, or that the table shows at another stage."""
    original = pkgutil.resolve_name(target)
    monkeypatch.setattr(target, change if change is HALVES else lambda *x: change(original(*x)))
    status, rows, end = replay(record, "--deterministic")
    low, high = measured
    assert low < float(rows[off or "velocity"][2]) < high and float(rows["text"][2]) == 0
    if off:
        assert end == [f"first OFF: step 1, rank 0, stage {off}; later stages inherit its error",
                       "replay OFF"] and status == 3
    if change is HALVES:
        assert rows["loss"][-1] == rows["reward"][-1] == "OK"  # given the recorded images
        assert rows["images"][-1] == "OFF"

@pytest.mark.parametrize("seed", range(2))
def test_replay_in_bf16_forgives_rounding_alone(tiny, tmp_path, seed, monkeypatch):
    """A correct port called OFF, as a ratio at the clip flips; or a wrong one called OK."""
    flags = ("--steps 2 --num_prompts 1 --num_generations 6 --batch_size 2 --sampling_steps 16 "
             "--eta 0.3 --learning_rate 1e-5 --dtype bf16 --device cpu --eval_images 2 --seed")
    record = tmp_path / "A"
    grpo_flux.main([*flags.split(), str(seed), "--record", str(record), "--out",
                    str(tmp_path / "run")])
    status, rows, end = replay(record, "--attention", "_native_math")
    tiny.policy.transformer.set_attention_backend("native")  # diffusers keeps one for all models
    assert (status, end) == (0, ["replay OK"]) and int(rows["loss"][1]) == 2
    assert float(rows["velocity"][2]) > 0  # another kernel, indeed
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", HALVES)
    assert replay(record)[1]["velocity"][-1] == "OFF"

def test_compare_two_runs(tmp_path, capsys):
    """A mean over everything that hides ten bad steps; steps that only one run has."""
    for name, rewards in dict(a=[0.5] * 40, b=[0.5] * 10 + [0.52] * 20,
                              c=[0.5] * 10 + [0.53] * 10).items():
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / name / "images" / "step_00000.png")
        lines = [dict(step=0, held_out=0.5), *(dict(step=i, reward=r, reward_std=0.1, loss=1e-6)
                                               for i, r in enumerate(rewards, 1))]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for other, status, words in (("b", 0, "+2.67%"), ("c", 3, "+6.00%")):
        with pytest.raises(SystemExit) as end:
            grpo_flux.main(["--compare", str(tmp_path / "a"), str(tmp_path / other)])
        out = capsys.readouterr().out
        assert end.value.code == status and words in out
        assert out.endswith(f"compare {'OFF' if status else 'OK'}\n")
        assert Image.open(tmp_path / other / "compare.png").size > (500, 500)

def test_deterministic_sets_every_switch(monkeypatch):
    """A switch that has another name than its library reads."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch, "npu", mock.Mock(), raising=False)
    try:
        reward.make_deterministic(3)
        assert torch.are_deterministic_algorithms_enabled() and torch.initial_seed() == 3
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ == dict(HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1", PYTHONHASHSEED="3",
                              ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0",
                              CLOSE_MATMUL_K_SHIFT="1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
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
    """A side rounded, a crop off by one, no projection, a scale left in, padding attended to."""
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
    shutil.copytree(pick, tmp_path / "pick", ignore=shutil.ignore_patterns(part))
    with pytest.raises(BadInput, match="--pickscore .*: must be transformers' CLIP model"):
        reward.PickScore(str(tmp_path / "pick"))

def test_checkpoints_of_others(tiny, tmp_path):
    """Weights refused for how they were saved; code in a file; another model's mean and std."""
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
    for saved, words in (({"state_dict": state, "args": types.SimpleNamespace()}, "Namespace"),
                         ([state], "weights of --clip_arch"), ({"model": {1: 2}}, "weights of")):
        torch.save(saved, file)
        with pytest.raises(BadInput, match=f"(?s)--clip .*clip.pt: .*{words}"):
            reward.HPS(file, tiny.cfg.hps_arch, flag="--clip")
    assert reward.new_clip("MobileCLIP-S1")[0].visual.image_mean == (0, 0, 0)  # as all its weights

def test_weights_from_the_hub(tmp_path, monkeypatch):
    """Loud retries, a message without flag or remedy, a cached file that is not found offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"--hps \(not given\): .*no connection; .* path with --hps"):
        reward.resolve_weights("--hps", "")
    folder = tmp_path / "models--owner--name"
    write(folder / "refs" / "main", "1")
    write(folder / "snapshots" / "1" / "a.pt", "")
    assert reward.resolve_weights("--clip", "owner/name/a.pt").endswith("snapshots/1/a.pt")
    download = mock.Mock(side_effect=OSError(28, "No space left"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.utils.get_session", mock.Mock())  # now there is a network
    with pytest.raises(BadInput, match=r"--clip o/n/a.pt: .*correct.*licence on https.*No space"):
        reward.resolve_weights("--clip", "o/n/a.pt")
    download.assert_called_once_with("o/n", "a.pt", local_files_only=False)
    for flag, value in (("--clip", "a/b"), ("--clip", "/x/a.pt"), ("--pickscore", "a/b/c")):
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
        return (sys.path[:], sys.argv[:], signal.getsignal(signal.SIGTERM), warnings.filters[:],
                torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())

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

NO_MEMORY = mock.Mock(side_effect=torch.OutOfMemoryError("of the device"))

@pytest.mark.parametrize("function, error, words", [
    (lambda i, p: i, BadInput, r"--reward x: .*2 finite numbers .* in step 3, .*\(2, 3, 4, 4\)"),
    (lambda i, p: 1 / 0, BadInput, "Zero"), (lambda i, p: sys.exit(1), BadInput, "SystemExit"),
    (lambda i, p: [1.0, float("nan")], BadInput, r"in step 3, prompts 'a' .*\[1.0, nan\]"),
    (NO_MEMORY, torch.OutOfMemoryError, "^of the device"),
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
    """Half a file under its name; ranks that remove each other's files; leftovers in the result."""
    for name in (".writing-x", ".old-x", "x"):
        write(tmp_path / name / "before", "")
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
    assert [file.name for file in tmp_path.iterdir()] == [".old-x"]
    reward.remove(tmp_path / ".old-x")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("given, used", [(None, "1200"), ("300", "300")])
def test_npus(given, used, monkeypatch):
    """HCCL's 120 s, too few for a slow disk; counts of processes over which it fails."""
    monkeypatch.setattr("torch.npu", mock.Mock(device_count=lambda: 8), raising=False)
    monkeypatch.setattr("torch.device", mock.Mock())
    environment = dict(LOCAL_RANK="1") | (dict(HCCL_CONNECT_TIMEOUT=given) if given else {})
    monkeypatch.setattr("os.environ", environment)
    reward.select_device("npu")
    torch.device.assert_called_once_with("npu", 1)
    assert environment["HCCL_CONNECT_TIMEOUT"] == used
    for size in (3, 5, 6, 7):
        environment["LOCAL_WORLD_SIZE"] = str(size)
        with pytest.raises(BadInput, match=f"--nproc_per_node {size}: must be 1, 2, 4, 8"):
            reward.select_device("npu")
    monkeypatch.setattr("torch.device", lambda name: types.SimpleNamespace(type=name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="--compile: .*triton-ascend"):
        reward.check_compile("npu")

def score_lines(tiny, capsys, *flags):
    """The lines that reward.py prints for flags: {path: score}, in their order."""
    flags = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu", *flags]
    reward.main([str(flag) for flag in flags])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {Path(path).name: float(value) for value, path in lines}

def test_pictures_as_people_have_them(tiny, tmp_path, capsys):
    """A photo on its side, black for transparent, hidden files; scores beside the wrong file."""
    rng = np.random.default_rng(0)
    red, blue = (Image.fromarray(reward.draw(p, rng)) for p in ("a red circle", "a blue cross"))
    exif, clear = Image.Exif(), red.convert("RGBA")
    exif[274] = 6  # to be turned to the right
    clear.putalpha(Image.fromarray((np.asarray(red) != (236, 236, 230)).any(-1)).convert("L"))
    white = Image.new("RGBA", clear.size, "white")
    white.paste(clear, mask=clear)
    pictures = {"red.png": red, "blue.png": blue, "red.gif": red.quantize(), "red.tiff": red,
                "grey.png": red.convert("L"), "wide.png": red.resize((64, 32)), "clear.png": clear,
                "white.png": white.convert("RGB"), "red.jpg": red, ".hidden.png": red,
                "deep.png": Image.fromarray(np.asarray(red.convert("L")).astype("uint16") * 257)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    red.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    (tmp_path / "red.jpg").rename(tmp_path / "red.jfif")
    (tmp_path / "notes.txt").touch()
    scores = score_lines(tiny, capsys, "--prompt", "a red circle", "--batch", 2, tmp_path)
    assert len(scores) == 11 and {"side.png", "red.gif", "red.jfif"} < scores.keys()
    assert scores["red.png"] == scores["red.tiff"] == scores["side.png"] > scores["blue.png"] + 0.2
    assert scores["clear.png"] == scores["white.png"] != scores["red.png"] != scores["grey.png"]
    assert scores["deep.png"] == scores["grey.png"]  # 16 bits of grey
    files = reward.find_pictures([tmp_path / ".hidden.png", tmp_path])
    assert files[0].name == ".hidden.png"  # asked for by name

def test_reward_command_line(tiny, tmp_path, capsys, monkeypatch, pick):
    """An own reward or PickScore that is not called; a terminal that cannot print a name."""
    name = os.fsdecode(b"0_a_caf\xc3\xa9\xff.png")
    Image.fromarray(reward.draw("a red circle", np.random.default_rng(0))).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("own_light.py").write_text("def f(images, prompts):\n    return [len(p) for p in prompts]")
    assert list(score_lines(tiny, capsys, "--reward", "own_light:f", tmp_path).values()) == [6]
    score = reward.PickScore(pick)(reward.read_image(name), ["a"]).item()
    printed = score_lines(tiny, capsys, "--reward", "pickscore", "--pickscore", pick, "--prompt",
                          "a", tmp_path)
    assert list(printed.values()) == [pytest.approx(score, abs=1e-5)]
    monkeypatch.setattr("sys.stdout", types.SimpleNamespace(encoding="ascii"))
    assert reward.printable(name + "\x1b\u4e2d") == r"0_a_caf\xe9\udcff.png\x1b\u4e2d"

def test_scores_of_two_devices(tiny, tmp_path, capsys):
    """Pictures 0, 1, 10, 11, 2 with others' prompts or scores; an error that is not relative."""
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

# ---------------------------------------------------------------------------------- what goes wrong

JUDGES = """import torch
number, calls = 3, []
async def wait(images, prompts): pass
def nan(images, prompts): return torch.tensor([0.0, float("nan")] * (len(images) // 2))
def later(images, prompts):
    calls.append(1)
    return images.mean((1, 2, 3)) / (len(calls) < 4)
"""
FILES = {
    "judges.py": JUDGES, "syntax.py": "def", "licence.py": "raise OSError('no licence')",
    "exits.py": "import sys; sys.exit('bye')", "json.py": "", "reward.py": "",
    "parser.py": "import argparse as a\np = a.ArgumentParser()\n"
    "p.add_argument('--x', required=1)\np.parse_args()", "page.png": "<html>", "page.pt": "<html>",
    "one.txt": "a red circle", "empty.txt": "\n \n", "zeros.txt": "a\0", "p.json": json.dumps(TWO),
    "latin.txt": b"B\xe4r", "other.jsonl":
    '{"image": "0001.png", "prompt": "y", "score": 1}', "cut.png": b"\x89PNG\r\n\x1a\n\0\0"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 424\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"

MODELS = {  # a copy of the tiny FLUX: (file or folder, what it becomes, words of the message)
    "fill": ("model_index.json", {"_class_name": "FluxFillPipeline"}, "it is a FluxFillPipeline"),
    "quantized": ("transformer/config.json", {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
    "fp16": (f"transformer/{WEIGHTS}", "a.fp16.safetensors", "a variant such as fp16"),
    "pickled": (f"vae/{WEIGHTS}", "diffusion_pytorch_model.bin", WEIGHTS),
    "cut": (f"transformer/{WEIGHTS}", "", "its files whole"),
    "pointer": ("tokenizer_2/tokenizer.json", POINTER, "git lfs pull"),
    "no_words": ("tokenizer/tokenizer.json", None, "2 tokens, its encoder"),
    "no_vae": ("vae", None, "vae"), "no_tokenizer": ("tokenizer_2", None, "104 tokens, its"),
    "no_shard": (f"transformer/{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"x": '
                 '"part-00002-of-00003.safetensors"}}', "part-00002")}
RECORDS = dict(record={}, text=dict(seed="a"), few=dict(num_prompts=2), long=dict(steps=2),
               null=dict(step_prompts=None), ranks={}, zero=dict(steps=0), cut={})
RUNS = dict(run={}, lora=dict(lora_rank=4), other=dict(model="FLUX.1-dev"), cut={}, lost={})

def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

def write_info(folder, tensors, file, **info):
    write(folder / file, save(tensors))
    write(folder / "config.json", json.dumps({"model": "tiny"} | info))

@pytest.fixture(scope="session")
def mess(tiny, tmp_path_factory):
    """A folder full of files with something wrong."""
    folder, picture = tmp_path_factory.mktemp("mess"), Image.new("RGB", (1, 1))
    for name in ("pictures", "busy", "empty", f"cache/tiny-{grpo_flux.TINY_VERSION}"):
        (folder / name).mkdir(parents=True)
    for name in ("a red dot.png", "0001.png"):
        picture.save(folder / "pictures" / name)
    for name, content in FILES.items():
        write(folder / name, content)
    for name, (file, change, _) in MODELS.items():
        path = Path(shutil.copytree(tiny.cfg.model, folder / name)) / file
        if isinstance(change, dict):
            change_json(path, **change)
        elif change is None:
            reward.remove(path)
        elif change.endswith((".safetensors", ".bin")):
            path.rename(path.with_name(change))
        else:
            write(path, change)
    for name, info in RECORDS.items():
        for rank in range(1 + (name == "ranks")):
            write_info(folder / f"{name}_tape", {"loss.0": torch.ones(4)},
                       f"step_00001_rank_{rank}.safetensors",
                       **dict(steps=1, num_prompts=1, step_prompts=[TWO[:1]]) | info)
    for name, info in RUNS.items():
        for step in range(3, 5):
            write_info(folder / f"{name}_run", {"weights.x": torch.ones(4)},
                       f"checkpoints/step_0000{step}/x.safetensors",
                       **asdict(settings()) | {"model": "tiny"} | info)
    for file in ("cut_tape/step_00001_rank_0", "cut_run/checkpoints/step_00004/x"):
        os.truncate(folder / f"{file}.safetensors", 80)
    (folder / "lost_run" / "config.json").unlink()
    return folder

def table(cases):
    return [(f"--{name} {value}", words) for words, flags in cases.items()
            for name, value in (flag.split("=") for flag in flags.split())]

# (flags, words of the message): refused before a process group, a device or a model is touched
EARLY = [
    *table({
        "from 1 to": "steps=0 steps=99999999999", "from 0 to": "seed=-1 kl_beta=nan ema_decay=1",
        "must be from": "eta=0 eta=inf", "below": "sde_window=8", "invalid int": "steps=1e3",
        "invalid float": "eta=much", "must be one of": "sde=ddpm device=tpu",
        "must divide the": "batch_size=9 batch_size=6 batch_size=96 num_generations=11",
        "multiple of 16": "height=40 width=721", "above 0": "reward=hps:0",
        "function": "reward=hps:nan reward=nothing_here:f", "no attribute": "reward=judges:none",
        "of type int": "reward=judges:number", "it is async": "reward=judges:wait",
        "(SyntaxError": "reward=syntax:f", "no licence": "reward=licence:f",
        "parses arguments (SystemExit: bye)": "reward=exits:f",
        "are required: --x": "reward=parser:f", "rename json.py": "reward=json:f",
        "rename reward.py": "reward=reward:f",
        "text file in UTF-8": "prompts=none.txt prompts=zeros.txt prompts=latin.txt prompts=busy",
        "is empty": "prompts=empty.txt", "> prompts.txt": "prompts=p.json",
        "new folder": "record=run_run",
        "folder of --record": "replay=. replay=none replay=text_tape",
        "with --replay zero_tape": "replay=zero_tape",
        "--steps 2": "replay=long_tape", "of as many processes, 1": "replay=ranks_tape",
        "must have step_prompts": "replay=few_tape replay=null_tape",
        "whole folder such as": "resume=nowhere resume=run_run out=cut_run out=lost_run "
                                "resume=cut_run/checkpoints/step_00004",
        "must be 4": "out=lora_run", "must be FLUX.1-dev": "out=other_run"}),
    ("--steps", "one argument"), ("--step 3", "unrecognized"), ("3", "unrecognized"),
    ("--resume none --out run_run", "holds a run"), ("--out run_run --steps 2", "at least 4"),
    ("--resume run_run/checkpoints/step_00003 --out run_run", "has gone on to"),
    ("--record a --replay record_tape", "not with --replay"), ("--compare run_run .", "two runs"),
    ("--model a/b", "--prompts (not given)"), ("--compare run_run", "2 arguments"),
    ("RANK=0 WORLD_SIZE=8 --num_prompts 1 --batch_size 12", "number of processes, 8")]

# refused by what must be opened, or called, to know; without --hps the tiny one
LATE = [
    *table({
        "CANN": "device=npu", "CUDA build": "device=cuda", "new folder": "record=one.txt/x",
        "not found; must be a file": "hps=none.pt", "error: --attention x: diff": "attention=x",
        "written to, and that no other": "out=one.txt out=one.txt/x out=/proc/x out=busy",
        "not of this policy": "out=run_run", "in step 3, prompts 'a": "reward=judges:later",
        "in the evaluation of step 0, prompts 'a red circle'": "reward=judges:nan",
        "rank_0.safetensors: must be a whole": "replay=cut_tape"}),
    ("XDG_CACHE_HOME=one.txt", "to write models to"),
    ("RANK=0", "not all of torchrun's"), ("RANK=0 WORLD_SIZE=1", "not all of torchrun's"),
    *((f"--model {name} --prompts one.txt {{hps}}", words) for name, words in [
        *((name, words) for name, (*_, words) in MODELS.items()), ("a/b", "hf auth login"),
        *((name, "a folder or hub name") for name in ("nowhere", ".", "\x1b[31mred"))])]

# refused by reward.py
SCORING = [
    ("pictures --device npu", "CANN"), ("pictures --device tpu", "auto or cuda"),
    *((name, f"{name}: must be a picture") for name in ("cut.png", "page.png", "none.png")),
    ("empty", "must be a picture"), ("pictures", "--prompt (not given)"),
    ("pictures --batch 0", "at least 1"), ("pictures --batch many", "invalid int"),
    ("pictures --prompts one.txt", "1 prompts for 2"),
    ("pictures --prompt x --prompts one.txt", "not allowed with"),
    *((f"pictures --prompt x {flags}", words) for flags, words in {
        "--save none/x": "folder that exists", "--against other.jsonl": "--save wrote",
        "--against none.jsonl": "--against none.jsonl", "--hps none.pt": "--hps none.pt",
        "--hps page.pt": "--hps page.pt: must be a whole", "--hps a/b/c.pt": "no connection",
        "--pickscore a/b --reward pickscore": "no connection",
        "--reward clip": "--clip (not given)", "--reward none": "must be hps, clip",
        "--reward hps,clip": "one reward"}.items())]

@faults
@pytest.mark.parametrize("program, flags, words", [
    (program, *row) for program, rows in dict(early=EARLY, late=LATE, scoring=SCORING).items()
    for row in rows])
def test_refused_in_one_line(program, flags, words, tiny, mess, tmp_path, monkeypatch, capfd):
    """A traceback, or hours of training on half a file, in the place of one line about the flag."""
    monkeypatch.chdir(mess)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delattr("torch.npu", raising=False)
    given = flags.format(hps=f"--hps {tiny.cfg.hps} --hps_arch {tiny.cfg.hps_arch}").split(" ")
    environment = [word for word in given if re.match("[A-Z_]+=", word)]
    for word in environment:
        monkeypatch.setenv(*word.split("="))
    argv = [word for word in given if word not in environment]
    if program == "early":
        monkeypatch.setattr(grpo_flux, "init_distributed", lambda _: pytest.fail("was not at once"))
    elif "--device" not in argv:
        argv += ["--device", "cpu"]
    if program == "late":
        argv += ["--out", f"{tmp_path}/out"] if "--out" not in argv else []
        argv += "--eval_images 4 --num_prompts 1 --batch_size 12".split()
    with FileLock("busy/lock"), pytest.raises(SystemExit) as end:
        try:
            (reward if program == "scoring" else grpo_flux).main(argv)
        except BadInput as problem:
            reward.exit_with_error(problem)
    *before, line = capfd.readouterr().err.splitlines()
    assert words in line and line.startswith("error: ") and line.isprintable()
    assert end.value.code == 2 and not any("Traceback" in text for text in before)
    assert not before or program != "early"
    assert any(word in line for word in [*given, "(not given)", "RANK"])

@job
def strange_place(folder):
    """A run where much is strange or broken around it, and one without docstrings."""
    write(folder / "tensorboard" / "__init__.py", "raise TypeError('no descriptors')")
    write(folder / "prompts.txt", "ein grüner Bär\n\U0001f600")
    run = partial(
        shell, "grpo_flux.py", *SHORT, "--prompts", "prompts.txt", "--out", "run", cwd=folder,
        MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONPATH=str(folder), HOME=None,
        LANG=None, LC_ALL="C", PYTHONIOENCODING="ascii", SLURM_PROCID="1", SLURM_NTASKS="4",
        SLURM_LOCALID="1", WORLD_SIZE="4", LOCAL_RANK="1")
    return run(PYTHONOPTIMIZE="1"), run(PYTHONOPTIMIZE="2")

@faults
def test_surroundings(strange_place):
    """A run that ends late because of its terminal, TensorBoard, environment or stripped docs."""
    done, refused = strange_place
    assert "no TensorBoard: no descriptors" in succeed(done) and "look at run" in done.stdout
    assert "ein gr\\xfcner B\\xe4r" in done.stdout and "Traceback" not in done.stderr
    assert refused.returncode == 2 and re.fullmatch("error: PYTHONOPTIMIZE 2.*\n", refused.stderr)

@faults
def test_other_models_and_prompts(tiny, tmp_path, capfd):
    """FLUX.1-schnell given guidance; a prompt that names a file, or steers the terminal."""
    model, tape = tmp_path / "models" / "FLUX.1-schnell", tmp_path / "tape"
    shutil.copytree(tiny.cfg.model, model, ignore=shutil.ignore_patterns("scheduler"))
    change_json(model / "transformer" / "config.json", guidance_embeds=False)
    file, prompts = model / "transformer" / WEIGHTS, tmp_path / "p.txt"
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

@faults
@pytest.mark.parametrize("name, calls, wrong, words", [
    ("velocity", 19, lambda v: v * math.nan, "an image of step . is not finite"),
    ("group_advantages", 1, lambda A: A * math.nan, "the gradient was not finite in steps 2 to 4"),
    ("rollout", 2, lambda t: t._replace(logp=t.logp + 1e-4), "the first ratio is off by 1"),
    ("load_transformer", 0, NO_MEMORY, "a lower --micro_batch")])
def test_numbers_that_go_wrong(name, calls, wrong, words, tiny, tmp_path, monkeypatch):
    """Two days of steps that train nothing; the reward blamed for what the policy did."""
    count, original = itertools.count(), getattr(grpo_flux, name)
    monkeypatch.setattr(grpo_flux, name, lambda *x, **y: (  # wrong after so many calls
        wrong if next(count) >= calls else lambda x: x)(original(*x, **y)))
    with pytest.raises((FloatingPointError, torch.OutOfMemoryError)) as end:
        grpo_flux.main([*SHORT, "--steps", "9", "--save_every", "1", "--out", str(tmp_path)])
    assert re.search(words, grpo_flux.explain(end.value))
    notes = [f"the same command goes on from {path}"
             for path in grpo_flux.checkpoints(tmp_path)[-1:]]
    assert notes == getattr(end.value, "__notes__", [])
    skipped = [line["skipped"] for line in read_metrics(tmp_path)]
    assert name != "group_advantages" or skipped == [0, 1, 1, 1]

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_stops(number, tiny, tmp_path, monkeypatch, capfd):
    """Steps lost when a machine goes; a handler that stays and swallows the next signal."""
    monkeypatch.chdir(tmp_path)
    flags, handler = [*SHORT, "--eval_images", "1"], signal.default_int_handler
    before = signal.signal(number, handler)  # a job in the background may ignore it
    with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
        patch.setattr(grpo_flux, "plan_step", lambda *args, plan=grpo_flux.plan_step: (
            os.kill(os.getpid(), number) or plan(*args)))  # in step 1
        grpo_flux.main(flags)
    assert end.value.code == (130 if number == signal.SIGINT else 0)
    assert signal.signal(number, before) == handler
    assert [path.name for path in grpo_flux.checkpoints("runs/tiny")] == ["step_00001"]
    if number == signal.SIGTERM:
        grpo_flux.main(flags)  # goes on
        assert [line["step"] for line in grpo_flux.read_metrics("runs/tiny")] == [0, 1, 2]
        assert "look at runs/tiny/before_after.png" in capfd.readouterr().out
        grpo_flux.main(flags)
        assert capfd.readouterr().out.startswith("the run in runs/tiny has finished its 2 steps")
        for name in ("metrics.jsonl", "before_after.png", "images/step_00000.png"):
            Path("runs/tiny", name).unlink()  # somebody has cleared them away
        grpo_flux.main(flags)

def test_handlers_of_others():
    """nohup that does not protect a run; a library's handler, which Python cannot put back."""
    handler, numbers = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None), (1, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    ctypes.CDLL(None).signal(signal.SIGUSR1, handler)
    with grpo_flux.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    after = [signal.signal(number, old) for number, old in zip(numbers, before)]
    assert not received and after[0] == signal.SIG_IGN

@faults
@pytest.mark.parametrize("victim, number", [("torchrun", signal.SIGTERM), ("rank", signal.SIGTERM),
                                            ("rank", signal.SIGKILL)])
def test_signals_to_two_processes(victim, number, tmp_path, heavy):
    """A process that waits for ever for one that is gone; a step that is lost without need."""
    out, log = tmp_path / "run", (tmp_path / "log").open("w")
    flags = [*SHORT, "--steps", "500", "--out", out, "--save_every", "2"]
    argv = [sys.executable, *TORCHRUN, HERE / "grpo_flux.py", *flags]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log)
    while process.poll() is None and len(grpo_flux.read_metrics(out)) < 4:
        time.sleep(0.1)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if victim == "torchrun" else int(ranks[-1]), number)
    status, text = process.wait(60), (tmp_path / "log").read_text()
    last, steps = grpo_flux.checkpoints(out)[-1].name, len(read_metrics(out))
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
        run = partial(shell, "grpo_flux.py", *FAULTY, "--out", str(tmp_path / "run"), cwd=HERE)
        done = run()  # a checkpoint has 22 MB
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.search(f"\nerror: .*No space left.* goes on from {checkpoint}\n$", done.stderr)
        assert [*checkpoint.parent.iterdir()] == [checkpoint]
        assert len(load_file(next(checkpoint.iterdir()))) > 100
        subprocess.run(["mount", "-o", "remount,size=400m", tmp_path], check=True)
        succeed(run())
    finally:
        subprocess.run(["umount", tmp_path])

def arm(doom, watched, seed):
    """Kill this process at its doom: in so many seconds, or soon after the n-th event of a kind."""
    seen, log = Counter(), os.open("events", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def die(after):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def see(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) or event in (
            "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.remove")
        if writes and watched in (path := os.path.abspath(str(args[0]))):
            kind = re.sub(r"[0-9a-f]{8,}|\d+", "N", path.removeprefix(watched))
            kind = f"{event} " + re.sub("(.writing-tiny-N/).*", r"\1...", kind)
            os.write(log, f"{kind}\n".encode())
            seen[kind] += 1
            if doom == (kind, seen[kind]):
                die(0.005 * np.random.default_rng(seed).random())

    sys.addaudithook(see)
    if isinstance(doom, float):
        die(doom)

def child(rank, flags, out, dooms, seed, port):
    with open(f"log_{rank}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if (world := len(dooms)) > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=f"{rank}",
                          LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{world}")
    os.environ["XDG_CACHE_HOME"] = str(out.parent / "cache")
    arm(dooms[rank], str(out.parent.resolve()), seed)
    grpo_flux.main([*flags, "--out", str(out)])

def launch(flags, out, dooms, seed):
    """Run to the end, or to the doom of a process, which ends the others: the exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    context = multiprocessing.start_processes(
        child, (flags, out, dooms, seed, port), len(dooms), join=False, start_method="fork")
    try:
        while not context.join():
            pass
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as end:
        print(end)
    statuses = [process.exitcode for process in context.processes]
    assert statuses.count(-signal.SIGKILL) <= len(dooms) - dooms.count(None), "a process hung"
    return statuses

def content(folder):
    """All files that have their final names, but for TensorBoard's; broken ones raise."""
    readers, files = defaultdict(lambda: Path.read_bytes), {}
    readers |= {".png": lambda path: Image.open(path).tobytes(), ".safetensors": lambda path: {
        name: x.numpy().tobytes() for name, x in load_file(path).items()},  # in any order
        ".json": lambda path: json.loads(path.read_text())}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not re.search("[.]writing-|[.]old-|tensorboard/|lock$", name):
            files[name] = readers[path.suffix](path)
    return files

def kill_often(kills, ranks, seed):
    """Kill runs of some processes so often, and go on with the same command; at their end compare
    them with one that was left alone. A third is killed at a random time, the others up to 5 ms
    after a file was opened to be written, renamed or removed, each kind in its turn."""
    rng, fit, survived, references = np.random.default_rng(seed), reward.fit, 0, []
    reward.fit = lambda *args, **kwargs: fit(*args, **kwargs | {"steps": 3})  # two seconds
    os.chdir(tempfile.mkdtemp())
    out = Path("now/run")
    for flags in [FAULTY, [*FAULTY, *LORA, "--ema_decay", "0.9"]][:1 + (kills > 3)]:
        begin = time.monotonic()
        assert launch(flags, out, ranks * [None], seed) == ranks * [0]  # the first one builds
        seconds = time.monotonic() - begin
        turns = Counter(Path("events").read_text().splitlines()).most_common()
        rng.shuffle(turns)
        references.append((flags, content(out), itertools.cycle(turns)))
        shutil.rmtree(out)
    chains = itertools.cycle(references)
    while survived < kills:
        flags, reference, turns = next(chains)
        if rng.random() < 0.25:
            shutil.rmtree(out.parent, ignore_errors=True)  # the tiny models, too
        for left in reversed(range(5)):
            moment = float(rng.uniform(0, seconds))
            if survived % 3:
                kind, count = next(turns)
                moment = kind, int(rng.integers(min(count, 2))) + 1
            victims = [[0], [0, 1], [1]][rng.integers(3)] if ranks > 1 else [0]
            victims = victims if left and survived < kills else []  # else let it end
            dooms = [moment if rank in victims else None for rank in range(ranks)]
            statuses = launch(flags, out, dooms, seed)
            ended, lines = content(out), grpo_flux.read_metrics(out)
            content(out.parent)
            assert [line["step"] for line in lines] == list(range(len(lines)))
            if not any(statuses):
                break
            assert -signal.SIGKILL in statuses, statuses
            survived += 1
            print(f"kill {survived} at {moment} of {victims}: {statuses}")
        differ = [x for x in reference.keys() | ended.keys() if ended.get(x) != reference.get(x)]
        assert not differ and not [*out.rglob(".writing-*"), *out.rglob(".old-*")], differ
        shutil.rmtree(out)
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

@pytest.mark.parametrize("flags", [[], [*LORA, *"--ema_decay 0.9 --kl_beta 0.1".split()]])
def test_resume_is_bit_for_bit(tiny, tmp_path, flags):
    """A moment, an average or a draw that starts anew; a line of metrics twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SHORT, *flags, "--save_every", "2", "--keep_last", "1", "--eval_every", "2"]
    for steps, out in (("4", whole), ("2", parts), ("4", parts)):
        grpo_flux.main([*flags, "--steps", steps, "--out", str(out)])
        if steps == "2":  # as if it had been killed in step 4; and a copy lies about
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 3}\n{"st')
            checkpoint = str(out / "checkpoints" / "step_00002")
            shutil.copytree(checkpoint, checkpoint + ".bak")
    assert [path.name for path in grpo_flux.checkpoints(parts)] == ["step_00004"]
    assert grpo_flux.read_metrics(parts) == grpo_flux.read_metrics(whole)
    assert content(parts / "export") == content(whole / "export")

@pytest.mark.parametrize("rank", [0, 4])
def test_export_is_the_trained_policy(tiny, tmp_path, rank):
    """An export that others read as another policy; frozen weights that are saved."""
    flags = ["--lora_rank", str(rank), "--lora_alpha", "8", "--learning_rate", "1e-3"]
    grpo_flux.main([*SHORT, *flags, "--ema_decay", "0", "--out", str(tmp_path)])
    folder, export = tmp_path / "checkpoints" / "step_00002", tmp_path / "export"
    cfg = settings(lora_rank=rank, lora_alpha=8.0, model=tiny.cfg.model)
    policy = grpo_flux.Policy(cfg, SHAPE[1:], CPU)
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), tiny.text(TWO)
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, vae=None)
    if rank:
        pipe.load_lora_weights(export)
    else:
        pipe.transformer = FluxTransformer2DModel.from_pretrained(export / "transformer")
    with torch.no_grad():
        before = policy.predict(*inputs)
        assert torch.equal(before, tiny.policy.predict(*inputs))  # adapters begin at 0
        policy.load(folder)
        trained = policy.predict(*inputs)
        loaded = partial(tiny.policy.predict.func, pipe.transformer,
                         **tiny.policy.predict.keywords)(*inputs)
    assert torch.allclose(loaded, trained, atol=1e-5) and (trained - before).abs().max() > 1e-3
    if rank:  # as those read it that know nothing of alpha: B A is the difference of the weights
        assert all("lora" in name for name in load_file(next(folder.iterdir())))
        lora, start = load_file(next(export.iterdir())), tiny.policy.transformer.state_dict()
        layers = [name[12:-14] for name in lora if name.endswith(".lora_A.weight")]
        assert 2 * len(layers) == len(lora) and len(layers) == 2 * 12 + 2 * 5
        policy.transformer.fuse_lora()
        for layer in layers:
            A, B = (lora[f"transformer.{layer}.lora_{letter}.weight"] for letter in "AB")
            fused = policy.transformer.get_parameter(f"{layer}.base_layer.weight")
            assert torch.allclose(B @ A, fused - start[f"{layer}.weight"], rtol=0, atol=1e-6)

# -------------------------------------------------------------------------------------------- NPU

# A device that torch really calls npu, without hardware: its tensors are host memory, and every
# operator runs on the CPU. Like an NPU it refuses float64, tensors of the CPU among its own, and
# some collectives of 3, 5, 6 or 7 processes; gelu and the autocast lists are torch_npu's. It says
# nothing of NPU kernels, each process has only npu:0, and keeps it for life.
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
        index = op.overloadpacket is torch.ops.aten.index
        if isinstance(x, torch.Tensor) and x.dim() and not index:
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

def with_npu(name, *argv, cwd, launcher=(), fails=False):
    """Run a function of this file in processes of their own that have the npu."""
    done = shell(*launcher, __file__, "--npu", name, *argv, cwd=cwd,
                 CUDA_VISIBLE_DEVICES="")  # torch_npu refuses to start beside a GPU
    if NO_NPU in done.stderr:
        pytest.skip(done.stderr[done.stderr.index(NO_NPU):].splitlines()[0])
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done

# README's list for the first run on an NPU
NPU_LIST = re.search(r"```bash\n(small=.*?)```", README, re.DOTALL)[1]
SMALL = re.search('small="(.*?)"', NPU_LIST)[1]
CHECKLIST = dict(re.findall(  # {command: the end of its comment}
    r"(?m)^((?:python|torchrun) .*?)  # .*?(look at \S+|\w+ OK|\w+\.png)$", NPU_LIST))

def run_checklist():
    """Run all but torchrun's command in this process; output.json says what each printed."""
    folder, output, grpo_flux.plot = sys.argv[1], [], lambda *_: None  # which takes a second
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
    two = with_npu("run_twice", *argv, cwd=folder, launcher=TORCHRUN, fails=True)
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
    """A CPU tensor, float64, a backend by name, gradients of one rank; a death without a word."""
    (cpu, a), (npu, b) = results(checklist[0] / "runs/cpu"), results(checklist[0] / "two")
    for one, two in zip(cpu, npu, strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-4)  # gelu is tanh's there
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
        assert two["first_ratio_dev"] == 0
    difference = [(u - v).abs().mean() for u, v in zip(a.parameters(), b.parameters())]
    assert max(difference) < 4e-5  # two steps of AdamW move weights by 4e-4
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
        folder = Path(str(i)).resolve()
        for name in ("reward.py", "grpo_flux.py"):
            write(folder / name, (HERE / name).read_text().replace(old, new))
            sys.modules.pop(name[:-3], None)
        sys.path.insert(0, str(folder))
        module = importlib.import_module("grpo_flux")
        module.draw = lambda *_: None  # it takes a second
        with mock.patch.dict(os.environ, {"RANK": "0"} if "nccl" in new else {}):
            try:
                module.main([*flags, str(folder / "run")])
            except Exception as error:
                write(folder / "error.txt", f"{type(error).__name__}: {error}")
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
    seen = count_at_real_size(0, 0.0, 1, 1, "npu", shares=[0])["seen"]
    assert not {dtype for _, dtype in seen} & {torch.float64, torch.complex128}
    assert {k for k, names in seen.items() if names & {"mm", "addmm"}} == {("npu", torch.bfloat16)}
    on_cpu = set().union(*(names for (device, _), names in seen.items() if device == "cpu"))
    assert on_cpu <= set(  # draws, positions and which steps are trained
        "arange expand clone view permute _unsafe_view _to_copy zeros_like stack slice lift_fresh "
        "ones add".split()), on_cpu

def test_npu_at_real_size(tmp_path):
    """float64, a tensor on the CPU, a matmul in fp32 that only a large or deep FLUX would have."""
    with_npu("run_at_real_size", cwd=tmp_path)

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_share_of_checkpointed_blocks(tiny, tmp_path, monkeypatch, lora_rank):
    """A share that is ignored, or that changes the first ratio or a bit of the gradients."""
    gradients, original = defaultdict(list), grpo_flux.checkpoint
    for share, calls in ((1, 4 * 4), (0.5, 2 * 4), (0, 0)):  # blocks times backwards
        run = load_run(tmp_path, gradient_checkpointing=share, lora_rank=lora_rank, batch_size=2,
                       num_generations=4, sampling_steps=3)
        run.policy.optimizer.register_step_pre_hook(lambda *_: gradients[share].extend(
            p.grad.clone() for p in run.policy.parameters.values()))
        counted = mock.Mock(side_effect=original)
        monkeypatch.setattr(grpo_flux, "checkpoint", counted)
        grpo_flux.TAPE.start(run.cfg, {}, 0)
        _, _, stats = grpo_flux.train_step(0, run)
        assert stats["updates"] == 2 and stats["first_ratio_dev"] == 0
        assert all(map(torch.equal, gradients[share], gradients[1])) and counted.call_count == calls
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

def test_adapters_cost_two_kernels():
    """A cast or a sum that comes with every adapted layer: launches bound a small batch."""
    layer, kernels = grpo_flux.LoraLinear(torch.nn.Linear(8, 6), 4, 8.0), []
    for layer.enabled in (False, True):
        with torch.no_grad(), Meter() as meter:
            layer(torch.randn(2, 3, 8))
        kernels.append(meter.counted["kernels"])
    assert kernels[1] - kernels[0] == 2

def test_real_size_is_measured(capsys):
    """A benchmark of an accelerator that ends at the first setting that needs too much memory, or
    that nobody has run since the code changed."""
    small = dict(thin=True, settings=[(1, 0, False), (2, 0.5, False)], num_layers=2,
                 num_single_layers=2)
    measure_at_real_size(CPU, **small)
    with mock.patch("grpo_flux.Policy", side_effect=[torch.OutOfMemoryError("no GiB")] * 9):
        with mock.patch(f"{__name__}.count_flop", return_value=[1, 3]):
            measure_at_real_size(CPU, **small)
    measure_at_real_size(CPU, budget=-1, **small)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] + row[8:10] for row in rows[3:5]] == [
        ["1", "0", "eager", "nan", "0.0e+00"], ["2", "0.5", "eager", "nan", "0.0e+00"]]
    assert all(row[10] == "yes" for row in rows[3:5])
    assert [row[3] for row in rows[8:10]] == ["OutOfMemoryError:"] * 2
    assert rows[-1][:4] == ["2", "settings", "left", "out"]


# ------------------------------------------------------------------------------------------ README

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
    assert names - {*re.findall(r"\w+", "".join(sources.values()))} <= {"interleave", "symbol"}
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
    """A first command that nobody has run since it was written; one for an NPU not tried here."""
    ran = (HERE / ".ci" / "run").read_text().replace(" --quiet", "")
    first = re.search(r"```bash\n(.*?)\n```", README, re.DOTALL)[1]
    commands = first.replace("\n", " && ").split(" && ")
    assert len(commands) == 5 and all(line in ran for line in commands if "venv" not in line)
    assert len(CHECKLIST) == NPU_LIST.count("\n") - 2 == 9
    assert f"tiny-{grpo_flux.TINY_VERSION}/hps" in NPU_LIST

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

def test_readme_python_runs(tiny, record, tmp_path, monkeypatch):
    """An export, a reward, a record of saved files or a sampler that the code has left behind."""
    monkeypatch.chdir(tmp_path)
    grpo_flux.main([*SHORT, *LORA, "--steps", "1", "--out", "runs/lora"])
    prompts = json.loads((record / "config.json").read_text())["step_prompts"]
    write(Path("saves/prompts.json"), json.dumps(prompts))
    for step in (1, 2):
        for name, x in load_file(record / f"step_0000{step}_rank_0.safetensors").items():
            torch.save(x, f"saves/{name}{f'_{step}_0' * ('.' in name)}.pt")
    small = {"black-forest-labs/FLUX.1-dev": tiny.cfg.model, '"cuda"': '"cpu"', "s=16)": "s=2)",
             "height=720, width=720": "height=32, width=32", "45 * 45, 64": "16, 16", "90": "8",
             "schedule(16": "schedule(2", "16, 12, 3, {}": "4, 12, 2, {}", "prompts=8": "prompts=1",
             "batch_size=32, micro_batch=1": "batch_size=12, micro_batch=12", '"bf16"': '"fp32"'}
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

# --------------------------------------------------------------------------------------- benchmark

def clock(device, call, *args, **named):
    """The seconds of a call, and its result; a device may compute when the host has gone on."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    begin = time.perf_counter()
    result = call(*args, **named)
    synchronize()
    return time.perf_counter() - begin, result

def transformer_alone(run):
    """The transformer calls of one step, and nothing else."""
    n = run.cfg.micro_batch
    calls = 12 // n
    x = torch.randn(n, 16, 16).to(run.device)
    text = run.text(["a red circle"] * n)
    sigma = x.new_ones(n, 1, 1)
    for _ in range(calls * run.cfg.sampling_steps):
        torch.no_grad()(run.policy.predict)(x, sigma, text)
    for _ in range(calls * grpo_flux.num_train_steps(run.cfg)):
        run.policy.predict(x, sigma, text).backward(x)
    run.policy.optimizer.zero_grad()

def benchmark(repetitions=7):
    """Print the seconds of a step, and of its transformer calls alone, at some batch sizes."""
    torch.set_num_threads(1)
    run = load_run(tempfile.mkdtemp(), reward.select_device(), sampling_steps=16,
                   learning_rate=1e-8)
    times = defaultdict(list)
    for _ in range(repetitions + 1):  # the first warms up
        for n in (12, 4, 1):
            run.cfg = replace(run.cfg, micro_batch=n, batch_size=max(n, 4))
            for call in (partial(grpo_flux.train_step, 0), transformer_alone):
                seconds, _ = clock(run.device, call, run)
                times[n, call is transformer_alone].append(seconds)
    shutil.rmtree(run.out)
    print(f"A GRPO step of 12 samples of the tiny FLUX on {run.device}, torch {torch.__version__}, "
          f"medians of {repetitions}\nmicro-batch   seconds   of its transformer calls   of "
          "micro-batch 4")
    for n in (12, 4, 1):
        step, alone, step_of_4 = (np.array(times[key][1:]) for key in ((n, 0), (n, 1), (4, 0)))
        print(f"{n:11}{np.median(step):10.3f}{np.median(step / alone):27.2f}"
              f"{np.median(step / step_of_4):19.2f}")

GIB = 2**30
ATTENTION = {  # FLOP of what torch 2.14's flop_registry leaves out: q k' and p v, then five like it
    "_scaled_dot_product_flash_attention_for_cpu":
        lambda q, k, *_, **__: 4 * q.numel() * k.shape[-2],
    "_scaled_dot_product_flash_attention_for_cpu_backward":
        lambda _, q, k, *__, **___: 10 * q.numel() * k.shape[-2]}

class Meter(TorchDispatchMode):
    """Counts kernels, FLOP, collectives, the bytes a rank receives by them, and live bytes."""

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
        if op.namespace == "prim":
            return result  # a FakeTensor that is asked for its device
        if not op.is_view and "view" not in op.__name__:  # _unsafe_view is one, too
            self.counted["kernels"] += 1
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
            self.counted[f"{name}_bytes"] += abs(args[0].nbytes - args[1].nbytes)
        return result

THIN = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))

def random_flux(device, **shape):
    """FLUX.1-dev, or another shape of it, with random weights in bf16, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(guidance_embeds=True, **shape)
    finally:
        torch.set_default_dtype(torch.float32)

def random_vae(device, thin):
    """FLUX.1's VAE with random weights in bf16."""
    channels = (32,) * 4 if thin else (128, 256, 512, 512)
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=channels, layers_per_block=2, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return vae.to(device, torch.bfloat16).requires_grad_(False)

def random_policy(cfg, device, **shape):
    """A Policy of FLUX.1-dev, or another shape of it, with random weights."""
    def load(cfg, device):
        with torch.device(device):
            return grpo_flux.prepare_policy(random_flux(device, **shape), cfg)

    with mock.patch.object(grpo_flux, "load_transformer", load):
        return grpo_flux.Policy(cfg, (cfg.height // 8, cfg.width // 8), device)

def random_inputs(cfg, transformer, device, keys):
    """Noise (B, L, C), and text of random embeddings."""
    sizes = (cfg.text_length, transformer.joint_attention_dim), (transformer.pooled_projection_dim,)
    text = [torch.randn(len(keys), *size, device=device).bfloat16() for size in sizes]
    x = grpo_flux.draw_latents(keys, (16, cfg.height // 8, cfg.width // 8), cfg)
    return x.to(device), text

def one_setting(n, share, compiled, side, tokens):
    """Config of a rollout of four denoising steps of n samples, all but the last trained."""
    return grpo_flux.Config(
        dtype="bf16", lora_rank=64, num_prompts=1, num_generations=max(n, 2),
        batch_size=max(n, 2), sampling_steps=4, micro_batch=n, gradient_checkpointing=share,
        compile=compiled, height=side, width=side, text_length=tokens)

def call_alone(policy, cfg, device):
    """{name: function} of a forward of the policy, and of one with its backward."""
    x, text = random_inputs(cfg, policy.transformer.config, device, [(0, 0, 0)])
    predict = partial(policy.predict, x, x.new_full((1, 1, 1), 0.7), text)
    return {"forward": torch.no_grad()(predict),
            "forward and backward": lambda: predict().square().mean().backward()}

def count_flop(cfg, **shape):
    """FLOP of a sample in one forward, and in one with a backward, counted on meta tensors."""
    device = torch.device("meta")
    policy = random_policy(replace(cfg, compile=False, gradient_checkpointing=0), device, **shape)
    flop = []
    for call in call_alone(policy, cfg, device).values():
        with FlopCounterMode(display=False) as counter:
            call()
        flop.append(counter.get_total_flops())
    return flop

def count_kernels(repetitions=7):
    """Print the kernels, and the host's milliseconds, of FLUX.1-dev's 57 blocks made thin, with
    LoRA: on an accelerator the host must start as many, whatever the width."""
    torch.set_num_threads(1)
    cfg = one_setting(1, 0, False, 64, 16)
    for name, call in call_alone(random_policy(cfg, CPU, **THIN), cfg, CPU).items():
        call()  # the masters' gradients are there
        with Meter() as meter:
            call()
        seconds = []
        for _ in range(repetitions):
            begin = time.process_time()  # other work on the machine does not count
            call()
            seconds.append(time.process_time() - begin)
        print(f"{name}: {meter.counted['kernels']} kernels, {1e3 * np.median(seconds):.0f} ms of "
              "one CPU thread", flush=True)

def measure_setting(cfg, device, vae, **shape):
    """Seconds of a rollout, a decode and an update of one micro-batch of samples, those of a first
    time that warms up and compiles, recompilations after it, GiB, and the update's statistics."""
    module, graphs = torch.get_device_module(device), torch._dynamo.utils.counters["stats"]
    if reward.is_accelerator(device):
        module.reset_peak_memory_stats()
    policy = random_policy(cfg, device, **shape)
    runs = []
    for step in range(2):
        compiled = graphs["unique_graphs"]
        keys = [(step, 0, i) for i in range(cfg.micro_batch)]
        x, text = random_inputs(cfg, policy.transformer.config, device, keys)
        rolled, trajectory = clock(
            device, rollout, policy.predict, x, text, keys, cfg, cfg.eta)
        decoded, _ = clock(
            device, decode, vae, trajectory.x0, (cfg.height // 8, cfg.width // 8), len(keys))
        updated, stats = clock(
            device, grpo_flux.update, policy.predict, policy.optimizer, trajectory, text,
            torch.ones(len(keys)), keys, cfg, first_ratio_limit=math.inf)
        runs.append([rolled, decoded, updated])
    peak = module.max_memory_allocated() / GIB if reward.is_accelerator(device) else math.nan
    return runs[1], sum(runs[0]), graphs["unique_graphs"] - compiled, peak, stats

# (micro-batch, share of checkpointed blocks, compiled), the most telling first
SETTINGS = [(1, 0, False), (1, 0, True), (4, 1, False), (4, 1, True), (2, 0.5, False)]
SETTINGS += [way for way in itertools.product((1, 2, 4), (0, 0.5, 1), (False, True))
             if way not in SETTINGS]

def measure_at_real_size(device, budget=math.inf, thin=False, settings=SETTINGS, **shape):
    """Print what samples of FLUX.1-dev, with random weights and LoRA, cost in each setting."""
    begin, real = time.monotonic(), grpo_flux.Config()
    side, tokens = (64, 16) if thin else (real.height, real.text_length)
    shape = (THIN if thin else {}) | shape
    T, K = real.sampling_steps, grpo_flux.num_train_steps(real)
    diffusers.logging.set_verbosity_error()
    vae = random_vae(device, thin)
    forward, both = count_flop(one_setting(1, 0, False, side, tokens), **shape)
    flop = T * forward + K * both
    print(f"{'thin ' * thin}FLUX.1-dev at {side}x{side}, bf16, LoRA 64, random weights; "
          f"{reward.describe_device(device)}\nseconds and {flop / 1e12:.4g} TFLOP a sample, of {T} "
          f"denoising steps, {K} trained; warm-up: of a quarter\nmicro share       rollout  decode "
          "update     sum TFLOP/s    GiB  ratio-1 finite recompiled warm-up", flush=True)
    for i, (n, share, compiled) in enumerate(settings):
        if time.monotonic() - begin > budget:
            print(f"{len(settings) - i} settings left out after {budget:.0f} s")
            break
        cfg = one_setting(n, share, compiled, side, tokens)
        print(f"{n:5}{share:6} {'compiled' if compiled else 'eager':8}", end="", flush=True)
        try:
            seconds, first, recompiled, peak, stats = measure_setting(cfg, device, vae, **shape)
        except Exception as error:  # out of memory, say; others may need less
            print(f" {type(error).__name__}: {str(error)[:60]!r}", flush=True)
        else:
            scale = T / cfg.sampling_steps, 1, K / grpo_flux.num_train_steps(cfg)
            parts = np.array(seconds) * scale / n
            print(*[f"{x:7.3f}" for x in (*parts, parts.sum())],
                  f"{flop / (parts[0] + parts[2]) / 1e12:7.3g}{peak:7.1f}",
                  f"{stats['first_ratio_dev']:8.1e} {'no' if stats['skipped'] else 'yes':6}"
                  f"{recompiled if compiled else '-':>10}{first:9.1f}", flush=True)
        torch._dynamo.reset()
        gc.collect()  # hooks and parameters refer to each other
        if reward.is_accelerator(device):
            torch.get_device_module(device).empty_cache()

def count_at_real_size(lora_rank, kl_beta, world, n, device="cpu", shares=(1, 0.5, 0)):
    """Count, on one of `world` ranks, a rollout of two denoising steps and, for each share of
    checkpointed blocks, an update of one backward of n samples."""
    torch.set_num_threads(1)
    gc.freeze()  # else the collector walks through all that was imported, again and again
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    cfg = grpo_flux.Config(dtype="bf16", lora_rank=lora_rank, num_prompts=1, num_generations=2,
                           batch_size=2, sampling_steps=2, micro_batch=n, kl_beta=kl_beta)
    keys, counted = [(0, 0, i) for i in range(n)], {}
    # what the host reads: 0.0 for loss, norm and ratio; AdamW's step 1; batch and window 0
    FakeTensor.tolist = lambda x: [0.0 if x.is_floating_point() else 0] * x.numel()
    FakeTensor.item = lambda x: 1.0 if x.is_floating_point() else 0
    FakeTensor.pin_memory = lambda x: x  # torch has no such operator for fake tensors
    grpo_flux.gather = lambda item: [item] * world
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    models = {}
    for trained in (True, False):  # the policy, and the reference model of kl_beta
        with torch.device("meta"):
            model = grpo_flux.prepare_policy(
                random_flux("meta").to(torch.bfloat16 if lora_rank else torch.float32), cfg)
        if world > 1:
            grpo_flux.shard(model, CPU, torch.bfloat16, keep_gathered=trained)
        models[trained] = model
    transformer = models[True]
    grpo_flux.load_transformer = (
        lambda cfg, device, trained=True: models[trained].to_empty(device=device))
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:  # refuses devices that mix
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device="npu") by way of the CPU
        policy = grpo_flux.Policy(cfg, (90, 90), torch.device(device))
        assert sum(p.numel() for p in transformer.parameters()) >= 11_901_408_320
        x, text = random_inputs(cfg, transformer.config, device, keys)
        trajectory = rollout(policy.predict, x, text, keys, cfg, cfg.eta)
        counted["rollout"] = meter.restart()
        for share in ("warm up", *shares):
            for p in policy.parameters.values():  # as after an earlier backward
                p.grad = torch.zeros_like(p)
            if share == "warm up":  # DTensor infers shapes, once
                sums = dict(ratio_max_dev=torch.zeros((), device=device))
                grpo_flux.optimizer_step(policy.optimizer, sums, cfg.max_grad_norm)
                continue
            transformer.disable_gradient_checkpointing()
            grpo_flux.prepare_policy(transformer, replace(
                cfg, lora_rank=0, gradient_checkpointing=share))
            grpo_flux.reshard(transformer)  # as it is after an optimizer step
            meter.restart()
            stats = grpo_flux.update(policy.predict, policy.optimizer, trajectory, text,
                                     torch.ones(n), keys, cfg, policy.reference, useful=[True])
            assert stats["updates"] == 1
            counted[share] = meter.restart()
    return counted | {"seen": meter.seen}

def benchmark_at_real_size():
    """Print FLOP, peak memory and collectives of FLUX.1-dev, from a process for each way."""
    cfg, sizes = grpo_flux.Config(), (1, 2, 4)
    images, T = cfg.num_prompts * cfg.num_generations, cfg.sampling_steps
    K = grpo_flux.num_train_steps(cfg)
    kinds = {(64, 0.0, 1): (1, 0.5, 0), (64, 0.0, 8): (1, 0.5, 0), (0, 0.0, 8): (1, 0.5, 0),
             (0, 0.1, 8): (1,)}  # shares of checkpointed blocks
    ways = [(*kind, n, "cpu", shares) for n in sizes[::-1] for kind, shares in kinds.items()]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        results = pool.starmap(count_at_real_size, ways, chunksize=1)
    counted = {way[:4]: result for way, result in zip(ways, results)}
    print(f"FLUX.1-dev at 720x720 in bf16, counted on torch {torch.__version__}: {T} forwards and "
          f"{K} with a\nbackward for each of the {images} images of a GRPO step\nLoRA  KL ranks "
          "share  GiB of a rank, micro-batch 1, 2, 4; PFLOP, without attention; GiB "
          "reduce-scattered")
    for kind, shares in kinds.items():
        runs = [counted[*kind, n] for n in sizes]
        for share in shares:
            one, two = runs[0]["rollout"], runs[0][share]
            matmuls, attention = (images * 1e-15 * (one[key] / 2 * T + two[key] * K)
                                  for key in ("flop", "attention"))
            peaks = [max(r["rollout"]["peak"], r[share]["peak"]) / GIB for r in runs]
            scattered = [r[share]["scatter_bytes"] * images / kind[2] * K / n / GIB
                         for r, n in zip(runs, sizes)]
            print("{:4}{:4}{:6}".format(*kind) + f"{share:7}", *(f"{x:8.1f}" for x in [
                *peaks, matmuls + attention, matmuls, *scattered]))
    print(f"full, 8 ranks: {images // cfg.batch_size} times all-gathers of "
          f"{counted[0, 0.0, 8, 1]['rollout']['gather_bytes'] / GIB:.1f} GiB for a rank")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--npu"]:
        try:
            libraries = install_npu()
        except Exception as problem:
            sys.exit(f"{NO_NPU}: {problem!r}")
        del sys.argv[1]
        globals()[sys.argv.pop(1)]()
    elif sys.argv[1:2] == ["--kill"]:
        kill_often(*map(int, sys.argv[2:]))
    else:
        parser = argparse.ArgumentParser(description="Benchmarks; see the top of this file.")
        parser.add_argument("--size", choices=["tiny", "flux-dev"], default="tiny")
        parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing later")
        parser.add_argument("--thin", action="store_true", help="measure 57 blocks of width 32")
        args, device = parser.parse_args(), reward.select_device()
        if args.size == "tiny":
            benchmark()
        elif args.thin or reward.is_accelerator(device):
            measure_at_real_size(device, args.seconds, args.thin)
        else:
            count_kernels()
            benchmark_at_real_size()
