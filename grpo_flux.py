"""GRPO for FLUX in one file: teach a text-to-image model what people prefer.

DanceGRPO (Xue et al., arXiv 2505.07818) in six lines, each with its functions:

    1. turn noise into an image by T small SDE steps, given a prompt     rollout, flux_step
    2. do that G times for each of P prompts; a group shares a prompt    plan_step
    3. decode the images, and score them with a reward model             decode, reward.HPS
    4. advantage: standard deviations above the mean of the group        group_advantages
    5. raise the probability of steps with A > 0: PPO's clipped loss     update, grpo_loss
    6. repeat with the next prompts                                      train_step, train

What differs from DanceGRPO's code (README says how much each matters):

    1. The transformer is given sigma as its timestep, not int(1000 sigma) / 1000.
    2. Rollout and update use one batch size, whatever it is, so the first ratio is exactly 1.
    3. Every random draw has a key (seed, purpose, step, prompt, sample, t): the same images on
       every device, at every batch size and number of processes. Each prompt has its own noise.
    4. With bf16 only the models compute in bf16; SDE steps, images and scores are fp32.
    5. The VAE decodes an image at once; tiles leave seams that a reward sees.
    6. A group of equal rewards gets advantages of exactly 0; a batch of them, no optimizer step.

    python grpo_flux.py                                     # a tiny FLUX, on a laptop
    torchrun --nproc_per_node 8 grpo_flux.py --model black-forest-labs/FLUX.1-dev \\
        --prompts prompts.txt                               # FLUX.1-dev; one card: --lora_rank 64

Letters of shapes: B samples of this process, b of a micro-batch, P prompts, G samples of a group,
T denoising steps, K trained ones, L latent tokens of an image, C channels of one, N text tokens, E
channels of one; unpacked latents are (c, h, w). TAPE.note and TAPE.draw return what they are given
unchanged; --record saves it too, and --replay compares it and puts recorded draws in its place.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torchvision.utils import save_image
from tqdm import tqdm

import reward
from reward import BadInput, atomic_write, bad_input_if_fails, printable, remove, require

# ------------------------------------------------------------------------------------------ config

def flag(default, help, low=None, high=None, choices=()):
    """A field of Config. --help and the check of its value read the same metadata."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

@dataclass
class Config:
    """Every field is a flag. Counts of a GRPO step are totals over all processes."""
    model: str = flag("tiny", "tiny, or a folder or hub name of FLUX.1 in diffusers format")
    prompts: str = flag("", "text file in UTF-8, a prompt a line; tiny has 24 of its own")
    out: str = flag("", "folder for all that a run writes; else runs/<model>")
    device: str = flag("auto", "auto: an accelerator, if there is one", choices=reward.DEVICES)
    dtype: str = flag("auto", "auto: bf16, on a cpu fp32", choices=("auto", "fp32", "bf16"))
    seed: int = flag(0, "of noise, trained steps, prompt order and LoRA's start", 0, 2**32 - 1)
    steps: int = flag(300, "GRPO steps: a rollout, its rewards, its update", 1, 10**9)
    # policy
    lora_rank: int = flag(0, "train LoRA adapters of this rank; 0: all weights", 0, 1024)
    lora_alpha: float = flag(128.0, "adapters are scaled by lora_alpha / lora_rank", 1e-3, 1e5)
    kl_beta: float = flag(0.0, "weight of the KL divergence from the initial policy", 0, 1e6)
    ema_decay: float = flag(0.0, "of averaged weights, for evaluation and export", 0, 0.99999)
    compile: bool = flag(False, "compile the blocks: minutes at the start, then faster")
    attention: str = flag("native", "diffusers' name of an attention backend")
    gradient_checkpointing: float = flag(1.0, "share of blocks that recompute activations", 0, 1)
    # reward
    reward: str = flag("hps", "hps, clip, pickscore, package.module:function; or hps:0.7,clip:0.3")
    hps: str = flag("", "file, or owner/name/file of the hub; else HPS-v2.1 from the hub")
    hps_arch: str = flag("ViT-H-14", "open_clip's name of its architecture, or a .json file")
    clip: str = flag("", "file, or owner/name/file of the hub, with weights for the reward clip")
    clip_arch: str = flag("ViT-H-14", "open_clip's name of its architecture, or a .json file")
    pickscore: str = flag("yuvalkirstain/PickScore_v1", "folder or hub name of PickScore")
    reward_fp32: bool = flag(False, "rewards on an accelerator in fp32, not in fp16 autocast")
    # rollout
    num_prompts: int = flag(8, "P, prompts of a GRPO step", 1, 10**4)
    num_generations: int = flag(12, "G, images of a prompt: a group", 2, 10**4)
    height: int = flag(720, "pixels, a multiple of 16", 16, 8192)
    width: int = flag(720, "pixels, a multiple of 16", 16, 8192)
    sampling_steps: int = flag(16, "T, denoising steps; the last is deterministic", 2, 1000)
    sde_window: int = flag(0, "only so many denoising steps in a row are SDE steps; 0: all", 0, 999)
    window_shift_every: int = flag(0, "GRPO steps until it moves by one; 0: it is random", 0, 10**9)
    sde: str = flag("dance", "formula of the SDE step", choices=("dance", "flow", "cps"))
    eta: float = flag(0.3, "noise level: more explores more, and blurs more", 1e-6, 10)
    shift: float = flag(3.0, "of the schedule; above 1: more steps at high noise", 1e-3, 1e3)
    guidance: float = flag(3.5, "guidance input of FLUX.1-dev; other models have none", 0, 1e3)
    init_same_noise: bool = flag(True, "a group starts from one noise; only the SDE varies it")
    text_length: int = flag(512, "T5 tokens of a prompt; FLUX.1-schnell: at most 256", 1, 512)
    micro_batch: int = flag(2, "largest batch of a transformer call; less saves memory", 1, 10**4)
    # update
    batch_size: int = flag(32, "images of an optimizer step", 1, 10**8)
    timestep_fraction: float = flag(0.0, "share of the SDE steps that are trained, chosen for each "
                                    "image; 0: all with sde_window or below 8, else 0.6", 0, 1)
    learning_rate: float = flag(1e-5, "of AdamW", 1e-12, 1)
    weight_decay: float = flag(1e-4, "of AdamW", 0, 1)
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm", 1e-9, 1e9)
    clip_range: float = flag(1e-4, "of the ratio; small, as logp is a mean", 1e-9, 1)
    adv_clip_max: float = flag(5.0, "advantages are clipped to +- this", 1e-3, 1e3)
    # checkpoints and evaluation
    save_every: int = flag(20, "GRPO steps between checkpoints", 1, 10**9)
    keep_last: int = flag(2, "checkpoints that are kept", 1, 10**9)
    resume: str = flag("auto", "auto: from the last checkpoint in --out; none; or a folder")
    eval_every: int = flag(20, "GRPO steps between evaluations", 1, 10**9)
    eval_images: int = flag(16, "ODE samples of an evaluation, always the same noise", 1, 10**5)
    # the same numbers on another device
    record: str = flag("", "new folder for every random draw and every stage's results")
    replay: str = flag("", "such a folder: take its settings and draws, compare every stage")
    compare: tuple = flag((), "folders of two runs: compare them, and do nothing else")
    deterministic: bool = flag(False, "deterministic kernels: equal runs, equal bits; slower")

    def __post_init__(self):
        for f in fields(self):
            value, (_, low, high, choices) = getattr(self, f.name), f.metadata.values()
            given = f"--{f.name} {value}" + f" (with --replay {self.replay})" * bool(self.replay)
            require(low is None or low <= value <= high, f"{given}: must be from {low} to {high}")
            require(value in (choices or [value]), f"{given}: must be one of {' '.join(choices)}")
        for name, value in ("height", self.height), ("width", self.width):
            require(value % 16 == 0, f"--{name} {value}: must be a multiple of 16")
        P, G, size = self.num_prompts, self.num_generations, self.batch_size
        require(P * G % size == 0 and (size % G == 0 or size % P == 0),
                f"--batch_size {size}: must divide the {P * G} images of a GRPO step, and be a "
                f"multiple of num_generations {G} (whole groups) or num_prompts {P}")
        require(self.sde_window < self.sampling_steps, f"--sde_window {self.sde_window}: must be "
                f"below sampling_steps {self.sampling_steps}")
        require(not (self.record and self.replay), f"--record {self.record}: not with --replay")
        reward.parse_rewards(self.reward)

# ------------------------------------------------------------------------------------------- draws

# The purpose of a draw, the second number of its key.
LATENTS, NOISE, TRAIN_STEPS, PROMPTS, HELD_OUT, WINDOW = range(6)

def randn(shape, *key):
    """Draw standard normal fp32 numbers of this shape; equal keys give equal numbers anywhere.

    key: (seed, purpose, step, prompt_index, sample, t) or its beginning. numpy's normal sampler
    makes almost no libm calls, so it is reproducible; rounding to fp32 removes the rest.
    """
    numbers = np.random.default_rng(key).standard_normal(shape).astype(np.float32)
    return TAPE.draw(torch.from_numpy(numbers), *key)

def randperm(n, *key):
    """Draw a random order of range(n), an int64 tensor (n,); key as in randn."""
    return TAPE.draw(torch.from_numpy(np.random.default_rng(key).permutation(n)), *key)

# ---------------------------------------------------------------------------------------- flow SDE

def sigma_schedule(sampling_steps: int, shift: float) -> list[float]:
    """Return T + 1 noise levels σ of T denoising steps, from 1.0 (noise) down to 0.0 (image).

    u = linspace(1, 0, T + 1);  σ = s u / (1 + (s - 1) u)  (Esser et al., arXiv 2403.03206)
    """
    us = [1 - t / sampling_steps for t in range(sampling_steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in us]

def flux_step(v, x, sigma, sigma_next, eta, sde="dance", noise=None, x_next=None):
    """Take one denoising step σ -> σ', or score one that was taken: (x_next, x0, logp).

    A rectified flow interpolates image and noise, x = (1 - σ) x0 + σ x1, and the model predicts
    v = x1 - x0. The ODE dx = v dσ turns noise into an image deterministically, so its steps have
    no probability to raise. The SDE injects noise and corrects the drift with the score, which
    follows from v: for small steps the marginals of x stay those of the ODE. dt = σ' - σ < 0:

      dance  score = -(x - (1 - σ) x0) / σ²;  mean = x + v dt - ½ η² score dt;  std = η√-dt
             (DanceGRPO, arXiv 2505.07818)
      flow   the same with η √(σ / (1 - σ)) for η; at σ = 1, where that divides by 0, with
             1 - σ' (Flow-GRPO, arXiv 2505.05470)
      cps    std = σ' sin(η π/2);  mean = (1 - σ') x0 + √(σ'² - std²) x1; the noise level
             is kept, but images are narrower (Flow-CPS, arXiv 2509.05952)

    v, x, noise, x_next: (B, L, C) fp32. sigma, sigma_next: floats or tensors (B, 1, 1). Give noise
    to take a step, x_next to score one; with eta = 0 the step is the ODE's and needs neither.

    Returns x_next (B, L, C); x0 (B, L, C), the image that v points to; and logp (B,), the mean over
    L and C of log N(x_next; mean, std²), nan if eta = 0. With the sum over all L C numbers the
    ratio exp(logp - logp_old) would be 0 or infinite after any update; the mean gives its (L C)-th
    root, so the clip range is 1e-4 and not 0.2.
    """
    sigma, sigma_next = (torch.as_tensor(s, dtype=x.dtype, device=x.device)
                         for s in (sigma, sigma_next))
    dt, x0 = sigma_next - sigma, x - sigma * v
    if sde not in ("dance", "flow", "cps"):
        raise ValueError(f"sde {sde!r} must be dance, flow or cps")
    if eta == 0:
        return x + v * dt, x0, x.new_full((len(x),), float("nan"))
    if sde == "cps":
        x1, std = x + (1 - sigma) * v, sigma_next * math.sin(eta * math.pi / 2)
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1
    else:
        if sde == "flow":
            eta = eta * (sigma / (1 - torch.where(sigma < 1, sigma, sigma_next))).sqrt()
        score = -(x - (1 - sigma) * x0) / sigma**2
        mean = x + v * dt - 0.5 * eta**2 * score * dt
        std = eta * (-dt).sqrt()
    if x_next is None:
        x_next = mean + std * noise  # stays fp32: rounding it to bf16 would change logp
    deviation = (x_next.detach() - mean) / std
    logp = (-0.5 * deviation**2 - std.log() - 0.5 * math.log(2 * math.pi)).mean(dim=(1, 2))
    return x_next, x0, logp

def gaussian_kl(v, v_reference, x, sigma, sigma_next, eta, sde="dance"):
    """Return the KL divergence (B,) between the SDE steps of two models from x: the mean over L and
    C of (mean - mean_reference)² / (2 std²), as both have one std. Arguments as in flux_step."""
    step = partial(flux_step, x=x, sigma=sigma, sigma_next=sigma_next, eta=eta, sde=sde)
    mean, _, logp_at_mean = step(v_reference, noise=torch.zeros_like(x))
    _, _, logp = step(v, x_next=mean)
    return logp_at_mean - logp

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
    """(B,) rewards, group by group -> (B,) advantages: (r - mean) / (std + eps) within each group.

    Unbiased std, as in DanceGRPO. A group of equal rewards gets exactly 0: the formula alone would
    divide the rounding error of its mean by eps.
    """
    r = rewards.view(-1, num_generations)  # (B / G, G)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)
    all_equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0).flatten()

def grpo_loss(logp, logp_old, advantages, clip_range, adv_clip_max):
    """PPO's clipped loss (Schulman et al., arXiv 1707.06347, section 3): the mean of
    max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)) with ρ = exp(logp - logp_old).

    logp (of the current policy, with gradient), logp_old (of the rollout), advantages A: (B,).
    Returns the loss and a dict of scalars: the mean ratio, the largest |ρ - 1|, and the share of
    samples whose gradient the clip has made 0.
    """
    A = advantages.clamp(-adv_clip_max, adv_clip_max)
    ratio = (logp - logp_old).exp()
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - clip_range, 1 + clip_range)
    ratio = ratio.detach()
    stats = {"ratio": ratio.mean(), "ratio_max_dev": (ratio - 1).abs().max(),
             "clip_frac": (clipped > unclipped).float().mean()}
    return torch.maximum(unclipped, clipped).mean(), stats

# ----------------------------------------------------------------------------------------- rollout

def plan_step(step, cfg, rank=0, world=1):
    """Return the keys (step, prompt_index, sample) of this process's samples, B = P G / world.

    The order of all P G samples is that of training, batch_size for each optimizer step: whole
    groups if batch_size is a multiple of G, else the next batch_size / P images of every prompt,
    which is DanceGRPO's way. Each process takes an equal, contiguous part of each batch.
    """
    P, G, size = cfg.num_prompts, cfg.num_generations, cfg.batch_size
    chunk = G if size % G == 0 else size // P  # consecutive images of one prompt
    order = [(step, p, i) for start in range(0, G, chunk) for p in range(P)
             for i in range(start, start + chunk)]
    part = size // world
    starts = range(rank * part, P * G, size)
    return [key for start in starts for key in order[start:start + part]]

def draw_latents(keys, shape, cfg):
    """Draw the initial noise (B, L, C) of each key; shape: latents (c, h, w)."""
    keys = [(step, p, 0 if cfg.init_same_noise else i) for step, p, i in keys]
    return pack_latents(torch.stack([randn(shape, cfg.seed, LATENTS, *key) for key in keys]))

def velocity(transformer, x, sigma, text, ids, guidance, bf16):
    """Return v (B, L, C) in fp32. This is the only call of the transformer; what follows knows it
    as predict(x, sigma, text).

    x (B, L, C) fp32; sigma (B, 1, 1); text: T5's embeddings (B, N, E) and CLIP's pooled one
    (B, E'); ids: image_ids (L, 3); guidance: for models that have that input.
    """
    prompt_embeds, pooled = text
    scale = x.new_full((len(x),), guidance) if transformer.config.guidance_embeds else None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        v = transformer(
            hidden_states=x, timestep=sigma.flatten(), guidance=scale, return_dict=False,
            encoder_hidden_states=prompt_embeds, pooled_projections=pooled,
            img_ids=ids, txt_ids=ids.new_zeros(prompt_embeds.shape[1], 3))
    return v[0].float()

def sde_steps(step, cfg):
    """Return the denoising steps of a GRPO step that are stochastic: all but the last, or a window
    of them that moves (MixGRPO, Li et al., arXiv 2507.21802). The others are the ODE's."""
    W = cfg.sde_window or cfg.sampling_steps - 1
    places = cfg.sampling_steps - W
    if cfg.window_shift_every:
        start = step // cfg.window_shift_every % places
    else:
        start = randperm(places, cfg.seed, WINDOW, step)[0].item()
    return range(start, start + W)

def num_train_steps(cfg):
    """Return K, how many of its SDE steps a sample trains on."""
    W = cfg.sde_window or cfg.sampling_steps - 1
    fraction = cfg.timestep_fraction or (1 if cfg.sde_window or W < 8 else 0.6)
    return max(1, int(fraction * W + 1e-9))  # 0.29 * 100 is below 29

# sigmas (T+1,); x (B, T, L, C) before each step; x0 (B, L, C) the images; logp (B, T-1)
Trajectory = namedtuple("Trajectory", "sigmas x x0 logp")

@torch.no_grad()
def rollout(predict, x, text, keys, cfg, eta):
    """Turn noise x (B, L, C) into images: a Trajectory.

    eta > 0 samples with the SDE inside sde_steps, eta = 0 with the ODE, which needs no keys.
    keys[i] = (step, prompt_index, sample) seeds the noise of sample i. The last step is
    deterministic, so its x0 is the image.
    """
    T = cfg.sampling_steps
    start = sde_steps(keys[0][0], cfg).start if eta and cfg.init_same_noise else 0
    if not start:
        _, states, x0, logp = denoise(predict, x, text, keys, range(T), cfg, eta)
    else:  # before its window a group is one deterministic path: take it once, then repeat it
        prompts = [prompt_index for _, prompt_index, _ in keys]
        distinct = list(dict.fromkeys(prompts))
        first = [prompts.index(p) for p in distinct]  # the row of each prompt's first sample
        path = denoise(predict, x[first], [c[first] for c in text], keys, range(start), cfg, eta)
        x, before, _, logp_before = (c[[distinct.index(p) for p in prompts]] for c in path)
        _, after, x0, logp_after = denoise(predict, x, text, keys, range(start, T), cfg, eta)
        states, logp = torch.cat([before, after], 1), torch.cat([logp_before, logp_after], 1)
    sigmas = torch.tensor(sigma_schedule(T, cfg.shift), device=x.device)
    return Trajectory(sigmas, states, x0, logp[:, :-1])

def denoise(predict, x, text, keys, steps, cfg, eta):
    """Take some denoising steps from x (B, L, C), micro_batch samples a call, all in fp32. Returns
    x after them, the x before each (B, steps, L, C), the last x0 (B, L, C), logp (B, steps)."""
    window, n, parts = sde_steps(keys[0][0], cfg) if eta else range(0), cfg.micro_batch, []
    sigmas = torch.tensor(sigma_schedule(cfg.sampling_steps, cfg.shift), device=x.device)
    for i in range(0, len(x), n):
        x_t, inputs, states, logps = x[i:i + n], [c[i:i + n] for c in text], [], []
        for t in steps:
            # (b, 1, 1), as in update: equal shapes use equal kernels, and the ratio is exactly 1
            sigma, sigma_next = (s.expand(len(x_t), 1, 1) for s in sigmas[t:t + 2])
            v, noise = TAPE.note("velocity", predict(x_t, sigma, inputs)), None
            if t in window:  # drawn on the host while the device computes v
                noise = [randn(x.shape[1:], cfg.seed, NOISE, *key, t) for key in keys[i:i + n]]
                noise = torch.stack(noise).to(x.device)
            states.append(x_t)
            x_t, x0, logp = flux_step(
                v, x_t, sigma, sigma_next, eta if t in window else 0, cfg.sde, noise)
            logps.append(logp)
        parts.append((x_t, torch.stack(states, 1), x0, torch.stack(logps, 1)))
    return [torch.cat(part) for part in zip(*parts)]

@torch.no_grad()
def decode(vae, x0, grid, micro_batch):
    """Decode latents (B, L, C) of a grid (h, w) to images (B, 3, H, W) in [0, 1], rounded to the 8
    bits of a file, each image at once."""
    images = []
    for part in x0.split(micro_batch):
        z = unpack_latents(part, *grid) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        images.append((image.clamp(0, 1) * 255).round() / 255)
    return torch.cat(images)

# ------------------------------------------------------------------------------------------ update

FIRST_RATIO_LIMIT = 1e-5  # of |ρ - 1| before the first optimizer step; right code gives exactly 0

def update(predict, optimizer, trajectory, text, advantages, keys, cfg, reference=None):
    """Train on a rollout once, an optimizer step for each batch_size samples: a dict of statistics.

    advantages (B,). Each sample trains on K of its SDE steps, chosen at random for itself. Only the
    first optimizer step is on-policy, so its ratio must be 1. A batch whose advantages are 0 in all
    processes gets no optimizer step. reference: predict of the model that kl_beta keeps the policy
    close to. The host waits for the device once an optimizer step.
    """
    sigmas, states, _, logp_old = trajectory
    device, window, K = states.device, sde_steps(keys[0][0], cfg), num_train_steps(cfg)
    orders = [randperm(len(window), cfg.seed, TRAIN_STEPS, *key)[:K] for key in keys]
    train_steps = torch.stack(orders).to(device) + window.start  # (B, K)
    batches = cfg.num_prompts * cfg.num_generations // cfg.batch_size
    nonzero = torch.stack(gather((advantages.view(batches, -1) != 0).any(1))).any(0).tolist()
    advantages, results = advantages.to(device), []
    for batch in torch.arange(len(keys), device=device).view(batches, -1)[nonzero]:
        totals, ratio_max_dev = torch.zeros(4, device=device), torch.zeros((), device=device)
        for i in batch.split(cfg.micro_batch):
            inputs = [c[i] for c in text]
            for t in train_steps[i].T:  # (b,), one denoising step of each sample
                x, x_next = states[i, t], states[i, t + 1]
                sigma, sigma_next = (sigmas[s].view(-1, 1, 1) for s in (t, t + 1))
                v = TAPE.note("velocity_in_update", predict(x, sigma, inputs))
                _, _, logp = flux_step(v, x, sigma, sigma_next, cfg.eta, cfg.sde, x_next=x_next)
                loss, stats = grpo_loss(
                    logp, logp_old[i, t], advantages[i], cfg.clip_range, cfg.adv_clip_max)
                kl = torch.zeros((), device=device)
                if reference:
                    kl = gaussian_kl(v, reference(x, sigma, inputs), x, sigma, sigma_next, cfg.eta,
                                     cfg.sde).mean()
                    loss = loss + cfg.kl_beta * kl
                count = len(batch) * K  # transitions; FSDP averages gradients over processes
                (loss * len(i) / count).backward()
                totals += torch.stack([loss.detach(), stats["ratio"], stats["clip_frac"],
                                       kl.detach()]) * len(i) / count
                ratio_max_dev = torch.maximum(ratio_max_dev, stats["ratio_max_dev"])
        results.append(optimizer_step(optimizer, totals, ratio_max_dev, cfg, first=not results))
    finite = [stats for stats in results if math.isfinite(stats["grad_norm"])]
    means = {name: sum(stats[name] for stats in finite) / len(finite) if finite else 0.0
             for name in ("loss", "ratio", "clip_frac", "kl", "grad_norm")}
    devs = [stats["ratio_max_dev"] for stats in results] or [0.0]
    return means | {"updates": len(finite), "skipped": len(results) - len(finite),
                    "first_ratio_dev": devs[0], "ratio_max_dev": max(devs)}

def optimizer_step(optimizer, totals, ratio_max_dev, cfg, first):
    """Clip the gradient, step unless it is not finite, and return the batch's statistics."""
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP
    names = ("loss", "ratio", "clip_frac", "kl", "grad_norm", "ratio_max_dev")
    stats = dict(zip(names, torch.stack([*totals, norm, ratio_max_dev]).tolist()))
    if first and stats["ratio_max_dev"] > FIRST_RATIO_LIMIT and not TAPE.recorded:
        raise FloatingPointError(
            f"the first ratio is off by {stats['ratio_max_dev']:.1e}, though the policy is still "
            "that of the rollout: rollout and update compute different velocities (latents rounded "
            "to bf16, dtype, batch size, dropout, kernels: try --deterministic)")
    TAPE.note("loss", stats["loss"])
    TAPE.note("grad_norm", stats["grad_norm"])
    if math.isfinite(stats["grad_norm"]):  # one norm for all processes: all of them step, or none
        optimizer.step()
    optimizer.zero_grad()
    return stats

# ------------------------------------------------------------------------------------- a GRPO step

def train_step(step, run):
    """Take GRPO step number `step`, from 0. Return scores {reward: (P G,)} and advantages (P G,)
    of all processes, group by group, and the statistics of this process's update."""
    cfg, policy, G = run.cfg, run.policy, run.cfg.num_generations
    keys = plan_step(step, cfg, run.rank, run.world)
    prompts = [run.step_prompts[step][prompt_index] for _, prompt_index, _ in keys]
    TAPE.open(step, keys)
    text = run.text(prompts)
    x = draw_latents(keys, run.shape, cfg).to(run.device)
    trajectory = rollout(policy.predict, x, text, keys, cfg, cfg.eta)
    images = decode(run.vae, trajectory.x0, run.shape[1:], cfg.micro_batch)
    TAPE.note("text", *text)
    TAPE.note("latents", trajectory.x, trajectory.x0)
    TAPE.note("logp", trajectory.logp[:, list(sde_steps(step, cfg))])
    images = TAPE.note("images", images)
    scores = reward.score(run.rewards, images, prompts, f"step {step + 1}")  # {name: (B,)}
    TAPE.note("reward", *scores.values())
    # A group may lie in several processes: gather its scores, and order them by group.
    rows = torch.tensor([prompt_index * G + sample for _, prompt_index, sample in keys])
    order = torch.cat(gather(rows)).argsort()
    scores = {name: torch.cat(gather(r))[order] for name, r in scores.items()}  # (P G,)
    advantages = sum(weight * group_advantages(scores[name], G)
                     for name, (weight, _) in run.rewards.items() if weight)
    TAPE.note("advantages", advantages[rows])
    stats = update(policy.predict, policy.optimizer, trajectory, text, advantages[rows], keys, cfg,
                   policy.reference)
    policy.update_ema(cfg.ema_decay)
    TAPE.close()
    return scores, advantages, stats

# The algorithm ends here. What follows loads models, saves, records and draws.

# -------------------------------------------------------------------------------------------- tape

# How far a replay may be from its record: {stage: (measure, limit in fp32, in bf16)}, in the order
# of a GRPO step. relative: sum of |a - b| over sum of |b|; mean: mean of |a - b|.
TOLERANCES = dict(
    text=("relative", 1e-4, 3e-2),  # rounding of 24 layers
    velocity=("relative", 1e-3, 3e-2),  # of 57 blocks; a wrong rotary embedding gives 8e-2
    latents=("relative", 1e-3, 3e-2),  # they add up velocities
    logp=("mean", 1e-5, 1e-5),  # a tenth of the clip range
    images=("mean", 1 / 255, 1 / 255),  # a grey level, which no eye sees
    reward=("relative", 1.5e-4, 1.5e-4),  # as in reward.py --against
    advantages=("relative", 2e-2, 2e-2),  # the reward's error over its std in a group
    velocity_in_update=("relative", 1e-3, 3e-2),  # as above, with what the optimizer has done
    loss=("mean", 1e-5, 1e-5),  # as logp, of which it is made
    grad_norm=("relative", 1e-2, 1e-1))  # rounding of forward and backward
TAPE_NAMES = re.compile(r"input_latents_\d+_\d+(_\d+)?|(coff|perms)_\d+_\d+|"
                        rf"({'|'.join(TOLERANCES)})\.\d+")

class Tape:
    """Record a step's noise, trained steps and results, or replay those draws and compare results.

    A safetensors file for each GRPO step and process. Results are STAGE.NUMBER. Draws have the
    names that serve to align DanceGRPO's code, with steps from 1 and rows of this process:
    input_latents_STEP_RANK[_ROW] (1, c, h, w); coff_N_RANK (1, L, C), N = ((STEP - 1) * rows + ROW)
    * T + t; perms_STEP_RANK (rows, T-1 or the window), the order of the SDE steps; K are trained.
    """
    file, recorded = None, {}  # off until it is opened

    def start(self, cfg, info, rank):
        self.cfg, self.rank, self.errors, self.file, self.recorded = cfg, rank, [], None, {}
        if cfg.record and rank == 0:
            with bad_input_if_fails(f"--record {cfg.record}: must be a new folder"):
                Path(cfg.record).mkdir(parents=True)
            write_json(Path(cfg.record) / "config.json", info)

    def open(self, step, keys):
        """Begin a GRPO step of the samples with these keys."""
        if self.cfg.record or self.cfg.replay:
            self.step, self.keys, self.results = step, keys, {}
            self.file = tape_file(self.cfg.record or self.cfg.replay, step, self.rank)
            if self.cfg.replay:
                with bad_input_if_fails(f"--replay {self.file}: must be a whole file of --record"):
                    self.recorded = load_file(self.file)
            for name in self.recorded:
                require(TAPE_NAMES.fullmatch(name), f"--replay {self.file}: nothing reads {name}")

    def draw(self, fresh, seed, purpose, step, prompt_index=0, sample=0, t=0):
        """Return a draw: fresh, or the recorded one in its place."""
        if not self.file or purpose not in (LATENTS, NOISE, TRAIN_STEPS):
            return fresh
        group = purpose == LATENTS and self.cfg.init_same_noise  # one draw, wherever sample 0 lies
        row = next(row for row, (_, p, i) in enumerate(self.keys)
                   if p == prompt_index and (group or i == sample))
        samples, rank, T = len(self.keys), self.rank, self.cfg.sampling_steps
        name, count = {
            LATENTS: (f"input_latents_{step + 1}_{rank}" + f"_{row}" * (row > 0), 1),
            NOISE: (f"coff_{(step * samples + row) * T + t}_{rank}", 1),
            TRAIN_STEPS: (f"perms_{step + 1}_{rank}", samples)}[purpose]
        if self.cfg.replay:
            return self.find(name, (count, *fresh.shape))[row % count].to(fresh.dtype)
        self.results.setdefault(name, fresh.new_zeros(count, *fresh.shape))[row % count] = fresh
        return fresh

    def find(self, name, shape):
        """Return a recorded tensor; refuse one that is missing or has another shape."""
        found = tuple(self.recorded[name].shape) if name in self.recorded else "is missing"
        require(found == tuple(shape),
                f"--replay {self.file}: {name} {found}: must be {tuple(shape)}")
        return self.recorded[name]

    def note(self, stage, *results):
        """Note a stage's results and return the first; of images the recorded one, so that the
        reward and what follows from it are compared on the same images."""
        for result in results if self.file else ():
            name = f"{stage}.{sum(key.startswith(f'{stage}.') for key in self.results)}"
            result = torch.as_tensor(result).detach().to("cpu", torch.float32, copy=True)
            self.results[name] = result.contiguous()
            if name in self.recorded:
                self.find(name, result.shape)
        replayed = self.recorded.get(f"{stage}.0") if stage == "images" else None
        return results[0] if replayed is None else replayed.to(results[0].device)

    def close(self):
        """End a GRPO step: write it, or compare it with the recorded one."""
        if self.file and self.cfg.record:
            with atomic_write(self.file) as path:
                save_file(self.results, path)
        for name, theirs in self.recorded.items():
            stage, _, number = name.partition(".")
            if stage not in TOLERANCES or stage in ("loss", "grad_norm") and number != "0":
                continue  # after the first optimizer step AdamW amplifies which ratios are clipped
            error = (self.results.get(name, theirs * math.nan) - theirs).abs()
            measure = error.mean() if TOLERANCES[stage][0] == "mean" else (
                error.sum() / theirs.abs().sum().clamp(min=1e-30))
            self.errors.append((self.step, list(TOLERANCES).index(stage), self.rank, error.numel(),
                                measure.item()))
        self.file, self.recorded = None, {}

    def verdict(self):
        """Return the table of a replay over all processes as text; its last line is OK or OFF."""
        errors, off = sum(gather(self.errors), []), []
        lines = ["stage                     count       worst     allowed"]
        for i, (stage, (measure, *limits)) in enumerate(TOLERANCES.items()):
            rows, limit = [row for row in errors if row[1] == i], limits[self.cfg.dtype == "bf16"]
            off += (wrong := [row for row in rows if not row[-1] <= limit])  # nan is OFF, too
            word = "OFF" if wrong else "OK" if rows else "not recorded"
            count, worst = sum(row[3] for row in rows), max([row[4] for row in rows], default=0)
            lines.append(f"{stage:18}{count:13}{worst:12.1e}{limit:12.1e} {measure:9}{word}")
        if off:
            step, i, rank, *_ = min(off)
            lines.append(f"first OFF: step {step + 1}, rank {rank}, stage {list(TOLERANCES)[i]}; "
                         "later stages inherit its error")
        word = "OFF" if off else "OK" if errors else "without results to compare"
        return "\n".join([*lines, f"replay {word}"])

def tape_file(folder, step, rank):
    return Path(folder) / f"step_{step + 1:05d}_rank_{rank}.safetensors"

def read_record(folder):
    """Return a record's settings, and the prompts of its GRPO steps."""
    types = {f.name: f.type for f in fields(Config)}
    with bad_input_if_fails(f"--replay {folder}: must be a folder of --record, or like one"):
        info = json.loads((Path(folder) / "config.json").read_text())
        unknown = sorted(info.keys() - types.keys() - {"machine", "versions", "step_prompts"})
        require(not unknown, f"nothing reads {' '.join(unknown)}")
        settings = {name: types[name](value) for name, value in info.items()
                    if name in types and name not in MACHINE_LOCAL}
    return settings, info.get("step_prompts") or []

TAPE = Tape()

# --------------------------------------------------------------------------------------- processes

def init_distributed(name):
    """Select the device, and join torchrun's processes: device, rank, world size."""
    device = reward.select_device(name)
    torch.get_device_module(device).set_device(device)
    if "RANK" not in os.environ:
        return device, 0, 1
    backend = dist.get_default_backend_for_device(device)
    if reward.is_accelerator(device):  # gloo carries objects: HCCL lacks collectives they need
        backend = f"cpu:gloo,{device.type}:{backend}"
    with bad_input_if_fails("RANK is set, but not all of torchrun's variables: unset it, or use "
                            "torchrun"):
        dist.init_process_group(backend)
    return device, dist.get_rank(), dist.get_world_size()

def gather(item):
    """Return the item of every process, in the order of their ranks; all wait for all."""
    items = [item]
    if dist.is_initialized():
        dist.all_gather_object(items := [None] * dist.get_world_size(), item)
    return items

def shard(transformer, device, dtype):
    """Apply FSDP2: over the processes of a machine; machines replicate, and average gradients."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    sizes = (world // local, local) if local and world > local else (world,)
    names = ("replicate", "shard")[-len(sizes):]
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # only read here
    for part in [*transformer.transformer_blocks, *transformer.single_transformer_blocks,
                 transformer]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
    transformer.set_reshard_after_forward(False)  # a block is gathered once for all calls up to
    transformer.set_reshard_after_backward(False)  # the next optimizer step, not at each of them

# ------------------------------------------------------------------------------------------ models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the linear layers that get adapters: those of attention and feed-forward in every block
LORA_TARGETS = (r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
                r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)")

def read_model_config(model):
    """Return the transformer's config; refuse a pipeline that is not FLUX.1's text-to-image."""
    kind = diffusers.FluxPipeline.load_config(model)["_class_name"]
    config = diffusers.FluxTransformer2DModel.load_config(model, subfolder="transformer")
    require(kind == "FluxPipeline", f"it is a {kind}, must be a FluxPipeline")
    require("quantization_config" not in config,
            "its weights are quantized, training needs the original ones")
    return config

def load_transformer(cfg, device):
    """Load the transformer: all weights in fp32, or frozen ones in cfg.dtype and fp32 adapters.

    Several processes shard it with FSDP2: each keeps a part of the weights, and of the mean of all
    gradients. One process reads the weights, the others build meta tensors.
    """
    dtype, weights = DTYPES[cfg.dtype] if cfg.lora_rank else torch.float32, {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        loaded = prepare_policy(diffusers.FluxTransformer2DModel.from_pretrained(
            cfg.model, subfolder="transformer", dtype=dtype, use_safetensors=True), cfg)
        weights = loaded.state_dict()
    if not dist.is_initialized():
        return loaded.to(device)
    config = read_model_config(cfg.model)
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel.from_config(config).to(dtype)
        shard(prepare_policy(transformer, cfg), device, DTYPES[cfg.dtype])
    transformer.to_empty(device=device)
    set_model_state_dict(transformer, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    return transformer

def prepare_policy(transformer, cfg):
    """Add adapters, gradient checkpointing, an attention backend and compilation, as cfg says."""
    if cfg.lora_rank:
        from peft import LoraConfig  # takes seconds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            transformer.add_adapter(LoraConfig(  # which freezes all else
                r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=LORA_TARGETS))
        for p in trained_parameters(transformer).values():
            p.data = p.data.float()
    share, blocks = cfg.gradient_checkpointing, [
        *transformer.transformer_blocks, *transformer.single_transformer_blocks]
    if chosen := {id(b) for i, b in enumerate(blocks) if int((i + 1) * share) > int(i * share)}:
        transformer.enable_gradient_checkpointing(
            lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False)
            if id(block) in chosen else block(*inputs))
    if cfg.attention != "native":
        with bad_input_if_fails(f"--attention {cfg.attention}: diffusers cannot use it here"):
            transformer.set_attention_backend(cfg.attention)
    if cfg.compile:
        transformer.compile_repeated_blocks()
    return transformer

def trained_parameters(transformer):
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}

@contextmanager
def dcp_errors():
    """Raise the first error that DCP has wrapped into CheckpointException, a BaseException."""
    try:
        yield
    except dcp.CheckpointException as error:  # its failures: {rank: (exception, traceback)}
        raise next(iter(error.failures.values()))[0] from None

class Policy:
    """The trained transformer, its optimizer, predict (its velocity), reference (the initial
    policy's, for kl_beta), and moving averages of its weights (for ema_decay)."""

    def __init__(self, cfg, grid, device):  # grid: (h, w) of latents
        self.transformer, self.reference = load_transformer(cfg, device), None
        self.parameters = trained_parameters(self.transformer)
        inputs = dict(ids=image_ids(*grid).to(device), guidance=cfg.guidance,
                      bf16=cfg.dtype == "bf16")
        self.predict = partial(velocity, self.transformer, **inputs)
        # fused makes no temporary copies of all weights, which would set the peak of memory
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
        self.optimizer.register_step_pre_hook(lambda *_: self.reshard())
        for p in self.parameters.values():  # as AdamW's first step would; a checkpoint needs them
            self.optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                           exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()
                         if cfg.ema_decay}
        if cfg.kl_beta and cfg.lora_rank:
            self.reference = self.predict_without_adapters
        elif cfg.kl_beta:
            initial = load_transformer(cfg, device).requires_grad_(False)
            self.reference = partial(velocity, initial, **inputs)

    @torch.no_grad()
    def predict_without_adapters(self, *batch):
        self.transformer.disable_adapters()
        v = self.predict(*batch)
        self.transformer.enable_adapters()
        return v

    def reshard(self):
        """Free the gathered weights, as the sharded ones are about to change."""
        for part in self.transformer.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def update_ema(self, decay):
        """Move the averages towards the weights: mean += (1 - decay) (weight - mean)."""
        for name, mean in self.averages.items():
            mean.lerp_(self.parameters[name].detach(), 1 - decay)

    @contextmanager
    def ema_weights(self):
        """Exchange the weights for their moving averages, if there are any, inside the block."""
        def exchange():
            self.reshard()
            for name, mean in self.averages.items():
                weight = self.parameters[name].detach()
                kept = weight.clone()
                weight.copy_(mean)
                mean.copy_(kept)

        exchange()
        yield
        exchange()

    def state(self):
        """Return {name: tensor} of the weights, their averages, and AdamW's state."""
        state = {f"average.{name}": mean for name, mean in self.averages.items()}
        for name, p in self.parameters.items():
            state[f"weights.{name}"] = p.detach()
            state |= {f"moments.{name}.{key}": x for key, x in self.optimizer.state[p].items()}
        return state

    def save(self, folder, rank):
        """Write a checkpoint atomically, as safetensors: torch's own pickles can run code."""
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may be
        with atomic_write(folder, rank) as work, dcp_errors():
            dcp.save({name: x.detach().cpu() for name, x in self.state().items()},
                     storage_writer=dcp.HuggingFaceStorageWriter(work, save_distributed=True),
                     no_dist=not dist.is_initialized())

    def load(self, folder):
        """Load a checkpoint, whatever number of processes wrote it."""
        with bad_input_if_fails(f"--resume {folder}: is not of this policy"), dcp_errors():
            dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder),
                     no_dist=not dist.is_initialized())

    def export(self, cfg, folder, rank):
        """Write what diffusers reads: a LoRA for FluxPipeline.load_lora_weights, or the model."""
        weights = {}
        for name, p in self.parameters.items():
            full = p.full_tensor() if hasattr(p, "full_tensor") else p  # every process takes part
            weights |= {name: full.detach().cpu()} if rank == 0 else {}
        if rank:
            return
        with atomic_write(folder) as work:
            if cfg.lora_rank:  # many readers take alpha for the rank: fold the scale into B
                scale = cfg.lora_alpha / cfg.lora_rank
                diffusers.FluxPipeline.save_lora_weights(work, {
                    name.replace(".default", ""): p * scale if "lora_B" in name else p
                    for name, p in weights.items()})
            else:
                with torch.device("meta"):  # FSDP has renamed the class of the trained one
                    model = diffusers.FluxTransformer2DModel.from_config(self.transformer.config)
                model.load_state_dict(weights, assign=True)
                model.save_pretrained(work / "transformer")

# ----------------------------------------------------------------------------------------- the run

class Run:
    """What all GRPO steps share: models, rewards {name: (weight, function)}, step_prompts (P for
    each step), shape (c, h, w) of latents, out (the folder that all is written to)."""

    def __init__(self, cfg, prompts, out, device, rank, world):
        self.out, self.device, self.rank, self.world = out, device, rank, world
        (self.step_prompts, self.eval_prompts), self.board = prompts, None
        if cfg.dtype == "auto":
            cfg = replace(cfg, dtype="bf16" if reward.is_accelerator(device) else "fp32")
        if cfg.model == "tiny":
            cfg = replace(cfg, **tiny_models(cfg))
        part = cfg.batch_size // world  # rollout and update use equal micro-batches
        cfg = replace(cfg, micro_batch=max(
            n for n in range(1, min(part, cfg.micro_batch) + 1) if part % n == 0))
        self.rewards = {name: (weight, reward.load_reward(
            name, getattr(cfg, name, ""), getattr(cfg, f"{name}_arch", ""), device,
            cfg.reward_fp32)) for name, weight in reward.parse_rewards(cfg.reward).items()}
        with bad_input_if_fails(
                f"--model {cfg.model}: must be tiny, or a folder or hub name of FLUX.1 for "
                "diffusers, its licence accepted (`hf auth login`), its files whole (`git lfs "
                "pull`) and without a variant such as fp16"):
            config = read_model_config(cfg.model)
            if not config["guidance_embeds"]:  # FLUX.1-schnell takes shorter texts
                cfg = replace(cfg, text_length=min(cfg.text_length, 256))
            self.cfg, self.text_files = cfg, self.encode_prompts(cfg)
            self.vae = diffusers.AutoencoderKL.from_pretrained(
                cfg.model, subfolder="vae", dtype=DTYPES[cfg.dtype], use_safetensors=True)
            self.vae.to(device).requires_grad_(False)
            pixels = 2 ** (len(self.vae.config.block_out_channels) - 1)  # a side of a latent pixel
            self.shape = config["in_channels"] // 4, cfg.height // pixels, cfg.width // pixels
            self.policy = Policy(cfg, self.shape[1:], device)

    @torch.no_grad()
    def encode_prompts(self, cfg):
        """Embed the prompts of the run, once, by its first process: {prompt: file in out/text}."""
        diffusers.logging.set_verbosity_error()  # else it prints what it cuts, whatever that holds
        files, folder = {}, self.out / "text"
        for prompt in [*self.eval_prompts, *sum(self.step_prompts[:cfg.steps], [])]:
            about = f"{cfg.model} {cfg.text_length} {cfg.dtype} {prompt}"
            name = hashlib.sha256(about.encode()).hexdigest()[:32]
            files[prompt] = folder / f"{name}.safetensors"
        missing = [prompt for prompt, file in files.items() if not file.exists()]
        if self.rank == 0 and missing:
            folder.mkdir(exist_ok=True)
            pipe = diffusers.FluxPipeline.from_pretrained(
                cfg.model, transformer=None, vae=None, scheduler=None, dtype=DTYPES[cfg.dtype],
                use_safetensors=True).to(self.device)
            for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder),
                                       (pipe.tokenizer_2, pipe.text_encoder_2)):
                size = encoder.config.vocab_size
                require(0.9 * size <= len(tokenizer) <= size,  # it loads without its files
                        f"a tokenizer has {len(tokenizer)} tokens, its encoder {size}: files of it "
                        "are missing")
            lengths = map(len, pipe.tokenizer_2(missing, truncation=False).input_ids)
            if long := sum(length > cfg.text_length for length in lengths):
                print(f"{long} of {len(missing)} prompts are cut to {cfg.text_length} tokens")
            for prompt in tqdm(missing, desc="text embeddings", disable=len(missing) < 100):
                embeds, pooled, _ = pipe.encode_prompt(  # alone: none depends on its neighbours
                    prompt, None, max_sequence_length=cfg.text_length)
                with atomic_write(files[prompt]) as path:
                    save_file(dict(embeds=embeds[0].cpu(), pooled=pooled[0].cpu()), path)
        gather(None)  # the others wait for it
        return files

    def text(self, prompts):
        """Return T5's embeddings (B, N, E) and CLIP's pooled ones (B, E')."""
        texts = {prompt: load_file(self.text_files[prompt]) for prompt in dict.fromkeys(prompts)}
        return tuple(torch.stack([texts[prompt][name] for prompt in prompts]).to(self.device)
                     for name in ("embeds", "pooled"))

    def label(self, scores):
        """Name scores for metrics: "reward" if just one is trained; by name, if there are more."""
        trained = [name for name, (weight, _) in self.rewards.items() if weight]
        labels = {"reward": scores[trained[0]]} if len(trained) == 1 else {}
        return labels | (scores if len(scores) > 1 else {})

    def evaluate(self, step):
        """Sample held-out noise with the ODE, always the same, and return the mean scores; the
        processes share the work. In the tiny world a judge looks, too."""
        cfg, count = self.cfg, self.cfg.eval_images
        part = math.ceil(count / self.world)
        mine = [i % count for i in range(self.rank * part, (self.rank + 1) * part)]
        prompts = [self.eval_prompts[i % len(self.eval_prompts)] for i in mine]
        x = pack_latents(torch.stack([randn(self.shape, 0, HELD_OUT, i) for i in mine]))
        x, text = x.to(self.device), self.text(prompts)
        with self.policy.ema_weights():
            x0 = rollout(self.policy.predict, x, text, None, cfg, eta=0).x0
        images = decode(self.vae, x0, self.shape[1:], cfg.micro_batch)
        scores = reward.score(self.rewards, images, prompts, f"the evaluation of step {step}")
        values = {"held_out" if name == "reward" else f"held_out_{name}": score
                  for name, score in self.label(scores).items()}
        if set(self.eval_prompts) <= set(reward.TINY_PROMPTS):
            values |= reward.judge_tiny(images, prompts, self.rewards)
        shown = torch.cat(gather(images[:24].cpu()))[:24]
        if self.rank == 0:  # rows of four, each 96 to 360 pixels wide
            scale = min(max(shown.shape[-1], 96), 360) / shown.shape[-1]
            shown = F.interpolate(shown, scale_factor=scale, mode="nearest-exact")
            with atomic_write(self.out / "images" / f"step_{step:05d}.png") as path:
                save_image(shown, path, nrow=4, format="png")
        return {name: round(torch.cat(gather(value))[:count].mean().item(), 6)
                for name, value in values.items()}

    def metrics(self, step, scores, advantages, stats):
        """Return the line of metrics.jsonl: means over all processes; the largest of deviations."""
        G, line = self.cfg.num_generations, {}
        for name, r in self.label(scores).items():
            line |= {name: r.mean(), f"{name}_std": r.view(-1, G).std(1).mean()}
        line["zero_std_frac"] = (advantages.view(-1, G) == 0).all(1).float().mean()
        every = gather(stats)
        for name in stats:
            values = [each[name] for each in every]
            line[name] = max(values) if name.endswith("_dev") else sum(values) / len(values)
        return {"step": step} | {name: float(f"{value:.7g}") for name, value in line.items()}

    def open(self, info, done):
        """Clear what a kill has left, write config.json, and keep the metrics up to step `done`."""
        for name in ("images", "checkpoints"):
            (self.out / name).mkdir(exist_ok=True)
        for leftover in [*self.out.glob("**/.writing-*"), *self.out.glob("**/.old-*"),
                         self.out / "before_after.png"]:
            remove(leftover)
        write_json(self.out / "config.json", info)
        kept = [line for line in read_metrics(self.out) if done and line["step"] <= done]
        with atomic_write(self.out / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=done + 1)
        except Exception as error:  # it is optional, and a broken installation can raise anything
            print(printable(f"no TensorBoard: {error}"))

    def write(self, line):
        """Append a line to metrics.jsonl; after an evaluation draw the curves."""
        if self.rank:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, line["step"])
        if any("held_out" in name for name in line):
            plot(self.out / "reward.png", [self.out])

def plot(path, folders, *pictures):
    """Plot pictures of evaluations, files of these runs, and the curves of the runs beside them."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing in this process
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    pictures = {file: imread(file) for file in pictures if file.exists()}
    height = max([4.5, *(4 * len(image) / len(image[0]) + 0.4 for image in pictures.values())])
    figure = Figure((4 * len(pictures) + 5, height), layout="constrained", dpi=120)
    *panels, axes = figure.subplots(1, len(pictures) + 1, squeeze=False)[0]
    for panel, (file, image) in zip(panels, pictures.items()):
        panel.imshow(image)
        panel.set_title(f"{file.parent.parent}, step {int(file.stem[5:])}", parse_math=False)
        panel.axis("off")
    for folder in folders:
        lines = read_metrics(folder)
        for name in dict.fromkeys(
                name for line in lines for name in line  # rewards, and all of an evaluation alone
                if f"{name}_std" in line or "loss" not in line and name != "step"):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{name} of {folder}" if len(folders) > 1 else name
            axes.plot(*zip(*points), ".-", label=label, zorder=-len(points))  # evaluations on top
    axes.set_xlabel("GRPO step")
    axes.legend(frameon=False)
    with atomic_write(path) as work:
        figure.savefig(work, format="png")

def read_metrics(out):
    """Return the whole lines of metrics.jsonl; a kill may have cut off the last one."""
    path = Path(out) / "metrics.jsonl"
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]

def write_json(path, value):
    with atomic_write(path) as work:
        work.write_text(json.dumps(value, indent=1))

def compare_runs(*folders):
    """Print the rewards of two runs side by side, draw compare.png into the second, and return
    whether their means over every ten steps, and over all, are within 5 % of each other."""
    with bad_input_if_fails(f"--compare {' '.join(folders)}: must be the folders of two runs with "
                            "rewards and steps in common"):
        runs = [{line["step"]: line for line in read_metrics(folder) if "loss" in line}
                for folder in folders]
        steps = sorted(runs[0].keys() & runs[1].keys())
        names = [key for key in runs[0][steps[0]] if f"{key}_std" in runs[1][steps[0]]]
        table = np.array([[[run[step][key] for step in steps] for run in runs] for key in names])
    worst = 0.0
    print("reward            steps           A         B  difference")
    for name, rows in zip(names, table):
        for part in [*(slice(i, i + 10) for i in range(0, len(steps), 10)), slice(None)]:
            a, b = rows[:, part].mean(1)
            worst = max(worst, abs(b / a - 1))
            print(f"{printable(name):12}{steps[part][0]:5} to {steps[part][-1]:5}{a:12.4f}{b:10.4f}"
                  f"{b / a - 1:+12.2%}")
    plot(Path(folders[1]) / "compare.png", folders, *(
        max(Path(f, "images").glob("*.png"), default=Path(f, "none")) for f in folders))
    print(f"look at {folders[1]}/compare.png\ncompare {'OK' if worst <= 0.05 else 'OFF'}")
    return worst <= 0.05

# --------------------------------------------------------------------------------------- tiny FLUX

TINY = dict(  # the defaults of --model tiny, where they differ
    steps=180, height=32, width=32, text_length=4, sampling_steps=6, eta=0.7, num_prompts=4,
    micro_batch=12, batch_size=12, learning_rate=2e-4, clip_range=5e-4, ema_decay=0.9,
    gradient_checkpointing=0.0, eval_images=192)
MISCAPTIONED = 0.6  # share of the pre-training samples that get a prompt drawn at random
TINY_VERSION = 2  # to be raised with any change of what is built, and of text_length and shift

def tiny_models(cfg):
    """Return the settings that name the tiny models; the first process builds them, once."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "grpo_flux", f"tiny-{TINY_VERSION}").absolute()
    if int(os.environ.get("RANK", 0)) == 0 and not folder.exists():
        with bad_input_if_fails(f"XDG_CACHE_HOME={home}: must be a folder to write models to"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name("lock")):
                if not folder.exists():
                    with atomic_write(folder) as work:
                        build_tiny(work)
    gather(None)  # the others wait for it
    settings, arch = {"model": str(folder / "flux")}, str(folder / "hps" / "tiny-clip.json")
    for name in ("hps", "clip"):
        if not getattr(cfg, name):
            settings |= {name: str(folder / "hps" / f"{name}.pt"), f"{name}_arch": arch}
    return settings

def build_tiny(folder):
    """Build a tiny FLUX.1 for diffusers, which draws well but ignores prompts, and a tiny HPS."""
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

    It learns to draw but hardly to follow prompts, as most captions are random: what GRPO teaches,
    to draw what was asked for, anybody can see.
    """
    cfg, vae, captions = Config(**TINY), pipe.vae, miscaption(labels, MISCAPTIONED)
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
        sigma, noise = cfg.shift * t / (1 + (cfg.shift - 1) * t), torch.randn_like(z[rows])
        x, inputs = (1 - sigma) * z[rows] + sigma * noise, [c[captions[rows]] for c in text]
        v = velocity(transformer, x, sigma, inputs, image_ids(8, 8), cfg.guidance, bf16=False)
        return F.mse_loss(v, noise - z[rows])

    reward.fit(transformer, loss, len(z), steps=800, batch=32, rate=4e-3,
               title=f"tiny FLUX (2/3): draws well; {MISCAPTIONED:.0%} of captions are random")
    return transformer

# -------------------------------------------------------------------------------------------- main

# settings of a run's machine and of its own files, which a replay does not take from its record
MACHINE_LOCAL = ("device", "out", "resume", "record", "replay", "compare", "deterministic")

def read_command_line(argv):
    """Return Config from flags, and for --replay the prompts of each recorded GRPO step."""
    require(__doc__, "PYTHONOPTIMIZE 2 or python -OO: must be lower, diffusers needs docstrings")
    about, *parts = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "grpo_flux.py", "grpo_flux.py [--flag value ...]", about, "".join(parts[-2:-1]),
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: reward.exit_with_error(f"{message}; see --help")
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs=2, metavar="RUN")}
    for f in fields(Config):
        kind = kinds.get(f.type, dict(type=f.type, metavar=f.type.__name__.upper()))
        help, low, high, choices = f.metadata.values()
        notes = [*choices, f"default {f.default}" * (f.default not in ("", ())),
                 f"tiny {TINY.get(f.name)}" * (f.name in TINY),
                 f"{low} to {high}" * (low is not None)]
        notes = f" ({', '.join(filter(None, notes))})" if any(notes) else ""
        parser.add_argument(f"--{f.name}", **kind, default=argparse.SUPPRESS,
                            help=f"{help}{notes}".replace("%", "%%"))
    given, step_prompts = vars(parser.parse_args(argv)), []
    if "replay" in given:
        settings, step_prompts = read_record(given["replay"])
        given = settings | given
    return Config(**(TINY if given.get("model", "tiny") == "tiny" else {}) | given), step_prompts

def check_inputs(cfg, step_prompts, world):
    """Refuse what cannot work before a model is loaded; return the P prompts of each GRPO step,
    and those of the evaluations."""
    P, steps = cfg.num_prompts, cfg.steps
    require(cfg.batch_size % world == 0, f"--batch_size {cfg.batch_size}: must be a multiple of "
            f"the number of processes, {world}")
    require(not cfg.record or not Path(cfg.record).exists(),
            f"--record {cfg.record}: must be a new folder")
    for name in reward.parse_rewards(cfg.reward):
        if ":" in name:
            reward.load_reward(name)
    if cfg.replay:
        last, other = (tape_file(cfg.replay, *at) for at in ((steps - 1, world - 1), (0, world)))
        require(last.exists() and not other.exists(), f"--replay {cfg.replay}: must be of as many "
                f"processes, {world}, and have --steps {steps}")
        require([len(prompts) for prompts in step_prompts[:steps]] == [P] * steps,
                f"--replay {cfg.replay}: its config.json must have step_prompts, {P} prompts for "
                f"each of {steps} steps")
        return step_prompts, step_prompts[0]
    require(cfg.prompts or cfg.model == "tiny",
            "--prompts (not given): must be a text file with a prompt a line")
    prompts = reward.read_prompts(cfg.prompts) if cfg.prompts else reward.TINY_PROMPTS
    order = [prompts[i] for epoch in range(math.ceil(steps * P / len(prompts)))
             for i in randperm(len(prompts), cfg.seed, PROMPTS, epoch).tolist()]  # shuffled anew
    return [order[i * P:(i + 1) * P] for i in range(steps)], prompts[:cfg.eval_images]

def checkpoints(out):
    """Return the folders of a run's checkpoints, from first to last."""
    folders = Path(out, "checkpoints").glob("step_*")  # some may be a user's copies
    return sorted((path for path in folders if path.name[5:].isdecimal()),
                  key=lambda path: int(path.name[5:]))

def find_checkpoint(cfg, out):
    """Return the folder to go on from, or None; refuse one that is broken or of another policy."""
    own = checkpoints(out)
    if cfg.replay or not own and cfg.resume in ("auto", "none"):
        return None
    folder = own[-1] if own else Path(cfg.resume)
    require(not own or cfg.resume != "none",
            f"--resume none: {out} holds a run; remove it, or give another --out")
    require(Path(cfg.resume).resolve() not in [path.resolve() for path in own[:-1]],
            f"--resume {cfg.resume}: {out} has gone on to {folder}; give that, or another --out")
    with bad_input_if_fails(f"--resume {cfg.resume}: must be auto, none, or a whole folder such as "
                            f"RUN/checkpoints/step_00020, which {folder} is not"):
        step = int(folder.name.removeprefix("step_"))
        for file in [*folder.glob("*.safetensors")] or [folder / "*.safetensors"]:
            safe_open(file, "pt").__enter__()  # is it as long as its header says?
        then = json.loads((folder.parent.parent / "config.json").read_text())
    for name in ("model", "lora_rank", "lora_alpha", "seed"):
        ours, theirs = getattr(cfg, name), then.get(name)
        require(Path(str(ours)).name == Path(str(theirs)).name,  # folders can move
                f"--{name} {ours}: must be {theirs}, as in the run of {folder}")
    require(cfg.steps >= step,
            f"--steps {cfg.steps}: must be at least {step}, where {folder} goes on from")
    return folder

@contextmanager
def stop_signals():
    """List the signals that ask the run to stop: it ends its step and saves. A second one kills."""
    received, before = [], {}

    def note(number, _):
        received.append(number)
        for known in before:
            signal.signal(known, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not installed by Python

def train(run, info, checkpoint):
    """Train from the checkpoint, or from the start, to the last step; save, evaluate and export."""
    cfg, out, policy, bad = run.cfg, run.out, run.policy, 0
    done = int(checkpoint.name[5:]) if checkpoint else 0
    if checkpoint:
        policy.load(checkpoint)
    if run.rank == 0:
        run.open(info, done)
    P, G, K = cfg.num_prompts, cfg.num_generations, num_train_steps(cfg)
    if run.rank == 0:
        print(f"a GRPO step: {P} prompts x {G} images, {K} of {cfg.sampling_steps} denoising steps "
              f"trained, {P * G * K} transitions; {P * G // cfg.batch_size} optimizer steps, "
              f"{cfg.batch_size / (P * G):.0%} on-policy\n{len(run.text_files)} prompts, the "
              f"first: {printable(run.eval_prompts[0][:80])}", flush=True)
    with stop_signals() as received, tqdm(
            total=cfg.steps, initial=done, desc="GRPO", unit="step", disable=run.rank > 0,
            dynamic_ncols=True) as bar:
        if done == 0:
            run.write({"step": 0} | run.evaluate(0))
        for step in range(done + 1, cfg.steps + 1):
            scores, advantages, stats = train_step(step - 1, run)
            line = run.metrics(step, scores, advantages, stats)
            if step % cfg.eval_every == 0 or step == cfg.steps:
                line |= run.evaluate(step)
            run.write(line)
            bar.set_postfix_str(" ".join(f"{name} {line[name]:.3g}" for name in (
                *run.label(scores), "ratio", "clip_frac", "grad_norm")), refresh=False)
            bar.update()
            bad = bad + 1 if stats["skipped"] else 0
            if bad == 3:
                raise FloatingPointError(f"the gradient was not finite in steps {step - 2} to "
                                         f"{step}; a lower --learning_rate may help")
            stop = any(gather(bool(received)))
            if step % cfg.save_every == 0 or step == cfg.steps or stop:
                policy.save(out / "checkpoints" / f"step_{step:05d}", run.rank)
                for folder in checkpoints(out)[:-cfg.keep_last] if run.rank == 0 else ():
                    remove(folder)
            if stop:
                sys.exit(130 if signal.SIGINT in received else 0)
    with policy.ema_weights():
        policy.export(cfg, out / "export", run.rank)
    if run.rank == 0:
        remove(out / "text")
        plot(out / "before_after.png", [out], *(
            out / "images" / f"step_{step:05d}.png" for step in (0, cfg.steps)))
        print(f"look at {out}/before_after.png; for diffusers: {out}/export")

def main(argv=None):
    cfg, step_prompts = read_command_line(argv)
    if cfg.compare:
        sys.exit(0 if compare_runs(*cfg.compare) else 3)
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    prompts, out = check_inputs(cfg, step_prompts, world), Path(
        cfg.out or f"runs/{os.path.basename(os.path.abspath(cfg.model))}")
    checkpoint, verdict = find_checkpoint(cfg, out), ""
    if (out / "before_after.png").exists() and (
            checkpoint == out / "checkpoints" / f"step_{cfg.steps:05d}"):
        print(f"the run in {out} has finished its {cfg.steps} steps; raise --steps to continue it, "
              "or give another --out")
        return
    if cfg.deterministic:
        reward.make_deterministic(cfg.seed)
    device, rank, world = init_distributed(cfg.device)
    if cfg.compile:
        reward.check_compile(device)
    lock = FileLock(out / "lock", timeout=0)
    if rank == 0:
        with bad_input_if_fails(f"--out {out}: must be a folder that can be written to, and that "
                                "no other run is at work in"):
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    try:
        run = Run(cfg, prompts, out, device, rank, world)
        packages = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")
        info = asdict(cfg) | {"dtype": run.cfg.dtype, "machine": reward.describe_device(device),
                              "versions": {name: version(name) for name in packages}}
        TAPE.start(cfg, info | {"step_prompts": prompts[0]}, rank)
        if cfg.replay:
            for step in range(cfg.steps):
                train_step(step, run)
            verdict = TAPE.verdict()
            if rank == 0:
                remove(out / "text")
                print(verdict)
        else:
            train(run, info, checkpoint)
    except Exception as error:
        if there := checkpoints(out):
            error.add_note(f"the same command goes on from {there[-1]}")
        raise
    finally:
        lock.release()
    if dist.is_initialized():
        dist.destroy_process_group()
    if verdict.endswith("OFF"):
        sys.exit(3)

def explain(error):
    """Return one line for an error that a user can act on; None for one that needs a traceback."""
    text, notes = str(error), "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, torch.OutOfMemoryError):
        text = ("out of memory: --gradient_checkpointing 1, a lower --micro_batch and LoRA "
                f"(--lora_rank 64) need less ({text})")
    elif not isinstance(error, (BadInput, OSError, SafetensorError, FloatingPointError)):
        if not isinstance(error, dist.DistError) and not re.search("gloo|nccl|hccl", text, re.I):
            return None
        text = ("another process has ended, see its message, or the network has failed "
                f"({text.strip()[:80]})")
    return text + notes

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:
        if (line := explain(problem)) is None:
            raise
        refused = isinstance(problem, BadInput)
        if refused and int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(10)  # the first process has most likely found the same, and says so
        reward.exit_with_error(line, status=2 if refused else 1)
