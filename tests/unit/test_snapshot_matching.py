"""Which image goes where, and which processors are near a GPU: pure functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_core.errors import InvalidArgument, SnapshotMismatch
from gms_core.snapshot.manifest import Device, Image
from gms_core.snapshot.matching import check_alike, check_expected, destinations, rank
from gms_core.snapshot.numa import parse_processors, processors_near


def _image(device: str = "host", pool: str = "weights", **identity: str) -> Image:
    return Image(pool, 1, Device(device, "host" if device == "host" else "cuda", 4096), identity, "", (), b"", (), (), 4096, ())


def _where(images: list[Image], given: list[str], there: list[str], pool: str = "") -> list[tuple[str, str]]:
    return [(one.device, one.pool) for one in destinations(images, given, there, pool)]


def test_images_go_where_they_were_saved_when_those_devices_are_there() -> None:
    images = [_image("GPU-b"), _image("GPU-a")]
    assert _where(images, [], ["GPU-a", "GPU-b", "GPU-c"]) == [("GPU-b", "weights"), ("GPU-a", "weights")]


def test_images_go_to_the_devices_in_order_when_it_is_another_machine() -> None:
    images = [_image("GPU-b"), _image("GPU-a")]
    assert _where(images, [], ["GPU-x", "GPU-a", "GPU-y", "host"]) == [("GPU-x", "weights"), ("GPU-a", "weights")]
    assert _where(images, ["GPU-y", "GPU-x"], ["GPU-x", "GPU-y"]) == [("GPU-y", "weights"), ("GPU-x", "weights")]


@pytest.mark.parametrize(("given", "there"), [([], ["GPU-x", "host"]), (["GPU-x"], ["GPU-x", "GPU-y"]), (["GPU-x", "GPU-y", "GPU-z"], ["GPU-x"])])
def test_restore_is_refused_when_devices_are_too_few_or_too_many(given: list[str], there: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="the snapshot has 2 images"):
        destinations([_image("GPU-a"), _image("GPU-b")], given, there)


def test_ranks_on_host_keep_their_numbers_when_the_pool_is_renamed() -> None:
    images = [_image(), _image(pool="weights.1")]
    assert _where(images, [], ["host"]) == [("host", "weights"), ("host", "weights.1")]
    assert _where(images, ["host"], ["host"], "draft") == [("host", "draft"), ("host", "draft.1")]
    with pytest.raises(InvalidArgument, match="cannot be called after"):
        destinations([_image(), _image(pool="other")], [], ["host"], "draft")


def test_restore_is_refused_when_two_images_would_go_to_one_pool() -> None:
    with pytest.raises(InvalidArgument, match="two images would go to one pool"):
        destinations([_image("GPU-a"), _image("GPU-b")], ["GPU-x", "GPU-x"], ["GPU-x"])


def test_host_memory_goes_to_no_gpu_when_one_is_named() -> None:
    with pytest.raises(InvalidArgument, match="of host memory"):
        destinations([_image()], ["GPU-x"], ["GPU-x"])


def test_ranks_are_in_order_when_there_are_more_than_ten() -> None:
    pools = ["weights", *(f"weights.{number}" for number in range(1, 12))]
    assert sorted(sorted(pools), key=lambda pool: rank({}, pool)) == pools
    gpus = [{"tp": f"{number}/12", "pp": "0/1"} for number in range(12)]
    assert sorted(sorted(gpus, key=str), key=lambda identity: rank(identity, "weights")) == gpus


def test_pools_are_refused_when_they_are_of_two_models() -> None:
    check_alike([("a", {"content": "x", "tp": "0/2"}), ("b", {"content": "x", "tp": "1/2"})])
    with pytest.raises(SnapshotMismatch, match="differ in content: a has 'x'; b has 'y'"):
        check_alike([("a", {"content": "x"}), ("b", {"content": "y"})])


def test_image_is_refused_when_a_field_is_not_the_expected_one() -> None:
    check_expected([_image(dtype="bf16", model="a")], {"dtype": "bf16"})
    with pytest.raises(SnapshotMismatch, match="dtype: 'fp8' != 'bf16'") as caught:
        check_expected([_image(dtype="bf16")], {"dtype": "fp8"})
    assert caught.value.details == {"dtype": "'fp8' != 'bf16'"}


def _machine(folder: Path, node: str, cpus: str = "8-15,24\n") -> dict[str, Path]:
    gpus, pci = folder / "gpus", folder / "pci"
    (gpus / "0000:4E:00.0").mkdir(parents=True)
    (gpus / "0000:4E:00.0/information").write_text("Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-11-22\nBus Location: \t 0000:4e:00.0\n")
    (pci / "0000:4e:00.0").mkdir(parents=True)
    (pci / "0000:4e:00.0/numa_node").write_text(node)
    (pci / "0000:4e:00.0/local_cpulist").write_text(cpus)
    return {"gpus": gpus, "pci": pci}


def test_processors_are_those_of_the_node_when_the_kernel_tells(tmp_path: Path) -> None:
    machine = _machine(tmp_path, "1\n")
    assert processors_near("GPU-11-22", **machine) == {*range(8, 16), 24}
    assert processors_near("GPU-11-2", **machine) == frozenset()
    assert processors_near("host", **machine) == frozenset()


def test_no_processors_are_chosen_when_the_kernel_does_not_tell(tmp_path: Path) -> None:
    assert processors_near("GPU-11-22", **_machine(tmp_path, "-1\n")) == frozenset()
    assert processors_near("GPU-11-22", gpus=tmp_path / "none", pci=tmp_path) == frozenset()
    assert processors_near("GPU-11-22", gpus=tmp_path / "gpus", pci=tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("text", "found"), [("", set()), ("0\n", {0}), ("0-2,5", {0, 1, 2, 5})])
def test_list_of_processors_is_understood_when_the_kernel_has_written_it(text: str, found: set[int]) -> None:
    assert parse_processors(text) == found
