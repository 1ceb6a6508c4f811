"""Downloads, from a server on this machine that breaks off, lies and redirects as Hugging Face does."""

import hashlib
import http.server
import threading

import pytest
import torch

import minirlhf.files.download
from minirlhf.running.errors import UserError
from minirlhf.files.download import download, fetch_official
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.weights import from_pretrained, save_pretrained

DATA = bytes(range(256)) * 4000                                 # a file of 1 MB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /a/resolve/main/f is answered with a redirect to /stored/... that names size and sha256; the storage serves
    ranges, and breaks off after server.cuts[0] bytes of an answer, then server.cuts[1], ..., then not any more."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        data = self.server.files.get(self.path.split("/")[-1])
        if data is None:
            self.send_error(404)
        elif "/resolve/" in self.path:
            self.redirect(data)
        else:
            self.send(data)

    def redirect(self, data):
        self.send_response(302)
        self.send_header("Location", "/stored/" + self.path.split("/")[-1])
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-Etag", f'"{self.server.sha256 or hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data):
        start = self.headers.get("Range", "bytes=0-")[6:-1]
        start = int(start) if self.server.ranges else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(data)
        self.wfile.write(data[start:start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cuts, server.ranges, server.sha256, server.requests = {"f": DATA}, [], True, None, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(minirlhf.files.download, "HUB", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def stored_ranges(server):
    return [asked for path, asked in server.requests if path.startswith("/stored/")]


def test_a_download_shows_a_bar_and_leaves_only_the_file(server, tmp_path, capsys):
    download(f"{server.url}/a/resolve/main/f", tmp_path / "new" / "f")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["f"]
    assert (tmp_path / "new" / "f").read_bytes() == DATA
    assert "f: 100%" in capsys.readouterr().err


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [300_000, 500_000]
    download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert stored_ranges(server) == [None, "bytes=300000-", "bytes=800000-"]


def test_the_next_run_goes_on_where_the_last_one_stopped(server, tmp_path):
    server.cuts = [300_000, 0]
    with pytest.raises(UserError, match="300000 of 1024000 bytes.*run this again.*put it at .*/f"):
        download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert stored_ranges(server)[-1] == "bytes=300000-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.cuts, server.ranges = [300_000], False
    download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize("part", [DATA[:1000][::-1], DATA, DATA + b"more"])
def test_a_part_of_something_else_never_becomes_the_file(server, tmp_path, part):
    (tmp_path / "f.part").write_bytes(part)
    with pytest.raises(UserError, match="run this again"):
        download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    download(f"{server.url}/a/resolve/main/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize("said_by", ["server", "caller"])
def test_a_wrong_sha256_is_thrown_away(server, tmp_path, said_by):
    server.sha256 = "0" * 64 if said_by == "server" else None
    with pytest.raises(UserError, match="does not have the sha256 0000"):
        download(f"{server.url}/a/resolve/main/f", tmp_path / "f", "0" * 64 if said_by == "caller" else None)
    assert list(tmp_path.glob("f*")) == []


def test_a_plain_server_is_enough(server, tmp_path):
    server.cuts = [1000]
    download(f"{server.url}/plain/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_what_is_not_there_or_not_reachable_is_one_clear_error(server, tmp_path):
    for url in (f"{server.url}/a/resolve/main/gone", "http://127.0.0.1:9/f"):
        with pytest.raises(UserError, match=f"{url} cannot be downloaded.*put it at {tmp_path / 'f'}") as error:
            download(url, tmp_path / "f")
        assert "\n" not in str(error.value)


def test_an_official_model_is_downloaded_once(server, tmp_path):
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config(131, 65, 40, 3, 5)), tmp_path / "hub")
    server.files = {name: (tmp_path / "hub" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    server.cuts = [1000, 50_000]
    model = from_pretrained("gpt2-large")
    assert torch.equal(model.wte.weight, from_pretrained(tmp_path / "hub").wte.weight)
    assert server.requests[0][0] == "/openai-community/gpt2-large/resolve/main/config.json"
    n = len(server.requests)
    assert fetch_official("gpt2-large") == tmp_path / "cache" / "gpt2-large"
    assert len(server.requests) == n
