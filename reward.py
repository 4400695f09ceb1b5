"""Rewards for text-to-image training, and the choice of the device they run on.

A reward is a function (images, prompts) -> scores: images (B, 3, H, W) float in [0, 1], B prompts,
scores (B,) float, higher is better. HPS (Wu et al., arXiv 2306.09341) and PickScore (Kirstain et
al., arXiv 2305.01569) are cosines of CLIP features, trained on which images people preferred.

    python reward.py --prompt "a cat in a hat" a.png b.png           # HPS-v2.1, from the hub
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --save scores.jsonl     # on a GPU
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --against scores.jsonl  # on an NPU
"""
import argparse
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from itertools import groupby, product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

class BadInput(ValueError):
    """Input that cannot work; the text is the one line that the user reads."""

def require(condition, message):
    """Raise BadInput with the message unless the condition holds."""
    if not condition:
        raise BadInput(message)

def printable(text):
    """Return text for the terminal; control characters, and what it cannot encode, are escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)

def exit_with_error(message, status=2):
    """End the program with one line on stderr, of at most about 800 characters."""
    line = printable(" ".join(str(message).split()))
    print("error:", line if len(line) < 800 else f"{line[:400]} ... {line[-400:]}", file=sys.stderr)
    sys.exit(status)

@contextmanager
def bad_input_if_fails(message):
    """Turn an exception or sys.exit inside into BadInput, with its text in brackets."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a user's files and modules can raise anything
        if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("--"):
            raise  # no input is to blame, or the error names the flag that is
        text = str(error).split("WeightsUnpickler error: ")[-1]  # leave out torch's advice
        kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        raise BadInput(f"{message} ({kind}{text})") from None

def remove(path):
    """Remove a file or folder, if there is one, so that a kill leaves no half under its name."""
    path = Path(path)
    if os.path.lexists(path) and not path.name.startswith((".old-", ".writing-")):
        old = path.with_name(f".old-{path.name}")
        remove(old)
        path = path.rename(old)
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)

@contextmanager
def atomic_write(path, rank=0):
    """Yield a temporary path to write a file or folder to; rename it to `path` on success.
    Rank 0 renames; processes that write into one folder must wait for each other before."""
    path = Path(path)
    temporary, old = (path.with_name(f".{word}-{path.name}") for word in ("writing", "old"))
    if rank > 0:  # rank 0 alone renames and removes
        yield temporary
        return
    remove(temporary)  # left behind by a run that was killed
    try:
        yield temporary
        remove(old)
        if path.is_dir():  # a rename takes the place of files only
            path.rename(old)
        os.replace(temporary, path)
        remove(old)
    finally:
        remove(temporary)

# ------------------------------------------------------------------------------------------ device

DEVICES = ("auto", "cuda", "npu", "cpu")

def select_device(name="auto") -> torch.device:
    """Return the device of this process: its own card, by LOCAL_RANK; auto: cuda, npu or cpu."""
    require(name in DEVICES, f"--device {name}: must be {' or '.join(DEVICES)}")
    modules = {kind: getattr(torch, kind, None) for kind in DEVICES[1:]}  # torch_npu adds torch.npu
    counts = {kind: m.device_count() for kind, m in modules.items() if m and m.is_available()}
    name = next(iter(counts)) if name == "auto" else name
    if name == "cpu":
        return torch.device(name)
    rank, size = (int(os.environ.get(f"LOCAL_{key}") or 0) for key in ("RANK", "WORLD_SIZE"))
    needs = "CANN and torch-npu, see README" if name == "npu" else "a CUDA build of torch"
    require(rank < counts.get(name, 0), f"--device {name}: torch finds none for process {rank}; "
            f"lower --nproc_per_node, or install {needs}")
    if name == "npu":  # HCCL's all-gather and reduce-scatter fail over 3, 5, 6 or 7 NPUs
        require(size not in (3, 5, 6, 7), f"--nproc_per_node {size}: must be 1, 2, 4, 8 or 16")
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "1200")  # seconds; 120 fail on a slow disk
    return torch.device(name, rank)

def is_accelerator(device) -> bool:
    return torch.device(device).type != "cpu"

def describe_device(device) -> str:
    """Return what decides on rounding: the card, or the CPU and its kernels; torch's version."""
    if is_accelerator(device):
        return f"{torch.get_device_module(device).get_device_name()}, torch {torch.__version__}"
    return (f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}")

def check_compile(device):
    """Raise BadInput if torch.compile has no compiler for the device."""
    require(torch.device(device).type != "npu" or importlib.util.find_spec("triton"),
            "--compile: torch.compile needs triton-ascend on an NPU; install it")

def make_deterministic(seed):
    """Choose deterministic kernels, full fp32 and seeds, before anything runs on the device."""
    from accelerate.utils import set_seed
    os.environ.update(  # the last one takes effect in child processes
        CUBLAS_WORKSPACE_CONFIG=":4096:8", HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1",
        CLOSE_MATMUL_K_SHIFT="1", ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0",
        PYTHONHASHSEED=str(seed))
    set_seed(seed)  # of Python, numpy and torch
    torch.use_deterministic_algorithms(True)  # without one CUDA raises, an NPU does not
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch, "npu"):
        torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False

# ----------------------------------------------------------------------------------------- rewards

WEIGHTS = {"--hps": "xswu/HPSv2/HPS_v2.1_compressed.pt",
           "--pickscore": "yuvalkirstain/PickScore_v1"}

def resolve_weights(flag, value) -> str:
    """Return the path of weights: as given, or downloaded from the hub; "" stands for WEIGHTS."""
    name, given = value or WEIGHTS.get(flag, ""), f"{flag} {value or '(not given)'}"
    if os.path.exists(name):
        return name
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", name)
    must = "folder, or owner/name" if flag == "--pickscore" else "file, or owner/name/file"
    require(match and bool(match[2]) == (flag != "--pickscore"),
            f"{given}: not found; must be a {must} of the hub, with weights")
    import huggingface_hub as hub
    offline = True
    with suppress(Exception):  # ask once: offline the hub's client retries, loudly, for 24 seconds
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=10)
        offline = False
    with bad_input_if_fails(
            f"{given}: {'there is no connection' if offline else 'the download failed'}; correct "
            f"the name, accept the licence on {hub.constants.ENDPOINT}/{match[1]} and run `hf auth "
            f"login`, or download it elsewhere and give its path with {flag}"):
        if match[2]:
            return hub.hf_hub_download(*match.groups(), local_files_only=offline)
        return hub.snapshot_download(match[1], local_files_only=offline,
                                     allow_patterns=["*.json", "*.txt", "*.safetensors"])

def preprocess(images, size=224, mean=(0.48145466, 0.4578275, 0.40821073),
               std=(0.26862954, 0.26130258, 0.27577711), crop=False):
    """Prepare images for CLIP: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised.

    Bicubic with antialias. crop=False, as for HPS: the longer side becomes `size`, zeros fill up
    the other. crop=True, as for PickScore: the shorter one does, and the centre is cut out."""
    height, width = images.shape[-2:]
    if crop:  # truncated, as transformers does; else rounded, as the official HPS does
        new = [int(size * side / min(height, width)) for side in (height, width)]
    else:
        new = [max(1, round(side * (size / max(height, width)))) for side in (height, width)]
    if new != [height, width]:
        images = F.interpolate(images, size=new, mode="bicubic", antialias=True)
    pad_h, pad_w = size - new[0], size - new[1]  # negative padding cuts off
    left, top = int(pad_w / 2), int(pad_h / 2)
    images = F.pad(images, (left, pad_w - left, top, pad_h - top))
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (mean, std))
    return (images - mean) / std

def new_clip(arch, flag="--hps"):
    """Return an open_clip model without weights, and its tokenizer; arch as in HPS."""
    import open_clip  # takes seconds
    name = Path(arch).stem if str(arch).endswith(".json") else arch
    with mock.patch("logging.warning"), bad_input_if_fails(  # silence: weights come later
            f"{flag}_arch {arch}: must be an open_clip model, such as ViT-H-14, or a .json of one"):
        if name != arch:
            open_clip.add_model_config(arch)
        # mean and std depend on the weights, not on arch: take those of the first published ones
        tag = [*open_clip.list_pretrained_tags_by_model(name), ""][0]
        model = open_clip.create_model(
            name, load_weights=False, force_preprocess_cfg=open_clip.get_pretrained_cfg(name, tag))
        return model, open_clip.get_tokenizer(name)

class HPS:
    """Score (B,) by HPS-v2.1: cosines of image and prompt features, about 0.2 to 0.35.

    arch: the name or .json file of any other open_clip model, whose similarity it then is.
    fp32: on an accelerator, do without the fp16 autocast that the official code uses."""
    def __init__(self, checkpoint, arch="ViT-H-14", device="cpu", fp32=False, flag="--hps"):
        from open_clip.factory import load_state_dict
        scalar = np.float64(0).__reduce__()[0]  # numpy's numbers, which training loops save too
        safe = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        safe += [np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd")]
        with torch.serialization.safe_globals(safe), bad_input_if_fails(
                f"{flag} {checkpoint}: must be a whole .pt, .bin or .safetensors file with the "
                f"weights of {flag}_arch {arch} and no Python objects"):
            state = load_state_dict(checkpoint)  # runs no code of the file
            state = {k.removeprefix("module."): w for k, w in state.get("model", state).items()}
            self.model, self.tokenizer = new_clip(arch, flag)
            self.model.load_state_dict(state)  # fp16 weights are copied into fp32 ones
        # The fused attention of torch's eval mode has no NPU kernel: one path on every device.
        torch.backends.mha.set_fastpath_enabled(False)
        self.device, self.half = torch.device(device), is_accelerator(device) and not fp32
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts):
        unique, visual = list(dict.fromkeys(prompts)), self.model.visual  # encode each prompt once
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            pixels = preprocess(images.to(self.device).float(), visual.image_size[0],
                                visual.image_mean, visual.image_std)
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True)
        # the product in fp16 would round 0.28 to steps of 0.0002
        return (image.float() * text.float()[[unique.index(p) for p in prompts]]).sum(-1)

class PickScore:
    """Score (B,) by PickScore, in fp32: cosines of image and prompt features, about 0.2."""
    def __init__(self, model="yuvalkirstain/PickScore_v1", device="cpu"):
        model = resolve_weights("--pickscore", model)
        with bad_input_if_fails(f"--pickscore {model}: must be transformers' CLIP model"):
            from transformers import AutoTokenizer, CLIPModel
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model, report = CLIPModel.from_pretrained(model, output_loading_info=True)
            size = self.model.config.text_config.vocab_size  # transformers makes up what is missing
            require(len(self.tokenizer) >= size and not report["missing_keys"],
                    "it lacks weights or tokens")
        self.model.to(device, torch.float32).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts):
        unique, config, device = list(dict.fromkeys(prompts)), self.model.config, self.model.device
        tokens = self.tokenizer(unique, padding=True, truncation=True, return_tensors="pt",
                                max_length=config.text_config.max_position_embeddings).to(device)
        pixels = preprocess(images.to(device).float(), config.vision_config.image_size, crop=True)
        image = self.model.get_image_features(pixels).pooler_output  # after the projection
        text = self.model.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(image, text[[unique.index(p) for p in prompts]])

def parse_rewards(spec) -> dict[str, float]:
    """Parse "hps:0.7,clip:0.3" into {"hps": 0.7, "clip": 0.3}; the weight is 1 if not given."""
    rewards, name = {}, r"(hps|clip|pickscore|[\w.]+:[a-zA-Z_]\w*)"
    for item in spec.split(","):
        match = re.fullmatch(name + r"(?::(\d*\.?\d+))?", item.strip())
        require(match and match[1] not in rewards, f"--reward {spec}: {item!r} must be hps, clip, "
                "pickscore or package.module:function, each once, with or without a :WEIGHT")
        rewards[match[1]] = float(match[2] or 1)  # 0: scored and logged, but not trained on
    require(any(rewards.values()), f"--reward {spec}: at least one weight must be above 0")
    return rewards

@contextmanager
def process_state_kept():
    """Restore what a user's module or function may have changed for the whole process."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    dtype = torch.get_default_dtype()
    try:
        with (warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()),
              mock.patch("sys.path", sys.path[:]), mock.patch("sys.argv", sys.argv[:])):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)  # this project never sets one
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)

def load_function(name):
    """Return the function of package.module:function; its calls leave the process as it was."""
    module, function = name.split(":")
    if os.getcwd() not in sys.path:  # as `python -m` does; it stays, for imports during calls
        sys.path.insert(0, os.getcwd())
    quiet = mock.patch("argparse.ArgumentParser.error", lambda parser, text: sys.exit(text))
    with quiet, process_state_kept(), bad_input_if_fails(f"--reward {name}: must be a function, "
            "whose module can be imported, and neither calls sys.exit nor parses arguments"):
        loaded, own = importlib.import_module(module), Path(f"{module.split('.')[0]}.py")
        require(not own.exists() or own.samefile(loaded.__file__),
                f"rename {own}: {loaded.__file__} has its name")
        found = getattr(loaded, function)
        require(callable(found) and not inspect.iscoroutinefunction(found),
                f"it is async, or of type {type(found).__name__}")
    return process_state_kept()(found)

def load_reward(name, source="", arch="", device="cpu", fp32=False):
    """Return the function (images, prompts) -> (B,) of a name; a user's needs no device."""
    if ":" in name:
        return load_function(name)
    weights = resolve_weights(f"--{name}", source)
    if name == "pickscore":
        return PickScore(weights, device)
    return HPS(weights, arch or "ViT-H-14", device, fp32, f"--{name}")

def score(rewards, images, prompts, where):
    """Return {name: scores (B,) fp32 on the CPU}; rewards: {name: (weight, function)}.
    Each function gets a copy of the images and of the prompts. where: "step 3", for messages."""
    if not images.isfinite().all():
        raise FloatingPointError(f"an image of {where} is not finite; --dtype fp32 may prevent it")
    scores = {}
    for name, (_, function) in rewards.items():
        with bad_input_if_fails(f"--reward {name}: must return {len(images)} finite numbers for as "
                                f"many images, but failed in {where}, prompts {prompts[0]!r} ..."):
            r = torch.as_tensor(function(images.clone(), list(prompts))).detach().float().cpu()
            require(r.shape == (len(images),) and r.isfinite().all(),
                    f"it gave {r.tolist() if r.ndim == 1 else tuple(r.shape)}")
            scores[name] = r
    return scores

def refuse_tables(lines, path):
    """Raise BadInput with a command that makes a text file, if lines are JSON, CSV or TSV."""
    text, column = "\n".join(lines), "(prompt|caption|text)"
    if start := re.match(r'([\[{])[\s\[{]*"', text):  # such as [{"prompt" or ["a cat" or {"prompt"
        kind, rows = "JSON", "json.load(file)" if start[1] == "[" else "map(json.loads, file)"
        name = re.search(rf'"{column}"\s*:', text, re.IGNORECASE)
    else:  # id,prompt or caption alone, but not a prompt such as: text, bold
        name = re.fullmatch(rf'(?:.*[,;\t])?"?{column}"?(?:[,;\t].*)?', lines[0], re.IGNORECASE)
        if not name or ", " in lines[0] or len(lines) == 1:
            return
        delimiter = max(("\t", ";", ","), key=lines[0].count)
        kind, rows = "CSV or TSV", f"csv.DictReader(file, delimiter={delimiter!r})"
    row = f"row[{name[1]!r}]" if name else "row"
    raise BadInput(f"--prompts {path}: is {kind}; must be a text file with one prompt per line, "
                   f'such as from: python -c "import csv, json; file = open({str(path)!r}); '
                   f'[print({row}) for row in {rows}]" > prompts.txt')

def read_prompts(path):
    """Return the lines of a UTF-8 text file, stripped, without the empty ones. Raises BadInput."""
    with bad_input_if_fails(f"--prompts {path}: must be a text file in UTF-8"):
        text = Path(path).read_text(encoding="utf-8-sig")
        require("\0" not in text, "it holds a zero byte, as UTF-16 and binary files do")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]  # splitlines splits more
    require(prompts, f"--prompts {path}: must hold one prompt per line, but is empty")
    refuse_tables(prompts, path)
    return prompts

# -------------------------------------------------------------------------------------- tiny world

BACKGROUND = 236, 236, 230
COLORS = dict(red=(220, 40, 40), green=(40, 170, 60), blue=(50, 80, 220),
              yellow=(240, 210, 40), purple=(150, 60, 190), black=(45, 45, 50))
SHAPES = dict(  # corners, in units of the radius
    circle=[(math.cos(i / 8), math.sin(i / 8)) for i in range(50)],
    square=[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    triangle=[(0, -1), (-1, 0.8), (1, 0.8)],
    cross=[(-1, -0.36), (-0.36, -0.36), (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36),
           (1, 0.36), (0.36, 0.36), (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36)])
TINY_PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]  # all 24

def draw(prompt, rng=None, size=32, place=(0.35, 0.5, 0.5)):
    """Draw a prompt of the tiny world, (size, size, 3) uint8; place: radius and centre as shares of
    the side, which rng draws if it is given."""
    _, color, shape = prompt.split()
    if rng is not None:
        place = (rng.uniform(0.32, 0.37), *rng.uniform(0.46, 0.54, size=2))
    large = 4 * size  # drawn large and scaled down: smooth edges
    radius, x, y = (large * share for share in place)
    picture = Image.new("RGB", (large, large), BACKGROUND)
    corners = [(x + radius * a, y + radius * b) for a, b in SHAPES[shape]]
    ImageDraw.Draw(picture).polygon(corners, COLORS[color])
    return np.asarray(picture.resize((size, size), Image.LANCZOS))

def tiny_dataset(count, seed=0):
    """Return images (count, 3, 32, 32) in [0, 1], and the index (count,) of each one's prompt."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(TINY_PROMPTS)
    images = np.stack([draw(TINY_PROMPTS[i], rng) for i in labels])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)

def find_foreground(images):
    """Return the mean colour (B, 3) of the foreground of images (B, 3, H, W), nan if there is none,
    and its soft mask (B, H * W), from 0 for the background to 1 for that colour."""
    background = torch.tensor(BACKGROUND) / 255
    away = images - background.view(3, 1, 1)
    inside = (away.norm(dim=1, keepdim=True) > 0.25).float()
    mean = (away * inside).sum((2, 3)) / inside.sum((2, 3))
    mask = away.norm(dim=1).flatten(1) / mean.norm(dim=1, keepdim=True)
    return mean + background, mask.clamp(0, 1).nan_to_num()

@cache
def shape_templates():
    """Return masks (4, N, 32 * 32): each shape in N sizes and places, more than the data has."""
    places = list(product(np.linspace(0.26, 0.42, 7), *[np.linspace(0.38, 0.62, 9)] * 2))
    drawn = [draw(f"a black {shape}", place=place) for shape in SHAPES for place in places]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
    return find_foreground(images)[1].view(len(SHAPES), len(places), -1)

def judge_tiny(images, prompts, rewards):
    """Return {metric: (B,) 1.0 or 0.0} of images (B, 3, 32, 32) of TINY_PROMPTS.
    accuracy: HPS ranks an image's own prompt first of 24. right_colour, _shape, _both: measured, no
    part of a reward; nearest colour to the mean foreground, shape with the best soft IoU."""
    own = torch.tensor([TINY_PROMPTS.index(p) for p in prompts])
    judged = {}
    if "hps" in rewards:
        _, hps = rewards["hps"]
        scores = torch.stack([hps(images, [p] * len(images)) for p in TINY_PROMPTS])  # (24, B)
        judged["accuracy"] = scores.argmax(0).cpu() == own
    (mean, mask), templates = find_foreground(images.float().cpu()), shape_templates()
    common = torch.einsum("bp,snp->bsn", mask, templates)
    norms = mask.square().sum(1)[:, None, None] + templates.square().sum(2)
    shape = (common / (norms - common)).amax(2).argmax(1)
    color = torch.cdist(mean, torch.tensor(list(COLORS.values())) / 255).argmin(1)
    there = ~mean.isnan().any(1)  # an empty image is right in nothing
    judged["right_colour"] = there & (color == own // len(SHAPES))
    judged["right_shape"] = there & (shape == own % len(SHAPES))
    judged["right_both"] = judged["right_colour"] & judged["right_shape"]
    return {name: right.float() for name, right in judged.items()}

TINY_CLIP = """{"embed_dim": 64, "quick_gelu": true,
 "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "head_width": 32, "layers": 3},
 "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}"""

def fit(model, loss, count, steps, batch, rate, title):
    """Train a tiny model with AdamW on loss(indices of a random batch out of count)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True):
        optimizer.zero_grad()
        loss(torch.randint(count, (batch,))).backward()
        optimizer.step()
        schedule.step()
    model.eval()

def botch(images, share):
    """Spoil images (B, 3, 32, 32) by a share (B,) <= 1: bend, tint, grain and blotches."""
    count, share = len(images), share.view(-1, 1, 1, 1)
    here = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), images.shape, align_corners=False)
    bend = F.interpolate(torch.randn(count, 2, 5, 5), size=32, mode="bicubic")
    images = F.grid_sample(images, here + 0.25 * (share * bend).permute(0, 2, 3, 1),
                           padding_mode="border", align_corners=False)
    mask = find_foreground(images)[1].view(-1, 1, 32, 32)
    images = images + 0.35 * share * mask * torch.randn(count, 3, 1, 1)
    for cell in (1, 4, 8):  # some noise in all: a judge of generated pictures must know it
        noise = F.interpolate(torch.randn(count, 3, 32 // cell, 32 // cell), scale_factor=cell)
        images = images + torch.rand(count, 1, 1, 1) * (0.05 + 0.25 * share) * noise
    return images.clamp(0, 1)

def build_tiny_hps(folder, images, labels):
    """Train a miniature CLIP, clip.pt when it is half trained and hps.pt at the end: it tells apart
    24 prompts, and a 25th that stands for how botched a picture is."""
    folder.mkdir()
    arch = folder / "tiny-clip.json"
    arch.write_text(TINY_CLIP)
    model, tokenizer = new_clip(arch)
    text = tokenizer([*TINY_PROMPTS, "a botched drawing"])

    def loss(pick):
        share = (2 * torch.rand(len(pick)) - 1).clamp(min=0)  # 0 for half of them
        target = F.one_hot(labels[pick], len(text)) * (1 - share[:, None])
        target[:, -1] = share
        features = model.encode_image(preprocess(botch(images[pick], share), 32), normalize=True)
        words = model.encode_text(text, normalize=True)
        return F.cross_entropy(model.logit_scale.exp() * features @ words.T, target)

    for name in ("clip", "hps"):
        fit(model, loss, len(images), steps=250, batch=64, rate=1e-3,
            title=f"tiny {name.upper():4} (3/3): which prompt is it, how well drawn")
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pt")

# ------------------------------------------------------------------------------------ command line

ALLOWED = 0.015  # percent of the mean score, on average over the pictures
FLAGS = (  # name, default, help
    ("prompt", "", "the text that all the pictures were made for"),
    ("prompts", "", "file with a text a line, in their order; else their names: 7_a_red_cat.png"),
    ("reward", "hps", "hps, clip, pickscore or package.module:function"),
    ("hps", "", "a file, or owner/name/file of the hub; without it HPS-v2.1 of the hub"),
    ("hps_arch", "ViT-H-14", "its name in open_clip, or a .json file"),
    ("clip", "", "weights of an open_clip model"),
    ("clip_arch", "ViT-H-14", "its name in open_clip, or a .json file"),
    ("pickscore", "", "a folder, or owner/name of the hub; without it PickScore_v1"),
    ("device", "auto", "auto, cuda, npu or cpu"),
    ("save", "", "write the scores to this file, a line of JSON each"),
    ("against", "", f"compare with a file of --save; mean error above {ALLOWED} %%: exit status 3"),
    ("batch", 16, "pictures at a time, if of one size"),
    ("reward_fp32", False, "no fp16 autocast"))

def find_pictures(paths):
    """Return the files among paths, and in natural order the pictures in the folders among them."""
    def natural(file):  # a2.png before a10.png
        return re.sub(r"\d+", lambda number: number[0].zfill(20), file.name), file.name

    formats = Image.registered_extensions()
    files = []
    for path in map(Path, paths):
        inside = [f for f in path.glob("[!.]*") if formats.get(f.suffix.lower()) in Image.OPEN]
        files += sorted(inside, key=natural) if path.is_dir() else [path]
    for file in files or paths:  # before a model is loaded
        with bad_input_if_fails(f"{file}: must be a picture that Pillow can read"):
            Image.open(file).close()
    return files

def read_image(path):
    """Return a picture file as (1, 3, H, W) float in [0, 1]: upright, in RGB, on white."""
    with bad_input_if_fails(f"{path}: must be a picture that Pillow can read"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

def score_pictures(args):
    """Print, save and compare the scores of pictures, whose prompt is one for all, a line each of a
    file, or from their names. Raises BadInput."""
    name, *others = parse_rewards(args.reward)
    require(not others, f"--reward {args.reward}: must be one reward here; run it for each")
    require(args.batch >= 1, f"--batch {args.batch}: must be at least 1")
    require(not args.prompt or not args.prompts,
            f"--prompts {args.prompts}: not allowed with --prompt; give one of them")
    require(Path(args.save).absolute().parent.is_dir(),
            f"--save {args.save}: must be a file in a folder that exists")
    device, files = select_device(args.device), find_pictures(args.images)
    prompts = read_prompts(args.prompts) if args.prompts else [  # 07_a_cat-2.png: a cat
        args.prompt or re.sub(r"^[\d\W_]+|[\d\W_]+$", "", file.stem).replace("_", " ")
        for file in files]
    require(len(prompts) == len(files), f"--prompts {args.prompts}: has {len(prompts)} prompts for "
            f"{len(files)} pictures; must have one a line, in the order of the pictures' names")
    for file, prompt in zip(files, prompts):
        require(prompt, f"--prompt (not given): must be, as the name of {file} has no words")
    if args.against:
        with bad_input_if_fails(f"--against {args.against}: must hold what --save wrote for the "
                                "same pictures and prompts"):
            lines = map(json.loads, Path(args.against).read_text(encoding="utf-8").splitlines())
            saved = {(line["image"], line["prompt"]): line["score"] for line in lines}
            expected = torch.tensor([saved[f.name, p] for f, p in zip(files, prompts)])
    source, arch = (getattr(args, name + part, "") for part in ("", "_arch"))
    rewards = {name: (1, load_reward(name, source, arch, device, args.reward_fp32))}
    bar = enumerate(tqdm(files, unit="picture", disable=len(files) < 100))
    images = ((i // args.batch, prompts[i], read_image(file)) for i, file in bar)
    scores = []
    for _, group in groupby(images, lambda item: (item[0], item[2].shape)):  # of one size
        _, texts, batch = zip(*group)
        scores += score(rewards, torch.cat(batch), texts, files[len(scores)])[name].tolist()
    for file, value in zip(files, scores):
        print(f"{value:.5f} {printable(file)}")
    if args.save:
        rows = [dict(image=f.name, prompt=p, score=s) for f, p, s in zip(files, prompts, scores)]
        with atomic_write(args.save) as path:
            path.write_text("\n".join(map(json.dumps, rows)))
    if args.against:
        errors = 100 * (torch.tensor(scores) - expected).abs() / expected.abs().mean()
        verdict = "OK" if errors.mean().item() <= ALLOWED else "OFF"
        print(f"{len(files)} scores: mean absolute error {errors.mean():.5f} %, largest "
              f"{errors.max():.5f} %, allowed {ALLOWED} % on average\nreward {verdict}")
        sys.exit(0 if verdict == "OK" else 3)

def main(argv=None):
    parser = argparse.ArgumentParser("reward.py", description="Score pictures with a reward.")
    parser.error = lambda message: exit_with_error(f"{message}; see --help")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders")
    for name, default, text in FLAGS:
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=text, **kind)
    try:
        score_pictures(parser.parse_args(argv))
    except BadInput as error:
        exit_with_error(error)

if __name__ == "__main__":
    main()
