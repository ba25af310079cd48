"""Locks in a store that several nodes share: etcd, or the API server of Kubernetes.

Such a lock belongs to whoever keeps renewing it. A process of its own beside the engine, the elector, does that: an engine may be too busy to do it
in time, or stopped, and must then be ended before anybody else can be elected, which it could not do itself. The elector outlives its engine by the
moment that it takes to see that all of its processes are gone, and gives the lock back then, so that nobody waits until it has run out.
"""
