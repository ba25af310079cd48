"""Locks of stores, as a configuration names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_core.failover.elector.address import EtcdAddress, K8sAddress, files, parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("etcd://a:2379/llama", EtcdAddress((("a", 2379),), "llama")),
        ("etcd://a:1,[::1]:2/x.y_z-1?ttl_s=5", EtcdAddress((("a", 1), ("::1", 2)), "x.y_z-1", 5.0)),
        ("etcd://a:1/x?cacert=/c&cert=/d&key=/e", EtcdAddress((("a", 1),), "x", 10.0, Path("/c"), Path("/d"), Path("/e"))),
        ("k8s:llama", K8sAddress("", "llama")),
        ("k8s:serving/llama-70b?ttl_s=15", K8sAddress("serving", "llama-70b", 15.0)),
    ],
)
def test_address_has_what_the_text_says(text, address):
    assert parse(text) == address


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("etcd:a", "must be etcd://HOST:PORT"),
        ("etcd://a/x", "'a' is not HOST:PORT"),
        ("etcd://a:0/x", "'a:0' is not HOST:PORT"),
        ("etcd://a:1,/x", "'' is not HOST:PORT"),
        ("etcd://a:1", "the lock's name"),
        ("etcd://a:1/", "the lock's name"),
        ("etcd://a:1/x/y", "the lock's name"),
        ("etcd://a:1/" + 65 * "x", "the lock's name"),
        ("etcd://a:1/x?ttl_s=2", "ttl_s must be 3 to 300 seconds"),
        ("etcd://a:1/x?ttl_s=nan", "ttl_s must be"),
        ("etcd://a:1/x?ttl_s=soon", "ttl_s must be"),
        ("etcd://a:1/x?ttl_s=5&ttl_s=6", "ttl_s is given twice"),
        ("etcd://a:1/x?ttl=5", "ttl is no option of etcd: locks"),
        ("etcd://a:1/x?cert=/d", "cert and key go together"),
        ("etcd://a:1/x?cacert=c", "cacert must be an absolute path"),
        ("k8s:", "must be k8s:"),
        ("k8s:Llama", "must be k8s:"),
        ("k8s:/llama", "must be k8s:"),
        ("k8s:a/b/c", "must be k8s:"),
        ("k8s:llama?cacert=/c", "cacert is no option of k8s: locks"),
        ("gms:x", "must be etcd:"),
    ],
)
def test_text_is_refused_with_the_reason(text, wrong):
    with pytest.raises(ValueError, match=wrong.replace("[", r"\[").replace("?", r"\?")):
        parse(text)


def test_files_are_those_that_are_named():
    assert files(parse("etcd://a:1/x?cacert=/c")) == {"cacert": Path("/c")}
    assert files(parse("k8s:x")) == {}
