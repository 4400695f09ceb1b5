"""GRPO for FLUX in one file: teach a rectified-flow text-to-image model what people prefer.

DanceGRPO (Xue et al., arXiv 2505.07818) in six lines, each with the function that does it:

    1. noise and a prompt become an image in T small steps, each of them random    rollout, flux_step
    2. do that G times for one prompt: a group                                     step_prompts
    3. decode the images and let a model of human preference score them            decode, reward.HPS
    4. advantage = how far an image is above its group's mean, in deviations       group_advantages
    5. make the steps of good images more probable, those of bad ones less,        update, grpo_loss
       but only a little at a time (PPO's clipped ratio)
    6. repeat with new prompts                                                     main

What differs from the authors' code, and why:

    1. The model is told σ itself, not int(1000 σ) / 1000.
    2. A step's log-density has its constants; there they are lost at a line end. Ratios do not change.
    3. Images are made in batches. Rollout and update use the same batch size, so that the first ratio
       is exactly 1; other batch sizes take other kernels, which is why theirs is 1 only at batch 1.
    4. Every random number has a name (seed, purpose, step, prompt, sample, t): the same images on
       every device, batch size and number of processes.
    5. Samples whose advantage is 0 are left out of the update: their gradient is 0.
    6. The score of an image is not rounded to fp16: ties would have no advantage.

    python grpo_flux.py                                     # a miniature FLUX, minutes on a laptop
    torchrun --nproc_per_node 8 grpo_flux.py --model black-forest-labs/FLUX.1-dev \\
        --hps HPS_v2.1_compressed.pt --prompts prompts.txt  # the real one

Letters in the comments on shapes: B samples, G samples of a group (one prompt), T denoising steps,
L latent tokens of an image, C channels of a token, S text tokens, D channels of a text token.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import tempfile
import textwrap
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import reward
from reward import BadInput


# ------------------------------------------------------------------------------------- config

@dataclass
class Config:
    # run
    model: str = "tiny"  # "tiny", or a folder or hub name of FLUX.1 in diffusers format
    prompts: str = ""  # text file, one prompt a line, UTF-8; tiny has its own 24
    out: str = ""  # folder for everything a run writes; empty: runs/<model>, or the next free number
    cache: str = ""  # folder where the tiny models are kept; empty: ~/.cache/grpo_flux
    device: str = "auto"  # auto, cuda, npu or cpu
    dtype: str = "auto"  # of the transformer's arithmetic: fp32, bf16; auto: bf16 on an accelerator
    seed: int = 0  # names every random draw together with step, prompt, sample and t
    steps: int = 300  # GRPO steps: a rollout, its rewards, its updates
    # reward
    reward: str = "hps"  # hps, clip, package.module:function; several as hps:0.7,clip:0.3
    hps: str = ""  # file HPS_v2.1_compressed.pt
    hps_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    clip: str = ""  # file with the weights of an open_clip model, for the reward "clip"
    clip_arch: str = "ViT-H-14"  # open_clip's name of its architecture, or a .json file
    reward_fp32: bool = False  # no fp16 autocast in the reward models, to compare devices
    # rollout
    num_prompts: int = 1  # prompts of a step on each process; groups never cross processes
    num_generations: int = 12  # images of a prompt: the group that advantages are relative to
    height: int = 720  # pixels, a multiple of 16
    width: int = 720  # pixels, a multiple of 16
    sampling_steps: int = 16  # T; the last one is deterministic and never trained
    sde: str = "dance"  # dance, flow or cps: where the noise of a step comes from
    eta: float = 0.3  # noise level; 0.3 to 1, more explores more and blurs more
    shift: float = 3.0  # 3 for FLUX; above 1 spends more steps at high noise
    guidance: float = 3.5  # FLUX.1-dev's guidance input
    init_same_noise: bool = True  # a group starts from one noise: its images differ by the SDE alone
    text_length: int = 512  # T5 tokens of a prompt; at most 512 for FLUX.1-dev, 256 for schnell
    micro_batch: int = 2  # samples in one transformer call, in rollout and update; as memory allows
    # update
    timestep_fraction: float = 0.6  # share of the T-1 random steps that is trained, (0, 1]
    gradient_accumulation_steps: int = 4  # samples of an optimizer step on each process
    learning_rate: float = 1e-5  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    clip_range: float = 1e-4  # of the ratio; this small because log-probabilities are means
    adv_clip_max: float = 5.0  # advantages are cut to +- this
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: less memory
    # pictures
    eval_every: int = 20  # steps between image grids with held-out noise
    eval_images: int = 16  # ODE samples that a grid and the held-out reward are made of

    def __post_init__(self):
        positive = ("steps num_prompts height width shift text_length micro_batch learning_rate "
                    "gradient_accumulation_steps max_grad_norm clip_range adv_clip_max eval_every eval_images")
        limits = {name: (1e-12, 1e9) for name in positive.split()} | dict(
            seed=(0, 2**32 - 1), num_generations=(2, 10_000), sampling_steps=(2, 1000), eta=(1e-6, 10),
            guidance=(0, 1000), weight_decay=(0, 1), clip_range=(1e-12, 1), timestep_fraction=(1e-6, 1),
            height=(16, 8192), width=(16, 8192))
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses nan
                raise BadInput(f"--{name} {value}: must be between {low:g} and {high:g}"
                               if low > 1e-12 else f"--{name} {value}: must be above 0")
        allowed = dict(device=reward.DEVICES, dtype=("auto", "fp32", "bf16"), sde=("dance", "flow", "cps"))
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise BadInput(f"--{name} {getattr(self, name)}: must be one of {', '.join(values)}")
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise BadInput(f"--{name} {getattr(self, name)}: must be a multiple of 16, for example "
                               f"{getattr(self, name) // 16 * 16}")
        batch, group = self.micro_batch, self.gradient_accumulation_steps
        if group % batch:
            raise BadInput(f"--gradient_accumulation_steps {group} must be a multiple of --micro_batch {batch}")
        if self.num_prompts * self.num_generations % group:
            raise BadInput(f"--num_prompts {self.num_prompts} x --num_generations {self.num_generations} samples "
                           f"must be a multiple of --gradient_accumulation_steps {group}")
        reward.parse_rewards(self.reward)


TINY = dict(  # what --model tiny takes instead of the defaults above; the command line wins over both
    steps=150, height=32, width=32, text_length=8, sampling_steps=8, eta=0.7, num_prompts=4,
    micro_batch=12, gradient_accumulation_steps=12, timestep_fraction=1.0, learning_rate=1e-4,
    gradient_checkpointing=False, eval_images=192)


# ------------------------------------------------------------------------------------- flow SDE

def sigma_schedule(sampling_steps: int, shift: float) -> list[float]:
    """Noise levels σ of T steps, T + 1 values from 1.0 (noise) down to 0.0 (image).

    t = linspace(1, 0, T + 1);  σ = s t / (1 + (s - 1) t)      (Esser et al., arXiv 2403.03206, section 5.3)
    """
    ts = [1 - i / sampling_steps for i in range(sampling_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in ts]


def flux_step(v, x, sigma, sigma_next, eta, sde="dance", noise=None, x_next=None):
    """One denoising step σ -> σ' of the SDE, or the log-density of a step that was taken earlier.

    A rectified flow has x = (1 - σ) x0 + σ x1 with noise x1, and the model predicts v = x1 - x0. The ODE
    dx = v dσ makes images without any randomness. These steps add noise of deviation `std` and correct
    the mean, so that x keeps the distribution it has in the ODE. With dt = σ' - σ < 0:

      dance  score = -(x - (1 - σ) x0) / σ²;  mean = x + v dt - ½ η² score dt;  std = η √(-dt)
             DanceGRPO, arXiv 2505.07818, section 3
      flow   the same with η √(σ / (1 - σ)) for η; at σ = 1, σ' stands for the σ in 1 - σ
             Flow-GRPO, arXiv 2505.05470, section 4
      cps    std = σ' sin(η π/2);  mean = (1 - σ') x0 + √(σ'² - std²) x1
             Flow-CPS, arXiv 2509.05952

    v, x, noise, x_next: (B, L, C) fp32. sigma, sigma_next: floats or tensors (B, 1, 1).
    Give `noise` to take a step, `x_next` to score one; with eta = 0 the step is the ODE's and needs neither.

    Returns x_next (B, L, C), x0 (B, L, C), the image that v points to, and logp (B,): log N(x_next; mean, std²)
    averaged over L and C (nan if eta = 0: no density). A mean, not a sum: exp(logp - logp_old) is the
    (L C)-th root of the true ratio, which is why the clip range is as small as 1e-4.
    """
    sigma, sigma_next = (torch.as_tensor(s, dtype=x.dtype, device=x.device) for s in (sigma, sigma_next))
    dt = sigma_next - sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    stochastic = eta > 0
    if sde == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1
    elif sde in ("dance", "flow"):
        if sde == "flow":
            eta = eta * (sigma / (1 - torch.where(sigma < 1, sigma, sigma_next))).sqrt()
        std = eta * (-dt).sqrt()
        score = -(x - (1 - sigma) * x0) / sigma**2
        mean = x + v * dt - 0.5 * eta**2 * score * dt
    else:
        raise ValueError(f"sde {sde!r} must be dance, flow or cps")
    if not stochastic:
        return mean, x0, x.new_full((len(x),), float("nan"))
    if x_next is None:
        if noise is None:
            raise ValueError("flux_step needs noise to take a step, or x_next to score one")
        x_next = mean + std * noise
    # x_next stays fp32: rounding it to bf16 here would move the ratio by several clip ranges
    z = (x_next.detach() - mean) / std
    logp = (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).mean(dim=(1, 2))
    return x_next, x0, logp


def pack_latents(z):
    """(B, c, h, w) -> (B, h/2 * w/2, 4c): each 2x2 patch of latent pixels becomes one token, FLUX's own order."""
    B, c, h, w = z.shape
    z = z.reshape(B, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(B, h // 2 * (w // 2), 4 * c)


def unpack_latents(x, h, w):
    """(B, h/2 * w/2, 4c) -> (B, c, h, w), the inverse of pack_latents; h and w count latent pixels."""
    B, _, C = x.shape
    x = x.reshape(B, h // 2, w // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C // 4, h, w)


def image_ids(h, w):
    """(h/2 * w/2, 3): the position (0, row, column) of every token, for FLUX's rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


# ------------------------------------------------------------------------------------- GRPO

def group_advantages(rewards, num_generations, eps=1e-8):
    """(B,) rewards -> (B,) advantages (r - mean) / (std + eps) inside each group of num_generations.

    Unbiased std, as in DanceGRPO. A group whose rewards are all equal has nothing to say and gets exactly 0;
    the formula alone would blow the rounding of its mean up by 1 / eps.
    """
    r = rewards.view(-1, num_generations)  # (B / G, G)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return advantages.masked_fill(flat, 0).flatten()


def grpo_loss(logp, logp_old, advantages, clip_range, adv_clip_max):
    """PPO's clipped loss (Schulman et al., arXiv 1707.06347, section 3): mean of max(-A r, -A clip(r)).

    logp (now, with gradient), logp_old (at the rollout), advantages: (B,). Returns the loss and a dict of
    scalars: ratio r = exp(logp - logp_old), how far it is from 1 at most, and the share whose gradient the
    clip has cut to 0.
    """
    A = advantages.clamp(-adv_clip_max, adv_clip_max)
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-A * ratio, -A * clipped).mean()
    with torch.no_grad():
        cut = (-A * clipped > -A * ratio).float().mean()
        stats = {"ratio": ratio.mean(), "ratio_off": (ratio - 1).abs().max(), "clipped": cut}
    return loss, stats


# ------------------------------------------------------------------------------------- rollout

# sigmas (T+1,); x (B, T, L, C): the latents before each step; x0 (B, L, C): the image's; logp (B, T-1)
Trajectory = namedtuple("Trajectory", "sigmas x x0 logp")


def velocity(transformer, x, sigma, text, grid, guidance, bf16):
    """v (B, L, C) fp32 that the model predicts: the only place that calls it.

    x (B, L, C) fp32; sigma (B, 1, 1); text: T5 tokens (B, S, D) and CLIP's pooled vector (B, D');
    grid: latent pixels (h, w); guidance goes to models that have an input for it (dev has, schnell has not).
    """
    tokens, pooled = text
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        v = transformer(
            hidden_states=x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=sigma.flatten(),
            guidance=x.new_full((len(x),), guidance) if transformer.config.guidance_embeds else None,
            img_ids=image_ids(*grid).to(x.device), txt_ids=x.new_zeros(tokens.shape[1], 3), return_dict=False)[0]
    return v.float()


@torch.no_grad()
def rollout(transformer, x, text, keys, grid, cfg, eta):
    """Turn noise x (B, L, C) into images, micro_batch of them at a time; everything stays fp32.

    eta > 0 is the SDE; eta = 0 the ODE that evaluation uses. keys: a (step, prompt, sample) for each of
    the B images, which names its draws. Returns the Trajectory.
    """
    T, n = cfg.sampling_steps, cfg.micro_batch
    sigmas = torch.tensor(sigma_schedule(T, cfg.shift), dtype=torch.float32, device=x.device)
    parts = []
    for i in range(0, len(x), n):
        z, words, states, logps = x[i:i + n], tuple(c[i:i + n] for c in text), [], []
        for t in range(T):
            # (B, 1, 1), as in the update: tensors of one shape give the same bits there
            sigma, sigma_next = (sigmas[t + k].expand(len(z), 1, 1) for k in (0, 1))
            v = velocity(transformer, z, sigma, words, grid, cfg.guidance, cfg.dtype == "bf16")
            states.append(z)
            random = eta if t < T - 1 else 0  # the image is the x0 of the last prediction
            noise = draw_noise(z, cfg.seed, keys[i:i + n], t) if random else None
            z, x0, logp = flux_step(v, z, sigma, sigma_next, random, cfg.sde, noise)
            logps.append(logp)
        parts.append((torch.stack(states, 1), x0, torch.stack(logps[:-1], 1)))
    return Trajectory(sigmas, *(torch.cat(part) for part in zip(*parts)))


@torch.no_grad()
def decode(vae, x0, grid, micro_batch):
    """Latents (B, L, C) -> images (B, 3, H, W) float in [0, 1], in 8-bit steps as a saved file has them.

    The whole picture at once: a tiled decoder leaves seams, and rewards see them.
    """
    images = []
    for part in x0.split(micro_batch):
        z = unpack_latents(part, *grid) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(z.to(vae.dtype), return_dict=False)[0].float()
        images.append(((image / 2 + 0.5).clamp(0, 1) * 255).round() / 255)
    return torch.cat(images)


# ------------------------------------------------------------------------------------- update

def plan_batches(advantages, cfg, device):
    """Which samples each transformer call of an update gets.

    Samples with advantage 0 are left out. A batch that is not full is filled up with advantage 0 (another
    size would give other bits), and all processes run as many batches as the one that needs most (FSDP's
    collectives must meet). Returns rows and advantages (batches, micro_batch) and, for each optimizer step,
    its number of batches.
    """
    n, size = cfg.micro_batch, cfg.gradient_accumulation_steps
    picks = [[i for i in range(s, s + size) if advantages[i] != 0] for s in range(0, len(advantages), size)]
    counts = torch.tensor([[math.ceil(len(pick) / n) for pick in picks]], dtype=torch.int32, device=device)
    counts, rows, signals = gather(counts).amax(0).tolist(), [], []
    for pick, count in zip(picks, counts):
        spare = count * n - len(pick)
        rows += pick + [0] * spare
        signals += [advantages[i].item() for i in pick] + [0.0] * spare
    return torch.tensor(rows, device=device).view(-1, n), torch.tensor(signals, device=device).view(-1, n), counts


def update(transformer, optimizer, trajectory, text, advantages, keys, grid, cfg):
    """One pass over a rollout: an optimizer step for every gradient_accumulation_steps samples, in order.

    advantages (B,) on the CPU. Of each sample a random timestep_fraction of its T-1 random steps is trained,
    other steps for every sample. Only the first optimizer step is on-policy, and there the ratio must be 1.
    Returns the means of the statistics; the host reads from the device once for each optimizer step.
    """
    sigmas, states, _, logp_old = trajectory
    device, random_steps = states.device, logp_old.shape[1]
    K = max(1, int(cfg.timestep_fraction * random_steps + 1e-9))
    trained = torch.stack([randperm(random_steps, cfg.seed, TRAINED, *key)[:K] for key in keys]).to(device)
    rows, signals, counts = plan_batches(advantages, cfg, device)
    batches = zip(rows, signals)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    results = []
    for count in filter(None, counts):  # a step whose groups are flat on every process does not happen
        totals, ratio_off = torch.zeros(3, device=device), torch.zeros((), device=device)
        for _, (i, A) in zip(range(count), batches):
            words = tuple(c[i] for c in text)
            for t in trained[i].T:  # (micro_batch,) step numbers, one for each sample
                sigma, sigma_next = (sigmas[t + k].view(-1, 1, 1) for k in (0, 1))
                x, x_next = states[i, t], states[i, t + 1]
                v = velocity(transformer, x, sigma, words, grid, cfg.guidance, cfg.dtype == "bf16")
                _, _, logp = flux_step(v, x, sigma, sigma_next, cfg.eta, cfg.sde, x_next=x_next)
                loss, stats = grpo_loss(logp, logp_old[i, t], A, cfg.clip_range, cfg.adv_clip_max)
                loss = loss * len(i) / (cfg.gradient_accumulation_steps * K)
                loss.backward()
                totals += torch.stack([loss.detach(), stats["ratio"] / (count * K), stats["clipped"] / (count * K)])
                ratio_off = torch.maximum(ratio_off, stats["ratio_off"])
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        results.append(torch.stack([*totals, norm, ratio_off]).tolist())
        if len(results) == 1 and not results[0][-1] <= 1e-5:
            raise RuntimeError(
                f"the ratio of the first update is off by {results[0][-1]:.1e}, but the policy has not changed since "
                "the rollout: rollout and update do not compute the same velocity (dtype, batch size, kernels)")
        optimizer.step()
        optimizer.zero_grad()
    *means, off = (sum(c) / len(c) for c in zip(*results)) if results else (0.0, 1.0, 0.0, 0.0, 0.0)
    off = max((r[-1] for r in results), default=off)
    return dict(zip(("loss", "ratio", "clipped", "grad_norm"), means), ratio_off=off, updates=len(results))


# ------------------------------------------------------------------------------------- draws

LATENTS, NOISE, TRAINED, PROMPTS, HELD_OUT = range(5)  # the purpose of a draw, second part of its name


def randn(shape, *key):
    """Standard normal fp32 numbers with a name: the same integers give the same bits on every machine.

    Drawn by numpy in float64 on the CPU: its ziggurat hardly calls the maths library, where processors
    differ in the last bit, and rounding to fp32 hides what is left.
    """
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape).astype(np.float32))


def randperm(n, *key):
    """A random order of range(n) with a name."""
    return torch.from_numpy(np.random.default_rng(key).permutation(n))


def draw_latents(keys, shape, cfg):
    """Initial noise (B, L, C) for a (step, prompt, sample) each; shape (c, h, w) is the latents' of one image."""
    same = cfg.init_same_noise
    z = [randn(shape, cfg.seed, LATENTS, step, prompt, 0 if same else sample) for step, prompt, sample in keys]
    return pack_latents(torch.stack(z))


def draw_noise(x, seed, keys, t):
    """Noise of step t for a batch x (B, L, C)."""
    return torch.stack([randn(x.shape[1:], seed, NOISE, *key, t) for key in keys]).to(x.device)


@lru_cache(maxsize=4)
def shuffled(n, seed, epoch):
    return randperm(n, seed, PROMPTS, epoch).tolist()


def step_prompts(prompts, step, cfg, rank, world):
    """This process's prompts of a step as (slot, prompt); all processes together walk through the shuffled
    file, so that 2 processes with 1 prompt each see what 1 process with 2 prompts sees."""
    slots = range(rank, world * cfg.num_prompts, world)
    places = [divmod(step * world * cfg.num_prompts + slot, len(prompts)) for slot in slots]
    return [(slot, prompts[shuffled(len(prompts), cfg.seed, epoch)[i]]) for slot, (epoch, i) in zip(slots, places)]


# ------------------------------------------------------------------------------------- processes

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
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


# ------------------------------------------------------------------------------------- models

def read_prompts(path):
    """The lines of a UTF-8 file, stripped, without the empty ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts {path}: must be a text file in UTF-8 ({error})") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"--prompts {path}: has no prompt; one a line is needed")
    return prompts


def check_files(cfg):
    """Refuse paths that cannot work while it is still cheap: before anything is loaded."""
    if os.path.isdir(cfg.model):
        if not os.path.isfile(os.path.join(cfg.model, "model_index.json")):
            raise BadInput(f"--model {cfg.model}: this folder has no model_index.json; a FLUX.1 in diffusers "
                           "format is needed")
    elif cfg.model != "tiny" and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", cfg.model):
        raise BadInput(f"--model {cfg.model}: no such folder; must be tiny, a folder, or a hub name such as "
                       "black-forest-labs/FLUX.1-dev")
    for name in reward.parse_rewards(cfg.reward):
        given = cfg.model != "tiny" or getattr(cfg, name, "")  # tiny brings its own
        if ":" not in name and given and not os.path.isfile(getattr(cfg, name)):
            path = getattr(cfg, name) or "(empty)"
            raise BadInput(f"--{name} {path}: no such file; the reward {name!r} needs its weights there")
    if cfg.out and os.path.exists(os.path.join(cfg.out, "metrics.jsonl")):
        raise BadInput(f"--out {cfg.out}: holds a finished or broken-off run; give a folder of its own")
    if cfg.model != "tiny" and not cfg.prompts:
        raise BadInput("--prompts (empty): a text file with one prompt a line is needed to train this model")
    if cfg.prompts:
        read_prompts(cfg.prompts)


@torch.no_grad()
def encode_prompts(cfg, prompts, device):
    """{prompt: (T5 tokens (S, D), CLIP vector (D'))} on the CPU; the encoders are freed again."""
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    pipe = FluxPipeline.from_pretrained(cfg.model, transformer=None, vae=None, torch_dtype=dtype).to(device)
    encoded = {}
    for i in range(0, len(prompts), 16):
        tokens, pooled, _ = pipe.encode_prompt(prompts[i:i + 16], prompt_2=None, max_sequence_length=cfg.text_length)
        encoded |= zip(prompts[i:i + 16], zip(tokens.cpu(), pooled.cpu()))
    return encoded


def batch_text(encoded, prompts, device):
    """Tokens (B, S, D) and vectors (B, D') of B prompts, on the device."""
    return tuple(torch.stack(c).to(device) for c in zip(*(encoded[p] for p in prompts)))


def load_models(cfg, device, world):
    """The transformer that is trained, fp32, sharded if there are several processes; and the VAE, frozen."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    source = dict(pretrained_model_name_or_path=cfg.model, subfolder="transformer")
    whole = None
    if not dist.is_initialized() or dist.get_rank() == 0:  # one process reads the weights
        whole = FluxTransformer2DModel.from_pretrained(**source, torch_dtype=torch.float32)
    transformer = whole.to(device) if world == 1 else shard(FluxTransformer2DModel, source, whole, cfg, device)
    transformer.requires_grad_(True).train()
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    vae = AutoencoderKL.from_pretrained(cfg.model, subfolder="vae", torch_dtype=dtype).to(device)
    return transformer, vae.eval().requires_grad_(False)


def shard(kind, source, whole, cfg, device):
    """FSDP2 (torch.distributed.fsdp.fully_shard): every process keeps 1 / world of the weights, gathers a block
    when it computes it, and receives the mean of all gradients. Rank 0 hands out the weights in `whole`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(**source))
    compute = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    transformer.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(transformer, whole.state_dict() if whole is not None else {}, options=options)
    return transformer


def export(transformer, folder):
    """Write the trained transformer as FluxTransformer2DModel.from_pretrained(folder) reads it."""
    from diffusers import FluxTransformer2DModel
    from huggingface_hub import save_torch_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(transformer, options=options)  # whole on rank 0, empty elsewhere
    if weights and folder:
        with torch.device("meta"):  # FSDP has renamed the class of the trained one
            FluxTransformer2DModel.from_config(transformer.config).save_config(folder)
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(weights, folder, filename_pattern=pattern, max_shard_size="10GB")


# ------------------------------------------------------------------------------------- tiny FLUX

def tiny_models(cache):
    """The folder of the tiny models. The first run builds them, under another name until they are whole;
    the name changes with the code that builds."""
    recipe = (build_tiny, build_tiny_vae, build_tiny_text, build_tiny_flux, reward.build_tiny_hps, reward.draw)
    key = hashlib.sha256("".join(map(inspect.getsource, recipe)).encode()).hexdigest()[:8]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_flux"
    folder = Path(cache or home) / f"tiny-{key}"
    if not folder.exists() and int(os.environ.get("RANK", 0)) == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
        try:
            build_tiny(work)
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # else another run was faster, and its models are as good
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
    return folder


def build_tiny(folder):
    """A miniature FLUX.1 in diffusers format that has hardly learnt its 24 prompts, and a miniature HPS."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    print("building the tiny models, once; about two minutes", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())  # torchrun gives a process one, but the others are waiting
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = reward.tiny_dataset(4800)
        vae = build_tiny_vae(images)
        parts = build_tiny_text()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=None, **parts)
        pipe.transformer = build_tiny_flux(pipe, images, labels)
        pipe.save_pretrained(folder / "flux")
        (folder / "hps").mkdir()
        reward.build_tiny_hps(folder / "hps", images, labels)
    torch.set_num_threads(threads)


def build_tiny_vae(images, steps=400, batch=32):
    """AutoencoderKL (16 x smaller than FLUX's): 32x32 pixels <-> (4, 8, 8), trained to reconstruct."""
    from diffusers import AutoencoderKL

    blocks = 3
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    optimizer, schedule = one_cycle(vae, 5e-3, steps)
    for _ in tqdm(range(steps), desc="tiny VAE  (1/3)", unit="step"):
        x = images[torch.randint(len(images), (batch,))] * 2 - 1
        z = vae.encode(x).latent_dist.mean
        # noise on the latents makes neighbours of a latent decode alike, which a policy will need
        loss = F.mse_loss(vae.decode(z + 0.1 * torch.randn_like(z)).sample, x) + 1e-3 * z.square().mean()
        descend(loss, optimizer, schedule)
    with torch.no_grad():
        z = vae.encode(images[:1024] * 2 - 1).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    return vae.eval().requires_grad_(False)


def build_tiny_text():
    """Text encoders of FLUX's two kinds with random weights: 24 prompts need no more to be told apart."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({word for prompt in reward.TINY_PROMPTS for word in prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("\u2581" + word, -1.0) for word in words]
    pieces += [(letter, -9.0) for letter in "\u2581" + letters]
    vocab = ["<|startoftext|>", "<|endoftext|>"] + [letter + end for letter in letters for end in ("", "</w>")]
    clip_tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77)
    t5 = T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    clip = CLIPTextConfig(vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                          num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return dict(tokenizer=clip_tokenizer, text_encoder=CLIPTextModel(clip).eval(), text_encoder_2=T5EncoderModel(t5).eval(),
                tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512))


def build_tiny_flux(pipe, images, labels, steps=100, batch=64):
    """FluxTransformer2DModel, 1.85 M parameters, flow matching: v = noise - image at a random σ.

    Stopped early on purpose: GRPO needs a model that can do better.
    """
    from diffusers import FluxTransformer2DModel

    cfg, vae = Config(**TINY), pipe.vae
    with torch.no_grad():
        tokens, pooled, _ = pipe.encode_prompt(reward.TINY_PROMPTS, None, max_sequence_length=cfg.text_length)
        z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(256)])
        z = pack_latents((z - vae.config.shift_factor) * vae.config.scaling_factor)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=tokens.shape[-1], pooled_projection_dim=pooled.shape[-1], guidance_embeds=True,
        axes_dims_rope=(8, 12, 12))
    optimizer, schedule = one_cycle(transformer, 2e-3, steps)
    for _ in tqdm(range(steps), desc="tiny FLUX (2/3)", unit="step"):
        pick = torch.randint(len(images), (batch,))
        t = torch.randn(batch, 1, 1).sigmoid()
        sigma, noise = cfg.shift * t / (1 + (cfg.shift - 1) * t), torch.randn_like(z[pick])
        x = (1 - sigma) * z[pick] + sigma * noise
        text = tokens[labels[pick]], pooled[labels[pick]]
        v = velocity(transformer, x, sigma, text, (8, 8), cfg.guidance, bf16=False)
        descend(F.mse_loss(v, noise - z[pick]), optimizer, schedule)
    return transformer.eval()


def one_cycle(model, rate, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)


def descend(loss, optimizer, schedule):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


# ------------------------------------------------------------------------------------- what a run shows

Evaluation = namedtuple("Evaluation", "images prompts rewards reward accuracy")


def evaluate(transformer, vae, rewards, encoded, prompts, grid, cfg, device):
    """The same prompts and noise every time, in every run: ODE samples, their rewards, and for the tiny world
    the share of images that HPS takes for their own prompt among all 24. Processes share the work."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    share = math.ceil(cfg.eval_images / world)
    mine = [(rank * share + i) % cfg.eval_images for i in range(share)]
    names = [prompts[i % len(prompts)] for i in mine]
    shape = (transformer.config.in_channels // 4, *grid)
    x = pack_latents(torch.stack([randn(shape, 0, HELD_OUT, i) for i in mine])).to(device)
    trajectory = rollout(transformer, x, batch_text(encoded, names, device), None, grid, cfg, eta=0)
    images = decode(vae, trajectory.x0, grid, cfg.micro_batch)
    scores = sum(weight * function(images, names).float() for weight, function in rewards.values())
    right = torch.full_like(scores, float("nan"))
    if set(prompts) == set(reward.TINY_PROMPTS) and "hps" in rewards:
        judged = torch.stack([rewards["hps"][1](images, [p] * share) for p in reward.TINY_PROMPTS]).argmax(0)
        right = (judged == torch.tensor([reward.TINY_PROMPTS.index(p) for p in names], device=device)).float()
    images, scores, right = (gather(c)[:cfg.eval_images].cpu() for c in (images, scores, right))
    names = [prompts[i % len(prompts)] for i in range(cfg.eval_images)]
    return Evaluation(images, names, scores.tolist(), scores.mean().item(), right.mean().item())


def draw_grid(evaluation, title, most=24, cell=112):
    """A PIL image: up to `most` pictures with prompt and reward under each, a title above."""
    count = min(most, len(evaluation.images))
    columns = min(count, 6)
    rows, caption = math.ceil(count / columns), 34
    font = ImageFont.load_default(size=11)
    canvas = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + caption + 8) + 32), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 8), title, "black", ImageFont.load_default(size=15))
    for i in range(count):
        x, y = 8 + i % columns * (cell + 8), 32 + i // columns * (cell + caption + 8)
        pixels = (evaluation.images[i].permute(1, 2, 0) * 255).round().byte().numpy()
        small = max(pixels.shape) < cell  # tiny pictures are enlarged with their pixels visible
        picture = Image.fromarray(pixels).resize((cell, cell), Image.NEAREST if small else Image.LANCZOS)
        canvas.paste(picture, (x, y))
        prompt = textwrap.shorten(evaluation.prompts[i], 20, placeholder="...")
        pen.text((x, y + cell + 2), f"{prompt}\n{evaluation.rewards[i]:.3f}", "black", font)
    return canvas


def draw_before_after(path, before, after):
    left, right = (draw_grid(e, f"{name}: held-out reward {e.reward:.3f}" + (
        f", prompt accuracy {e.accuracy:.0%}" if e.accuracy == e.accuracy else ""))
        for name, e in (("before", before), ("after", after)))
    canvas = Image.new("RGB", (left.width + right.width + 24, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + 24, 0))
    canvas.save(path)


def draw_curve(path, history, held_out):
    """reward.png: the mean reward of the rollouts and, as dots, of the held-out images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot([m["step"] for m in history], [m["reward"] for m in history], lw=1, label="rollouts (SDE)")
    axes.plot(*zip(*held_out), "o-", ms=4, label="held-out noise (ODE)")
    axes.set(xlabel="GRPO step", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------- main

def read_command_line(argv):
    """Config from flags: every field is one, --help shows the comment behind it, an unknown one is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__[__doc__.index("    python grpo"):__doc__.index("Letters")],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, usage="grpo_flux.py [--flag value ...]")
    parser.error = reward.refuse
    group, types = parser, {f.name: f for f in fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if match := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(match[1])
        elif match := re.fullmatch(r"    (\w+): (\w+) = .*?  # (.*)", line):
            name, kind, comment = match.groups()
            default = f"default {types[name].default!r}" + (f", tiny {TINY[name]!r}" if name in TINY else "")
            options = dict(action=argparse.BooleanOptionalAction) if kind == "bool" else dict(
                type=types[name].type, metavar=kind.upper())
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options,
                               help=f"{comment} ({default})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    return Config(**{**(TINY if given.get("model", "tiny") == "tiny" else {}), **given})


def prepare(cfg, device):
    """The prompts and the reward functions {name: (weight, function)}, and cfg with every path filled in."""
    prompts = read_prompts(cfg.prompts) if cfg.prompts else reward.TINY_PROMPTS
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bf16" if reward.is_accelerator(device) else "fp32")
    if cfg.model == "tiny":
        folder = tiny_models(cfg.cache)
        tiny = {name: (str(folder / "hps" / f"{name}.pt"), str(folder / "hps" / "tiny-clip.json"))
                for name in ("hps", "clip") if not getattr(cfg, name)}
        cfg = replace(cfg, model=str(folder / "flux"), **{name: path for name, (path, _) in tiny.items()},
                      **{f"{name}_arch": arch for name, (_, arch) in tiny.items()})
    rewards = {}
    for name, weight in reward.parse_rewards(cfg.reward).items():
        weights = () if ":" in name else (getattr(cfg, name), getattr(cfg, f"{name}_arch"))
        rewards[name] = weight, reward.load_reward(name, *weights, device=device, fp32=cfg.reward_fp32)
    return cfg, prompts, rewards


def score(rewards, images, prompts):
    """{name: scores (B,) fp32 on the CPU} of every reward."""
    scores = {}
    for name, (_, function) in rewards.items():
        scores[name] = torch.as_tensor(function(images, prompts)).detach().float().cpu()
        if scores[name].shape != (len(images),) or not scores[name].isfinite().all():
            raise BadInput(f"--reward {name}: must return {len(images)} finite numbers for {len(images)} images, but "
                           f"gave {tuple(scores[name].shape)} with values such as {scores[name].flatten()[:3].tolist()}")
    return scores


def open_run(cfg, name):
    """--out, or the first of runs/NAME, runs/NAME-2, ... that is not there yet, with config.json in it."""
    names = (Path("runs") / (name + end) for end in ("", *(f"-{i}" for i in range(2, 10_000))))
    out = Path(cfg.out) if cfg.out else next(path for path in names if not path.exists())
    (out / "images").mkdir(parents=True, exist_ok=True)
    packages = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    (out / "config.json").write_text(json.dumps({**asdict(cfg), "versions": versions}, indent=1) + "\n")
    return out


def stopwatch(device):
    """A function that returns the seconds since its last call, with the device's work done."""
    last = time.perf_counter()

    def lap():
        nonlocal last
        torch.get_device_module(device).synchronize()
        now = time.perf_counter()
        last, seconds = now, now - last
        return round(seconds, 3)
    return lap


def summarize(step, scores, total, stats, seconds, cfg, device):
    """The line of metrics.jsonl for a step: means over all processes, and what is worst for ratio_off."""
    groups = total.view(-1, cfg.num_generations)
    values = dict(reward=total.mean(), spread=groups.std(1).mean(), flat=(groups.std(1) == 0).float().mean(), **stats)
    values |= {name: r.mean() for name, r in scores.items()} if len(scores) > 1 else {}
    ranks = gather(torch.tensor([[float(v) for v in values.values()]], device=device)).cpu()
    line = dict(zip(values, ranks.mean(0).tolist())) | {"ratio_off": ranks[:, list(values).index("ratio_off")].max().item()}
    return {"step": step, **{k: float(f"{v:.7g}") for k, v in line.items()}, **seconds}


def show(out, step, evaluation, history, held_out):
    """Write the pictures of an evaluation and the curve so far."""
    title = f"step {step}: held-out reward {evaluation.reward:.3f}"
    draw_grid(evaluation, title).save(out / "images" / f"step_{step:05d}.png")
    draw_curve(out / "reward.png", history, held_out)


def main(argv=None):
    cfg = read_command_line(argv)
    check_files(cfg)
    name, (device, rank, world) = Path(cfg.model).name, start(cfg.device)
    cfg, prompts, rewards = prepare(cfg, device)
    shown, G = prompts[:cfg.eval_images], cfg.num_generations
    plan = [step_prompts(prompts, step, cfg, rank, world) for step in range(cfg.steps)]
    used = dict.fromkeys([*shown, *(prompt for slots in plan for _, prompt in slots)])
    encoded = encode_prompts(cfg, list(used), device)
    transformer, vae = load_models(cfg, device, world)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels of a latent pixel
    grid = cfg.height // scale, cfg.width // scale
    shape = transformer.config.in_channels // 4, *grid  # latents (c, h, w) of an image
    out = open_run(cfg, name) if rank == 0 else None
    history, held_out = [], []
    bar = tqdm(total=cfg.steps, desc="GRPO", unit="step", disable=rank > 0, dynamic_ncols=True)
    for step in range(cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            after = evaluate(transformer, vae, rewards, encoded, shown, grid, cfg, device)
            before = after if step == 0 else before
            held_out.append((step, after.reward))
            if rank == 0:
                show(out, step, after, history, held_out)
        if step == cfg.steps:
            break
        lap = stopwatch(device)
        names = [prompt for _, prompt in plan[step] for _ in range(G)]
        keys = [(step, slot, sample) for slot, _ in plan[step] for sample in range(G)]
        text, x = batch_text(encoded, names, device), draw_latents(keys, shape, cfg).to(device)

        trajectory = rollout(transformer, x, text, keys, grid, cfg, cfg.eta)
        images = decode(vae, trajectory.x0, grid, cfg.micro_batch)
        seconds = {"rollout_s": lap()}
        scores = score(rewards, images, names)
        seconds["reward_s"] = lap()
        advantages = sum(w * group_advantages(scores[name], G) for name, (w, _) in rewards.items())
        stats = update(transformer, optimizer, trajectory, text, advantages, keys, grid, cfg)
        seconds["update_s"] = lap()

        total = sum(w * scores[name] for name, (w, _) in rewards.items())
        history.append(summarize(step + 1, scores, total, stats, seconds, cfg, device))
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(history[-1]) + "\n")
        bar.set_postfix_str(BAR.format(**history[-1]))
        bar.update()
    bar.close()
    export(transformer, out / "export" / "transformer" if rank == 0 else None)
    if rank == 0:
        draw_before_after(out / "before_after.png", before, after)
        accuracy = f", prompt accuracy {before.accuracy:.1%} -> {after.accuracy:.1%}" if after.accuracy == after.accuracy else ""
        print(f"held-out reward {before.reward:.3f} -> {after.reward:.3f}{accuracy} ({cfg.eval_images} images, fixed noise, ODE)")
        print(f"look at {out}/before_after.png and {out}/reward.png; {out}/export/transformer is for diffusers")
    if dist.is_initialized():
        dist.destroy_process_group()


BAR = ("reward {reward:.3f} +-{spread:.3f}  ratio {ratio:.6f} off {ratio_off:.0e}  clipped {clipped:.0%}  "
       "grad {grad_norm:.2f}  {rollout_s:.1f}+{reward_s:.1f}+{update_s:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except BadInput as problem:
        reward.refuse(problem)
    except KeyboardInterrupt:
        reward.refuse("interrupted")
