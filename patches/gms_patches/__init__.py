"""Patches of engines, as data, and the symbols of an engine that an adapter relies on.

A patch is the last resort, after the engine's own seams and a subclass. It names its target, the versions and signatures that it knows, and why
it exists; `gms_patches.apply` applies it once, reversibly, and fails closed; `gms_patches.check` verifies it without importing the engine.
"""
