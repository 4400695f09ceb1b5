"""Tests against what others wrote or a person can work out: torch.distributions, diffusers, a flow
with a known solution, numbers by hand. Each docstring names the mistake that its test catches,
and says what is asserted where that is not obvious.

    python -m pytest -q test_grpo_flux.py   # on the CPU; the first run builds the tiny models
    python test_grpo_flux.py                # the benchmark, on the best device there is
    python test_grpo_flux.py --size flux-dev  # FLUX.1-dev: measured on a device, else counted

Sections, in their order; what several of them use comes first:

    flow SDE              a denoising step, its log-probability, FLUX's latents
    GRPO                  advantages, loss, published numbers, the algorithm cut out
    rollout               FluxPipeline's images, plan of the samples, windows of SDE steps
    update                DanceGRPO's figures, gradients, first ratio, precision, LoRA, draws
    run and command line  whole runs, processes, flags, prompts, FSDP, the tiny world
    tape                  --record and --replay
    reward                HPS, CLIP, PickScore, rewards of one's own, scores of pictures
    what goes wrong       refusals in one line, signals, kills, resume, export
    NPU                   a stand-in of the device on the CPU
    README                its commands, numbers and code
    benchmark             time and memory of a GRPO step
"""

import argparse
import copy
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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout, suppress
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
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import FlopCounterMode

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
    """A fixture with the result of a function that waits for processes, in a thread beside the
    tests: it must not use load_run, which resets grpo_flux.on_draw under them."""
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
    grpo_flux.on_draw = None  # the tape of another test
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:  # that of a run in this process
            signal.signal(number, handler)

def sample(tiny, cfg, keys):
    """The trajectory of some (step, prompt_index, sample) on TWO prompts, and its text."""
    text, x = tiny.text([TWO[p] for _, p, _ in keys]), grpo_flux.draw_latents(keys, SHAPE, cfg)
    return rollout(tiny.policy.predict, x, text, keys, cfg, cfg.eta), text

def linear_policy(cfg, module=grpo_flux, step=0):
    """A policy small enough to check, v = x W + prompt_index: W, the σ of its calls, a rollout,
    its update."""
    torch.manual_seed(0)
    W, calls = (0.3 * torch.randn(4, 4)).requires_grad_(), []
    keys, window = module.plan_step(step, cfg), module.sde_steps(step, cfg)
    x = grpo_flux.draw_latents(keys, (1, 4, 4), cfg)
    text = [torch.tensor([[[float(p)]] for _, p, _ in keys])]

    def predict(x, sigma, text):
        calls.append(sigma.flatten())
        return x @ W + text[0]

    def update(optimizer, advantages, **more):
        calls.clear()
        return module.update(predict, optimizer, trajectory, text, advantages, keys, cfg,
                             window=window, **more)

    trajectory = module.rollout(predict, x, text, keys, cfg, cfg.eta, window)
    return W, calls, trajectory, update

def in_processes(run, world, function, monkeypatch):
    """What function gives for a run in each of some threads, which gather as processes do."""
    items, barrier, own = [None] * world, threading.Barrier(world, timeout=10), threading.local()

    def gather(item):
        items[own.rank] = item
        barrier.wait()
        every = list(items)
        barrier.wait()
        return every

    def call(rank):
        own.rank, one = rank, copy.copy(run)
        one.rank, one.world = rank, world
        return function(one)

    monkeypatch.setattr(grpo_flux, "gather", gather)
    with ThreadPoolExecutor(world) as pool:
        return [*pool.map(call, range(world))]

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
    """A wrong std, a lost constant, a sum for a mean, another sample's σ, 1 / (1 - σ) at 1, a
    gradient through x_next."""
    v, x, noise = torch.randn(3, 4, 6, 5)
    v.requires_grad_()
    levels = [(1.0, 0.9), (0.9, 0.7), (0.5, 0.2), (0.2, 0.05)]
    sigmas = torch.tensor(levels).T[..., None, None]  # (2, B, 1, 1)
    x_next, x0, logp = flux_step(v, x, *sigmas, 0.6, sde, noise)
    for i, (sigma, sigma_next) in enumerate(levels):
        normal = gaussian(sde, v[i], x[i], sigma, sigma_next, 0.6)
        assert torch.allclose(x_next[i].double(), normal.mean + normal.stddev * noise[i])
        expected = normal.log_prob(x_next[i].double()).mean().float()
        assert torch.allclose(logp[i], expected, atol=2e-5)
        assert torch.allclose(x0[i], x[i] - sigma * v[i])
    scored = flux_step(v, x, *sigmas, 0.6, sde, x_next=x_next.detach())[2]
    gradients = [torch.autograd.grad(each.sum(), v)[0] for each in (logp, scored)]
    assert torch.equal(logp, scored)  # the same bits
    assert torch.equal(*gradients) and gradients[0].any()  # x_next is data
    assert flux_step(v, x, *sigmas, 0.0, sde)[2].isnan().all()  # an ODE step has no density

@pytest.mark.parametrize("sde", ["dance", "flow"])
@pytest.mark.parametrize("eta", [0, 0.3, 0.7, 1.0])
def test_ode_and_sde_have_the_same_marginals(sde, eta):
    """A score term of the wrong sign, size or std: if images are N(1.5, 0.3²), v is known, and x
    keeps the mean and the std of the exact flow."""
    x, sigmas = torch.randn(1, 100_000, 1), grpo_flux.sigma_schedule(100, 3.0)
    for s, s_next in itertools.pairwise(sigmas):
        gap = (x - (1 - s) * 1.5) / ((1 - s)**2 * 0.3**2 + s**2)
        v = (s - (1 - s) * 0.3**2) * gap - 1.5  # E[x1 - x0 | x]
        level = eta if s_next else 0
        x = flux_step(v, x, s, s_next, level, sde, torch.randn_like(x))[0]
        if s_next < 0.8:  # the steps of flow are coarse near 1
            exact = (1 - s_next) * 1.5, math.hypot((1 - s_next) * 0.3, s_next)
            assert (x.mean().item(), x.std().item()) == pytest.approx(exact, abs=0.025)

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
    """Groups that mix, a flat group whose rounded mean is divided by eps."""
    ramp = torch.tensor([1.0, 2.0, 3.0, 4.0])  # std² = 5/3: 1.5 / 1.2909944 = 1.1618950
    advantages = group_advantages(torch.cat([ramp, torch.full((4,), 0.1), -3 * ramp]), 4)
    expected = torch.tensor([-1.1618950, -0.3872983, 0.3872983, 1.1618950])
    expected = torch.cat([expected, torch.zeros(4), -expected])
    assert torch.allclose(advantages, expected, atol=1e-6) and not advantages[4:8].any()
    assert not group_advantages(torch.rand(300, 1).expand(300, 12).flatten(), 12).any()

def test_published_numbers():
    """A constant, a std, a clip or a schedule other than in the unit tests of three libraries."""
    one, A = torch.ones(1, 1, 1), torch.tensor([1.0, -1.0, 2.0])
    logp = torch.tensor([0.5, 1.0, 1.5]).log()
    loss, _ = grpo_loss(logp, torch.zeros(3), A, 0.2, 5.0)
    _, x0, scored = flux_step(one, one, 0.03, 0.02, 0.3, x_next=one / 2)
    levels = [1, 0.9783, 0.9545, 0.9286, 0.9, 0.8684, 0.8333, 0.7941, 0.75, 0.7, 0.6429, 0.5769,
              0.5, 0.4091, 0.3, 0.1667, 0]
    for ours, theirs in (
            (x0, [0.97]), (scored, [-115.198]),  # MindSpeed-MM
            (grpo_flux.sigma_schedule(16, 3.0), levels), (loss, [-0.6333]),  # NeMo-RL
            (group_advantages(torch.tensor([1.0, 3.0]), 2), [-0.7071, 0.7071]),
            (group_advantages(torch.tensor([0.0, 2.0, 1.0]), 3), [-1, 1, 0])):  # torchrl
        assert torch.as_tensor(ours).flatten().tolist() == pytest.approx(theirs, abs=5e-4)

def test_algorithm_can_be_cut_out():
    """A function of the algorithm that needs the tape, the processes or more than torch and numpy:
    cut out, the sections from draws to update give the same weights and statistics."""
    imports = ("import math, torch, numpy as np\nfrom functools import partial\n"
               "from collections import namedtuple\n")
    sections = r"(?ms)^# -+ draws$.*(?=^# -+ a GRPO step$)"
    alone = types.ModuleType("alone")
    exec(imports + re.search(sections, inspect.getsource(grpo_flux))[0], vars(alone))
    cfg, ends = settings(sampling_steps=6, sde_window=3, batch_size=6, kl_beta=0.1), []
    for module in (alone, grpo_flux):
        W, _, trajectory, update = linear_policy(cfg, module, step=1)
        A = module.group_advantages(torch.arange(12.0), 12)
        stats = update(torch.optim.SGD([W], lr=1.0), A, reference=lambda x, sigma, text: -x)
        ends.append((stats, W.tolist(), trajectory.x.tolist()))
    assert ends[0] == ends[1] and ends[0][0]["updates"] == 2

# ----------------------------------------------------------------------------------------- rollout

def test_rollout_is_that_of_flux_pipeline(tiny):
    """A timestep 1000 times too large, text inputs that swap, the VAE's shift left out."""
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, transformer=tiny.policy.transformer)
    keys, text = [(0, 0, 0), (0, 1, 0)], tiny.text(TWO)
    x = grpo_flux.draw_latents(keys, SHAPE, tiny.cfg)
    x0 = rollout(tiny.policy.predict, x, text, keys, tiny.cfg, eta=0).x0
    images = decode(tiny.vae, x0, SHAPE[1:], 1)
    theirs = pipe(TWO, height=32, width=32, num_inference_steps=8, guidance_scale=3.5, latents=x,
                  max_sequence_length=8, output_type="pt").images
    assert torch.allclose(images, theirs, rtol=0, atol=0.5 / 255 + 1e-4)  # ours have 8 bits
    assert torch.equal((images * 255).round() / 255, images)

@pytest.mark.parametrize("G, S, order", [
    (4, 4, "00 01 02 03 10 11 12 13"), (4, 8, "00 01 02 03 10 11 12 13"),  # whole groups
    (6, 4, "00 01 10 11 02 03 12 13 04 05 14 15")])  # DanceGRPO's way: 2 of each prompt
def test_samples_are_dealt_by_optimizer_step(G, S, order):
    """Processes that count for themselves: more of them would be another experiment."""
    cfg = settings(num_prompts=2, num_generations=G, batch_size=S)
    for world in (1, 2, 4):
        plans = np.array([grpo_flux.plan_step(5, cfg, rank, world) for rank in range(world)])
        plans = plans.reshape(world, 2 * G // S, -1, 3).swapaxes(0, 1)  # by optimizer step
        assert plans.reshape(-1, 3).tolist() == [[5, int(p), int(i)] for p, i in order.split()]

@pytest.mark.parametrize("flags, steps, trained", [
    ("", 16, 9), ("--timestep_fraction 0.3", 16, 4), ("--sde_window 4", 16, 4), ("", 4, 3),
    ("--sde_window 4 --timestep_fraction 0.5", 16, 2), ("--timestep_fraction 0.29", 101, 29)])
def test_number_of_trained_steps(flags, steps, trained):
    """--sde_window 4 that trains 2 steps; the 4 steps of FLUX.1-schnell that train 1."""
    cfg, _ = grpo_flux.read_command_line(
        ["--model", "a/b", "--sampling_steps", str(steps), *flags.split()])
    assert grpo_flux.num_train_steps(cfg) == trained

def test_window():
    """Noise or training outside of the window; one that never moves; paths of another prompt."""
    cfg = settings(sampling_steps=6, sde_window=3, window_shift_every=2, timestep_fraction=0.7,
                   num_prompts=2, batch_size=24)
    starts = [grpo_flux.sde_steps(step, cfg).start for step in range(7)]
    assert starts == [0, 0, 1, 1, 2, 2, 0]
    drawn = replace(cfg, window_shift_every=0)
    assert {grpo_flux.sde_steps(step, drawn).start for step in range(30)} == {0, 1, 2}
    W, calls, (sigmas, x, _, logp), update = linear_policy(cfg, step=3)
    assert [len(call) for call in calls] == [2] + 2 * [12] * 5  # a path a prompt, then all samples
    prompts = torch.arange(24).view(-1, 1, 1) // 12
    for t in range(5):
        v = x[:, t] @ W + prompts
        off = (x[:, t + 1] - x[:, t] - v * (sigmas[t + 1] - sigmas[t])).abs().amax((1, 2))
        assert off.min() > 0.1 if t in (1, 2, 3) else off.max() < 1e-5
        assert logp[:, t].isnan().all() == (t not in (1, 2, 3))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 24))
    assert len(calls) == 4 and set(torch.cat(calls).tolist()) == set(sigmas[1:4].tolist())

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

def test_dancegrpo_gives_the_same_figures():
    """A sampler, log-probability, advantage, order of training or loss that is not DanceGRPO's."""
    cfg = grpo_flux.Config(num_prompts=1, num_generations=6, sampling_steps=6, batch_size=2,
                           micro_batch=1, timestep_fraction=0.6)
    w, seen = torch.linspace(-0.5, 1.0, 16).requires_grad_(), defaultdict(list)
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=1e-4)

    def predict(x, sigma, text):
        return x * w + 0.3 * torch.sin(3 * sigma + torch.arange(16))

    def report(stats):
        for name in ("loss", "grad_norm"):
            seen[name].append(stats[name])

    for step, rewards in enumerate(torch.tensor(DANCEGRPO["reward"]).view(2, 6)):
        keys, text = grpo_flux.plan_step(step, cfg), [torch.zeros(6, 1)]
        x = grpo_flux.draw_latents(keys, (4, 2, 4), cfg)
        trajectory = rollout(predict, x, text, keys, cfg, cfg.eta)
        grpo_flux.update(predict, optimizer, trajectory, text, group_advantages(rewards, 6),
                         keys, cfg, report=report)
        seen["first_logp"] += trajectory.logp[:, 0].tolist()
        seen["x0_sum"] += trajectory.x0.sum((1, 2)).tolist()
    for name, values in (seen | dict(weights=w.tolist())).items():
        assert values == pytest.approx(DANCEGRPO[name], rel=2e-6, abs=1e-6), name

@pytest.mark.parametrize("micro_batch, moved", [(1, 0.01), (4, 0.01), (12, 0.0)])
@pytest.mark.parametrize("sde", SDES)
def test_gradient_of_every_term(sde, micro_batch, moved):
    """A gradient through x_next, none through the KL divergence, a step scored at another σ, a
    mean over micro-batches: gradient and statistics are those of float64, at the weights of the
    rollout and at others, where the clip bites."""
    cfg = settings(sde=sde, micro_batch=micro_batch, max_grad_norm=1e-3, adv_clip_max=1.0,
                   kl_beta=0.02, clip_range=2e-3)
    W, _, trajectory, update = linear_policy(cfg)
    A = torch.linspace(-1.4, 1.6, 12) * (torch.arange(12) % 3 > 0)
    W.data += moved
    start, fixed = W.detach().double().requires_grad_(), 0.5 * torch.eye(4).double()
    sigmas, logps, kls = grpo_flux.sigma_schedule(cfg.sampling_steps, cfg.shift), [], []
    for t in range(7):
        x, x_next = trajectory.x[:, t:t + 2].double().unbind(1)
        now, initial = (gaussian(sde, x @ weights, x, *sigmas[t:t + 2], cfg.eta)
                        for weights in (start, fixed))
        logps.append(now.log_prob(x_next).mean((1, 2)))
        kls.append(torch.distributions.kl_divergence(now, initial).mean())
    ratio = (torch.stack(logps, 1) - trajectory.logp).exp()
    kl, A1 = sum(kls) / 7, A.clamp(-1, 1)[:, None]
    clipped = ratio.clamp(1 - 2e-3, 1 + 2e-3) * A1
    loss = -torch.minimum(ratio * A1, clipped).mean() + 0.02 * kl  # as in the paper of PPO
    loss.backward()
    stats = update(torch.optim.SGD([W], lr=1.0), A, first_ratio_limit=2 * moved,
                   reference=lambda x, sigma, text: x @ fixed.float())
    clipped_gradient = start.grad / start.grad.norm() * 1e-3  # by which W moves
    assert torch.allclose(start - W, clipped_gradient, rtol=2e-3, atol=1e-6)
    assert (stats["first_ratio_dev"] == 0) == (moved == 0)
    expected = dict(loss=loss, ratio=ratio.mean(), kl=kl, grad_norm=start.grad.norm(),
                    ratio_max_dev=(ratio - 1).abs().max(),
                    clip_frac=(ratio * A1 > clipped).double().mean())
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), name

@pytest.mark.parametrize("micro_batch", [1, 4, 12])
@pytest.mark.parametrize("sde", SDES)
def test_first_ratio_is_one(tiny, sde, micro_batch):
    """Rollout and update that compute other bits, or take the text of other samples."""
    cfg = settings(sde=sde, micro_batch=micro_batch, sampling_steps=4, timestep_fraction=0.7)
    keys, A = [(3, i // 6, i) for i in range(12)], torch.linspace(-1, 1, 12)
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
    counts, graphs = torch._dynamo.utils.counters["stats"], []
    for step in range(3):  # with two windows
        _, _, stats = grpo_flux.train_step(step, run)
        graphs.append(counts["unique_graphs"])
        assert stats["first_ratio_dev"] == 0 and stats["updates"] == 2
        run.evaluate(step)
    assert graphs[0] > 0 and graphs == [counts["unique_graphs"]] * 3

def test_batches_that_move_nothing():
    """Weights that are nan after one nan; calls, weight decay, momentum for a gradient of 0; means
    over optimizer steps that were not taken."""
    W, calls, _, update = linear_policy(settings(num_prompts=2, micro_batch=4))
    optimizer, start = torch.optim.AdamW([W], lr=0.1), W.tolist()
    good = torch.tensor([1.0, -1.0, 0.0] * 4)
    flat, bad = 0 * good, math.nan * good
    for A, updates, skipped in (([flat, flat], 0, 0), ([flat, bad], 0, 1), ([bad, good], 1, 1)):
        assert W.tolist() == start
        stats = update(optimizer, torch.cat(A))
        assert (stats["updates"], stats["skipped"]) == (updates, skipped)
        assert len(calls) == 3 * 7 * (updates + skipped)  # 12 samples by 4, 7 SDE steps
        assert bool(optimizer.state) == ("loss" in stats) == bool(updates)
        assert all(map(math.isfinite, stats.values()))
    assert stats["ratio"] == pytest.approx(1)
    start = W.tolist()
    with pytest.raises(FloatingPointError, match="first ratio is off"):  # W is not the rollout's
        update(optimizer, torch.cat([good, good]))
    assert W.tolist() == start
    stats = update(optimizer, torch.cat([good, good]), useful=[True, False],  # as given
                   first_ratio_limit=math.inf)
    assert stats["updates"] == 1 and W.tolist() != start and W.isfinite().all()

def test_steps_are_chosen_for_each_sample():
    """The last, deterministic step trained; a step twice; all samples with the same steps."""
    W, calls, trajectory, update = linear_policy(settings(sampling_steps=16))
    update(torch.optim.SGD([W], lr=1e-3), torch.linspace(-1, 1, 12))
    chosen = {frozenset(steps) for steps in torch.stack(calls, 1).tolist()}
    stochastic = set(trajectory.sigmas[:15].tolist())
    assert len(calls) == 9 and len(chosen) > 6  # int(0.6 * 15)
    assert all(len(steps) == 9 and steps <= stochastic for steps in chosen)

def test_ema_weights(tiny):
    """A decay that is taken the other way round; weights that the average replaces for good."""
    policy = grpo_flux.Policy(replace(tiny.cfg, ema_decay=0.9), SHAPE[1:], CPU)
    weight, *_ = policy.parameters.values()
    start = weight.detach().clone()
    for i in (1, 2):
        weight.data.copy_(start + i)
        policy.update_ema(0.9)
    for _ in range(2):  # it leaves both as they were
        with policy.ema_weights():
            assert torch.allclose(weight, start + 0.09 * 1 + 0.1 * 2, atol=1e-6)
        assert torch.equal(weight, start + 2)

@pytest.mark.parametrize("rank", [0, 4])
def test_kl_refers_to_the_start(tiny, rank):
    """A reference that is the trained policy itself, or leaves the adapters switched off."""
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), tiny.text(TWO)
    policy = grpo_flux.Policy(replace(tiny.cfg, kl_beta=0.1, lora_rank=rank), SHAPE[1:], CPU)
    start = policy.predict(*inputs)
    for p in policy.parameters.values():
        p.data += 0.01
    moved, reference = policy.predict(*inputs), policy.reference(*inputs)
    assert torch.equal(reference, start) and not reference.requires_grad
    assert torch.equal(policy.predict(*inputs), moved)
    assert not torch.allclose(moved, start, atol=1e-3) and moved.requires_grad

class Transfers(TorchDispatchMode):
    """List operators that mix CPU and device, here meta, and that the host waits for."""
    found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs={}):
        result = op(*args, **kwargs)
        devices = {x.device for x in tree_leaves((args, kwargs, result))
                   if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.found.append(op)
        return result

def test_nothing_waits_for_the_device(tiny, monkeypatch):
    """.item(), .to(device) or an index of the CPU in a rollout, an update or a call of FLUX: on
    meta, whose numbers nobody can read, the host reads once at the end of each optimizer step."""
    transformer = copy.deepcopy(tiny.policy.transformer).to("meta")
    pinned, reads, ends = [], [], []
    inputs = tiny.policy.predict.keywords | dict(ids=torch.empty(16, 3, device="meta"))
    predict = partial(grpo_flux.velocity, transformer, **inputs)
    cfg = settings(sampling_steps=3, sde_window=1, batch_size=6, micro_batch=6)
    keys, text = grpo_flux.plan_step(0, cfg), [c.to("meta") for c in tiny.text(TWO[:1] * 12)]
    x, A = torch.empty(12, 16, 16, device="meta"), torch.linspace(-1, 1, 12)
    optimizer, window = torch.optim.SGD(transformer.parameters(), lr=0), range(1, 2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or [0.0] * len(x))
    with Transfers():
        trajectory = rollout(predict, x, text, keys, cfg, cfg.eta, window)
        grpo_flux.update(predict, optimizer, trajectory, text, A, keys, cfg, window=window,
                         useful=[True, True], report=lambda stats: ends.append(len(reads)))
    assert ends == [1, 2] and not Transfers.found and len(pinned) > 5

@pytest.mark.parametrize("rank", [0, 4])
def test_bf16_is_that_of_diffusers(tiny, monkeypatch, rank):
    """Autocast, an fp32 among bf16, weights of before the optimizer step: the velocity has the bits
    of a model of diffusers in bf16, and q, k and v reach the attention with one dtype."""
    policy = grpo_flux.Policy(replace(tiny.cfg, dtype="bf16", lora_rank=rank), SHAPE[1:], CPU)
    model = FluxTransformer2DModel.from_pretrained(
        tiny.cfg.model, subfolder="transformer", dtype=torch.bfloat16)
    x, sigma, text = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.5), tiny.text(TWO)
    expected = model(*(c.bfloat16() for c in (x, *text, sigma.flatten())),
                     grpo_flux.image_ids(8, 8), torch.zeros(8, 3), torch.full((2,), 3.5)).sample
    attend = mock.Mock(wraps=transformer_flux.dispatch_attention_fn)
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", attend)
    v = policy.predict(x, sigma, text)
    assert torch.equal(v, expected.float())
    assert {c.dtype for call in attend.mock_calls for c in call.args} == {torch.bfloat16}
    v.square().sum().backward()
    policy.optimizer.step()
    for name, p in policy.computing.items():
        assert torch.equal(p, policy.parameters[name].bfloat16())
    assert policy.predict(x, sigma, text).square().sum() < v.square().sum()

def test_masters_add_gradients_in_fp32():
    """A gradient that bf16 loses, or that the first micro-batch alone makes: 256 + 1."""
    p = torch.nn.Parameter(torch.ones(1))
    masters = grpo_flux.fp32_masters({"p": p})
    for factor in (256.0, 1.0):
        (p * factor).sum().backward()
    assert masters["p"].grad.item() == 257 and masters["p"].dtype == torch.float32
    assert p.dtype == torch.bfloat16 and p.grad is None

def test_lora_layer():
    """alpha for alpha / rank, a lost bias, adapters that stay on for the reference."""
    layer, x = torch.nn.Linear(6, 5), torch.randn(2, 3, 6)
    lora = grpo_flux.LoraLinear(layer, 2, 8.0)
    torch.nn.init.normal_(lora.lora_B.weight)
    added = 8 / 2 * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    assert torch.allclose(lora(x), layer(x) + added, atol=1e-5)
    lora.enabled = False
    assert torch.allclose(lora(x), layer(x), atol=1e-6)

def test_draws_have_keys():
    """Numbers that follow the order of calls, another generator, a part of a key left out: no two
    draws of a GRPO step have one key, and all keys begin with the seed."""
    golden = [-0.8458674550056458, -0.03669758886098862, 0.7569313049316406, -0.37433308362960815]
    assert grpo_flux.randn((2, 2), 0, 1, 2, 3, 4, 5).flatten().tolist() == golden
    assert grpo_flux.randperm(8, 0, 1, 2, 3, 4, 5).tolist() == [1, 6, 0, 3, 5, 2, 7, 4]
    seen, cfg = [], settings(
        num_prompts=2, seed=5, sampling_steps=4, sde_window=2, init_same_noise=False)
    grpo_flux.on_draw = lambda draw, key: seen.append(key) or draw
    W, *_, update = linear_policy(cfg)
    update(torch.optim.SGD([W], lr=0), torch.linspace(-1, 1, 24))
    # a window, 2 noises of 24 samples, their trained steps and first noises
    assert len(set(seen)) == len(seen) == 1 + 2 * 24 + 24 + 24 and {key[0] for key in seen} == {5}

@pytest.mark.parametrize("count, P", [(24, 4), (5, 1), (3, 4)])
def test_prompts_go_round(count, P, tmp_path):
    """A prompt twice or never in a round, one fixed order."""
    file, prompts = tmp_path / "prompts.txt", [f"prompt {i}" for i in range(10, 10 + count)]
    file.write_text("\n".join(prompts))
    cfg = settings(num_prompts=P, steps=15, prompts=str(file))
    steps, shown = grpo_flux.check_inputs(cfg, [], 1)
    assert [len(step) for step in steps] == [P] * 15 and shown == prompts
    rounds = np.array(steps).flatten()[:15 * P // count * count].reshape(-1, count)
    assert all(sorted(part) == prompts for part in rounds) and any(rounds[0] != rounds[1])

# ---------------------------------------------------------------------------- run and command line

RIGHT = {"right_colour", "right_shape", "right_both"}  # metrics of the independent judge

def test_run(tiny, tmp_path, monkeypatch, capsys):
    """A run that ends in an error, writes outside of --out, exports what it began with, or whose
    reward falls, as an optimizer, an advantage or a loss of the wrong sign makes it."""
    monkeypatch.chdir(tmp_path)
    write(Path("colour.py"), "red = lambda x, prompts: (x[:, 0] - x[:, 1]).mean((1, 2))")
    grpo_flux.main("--device cpu --num_prompts 1 --steps 12 --eval_every 6 --eval_images 24 --out "
                   "run --learning_rate 3e-4 --reward colour:red:0.7,hps:0.3".split())
    out = capsys.readouterr().out
    assert "1 prompts x 12 images, 5 of 6 denoising steps trained, 60 transitions" in out
    assert "1 optimizer steps, 100% on-policy" in out and "24 prompts, the first: a red" in out
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"colour.py", "run"}
    lines, model = results(Path("run"))
    for line in lines:
        assert line["ratio"] == 1 and line["first_ratio_dev"] == 0 and line["grad_norm"] > 0
        assert line["zero_std_frac"] == 0 and all(map(math.isfinite, line.values()))
        assert "reward" not in line and {"colour:red_std", "hps", "hps_std"} <= line.keys()
    rewards = [line["colour:red"] for line in lines]
    assert len(rewards) == 12 and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.02
    judged = {"held_out_colour:red", "held_out_hps", "accuracy", *RIGHT}
    evaluated = [line for line in grpo_flux.read_metrics("run") if judged <= line.keys()]
    assert [line["step"] for line in evaluated] == [0, 6, 12]
    start, end = (torch.nn.utils.parameters_to_vector(transformer.parameters())
                  for transformer in (tiny.policy.transformer, model))
    assert 1e-5 < (end - start).abs().max() < 1e-2

@pytest.mark.parametrize("world, S", [(1, 12), (2, 24), (3, 6)])
def test_pictures_belong_to_their_prompts(tiny, tmp_path, monkeypatch, world, S):
    """Images scored with another prompt, advantages of other samples, raw scores of two scales
    added, a reward of weight 0 that is trained on, an evaluation that depends on the number of
    processes. The prompts are numbers; this policy paints them into the first pixel, and noise of
    the sample into the others; the reward reads both, and is flat for prompt 0."""
    run = copy.copy(tiny)
    r, A = torch.empty(2, 2, 12).double()  # reward and advantage of each sample
    run.cfg = settings(num_prompts=2, batch_size=S, sampling_steps=3, eval_images=12,
                       init_same_noise=False)
    run.out, run.step_prompts, run.eval_prompts = tmp_path, ["01"], "0123456789"
    run.text = lambda prompts: [torch.tensor([float(p) for p in prompts])]

    def predict(x, sigma, text):
        target = x.clone()
        target[:, 0, 0] = text[0] / 10
        return (x - target) / sigma

    def judge(images, prompts):
        drawn = (images[:, 0, 0, 0] * 10).round()
        assert drawn.tolist() == [float(p) for p in prompts]
        return images[:, 0, -1, -1] * (drawn > 0)

    def update(predict, optimizer, trajectory, text, advantages, keys, cfg, reference, window,
               useful, *_):
        assert useful == ([False, True] if S == 12 else [True] * (24 // S))
        for (_, p, i), x0, advantage in zip(keys, trajectory.x0[:, None, None], advantages):
            r[p, i], A[p, i] = judge(x0, [p]), advantage
        return {}

    def step(one):
        return one.metrics(1, *grpo_flux.train_step(0, one))

    run.policy = mock.MagicMock(predict=predict)
    run.rewards = {"hps": (0.5, judge), "clip": (0.25, lambda *given: 100 * judge(*given)),
                   "logged": (0, lambda images, prompts: images[:, 0, -1, 0])}
    monkeypatch.setattr(grpo_flux, "decode", lambda vae, x0, *_: x0[:, None])
    monkeypatch.setattr(grpo_flux, "update", update)
    for line in in_processes(run, world, step, monkeypatch):
        assert line["hps"] == pytest.approx(r.mean().item(), abs=1e-6)
        assert line["hps_std"] == pytest.approx(r.std(1).mean().item(), rel=1e-5)
        assert "logged_std" in line
    assert torch.allclose(A[1], 0.75 * (r[1] - r[1].mean()) / r[1].std(), atol=1e-4)
    assert not A[0].any()
    (tmp_path / "images").mkdir()
    one, more = (in_processes(run, n, lambda one: one.evaluate(0), monkeypatch)[0]
                 for n in (1, 4 * world))
    assert more == pytest.approx(one, abs=1e-5)

SLICES = "--num_prompts 2 --batch_size 8 --learning_rate 1e-4".split()  # 4 images of each prompt

@job
def two_ranks(folder):
    """The folder of a run of two processes and of one from its checkpoint, with records A of two
    processes and B of one; what replays of A on 2 and 1, and of B on 2, have printed."""
    def start(*flags, launcher=TORCHRUN):
        return succeed(shell(*launcher, "grpo_flux.py", *flags, cwd=folder))

    flags = [*THREE, *SLICES, "--deterministic"]
    start(*flags, *"--out run --save_every 2 --record A".split())
    start(*flags, *"--out one --steps 1 --record B".split(), launcher=[])
    again = *THREE, *SLICES, "--out", "again", "--resume", "run/checkpoints/step_00002"
    replay = "--device", "cpu", "--deterministic", "--replay"
    with ThreadPoolExecutor() as pool:  # two replays of a record at once, beside a run
        running = [pool.submit(start, *again), pool.submit(start, *replay, "A"),
                   pool.submit(start, *replay, "A", launcher=[]),
                   pool.submit(start, *replay, "B")]
    return folder, [each.result() for each in running[1:]]

def test_the_same_experiment_on_any_number_of_processes(two_ranks, tmp_path):
    """Counts, prompts or draws by process or by batch; gradients summed and not averaged; weights
    that part; more pictures of an evaluation than were asked for."""
    def read(folder):
        lines, model = results(folder)
        for line in lines:
            del line["clip_frac"]  # a ratio at the clip may flip
        picture = np.asarray(Image.open(folder / "images" / "step_00003.png"), dtype=float)
        return lines, torch.nn.utils.parameters_to_vector(model.parameters()), picture

    expected, weights, picture = read(two_ranks[0] / "run")
    checkpoint = str(two_ranks[0] / "run" / "checkpoints" / "step_00002")
    for flags, steps in (([], [1, 2, 3]), (["--resume", checkpoint], [3])):
        out = tmp_path / str(len(steps))
        grpo_flux.main([*THREE, *SLICES, *flags, "--out", str(out)])
        lines, others, other_picture = read(out)
        assert [line["step"] for line in lines] == steps
        for line in lines:
            assert line == pytest.approx(expected[line["step"] - 1], rel=1e-4, abs=1e-6)
        assert (others - weights).norm() < 1e-5 * weights.norm()
        assert np.allclose(other_picture, picture, atol=2)  # of 255
    assert torch.equal(read(two_ranks[0] / "again")[1], weights)

def test_every_setting_is_explained_and_read(capsys):
    """A flag that no code reads, a number without limits, help or a default that --help lacks."""
    read = set(re.findall(r"\bcfg\.(\w+)", inspect.getsource(grpo_flux)))
    read |= {"hps", "hps_arch", "clip", "clip_arch", "pickscore"}  # with getattr
    with pytest.raises(SystemExit):
        grpo_flux.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    source = inspect.getsource(grpo_flux.Config)
    for f in fields(grpo_flux.Config):
        assert f.name in read and f.type not in (int, float)
        assert re.search(rf"(?m)^    {f.name}: .*  # (.+)", source)[1] in text
        assert not f.default or f"default {f.default}" in text
    for flags, sides in (("", (32, 32)), ("--width 64", (32, 64)),  # a flag, then TINY
                         ("--model a/b", (720, 720))):
        cfg, _ = grpo_flux.read_command_line(flags.split())
        assert (cfg.height, cfg.width) == sides

def test_prompts_are_encoded_once(tiny, tmp_path, monkeypatch, capsys):
    """Encoders that are loaded for nothing; embeddings of another run's length or model."""
    def encode(*prompts, **changes):
        run = types.SimpleNamespace(out=tmp_path, rank=0, device=CPU, eval_prompts=prompts,
                                    step_prompts=[])
        cfg = replace(tiny.cfg, **dict(text_length=6) | changes)
        run.text_files = grpo_flux.Run.encode_prompts(run, cfg)
        return run

    run = encode("a red circle", "a red circle and a blue cross")
    assert "1 of 2 prompts are cut to 6 tokens" in capsys.readouterr().out
    assert grpo_flux.Run.text(run, ["a red circle"] * 2)[0].shape == (2, 6, 64)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert encode("a red circle").text_files.keys() == {"a red circle"}
    for change in (dict(text_length=7), dict(dtype="bf16"), dict(model="another")):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            encode("a red circle", **change)

def test_blocks_are_gathered_once(tiny):
    """FSDP that gathers all weights again at every call, or computes with those from before an
    optimizer step: a rollout, an update of two optimizer steps and a rollout gather three times."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        policy = grpo_flux.Policy(tiny.cfg, SHAPE[1:], CPU)
        sharded = types.SimpleNamespace(policy=policy, text=tiny.text)
        cfg, keys = settings(batch_size=6, sampling_steps=3), [(0, 0, i) for i in range(12)]
        with torch.profiler.profile() as profile:
            trajectory, text = sample(sharded, cfg, keys)
            grpo_flux.update(policy.predict, policy.optimizer, trajectory, text,
                             torch.linspace(-1, 1, 12), keys, cfg)
            sample(sharded, cfg, keys)
    finally:
        dist.destroy_process_group()
    gathers = [event for event in profile.events() if event.name == "c10d::_allgather_base_"]
    assert len(gathers) == 3 * (2 + 2 + 1)  # blocks, and a root

@pytest.mark.parametrize("flags", [[], LORA, ["--dtype", "bf16"]])
def test_attention_without_a_backward(flags, tiny, tmp_path, monkeypatch):
    """A kernel that leaves all that is behind it untrained, without a word."""
    attend = transformer_flux.dispatch_attention_fn
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn",
                        lambda *x, **named: attend(*x, **named).detach())
    with pytest.raises(BadInput, match="--attention native: .* has no backward; choose another"):
        grpo_flux.main([*SHORT, *flags, "--out", str(tmp_path)])

@pytest.mark.parametrize("good", [0, 1])
def test_gradients_that_are_not_finite(good, tiny, tmp_path, monkeypatch):
    """Days without a step; a learning rate blamed for nan before it was ever used."""
    count, real = itertools.count(), grpo_flux.grpo_loss

    def loss(logp, *args):  # of 3 calls a GRPO step; 0 at first, with the gradient 0 / 0
        value, stats = real(logp, *args)
        return value + (0 * logp.sum()).sqrt() if next(count) >= 3 * good else value, stats

    monkeypatch.setattr(grpo_flux, "grpo_loss", loss)
    with pytest.raises(FloatingPointError) as end:
        grpo_flux.main([*SHORT, "--out", str(tmp_path)])
    words = grpo_flux.explain(end.value)
    assert f"of GRPO step {good + 1}, after {good} earlier ones; the loss" in words
    assert ("--learning_rate" in words) == bool(good) and not (tmp_path / "export").exists()
    assert len(read_metrics(tmp_path)) == good

def test_equal_rewards(tiny, tmp_path, monkeypatch, capsys):
    """A run that trains nothing and exports what it began with, or says so at every step."""
    monkeypatch.chdir(tmp_path)
    write(Path("flat.py"), "zero = lambda images, prompts: images.new_zeros(len(images))")
    with pytest.raises(FloatingPointError, match="nothing was trained or exported"):
        grpo_flux.main([*SHORT, "--steps", "5", "--reward", "flat:zero", "--out", "run"])
    assert capsys.readouterr().out.count("warning: in GRPO steps 1 to 3 ") == 1
    first, *lines = grpo_flux.read_metrics("run")
    assert len(lines) == 5 and not Path("run", "export").exists()
    for line in lines:
        assert line["zero_std_frac"] == 1 and line["updates"] == 0
        assert not line.keys() & {"loss", "ratio", "grad_norm", "first_ratio_dev"}

def test_the_tiny_start_is_miscaptioned():
    """A start that listens already, or whose share of wrong captions is not what it says."""
    labels = torch.arange(24_000) % 24
    captions = grpo_flux.miscaption(labels, grpo_flux.MISCAPTIONED)
    assert (captions != labels).float().mean().item() == pytest.approx(0.6 * 23 / 24, abs=0.01)

def test_judge_of_the_tiny_world():
    """A judge that calls a drawn picture wrong, or an empty or another prompt's right."""
    images, labels = reward.tiny_dataset(480, seed=7)
    empty = 0 * images + torch.tensor(reward.BACKGROUND).view(3, 1, 1) / 255
    other = len(reward.SHAPES) + 1  # the next colour and the next shape
    for pictures, shift, right in ((images, 0, True), (images, other, False), (empty, 0, False)):
        prompts = [reward.TINY_PROMPTS[(i + shift) % 24] for i in labels]
        judged = reward.judge_tiny(pictures, prompts, {})
        assert judged.keys() == RIGHT
        assert all((value == right).all() for value in judged.values())

# -------------------------------------------------------------------------------------------- tape

def read_table(printed):
    """{stage: row of the table}, the lines below the table."""
    lines = printed.splitlines()
    rows = [line.split() for line in lines if line.startswith(tuple(grpo_flux.TOLERANCES))]
    end = [line for line in lines if line.startswith(("first OFF", "replay"))]
    return {row[0]: row for row in rows}, end

def replay(folder, *flags):
    """Exit status, {stage: row of the table}, the lines below the table."""
    with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit) as end:
        grpo_flux.main([*flags, "--replay", str(folder), "--device", "cpu"])
        sys.exit(0)
    return end.value.code, *read_table(text.getvalue())

@pytest.fixture(scope="module")
def record(tiny, tmp_path_factory):
    """A record of two steps on one prompt, made with --deterministic."""
    folder = tmp_path_factory.mktemp("tape")
    grpo_flux.main([*SHORT, "--record", str(folder / "A"), "--out", str(folder / "run"),
                    "--deterministic"])
    yield folder / "A"
    torch.use_deterministic_algorithms(False)

def test_replay_on_any_number_of_processes(two_ranks):
    """Draws or results of one rank taken for another's; replays that write, or stand in each
    other's way; a run that is not deterministic: on the same processes all errors are 0."""
    folder, outputs = two_ranks
    same, *others = [read_table(printed) for printed in outputs]
    for rows, end in (same, *others):
        assert [*rows] == [*grpo_flux.TOLERANCES] and end == ["replay OK"]
    for rows, _ in others:
        assert [name for name, row in rows.items() if row[-2:] == ["not", "compared"]] == [
            "velocity", "velocity_in_update"]
    assert all(float(row[2]) == 0 for row in same[0].values())
    # 3 steps, 2 ranks, 12 samples, T = 3; an optimizer step is compared in each of them
    counts = [int(same[0][name][1]) for name in ("velocity", "grad_norm")]
    assert counts == [3 * 2 * 12 * 3 * 256, 6]
    assert {path.name for path in folder.iterdir()} == {"run", "again", "one", "A", "B"}

def test_replay_takes_all_draws_from_the_tape(record):
    """A random number that is drawn beside the tape: it would change with the seed; a draw that the
    tape has under another name."""
    tape = load_file(record / "step_00002_rank_0.safetensors")
    drawn = grpo_flux.randn((16, 16), 0, grpo_flux.NOISE, 1, 0, 5, 2)  # the last one, of step 2
    assert torch.equal(tape["noise_2_0_5_2"], drawn)
    assert replay(record, "--seed", "7")[::2] == (0, ["replay OK"])

def test_replay_of_a_foreign_record(tiny, tmp_path):
    """Names, shapes or order of draws and results other than in Tape's docstring, by which plain
    Python has written them; a record without them that is called OK."""
    flags = dict(steps=1, num_prompts=2, num_generations=2, batch_size=4, sampling_steps=2,
                 dtype="fp32", text_length=8, step_prompts=[TWO])
    start, noise = torch.randn(2, *SHAPE), torch.randn(4, 16, 16)
    draws = {f"initial_noise_1_{p}_0": start[p] for p in (0, 1)}
    for p, i in itertools.product((0, 1), (0, 1)):
        draws[f"noise_1_{p}_{i}_0"] = noise[2 * p + i]
        draws[f"train_steps_1_{p}_{i}"] = torch.zeros(1).long()
    text = tiny.text([TWO[0], TWO[0], TWO[1], TWO[1]])
    x = grpo_flux.pack_latents(start.repeat_interleave(2, dim=0))
    with torch.no_grad():  # shift 3: σ is 1, 0.75, 0
        v = tiny.policy.predict(x, torch.ones(4, 1, 1), text)
        x_next, _, logp = flux_step(v, x, 1, 0.75, tiny.cfg.eta, noise=noise)
        v_next = tiny.policy.predict(x_next, torch.full((4, 1, 1), 0.75), text)
    results = {"text.0": text[0], "text.1": text[1], "velocity.0": v, "velocity.1": v_next,
               "latents.0": torch.stack([x, x_next], 1), "latents.1": x_next - 0.75 * v_next,
               "logp.0": logp[:, None]}

    def change(**changes):
        tensors = {name: x for name, x in (draws | results | changes).items() if x is not None}
        write_info(tmp_path / "A", tensors, "step_00001_rank_0.safetensors", **flags)
        return tmp_path / "A"

    status, rows, end = replay(change())
    assert (status, end) == (0, ["replay OK"])
    compared = [name for name, row in rows.items() if row[-1] == "OK"]
    assert compared == ["text", "velocity", "latents", "logp"]
    for changes in (dict.fromkeys(results), {"velocity.1": v * math.nan}):
        assert replay(change(**changes))[0] == 3
    for changes, words in (({"logp.0": logp[:3]}, "a whole file of --record"),
                           ({"noise_1_1_0_0": None}, "must hold noise_1_1_0_0")):
        with pytest.raises(BadInput, match=words):
            grpo_flux.main(["--replay", str(change(**changes)), "--device", "cpu"])

HALVES = partial(transformer_flux.apply_rotary_emb, use_real_unbind_dim=-2)  # FLUX has neighbours

@pytest.mark.parametrize("target, change, off, low, high", [
    # a reward that is off by 0.02 % on the same images; a velocity that is off by 0.01 %; a rotary
    # embedding, in rollout and update alike, that makes noise while loss and ratio look right
    ("reward.HPS.__call__", lambda scores: scores * 1.0002, "reward", 1.9e-4, 2.1e-4),
    ("grpo_flux.velocity", lambda v: v * 1.0001, "velocity", 9e-5, 3e-4),
    ("diffusers.models.transformers.transformer_flux.apply_rotary_emb", HALVES, "velocity",
     0.05, 1)])
def test_replay_finds(target, change, off, low, high, record, monkeypatch):
    """A change of one stage that is not seen, or that the table shows at another stage."""
    original = pkgutil.resolve_name(target)
    monkeypatch.setattr(target, change if change is HALVES else (
        lambda *x, **named: change(original(*x, **named))))
    status, rows, end = replay(record, "--deterministic")
    assert low < float(rows[off][2]) < high and float(rows["text"][2]) == 0
    assert end == [f"first OFF: step 1, rank 0, stage {off}; later stages inherit its error",
                   "replay OFF"] and status == 3
    if change is HALVES:
        assert rows["loss"][-1] == rows["reward"][-1] == "OK"  # given the recorded images
        assert rows["images"][-1] == "OFF"

def test_replay_in_bf16_forgives_rounding_alone(tiny, tmp_path, monkeypatch):
    """A correct port called OFF, as a ratio at the clip flips; or a wrong one called OK."""
    flags = ("--steps 2 --num_prompts 1 --num_generations 6 --batch_size 2 --sampling_steps 16 "
             "--eta 0.3 --learning_rate 1e-5 --dtype bf16 --device cpu --eval_images 2 --seed 1")
    record = tmp_path / "A"
    grpo_flux.main([*flags.split(), "--record", str(record), "--out", str(tmp_path / "run")])
    status, rows, end = replay(record, "--attention", "_native_math")
    tiny.policy.transformer.set_attention_backend("native")  # diffusers keeps one for all models
    assert (status, end) == (0, ["replay OK"]) and int(rows["loss"][1]) == 2
    assert float(rows["velocity"][2]) > 0  # another kernel, indeed
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", HALVES)
    assert replay(record)[1]["velocity"][-1] == "OFF"

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

@pytest.mark.parametrize("part", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pickscore_that_lacks_a_part(part, pick, tmp_path):
    """Weights or words that transformers makes up at random where there are none."""
    shutil.copytree(pick, tmp_path / "pick", ignore=shutil.ignore_patterns(part))
    with pytest.raises(BadInput, match="--pickscore .*: must be transformers' CLIP model"):
        reward.PickScore(str(tmp_path / "pick"))

def test_checkpoints_of_others(tiny, tmp_path):
    """Weights refused for how they were saved; code in a file; weights that are stretched to
    another image size; another model's mean and std."""
    file, arch, images = tmp_path / "clip.pt", tiny.cfg.hps_arch, torch.rand(2, 3, 40, 32)
    state = torch.load(tiny.cfg.hps)["state_dict"]
    half = {f"module.{name}": x.half() for name, x in state.items()}
    for saved in (half, {"state_dict": half, "epoch": 3}):
        torch.save(saved, file)
        hps = reward.HPS(file, arch)
        assert torch.allclose(hps(images, TWO), tiny.hps(images, TWO), atol=1e-3)
        assert {p.dtype for p in hps.model.parameters()} == {torch.float32}
    for saved, words in (({"state_dict": state, "args": types.SimpleNamespace()}, "Namespace"),
                         ({"model": {1: 2}}, "weights of --clip_arch")):
        torch.save(saved, file)
        with pytest.raises(BadInput, match=f"(?s)--clip .*clip.pt: .*{words}"):
            reward.HPS(file, arch, flag="--clip")
    larger = tmp_path / "larger.json"
    larger.write_text(Path(arch).read_text().replace('"image_size": 32', '"image_size": 64'))
    with pytest.raises(BadInput, match="size mismatch"):
        reward.HPS(tiny.cfg.hps, larger)
    torch.save(open_clip.create_model("MobileCLIP-S1").state_dict(), file)
    other = reward.HPS(file, "MobileCLIP-S1")
    assert other.model.visual.image_mean == (0, 0, 0)  # as for all published weights of it

def test_reward_specs():
    """A weight dropped without a word; a reward of weight 0 refused; a run without any reward."""
    assert reward.parse_rewards("hps:0.7,clip:0.3") == {"hps": 0.7, "clip": 0.3}
    assert reward.parse_rewards("hps:0, my.rewards:f:2") == {"hps": 0.0, "my.rewards:f": 2.0}
    for bad in ("", "hsp", "hps:", "hps:-1", "hps,hps", "hps:1.2.3", "a:b:c", "hps:0,a:f:0"):
        with pytest.raises(BadInput, match="must be"):
            reward.parse_rewards(bad)

def test_own_rewards_spoil_nothing(tmp_path, monkeypatch):
    """One reward that changes the images or prompts of all others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    write(Path("spoiler.py"), "def f(images, prompts):\n"
          "    images.zero_()\n    return [len(prompts.pop())] * 2")
    images, prompts = torch.ones(2, 3, 4, 4), ["a", "bc"]
    rewards = dict.fromkeys("fgh", (1.0, reward.load_reward("spoiler:f")))
    scores = reward.score(rewards, images, prompts, "step 1")
    assert images.min() == 1 and prompts == ["a", "bc"]
    assert {name: r.tolist() for name, r in scores.items()} == dict.fromkeys("fgh", [2, 2])

NO_MEMORY = mock.Mock(side_effect=torch.OutOfMemoryError("of the device"))

@pytest.mark.parametrize("function, error, words", [
    (lambda i, p: i, BadInput, r"--reward x: .*2 finite numbers .* in step 3, .*\(2, 3, 4, 4\)"),
    (lambda i, p: sys.exit(1), BadInput, "SystemExit"),
    (lambda i, p: [1.0, float("nan")], BadInput, r"in step 3, prompts 'a' .*\[1.0, nan\]"),
    (NO_MEMORY, torch.OutOfMemoryError, "^of the device"),
    (None, FloatingPointError, "step 3")])
def test_scores_refused(function, error, words):
    """Scores of another shape, or nan, that end in the weights; the end of a run without a word."""
    images = torch.full((2, 3, 4, 4), 0.5 if function else float("inf"))
    with pytest.raises(error, match=words):
        reward.score({"x": (1.0, function)}, images, ["a", "b"], "step 3")

def test_prompt_files(tmp_path):
    """Braces and columns of a table trained on as prompts; prompts with a comma refused as one."""
    lines = ["[a cat], red", "{red|blue} car", '"a, b"', "a\tb", "x" * 200_000]
    write(tmp_path / "p.txt", "\n \n".join(lines))
    assert reward.read_prompts(tmp_path / "p.txt") == lines
    for name in ("p.csv", "p.TSV", "p.json", "p.jsonl"):
        with pytest.raises(BadInput, match=f"--prompts {name}: must be .*, not a table"):
            reward.read_prompts(name)

def test_atomic_write(tmp_path):
    """Half a file under its name; ranks that remove each other's files; leftovers in the result."""
    final = tmp_path / "x"
    for name in (".writing-x", ".old-x", "x"):
        write(tmp_path / name / "before", "")
    with pytest.raises(KeyboardInterrupt), reward.atomic_write(final) as path:
        path.mkdir()
        raise KeyboardInterrupt
    assert (final / "before").exists() and not path.exists()
    with reward.atomic_write(final) as path:
        path.mkdir()
        with reward.atomic_write(final, rank=1) as other:
            (other / "shard").touch()
        with pytest.raises(OSError), reward.atomic_write(final, rank=1):
            raise OSError
        assert path == other and path.exists()
    assert [*tmp_path.rglob("*")] == [final, final / "shard"]
    with mock.patch("shutil.rmtree", side_effect=PermissionError(1, "Mine")):
        with pytest.raises(PermissionError, match="Mine"):
            reward.remove(final)  # a kill would leave the same
    assert [file.name for file in tmp_path.iterdir()] == [".old-x"]
    reward.remove(tmp_path / ".old-x")
    assert not list(tmp_path.iterdir())

def test_files_of_the_user_stay(tmp_path, monkeypatch):
    """A folder replaced by a file; what a link points to removed; a link replaced."""
    monkeypatch.chdir(tmp_path)
    write(Path("disk/folder/mine"), "")
    write(Path("disk/file"), "mine")
    for name, good, bad in (("folder", Path.mkdir, Path.touch), ("file", Path.touch, Path.mkdir)):
        Path(name).symlink_to(f"disk/{name}")
        before = sorted(Path().rglob("*"))
        with pytest.raises(OSError), reward.atomic_write(name) as work:
            bad(work)
        assert sorted(Path().rglob("*")) == before
        with reward.atomic_write(name) as work:
            good(work)
        assert Path(name).is_symlink()
        reward.remove(name)
    assert {*Path().rglob("*")} == {Path("disk"), Path("disk/folder"), Path("disk/file")}
    assert not Path("disk/file").read_text()

def test_attention_of_cudnn_is_off(monkeypatch):
    """Gradients that are nan on Hopper and Blackwell."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch begins
    device, on = reward.select_device(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert device == torch.device("cuda", 0) and not on

@pytest.mark.parametrize("backend, words", [
    ("native", None), ("x", "not registered"), ("flex", "backward"),
    ("_native_cudnn", "No viable backend"), ("flash_hub", "pip install kernels")])
def test_attention_backends(backend, words):
    """A traceback after minutes of loading; a probe that draws, and so changes what a run begins
    with."""
    state = torch.get_rng_state()
    try:
        reward.check_attention(backend, CPU, torch.bfloat16)
        assert words is None
    except BadInput as error:
        assert words in str(error) and str(error).startswith(f"--attention {backend}: ")
    assert torch.equal(torch.get_rng_state(), state)

def test_attention_that_cannot_train(monkeypatch):
    """Attention weights that silently stay untrained; kernels that ignore --deterministic."""
    with pytest.raises(BadInput, match="--attention flex: .*--deterministic"):
        reward.check_attention("flex", CPU, torch.float32, deterministic=True)
    for kernel in (lambda q, k, v, **_: q.detach(), lambda q, k, v, **_: 2 * q):
        monkeypatch.setattr("diffusers.models.attention_dispatch.dispatch_attention_fn", kernel)
        with pytest.raises(BadInput, match="--attention native: .*can train"):
            reward.check_attention("native", CPU, torch.float32)

def test_npus(monkeypatch):
    """HCCL's 120 s, too few for a slow disk; counts of processes over which it fails."""
    npu = mock.Mock(type="npu")
    monkeypatch.setattr("torch.npu", mock.Mock(device_count=lambda: 8), raising=False)
    monkeypatch.setattr("torch.device", mock.Mock(return_value=npu))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("os.environ", {"LOCAL_RANK": "1"})
    assert reward.select_device("npu") == npu and torch.device.call_args.args == ("npu", 1)
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "1200"
    for size in "3567":
        os.environ["LOCAL_WORLD_SIZE"] = size
        with pytest.raises(BadInput, match=f"--nproc_per_node {size}: must be 1, 2, 4, 8"):
            reward.select_device("npu")

@pytest.fixture
def score_lines(tiny, tmp_path, monkeypatch, capsys):
    """A function that runs reward.py in an empty folder: {file: score} that it prints, in order."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        argv = ["--hps", tiny.cfg.hps, "--hps_arch", tiny.cfg.hps_arch, "--device", "cpu", *flags]
        reward.main(argv)
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        return {Path(path).name: float(value) for value, path in lines}

    return run

def test_pictures_as_people_have_them(score_lines):
    """A photo on its side, black for transparent, hidden files; scores beside the wrong file."""
    red, blue = (Image.fromarray(reward.draw(p)) for p in TWO)
    exif, clear, grey = Image.Exif(), red.convert("RGBA"), red.convert("L")
    exif[274] = 6  # to be turned to the right
    clear.putalpha(0)
    white = Image.new("RGB", red.size, "white")
    pictures = {"red.png": red, "blue.png": blue, "red.tiff": red, "grey.png": grey,
                "clear.png": clear, "white.png": white, ".hidden.png": red}
    for name, picture in pictures.items():
        picture.save(name)
    red.transpose(Image.Transpose.ROTATE_90).save("side.png", exif=exif)
    for name in ("notes.txt", "data.h5", "film.mpg"):  # Pillow names the last two formats
        Path(name).touch()
    scores = score_lines("--prompt", "a red circle", ".")
    assert scores.keys() == {"side.png", *pictures} - {".hidden.png"}
    assert scores["red.png"] == scores["red.tiff"] == scores["side.png"] > scores["blue.png"] + 0.2
    assert scores["clear.png"] == scores["white.png"] != scores["red.png"] != scores["grey.png"]
    Image.fromarray(np.asarray(grey).astype("uint16") * 257).save("deep.png")
    with pytest.raises(BadInput, match="deep.png: .*16 bits"):
        reward.read_image("deep.png")

def test_reward_command_line(score_lines, tmp_path, monkeypatch, pick):
    """An own reward or PickScore that is not called; a name that steers the terminal; scores that
    are lost with the reader of a pipe."""
    picture = tmp_path / "pictures" / "0_a_café.png"
    picture.parent.mkdir()
    Image.fromarray(reward.draw("a red circle")).save(picture)
    write(Path("own_light.py"), "def f(images, prompts): return [len(p) for p in prompts]")
    flags = "--reward own_light:f pictures --device cpu --save s.jsonl".split()
    done = subprocess.run(["bash", "-c", '"$@" | true', "", sys.executable, HERE / "reward.py",
                           *flags], stderr=-1, text=True)
    assert done.stderr == f"the first: pictures/{picture.name}: a café\n"
    assert json.loads(Path("s.jsonl").read_text()) == dict(
        image=picture.name, prompt="a café", score=6)
    score = reward.PickScore(pick)(reward.read_image(picture), ["a"]).item()
    flags = "--reward pickscore --prompt a pictures --pickscore".split()
    assert score_lines(*flags, pick) == {picture.name: pytest.approx(score, abs=1e-5)}
    assert reward.printable("é\udcff\x1b\u4e2d") == "é" + r"\udcff\x1b" + "\u4e2d"

def test_prompts_in_names():
    """Numbers of the prompt lost with the counter; plausible scores for the word ComfyUI."""
    def prompts(*names):
        return reward.prompts_from_names([Path("x", f"{name}.png") for name in names])

    assert prompts("8_35mm_photo_of_1965", "07-a_cat") == ["35mm photo of 1965", "a cat"]
    assert prompts("7_3_red_circles") == ["3 red circles"]
    for names in (["a_cat", "0001"], ["ComfyUI_00001_", "ComfyUI_00002_"], ["step_0", "step_1"]):
        with pytest.raises(BadInput, match=r"--prompt \(not given\): must be.* x/"):
            prompts(*names)

@pytest.mark.parametrize("expected, error, allowed", [
    ([0.1, -0.1], 1.49e-5, True), ([0.1, -0.1], 1.51e-5, False), ([0.0], 0.0, True),
    ([0.3, math.nan], 0.0, False)])
def test_errors_of_scores(expected, error, allowed):
    """Rewards with a mean of 0, whose errors are infinite; nan, which no limit holds."""
    expected = torch.tensor(expected)
    assert reward.compare((expected + error).tolist(), expected) == allowed

def test_scores_of_two_devices(score_lines, capsys):
    """Pictures 0, 1, 10, 11, 2 with others' prompts or scores; files that cannot be put together;
    scores of other pictures that pass."""
    prompts, pictures = reward.TINY_PROMPTS[:12], Path("pictures")
    pictures.mkdir()
    for i, prompt in enumerate(prompts):
        picture = Image.fromarray(reward.draw(prompt))
        picture.save(pictures / f"{i}_{prompt.replace(' ', '_')}.png")
    write(Path("p.txt"), "\n".join(prompts))
    score_lines("pictures", "--save", "s.jsonl")
    right = Path("s.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["prompt"] for line in right] == prompts
    far = [line.replace('"score": 0', '"score": 1') for line in right]
    by_shell = sorted(map(str, pictures.iterdir()))
    for saved, given, status, words in (
            (right, ["pictures"], 0, "reward OK"), (far, ["pictures"], 3, "reward OFF"),
            (right[::-1], ["pictures"], 2, "same order"),
            (right[1:], ["pictures"], 2, "same order"),
            (right, ["pictures", "--prompts", "p.txt"], 0, "reward OK"),
            (right, [*by_shell, "--prompts", "p.txt"], 2, "in the order of their names")):
        write(Path("s.jsonl"), "".join(saved))
        with pytest.raises(SystemExit, match=str(status)):
            score_lines(*given, "--against", "s.jsonl")
        assert words in "".join(capsys.readouterr())

# ---------------------------------------------------------------------------------- what goes wrong

FAULTY = ("--device cpu --num_prompts 1 --num_generations 2 --micro_batch 2 --sampling_steps 2 "
          "--batch_size 2 --eval_images 2 --eval_every 2 --save_every 1 --learning_rate 1e-3 "
          "--ema_decay 0 --steps 4")
JUDGES = """import torch
calls = []
def nan(images, prompts): return torch.tensor([0.0, float("nan")] * (len(images) // 2))
def later(images, prompts):
    calls.append(1)
    return images.mean((1, 2, 3)) / (len(calls) < 5)
"""
FILES = {
    "judges.py": JUDGES, "syntax.py": "def", "licence.py": "raise OSError('no licence')",
    "exits.py": "import sys; sys.exit('bye')", "page.png": "<html>", "page.pt": "<html>",
    "one.txt": "a red circle", "empty.txt": "\n \n", "p.json": json.dumps(TWO),
    "latin.txt": b"B\xe4r", "cut.png": b"\x89PNG\r\n\x1a\n\0\0",
    "other.jsonl": '{"image": "0001.png", "prompt": "y", "score": 1}'}
WEIGHTS = "diffusion_pytorch_model.safetensors"

def table(text):
    """The cells of each line, between bars."""
    return [re.split(r" *\| *", line.strip()) for line in text.strip().splitlines()]

# a copy | of what | a file or folder of it | its content, new settings, new name or end
BROKEN = table(f"""
    fill      | flux | model_index.json | {{"_class_name": "FluxFillPipeline"}}
    quantized | flux | transformer/config.json | {{"quantization_config": {{}}}}
    fp16      | flux | transformer/{WEIGHTS} | a.fp16.safetensors
    pickled   | flux | vae/{WEIGHTS} | diffusion_pytorch_model.bin
    cut       | flux | transformer/{WEIGHTS} | cut
    pointer   | flux | tokenizer_2/tokenizer.json | version https://git-lfs.github.com
    no_words  | flux | tokenizer/tokenizer.json | removed
    no_vae    | flux | vae | removed
    no_tokenizer | flux | tokenizer_2 | removed
    shard | flux | transformer/{WEIGHTS}.index.json | {{"metadata":{{}},"weight_map":{{"x":"y2"}}}}
    text_tape | tape | config.json | {{"seed": "a"}}
    few_tape  | tape | config.json | {{"num_prompts": 2}}
    long_tape | tape | config.json | {{"steps": 2}}
    null_tape | tape | config.json | {{"step_prompts": null}}
    lora_run  | run | config.json | {{"lora_rank": 4}}
    other_run | run | config.json | {{"model": "FLUX.1-dev"}}
    lost_run  | run | config.json | removed
    cut_run   | run | checkpoints/step_00004/x.safetensors | cut
""")

def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

def write_info(folder, tensors, file, **info):
    write(folder / file, save(tensors))
    write(folder / "config.json", json.dumps({"model": "tiny"} | info))

def spoil(path, change):
    """Make a change of BROKEN to a file."""
    if change == "removed":
        reward.remove(path)
    elif change == "cut":
        os.truncate(path, 80)
    elif change.startswith("{") and path.exists():
        change_json(path, **json.loads(change))
    elif change.endswith((".safetensors", ".bin")):
        path.rename(path.with_name(change))
    else:
        write(path, change)

@pytest.fixture(scope="session")
def mess(tiny, tmp_path_factory):
    """A folder full of files with something wrong."""
    folder = tmp_path_factory.mktemp("mess")
    for name, held in FILES.items():
        write(folder / name, held)
    for name in ("pictures", "empty", "busy"):
        (folder / name).mkdir()
    for name in ("a red dot.png", "0001.png"):
        Image.new("RGB", (1, 1)).save(folder / "pictures" / name)
    (folder / "busy" / "lock").touch()
    (folder / "link").symlink_to("pictures")
    (folder / "flux").symlink_to(tiny.cfg.model)
    write_info(folder / "tape", {"reward.0": torch.ones(12)}, "step_00001_rank_0.safetensors",
               steps=1, num_prompts=1, step_prompts=[TWO[:1]])
    for step in ("step_00003", "step_00004"):
        checkpoint = folder / "run" / "checkpoints" / step
        write_info(folder / "run", {"weights.x": torch.ones(4)}, checkpoint / "x.safetensors",
                   **asdict(grpo_flux.Config(**grpo_flux.TINY)))
        grpo_flux.write_json(checkpoint / "manifest.json", grpo_flux.file_sizes(checkpoint))
    for name, original, file, change in BROKEN:
        shutil.copytree(folder / original, folder / name)
        spoil(folder / name / file, change)
    return folder

def cases(text):
    """Rows of (flags, words of the message) from lines of words | flags | flags ..."""
    return [(flags, words) for words, *several in table(text) for flags in several]

# refused before a process group, a device or a model is touched
EARLY = cases("""
    from 1 to             | --steps 0 | --steps 99999999999
    from 0 to             | --seed -1 | --ema_decay 1
    from 0 to             | --kl_beta nan | --kl_beta inf
    must be from          | --eta 0 | --eta inf
    below                 | --sde_window 8
    invalid int           | --steps 1e3
    invalid float         | --eta much
    one argument          | --steps
    unrecognized          | --step 3 | 3
    must be one of        | --sde ddpm | --device tpu
    must divide the       | --batch_size 9 | --batch_size 6 | --batch_size 96
    must divide the       | --num_generations 11
    multiple of 16        | --height 40 | --width 721
    at most 1             | --sde cps --eta 1.1
    number of processes, 8 | RANK=0 WORLD_SIZE=8 --num_prompts 1 --batch_size 12
    above 0               | --reward hps:0
    function              | --reward hps:nan | --reward nothing_here:f
    no attribute          | --reward judges:none | --reward json:f
    (SyntaxError          | --reward syntax:f
    no licence            | --reward licence:f
    parses arguments (SystemExit: bye) | --reward exits:f
    not found; must be a file | --hps none.pt | --reward clip --clip a/b | --hps /x/a.pt
    not found; must be a file | --reward pickscore --pickscore a/b/c
    in UTF-8              | --prompts none.txt | --prompts latin.txt
    in UTF-8              | --prompts busy
    is empty              | --prompts empty.txt
    not a table           | --prompts p.json
    --prompts (not given) | --model a/b
    must be tiny          | --model /none --prompts one.txt
    new folder            | --record run
    not with --replay     | --record a --replay tape
    folder of --record    | --replay . | --replay none | --replay text_tape | --replay null_tape
    each of --steps 2     | --replay long_tape
    must have step_prompts | --replay few_tape
    must be new, empty    | --out pictures | --out lost_run | --out cut
    not a whole checkpoint | --resume nowhere | --resume run | --out cut_run
    not a whole checkpoint | --resume cut_run/checkpoints/step_00004
    must lie in a run     | --resume lost_run/checkpoints/step_00003
    has gone on to        | --resume run/checkpoints/step_00003 --out run | --resume none --out run
    at least 4            | --out run --steps 2
    must be 4             | --out lora_run
    must be FLUX.1-dev    | --out other_run
""")

# refused by what must be opened, or called, to know; without --hps the tiny one
LATE = cases("""
    CANN                  | --device npu
    CUDA build            | --device cuda
    not all of torchrun's | RANK=0 | RANK=0 WORLD_SIZE=1
    no backend of this name | --attention x | --attention flash | --attention _native_cudnn
    new folder            | --record one.txt/x
    written to, and that no other | --out one.txt | --out one.txt/x | --out /proc/x | --out busy
    in step 3, prompts 'a | --reward judges:later
    in the evaluation of step 0, prompts 'a red circle' | --reward judges:nan
    to write models to    | XDG_CACHE_HOME=one.txt
    hf auth login         | --model a/b
    a folder or hub name  | --model . | --model \x1b[31mred
    it is a FluxFillPipeline | --model fill
    training needs the original | --model quantized
    a variant such as fp16 | --model fp16
    diffusion_pytorch_model.safetensors | --model pickled
    its files whole       | --model cut
    git lfs pull          | --model pointer
    2 tokens, its encoder | --model no_words
    104 tokens, its       | --model no_tokenizer
    vae                   | --model no_vae
    y2                    | --model shard
""")

# refused by reward.py
SCORING = cases("""
    CANN                  | pictures --device npu
    finds none            | pictures --device tpu
    must be a picture     | cut.png | page.png | none.png | empty
    --prompt (not given)  | pictures
    unrecognized          | pictures --batch 4
    1 prompts for 2       | pictures --prompts one.txt
    not allowed with      | pictures --prompt x --prompts one.txt
    must be a file        | pictures --prompt x --save pictures | pictures --prompt x --save link
    must be a file        | pictures --prompt x --save none/x | pictures --prompt x --save /proc/x
    must be a file        | pictures --prompt x --save one.txt/x
    --save wrote          | pictures --prompt x --against other.jsonl
    --against none.jsonl  | pictures --prompt x --against none.jsonl
    --hps none.pt         | pictures --prompt x --hps none.pt
    must be a whole       | pictures --prompt x --hps page.pt
    accept the licence    | pictures --prompt x --hps a/b/c.pt
    give its path         | pictures --prompt x --clip a/b/c.pt --reward clip
    owner/name of the hub | pictures --prompt x --pickscore a/b --reward pickscore
    --clip (not given)    | pictures --prompt x --reward clip
    must be hps, clip     | pictures --prompt x --reward none
    one reward            | pictures --prompt x --reward hps,clip
""")

# a program or flag: what is called only after the input was refused
TOO_LATE = {"early": "grpo_flux.init_distributed", "--attention": "grpo_flux.tiny_models",
            "--save": "reward.load_reward"}

def stamps(folder):
    """{path: when it was changed} of all files and folders."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

@faults
@pytest.mark.parametrize("program, flags, words", [
    (program, *row) for program, rows in dict(early=EARLY, late=LATE, scoring=SCORING).items()
    for row in rows])
def test_refused_in_one_line(program, flags, words, tiny, mess, tmp_path, monkeypatch, capfd):
    """A traceback, or hours of training on half a file, in the place of one line about the flag;
    a file of the user that is written all the same."""
    monkeypatch.chdir(mess)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delattr("torch.npu", raising=False)
    given, argv = flags.split(" "), ["--device=cpu"]
    if program == "late":
        argv += [f"--out={tmp_path}/out", *FAULTY.split()]
    if program == "late" and "--model" in given:
        argv += [f"--hps={tiny.cfg.hps}", f"--hps_arch={tiny.cfg.hps_arch}", "--prompts=one.txt"]
    for word in given:
        if re.match("[A-Z_]+=", word):
            monkeypatch.setenv(*word.split("="))
        else:
            argv.append(word)
    for word, function in TOO_LATE.items():
        if word in (program, *argv):
            monkeypatch.setattr(function, mock.Mock(side_effect=AssertionError("not at once")))
    files = stamps(mess)
    with FileLock("busy/lock"), pytest.raises(SystemExit, match="2"):
        try:
            (reward if program == "scoring" else grpo_flux).main(argv)
        except BadInput as problem:
            reward.exit_with_error(problem)
    *before, line = capfd.readouterr().err.splitlines()
    assert words in line and line.startswith("error: ") and line.isprintable()
    assert any(word in line for word in [*given, "(not given)", "RANK"])
    assert not any("Traceback" in text for text in before)
    assert not before or program != "early"
    assert stamps(mess) == files

@job
def strange_place(folder):
    """A run where much is strange or broken around it, and one without stdout."""
    write(folder / "tensorboard" / "__init__.py", "raise TypeError('no descriptors')")
    write(folder / "prompts.txt", "ein grüner Bär\n\U0001f600")
    close = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return folder, shell(
        "grpo_flux.py", *SHORT, "--prompts", "prompts.txt", "--out", "run", cwd=folder,
        PYTHONPATH=str(folder), HOME=None, LANG=None, LC_ALL="C", PYTHONIOENCODING="ascii",
        SLURM_PROCID="1", SLURM_NTASKS="4", SLURM_LOCALID="1", WORLD_SIZE="4", LOCAL_RANK="1",
        PYTHONOPTIMIZE="1"), shell(
        "-c", close, "grpo_flux.py", *SHORT, "--out=~/closed", cwd=folder, HOME=str(folder),
        XDG_CACHE_HOME=home)

@faults
def test_surroundings(strange_place):
    """A run that ends late because of its terminal, TensorBoard or environment; a folder named ~;
    a program that a daemon starts without stdout."""
    folder, done, closed = strange_place
    assert "look at run" in succeed(done) and "Traceback" not in done.stderr
    assert "ein gr\\xfcner B\\xe4r" in done.stdout
    succeed(closed)
    assert (folder / "closed" / "before_after.png").exists()

@faults
def test_other_models_and_prompts(tiny, tmp_path, monkeypatch, capfd):
    """FLUX.1-schnell given guidance; a prompt that names a file, or steers the terminal."""
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny.cfg.model, "schnell"))
    change_json(model / "transformer" / "config.json", guidance_embeds=False)
    file = model / "transformer" / WEIGHTS
    save_file({name: x for name, x in load_file(file).items() if "guidance" not in name}, file)
    Path("p.txt").write_text("\n".join([
        "\x1b[31mred\x1b]0;title\x07", "../../etc/passwd", "/abs/path\\..", "$(rm -rf .)", "'\";--",
        "\U0001f600\u202eabc\x85\u2028", "$x^{", "%s {step} {0}", "a red circle " * 8_000]))
    sizes = [f"--{name}={value}" for name, value in grpo_flux.TINY.items() if value]
    grpo_flux.main([*sizes, *SHORT, *(
        f"--model schnell --hps {tiny.cfg.hps} --hps_arch {tiny.cfg.hps_arch} --prompts p.txt "
        "--eval_images 9 --shift 1 --record tape --out run").split()])
    printed = "".join(capfd.readouterr())
    assert "3 of 4 denoising steps trained" in printed and r"\x1b[31mred" in printed
    assert "\x1b[31m" not in printed and "\x07" not in printed and "of 9 prompts are" in printed
    assert not results(Path("run"))[1].config.guidance_embeds
    assert {*os.listdir()} == {"p.txt", "run", "tape", "schnell"} and not Path("run/.text").exists()
    Path("p.txt").unlink()
    grpo_flux.main("--replay tape --device cpu".split())
    assert "replay OK" in capfd.readouterr().out

@faults
@pytest.mark.parametrize("name, calls, wrong, words", [
    ("velocity", 19, lambda v: v * math.nan, "an image of step . is not finite"),
    ("group_advantages", 1, lambda A: A * math.nan, "of GRPO step 2, after 1 .* was not finite"),
    ("rollout", 2, lambda t: t._replace(logp=t.logp + 1e-4), "the first ratio is off by 1"),
    ("load_transformer", 0, NO_MEMORY, "a lower --micro_batch"),
    ("file_sizes", 1, mock.Mock(side_effect=OSError(28, "disk full")), "disk full.*step_00001$")])
def test_runs_that_go_wrong(name, calls, wrong, words, tiny, tmp_path, monkeypatch):
    """Two days of steps that train nothing; the reward blamed for what the policy did; the old
    checkpoint gone before the new one is whole."""
    count, original = itertools.count(), getattr(grpo_flux, name)

    def spoiled(*args, **kwargs):  # after so many calls
        result = original(*args, **kwargs)
        return wrong(result) if next(count) >= calls else result

    monkeypatch.setattr(grpo_flux, name, spoiled)
    with pytest.raises((FloatingPointError, torch.OutOfMemoryError, OSError)) as end:
        grpo_flux.main(f"{FAULTY} --steps 9 --keep_last 1 --out {tmp_path}".split())
    line, last = grpo_flux.explain(end.value), grpo_flux.checkpoints(tmp_path)
    assert re.search(words, line)
    assert re.findall("the same command continues from (.*)", line) == [*map(str, last)]
    assert not [*tmp_path.rglob(".writing-*")]

@pytest.mark.parametrize("error, of_processes", [
    (dist.DistStoreError("Timed out"), True), (dist.DistBackendError("Connection closed"), True),
    (RuntimeError("[gloo/pair.cc] Closed"), True), (RuntimeError("NCCL error in: x"), True),
    (RuntimeError(f"HCCL: {'rank ' * 90}error code EI0006"), True),
    (RuntimeError("size mismatch"), False), (ValueError("/data/gloo/x"), False),
    (OSError(2, "No such file", "/home/nccl/vae"), False)])
def test_errors_of_processes(error, of_processes, capsys):
    """A model that is blamed for a network, or for a process that loads for long; a path taken
    for one; a code of HCCL that is cut off; a lost traceback."""
    with pytest.raises(Exception) as end, grpo_flux.model_errors("FLUX.1-dev"):
        raise error
    assert ("--model FLUX.1-dev: must be" in str(end.value)) != of_processes
    if of_processes:
        line = grpo_flux.explain(end.value)
        assert line.startswith("another process has ended") and str(error) in line
        assert capsys.readouterr().err.startswith("Traceback")

@pytest.mark.parametrize("name", "SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGINT".split())
def test_signal_saves_and_stops(name, tiny, tmp_path, monkeypatch, capfd):
    """Steps lost when a machine goes; a second signal that is swallowed; a run that goes on with
    other settings without a word, or is finished and begins anew."""
    monkeypatch.chdir(tmp_path)
    number, draw = getattr(signal, name), grpo_flux.draw_latents
    flags = [*SHORT, "--eval_images", "1"]

    def draw_and_signal(*args):  # in step 1
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one kills
        return draw(*args)

    before = signal.signal(number, lambda *_: None)  # not ignored, as in the background
    with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
        patch.setattr(grpo_flux, "draw_latents", draw_and_signal)
        grpo_flux.main(flags)
    signal.signal(number, before)
    assert end.value.code == (130 if name == "SIGINT" else 0)
    assert [path.name for path in grpo_flux.checkpoints("runs/tiny")] == ["step_00001"]
    if name == "SIGTERM":
        flags += ["--clip_range", "1e-3"]
        grpo_flux.main(flags)  # goes on
        assert [line["step"] for line in grpo_flux.read_metrics("runs/tiny")] == [0, 1, 2]
        printed = capfd.readouterr().out
        assert "look at runs/tiny/before_after.png" in printed
        assert "from runs/tiny/checkpoints/step_00001, clip_range 0.0005 -> 0.001\n" in printed
        with pytest.raises(BadInput, match="--hps none.pt"):
            grpo_flux.main([*flags, "--hps", "none.pt"])

STOP = """import os, signal
calls = []
def f(images, prompts):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":  # in step 1
        os.kill(os.getpid(), signal.SIGTERM)
    return images.mean((1, 2, 3))
"""

@faults
def test_signal_to_one_of_two_processes(tmp_path, heavy):
    """A step that is lost without need, as one process does not know of the other's signal."""
    write(tmp_path / "stop.py", STOP)
    flags = f"{FAULTY} --reward stop:f --out run".split()
    succeed(shell(*TORCHRUN, "grpo_flux.py", *flags, cwd=tmp_path))
    assert [path.name for path in grpo_flux.checkpoints(tmp_path / "run")] == ["step_00001"]

def content(folder):
    """{file: a hash of what is in it} of all files but locks; tensors may be in any order."""
    files = {}
    for path in filter(Path.is_file, folder.rglob("*.*")):
        tensors = path.suffix == ".safetensors"
        held = save(load_file(path)) if tensors else path.read_bytes()
        files[str(path.relative_to(folder))] = hash(held)
    return files

def doomed(seed, attempt, rank=0):
    """Run grpo_flux.py and, unless seed is 0, kill it up to 5 ms after it opens a file to write,
    renames or removes one: any of the first 70, of about 110 in a whole run."""
    rng, fit = np.random.default_rng([seed, attempt, rank]), reward.fit
    seen, last = itertools.count(), rng.integers(70) if seed else None

    def see(event, args):
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and next(seen) == last:
            after = 0.005 * rng.random()
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

    reward.fit = lambda *args, **kwargs: fit(*args, **kwargs | {"steps": 3})  # builds in seconds
    sys.addaudithook(see)
    try:
        grpo_flux.main(f"{FAULTY} --out run".split())
    except RuntimeError as error:
        if not reward.is_collective_error(error):  # the other process was not killed
            raise

def start_again(seed):
    """Start the same run until no kill ends it; of several processes torchrun does so."""
    if "RANK" in os.environ:
        attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
        return doomed(seed, int(attempt), int(rank))
    for attempt in itertools.count():
        if os.fork() == 0:
            return doomed(seed, attempt)
        _, status = os.wait()
        if status != signal.SIGKILL:
            sys.exit(status != 0)
        print("exitcode: -9", file=sys.stderr)  # as torchrun says it

def run_with_kills(folder, ranks, seed):
    """The files of a run that begins again after each kill, until it ends."""
    folder = folder / "kills"  # always the same, which config.json holds
    folder.mkdir()
    launcher = [*TORCHRUN, "--max_restarts", "30"] if ranks == 2 else []
    done = shell(*launcher, __file__, "--doomed", f"{seed}", cwd=folder,
                 XDG_CACHE_HOME=str(folder / "cache"))
    succeed(done)
    assert {*re.findall(r"exitcode: (-?\d+)", done.stderr)} == ({"-9"} if seed else set())
    files = content(folder / "run")
    shutil.rmtree(folder)
    return files

@job
def few_kills(folder):
    # 4 dies in a checkpoint, 535 while the tiny models are built; how often else, time decides.
    return [run_with_kills(folder, 1, seed) for seed in (0, 4, 535)]

@faults
def test_few_kills(few_kills):
    """Half a checkpoint, picture, model or line that the next run takes for a whole one."""
    whole, *killed = few_kills
    assert killed == 2 * [whole]

@faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_kills(ranks, tmp_path, heavy):
    """What only one moment in forty shows; a restart that connects to what the attempt before it
    left, and hangs or is lost."""
    whole, *killed = [run_with_kills(tmp_path, ranks, seed) for seed in range(7)]
    assert killed == 6 * [whole]

@faults
def test_files_of_the_user(tiny, tmp_path, monkeypatch, capfd):
    """A file in a run's folder, or a live run below it, that a second start clears away; links to
    a larger disk that are replaced, or gather leftovers; a finished run that begins anew."""
    monkeypatch.chdir(tmp_path)
    run, disk, remove = Path("run"), tmp_path / "disk", reward.remove
    flags = f"{FAULTY} --height 64 --width 64 --out run --steps".split()
    grpo_flux.main([*flags, "1"])
    disk.mkdir()
    for name in ("checkpoints", "export"):
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(disk / name)
    mine = [run / name for name in ("text/prompts.txt", "notes.txt", "sub/.writing-x/y")]
    for path in (*mine, disk / ".writing-export", disk / "checkpoints" / ".old-step_00000",
                 disk / "checkpoints" / ".old-busy"):
        write(path, "mine")

    def remove_unless_busy(path):  # as is what another program reads
        if path.name in ("step_00001", ".old-busy"):
            raise PermissionError("busy")
        remove(path)

    monkeypatch.setattr(grpo_flux, "remove", remove_unless_busy)
    grpo_flux.main([*flags, "4"])
    assert "step_00001 stays: busy" in capfd.readouterr().err
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert sorted(str(path.relative_to(disk)) for path in [*disk.glob("*"), *disk.glob("*/*")]) == [
        "checkpoints", "checkpoints/.old-busy", "checkpoints/step_00001",
        "checkpoints/step_00003", "checkpoints/step_00004", "export", "export/transformer"]
    assert (run / "export").is_symlink() and (run / "checkpoints").is_symlink()
    assert "right_both" not in grpo_flux.read_metrics(run)[0]  # its judge knows 32 x 32 alone
    for folder in grpo_flux.checkpoints(run):
        remove(folder)
    files = stamps(tmp_path)
    with pytest.raises(BadInput, match="--out run: holds a run without its checkpoints"):
        grpo_flux.main([*flags, "4"])
    assert stamps(tmp_path) == files

def test_what_a_resumed_run_may_change(tiny, tmp_path):
    """One curve of two experiments; a run that is not recognised as its model has moved."""
    model, prompts = Path(shutil.copytree(tiny.cfg.model, tmp_path / "model")), tmp_path / "p.txt"
    prompts.write_text("a red circle")
    cfg = grpo_flux.Config(**grpo_flux.TINY | dict(model=str(model), prompts=str(prompts)))
    then = grpo_flux.describe_run(cfg, CPU) | dict(lora_alpha=128)  # an int: somebody's edit
    write(tmp_path / "config.json", json.dumps(then))

    def check(**changes):
        ours = types.SimpleNamespace(**vars(cfg) | changes)
        try:
            return grpo_flux.check_same_experiment(ours, tmp_path / "checkpoints" / "step_00002")
        except BadInput as refusal:
            return str(refusal)

    assert check() == ""
    for f in fields(cfg):
        old = getattr(cfg, f.name)
        new = old + {str: "x"}.get(f.type, 1)
        words = f"--{f.name} {new}: must be {'(not given)' if old == '' else old}"
        if f.name in grpo_flux.TUNED:
            words = f", {f.name} {old} -> {new}"
        elif f.name in grpo_flux.FREE + grpo_flux.LOCAL:
            words = ""
        given = check(**{f.name: new})
        assert given.startswith(words) and bool(given) == bool(words)
    assert check(ema_decay=0.0).startswith("--ema_decay 0.0: must be 0.9")
    write(model / ".cache" / "huggingface" / "x.metadata", "a later download")
    moved = str(shutil.move(model, tmp_path / "moved"))
    assert check(model=moved) == ""
    other = Path(shutil.copytree(moved, model), "transformer", WEIGHTS)
    other.write_bytes(other.read_bytes()[:-4] + b"else")  # of the same size
    assert check().startswith(f"--model {model}: must be {model} with the same content")
    prompts.write_text("a blue circle")
    assert check(model=moved).startswith(f"--prompts {prompts}: must be")

def test_a_checkpoint_is_whole_or_refused(two_ranks, tmp_path):
    """Weights of the start where a copy has left out a shard, or cut it off."""
    out = shutil.copytree(two_ranks[0] / "run", tmp_path / "run")
    find = partial(grpo_flux.find_checkpoint, settings(), out)
    files = sorted((whole := find()).iterdir())
    assert len(files) == 3  # two shards and the manifest
    for file in files:
        held = file.read_bytes()
        for left in (held[:-1], b"", None):
            file.unlink() if left is None else file.write_bytes(left)
            with pytest.raises(BadInput, match=f"{whole.name} is not a whole checkpoint"):
                find()
        file.write_bytes(held)
    assert find() == whole

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
    flags = f"--lora_rank {rank} --lora_alpha 8 --learning_rate 1e-3 --ema_decay 0 --out"
    grpo_flux.main([*SHORT, *flags.split(), str(tmp_path)])
    folder, export = tmp_path / "checkpoints" / "step_00002", tmp_path / "export"
    cfg = settings(lora_rank=rank, lora_alpha=8.0, model=tiny.cfg.model)
    policy, keywords = grpo_flux.Policy(cfg, SHAPE[1:], CPU), tiny.policy.predict.keywords
    inputs = torch.randn(2, 16, 16), torch.full((2, 1, 1), 0.6), tiny.text(TWO)
    pipe = FluxPipeline.from_pretrained(tiny.cfg.model, vae=None)
    if rank:  # peft takes alpha for the rank, unless a file says more than ours
        with pytest.raises(BadInput, match=f"--resume {folder}: is not of this policy"):
            tiny.policy.load(folder)
        pipe.load_lora_weights(export)
        assert len(load_file(next(export.iterdir()))) == 2 * (2 * 12 + 2 * 5)
        assert all("lora" in name for name in load_file(next(folder.glob("*.safetensors"))))
    else:
        pipe.transformer = FluxTransformer2DModel.from_pretrained(export / "transformer")
    with torch.no_grad():
        before = policy.predict(*inputs)
        assert torch.equal(before, tiny.policy.predict(*inputs))  # adapters begin at 0
        policy.load(folder)
        trained = policy.predict(*inputs)
        loaded = grpo_flux.velocity(pipe.transformer, *inputs, **keywords)
    assert torch.allclose(loaded, trained, atol=1e-5) and (trained - before).abs().max() > 1e-3

# -------------------------------------------------------------------------------------------- NPU

# A device that torch really calls npu, without hardware: its tensors are host memory, and every
# operator runs on the CPU. Like an NPU it refuses float64 and tensors of the CPU among its own; its
# gelu and autocast lists are torch_npu's. It says nothing of NPU kernels, each process has only
# npu:0, and keeps it for life.
LOW = "conv2d linear matmul mm bmm addmm baddbmm scaled_dot_product_attention"  # in autocast
FP32 = "layer_norm group_norm softmax norm pow"  # rms_norm, gelu: neither
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
        if isinstance(x, torch.device):
            return CPU
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_npu:
            empty = torch.empty(x.shape, dtype=x.dtype)  # an output may get another size
            return twins.setdefault(id(x), (x, recast(x, 1) if x.numel() else empty))[1]
        if x.dim():
            strays.append(x)
        return x

    def to_npu(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{op}: {x.dtype} on npu")
        same = [own for own, twin in twins.values() if twin is x]
        return same[0] if same else recast(x, 12)

    inputs, options = tree_map(to_cpu, (args, kwargs))
    if op is torch.ops.aten._copy_from.default:  # of .to and copy_, which may see both devices
        inputs[1].copy_(inputs[0])
        return args[1]
    if strays:
        raise RuntimeError(f"{op}: npu tensors meet a tensor {tuple(strays[0].shape)} of the cpu")
    if "gelu" in op.name():
        options["approximate"] = "tanh"
    result = op(*inputs, **options)
    if op.namespace == "c10d":  # gloo carries it, in the group that has gloo for the cpu
        work = result[-1] if isinstance(result, tuple) else result
        dist.Work.unbox(work).wait()  # torch finds it by storage, and views here have their own
    for own, twin in twins.values():
        if twin.shape != own.shape:
            own.data = recast(twin, 12)
    return tree_map(to_npu, result)

def autocast(op, *args, **kwargs):
    """What is in neither list computes in the dtype that it is given."""
    lists = dict.fromkeys(LOW.split(), torch.get_autocast_dtype("npu"))
    lists |= dict.fromkeys(FP32.split(), torch.float32)
    dtype = lists.get(op.overloadpacket.__name__)

    def cast(x):
        return x.to(dtype) if dtype and torch.is_tensor(x) and x.is_floating_point() else x

    with torch.autocast("npu", enabled=False):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))

def install_npu():
    npu = mock.MagicMock(  # what torch.cuda has, npu has
        spec=torch.cuda, conv=mock.Mock(), matmul=mock.Mock(), _is_in_bad_fork=lambda: False,
        current_device=lambda: 0, device_count=lambda: 8,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16])
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    torch.Tensor.pin_memory = lambda x: x  # all of its memory is the host's
    torch.Tensor.record_stream = lambda x, stream: None
    dist.Backend.register_backend(  # what torch asks it for, run_on_cpu does
        "hccl", lambda o, _: dist.ProcessGroupGloo(o.store, o.group_rank, o.group_size, o.timeout),
        extended_api=True, devices=["npu"])
    every, aten, c10d = libraries = [torch.library.Library(*names) for names in (
        ("_", "IMPL"), ("aten", "IMPL", "PrivateUse1"), ("c10d", "IMPL", "PrivateUse1"))]
    every.fallback(run_on_cpu, "PrivateUse1")
    every.fallback(autocast, "AutocastPrivateUse1")
    aten.impl("convolution_overrideable", partial(run_on_cpu, torch.ops.aten.convolution.default))
    for name in COLLECTIVES.split():
        c10d.impl(name, partial(run_on_cpu, getattr(torch.ops.c10d, name).default))
    resize = torch.UntypedStorage.resize_  # FSDP frees memory with it; here it stays
    torch.UntypedStorage.resize_ = lambda s, n: s if s.device.type == "npu" else resize(s, n)
    return libraries  # they take their operators along when they go

def with_npu(name, *argv, cwd, launcher=()):
    """Run a function of this file in processes of their own that have the npu."""
    return succeed(shell(*launcher, __file__, "--npu", name, *argv, cwd=cwd,
                         CUDA_VISIBLE_DEVICES=""))  # torch_npu refuses to start beside a GPU

def fenced(language):
    """README's blocks in a language, a command on one line."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)
    return [re.sub(r" *\\\n *", " ", block) for block in blocks]

def first_run():
    """README's list for the first run on an NPU: (program, its arguments, what it prints)."""
    [block] = [block for block in fenced("bash") if "small=" in block]
    assert f"tiny-{grpo_flux.TINY_VERSION}/hps" in block
    models = Path(grpo_flux.tiny_models(settings(), 0)["hps"]).parent
    for name, value in [*re.findall(r'(\w+)="(.*?)"', block), ("tiny", str(models))]:
        block = block.replace(f"${name}", value)
    return re.findall(r"(?m)^(python|torchrun) (.*?)  # .*?(\w+ OK|\S+)$", block)

def run_checklist():
    """Run all but torchrun's command in this process."""
    for program, arguments, words in first_run():
        if program == "python":
            script, *argv = arguments.split()
            with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
                sys.modules[script.removesuffix(".py")].main(argv)
            assert words in printed.getvalue(), arguments

def run_alone():
    grpo_flux.main(sys.argv[1:])

@job
def checklist(folder):
    [argv] = [words.split()[3:] for program, words, _ in first_run() if program == "torchrun"]
    with_npu("run_alone", *argv, cwd=folder, launcher=TORCHRUN)
    shutil.copytree(folder / "runs/two", folder / "two")  # before a later command goes on with it
    with_npu("run_checklist", cwd=folder)
    return folder

def test_npu_passes_the_first_run_checklist(checklist):
    """A command of README's list that does not work, or a device that fails one of its checks or
    does not what a CPU does: a CPU tensor, float64, a backend by name, gradients of one rank."""
    for name in ("npu", "lora"):  # in bf16
        lines = read_metrics(checklist / "runs" / name)
        assert [line["first_ratio_dev"] for line in lines] == [0, 0]
    (cpu, a), (npu, b) = results(checklist / "runs/cpu"), results(checklist / "two")
    for one, two in zip(cpu, npu, strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-4)  # gelu is tanh's there
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
        assert two["first_ratio_dev"] == 0
    difference = [(u - v).abs().mean() for u, v in zip(a.parameters(), b.parameters())]
    assert max(difference) < 4e-5  # two steps of AdamW move weights by 4e-4

# what a port gets wrong: code | another in its place | words of the error. The first one is no
# fault. The last one is the
# float64 of diffusers' rotary embedding, which it leaves only where it knows the device.
ROTARY = ("from diffusers.models.transformers import transformer_flux as f; "
          "f.maybe_adjust_dtype_for_device")
FAULTS = table(f"""
    import reward | import reward | None
    torch.get_device_module(device).set_device | torch.cuda.set_device | cuda
    send(x, run.device) | x | of the cpu
    dtype=x.dtype, device=x.device) | dtype=torch.float64, device=x.device) | float64
    numbers.astype(np.float32) | numbers | float64
    send(torch.stack(draws), x.device) | torch.stack(draws) | npu:0 and cpu
    torch.stack(draws), x | torch.randn(9, generator=torch.Generator(x.device)), x | Generator
    send(rows, self.device) | rows | of the cpu
    send(advantages, device) | advantages | indexed tensor
    self.tokenizer(unique).to(self.device) | self.tokenizer(unique) | of the cpu
    bf16 = cfg.dtype == "bf16" | bf16 = False | computes in fp32
    torch.autocast(self.device.type | torch.autocast('cuda' | computes in fp32
    import reward | import reward; {ROTARY} = lambda dtype, _: dtype | float64
""")

def run_with_faults():
    """A short run in bf16 of a copy of the code with each fault; error.txt says how it ended."""
    def refuse_fp32(layer, _, y):
        if isinstance(layer, torch.nn.Linear) and y.is_npu and y.dtype == torch.float32:
            raise TypeError(f"{layer} computes in fp32")

    torch.nn.modules.module.register_module_forward_hook(refuse_fp32)
    flags = ("--device npu --steps 1 --sampling_steps 3 --num_prompts 1 --num_generations 4 "
             "--micro_batch 2 --batch_size 4 --eval_images 3 --out").split()
    for i, (old, new, _) in enumerate(FAULTS):
        folder, ended = Path(str(i)).resolve(), None
        for name in ("reward.py", "grpo_flux.py"):
            write(folder / name, (HERE / name).read_text().replace(old, new))
            sys.modules.pop(name[:-3], None)
        sys.path.insert(0, str(folder))
        try:
            importlib.import_module("grpo_flux").main([*flags, str(folder / "run")])
        except Exception as error:
            ended = error
        write(folder / "ended", repr(ended))

@job
def npu_faults(folder):
    with_npu("run_with_faults", cwd=folder)
    return folder

@pytest.mark.parametrize("i", range(len(FAULTS)))
def test_npu_shows_what_a_port_gets_wrong(npu_faults, i):
    """A stand-in that is blind to what it stands for."""
    assert FAULTS[i][2].lower() in (npu_faults / str(i) / "ended").read_text().lower()

class Operators(TorchDispatchMode):
    """Counts what makes tensors: {(name of an operator, device, dtype): times}."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        for x in filter(torch.is_tensor, tree_leaves(result)):
            self.made[op.overloadpacket.__name__, x.device.type, x.dtype] += 1
        return result

def run_at_real_size():
    """A rollout and an update of FLUX.1-dev at 720x720."""
    seen = Operators()
    count_at_real_size((0, 0.0, 1, 0, 1), "npu", seen)
    assert not {dtype for *_, dtype in seen.made} & {torch.float64, torch.complex128}
    matmuls = {made[1:] for made in seen.made if made[0] in ("mm", "addmm")}
    assert matmuls == {("npu", torch.bfloat16)}
    on_cpu = {name for name, device, _ in seen.made if device == "cpu"}
    assert on_cpu <= set(  # draws, positions and which steps are trained
        "arange expand clone view transpose pixel_unshuffle _unsafe_view _to_copy zeros zeros_like "
        "stack slice lift_fresh ones add".split()), on_cpu

def test_npu_at_real_size(tmp_path):
    """float64, a tensor on the CPU, a matmul in fp32 that only a large or deep FLUX would have."""
    with_npu("run_at_real_size", cwd=tmp_path)

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_share_of_checkpointed_blocks(tiny, tmp_path, lora_rank):
    """A share that is ignored, or that changes the first ratio or a bit of the gradients."""
    gradients = defaultdict(list)
    for share, calls in ((1, 4 * 4), (0.5, 2 * 4), (0, 0)):  # blocks times backwards
        run = load_run(tmp_path, gradient_checkpointing=share, lora_rank=lora_rank, batch_size=2,
                       num_generations=4, sampling_steps=3)
        run.policy.optimizer.register_step_pre_hook(lambda *_: gradients[share].extend(
            p.grad.clone() for p in run.policy.parameters.values()))
        with mock.patch.object(grpo_flux, "checkpoint", wraps=grpo_flux.checkpoint) as counted:
            _, _, stats = grpo_flux.train_step(0, run)
        assert stats["updates"] == 2 and stats["first_ratio_dev"] == 0
        assert all(map(torch.equal, gradients[share], gradients[1]))
        assert counted.call_count == calls
    assert any(g.any() for g in gradients[1])

def test_all_flop_are_counted():
    """Attention that is left out, or a backward that counts as a forward."""
    linear = Counter()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda layer, _, y: linear.update(
        flop=2 * y.numel() * layer.in_features if isinstance(layer, torch.nn.Linear) else 0))
    with hook:
        forward, backward = count_flop(
            real_size(1, 0, thin=True, lora_rank=0), num_layers=2, num_single_layers=2, **THIN)
    attention = 4 * (16 + 16) ** 2 * 32 * 4  # 4 S² D of each layer
    assert forward == linear["flop"] + attention and 1.9 < backward / forward <= 2.1

def test_adapters_cost_two_kernels():
    """A cast or a sum that comes with every adapted layer: launches bound a small batch."""
    layer, seen = grpo_flux.LoraLinear(torch.nn.Linear(8, 6), 4, 8.0), []
    for layer.enabled in (False, True):
        with torch.no_grad(), Operators() as operators:
            layer(torch.randn(2, 3, 8))
        seen.append(operators.made)
    more = sorted(name for name, *_ in (seen[1] - seen[0]).elements())
    assert more == ["addmm", "mm", "permute", "t"]  # the last two are views

def test_real_size_is_measured(capsys):
    """A benchmark of an accelerator that ends at the first setting that needs too much memory, or
    that nobody has run since the code changed."""
    small = dict(thin=True, settings=[((1, 0), False), ((2, 0.5), False)], num_layers=2,
                 num_single_layers=2)
    measure_at_real_size(CPU, **small)
    with mock.patch(f"{__name__}.one_step", side_effect=torch.OutOfMemoryError("no GiB")):
        measure_at_real_size(CPU, **small)
    measure_at_real_size(CPU, budget=-1, **small)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] + row[7:] for row in rows[3:5]] == [
        ["1", "0", "False", "nan", "0", "0", "0"], ["2", "0.5", "False", "nan", "0", "0", "0"]]
    assert [row[3] for row in rows[8:10]] == ["OutOfMemoryError:"] * 2
    assert rows[-1][:4] == ["2", "settings", "left", "out"]

# ------------------------------------------------------------------------------------------ README

def test_readme_names_what_exists():
    """A flag, a picture or a chapter that was renamed."""
    flags = {*(f.name for f in fields(grpo_flux.Config)), *reward.FLAGS,
             *("nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts shutdown_timeout "
               "signals-to-handle size kill restarts help extra-index-url local-dir exclude "
               "no-init_same_noise").split()}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)) <= flags
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
                for line in re.findall(r"(?m)^#+ (.*)", README)}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings
    assert all((HERE / name).is_file() for name in re.findall(r'src="(.*?)"', README))

def test_readme_commands_are_those_of_ci():
    """A first command that nobody has run since it was written."""
    commands = re.findall("(?m)^[^#\n].*", fenced("bash")[0])
    ran = (HERE / ".ci" / "run").read_text().splitlines()
    assert len(commands) == 2 and ran[-2:] == commands

def test_the_algorithm_can_be_copied():
    """A function of the algorithm that needs the run, its tape or the other processes."""
    for name in ("sigma_schedule sde_mean_std flux_step gaussian_kl group_advantages grpo_loss "
                 "plan_step rollout denoise update optimizer_step summarize").split():
        used = {*getattr(grpo_flux, name).__code__.co_names}
        assert not used & {"dist", "gather", "on_draw", "reward", "require", "Run", "Tape"}, name

def test_readme_python_runs(tiny, record, tmp_path, monkeypatch):
    """An export, a reward, a record of saved files or a sampler that the code has left behind."""
    monkeypatch.chdir(tmp_path)
    grpo_flux.main([*SHORT, *LORA, "--steps", "1", "--out", "runs/lora"])
    for name in ("on_cuda", "on_npu"):  # two runs to compare
        shutil.copytree("runs/lora", f"runs/{name}")
    prompts = json.loads((record / "config.json").read_text())["step_prompts"]
    write(Path("saves/prompts.json"), json.dumps(prompts))
    for step in (1, 2):  # draws as DanceGRPO's code numbers them, and results
        tensors = load_file(record / f"step_0000{step}_rank_0.safetensors")
        saves = {f"input_latents_{step}_0": tensors[f"initial_noise_{step}_0_0"][None]}
        saves[f"perms_{step}_0"] = torch.stack(
            [tensors[f"train_steps_{step}_0_{i}"] for i in range(12)])
        for i, t in itertools.product(range(12), range(3)):
            number = ((step - 1) * 12 + i) * 4 + t
            saves[f"coff_{number}_0"] = tensors[f"noise_{step}_0_{i}_{t}"][None]
        saves |= {f"{name}_{step}_0": x for name, x in tensors.items() if "." in name}
        for name, x in saves.items():
            torch.save(x, f"saves/{name}.pt")
    small = r"""black-forest-labs/FLUX\.1-dev -> MODEL
"cuda" -> "cpu"
"bf16" -> "fp32"
\b720\b -> 32
num_inference_steps=\d+ -> num_inference_steps=2
45 \* 45, 64 -> 16, 16
\b90\b -> 8
sigma_schedule\(16 -> sigma_schedule(2
T, steps, world = 16, 3, 8 -> T, steps, world = 4, 2, 1
\bnum_prompts=8\b -> num_prompts=1
\bbatch_size=32\b -> batch_size=12
\bmicro_batch=\d+ -> micro_batch=12"""
    world, blocks = {}, fenced("python")
    for line in small.replace("MODEL", tiny.cfg.model).split("\n"):
        old, new = line.split(" -> ")
        assert any(re.search(old, block) for block in blocks), f"README's Python lacks {old}"
        blocks = [re.sub(old, new, block) for block in blocks]
    for block in blocks:
        exec(compile(block, "README.md", "exec"), world)
    assert Path("cat.png").is_file()
    [Path("my_reward.py").write_text(block) for block in blocks if "my_reward.py" in block]
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
THIN = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))

def real_size(n, share, thin=False, lora_rank=64, **changes):
    """Config of a rollout of n samples on FLUX.1-dev, and of an update with their one batch."""
    if thin:
        changes |= dict(height=64, width=64, text_length=16)
    return grpo_flux.Config(
        dtype="bf16", lora_rank=lora_rank, num_prompts=1, num_generations=max(n, 2),
        batch_size=max(n, 2), micro_batch=n, gradient_checkpointing=share, **changes)

def random_vae(device, thin):
    """FLUX.1's VAE with random weights in bf16."""
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=(32,) * 4 if thin else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611, shift_factor=0.1159, layers_per_block=2, use_quant_conv=False,
        use_post_quant_conv=False)
    return vae.to(device, torch.bfloat16)

def random_policy(cfg, device, **shape):
    """A Policy of FLUX.1-dev, or another shape of it, whose weights have no values yet."""
    diffusers.logging.set_verbosity_error()

    def load(cfg, device, trained=True):
        with unset_fake_temporarily(), torch.device("meta"):
            transformer = FluxTransformer2DModel(guidance_embeds=True, **shape)
            transformer.to(torch.bfloat16 if cfg.lora_rank else torch.float32)
            grpo_flux.prepare_policy(transformer, cfg)
            if dist.is_initialized():
                grpo_flux.shard(transformer, CPU, torch.bfloat16, keep_gathered=trained)
        return transformer.to_empty(device=device)

    with mock.patch.object(grpo_flux, "load_transformer", load):
        return grpo_flux.Policy(cfg, (cfg.height // 8, cfg.width // 8), device)

def random_inputs(policy, cfg, device):
    """Keys (step, prompt_index, sample) of a micro-batch, noise (B, L, C), and text of random
    embeddings."""
    keys, config = [(0, 0, i) for i in range(cfg.micro_batch)], policy.transformer.config
    x = grpo_flux.draw_latents(keys, (16, cfg.height // 8, cfg.width // 8), cfg).to(device)
    sizes = (cfg.text_length, config.joint_attention_dim), (config.pooled_projection_dim,)
    text = [torch.randn(len(x), *size, device=device).bfloat16() for size in sizes]
    return keys, x, text

def one_step(policy, cfg, device):
    """Seconds of a rollout and of an update of one micro-batch, its images as latents, and the
    update's statistics."""
    keys, x, text = random_inputs(policy, cfg, device)
    rolled, trajectory = clock(device, rollout, policy.predict, x, text, keys, cfg, cfg.eta)
    grpo_flux.reshard(policy.transformer)  # as an optimizer step would: the update gathers again
    updated, stats = clock(
        device, grpo_flux.update, policy.predict, policy.optimizer, trajectory, text,
        torch.ones(len(x)), keys, cfg, policy.reference, useful=[True],
        first_ratio_limit=math.inf)
    return rolled, updated, trajectory.x0, stats

def count_flop(cfg, **shape):
    """FLOP of a forward of one sample, and of its backward, counted on meta tensors."""
    policy = random_policy(cfg, torch.device("meta"), **shape)
    _, x, text = random_inputs(policy, cfg, "meta")
    with FlopCounterMode(display=False) as forward:
        v = policy.predict(x, x.new_ones(1, 1, 1), text)
    with FlopCounterMode(display=False) as backward:
        v.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()

# (micro-batch, share of checkpointed blocks), compiled or not: the most telling first
SETTINGS = [*itertools.product(
    [(1, 0), (4, 1), (2, 0.5), (1, 1), (2, 0), (4, 0.5), (4, 0)], (False, True))]

def measure_at_real_size(device, budget=math.inf, thin=False, settings=SETTINGS, **shape):
    """Print what samples of FLUX.1-dev, with random weights and LoRA, cost in each setting."""
    begin, real = time.monotonic(), grpo_flux.Config()
    T, K = real.sampling_steps, grpo_flux.num_train_steps(real)
    module, graphs = torch.get_device_module(device), torch._dynamo.utils.counters["stats"]
    if thin:
        shape |= THIN
    forward, backward = count_flop(real_size(1, 0, thin), **shape)
    flop = (T + K) * forward + K * backward
    print(f"{'thin ' * thin}FLUX.1-dev in bf16, LoRA 64, random weights; "
          f"{reward.describe_device(device)}\nseconds and {flop / 1e12:.4g} TFLOP a sample, of {T} "
          f"denoising steps, {K} trained\nmicro\tshare\tcompile\trollout\tdecode\tupdate\tTFLOP/s\t"
          "GiB\tratio-1\tskipped\trecompiled")
    vae = random_vae(device, thin)
    for i, ((n, share), compiled) in enumerate(settings):
        if time.monotonic() - begin > budget:
            print(f"{len(settings) - i} settings left out after {budget:.0f} s")
            break
        print(n, share, compiled, sep="\t", end="\t", flush=True)
        cfg = real_size(n, share, thin, sampling_steps=4, compile=compiled)
        torch._dynamo.reset()
        gc.collect()  # hooks and parameters refer to each other
        if reward.is_accelerator(device):
            module.empty_cache()
            module.reset_peak_memory_stats()
        try:
            policy = random_policy(cfg, device, **shape)
            for p in (*policy.transformer.parameters(), *policy.parameters.values()):
                torch.nn.init.normal_(p, std=0.02)
            one_step(policy, cfg, device)  # warms up, and compiles
            before = graphs["unique_graphs"]
            rolled, updated, x0, stats = one_step(policy, cfg, device)
            grid = cfg.height // 8, cfg.width // 8
            decode(vae, x0, grid, n)  # warms up
            decoded, _ = clock(device, decode, vae, x0, grid, n)
        except Exception as error:  # out of memory, say; others may need less
            print(f"{type(error).__name__}: {str(error)[:60]!r}", flush=True)
            continue
        rolled *= T / cfg.sampling_steps / n
        updated *= K / grpo_flux.num_train_steps(cfg) / n
        peak = getattr(module, "max_memory_allocated", lambda: math.nan)()
        row = (rolled, decoded / n, updated, flop / (rolled + updated) / 1e12, peak / GIB,
               stats["first_ratio_dev"], stats["skipped"], graphs["unique_graphs"] - before)
        print(*(f"{x:.4g}" for x in row), sep="\t", flush=True)

def count_at_real_size(setting, device="cpu", watch=nullcontext()):
    """Bytes at most on one of some ranks, by device, in a rollout of two denoising steps and an
    update of one backward: counted on tensors without memory."""
    lora_rank, kl_beta, world, share, n = setting
    torch.set_num_threads(1)
    gc.freeze()  # else the collector walks through all that was imported, again and again
    cfg = real_size(n, share, lora_rank=lora_rank, kl_beta=kl_beta, sampling_steps=2)
    # what the host reads: 0.0 for loss, norm and ratio; AdamW's step 1; batch and window 0
    FakeTensor.tolist = lambda x: [0.0 if x.is_floating_point() else 0] * x.numel()
    FakeTensor.item = lambda x: 1.0 if x.is_floating_point() else 0
    FakeTensor.pin_memory = lambda x: x  # torch has no such operator for fake tensors
    grpo_flux.gather = lambda item: [item] * world
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    memory = MemTracker()
    memory._mod_tracker = mock.MagicMock(is_bw=False)  # it refuses modules that are called again
    with FakeTensorMode(allow_non_fake_inputs=True), watch:  # refuses devices that mix
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device="npu") by way of the CPU
        with memory:
            policy = random_policy(cfg, torch.device(device))
            for p in policy.parameters.values():  # as after an earlier backward
                p.grad = torch.zeros_like(p)
            torch.nn.utils.clip_grad_norm_(policy.parameters.values(), 1.0)
            policy.optimizer.step()  # DTensor infers shapes, once
        with memory:  # the peak anew
            *_, stats = one_step(policy, cfg, torch.device(device))
    assert sum(p.numel() for p in policy.transformer.parameters()) >= 11_901_408_320
    assert stats["updates"] == 1
    return {str(name): peak["Total"] for name, peak in memory.get_tracker_snapshot("peak").items()}

def benchmark_at_real_size():
    """Print the peak memory of FLUX.1-dev, from a process for each setting."""
    print(f"FLUX.1-dev at 720x720 in bf16, counted on torch {torch.__version__}\n"
          "LoRA\tKL\tranks\tshare\tmicro\tGiB of a rank", flush=True)
    kinds = (64, 0.0, 1), (0, 0.0, 8), (0, 0.1, 8), (64, 0.0, 8)
    settings = [(*kind, share, n) for share in (1, 0, 0.5) for kind in kinds for n in (1, 2, 4)]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for setting, peak in zip(settings, pool.imap(count_at_real_size, settings)):
            print(*setting, f"{peak['cpu'] / GIB:.1f}", sep="\t", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmarks; see the top of this file.")
    parser.add_argument("--size", choices=["tiny", "flux-dev"], default="tiny")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing later")
    parser.add_argument("--thin", action="store_true", help="measure 57 blocks of width 32")
    parser.add_argument("--doomed", type=int, help="start a run again and again; seed of kills")
    parser.add_argument("--npu", nargs=argparse.REMAINDER, help="a function, and its flags")
    args = parser.parse_args()
    if args.npu:
        libraries = install_npu()
        sys.argv[1:] = args.npu[1:]
        globals()[args.npu[0]]()
    elif args.doomed is not None:
        start_again(args.doomed)
    elif args.size == "tiny":
        benchmark()
    elif args.thin or reward.is_accelerator(reward.select_device()):
        measure_at_real_size(reward.select_device(), args.seconds, args.thin)
    else:
        benchmark_at_real_size()
