"""GRPO for FLUX in one file: teach a text-to-image model what people prefer.

DanceGRPO (Xue et al., arXiv 2505.07818) in six lines, each with the functions that do it:

    1. T small random steps turn noise and a prompt into an image      rollout, flux_step
    2. do that G times for the same prompt: a group                    plan_prompts
    3. decode, and let a model of human preference score the images    decode, reward.HPS
    4. advantage: by how many deviations is an image above its group   group_advantages
    5. make the steps of good images more probable: PPO's clipped loss  update, grpo_loss
    6. repeat with new prompts                                         train_step, main

What differs from the authors' code, and why:

    1. The model is told σ itself as its timestep, not int(1000 σ) / 1000.
    2. Log-densities keep their constants, which theirs drop; ratios are the same.
    3. Batches: kernels give other bits for other batch sizes, so rollout and update use one size,
       and the first ratio is exactly 1. Theirs is 1 only at batch 1.
    4. Every random number has a name (seed, purpose, step, prompt, sample, t): the same images on
       every device, with every batch size and number of processes.
    5. Samples whose advantage is 0 are left out of the update: their gradient is 0.
    6. Scores are not rounded to fp16, where two images of a group may tie.

    python grpo_flux.py                                     # a FLUX in miniature, on a laptop
    torchrun --nproc_per_node 8 grpo_flux.py --model black-forest-labs/FLUX.1-dev \\
        --hps HPS_v2.1_compressed.pt --prompts prompts.txt  # the real one; one card: --lora_rank 64

Letters of shapes: B samples, G samples of a group (one prompt), T denoising steps, L latent tokens
of an image, C channels of one, S text tokens, D channels of one; unpacked latents are (c, h, w).
TAPE, met on the way, does nothing unless a run is recorded or replayed.
"""

import argparse
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import reward
from reward import BadInput, publish, refusing, remove, whole


class Stopped(RuntimeError):
    """A run that cannot go on; the text is the one line that its user will read."""

# ------------------------------------------------------------------------------------------ config


@dataclass
class Config:
    # run
    model: str = "tiny"  # tiny, or a folder or hub name of FLUX.1 in diffusers format
    prompts: str = ""  # text file in UTF-8, a prompt a line; tiny has 24 of its own
    out: str = ""  # folder for all that a run writes; else the first free runs/<model>
    cache: str = ""  # folder to keep the tiny models in; else ~/.cache/grpo_flux
    device: str = "auto"  # {auto cuda npu cpu}
    dtype: str = "auto"  # of the model's arithmetic {auto fp32 bf16}; auto: bf16, on a cpu fp32
    seed: int = 0  # part of the name of every random draw [0, 4294967295]
    steps: int = 300  # GRPO steps: a rollout, its rewards, its updates [1, 1e9]
    # policy
    lora_rank: int = 0  # train adapters of this rank; 0: train all weights [0, 1024]
    lora_alpha: float = 128.0  # adapters are scaled by lora_alpha / lora_rank [1e-3, 1e5]
    kl_beta: float = 0.0  # weight of the KL divergence from the model at the start [0, 1e6]
    ema_decay: float = 0.0  # of averaged weights, for pictures and export; 0: none [0, 0.99999]
    compile: bool = False  # compile the blocks: minutes at the start, then faster
    attention: str = "native"  # diffusers' name of an attention backend
    # reward
    reward: str = "hps"  # hps, clip or package.module:function; several: hps:0.7,clip:0.3
    hps: str = ""  # file HPS_v2.1_compressed.pt
    hps_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    clip: str = ""  # file with the weights of an open_clip model, for the reward clip
    clip_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    reward_fp32: bool = False  # keep rewards in fp32 on an accelerator; else fp16 autocast
    # rollout
    num_prompts: int = 1  # prompts of a step in each process, for a whole group each [1, 1e4]
    num_generations: int = 12  # images of a prompt: G, what advantages are relative to [2, 1e4]
    height: int = 720  # pixels, a multiple of 16 [16, 8192]
    width: int = 720  # pixels, a multiple of 16 [16, 8192]
    sampling_steps: int = 16  # T; the last step is deterministic and never trained [2, 1000]
    sde_window: int = 0  # only so many steps in a row are random and trained; 0: all T-1 [0, 999]
    window_shift_every: int = 0  # steps until the window moves on; 0: drawn for each step [0, 1e9]
    sde: str = "dance"  # how the noise of a step is scaled {dance flow cps}
    eta: float = 0.3  # noise level: more explores more, and blurs more [1e-6, 10]
    shift: float = 3.0  # 3 for FLUX; above 1 spends more steps at high noise [1e-3, 1e3]
    guidance: float = 3.5  # the guidance input of FLUX.1-dev; other models have none [0, 1e3]
    init_same_noise: bool = True  # a group starts from one noise; the SDE alone sets it apart
    text_length: int = 512  # T5 tokens of a prompt; 256 for FLUX.1-schnell [1, 512]
    micro_batch: int = 2  # samples of a transformer call, as memory allows [1, 1e4]
    # update
    timestep_fraction: float = 0.6  # share of the T-1 random steps that is trained [1e-3, 1]
    gradient_accumulation_steps: int = 4  # samples of an optimizer step, a process [1, 1e8]
    learning_rate: float = 1e-5  # of AdamW [1e-12, 1]
    weight_decay: float = 1e-4  # of AdamW [0, 1]
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm [1e-9, 1e9]
    clip_range: float = 1e-4  # of the ratio; so small as log-densities are means [1e-9, 1]
    adv_clip_max: float = 5.0  # advantages are cut to +- this [1e-3, 1e3]
    gradient_checkpointing: bool = True  # compute activations again in the backward pass
    # checkpoints
    save_every: int = 20  # steps between two; the last step is always saved [1, 1e9]
    keep_last: int = 2  # how many stay [1, 1e9]
    resume: str = "auto"  # auto: from the last checkpoint in --out; none; or a folder to start from
    # pictures
    eval_every: int = 20  # steps between two image grids [1, 1e9]
    eval_images: int = 16  # ODE samples from held-out noise, scored for every grid [1, 1e5]
    # the same numbers on another device
    record: str = ""  # folder to keep every random draw and the result of every stage in
    replay: str = ""  # such a folder: take its settings and draws, and compare every stage
    compare: tuple = ()  # folders of two runs: compare rewards and pictures, and do nothing else
    deterministic: bool = False  # every run on one device gives the same bits; slower

    def __post_init__(self):
        for name, (_, comment) in COMMENTS.items():  # they hold what is allowed: see --help
            value, must = getattr(self, name), ""
            if interval := re.search(r"\[(\S+), (\S+)\]", comment):
                low, high = map(float, interval.groups())
                must = "" if low <= value <= high else f"must be from {low:.10g} to {high:.10g}"
            elif choices := re.search(r"\{(.+)\}", comment):
                must = "" if value in choices[1].split() else f"must be one of {choices[1]}"
            if name in ("height", "width") and value % 16:
                must = must or "must be a multiple of 16"
            if must:
                raise BadInput(f"--{name} {value}: {must}")
        size, samples = self.gradient_accumulation_steps, self.num_prompts * self.num_generations
        if size % self.micro_batch or samples % size:
            raise BadInput(f"--gradient_accumulation_steps {size}: must be a multiple of "
                           f"micro_batch {self.micro_batch} and divide the step's {samples} "
                           f"images (num_prompts {self.num_prompts} x {self.num_generations})")
        if self.sde_window >= self.sampling_steps:
            raise BadInput(f"--sde_window {self.sde_window}: must be below sampling_steps "
                           f"{self.sampling_steps}")
        if self.record and self.replay:
            raise BadInput(f"--record {self.record} --replay {self.replay}: must be one of them")
        reward.parse_rewards(self.reward)


# {field: (default, comment)}, read from the lines above
COMMENTS = {name: rest for name, *rest in re.findall(
    r"    (\w+): \w+ = (.*?)  # (.*)", inspect.getsource(Config))}

TINY = dict(  # what --model tiny takes instead; a flag on the command line wins over both
    steps=200, height=32, width=32, text_length=8, sampling_steps=8, eta=0.7, num_prompts=4,
    micro_batch=12, gradient_accumulation_steps=12, timestep_fraction=1.0, learning_rate=1e-4,
    gradient_checkpointing=False, eval_images=192)


# ---------------------------------------------------------------------------------------- flow SDE

def sigma_schedule(sampling_steps: int, shift: float) -> list[float]:
    """Noise levels σ of T steps: T + 1 values from 1.0, noise, down to 0.0, the image.

    t = linspace(1, 0, T + 1);  σ = s t / (1 + (s - 1) t)  (Esser et al., arXiv 2403.03206)
    """
    ts = [1 - i / sampling_steps for i in range(sampling_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in ts]


def flux_step(v, x, sigma, sigma_next, eta, sde="dance", noise=None, x_next=None):
    """One denoising step σ -> σ' of the SDE, or the log-density of a step taken earlier.

    A rectified flow mixes image and noise, x = (1 - σ) x0 + σ x1, and the model predicts
    v = x1 - x0. Following dx = v dσ down to σ = 0 makes an image without any randomness. These
    steps add noise of deviation std and correct the mean: dance and flow keep, for small steps, the
    distribution of x; cps keeps its noise level, but narrows the images. With dt = σ' - σ < 0:

      dance  score = -(x - (1 - σ) x0) / σ²;  mean = x + v dt - ½ η² score dt;  std = η√-dt
             (DanceGRPO, arXiv 2505.07818)
      flow   the same with η √(σ / (1 - σ)) for η; at σ = 1, σ' stands for the σ of 1 - σ
             (Flow-GRPO, arXiv 2505.05470)
      cps    std = σ' sin(η π/2);  mean = (1 - σ') x0 + √(σ'² - std²) x1
             (Flow-CPS, arXiv 2509.05952)

    v, x, noise, x_next: (B, L, C) fp32. sigma, sigma_next: floats or tensors (B, 1, 1). Give
    noise to take a step, x_next to score one; with eta = 0 it is the ODE's and needs neither.

    Returns x_next (B, L, C); x0 (B, L, C), the image that v points to; and logp (B,), the mean
    over L and C of log N(x_next; mean, std²), nan if eta = 0. Being a mean and not a sum, it
    makes exp(logp - logp_old) the (L C)-th root of the true ratio: hence a clip range of 1e-4.
    """
    sigma, sigma_next = (torch.as_tensor(s, dtype=x.dtype, device=x.device)
                         for s in (sigma, sigma_next))
    dt, x0, random = sigma_next - sigma, x - sigma * v, eta > 0
    if sde == "cps":
        x1, std = x + (1 - sigma) * v, sigma_next * math.sin(eta * math.pi / 2)
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1
    elif sde in ("dance", "flow"):
        if sde == "flow":
            eta = eta * (sigma / (1 - torch.where(sigma < 1, sigma, sigma_next))).sqrt()
        score = -(x - (1 - sigma) * x0) / sigma**2
        mean = x + v * dt - 0.5 * eta**2 * score * dt
        std = eta * (-dt).sqrt()
    else:
        raise ValueError(f"sde {sde!r} must be dance, flow or cps")
    if not random:
        return x + v * dt, x0, x.new_full((len(x),), float("nan"))
    if x_next is None:
        x_next = mean + std * noise  # fp32 from now on: bf16 would move the ratio by 7 clip ranges
    z = (x_next.detach() - mean) / std
    logp = (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).mean(dim=(1, 2))
    return x_next, x0, logp


def pack_latents(z):
    """(B, c, h, w) -> (B, h/2 * w/2, 4c): each 2x2 patch becomes a token, in FLUX's order."""
    B, c, h, w = z.shape
    z = z.reshape(B, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(B, (h // 2) * (w // 2), 4 * c)


def unpack_latents(x, h, w):
    """(B, h/2 * w/2, 4c) -> (B, c, h, w), the inverse; h and w count latent pixels."""
    B, _, C = x.shape
    x = x.reshape(B, h // 2, w // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C // 4, h, w)


def image_ids(h, w):
    """(h/2 * w/2, 3): the position (0, row, column) of each token, for the rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).float()


# -------------------------------------------------------------------------------------------- GRPO

def group_advantages(rewards, num_generations, eps=1e-8):
    """(B,) rewards -> (B,) advantages: (r - mean) / (std + eps) in each group of num_generations.

    Unbiased std, as in DanceGRPO. A group of equal rewards gets exactly 0: the formula alone would
    divide the rounding of its mean by eps.
    """
    r = rewards.view(-1, num_generations)  # (B / G, G)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return advantages.masked_fill(flat, 0).flatten()


def grpo_loss(logp, logp_old, advantages, clip_range, adv_clip_max):
    """PPO's clipped loss (Schulman et al., arXiv 1707.06347, section 3): mean of
    max(-A r, -A clip(r, 1 - ε, 1 + ε)) with r = exp(logp - logp_old).

    logp (now, with gradient), logp_old (of the rollout), advantages A: (B,). Returns the loss and
    a dict of scalars: the mean ratio, the largest |ratio - 1|, the share whose gradient the clip
    has made 0.
    """
    A = advantages.clamp(-adv_clip_max, adv_clip_max)
    ratio = (logp - logp_old).exp()
    free, clipped = -A * ratio, -A * ratio.clamp(1 - clip_range, 1 + clip_range)
    ratio = ratio.detach()
    stats = {"ratio": ratio.mean(), "ratio_off": (ratio - 1).abs().max(),
             "clipped": (clipped > free).float().mean()}
    return torch.maximum(free, clipped).mean(), stats


# ----------------------------------------------------------------------------------------- rollout

# sigmas (T+1,); x (B, T, L, C) before each step; x0 (B, L, C) the images; logp (B, T-1)
Trajectory = namedtuple("Trajectory", "sigmas x x0 logp")


def velocity(transformer, x, sigma, text, ids, guidance, bf16):
    """v (B, L, C) fp32, the only call of the model; from now on `predict(x, sigma, text)`.

    x (B, L, C) fp32; sigma (B, 1, 1); text: T5's tokens (B, S, D) and CLIP's vector (B, D');
    ids: image_ids (L, 3); guidance: for models that have that input.
    """
    tokens, pooled = text
    scale = x.new_full((len(x),), guidance) if transformer.config.guidance_embeds else None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        v = transformer(
            hidden_states=x, timestep=sigma.flatten(), guidance=scale, return_dict=False,
            encoder_hidden_states=tokens, pooled_projections=pooled,
            img_ids=ids, txt_ids=ids.new_zeros(tokens.shape[1], 3))
    return v[0].float()


def random_steps(step, cfg):
    """The steps of a rollout that are random and trained: all but the last, or a window of them
    that moves (MixGRPO, Li et al., arXiv 2507.21802)."""
    last, W = cfg.sampling_steps - 1, cfg.sde_window
    if not W:
        return range(last)
    places = last - W + 1
    start = randperm(places, cfg.seed, WINDOW, step)[0].item()
    if cfg.window_shift_every:
        start = step // cfg.window_shift_every % places
    return range(start, start + W)


def count_trained(window, cfg):  # of a sample; 1e-9 as 0.29 * 100 is below 29
    return max(1, int(cfg.timestep_fraction * len(window) + 1e-9))


@torch.no_grad()
def rollout(predict, x, text, keys, cfg, eta):
    """Turn noise x (B, L, C) into images, micro_batch at a time, all in fp32: a Trajectory.

    eta > 0: by the SDE, in the random steps of (step, prompt, sample), the keys that also name the
    noise of each of the B samples; 0: by the ODE, for evaluation.
    """
    T, n, shared = cfg.sampling_steps, cfg.micro_batch, {}
    window = random_steps(keys[0][0], cfg) if eta else range(0)
    sigmas = torch.tensor(sigma_schedule(T, cfg.shift), dtype=torch.float32, device=x.device)
    parts = []
    for i in range(0, len(x), n):
        z, words, states, logps = x[i:i + n], [c[i:i + n] for c in text], [], []
        alike = i and all(torch.equal(c[i:i + n], c[i - n:i]) for c in (x, *text))
        for t in range(T):
            # the shape (B, 1, 1) of the update: with the same shapes come the same bits
            sigma, sigma_next = (sigmas[t + k].expand(len(z), 1, 1) for k in (0, 1))
            eta_t, noise = eta if t in window else 0, None  # never in the last: x0 is shown
            # batches of one group are alike up to their first noise, and so is v (in all processes
            # or in none, as FSDP needs: noise differs between prompts)
            v = shared[t] if alike and t <= window.start else predict(z, sigma, words)
            if t <= window.start:
                shared[t] = v
            TAPE.note("velocity", v)
            if eta_t:  # drawn while the device is at work on v
                noise = [randn(z.shape[1:], cfg.seed, NOISE, *key, t) for key in keys[i:i + n]]
                noise = torch.stack(noise).to(z.device)
            states.append(z)
            z, x0, logp = flux_step(v, z, sigma, sigma_next, eta_t, cfg.sde, noise)
            logps.append(logp)
        parts.append((torch.stack(states, 1), x0, torch.stack(logps[:-1], 1)))
    return Trajectory(sigmas, *map(torch.cat, zip(*parts)))


@torch.no_grad()
def decode(vae, x0, grid, micro_batch):
    """Latents (B, L, C) -> images (B, 3, H, W) in [0, 1], rounded to the 8 bits of a file.

    Each image at once: a tiled decoder leaves seams, and a reward sees them.
    """
    images = []
    for part in x0.split(micro_batch):
        z = unpack_latents(part, *grid) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        images.append((image.clamp(0, 1) * 255).round() / 255)
    return torch.cat(images)


# ------------------------------------------------------------------------------------------ update

def plan_batches(advantages, cfg, device):
    """Samples and advantages (batches, micro_batch) of an update, batches per optimizer step.

    Samples of advantage 0 are left out. A batch that is not full gets fillers of advantage 0, as
    another size would give other bits; and every process runs as many batches as the one that
    needs most, as their collectives must meet.
    """
    n, size = cfg.micro_batch, cfg.gradient_accumulation_steps
    picks = [[i for i in range(s, s + size) if advantages[i] != 0]
             for s in range(0, len(advantages), size)]
    counts = torch.tensor([[math.ceil(len(pick) / n) for pick in picks]], dtype=torch.int32)
    counts, samples, signals = gather(counts.to(device)).amax(0).tolist(), [], []
    for pick, count in zip(picks, counts):
        fillers = count * n - len(pick)
        samples += pick + [0] * fillers
        signals += [advantages[i].item() for i in pick] + [0.0] * fillers
    samples, signals = torch.tensor(samples, dtype=torch.long), torch.tensor(signals)
    return samples.view(-1, n).to(device), signals.view(-1, n).to(device), counts


def update(predict, optimizer, trajectory, text, advantages, keys, cfg, reference=None):
    """One pass over a rollout, an optimizer step for every gradient_accumulation_steps samples.

    advantages (B,) on the CPU. Each sample trains a random share timestep_fraction of the random
    steps, each its own. Only the first optimizer step is on-policy: its ratio must be 1.
    reference: predict of the model that kl_beta ties the policy to. Returns the means of the
    statistics. The host waits for the device once an optimizer step.
    """
    sigmas, states, _, logp_old = trajectory
    device, window = states.device, random_steps(keys[0][0], cfg)
    K = count_trained(window, cfg)
    orders = [randperm(len(window), cfg.seed, TRAINED, *key)[:K] for key in keys]
    trained = torch.stack(orders).to(device) + window.start  # (B, K) step numbers
    samples, signals, counts = plan_batches(advantages, cfg, device)
    batches, results = zip(samples, signals), []
    for count in filter(None, counts):  # 0: its groups are flat in every process
        sums, ratio_off = torch.zeros(4, device=device), torch.zeros((), device=device)
        for _, (i, A) in zip(range(count), batches):
            words = [c[i] for c in text]
            for t in trained[i].T:  # (micro_batch,)
                sigma, sigma_next = (sigmas[t + k].view(-1, 1, 1) for k in (0, 1))
                x, x_next = states[i, t], states[i, t + 1]
                v = TAPE.note("velocity_in_update", predict(x, sigma, words))
                _, _, logp = flux_step(v, x, sigma, sigma_next, cfg.eta, cfg.sde, x_next=x_next)
                loss, stats = grpo_loss(logp, logp_old[i, t], A, cfg.clip_range, cfg.adv_clip_max)
                kl = torch.zeros((), device=device)
                if reference:
                    kl = gaussian_kl(v, reference(x, sigma, words), x, sigma, sigma_next, cfg)
                    loss = loss + cfg.kl_beta * kl
                loss = loss * len(i) / (cfg.gradient_accumulation_steps * K)
                loss.backward()
                mean = torch.stack([stats["ratio"], stats["clipped"], kl.detach()]) / (count * K)
                sums += torch.cat([loss.detach()[None], mean])
                ratio_off = torch.maximum(ratio_off, stats["ratio_off"])
        results.append(descend(optimizer, sums, ratio_off, cfg, first=not results))
    sound = [result for result in results if math.isfinite(result[-2])]  # the norm
    columns = list(zip(*sound)) or [[0.0], [1.0], [0.0], [0.0], [0.0], [0.0]]
    means = [sum(c) / len(c) for c in columns]
    names = ("loss", "ratio", "clipped", "kl", "grad_norm")
    counts = {"updates": len(sound), "skipped": len(results) - len(sound)}
    return counts | dict(zip(names, means)) | {"ratio_off": max(columns[-1])}


def gaussian_kl(v, v_reference, x, sigma, sigma_next, cfg):
    """KL divergence of two steps from x, a mean over L and C as logp is. Both have one std, so it
    is (mean - mean_reference)² / (2 std²), whichever is taken from which."""
    step = partial(flux_step, x=x, sigma=sigma, sigma_next=sigma_next, eta=cfg.eta, sde=cfg.sde)
    mean, _, top = step(v_reference, noise=torch.zeros_like(x))  # the density at its own mean
    return (top - step(v, x_next=mean)[2]).mean()


def descend(optimizer, sums, ratio_off, cfg, first):
    """The optimizer step, unless a gradient is not finite; returns loss, ratio, clipped share, KL,
    norm of the gradient, largest |ratio - 1| as floats: the one place where the host waits."""
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded by FSDP
    *values, off = torch.stack([*sums, norm, ratio_off]).tolist()
    if first and off > 1e-5:
        raise FloatingPointError(
            f"the first ratio is off by {off:.1e} though the policy is still that of the rollout: "
            "rollout and update compute different velocities (dtype, batch size, kernels)")
    if math.isfinite(values[-1]):  # one norm for all processes: they all step, or none does
        optimizer.step()
    optimizer.zero_grad()
    return *values, off


# ------------------------------------------------------------------------------------------- draws

LATENTS, NOISE, TRAINED, PROMPTS, HELD_OUT, WINDOW = range(6)  # the purpose in the name of a draw


def randn(shape, *key):
    """Standard normal fp32 numbers with a name: the same integers, the same bits on every machine.

    Drawn by numpy in float64 on the CPU: its ziggurat hardly calls the maths library, where
    processors differ in the last bit, and rounding to fp32 hides what is left.
    """
    numbers = np.random.default_rng(key).standard_normal(shape).astype(np.float32)
    return TAPE.draw(torch.from_numpy(numbers), *key)


def randperm(n, *key):
    """A random order of range(n) with a name."""
    return TAPE.draw(torch.from_numpy(np.random.default_rng(key).permutation(n)), *key)


def draw_latents(keys, shape, cfg):
    """Initial noise (B, L, C), one for each (step, prompt, sample); shape: latents (c, h, w)."""
    names = [(step, prompt, 0 if cfg.init_same_noise else i) for step, prompt, i in keys]
    return pack_latents(torch.stack([randn(shape, cfg.seed, LATENTS, *name) for name in names]))


def plan_prompts(prompts, cfg, rank, world):
    """For every step, this process's prompts as (slot, prompt).

    All processes together walk through the prompts, shuffled anew each time around: 2 processes
    with 1 prompt each see what 1 process with 2 prompts sees.
    """
    together = world * cfg.num_prompts
    rounds = range(math.ceil(cfg.steps * together / len(prompts)))
    order = torch.cat([randperm(len(prompts), cfg.seed, PROMPTS, i) for i in rounds]).tolist()
    slots = range(rank, together, world)
    return [[(slot, prompts[order[step * together + slot]]) for slot in slots]
            for step in range(cfg.steps)]


# -------------------------------------------------------------------------------------------- tape

# How far a replay may be from its record: {stage: (measure, limit in fp32, in bf16)}, in the order
# of a step. relative: the sum of |a - b| over that of |b|; mean: the mean of |a - b|.
TOLERANCES = dict(
    text=("relative", 1e-4, 3e-2),  # the rounding of 24 layers
    velocity=("relative", 1e-3, 3e-2),  # that of 57 blocks; rotary embeddings gone wrong: 8e-2
    latents=("relative", 1e-3, 3e-2),  # they add up velocities
    logp=("mean", 1e-5, 1e-5),  # a tenth of the clip range
    images=("mean", 1 / 255, 1 / 255),  # a grey level, which no eye sees
    reward=("relative", 1.5e-4, 1.5e-4),  # what ports of HPS to Ascend are held to
    advantages=("relative", 2e-2, 2e-2),  # the reward's error over its spread in a group
    velocity_in_update=("relative", 1e-3, 3e-2),  # as above, with what the optimizer has done
    loss=("mean", 1e-5, 1e-5),  # as logp, of which it is made
    grad_norm=("relative", 1e-2, 1e-1))  # the rounding of forward and backward


class Tape:
    """Keeps every draw and the result of every stage, or takes the draws from such a record and
    compares its own results with the recorded ones. Off until it is started.

    A safetensors file a step and rank. Results are STAGE.NUMBER. Draws have the names that serve
    to align DanceGRPO's code, with steps from 1: input_latents_STEP_RANK (1, c, h, w); coff_N_RANK
    (1, L, C), the run's noise N = ((STEP - 1) * samples + sample) * T + t; perms_STEP_RANK
    (samples, T-1), the order in which a sample's steps are trained.
    """

    def __init__(self):
        self.file, self.now, self.then = None, {}, {}

    def start(self, cfg, facts, device, rank, world):
        self.__init__()
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.folder = Path(cfg.record or cfg.replay)
        self.errors = torch.zeros(cfg.steps, len(TOLERANCES), 4)  # count, max, sum, relative
        if cfg.record:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                with whole(self.folder / "config.json") as path:
                    path.write_text(json.dumps(facts, indent=1))
        if cfg.replay:
            last, other = self.path(cfg.steps - 1, rank), self.path(0, world)
            if not last.is_file() or other.is_file():
                raise BadInput(f"--replay {cfg.replay}: must be a record of {world} processes and "
                               f"of --steps {cfg.steps} or more")
            then = json.loads((self.folder / "config.json").read_text())
            self.exact = then | {name: facts[name] for name in ("deterministic", "machine")} == then
            self.exact = self.exact and cfg.deterministic

    def path(self, step, rank):
        return self.folder / f"step_{step + 1:05d}_rank_{rank}.safetensors"

    def open(self, step):
        """The begin of a step."""
        if self.cfg.record or self.cfg.replay:
            self.step, self.file, self.now = step, self.path(step, self.rank), {}
            self.then = load_file(self.file) if self.cfg.replay else {}

    def draw(self, fresh, seed, purpose, step, slot=0, sample=0, t=0):
        """A draw of the loop: fresh, or the recorded one in its place."""
        if not self.file or purpose not in (LATENTS, NOISE, TRAINED):
            return fresh
        samples = self.cfg.num_prompts * self.cfg.num_generations
        row = slot // self.world * self.cfg.num_generations + sample  # of this process's samples
        name, count = {
            LATENTS: (f"input_latents_{step + 1}_{self.rank}" + f"_{row}" * (row > 0), 1),
            NOISE: (f"coff_{(step * samples + row) * self.cfg.sampling_steps + t}_{self.rank}", 1),
            TRAINED: (f"perms_{step + 1}_{self.rank}", samples)}[purpose]
        if self.cfg.record:
            self.now.setdefault(name, fresh.new_zeros(count, *fresh.shape))[row % count] = fresh
            return fresh
        if name not in self.then or self.then[name].shape != (count, *fresh.shape):
            raise BadInput(f"--replay {self.folder}: must hold {name} {(count, *fresh.shape)}")
        return self.then[name][row % count].to(fresh.dtype)

    def note(self, stage, *results):
        """Results of a stage. Returns the first; of images the recorded one, so that the reward
        and what follows from it are compared on the same pictures."""
        if not self.file:
            return results[0]
        for result in results:
            number = sum(name.startswith(f"{stage}.") for name in self.now)
            value = torch.as_tensor(result).detach().to("cpu", torch.float32, copy=True)
            self.now[f"{stage}.{number}"] = value.contiguous()
        if stage == "images" and "images.0" in self.then:
            return self.then["images.0"].to(results[0].device)
        return results[0]

    def close(self):
        """The end of a step: write it down, or compare it."""
        if self.file and self.cfg.record:
            with whole(self.file) as path:
                save_file(self.now, path)
        for name, theirs in self.then.items():
            stage, ours = name.split(".")[0], self.now.get(name)
            if stage in TOLERANCES:
                alike = ours is not None and ours.shape == theirs.shape
                error = (ours - theirs).abs() if alike else torch.full(theirs.shape, math.inf)
                relative = error.sum() / theirs.abs().sum().clamp(min=1e-30)
                row = self.errors[self.step, list(TOLERANCES).index(stage)]
                row[::2] += torch.tensor([error.numel(), error.sum()])
                row[1::2] = torch.maximum(row[1::2], torch.stack([error.max(), relative]))
        self.file = None

    def verdict(self):
        """The table of a replay, over all processes, as text; its last line is OK or OFF."""
        errors = gather(self.errors[None].to(self.device)).cpu()  # (ranks, steps, stages, 4)
        stages, column = list(TOLERANCES), 2 if self.cfg.dtype == "bf16" else 1
        limits = torch.tensor([0.0 if self.exact else row[column] for row in TOLERANCES.values()])
        by_mean = torch.tensor([measure == "mean" for measure, *_ in TOLERANCES.values()])
        held = torch.where(by_mean, errors[..., 2] / errors[..., 0], errors[..., 3])
        off = ~(held <= limits) & (errors[..., 0] > 0)  # nan is off
        lines = ["stage                     count  max error  mean error    relative    allowed"]
        for i, stage in enumerate(stages):
            rows = errors[:, :, i].flatten(0, 1)  # (ranks * steps, 4)
            (count, _, total, _), (_, most, _, relative) = rows.sum(0), rows.amax(0)
            lines.append(f"{stage:18}{count:13.0f}{most:11.1e}{total / count:12.1e}{relative:12.1e}"
                         f"{limits[i]:11.1e} {TOLERANCES[stage][0]:9}"
                         f"{'OFF' if off[..., i].any() else 'OK' if count else 'not recorded'}")
        for step, i, rank in off.permute(1, 2, 0).nonzero()[:1]:  # in the order of the run
            lines.append(f"first OFF: step {step + 1}, rank {rank}, stage {stages[i]}; what comes "
                         "after it is noise")
        word = "OFF" if off.any() else "OK" if errors.any() else "without results to compare"
        return "\n".join([*lines, f"replay {word}"])


TAPE = Tape()


# --------------------------------------------------------------------------------------- processes

def start(name):
    """Join the other processes of torchrun, if there are any: device, rank, world size."""
    device = reward.select_device(name)
    torch.get_device_module(device).set_device(device)
    if "RANK" not in os.environ:
        return device, 0, 1
    dist.init_process_group(dist.get_default_backend_for_device(device))
    return device, dist.get_rank(), dist.get_world_size()


def gather(x):
    """(n, ...) of every process -> (world * n, ...) in the order of their ranks."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def clock(device):
    torch.get_device_module(device).synchronize()  # else it is still at work
    return time.perf_counter()


# ------------------------------------------------------------------------------------------ checks

# Flags by themselves are checked by Config; files here, before any model is read.

def check_files(cfg):
    """Refuse what cannot work; returns the prompts, and the checkpoint to go on from or None."""
    tiny, rewards = cfg.model == "tiny", reward.parse_rewards(cfg.reward)
    if not tiny:
        check_model(cfg.model)
    for name in rewards:
        path = getattr(cfg, name, None)  # None: a function of the user's
        if path is None:
            reward.load_reward(name)
        elif (path or not tiny) and not os.path.isfile(path):
            raise BadInput(f"--{name} {path or '(not given)'}: must be the file with its weights")
    if cfg.resume == "none" and cfg.out and (Path(cfg.out) / "metrics.jsonl").exists():
        raise BadInput(f"--out {cfg.out}: holds a run already; must be a folder of its own")
    if cfg.record and (Path(cfg.record) / "config.json").exists():
        raise BadInput(f"--record {cfg.record}: holds a record already; must be a new folder")
    if not tiny and not cfg.prompts:
        raise BadInput("--prompts (not given): must be a text file with one prompt a line")
    prompts = reward.read_prompts(cfg.prompts) if cfg.prompts else reward.TINY_PROMPTS
    checkpoint = find_checkpoint(cfg)
    if cfg.attention != "native":
        check_attention(cfg.attention)
    for name, folder in dict(cache=cache_folder(cfg), record=cfg.record).items():
        if folder:
            with refusing(f"--{name} {folder}: must be a folder that can be written to"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
    return prompts, checkpoint


def check_model(model):
    """Refuse a folder that is not FLUX.1, or has a part missing or cut off. Reads no weights."""
    folder = Path(model)
    if not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", model):
        return  # a name on the hub
    with refusing(f"--model {model}: must be tiny, a folder with the model_index.json of FLUX.1, "
                  "or a name on the hub such as black-forest-labs/FLUX.1-dev"):
        index = json.loads((folder / "model_index.json").read_text())
        if index["_class_name"] != "FluxPipeline":
            raise ValueError(f"this is a {index['_class_name']}")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        with refusing(f"--model {model}: its folder {part} must hold a config.json and whole "
                      ".safetensors files"):
            json.loads((folder / part / "config.json").read_text())
            shards = set(folder.glob(f"{part}/*.safetensors"))
            for index in folder.glob(f"{part}/*.safetensors.index.json"):
                names = json.loads(index.read_text())["weight_map"].values()
                shards |= {folder / part / name for name in names}
            check_weights(shards)
    for part in ("tokenizer", "tokenizer_2"):
        if not (folder / part).is_dir():
            raise BadInput(f"--model {model}: must hold a folder {part}")


def check_weights(files):
    """Refuse them unless all are there, and are as long as their headers say."""
    if not files:
        raise FileNotFoundError("there is none")
    for file in sorted(files):
        with refusing(file.name), safe_open(file, "pt"):
            pass


def check_attention(name):
    """Refuse an attention backend that diffusers does not know or cannot use here."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        probe = FluxTransformer2DModel(num_layers=1, num_single_layers=0, num_attention_heads=1)
    with refusing(f"--attention {name}: must be a backend that diffusers can use here"):
        probe.set_attention_backend(name)


def checkpoints(out):
    """The folders of a run's checkpoints, from first to last."""
    return sorted(Path(out, "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))


def find_checkpoint(cfg):
    """The folder to go on from, if there is one; its run must have had the same kind of policy."""
    there, asked = checkpoints(cfg.out) if cfg.out else [], cfg.resume not in ("auto", "none")
    if cfg.resume == "none" or not there and not asked:
        return None
    folder = there[-1] if there else Path(cfg.resume)
    if there and asked and Path(cfg.resume).resolve() in [path.resolve() for path in there[:-1]]:
        raise BadInput(f"--resume {cfg.resume}: its run has gone on to {folder}; must be that one, "
                       "or another --out")
    with refusing(f"--resume {cfg.resume}: must be auto, none, or a whole folder such as "
                  f"RUN/checkpoints/step_00020, but {folder} is not"):
        step = int(folder.name.removeprefix("step_"))
        check_weights(set(folder.glob("*.safetensors")))
        then = json.loads((folder.parent.parent / "config.json").read_text())
        later = then.keys() - COMMENTS.keys() - {"machine", "versions"}
    if later:
        raise BadInput(f"--resume {folder}: must be from this version of grpo_flux.py, but its run "
                       f"was set {', '.join(sorted(later))}")
    for name in ("model", "lora_rank", "lora_alpha", "seed"):
        ours, theirs = getattr(cfg, name), then.get(name)
        if ours != theirs and (name != "model" or Path(ours).name != Path(str(theirs)).name):
            raise BadInput(f"--{name} {ours}: must be {theirs}, as in the run of {folder}")
    if cfg.ema_decay and not then.get("ema_decay"):
        raise BadInput(f"--ema_decay {cfg.ema_decay}: must be 0, as {folder} holds no average")
    if cfg.steps < step:
        raise BadInput(f"--steps {cfg.steps}: must be at least {step}, where {folder} goes on from")
    return folder


# ------------------------------------------------------------------------------------------ models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cache_folder(cfg):
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(cfg.cache) if cfg.cache else home / "grpo_flux"


def prepare(cfg, device):
    """cfg with every path filled in, and the rewards as {name: (weight, function)}."""
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bf16" if reward.is_accelerator(device) else "fp32")
    if cfg.model == "tiny":
        folder = tiny_models(cfg)
        cfg = replace(cfg, model=str(folder / "flux"))
        for name in ("hps", "clip"):
            if not getattr(cfg, name):
                cfg = replace(cfg, **{name: str(folder / "hps" / f"{name}.pt"),
                                      f"{name}_arch": str(folder / "hps" / "tiny-clip.json")})
    if not read_config(cfg)["guidance_embeds"]:  # FLUX.1-schnell knows no longer texts
        cfg = replace(cfg, text_length=min(cfg.text_length, 256))
    rewards = {}
    for name, weight in reward.parse_rewards(cfg.reward).items():
        source = getattr(cfg, name, ""), getattr(cfg, f"{name}_arch", "")
        rewards[name] = weight, reward.load_reward(name, *source, device, cfg.reward_fp32)
    return cfg, rewards


@torch.no_grad()
def encode_prompts(cfg, prompts, device):
    """{prompt: file with T5's tokens (S, D) and CLIP's vector (D')}. A prompt is encoded once and
    kept in the cache; the encoders are freed again."""
    from diffusers import FluxPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # else what is cut from a prompt is printed as it is
    index = Path(cfg.model) / "model_index.json"
    about = cfg.model, index.exists() and index.stat().st_mtime, cfg.text_length, cfg.dtype
    names = (hashlib.sha256(f"{about} {prompt}".encode()).hexdigest()[:32] for prompt in prompts)
    folder = cache_folder(cfg) / "text"
    files = {prompt: folder / f"{name}.safetensors" for prompt, name in zip(prompts, names)}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # one process works, the others find it done
        if missing := [prompt for prompt in prompts if not files[prompt].exists()]:
            pipe = FluxPipeline.from_pretrained(
                cfg.model, transformer=None, vae=None, dtype=DTYPES[cfg.dtype],
                use_safetensors=True).to(device)
            lengths = map(len, pipe.tokenizer_2(missing, truncation=False).input_ids)
            if long := sum(length > cfg.text_length for length in lengths):
                print(f"{long} of {len(missing)} new prompts have more than {cfg.text_length} "
                      "tokens and are cut")
        for prompt in missing:  # one by one: no prompt's bits depend on its neighbours
            tokens, pooled, _ = pipe.encode_prompt(
                prompt, None, max_sequence_length=cfg.text_length)
            with whole(files[prompt]) as path:
                save_file(dict(tokens=tokens[0].cpu(), pooled=pooled[0].cpu()), path)
    return files


def batch_text(encoded, prompts, device):  # tokens (B, S, D), vectors (B, D')
    texts = {prompt: load_file(encoded[prompt]) for prompt in dict.fromkeys(prompts)}
    return tuple(torch.stack([texts[prompt][name] for prompt in prompts]).to(device)
                 for name in ("tokens", "pooled"))


# the linear layers that get adapters: those of attention and feed-forward in every block
ADAPTED = (r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
           r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)")


def read_config(cfg):
    """What the transformer's config.json says, before anything is loaded."""
    from diffusers import FluxTransformer2DModel

    with refusing(f"--model {cfg.model}: cannot be read; accept the licence on its page, then "
                  "`hf auth login`, or give a folder"):
        return FluxTransformer2DModel.load_config(cfg.model, subfolder="transformer")


def load_vae(cfg, device):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        cfg.model, subfolder="vae", dtype=DTYPES[cfg.dtype], use_safetensors=True)
    return vae.to(device).requires_grad_(False)


def load_transformer(cfg, device):
    """The policy: all weights in fp32, or with LoRA frozen ones in cfg.dtype and adapters in fp32.

    With several processes it is sharded by FSDP2: each keeps a share of the weights, gathers a
    block to compute it, and gets the mean of all gradients. One process reads the weights.
    """
    from diffusers import FluxTransformer2DModel
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    dtype, kind = DTYPES[cfg.dtype] if cfg.lora_rank else torch.float32, FluxTransformer2DModel
    if not dist.is_initialized() or dist.get_rank() == 0:
        loaded = prepare_policy(kind.from_pretrained(
            cfg.model, subfolder="transformer", dtype=dtype, use_safetensors=True), cfg)
    if not dist.is_initialized():
        return loaded.to(device)
    with torch.device("meta"):
        transformer = prepare_policy(kind.from_config(read_config(cfg)).to(dtype), cfg)
    shard(transformer, device, DTYPES[cfg.dtype])
    transformer.to_empty(device=device)
    weights = loaded.state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(transformer, weights, options=options)
    return transformer


def prepare_policy(transformer, cfg):
    """Switch on what the flags ask for; it changes no number of the model."""
    if cfg.lora_rank:
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            transformer.add_adapter(LoraConfig(  # which freezes all else
                r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=ADAPTED))
        for p in trained_parameters(transformer).values():
            p.data = p.data.float()
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if cfg.attention != "native":
        transformer.set_attention_backend(cfg.attention)
    if cfg.compile:
        transformer.compile_repeated_blocks()
    return transformer


def trained_parameters(transformer):
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def shard(transformer, device, dtype):
    """FSDP2 over all processes; on several machines each holds all shards, and averages gradients
    with the others."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    sizes = (world // local, local) if local and world > local else (world,)
    names = ("replicate", "shard")[-len(sizes):]
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # read only here
    for part in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
    fully_shard(transformer, mesh=mesh, mp_policy=precision)
    transformer.set_reshard_after_forward(False)  # gather a block once for all calls up to the
    transformer.set_reshard_after_backward(False)  # next optimizer step, not at each of them


def let_go(transformer):
    """Forget the gathered weights: the shards have changed."""
    from torch.distributed.fsdp import FSDPModule

    for part in transformer.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


# parameters: the trained ones by name; predict; reference, if kl_beta asks for it: predict with the
# weights of the start; average, if ema_decay does: moving averages of the parameters
Policy = namedtuple("Policy", "transformer parameters predict reference optimizer average")


def make_policy(cfg, grid, device):
    """The policy at its start, and all that belongs to it; grid: (h, w) of its latents."""
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    transformer = load_transformer(cfg, device)
    inputs = dict(ids=image_ids(*grid).to(device), guidance=cfg.guidance, bf16=cfg.dtype == "bf16")
    predict, parameters = partial(velocity, transformer, **inputs), trained_parameters(transformer)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
        fused=None if reward.is_accelerator(device) else True)  # there torch's choice is good
    optimizer.register_step_post_hook(lambda *_: let_go(transformer))
    average = {name: p.detach().clone() for name, p in parameters.items() if cfg.ema_decay}
    frozen = None if cfg.lora_rank or not cfg.kl_beta else partial(
        velocity, load_transformer(cfg, device).requires_grad_(False), **inputs)

    @torch.no_grad()
    def reference(*batch):
        if frozen:
            return frozen(*batch)
        scale_lora_layers(transformer, 0.0)
        v = predict(*batch)
        unscale_lora_layers(transformer, 0.0)  # to what they were
        return v

    reference = reference if cfg.kl_beta else None
    return Policy(transformer, parameters, predict, reference, optimizer, average)


def local_parts(tensors):  # what this process holds of them
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def follow(policy, decay):
    """Move the average towards the weights: mean += (1 - decay) (weight - mean)."""
    weights = local_parts(p.detach() for p in policy.parameters.values())
    torch._foreach_lerp_(local_parts(policy.average.values()), weights, 1 - decay)


@contextmanager
def averaged(policy):
    """The moving average, if there is one, in the place of the trained weights for a while."""
    def swap():
        let_go(policy.transformer)
        for p, mean in zip(parts, local_parts(policy.average.values())):
            kept = p.clone()
            p.copy_(mean)
            mean.copy_(kept)

    parts = local_parts(p.detach() for p in policy.parameters.values())
    if policy.average:
        swap()
    yield
    if policy.average:
        swap()


def export(transformer, cfg, folder):
    """Write what diffusers reads: a LoRA for FluxPipeline.load_lora_weights, or the transformer for
    FluxTransformer2DModel.from_pretrained."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from huggingface_hub import save_torch_state_dict
    from peft.utils import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True,
                               ignore_frozen_params=bool(cfg.lora_rank))
    weights = get_model_state_dict(transformer, options=options)
    if not weights:  # not on rank 0
        return
    with whole(folder) as work:
        if cfg.lora_rank:
            about = transformer.peft_config["default"].to_dict()  # alpha, which is in no weight
            FluxPipeline.save_lora_weights(
                work, get_peft_model_state_dict(transformer, weights),
                transformer_lora_adapter_metadata=about)
        else:
            with torch.device("meta"):  # FSDP has renamed the class of the trained one
                config = FluxTransformer2DModel.from_config(transformer.config)
            config.save_config(work / "transformer")
            save_torch_state_dict(
                weights, work / "transformer", max_shard_size="10GB",
                filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


# ------------------------------------------------------------------------------------- checkpoints

def training_state(policy):
    """What a run needs to go on as if it had not stopped, on the CPU; of each weight a shard. And
    the optimizer's settings, which come from the flags."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
    weights, optimizer = get_state_dict(policy.transformer, policy.optimizer, options=options)
    average = {name: mean.cpu() for name, mean in policy.average.items()}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # with one process it is
    state = dict(weights=weights, moments=optimizer["state"], average=average)
    return state, optimizer["param_groups"]


@cache
def host_group():
    """Processes that agree about files by way of their CPUs: not all that takes can hccl."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def save_checkpoint(folder, policy, keep_last, rank):
    """Written under another name until all of it is there. A checkpoint is safetensors files, as
    anything else in torch would be pickles, which can run code."""
    import torch.distributed.checkpoint as dcp

    work = folder.with_name(f"writing-{folder.name}")
    try:
        dcp.save(training_state(policy)[0], process_group=host_group(),
                 storage_writer=dcp.HuggingFaceStorageWriter(work, save_distributed=True),
                 no_dist=not dist.is_initialized())
    except BaseException:
        remove(work)
        raise
    if rank == 0:
        publish(work, folder)
        thin_out(folder.parent.parent, keep_last)


def thin_out(out, keep_last):
    """Remove all but the last checkpoints, each in one piece."""
    for folder in checkpoints(out)[:-keep_last]:
        work = folder.with_name(f"old-{folder.name}")
        os.rename(folder, work)
        remove(work)


def load_checkpoint(folder, policy):
    """Put a checkpoint into place, whatever number of processes wrote it; returns its step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state, groups = training_state(policy)
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder),
                 process_group=host_group(), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise BadInput(f"--resume {folder}: must hold this policy ({cause})") from None
    moments = dict(state=state["moments"], param_groups=groups)
    set_state_dict(policy.transformer, policy.optimizer, model_state_dict=state["weights"],
                   optim_state_dict=moments, options=StateDictOptions(strict=False))
    for name, mean in policy.average.items():
        mean.copy_(state["average"][name])
    return int(folder.name.removeprefix("step_"))


# --------------------------------------------------------------------------------------- tiny FLUX

def tiny_models(cfg):
    """The folder of the tiny models. The first process builds them, as transformers saves nothing
    in another one; its name changes with the code that builds."""
    recipe = (build_tiny, build_tiny_vae, build_tiny_text, build_tiny_flux, reward.build_tiny_hps,
              reward.draw, reward.fit)
    text = "".join(map(inspect.getsource, recipe)) + str((reward.COLORS, reward.TINY_CLIP))
    folder = cache_folder(cfg) / f"tiny-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if int(os.environ.get("RANK", 0)) == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock"):
            if not folder.exists():
                with whole(folder) as work:
                    build_tiny(work)
    if dist.is_initialized():
        dist.barrier()
    return folder


def build_tiny(folder):
    """A FLUX.1 in miniature, in diffusers format, with 24 prompts half learnt; and a tiny HPS."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    print("building the tiny models, once, a minute or two", flush=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = reward.tiny_dataset(4800)
        vae, scheduler = build_tiny_vae(images), FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = FluxPipeline(scheduler, vae=vae, transformer=None, **build_tiny_text())
        pipe.register_modules(transformer=build_tiny_flux(pipe, images, labels))
        pipe.save_pretrained(folder / "flux")
        reward.build_tiny_hps(folder / "hps", images, labels)


def build_tiny_vae(images):
    """AutoencoderKL, 0.23 M parameters: 32x32 pixels <-> latents (4, 8, 8)."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)

    def loss(pick):
        z = vae.encode(images[pick] * 2 - 1).latent_dist.mean
        # noise on the latents: what is near a good latent must decode to a good picture
        seen = vae.decode(z + 0.1 * torch.randn_like(z)).sample
        return F.mse_loss(seen, images[pick] * 2 - 1) + 1e-3 * z.square().mean()

    reward.fit(vae, loss, len(images), steps=400, batch=32, rate=5e-3, title="tiny VAE  (1/3)")
    with torch.no_grad():
        z = vae.encode(images[:1024] * 2 - 1).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    return vae.requires_grad_(False)


def build_tiny_text():
    """FLUX's two text encoders with random weights: enough to tell 24 prompts apart."""
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


def build_tiny_flux(pipe, images, labels):
    """FluxTransformer2DModel, 1.85 M parameters, by flow matching: v = noise - image at random σ.
    Stopped early on purpose: GRPO needs something to improve."""
    from diffusers import FluxTransformer2DModel

    cfg, vae = Config(**TINY), pipe.vae
    with torch.no_grad():
        length, prompts = cfg.text_length, reward.TINY_PROMPTS
        *text, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
        z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(256)])
        z = pack_latents((z - vae.config.shift_factor) * vae.config.scaling_factor)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12))

    def loss(pick):
        t = torch.randn(len(pick), 1, 1).sigmoid()
        sigma, noise = cfg.shift * t / (1 + (cfg.shift - 1) * t), torch.randn_like(z[pick])
        x, words = (1 - sigma) * z[pick] + sigma * noise, [c[labels[pick]] for c in text]
        v = velocity(transformer, x, sigma, words, image_ids(8, 8), cfg.guidance, bf16=False)
        return F.mse_loss(v, noise - z[pick])

    reward.fit(transformer, loss, len(z), steps=80, batch=64, rate=2e-3, title="tiny FLUX (2/3)")
    return transformer


# -------------------------------------------------------------------------------- what a run shows

Evaluation = namedtuple("Evaluation", "images prompts rewards accuracy")


def evaluate(predict, vae, rewards, encoded, prompts, shape, cfg, device, rank, world):
    """ODE samples of the same prompts and noise every time, in every run, with their rewards.

    In the tiny world also the share of images that HPS takes for their own prompt. Processes
    share the work.
    """
    share = math.ceil(cfg.eval_images / world)
    mine = [i % cfg.eval_images for i in range(rank * share, (rank + 1) * share)]
    names = [prompts[i % len(prompts)] for i in mine]
    x = pack_latents(torch.stack([randn(shape, 0, HELD_OUT, i) for i in mine])).to(device)
    trajectory = rollout(predict, x, batch_text(encoded, names, device), None, cfg, eta=0)
    images = decode(vae, trajectory.x0, shape[1:], cfg.micro_batch)
    scores = score(rewards, images, names, "an evaluation")
    total = sum(weight * scores[name] for name, (weight, _) in rewards.items())
    right = torch.full_like(total, float("nan"))
    if "hps" in rewards and set(names) <= set(reward.TINY_PROMPTS):
        right = reward.tiny_accuracy(rewards["hps"][1], images, names)
    images, total, right = (gather(c.to(device))[:cfg.eval_images].cpu()
                            for c in (images, total, right))
    names = [prompts[i % len(prompts)] for i in range(cfg.eval_images)]
    return Evaluation(images, names, total, right.float().mean().item())


def headline(held_out, accuracy=-1.0, **_):
    right = f", prompt accuracy {accuracy:.1%}" if accuracy >= 0 else ""
    return f"held-out reward {held_out:.3f}{right}"


def show(out, step, seen, history, cfg, board):
    """The image grid of an evaluation, and the curves so far."""
    path = out / "images" / f"step_{step:05d}.png"
    draw_grid(path, step, seen)
    if board:
        board.add_image("images", np.asarray(Image.open(path)), step, dataformats="HWC")
    held_out = [(line["step"] - 1, line["held_out"]) for line in history
                if (line["step"] - 1) % cfg.eval_every == 0]
    draw_curves(out / "reward.png", {
        "rollouts (SDE)": [(line["step"], line["reward"]) for line in history],
        "held-out noise (ODE)": [*held_out, (step, seen.rewards.mean().item())]})
    gc.collect()  # figures are cycles, and large


def draw_grid(path, step, e, most=24):
    """The images of an evaluation, prompt and reward under each."""
    from matplotlib.figure import Figure

    count = min(most, len(e.images))
    columns, rows = min(count, 4), math.ceil(count / 4)
    width = max(1.35 * columns, 5.5)  # room for the title
    figure = Figure((width, 1.75 * rows + 0.5), layout="constrained", dpi=100)
    text = headline(e.rewards.mean(), e.accuracy)
    figure.suptitle(f"step {step}: {text}", parse_math=False)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if i < count:
            axes.imshow(e.images[i].permute(1, 2, 0).numpy())
            text = f"{reward.plain(e.prompts[i][:20])}\n{e.rewards[i]:.3f}"
            axes.set_title(text, y=-0.38, fontsize=8, parse_math=False)
    warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks become boxes
    with whole(path) as work:
        figure.savefig(work)


def side_by_side(path, pictures):
    parts = [Image.open(picture).convert("RGB") for picture in pictures]
    size, left = (sum(part.width for part in parts), max(part.height for part in parts)), 0
    sheet = Image.new("RGB", size, "white")
    for part in parts:
        sheet.paste(part, (left, (sheet.height - part.height) // 2))
        left += part.width
    with whole(path) as work:
        sheet.save(work)


def draw_curves(path, curves, grids=()):
    """Rewards {label: [(step, reward), ...]} and, below them, two image files side by side."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure((12, 10) if grids else (5.5, 4.5), layout="constrained", dpi=100)
    panels = figure.subplot_mosaic([["top", "top"], *([[0, 1]] if grids else [])])
    for label, points in curves.items():
        panels["top"].plot(*zip(*points), "o-" if len(points) < 30 else "-", label=label)
    panels["top"].set(xlabel="GRPO step", ylabel="reward")
    panels["top"].legend(frameon=False)
    for i, (label, grid) in enumerate(zip(curves, grids)):
        panels[i].set_title(label, parse_math=False)
        panels[i].imshow(imread(grid))
        panels[i].axis("off")
    with whole(path) as work:
        figure.savefig(work)


def describe_run(cfg, device):
    """Every setting, and of the machine what decides on the bits: config.json."""
    packages = "torch diffusers transformers open_clip_torch numpy pillow".split()
    versions = {package: version(package) for package in packages}
    return asdict(cfg) | {"machine": reward.describe(device), "versions": versions}


@contextmanager
def run_folder(cfg, rank):
    """--out, or the first free one of runs/MODEL, runs/MODEL-2, ...: ours alone until the end.
    What stops the run ends in one line that says where the same command goes on from."""
    ends, model = ("", *(f"-{i}" for i in range(2, 10_000))), Path(cfg.model).name
    free = (name for name in (f"runs/{model}{end}" for end in ends)
            if not Path(name, "config.json").exists())
    out = lock = None
    for out in map(Path, ([cfg.out] if cfg.out else free) if rank == 0 else ()):
        with refusing(f"--out {out}: must be a folder that can be written to, and that no other "
                      "run is at work in"):
            out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(out / "lock", timeout=0)
            try:
                lock.acquire()
                break
            except Timeout:
                if cfg.out:
                    raise
    if dist.is_initialized():
        dist.broadcast_object_list(found := [out], group=host_group())
        out = found[0]
    try:
        yield out
    except BaseException as error:
        there, cause = checkpoints(out), name_cause(error, out)
        if isinstance(error, BadInput):
            rest = f"; the last checkpoint is {there[-1]}" if there else ""
            raise BadInput(f"{error}{rest}") from None
        if cause is None:
            raise
        same = "the same command" if cfg.out else f"the same command with --out {out}"
        rest = f"; {same} goes on from {there[-1]}" if there else ""
        raise Stopped(f"{cause}{rest}") from error
    finally:
        if lock:
            lock.release()


def name_cause(error, out):
    """One line for what stopped a run; None for what deserves a traceback."""
    if hasattr(error, "failures"):  # torch's CheckpointException, {rank: (error, traceback)}
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: a lower --micro_batch needs less, and so does --lora_rank ({error})"
    if isinstance(error, (OSError, SafetensorError)):
        return f"{error}; this run writes to --out {out}"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return f"another process has ended, see its message ({str(error).strip()[:80]})"
    return str(error) if isinstance(error, FloatingPointError) else None


def open_run(out, facts, checkpoint, last):
    """Make the folder and config.json; returns the lines of metrics.jsonl up to step `last`, of the
    run that the checkpoint is from."""
    for name in ("images", "checkpoints"):
        (out / name).mkdir(exist_ok=True)
    for half in [*out.glob("**/writing-*"), *out.glob("**/old-*")]:  # of a run that was killed
        remove(half)
    thin_out(out, facts["keep_last"])
    source = checkpoint.parent.parent if checkpoint else out
    if checkpoint:
        then = json.loads((source / "config.json").read_text())
        changes = [f"{name} {then[name]} -> {facts[name]}" for name in COMMENTS
                   if name in then and then[name] != facts[name] and name not in OWN]
        print(f"going on from {checkpoint}" + "".join(f", {change}" for change in changes))
    start = "images/step_00000.png"
    if source.resolve() != out.resolve() and (source / start).exists():
        with whole(out / start) as path:
            shutil.copy(source / start, path)
    with whole(out / "config.json") as path:
        path.write_text(json.dumps(facts, indent=1))
    history = read_metrics(source / "metrics.jsonl", last)
    with whole(out / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in history))
    return history


def read_metrics(path, last):
    """The lines up to step `last`; what is after them, or cut off, will be written again."""
    history = []
    for text in path.read_text().splitlines() if last and path.exists() else ():
        try:
            history.append(json.loads(text))
        except ValueError:
            break
    return [line for line in history if line["step"] <= last]


def write_line(out, line, board):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    for name, value in line.items() if board else ():
        board.add_scalar(name, value, line["step"])


def describe_step(cfg, policy, grid, world):
    """What a step is and costs, as text: counted from shapes, without computing anything."""
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    G, T, L, S = cfg.num_generations, cfg.sampling_steps, grid[0] * grid[1] // 4, cfg.text_length
    K = count_trained(random_steps(0, cfg), cfg)
    config, images = policy.transformer.config, cfg.num_prompts * G  # of a process
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        FluxTransformer2DModel.from_config(config)(
            torch.empty(1, L, config.in_channels), torch.empty(1, S, config.joint_attention_dim),
            torch.empty(1, config.pooled_projection_dim), torch.empty(1), torch.empty(L, 3),
            torch.empty(S, 3), torch.empty(1) if config.guidance_embeds else None)
    call = counter.get_total_flops() / 1e12
    # backward: to the inputs as much as forward, to the weights again, unless they are frozen
    trained = 2 + (not cfg.lora_rank) + cfg.gradient_checkpointing + bool(cfg.kl_beta)
    weights = local_parts(policy.transformer.parameters())
    moving = local_parts(policy.parameters.values())
    copies = 3 + bool(cfg.ema_decay)  # gradients, two moments, the average
    held = sum(p.nbytes for p in weights) + copies * sum(p.nbytes for p in moving)
    updates = images // cfg.gradient_accumulation_steps
    return (
        f"a step: {world * cfg.num_prompts} prompts x {G} images; {K} of {T} steps trained, "
        f"{world * images * K} transitions\n"
        f"updates: {updates}, {1 / updates:.0%} of the transitions on-policy\n"
        f"an image of {L} tokens with {S} of text: {call:.3g} TFLOP a call of the transformer, "
        f"{call * (T + K * trained):.3g} in all\n"
        f"weights, gradients, moments: {held / 2**30:.3g} GiB a process; activations come on top")


def open_board(out, first):
    """TensorBoard's writer, if it is installed: the same numbers and grids as in the files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard", purge_step=first + 1)


def summarize(step, rewards, scores, stats, cfg, device):
    """A step's line of metrics.jsonl: means over all processes; of ratio_off the largest."""
    total = sum(weight * scores[name] for name, (weight, _) in rewards.items())
    spread = total.view(-1, cfg.num_generations).std(1)  # (groups,)
    values = dict(reward=total.mean(), spread=spread.mean(), flat=(spread == 0).float().mean())
    values |= {name: r.mean() for name, r in scores.items() if len(scores) > 1} | stats
    table = gather(torch.tensor([[float(v) for v in values.values()]], device=device)).cpu()
    line = dict(zip(values, table.mean(0).tolist())) | {"ratio_off": table[:, -1].max().item()}
    return {"step": step} | {name: float(f"{value:.7g}") for name, value in line.items()}


def find_trouble(history, patience=20):
    """What the last lines of metrics.jsonl warn of, as text, or None."""
    recent = history[-patience:]
    if len(history) % patience == 0 and all(line["flat"] == 1 for line in recent):
        return (f"in {patience} steps all images of a group scored the same: the reward does not "
                "tell them apart, and nothing is learnt")
    rewards = [line["reward"] for line in history[-5 * patience:]]
    if len(rewards) < 5 * patience or len(history) % patience:
        return None
    then, now = np.array_split(np.array(rewards), 2)
    error = math.sqrt(then.var() / len(then) + now.var() / len(now))
    if now.mean() < then.mean() - 3 * error:
        return (f"the reward has fallen for {len(rewards)} steps, from {then.mean():.4f} to "
                f"{now.mean():.4f}: a lower --learning_rate or a --kl_beta may help")
    return None


def compare_runs(*folders):
    """Print reward and loss of two runs side by side and draw compare.png into the second; True
    if the mean rewards of every ten steps, and of all, are within 5 % of each other."""
    with refusing(f"--compare {' '.join(folders)}: must be the folders of two runs with steps in "
                  "common"):
        files = [(Path(folder) / "metrics.jsonl").read_text().splitlines() for folder in folders]
        runs = [{line["step"]: (line["reward"], line["loss"]) for line in map(json.loads, lines)}
                for lines in files]
        steps = sorted(runs[0].keys() & runs[1].keys())
        table = np.array([[run[step] for step in steps] for run in runs])
        rewards, losses = table.transpose(2, 0, 1)  # (2, steps)
    worst, parts = 0.0, [slice(i, i + 10) for i in range(0, len(steps), 10)] + [slice(None)]
    print("steps              reward A  reward B  difference    loss A    loss B")
    for part in parts:
        (a, b), (c, d) = rewards[:, part].mean(1), losses[:, part].mean(1)
        worst = max(worst, abs(b / a - 1))
        print(f"{steps[part][0]:5} to {steps[part][-1]:5}    {a:10.4f}{b:10.4f}{b / a - 1:+12.2%}"
              f"{c:10.1e}{d:10.1e}")
    a, b = rewards[:, i := np.abs(rewards[1] / rewards[0] - 1).argmax()]
    print(f"worst step: {steps[i]}, {a:.4f} and {b:.4f}, {b / a - 1:+.2%}")
    names = [{file.name for file in Path(f, "images").glob("*.png")} for f in folders]
    grids = [Path(f, "images", name) for name in sorted(names[0] & names[1])[-1:] for f in folders]
    curves = {f: list(zip(steps, curve)) for f, curve in zip(folders, rewards)}
    draw_curves(Path(folders[1]) / "compare.png", curves, grids)
    print(f"look at {folders[1]}/compare.png\ncompare {'OK' if worst <= 0.05 else 'OFF'}")
    return worst <= 0.05


# -------------------------------------------------------------------------------------------- main

def read_command_line(argv):
    """Config from flags: every field is one, its comment the help."""
    about, *_, examples, _ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "grpo_flux.py", "grpo_flux.py [--flag value ...]", about, examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: reward.refuse(f"{message}; see --help")
    for name, (default, comment) in COMMENTS.items():
        kind, tiny = Config.__annotations__[name], f", tiny {TINY[name]}" if name in TINY else ""
        options = dict(type=kind, metavar=kind.__name__.upper())
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            options = dict(nargs=2, metavar="RUN")
        parser.add_argument(f"--{name}", **options, default=argparse.SUPPRESS,
                            help=f"{comment} (default {default}{tiny})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    if "replay" in given:
        given = read_settings(given["replay"]) | given
    return Config(**(TINY if given.get("model", "tiny") == "tiny" else {}) | given)


# settings of a run's machine and of its own files
OWN = ("device", "out", "cache", "resume", "record", "compare", "deterministic")


def read_settings(folder):
    """The settings of a recorded run, but for its own."""
    with refusing(f"--replay {folder}: must be a folder of --record"):
        (Path(folder) / "step_00001_rank_0.safetensors").stat()
        settings = json.loads((Path(folder) / "config.json").read_text())
        return {name: Config.__annotations__[name](settings[name]) for name in COMMENTS
                if name in settings and name not in OWN}


def score(rewards, images, prompts, moment):
    """{name: scores (B,) fp32 on the CPU} of every reward; moment: for messages."""
    if not images.isfinite().all():
        raise FloatingPointError(f"an image of {moment} is not finite: the policy or its VAE has "
                                 "overflown; --dtype fp32 may tell which")
    scores = {}
    for name, (_, function) in rewards.items():
        try:
            r = scores[name] = torch.as_tensor(function(images, prompts)).detach().float().cpu()
        except Exception as error:  # whatever a function of the user's raises
            raise BadInput(f"--reward {name}: must score {len(images)} images, but raised "
                           f"{type(error).__name__} ({error}) in {moment}, prompts {prompts[0]!r} "
                           "...") from error
        if r.shape != (len(images),):
            raise BadInput(f"--reward {name}: must return {len(images)} numbers for as many "
                           f"images, but gave {tuple(r.shape)} in {moment}, prompts "
                           f"{prompts[0]!r} ...")
        if (bad := (~r.isfinite()).nonzero().flatten().tolist()):
            raise BadInput(f"--reward {name}: must return finite numbers, but gave {r[bad[0]]} in "
                           f"{moment} for the prompt {prompts[bad[0]]!r}")
    return scores


def train_step(step, chosen, policy, vae, rewards, encoded, shape, cfg, device):
    """One step of GRPO: images of the chosen (slot, prompt), their scores, the update; returns the
    scores, the update's statistics and the seconds of each part."""
    G = cfg.num_generations
    names = [prompt for _, prompt in chosen for _ in range(G)]
    keys = [(step, slot, sample) for slot, _ in chosen for sample in range(G)]
    times = [clock(device)]
    TAPE.open(step)
    x, text = draw_latents(keys, shape, cfg).to(device), batch_text(encoded, names, device)
    TAPE.note("text", *text)
    trajectory = rollout(policy.predict, x, text, keys, cfg, cfg.eta)
    TAPE.note("latents", trajectory.x, trajectory.x0)
    TAPE.note("logp", trajectory.logp[:, list(random_steps(step, cfg))])
    images = TAPE.note("images", decode(vae, trajectory.x0, shape[1:], cfg.micro_batch))
    times.append(clock(device))
    scores = score(rewards, images, names, f"step {step + 1}")
    TAPE.note("reward", *scores.values())
    times.append(clock(device))
    advantages = sum(w * group_advantages(scores[name], G) for name, (w, _) in rewards.items())
    TAPE.note("advantages", advantages)
    stats = update(policy.predict, policy.optimizer, trajectory, text, advantages, keys, cfg,
                   policy.reference)
    if policy.average:
        follow(policy, cfg.ema_decay)
    TAPE.note("loss", stats["loss"])
    TAPE.note("grad_norm", stats["grad_norm"])
    TAPE.close()
    times.append(clock(device))
    names = ("rollout_s", "reward_s", "update_s")
    seconds = {name: round(b - a, 4) for name, a, b in zip(names, times, times[1:])}
    return scores, stats, seconds


@contextmanager
def stop_requests():
    """A list of the SIGINTs and SIGTERMs that came: a step ends first, and is saved. A second one
    is not so patient."""
    came = []

    def note(number, _):
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    cfg = read_command_line(argv)
    if cfg.compare:
        sys.exit(0 if compare_runs(*cfg.compare) else 3)
    prompts, checkpoint = check_files(cfg)
    if cfg.deterministic:
        reward.make_deterministic(cfg.seed)
    device, rank, world = start(cfg.device)
    with run_folder(cfg, rank) as out:
        verdict = train(cfg, prompts, checkpoint, out, device, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()
    if verdict.endswith("OFF"):
        sys.exit(3)


def train(asked, prompts, checkpoint, out, device, rank, world):
    """The run, from loading to export; returns what a replay has to say."""
    cfg, rewards = prepare(asked, device)
    facts = describe_run(replace(asked, dtype=cfg.dtype), device)
    TAPE.start(cfg, facts, device, rank, world)
    shown, plan = prompts[:cfg.eval_images], plan_prompts(prompts, cfg, rank, world)
    used = dict.fromkeys([*shown, *(prompt for chosen in plan for _, prompt in chosen)])
    encoded = encode_prompts(cfg, list(used), device)
    vae, channels = load_vae(cfg, device), read_config(cfg)["in_channels"] // 4
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)  # along a side of a latent pixel
    shape = channels, cfg.height // pixels, cfg.width // pixels
    policy = make_policy(cfg, shape[1:], device)
    first = load_checkpoint(checkpoint, policy) if checkpoint else 0
    history = open_run(out, facts, checkpoint, first) if rank == 0 else []
    board = open_board(out, first) if rank == 0 else None
    if rank == 0:
        print(describe_step(cfg, policy, shape[1:], world), flush=True)
    bar = tqdm(total=cfg.steps, initial=first, desc="GRPO", unit="step", disable=rank > 0,
               dynamic_ncols=True)

    def look(step):
        with averaged(policy):
            seen = evaluate(policy.predict, vae, rewards, encoded, shown, shape, cfg, device, rank,
                            world)
        if rank == 0:
            show(out, step, seen, history, cfg, board)
        values = dict(held_out=seen.rewards.mean().item(), accuracy=seen.accuracy)
        return {name: round(value, 6) for name, value in values.items() if value == value}

    bad, past = 0, history[-1] if history else {}
    held_out = {name: past[name] for name in ("held_out", "accuracy") if name in past}
    with bar, stop_requests() as signals:
        for step in range(first, cfg.steps):
            if step % cfg.eval_every == 0:
                held_out = look(step)
            scores, stats, seconds = train_step(
                step, plan[step], policy, vae, rewards, encoded, shape, cfg, device)
            line = summarize(step + 1, rewards, scores, stats, cfg, device) | held_out | seconds
            history.append(line)
            if rank == 0:
                write_line(out, line, board)
                if trouble := find_trouble(history):
                    bar.write(f"step {step + 1}: {trouble}")
            bar.set_postfix_str(
                "reward {reward:.3f}+-{spread:.3f} ratio {ratio:.6f} (off {ratio_off:.0e}) clipped "
                "{clipped:.0%} grad {grad_norm:.2f} | {rollout_s:.1f}+{reward_s:.1f}+{update_s:.1f}"
                " s".format(**line), refresh=False)
            bar.update()
            bad = bad + 1 if stats["skipped"] else 0
            if bad == 3:
                raise FloatingPointError(
                    f"the gradient was not finite in steps {step - 1} to {step + 1}; a lower "
                    "--learning_rate may help")
            stopping = gather(torch.tensor([float(len(signals))], device=device)).sum() > 0
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stopping:
                folder = out / "checkpoints" / f"step_{step + 1:05d}"
                save_checkpoint(folder, policy, cfg.keep_last, rank)
            if stopping:
                sys.exit(130 if signal.SIGINT in signals else 0)
    last = look(cfg.steps)
    with averaged(policy):
        export(policy.transformer, cfg, out / "export")
    if rank == 0:
        shots = [out / "images" / f"step_{step:05d}.png" for step in (0, cfg.steps)]
        shots = [shot for shot in shots if shot.exists()]
        side_by_side(out / "before_after.png", [*shots, out / "reward.png"])
        before = next(line for line in [*history, last] if "held_out" in line)
        print(f"before: {headline(**before)}; after: {headline(**last)} "
              f"({cfg.eval_images} images)\nlook at {out}/before_after.png; for diffusers: "
              f"{out}/export")
    verdict = TAPE.verdict() if cfg.replay else ""
    if rank == 0 and verdict:
        print(verdict)
    return verdict


if __name__ == "__main__":
    try:
        main()
    except BadInput as problem:
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(10)  # the first process has most likely found the same, and says so
        reward.refuse(problem)
    except Stopped as problem:
        reward.refuse(problem, status=1)
    except KeyboardInterrupt:
        sys.exit(130)
