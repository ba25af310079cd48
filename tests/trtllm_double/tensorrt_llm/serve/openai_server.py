"""The server: whether it is well, and an answer, whole or in pieces."""

import asyncio
import json

import uvicorn


class OpenAIServer:
    def __init__(self, llm, model, **options):
        self.llm = llm
        self.model = model

    async def __call__(self, host, port, sockets=None):
        config = uvicorn.Config(self._app, host=host, port=port, log_level="info", timeout_keep_alive=5, lifespan="off", interface="asgi3")
        await uvicorn.Server(config).serve(sockets=sockets)

    async def _app(self, scope, receive, send):
        status, pieces = 404, ({},)
        if scope["path"] == "/health":
            status = 200
        elif scope["path"] == "/v1/models":
            status, pieces = 200, ({"data": [{"id": self.model}]},)
        elif scope["path"] == "/v1/completions":
            wanted = json.loads(await self._body(receive))
            status, pieces = 200, ({"choices": self.llm.generate(wanted["prompt"])} for _ in range(wanted.get("pieces", 1)))
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": json.dumps(piece).encode() + b"\n", "more_body": True})
        await send({"type": "http.response.body"})

    async def _body(self, receive):
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            body, is_whole = body + message.get("body", b""), not message.get("more_body")
        return body
