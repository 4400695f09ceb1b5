"""Rewards for text-to-image training, and the choice of the device they run on.

A reward is a function (images, prompts) -> scores: images (B, 3, H, W) float in [0, 1], B
prompts, scores (B,) float, higher is better. HPS (Wu et al., arXiv 2306.09341) and PickScore
(Kirstain et al., arXiv 2305.01569) are cosines of CLIP features, trained on which images
people preferred.

    python reward.py --prompt "a cat in a hat" a.png b.png           # HPS-v2.1, from the hub
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --save scores.jsonl     # on a GPU
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --against scores.jsonl  # on an NPU
"""
import argparse
import cmath
import json
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import normalize
from tqdm import tqdm

class BadInput(ValueError):
    """Input that cannot work; the text is the one line that the user reads."""

def require(condition, message):
    """Raise BadInput with the message unless the condition holds."""
    if not condition:
        raise BadInput(message)

def printable(text):
    """Return text for the terminal; escaped if it holds what would steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

def exit_with_error(message, status=2):
    """End the program with one line on stderr, of at most 2,000 characters."""
    print("error:", printable(textwrap.shorten(str(message), 2000)), file=sys.stderr)
    sys.exit(status)

def is_collective_error(error):
    """Tell whether a collective has failed: another process has ended, or the network has."""
    # Backends raise RuntimeError or a kind of it, such as DistStoreError; the texts of OSError
    # and ValueError may hold a user's paths.
    return isinstance(error, RuntimeError) and re.search("(?i)^dist|gloo|nccl|hccl", repr(error))

@contextmanager
def bad_input_if_fails(message):
    """Turn an exception or sys.exit inside into BadInput, with its name and text in brackets."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a user's files and modules can raise anything
        if isinstance(error, torch.OutOfMemoryError) or is_collective_error(error):
            raise  # no input is to blame
        text = str(error).split("WeightsUnpickler error: ")[-1]  # leave out torch's advice
        if not isinstance(error, BadInput):
            text = f"{type(error).__name__}: {text}"
        raise BadInput(f"{message} ({text})") from None

def delete(path):
    """Remove a Path as `remove` does, but under its own name: a kill leaves half of a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

def remove(path):
    """Remove a file, a folder or a link (but not what it points to), if there is one.

    It gets another name first, so that a kill leaves no half of a folder under its own."""
    path = Path(path)
    old = path.with_name(f".old-{path.name}")
    delete(old)  # left behind by a kill
    if os.path.lexists(path):
        delete(path.rename(old))

@contextmanager
def atomic_write(path, rank=0):
    """Yield a temporary path to write a file or folder to; rename it to `path` on success.

    A file takes the place of a file and a folder that of a folder; else OSError is raised, and
    what was there stays. A link is followed. Rank 0 renames; processes that write into one
    folder must wait for each other before."""
    path = Path(path).resolve()
    temporary = path.with_name(f".writing-{path.name}")
    if rank > 0:  # rank 0 alone renames and removes
        yield temporary
        return

    delete(temporary)  # left behind by a run that was killed
    try:
        yield temporary
        # A rename takes the place of a file, but not of a folder with something in it.
        old = path.with_name(f".old-{path.name}")
        delete(old)
        if path.is_dir() and temporary.is_dir():
            path.rename(old)
        os.replace(temporary, path)  # raises if one is a file and the other a folder
        delete(old)
    finally:
        delete(temporary)

# ------------------------------------------------------------------------------------------ device

DEVICES = ("auto", "cuda", "npu", "cpu")

def select_device(name="auto") -> torch.device:
    """Return the device of this process, by LOCAL_RANK; auto: the first of cuda, npu, cpu."""
    counts = {}  # of the cards of each kind that is there
    for kind in DEVICES[1:]:
        module = getattr(torch, kind, None)  # torch_npu adds torch.npu
        if module and module.is_available():
            counts[kind] = module.device_count()
    if name == "auto":
        name = next(iter(counts))
    if name == "cpu":
        return torch.device(name)

    rank = int(os.environ.get("LOCAL_RANK") or 0)
    require(rank < counts.get(name, 0),
            f"--device {name}: torch finds none for process {rank}; lower --nproc_per_node, or "
            "install a CUDA build of torch, or CANN and torch-npu (see README)")
    if name == "cuda":
        # Since 2.11 torch prefers cuDNN's attention on Hopper and Blackwell. Its forward is
        # right, but its backward gives nan for q, k, v with strides such as FLUX's:
        # pytorch#196678, trl#7181, cudnn-frontend#160 and #1072.
        # `--attention _native_cudnn` still chooses it.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "npu":
        # HCCL's all-gather and reduce-scatter fail over 3, 5, 6 or 7 NPUs.
        size = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
        require(size not in (3, 5, 6, 7), f"--nproc_per_node {size}: must be 1, 2, 4, 8 or 16")
        # Its default of 120 seconds is too short where a disk is slow.
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "1200")
    return torch.device(name, rank)

def is_accelerator(device):
    return torch.device(device).type != "cpu"

def describe_device(device):
    """Return what decides on rounding: the card or the CPU with its kernels, and torch."""
    if is_accelerator(device):
        card = torch.get_device_module(device).get_device_name()
        return f"{card}, torch {torch.__version__}"
    return (f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}")

def check_attention(backend, device, dtype, deterministic=False):
    """Raise BadInput unless a backend of diffusers' attention can train on device in dtype."""
    from diffusers.models import attention_dispatch
    require("native" in backend or not deterministic,
            f"--attention {backend}: must be native or _native_... with --deterministic, as "
            "torch's switch does not reach other kernels")

    # Try it on q, k, v of (batch, length, heads, channels), which attention sees as strided views.
    # They are not drawn, since the seed is for the training.
    options = dict(device=device, dtype=dtype, requires_grad=True)
    with bad_input_if_fails(
            f"--attention {backend}: diffusers has no backend of this name that can train on this "
            f"device ({device}) in {dtype}"):
        inputs = [torch.ones(1, 64, 2, 64, **options) for _ in "qkv"]
        # The context checks what the backend needs, and downloads a kernel of the hub.
        with attention_dispatch.attention_backend(backend):
            out = attention_dispatch.dispatch_attention_fn(*inputs, backend=backend)
        torch.autograd.grad(out.sum(), inputs)  # raises if one of them gets no gradient

def make_deterministic(seed):
    """Choose deterministic kernels, full fp32 and seeds; call it before the device is used."""
    from accelerate.utils import set_seed
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8", HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1",
        CLOSE_MATMUL_K_SHIFT="1", ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0")
    # Of Python, numpy and torch. Without a deterministic kernel CUDA raises, an NPU does not.
    set_seed(seed, deterministic=True)
    torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch, "npu"):
        torch.npu.conv.allow_hf32 = False
        torch.npu.matmul.allow_hf32 = False

# ----------------------------------------------------------------------------------------- rewards

WEIGHTS = {"--hps": "xswu/HPSv2/HPS_v2.1_compressed.pt",
           "--pickscore": "yuvalkirstain/PickScore_v1"}

def check_weights(flag, value):
    """Return the path or the hub name of weights; "" stands for WEIGHTS. Needs no network.

    Raises BadInput unless the path exists, or it may name weights of the hub."""
    name = value or WEIGHTS.get(flag, "")
    file = "" if flag == "--pickscore" else "/.+"
    require(os.path.exists(name) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*" + file, name),
            f"{flag} {value or '(not given)'}: not found; must be a file, or owner/name/file of "
            "the hub; for --pickscore a folder, or owner/name")
    return name

def resolve_weights(flag, value):
    """Return the path of weights; those that value names on the hub are downloaded.

    A name of PickScore stays as it is, since transformers downloads by itself."""
    name = check_weights(flag, value)
    if os.path.exists(name) or flag == "--pickscore":
        return name
    import huggingface_hub
    with bad_input_if_fails(
            f"{flag} {name}: the download failed; correct the name, accept the licence on its "
            "page and run `hf auth login`, or download it elsewhere and give its path with "
            f"{flag}"):
        owner, model, file = name.split("/", 2)
        return huggingface_hub.hf_hub_download(f"{owner}/{model}", file)

def preprocess(images, size=224, mean=(0.48145466, 0.4578275, 0.40821073),
               std=(0.26862954, 0.26130258, 0.27577711), crop=False):
    """Prepare images for CLIP: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised.

    Bicubic with antialias. crop=False, as for HPS: the longer side becomes `size`, and zeros
    fill up the other. crop=True, as for PickScore: the shorter side does, and the centre is cut
    out."""
    sides = images.shape[-2:]
    if crop:  # truncated, as transformers does; else rounded, as the official HPS does
        new = [int(size * side / min(sides)) for side in sides]
    else:
        scale = size / max(sides)
        new = [max(1, round(side * scale)) for side in sides]
    if new != list(sides):
        images = F.interpolate(images, size=new, mode="bicubic", antialias=True)

    padding = []
    for side in reversed(new):  # F.pad begins with the last dimension
        missing = size - side  # below 0: it cuts off
        before = int(missing / 2)
        padding += [before, missing - before]
    return normalize(F.pad(images, padding), mean, std)

class HPS:
    """Score (B,) by HPS-v2.1: cosines of image and prompt features, about 0.2 to 0.35.

    arch: the name or .json file of any other open_clip model, whose similarity it then is.
    fp32: on an accelerator, do without the fp16 autocast that the official code uses."""

    def __init__(self, checkpoint, arch="ViT-H-14", device="cpu", fp32=False, flag="--hps"):
        import open_clip  # takes seconds
        with bad_input_if_fails(
                f"{flag} {checkpoint}: must be a whole .pt, .bin or .safetensors file without "
                f"Python objects, with the weights of {flag}_arch {arch}; the arch must be a model "
                "of open_clip, such as ViT-H-14, or a .json of one"):
            if str(arch).endswith(".json"):
                open_clip.add_model_config(arch)
                arch = Path(arch).stem
            # Mean and std depend on the weights, not on arch: take those of the first that were
            # published.
            tags = open_clip.list_pretrained_tags_by_model(arch)
            normalise = open_clip.get_pretrained_cfg(arch, tags[0]) if tags else {}
            # It runs no code of the file; fp16 weights are copied into fp32 ones.
            self.model = open_clip.create_model(
                arch, str(checkpoint), force_preprocess_cfg=normalise)
            # It has resized weights of another image size or text length. This refuses them.
            self.model.load_state_dict(open_clip.factory.load_state_dict(checkpoint))
            self.tokenizer = open_clip.get_tokenizer(arch)
        # The fused attention of torch's eval mode has no NPU kernel: one path on every device.
        torch.backends.mha.set_fastpath_enabled(False)
        self.device = torch.device(device)
        self.half = is_accelerator(device) and not fp32
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts):
        unique = list(dict.fromkeys(prompts))  # encode each prompt once
        rows = [unique.index(prompt) for prompt in prompts]
        visual = self.model.visual
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            pixels = preprocess(images.to(self.device).float(), visual.image_size[0],
                                visual.image_mean, visual.image_std)
            tokens = self.tokenizer(unique).to(self.device)
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(tokens, normalize=True)
        # The product in fp16 would round 0.28 to steps of 0.0002.
        return (image.float() * text.float()[rows]).sum(-1)

class PickScore:
    """Score (B,) by PickScore, in fp32: cosines of image and prompt features, about 0.2."""

    def __init__(self, model, device="cpu"):
        with bad_input_if_fails(
                f"--pickscore {model}: must be transformers' CLIP model, a folder or owner/name "
                "of the hub"):
            from transformers import AutoTokenizer, CLIPModel
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model, report = CLIPModel.from_pretrained(model, output_loading_info=True)
            # transformers makes up what is missing
            words = self.model.config.text_config.vocab_size
            require(len(self.tokenizer) >= words and not report["missing_keys"],
                    "it lacks weights or tokens")
        self.model.to(device, torch.float32)  # in eval mode, as from_pretrained leaves it

    @torch.no_grad()
    def __call__(self, images, prompts):
        config = self.model.config
        device = self.model.device
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                max_length=config.text_config.max_position_embeddings)
        size = config.vision_config.image_size
        pixels = preprocess(images.to(device).float(), size, crop=True)
        image = self.model.get_image_features(pixels).pooler_output  # after the projection
        text = self.model.get_text_features(**tokens.to(device)).pooler_output
        return F.cosine_similarity(image, text)

def parse_rewards(spec):
    """Parse "hps:0.7,clip" into {"hps": 0.7, "clip": 1.0}: names and weights."""
    rewards = {}
    for item in spec.split(","):
        match = re.fullmatch(
            r"(hps|clip|pickscore|[\w.]+:[a-zA-Z_]\w*)(?::(\d*\.?\d+))?", item.strip())
        require(match and match[1] not in rewards,
                f"--reward {spec}: {item!r} must be hps, clip, pickscore or "
                "package.module:function, each once, with or without a :WEIGHT")
        rewards[match[1]] = float(match[2] or 1)  # 0: scored and logged, but not trained on
    require(any(rewards.values()), f"--reward {spec}: at least one weight must be above 0")
    return rewards

def load_reward(name, source="", arch="", device="cpu", fp32=False):
    """Return the function (images, prompts) -> (B,) of a name; a user's needs no device."""
    if ":" in name:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        with bad_input_if_fails(
                f"--reward {name}: must be a function, whose module can be imported, and "
                "neither calls sys.exit nor parses arguments"):
            return pkgutil.resolve_name(name)

    weights = resolve_weights(f"--{name}", source)
    if name == "pickscore":
        return PickScore(weights, device)
    return HPS(weights, arch or "ViT-H-14", device, fp32, f"--{name}")

def score(rewards, images, prompts, where):
    """Return {name: scores (B,) fp32 on the CPU}; rewards: {name: (weight, function)}.

    Each function gets a copy of the images and of the prompts. where: "step 3", for messages.
    Raises BadInput that names the reward, and FloatingPointError for images."""
    if not images.isfinite().all():
        raise FloatingPointError(
            f"an image of {where} is not finite; --dtype fp32 may prevent it")

    scores = {}
    for name, (_, function) in rewards.items():
        with bad_input_if_fails(f"--reward {name}: failed in {where}, prompts {prompts[0]!r} ..."):
            scores[name] = torch.as_tensor(function(images.clone(), list(prompts)))
    for name, result in scores.items():  # only now, so that no model waits for another's scores
        values = result.detach().float().cpu()
        require(values.shape == (len(images),) and values.isfinite().all(),
                f"--reward {name}: must return {len(images)} finite numbers for as many images, "
                f"but in {where}, prompts {prompts[0]!r} ..., it gave the shape "
                f"{tuple(values.shape)}: {values.flatten()[:8].tolist()}")
        scores[name] = values
    return scores

def read_prompts(path):
    """Return the lines of a UTF-8 text file that are not empty, stripped. Raises BadInput."""
    with bad_input_if_fails(
            f"--prompts {path}: must be a text file in UTF-8 with one prompt per line, not a "
            "table"):
        require(not re.search(r"(?i)\.(csv|tsv|jsonl?)$", str(path)), "it has the name of one")
        text = Path(path).read_text(encoding="utf-8-sig")
        require("\0" not in text, "it holds a zero byte, as UTF-16 does")
        lines = text.split("\n")  # splitlines splits at more characters
        prompts = [line.strip() for line in lines if line.strip()]
        require(prompts, "it is empty")
    return prompts

# -------------------------------------------------------------------------------------- tiny world

BACKGROUND = 236, 236, 230
COLORS = dict(red=(220, 40, 40), green=(40, 170, 60), blue=(50, 80, 220),
              yellow=(240, 210, 40), purple=(150, 60, 190), black=(45, 45, 50))

def quarter_turns(*corners):
    """Return corners, and after them what they become by one, two and three quarter turns."""
    return [corner * 1j ** turns for turns in range(4) for corner in corners]

SHAPES = dict(  # corners x + yj, in units of the radius
    circle=[cmath.rect(1, i / 8) for i in range(50)],
    square=quarter_turns(-0.85 - 0.85j),
    triangle=[0 - 1j, -1 + 0.8j, 1 + 0.8j],
    cross=quarter_turns(-1 - 0.36j, -0.36 - 0.36j, -0.36 - 1j))
TINY_PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]  # all 24

def draw(prompt, rng=None, place=(0.35, 0.5, 0.5)):
    """Draw a prompt of the tiny world, (32, 32, 3) uint8.

    place: radius and centre as shares of the side, which rng draws if it is given."""
    _, color, shape = prompt.split()
    if rng is not None:
        place = (rng.uniform(0.32, 0.37), *rng.uniform(0.46, 0.54, size=2))
    radius, x, y = (128 * share for share in place)  # drawn large and scaled down: smooth edges
    picture = Image.new("RGB", (128, 128), BACKGROUND)
    corners = [(x + radius * c.real, y + radius * c.imag) for c in SHAPES[shape]]
    ImageDraw.Draw(picture).polygon(corners, COLORS[color])
    return np.asarray(picture.resize((32, 32), Image.LANCZOS))

def as_images(pictures):
    """Return pictures (H, W, 3) uint8 as images (B, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255

def tiny_dataset(count, seed=0):
    """Return images (count, 3, 32, 32) in [0, 1] and the index (count,) of their prompts."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(count) % len(TINY_PROMPTS)
    pictures = [draw(TINY_PROMPTS[label], rng) for label in labels]
    return as_images(pictures), labels

def find_foreground(images):
    """Return the mean colour (B, 3) of the foreground of images (B, 3, H, W), nan without one.

    Also its soft mask (B, H * W), from 0 for the background to 1 for that colour."""
    background = torch.tensor(BACKGROUND) / 255
    away = images.flatten(2) - background[:, None]  # (B, 3, H * W)
    distance = away.norm(dim=1, keepdim=True)
    inside = (distance > 0.25).float()
    mean = (away * inside).sum(2) / inside.sum(2)
    mask = distance[:, 0] / mean.norm(dim=1, keepdim=True)
    return mean + background, mask.clamp(0, 1).nan_to_num()

@cache
def shape_templates():
    """Return masks (4 * N, 32 * 32): each shape in N sizes and places, more than in the data."""
    radii = np.linspace(0.26, 0.42, 7)
    centres = np.linspace(0.38, 0.62, 9)
    pictures = [draw(f"a black {shape}", place=place)
                for shape, *place in product(SHAPES, radii, centres, centres)]
    return find_foreground(as_images(pictures))[1]

def judge_tiny(images, prompts, rewards):
    """Return {metric: (B,) 1.0 or 0.0} of images (B, 3, 32, 32) of TINY_PROMPTS.

    accuracy: HPS ranks an image's own prompt first of 24. right_colour, right_shape and
    right_both are measured, and no part of a reward: the colour nearest to the mean foreground,
    the shape with the best soft IoU."""
    own = torch.tensor([TINY_PROMPTS.index(p) for p in prompts])
    judged = {}
    if "hps" in rewards:
        _, hps = rewards["hps"]
        scores = torch.stack([hps(images, [p] * len(images)) for p in TINY_PROMPTS])  # (24, B)
        judged["accuracy"] = scores.argmax(0).cpu() == own
    mean, mask = find_foreground(images.float().cpu())
    templates = shape_templates()
    common = mask @ templates.T  # (B, 4 * N)
    norms = mask.square().sum(1, keepdim=True) + templates.square().sum(1)
    best = (common / (norms - common)).argmax(1)
    shape = best * len(SHAPES) // len(templates)
    color = torch.cdist(mean, torch.tensor(list(COLORS.values())) / 255).argmin(1)
    there = ~mean.isnan().any(1)  # an empty image is right in nothing
    right_color = there & (color == own // len(SHAPES))
    right_shape = there & (shape == own % len(SHAPES))
    judged |= dict(right_colour=right_color, right_shape=right_shape,
                   right_both=right_color & right_shape)
    return {name: right.float() for name, right in judged.items()}

TINY_CLIP = """{"embed_dim": 64, "quick_gelu": true,
 "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "head_width": 32, "layers": 3},
 "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}"""

def fit(model, loss, count, steps, batch, rate, title):
    """Train a tiny model with AdamW on loss(indices of a random batch out of count)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc=title):
        optimizer.zero_grad()
        loss(torch.randint(count, (batch,))).backward()
        optimizer.step()
        schedule.step()
    model.eval()

def botch(images, share):
    """Spoil images (B, 3, 32, 32) by a share (B,) <= 1: bend, tint, grain and blotches."""
    count = len(images)
    share = share.view(-1, 1, 1, 1)
    here = F.affine_grid(torch.eye(2, 3)[None], (1, 3, 32, 32), align_corners=False)
    bend = F.interpolate(torch.randn(count, 2, 5, 5), size=32, mode="bicubic")
    images = F.grid_sample(images, here + 0.25 * (share * bend).permute(0, 2, 3, 1),
                           padding_mode="border", align_corners=False)
    mask = find_foreground(images)[1].view(-1, 1, 32, 32)
    images = images + 0.35 * share * mask * torch.randn(count, 3, 1, 1)
    for side in (32, 8, 4):  # some noise in all: a judge of generated pictures must know it
        noise = F.interpolate(torch.randn(count, 3, side, side), size=32)
        images = images + torch.rand(count, 1, 1, 1) * (0.05 + 0.25 * share) * noise
    return images.clamp(0, 1)

def build_tiny_hps(folder, images, labels):
    """Train a miniature CLIP; save clip.pt when it is half trained and hps.pt at the end.

    It tells apart 24 prompts, and a 25th that stands for how botched a picture is."""
    import open_clip
    folder.mkdir()
    (folder / "tiny-clip.json").write_text(TINY_CLIP)
    model = open_clip.CLIP(**json.loads(TINY_CLIP))
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    text = tokenizer([*TINY_PROMPTS, "a botched drawing"])

    def loss(pick):
        share = (2 * torch.rand(len(pick)) - 1).clamp(min=0)  # 0 for half of them
        target = F.one_hot(labels[pick], len(text)) * (1 - share[:, None])
        target[:, -1] = share
        pixels = preprocess(botch(images[pick], share), 32)
        features, words, scale = model(pixels, text)
        return F.cross_entropy(scale * features @ words.T, target)

    for name in ("clip", "hps"):
        fit(model, loss, len(images), steps=250, batch=64, rate=1e-3,
            title=f"tiny {name.upper():4} (3/3): which prompt is it, how well drawn")
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pt")

# ------------------------------------------------------------------------------------ command line

ALLOWED = 0.015  # percent of the scores' root mean square, on average over the pictures
# Read from a folder; others that Pillow can read are given by name.
PICTURES = ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .jp2 .ppm"
FLAGS = {
    "prompt": "the text that all the pictures were made for",
    "prompts":
        "file with one prompt per line, in the order of the pictures; else: 7_a_red_cat.png",
    "reward": "hps (the default), clip, pickscore or package.module:function",
    "hps": "a file, or owner/name/file of the hub; without it HPS-v2.1 of the hub",
    "hps_arch": "its name in open_clip, or a .json file; without it ViT-H-14",
    "clip": "weights of an open_clip model",
    "clip_arch": "its name in open_clip, or a .json file; without it ViT-H-14",
    "pickscore": "a folder, or owner/name of the hub; without it PickScore_v1",
    "device": "auto (the default), cuda, npu or cpu",
    "save": "write the scores to this file, one line of JSON per picture",
    "against": f"compare with a file of --save; mean error above {ALLOWED} %%: exit status 3"}

def natural(path):
    """Return a key to sort paths by that takes digits for numbers: a2.png before a10.png."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(path)), str(path)

def find_pictures(paths):
    """Return the files among paths, and the pictures of folders among them in natural order."""
    files = []
    for path in map(Path, paths):
        inside = [f for f in path.glob("[!.]*") if f.suffix.lower() in PICTURES.split()]
        files += sorted(inside, key=natural) if path.is_dir() else [path]
    require(files, f"{paths[0]}: must be a picture, or a folder with some ({PICTURES})")
    for file in files:  # before a model is loaded
        read_image(file)
    return files

def read_image(path):
    """Return a picture file as (1, 3, H, W) float in [0, 1]: upright, in RGB, on white."""
    with bad_input_if_fails(f"{path}: must be a picture that Pillow can read"):
        image = ImageOps.exif_transpose(Image.open(path))
        require(not image.mode.startswith("I"), "it has 16 bits; they would be cut off at 255")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return as_images([image])

def prompts_from_names(files):
    """Return the prompts in the names of pictures, "a cat" for 07_a_cat.png. Raises BadInput."""
    names = [file.stem.replace("_", " ") for file in files]
    prompts = [re.sub(r"^\d+[- ]+", "", name).strip() for name in names]
    words = {re.sub(r"[\W\d]+", "", prompt) for prompt in prompts}
    # ComfyUI_00001_.png, ComfyUI_00002_.png: the scores of that word would look plausible
    require(all(words) and (len(files) == 1 or len(words) > 1),
            "--prompt (not given): must be, as the names of the pictures have no words, or each "
            f"the same: {files[0]}")
    return prompts

def check_save(path):
    """Raise BadInput unless atomic_write can write a file to path."""
    with bad_input_if_fails(
            f"--save {path}: must be a file, in a folder that exists and can be written to"):
        path = Path(path).resolve()
        require(path.is_file() or not path.exists(), "it is no file")
        tempfile.TemporaryFile(dir=path.parent).close()

def read_scores(path, rows):
    """Return the scores (N,) that --save wrote for the same rows of picture and prompt."""
    with bad_input_if_fails(
            f"--against {path}: must hold what --save wrote for the same pictures and prompts, "
            "in the same order"):
        with open(path, encoding="utf-8") as file:
            saved = [json.loads(line) for line in file]
        scores = [row.pop("score") for row in saved]
        require(saved == rows, f"it has others: {len(saved)} for {len(rows)} pictures")
        return torch.tensor(scores)

def compare(scores, expected):
    """Print the errors of scores in percent; return whether their mean is at most ALLOWED.

    They are relative to the root mean square of what is expected, as its mean may be 0."""
    size = expected.square().mean().sqrt().clamp(min=1e-12)
    errors = 100 * (torch.tensor(scores) - expected).abs() / size
    allowed = errors.mean().item() <= ALLOWED  # nan is not
    print(f"{len(scores)} scores: mean absolute error {errors.mean():.5f} %, largest "
          f"{errors.max():.5f} %, allowed {ALLOWED} % on average")
    print(f"reward {'OK' if allowed else 'OFF'}", flush=True)
    return allowed

def score_pictures(args):
    """Print, save and compare the scores of pictures. Raises BadInput.

    Their prompts are --prompt for all, the lines of --prompts, or in their names."""
    name, *others = parse_rewards(args.reward)
    require(not others, f"--reward {args.reward}: must be one reward here; run it for each")
    require(not args.prompt or not args.prompts,
            f"--prompts {args.prompts}: not allowed with --prompt; give one of them")

    # What can be refused is refused before a model is loaded.
    if args.save:
        check_save(args.save)
    device = select_device(args.device)
    files = find_pictures(args.images)
    if args.prompt:
        prompts = [args.prompt] * len(files)
    elif args.prompts:
        prompts = read_prompts(args.prompts)
        require(len(prompts) == len(files),
                f"--prompts {args.prompts}: has {len(prompts)} prompts for {len(files)} "
                "pictures; must have one per line, in the order of the pictures")
        require(files == sorted(files, key=natural),
                f"--prompts {args.prompts}: the pictures must be in the order of their names, 2 "
                "before 10, so that none gets the prompt of another; give their folder")
    else:
        prompts = prompts_from_names(files)
    print("the first:", printable(f"{files[0]}: {prompts[0]}"), file=sys.stderr)
    rows = [dict(image=file.name, prompt=prompt) for file, prompt in zip(files, prompts)]
    if args.against:
        expected = read_scores(args.against, rows)

    source = getattr(args, name, "")
    arch = getattr(args, f"{name}_arch", "")
    rewards = {name: (1, load_reward(name, source, arch, device, args.reward_fp32))}
    scores = []
    for file, prompt in zip(tqdm(files, delay=10), prompts):
        scores += score(rewards, read_image(file), [prompt], file)[name].tolist()

    if args.save:  # before anything is printed, as the reader of a pipe may end
        lines = [json.dumps(row | dict(score=x)) + "\n" for row, x in zip(rows, scores)]
        with atomic_write(args.save) as path:
            path.write_text("".join(lines))
    for file, value in zip(files, scores):
        print(f"{value:.5f} {printable(file)}", flush=True)
    if args.against:
        sys.exit(0 if compare(scores, expected) else 3)

def main(argv=None):
    parser = argparse.ArgumentParser(description="Score pictures with a reward.")
    parser.error = lambda message: exit_with_error(f"{message}; see --help")
    parser.add_argument("images", nargs="+", help="picture files, or folders")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", default="", help=text)
    parser.set_defaults(reward="hps", device="auto")
    parser.add_argument("--reward_fp32", action="store_true", help="no fp16 autocast")
    try:
        score_pictures(parser.parse_args(argv))
    except BadInput as error:
        exit_with_error(error)
    except BrokenPipeError:
        os._exit(1)  # `| head` has seen enough; no flush, which would fail as well

if __name__ == "__main__":
    if sys.stdout:  # a daemon may have closed it
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    main()
