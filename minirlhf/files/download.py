"""Downloading the official files with torch.hub. A file appears only when it is complete."""

import hashlib
import os
import socket
import sys
import urllib.request
from pathlib import Path

import torch.hub

from minirlhf.files.errors import UserError, require

try:
    import fcntl
except ImportError:                                             # Windows does not have it: nothing is locked there
    fcntl = None

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")   # the variable with which people set a mirror
OFFICIAL = {    # name: folder on the hub and its branch, file of the weights. GPT-J's float16 branch is half the size.
    "gpt2": ("openai-community/gpt2/resolve/main", "model.safetensors"),
    "gpt2-medium": ("openai-community/gpt2-medium/resolve/main", "model.safetensors"),
    "gpt2-large": ("openai-community/gpt2-large/resolve/main", "model.safetensors"),
    "gpt2-xl": ("openai-community/gpt2-xl/resolve/main", "model.safetensors"),
    "gpt-j-6b": ("EleutherAI/gpt-j-6b/resolve/float16", "pytorch_model.bin"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M/resolve/main", "model.safetensors"),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct/resolve/main", "model.safetensors"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M/resolve/main", "model.safetensors"),
    "smollm2-360m-instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct/resolve/main", "model.safetensors"),
}
# The tokenizer of the others. GPT-2's and GPT-J's is in OpenAI's own two files.
TOKENIZER_FILES = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")


def cache_folder():
    """Where downloads are kept: $MINIRLHF_CACHE, or ~/.cache/minirlhf."""
    try:
        return Path(os.environ.get("MINIRLHF_CACHE") or "~/.cache/minirlhf").expanduser()
    except RuntimeError:
        raise UserError("there is no home folder to keep downloads in: name a folder in MINIRLHF_CACHE") from None


def model_folder(name, wanted=("config.json",)):
    """The folder of that name as a Path. UserError unless it is there, with at least one of the wanted files in it."""
    # Not Path(name).is_dir(), which raises for a name that no file can have.
    require(os.path.isdir(name), f"{name}: no such model folder. Train it first, or run the command in the repository. "
                                 f"The official models are {', '.join(OFFICIAL)}")
    folder = Path(name)
    require(any((folder / file).exists() for file in wanted),
            f"no {' or '.join(wanted)} in {folder}, so it is not a model folder")
    return folder


def fetch_official(name):
    """The folder of an official model in the cache. Downloads what is not there yet."""
    if os.path.isdir(name):
        print(f"note: {name} is the official model; your folder is ./{name}", file=sys.stderr)
    where, weights = OFFICIAL[name]
    folder = cache_folder() / name
    for file in ("config.json", *(() if name.startswith("gpt") else TOKENIZER_FILES), weights):
        if not (folder / file).exists():
            download(f"{HUB}/{where}/{file}", folder / file)
    return folder


def download(url, file, sha256=None, hint=""):
    """url -> file, as long as its server says and with this sha256, if one is given. The UserError says what to do, or
    gives the hint."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.parent / ".lock", "ab")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}. MINIRLHF_CACHE can name another folder") from None
    with lock:
        if fcntl:                                   # torchrun starts several processes that want the same file
            fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():                           # another process has downloaded it in the meantime
            return
        print(f"downloading {url}", file=sys.stderr)
        socket.setdefaulttimeout(30)                # torch.hub sets none, and would wait forever on a dead connection
        try:
            transfer(url, file, sha256)
        except Exception as error:                  # of the network, the disk, or the hash
            raise UserError(f"{url} cannot be downloaded ({error}): run this again, or "
                            + (hint or f"download it by other means and put it at {file}")) from None
        finally:
            socket.setdefaulttimeout(None)


def transfer(url, file, sha256):
    """torch.hub checks the sha256, if one is known, but does not notice a connection that ends too early."""
    with urllib.request.urlopen(url) as reply:                          # reads the headers only
        size = reply.length
    part = file.with_name(file.name + ".part")
    torch.hub.download_url_to_file(url, part, sha256)
    arrived = part.stat().st_size
    if size not in (None, arrived):
        part.unlink()
        raise OSError(f"{arrived} of {size} bytes arrived")
    os.replace(part, file)


def sha256_of(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
