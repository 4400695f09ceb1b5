"""GRPO for FLUX in one file: teach a text-to-image model what people prefer.

DanceGRPO (Xue et al., arXiv 2505.07818) in six stages, as numbered in train_step:

    1. plan: G images for each of P prompts; a group shares a prompt    plan_step
    2. draw the noise that each image starts from                       draw_latents
    3. turn it into an image by T small SDE steps                       rollout, flux_step
    4. decode the images and score them with a reward model             decode, reward.score
    5. advantage A: standard deviations above the mean of the group     group_advantages
    6. make denoising steps with A > 0 likelier, the others less: PPO   update, grpo_loss

train repeats this with the next prompts. What differs from DanceGRPO's code (README says how
much each difference matters):

    - The transformer is given sigma as its timestep, not int(1000 sigma) / 1000.
    - Rollout and update use one batch size, so the first ratio is exactly 1.
    - Every random draw has a key (seed, purpose, step, prompt_index, sample, t): the same
      noise on every device, at every batch size and number of processes.
    - bf16 is for the models' forward and backward; SDE steps, images and scores stay fp32.
    - The VAE decodes without tiles; with FLUX.1's, tiles would differ above 1024 pixels only.
    - Equal rewards of a group give advantages of 0; an optimizer step without any other
      advantage is left out.

    python grpo_flux.py  # a tiny FLUX, on a laptop
    torchrun --nproc_per_node 8 grpo_flux.py --model FLUX.1-dev --prompts prompts.txt

Letters in shapes: B samples of this process, b of a micro-batch; P prompts, G samples of a
group, S samples of an optimizer step; T denoising steps, W of them SDE steps, K of those
trained; L latent tokens of C channels, N text tokens of E channels; unpacked latents are
(c, h, w). Steps count from 0 in code and in keys, from 1 wherever a person reads them.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torchvision.utils import save_image
from tqdm import tqdm

import reward
from reward import BadInput, atomic_write, bad_input_if_fails, printable, remove, require

# ----------------------------------------------------------------------------------- draws

# The purpose of a draw, the second number of its key.
LATENTS, NOISE, TRAIN_STEPS, PROMPTS, HELD_OUT, WINDOW = range(6)

on_draw = None  # --record and --replay put a function (draw, key) -> draw here

def randn(shape, *key):
    """Draw standard normal fp32 numbers of this shape; equal keys give equal numbers anywhere.

    key: integers of which the first two are the seed and the purpose, such as (seed, NOISE,
    step, prompt_index, sample, t). Drawn by numpy on the CPU, the same for every device.
    """
    numbers = np.random.default_rng(key).standard_normal(shape)
    draw = torch.from_numpy(numbers.astype(np.float32))
    return on_draw(draw, key) if on_draw else draw

def randperm(n, *key):
    """Draw a random order of range(n), an int64 tensor (n,); key as in randn."""
    order = np.random.default_rng(key).permutation(n)
    draw = torch.from_numpy(order)
    return on_draw(draw, key) if on_draw else draw

def send(tensor, device):
    """Copy a CPU tensor to a device, through pinned memory, without waiting for the copy."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

# -------------------------------------------------------------------------------- flow SDE

def sigma_schedule(sampling_steps: int, shift: float) -> list[float]:
    """Return T + 1 noise levels σ of T denoising steps, from 1.0 (noise) down to 0.0 (image).

    u = linspace(1, 0, T + 1);  σ = s u / (1 + (s - 1) u)  (Esser et al., arXiv 2403.03206)
    """
    us = [1 - t / sampling_steps for t in range(sampling_steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in us]

def flux_step(v, x, sigma, sigma_next, eta, sde="dance", noise=None, x_next=None):
    """Take one denoising step σ -> σ', or score one that was taken: (x_next, x0, logp).

    A rectified flow interpolates image and noise, x = (1 - σ) x0 + σ x1, and the model
    predicts v = x1 - x0. The ODE dx = v dσ turns noise into an image deterministically, so
    its steps have no probability to raise. Those of an SDE have one: x_next ~ N(mean, std²),
    see sde_mean_std.

    v, x, noise, x_next: (B, L, C) fp32. sigma, sigma_next: floats or tensors (B, 1, 1). Give
    exactly one of noise, to take a step, and x_next, to score one. eta = 0 takes the ODE's
    step and needs neither; the last step, to σ' = 0, must be one. Raises ValueError for another
    sde than dance, flow or cps.

    Returns x_next (B, L, C); x0 (B, L, C), the image that v points to; and logp (B,), the mean
    over L and C of log N(x_next; mean, std²), nan if eta = 0. With the sum over all L C numbers
    the ratio exp(logp - logp_old) would be 0 or infinite after any update. The mean gives the
    (L C)-th root of this ratio, which is near 1: so the clip range is 1e-4 and not 0.2.
    """
    if sde not in ("dance", "flow", "cps"):
        raise ValueError(f"sde {sde!r} must be dance, flow or cps")
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    sigma_next = torch.as_tensor(sigma_next, dtype=x.dtype, device=x.device)
    x0 = x - sigma * v
    if eta == 0:
        x_next = x + v * (sigma_next - sigma)
        no_density = x.new_full((len(x),), math.nan)
        return x_next, x0, no_density

    mean, std = sde_mean_std(v, x, sigma, sigma_next, eta, sde)
    if x_next is None:
        x_next = mean + std * noise  # stays fp32: rounding it to bf16 would change logp

    # The step taken is data, the policy's action: the gradient runs through mean alone.
    deviation = (x_next.detach() - mean) / std
    constant = 0.5 * math.log(2 * math.pi)
    logp = -0.5 * deviation**2 - std.log() - constant
    return x_next, x0, logp.mean(dim=(1, 2))

def sde_mean_std(v, x, sigma, sigma_next, eta, sde="dance"):
    """Return the mean (B, L, C) and std of the Gaussian from which an SDE step draws x_next.

    The SDE is the ODE dx = v dσ plus noise. Noise alone would widen the distribution of x; a
    drift along the score ∇ log p(x) undoes this, so that for small steps x is distributed as
    under the ODE. x given x0 is N((1 - σ) x0, σ²); by Tweedie's formula the score is that of
    this Gaussian, with the mean of x0 given x, which is x - σ v, as x0. With dt = σ' - σ < 0:

      dance  score = -(x - (1 - σ) x0) / σ²;  mean = x + v dt - ½ η² score dt;
             std = η √(-dt) (DanceGRPO, arXiv 2505.07818)
      flow   the same with η √(σ / (1 - σ)) for η; at σ = 1, where that divides by 0, 1 - σ'
             takes the place of 1 - σ (Flow-GRPO, arXiv 2505.05470)
      cps    std = σ' sin(η π/2);  mean = (1 - σ') x0 + √(σ'² - std²) x1; x keeps
             the noise of σ', but images vary less than with dance (Flow-CPS, arXiv 2509.05952)

    sigma, sigma_next: tensors that broadcast to (B, 1, 1), as std does. eta above 0.
    """
    dt = sigma_next - sigma
    x0 = x - sigma * v
    if sde == "cps":
        x1 = x + (1 - sigma) * v
        std = sigma_next * math.sin(eta * math.pi / 2)
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1
        return mean, std

    if sde == "flow":
        sigma_below_1 = torch.where(sigma < 1, sigma, sigma_next)
        eta = eta * (sigma / (1 - sigma_below_1)).sqrt()
    score = -(x - (1 - sigma) * x0) / sigma**2
    mean = x + v * dt - 0.5 * eta**2 * score * dt
    std = eta * (-dt).sqrt()
    return mean, std

def gaussian_kl(v, v_reference, x, sigma, sigma_next, eta, sde="dance"):
    """Return the KL divergence (B,) between the SDE steps of two models from the same x.

    Both are Gaussians with the same std, so each number adds (mean - mean_reference)² /
    (2 std²). As in logp, this is the mean over L and C. sigma, sigma_next: tensors (B, 1, 1);
    the other arguments are those of flux_step.
    """
    mean, std = sde_mean_std(v, x, sigma, sigma_next, eta, sde)
    mean_reference, _ = sde_mean_std(v_reference, x, sigma, sigma_next, eta, sde)
    kl = (mean - mean_reference) ** 2 / (2 * std**2)
    return kl.mean(dim=(1, 2))

# ------------------------------------------------------------------------------------ GRPO

def group_advantages(rewards, num_generations, eps=1e-8):
    """Return the advantage of each reward within its group: (r - mean) / (std + eps).

    rewards (P G,), prompt after prompt. Unbiased std, as in DanceGRPO. A group of equal rewards
    gets exactly 0: the formula alone would divide the rounding error of its mean by eps.
    """
    r = rewards.view(-1, num_generations)  # (P, G)
    mean = r.mean(1, keepdim=True)
    std = r.std(1, keepdim=True)
    advantages = (r - mean) / (std + eps)
    all_equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0).flatten()

def grpo_loss(logp, logp_old, advantages, clip_range, adv_clip_max):
    """Return PPO's clipped loss (Schulman et al., arXiv 1707.06347, section 3) and statistics.

    The loss is the mean of max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)), ρ = exp(logp - logp_old), with
    ε = clip_range and A = advantages limited to ± adv_clip_max. logp (of the current policy,
    with gradient), logp_old (of the rollout), advantages: (b,). Statistics: the mean ratio,
    the largest |ρ - 1|, and the share of samples whose gradient the clip has made 0.
    """
    A = advantages.clamp(-adv_clip_max, adv_clip_max)
    ratio = (logp - logp_old).exp()
    unclipped = -A * ratio
    clipped = -A * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped).mean()

    ratio = ratio.detach()
    stats = {
        "ratio": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        # Where the clipped term is larger, it is a constant: the sample has no gradient.
        "clip_frac": (clipped > unclipped).float().mean(),
    }
    return loss, stats

# --------------------------------------------------------------------------------- rollout

def plan_step(step, cfg, rank=0, world=1):
    """Return the keys (step, prompt_index, sample) of this process's samples, B = P G / world.

    The samples are in the order of training, S for each optimizer step: whole groups if S is a
    multiple of G, else S / P images of every prompt, as in DanceGRPO. Each process makes an
    equal part of each S, in one piece. For example, as prompt.sample, optimizer steps by |:

      P = 2, G = 4, S = 4: 0.0 0.1 0.2 0.3 | 1.0 1.1 1.2 1.3; rank 0 of two: 0.0 0.1 | 1.0 1.1
      P = 2, G = 3, S = 2: 0.0 1.0 | 0.1 1.1 | 0.2 1.2
    """
    P, G, S = cfg.num_prompts, cfg.num_generations, cfg.batch_size
    in_a_row = G if S % G == 0 else S // P  # consecutive images of one prompt
    order = []
    for start in range(0, G, in_a_row):
        for p in range(P):
            order += [(step, p, i) for i in range(start, start + in_a_row)]

    share = S // world
    mine = []
    for start in range(rank * share, P * G, S):  # its part of each optimizer step
        mine += order[start:start + share]
    return mine

def sde_steps(step, cfg):
    """Return the range of denoising steps that are SDE steps in a GRPO step.

    All but the last, or a window of W (MixGRPO, Li et al., arXiv 2507.21802), which moves by
    one every window_shift_every GRPO steps (0: it is drawn for each). The others are ODE steps.
    """
    T, W = cfg.sampling_steps, cfg.sde_window
    if W == 0:  # no window
        return range(T - 1)
    if cfg.window_shift_every:
        start = step // cfg.window_shift_every % (T - W)
    else:
        order = randperm(T - W, cfg.seed, WINDOW, step)
        start = int(order[0])  # each of T - W is equally likely
    return range(start, start + W)

def num_train_steps(cfg):
    """Return K, the number of its W SDE steps that a sample trains on.

    timestep_fraction 0 chooses: all W of a window, which is there to be trained, and all W
    below 8, as 0.6 of the 3 SDE steps of a 4-step model would leave 1; else DanceGRPO's 0.6.
    """
    W = cfg.sde_window or cfg.sampling_steps - 1
    fraction = cfg.timestep_fraction
    if fraction == 0:
        fraction = 1 if cfg.sde_window or W < 8 else 0.6
    return max(1, int(fraction * W + 1e-9))  # 1e-9: 0.29 * 100 is 28.999...

Trajectory = namedtuple("Trajectory", [
    "sigmas",  # (T + 1,)
    "x",  # (B, T, L, C), before each denoising step
    "x0",  # (B, L, C), the images, as latents
    "logp",  # (B, T - 1), nan outside of the window
])

@torch.no_grad()
def rollout(predict, x, text, keys, cfg, eta, window=None):
    """Turn noise x (B, L, C) into images; return a Trajectory.

    predict(x, sigma, text) is the velocity of a micro-batch; text: tensors, one row per
    sample. keys[i] = (step, prompt_index, sample) names the noise of sample i. SDE steps are
    taken inside the window (all but the last, if none is given), ODE steps outside of it;
    eta = 0 takes ODE steps alone and needs no keys. With cfg.init_same_noise the samples of a
    prompt must start from equal x. The last step is the ODE's to σ = 0: its x0 is the image.
    cfg has sampling_steps, shift, sde, seed, micro_batch and init_same_noise.
    """
    T = cfg.sampling_steps
    sigmas = send(torch.tensor(sigma_schedule(T, cfg.shift)), x.device)
    if eta == 0:
        window = range(0)
    elif window is None:
        window = range(T - 1)
    denoise_steps = partial(
        denoise, predict, sigmas=sigmas, window=window, cfg=cfg, eta=eta)

    shared_steps = window.start if cfg.init_same_noise else 0
    if shared_steps == 0:
        _, states, x0, logp = denoise_steps(x, text, keys, range(T))
        return Trajectory(sigmas, states, x0, logp[:, :-1])

    # Samples of a prompt share noise, hence the path up to the window: compute it once.
    prompt_of_row = [prompt_index for _, prompt_index, _ in keys]
    distinct = list(dict.fromkeys(prompt_of_row))
    first_rows = torch.tensor([prompt_of_row.index(p) for p in distinct])
    first_rows = send(first_rows, x.device)
    text_of_paths = [tensor[first_rows] for tensor in text]
    path = denoise_steps(x[first_rows], text_of_paths, None, range(shared_steps))

    # From the window on each sample goes its own way.
    path_of_row = torch.tensor([distinct.index(p) for p in prompt_of_row])
    path_of_row = send(path_of_row, x.device)
    x, before, _, logp_before = [tensor[path_of_row] for tensor in path]
    _, after, x0, logp_after = denoise_steps(x, text, keys, range(shared_steps, T))
    states = torch.cat([before, after], dim=1)
    logp = torch.cat([logp_before, logp_after], dim=1)
    return Trajectory(sigmas, states, x0, logp[:, :-1])

def denoise(predict, x, text, keys, steps, sigmas, window, cfg, eta):
    """Take some denoising steps from x (B, L, C), micro_batch samples per call; x stays fp32.

    Returns x after them, the x before each of them (B, len(steps), L, C), the last x0
    (B, L, C) and logp (B, len(steps)), which is nan for the steps outside of the window.
    """
    results = []
    for start in range(0, len(x), cfg.micro_batch):
        rows = slice(start, start + cfg.micro_batch)
        x_t = x[rows]
        text_part = [tensor[rows] for tensor in text]

        # Draw and copy the noise of all steps first, so that the device never waits for it.
        noise = {}
        for t in steps:
            if t in window:
                draws = [randn(x.shape[1:], cfg.seed, NOISE, *key, t) for key in keys[rows]]
                noise[t] = send(torch.stack(draws), x.device)

        states, logps = [], []
        for t in steps:
            # (b, 1, 1), as in update: other shapes may run other kernels, which round otherwise
            sigma = sigmas[t].expand(len(x_t), 1, 1)
            sigma_next = sigmas[t + 1].expand(len(x_t), 1, 1)
            v = predict(x_t, sigma, text_part)
            states.append(x_t)
            eta_t = eta if t in window else 0
            x_t, x0, logp = flux_step(
                v, x_t, sigma, sigma_next, eta_t, cfg.sde, noise.get(t))
            logps.append(logp)
        states = torch.stack(states, dim=1)
        logps = torch.stack(logps, dim=1)
        results.append((x_t, states, x0, logps))
    return [torch.cat(part) for part in zip(*results)]

# ---------------------------------------------------------------------------------- update

FIRST_RATIO_LIMIT = 1e-5  # of |ρ - 1| before the first optimizer step; correct code has 0

def update(predict, optimizer, trajectory, text, advantages, keys, cfg,
           reference=None, window=None, useful=None,
           first_ratio_limit=FIRST_RATIO_LIMIT, report=None):
    """Train on a rollout once, with one optimizer step per S samples; return statistics.

    advantages (B,), on the CPU. Each sample trains on its own random K of the SDE steps. In
    the first optimizer step the policy is still that of the rollout: a ratio other than 1
    raises FloatingPointError. cfg.micro_batch must divide this process's part of S, so that
    rollout and update call predict with the same batches, which then round alike.

    reference: predict of the initial policy, for kl_beta. window: as in rollout. useful: for
    each optimizer step, whether any process has an advantage other than 0; if none has, it is
    left out; needed with several processes. report: called with the statistics of each
    optimizer step. The host waits for the device once per optimizer step, at its end. Besides
    the rollout's, cfg has eta, num_prompts, num_generations, batch_size, timestep_fraction,
    sde_window, clip_range, adv_clip_max, max_grad_norm and kl_beta.
    """
    sigmas, states, _, logp_old = trajectory
    device = states.device
    K = num_train_steps(cfg)
    if window is None:
        window = range(cfg.sampling_steps - 1)

    # Which K of its SDE steps each sample trains on: the first ones of a random order.
    train_steps = []
    for key in keys:
        order = randperm(len(window), cfg.seed, TRAIN_STEPS, *key)
        train_steps.append(window.start + order[:K])
    train_steps = send(torch.stack(train_steps), device)  # (B, K)

    # The rows of each optimizer step, in the order of plan_step.
    num_updates = cfg.num_prompts * cfg.num_generations // cfg.batch_size
    batches = torch.arange(len(keys), device=device).view(num_updates, -1)
    if useful is None:
        nonzero = advantages.view(num_updates, -1) != 0
        useful = nonzero.any(dim=1).tolist()
    advantages = send(advantages, device)

    history = []
    for rows, is_useful in zip(batches, useful):
        if not is_useful:
            continue
        totals = {}  # they stay on the device until the optimizer step
        for name in ("loss", "ratio", "clip_frac", "kl", "ratio_max_dev"):
            totals[name] = torch.zeros((), device=device)

        transitions = len(rows) * K
        for part in rows.split(cfg.micro_batch):
            text_part = [tensor[part] for tensor in text]

            for k in range(K):
                # One transition x -> x_next of each sample, each at its own noise level.
                t = train_steps[part, k]  # (b,)
                x = states[part, t]
                x_next = states[part, t + 1]
                sigma = sigmas[t].view(-1, 1, 1)
                sigma_next = sigmas[t + 1].view(-1, 1, 1)

                # How probable does the policy find it now?
                v = predict(x, sigma, text_part)
                _, _, logp = flux_step(
                    v, x, sigma, sigma_next, cfg.eta, cfg.sde, x_next=x_next)
                loss, stats = grpo_loss(
                    logp, logp_old[part, t], advantages[part],
                    cfg.clip_range, cfg.adv_clip_max)
                if reference:
                    v_reference = reference(x, sigma, text_part)
                    kl = gaussian_kl(
                        v, v_reference, x, sigma, sigma_next, cfg.eta, cfg.sde).mean()
                    stats["kl"] = kl.detach()
                    loss = loss + cfg.kl_beta * kl

                # Gradients add up to this process's mean over transitions; FSDP averages them.
                (loss * len(part) / transitions).backward()
                stats["loss"] = loss.detach()
                largest = stats.pop("ratio_max_dev")
                totals["ratio_max_dev"] = torch.maximum(totals["ratio_max_dev"], largest)
                for name, value in stats.items():
                    totals[name] += value * len(part) / transitions

        is_first = not history  # the policy is still that of the rollout
        limit = first_ratio_limit if is_first else math.inf
        history.append(optimizer_step(optimizer, totals, cfg.max_grad_norm, limit))
        if report:
            report(history[-1])
    return summarize(history)

def optimizer_step(optimizer, totals, max_grad_norm, first_ratio_limit=math.inf):
    """Clip the gradient, step if its norm is finite, and return the statistics as floats."""
    parameters = optimizer.param_groups[0]["params"]  # there is one group
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if hasattr(norm, "full_tensor"):  # a DTensor under FSDP
        norm = norm.full_tensor()
    names = [*totals, "grad_norm"]
    values = torch.stack([*totals.values(), norm]).tolist()  # one transfer to the host
    stats = dict(zip(names, values))

    if stats["ratio_max_dev"] > first_ratio_limit:
        raise FloatingPointError(
            f"the first ratio is off by {stats['ratio_max_dev']:.1e}, though the policy is still "
            "that of the rollout: rollout and update compute different velocities. Likely "
            "causes: latents rounded to bf16, another dtype or batch size, dropout, kernels "
            "(try --deterministic)")
    if math.isfinite(stats["grad_norm"]):  # equal in all processes: all step, or none
        optimizer.step()
    optimizer.zero_grad()
    return stats

def summarize(history):
    """Return means over the optimizer steps taken, which are absent if there was none; the
    numbers of those taken and of those skipped, as their gradient was not finite; and, for
    metrics that end in _dev, the first and the largest |ρ - 1| of all."""
    taken = [stats for stats in history if math.isfinite(stats["grad_norm"])]
    summary = {}
    if taken:
        for name in ("loss", "ratio", "clip_frac", "kl", "grad_norm"):
            total = sum(stats[name] for stats in taken)
            summary[name] = total / len(taken)
    summary["updates"] = len(taken)
    summary["skipped"] = len(history) - len(taken)
    if history:
        deviations = [stats["ratio_max_dev"] for stats in history]
        summary["first_ratio_dev"] = deviations[0]
        summary["ratio_max_dev"] = max(deviations)
    return summary

# ----------------------------------------------------------------------------- a GRPO step

def train_step(step, run):
    """Take GRPO step number `step`, from 0. Return scores {reward: (P G,)} and advantages
    (P G,) of all processes, group after group, and the statistics of this process's update."""
    cfg, policy, tape = run.cfg, run.policy, run.tape
    G = cfg.num_generations
    tape.open(step)  # --record and --replay; without them the tape does nothing
    window = sde_steps(step, cfg)

    # 1. Plan which images this process makes.
    keys = plan_step(step, cfg, run.rank, run.world)
    prompts = [run.step_prompts[step][p] for _, p, _ in keys]
    text = run.text(prompts)
    tape.note("text", *text)

    # 2. Draw the noise that each image starts from.
    x = draw_latents(keys, run.shape, cfg)
    x = send(x, run.device)

    # 3. Turn it into images, and keep every denoising step.
    predict = tape.watch("velocity", policy.predict)
    trajectory = rollout(predict, x, text, keys, cfg, cfg.eta, window)
    tape.note("latents", trajectory.x, trajectory.x0)
    tape.note("logp", trajectory.logp[:, window.start:window.stop])

    # 4. Decode and score the images.
    images = decode(run.vae, trajectory.x0, run.shape[1:], cfg.micro_batch)
    images = tape.note("images", images)  # a replay continues with the recorded ones
    scores = reward.score(run.rewards, images, prompts, f"step {step + 1}")  # {name: (B,)}
    tape.note("reward", *scores.values())

    # 5. Compare each image with its group. It may lie in several processes: gather all scores,
    # and sort them by row = prompt_index * G + sample. Two ranks with rows [0 1 4 5] and
    # [2 3 6 7] need the order [0 1 4 5 2 3 6 7].
    rows = torch.tensor([p * G + i for _, p, i in keys])
    order = torch.cat(gather(rows)).argsort()
    for name, mine in scores.items():
        scores[name] = torch.cat(gather(mine))[order]  # (P G,)
    advantages = torch.zeros(len(order))
    for name, (weight, _) in run.rewards.items():
        advantages += weight * group_advantages(scores[name], G)
    tape.note("advantages", advantages[rows])

    # 6. Train. An optimizer step whose advantages are 0 in all processes is left out.
    training_order = [p * G + i for _, p, i in plan_step(step, cfg)]
    nonzero = advantages[training_order].view(-1, cfg.batch_size) != 0
    useful = nonzero.any(dim=1).tolist()
    predict = tape.watch("velocity_in_update", policy.predict)
    history = []  # the statistics of each optimizer step
    stats = update(
        predict, policy.optimizer, trajectory, text, advantages[rows], keys, cfg,
        policy.reference, window, useful, run.first_ratio_limit, history.append)
    tape.close(history)
    nothing_finite = history and stats["updates"] == 0
    if nothing_finite and not cfg.replay:
        raise FloatingPointError(explain_gradient(step, history, policy.steps_taken()))
    policy.update_ema(cfg.ema_decay)
    return scores, advantages, stats

# The algorithm ends here. What follows loads models, saves, records and plots.

# --------------------------------------------------------------------------- FLUX's format

def velocity(transformer, x, sigma, text, ids, guidance, bf16):
    """Return v (B, L, C) in fp32. This is the only call of the transformer; the algorithm
    knows it as predict(x, sigma, text).

    x (B, L, C) fp32; sigma (B, 1, 1); text: T5's embeddings (B, N, E) and CLIP's pooled one
    (B, E'); ids: image_ids (L, 3); guidance: for models that have that input. bf16: the
    weights that the transformer computes with are bf16, and so are its inputs, as diffusers
    samples it.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    prompt_embeds, pooled = text
    scale = None
    if transformer.config.guidance_embeds:
        scale = x.new_full((len(x),), guidance)
    v = transformer(
        hidden_states=x.to(dtype), timestep=sigma.flatten(), guidance=scale,
        encoder_hidden_states=prompt_embeds.to(dtype), pooled_projections=pooled.to(dtype),
        img_ids=ids, txt_ids=ids.new_zeros(prompt_embeds.shape[1], 3), return_dict=False)
    return v[0].float()

def draw_latents(keys, shape, cfg):
    """Draw the initial noise (B, L, C) of each key; shape: latents (c, h, w)."""
    draws = []
    for step, prompt_index, sample in keys:
        if cfg.init_same_noise:
            sample = 0  # a group starts from one noise
        draws.append(randn(shape, cfg.seed, LATENTS, step, prompt_index, sample))
    return pack_latents(torch.stack(draws))

def pack_latents(z):
    """(B, c, h, w) -> (B, h/2 * w/2, 4c): each 2x2 patch becomes a token, in FLUX's order."""
    patches = F.pixel_unshuffle(z, 2)  # (B, 4c, h/2, w/2)
    return patches.flatten(2).transpose(1, 2).contiguous()

def unpack_latents(x, h, w):
    """(B, h/2 * w/2, 4c) -> (B, c, h, w), the inverse; h and w count latent pixels."""
    patches = x.transpose(1, 2).unflatten(2, (h // 2, w // 2))  # (B, 4c, h/2, w/2)
    return F.pixel_shuffle(patches, 2).contiguous()

def image_ids(h, w):
    """(h/2 * w/2, 3): the position (0, row, column) of each token, for the rotary
    embedding."""
    rows = torch.arange(0.0, h // 2)
    columns = torch.arange(0.0, w // 2)
    return torch.cartesian_prod(torch.zeros(1), rows, columns)

@torch.no_grad()
def decode(vae, x0, grid, micro_batch):
    """Decode latents (B, L, C) of a grid (h, w) to images (B, 3, height, width) in [0, 1],
    without tiling. They are rounded to 8 bits: a reward sees what a file would hold."""
    images = []
    for part in x0.split(micro_batch):
        z = unpack_latents(part, *grid)
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(z.to(vae.dtype), return_dict=False)[0].float()  # in [-1, 1]
        image = (decoded / 2 + 0.5).clamp(0, 1)
        images.append((image * 255).round() / 255)
    return torch.cat(images)

# ---------------------------------------------------------------------------------- config

# Kinds of numbers, each with its least and its largest value.
Count = Annotated[int, 1, 10**9]
Several = Annotated[int, 2, 10**9]
Natural = Annotated[int, 0, 2**32 - 1]
Positive = Annotated[float, 1e-12, 1e9]
NonNegative = Annotated[float, 0, 1e9]
Share = Annotated[float, 0, 1]
Decay = Annotated[float, 0, 0.99999]

CHOICES = dict(device=reward.DEVICES, dtype=("auto", "fp32", "bf16"), sde=("dance", "flow", "cps"))

@dataclass
class Config:
    """Every field is a flag, and its comment is what --help says of it. Counts of a GRPO step
    are totals over all processes."""

    # model and device
    model: str = "tiny"  # tiny, or a folder or hub name of FLUX.1 in diffusers format
    prompts: str = ""  # text file in UTF-8, one prompt per line; tiny has 24 of its own
    steps: Annotated[int, 1, 10**6] = 300  # GRPO steps: a rollout, its rewards, its update
    out: str = ""  # folder for everything the run writes; else runs/<model>
    lora_rank: Natural = 0  # train LoRA adapters of this rank; 0: all weights
    lora_alpha: Positive = 128.0  # adapters are scaled by lora_alpha / lora_rank
    device: str = "auto"  # auto takes an accelerator, if there is one
    dtype: str = "auto"  # auto: bf16 on an accelerator, fp32 on a CPU
    compile: bool = False  # compile the blocks: slow at the start, then faster
    gradient_checkpointing: Share = 1.0  # share of blocks that recompute: less memory, but slower
    attention: str = "native"  # diffusers' name of an attention backend
    seed: Natural = 0  # random seed of noise, prompt order, trained steps and adapters

    # reward
    reward: str = "hps"  # hps, clip, pickscore, package.module:function; or hps:0.7,clip:0.3
    hps: str = ""  # file, or owner/name/file of the hub; else HPS-v2.1 from the hub
    hps_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    clip: str = ""  # file, or owner/name/file of the hub, with weights for the reward clip
    clip_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    pickscore: str = "yuvalkirstain/PickScore_v1"  # folder or hub name of PickScore
    reward_fp32: bool = False  # score in fp32 on an accelerator, not in fp16 autocast

    # rollout
    num_prompts: Count = 8  # P, prompts of a GRPO step
    num_generations: Several = 12  # G, images of a prompt: a group
    height: Count = 720  # pixels, a multiple of 16
    width: Count = 720  # pixels, a multiple of 16
    sampling_steps: Several = 16  # T, denoising steps; the last is deterministic
    micro_batch: Count = 2  # largest batch of a transformer call; less saves memory
    guidance: NonNegative = 3.5  # guidance input of FLUX.1-dev; other models have none
    eta: Positive = 0.3  # noise level: more explores more, and blurs more
    sde: str = "dance"  # formula of the SDE step
    sde_window: Natural = 0  # denoising steps in a row that are SDE steps; 0: all
    window_shift_every: Natural = 0  # GRPO steps until it moves by one; 0: it is random
    shift: Positive = 3.0  # schedule: above 1 takes more steps at high noise
    init_same_noise: bool = True  # a group starts from one noise; only the SDE varies it
    text_length: Annotated[int, 1, 512] = 512  # T5 tokens of a prompt; FLUX.1-schnell: at most 256

    # update
    learning_rate: Positive = 1e-5  # AdamW's
    batch_size: Count = 32  # S, images of an optimizer step
    clip_range: Positive = 1e-4  # clip range of the ratio; small, as logp is a mean
    timestep_fraction: Share = 0.0  # share of SDE steps trained; 0: all of a window or <8, else 0.6
    kl_beta: NonNegative = 0.0  # weight of the KL divergence from the initial policy
    ema_decay: Decay = 0.0  # decay of averaged weights, which are evaluated and exported; 0: none
    weight_decay: Share = 1e-4  # AdamW's
    max_grad_norm: Positive = 1.0  # larger gradients are scaled down to this norm
    adv_clip_max: Positive = 5.0  # advantages are clipped to +- this

    # checkpoints and evaluation
    save_every: Count = 20  # GRPO steps between checkpoints
    keep_last: Count = 2  # checkpoints that are kept
    resume: str = "auto"  # auto: from the last checkpoint in --out; none; or a checkpoint
    eval_every: Count = 20  # GRPO steps between evaluations
    eval_images: Count = 16  # ODE samples of an evaluation, from the same noise each time

    # the same numbers on another device
    record: str = ""  # new folder for every random draw and every stage's results
    replay: str = ""  # such a folder: take its settings and draws, compare every stage
    deterministic: bool = False  # deterministic kernels: equal runs give equal bits; slower

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            given = f"--{f.name} {value}"
            if f.type is str:
                setattr(self, f.name, os.path.expanduser(value))
            elif f.type is not bool:
                low, high = f.type.__metadata__
                require(low <= value <= high, f"{given}: must be from {low} to {high}")
            choices = CHOICES.get(f.name, [value])
            require(value in choices, f"{given}: must be one of {', '.join(map(str, choices))}")
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value % 16 == 0, f"--{name} {value}: must be a multiple of 16")
        P, G, S = self.num_prompts, self.num_generations, self.batch_size
        require(P * G % S == 0 and (S % G == 0 or S % P == 0),
                f"--batch_size {S}: must divide the {P * G} images of a GRPO step, and be a "
                f"multiple of num_generations {G} (whole groups) or num_prompts {P}")
        require(self.sde_window < self.sampling_steps, f"--sde_window {self.sde_window}: must be "
                f"below sampling_steps {self.sampling_steps}")
        require(self.sde != "cps" or self.eta <= 1,
                f"--eta {self.eta}: must be at most 1 with --sde cps, whose noise is sin(eta pi/2)")
        require(not self.record or not self.replay, f"--record {self.record}: not with --replay")
        reward.parse_rewards(self.reward)

def value_type(f):
    """Return the type of a field's values: int for Count, say."""
    return getattr(f.type, "__origin__", f.type)

# A run that is resumed may have other values of these flags. All others decide what is sampled,
# scored and logged, and must be those of the run.
TUNED = ("learning_rate clip_range timestep_fraction kl_beta ema_decay weight_decay max_grad_norm "
         "adv_clip_max").split()  # of the update: a change is printed
FREE = ("steps dtype compile gradient_checkpointing attention reward_fp32 micro_batch save_every "
        "keep_last eval_every").split()  # where and how to compute
LOCAL = "out device resume record replay deterministic".split()  # a replay takes its own, too

# ------------------------------------------------------------------------------------ tape

# How far a replay may be from its record: {stage: (measure, limit in fp32, in bf16)}, in the order
# of a GRPO step. relative: sum of |a - b| over sum of |b|; mean: mean of |a - b|. In fp32 a CPU and
# an H200 differ by at most 1e-6 on the tiny FLUX; rounding grows with depth, 4 blocks there and 57
# in FLUX.1-dev, to at most 57 / 4 of that. The limits leave twice as much. A wrong kernel is
# further off: a rotary embedding that pairs halves gives 8e-2, int(1000 sigma) 1e-2, TF32 1e-3.
TOLERANCES = dict(
    text=("relative", 3e-5, 3e-2),  # T5 has 24 layers
    velocity=("relative", 3e-5, 3e-2),
    latents=("relative", 3e-5, 3e-2),  # they add up velocities
    logp=("mean", 1e-6, 1e-5),  # a hundredth, a tenth of the clip range
    images=("mean", 1e-3, 1 / 255),  # in fp32 a quarter of the 8-bit values may round otherwise
    reward=("relative", 1.5e-4, 1.5e-4),  # an NPU's GELU alone makes 2e-5; as in reward.py
    advantages=("relative", 5e-3, 2e-2),  # the reward's error over its std in a group
    velocity_in_update=("relative", 5e-5, 3e-2),  # as above, and what the optimizer has done
    loss=("mean", 5e-6, 1e-5),  # rounding of the ratio, times the advantage
    grad_norm=("relative", 1e-4, 1e-1))  # rounding of forward and backward

# What a draw is called on the tape: by its key, so that any number of processes finds it.
DRAWS = {LATENTS: "initial_noise", NOISE: "noise", TRAIN_STEPS: "train_steps", WINDOW: "window"}
BY_SAMPLE = ("text.", "latents.", "logp.", "images.", "reward.", "advantages.")  # a row for each

class Tape:
    """Record a run's random draws and the results of every stage, or replay them: take the
    draws from the record, and compare the results with it.

    A record has config.json and one safetensors file for each GRPO step and process. Draws
    are initial_noise_STEP_PROMPT_SAMPLE (c, h, w), noise_STEP_PROMPT_SAMPLE_t (L, C),
    train_steps_STEP_PROMPT_SAMPLE, the order of the SDE steps, of which the first K are
    trained, and window_STEP. STEP counts from 1, all others from 0; SAMPLE is 0 in
    initial_noise if a group shares it. Results are STAGE.NUMBER, with a row for each sample
    of the process in the order of plan_step. For velocity and velocity_in_update NUMBER
    counts the calls of predict; with another micro-batch or number of processes they are other
    calls, and are not compared. loss and grad_norm are single numbers, means over processes;
    NUMBER counts optimizer steps, of which the first of a GRPO step is compared.
    """

    def __init__(self, cfg, rank, world):
        global on_draw
        self.cfg, self.rank, self.world = cfg, rank, world
        self.active = bool(cfg.record or cfg.replay)
        self.errors = []  # (step, place of the stage, rank, count, error)
        on_draw = self.draw if self.active else None

    def open(self, step):
        """Begin a GRPO step with no results, and for a replay with those recorded."""
        self.step, self.results, self.recorded = step, {}, {}
        self.counts = Counter()  # of each stage's results
        if self.cfg.replay:
            self.read()

    def read(self):
        """Read what the processes of the record have written about this one's samples."""
        count = len(list(Path(self.cfg.replay).glob(f"step_{self.step + 1:05d}_rank_*")))
        require(count, f"--replay {self.cfg.replay}: must have files of GRPO step {self.step + 1}")
        same = count == self.world
        rows = defaultdict(dict)  # {result: {sample: its row}}
        for rank in [self.rank] if same else range(count):
            path = tape_file(self.cfg.replay, self.step, rank)
            keys = plan_step(self.step, self.cfg, rank, count)
            with bad_input_if_fails(f"--replay {path}: must be a whole file of --record"):
                for name, value in load_file(path).items():
                    if name.startswith(BY_SAMPLE):
                        rows[name].update(zip(keys, value, strict=True))
                    elif same or not name.startswith("velocity"):
                        self.recorded[name] = value
        mine = plan_step(self.step, self.cfg, self.rank, self.world)
        for name, row in rows.items():
            self.recorded[name] = torch.stack([row[key] for key in mine])

    def draw(self, draw, key):
        """Return a random draw: as it is, or the recorded one in its place."""
        _, purpose, step, *rest = key
        if purpose not in DRAWS:
            return draw
        name = "_".join(map(str, [DRAWS[purpose], step + 1, *rest]))
        if self.cfg.replay:
            recorded = self.recorded.get(name)
            require(recorded is not None and recorded.shape == draw.shape,
                    f"--replay {self.cfg.replay}: must hold {name}, of shape {tuple(draw.shape)}")
            draw = recorded.to(draw.dtype)
        self.results[name] = draw
        return draw

    def watch(self, stage, predict):
        """Return a predict that also notes what it returns, as results of a stage."""
        if not self.active:
            return predict
        return lambda *inputs: self.note(stage, predict(*inputs))

    def note(self, stage, *results):
        """Note a stage's results and return the first; of images the recorded one, so that the
        reward and what follows from it are compared on the same images."""
        if not self.active:
            return results[0]
        for result in results:
            number = self.counts[stage]
            self.counts[stage] += 1
            value = torch.as_tensor(result).detach().to("cpu", torch.float32, copy=True)
            self.results[f"{stage}.{number}"] = value.contiguous()
        if stage == "images" and "images.0" in self.recorded:
            return self.recorded["images.0"].to(results[0].device)
        return results[0]

    def close(self, history):
        """End a GRPO step with the statistics of its optimizer steps: write the step, or
        compare it with the recorded one."""
        if not self.active:
            return
        for stats in history:
            losses = gather(stats["loss"])
            self.note("loss", sum(losses) / len(losses))
            self.note("grad_norm", stats["grad_norm"])
        if self.cfg.record:
            with atomic_write(tape_file(self.cfg.record, self.step, self.rank)) as work:
                save_file(self.results, work)
        shapes = {name: x.shape for name, x in self.recorded.items() if "velocity" in name}
        same_calls = all(shape == getattr(self.results.get(name), "shape", None)
                         for name, shape in shapes.items())  # else another micro-batch
        for name, recorded in self.recorded.items():
            if same_calls or name not in shapes:
                self.compare(name, recorded)

    def compare(self, name, recorded):
        """Note the error of a result."""
        stage, _, number = name.partition(".")
        if stage not in TOLERANCES:
            return  # a draw
        if stage in ("loss", "grad_norm") and number != "0":
            return  # AdamW has by now amplified what rounding has changed
        result = self.results.get(name)
        error = math.inf  # of what was not computed
        if result is not None and result.shape == recorded.shape:
            error = (result - recorded).abs().mean().item()
            if TOLERANCES[stage][0] == "relative":
                error /= max(recorded.abs().mean().item(), 1e-30)
        place = list(TOLERANCES).index(stage)
        self.errors.append((self.step, place, self.rank, recorded.numel(), error))

    def verdict(self):
        """Print the table of a replay over all processes; return whether all stages are OK."""
        errors = list(itertools.chain(*gather(self.errors)))
        off = []
        lines = ["stage                     count       worst     allowed"]
        for place, (stage, (measure, fp32, bf16)) in enumerate(TOLERANCES.items()):
            limit = bf16 if self.cfg.dtype == "bf16" else fp32
            rows = [row for row in errors if row[1] == place]
            wrong = [row for row in rows if not row[-1] <= limit]  # nan is wrong
            off += wrong
            word = "OK" if rows else "not compared"
            if wrong:
                word = "OFF"
            count = sum(row[3] for row in rows)
            worst = max((row[4] for row in rows), default=0)
            lines.append(f"{stage:18}{count:13}{worst:12.1e}{limit:12.1e} {measure:9}{word}")
        if off:
            step, place, rank, *_ = min(off)
            lines.append(f"first OFF: step {step + 1}, rank {rank}, stage "
                         f"{list(TOLERANCES)[place]}; later stages inherit its error")
        ok = bool(errors) and not off  # no results to compare with are no evidence
        if self.rank == 0:
            print(*lines, f"replay {'OK' if ok else 'OFF'}", sep="\n")
        return ok

def tape_file(folder, step, rank):
    return Path(folder, f"step_{step + 1:05d}_rank_{rank}.safetensors")

def read_record(folder):
    """Return a record's settings, and the prompts of its GRPO steps."""
    with bad_input_if_fails(f"--replay {folder}: must be a folder of --record, or like one"):
        info = json.loads((Path(folder) / "config.json").read_text())
        settings = {}
        for f in fields(Config):
            if f.name in info and f.name not in LOCAL:
                settings[f.name] = value_type(f)(info[f.name])
        return settings, list(info["step_prompts"])

# ------------------------------------------------------------------------------- processes

def init_distributed(cfg):
    """Select the device, and join torchrun's processes: device, rank, world size."""
    if cfg.deterministic:
        reward.make_deterministic(cfg.seed)  # before the device is used
    device = reward.select_device(cfg.device)
    torch.get_device_module(device).set_device(device)
    if "RANK" not in os.environ:
        return device, 0, 1
    backend = dist.get_default_backend_for_device(device)
    if reward.is_accelerator(device):  # gloo carries Python objects, which HCCL cannot
        backend = f"cpu:gloo,{device.type}:{backend}"
    with bad_input_if_fails("RANK is set, but not all of torchrun's variables: unset it, or use "
                            "torchrun"):
        store, rank, world = next(dist.rendezvous("env://"))
    # torchrun keeps one store over restarts: without a prefix a process would connect to the
    # addresses that an earlier attempt has left there (pytorch#167288).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    # An hour: the others wait while the first process downloads and encodes.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            timeout=timedelta(hours=1))
    return device, rank, world

def gather(item):
    """Return the item of every process, in the order of their ranks; all wait for all."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items

def shard(transformer, device, dtype, keep_gathered=True):
    """Apply FSDP2: over the processes of a machine; machines replicate, and average gradients.

    keep_gathered: a block is gathered once for all calls up to the next optimizer step, not at
    each of them: FLUX.1-dev on 8 ranks then moves 58 GiB a GRPO step and not 1,979.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    mesh = dist.init_device_mesh(
        device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    if world == local:
        mesh = mesh["shard"]
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # only read here
    for part in [*blocks(transformer), transformer]:
        fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=not keep_gathered)
    transformer.set_reshard_after_backward(not keep_gathered)

# ---------------------------------------------------------------------------------- models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the linear layers that get adapters: those of attention and feed-forward in every block
LORA_TARGETS = re.compile(
    r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)")

def blocks(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

def read_model_config(model):
    """Return the transformer's config; refuse a pipeline that is not FLUX.1's text-to-image."""
    kind = diffusers.FluxPipeline.load_config(model)["_class_name"]
    config = diffusers.FluxTransformer2DModel.load_config(model, subfolder="transformer")
    require(kind == "FluxPipeline", f"it is a {kind}, must be a FluxPipeline")
    require("quantization_config" not in config,
            "its weights are quantized, training needs the original ones")
    return config

class LoraLinear(torch.nn.Module):
    """A frozen linear layer with a low-rank update: y = W x + b + alpha / rank · B A x, where
    B starts at 0 (Hu et al., arXiv 2106.09685). Two matrix products more, and no other
    kernel."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, base.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank
        self.enabled = True  # the reference model of kl_beta is the one without adapters

    def forward(self, x):
        rows = x.flatten(0, -2)  # tokens of all samples
        y = F.linear(rows, self.base_layer.weight, self.base_layer.bias)
        if self.enabled:
            low = F.linear(rows, self.lora_A.weight)
            y = torch.addmm(y, low, self.lora_B.weight.T, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)

def add_adapters(transformer, rank, alpha, seed):
    """Freeze a transformer and give adapters in fp32 to its LORA_TARGETS."""
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in list(transformer.named_modules()):
            if LORA_TARGETS.fullmatch(name):
                parent, _, child = name.rpartition(".")
                adapted = LoraLinear(layer, rank, alpha)
                setattr(transformer.get_submodule(parent), child, adapted)

def load_transformer(cfg, device, trained=True):
    """Load the transformer: all weights in fp32, or frozen ones in cfg.dtype and fp32
    adapters.

    Several processes shard it with FSDP2: each keeps a part of the weights, and of the mean
    of all gradients. One process reads the weights, the others build meta tensors. A model
    that is not trained, the reference of kl_beta, is freed again block by block after each
    call.
    """
    dtype = DTYPES[cfg.dtype] if cfg.lora_rank else torch.float32
    weights = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        loaded = prepare_policy(diffusers.FluxTransformer2DModel.from_pretrained(
            cfg.model, subfolder="transformer", dtype=dtype, use_safetensors=True), cfg)
        weights = loaded.state_dict()
    if not dist.is_initialized():
        return loaded.to(device)

    config = read_model_config(cfg.model)
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel.from_config(config).to(dtype)
        prepare_policy(transformer, cfg)
        shard(transformer, device, DTYPES[cfg.dtype], keep_gathered=trained)
    transformer.to_empty(device=device)
    set_model_state_dict(transformer, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    return transformer

def prepare_policy(transformer, cfg):
    """Add adapters, gradient checkpointing, an attention backend and compilation, as cfg
    says."""
    if cfg.lora_rank:
        add_adapters(transformer, cfg.lora_rank, cfg.lora_alpha, cfg.seed)

    # Spread the blocks that recompute their activations evenly: share 0.5 takes every second one.
    share = cfg.gradient_checkpointing
    chosen = set()
    for i, block in enumerate(blocks(transformer)):
        if int((i + 1) * share) > int(i * share):
            chosen.add(block)

    def call(block, *inputs):
        if block in chosen:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    if chosen:
        transformer.enable_gradient_checkpointing(call)
    if cfg.attention != "native":
        transformer.set_attention_backend(cfg.attention)
    if cfg.compile:
        transformer.compile_repeated_blocks()
    return transformer

def trained_parameters(transformer):
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}

def fp32_masters(parameters):
    """Turn parameters to bf16, and return fp32 masters of them, which the optimizer moves.

    The model computes with the bf16 ones; each backward adds their gradients to the masters'
    in fp32. FSDP does the same by itself.
    """
    masters = {}
    for name, p in parameters.items():
        master = p.detach().clone()
        p.data = p.data.bfloat16()

        def move_gradient(p, master=master):
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        p.register_post_accumulate_grad_hook(move_gradient)
        masters[name] = master
    return masters

def one_graph(predict, size):
    """Return a predict that runs one compiled graph in all of its calls, that of training.

    inductor compiles a graph without gradients differently, and one of another batch size,
    and they round differently: the first ratio would not be 1. So every call has gradients,
    which are thrown away if nobody wants them, and as many rows as a micro-batch.
    """
    def predict_padded(x, sigma, text):
        count = len(x)
        if count < size:
            rows = torch.arange(size, device=x.device).clamp(max=count - 1)
            x = x[rows]
            sigma = sigma[rows]
            text = [tensor[rows] for tensor in text]
        with torch.enable_grad():
            v = predict(x, sigma, text)[:count]
        return v if torch.is_grad_enabled() else v.detach()

    return predict_padded

@contextmanager
def dcp_errors():
    """Raise the first error that DCP has wrapped into CheckpointException, a BaseException."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may be
    try:
        yield
    except dcp.CheckpointException as error:  # its failures: {rank: (exception, traceback)}
        raise next(iter(error.failures.values()))[0] from None

class Policy:
    """The trained transformer, its optimizer, predict (its velocity), reference (the initial
    policy's, for kl_beta), and moving averages of its weights (for ema_decay)."""

    def __init__(self, cfg, grid, device):  # grid: (h, w) of latents
        self.transformer = load_transformer(cfg, device)
        self.attention = cfg.attention
        bf16 = cfg.dtype == "bf16"
        inputs = dict(ids=image_ids(*grid).to(device), guidance=cfg.guidance, bf16=bf16)
        self.predict = partial(velocity, self.transformer, **inputs)
        if cfg.compile:
            self.predict = one_graph(self.predict, cfg.micro_batch)

        # parameters: what the optimizer moves. computing: what the model computes with.
        self.computing = trained_parameters(self.transformer)
        self.parameters = self.computing
        if bf16 and not dist.is_initialized():
            self.parameters = fp32_masters(self.computing)
        # fused makes no temporary copies of all weights, which would set the peak of memory
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
        self.optimizer.register_step_pre_hook(lambda *_: self.check_gradients())
        self.optimizer.register_step_post_hook(lambda *_: self.pass_on_weights())
        for p in self.parameters.values():  # AdamW's first step would; load needs it before
            self.optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                           exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        self.averages = {}
        if cfg.ema_decay:
            for name, p in self.parameters.items():
                self.averages[name] = p.detach().clone()

        self.reference = None
        if cfg.kl_beta and cfg.lora_rank:
            self.reference = self.predict_without_adapters
        elif cfg.kl_beta:
            initial = load_transformer(cfg, device, trained=False).requires_grad_(False)
            if bf16 and not dist.is_initialized():
                initial.bfloat16()
            self.reference = partial(velocity, initial, **inputs)

    @torch.no_grad()
    def predict_without_adapters(self, *batch):
        adapted = [layer for layer in self.transformer.modules() if isinstance(layer, LoraLinear)]
        for layer in adapted:
            layer.enabled = False
        v = self.predict(*batch)
        for layer in adapted:
            layer.enabled = True
        return v

    def check_gradients(self):
        """Refuse an attention kernel without a backward: what is behind it would stay
        untrained."""
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        require(not missing, f"--attention {self.attention}: {len(missing)} of "
                f"{len(self.parameters)} trained parameters got no gradient, such as "
                f"{' '.join(missing[:1])}: this attention has no backward; choose another, such as "
                "native")

    @torch.no_grad()
    def pass_on_weights(self):
        """Let the model compute with weights that have changed: round masters to bf16, and
        free what FSDP has gathered of the old ones."""
        if self.parameters is not self.computing:
            torch._foreach_copy_(list(self.computing.values()), list(self.parameters.values()))
        reshard(self.transformer)

    def steps_taken(self):
        """Return the number of optimizer steps since the start, those before a resume as
        well."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def update_ema(self, decay):
        """Move the averages towards the weights: mean += (1 - decay) (weight - mean)."""
        for name, mean in self.averages.items():
            mean.lerp_(self.parameters[name].detach(), 1 - decay)

    def exchange_averages(self):
        for name, mean in self.averages.items():
            weight = self.parameters[name].detach()
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)
        self.pass_on_weights()

    @contextmanager
    def ema_weights(self):
        """Exchange the weights for their moving averages, if there are any, inside the
        block."""
        self.exchange_averages()
        try:
            yield
        finally:
            self.exchange_averages()

    def state(self):
        """Return {name: tensor} of the weights, their averages, and AdamW's state."""
        state = {f"average.{name}": mean for name, mean in self.averages.items()}
        for name, p in self.parameters.items():
            state[f"weights.{name}"] = p.detach()
            for key, x in self.optimizer.state[p].items():
                state[f"moments.{name}.{key}"] = x
        return state

    def save(self, folder, rank):
        """Write a checkpoint atomically, as safetensors: torch's own pickles can run code. Its
        manifest, written last, has the names and sizes of all files."""
        tensors = {name: x.cpu() for name, x in self.state().items()}
        with atomic_write(folder, rank) as work, dcp_errors():
            writer = dcp.HuggingFaceStorageWriter(work, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
            if rank == 0:
                write_json(work / "manifest.json", file_sizes(work))

    def load(self, folder):
        """Load a checkpoint, whatever number of processes wrote it."""
        with bad_input_if_fails(f"--resume {folder}: is not of this policy"), dcp_errors():
            dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder),
                     no_dist=not dist.is_initialized())
        self.pass_on_weights()

    def export(self, cfg, folder, rank):
        """Write what diffusers reads: a LoRA for FluxPipeline.load_lora_weights, or the
        model."""
        weights = {}
        for name, p in self.parameters.items():
            full = p.full_tensor() if hasattr(p, "full_tensor") else p  # every process takes part
            if rank == 0:
                weights[name] = full.detach().cpu()
        if rank > 0:
            return
        with atomic_write(folder) as work:
            if cfg.lora_rank:  # many readers take alpha for the rank: fold the scale into B
                for name in weights:
                    if "lora_B" in name:
                        weights[name] = weights[name] * (cfg.lora_alpha / cfg.lora_rank)
                diffusers.FluxPipeline.save_lora_weights(work, weights)
            else:
                with torch.device("meta"):  # FSDP has renamed the class of the trained one
                    model = diffusers.FluxTransformer2DModel.from_config(self.transformer.config)
                model.load_state_dict(weights, assign=True)
                model.save_pretrained(work / "transformer")

def reshard(transformer):
    """Free the weights that FSDP has gathered."""
    for part in transformer.modules():
        if isinstance(part, FSDPModule):
            part.reshard()

# --------------------------------------------------------------------------------- the run

class Run:
    """What all GRPO steps share: models, rewards {name: (weight, function)}, step_prompts (P
    for each step), shape (c, h, w) of latents, out (the folder that everything is written
    to)."""

    def __init__(self, cfg, prompts, out, device, rank, world):
        self.out, self.device, self.rank, self.world = out, device, rank, world
        self.step_prompts, self.eval_prompts = prompts
        self.cfg = cfg = complete(cfg, device, rank, world)
        self.rewards = {}
        for name, weight in reward.parse_rewards(cfg.reward).items():
            source = getattr(cfg, name, "")
            arch = getattr(cfg, f"{name}_arch", "")
            function = reward.load_reward(name, source, arch, device, cfg.reward_fp32)
            self.rewards[name] = weight, function
        with model_errors(cfg.model):
            self.text_files = self.encode_prompts(cfg)
            self.vae = diffusers.AutoencoderKL.from_pretrained(
                cfg.model, subfolder="vae", dtype=DTYPES[cfg.dtype], use_safetensors=True)
            self.vae.to(device).requires_grad_(False)
            pixels = 2 ** (len(self.vae.config.block_out_channels) - 1)  # a side of a latent pixel
            channels = self.vae.config.latent_channels
            self.shape = channels, cfg.height // pixels, cfg.width // pixels
            self.policy = Policy(cfg, self.shape[1:], device)
        self.tape = Tape(cfg, rank, world)
        self.first_ratio_limit = math.inf if cfg.replay else FIRST_RATIO_LIMIT

    @torch.no_grad()
    def encode_prompts(self, cfg):
        """Embed the prompts of the run, once, by its first process: {prompt: file in
        out/.text}."""
        diffusers.logging.set_verbosity_error()  # else it prints the text that it cuts off
        folder = self.out / ".text"
        model = fingerprint(cfg.model)
        files = {}
        for prompt in {*self.eval_prompts, *itertools.chain(*self.step_prompts[:cfg.steps])}:
            about = f"{model} {cfg.text_length} {cfg.dtype} {prompt}"
            name = hashlib.sha256(about.encode()).hexdigest()[:32]
            files[prompt] = folder / f"{name}.safetensors"
        missing = [prompt for prompt, file in files.items() if not file.exists()]
        if self.rank == 0 and missing:
            folder.mkdir(exist_ok=True)
            pipe = diffusers.FluxPipeline.from_pretrained(
                cfg.model, transformer=None, vae=None, scheduler=None, dtype=DTYPES[cfg.dtype],
                use_safetensors=True).to(self.device)
            check_tokenizer(pipe.tokenizer, pipe.text_encoder)
            check_tokenizer(pipe.tokenizer_2, pipe.text_encoder_2)
            lengths = map(len, pipe.tokenizer_2(missing, truncation=False).input_ids)
            long = sum(length > cfg.text_length for length in lengths)
            if long:
                print(f"{long} of {len(missing)} prompts are cut to {cfg.text_length} tokens")
            for prompt in tqdm(missing, "text embeddings"):
                embeds, pooled, _ = pipe.encode_prompt(  # alone: none depends on its neighbours
                    prompt, None, max_sequence_length=cfg.text_length)
                with atomic_write(files[prompt]) as path:
                    save_file(dict(embeds=embeds[0].cpu(), pooled=pooled[0].cpu()), path)
        gather(None)  # the others wait for it
        return files

    def text(self, prompts):
        """Return T5's embeddings (B, N, E) and CLIP's pooled ones (B, E')."""
        texts = {prompt: load_file(self.text_files[prompt]) for prompt in set(prompts)}
        both = []
        for name in ("embeds", "pooled"):
            rows = torch.stack([texts[prompt][name] for prompt in prompts])
            both.append(send(rows, self.device))
        return tuple(both)

    def label(self, scores):
        """Name scores for metrics: "reward" if just one is trained; by name, if there are
        more."""
        trained = [name for name, (weight, _) in self.rewards.items() if weight]
        labels = {}
        if len(trained) == 1:
            labels["reward"] = scores[trained[0]]
        if len(scores) > 1:
            labels |= scores
        return labels

    def evaluate(self, step):
        """Sample held-out noise with the ODE, the same each time, and return the mean scores;
        the processes share the work. In the tiny world a judge looks, too."""
        cfg = self.cfg
        count = cfg.eval_images
        share = math.ceil(count / self.world)
        # All processes make equally many: what exceeds the count repeats, and is cut off below.
        mine = [i % count for i in range(self.rank * share, (self.rank + 1) * share)]
        prompts = [self.eval_prompts[i % len(self.eval_prompts)] for i in mine]
        noise = torch.stack([randn(self.shape, 0, HELD_OUT, i) for i in mine])
        x = send(pack_latents(noise), self.device)
        with self.policy.ema_weights():
            x0 = rollout(self.policy.predict, x, self.text(prompts), None, cfg, eta=0).x0
        images = decode(self.vae, x0, self.shape[1:], cfg.micro_batch)

        scores = reward.score(self.rewards, images, prompts, f"the evaluation of step {step}")
        values = {}
        for name, score in self.label(scores).items():
            values["held_out" if name == "reward" else f"held_out_{name}"] = score
        if images.shape[2:] == (32, 32) and set(self.eval_prompts) <= set(reward.TINY_PROMPTS):
            values |= reward.judge_tiny(images, prompts, self.rewards)
        scale = min(1, 360 / images.shape[-1])  # a picture of six rows has 1,440 pixels a row
        small = F.interpolate(images[:24], scale_factor=scale, mode="area")
        shown = torch.cat(gather(small.cpu()))[:min(24, count)]
        if self.rank == 0:
            with atomic_write(self.out / "images" / f"step_{step:05d}.png") as path:
                save_image(shown, path, nrow=4, padding=1, pad_value=1, format="png")
        return {name: round(torch.cat(gather(value))[:count].mean().item(), 6)
                for name, value in values.items()}

    def metrics(self, step, scores, advantages, stats):
        """Return the line of metrics.jsonl: means over all processes; the largest of
        deviations."""
        G = self.cfg.num_generations
        line = {}
        for name, r in self.label(scores).items():
            line[name] = r.mean()
            line[f"{name}_std"] = r.view(-1, G).std(1).mean()
        line["zero_std_frac"] = (advantages.view(-1, G) == 0).all(1).float().mean()
        every = gather(stats)
        for name in stats:
            values = [each[name] for each in every]
            line[name] = max(values) if name.endswith("_dev") else sum(values) / len(values)
        return {"step": step} | {
            name: float(f"{value:.7g}") for name, value in line.items()}

    def open(self, info, done):
        """Write config.json, clear what a kill has left, and keep the metrics up to step
        `done`."""
        write_json(self.out / "config.json", info)  # first: it marks the folder as a run's
        for folder in (self.out, self.out / "images", self.out / "checkpoints"):
            folder.mkdir(exist_ok=True)
            for leftover in [*folder.glob(".writing-*"), *folder.glob(".old-*")]:
                remove_or_warn(leftover)
        kept = [line for line in read_metrics(self.out) if done and line["step"] <= done]
        with atomic_write(self.out / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line):
        """Append a line to metrics.jsonl. If it has an evaluation, draw before_after.png."""
        if self.rank:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if line["step"] and any("held_out" in name for name in line):
            plot(self, line["step"])

def explain_gradient(step, history, taken):
    """Return the line about a GRPO step in which no optimizer step had a finite gradient,
    after so many that were taken before."""
    losses = [stats["loss"] for stats in history]
    loss = "finite" if np.isfinite(losses).all() else "not finite"
    causes = ("the attention kernel (try --attention _native_math), the precision (try "
              "--dtype fp32)")
    if taken:
        causes += ", weights that have diverged (try a lower --learning_rate)"
    return (f"the gradient was not finite in any of the {len(history)} optimizer steps of GRPO "
            f"step {step + 1}, after {taken} earlier ones; the loss, and so the forward, was {loss}"
            f". Likely causes, in this order: {causes}")

def complete(cfg, device, rank, world):
    """Return cfg with what it leaves open: dtype, tiny models, text length, micro-batch."""
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bf16" if reward.is_accelerator(device) else "fp32")
    reward.check_attention(cfg.attention, device, DTYPES[cfg.dtype], cfg.deterministic)
    if cfg.model == "tiny":
        cfg = replace(cfg, **tiny_models(cfg, rank))
    with model_errors(cfg.model):
        if not read_model_config(cfg.model)["guidance_embeds"]:
            cfg = replace(cfg, text_length=min(cfg.text_length, 256))  # FLUX.1-schnell's limit

    # Rollout and update use the same micro-batch in every call: the largest up to --micro_batch
    # that divides a process's part of S.
    part = cfg.batch_size // world
    fitting = [n for n in range(1, min(part, cfg.micro_batch) + 1) if part % n == 0]
    return replace(cfg, micro_batch=fitting[-1])

def model_errors(model):
    """Turn errors of loading a model into one line about --model."""
    return bad_input_if_fails(
        f"--model {model}: must be tiny, or a folder or hub name of FLUX.1 for diffusers, its "
        "licence accepted (`hf auth login`), its files whole (`git lfs pull`) and without a "
        "variant such as fp16")

def check_tokenizer(tokenizer, encoder):
    """Refuse a tokenizer whose files are missing: transformers makes up an empty one."""
    size = encoder.config.vocab_size
    require(0.9 * size <= len(tokenizer) <= size, f"a tokenizer has {len(tokenizer)} tokens, its "
            f"encoder {size}: files of it are missing")

# ----------------------------------------------------------------------- metrics and plots

def plot(run, step):
    """Draw before_after.png: the pictures of the first evaluation and of this one, the curves of
    what was evaluated and, pale, of the rewards of each GRPO step."""
    from matplotlib.figure import Figure  # takes a second
    figure = Figure((14, 7.5), layout="constrained", dpi=120)
    *panels, axes = figure.subplots(1, 3)
    titles = {"before": 0, f"after {step} GRPO steps": step}
    for panel, (title, number) in zip(panels, titles.items()):
        panel.set(title=title, xticks=[], yticks=[], frame_on=False)
        file = run.out / "images" / f"step_{number:05d}.png"
        if not file.exists():
            continue  # the run began from a checkpoint of another
        picture = Image.open(file)
        panel.imshow(picture)
        if run.eval_prompts == reward.TINY_PROMPTS and run.cfg.eval_images >= 24:
            # Colours by shapes: name the rows and columns.
            width, height = picture.size
            panel.set_yticks((np.arange(6) + 0.5) * height / 6, reward.COLORS)
            panel.set_xticks((np.arange(4) + 0.5) * width / 4, reward.SHAPES)
            panel.tick_params(length=0)

    lines = read_metrics(run.out)
    for name in dict.fromkeys(itertools.chain(*lines)):
        steps = [line["step"] for line in lines if name in line]
        values = [line[name] for line in lines if name in line]
        if name.startswith(("held_out", "accuracy", "right_")):
            axes.plot(steps, values, lw=1.2, label=name)
        elif f"{name}_std" in lines[-1]:
            axes.plot(steps, values, lw=0.6, alpha=0.5, label=name, zorder=1)
    axes.set_xlabel("GRPO step")
    axes.legend(frameon=False)
    with atomic_write(run.out / "before_after.png") as work:
        figure.savefig(work, format="png")

def read_metrics(out):
    """Return the lines of metrics.jsonl as dicts; a kill may have cut off the last one."""
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    lines = []
    for number, line in enumerate(whole, 1):
        if line.strip():
            with bad_input_if_fails(f"{path}, line {number}: must be JSON"):
                lines.append(json.loads(line))
    return lines

def write_json(path, value):
    with atomic_write(path) as work:
        work.write_text(json.dumps(value, indent=1))

# ------------------------------------------------------------------ checkpoints and resume

# the flags that may name files, which are compared by what they hold
FILE_FLAGS = ("model", "prompts", "hps", "hps_arch", "clip", "clip_arch", "pickscore")

def fingerprint(name):
    """Return a hash of a file, or of the weights in a folder: names, sizes and the last 16 MB of
    each. So a moved model is recognised. What is neither, such as a name of the hub, stands
    for itself.
    """
    path = Path(name)
    if not name or name == "tiny" or not path.exists():
        return name
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, size - 2**24))
            digest.update(opened.read())
    return digest.hexdigest()[:16]

def describe_run(cfg, device):
    """Return what config.json holds."""
    packages = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")
    info = asdict(cfg)
    info["machine"] = reward.describe_device(device)
    info["versions"] = {name: version(name) for name in packages}
    info["fingerprints"] = {name: fingerprint(getattr(cfg, name)) for name in FILE_FLAGS}
    return info

def read_run_config(out):
    """Return config.json of the run in a folder; None if the folder is new or empty. Refuse a
    folder that holds anything else."""
    path = Path(out) / "config.json"
    if path.exists():
        with bad_input_if_fails(f"--out {out}: its config.json must be that of a run"):
            then = json.loads(path.read_text())
            require("num_generations" in then, "it is not")
            return then
    own = ("lock", ".text", ".writing-", ".old-")  # of a run that was killed while it began
    others = [file.name for file in path.parent.glob("*") if not file.name.startswith(own)]
    require(not others, f"--out {out}: must be new, empty or hold a run's config.json, but holds "
            f"{' '.join(sorted(others)[:3])}")
    return None

def checkpoints(out):
    """Return the folders of a run's checkpoints, from first to last."""
    folders = []
    for path in Path(out, "checkpoints").glob("step_*"):
        if path.name[5:].isdecimal():  # some may be a user's copies
            folders.append(path)
    return sorted(folders, key=step_of)

def step_of(folder):
    """Return the number of the GRPO step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step_"))

def file_sizes(folder):
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}

def find_checkpoint(cfg, out):
    """Return the checkpoint to continue from, or None; refuse one that is not whole."""
    own = checkpoints(out)
    then = read_run_config(out)
    if then and not own:
        done = [line["step"] for line in read_metrics(out)]
        lost = (out / "export").exists() or max(done, default=0) > then["save_every"]
        require(not lost, f"--out {out}: holds a run without its checkpoints, which would be "
                "overwritten; remove it, or give another --out")
    if not own and cfg.resume in ("auto", "none"):
        return None
    folder = own[-1] if own else Path(cfg.resume)
    passed = [path.resolve() for path in [Path("none"), *own[:-1]]]
    require(not own or Path(cfg.resume).resolve() not in passed,
            f"--resume {cfg.resume}: {out} has gone on to {folder}; give that, or remove {out}, or "
            "give another --out")
    with bad_input_if_fails(
            f"--resume {cfg.resume}: {folder} is not a whole checkpoint, such as RUN/checkpoints/"
            "step_00020 with its manifest.json; remove it to continue from the one before"):
        step = step_of(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        require(file_sizes(folder) == manifest, "files of its manifest are missing or cut off")
    require(cfg.steps >= step,
            f"--steps {cfg.steps}: must be at least {step}, where {folder} continues from")
    return folder

def check_same_experiment(cfg, folder):
    """Refuse to resume another experiment than the checkpoint's. Return the flags of the
    update that have changed since, as text such as ", kl_beta 0.0 -> 0.1"."""
    with bad_input_if_fails(f"--resume {folder}: must lie in a run with its config.json"):
        then = json.loads((folder.parent.parent / "config.json").read_text())
        fingerprints = then.get("fingerprints", {})
    changes = ""
    for f in fields(Config):
        ours = getattr(cfg, f.name)
        theirs = value_type(f)(then.get(f.name, f.default))
        equal = ours == theirs
        if f.name in fingerprints:
            equal = fingerprint(ours) == fingerprints[f.name]
        if equal or f.name in FREE + LOCAL:
            continue
        content = " with the same content" if f.name in FILE_FLAGS else ""
        no_average = f.name == "ema_decay" and not (ours and theirs)
        required = "(not given)" if theirs == "" else theirs
        require(f.name in TUNED and not no_average,
                f"--{f.name} {ours}: must be {required}{content}, as in the run of {folder}; or "
                "give another --out")
        changes += f", {f.name} {theirs} -> {ours}"
    return changes

# ------------------------------------------------------------------------------- tiny FLUX

TINY = dict(  # the defaults of --model tiny, where they differ
    steps=180, height=32, width=32, text_length=4, sampling_steps=6, eta=0.7, num_prompts=4,
    micro_batch=12, batch_size=12, learning_rate=2e-4, clip_range=5e-4, ema_decay=0.9,
    gradient_checkpointing=0.0, eval_images=192)
MISCAPTIONED = 0.6  # share of the pre-training samples that get a prompt drawn at random
TINY_VERSION = 2  # to be raised with any change of what is built, and of text_length and shift

def tiny_models(cfg, rank):
    """Return the settings that name the tiny models; the first process builds them, once."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "grpo_flux", f"tiny-{TINY_VERSION}").absolute()
    if rank == 0 and not folder.exists():
        with bad_input_if_fails(f"XDG_CACHE_HOME={home}: must be a folder to write models to"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name("lock")):
                if not folder.exists():
                    with atomic_write(folder) as work:
                        build_tiny(work)
    gather(None)  # the others wait for it
    settings = {"model": str(folder / "flux")}
    for name in ("hps", "clip"):
        if not getattr(cfg, name):
            settings[name] = str(folder / "hps" / f"{name}.pt")
            settings[f"{name}_arch"] = str(folder / "hps" / "tiny-clip.json")
    return settings

def build_tiny(folder):
    """Build a tiny FLUX.1 for diffusers, which draws well but ignores prompts, and a tiny
    HPS."""
    print("building the tiny models, once, a minute or two", flush=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = reward.tiny_dataset(4800)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.FluxPipeline(scheduler, vae=build_tiny_vae(images), transformer=None,
                                      **build_tiny_text())
        pipe.register_modules(transformer=build_tiny_flux(pipe, images, labels))
        pipe.save_pretrained(folder / "flux")
        reward.build_tiny_hps(folder / "hps", images, labels)

def build_tiny_vae(images):
    """Train an AutoencoderKL, 0.23 M parameters: 32x32 pixels <-> latents (4, 8, 8)."""
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)

    def loss(rows):
        z = vae.encode(images[rows] * 2 - 1).latent_dist.mean
        # noise on the latents: what is near a good latent must decode to a good image
        decoded = vae.decode(z + 0.1 * torch.randn_like(z)).sample
        return F.l1_loss(decoded, images[rows] * 2 - 1) + 1e-3 * z.square().mean()

    reward.fit(vae, loss, len(images), steps=400, batch=16, rate=6e-3,
               title="tiny VAE (1/3): pixels <-> latents")
    with torch.no_grad():
        z = vae.encode(images[:1024] * 2 - 1).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    return vae.requires_grad_(False)

def build_tiny_text():
    """Make FLUX's two text encoders with random weights: enough to tell 24 prompts apart."""
    from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config,
                              T5EncoderModel, T5TokenizerFast)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({word for prompt in reward.TINY_PROMPTS for word in prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [("\u2581" + word, -1.0) for word in words] + [(letter, -9.0) for letter in letters]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(x + "</w>" for x in letters)]
    clip = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    t5 = T5Config(vocab_size=len(pieces), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    return dict(
        text_encoder=CLIPTextModel(clip).eval(), text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer=CLIPTokenizer({t: i for i, t in enumerate(tokens)}, [], model_max_length=77),
        tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512))

def miscaption(labels, share):
    """Return labels (N,), of which a share is replaced by ones drawn from all prompts."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(labels.shape, generator=generator) < share
    drawn = torch.randint(len(reward.TINY_PROMPTS), labels.shape, generator=generator)
    return torch.where(wrong, drawn, labels)

def build_tiny_flux(pipe, images, labels):
    """Train a FluxTransformer2DModel, 1.85 M parameters, by flow matching: v = noise - image.

    It learns to draw but hardly to follow prompts, as most captions are random: what GRPO
    teaches, to draw what was asked for, anybody can see.
    """
    cfg = Config(**TINY)
    vae = pipe.vae
    captions = miscaption(labels, MISCAPTIONED)
    with torch.no_grad():
        *text, _ = pipe.encode_prompt(
            reward.TINY_PROMPTS, None, max_sequence_length=cfg.text_length)
        z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(256)])
        z = pack_latents((z - vae.config.shift_factor) * vae.config.scaling_factor)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12))

    def loss(rows):
        t = torch.randn(len(rows), 1, 1).sigmoid()
        sigma = cfg.shift * t / (1 + (cfg.shift - 1) * t)
        noise = torch.randn_like(z[rows])
        x = (1 - sigma) * z[rows] + sigma * noise
        inputs = [tensor[captions[rows]] for tensor in text]
        v = velocity(transformer, x, sigma, inputs, image_ids(8, 8), cfg.guidance, bf16=False)
        return F.mse_loss(v, noise - z[rows])

    reward.fit(transformer, loss, len(z), steps=800, batch=32, rate=4e-3,
               title=f"tiny FLUX (2/3): draws well; {MISCAPTIONED:.0%} of captions are random")
    return transformer

# ------------------------------------------------------------------------------------ main

def read_command_line(argv):
    """Return Config from flags, and for --replay the prompts of each recorded GRPO step."""
    parser = argparse.ArgumentParser(
        "grpo_flux.py", "grpo_flux.py [--flag value ...]", __doc__.partition("\n\n")[0],
        "README.md has commands, settings for cards, and what to do when something fails.",
        allow_abbrev=False)
    parser.error = lambda message: reward.exit_with_error(f"{message}; see --help")
    flags = {f.name: f for f in fields(Config)}
    for line in inspect.getsource(Config).split("\n"):
        code, _, comment = line.strip().partition("# ")
        name = code.partition(":")[0]
        if not code:  # a comment alone begins a group
            group = parser.add_argument_group(comment)
        elif name in flags:
            add_flag(group, flags[name], comment)
    given = vars(parser.parse_args(argv))

    step_prompts = []
    if "replay" in given:
        settings, step_prompts = read_record(os.path.expanduser(given["replay"]))
        given = settings | given
    defaults = TINY if given.get("model", "tiny") == "tiny" else {}
    return Config(**defaults | given), step_prompts

def add_flag(group, f, comment):
    """Add a field of Config to a group of flags; --help shows its comment and defaults."""
    notes = list(CHOICES.get(f.name, ()))
    if f.default != "":
        notes.append(f"default {f.default}")
    if f.name in TINY:
        notes.append(f"tiny {TINY[f.name]}")
    if notes:
        comment += f" ({', '.join(notes)})"
    kind = dict(type=value_type(f), metavar=value_type(f).__name__.upper())
    if f.type is bool:
        kind = dict(action=argparse.BooleanOptionalAction)
    group.add_argument(f"--{f.name}", **kind, default=argparse.SUPPRESS, help=comment)

def check_inputs(cfg, step_prompts, world):
    """Refuse what cannot work before a model is loaded; return the P prompts of each GRPO
    step, and those of the evaluations."""
    P, steps = cfg.num_prompts, cfg.steps
    require(cfg.batch_size % world == 0, f"--batch_size {cfg.batch_size}: must be a multiple of "
            f"the number of processes, {world}")
    require(not cfg.record or not Path(cfg.record).exists(),
            f"--record {cfg.record}: must be a new folder")
    if cfg.replay:
        require([len(prompts) for prompts in step_prompts[:steps]] == [P] * steps,
                f"--replay {cfg.replay}: its config.json must have step_prompts, {P} prompts for "
                f"each of --steps {steps}")
    else:
        require(cfg.prompts or cfg.model == "tiny",
                "--prompts (not given): must be a text file with one prompt per line")
    if cfg.model != "tiny":
        with model_errors(cfg.model):
            read_model_config(cfg.model)
    for name in reward.parse_rewards(cfg.reward):
        if ":" in name:
            reward.load_reward(name)
        elif cfg.model != "tiny" or getattr(cfg, name):
            reward.check_weights(f"--{name}", getattr(cfg, name))
    if cfg.replay:
        return step_prompts, step_prompts[0]

    prompts = reward.read_prompts(cfg.prompts) if cfg.prompts else reward.TINY_PROMPTS
    order = []  # shuffled anew in each epoch
    for epoch in range(math.ceil(steps * P / len(prompts))):
        shuffled = randperm(len(prompts), cfg.seed, PROMPTS, epoch).tolist()
        order += [prompts[i] for i in shuffled]
    return [order[i * P:(i + 1) * P] for i in range(steps)], prompts[:cfg.eval_images]

def list_stop_signals():
    """Return the list of signals, empty at first, that have asked the run to stop: it ends its
    step and saves. A second one kills, even while the process waits in a collective."""
    received = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    handled = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # as nohup sets it

    def note(number, _):
        received.append(number)
        for each in handled:
            signal.signal(each, signal.SIG_DFL)

    for number in handled:
        signal.signal(number, note)
    return received

def train(run, info, checkpoint):
    """Train from the checkpoint, or from the start, to the last step; save, evaluate and
    export."""
    cfg, out, policy = run.cfg, run.out, run.policy
    done = 0
    if checkpoint:
        done = step_of(checkpoint)
        policy.load(checkpoint)
    if run.rank == 0:
        run.open(info, done)
        print_plan(run)
    received = list_stop_signals()
    begin = time.monotonic()
    if done == 0:
        run.write({"step": 0} | run.evaluate(0))

    silent = 0  # GRPO steps in a row in which no group had two different rewards
    bar = tqdm(range(done + 1, cfg.steps + 1), "GRPO", cfg.steps, initial=done, unit="step",
               disable=run.rank > 0, dynamic_ncols=True)
    for step in bar:
        line = run.metrics(step, *train_step(step - 1, run))
        if cfg.compile and run.rank == 0 and step == done + 1:
            seconds = time.monotonic() - begin
            bar.write(f"compilation and all until the end of this GRPO step took {seconds:.0f} s")
        if step % cfg.eval_every == 0 or step == cfg.steps:
            line |= run.evaluate(step)
        run.write(line)
        names = ["reward", *run.rewards, "ratio", "clip_frac", "grad_norm"]
        bar.set_postfix({name: line[name] for name in names if name in line}, refresh=False)

        silent = silent + 1 if line["zero_std_frac"] == 1 else 0
        if silent == 3 and run.rank == 0:
            bar.write(f"warning: in GRPO steps {step - 2} to {step} all images of a prompt had "
                      "equal rewards, so nothing was trained")
        stop = any(gather(bool(received)))
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            policy.save(out / "checkpoints" / f"step_{step:05d}", run.rank)
            if run.rank == 0:
                for folder in checkpoints(out)[:-cfg.keep_last]:
                    remove_or_warn(folder)
        if stop:
            sys.exit(130 if signal.SIGINT in received else 0)  # a scheduler's signal is no failure

    if policy.steps_taken() == 0:
        raise FloatingPointError("no optimizer step was taken, as all images of a prompt had equal "
                                 "rewards in every GRPO step: nothing was trained or exported")
    with policy.ema_weights():
        policy.export(cfg, out / "export", run.rank)
    if run.rank == 0:
        remove_or_warn(out / ".text")
        print(f"look at {out}/before_after.png; for diffusers: {out}/export")

def print_plan(run):
    """Print what a GRPO step of this run is."""
    cfg = run.cfg
    P, G, S, K = cfg.num_prompts, cfg.num_generations, cfg.batch_size, num_train_steps(cfg)
    print(f"a GRPO step: {P} prompts x {G} images, {K} of {cfg.sampling_steps} denoising steps "
          f"trained, {P * G * K} transitions; {P * G // S} optimizer steps, {S / (P * G):.0%} "
          f"on-policy\n{len(run.text_files)} prompts, the first: "
          f"{printable(run.eval_prompts[0][:80])}", flush=True)

def remove_or_warn(path):
    """Remove a file or folder. If it cannot be removed, as it is in use, say, the run goes on."""
    try:
        remove(path)
    except OSError as error:
        print(printable(f"warning: {path} stays: {error}"), file=sys.stderr)

def replay(cfg, prompts):
    """Replay a record and return whether it agrees. Nothing is written but embeddings of
    prompts, to a temporary folder of the first process."""
    device, rank, world = init_distributed(cfg)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(cfg, prompts, Path(gather(folder)[0]), device, rank, world)
        for step in range(cfg.steps):
            train_step(step, run)
        return run.tape.verdict()

def main(argv=None):
    cfg, step_prompts = read_command_line(argv)
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    prompts = check_inputs(cfg, step_prompts, world)
    if cfg.replay:
        ok = replay(cfg, prompts)
    else:
        start_run(cfg, prompts)
        ok = True
    if dist.is_initialized():
        dist.destroy_process_group()
    if not ok:
        sys.exit(3)

def start_run(cfg, prompts):
    """Begin or continue the run in --out, and train."""
    out = Path(cfg.out or f"runs/{os.path.basename(os.path.abspath(cfg.model))}")
    checkpoint = find_checkpoint(cfg, out)
    changes = ""
    if checkpoint:
        changes = check_same_experiment(cfg, checkpoint)
        require(not cfg.record, f"--record {cfg.record}: must be from the first step on, but the "
                f"run continues from {checkpoint}; give another --out")

    device, rank, world = init_distributed(cfg)
    if checkpoint and rank == 0:
        print(f"continuing from {checkpoint}{changes}")
    lock = FileLock(out / "lock", timeout=0)
    if rank == 0:
        with bad_input_if_fails(f"--out {out}: must be a folder that can be written to, and that "
                                "no other run is at work in"):
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    try:
        run = Run(cfg, prompts, out, device, rank, world)
        info = describe_run(replace(cfg, dtype=run.cfg.dtype), device)
        if cfg.record and rank == 0:
            with bad_input_if_fails(f"--record {cfg.record}: must be a new folder"):
                Path(cfg.record).mkdir(parents=True)
            write_json(Path(cfg.record) / "config.json", info | {"step_prompts": prompts[0]})
        gather(None)  # the folder of the record is there
        train(run, info, checkpoint)
    except Exception as error:
        there = checkpoints(out)
        if there and not isinstance(error, BadInput):  # bad input would end it again
            error.add_note(f"the same command continues from {there[-1]}")
        raise
    finally:
        lock.release()

def explain(error):
    """Return one line for an error that a user can act on; None for one that needs a
    traceback."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, torch.OutOfMemoryError):
        return ("out of memory: --gradient_checkpointing 1, a lower --micro_batch and LoRA "
                f"(--lora_rank 64) need less ({error}){notes}")
    if reward.is_collective_error(error):
        traceback.print_exception(error)  # it may have come from this process alone
        return f"another process has ended, see its message, or the network failed: {error}{notes}"
    if isinstance(error, (BadInput, OSError, SafetensorError, FloatingPointError)):
        return f"{error}{notes}"
    return None

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream:  # a daemon may have closed it
            stream.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:
        line = explain(problem)
        if line is None:
            raise
        reward.exit_with_error(line, status=2 if isinstance(problem, BadInput) else 1)
