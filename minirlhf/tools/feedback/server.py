"""The web server behind the page. It listens on this machine only.

Three checks keep everyone else out. The token is new at every start and only in the address that the terminal shows, so
other users of this machine do not have it. The Host header must be ours, which stops web sites whose name was pointed
at 127.0.0.1. Requests that a page of another site sends are refused because of their Origin. The page itself, which
says nothing, is given to all who ask this machine. It takes the token out of the address bar and keeps it per tab.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from minirlhf.files.jsonl import json_object, text
from minirlhf.files.errors import UserError, require
from minirlhf.tools.feedback.votes import FLAGS

PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 64 * 1024    # bytes of a request; a response of 1,024 tokens has about 5,000


MOST = 64               # connections that may be without a complete request. One more ends the oldest of them


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port, session, frame=False):
        super().__init__(("127.0.0.1", port), Handler)
        self.waiting = {}                           # connection without a complete request -> since when
        self.session, self.page = session, PAGE.read_bytes()
        self.token, self.overview_token, self.frame = secrets.token_hex(16), secrets.token_hex(16), frame
        self.url = f"http://127.0.0.1:{self.server_port}/?token={self.token}"
        self.overview_url = f"http://127.0.0.1:{self.server_port}/overview?token={self.overview_token}"
        hashes = {kind.decode(): base64.b64encode(hashlib.sha256(code).digest()).decode()
                  for kind, code in re.findall(rb"<(script|style)>(.*?)</\1>", self.page, re.DOTALL)}
        # The browser runs only the page's own script and connects only to this server. The page shows model text
        # through textContent, which is safe already; this is a second defence.
        ancestors = "" if frame else "frame-ancestors 'none'; "
        self.policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                       f"{ancestors}script-src 'sha256-{hashes['script']}'; "
                       f"style-src 'sha256-{hashes['style']}'")

    def process_request(self, request, client_address):
        self.waiting[request] = time.monotonic()
        for old, since in list(self.waiting.items()):
            if len(self.waiting) > MOST or time.monotonic() - since > Handler.timeout:
                self.waiting.pop(old, None)
                with contextlib.suppress(OSError):
                    old.shutdown(socket.SHUT_RDWR)  # its thread then closes it
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):      # those mean that the browser went away
            print(f"request failed: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    timeout = 10                                    # seconds without a byte from the client
    error_content_type, error_message_format = "text/plain", "%(code)d %(message)s\n"

    def log_message(self, *args):
        pass

    def end_headers(self):
        for name, value in (("Content-Security-Policy", self.server.policy), ("X-Content-Type-Options", "nosniff"),
                            ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        super().end_headers()

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def check(self, token):
        """Raises UserError unless the request comes from our own page, or from the address in the terminal.

        token: the one that came with the request, None where none is needed.
        """
        hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        given = self.headers.get_all("Host", [])
        require(len(given) == 1 and given[0].lower() in hosts, "wrong host")
        origin, site = self.headers.get("Origin", f"http://{given[0]}"), self.headers.get("Sec-Fetch-Site", "none")
        own = site in ("same-origin", "none") or self.server.frame and self.command == "GET"
        require(origin == f"http://{given[0]}" and own, "requests from other sites are refused")
        expected = self.server.overview_token if self.path.startswith("/overview") else self.server.token
        require(token is None or secrets.compare_digest(token.encode(), expected.encode()),
                "the token is missing or from before a restart: open the address that the terminal shows now")

    def do_GET(self):
        path, given, token = self.path.partition("?token=")
        try:
            self.check(token if given else None)
            require(path in ("/", "/overview"), "nothing here")
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        except UserError as error:
            self.send_error(403, str(error))

    def do_POST(self):
        try:
            self.check(self.headers.get("X-Token", ""))
            status, reply = 200, self.act(self.read_json())
        except UserError as error:
            status, reply = 400, {"error": str(error)}
        except (OSError, RuntimeError) as error:            # the disk is full, say, or sampling failed
            status, reply = 500, {"error": str(error)}
        self.answer(status, "application/json", json.dumps(reply).encode())

    def read_json(self):
        length = self.headers.get("Content-Length", "")
        require(re.fullmatch("[0-9]{1,9}", length) and "Transfer-Encoding" not in self.headers, "a length is needed")
        require(int(length) <= MAX_BODY, f"more than {MAX_BODY} bytes")
        return json_object(self.rfile.read(int(length)), "request")

    def act(self, value):
        """Checks what every action has, and calls the one that the path names."""
        self.server.waiting.pop(self.connection, None)          # the request is complete, and may take its time
        name, item, seconds = value.get("annotator"), value.get("item"), value.get("seconds", 0)
        require(isinstance(name, str) and name == name.strip() and 0 < len(name) <= 40 and name.isprintable(),
                "a name has 1 to 40 characters")
        require(type(seconds) in (int, float) and 0 <= seconds < 1e7, "seconds must be a number from 0")
        session = self.server.session
        about = round(seconds, 2), remarks_of(value), value.get("revise") is True
        actions = {"/next": lambda: session.next(name),
                   "/vote": lambda: session.vote(name, item, value.get("ranks"), *about),
                   "/write": lambda: session.write(name, item, value.get("response"), *about),
                   "/skip": lambda: session.skip(name, item, *about),
                   "/undo": lambda: session.undo(name),
                   "/past": lambda: session.past(name),
                   "/revise": lambda: session.revise(name, item),
                   "/overview": session.overview,
                   "/guidelines": lambda: {"text": session.guidelines}}
        require(self.path in actions, "nothing here")
        with session.lock:
            return actions[self.path]()


def remarks_of(value):
    """The flags and the note of a request, {} if it has none."""
    flags, note = value.get("flags", []), text(value.get("note", ""), "note", "the request").strip()
    require(isinstance(flags, list) and all(flag in FLAGS for flag in flags), f"flags are {', '.join(FLAGS)}")
    given = {"flags": sorted(set(flags)), "note": note}
    return {name: given[name] for name in given if given[name]}


def serve(session, port, open_page, frame=False):
    """Serves until Ctrl-C or SIGTERM."""
    try:
        server = Server(port, session, frame)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {getattr(error, 'strerror', None) or error}. Give another number, or "
                        "--port 0, which takes a free port") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # raises KeyboardInterrupt, as Ctrl-C does
    print(f"Open {server.url}\nto see the page. Ctrl-C ends it. Votes are saved in {session.votes.path}\n"
          f"Who has done what, for the person in charge: {server.overview_url}", flush=True)
    # Without a screen webbrowser would start a text browser in this terminal.
    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if screen and open_page:
        webbrowser.open(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    with session.lock:                              # lets a vote or an item that is being written finish
        server.server_close()
