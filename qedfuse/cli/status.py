"""`qedfuse status`."""

from __future__ import annotations

from typing import Any

import click

from qedfuse.cli.params import file_name, output_option, show_size, to_json
from qedfuse.cli.umount import find_qedfuse_mount
from qedfuse.daemon.control import Client
from qedfuse.errors import EXIT_FAILED, EXIT_OK
from qedfuse.text import printable


@click.command(epilog=f"Exit codes: {EXIT_OK} shown, {EXIT_FAILED} not a qedfuse mount, or its daemon does not answer.")
@output_option
@click.argument("mountpoint", type=file_name)
def status(output: str, mountpoint: str) -> int:
    """Show what the daemon of MOUNTPOINT is doing: its images, and how many requests it has answered."""
    with Client(find_qedfuse_mount(mountpoint)) as client:
        answer = client.ask("status")
    click.echo(to_json(answer, indent=4) if output == "json" else _describe(answer))
    return EXIT_OK


def _describe(answer: dict[str, Any]) -> str:
    requests = ", ".join(f"{count} {name}" for name, count in answer["requests"].items())
    lines = [
        f"mountpoint: {printable(answer['mountpoint'])}{' (read-only)' if answer['read-only'] else ''}",
        f"daemon: pid {answer['pid']}, fast path {'on' if answer['fastpath'] else 'off'}"
        f"{', direct I/O' if answer.get('direct-io') else ''}",
        *(f"source: {printable(source)}" for source in answer["sources"]),
        f"requests: {requests}",
    ]
    for image in answer["images"]:
        mode = "writable" if image["writable"] else "read-only"
        lines.append(f"open image: {printable(image['filename'])} ({show_size(image['virtual-size'])}, {mode})")
        if image["backing-filename"] is not None:
            lines.append(f"    backing file: {printable(image['backing-filename'])}")
        if image["error"] is not None:
            lines.append(f"    failed: {printable(image['error'])}")
    lines += [f"not opened: {printable(image['error'])}" for image in answer.get("unopened-images", ())]
    lines += [
        f"not shown: {printable(image['filename'])}, hidden by {printable(image['hidden-by'])}"
        for image in answer.get("hidden-images", ())
    ]
    return "\n".join(lines)
