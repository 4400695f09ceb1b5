"""Rewards for text-to-image training, and the choice of the device they run on.

A reward is a function (images, prompts) -> scores: images (B, 3, H, W) float in [0, 1], B prompts,
scores (B,) float, higher is better. HPS is the human preference score (Wu et al., arXiv
2306.09341): the cosine of two CLIP features, after training on what people chose.

    python reward.py --hps HPS_v2.1_compressed.pt --prompt "a cat in a hat" a.png b.png
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --save scores.jsonl     # on a GPU
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --against scores.jsonl  # on an NPU

This file imports nothing else of the project; it alone knows the kinds of devices by name.
"""

import argparse
import importlib
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm import tqdm


class BadInput(ValueError):
    """What the user gave cannot work; the text is the one line they will read."""


def plain(text):
    """Text for a terminal: characters that would steer it are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def refuse(message, status=2):
    """End the program as for every bad input: one line on stderr, exit status 2."""
    line = plain(" ".join(str(message).split()))
    line = line if len(line) < 800 else f"{line[:400]} ... {line[-400:]}"
    print("error:", line, file=sys.stderr)
    sys.exit(status)


@contextmanager
def refusing(message):
    """Whatever it raises to read what the user gave becomes a BadInput."""
    try:
        yield
    except Exception as error:  # of files and modules of the user's anything may come
        kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        raise BadInput(f"{message} ({kind}{error})") from None


# ------------------------------------------------------------------------------------------- files

def remove(path):
    """Remove a file or a folder, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
    Path(path).unlink(missing_ok=True)


def publish(work, path):
    """Give a complete file or folder its name; what had that name makes way in one piece."""
    old = path.with_name(f"old-{path.name}")
    if path.is_dir():
        os.rename(path, old)
    os.replace(work, path)
    remove(old)


@contextmanager
def whole(path):
    """A name to write to: what was written appears at path when all of it is there, or not."""
    work = Path(path).with_name(f"writing-{Path(path).name}")
    remove(work)  # of a run that was killed
    try:
        yield work
    except BaseException:
        remove(work)
        raise
    publish(work, Path(path))


# ------------------------------------------------------------------------------------------ device

DEVICES = ("auto", "cuda", "npu", "cpu")


def select_device(name="auto") -> torch.device:
    """The device of this process: "auto" takes the first of cuda, npu, cpu that is there.

    Under torchrun each process of a machine takes its own, by LOCAL_RANK. Raises BadInput if
    the machine does not have it.
    """
    def count(kind):  # torch_npu makes torch.npu when torch is imported
        module = getattr(torch, kind, None)
        return module.device_count() if module is not None and module.is_available() else 0

    if name not in DEVICES:
        raise BadInput(f"--device {name}: must be {' or '.join(DEVICES)}")
    if name == "auto":
        name = next((kind for kind in DEVICES[1:3] if count(kind)), "cpu")
    if name == "cpu":
        return torch.device(name)
    index, there = int(os.environ.get("LOCAL_RANK", 0)), count(name)
    if not there:
        needs = {"cuda": "an NVIDIA driver and a CUDA build of torch",
                 "npu": "CANN and the torch-npu of the same version as torch"}[name]
        raise BadInput(f"--device {name}: torch finds none on this machine; it needs {needs}")
    if index >= there:
        raise BadInput(f"--device {name}: this machine has {there}, too few for process {index}; "
                       f"--nproc_per_node must be at most {there}")
    return torch.device(name, index)


def is_accelerator(device) -> bool:
    return torch.device(device).type != "cpu"


def describe(device) -> str:
    """What decides on the bits of a result: the device, its kernels, torch's version."""
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name += f", {torch.get_num_threads()} threads"
    if is_accelerator(device):
        name = torch.get_device_module(device).get_device_name()
    return f"{name}, torch {torch.__version__}"


def make_deterministic(seed):
    """One device gives the same bits in every run: fixed kernels, no reduced fp32, fixed seeds.

    Call it before anything runs on the device, as its libraries read their switches once. On an
    accelerator it costs speed, and an operator without a deterministic kernel raises RuntimeError.
    """
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8", HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1",
        CLOSE_MATMUL_K_SHIFT="1", ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0",
        PYTHONHASHSEED=str(seed))  # the last counts in the processes that this one starts
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    if hasattr(torch, "npu"):
        torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False


# --------------------------------------------------------------------------------------------- HPS

def preprocess(images, size=224, mean=(0.48145466, 0.4578275, 0.40821073),
               std=(0.26862954, 0.26130258, 0.27577711)):
    """The official HPS preprocessing, on a batch: (B, 3, H, W) in [0, 1] -> (B, 3, size, size).

    Bicubic with antialias so that the longer side is `size`, zeros beside the shorter one, then
    CLIP's mean and std. (open_clip's own transform crops, which changes scores of other shapes.)
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new = max(1, round(height * scale)), max(1, round(width * scale))
        images = F.interpolate(images, size=new, mode="bicubic", antialias=True)
    pad_h, pad_w = size - images.shape[-2], size - images.shape[-1]
    images = F.pad(images, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (mean, std))
    return (images - mean) / std


def read_checkpoint(path):
    """The state dict in a .pt or .safetensors file; never runs code that a file may hold."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file; must be weights such as HPS_v2.1_compressed.pt")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        raise BadInput(f"{path}: not a file of weights, or broken on its way "
                       f"({type(error).__name__})") from None
    return state.get("state_dict", state) if isinstance(state, dict) else state


def find_arch(arch):
    """The name of an architecture; a .json file that describes one is made known to open_clip."""
    import open_clip  # takes seconds: imported where it is needed

    if str(arch).endswith(".json"):
        with refusing(f"{arch}: must be a model description of open_clip"):
            json.loads(Path(arch).read_text())
            open_clip.add_model_config(arch)
        arch = Path(arch).stem
    if arch not in open_clip.list_models():
        raise BadInput(f"{arch}: must be a model that open_clip knows; HPS-v2.1 is a ViT-H-14")
    return arch


def new_clip(arch):
    """A new open_clip model and its tokenizer; arch as in HPS."""
    import open_clip

    arch = find_arch(arch)
    logging.disable(logging.WARNING)  # "no pretrained weights": they come next
    model = open_clip.create_model(arch, pretrained=None, load_weights=False)
    logging.disable(logging.NOTSET)
    return model, open_clip.get_tokenizer(arch)


class HPS:
    """HPS-v2.1: scores (B,), the cosines of image and prompt features, about 0.2 to 0.35.

    checkpoint: HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2; with the weights of
        any open_clip model (.pt, .bin, .safetensors) it is that model's image-text similarity.
    arch: the name that open_clip has for the model, or a .json file that describes it.
    fp32: do without the fp16 autocast that the official code uses, and this on an accelerator.
    """

    def __init__(self, checkpoint, arch="ViT-H-14", device="cpu", fp32=False):
        find_arch(arch)
        state = read_checkpoint(checkpoint)
        self.model, self.tokenizer = new_clip(arch)
        # The fused attention of torch's eval mode has no NPU kernel: one path on every device.
        torch.backends.mha.set_fastpath_enabled(False)
        self.device, self.half = torch.device(device), is_accelerator(device) and not fp32
        try:
            self.model.load_state_dict(state, strict=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()
            raise BadInput(f"{checkpoint}: not the weights of {arch}: "
                           f"{' '.join(reason[:2])[:200]}") from None
        self.model.to(self.device).eval().requires_grad_(False)
        self.size = self.model.visual.image_size[0]

    @torch.no_grad()
    def __call__(self, images, prompts):
        unique = list(dict.fromkeys(prompts))  # a group shares its prompt: encode it once
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            pixels = preprocess(images.to(self.device).float(), self.size)
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True)
        # the product in fp16 would round 0.28 to steps of 0.0002
        return (image.float() * text.float()[[unique.index(p) for p in prompts]]).sum(-1)


# ------------------------------------------------------------------------------------- reward spec

def parse_rewards(spec) -> dict[str, float]:
    """ "hps:0.7,clip:0.3" -> {"hps": 0.7, "clip": 0.3}; the weight is 1 where none is given.

    A name is hps, clip, or package.module:function for a function of the user's.
    """
    rewards = {}
    for item in spec.split(","):
        match = re.fullmatch(r"(hps|clip|[\w.]+:[a-zA-Z_]\w*)(?::(\d*\.?\d+))?", item.strip())
        if not match or match[1] in rewards or not re.search("[1-9]", match[2] or "1"):
            raise BadInput(f"--reward {spec}: {item!r} must be hps, clip or package.module:function"
                           ", each once, with a :WEIGHT above 0 behind it or nothing")
        rewards[match[1]] = float(match[2] or 1)
    return rewards


def load_reward(name, checkpoint="", arch="ViT-H-14", device="cpu", fp32=False):
    if ":" not in name:
        return HPS(checkpoint, arch, device, fp32)
    module, function = name.split(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, also when torchrun starts us
    try:
        with refusing(f"--reward {name}: must be a function that can be imported"):
            found = getattr(importlib.import_module(module), function)
            if not callable(found):
                raise TypeError(f"it is of type {type(found).__name__}")
            return found
    finally:
        sys.path.pop(0)


# -------------------------------------------------------------------------------------- tiny world

COLORS = dict(red=(220, 40, 40), green=(40, 170, 60), blue=(50, 80, 220),
              yellow=(240, 210, 40), purple=(150, 60, 190), black=(45, 45, 50))
SHAPES = dict(  # corners, in units of the radius
    circle=[(math.cos(i / 8), math.sin(i / 8)) for i in range(50)],
    square=[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    triangle=[(0, -1), (-1, 0.8), (1, 0.8)],
    cross=[(-1, -0.36), (-0.36, -0.36), (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36),
           (1, 0.36), (0.36, 0.36), (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36)])
TINY_PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]  # all 24


def draw(prompt, rng, size=32):
    """A picture (size, size, 3) uint8 of a prompt of the tiny world; rng sets place and extent."""
    _, color, shape = prompt.split()
    large = 4 * size  # drawn large and scaled down: smooth edges
    picture = Image.new("RGB", (large, large), (236, 236, 230))
    radius, (x, y) = large * rng.uniform(0.28, 0.36), large * rng.uniform(0.42, 0.58, size=2)
    corners = [(x + radius * a, y + radius * b) for a, b in SHAPES[shape]]
    ImageDraw.Draw(picture).polygon(corners, COLORS[color])
    return np.asarray(picture.resize((size, size), Image.LANCZOS))


def tiny_dataset(count, seed=0):
    """images (count, 3, 32, 32) float in [0, 1] and the index (count,) of each one's prompt."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(TINY_PROMPTS)
    images = np.stack([draw(TINY_PROMPTS[i], rng) for i in labels])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)


TINY_CLIP = """{"embed_dim": 64,
 "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "head_width": 32, "layers": 3},
 "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}"""


def fit(model, loss, count, steps, batch, rate, title):
    """Train a tiny model with AdamW on loss(indices of a random batch out of count)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True):
        optimizer.zero_grad()
        loss(torch.randint(count, (batch,))).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def build_tiny_hps(folder, images, labels):
    """A miniature CLIP of the tiny world: clip.pt when it is half trained, hps.pt at the end."""
    folder.mkdir()
    arch = folder / "tiny-clip.json"
    arch.write_text(TINY_CLIP)
    model, tokenizer = new_clip(arch)
    text = tokenizer(TINY_PROMPTS)

    def loss(pick):
        # a judge of generated pictures must have seen noisy ones
        noise = 0.1 * torch.rand(len(pick), 1, 1, 1) * torch.randn(len(pick), 3, 32, 32)
        pixels = preprocess((images[pick] + noise).clamp(0, 1), 32)
        features = model.encode_image(pixels, normalize=True)
        words = model.encode_text(text, normalize=True)
        return F.cross_entropy(model.logit_scale.exp() * features @ words.T, labels[pick])

    for name in ("clip", "hps"):
        fit(model, loss, len(images), steps=200, batch=64, rate=1e-3, title=f"tiny {name:4} (3/3)")
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pt")


def tiny_accuracy(hps, images, prompts):
    """(B,) 1.0 where the model takes an image for its own prompt among all 24, else 0.0."""
    scores = torch.stack([hps(images, [p] * len(images)) for p in TINY_PROMPTS])  # (24, B)
    own = torch.tensor([TINY_PROMPTS.index(p) for p in prompts], device=scores.device)
    return (scores.argmax(0) == own).float()


# ------------------------------------------------------------------------------------ command line

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ALLOWED = 0.015  # percent of the mean score: what ports of HPS to Ascend are held to


def find_pictures(paths):
    """The files among paths, and the pictures of the folders among them, sorted by name."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files += [file for file in inside if file.suffix.lower() in PICTURES] or [path]
    for file in files:
        with refusing(f"{file}: must be a picture that Pillow can read"):
            Image.open(file).close()
    return files


def read_image(path):
    """A picture file as (1, 3, H, W) float in [0, 1]; grey and transparent ones become RGB."""
    with refusing(f"{path}: must be a picture that Pillow can read"), Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def read_batches(files, most):
    """Pictures (B, 3, H, W), in their order: neighbours of one size together, `most` at a time."""
    batch = []
    for image in map(read_image, files):
        if batch and (len(batch) == most or batch[0].shape != image.shape):
            yield torch.cat(batch)
            batch = []
        batch.append(image)
    yield torch.cat(batch)


def read_prompts(path, flag="--prompts"):
    """The lines of a UTF-8 file, stripped, without the empty ones."""
    with refusing(f"{flag} {path}: must be a text file in UTF-8"):
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a zero byte, as UTF-16 and programs do")
    lines = text.split("\n")  # and nowhere else: a prompt may hold any other character
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise BadInput(f"{flag} {path}: must hold a prompt a line, but is empty")
    return prompts


def prompts_of(files, prompt, path):
    """One prompt a picture: the same for all, a line each of a file, or from the files' names."""
    if prompt:
        return [prompt] * len(files)
    if not path:  # "0007_a_cat-2.png": a cat
        names = [re.sub(r"^[\d\W_]+|[\d\W_]+$", "", file.stem) for file in files]
        if not all(names):
            raise BadInput(f"--prompt (not given): must be, as {files[names.index('')]} has no "
                           "words in its name")
        return [name.replace("_", " ") for name in names]
    if len(prompts := read_prompts(path)) != len(files):
        raise BadInput(f"--prompts {path}: has {len(prompts)} prompts for {len(files)} pictures; "
                       "must have one a line, in the order of the pictures' names")
    return prompts


def read_scores(path, names):
    """The scores (B,) that --save wrote for the same (picture, prompt) names."""
    lines = read_prompts(path, "--against")
    with refusing(f"--against {path}: must hold what --save wrote for the same pictures and "
                  "prompts"):
        scores = {(line["image"], line["prompt"]): line["score"] for line in map(json.loads, lines)}
        return torch.tensor([scores[name] for name in names])


def main(argv=None):
    parser = argparse.ArgumentParser(
        "reward.py", description="Score pictures with HPS-v2.1: a line with score and file each.")
    parser.error = lambda message: refuse(f"{message}; see --help")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="the text that all the pictures were made for")
    text.add_argument("--prompts", metavar="FILE", help="a text a line, in the order of the "
                      "pictures; without it the text is in the names: 0007_a_cat.png")
    parser.add_argument("--hps", required=True, metavar="FILE", help="HPS_v2.1_compressed.pt")
    parser.add_argument("--hps_arch", default="ViT-H-14", help="its name in open_clip, or a .json")
    parser.add_argument("--device", default="auto", help="auto, cuda, npu or cpu")
    parser.add_argument("--reward_fp32", action="store_true", help="no fp16 autocast")
    parser.add_argument("--deterministic", action="store_true", help="the same bits in every run")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time, if of one size")
    parser.add_argument("--save", metavar="FILE", help="write the scores, a line of JSON each")
    parser.add_argument("--against", metavar="FILE", help="compare with what --save wrote on "
                        "another device; exit status 3 if the mean error is above 0.015 %%")
    args = parser.parse_args(argv)
    try:
        score_pictures(args)
    except BadInput as error:
        refuse(error)


def score_pictures(args):
    if args.batch < 1:
        raise BadInput(f"--batch {args.batch}: must be at least 1")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        raise BadInput(f"--save {args.save}: must be a file in a folder that exists")
    device, files = select_device(args.device), find_pictures(args.images)
    names = [(file.name, text) for file, text in zip(files, prompts_of(files, args.prompt,
                                                                       args.prompts))]
    others = read_scores(args.against, names) if args.against else None
    if args.deterministic:
        make_deterministic(0)
    hps, scores = HPS(args.hps, args.hps_arch, device, args.reward_fp32), []
    with tqdm(total=len(files), unit="picture", disable=len(files) < 100) as bar:
        for images in read_batches(files, args.batch):
            prompts = [text for _, text in names[len(scores):len(scores) + len(images)]]
            scores += hps(images, prompts).tolist()
            bar.update(len(images))
    if args.save:
        lines = [json.dumps(dict(image=image, prompt=text, score=score), ensure_ascii=False)
                 for (image, text), score in zip(names, scores)]
        with whole(args.save) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    errors = torch.tensor(scores) - others if args.against else [None] * len(scores)
    for file, score, error in zip(files, scores, errors):
        print(f"{score:.5f}", *([] if error is None else [f"{error:+.1e}"]), f" {plain(file)}")
    if args.against:
        share = 100 / others.abs().mean().item()  # errors in percent of the mean score
        mean, worst = errors.abs().mean().item() * share, errors.abs().max().item() * share
        fine = mean <= ALLOWED
        print(f"{len(files)} scores: mean absolute error {mean:.5f} %, largest {worst:.5f} %, "
              f"allowed {ALLOWED} % on average\nreward {'OK' if fine else 'OFF'}")
        sys.exit(0 if fine else 3)


if __name__ == "__main__":
    main()
