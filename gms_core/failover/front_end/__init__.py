"""How the API servers of an engine that fails over come to serve, and how they end. Neutral of engines; the HTTP server is the engine's own.

`api_server` is one API server's whole way; an adapter gives it an `engine.EngineCalls` and an `engine.HttpServer`. `gate` holds an address at which
nobody listens yet, `rehearsal` asks the engine a few requests before it stands by, `standing` is the election and the promotion, `timeline` measures
that, `status_page` serves ``/gms/status`` apart, `main_process` is for engines with several API servers, and `named` for processes that no rank can
speak to.
"""
