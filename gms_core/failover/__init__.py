"""Failover: one engine serves, others wait ready, and the next one takes over when the first is gone. Neutral of engines and web frameworks.

The role machine is pure (`roles`); `status` holds the engine's state for everybody who looks at it; `locks` elect, `promotion` is the way from the
lock to the service, made of `steps`, `control` and `follower` are the connections with the servers, `http` and `notifications` tell the world.
`front_end` puts all of that together for an API server, and `cohort` is what every process of the engine does.

An adapter has to do this, in the processes of its engine:

    options = failover_config(gms)                       # config; None: the engine does not fail over

    begin_cohort("vllm")                                 # cohort; in the first process, before it starts any other and before it uses a GPU
    open_early(options)                                  # front_end.api_server; in the process that is to be the first API server

    end_with_parent()                                    # parent_death; in every further process, as its first step
    take_place(name, sockets, serves=..., connect_timeout_s=...)   # cohort; in every process but API servers, as soon as the servers are known
    settle(name)                                         # cohort; likewise, just before the engine stands by

    server = ApiServer(engine, http, place, options, connect_timeout_s=..., grace_s=...)   # front_end.api_server; in each API server, once it is up
    await server.start()                                 # the others join by now
    if await server.come_to_serve():                     # rehearsed, settled, standby, elected, promoted, open
        ...                                              # the engine serves, until it is stopped, demoted or ended by server.failure
    server.depart()                                      # the servers end what is left after that time; not if the engine has crashed
    ...                                                  # the engine lets go of its memory
    server.close()                                       # the process ends, and the lock with it

``engine`` answers `front_end.engine.EngineCalls` over the engine's own calls to its schedulers and ranks, and ``http`` answers `HttpServer` over its
HTTP server. Before its engine is the primary, an address that engines share must not be listened at (`front_end.gate`), and one that they do not
share answers 503 (`http.HoldMiddleware`). A process that starts several API servers and is none itself calls `front_end.main_process.take_part`.

Nothing here exits the process, but by a signal that the engine takes for the order to end.
"""
