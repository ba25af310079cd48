"""Failover: one engine serves, others wait ready, and the next one takes over when the first is gone. Neutral of engines and web frameworks.

The role machine is pure (`roles`); `status` holds the engine's state for everybody who looks at it; `locks` elect, `promotion` is the way from the
lock to the service, `control` and `follower` are the connections with the servers, `http` and `notifications` tell the world.

An adapter uses the parts in this order, in the engine's first API server:

    options = failover_config(gms)                                     # configuration; None: the engine does not fail over
    lock = open_lock(options.lock)                                     # locks; early, before the process uses a GPU
    state = EngineState(engine, cohort, options.lock, address="127.0.0.1:8000")
    notifier = Notifier(state, on_promoted=options.on_promoted, webhook=options.webhook)
    gate = HoldMiddleware(app, state)                                  # http; form 503. Form port: do not listen yet
    ...                                                                # the engine starts; its ranks join, and tell their servers' sockets
    process = EngineProcess(cohort, engine, "api-server 0", sockets, deadline_s=options.deadline_s or 0)
    control = Control(process, state, lock, check=from_thread(loop, ask_all_ranks), on_found=None)   # check: only needed with a deadline
    promotion = Promotion(process, state, lock, promote, control.depart, autonomous=options.autonomous, timeout_s=options.promotion_timeout_s)
    control.start(on_promote=promotion.go, on_demote=..., on_lost=...)
    state.ready()                                                      # init becomes standby
    await promotion.run()                                              # standby, promoting, primary; if it raises, end the process
    ...                                                                # the gate opens: listen
    notifier.gate_opened()                                             # tells plugins, the command and the webhook
    ...                                                                # the engine serves, until it is stopped or demoted
    state.end("stopped")                                               # fenced: no new requests; those that run are finished
    control.depart(grace_s)                                            # the servers end what is left after that time
    notifier.close(timeout_s)                                          # the process ends, and the lock with it

``promote`` is a coroutine function that makes every rank hold and map its memory and returns a `Promoted`. ``on_demote`` and ``on_lost`` are called
in threads. A further API server of the same engine has a `Follower` in place of lock, `Control` and `Promotion`, and a state of its own:

    follower = Follower(process, state, check=...)
    follower.start(on_demote=..., on_lost=...)
    state.ready()
    await follower.follow()                                            # primary when the engine is; if it raises, end the process
    ...                                                                # the gate opens
    follower.depart(grace_s)                                           # at the end, as above

Nothing here exits the process: whoever is told that the engine is fenced ends it.
"""
