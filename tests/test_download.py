"""Downloads, from a server on this machine that breaks off, lies and redirects as Hugging Face does."""

import concurrent.futures
import contextlib
import hashlib
import http.server
import threading

import pytest
import torch

import minirlhf.files.download
from minirlhf.files.errors import UserError
from minirlhf.files.download import download, fetch_official
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.weights import from_pretrained, save_pretrained

DATA = bytes(range(256)) * 4000                                 # a file of 1 MB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /a/resolve/main/f is answered with a redirect to /stored/f. The storage breaks off after server.cut bytes."""

    def do_GET(self):
        self.server.requests.append(self.path)
        data = self.server.files.get(self.path.split("/")[-1])
        if data is None:
            self.send_error(404)
        elif "/resolve/" in self.path:
            self.redirect()
        else:
            self.send(data)

    def redirect(self):
        self.send_response(302)
        self.send_header("Location", "/stored/" + self.path.split("/")[-1])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data):
        self.send_response(200)
        if self.server.states_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):              # whoever wants only the headers closes the connection
            self.wfile.write(data[:self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cut, server.states_length, server.requests = {"f": DATA}, None, True, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(minirlhf.files.download, "HUB", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_shows_a_bar_and_leaves_only_the_file(server, tmp_path, capsys):
    download(f"{server.url}/a/resolve/main/f", tmp_path / "new" / "f")
    assert [file.name for file in (tmp_path / "new").iterdir() if file.name != ".lock"] == ["f"]
    assert (tmp_path / "new" / "f").read_bytes() == DATA
    shown = capsys.readouterr().err
    assert f"downloading {server.url}/a/resolve/main/f" in shown and "100%" in shown


@pytest.mark.parametrize("path", ["a/resolve/main/f", "plain/f"])
@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_transfer_that_breaks_off_leaves_nothing_and_the_next_run_succeeds(server, tmp_path, path, sha256):
    server.cut = 300_000
    with pytest.raises(UserError, match="cannot be downloaded.*run this again.*put it at .*/f") as error:
        download(f"{server.url}/{path}", tmp_path / "f", sha256)
    assert "\n" not in str(error.value) and list(tmp_path.glob("f*")) == []
    server.cut = None
    download(f"{server.url}/{path}", tmp_path / "f", sha256)
    assert (tmp_path / "f").read_bytes() == DATA


def test_without_a_hash_the_length_is_checked(server, tmp_path):
    server.cut = 300_000
    for path in ("a/resolve/main/f", "plain/f"):
        with pytest.raises(UserError, match="300000 of 1024000 bytes arrived"):
            download(f"{server.url}/{path}", tmp_path / "f")
    assert list(tmp_path.glob("f*")) == []


def test_a_wrong_sha256_is_thrown_away(server, tmp_path):
    with pytest.raises(UserError, match="invalid hash value .expected .0000.*run this again"):
        download(f"{server.url}/a/resolve/main/f", tmp_path / "f", "0" * 64)
    assert list(tmp_path.glob("f*")) == []


@pytest.mark.parametrize("states_length", [True, False])
def test_a_plain_server_is_enough(server, tmp_path, states_length):
    server.states_length = states_length
    download(f"{server.url}/plain/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_several_processes_download_a_file_once(server, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: download(f"{server.url}/plain/f", tmp_path / "f", SHA256), range(4)))
    assert server.requests == ["/plain/f"] * 2 and (tmp_path / "f").read_bytes() == DATA


def test_what_is_not_there_or_not_reachable_is_one_clear_error(server, tmp_path):
    for url in (f"{server.url}/a/resolve/main/gone", "http://127.0.0.1:9/f", "no-scheme.example/f"):
        with pytest.raises(UserError, match=f"{url} cannot be downloaded.*put it at {tmp_path / 'f'}") as error:
            download(url, tmp_path / "f")
        assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_one_error_that_names_the_variable(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()                                 # no folder can be made in it, not even by root
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match="file/cache/gpt2/config.json.* cannot be written: .*MINIRLHF_CACHE") as error:
        from_pretrained("gpt2")
    assert "\n" not in str(error.value) and not server.requests


def test_an_official_model_is_downloaded_once(server, tmp_path):
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config(131, 65, 40, 3, 5)), tmp_path / "hub")
    server.files = {name: (tmp_path / "hub" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    model = from_pretrained("gpt2-large")
    assert torch.equal(model.wte.weight, from_pretrained(tmp_path / "hub").wte.weight)
    assert server.requests[0] == "/openai-community/gpt2-large/resolve/main/config.json"
    n = len(server.requests)
    assert fetch_official("gpt2-large") == tmp_path / "cache" / "gpt2-large"
    assert len(server.requests) == n
