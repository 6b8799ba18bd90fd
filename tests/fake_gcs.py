"""A bucket in memory: as much of the API of Google Cloud Storage as TensorFlow, TensorStore and
ArrayRecord use.

TensorFlow knows no other address than googleapis.com over TLS. `FakeGCS` therefore is a proxy for
https too, which answers for googleapis.com itself, with a certificate made on the spot.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

HOSTS = "subjectAltName=DNS:storage.googleapis.com,DNS:www.googleapis.com"


class FakeGCS:
    """Serves `objects` {"bucket/name": bytes} of the buckets given; a context manager."""

    def __init__(self, folder, *buckets):
        self.key, self.certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake".split()
        command += ["-addext", HOSTS, "-keyout", self.key, "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        self.buckets = buckets
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.lock = threading.Lock()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.certificate, self.key)
        handler = type("Handler", (_Handler,), {"gcs": self, "tls": tls})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self):
        """For a process that is to find this instead of the real one."""
        url = f"http://127.0.0.1:{self.server.server_port}"
        return os.environ | {
            "HTTPS_PROXY": url, "https_proxy": url, "NO_PROXY": "", "no_proxy": "",
            "CURL_CA_BUNDLE": self.certificate, "NO_GCE_CHECK": "true",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "GCS_RETRY_CONFIG_MAX_RETRIES": "1",
            "TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # of ArrayRecord's reader
        }  # fmt: skip

    def write(self, name, data):
        self.objects[name] = data
        self.generations[name] = self.generations.get(name, 0) + 1
        return self.metadata(name)

    def metadata(self, name):
        bucket, _, path = name.partition("/")
        return {
            "kind": "storage#object", "bucket": bucket, "name": path,
            "size": str(len(self.objects[name])), "generation": str(self.generations[name]),
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def names(self, bucket, query):
        """The answer to a listing: items and prefixes, in one page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(f"{bucket}/{prefix}"):
                continue
            path = name[len(bucket) + 1 :]
            if not query.get("startOffset", "") <= path < query.get("endOffset", "\U0010ffff"):
                continue
            rest, found, _ = path[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + rest + delimiter)
            else:
                items.append(self.metadata(name))
        return {"items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: FakeGCS
    tls: ssl.SSLContext

    def log_message(self, *_):
        """Quiet."""

    def do_CONNECT(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def handle_expect_100(self):
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do(self):
        body = self.body()
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        with self.gcs.lock:
            self.gcs.requests.append((self.command, self.path, self.headers.get("Range", "")))
            self.route(self.command, parts.path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do

    def route(self, method, path, query, body):
        gcs = self.gcs
        found = re.fullmatch(r"(/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(/.*)?)?)?", path)
        if found:
            upload, bucket, name, rest = found.groups()
        elif path.startswith("/session/"):
            return self.resume(unquote(path[9:]), body)
        else:  # https://storage.googleapis.com/BUCKET/OBJECT
            upload, rest, bucket, name = None, None, *path[1:].split("/", 1)
            query["alt"] = "media"
        if bucket not in gcs.buckets:
            return self.answer({"error": "no such bucket"}, 404)
        full = f"{bucket}/{unquote(name) if name else query.get('name', '')}"
        generation = str(gcs.generations[full]) if full in gcs.objects else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            return self.answer({"error": "generation"}, 412)
        if upload and query["uploadType"] == "resumable":
            host = self.headers.get("Host")
            return self.answer({}, Location=f"https://{host}/session/{quote(full, safe='')}")
        if upload:
            return self.answer(gcs.write(full, body))
        if path.endswith("/o"):
            return self.answer(gcs.names(bucket, query))
        if name is None:
            return self.answer({"name": bucket})
        if full not in gcs.objects:
            return self.answer({"error": "no such object"}, 404)
        if rest:  # /rewriteTo/b/BUCKET/o/OBJECT
            _, _, _, to_bucket, _, to = rest.split("/")
            copy = gcs.write(f"{to_bucket}/{unquote(to)}", gcs.objects[full])
            return self.answer({"done": True, "resource": copy})
        if method == "DELETE":
            del gcs.objects[full]
            return self.answer(b"", 204)
        if query.get("alt") != "media":
            return self.answer(gcs.metadata(full))
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(b"", 304)
        self.media(gcs.objects[full], generation)

    def media(self, data, generation):
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(data, x_goog_generation=generation)
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self.answer(b"", 416, Content_Range=f"bytes */{len(data)}")
        self.answer(data[start:stop], 206, x_goog_generation=generation,
                    Content_Range=f"bytes {start}-{stop - 1}/{len(data)}")  # fmt: skip

    def resume(self, full, body):
        """A part of a resumable upload."""
        end, total = re.fullmatch(
            r"bytes (?:\d+-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */*")
        ).groups()
        data = self.gcs.uploads.pop(full, b"") + body
        if total == "*" or (end is not None and int(end) + 1 < int(total)):
            self.gcs.uploads[full] = data
            return self.answer(b"", 308, Range=f"bytes=0-{len(data) - 1}")
        self.answer(self.gcs.write(full, data))
