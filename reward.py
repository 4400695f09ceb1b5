"""Rewards for text-to-image training, and the choice of the device they run on.

A reward is a function (images, prompts) -> scores: images (B, 3, H, W) float in [0, 1], B prompts,
scores (B,) float, higher is better. HPS (Wu et al., arXiv 2306.09341) and PickScore (Kirstain et
al., arXiv 2305.01569) are cosines of CLIP features, trained on which images people preferred.

    python reward.py --prompt "a cat in a hat" a.png b.png           # HPS-v2.1, from the hub
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --save scores.jsonl     # on a GPU
    python reward.py --hps HPS_v2.1_compressed.pt pictures/ --against scores.jsonl  # on an NPU

This file imports nothing else of the project; it alone names the kinds of devices.
"""

import argparse
import csv
import importlib
import inspect
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file
from tqdm import tqdm


class BadInput(ValueError):
    """Input of the user's that cannot work; the text is the one line that the user reads."""


def printable(text):
    """Return text for the terminal; control characters, and what it cannot encode, are escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def exit_with_error(message, status=2):
    """End the program with one line on stderr, of at most about 800 characters."""
    line = printable(" ".join(str(message).split()))
    line = line if len(line) < 800 else f"{line[:400]} ... {line[-400:]}"
    print("error:", line, file=sys.stderr)
    sys.exit(status)


@contextmanager
def bad_input_if_fails(message):
    """Turn any Exception inside into BadInput: the message, then the exception in brackets."""
    try:
        yield
    except Exception as error:  # a user's files and modules can raise anything
        kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        raise BadInput(f"{message} ({kind}{error})") from None


# ------------------------------------------------------------------------------------------- files

def remove(path):
    """Remove a file or a folder, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
    Path(path).unlink(missing_ok=True)


@contextmanager
def atomic_write(path, rank=0):
    """Yield a temporary path to write a file or folder to; rename it to `path` on success.

    It is removed on an exception. Where several processes write into one folder, rank 0 alone
    renames and removes: they must wait for each other after entering and before leaving.
    """
    path = Path(path)
    temporary, old = path.with_name(f"writing-{path.name}"), path.with_name(f"old-{path.name}")
    if rank == 0:
        remove(temporary)  # left behind by a run that was killed
    try:
        yield temporary
    except BaseException:
        if rank == 0:
            remove(temporary)
        raise
    if rank == 0:
        if path.is_dir():
            remove(old)
            os.rename(path, old)
        os.replace(temporary, path)
        remove(old)


# ------------------------------------------------------------------------------------------ device

DEVICES = ("auto", "cuda", "npu", "cpu")


def select_device(name="auto") -> torch.device:
    """Return the device of this process; "auto" is the first of cuda, npu and cpu that exists.

    Under torchrun each process of a machine takes its own card, by LOCAL_RANK. Raises BadInput if
    the machine has none, or too few.
    """
    def count(kind):  # importing torch loads torch_npu, which adds torch.npu
        module = getattr(torch, kind, None)
        return module.device_count() if module is not None and module.is_available() else 0

    if name not in DEVICES:
        raise BadInput(f"--device {name}: must be {' or '.join(DEVICES)}")
    if name == "auto":
        name = next((kind for kind in DEVICES[1:3] if count(kind)), "cpu")
    if name == "cpu":
        return torch.device(name)
    index, available = int(os.environ.get("LOCAL_RANK") or 0), count(name)
    if not available:
        needs = {"cuda": "an NVIDIA driver and a CUDA build of torch", "npu":
                 f"CANN and the torch-npu of torch {torch.__version__}; which CANN, says the table "
                 "in https://github.com/Ascend/pytorch/blob/master/COMPATIBILITY.en.md"}
        raise BadInput(f"--device {name}: torch finds none on this machine; it needs {needs[name]}")
    if index >= available:
        raise BadInput(f"--device {name}: this machine has {available}, too few for process "
                       f"{index}; --nproc_per_node must be at most {available}")
    if name == "npu":  # HCCL waits 120 s for the slowest process, too few for a slow shared disk
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "1200")
    return torch.device(name, index)


def is_accelerator(device) -> bool:
    return torch.device(device).type != "cpu"


def describe_device(device) -> str:
    """Return what decides on rounding: the device's name or CPU kernels, and torch's version."""
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name += f", {torch.get_num_threads()} threads"
    if is_accelerator(device):
        name = torch.get_device_module(device).get_device_name()
    return f"{name}, torch {torch.__version__}"


def make_deterministic(seed):
    """Choose deterministic kernels, full fp32 and seeds: a device then repeats its results.

    Call it before anything runs on the device, whose libraries read these settings once. It costs
    speed. On CUDA an operator without a deterministic kernel raises RuntimeError; on an NPU nothing
    raises, and such an operator stays as it is.
    """
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8", HCCL_DETERMINISTIC="true", LCCL_DETERMINISTIC="1",
        CLOSE_MATMUL_K_SHIFT="1", ATB_MATMUL_SHUFFLE_K_ENABLE="0", ATB_LLM_LCOC_ENABLE="0",
        PYTHONHASHSEED=str(seed))  # the last one takes effect in child processes
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    if hasattr(torch, "npu"):
        torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False


# ----------------------------------------------------------------------------------------- weights

WEIGHTS = {"hps": "xswu/HPSv2/HPS_v2.1_compressed.pt", "pickscore": "yuvalkirstain/PickScore_v1"}


def resolve_weights(flag, value, default="", folder=False) -> str:
    """Return the path of weights: a file (or folder) as given, or a download from the hub.

    A hub name is owner/name/file, that of a folder owner/name; `default` stands for an empty value.
    Offline, the hub's cache is searched. Raises BadInput with the flag and what to do.
    """
    name, given = value or default, f"{flag} {value or '(not given)'}"
    if (os.path.isdir if folder else os.path.isfile)(name):
        return name
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", name)
    if not match or bool(match[2]) == folder:
        raise BadInput(f"{given}: no such {'folder' if folder else 'file'}; must be one with its "
                       f"weights, or {'owner/name' if folder else 'owner/name/file'} of the hub")
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download
    from huggingface_hub.utils import get_session

    page = f"{constants.ENDPOINT}/{match[1]}"
    try:  # ask once: without a connection the hub's client retries, loudly, for 24 seconds
        get_session().head(constants.ENDPOINT, timeout=10)
        offline = False
    except Exception:  # its kinds differ with the client's version; also with HF_HUB_OFFLINE
        offline = True
    with bad_input_if_fails(f"{given}: not here, and cannot get {name} from the hub"):
        try:
            if folder:
                return snapshot_download(match[1], local_files_only=offline,
                                         allow_patterns=["*.json", "*.txt", "*.safetensors"])
            return hf_hub_download(match[1], match[2], local_files_only=offline)
        except errors.GatedRepoError:
            raise BadInput(f"accept the licence on {page}, then run `hf auth login`")
        except errors.LocalEntryNotFoundError:
            raise BadInput(f"no connection, and not in its cache; download it from {page} elsewhere"
                           f" and give its path with {flag}")
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
            raise BadInput(f"it is not on {page}; correct the name, or run `hf auth login` "
                           "if it is private")


def read_checkpoint(path, flag="--hps"):
    """Return the state dict in a .pt, .bin or .safetensors file, without running code in it.

    It may be inside {"state_dict": ...} or {"model": ...}. BadInput says what prevents reading.
    """
    scalar = np.float64(0).__reduce__()[0]  # training loops save numpy's numbers, with two names
    safe = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    safe += [np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd")]
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals(safe):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file can make the readers raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"beside tensors it holds {code[1]}" if code else type(error).__name__
        raise BadInput(f"{flag} {path}: no file of weights, or incomplete ({reason}); must be a "
                       ".pt, .bin or .safetensors file with a state dict") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state


# ----------------------------------------------------------------------------------------- rewards

def preprocess(images, size=224, mean=(0.48145466, 0.4578275, 0.40821073),
               std=(0.26862954, 0.26130258, 0.27577711), crop=False):
    """Prepare images for CLIP: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised.

    Bicubic with antialias. crop=False, as for HPS: the longer side becomes `size`, zeros fill up
    the shorter one. crop=True, as for PickScore: the shorter one does, and the centre is cut out.
    """
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
    import open_clip  # takes seconds: imported where it is needed

    name = str(arch)
    logging.disable(logging.WARNING)  # "no pretrained weights": they are loaded later
    try:
        with bad_input_if_fails(f"{flag}_arch {arch}: must be a model description of open_clip, or "
                                "a name that open_clip knows; HPS-v2.1 is a ViT-H-14"):
            if name.endswith("open_clip_config.json"):  # as it lies beside weights on the hub
                name = f"local-dir:{Path(arch).absolute().parent}"
            elif name.endswith(".json"):
                json.loads(Path(arch).read_text())
                open_clip.add_model_config(arch)
                name = Path(arch).stem
            if name not in open_clip.list_models() and not name.startswith("local-dir:"):
                raise ValueError("not in open_clip.list_models()")
            model = open_clip.create_model(name, pretrained=None, load_weights=False)
            tokenizer = open_clip.get_tokenizer(name)
    finally:
        logging.disable(logging.NOTSET)
    # mean and std are not of the architecture but of its weights: take them if all published agree
    configs = (open_clip.get_pretrained_cfg(name, tag)
               for tag in open_clip.list_pretrained_tags_by_model(name))
    published = {(config["mean"], config["std"]) for config in configs if config.get("mean")}
    if len(published) == 1:
        [(model.visual.image_mean, model.visual.image_std)] = published
    return model, tokenizer


class HPS:
    """HPS-v2.1: scores (B,), the cosines of image and prompt features, about 0.2 to 0.35.

    checkpoint: HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2; with the weights of
        any open_clip model (.pt, .bin, .safetensors) it is that model's image-text similarity.
    arch: the name that open_clip has for the model, or a .json file that describes it.
    fp32: on an accelerator, do without the fp16 autocast that the official code uses.
    flag: what the command line calls the checkpoint. BadInput names it.
    """

    def __init__(self, checkpoint, arch="ViT-H-14", device="cpu", fp32=False, flag="--hps"):
        state = read_checkpoint(checkpoint, flag)
        self.model, self.tokenizer = new_clip(arch, flag)
        # The fused attention of torch's eval mode has no NPU kernel: one path on every device.
        torch.backends.mha.set_fastpath_enabled(False)
        self.device, self.half = torch.device(device), is_accelerator(device) and not fp32
        try:  # "module." is DistributedDataParallel's; fp16 weights are copied into fp32 ones
            state = {name.removeprefix("module."): weight for name, weight in state.items()}
            self.model.load_state_dict(state, strict=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split("\n")[:2])[:200]
            raise BadInput(f"{flag} {checkpoint}: not the weights of {flag}_arch {arch}: "
                           f"{reason}") from None
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
    """PickScore: scores (B,) in fp32, the cosines of image and prompt features, about 0.2.

    model: a folder or hub name of a CLIP model in transformers' format. Raises BadInput.
    """

    def __init__(self, model=WEIGHTS["pickscore"], device="cpu"):
        folder = resolve_weights("--pickscore", model, folder=True)
        with bad_input_if_fails(f"--pickscore {model}: must be a CLIP model of transformers"):
            from transformers import AutoTokenizer, CLIPModel, logging as messages

            messages.set_verbosity_error()  # what is wrong is said below, in one line
            messages.disable_progress_bar()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model, report = CLIPModel.from_pretrained(folder, dtype=torch.float32,
                                                           output_loading_info=True)
            size, missing = self.model.config.text_config.vocab_size, report["missing_keys"]
            if missing or len(self.tokenizer) < size:  # transformers makes up what is missing
                raise ValueError(f"{len(missing)} weights are missing, and the tokenizer has "
                                 f"{len(self.tokenizer)} of {size} tokens")
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts):
        unique, config, device = list(dict.fromkeys(prompts)), self.model.config, self.model.device
        tokens = self.tokenizer(unique, padding=True, truncation=True, return_tensors="pt",
                                max_length=config.text_config.max_position_embeddings).to(device)
        pixels = preprocess(images.to(device).float(), config.vision_config.image_size, crop=True)
        features = self.model.get_image_features(pixels), self.model.get_text_features(**tokens)
        # transformers 5 returns an object with the projected features, 4 the features
        image, text = (F.normalize(getattr(f, "pooler_output", f), dim=-1) for f in features)
        return (image * text[[unique.index(p) for p in prompts]]).sum(-1)


def parse_rewards(spec) -> dict[str, float]:
    """ "hps:0.7,clip:0.3" -> {"hps": 0.7, "clip": 0.3}; the weight is 1 where none is given.

    A name is hps, clip, pickscore or package.module:function. A reward of weight 0 is scored and
    logged, but not trained on. Raises BadInput.
    """
    rewards, name = {}, r"(hps|clip|pickscore|[\w.]+:[a-zA-Z_]\w*)"
    for item in spec.split(","):
        match = re.fullmatch(name + r"(?::(\d*\.?\d+))?", item.strip())
        if not match or match[1] in rewards:
            raise BadInput(f"--reward {spec}: {item!r} must be hps, clip, pickscore or "
                           "package.module:function, each once, with or without a :WEIGHT")
        rewards[match[1]] = float(match[2] or 1)
    if not any(rewards.values()):
        raise BadInput(f"--reward {spec}: at least one weight must be above 0")
    return rewards


@contextmanager
def process_state_kept():
    """Restore what a user's module or function may have changed for the whole process."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    path, argv, grad = list(sys.path), list(sys.argv), torch.is_grad_enabled()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.path[:], sys.argv[:] = path, argv
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def load_function(name):
    """Return the function of package.module:function; its calls leave the process as it was."""
    module, function = name.split(":")
    top = os.path.join(os.getcwd(), module.split(".")[0])
    if os.getcwd() not in sys.path:  # as `python -m` does; it stays, for imports during calls
        sys.path.insert(0, os.getcwd())
    with bad_input_if_fails(f"--reward {name}: must be a function that can be imported"):
        known = getattr(sys.modules.get(os.path.basename(top)), "__file__", None)
        for file in (f"{top}.py", os.path.join(top, "__init__.py")):
            if known and os.path.exists(file) and not os.path.samefile(file, known):
                raise ImportError(f"rename {file}: its name is taken by {known}")
        quiet = mock.patch.object(argparse.ArgumentParser, "error", lambda _, text: sys.exit(text))
        try:
            with process_state_kept(), quiet:
                found = getattr(importlib.import_module(module), function)
        except SystemExit as end:
            raise ImportError(f"its import calls sys.exit or parses arguments, {end}; move that "
                              "under if __name__ == '__main__'") from None
        if not callable(found) or inspect.iscoroutinefunction(found):
            raise TypeError(f"it is async, or of type {type(found).__name__}")

    def guarded(images, prompts):
        with process_state_kept():
            return found(images, prompts)
    return guarded


def load_reward(name, source="", arch="", device="cpu", fp32=False):
    """Return the function (images, prompts) -> (B,) of a name as in parse_rewards.

    source: weights, as in resolve_weights; "" for those on the hub. arch, fp32: as in HPS. A user's
    function needs its name alone, so it can be checked before a device is used. Raises BadInput.
    """
    if ":" in name:
        return load_function(name)
    if name == "pickscore":
        return PickScore(source or WEIGHTS[name], device)
    path = resolve_weights(f"--{name}", source, WEIGHTS.get(name, ""))
    return HPS(path, arch or "ViT-H-14", device, fp32, f"--{name}")


def score(rewards, images, prompts, where):
    """Return {name: scores (B,) fp32 on the CPU}; rewards: {name: (weight, function)}.

    where: "step 3" or the like, for messages. Each function gets a copy of the images and a list of
    the prompts. Raises FloatingPointError for images that are not finite, else BadInput.
    """
    if not images.isfinite().all():
        raise FloatingPointError(f"an image of {where} is not finite: the policy or its VAE has "
                                 "overflown; --dtype fp32 may tell which")
    scores = {}
    for name, (_, function) in rewards.items():
        must = f"--reward {name}: must return {len(images)} finite numbers for as many images, but"
        place = f"in {where}, prompts {prompts[0]!r} ..."
        try:
            r = torch.as_tensor(function(images.clone(), list(prompts))).detach().float().cpu()
        except (Exception, SystemExit) as error:  # whatever a function of the user's raises
            raise BadInput(f"{must} raised {type(error).__name__} ({error}) {place}") from error
        if r.shape != (len(images),):
            raise BadInput(f"{must} gave {tuple(r.shape)} {place}")
        if bad := (~r.isfinite()).nonzero().flatten().tolist():
            raise BadInput(f"{must} gave {r[bad[0]]} in {where} for the prompt {prompts[bad[0]]!r}")
        scores[name] = r
    return scores


# ----------------------------------------------------------------------------------------- prompts

def find_recipe(lines, path):
    """Return a command that makes a text file of JSON, CSV or TSV, or "" for lines of text."""
    prompt, rows, header = re.compile(r"(?i)(\w+_)?(prompt|caption|text)s?"), "", []
    for part in (lines[0], "\n".join(lines)):  # of JSON lines the first, or all of JSON
        try:
            data = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if data and isinstance(data, (dict, list)):  # a prompt can be a number or in quotes
            rows = "json.load(file)" if isinstance(data, list) else "map(json.loads, file)"
            header = data[0] if isinstance(data, list) else data
            header = [*map(str, header)] if isinstance(header, (dict, list)) else header
    for delimiter in ",\t;" if len(lines) > 1 and not rows else "":
        names = [name.strip('" ') for name in lines[0].split(delimiter)]
        # a prompt can look like a header, but hardly with as many commas in every other line
        if any(map(prompt.fullmatch, names)) and all(
                len(row) == len(names) for row in csv.reader(lines, delimiter=delimiter)):
            rows, header = f"csv.DictReader(file, delimiter={delimiter!r})", names
    if not rows:
        return ""
    names = [*filter(prompt.fullmatch, header), "prompt"] if isinstance(header, list) else []
    code = f"[print({f'row[{names[0]!r}]' if names else 'row'}) for row in {rows}]"
    return f'python -c "import csv, json; file = open({str(path)!r}); {code}" > prompts.txt'


def read_prompts(path, flag="--prompts"):
    """Return the lines of a UTF-8 text file, stripped, without the empty ones. Raises BadInput."""
    with bad_input_if_fails(f"{flag} {path}: must be a text file in UTF-8"):
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a zero byte, as UTF-16 and binary files do")
    lines = text.split("\n")  # and nowhere else: a prompt may hold any other character
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise BadInput(f"{flag} {path}: must hold one prompt per line, but is empty")
    if recipe := find_recipe(prompts, path):
        raise BadInput(f"{flag} {path}: is JSON or a table; must be a text file with one prompt "
                       f"per line, such as from: {recipe}")
    return prompts


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

ALLOWED = 0.015  # percent of the mean score: what ports of HPS to Ascend are held to


def natural_order(file):
    """Return a key to sort files by: a2.png before a10.png."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", file.name)], file.name


def find_pictures(paths):
    """Return the files among paths, and in natural order the pictures in the folders among them."""
    Image.init()
    endings = {s for s, format in Image.registered_extensions().items() if format in Image.OPEN}
    files, left_out = [], []
    for path in map(Path, paths):
        inside = sorted(path.iterdir(), key=natural_order) if path.is_dir() else []
        pictures = [file for file in inside
                    if file.suffix.lower() in endings and not file.name.startswith(".")]
        left_out += sorted(file.name for file in {*inside} - {*pictures})
        files += pictures or [path]
    for file in files:
        with bad_input_if_fails(f"{file}: must be a picture that Pillow can read"):
            Image.open(file).close()
    if left_out:
        names = ", ".join(left_out[:5] + ["..."] * (len(left_out) > 5))
        print("left out, as hidden or no picture:", printable(names), file=sys.stderr)
    return files


def read_image(path):
    """Return a picture file as (1, 3, H, W) float in [0, 1]: upright, in RGB, on white."""
    with bad_input_if_fails(f"{path}: must be a picture that Pillow can read"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def read_batches(files, most):
    """Yield pictures (B, 3, H, W) in their order: neighbours of one size, at most so many."""
    batch = []
    for image in map(read_image, files):
        if batch and (len(batch) == most or batch[0].shape != image.shape):
            yield torch.cat(batch)
            batch = []
        batch.append(image)
    yield torch.cat(batch)


def prompts_of(files, prompt, path):
    """Return a prompt for each picture: one for all, a line each of a file, or from file names."""
    prompts = read_prompts(path) if path else [
        prompt or re.sub(r"^[\d\W_]+|[\d\W_]+$", "", file.stem).replace("_", " ")  # 07_a_cat-2.png
        for file in files]
    if len(prompts) != len(files):
        raise BadInput(f"--prompts {path}: has {len(prompts)} prompts for {len(files)} pictures; "
                       "must have one a line, in the order of the pictures' names")
    if "" in prompts:
        raise BadInput(f"--prompt (not given): must be, as {files[prompts.index('')]} has no words "
                       "in its name")
    return prompts


def read_scores(path, names):
    """Return the scores (B,) that --save wrote for the same (picture, prompt) names."""
    with bad_input_if_fails(f"--against {path}: must hold what --save wrote for the same pictures "
                            "and prompts"):
        lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        scores = {(line["image"], line["prompt"]): line["score"] for line in lines}
        return torch.tensor([scores[name] for name in names])


def read_command_line(argv):
    parser = argparse.ArgumentParser(
        "reward.py", description="Score pictures with a reward: a line with score and file each.")
    parser.error = lambda message: exit_with_error(f"{message}; see --help")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders")
    for flag, default, text in (
            ("--prompt", "", "the text that all the pictures were made for"),
            ("--prompts", "", "file with a text a line, in the order of the pictures; without it "
             "the text is in the names: 0007_a_cat.png"),
            ("--reward", "hps", "hps, clip, pickscore or package.module:function"),
            ("--hps", "", "a file, or owner/name/file of the hub; without it HPS-v2.1 of the hub"),
            ("--hps_arch", "ViT-H-14", "its name in open_clip, or a .json file"),
            ("--clip", "", "weights of an open_clip model"),
            ("--clip_arch", "ViT-H-14", "its name in open_clip, or a .json file"),
            ("--pickscore", "", "a folder, or owner/name of the hub; without it PickScore_v1"),
            ("--device", "auto", "auto, cuda, npu or cpu"),
            ("--save", "", "write the scores to this file, a line of JSON each"),
            ("--against", "", "compare with what --save wrote on another device; exit status 3 if "
             "the mean error is above 0.015 %%")):
        parser.add_argument(flag, default=default, help=text)
    parser.add_argument("--reward_fp32", action="store_true", help="no fp16 autocast")
    parser.add_argument("--deterministic", action="store_true", help="repeat results exactly")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time, if of one size")
    return parser.parse_args(argv)


def score_pictures(args):
    """Print and save the scores of the command line, and the verdict of --against."""
    if args.batch < 1:
        raise BadInput(f"--batch {args.batch}: must be at least 1")
    if args.prompt and args.prompts:
        raise BadInput(f"--prompts {args.prompts}: not allowed with --prompt; give one of them")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        raise BadInput(f"--save {args.save}: must be a file in a folder that exists")
    name, *others = parse_rewards(args.reward)
    if others:
        raise BadInput(f"--reward {args.reward}: must be one reward here; run it for each")
    device, files = select_device(args.device), find_pictures(args.images)
    prompts = prompts_of(files, args.prompt, args.prompts)
    names = [(file.name, prompt) for file, prompt in zip(files, prompts)]
    expected = read_scores(args.against, names) if args.against else None
    if args.deterministic:
        make_deterministic(0)
    function = load_reward(name, getattr(args, name, ""), getattr(args, f"{name}_arch", ""), device,
                           args.reward_fp32)
    scores = []
    with tqdm(total=len(files), unit="picture", disable=len(files) < 100) as bar:
        for images in read_batches(files, args.batch):
            i = len(scores)
            batch = score({name: (1, function)}, images, prompts[i:i + len(images)], files[i])
            scores += batch[name].tolist()
            bar.update(len(images))
    if args.save:
        lines = [json.dumps(dict(image=image, prompt=prompt, score=value)) + "\n"
                 for (image, prompt), value in zip(names, scores)]
        with atomic_write(args.save) as path:
            path.write_text("".join(lines))
    print_scores(files, torch.tensor(scores), expected)


def print_scores(files, scores, expected):
    """Print a line for each score; end with exit status 3 if the expected ones differ too much."""
    errors = scores - (scores if expected is None else expected)
    for file, value, error in zip(files, scores.tolist(), errors.tolist()):
        print(f"{value:.5f} {'' if expected is None else f'{error:+.1e} '}{printable(file)}")
    if expected is not None:
        errors = errors.abs() * 100 / expected.abs().mean()  # percent of the mean score
        fine = errors.mean().item() <= ALLOWED
        print(f"{len(files)} scores: mean absolute error {errors.mean():.5f} %, largest "
              f"{errors.max():.5f} %, allowed {ALLOWED} % on average\n"
              f"reward {'OK' if fine else 'OFF'}")
        sys.exit(0 if fine else 3)


def main(argv=None):
    args = read_command_line(argv)
    try:
        score_pictures(args)
    except BadInput as error:
        exit_with_error(error)


if __name__ == "__main__":
    main()
