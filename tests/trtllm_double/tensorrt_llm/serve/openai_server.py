"""The server: enough of HTTP to ask whether it is well, and for an answer."""

import asyncio
import json
import signal


class OpenAIServer:
    def __init__(self, llm, model, **options):
        self.llm = llm
        self.model = model

    async def __call__(self, host, port, sockets=None):
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, done.set)
        options = {"sock": sockets[0]} if sockets else {"host": host, "port": port}
        async with await asyncio.start_server(self._answer, **options):
            await done.wait()

    async def _answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        length = next((int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length:")), 0)
        body = await reader.readexactly(length)
        status, answer = 404, {}
        if path == "/health":
            status = 200
        elif path == "/v1/models":
            status, answer = 200, {"data": [{"id": self.model}]}
        elif path == "/v1/completions":
            status, answer = 200, {"choices": self.llm.generate(json.loads(body)["prompt"])}
        content = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d \r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(content)) + content)
        await writer.drain()
        writer.close()
