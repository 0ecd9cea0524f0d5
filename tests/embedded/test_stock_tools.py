"""Xen's own xenstore-* programs against the embedded XenStore."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from tests.support.world import running_world, store_socket
from tests.support.xenstore import printed, start_watch, tool

pytestmark = pytest.mark.skipif(
    shutil.which("xenstore-ls") is None, reason="xenstore-utils is not installed"
)


async def test_write_read_list_exists_and_rm(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        at = store_socket(world)
        await tool(at, "write", "/tool/a", "1", "/tool/b/c", "two words")
        assert await printed(at, "read", "/tool/a", "/tool/b/c") == ["1", "two words"]
        assert await printed(at, "list", "/tool") == ["a", "b"]
        assert (await tool(at, "exists", "/tool/b", check=False)).returncode == 0
        await tool(at, "rm", "/tool/b")
        assert (await tool(at, "exists", "/tool/b", check=False)).returncode == 1
        missing = await tool(at, "read", "/tool/b", check=False)
        assert missing.returncode == 1
        assert b"couldn't read" in missing.stderr


async def test_ls_shows_the_tree_with_permissions(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        await world.create_domain(2, "vtpm")
        shown = await printed(store_socket(world), "ls", "-fp", "/local/domain/2")
        lines = {line.split(" = ")[0]: line for line in shown}
        assert '"vtpm"' in lines["/local/domain/2/name"]
        assert lines["/local/domain/2/name"].endswith("(n0,r2)")
        assert lines["/local/domain/2/device"].endswith("(n2)")


async def test_chmod_is_enforced_for_each_domain(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        for domid in (2, 3):
            await world.create_domain(domid, f"d{domid}")
        await tool(store_socket(world), "write", "/shared", "x")
        for domid in (2, 3):
            denied = await tool(store_socket(world, domid), "read", "/shared", check=False)
            assert denied.returncode == 1
        await tool(store_socket(world), "chmod", "/shared", "n0", "r2", "b3")
        assert await printed(store_socket(world, 2), "read", "/shared") == ["x"]
        assert (await tool(store_socket(world, 2), "write", "/shared", "y", check=False)).returncode
        await tool(store_socket(world, 3), "write", "/shared", "z")
        assert await printed(store_socket(world), "read", "/shared") == ["z"]


async def test_a_domain_uses_paths_relative_to_its_own(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        await world.create_domain(2, "vtpm")
        await tool(store_socket(world, 2), "write", "data/key", "v")
        assert await printed(store_socket(world), "read", "/local/domain/2/data/key") == ["v"]


async def test_a_directory_of_more_than_a_message_is_listed_in_parts(tmp_path: Path) -> None:
    names = [f"{number:03d}-a-rather-long-name-for-a-node" for number in range(300)]
    assert sum(len(name) + 1 for name in names) > 2 * 4096
    async with running_world(tmp_path) as world:
        at = store_socket(world)
        await tool(at, "write", *(word for name in names for word in (f"/big/{name}", "")))
        assert await printed(at, "list", "/big") == names
        assert len(await printed(at, "ls", "/big")) == len(names)


async def test_watch_sees_changes_and_domains_come_and_go(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world, trio.open_nursery() as nursery:
        at = store_socket(world)
        seen = await start_watch(nursery, at, ["/w", "@introduceDomain", "@releaseDomain"])
        assert {await seen.line() for _ in range(3)} == {"/w", "@introduceDomain", "@releaseDomain"}
        await tool(at, "write", "/w/deep/er", "1")
        assert await seen.line() == "/w/deep/er"
        await world.create_domain(5, "five")
        assert await seen.line() == "@introduceDomain"
        await tool(at, "rm", "/w")
        assert await seen.line() == "/w"
        await world.destroy_domain(5)
        assert await seen.line() == "@releaseDomain"
        nursery.cancel_scope.cancel()


async def test_worlds_do_not_know_of_each_other(tmp_path: Path) -> None:
    async with running_world(tmp_path) as one, running_world(tmp_path) as other:
        await tool(store_socket(one), "write", "/only", "here")
        assert (await tool(store_socket(other), "exists", "/only", check=False)).returncode == 1
        await one.create_domain(7, "seven")
        assert 7 not in other.domains()
