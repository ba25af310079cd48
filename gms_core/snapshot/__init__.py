"""Snapshots: published memory on disks or in object stores, and back."""
