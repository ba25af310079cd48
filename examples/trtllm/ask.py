"""Ask an engine's server for a few tokens, as soon as it can be reached: python ask.py PORT SECONDS."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request

port, patience_s = sys.argv[1], float(sys.argv[2])
end = time.monotonic() + patience_s


def asked(path: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


while True:
    try:
        model = asked("/v1/models")["data"][0]["id"]
        found = asked("/v1/completions", {"model": model, "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0})
        break
    except urllib.error.HTTPError:
        raise
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.02)
print(json.dumps([choice.get("text", choice) if isinstance(choice, dict) else choice for choice in found["choices"]]))
