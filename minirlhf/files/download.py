"""Fetching the official files: resumed where a transfer broke, checked, and only then put in place."""

import hashlib
import http.client
import os
import re
import urllib.request
from pathlib import Path

from tqdm import tqdm

from minirlhf.running.errors import UserError

try:
    import fcntl
except ImportError:                                             # Windows has no such locks
    fcntl = None

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")       # the variable by which people set a mirror
OFFICIAL = {    # name: folder on the hub, with the branch; the weights file. GPT-J's float16 branch is half the size.
    "gpt2": ("openai-community/gpt2/resolve/main", "model.safetensors"),
    "gpt2-medium": ("openai-community/gpt2-medium/resolve/main", "model.safetensors"),
    "gpt2-large": ("openai-community/gpt2-large/resolve/main", "model.safetensors"),
    "gpt2-xl": ("openai-community/gpt2-xl/resolve/main", "model.safetensors"),
    "gpt-j-6b": ("EleutherAI/gpt-j-6b/resolve/float16", "pytorch_model.bin"),
}


def cache_folder():
    """Where downloads stay: $MINIRLHF_CACHE, or ~/.cache/minirlhf."""
    return Path(os.environ.get("MINIRLHF_CACHE") or "~/.cache/minirlhf").expanduser()


def is_official(name_or_folder):
    """An official name always means the official model: a folder of that name beside you is ./gpt2, or a Path."""
    return isinstance(name_or_folder, str) and name_or_folder in OFFICIAL


def model_folder(name_or_folder):
    """The folder that is meant, or UserError if there is none."""
    if not os.path.isdir(name_or_folder):           # False for a name that no file can have, where Path.is_dir() raises
        raise UserError(f"{name_or_folder}: no such model folder; the official models are {', '.join(OFFICIAL)}")
    return Path(name_or_folder)


def fetch_official(name):
    """The folder of an official model in the cache; what is not there yet is downloaded. UserError if it cannot be."""
    where, weights = OFFICIAL[name]
    folder = cache_folder() / name
    for file in ("config.json", weights):
        if not (folder / file).exists():
            download(f"{HUB}/{where}/{file}", folder / file)
    return folder


def download(url, file, sha256=None, hint=""):
    """url -> file, which appears only when it is whole; until then the bytes are in file.part, from where the next try
    goes on. Tries again as long as each try brings something. UserError says what to do, or gives the hint.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part, before = file.with_name(file.name + ".part"), -1
    with open(part, "ab") as held:                              # torchrun starts several processes that want the file
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX)
        if file.exists():                                       # one of them has fetched it meanwhile
            return part.unlink(missing_ok=True)
        while length(part) > before:
            before = length(part)
            try:
                size, promised = transfer(url, part)
                if size in (None, length(part)):
                    return put_in_place(part, file, sha256 or promised, url)
                problem = f"{length(part)} of {size} bytes came"
            except (OSError, http.client.HTTPException) as error:
                problem = error
                if getattr(error, "code", None) == 416:         # no beginning of this file: start anew next time
                    os.truncate(part, 0)
    hint = hint or f"fetch it by other means and put it at {file}"
    raise UserError(f"{url} cannot be downloaded ({problem}): run this again to go on where it stopped, or {hint}")


def length(part):
    return part.stat().st_size if part.exists() else 0


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the headers of the one that describes the file.

    Hugging Face answers for a large file with a redirect to where it is stored, and only the headers of that redirect
    name the size and the sha256 of the file that was published (X-Linked-Size, X-Linked-Etag).
    """
    linked = {}

    def redirect_request(self, request, reply, code, message, headers, url):
        if "X-Linked-Etag" in headers:
            self.linked = headers
        return super().redirect_request(request, reply, code, message, headers, url)


def transfer(url, part):
    """Appends to part what is missing of url; returns the size and sha256 the server promises (None: it does not)."""
    have = length(part)
    redirects = Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.build_opener(redirects).open(request, timeout=30) as reply:
        have = have if reply.status == 206 else 0               # 200: the server starts from the beginning
        rest = reply.headers["Content-Length"]
        size = redirects.linked.get("X-Linked-Size") or (have + int(rest) if rest else None)
        etag = redirects.linked.get("X-Linked-Etag", "").strip('"')
        bar = tqdm(desc=part.stem, total=size and int(size), initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as f:
            while chunk := reply.read(1 << 20):
                f.write(chunk)
                bar.update(len(chunk))
    return size and int(size), etag if re.fullmatch("[0-9a-f]{64}", etag) else None


def put_in_place(part, file, sha256, url):
    """Renames part to file if its sha256 is the one expected (None: nobody said); deletes it and raises otherwise."""
    if sha256 is not None and sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f"what came from {url} does not have the sha256 {sha256}: it was thrown away, run this again")
    os.replace(part, file)


def sha256_of(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
